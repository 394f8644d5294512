"""The numerics that the CPU kernels promise, as bounds around the float64 oracle.

In float32, before the activation, with x̂*, y*, dx* ... the oracle's values of the same input:
|y − y*| ≤ 2e-6·(|γ|·max(1, |x̂*|) + |β| + |residual|), |dx − dx*| ≤ 4e-6·|γ|·rstd·max|dy|,
|dβ − dβ*| ≤ 1e-6·Σ|dy|, |dγ − dγ*| ≤ 2e-6·Σ|dy·x̂*|, each maximum and sum over a channel.

Where these four cannot hold of any float32 result, and what is tested instead:

- dy has jumped where an activation bends at 0. Where y* before the activation is within its bound
  of 0, either side is right, and the gradients must be those of the side that our y took.
- dγ where dy is large only at values near the mean: x̂ has an error relative to its own scale,
  not to x̂*. So Σ|dy·x̂*| counts |x̂*| below the channel's own √mean(x̂*²) as that.
- dx where |x̂| is large: its third term is x̂·mean(dy·x̂), which alone is rounded by
  6e-8·|x̂|·mean|dy·x̂|. So max|dy| is multiplied by max(1, |x̂*|/8), 1 for all but wild outliers.
- An activation that the kernels do not fuse is PyTorch's own, of the kernel's y, rounded to the
  input's precision: its slope carries the error of y on, and its own rounding is added.
- A bfloat16 result is rounded once more: 2⁻⁸ of itself.
- Below 1e-37 float32 itself loses digits: some of its smallest steps are added to every bound.
"""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import oracle
import torch

FUSED = (None, "relu", "leaky_relu")
_HALF = 2.0**-8  # bfloat16: half a step, relative
_OWN = 1e-6  # the rounding of an activation of PyTorch's and of its derivative, float32
_STEEP, _CURVED = 1.13, 0.8  # the largest |act'| and |act''| of all smooth activations
_TINY = 16 * 1.4e-45


def _wide(vector: Any, ndim: int) -> Any:
    return np.asarray(vector, np.float64).reshape((1, -1) + (1,) * (ndim - 2))


def _check(name: str, ours: Any, truth: Any, bound: Any) -> None:
    if ours is None:
        return
    ours = cases.numpy(ours)
    assert ours.shape == truth.shape, name
    assert np.isfinite(ours).all(), name
    bound = np.broadcast_to(bound, truth.shape) + _TINY
    excess = np.abs(ours - truth) - bound
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, (
        f"{name}{[int(i) for i in worst]}: {ours[worst]!r}, the truth is {truth[worst]!r}, "
        f"off by {abs(ours[worst] - truth[worst]):.3g} where {bound[worst]:.3g} is allowed"
    )


def assert_kept(
    call: cases.Call,
    y: torch.Tensor,
    grads: dict[str, torch.Tensor],
    moments: Any = None,
    *,
    eps: float = 1e-5,
    act: Any = None,
    given: Any = None,
) -> None:
    """Assert every bound for the result of ``cases.run(call, eps=eps, act=act, given=given)``."""
    x, weight, bias, residual, mask, dy = (cases.numpy(t) for t in call)
    given = None if given is None else tuple(cases.numpy(t) for t in given)
    axes = (0, *range(2, x.ndim))
    stated = {"eps": eps, "mask": mask, "given": given}
    if mask is not None:
        valid = np.broadcast_to(np.broadcast_to(mask, x.shape[:1] + x.shape[2:])[:, None], x.shape)
        x, dy = np.where(valid, x, 0.0), np.where(valid, dy, 0.0)
        residual = None if residual is None else np.where(valid, residual, 0.0)
    xhat = oracle.forward(x, **stated)
    z = oracle.forward(x, weight, bias, residual=residual, **stated)
    seen = oracle.statistics(x, mask)
    var = seen.m2 / max(seen.n, 1.0) if given is None else given[1]
    gamma = _wide(np.ones_like(var) if weight is None else np.abs(weight), x.ndim)
    size = gamma * np.maximum(1, np.abs(xhat))
    size = size + (0 if bias is None else np.abs(_wide(bias, x.ndim)))
    size = size + (0 if residual is None else np.abs(residual))
    off = 2e-6 * size
    name, slope = act if isinstance(act, tuple) else (act, 0.01 if act == "leaky_relu" else 0.0)
    half = _HALF if call.x.dtype == torch.bfloat16 else 0.0
    value, bend = oracle.activation(act, z)
    if name in FUSED:
        if name is not None:
            bend = np.where(np.abs(z) <= off, np.where(cases.numpy(y) > 0, 1.0, slope), bend)
        y_off = off * max(1.0, slope) + 1e-7 * slope * np.abs(value)
        bend_off = np.zeros_like(z)
    else:
        z_off = off + half * (np.abs(z) + off)
        y_off = _STEEP * z_off + _OWN * np.maximum(1, np.abs(value))
        bend_off = _CURVED * z_off + _OWN
        bend_off = bend_off + half * (np.abs(bend) + bend_off)
    y_off = y_off + half * (np.abs(value) + y_off)
    du, du_off = dy * bend, np.abs(dy) * bend_off
    truth = oracle.backward(du, x, weight, bias, residual=residual, **stated)
    rms = np.sqrt((xhat**2).sum(axes) / max(seen.n, 1.0))
    blurred = np.maximum(np.abs(xhat), _wide(rms, x.ndim))
    rstd = _wide(1 / np.sqrt(var + eps), x.ndim)
    largest, rough = (v.max(axes, keepdims=True, initial=0.0) for v in (np.abs(du), du_off))
    wild = np.maximum(1, np.abs(xhat) / 8)
    dx_off = gamma * rstd * (4e-6 * largest * wild + 3 * rough * np.maximum(1, np.abs(xhat)))
    dx_off = dx_off + half * (np.abs(truth.dx) + dx_off)
    dresidual_off = du_off + (2e-7 + half) * np.abs(du)
    if mask is not None:
        value, y_off, dx_off, dresidual_off = (
            np.where(valid, v, 0.0) for v in (value, y_off, dx_off, dresidual_off)
        )
    _check("y", y, value, y_off)
    _check("dbias", grads.get("dbias"), truth.dbias, (1e-6 * np.abs(du) + du_off).sum(axes))
    bound = ((2e-6 * np.abs(du) + du_off) * blurred).sum(axes)
    _check("dweight", grads.get("dweight"), truth.dweight, bound)
    _check("dx", grads.get("dx"), truth.dx, dx_off)
    _check("dresidual", grads.get("dresidual"), truth.dresidual, dresidual_off)
    if given is None and moments is not None:
        std = np.sqrt(seen.m2 / max(seen.n, 1.0))
        _check("mean", moments.mean, seen.mean, 1e-6 * std + 1e-15 * np.abs(seen.mean))
        _check("m2", moments.m2, seen.m2, 2e-6 * seen.m2)
        assert set(moments.n.view(-1).tolist()) == {seen.n}
