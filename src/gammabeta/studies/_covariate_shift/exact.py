"""Which statistics of a layer its own gamma and beta set, whatever comes before (exact)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gammabeta._runs import Row
from gammabeta.ops import batch_norm
from gammabeta.studies._train import stream

MARGINAL, JOINT = "mean and standard deviation", "joint and higher moments"
_SAMPLES, _UNITS = 200, 8


def measure(seed: int) -> Iterator[Row]:
    """Statistics of a layer's output before and after arbitrary changes of all earlier weights."""
    g = stream(seed, "statistics")
    x = torch.randn(_SAMPLES, _UNITS, generator=g, dtype=torch.float64)
    gamma = torch.randn(_UNITS, generator=g, dtype=torch.float64)
    beta = torch.randn(_UNITS, generator=g, dtype=torch.float64)
    first, other = (_earlier(x, g, size) for size in (1.0, 3.0))
    # eps = 0, which no layer takes in training: with it the standard deviation is |gamma| itself
    one, two = (batch_norm(z, gamma, beta, eps=0.0)[0] for z in (first, other))
    condition = max(float(1 + (z.abs().amax(0) / z.std(0, correction=0)).max())
                    for z in (first, other, one, two))  # fmt: skip
    compared: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
        (MARGINAL, "mean of each unit"): lambda y: y.mean(0),
        (MARGINAL, "standard deviation of each unit"): lambda y: y.std(0, correction=0),
        (JOINT, "correlations between units"): _correlations,
        (JOINT, "skewness of each unit"): _skewness,
        (JOINT, "mean of each unit after a ReLU"): lambda y: y.relu().mean(0),
        (JOINT, "standard deviation after a ReLU"): lambda y: y.relu().std(0, correction=0),
    }
    for (half, name), statistic in compared.items():
        yield _row(half, name, statistic(one), statistic(two), condition)
    population = batch_norm(first, gamma, beta, eps=0.0)[1]
    fixed = batch_norm(other, gamma, beta, moments=population, eps=0.0)[0]
    yield _row(JOINT, "mean of each unit in eval mode", one.mean(0), fixed.mean(0), condition)


def _earlier(x: Tensor, g: torch.Generator, size: float) -> Tensor:
    """Two layers of random weights with a ReLU between: what the normalization receives."""
    first, second = (
        size * torch.randn(_UNITS, _UNITS, generator=g, dtype=torch.float64) for _ in range(2)
    )
    return (x @ first).relu() @ second + size * torch.randn(_UNITS, generator=g).double()


def _correlations(y: Tensor) -> Tensor:
    centered = y - y.mean(0)
    unit = centered / centered.norm(dim=0)
    matrix: Tensor = unit.T @ unit
    return matrix


def _skewness(y: Tensor) -> Tensor:
    centered = y - y.mean(0)
    skewness: Tensor = centered.pow(3).mean(0) / centered.square().mean(0).pow(1.5)
    return skewness


def _row(half: str, name: str, wanted: Tensor, found: Tensor, condition: float) -> Row:
    place = int((found - wanted).abs().argmax())
    return {
        "kind": "check",
        "half": half,
        "compared": name,
        "error": float((found - wanted).abs().max() / wanted.abs().max()),
        "condition": condition,
        "before": float(wanted.flatten()[place]),
        "after": float(found.flatten()[place]),
    }
