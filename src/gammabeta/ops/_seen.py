"""Statistics in the form in which a backend or a layer has them at hand.

Each turns into ``Moments`` when somebody asks: the way through float64 tensors costs as much time
as normalizing a small batch.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gammabeta.moments import Moments


class Held(NamedTuple):
    """A layer's running statistics, to normalize with."""

    mean: Tensor
    var: Tensor

    def moments(self) -> Moments:
        return Moments.given(self.mean, self.var)


class Batch(NamedTuple):
    """A batch's statistics as PyTorch's op reports them."""

    both: Tensor  # (2, C): mean and unbiased variance
    values: int  # per channel

    def moments(self) -> Moments:
        n = torch.full((), self.values, dtype=torch.float64, device=self.both.device)
        mean, var = self.both.to(torch.float64).unbind()
        return Moments(n, mean, var * (self.values - 1))


class Kept(NamedTuple):
    """A batch's statistics as the CPU kernels leave them."""

    stats: Tensor  # float64: C means, C sums of squared deviations; more behind them
    channels: int
    values: float  # per channel
    masked: bool

    def moments(self) -> Moments:
        n = torch.full((), self.values, dtype=torch.float64)
        c = self.channels
        return Moments(n.expand(c) if self.masked else n, self.stats[:c], self.stats[c : 2 * c])


Seen: TypeAlias = Moments | Held | Batch | Kept


def as_moments(seen: Seen) -> Moments:
    """The moments of what was seen."""
    return seen if isinstance(seen, Moments) else seen.moments()
