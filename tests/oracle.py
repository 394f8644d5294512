"""Batch normalization in float64 NumPy: the judge of every other implementation.

Written from the equations (Ioffe & Szegedy 2015, Algorithm 1 and section 3) and from nothing
else: no torch, no code shared with the package. Arrays have their channels on axis 1; a mask has
the shape of ``x`` without that axis (or one that broadcasts to it) and True means valid.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Act = None | str | tuple[str, float | str]

_erf = np.vectorize(math.erf, otypes=[np.float64])


class Statistics(NamedTuple):
    """Number of values behind each channel, their mean and their sum of squared deviations."""

    n: float
    mean: Array
    m2: Array

    @property
    def var(self) -> Array:
        return self.m2 / self.n

    @property
    def unbiased(self) -> Array:
        return self.m2 / (self.n - 1)


class Gradients(NamedTuple):
    dx: Array
    dweight: Array
    dbias: Array
    dresidual: Array


def _sigmoid(u: Array) -> Array:
    # Both branches are evaluated only where their exponential cannot overflow.
    e = np.exp(-np.abs(u))
    return np.where(u >= 0, 1 / (1 + e), e / (1 + e))


def _gelu_tanh(u: Array) -> tuple[Array, Array]:
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (u + 0.044715 * u**3))
    du = c * (1 + 3 * 0.044715 * u**2)
    return 0.5 * u * (1 + t), 0.5 * (1 + t) + 0.5 * u * (1 - t**2) * du


def activation(act: Act, u: Array) -> tuple[Array, Array]:
    """The activation's value and its derivative; at a kink the derivative from the left."""
    name, parameter = act if isinstance(act, tuple) else (act, None)
    u = np.asarray(u, np.float64)
    if name is None:
        return u, np.ones_like(u)
    if name == "relu":
        return np.maximum(u, 0), (u > 0).astype(np.float64)
    if name == "leaky_relu":
        slope = 0.01 if parameter is None else float(parameter)
        return np.where(u > 0, u, slope * u), np.where(u > 0, 1.0, slope)
    if name == "sigmoid":
        s = _sigmoid(u)
        return s, s * (1 - s)
    if name == "tanh":
        t = np.tanh(u)
        return t, 1 - t**2
    if name == "softplus":
        return np.logaddexp(0, u), _sigmoid(u)
    if name == "silu":
        s = _sigmoid(u)
        return u * s, s + u * s * (1 - s)
    if name == "gelu" and parameter == "tanh":
        return _gelu_tanh(u)
    if name == "gelu":
        cdf = 0.5 * (1 + _erf(u / math.sqrt(2)))
        return u * cdf, cdf + u * np.exp(-0.5 * u**2) / math.sqrt(2 * math.pi)
    raise ValueError(f"the oracle knows no activation {act!r}")


def _wide(vector: Array | None, ndim: int, default: float) -> Array:
    """A value per channel, shaped so that it multiplies x."""
    if vector is None:
        return np.full((1,) * ndim, default)
    return np.asarray(vector, np.float64).reshape((1, -1) + (1,) * (ndim - 2))


def _valid(x: Array, mask: Array | None) -> Array:
    """The mask at full size, channels included."""
    if mask is None:
        return np.ones(x.shape, bool)
    without_channels = x.shape[:1] + x.shape[2:]
    return np.broadcast_to(np.broadcast_to(mask, without_channels)[:, None], x.shape)


def statistics(x: Array, mask: Array | None = None) -> Statistics:
    """n, mean and sum of squared deviations of each channel over its valid values."""
    x = np.asarray(x, np.float64)
    n, mean, m2 = _statistics(_Held(x), None if mask is None else _Held(mask))
    return Statistics(n, mean.copy(), m2.copy())


class _Held:
    """An array that is compared by its values, to look up what was made of it."""

    def __init__(self, array: Array) -> None:
        self.array = np.array(array)
        self.key = (self.array.shape, self.array.dtype.str, self.array.tobytes())

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.key == other.key


@functools.lru_cache(maxsize=4)  # forward, backward and their judges ask for the same ones
def _statistics(held: _Held, mask_held: _Held | None) -> Statistics:
    x, mask = held.array, None if mask_held is None else mask_held.array
    valid = _valid(x, mask)
    columns = [np.moveaxis(x, 1, 0)[c][np.moveaxis(valid, 1, 0)[c]] for c in range(x.shape[1])]
    # math.fsum is exact, so these statistics owe nothing to an order of summation.
    count = float(columns[0].size) if columns else 0.0
    mean = np.array([math.fsum(v.tolist()) / v.size if v.size else 0.0 for v in columns])
    m2 = np.array([math.fsum(((v - m) ** 2).tolist()) for v, m in zip(columns, mean, strict=True)])
    return Statistics(count, mean, m2)


