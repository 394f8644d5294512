"""Cells with targets: several numbers, each of which has to lie somewhere for a claim to hold.

A claim of numbers at many places ("at every batch size", "in every layer") holds if every cell
does, and is refuted if any is, at a level that accounts for how many there are.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from gammabeta.studies._verdict import (
    Interval,
    advice,
    interval,
    lies_above,
    number,
    seeds_for,
    superiority,
)


class Target(NamedTuple):
    """What a cell has to be: inside [low, high], or, with delta, above 0 and at least delta."""

    level: str
    low: float
    high: float
    precision: float  # what the half-width of the interval is planned by
    delta: float | None = None
    every: bool = False  # each draw has to be inside, instead of the interval


class Found(NamedTuple):
    """A cell and what its rule says."""

    name: str
    target: Target
    values: list[float]
    interval: Interval | None
    status: str
    reason: str

    @property
    def margin(self) -> float:
        """How far inside its target the mean lies; below 0: outside."""
        if self.interval is None:
            return math.inf
        low = self.target.low if self.target.delta is None else self.target.delta
        return min(self.interval.mean - low, self.target.high - self.interval.mean)


def decide(target: Target, values: Sequence[float], cells: int) -> tuple[str, str]:
    """Status and reason of one cell among so many of its claim."""
    if len(values) < 2:
        return "inconclusive", f"{len(values)} draws"
    low, high = target.low, target.high
    if target.every:
        inside = sum(low <= v <= high for v in values)
        status = {0: "refuted", len(values): "supported"}.get(inside, "inconclusive")
        return status, f"{inside} of {len(values)} draws"
    usual, strict = interval(values), interval(values, 1 - 0.05 / cells)
    if target.delta is not None:
        if strict.hi < target.delta:
            reason = "reversed" if strict.hi < 0 else "too small to matter"
            return "refuted", reason if strict.hi < 0 or strict.lo > 0 else "absent"
        if usual.lo > 0 and usual.mean >= target.delta:
            return "supported", f"above 0, and at least {target.delta:g} on average"
        return "inconclusive", advice("the interval is too wide", needed(target, values, cells))
    two_sided = math.isfinite(low) and math.isfinite(high)
    narrow = interval(values, 0.90) if two_sided else usual
    said = f"{low:.4g} to {high:.4g}" if two_sided else (
        f"above {low:.4g}" if math.isfinite(low) else f"below {high:.4g}"
    )  # fmt: skip
    if low < narrow.lo and narrow.hi < high:
        return "supported", said
    if strict.hi < low or strict.lo > high:
        return "refuted", f"not {said}"
    why = f"the interval is too wide for {said}"
    return "inconclusive", advice(why, needed(target, values, cells))


def needed(target: Target, values: Sequence[float], cells: int) -> int | None:
    """Draws that would decide an open cell if mean and spread stayed as they are.

    None where none below 1,000 would, or where draws are counted.

    >>> needed(Target("", 0.8, 1.2, 0.2), [0.6, 0.7, 0.9, 0.6], 1)
    11
    """
    if target.every or len(values) < 2:
        return None
    i, low, high = interval(values), target.low, target.high
    strict = 1 - 0.05 / cells
    if target.delta is not None:
        inside = i.mean >= target.delta
        return seeds_for(
            i.sd, i.mean if inside else target.delta - i.mean, 0.95 if inside else strict
        )
    gap = min(i.mean - low, high - i.mean)
    usual = 0.90 if math.isfinite(low) and math.isfinite(high) else 0.95
    return seeds_for(i.sd, abs(gap), usual if gap > 0 else strict)


def p_value(target: Target, values: Sequence[float]) -> float | None:
    """p of what "supported" has to reject, comparable with 0.05; None where draws are counted.

    Two-sided where the target has one end, the larger of two one-sided ones where it has two.
    """
    if target.every or len(values) < 2:
        return None
    if target.delta is not None:
        return superiority(values, target.delta).p
    low, high = target.low, target.high
    if math.isfinite(low) and math.isfinite(high):
        return number(values, (low + high) / 2, (high - low) / 2).p
    if math.isfinite(low):
        return lies_above(values, low).p
    return lies_above([-v for v in values], -high).p


def overall(found: Sequence[Found], undecided: Sequence[str] = ()) -> str:
    """One status of all cells, level by level; levels that stay open are named."""
    levels: dict[str, set[str]] = defaultdict(set)
    for f in found:
        levels[f.target.level].add(f.status)
    for level in undecided:
        levels[level] = {"inconclusive"}
    if not levels:
        return "inconclusive"
    said = {
        "refuted" if "refuted" in has else "supported" if has == {"supported"} else "inconclusive"
        for has in levels.values()
    }
    if len(said) == 1:
        return said.pop()
    return "mixed" if said == {"supported", "refuted"} else "inconclusive"
