"""Batch renormalization: training outputs that come close to those of inference."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gammabeta.layers._method import Method, wide_dtype
from gammabeta.moments import Moments
from gammabeta.ops import _torch, batch_norm
from gammabeta.ops._seen import Held

Limit: TypeAlias = float | Callable[[Tensor], float | Tensor]

_MEMORY = 8  # forwards of a layer whose recomputation in a backward pass is still right


class _Past(NamedTuple):
    """What a batch is corrected towards: the state of the layer before that batch."""

    mean: Tensor
    var: Tensor
    step: Tensor | None
    seen: Moments  # of that batch, by which its recomputation finds this state


class _Renorm(Method):
    """y = γ·(x̂·r + d) + β, computed as one batch normalization with γ·r and γ·d + β."""

    # what the last batches were corrected towards, newest first, for their recomputation; never
    # changed in place, since replicas of a layer on several devices share what they start with
    _past: tuple[_Past, ...] = ()

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
        r_max: Limit = 3.0,
        d_max: Limit = 5.0,
        bias: bool = True,
        backend: str = "auto",
        stored_variance: str = "unbiased",
        on_single: str = "error",
    ) -> None:
        if not track_running_stats:
            raise ValueError(
                f"{type(self).__name__}: batch renormalization corrects a batch towards the "
                "running statistics, so it needs them, got track_running_stats=False. Use a "
                "BatchNorm layer for statistics of the batch alone."
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
        self.r_max, self.d_max = r_max, d_max
        for name, least in (("r_max", 1.0), ("d_max", 0.0)):
            value = getattr(self, name)
            if not callable(value):
                if isinstance(value, bool) or not isinstance(value, Real):
                    raise self._no_number(name, least, value)
                self._limit(name, least, None)

    def _normalize(self, x: Tensor, mask: Tensor | None, given: Held | None) -> Tensor:
        if given is not None:
            return super()._normalize(x, mask, given)
        call: dict[str, Any] = {"eps": self._eps, "mask": mask, "group": self._group}
        call["backend"] = self.backend
        with torch.no_grad():
            _, seen = batch_norm(x.detach(), **call)
        r, d = self._correction(seen)
        dtype = wide_dtype(x if self.weight is None else self.weight)
        weight, bias = r.to(dtype), d.to(dtype)
        if self.weight is not None:
            weight, bias = self.weight * weight, self.weight * bias
        if self.bias is not None:
            bias = bias + self.bias
        y, _ = batch_norm(x, weight, bias, **call)
        self._offer(x, seen)
        return y

    @torch.no_grad()
    def _correction(self, seen: Moments) -> tuple[Tensor, Tensor]:
        """r and d of each channel, (C,), float64, constants for every derivative."""
        past = self._towards(seen)
        # a channel without a valid value has n = 0; its NaN would reach γ through 0·NaN
        batch = (seen.m2 / seen.n.clamp(min=1) + self._eps).sqrt()
        held = (past.var.to(torch.float64) + self._eps).sqrt()
        r_max = self._limit("r_max", 1.0, past.step).to(held.device)
        d_max = self._limit("d_max", 0.0, past.step).to(held.device)
        r = (batch / held).clamp(1 / r_max, r_max)
        d = ((seen.mean - past.mean) / held).clamp(-d_max, d_max)
        return r, d

    def _towards(self, seen: Moments) -> _Past:
        """The running statistics and the step, as they were when this batch came first.

        Activation checkpointing computes a batch again, perhaps after its statistics or those of
        others were committed; it must meet the old ones, or its gradients would belong to another
        r and d. Batches that are not counted are remembered too: they are recomputed as well.
        """
        held = self._held()
        if held is None:
            raise ValueError(
                f"{self._name()}: batch renormalization needs running statistics, got None. Build "
                f"the layer anew.{self._details()}"
            )
        mean, var = held
        now = _Past(mean, var, self.num_batches_tracked, seen)
        if _torch.in_backward():
            return _nearest(self._past, now)
        plain = type(mean) is Tensor and not mean.is_meta
        if plain and not torch.compiler.is_compiling() and not _torch.transform_active():
            step = None if now.step is None else now.step.clone()
            kept = _Past(mean.detach().clone(), var.detach().clone(), step, seen)
            self._past = (kept, *self._past[: _MEMORY - 1])
        return now

    def __getstate__(self) -> dict[str, Any]:
        """Without what only a backward pass through this very layer asks for."""
        return {key: value for key, value in super().__getstate__().items() if key != "_past"}

    def _limit(self, name: str, least: float, step: Tensor | None) -> Tensor:
        value = getattr(self, name)
        if callable(value):
            if step is None:
                raise ValueError(
                    f"{self._name()}: {name} is a function of num_batches_tracked, which must not "
                    f"be None. Give it back its counter, or use a number.{self._details()}"
                )
            value = value(step)
        try:
            limit = torch.as_tensor(value, dtype=torch.float64).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._no_number(name, least, value) from error
        if _torch.host_readable(limit) and not bool((limit >= least).all()):
            raise ValueError(
                f"{type(self).__name__}: {name} must be at least {least:g}, got {value!r}. "
                "r_max = 1 and d_max = 0 are batch normalization, infinity is no limit."
            )
        return limit

    def _no_number(self, name: str, least: float, value: object) -> TypeError:
        usual = {"r_max": "3", "d_max": "5"}[name]
        return TypeError(
            f"{type(self).__name__}: {name} must be a number, at least {least:g}, or a function of "
            f"num_batches_tracked that gives one, got {value!r}. Usual is {usual}."
        )

    def extra_repr(self) -> str:
        r_max, d_max = (getattr(v, "__name__", v) for v in (self.r_max, self.d_max))
        return f"{super().extra_repr()}, r_max={r_max}, d_max={d_max}"


def _nearest(past: tuple[_Past, ...], now: _Past) -> _Past:
    """The state that the batch of ``now`` met: that of the remembered batch most like it.

    A recomputed batch has the moments of its first forward, to the bit or, where a device adds in
    any order, nearly so. The choice is made by tensors, which no device has to wait for.
    """
    mean, step = now.mean, now.step
    fits = [
        p
        for p in past
        if p.mean.device == mean.device
        and p.mean.dtype == mean.dtype
        and p.mean.shape == mean.shape
        and (p.step is None) == (step is None)
    ]
    if len(fits) < 2:
        return fits[0] if fits else now
    apart = torch.stack([_apart(p.seen, now.seen) for p in fits])
    index = apart.argmin().view(1)  # the first of equals: the newest

    def pick(values: list[Tensor]) -> Tensor:
        return torch.stack(values).index_select(0, index).squeeze(0)

    steps = [p.step for p in fits if p.step is not None]
    chosen = pick([p.mean for p in fits]), pick([p.var for p in fits])
    return _Past(*chosen, pick(steps) if steps else None, now.seen)


def _apart(a: Moments, b: Moments) -> Tensor:
    """A number (), 0 for equal moments; a channel that is not finite has no part in it."""
    parts = [
        ((one - two).abs() / (one.abs() + two.abs()).clamp(min=1e-300)).nan_to_num(nan=0.0)
        for one, two in ((a.mean, b.mean), (a.m2, b.m2))
    ]
    return torch.cat(parts).sum()


class BatchRenorm1d(_Renorm):
    """Batch renormalization over (N, C) or (N, C, L).

    In training y = γ·(x̂·r + d) + β per channel, with x̂ = (x − μ_B)/σ_B and

        r = clip(σ_B/σ, 1/r_max, r_max),    d = clip((μ_B − μ)/σ, −d_max, d_max),

    which are constants for every derivative. μ_B and σ_B = √(var_B + eps), with the biased
    variance, are those of the batch, over n and, with a length, all positions; μ = running_mean
    and σ = √(running_var + eps) are the running ones before the batch enters them. Where no limit
    binds, y = γ·(x − μ)/σ + β: the output of inference. With r_max = 1 and d_max = 0 the layer is
    batch normalization. In eval mode the running statistics normalize.

    Args:
        num_features: C.
        eps: added to both variances, in units of x²; > 0.
        momentum: weight of the new value in the running statistics (the paper's α, there 0.01);
            None weights all batches equally.
        affine: whether there are γ (``weight``) and, with ``bias``, β (``bias``), both (C,).
        track_running_stats: must be True.
        device, dtype: of the parameters. The buffers are float32 in any lower dtype.
        r_max, d_max: the limits, without unit, ≥ 1 and ≥ 0: numbers, or functions of the step.
            Such a function gets ``num_batches_tracked``, a tensor (), and returns a number or a
            tensor; tensor arithmetic keeps devices from waiting and compiles, and is checked only
            where that costs nothing. The paper trains its first 5,000 steps with 1 and 0, and
            reaches 3 at step 40,000 and 5 at step 25,000. A function that is to be pickled is
            defined at the top of a module.
        bias: whether there is β.
        backend: see :func:`gammabeta.batch_norm`.
        stored_variance: "unbiased", as in PyTorch, or "biased".
        on_single: what to do in training with one value per channel: raise an "error", or
            normalize by the "running" statistics and leave them as they are.

    Shape: input (N, C) or (N, C, L); output the same. ``mask`` in ``forward`` is bool,
    True = valid, broadcastable to (N,) or (N, L); y = 0 elsewhere.

    Raises:
        TypeError: a limit is neither a number nor a function; the input is not floating.
        ValueError: a limit out of range; track_running_stats=False; wrong number of dimensions;
            one value per channel in training.
        RuntimeError: wrong number of channels.

    >>> import torch, gammabeta as gb
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> layer = gb.BatchRenorm1d(1)            # running mean 0 and variance 1: within the limits
    >>> [round(v, 4) for v in layer(x).flatten().tolist()]
    [1.0, 3.0]
    >>> layer = gb.BatchRenorm1d(1, d_max=0.5)  # the batch's mean is 2 running deviations away
    >>> [round(v, 4) for v in layer(x).flatten().tolist()]
    [-0.5, 1.5]
    >>> paper = lambda step: 1 + 2 * ((step - 5000) / 35000).clamp(0, 1)
    >>> round(gb.BatchRenorm1d(1, r_max=paper, d_max=0)(x)[1].item(), 4)
    1.0

    Source: Ioffe 2017, Algorithm 1 and section 3, arXiv:1702.03275.
    Differs from the paper: there the running average is of σ_B itself, eps inside the root; here
    it is of the variance, without eps and with m/(m − 1), so that a ``state_dict`` fits any batch
    normalization. The mean of a root is below the root of the mean: the paper's σ is smaller where
    σ_B varies.

    Under activation checkpointing a recomputed batch meets the statistics that its first forward
    met, counted or not, if that was one of the layer's last eight before the backward pass; more
    belong inside :func:`gammabeta.accumulate`. They are told apart by their statistics: of one
    batch that came twice, in two states of the layer, the later state is taken. A checkpoint inside
    ``torch.compile``, or around what it compiled, recomputes a counted batch with the statistics
    after the update, and its gradients are wrong without a word: there, keep the layer out of the
    checkpoint, or do without the compiler.
    Synchronized over processes the layer needs two collectives forward.
    """

    _dimensions = (2, 3)


class BatchRenorm2d(_Renorm):
    """Batch renormalization over (N, C, H, W).

    y = γ·(x̂·r + d) + β, the statistics per channel, over n and all positions. Formulas,
    arguments and errors are those of :class:`BatchRenorm1d`; a mask broadcasts to (N, H, W).

    >>> import torch, gammabeta as gb
    >>> x = 1 + torch.arange(4.0).view(1, 1, 2, 2)
    >>> [round(v, 4) for v in gb.BatchRenorm2d(1)(x).flatten().tolist()]
    [1.0, 2.0, 3.0, 4.0]

    Source: Ioffe 2017, Algorithm 1, arXiv:1702.03275.
    """

    _dimensions = (4,)


class BatchRenorm3d(_Renorm):
    """Batch renormalization over (N, C, D, H, W).

    y = γ·(x̂·r + d) + β, the statistics per channel, over n and all positions. Formulas,
    arguments and errors are those of :class:`BatchRenorm1d`; a mask broadcasts to (N, D, H, W).

    >>> import torch, gammabeta as gb
    >>> x = 1 + torch.arange(4.0).view(1, 1, 1, 2, 2)
    >>> [round(v, 4) for v in gb.BatchRenorm3d(1, r_max=1, d_max=0)(x).flatten().tolist()]
    [-1.3416, -0.4472, 0.4472, 1.3416]

    Source: Ioffe 2017, Algorithm 1, arXiv:1702.03275.
    """

    _dimensions = (5,)
