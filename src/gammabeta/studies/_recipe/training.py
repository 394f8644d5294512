"""Training by a recipe: dropout, weight decay, a rate that halves (the protocol is elsewhere)."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta.layers.batch_norm import BatchNorm2d
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import batches, pixels, stream


class Recipe(NamedTuple):
    """How an arm is trained; the rate is a multiple of the best one of its group's reference."""

    bn: bool
    factor: float = 1.0
    activation: str = "relu"
    dropout: float = 0.0
    decay: float = 0.0  # of all weight matrices
    halvings: float = 0.0  # of the rate, over the whole training
    convolutional: bool = False


class Dropped(nn.Module):
    """Dropout with random numbers of its own; nothing in eval mode."""

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__()
        self.p, self.generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(x.shape, generator=self.generator) >= self.p
        return x * kept / (1 - self.p)


class Convolutional(MLP):
    """Two convolutions with stride 2 and a dense layer; takes rows of pixels, as ``MLP`` does."""

    def __init__(self, side: int, bn: bool, generator: torch.Generator, width: float) -> None:
        nn.Module.__init__(self)
        kernel = 5 if side >= 13 else 3
        channels = (1, round(8 * width), round(16 * width))
        layers: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
        # PyTorch's own initialization would draw from the global random state.
        with torch.random.fork_rng(devices=()):
            for fan, out in itertools.pairwise(channels):
                layers.append(nn.Conv2d(fan, out, kernel, stride=2, bias=not bn))
                layers += [BatchNorm2d(out), nn.ReLU()] if bn else [nn.ReLU()]
                side = (side - kernel) // 2 + 1
            last = nn.Linear(channels[-1] * side**2, 10)
        self.layers = nn.Sequential(*layers, nn.Flatten(), last)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                std = math.sqrt(2 / layer.weight[0].numel())
                nn.init.trunc_normal_(
                    layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator
                )
                if layer.bias is not None:
                    nn.init.constant_(layer.bias, 0.1)


def network(count: int, recipe: Recipe, seed: int, width: float = 1.0) -> MLP:
    """The network of an arm; dropout stands before the last layer."""
    if recipe.convolutional:
        return Convolutional(math.isqrt(count), recipe.bn, stream(seed, "weights"), width)
    units = round(100 * width)
    net = MLP((count, units, units, 10), recipe.activation, recipe.bn, stream(seed, "weights"))
    if recipe.dropout:
        net.layers.insert(len(net.layers) - 1, Dropped(recipe.dropout, stream(seed, "dropout")))
    return net


def trainings(
    net: MLP,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    *,
    pixel_max: int,
    rate: float,
    steps: int,
    seed: int,
    stops: Sequence[int],
) -> Iterator[tuple[int, float]]:
    """SGD with weight decay and a rate that halves; yields step and loss at the stops."""
    parameters = list(net.parameters())
    flat, order = x.flatten(1), batches(len(x), 64, stream(seed, "order"))
    net.train()
    for step, index in zip(range(1, steps + 1), order, strict=False):
        now = rate * 0.5 ** (recipe.halvings * (step - 1) / steps)
        loss = cross_entropy(net(pixels(flat[index], pixel_max)), y[index])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if recipe.decay and parameter.dim() > 1:
                    parameter.mul_(1 - now * recipe.decay)
                parameter.sub_(gradient, alpha=now)
        if step in stops:
            yield step, loss.item()