class _Parts(NamedTuple):
    x: Array
    valid: Array
    rstd: Array
    xhat: Array
    before_act: Array


def _parts(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    residual: Array | None,
    mask: Array | None,
    given: tuple[Array, Array] | None,
) -> _Parts:
    x = np.asarray(x, np.float64)
    valid = _valid(x, mask)
    x = np.where(valid, x, 0.0)
    if given is None:
        stats = statistics(x, mask)
        mean, var = stats.mean, stats.m2 / max(stats.n, 1.0)
    else:
        mean, var = (np.asarray(v, np.float64) for v in given)
    with np.errstate(divide="ignore"):
        # A constant channel with eps = 0 has nothing to scale: its rstd is defined as 0.
        rstd = _wide(np.where(var + eps == 0, 0.0, 1 / np.sqrt(var + eps)), x.ndim, 1.0)
    xhat = (x - _wide(mean, x.ndim, 0.0)) * rstd
    u = xhat * _wide(weight, x.ndim, 1.0) + _wide(bias, x.ndim, 0.0)
    if residual is not None:
        u = u + np.where(valid, np.asarray(residual, np.float64), 0.0)
    return _Parts(x, valid, rstd, xhat, u)


def forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    act: Act = None,
    residual: Array | None = None,
    mask: Array | None = None,
    given: tuple[Array, Array] | None = None,
) -> Array:
    """y = act(γ·(x − mean)·rstd + β + residual); 0 where the mask is False.

    ``given`` is (mean, biased variance) and means inference.
    """
    parts = _parts(x, weight, bias, eps, residual, mask, given)
    return np.where(parts.valid, activation(act, parts.before_act)[0], 0.0)


def backward(
    dy: Array,
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    act: Act = None,
    residual: Array | None = None,
    mask: Array | None = None,
    given: tuple[Array, Array] | None = None,
) -> Gradients:
    """The closed form: dβ = Σdu, dγ = Σdu·x̂, dx = γ·rstd·(du − mean(du) − x̂·mean(du·x̂)).

    du is dy behind the activation; the means run over the valid values and vanish at inference,
    where the statistics do not depend on x.
    """
    parts = _parts(x, weight, bias, eps, residual, mask, given)
    du = np.where(parts.valid, np.asarray(dy, np.float64) * activation(act, parts.before_act)[1], 0)
    axes = (0, *range(2, parts.x.ndim))
    dbias = du.sum(axes)
    dweight = (du * parts.xhat).sum(axes)
    scale = _wide(weight, parts.x.ndim, 1.0) * parts.rstd
    if given is None:
        n = max(statistics(parts.x, mask).n, 1.0)
        du_mean, du_xhat_mean = (_wide(v / n, parts.x.ndim, 0.0) for v in (dbias, dweight))
        dx = scale * (du - du_mean - parts.xhat * du_xhat_mean)
    else:
        dx = scale * du
    return Gradients(np.where(parts.valid, dx, 0.0), dweight, dbias, du)


class Running(NamedTuple):
    mean: Array
    var: Array
    batches: int


def running(
    batches: Sequence[Array],
    momentum: float | None,
    *,
    stored: str = "unbiased",
    masks: Sequence[Array | None] | None = None,
) -> Running:
    """The running statistics of a new layer after these batches.

    ``momentum`` is the weight of the new value, as in PyTorch; None is the plain average.
    """
    channels = batches[0].shape[1]
    mean, var = np.zeros(channels), np.ones(channels)
    for k, batch in enumerate(batches, start=1):
        stats = statistics(batch, None if masks is None else masks[k - 1])
        weight = 1 / k if momentum is None else momentum
        new_var = stats.unbiased if stored == "unbiased" else stats.var
        mean = (1 - weight) * mean + weight * stats.mean
        var = (1 - weight) * var + weight * new_var
    return Running(mean, var, len(batches))


def numerical_gradient(f: Callable[[Array], float], x: Array, step: float = 1e-5) -> Array:
    """Central differences of a scalar function, one coordinate at a time."""
    x = np.array(x, np.float64)
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + step
        high = f(x)
        x[i] = kept - step
        low = f(x)
        x[i] = kept
        gradient[i] = (high - low) / (2 * step)
    return gradient
