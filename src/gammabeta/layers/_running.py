"""What all layers share: running statistics, their dtypes, and when they are updated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from gammabeta.moments import Moments
from gammabeta.ops import batch_norm
from gammabeta.ops._activations import Act

_BUFFERS = ("running_mean", "running_var")


class RunningMoments(_NormBase):
    """Owns running_mean, running_var and num_batches_tracked, and commits batches to them.

    running ← (1 − momentum)·running + momentum·batch: ``momentum`` is the weight of the new
    value, as everywhere in PyTorch; None weights all batches equally, 1/num_batches_tracked.

    The buffers are float32 in a layer of any lower precision (float64 in a float64 layer):
    in bfloat16 a running mean stops moving once a step is below half a unit in its last
    place, in float16 a variance above 65,504 is infinite.
    """

    backend: str = "auto"
    stored_variance: Literal["unbiased", "biased"] = "unbiased"
    on_single: Literal["error", "running"] = "error"
    _dimensions: tuple[int, ...] = ()
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def _configure(self, backend: str, stored_variance: str, on_single: str) -> None:
        for name, value, choices in (
            ("stored_variance", stored_variance, ("unbiased", "biased")),
            ("on_single", on_single, ("error", "running")),
        ):
            if value not in choices:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be {choices[0]!r} or {choices[1]!r}, "
                    f"got {value!r}."
                )
        # as plain attributes only where they differ: a layer made by PyTorch's code has none
        if backend != "auto":
            self.backend = backend
        if stored_variance != "unbiased":
            self.stored_variance = "biased"
        if on_single != "error":
            self.on_single = "running"
        self._widen_buffers()

    # -- forward ------------------------------------------------------------------------

    def _forward(
        self, x: Tensor, eps: float, act: Act, residual: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        if x.dim() not in self._dimensions or x.shape[1] != self.num_features:
            self._check_input_dim(x)
            self._check_channels(x)
        held = self._held()
        given = None if self.training or held is None else Moments.given(*held)
        commit = self.training and self.track_running_stats and held is not None
        if given is None and mask is None and x.numel() == x.shape[1]:
            if self.on_single == "error" or held is None:
                raise ValueError(
                    f"{type(self).__name__}: Expected more than 1 value per channel when "
                    f"training, got input size {tuple(x.shape)}. Use a larger batch, call "
                    '.eval(), or on_single="running".'
                )
            given, commit = Moments.given(*held), False
        y, seen = batch_norm(
            x,
            self.weight,
            self.bias,
            moments=given,
            eps=eps,
            act=act,
            residual=residual,
            mask=mask,
            backend=self.backend,
        )
        if commit and held is not None:
            self._commit(seen, *held)
        return y

    def _held(self) -> tuple[Tensor, Tensor] | None:
        mean, var = self.running_mean, self.running_var
        return None if mean is None or var is None else (mean, var)

    @torch.no_grad()
    def _commit(self, seen: Moments, mean: Tensor, var: Tensor) -> None:
        """Enter one batch into the running statistics, or nothing of it.

        A statistic that is not finite would stay in the buffers for ever. The choice is made
        by tensor values, so that a device never has to answer the host.
        """
        # m2/(n − 1), which is 0/0 = NaN for a single value, so that it is skipped too
        count = seen.n if self.stored_variance == "biased" else (seen.n - 1).clamp(min=0)
        batch = torch.stack((seen.mean, seen.m2 / count)).to(mean.dtype)
        fine = torch.linalg.vector_norm(batch, torch.inf) < torch.inf  # False for NaN too
        tracked = self.num_batches_tracked
        if tracked is not None:
            tracked.add_(fine)
        if self.momentum is not None:
            weight: float | Tensor = self.momentum
        elif tracked is None:
            weight = 1.0
        else:
            weight = 1.0 / tracked.clamp(min=1).to(mean.dtype)
        for running, new in zip((mean, var), batch.unbind(), strict=True):
            running.lerp_(torch.where(fine, new, running), weight)

    # -- checks -------------------------------------------------------------------------

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() not in self._dimensions:
            wanted = " or ".join(f"{d}D" for d in self._dimensions)
            raise ValueError(
                f"{type(self).__name__}: expected {wanted} input (got {x.dim()}D input of size "
                f"{tuple(x.shape)}). Choose the layer by its dimensions: 1d for (N, C) and "
                "(N, C, L), 2d for (N, C, H, W), 3d for (N, C, D, H, W)."
            )

    def _check_channels(self, x: Tensor) -> None:
        for name in (*_BUFFERS, "weight", "bias"):
            owned = getattr(self, name)
            if owned is not None and owned.shape[0] != x.shape[1]:
                raise RuntimeError(
                    f"{type(self).__name__}: {name} should contain {x.shape[1]} elements not "
                    f"{owned.shape[0]}: the layer was made for num_features="
                    f"{self.num_features}, the input of size {tuple(x.shape)} has "
                    f"{x.shape[1]} channels on axis 1."
                )

    # -- dtypes of the buffers ----------------------------------------------------------

    def _widen_buffers(self) -> None:
        for name in _BUFFERS:
            held = self._buffers.get(name)
            if held is not None and _is_low(held):
                self._buffers[name] = held.to(torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMoments:
        before = {name: self._buffers.get(name) for name in _BUFFERS}
        # torch leaves this method without types
        apply: Callable[..., object] = super()._apply
        apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and _is_low(new):
                # from the old values: a round trip through half precision would round them
                wide = old if old.device == new.device else old.to(new.device)
                self._buffers[name] = wide.to(torch.float32)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._widen_buffers()

    # -- what a person and a tracer see -------------------------------------------------

    def extra_repr(self) -> str:
        hidden = self.__dict__.get("_eps")  # of layers that do not offer it to other tools
        shown = (
            f"{self.num_features}, eps={self.eps if hidden is None else hidden}, "
            f"momentum={self.momentum}, affine={self.affine}, bias={self.bias is not None}, "
            f"track_running_stats={self.track_running_stats}"
        )
        for name in ("backend", "stored_variance", "on_single"):
            if getattr(self, name) != getattr(RunningMoments, name):
                shown += f", {name}={getattr(self, name)!r}"
        return shown


def _is_low(t: Tensor) -> bool:
    # a lazy layer's buffers have no values to convert yet; it widens them once it has seen x
    return not is_lazy(t) and t.is_floating_point() and t.dtype.itemsize < 4


def is_traced(x: object) -> bool:
    """Whether ``x`` stands for a tensor in ``torch.fx.symbolic_trace``."""
    return isinstance(x, fx.Proxy)


def traced_call(layer: torch.nn.Module, x: Any, **operands: Any) -> Any:
    """Record one call of ``layer`` in the graph of ``torch.fx.symbolic_trace``.

    fx takes a layer whole only if it comes from ``torch.nn``; our forward looks at shapes,
    which a proxy does not have.
    """
    given = {name: value for name, value in operands.items() if value is not None}
    path = x.tracer.path_of_module(layer)
    return x.tracer.create_proxy("call_module", path, (x,), given)
