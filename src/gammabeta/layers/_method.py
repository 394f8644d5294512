"""What the methods beside batch normalization share: arguments, tracing, and a hidden eps."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from gammabeta.layers._running import RunningMoments, is_traced, traced_call
from gammabeta.ops import _torch, run
from gammabeta.ops._seen import Held


class Concealed(RunningMoments, _BatchNorm):
    """A layer with γ, β and running statistics that is more than plain batch normalization.

    It is found by tools that look for ``_BatchNorm`` to freeze it or to refresh its statistics.
    It has no attribute ``eps``: a tool that turns layers into ``SyncBatchNorm`` reads it, and
    would put plain batch normalization in its place without a word.
    """

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        device: Any,
        dtype: Any,
        bias: bool,
        backend: str,
        stored_variance: str,
        on_single: str,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self._eps = float(self.__dict__.pop("eps"))
        self._configure(backend, stored_variance, on_single)

    def __getattr__(self, name: str) -> Any:
        if name == "eps":
            raise AttributeError(
                f"{type(self).__name__} hides `eps` from tools that fold or convert a plain batch "
                "normalization: they would drop what this layer does beyond it. It stands in the "
                "layer's repr; leave the layer out where such a tool runs."
            )
        return super().__getattr__(name)


class Method(Concealed):
    """A method beside batch normalization: it overrides ``_normalize`` for a batch."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        if is_traced(input):
            return cast(Tensor, traced_call(self, input, mask=mask))
        given = self._given(input, mask)
        if not input.is_floating_point():
            raise TypeError(
                f"{self._name()}: expected a floating input, got {input.dtype}. Use x.float()."
                f"{self._details()}"
            )
        return self._normalize(input, mask, given)

    def _normalize(self, x: Tensor, mask: Tensor | None, given: Held | None) -> Tensor:
        """By the ``given`` running statistics; a method overrides it for those of a batch."""
        operands = (self.weight, self.bias, given, self._eps, None, None, mask, None)
        return run(x, *operands, self.backend)[0]

    def _refuse_group(self) -> None:
        """For a method whose statistics are those of this process's samples by definition."""
        if self._group is not None:
            raise ValueError(
                f"{self._name()}: its statistics must come from one process, got a layer whose "
                "statistics are synchronized. Use gammabeta.unsync_statistics on this layer."
                f"{self._details()}"
            )


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: that of ``x``, float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``, of one shape with it."""
    if _torch.transform_active():  # a stack of tensors has no format to ask for
        return y
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if form is not None and not x.is_contiguous() and x.is_contiguous(memory_format=form):
        return y.contiguous(memory_format=form)
    return y.contiguous()
