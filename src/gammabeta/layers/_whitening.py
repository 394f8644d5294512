"""What whitening layers share: mergeable covariances, inverse square roots, one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gammabeta.layers._method import Method, in_format_of, wide_dtype
from gammabeta.moments import spread_mask
from gammabeta.ops._seen import Held


class CrossMoments(NamedTuple):
    """Count, mean and sums of products of deviations of a batch, within groups of channels.

    Detached, float64: n (), mean (C,), m2 (G, d, d) with C = G·d.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor

    def merge(self, other: CrossMoments) -> CrossMoments:
        """Pool as if both had been one batch: m2 = m2₁ + m2₂ + δδᵀ n₁n₂/n."""
        n = self.n + other.n
        share = other.n / n.clamp(min=1)
        delta = other.mean - self.mean
        column = delta.reshape(*self.m2.shape[:2], 1)
        m2 = self.m2 + other.m2 + column * column.mT * (self.n * share)
        return CrossMoments(n, self.mean + delta * share, m2)


class Whitening(Method):
    """y = γ·W(x − mean) + β in each group of channels, with W an inverse root of Σ + eps·I.

    Beside running_mean (C,) there is running_cov (G, d, d) in place of running_var.
    """

    running_cov: Tensor | None
    _buffer_names = ("running_mean", "running_cov")

    def __init__(self, num_features: int, eps: float, group_size: int, *rest: Any) -> None:
        kind = type(self).__name__
        if not eps > 0:
            raise ValueError(
                f"{kind}: eps must be > 0, or a batch with fewer values than channels in a group "
                f"has no inverse, got {eps}. Usual is 1e-5."
            )
        if not isinstance(group_size, int) or group_size < 1:
            raise ValueError(
                f"{kind}: group_size must be a whole number of channels, at least 1, got "
                f"{group_size!r}."
            )
        size = min(group_size, max(num_features, 1))
        if num_features % size:
            fits = [d for d in range(1, num_features + 1) if num_features % d == 0]
            raise ValueError(
                f"{kind}: groups must have equally many channels, got group_size={group_size} for "
                f"{num_features} features. These divide it: {', '.join(map(str, fits))}."
            )
        super().__init__(num_features, eps, *rest)
        self.group_size = size
        mean = self.running_mean
        self.running_var = None
        cov = None
        if mean is not None:
            cov = mean.new_zeros(num_features // size, size, size)
        self.register_buffer("running_cov", cov)
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Set running_mean to 0, running_cov to the identity, num_batches_tracked to 0."""
        for name in ("running_mean", "num_batches_tracked"):
            held = self._buffers[name]
            if held is not None:
                held.zero_()
        cov = self._buffers.get("running_cov")  # not there yet while the base initializes
        if cov is not None:
            cov.copy_(torch.eye(self.group_size, dtype=cov.dtype, device=cov.device))

    def _inverse_root(self, cov: Tensor) -> Tensor:
        """W for cov + eps·I, both (G, d, d) in float64; the method's own."""
        raise TypeError(f"{type(self).__name__} does not say how it takes an inverse root.")

    # -- forward ------------------------------------------------------------------------

    def _normalize(self, x: Tensor, mask: Tensor | None, given: Held | None) -> Tensor:
        by_batch = given is None
        if by_batch:
            self._refuse_group()
        valid = None if mask is None else spread_mask(mask, x)
        with _no_autocast(x):
            wide = wide_dtype(x)
            rows = self._rows(x.to(wide))
            if by_batch:
                kept = None if valid is None else self._rows(valid)
                near, rest, cov, seen = _covariance(rows, kept)
            else:
                mean, held = self._statistics()
                near = rows - mean.to(wide).reshape(*held.shape[:2], 1)
                rest, cov, seen = None, held.to(torch.float64), None
            # γ and β in the product: a pass over the small matrix in place of one over the data
            root = self._inverse_root(cov).to(wide)
            column = (*root.shape[:2], 1)
            if self.weight is not None:
                root = root * self.weight.to(wide).reshape(column)
            shift = near.new_zeros(column) if rest is None else -(root @ rest)
            if self.bias is not None:
                shift = shift + self.bias.to(wide).reshape(column)
            y = torch.baddbmm(shift, root, near)
            y = y.reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
        if valid is not None:
            y = torch.where(valid, y, 0.0)
        if seen is not None:
            self._offer(x, seen)
        return in_format_of(x, y.to(x.dtype))

    def _rows(self, x: Tensor) -> Tensor:
        """(N, C, ...) as (G, d, M): the M values of each channel in a row; a mask as (1, 1, M)."""
        d = self.group_size if x.shape[1] == self.num_features else 1
        count = x.shape[0]
        for size in x.shape[2:]:
            count = count * size
        return x.transpose(0, 1).reshape(x.shape[1] // d, d, count)

    # -- running statistics -------------------------------------------------------------

    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, cov = self.running_mean, self.running_cov
        if mean is None or cov is None:
            raise ValueError(
                f"{self._name()}: running statistics must be there to normalize by, got None. "
                f"Build the layer with track_running_stats=True.{self._details()}"
            )
        return mean, cov

    def _held(self) -> tuple[Tensor, Tensor] | None:
        mean, cov = self.running_mean, self.running_cov
        if mean is None or cov is None:
            return None
        return mean, cov.diagonal(dim1=-2, dim2=-1).reshape(-1)

    @torch.no_grad()
    def _commit(self, seen: Any) -> None:
        mean, cov = self._statistics()
        count = seen.n if self.stored_variance == "biased" else (seen.n - 1).clamp(min=0)
        new = (seen.m2 / count).reshape(cov.shape)
        self._enter(running_mean=(mean, seen.mean), running_cov=(cov, new))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast would take the products, and so the covariance, in half precision."""
    if not torch.amp.is_autocast_available(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _covariance(rows: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor, CrossMoments]:
    """Rows (G, d, M) moved near 0, their remaining mean (G, d, 1), their covariance, the moments.

    ``kept`` marks the valid values; the others become 0. Moved by a mean that need not be exact
    and takes no part in gradients, rows keep the digits of data far from zero; what is left of the
    mean is small and is taken care of exactly.
    """
    if kept is None:
        n = torch.full((), rows.shape[-1], dtype=torch.float64, device=rows.device)
    else:
        rows = torch.where(kept, rows, 0.0)
        n = kept.sum(dtype=torch.float64)
    divisor = n.clamp(min=1).to(rows.dtype)
    first = rows.detach().sum(-1, keepdim=True) / divisor
    near = rows - first
    if kept is not None:
        near = torch.where(kept, near, 0.0)
    rest = near.sum(-1, keepdim=True) / divisor
    cov = ((near @ near.mT) / divisor - rest @ rest.mT).to(torch.float64)
    mean = (first.to(torch.float64) + rest.detach().to(torch.float64)).reshape(-1)
    return near, rest, cov, CrossMoments(n, mean, cov.detach() * n)


def inverse_root(matrix: Tensor, least: float) -> Tensor:
    """The symmetric S^(-1/2) of S (..., d, d), no eigenvalue of which is below ``least``.

    Differentiable any number of times, equal eigenvalues or not; NaN where S is not finite.
    """
    apply: Callable[..., Tensor] = _InverseRoot.apply
    return apply(matrix, least)


class _InverseRoot(torch.autograd.Function):
    """W = S^(-1/2) through eigenvectors, differentiated without them.

    The gradient of an eigenvector has 1/(λi − λj), infinite for equal eigenvalues; W itself is
    smooth. W·W = S⁻¹ gives W·dW + dW·W = −S⁻¹·dS·S⁻¹, a Lyapunov equation whose solution divides
    by sums of eigenvalues only.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, least: float) -> Tensor:
        values, vectors = _eigen(matrix)
        # rounding of the covariance may leave an eigenvalue below its bound, and even below 0
        return (vectors * values.clamp(min=least).rsqrt().unsqueeze(-2)) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (root,) = ctx.saved_tensors
        square = root @ root
        return -(square @ _lyapunov(root, grads[0]) @ square), None


class _Lyapunov(torch.autograd.Function):
    """Z with W·Z + Z·W = Q, W symmetric and positive: dQ = P, dW = −(P·Zᵀ + Zᵀ·P), P of dZ."""

    generate_vmap_rule = True

    @staticmethod
    def forward(root: Tensor, right: Tensor) -> Tensor:
        values, vectors = _eigen(root)
        sums = values.unsqueeze(-1) + values.unsqueeze(-2)
        return vectors @ ((vectors.mT @ right @ vectors) / sums) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        root, solution = ctx.saved_tensors
        adjoint = _lyapunov(root, grads[0])
        return -(adjoint @ solution.mT + solution.mT @ adjoint), adjoint


def _lyapunov(root: Tensor, right: Tensor) -> Tensor:
    apply: Callable[..., Tensor] = _Lyapunov.apply
    return apply(root, right)


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; NaN, where LAPACK would raise for the whole stack."""
    finite = torch.isfinite(matrix).all(-1).all(-1)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    values, vectors = torch.linalg.eigh(torch.where(finite[..., None, None], matrix, identity))
    return torch.where(finite[..., None], values, torch.nan), vectors
