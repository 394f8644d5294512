"""Moments: the mergeable statistics of a batch, the noun that all parts share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def over(values: Tensor, x: Tensor) -> Tensor:
    """Shape per-channel ``values`` (C,) so that they broadcast over ``x`` (N, C, ...)."""
    return values.reshape((1, -1) + (1,) * (x.dim() - 2))


def reduced(x: Tensor) -> list[int]:
    """The axes that batch normalization reduces: all but the channels, axis 1."""
    return [0, *range(2, x.dim())]


def spread_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Give ``mask`` the missing channel axis: (N, ...) becomes (N, 1, ...)."""
    shape = (x.shape[0], *x.shape[2:])
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"mask: expected a bool tensor, True = valid, got {came}. Compare first, for example "
            "lengths[:, None] > torch.arange(L)."
        )
    try:
        full = torch.broadcast_to(mask, shape)
    except RuntimeError:
        channel = mask.dim() == x.dim() and mask.shape[1] == 1
        cure = "drop it with mask.squeeze(1)" if channel else "see its shape above"
        raise ValueError(
            f"mask: expected a shape that broadcasts to the input without its channel axis, "
            f"{tuple(shape)}, got {tuple(mask.shape)}. A mask has no channel axis: {cure}."
        ) from None
    return full.unsqueeze(1)


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of a batch, per channel.

    n, mean = (1/n) Σ x and m2 = Σ (x − mean)², over all axes but axis 1 (the channels): over
    the samples for (N, C), over samples and positions for (N, C, ...).

    Attributes:
        n: float64, () or, under a mask, (C,). How many values each channel has.
        mean: float64, (C,). In units of x.
        m2: float64, (C,). In units of x².

    The tensors are always detached: no gradient flows through a ``Moments``. Two of them merge
    into those of the whole, whatever the split was, so that the statistics of small batches, of
    masked batches and of several devices can be pooled without their data.

    >>> import torch, gammabeta as gb
    >>> x = torch.tensor([[1.0], [2.0], [6.0]])
    >>> whole = gb.Moments.of(x)
    >>> whole.mean.item(), whole.var().item(), whole.unbiased().item()
    (3.0, 4.666666666666667, 7.0)
    >>> parts = gb.Moments.of(x[:1]).merge(gb.Moments.of(x[1:]))
    >>> parts.mean.item(), parts.m2.item()
    (3.0, 14.0)

    Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance",
    The American Statistician 37(3), eq. 2.1.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> Moments:
        """Take the moments of ``x`` in float64.

        Args:
            x: (N, C) or (N, C, ...), any floating dtype.
            mask: bool, True = valid, broadcastable to x without its channel axis.

        Returns:
            Moments of the valid values. A channel without values has n = 0, mean = 0, m2 = 0,
            the neutral element of :meth:`merge`.

        Raises:
            TypeError: x is not floating, or mask is not bool.
            ValueError: x has fewer than two axes, or mask does not broadcast.
        """
        if not x.is_floating_point():
            raise TypeError(f"Moments: expected a floating tensor, got {x.dtype}. Use x.float().")
        if x.dim() < 2:
            raise ValueError(
                f"Moments: expected (N, C) or (N, C, ...) with channels on axis 1, got "
                f"{tuple(x.shape)}. Add the missing axis with unsqueeze."
            )
        x = x.detach()
        valid = None if mask is None else spread_mask(mask, x)
        return statistics(x, valid)

    @classmethod
    def given(cls, mean: Tensor, var: Tensor) -> Moments:
        """Wrap a known mean and (biased or population) variance, to normalize with them.

        n is 1, so that ``var()`` returns the given variance; such moments carry no count of
        observations and are not for merging.

        >>> import torch, gammabeta as gb
        >>> gb.Moments.given(torch.tensor([1.0]), torch.tensor([4.0])).var()
        tensor([4.], dtype=torch.float64)
        """
        if mean.shape != var.shape or mean.dim() != 1:
            raise ValueError(
                f"Moments.given: expected a mean and a variance of one shape (C,), got "
                f"{tuple(mean.shape)} and {tuple(var.shape)}. Flatten them to one value a channel."
            )
        one = torch.ones((), dtype=torch.float64, device=mean.device)
        # copies: what a backward pass keeps must not change when a buffer is written to
        mean = mean.detach().to(torch.float64, copy=True)
        return cls(one, mean, var.detach().to(torch.float64, copy=True))

    def merge(self, other: Moments) -> Moments:
        """Pool with the moments of other data, as if both had been one batch.

        n = n₁ + n₂, mean = mean₁ + δ n₂/n, m2 = m2₁ + m2₂ + δ² n₁n₂/n, δ = mean₂ − mean₁.
        Agrees with the moments of the whole to 1e-12 relative for any split and order while
        |mean| is at most 10⁴ standard deviations; beyond, the rounding of the means to float64
        grows in proportion (2e-12 at 10⁵, 2e-11 at 10⁶).

        Raises:
            ValueError: the two have different numbers of channels.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"Moments.merge: expected moments of equally many channels, got "
                f"{tuple(self.mean.shape)} and {tuple(other.mean.shape)}."
            )
        n = self.n + other.n
        # An empty part has mean 0 and weight 0; two empty parts must not divide 0 by 0.
        share = other.n / n.clamp(min=1)
        delta = other.mean - self.mean
        mean = self.mean + delta * share
        return Moments(n, mean, self.m2 + other.m2 + delta * delta * (self.n * share))

    def var(self) -> Tensor:
        """Biased variance m2/n, (C,), float64: what normalizes the batch."""
        return self.m2 / self.n

    def unbiased(self) -> Tensor:
        """Unbiased variance m2/(n − 1), (C,), float64; NaN where n ≤ 1."""
        freedom = self.n - 1
        return self.m2 / torch.where(freedom > 0, freedom, torch.nan)


def statistics(x: Tensor, valid: Tensor | None) -> Moments:
    """Moments of ``x`` by a corrected two-pass sum in float64, with gradients kept.

    ``valid`` is None or a bool tensor with a channel axis of size 1 (:func:`spread_mask`).
    The mean is taken twice, the second time of the deviations from the first: a constant
    channel then has exactly its constant as mean and m2 = 0, in every dtype.
    """
    x = x.to(torch.float64)
    axes = reduced(x)
    channels = x.shape[1]
    if valid is None:
        # n without .item() and as a plain fill: it stays symbolic under tracing
        count = x.shape[0]
        for size in x.shape[2:]:
            count = count * size
        n = torch.full((), count, dtype=torch.float64, device=x.device)
    else:
        x = torch.where(valid, x, 0.0)
        n = valid.sum(dtype=torch.float64).expand(channels)
    divisor = n.clamp(min=1)
    first = x.detach().sum(axes) / divisor
    centered = _center(x, first, valid)
    mean = first + centered.sum(axes) / divisor
    deviation = _center(x, mean, valid)
    return Moments(n, mean, (deviation * deviation).sum(axes))


def _center(x: Tensor, mean: Tensor, valid: Tensor | None) -> Tensor:
    centered = x - over(mean, x)
    return centered if valid is None else torch.where(valid, centered, 0.0)
