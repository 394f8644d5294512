"""What the scripts of this folder share: images, intervals, and how a result is told.

Each script writes one protocol of the registry again, with PyTorch's own layers and nothing of
gammabeta, and prints a line of JSON for each number: claim, cell, mean and 95 % interval over
draws, and the null that tells the direction. Alone: `python tests/independent/rank_collapse.py`;
those that need images take the folder that holds mnist/ as their argument, some others `quick`,
which makes fewer draws or leaves out the largest networks.
"""

import gzip
import json
import math
import statistics
import sys
from pathlib import Path

import torch

QUICK = "quick" in sys.argv[1:]
# Student's t, 97.5 %, by degrees of freedom
T = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.306}
T |= {9: 2.2622, 10: 2.2281, 11: 2.201, 12: 2.1788, 13: 2.1604, 14: 2.1448, 15: 2.1314}


def tell(claim, cell, values, null=0.0):
    """Print the mean of one number per draw with its t interval."""
    mean, n = statistics.fmean(values), len(values)
    half = T[n - 1] * statistics.stdev(values) / math.sqrt(n)
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
