"""Ghost batch normalization: statistics of small parts of a large batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gammabeta.layers._method import Method, in_format_of
from gammabeta.moments import Moments, spread_mask
from gammabeta.ops import batch_norm
from gammabeta.ops._seen import Held

# Ghosts of up to this many numbers are normalized in one call, which costs copies of them; larger
# ones each in a call of its own, which costs some tenths of a millisecond (measured on a CPU).
_SMALL = 2**18


class _Ghost(Method):
    """Every ``virtual_batch_size`` samples are normalized by their own statistics."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        virtual_batch_size: int,
        bias: bool = True,
        backend: str = "auto",
        stored_variance: str = "unbiased",
        on_single: str = "error",
    ) -> None:
        if not isinstance(virtual_batch_size, int) or virtual_batch_size < 1:
            raise ValueError(
                f"{type(self).__name__}: virtual_batch_size must be a whole number of samples, at "
                f"least 1, got {virtual_batch_size!r}. Usual are 16 to 256."
            )
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias,
            backend,
            stored_variance,
            on_single,
        )
        self.virtual_batch_size = virtual_batch_size

    def _normalize(self, x: Tensor, mask: Tensor | None, given: Held | None) -> Tensor:
        if given is not None:
            return super()._normalize(x, mask, given)
        self._refuse_group()
        size = self.virtual_batch_size
        if x.shape[0] <= size:
            parts = [self._ghosts(x, x.shape[0], mask)]
        elif mask is None and x[:size].numel() <= _SMALL:
            whole = x.shape[0] - x.shape[0] % size
            parts = [self._ghosts(x[:whole], size, None)]
            if whole < x.shape[0]:
                parts.append(self._ghosts(x[whole:], x.shape[0] - whole, None))
        else:
            pieces = torch.split(x, size)
            valid: Sequence[Tensor | None] = [None] * len(pieces)
            if mask is not None:  # without a channel axis, so that ghosts cannot become channels
                valid = torch.split(spread_mask(mask, x).squeeze(1), size)
            pairs = zip(pieces, valid, strict=True)
            parts = [self._ghosts(piece, piece.shape[0], part) for piece, part in pairs]
        seen = parts[0][1]
        for _, other in parts[1:]:
            seen = seen.merge(other)
        self._offer(x, seen)
        return parts[0][0] if len(parts) == 1 else torch.cat([y for y, _ in parts])

    def _ghosts(self, x: Tensor, size: int, mask: Tensor | None) -> tuple[Tensor, Moments]:
        """Normalize ghosts of ``size`` samples each; the moments of all samples together."""
        call: dict[str, Any] = {"eps": self._eps, "backend": self.backend}
        channels = x.shape[1]
        single = mask is None and x.shape[0] > 0 and x[:size].numel() == channels
        if single:
            held = self._held()
            if held is None or self.on_single != "running":
                raise ValueError(
                    f"{self._name()}: Expected more than 1 value per channel in every ghost when "
                    f"training, got a ghost of size {tuple(x[:size].shape)}. Choose a batch whose "
                    f"size is a multiple of virtual_batch_size={self.virtual_batch_size} or leaves "
                    f'more than one sample, call .eval(), or on_single="running".'
                    f"{self._details()}"
                )
            y, _ = batch_norm(x, self.weight, self.bias, moments=Moments.given(*held), **call)
            return y, Moments.of(x)
        if x.shape[0] == size:
            return batch_norm(x, self.weight, self.bias, mask=mask, **call)
        # one call for all ghosts: each channel of each ghost becomes a channel of its own
        ghosts, rest = x.shape[0] // size, x.shape[2:]
        folded = x.reshape(ghosts, size, channels, *rest).transpose(0, 1)
        folded = folded.reshape(size, ghosts * channels, *rest)
        weight = None if self.weight is None else self.weight.repeat(ghosts)
        bias = None if self.bias is None else self.bias.repeat(ghosts)
        y, each = batch_norm(folded, weight, bias, **call)
        y = y.reshape(size, ghosts, channels, *rest).transpose(0, 1).reshape(x.shape)
        return in_format_of(x, y), _pooled(each, ghosts)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"


def _pooled(each: Moments, ghosts: int) -> Moments:
    """The moments of ``ghosts`` parts of one size as one: the merge of all at once."""
    means, m2s = each.mean.view(ghosts, -1), each.m2.view(ghosts, -1)
    mean = means.mean(0)
    return Moments(each.n * ghosts, mean, (m2s + each.n * (means - mean).square()).sum(0))


