"""Kernels for the CPU: fused, accurate, on PyTorch's own threads, without a compiler at hand.

They are written in a few words of Python (``_emit``), compiled by LLVM in a fraction of a second
when they are first needed, and called with raw addresses. ``_planes`` and ``_pixels`` hold the two
ways through memory, ``_operands`` the arithmetic that both share, ``_compile`` threads and code;
``_calls`` calls them, and ``_registered`` shows them to tracers and the compiler as one operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gammabeta.moments import Moments
from gammabeta.ops import _torch
from gammabeta.ops._activations import Parsed
from gammabeta.ops._cpu import _autograd, _calls, _compile, _registered
from gammabeta.ops._seen import Held, Kept, Seen

LACKS: tuple[str, ...] = ()  # promises of docs/numerics.md that this backend does not keep
_EXACT = (Tensor, nn.Parameter)
by_address = _autograd.forward
_DTYPES = (torch.float32, torch.bfloat16)
_LARGE = 1 << 20  # elements, from which on one thread among many would be a surprise


def why_not(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    stats: Moments | Held | None = None,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    group: Any = None,
) -> str | None:
    """The reason why the kernels cannot run this call, or None."""
    if x.dtype not in _DTYPES:
        return f"the CPU kernels take float32 and bfloat16, got {x.dtype}"
    if not (x.device.type == "cpu" and x.layout is torch.strided and not x.is_nested):
        return f"the CPU kernels take dense tensors in main memory, got {x.device} {x.layout}"
    if x.numel() == 0:
        return "the CPU kernels need at least one value"
    if eps < 1e-30:
        return f"the CPU kernels hold 1/√(var + eps) in float32 and need eps ≥ 1e-30, got {eps}"
    traced = _torch.recorded()  # then tensors are of the tracer's own kind
    for name, value in (("input", x), ("weight", weight), ("bias", bias), ("residual", residual)):
        if value is None:
            continue
        if not (type(value) in _EXACT or traced):
            return f"the CPU kernels take plain tensors, got {name} of {type(value).__name__}"
        if value.device != x.device:
            return f"the CPU kernels need {name} on {x.device}, got {value.device}"
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != torch.float32:
            return f"the CPU kernels take {name} in torch.float32, got {value.dtype}"
    if residual is not None and residual.dtype != x.dtype:
        return f"the CPU kernels need the residual in {x.dtype}, got {residual.dtype}"
    return _compile.missing() or _alone(x)


def _alone(x: Tensor) -> str | None:
    if _torch.recorded() or x.numel() < _LARGE or _compile.together():
        return None
    return (
        "no OpenMP runtime of PyTorch's was found, so that one thread would do what several are "
        "asked to do; torch.set_num_threads(1) allows it"
    )


def direct(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Moments | Held | None,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None,
) -> bool:
    """Whether this is a plain, sound call, the usual one: True implies ``why_not(...) is None``.

    Asked at every call, where normalizing a small batch takes four microseconds: questions that are
    answered fast, and all others left to the checks that explain themselves.
    """
    kind, dtype = type(x), x.dtype
    if not (
        (kind is Tensor or kind is nn.Parameter)
        and x.is_cpu
        and (dtype is torch.float32 or dtype is torch.bfloat16)
        and x.layout is torch.strided
        and x.dim() > 1
        and not x.is_nested
        and 0 < x.numel() < _LARGE
        and type(eps) is float
        and 1e-30 <= eps < 1e30
        and mask is None
        and _torch.addresses_count()
        and _compile.ready()
        and (stats is None or (type(stats) is Held and _calls.readable(stats)))
    ):
        return False
    channels = x.shape[1]
    for parameter in (weight, bias):
        if parameter is not None and not (
            (type(parameter) is nn.Parameter or type(parameter) is Tensor)
            and parameter.dtype is torch.float32
            and parameter.is_cpu
            and parameter.dim() == 1
            and parameter.numel() == channels
            and parameter.layout is torch.strided
            and _calls.at_hand(parameter)
        ):
            return False
    return residual is None or (
        type(residual) is Tensor
        and residual.dtype is dtype
        and residual.is_cpu
        and residual.layout is torch.strided
        and residual.shape == x.shape
    )


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Moments | Held | None,
    eps: float,
    act: Parsed,
    residual: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Seen]:
    """Everything in one call, by addresses where they mean something, else as one operator."""
    if _torch.addresses_count():
        if isinstance(stats, Held) and not _calls.readable(stats):
            stats = stats.moments()
        return by_address(x, weight, bias, stats, eps, act, residual, valid)
    given = stats.moments() if isinstance(stats, Held) else stats
    return _registered.forward(x, weight, bias, given, eps, act, residual, valid)


def enter(
    seen: Seen,
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    momentum: float | None,
    biased: bool,
) -> bool | None:
    """Enter a batch into running statistics in one call, or nothing of it if it is not finite.

    Returns whether it was finite; None if this cannot be done here.
    """
    if type(seen) is not Kept:  # which only a call by address leaves
        return None
    for held in (running_mean, running_var):
        if not (type(held) is Tensor and held.dtype is torch.float32 and held.is_contiguous()):
            return None
    if seen.values < 2:
        return False
    correction = 1.0 / (seen.values if biased else seen.values - 1.0)
    return _calls.enter(
        seen.stats, seen.channels, running_mean, running_var, tracked, momentum, correction
    )


# -- the seam, between whose functions collectives go ---------------------------------------------


def moments(x: Tensor, valid: Tensor | None) -> Moments:
    """The batch's statistics."""
    call = _calls.prepare(x.detach(), None, None, None, valid, 1.0, None)
    count = _calls.count_of(x, valid)
    _, kept, _ = _calls.forward(call, None, count=count, want_y=False)
    return Kept(kept, x.shape[1], count, valid is not None).moments()


