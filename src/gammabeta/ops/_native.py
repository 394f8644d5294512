"""PyTorch's own batch normalization, with its speed and its numerics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gammabeta.moments import Moments, over, reduced
from gammabeta.ops import _activations, _reference, _torch
from gammabeta.ops._activations import Parsed
from gammabeta.ops._seen import Batch, Held

# Promises of docs/numerics.md that this backend does not keep.
LACKS: tuple[str, ...] = (
    "error at most 2e-6 for a mean of up to 1e6 standard deviations",
    "a constant channel gives exactly the bias",
    "values up to 1e30 give finite results",
    "gradients within 4e-6 (dx), 2e-6 (dγ) and 1e-6 (dβ) of their units",
    "the same bits for any number of threads",
)
_LOW = (torch.float16, torch.bfloat16)


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
    """The reason why PyTorch's op cannot run this call, or None."""
    if mask is not None:
        return "PyTorch's op takes no mask"
    if eps <= 0:
        return f"PyTorch's op needs eps > 0, got {eps}"
    wide = torch.float32 if x.dtype in _LOW else x.dtype
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != wide:
            return f"PyTorch's op needs {name} in {wide} beside an input in {x.dtype}"
    if stats is None and x.numel() <= (x.shape[1] if group is None else 0):
        return "PyTorch's op needs more than one value per channel to take statistics"
    return None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Moments | None,
    eps: float,
    act: Parsed,
    residual: Tensor | None,
) -> tuple[Tensor, Moments | Batch]:
    """Everything in one call.

    The op reports a batch's statistics only by an update of running buffers: two fresh ones
    with momentum 1.
    """
    seen: Moments | Batch
    if stats is None:
        wide = torch.float32 if x.dtype in _LOW else x.dtype
        both = torch.zeros(2, x.shape[1], dtype=wide, device=x.device)
        if _torch.recorded():  # tracers know the op that users know
            mean, var = both.unbind()
            cudnn = torch.backends.cudnn.enabled
            z = torch.batch_norm(x, weight, bias, mean, var, True, 1.0, eps, cudnn)
        else:
            z = _fused(x, weight, bias, both, eps)
        seen = Batch(both, x.numel() // x.shape[1])
    else:
        z = normalize(x, stats, weight, bias, eps, None, None, None)
        seen = stats
    if residual is not None:
        z = z + residual
    return _activations.apply(act, z), seen


class _Fused(torch.autograd.Function):
    """PyTorch's forward and backward in training mode, whichever kernel it picks.

    Its second derivative holds the batch's statistics constant where it is differentiated again,
    so that third derivatives come out wrong in silence: where the backward itself is to be
    differentiated, the equations of the reference run instead.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, both: Tensor, eps: float
    ) -> Tensor:
        mean, var = both.unbind()
        cudnn = torch.backends.cudnn.enabled
        y: Tensor
        y, *saved, reserve, kernel = _forward(x, weight, bias, mean, var, True, 1.0, eps, cudnn)
        ctx.save_for_backward(x, weight, bias, *saved, reserve)
        ctx.eps, ctx.kernel = eps, kernel
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, *saved, reserve = ctx.saved_tensors
        if torch.is_grad_enabled():
            call = (grads[0], x, weight, bias, None, None, None, ctx.eps, None)
            return *_reference.gradients(*call)[:3], None, None
        needed = list(ctx.needs_input_grad[:3])
        rest = (None, None, *saved, True, ctx.eps, needed, reserve)
        dx, dweight, dbias = _backward(ctx.kernel, x, grads[0], weight, *rest)
        # without γ the kernel still gives its gradient
        return dx, None if weight is None else dweight, None if bias is None else dbias, None, None


# torch leaves these without types
_fused: Callable[..., Tensor] = _Fused.apply
_forward: Callable[..., Any] = torch.ops.aten._batch_norm_impl_index.default
_backward: Callable[..., Any] = torch.ops.aten._batch_norm_impl_index_backward.default


def moments(x: Tensor, valid: Tensor | None) -> Moments:
    """Mean and variance by torch.var_mean in the input's precision (float32 at least)."""
    wide = x.detach().to(torch.float32 if x.dtype in _LOW else x.dtype)
    var, mean = torch.var_mean(wide, reduced(x), correction=0)
    count = x.numel() // x.shape[1]
    n = torch.full((), count, dtype=torch.float64, device=x.device)
    return Moments(n, mean.to(torch.float64), var.to(torch.float64) * count)


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
    """y = act(γ·x̂ + β + residual) with the given statistics, by PyTorch's inference op."""
    wide = torch.float32 if x.dtype in _LOW else x.dtype
    mean, var = stats.mean.to(wide), stats.var().to(wide)
    cudnn = torch.backends.cudnn.enabled
    z = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, cudnn)
    return _activations.apply(act, z if residual is None else z + residual)


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
    """Σ dy and Σ dy·x̂ per channel, dy taken before the activation."""
    xhat = normalize(x, stats, None, None, eps, None, None, None)
    dz = _through_activation(dy, xhat, weight, bias, act, residual)
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
    """dx = γ·rstd·(dy − mean(dy) − x̂·mean(dy·x̂)), and the residual's gradient."""
    xhat = normalize(x, stats, None, None, eps, None, None, None)
    dz = _through_activation(dy, xhat, weight, bias, act, residual)
    dx = dz
    if n is not None:
        sum_dy, sum_dy_xhat = (over((s / n).to(xhat.dtype), x) for s in sums)
        dx = dz - sum_dy - xhat * sum_dy_xhat
    rstd = (stats.var() + eps).rsqrt().to(xhat.dtype)
    dx = dx * over(rstd if weight is None else rstd * weight, x)
    return dx.to(x.dtype), None if residual is None else dz.to(residual.dtype)


def _through_activation(
    dy: Tensor,
    xhat: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: Parsed,
    residual: Tensor | None,
) -> Tensor:
    z = xhat if weight is None else xhat * over(weight, xhat)
    if bias is not None:
        z = z + over(bias, xhat)
    slope = _activations.derivative(act, z if residual is None else z + residual)
    return dy if slope is None else dy * slope
