"""What all layers share: running statistics, their dtypes, and when they are updated."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from gammabeta.ops import _torch, as_moments, check_backend, enter, run
from gammabeta.ops._activations import Act
from gammabeta.ops._seen import Batch, Held, Kept, Seen


class StatisticsWarning(UserWarning):
    """Running statistics are not what they seem; each layer warns once.

    >>> import torch, warnings, gammabeta as gb
    >>> layer = gb.BatchNorm1d(1)
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     _ = layer(torch.tensor([[float("nan")], [1.0]]))
    >>> caught[0].category.__name__, layer.running_mean
    ('StatisticsWarning', tensor([0.]))
    """


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
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    _dimensions: tuple[int, ...] = ()
    _buffer_names: tuple[str, ...] = ("running_mean", "running_var")
    # Set by the functions of gammabeta.models; here as defaults, so that a layer that was made
    # by PyTorch's code and only changed its class has them too.
    _label: str = ""  # qualified name in the model, for messages
    _group: Any = None  # process group to share a batch's statistics with
    _frozen: bool = False  # normalize by the running statistics, in training mode too
    _thawed: dict[str, bool] | None = None  # requires_grad of γ and β before they were frozen
    _blocked: int = 0  # how many no_update() are in force
    _pending: list[Any] | None = None  # what accumulate() has merged so far, if it is in force
    _rebind: bool = False  # give new buffers instead of writing into the old ones
    _skipped: Tensor | None = None  # how many batches were not finite
    _warned: bool = False

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
        check_backend(backend)
        # as attributes of the layer only where they differ from the defaults above
        if backend != "auto":
            self.backend = backend
        if stored_variance != "unbiased":
            self.stored_variance = "biased"
        if on_single != "error":
            self.on_single = "running"
        self._prepare()

    def _prepare(self) -> None:
        """What a layer needs beyond the attributes above, however it came to be of this class."""
        held = self._buffers.get("running_mean")
        if held is not None:
            self._skipped = torch.zeros((), dtype=torch.int64, device=held.device)
        self._widen_buffers()

    # -- forward ------------------------------------------------------------------------

    def _forward(self, x: Tensor, act: Act, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        given = self._given(x, mask)
        y, seen = self._run(x, given, act, residual, mask)
        if given is not None:
            return y
        if type(seen) is Kept:  # neither empty nor of a group: the short way
            plain = self._pending is None and not (self._blocked or self._rebind)
            if plain and self.training and self.track_running_stats and not _torch.in_backward():
                self._commit(seen)
            else:
                self._propose(seen)
            return y
        if self._group is not None and mask is None and bool(as_moments(seen).n == 1):
            return self._run(x, Held(*self._single(x)), act, residual, mask)[0]
        self._offer(x, seen)
        return y

    def _run(
        self, x: Tensor, given: Held | None, act: Act, residual: Tensor | None, mask: Any
    ) -> tuple[Tensor, Seen]:
        group = self._group if given is None else None
        # past Module.__getattr__, which takes half a microsecond; parametrized ones are not there
        own = self._parameters
        weight = own["weight"] if "weight" in own else self.weight  # noqa: SIM401
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        operands = (weight, bias, given, self._epsilon(), act, residual, mask, group)
        try:
            return run(x, *operands, self.backend)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self._name()}: {error}{self._details()}") from error

    def _single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The running statistics, to normalize one value per channel with; or the error."""
        held = self._held()
        if held is not None and self.on_single == "running":
            return held
        raise ValueError(
            f"{self._name()}: Expected more than 1 value per channel when training, got input size "
            f'{tuple(x.shape)}. Use a larger batch, call .eval(), or on_single="running".'
            f"{self._details()}"
        )

    def _given(self, x: Tensor, mask: Tensor | None) -> Held | None:
        """Check the input; the running statistics if they normalize it, None if the batch's do."""
        if x.dim() not in self._dimensions or x.shape[1] != self.num_features:
            self._check_input_dim(x)
            self._check_channels(x)
        if self._frozen or not self.training:
            held = self._held()
            if held is not None:
                return Held(*held)
        if not self._epsilon() > 0:
            raise ValueError(
                f"{self._name()}: batch_norm eps must be positive during training, but got "
                f"{self._epsilon()}. Usual is 1e-5; the function gammabeta.batch_norm accepts 0."
            )
        if mask is None and self._group is None and x.numel() == x.shape[1]:
            return Held(*self._single(x))
        return None

    def _epsilon(self) -> float:
        hidden = self.__dict__.get("_eps")  # of layers that do not offer it to other tools
        return self.eps if hidden is None else float(hidden)

    def _held(self) -> tuple[Tensor, Tensor] | None:
        own = self._buffers
        mean, var = own.get("running_mean"), own.get("running_var")
        if mean is None or var is None:  # plain attributes, in a module that some tool made
            mean, var = self.running_mean, self.running_var
        return None if mean is None or var is None else (mean, var)

    # -- running statistics -------------------------------------------------------------

    def _offer(self, x: Tensor, seen: Any) -> None:
        """Propose the statistics ``seen`` in ``x``, if there are any."""
        empty = x.numel() == 0 and (self._group is None or bool((as_moments(seen).n == 0).all()))
        if empty:
            self._count_empty()
        else:
            self._propose(seen)

    def _propose(self, seen: Any) -> None:
        """Offer the statistics of a forward pass: they are committed now, later or never.

        ``seen`` is anything with ``merge`` that ``_commit`` understands.
        """
        if not self._commits():
            return
        if self._pending is None or self._rebind:
            self._commit(seen)
        else:
            seen = seen.moments() if isinstance(seen, Batch | Kept) else seen
            self._pending[:] = [self._pending[0].merge(seen) if self._pending else seen]

    def _commits(self) -> bool:
        """Whether a forward pass that happens now is one to enter."""
        if not (self.training and self.track_running_stats) or self._blocked:
            return False
        return not _torch.in_backward() and self._held() is not None

    def _count_empty(self) -> None:
        """A batch without samples has no statistics; it is counted, as in PyTorch."""
        tracked = self.num_batches_tracked
        if tracked is not None and self._pending is None and self._commits():
            self._buffers["num_batches_tracked"] = tracked + 1 if self._rebind else tracked.add_(1)

    def _commit(self, seen: Seen) -> None:
        """Enter one batch into the running statistics, or nothing of it.

        A statistic that is not finite would stay in the buffers for ever. Where reading a value
        would make a device wait, or hide it from a tracer, the choice is made by tensor values.
        """
        biased = self.stored_variance == "biased"
        held = self._held()
        if held is None:
            return
        if not self._rebind:
            tracked = self._buffers.get("num_batches_tracked")
            done = enter(seen, *held, tracked, self.momentum, biased)
            if done is not None:
                if not done:
                    self._skip()
                return
        self._commit_parts(seen, biased, held)

    @torch.no_grad()
    def _commit_parts(self, seen: Seen, biased: bool, held: tuple[Tensor, Tensor]) -> None:
        whole = None
        if isinstance(seen, Batch):
            whole = seen.both
            batch_mean, batch_var = seen.both.unbind()
            if biased:
                batch_var = batch_var * ((seen.values - 1) / seen.values)
        else:
            seen = as_moments(seen)
            # unbiased() is NaN for a single value, which is skipped like any other NaN
            batch_mean, batch_var = seen.mean, seen.unbiased()
            if biased:
                batch_var = batch_var * ((seen.n - 1) / seen.n)
        mean, var = held
        self._enter(whole, running_mean=(mean, batch_mean), running_var=(var, batch_var))

    def _enter(self, whole: Tensor | None = None, **pairs: tuple[Tensor, Tensor]) -> None:
        """running ← (1 − momentum)·running + momentum·new for each buffer, all or none.

        ``whole`` holds all new values at once, where they come from one tensor.
        """
        old = [held for held, _ in pairs.values()]
        new = [value.to(held.dtype) for held, value in pairs.values()]
        tracked = self.num_batches_tracked
        fine: bool | Tensor
        if not self._rebind and _torch.host_readable(new[0]):
            # the largest magnitude is NaN or infinite if any value is
            looked = new if whole is None or whole.dtype != old[0].dtype else [whole]
            fine = all(math.isfinite(torch.linalg.vector_norm(v, torch.inf)) for v in looked)
            if not fine:
                self._skip()
                return
        else:
            self._check_batched(old, new)
            flat = torch.cat([value.flatten() for value in new])
            fine = torch.linalg.vector_norm(flat, torch.inf) < torch.inf
            self._count_skip(~fine)
        if tracked is not None:
            tracked = self._track(tracked, fine)
        weight: float | Tensor = 0.0  # without momentum and count PyTorch's does not move either
        if self.momentum is not None:
            weight = self.momentum
        elif tracked is not None:
            weight = 1.0 / tracked.clamp(min=1).to(old[0].dtype)
        for name, held, value in zip(pairs, old, new, strict=True):
            if isinstance(fine, bool):
                held.lerp_(value, weight)
                continue
            # vmap has no rule for lerp
            updated = torch.where(fine, held * (1 - weight) + value * weight, held)
            if self._rebind:
                self._buffers[name] = updated
            else:
                held.copy_(updated)

    def _track(self, tracked: Tensor, count: int | bool | Tensor) -> Tensor:
        if not self._rebind:
            return tracked.add_(1 if count is True else count)
        self._buffers["num_batches_tracked"] = tracked + count
        return tracked + count

    def _check_batched(self, old: list[Tensor], new: list[Tensor]) -> None:
        pairs = zip(old, new, strict=True)
        if not self._rebind and any(
            _torch.is_batched(value) and not _torch.is_batched(held) for held, value in pairs
        ):
            raise RuntimeError(
                f"{self._name()}: under torch.func.vmap each copy has running statistics of its "
                "own, which one buffer cannot hold. Use gammabeta.functional_call, which returns "
                f"the new buffers stacked, or gammabeta.no_update.{self._details()}"
            )

    def _count_skip(self, skip: int | Tensor) -> None:
        stacked = isinstance(skip, Tensor) and _torch.is_batched(skip)
        if self._skipped is not None and not (self._rebind or stacked):
            self._skipped.add_(skip)

    def _skip(self) -> None:
        self._count_skip(1)
        self._warn()

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._name()}: a batch was not entered into the running statistics, since its "
                "mean or variance is NaN or infinite, or it has fewer than two valid values per "
                "channel. Look at its input and mask; gammabeta.skipped(model) counts such "
                f"batches.{self._details()}",
                StatisticsWarning,
                stacklevel=2,
            )

    def _name(self) -> str:
        kind = type(self).__name__
        return f"{kind} {self._label!r}" if self._label else kind

    def _details(self) -> str:
        return "" if self._label else f" (The layer: {self!r}.)"

    # -- checks -------------------------------------------------------------------------

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() not in self._dimensions:
            wanted = " or ".join(f"{d}D" for d in self._dimensions)
            raise ValueError(
                f"{self._name()}: expected {wanted} input (got {x.dim()}D input), of size "
                f"{tuple(x.shape)}. Choose the layer by its dimensions: 1d for (N, C) and "
                "(N, C, L), 2d for (N, C, H, W), 3d for (N, C, D, H, W)."
            )

    def _check_channels(self, x: Tensor) -> None:
        for name in ("running_mean", "running_var", "weight", "bias"):
            owned = getattr(self, name)
            if owned is not None and owned.shape[0] != x.shape[1]:
                raise RuntimeError(
                    f"{self._name()}: {name} should contain {x.shape[1]} elements not "
                    f"{owned.shape[0]}: the layer was made for num_features="
                    f"{self.num_features}, the input of size {tuple(x.shape)} has "
                    f"{x.shape[1]} channels on axis 1."
                )

    # -- dtypes of the buffers ----------------------------------------------------------

    def _widen_buffers(self) -> None:
        for name in self._buffer_names:
            held = self._buffers.get(name)
            if held is not None and _is_low(held):
                self._buffers[name] = held.to(torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMoments:
        before = {name: self._buffers.get(name) for name in self._buffer_names}
        # torch leaves this method without types
        apply: Callable[..., object] = super()._apply
        apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and _is_low(new):
                # from the old values: a round trip through half precision would round them
                wide = old if old.device == new.device else old.to(new.device)
                self._buffers[name] = wide.to(torch.float32)
        count, held = self._skipped, self._buffers.get("running_mean")
        if count is not None and held is not None and count.device != held.device:
            blank = torch.zeros((), dtype=torch.int64, device=held.device)
            self._skipped = blank if count.is_meta else count.to(held.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._widen_buffers()

    def __getstate__(self) -> dict[str, Any]:
        """Without what a `with` block has set for the time being: a copy is not in the block."""
        passing = ("_blocked", "_pending", "_rebind")
        return {key: value for key, value in self.__dict__.items() if key not in passing}

    # -- what a person and a tracer see -------------------------------------------------

    def extra_repr(self) -> str:
        shown = (
            f"{self.num_features}, eps={self._epsilon()}, "
            f"momentum={self.momentum}, affine={self.affine}, bias={self.bias is not None}, "
            f"track_running_stats={self.track_running_stats}"
        )
        for name in ("backend", "stored_variance", "on_single"):
            if getattr(self, name) != getattr(RunningMoments, name):
                shown += f", {name}={getattr(self, name)!r}"
        if self._frozen:
            shown += ", frozen"
        return shown if self._group is None else f"{shown}, synchronized"


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
    if layer._forward_hooks or layer._forward_pre_hooks:
        # the hooks run around us now, on proxies; a call of the module would run them again
        own = x.tracer.create_proxy("get_attr", x.tracer.path_of_module(layer), (), {})
        return x.tracer.create_proxy("call_method", "forward", (own, x), given)
    path = x.tracer.path_of_module(layer)
    return x.tracer.create_proxy("call_module", path, (x,), given)
