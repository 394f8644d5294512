"""The methods beside batch normalization in float64 NumPy: the judge of the layers.

Written from the papers' algorithms, each forward with its gradients by hand; no torch, no code
shared with the package, and other routes where there are some: the covariance's root comes from
singular values of the data, its derivative from a linear system, ghosts from a loop. Arrays have
their channels on axis 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Result(NamedTuple):
    """Output, and the gradients for an incoming ``dy``."""

    y: Array
    dx: Array
    dweight: Array
    dbias: Array


def columns(x: Array) -> Array:
    """(N, C, ...) as (C, M): all values of a channel in one row."""
    return np.moveaxis(np.asarray(x, np.float64), 1, 0).reshape(x.shape[1], -1)


def back(rows: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of :func:`columns`."""
    return np.moveaxis(rows.reshape(shape[1], shape[0], *shape[2:]), 0, 1)


def _standardize(rows: Array, eps: float) -> tuple[Array, Array, Array]:
    mean = rows.mean(1, keepdims=True)
    deviation = np.sqrt(((rows - mean) ** 2).mean(1, keepdims=True) + eps)
    return (rows - mean) / deviation, mean, deviation


def _input_gradient(dxhat: Array, xhat: Array, deviation: Array) -> Array:
    """Through the mean and the variance of the rows."""
    m = xhat.shape[1]
    total = dxhat.sum(1, keepdims=True) + xhat * (dxhat * xhat).sum(1, keepdims=True)
    return (dxhat - total / m) / deviation


def renorm(
    x: Array,
    weight: Array,
    bias: Array,
    dy: Array,
    mean: Array,
    var: Array,
    *,
    r_max: float,
    d_max: float,
    eps: float = 1e-5,
) -> Result:
    """Ioffe 2017, Algorithm 1; r and d are constants. mean and var are the running ones."""
    rows, dyr = columns(x), columns(dy)
    xhat, batch_mean, batch_deviation = _standardize(rows, eps)
    deviation = np.sqrt(var + eps)[:, None]
    r = np.minimum(np.maximum(batch_deviation / deviation, 1 / r_max), r_max)
    d = np.minimum(np.maximum((batch_mean - mean[:, None]) / deviation, -d_max), d_max)
    corrected = xhat * r + d
    y = weight[:, None] * corrected + bias[:, None]
    dx = _input_gradient(dyr * weight[:, None] * r, xhat, batch_deviation)
    return Result(back(y, x.shape), back(dx, x.shape), (dyr * corrected).sum(1), dyr.sum(1))


def ghost(
    x: Array, weight: Array, bias: Array, dy: Array, *, size: int, eps: float = 1e-5
) -> Result:
    """Hoffer et al. 2017, Algorithm 1: one ghost after the other."""
    y, dx = np.empty(x.shape), np.empty(x.shape)
    dweight, dbias = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        xhat, _, deviation = _standardize(columns(x[part]), eps)
        dyr = columns(dy[part])
        shape = x[part].shape
        y[part] = back(weight[:, None] * xhat + bias[:, None], shape)
        dx[part] = back(_input_gradient(dyr * weight[:, None], xhat, deviation), shape)
        dweight += (dyr * xhat).sum(1)
        dbias += dyr.sum(1)
    return Result(y, dx, dweight, dbias)


def zca_root(centered: Array, eps: float) -> Array:
    """(XXᵀ/m + eps·I)^(-1/2) from the singular values of X; those that are missing are 0."""
    d, m = centered.shape
    vectors, singular, _ = np.linalg.svd(centered, full_matrices=True)
    squares = np.zeros(d)
    squares[: len(singular)] = singular**2 / m
    return (vectors / np.sqrt(squares + eps)) @ vectors.T


def _zca_gradient(root: Array, droot: Array) -> Array:
    """dL/dS for W = S^(-1/2): W·dW + dW·W = −W²·dS·W² as one linear system."""
    d = len(root)
    identity = np.eye(d)
    system = np.kron(root, identity) + np.kron(identity, root)
    solution = np.linalg.solve(system, droot.reshape(-1)).reshape(d, d)
    square = root @ root
    return -square @ solution @ square


