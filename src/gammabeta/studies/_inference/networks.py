"""The dense and the convolutional network that the experiment trains."""

import itertools
import math

import torch
from torch import nn

from gammabeta.layers.batch_norm import BatchNorm2d
from gammabeta.studies._nets import MLP, m2
from gammabeta.studies._train import stream

GROUPS = {"dense": ("bn", "eval"), "convolutional": ("bn",)}


class Convolutional(MLP):
    """Two convolutions with stride 2, each with BN and ReLU, and a dense layer; takes rows.

    Convolutions of 5x5 (3x3 where the images are smaller than 13x13) with 8 and 16 channels.
    """

    def __init__(self, side: int, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        kernel, channels = 5 if side >= 13 else 3, (1, 8, 16)
        layers: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
        # PyTorch's own initialization would draw from the global random state.
        with torch.random.fork_rng(devices=()):
            for fan, out in itertools.pairwise(channels):
                layers += [nn.Conv2d(fan, out, kernel, stride=2, bias=False), BatchNorm2d(out)]
                layers.append(nn.ReLU())
                side = (side - kernel) // 2 + 1
            last = nn.Linear(channels[-1] * side**2, 10)
        self.layers = nn.Sequential(*layers, nn.Flatten(), last)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                std = math.sqrt(2 / layer.weight[0].numel())
                nn.init.trunc_normal_(
                    layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator
                )
        nn.init.constant_(last.bias, 0.1)


def built(pixels: int, group: str, seed: int) -> MLP:
    """The network of a group, before training."""
    generator = stream(seed, "weights")
    if group == "convolutional":
        return Convolutional(math.isqrt(pixels), generator)
    return m2(pixels, "relu", True, generator)
