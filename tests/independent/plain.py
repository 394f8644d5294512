"""What the scripts of this folder share: images, intervals, and how a result is told.

Each script writes one protocol of the registry again, with PyTorch's own layers and nothing of
gammabeta, and prints a line of JSON for each number: claim, cell, mean and 95 % interval over
draws, and the null that tells the direction. Alone: `python tests/independent/rank_collapse.py`;
those that need images take the folder that holds mnist/ as their argument.
"""

import gzip
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from scipy.stats import t


def tell(claim, cell, values, null=0.0):
    """Print the mean of one number per draw with its t interval."""
    mean, n = statistics.fmean(values), len(values)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    result = {"claim": claim, "cell": cell, "mean": mean, "lo": mean - half, "hi": mean + half}
    print(json.dumps({**result, "n": n, "null": null}), flush=True)


def mnist(part="train"):
    """Images as rows in [0, 1], and labels, read from the files of the folder in sys.argv[1]."""
    folder = Path(sys.argv[1]) / "mnist"
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    x = torch.frombuffer(bytearray(images), dtype=torch.uint8).view(-1, 784).float() / 255
    return x, torch.frombuffer(bytearray(labels), dtype=torch.uint8).long()


def slope(x, y):
    """Of the least-squares line."""
    return statistics.linear_regression(list(x), list(y)).slope