def newton_root(covariance: Array, steps: int) -> tuple[Array, list[Array]]:
    """P_T/√tr and all P: Huang et al. 2019, Algorithm 1."""
    trace = np.trace(covariance)
    iterates = [np.eye(len(covariance))]
    for _ in range(steps):
        p = iterates[-1]
        iterates.append(1.5 * p - 0.5 * p @ p @ p @ (covariance / trace))
    return iterates[-1] / np.sqrt(trace), iterates


def _newton_gradient(covariance: Array, iterates: list[Array], droot: Array) -> Array:
    """The iteration run backwards."""
    trace = np.trace(covariance)
    scaled = covariance / trace
    dp = droot / np.sqrt(trace)
    dscaled = np.zeros_like(scaled)
    for p in reversed(iterates[:-1]):
        dscaled += -0.5 * (p @ p @ p).T @ dp
        product = dp @ (p @ p @ scaled).T + p.T @ dp @ (p @ scaled).T + (p @ p).T @ dp @ scaled.T
        dp = 1.5 * dp - 0.5 * product
    dtrace = -0.5 * trace**-1.5 * (droot * iterates[-1]).sum()
    dtrace -= (dscaled * covariance).sum() / trace**2
    return dscaled / trace + dtrace * np.eye(len(covariance))


def whiten(
    x: Array,
    weight: Array,
    bias: Array,
    dy: Array,
    *,
    group: int,
    steps: int | None = None,
    eps: float = 1e-5,
) -> Result:
    """Huang et al. 2018 (ZCA, ``steps`` None) and 2019 (Newton), group after group."""
    rows, dyr = columns(x), columns(dy)
    m = rows.shape[1]
    xhat, dx = np.empty_like(rows), np.empty_like(rows)
    for start in range(0, len(rows), group):
        part = slice(start, start + group)
        centered = rows[part] - rows[part].mean(1, keepdims=True)
        covariance = centered @ centered.T / m + eps * np.eye(group)
        dxhat = dyr[part] * weight[part, None]
        if steps is None:
            root = zca_root(centered, eps)
            dcovariance = _zca_gradient(root, dxhat @ centered.T)
        else:
            root, iterates = newton_root(covariance, steps)
            dcovariance = _newton_gradient(covariance, iterates, dxhat @ centered.T)
        xhat[part] = root @ centered
        dcentered = root.T @ dxhat + (dcovariance + dcovariance.T) @ centered / m
        dx[part] = dcentered - dcentered.mean(1, keepdims=True)
    y = weight[:, None] * xhat + bias[:, None]
    return Result(back(y, x.shape), back(dx, x.shape), (dyr * xhat).sum(1), dyr.sum(1))


class Running(NamedTuple):
    """Running mean, variance and covariance (d × d in each group) after some batches."""

    mean: Array
    var: Array
    cov: Array


def running(
    batches: Sequence[Array], momentum: float | None, group: int, *, unbiased: bool = True
) -> Running:
    """From 0, 1 and the identity; ``momentum`` is the weight of the new value."""
    channels = batches[0].shape[1]
    state = Running(
        np.zeros(channels), np.ones(channels), np.tile(np.eye(group), (channels // group, 1, 1))
    )
    for count, batch in enumerate(batches, start=1):
        rows = columns(batch)
        full = np.atleast_2d(np.cov(rows, bias=not unbiased))
        blocks = [
            full[g : g + group, g : g + group] for g in range(0, channels, group)
        ]  # the covariances between groups are not kept
        new = Running(rows.mean(1), np.diag(full), np.stack(blocks))
        share = 1 / count if momentum is None else momentum
        state = Running(*((1 - share) * a + share * b for a, b in zip(state, new, strict=True)))
    return state


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
