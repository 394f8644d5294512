"""From looks to one number for each seed."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from gammabeta._runs import Row, Scalar
from gammabeta.studies._pairs import NORMS
from gammabeta.studies._tuned import KEYS

Looks = Mapping[int, Row]  # by step
Seen = dict[tuple[Scalar, ...], dict[int, dict[int, Row]]]  # KEYS -> seed -> step -> look
Arms = Mapping[str, Mapping[int, Looks]]  # arm -> seed -> looks


def seen_by(rows: Sequence[Row]) -> Seen:
    """The looks by arm, seed and step; those that have numbers."""
    found: Seen = {}
    for row in rows:
        seed, step = row["seed"], row.get("step")
        if "loss" in row and isinstance(seed, int) and isinstance(step, int):
            key = tuple(row[name] for name in KEYS)
            found.setdefault(key, {}).setdefault(seed, {})[step] = row
    return found


def raising(arms: Arms, lengths: Sequence[str]) -> dict[int, float]:
    """Share of looks at which the loss rises, without minus with BN, by seed."""

    def share(looks: Looks) -> float:
        rises = [bool(row[f"raises_{at}"]) for row in looks.values() for at in lengths]
        return statistics.fmean(rises)

    return _difference(arms, share)


def stale(arms: Arms, length: str) -> dict[int, float]:
    """Share of layers whose step is stale, without minus with BN, by seed."""
    return _difference(
        arms, lambda looks: statistics.fmean(number(r, f"stale_{length}") for r in looks.values())
    )


def logs(arms: Arms, length: str) -> dict[int, float]:
    """Mean of ln(|interaction| over the promise), without minus with BN, by seed."""

    def mean(looks: Looks) -> float:
        return statistics.fmean(
            math.log(max(number(row, f"ratio_{length}"), 1e-6)) for row in looks.values()
        )

    return _difference(arms, mean)


def _difference(arms: Arms, of: Callable[[Looks], float]) -> dict[int, float]:
    bn, none = (arms.get(norm, {}) for norm in NORMS)
    return {seed: of(none[seed]) - of(bn[seed]) for seed in sorted(bn.keys() & none.keys())}


def error(looks: Looks, name: str) -> float:
    """Median over the looks of an error of the promise."""
    return statistics.median(number(row, name) for row in looks.values())


def slopes(by_depth: Mapping[int, Mapping[int, Looks]], name: str) -> dict[int, float]:
    """Slope of ln(error) over ln(depth) by seed, for the seeds that all depths have."""
    shared = set.intersection(*(set(by_seed) for by_seed in by_depth.values()))
    found = {}
    for seed in sorted(shared):
        x = [math.log(depth) for depth in by_depth]
        y = [math.log(max(error(by[seed], name), 1e-6)) for by in by_depth.values()]
        found[seed] = statistics.linear_regression(x, y).slope
    return found


def number(row: Row, name: str) -> float:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a look must have the number {name}, got {value!r}. Repeat that cell.")
    return float(value)
