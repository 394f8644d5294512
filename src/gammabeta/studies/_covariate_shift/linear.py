"""The 25-layer linear network of Santurkar et al. 2018 (the protocol is the experiment's)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gammabeta._runs import Row
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.studies._covariate_shift.deep import (
    LENGTHS,
    finite,
    moments_of_training,
    one_step,
    turns,
)
from gammabeta.studies._train import stream

DEPTH, WIDTH, SAMPLES = 25, 10, 1000
# Fine enough that the path is the gradient flow's: the loss then halves at a time, not at a step.
_FINE = 1e-4


class SquaredError(nn.Module):
    """Mean over samples of the squared length of the error."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(1).mean()


def network(norm: bool, seed: int) -> nn.Sequential:
    """25 layers of 10 x 10, Glorot's normal weights; batch normalization after all but the last."""
    g = stream(seed, "linear weights")
    layers: list[nn.Module] = []
    for depth in range(1, DEPTH + 1):
        with torch.random.fork_rng(devices=()):
            layer = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.normal_(layer.weight, 0, math.sqrt(1 / WIDTH), generator=g)
        layers += [layer, BatchNorm1d(WIDTH)] if norm and depth < DEPTH else [layer]
    return nn.Sequential(*layers)


def samples(seed: int) -> tuple[Tensor, Tensor]:
    """x ~ N(0, 1) and A x for a random A, the same whatever the network."""
    g = stream(seed, "linear data")
    x = torch.randn(SAMPLES, WIDTH, generator=g)
    return x, x @ torch.randn(WIDTH, WIDTH, generator=g).T


def descend(net: nn.Module, batch: tuple[Tensor, Tensor], rate: float) -> Iterator[float]:
    """Gradient descent on the whole batch, for ever: the loss before each step."""
    loss, parameters = SquaredError(), list(net.parameters())
    while True:
        value = loss(net(batch[0]), batch[1])
        gradients = torch.autograd.grad(value, parameters)
        yield float(value.detach())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)


def halving_rate(norm: bool, seed: int, steps: int, most: int) -> tuple[float, bool]:
    """The rate at which the loss halves in so many steps, and whether it halved in the search.

    Found at a rate of 1e-4, in at most ``most`` steps, and scaled: both follow the gradient flow.
    """
    first = None
    for count, loss in enumerate(descend(network(norm, seed), samples(seed), _FINE)):
        first = loss if first is None else first
        if loss <= first / 2 or count == most:
            return _FINE * max(count, 1) / steps, loss <= first / 2
    raise AssertionError("descend() never ends")


def measure(norm: bool, seed: int, steps: int, points: int) -> Iterator[Row]:
    """What steps do to the gradients, from the start until the loss has halved."""
    rate, halved = halving_rate(norm, seed, steps, 4 * steps)
    net, batch = network(norm, seed), samples(seed)
    looks = moments_of_training(steps, points)
    for step, loss in enumerate(descend(net, batch, rate)):
        if step in looks:
            found = (
                turns(one_step(net, SquaredError(), batch, rate), LENGTHS) if finite(net) else {}
            )
            yield {"kind": "run", "step": step, "rate_found": rate, "halved": halved,
                   "loss": loss if math.isfinite(loss) else 1e6, **found}  # fmt: skip
        if step >= steps:
            return