def normalize(
    x: Tensor,
    stats: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: Parsed,
    residual: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """y = act(γ·x̂ + β + residual) with the given statistics."""
    with torch.no_grad():
        return by_address(x, weight, bias, stats, eps, act, residual, valid)[0]


def reduce_grads(
    dy: Tensor,
    x: Tensor,
    stats: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: Parsed,
    residual: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dβ = Σ dy and dγ = Σ dy·x̂ per channel, float64, dy taken before the activation."""
    before, slope = _before(dy, x, stats, weight, bias, eps, act, residual, valid)
    call = _calls.prepare(x, weight, bias, None, valid, eps, slope)
    kept = _kept(stats, weight, bias, eps)
    before = _calls.arranged(before, call.layout)
    sums = torch.empty(2, x.shape[1], dtype=torch.float64, device=_calls.CPU)
    _calls.backward(before, call, kept, None, 1.0, True, sums=sums, want_dx=False)
    return sums[0], sums[1]


def grad_input(
    dy: Tensor,
    x: Tensor,
    stats: Moments,
    sums: tuple[Tensor, Tensor],
    n: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: Parsed,
    residual: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """dx = γ·rstd·(dy − mean(dy) − x̂·mean(dy·x̂)), and the residual's gradient."""
    before, slope = _before(dy, x, stats, weight, bias, eps, act, residual, valid)
    call = _calls.prepare(x, weight, bias, None, valid, eps, slope)
    kept = _kept(stats, weight, bias, eps)
    before = _calls.arranged(before, call.layout)
    count = 1.0 if n is None else float(n.flatten()[0])
    both = torch.stack([s.to(torch.float64) for s in sums])
    dx, *_ = _calls.backward(before, call, kept, None, count, n is None, sums=both, given=True)
    assert dx is not None
    if residual is None:
        return dx, None
    return dx, before if valid is None else before.masked_fill(~valid, 0.0)


def _before(
    dy: Tensor,
    x: Tensor,
    stats: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: Parsed,
    residual: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, float | None]:
    """dy before what the kernels do not fuse, and the slope of what they do."""
    slope = _autograd.slope_of(act)
    if act is None or (slope is not None and residual is None):
        return dy, slope
    z = normalize(x, stats, weight, bias, eps, None, residual, valid)
    if slope is not None:
        return torch.where(z <= 0, dy * slope, dy), None
    return _autograd.through(dy, z, act), None


def _kept(stats: Moments, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The plan of given statistics, where a forward would have kept it."""
    rstd = (stats.var() + eps).rsqrt()
    high = stats.mean.float()
    low = stats.mean - high.double()
    scale = rstd if weight is None else rstd * weight.detach()
    shift = -low * scale if bias is None else bias.detach() - low * scale
    plan = torch.cat([high, scale.float(), shift.float(), rstd.float(), (low * rstd).float()])
    channels = high.numel()
    kept = torch.empty(_calls.kept_size(channels), dtype=torch.float64, device=_calls.CPU)
    kept[2 * channels :].view(torch.float32)[: 5 * channels] = plan
    return kept
