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
    sound: bool = False,
) -> tuple[Tensor, Moments | Held | Kept]:
    """y and what normalized it; ``sound`` says that weight and bias can be read as they lie."""
    slope = slope_of(act)
    smooth = act is not None and slope is None
    layout = _calls.layout_of(x)
    usual = (
        layout is not None
        and not (smooth or x.is_neg() or x._is_zerotensor())
        and valid is None
        and (sound or weight is None or _calls.at_hand(weight))
        and (sound or bias is None or _calls.at_hand(bias))
    )
    if not torch.is_grad_enabled() or not (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        if usual and type(given) is Held:
            assert layout is not None
            return _infer(x, weight, bias, residual, given, eps, slope, layout), given
        y, kept, _, count = compute(x, weight, bias, residual, valid, given, eps, act, False)
    elif usual and given is None:
        form = (x.shape, x.dtype, layout, eps, act, slope, residual is not None)
        plan = _calls.plain(*form, _calls.threads_for(x))
        boxed: list[Kept] = []
        y = _plain(x, weight, bias, residual, plan, boxed)
        (seen,) = boxed
        if made is not None and residual is None:
            how = How(eps, act, slope, False, seen.values, False, False, plan.layout)
            made(y, (x, weight, bias, None, seen.stats), how)
        return y, seen
    else:
        box: list[Any] = []
        y = _apply(x, weight, bias, residual, (valid, given, eps, act, box))
        kept, count = box
        if made is not None and residual is None:
            how = How(eps, act, slope, smooth, count, given is not None, False, _calls.lies(x))
            made(y, (x, weight, bias, valid, kept), how)
    if given is not None:
        return y, given
    return y, Kept(kept, x.shape[1], count, valid is not None)


def _infer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    given: Held,
    eps: float,
    slope: float | None,
    layout: str,
) -> Tensor:
    """y by running statistics, of which nothing is kept."""
    form = (x.shape, x.dtype, layout, eps, slope, residual is not None)
    (run, words, room, _), large = _calls.held(*form, _calls.threads_for(x))
    if residual is not None:
        residual = _calls.arranged(residual, layout)
    y = _calls.fresh(x, large)
    channels = x.shape[1]
    stats = _calls.scratch(8 * _calls.kept_size(channels) + room)
    addresses = _calls.pointers(
        *(x.data_ptr(), y.data_ptr(), 0, 0),
        *(0 if residual is None else residual.data_ptr(), 0, 0, 0),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        *(stats, given.mean.data_ptr(), given.var.data_ptr(), stats + 16 * channels),
        *(stats + 8 * _calls.kept_size(channels), 0, 0, 0, 0, 0, 0),
    )
    run(addresses + words)
    return y


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
    call = _calls.prepare(x, weight, bias, residual, valid, eps, slope)
    count = _calls.count_of(x, valid)
    y, kept, signs = _calls.forward(call, given, count=count, want_signs=want_signs)
    if act is not None and slope is None:
        y = _smooth(y, act, valid)
    return y, kept, signs, count


def repeat(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    kept: Tensor,
    how: How,
) -> Tensor:
    """The y of an earlier call without a residual once more, bit for bit, from what it kept."""
    call = _calls.prepare(x, weight, bias, None, valid, how.eps, how.slope, how.layout)
    count = 1.0 if how.fixed else how.values  # given statistics are kept as a variance
    y, _, _ = _calls.forward(call, None, count=count, again=kept)
    return _smooth(y, how.act, valid) if how.smooth else y


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
        rest: tuple[Any, ...],
    ) -> Tensor:
        valid, given, eps, act, box = rest
        y, kept, signs, count = compute(x, weight, bias, residual, valid, given, eps, act, True)
        # where signs are kept, or nothing bends, the residual's values no longer matter
        slope = slope_of(act)
        smooth = act is not None and slope is None
        kept_residual = residual if smooth else None
        ctx.save_for_backward(x, weight, bias, kept_residual, valid, kept, signs)
        fixed, added = given is not None, residual is not None
        ctx.how = How(eps, act, slope, smooth, count, fixed, added, _calls.lies(x))
        box += (kept, count)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = Saved._make(ctx.saved_tensors)
        if torch.is_grad_enabled():
            found = differentiable(grads[0], saved, ctx.how)
        else:
            found = gradients(grads[0], saved, ctx.how, ctx.needs_input_grad)
        return *found, None


