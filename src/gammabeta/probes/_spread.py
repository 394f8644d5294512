"""Whether batches are draws from one population, or fall into groups whose statistics differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gammabeta.models._population import Call, tensors
from gammabeta.moments import Moments, over

_SURE = 5.0  # standard deviations of chance
_NOISE = 16  # values: what chance makes of the statistics of so many is what groups must exceed


class Apart(NamedTuple):
    """How far batches are apart in one layer beyond chance, root mean square over channels.

    Attributes:
        mean: standard deviation of the means of batches, by that of values within a batch.
        var: standard deviation of their variances, by the mean variance.
    """

    mean: float
    var: float


class Spread:
    """One-way analysis of variance of what enters each layer, batches being the groups.

    Observed are samples, which are independent: the mean over a sample's positions, and the mean
    of its squares. To be taken in eval mode, where no sample depends on another one.
    """

    def __init__(self) -> None:
        self._centers: dict[str, Tensor] = {}
        # of each batch: moments of the means and of the squares of its samples, variance of values
        self._seen: dict[str, list[tuple[Moments, Moments, Tensor]]] = {}

    def of(self, batch: Any) -> Callable[[Call, Tensor, Tensor | None], None]:
        """What is to be called with the input of each layer."""
        sizes = {len(t) for t in tensors(batch) if t.dim()}

        def enter(call: Call, x: Tensor, mask: Tensor | None) -> None:
            name, number = call
            # rows that are no samples may depend on each other
            if number or mask is not None or {len(x)} != sizes:
                return
            x = x.detach().double()
            whole = Moments.of(x)
            center = self._centers.setdefault(name, whole.mean)
            parts = (x - over(center, x)).reshape(*x.shape[:2], -1)
            held = self._seen.setdefault(name, [])
            means, squares = Moments.of(parts.mean(2)), Moments.of(parts.square().mean(2))
            held.append((means, squares, whole.var()))

        return enter

    def groups(self) -> dict[str, Apart]:
        """Layers where batches are apart."""
        found = {}
        for name, held in self._seen.items():
            if len(held) < 2:
                continue
            means, squares, variances = zip(*held, strict=True)
            var = torch.stack(variances).mean(0)
            live = var > 0
            if not live.any():
                continue
            (mean_z, mean), (square_z, square) = between(means, live), between(squares, live)
            apart = Apart(
                math.sqrt(float((mean / var[live]).mean())),
                math.sqrt(float((square / var[live].square()).mean())),
            )
            far = (mean_z > _SURE and apart.mean > math.sqrt(1 / _NOISE)) or (
                square_z > _SURE and apart.var > math.sqrt(2 / _NOISE)
            )
            if far:
                found[name] = apart
        return found


def between(batches: Sequence[Moments], live: Tensor) -> tuple[float, Tensor]:
    """How many standard deviations of chance batches are apart, and the variance between them.

    F = variance between / variance within, mean over channels, which may all be one; its standard
    deviations by Paulson's approximation. The variance is per channel, without what chance makes.
    """
    n = torch.stack([moments.n for moments in batches])[:, None]
    mean = torch.stack([moments.mean for moments in batches])[:, live]
    inside = torch.stack([moments.m2 for moments in batches])[:, live].sum(0)
    total = float(n.sum())
    free, rest = len(batches) - 1, total - len(batches)
    if rest < 3:
        return 0.0, torch.zeros_like(inside)
    outside = (n * (mean - (n * mean).sum(0) / total).square()).sum(0) / free
    inside = inside / rest
    f = float((outside / inside.clamp_min(1e-300)).clamp_max(1e6).mean()) ** (1 / 3)
    a, b = 2 / (9 * free), 2 / (9 * rest)
    size = (total - float(n.square().sum()) / total) / free
    z = ((1 - b) * f - (1 - a)) / math.sqrt(b * f * f + a)
    return z, (outside - inside).clamp_min(0) / size
