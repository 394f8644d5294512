"""The kernels as one step of autograd: forward, closed-form backward, second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gammabeta.moments import Moments
from gammabeta.ops import _activations, _reference
from gammabeta.ops._activations import Parsed
from gammabeta.ops._cpu import _calls
from gammabeta.ops._seen import Held, Kept

_aten = torch.ops.aten


def slope_of(act: Parsed) -> float | None:
    """The slope for negative values of an activation that the kernels fuse, else None."""
    if act is None:
        return None
    if act[0] == "relu":
        return 0.0
    return act[1] if act[0] == "leaky_relu" and isinstance(act[1], float) else None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    given: Moments | Held | None,
    eps: float,
    act: Parsed,
    residual: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Moments | Held | Kept]:
    """y and what normalized it."""
    call = (x, weight, bias, residual, valid, given, eps, act)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[:4]):
        box: list[Any] = []
        y = _apply(*call, box)
        kept, count = box
    else:
        y, kept, _, count = compute(*call, False)
    if given is not None:
        return y, given
    return y, Kept(kept, x.shape[1], count, valid is not None)


def compute(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    given: Moments | Held | None,
    eps: float,
    act: Parsed,
    want_signs: bool,
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """y, what is kept, the signs before the activation where they are wanted, the count."""
    slope = slope_of(act)
    layout, call = _calls.prepare(x, weight, bias, residual, valid, eps, slope)
    count = _calls.count_of(x, valid)
    y, kept, signs = _calls.forward(call, layout, given, count=count, want_signs=want_signs)
    if act is not None and slope is None:
        y = _smooth(y, act, valid)
    return y, kept, signs, count


def _smooth(z: Tensor, act: Parsed, valid: Tensor | None) -> Tensor:
    """An activation that is not fused, of memory that nobody else knows, in place where it can."""
    match act:
        case ("sigmoid", _):
            y = z.sigmoid_()
        case ("tanh", _):
            y = z.tanh_()
        case ("silu", _):
            y = torch.nn.functional.silu(z, inplace=True)
        case _:
            y = _activations.apply(act, z)
    return y if valid is None else y.masked_fill_(~valid, 0.0)


def through(dy: Tensor, z: Tensor, act: Parsed) -> Tensor:
    """dy·act'(z), by PyTorch's own backward operators."""
    dz: Tensor
    match act:
        case ("sigmoid", _):
            dz = _aten.sigmoid_backward(dy, z.sigmoid_())
        case ("tanh", _):
            dz = _aten.tanh_backward(dy, z.tanh_())
        case ("silu", _):
            dz = _aten.silu_backward(dy, z)
        case ("gelu", str(approximate)):
            dz = _aten.gelu_backward(dy, z, approximate=approximate)
        case _:
            dz = _aten.softplus_backward(dy, z, 1.0, 20.0)
    return dz


class _Normalize(torch.autograd.Function):
    """Keeps x and O(C); behind a residual and relu or leaky_relu one bit of each element more, for
    another activation the residual itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        valid: Tensor | None,
        given: Moments | Held | None,
        eps: float,
        act: Parsed,
        box: list[Any],
    ) -> Tensor:
        y, kept, signs, count = compute(x, weight, bias, residual, valid, given, eps, act, True)
        ctx.smooth = act is not None and slope_of(act) is None
        # where signs are kept, or nothing bends, the residual's values no longer matter
        ctx.save_for_backward(x, weight, bias, residual if ctx.smooth else None, valid, kept, signs)
        ctx.eps, ctx.act, ctx.count = eps, act, count
        ctx.fixed, ctx.added = given is not None, residual is not None
        box += (kept, count)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, residual, valid, kept, signs = ctx.saved_tensors
        saved = Saved(x, weight, bias, residual, valid, kept, signs)
        how = How(ctx.eps, ctx.act, ctx.count, ctx.fixed, ctx.added)
        if torch.is_grad_enabled():
            found = differentiable(grads[0], saved, how)
        else:
            found = gradients(grads[0], saved, how, ctx.needs_input_grad)
        return *found, *(None,) * 5


class Saved(NamedTuple):
    """What a forward keeps for its backward."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    valid: Tensor | None
    kept: Tensor
    signs: Tensor | None


class How(NamedTuple):
    eps: float
    act: Parsed
    values: float  # per channel
    fixed: bool  # the statistics were given
    added: bool  # there was a residual


Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def gradients(dy: Tensor, saved: Saved, how: How, needed: Sequence[bool]) -> Gradients:
    """Of x, weight, bias and residual, by the kernels."""
    x, weight, bias, residual, valid, kept, signs = saved
    smooth = how.act is not None and slope_of(how.act) is None
    slope = slope_of(how.act)
    layout, call = _calls.prepare(x, weight, bias, residual, valid, how.eps, slope)
    dy = _calls.arranged(dy, layout)
    if smooth:
        count = 1.0 if how.fixed else how.values  # given statistics are kept as a variance
        z, _, _ = _calls.forward(call, layout, None, count=count, again=kept)
        dy = through(dy, z, how.act)
    call = call._replace(residual=None)
    # where nothing bends and all is valid, the residual's gradient is dy
    written = how.added and needed[3] and (slope is not None or valid is not None)
    dx, dresidual, sums = _calls.backward(
        dy,
        call,
        layout,
        kept,
        signs,
        count=how.values,
        fixed=how.fixed,
        want_dx=needed[0] or written,
        want_dresidual=written,
    )
    if how.added and not written:
        dresidual = dy
    return dx, sums.weight, sums.bias, dresidual


def differentiable(dy: Tensor, saved: Saved, how: How) -> Gradients:
    """The same in operations that can be differentiated again."""
    x, weight, bias, residual, valid, kept, signs = saved
    act, c = how.act, x.shape[1]
    if signs is not None:
        slope = slope_of(act)
        assert slope is not None
        dy = torch.where(_calls.negative(signs, x, valid is not None), dy * slope, dy)
        act = None
    if how.added and residual is None:  # its value does not matter: only its gradient is wanted
        residual = dy.new_zeros(()).expand_as(x)
    given = None
    if how.fixed:
        given = Moments(kept.new_ones(()), kept[:c], kept[c : 2 * c])
    return _reference.gradients(dy, x, weight, bias, residual, valid, given, how.eps, act)


# torch leaves it without types
_apply: Callable[..., Tensor] = _Normalize.apply
