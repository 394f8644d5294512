"""Training with a learning rate that falls along a cosine, as the source has it."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gammabeta.studies._nets import MLP
from gammabeta.studies._train import batches


def cosine(rate: float, steps: int) -> list[float]:
    """The rate of each step: from ``rate`` to nearly 0 along half a cosine.

    >>> [round(r, 3) for r in cosine(1.0, 4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    return [rate * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


def fit(
    net: MLP,
    x: Tensor,
    labels: Tensor,
    *,
    rates: Sequence[float],
    batch: int,
    order: torch.Generator,
) -> Iterator[float]:
    """SGD on the mean cross-entropy of rows x, a step for each rate; gives each step's loss."""
    parameters = list(net.parameters())
    net.train()
    for rate, index in zip(rates, batches(len(x), batch, order), strict=False):
        value = cross_entropy(net(x[index]), labels[index])
        gradients = torch.autograd.grad(value, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)
        yield value.item()
