"""The toy: a chain of linear neurons, one step of gradient descent (the protocol is its own)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from gammabeta._runs import Row
from gammabeta.probes import interaction
from gammabeta.probes.step import Step
from gammabeta.studies._train import stream

DEPTHS = (1, 2, 4, 8, 12, 16)
RATE = 0.05
PROMISED = 0.1
SAME_RATE, SAME_PROMISE = "the same learning rate", "the same promise"


def chain(seed: int) -> Iterator[Row]:
    """A point for each depth: error of the first-order promise, at both lengths of step."""
    generator = stream(seed, "chain")
    drawn = 1 + 0.1 * torch.randn(max(DEPTHS), generator=generator, dtype=torch.float64)
    weights = drawn.tolist()
    for depth in DEPTHS:
        slopes = sum(g * g for g in gradients(weights[:depth]))
        loss = product(weights[:depth])
        for series, rate in ((SAME_RATE, RATE), (SAME_PROMISE, PROMISED * loss / slopes)):
            error = measured(weights[:depth], rate)
            yield {"kind": "curve", "curve": "chain", "series": series, "x": depth, "y": error}


def product(values: Sequence[float]) -> float:
    found = 1.0
    for value in values:
        found *= value
    return found


def gradients(weights: Sequence[float]) -> list[float]:
    """dy/dw_k of y = w_1 ... w_L: the product of all others."""
    return [product([*weights[:k], *weights[k + 1 :]]) for k in range(len(weights))]


def measured(weights: Sequence[float], rate: float) -> float:
    """|change - promise| / |promise| of one step, by the probe of interactions."""
    layers = [nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in weights]
    for layer, weight in zip(layers, weights, strict=True):
        nn.init.constant_(layer.weight, weight)
    model = nn.Sequential(*layers)

    def forward(net: nn.Module, x: Any) -> torch.Tensor:
        y: torch.Tensor = net(x)
        return y.sum()

    step = Step(
        model,
        None,
        torch.ones(1, 1, dtype=torch.float64),
        optimizer=torch.optim.SGD(model.parameters(), lr=rate),
        forward=forward,
    )
    found = interaction.measure(step, {}, second_order=False)
    promise = float(found["first_order"])
    return abs(float(found["joint"]) - promise) / abs(promise)