class GhostBatchNorm1d(_Ghost):
    """Ghost batch normalization over (N, C) or (N, C, L).

    In training the batch is cut, in its order, into ghosts of ``virtual_batch_size`` samples, the
    last of which may be smaller. Each ghost g is normalized by its own statistics,

        y = γ·(x − mean_g)/√(var_g + eps) + β,

    per channel, over its samples and, with a length, all positions, with the biased variance. The
    running statistics get one batch per forward: the exactly merged mean and variance of all
    samples, as if there were no ghosts. In eval mode they normalize, without ghosts. A batch that
    is no larger than a ghost gives plain batch normalization.

    Args:
        num_features: C.
        eps: added to the variance, in units of x²; > 0.
        momentum: weight of the new value in the running statistics; None weights all batches
            equally.
        affine: whether there are γ (``weight``) and, with ``bias``, β (``bias``), both (C,).
        track_running_stats: without, ghosts normalize in eval mode too.
        device, dtype: of the parameters. The buffers are float32 in any lower dtype.
        virtual_batch_size: samples per ghost, ≥ 1.
        bias: whether there is β.
        backend: see :func:`gammabeta.batch_norm`.
        stored_variance: "unbiased", as in PyTorch, or "biased"; the count is that of the batch.
        on_single: what to do in training with a ghost of one value per channel: raise an "error",
            or normalize it by the "running" statistics; its value enters the merged statistics.

    Shape: input (N, C) or (N, C, L); output the same. ``mask`` in ``forward`` is bool,
    True = valid, broadcastable to (N,) or (N, L); y = 0 elsewhere. Small ghosts are
    normalized all at once; large ones, and any with a mask, one after the other.

    Raises:
        TypeError: the input is not floating.
        ValueError: virtual_batch_size is not a positive whole number; wrong number of dimensions;
            a ghost of one value per channel in training; statistics shared between processes.
        RuntimeError: wrong number of channels.

    >>> import torch, gammabeta as gb
    >>> layer = gb.GhostBatchNorm1d(1, virtual_batch_size=2, momentum=1.0)
    >>> x = torch.tensor([[0.0], [2.0], [10.0], [14.0]])
    >>> [round(v, 3) for v in layer(x).flatten().tolist()]
    [-1.0, 1.0, -1.0, 1.0]
    >>> layer.running_mean.item(), round(layer.running_var.item(), 4)
    (6.5, 43.6667)

    Source: Hoffer, Hubara & Soudry 2017, Algorithm 1, arXiv:1705.08741.
    Differs from the paper: there every ghost enters the running statistics in turn, with weight
    momentum, and the running variance is the mean within ghosts; here the batch enters once, with
    the variance between ghosts, which is what inference meets.
    """

    _dimensions = (2, 3)


class GhostBatchNorm2d(_Ghost):
    """Ghost batch normalization over (N, C, H, W).

    One mean and one variance per ghost and channel, over its samples and all positions. Formulas,
    arguments and errors are those of :class:`GhostBatchNorm1d`; a mask broadcasts to (N, H, W).

    >>> import torch, gammabeta as gb
    >>> layer = gb.GhostBatchNorm2d(1, virtual_batch_size=1)    # each image by itself
    >>> x = torch.tensor([0.0, 2.0, 10.0, 14.0]).view(2, 1, 1, 2)
    >>> [round(v, 3) for v in layer(x).flatten().tolist()]
    [-1.0, 1.0, -1.0, 1.0]

    Source: Hoffer, Hubara & Soudry 2017, Algorithm 1, arXiv:1705.08741.
    """

    _dimensions = (4,)


class GhostBatchNorm3d(_Ghost):
    """Ghost batch normalization over (N, C, D, H, W).

    One mean and one variance per ghost and channel, over its samples and all positions. Formulas,
    arguments and errors are those of :class:`GhostBatchNorm1d`; a mask broadcasts to (N, D, H, W).

    >>> import torch, gammabeta as gb
    >>> layer = gb.GhostBatchNorm3d(2, virtual_batch_size=4)
    >>> layer(torch.zeros(6, 2, 2, 2, 2)).abs().max().item(), layer.num_batches_tracked.item()
    (0.0, 1)

    Source: Hoffer, Hubara & Soudry 2017, Algorithm 1, arXiv:1705.08741.
    """

    _dimensions = (5,)
