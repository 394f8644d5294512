"""How far calibrated variances depend on the split of the data, and on whose rounding.

A network of three convolutions, each with a normalization behind it, is calibrated on the same
64 images as one batch and in smaller ones down to single images. What is reported is the largest
relative change of a variance, over ten initializations and two widths.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import gammabeta as gb

SPLITS = ([64], [2, 2, 4, 8, 16, 32], [1] * 64)
SEEDS, WIDTHS, IMAGES, DEVIATION = range(10), (4, 8), 64, 0.1
# name -> mean of the images, dtype of the network, convolutions in float64 and rounded once
SETTINGS = {
    "float32": (300.0, torch.float32, False),
    "float32, the convolutions in float64 and rounded once": (300.0, torch.float32, True),
    "float64": (300.0, torch.float64, False),
    "float32, mean removed": (0.0, torch.float32, False),
}


class RoundedOnce(nn.Conv2d):
    """A convolution whose result does not depend on the batch around a sample."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.double()
        return self._conv_forward(input.double(), weight, None).to(input.dtype)


def network(seed: int, width: int, dtype: torch.dtype, exact: bool) -> nn.Sequential:
    torch.manual_seed(seed)
    convolution = RoundedOnce if exact else nn.Conv2d
    layers: list[nn.Module] = []
    for channels in (3, width, width):
        layers += [convolution(channels, width, 3, bias=False), gb.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def change(seed: int, width: int, mean: float, dtype: torch.dtype, exact: bool) -> float:
    model = network(seed, width, dtype, exact)
    x = (torch.randn(IMAGES, 3, 8, 8) * DEVIATION + mean).to(dtype)
    found = []
    for sizes in SPLITS:
        twin = copy.deepcopy(model)
        gb.calibrate(twin, x.split(sizes))
        variances = [m.running_var for m in twin if isinstance(m, gb.BatchNorm2d)]
        found.append(torch.cat(variances).double())
    return max(((other / found[0]) - 1).abs().max().item() for other in found[1:])


def measure() -> dict[str, Any]:
    results = []
    for name, (mean, dtype, exact) in SETTINGS.items():
        changes = [change(s, w, mean, dtype, exact) for s in SEEDS for w in WIDTHS]
        results.append({"arithmetic": name, "mean": mean, "largest_change": max(changes)})
    return {"what": "largest relative change of a calibrated variance", "results": results}


def show(result: dict[str, Any]) -> str:
    rows = [f"  {r['arithmetic']:56} {r['largest_change']:.1e}" for r in result["results"]]
    return "\n".join([result["what"], *rows])
