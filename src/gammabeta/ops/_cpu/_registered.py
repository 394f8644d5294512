"""The kernels as operators of PyTorch: what tracers, modes, profilers and the compiler see.

An address means nothing to a tracer, and replaying one would compute wrong numbers in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gammabeta.moments import Moments
from gammabeta.ops._activations import Parsed
from gammabeta.ops._cpu import _autograd, _calls
from gammabeta.ops._cpu._autograd import How, Saved

# Any layout will do: without this the compiler would copy what it keeps channels-last.
_TAGS = (torch.Tag.flexible_layout,)
_LAYOUTS = ("planes", "pixels")


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    given: Moments | None,
    eps: float,
    act: Parsed,
    residual: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Moments]:
    """y and the statistics that normalized it, in one operator."""
    mean, var = (None, None) if given is None else (given.mean, given.var())
    y, kept, _ = torch.ops.gammabeta.batch_norm.default(
        x, weight, bias, residual, valid, mean, var, eps, _spell(act)
    )
    if given is not None:
        return y, given
    c = x.shape[1]
    kept = kept.detach()
    n = kept[-2].expand(c) if valid is not None else kept[-2]
    return y, Moments(n, kept[:c], kept[c : 2 * c])


def _spell(act: Parsed) -> str:
    return "" if act is None else f"{act[0]}:{'' if act[1] is None else act[1]}"


def _read(act: str) -> Parsed:
    if not act:
        return None
    name, _, parameter = act.partition(":")
    if name == "leaky_relu":
        return name, float(parameter)
    return name, parameter or None


def _how(eps: float, act: str, values: float, fixed: bool, added: bool, layout: str) -> How:
    parsed = _read(act)
    slope = _autograd.slope_of(parsed)
    smooth = parsed is not None and slope is None
    return How(eps, parsed, slope, smooth, values, fixed, added, layout)


def _impl(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    given = None if mean is None or var is None else Moments.given(mean, var)
    call = (x, weight, bias, residual, mask, given, eps, _read(act))
    y, kept, signs, count = _autograd.compute(*call, True)
    # with the layout, since the compiler may bring x here in another than it was traced in
    kept[-2], kept[-1] = count, _LAYOUTS.index(_calls.lies(x))
    return y, kept, torch.empty(0, dtype=torch.int16, device=_calls.CPU) if signs is None else signs


_batch_norm = torch.library.custom_op(
    "gammabeta::batch_norm", _impl, mutates_args=(), device_types="cpu", tags=_TAGS
)


@_batch_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = x.new_empty(_calls.kept_size(x.shape[1]), dtype=torch.float64)
    count = 0
    if residual is not None and _autograd.slope_of(_read(act)) is not None:
        count = _calls.signs_of(x, mask is not None)
    return _fresh_like(x), kept, x.new_empty(count, dtype=torch.int16)


def _fresh_like(x: Tensor) -> Tensor:
    if _calls.layout_of(x) is None:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x)


def _backward_impl(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    kept: Tensor,
    signs: Tensor,
    eps: float,
    act: str,
    fixed: bool,
    added: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    saved = Saved(x, weight, bias, residual, mask, kept, signs if signs.numel() else None)
    values, layout = float(kept[-2]), _LAYOUTS[int(kept[-1])]
    how = _how(eps, act, values, fixed, added, layout)
    dx, dweight, dbias, dresidual = _autograd.gradients(dy, saved, how, needed)
    # no more than the fake kernel tells; and never dy itself or a view of it, which an operator may
    # not give back: its caller knows that the residual's gradient is dy where nothing bends it
    dx = _as(dx, x) if needed[0] else None
    dresidual = _as(dresidual, x) if _bends(act, mask, added, needed) else None
    return _there(dx, x), _there(dweight, x), _there(dbias, x), _there(dresidual, x)


def _as(t: Tensor | None, x: Tensor) -> Tensor | None:
    """t in the layout that the fake kernel tells."""
    return None if t is None else _calls.arranged(t, _calls.lies(x))


def _there(t: Tensor | None, x: Tensor) -> Tensor:
    """An operator gives tensors: an empty one stands for none."""
    return x.new_empty(0) if t is None else t


_backward = torch.library.custom_op(
    "gammabeta::batch_norm_backward",
    _backward_impl,
    mutates_args=(),
    device_types="cpu",
    tags=_TAGS,
)


def _bends(act: str, mask: Tensor | None, added: bool, needed: Sequence[bool]) -> bool:
    """Whether the residual's gradient is wanted and another than dy."""
    return added and needed[3] and (mask is not None or bool(act))


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    kept: Tensor,
    signs: Tensor,
    eps: float,
    act: str,
    fixed: bool,
    added: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _fresh_like(x) if needed[0] else x.new_empty(0),
        x.new_empty(0) if weight is None else torch.empty_like(weight),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
        _fresh_like(x) if _bends(act, mask, added, needed) else x.new_empty(0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, mask, mean, _, eps, act = inputs
    _, kept, signs = output
    parsed = _read(act)
    smooth = parsed is not None and _autograd.slope_of(parsed) is None
    ctx.save_for_backward(x, weight, bias, residual if smooth else None, mask, kept, signs)
    ctx.mark_non_differentiable(kept, signs)
    ctx.eps, ctx.act, ctx.fixed, ctx.added = eps, act, mean is not None, residual is not None
    ctx.layout = _calls.lies(x)


def _differentiate(ctx: Any, dy: Tensor, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, mask, kept, signs = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:4])
    found: tuple[Tensor | None, ...]
    if torch.is_grad_enabled():
        saved = Saved(x, weight, bias, residual, mask, kept, signs if signs.numel() else None)
        how = _how(ctx.eps, ctx.act, 0.0, ctx.fixed, ctx.added, ctx.layout)
        found = _autograd.differentiable(dy, saved, how)
    else:
        call = (dy, x, weight, bias, residual, mask, kept, signs)
        dx, dweight, dbias, dresidual = torch.ops.gammabeta.batch_norm_backward.default(
            *call, ctx.eps, ctx.act, ctx.fixed, ctx.added, needed
        )
        if not _bends(ctx.act, mask, ctx.added, needed):
            dresidual = dy
        found = (dx, dweight, dbias, dresidual)
    return *(g if need else None for g, need in zip(found, needed, strict=True)), *(None,) * 5


_batch_norm.register_autograd(_differentiate, setup_context=_keep)
