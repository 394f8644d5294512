"""How the singular values of a matrix are distributed: all of them, or an estimate with its error.

A matrix that is only given as products is seen through Golub-Kahan bidiagonalization from a random
vector, with full reorthogonalization: the singular values of the small bidiagonal matrix B, each
with the squared first entry of its right singular vector as its weight, are the Gauss quadrature of
the distribution, as that vector weighs it (stochastic Lanczos quadrature).

The stated error of an estimate is the sum of two parts:

- three standard errors of the random vectors. For one that is uniform on the sphere of dimension n
  the variance of Σ ω f(s) is 2 Var f/(n + 2);
- 1.5 times the range of the estimate over several rules: those of the leading parts of B, with
  three quarters of the steps to all, and the last one with its smallest value counted as 0. That
  is what the quadrature has not settled: values near 0 are found last, and before they are, a null
  space looks like one small value of large weight. This part is an estimate, no bound.

Sources: Golub & Kahan 1965, "Calculating the singular values and pseudo-inverse of a matrix",
Sec. 2; Golub & Meurant 2010, "Matrices, Moments and Quadrature", Sec. 4.1; Chen, Trogdon & Ubaru
2021, "Analysis of stochastic Lanczos quadrature for spectrum approximation", Secs. 2 and 3
(arXiv 2105.06595).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

QUANTITIES = ("in_range", "zeros", "largest", "rms", "mean_abs_log", "spread")
Product = Callable[[Tensor], Tensor]

_RULES = 5  # from three quarters of the steps to all
_SAMPLING = 3.0  # standard errors
_UNSETTLED = 1.5  # enough for all of 64 spectra of eight kinds, with 32 and with 64 steps
_ROUNDING = 100.0


class Rule(NamedTuple):
    """Singular values, and the share that each stands for; both (K,), float64."""

    values: Tensor
    weights: Tensor


class Spectrum(NamedTuple):
    """The distribution of singular values of one matrix, or of several of one size.

    Attributes:
        rules: the last is the distribution; those before it could as well be.
        size: how many singular values a matrix has, min(rows, columns).
        starts: how many random vectors are behind an estimate; 0 says that it is exact.
        zero: up to this multiple of the largest, a singular value counts as 0.
    """

    rules: tuple[Rule, ...]
    size: int
    starts: int
    zero: float

    def of_size(self, size: int) -> Spectrum:
        """The same with zeros, up to ``size`` singular values of each matrix."""
        share = self.size / size
        if share == 1:
            return self
        rules = []
        for values, weights in self.rules:
            weights = torch.cat([weights * share, weights.new_tensor([1 - share])])
            rules.append(Rule(torch.cat([values, values.new_zeros(1)]), weights))
        # sampling errors that follow from the larger size are too large, if anything
        return self._replace(rules=tuple(rules), size=size)

    def summary(self) -> dict[str, Tensor]:
        """Shares and moments, each (), float64; of an estimate ``<name>_error`` beside each."""
        found = [_quantities(rule, self.zero, self.size) for rule in self.rules]
        result: dict[str, Tensor] = {}
        for name, (value, variance) in found[-1].items():
            result[name] = value
            if self.starts:
                sampling = (2 * variance / ((self.size + 2) * self.starts)).sqrt()
                others = torch.stack([each[name][0] for each in found if name in each])
                unsettled = others.max() - others.min()
                result[f"{name}_error"] = _SAMPLING * sampling + _UNSETTLED * unsettled
        return result

    def sorted(self, points: int | None = None) -> Tensor:
        """The singular values from the largest down, at most ``points`` at evenly spaced ranks."""
        values, order = self.rules[-1].values.sort(descending=True)
        if self.starts == 0 and (points is None or len(values) <= points):
            return values
        count = self.size if points is None else min(points, self.size)
        ranks = torch.linspace(0, 1, count, dtype=values.dtype)
        if self.starts == 0:
            return values[(ranks * (len(values) - 1)).round().long()]
        # the value at rank r is the first whose weight, with those of all larger ones, exceeds r
        heights = self.rules[-1].weights[order].cumsum(0)
        return values[torch.searchsorted(heights, ranks).clamp(max=len(values) - 1)]


def pooled(spectra: Sequence[Spectrum]) -> Spectrum:
    """The distribution over the singular values of all of them, of one size."""
    rules = []
    for several in zip(*(spectrum.rules for spectrum in spectra), strict=True):
        values = torch.cat([rule.values for rule in several])
        rules.append(Rule(values, torch.cat([rule.weights for rule in several]) / len(several)))
    starts = sum(spectrum.starts for spectrum in spectra)
    return spectra[0]._replace(rules=tuple(rules), starts=starts)


def exact(matrices: Tensor, zero: float) -> Spectrum:
    """All singular values of ``matrices``, (rows, columns) or (number, rows, columns)."""
    size = min(matrices.shape[-2:])
    matrices = matrices.detach().to("cpu", torch.float64)
    if not bool(matrices.isfinite().all()):
        values = matrices.new_full((matrices.shape[:-2].numel() * size,), math.nan)
    else:
        values = torch.linalg.svdvals(matrices).flatten()
    return Spectrum((Rule(values, torch.full_like(values, 1 / len(values))),), size, 0, zero)


def estimated(
    apply: Product,
    transpose: Product,
    like: Tensor,
    generator: torch.Generator,
    *,
    steps: int,
    starts: int,
    zero: float,
) -> Spectrum:
    """The distribution of the singular values of a matrix A with no more columns than rows.

    Args:
        apply: v to A·v.
        transpose: u to Aᵀ·u.
        like: a tensor of the device and precision of v, (columns,).
        generator: of random vectors, on the CPU. Spectra that are pooled need different ones.
        steps: products with A, and as many with Aᵀ, for each start.
        starts: how many random vectors.
    """
    found = []
    if len(like) == 0:
        nothing = Rule(torch.zeros(1).double(), torch.ones(1).double())
        return Spectrum((nothing,) * (_RULES + 1), 0, starts, zero)
    for _ in range(starts):
        start = torch.randn(len(like), dtype=torch.float64, generator=generator).to(like)
        rules = _rules(*bidiagonal(apply, transpose, start, steps), zero)
        found.append(Spectrum(rules, len(like), 1, zero))
    return pooled(found)


def bidiagonal(
    apply: Product, transpose: Product, start: Tensor, steps: int
) -> tuple[Tensor, Tensor, bool]:
    """Golub-Kahan bidiagonalization of A from ``start``, with full reorthogonalization.

    A V = U B and AᵀU = V Bᵀ + a remainder in the last column, where U and V have orthonormal
    columns, the first of V being the normalized start, and B is upper bidiagonal.

    Returns:
        The diagonal and the superdiagonal of B, float64, and whether the remainder is 0 up to
        rounding: the singular values of B are then singular values of A. A last diagonal entry of
        0 means that A has a null space that the start has a part in.
    """
    steps = min(steps, len(start))
    tiny = _ROUNDING * torch.finfo(start.dtype).eps
    v = start / torch.linalg.vector_norm(start)
    right, left = v.new_empty(steps, len(v)), v.new_empty(0)
    diagonal: list[float] = []
    above: list[float] = []
    done = steps == len(start)
    for k in range(steps):
        right[k] = v
        u = apply(v)
        if k == 0:
            left = u.new_empty(steps, len(u))
        u = _orthogonal(u, left[:k])
        diagonal.append(float(torch.linalg.vector_norm(u)))
        largest = max([*diagonal, *above])
        if not math.isfinite(largest):
            return torch.full((1,), math.nan, dtype=torch.float64), torch.zeros(0).double(), True
        if diagonal[-1] <= tiny * largest:
            diagonal[-1], done = 0.0, True
            break
        left[k] = u / diagonal[-1]
        v = _orthogonal(transpose(left[k]), right[: k + 1])
        above.append(float(torch.linalg.vector_norm(v)))
        if above[-1] <= tiny * max([*diagonal, *above]):
            done = True
            break
        v = v / above[-1]
    kept = above[: len(diagonal) - 1]
    double = torch.float64
    return torch.tensor(diagonal, dtype=double), torch.tensor(kept, dtype=double), done


def _orthogonal(x: Tensor, basis: Tensor) -> Tensor:
    """``x`` without its parts along the orthonormal rows of ``basis``; twice is enough."""
    for _ in range(2):
        x = x - basis.T @ (basis @ x)
    return x


def _rules(diagonal: Tensor, above: Tensor, done: bool, zero: float) -> tuple[Rule, ...]:
    """The rule of all steps, last, and before it others that differ where it is not settled."""
    count = len(diagonal)
    if bool(diagonal.isnan().any()):
        return (Rule(diagonal, torch.ones_like(diagonal)),) * (_RULES + 1)
    last = _gauss(diagonal, above)
    if done:
        return (last,) * (_RULES + 1)
    lengths = [math.ceil(count * (3 + r / (_RULES - 1)) / 4) for r in range(_RULES - 1)]
    fewer = [_gauss(diagonal[:k], above[: k - 1]) for k in lengths]
    values = last.values.clone()
    kept = values > zero * values.max()
    values[kept & (values == values[kept].min())] = 0.0
    return (*fewer, Rule(values, last.weights), last)


def _gauss(diagonal: Tensor, above: Tensor) -> Rule:
    _, values, right = torch.linalg.svd(torch.diag(diagonal) + torch.diag(above, 1))
    return Rule(values, right[:, 0].square())


def _quantities(rule: Rule, zero: float, size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Each quantity with the variance of f, to first order, if it is a mean of f over the rule."""
    values, weights = rule
    largest = values.max()
    none = torch.zeros_like(largest)
    if bool(largest.isnan()):
        return dict.fromkeys(QUANTITIES, (largest, largest))
    zeros = values <= zero * largest
    inside = (values >= 0.5) & (values <= 2) & ~zeros
    result = {
        "in_range": _share(weights, inside, size),
        "zeros": _share(weights, zeros, size),
        "largest": (largest, none),
    }
    if bool(zeros.all()):
        return result | {"rms": (none, none)}
    square, variance = _mean(values.square(), weights)
    result["rms"] = (square.sqrt(), variance / (4 * square))
    kept = weights[~zeros]
    logs, parts = values[~zeros].log(), kept / kept.sum()
    off, variance = _mean(logs.abs(), parts)
    result["mean_abs_log"] = (off, variance / kept.sum())
    center, _ = _mean(logs, parts)
    width, variance = _mean((logs - center).square(), parts)
    variance = variance / (4 * width * kept.sum()) if bool(width > 0) else none
    result["spread"] = (width.sqrt(), variance)
    return result


def _mean(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    mean = (weights * values).sum()
    return mean, (weights * (values - mean).square()).sum()


def _share(weights: Tensor, chosen: Tensor, size: int) -> tuple[Tensor, Tensor]:
    share = weights[chosen].sum()
    # none seen does not mean that there is none: as if one more were in and one more out
    likely = (share * size + 1) / (size + 2)
    return share, likely * (1 - likely)
