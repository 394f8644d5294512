"""How much a batch's mean and variance, and what they normalize, vary from batch to batch.

A layer normalizes by the statistics of the m values that a channel has in the batch, and another
batch would have had others. Write one value, standardized by the population, as x̂; in a batch
with mean μ_B and standard deviation σ_B it becomes s·x̂ + a with

    s = √(σ² + eps) / √(σ_B² + eps)     the multiplicative part of the noise,
    a = (μ − μ_B) / √(σ_B² + eps)       the additive part,

the same for all values of the channel. For m independent values of kurtosis κ

    Var(μ_B) = σ²/m,    Var(σ_B²) = σ⁴ (m − 1)/m³ ((m − 1) κ − (m − 3)),
    Var(a) → 1/m,       Var(s) → (κ − 1)/(4m)       for large m;

for Gaussian ones, outside the batch and with eps = 0, Var(a) = 1/(m − 3), and Var(s) is that of
√m over a χ variable of m − 1 degrees of freedom (:func:`gaussian`).

The m values of a channel of an image are not independent. What varies here is therefore which
*samples* are in the batch, each with all its positions. The batch at hand, of N samples, is taken
as the population and batches of B samples are drawn from it with replacement. So all variances
are those of a population of N samples: as estimates for the data that the batch came from they
are low by a factor of about 1 − 1/N.

Quantities:
    ``<site>/sizes``: (S,) the batch sizes B, in samples, that the vectors below belong to.
    ``<site>/mean``: (S,) Var(μ_B)/σ², exact; mean over channels. Healthy is what the batch size
        makes it, 1/m for independent values.
    ``<site>/variance``: (S,) Var(σ_B²)/σ⁴, exact; mean over channels.
    ``<site>/additive``, ``<site>/multiplicative``: (S,) Var(a) and Var(s) of ``draws`` drawn
        batches; mean over channels. The standard error of a channel's value is √(2/draws) of it
        (9 % with 256 draws) where B is 16 or more; with smaller batches the tails are heavy, below
        4 values even infinite without eps.
    ``<site>/snr``: (C,) signal-to-noise ratio of each channel at the batch's own size, the variance
        of x̂ over that of its noise, (Var(x̂)) / (Var(s) Var(x̂) + Var(a)); with independent Gaussian
        values about 2m/3. Below 10 the network sees more than a third of a standard deviation of
        noise. A constant channel has no signal: 0.
    ``<site>/kurtosis``: κ, mean over channels; 3 if Gaussian.
    ``<site>/independent``: how many independent values a sample contributes to a channel's mean,
        σ² over the variance of the samples' means; median over channels. 1 for (N, C); for an
        image often a few, where PyTorch's batch statistics count H·W.

Sites that do not normalize by statistics of a batch (group and layer normalization, frozen
layers) are left out, and so is a batch of one sample, which tells nothing about others.

Cost: the forward pass that the step makes for its activations, and for each size and site two
products of a (draws, N) with a (N, C) matrix in float64. Memory: that of the activations.

Sources: Teye, Azizpour & Smith 2018, "Bayesian Uncertainty Estimation for Batch Normalized Deep
Networks", supplement (arXiv 1802.06455), and Luo et al. 2019, "Towards Understanding
Regularization in Batch Normalization", Sec. 2 (arXiv 1809.00846), for the distribution at large m;
the formulas for samples that hold several dependent values, and at finite m, follow from the
moments of a mean.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gammabeta.layers._running import RunningMoments
from gammabeta.moments import Moments, over
from gammabeta.probes.step import Step


class Samples(NamedTuple):
    """What each sample adds to a channel's statistics, (N, C) float64 each, and the totals (C,)."""

    u: Tensor  # mean over positions of x − μ
    q: Tensor  # mean over positions of (x − μ)²
    var: Tensor  # σ², the mean of q
    kurtosis: Tensor  # of all values; 0 where σ² = 0

    @classmethod
    def of(cls, x: Tensor) -> Samples:
        """Of an input (N, C, ...) of a normalization."""
        x = (
            x.detach().to(torch.float64).flatten(2)
            if x.dim() > 2
            else x.detach().double()[..., None]
        )
        # this mean of a constant channel is the constant, so that it has exactly no deviation
        x = x - over(Moments.of(x).mean, x)
        squared = x * x
        var = squared.mean((0, 2))
        fourth = (squared * squared).mean((0, 2))
        kurtosis = torch.where(var == 0, 0.0, fourth / torch.where(var == 0, 1.0, var * var))
        return cls(x.mean(2), squared.mean(2), var, kurtosis)


def variances(samples: Samples, size: int) -> tuple[Tensor, Tensor]:
    """Var(μ_B) and Var(σ_B²) of batches of ``size`` samples drawn with replacement, exact.

    With u and q of each sample (:class:`Samples`), Var(μ_B) = E u²/B and

        Var(σ_B²) = Var(q)/B + 2 (E u²)²/B² + (E u⁴ − 3 (E u²)²)/B³ − 2 Cov(q, u²)/B²,

    σ_B² being biased, the mean of q in the batch less the square of its mean of u.

    Returns:
        Two tensors (C,), float64.

    >>> import torch
    >>> x = torch.tensor([[0.0], [2.0]])
    >>> variances(Samples.of(x), 2)  # batches: 00, 02, 20, 22
    (tensor([0.5000], dtype=torch.float64), tensor([0.2500], dtype=torch.float64))
    """
    u2 = samples.u.square()
    q = samples.q - samples.var
    second, fourth = u2.mean(0), u2.square().mean(0)
    of_mean = second / size
    of_var = (
        q.square().mean(0) / size
        + 2 * (second.square() - (q * u2).mean(0)) / size**2
        + (fourth - 3 * second.square()) / size**3
    )
    return of_mean, of_var


