"""Statistics over the ranks of a process group: one collective forward, one backward.

What travels is O(C): a header, the count, the means and the sums of squared deviations. The
header (call number, hash of the layer's name, channels, dtype) lets ranks that meet in different
layers find out, instead of mixing their statistics.
"""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from gammabeta.moments import Moments

_HEADER = 4
# Ranks that meet with different numbers of channels must find out from a message of one size:
# gloo ends the process where sizes differ. 16 KB hold up to 1,021 channels; the rest of a longer
# message follows once the headers agree.
_FRAME = 2048
_DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.float64: 4}


class Meeting:
    """A process group, and the name under which one layer meets its twins on the other ranks.

    Shared by ``copy.deepcopy``; dropped, with a warning, by ``pickle``, which cannot carry a group.
    """

    def __init__(self, group: Any = None, label: str = "batch_norm") -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "Synchronized statistics need a process group: torch.distributed must be "
                "initialized, and is not. Call torch.distributed.init_process_group first "
                "(torchrun sets its variables), or leave the statistics local."
            )
        if dist.get_rank(group) < 0:
            raise RuntimeError(
                f"Synchronized statistics: this process must be one of the group's ranks, and is "
                f"not (layer {label!r}). Synchronize on the ranks of the group only."
            )
        self.group = group
        self.label = label
        self.calls = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Meeting:
        twin = copy.copy(self)
        memo[id(self)] = twin
        return twin

    def __copy__(self) -> Meeting:
        twin = object.__new__(Meeting)  # without a question to the group, which may be gone
        twin.group, twin.label, twin.calls = self.group, self.label, self.calls
        return twin

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        warnings.warn(
            f"{self.label!r}: a process group cannot be pickled, so the copy does not synchronize "
            "its statistics. Call gammabeta.sync_statistics on it again.",
            UserWarning,
            stacklevel=2,
        )
        return _nothing, ()

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def header(self, like: Tensor, channels: int) -> Tensor:
        """Call number, name, channels and dtype, as exact numbers in float64."""
        name = zlib.crc32(self.label.encode())
        facts = [float(self.calls), float(name), float(channels), float(_DTYPES[like.dtype])]
        return torch.tensor(facts, dtype=torch.float64, device=like.device)

    def place(self) -> str:
        rank = dist.get_rank(self.group)
        return f"layer {self.label!r}, rank {rank} of {self.size}, call {self.calls}"

    def compare(self, same: Tensor, like: Tensor) -> None:
        """Raise on every rank, naming all layers, unless all ranks are in the same call."""
        if bool(same):
            return
        own = f"{self.place()} with {like.shape[1]} channels in {like.dtype}"
        places: list[Any] = [None] * self.size
        dist.all_gather_object(places, own, group=self.group)
        raise RuntimeError(
            "Synchronized statistics: all ranks must call the same layers in the same order, with "
            f"the same channels and dtype, got {'; '.join(map(str, places))}. Look for a layer "
            "that only some of them call; then gammabeta.sync_statistics(model) on every rank "
            "starts to count anew."
        )

    def failed(self, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"Synchronized statistics: the other ranks did not come to {self.place()}. All ranks "
            f"must call the same layers in the same order; gammabeta.sync_statistics(model) on "
            f"every rank starts to count anew. ({type(error).__name__}: {error})"
        )


def _nothing() -> None:
    return None


def meet(group: Any) -> Meeting:
    """``group`` as a layer gives it, or a plain process group."""
    return group if isinstance(group, Meeting) else Meeting(group)


def merged(local: Moments, x: Tensor, meeting: Meeting) -> Moments:
    """The moments of all ranks' data: one all-gather, differentiable any number of times."""
    channels = x.shape[1]
    count = local.n if local.n.dim() == 0 else local.n[0]
    head = meeting.header(x, channels)
    packed = torch.cat((head, count.reshape(1), local.mean, local.m2))
    everyone = _framed(packed, meeting, _gather)
    meeting.compare((everyone[:, :_HEADER] == head).all(), x)
    if len(packed) > _FRAME:
        everyone = torch.cat((everyone, _gather(packed[_FRAME:], meeting)), 1)
    n = everyone[:, _HEADER : _HEADER + 1]
    means, m2s = everyone[:, _HEADER + 1 : len(packed)].chunk(2, dim=1)
    total = n.sum()
    mean = (n * means).sum(0) / total.clamp(min=1)
    spread = means - mean
    return Moments(total, mean, m2s.sum(0) + (n * spread * spread).sum(0))


def summed(sums: tuple[Tensor, Tensor], x: Tensor, meeting: Meeting) -> tuple[Tensor, Tensor]:
    """Two sums per channel over all ranks: one all-reduce, differentiable any number of times.

    Sums of headers are R times one's own on every rank, unless headers differ.
    """
    head = meeting.header(x, x.shape[1])
    packed = torch.cat((head, *(s.to(torch.float64) for s in sums)))
    total = _framed(packed, meeting, _all_sum)
    meeting.compare((total[:_HEADER] == head * meeting.size).all(), x)
    if len(packed) > _FRAME:
        total = torch.cat((total, _all_sum(packed[_FRAME:], meeting)))
    first, second = total[_HEADER : len(packed)].chunk(2)
    return first, second


def _framed(
    packed: Tensor, meeting: Meeting, collective: Callable[[Tensor, Meeting], Tensor]
) -> Tensor:
    """The first collective, of a message of one size on all ranks."""
    first = packed[:_FRAME]
    return collective(F.pad(first, (0, _FRAME - len(first))), meeting)


def _gather(t: Tensor, meeting: Meeting) -> Tensor:
    apply: Callable[..., Tensor] = _Gather.apply  # torch leaves it without types
    return apply(t, meeting)


def _all_sum(t: Tensor, meeting: Meeting) -> Tensor:
    apply: Callable[..., Tensor] = _AllSum.apply
    return apply(t, meeting)


class _Gather(torch.autograd.Function):
    """Stack the tensors of all ranks, (R, …)."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, meeting: Meeting) -> Tensor:
        ctx.meeting = meeting
        parts = [torch.empty_like(t) for _ in range(meeting.size)]
        try:
            dist.all_gather(parts, t.contiguous(), group=meeting.group)
        except RuntimeError as error:
            raise meeting.failed(error) from error
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total = _all_sum(grads[0], ctx.meeting)
        return total[dist.get_rank(ctx.meeting.group)], None


class _AllSum(torch.autograd.Function):
    """Sum the tensors of all ranks."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, meeting: Meeting) -> Tensor:
        ctx.meeting = meeting
        total = t.clone(memory_format=torch.contiguous_format)
        try:
            dist.all_reduce(total, group=meeting.group)
        except RuntimeError as error:
            raise meeting.failed(error) from error
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _all_sum(grads[0], ctx.meeting), None