class _Plain(torch.autograd.Function):
    """The same for the usual call, whose way to the kernel is as short as Python allows: with a
    small batch it is longer than the kernel's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        plan: _calls.Plain,
        box: list[Kept],
    ) -> Tensor:
        run, words, room, size = plan.forward
        kept = torch.empty(plan.kept, dtype=torch.float64, device=_calls.CPU)
        y = _calls.fresh(x, plan.large)
        signs = None
        if residual is not None:
            residual = _calls.arranged(residual, plan.layout)
            if plan.slope is not None:
                signs = torch.empty(size, dtype=torch.int16, device=_calls.CPU)
        stats = kept.data_ptr()
        addresses = _calls.pointers(
            *(x.data_ptr(), y.data_ptr(), 0, 0),
            *(0 if residual is None else residual.data_ptr(), 0),
            *(0 if signs is None else signs.data_ptr(), 0),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            *(stats, 0, 0, stats + plan.place, _calls.scratch(room), 0, 0, 0, 0, 0, 0),
        )
        run(addresses + words)
        ctx.save_for_backward(x, weight, bias, kept, signs)
        ctx.plan, ctx.added = plan, residual is not None
        box.append(Kept(kept, x.shape[1], plan.values, False))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, kept, signs = ctx.saved_tensors
        plan, added, needed = ctx.plan, ctx.added, ctx.needs_input_grad
        (dy,) = grads
        if torch.is_grad_enabled():
            saved = Saved(x, weight, bias, None, None, kept, signs)
            act, eps, slope, layout = plan.act, plan.eps, plan.slope, plan.layout
            how = How(eps, act, slope, False, plan.values, False, added, layout)
            return *differentiable(dy, saved, how), None, None
        dy = _calls.arranged(dy, plan.layout)
        x = _calls.arranged(x, plan.layout)  # a hook may have given it back in another
        written = signs is not None and needed[3]
        wanted = needed[0] or written
        run, words, room, _ = plan.backward if wanted else plan.sums
        dx = _calls.fresh(x, plan.large) if wanted else None
        dresidual = _calls.fresh(x, plan.large) if written else None
        dweight = None if weight is None else torch.empty_like(weight)
        dbias = None if bias is None else torch.empty_like(bias)
        stats, place = kept.data_ptr(), _calls.scratch(room + plan.place)
        addresses = _calls.pointers(
            *(x.data_ptr(), 0, dy.data_ptr(), 0 if dx is None else dx.data_ptr()),
            *(0, 0 if dresidual is None else dresidual.data_ptr()),
            *(0 if signs is None else signs.data_ptr(), 0, 0, 0),
            *(stats, 0, 0, stats + plan.place, place, place + room),
            0 if dweight is None else dweight.data_ptr(),
            0 if dbias is None else dbias.data_ptr(),
            *(0, 0, 0),
        )
        run(addresses + words)
        # where nothing bends, the residual's gradient is dy
        return dx, dweight, dbias, dresidual if written else dy if added else None, None, None


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
    slope: float | None  # of what the kernels fuse
    smooth: bool  # another activation, which they do not
    values: float  # per channel
    fixed: bool  # the statistics were given
    added: bool  # there was a residual
    layout: str  # that the kernels took x in: a hook may give it back in another


Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def gradients(dy: Tensor, saved: Saved, how: How, needed: Sequence[bool]) -> Gradients:
    """Of x, weight, bias and residual, by the kernels."""
    x, weight, bias, residual, valid, kept, signs = saved
    eps, act, slope, smooth, values, fixed, added, layout = how
    call = _calls.prepare(x, weight, bias, residual, valid, eps, slope, layout)
    dy = _calls.arranged(dy, call.layout)
    if smooth:
        count = 1.0 if fixed else values  # see repeat
        z, _, _ = _calls.forward(call, None, count=count, again=kept)
        dy = through(dy, z, act)
    # where nothing bends and all is valid, the residual's gradient is dy
    written = added and needed[3] and (slope is not None or valid is not None)
    dx, dweight, dbias, dresidual = _calls.backward(
        dy, call, kept, signs, values, fixed, want_dx=needed[0] or written, want_dresidual=written
    )
    if added and not written:
        dresidual = dy
    return dx, dweight, dbias, dresidual


def differentiable(dy: Tensor, saved: Saved, how: How) -> Gradients:
    """The same in operations that can be differentiated again."""
    x, weight, bias, residual, valid, kept, signs = saved
    act, c = how.act, x.shape[1]
    if signs is not None:
        assert how.slope is not None
        bent = _calls.negative(signs, x, valid is not None, how.layout)
        dy = torch.where(bent, dy * how.slope, dy)
        act = None
    if how.added and residual is None:  # its value does not matter: only its gradient is wanted
        residual = dy.new_zeros(()).expand_as(x)
    given = None
    if how.fixed:
        given = Moments(kept.new_ones(()), kept[:c], kept[c : 2 * c])
    return _reference.gradients(dy, x, weight, bias, residual, valid, given, how.eps, act)


# torch leaves it without types
_apply: Callable[..., Tensor] = _Normalize.apply
# past Function.apply, which asks for transforms, as the way here has done
_plain: Callable[..., Tensor] = super(torch.autograd.Function, _Plain).apply

# told of each differentiable y without a residual and of what it was made from, while
# outputs are to be recomputed
made: Callable[[Tensor, tuple[Tensor | None, ...], How], None] | None = None
