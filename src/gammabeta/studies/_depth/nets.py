"""Dense networks of several depths on standardized images (the protocol is the experiment's)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gammabeta.studies._nets import MLP
from gammabeta.studies._train import stream


class Network(NamedTuple):
    """Hidden layers of 100 units.

    std: of Gaussian weights; None: a truncated normal distribution with sqrt(2 / fan-in).
    """

    depth: int
    activation: str = "relu"
    std: float | None = None


class Standardized(nn.Module):
    """(x - mean) / standard deviation, one number each for all pixels of the training images."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        std, mean = torch.std_mean(x)
        self.mean, self.std = float(mean), float(std)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def network(x: Tensor, of: Network, arm: str, seed: int) -> MLP:
    """The network of an arm: "bn" (before each activation), "none" or "selu".

    Args:
        x: the training images, rows of pixels in [0, 1].
    """
    generator = stream(seed, "weights")
    sizes = (x.shape[1], *[100] * of.depth, 10)
    net = MLP(sizes, of.activation, arm == "bn", generator)
    if arm == "selu":
        layers = (nn.SELU() if isinstance(m, nn.ReLU) else m for m in net.layers)
        net.layers = nn.Sequential(*layers)
    for layer in net.layers:
        if not isinstance(layer, nn.Linear):
            continue
        if arm == "selu":
            std = 1 / math.sqrt(layer.in_features)
            nn.init.normal_(layer.weight, std=std, generator=generator)
            nn.init.zeros_(layer.bias)
        elif of.std is not None:
            nn.init.normal_(layer.weight, std=of.std, generator=generator)
    net.layers = nn.Sequential(Standardized(x), *net.layers)
    return net
