"""The equations as the literature writes them, in float64, for any floating dtype.

Slow, plain and accurate: what every other backend is compared with, and what runs where the
others cannot (masks, torch.func, forward mode, derivatives above the first). Every operation
is one that autograd can differentiate any number of times.

Source: Ioffe & Szegedy 2015, Algorithm 1 and the equations of section 3, arXiv:1502.03167.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gammabeta.moments import Moments, over, reduced, statistics
from gammabeta.ops import _activations
from gammabeta.ops._activations import Parsed

LACKS: tuple[str, ...] = ()  # promises of docs/numerics.md that this backend does not keep


def why_not(x: Tensor, *call: Any) -> str | None:
    """None: the reference runs everywhere."""
    return None


def moments(x: Tensor, valid: Tensor | None) -> Moments:
    """μ = (1/m) Σ xᵢ and σ² = (1/m) Σ (xᵢ − μ)², detached; the mask has its channel axis."""
    return statistics(x.detach(), valid)


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
    """y = act(γ·x̂ + β + residual), x̂ = (x − μ)/√(σ² + ε); 0 where the mask is False."""
    _, _, z = _preactivation(x, stats, weight, bias, eps, residual, valid)
    y = _activations.apply(act, z)
    if valid is not None:
        y = torch.where(valid, y, 0.0)
    return y.to(output_dtype(x, residual))


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
    xhat, _, z = _preactivation(x, stats, weight, bias, eps, residual, valid)
    dz = _through_activation(dy, z, act, valid)
    return dz.sum(reduced(x)), (dz * xhat).sum(reduced(x))


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
    """dx = γ·rstd·(dy − mean(dy) − x̂·mean(dy·x̂)), and the residual's gradient.

    ``n`` is the count that the sums were taken over; None when the statistics were given, so
    that they do not depend on x and the two means drop out (inference).
    """
    xhat, rstd, z = _preactivation(x, stats, weight, bias, eps, residual, valid)
    dz = _through_activation(dy, z, act, valid)
    dx = dz
    if n is not None:
        sum_dy, sum_dy_xhat = (over(s / n.clamp(min=1), x) for s in sums)
        dx = dz - sum_dy - xhat * sum_dy_xhat
    scale = rstd if weight is None else rstd * weight.to(torch.float64)
    dx = dx * over(scale, x)
    if valid is not None:
        dx = torch.where(valid, dx, 0.0)
    return dx.to(x.dtype), None if residual is None else dz.to(residual.dtype)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    given: Moments | None,
    eps: float,
    act: Parsed,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dγ, dβ and the residual's gradient, to be differentiated again.

    The statistics are taken once more, so that they depend on x; saved ones would be constants.
    """
    stats = statistics(x, valid) if given is None else given
    rest = (weight, bias, eps, act, residual, valid)
    sums = reduce_grads(dy, x, stats, *rest)
    n = stats.n if given is None else None
    dx, dresidual = grad_input(dy, x, stats, sums, n, *rest)
    dweight = None if weight is None else sums[1].to(weight.dtype)
    return dx, dweight, None if bias is None else sums[0].to(bias.dtype), dresidual


def _preactivation(
    x: Tensor,
    stats: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x̂, rstd and z = γ·x̂ + β + residual, in float64; x̂ = 0 at masked positions."""
    x64 = x.to(torch.float64)
    if valid is not None:  # before any arithmetic: NaN · 0 is NaN
        x64 = torch.where(valid, x64, over(stats.mean, x64))
    total = stats.m2 / stats.n.clamp(min=1) + eps
    # a channel with var + eps = 0 is constant: rstd := 0, so that y = β and dx = 0
    zero = total == 0
    rstd = torch.where(zero, 0.0, torch.where(zero, 1.0, total).rsqrt())
    xhat = (x64 - over(stats.mean, x64)) * over(rstd, x64)
    z = xhat if weight is None else xhat * over(weight.to(torch.float64), x64)
    if bias is not None:
        z = z + over(bias.to(torch.float64), x64)
    if residual is not None:
        extra = residual.to(torch.float64)
        z = z + (extra if valid is None else torch.where(valid, extra, 0.0))
    return xhat, rstd, z


def _through_activation(dy: Tensor, z: Tensor, act: Parsed, valid: Tensor | None) -> Tensor:
    dz = dy.to(torch.float64)
    if valid is not None:
        dz = torch.where(valid, dz, 0.0)
    slope = _activations.derivative(act, z)
    return dz if slope is None else dz * slope


def output_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """The dtype of y: that of x, promoted by the residual's."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