def independent(values: int, kurtosis: float = 3.0) -> tuple[float, float]:
    """Var(μ_B)/σ² and Var(σ_B²)/σ⁴ of a batch of that many independent values.

    >>> independent(4), independent(64)
    ((0.25, 0.375), (0.015625, 0.03076171875))
    """
    m = values
    return 1 / m, (m - 1) * ((m - 1) * kurtosis - (m - 3)) / m**3


def gaussian(values: int) -> tuple[float, float]:
    """Var(a) and Var(s) for a Gaussian population and a value outside the batch, eps = 0.

    Var(a) = 1/(m − 3); Var(s) = m/(m − 3) − m/2·(Γ(m/2 − 1)/Γ(m/2 − 1/2))².

    Raises:
        ValueError: fewer than 4 values, with which the variances are infinite.

    >>> additive, multiplicative = gaussian(16)
    >>> round(additive, 6), round(multiplicative * 2 * 16, 4)
    (0.076923, 1.4846)
    """
    m = values
    if m < 4:
        raise ValueError(
            f"gaussian: the variances are finite from 4 values per channel on, got {m}. "
            "Use a larger batch."
        )
    mean = math.sqrt(m / 2) * math.exp(math.lgamma(m / 2 - 1) - math.lgamma((m - 1) / 2))
    return 1 / (m - 3), m / (m - 3) - mean * mean


def drawn(
    samples: Samples, size: int, eps: float = 0.0, draws: int = 256, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The parts a and s of the noise in ``draws`` batches drawn with replacement.

    Args:
        samples: of a layer's input.
        size: batch size B, in samples.
        eps: the layer's. Without it a batch of equal values has infinite s.
        draws: how many batches.
        seed: of a generator of its own: no global random state is read or changed.

    Returns:
        a and s, (draws, C) float64 each.
    """
    n = len(samples.u)
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(n, (draws, size), generator=generator)
    counts = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(
        1, which, torch.ones(draws, size, dtype=torch.float64)
    )
    share = counts.to(samples.u.device) / size
    mean = share @ samples.u
    var = (share @ samples.q - mean * mean).clamp(min=0)
    rstd = (var + eps).rsqrt()
    return -mean * rstd, (samples.var + eps).sqrt() * rstd


def measure(
    step: Step,
    memory: MutableMapping[str, Any],
    *,
    sizes: Sequence[int] | None = None,
    draws: int = 256,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Measure the noise of the statistics of every batch normalization; see the module.

    Args:
        step: the training step.
        memory: not used.
        sizes: batch sizes in samples; by default the powers of two from 4 to the batch's own size,
            and that size. Sizes above it are allowed.
        draws: drawn batches for each size.
        seed: of the draws.

    Raises:
        ValueError: a size below 2, or fewer than 2 draws.
    """
    if draws < 2 or (sizes is not None and (not sizes or min(sizes) < 2)):
        raise ValueError(
            f"statistics_noise: expected batch sizes and a number of draws of at least 2, got "
            f"sizes={sizes!r}, draws={draws}. A batch of one sample has no variance between "
            "samples."
        )
    result: dict[str, Tensor] = {}
    for site in step.sites:
        x = step.activations[site.name].input
        if not _by_batch(step, site.module) or len(x) < 2:
            continue
        samples = Samples.of(x)
        chosen = list(sizes) if sizes is not None else _powers(len(x))
        found = _of_site(samples, chosen, _eps(site.module), draws, seed)
        result |= {f"{site.name}/{key}": value.cpu() for key, value in found.items()}
    return result


def _of_site(
    samples: Samples, sizes: list[int], eps: float, draws: int, seed: int
) -> dict[str, Tensor]:
    """The quantities of one site; those that need a channel that varies are absent without one."""
    var = samples.var
    live = var != 0  # a NaN is to be seen
    signal = var / torch.where(live, var + eps, 1.0)
    a, s = (part.var(0) for part in drawn(samples, len(samples.u), eps, draws, seed))
    result = {
        "sizes": torch.tensor(sizes),
        "snr": torch.where(live, signal / (s * signal + a), 0.0),
    }
    if not live.any():
        return result
    columns = []
    for size in sizes:
        of_mean, of_var = variances(samples, size)
        a, s = (part.var(0) for part in drawn(samples, size, eps, draws, seed))
        found = torch.stack([of_mean / var, of_var / var.square(), a, s])
        columns.append(found[:, live].mean(1))
    names = ("mean", "variance", "additive", "multiplicative")
    result |= dict(zip(names, torch.stack(columns, 1), strict=True))
    result["kurtosis"] = samples.kurtosis[live].mean()
    result["independent"] = (var / samples.u.square().mean(0))[live].median()
    return result


def _powers(most: int) -> list[int]:
    """The powers of two from 4 to ``most``, and ``most``."""
    return [2**k for k in range(2, most.bit_length()) if 2**k < most] + [most]


def _eps(module: nn.Module) -> float:
    return float(module._epsilon() if isinstance(module, RunningMoments) else vars(module)["eps"])


def _by_batch(step: Step, module: nn.Module) -> bool:
    """Whether ``module`` normalizes by statistics of the batch in a training step."""
    if not isinstance(module, RunningMoments | _BatchNorm):
        return False
    if module.running_mean is None:
        return True
    frozen = isinstance(module, RunningMoments) and module._frozen
    # a model in evaluation mode is measured as if train() had been called on all of it
    return not frozen and (module.training or not step.model.training)
