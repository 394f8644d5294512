"""Contrasts over the grid of activations, optimizers and batch sizes, one number per seed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gammabeta.studies._pairs import NORMS, Run, Runs, gains

OPTIMIZERS = ("sgd", "adam")
FACTORS = ("activation", "optimizer", "batch size")
CROSSED = ("relu", "sigmoid")  # of opt-less

Place = tuple[str, str, int]  # activation, optimizer, batch size
Rates = Mapping[Place, Mapping[str, float]]  # place -> arm -> learning rate
Gains = dict[Place, dict[int, float]]  # place -> seed -> points


def arm_of(part: str, runs: Runs, place: Place, norm: str, rate: float | None) -> dict[int, Run]:
    return runs.get((part, *place, norm, rate), {})


def gains_of(part: str, runs: Runs, best: Rates, places: Sequence[Place]) -> Gains:
    """Gain in points by place and seed; empty where an arm or its rate is missing."""
    found = {}
    for place in places:
        rates = best.get(place, {})
        with_bn, without = (arm_of(part, runs, place, n, rates.get(n)) for n in NORMS)
        found[place] = gains(with_bn, without)
    return found


def shares(table: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """Omega squared of each axis's main effect, all interactions being the error.

    (SS - df MS_error) / (SS_total + MS_error) of one value per cell; 0 if all values are equal.
    """
    mean = table.mean()
    total = float(((table - mean) ** 2).sum())
    if total <= 0:
        return [0.0] * table.ndim
    squares, freedom = [], []
    for axis, size in enumerate(table.shape):
        others = tuple(k for k in range(table.ndim) if k != axis)
        by_level = table.mean(axis=others)
        squares.append(table.size / size * float(((by_level - mean) ** 2).sum()))
        freedom.append(size - 1)
    error = (total - sum(squares)) / (table.size - 1 - sum(freedom))
    return [(ss - df * error) / (total + error) for ss, df in zip(squares, freedom, strict=True)]


def shares_by_seed(by: Gains) -> list[list[float]]:
    """Shares of the factors, for each seed that the whole grid has."""
    seeds = set.intersection(*(set(by_seed) for by_seed in by.values()))
    shape = [len(set(levels)) for levels in zip(*by, strict=True)]
    # The places are in the order of a product: the last factor varies fastest.
    return [
        shares(np.array([by_seed[s] for by_seed in by.values()]).reshape(shape))
        for s in sorted(seeds)
    ]


def factors(by: Gains) -> dict[str, list[float]]:
    """Share of the activation minus that of each other factor, seed by seed."""
    found = shares_by_seed(by)
    return {
        f"activation − {factor}": [each[0] - each[k] for each in found]
        for k, factor in enumerate(FACTORS)
        if k > 0
    }


def optimizer_less(arms: Mapping[tuple[str, str], Mapping[int, Run]]) -> list[float]:
    """Main effect of the activation minus that of the optimizer, seed by seed."""
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in arms.values())))
    if not seeds:
        return []
    at = {arm: np.array([by_seed[s].final for s in seeds]) for arm, by_seed in arms.items()}
    first, second = CROSSED
    sgd, adam = OPTIMIZERS
    activation = (at[first, sgd] + at[first, adam] - at[second, sgd] - at[second, adam]) / 2
    optimizer = (at[first, sgd] + at[second, sgd] - at[first, adam] - at[second, adam]) / 2
    signed = [x if x.mean() >= 0 else -x for x in (activation, optimizer)]
    return [float(v) for v in signed[0] - signed[1]]


def contrasts(
    part: str, runs: Runs, rates: Mapping[tuple[Place, str], float | None]
) -> dict[str, list[float]]:
    """opt-less and sgd-bn-vs-adam, at batch 64, each arm at this rate."""

    def at(activation: str, optimizer: str, norm: str) -> dict[int, Run]:
        place = (activation, optimizer, 64)
        return arm_of(part, runs, place, norm, rates.get((place, norm)))

    crossed = {(a, o): at(a, o, "bn") for a in CROSSED for o in OPTIMIZERS}
    beside = gains(crossed["relu", "sgd"], at("relu", "adam", "none"))
    return {"opt-less": optimizer_less(crossed), "sgd-bn-vs-adam": list(beside.values())}


def own_rates(best: Rates) -> dict[tuple[Place, str], float | None]:
    return {(place, norm): rate for place, by in best.items() for norm, rate in by.items()}


def same_rate(rate: float) -> dict[tuple[Place, str], float | None]:
    return {((a, o, 64), n): rate for a, o, n in published_arms()}


def published_arms() -> list[tuple[str, str, str]]:
    """What the two claims need: four arms with, and ReLU with Adam without."""
    crossed = [(a, o, "bn") for a in CROSSED for o in OPTIMIZERS]
    return [*crossed, ("relu", "adam", "none")]
