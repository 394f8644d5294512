"""What a claim asks of numbers that runs end with: from rows to parts, to seeds, to a verdict.

A part is one number for each seed and a rule (``_joint``). Parts from the pilot's rows give the
number of seeds, parts from the others the verdict.
"""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Setting, Words, answer
from gammabeta.studies._claims import claims
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._outcomes import beside as with_cells
from gammabeta.studies._tuned import MOST_SEEDS, PILOT_SEEDS, shown
from gammabeta.studies._verdict import Outcome, Verdict, planned_n

_LAST = 3


class Asked(NamedTuple):
    """One part of a claim: a number by seed, a rule with its bound, and a level (see ``Part``).

    ``precision``: the half-width of the interval is planned to be half of it; infinite: the number
    of seeds is not planned by this part. ``tolerance`` is that of the rule "number".
    """

    values: Mapping[int, float]
    rule: str
    bound: float
    precision: float = math.inf
    level: str = ""
    tolerance: float | None = None


Parts = Mapping[str, Asked]


def ends(
    rows: Sequence[Row], column: str, arm: Mapping[str, Scalar], steps: Sequence[int] = ()
) -> dict[int, float]:
    """The mean of a column over the last three steps that have it, by seed.

    Args:
        arm: what other columns of these rows have to be.
        steps: the mean is over these steps instead; a seed that lacks one is left out.

    >>> rows = [{"seed": 0, "step": s, "loss": float(s), "arm": "a"} for s in range(5)]
    >>> ends(rows, "loss", {"arm": "a"}), ends(rows, "loss", {"arm": "a"}, [0, 1])
    ({0: 3.0}, {0: 0.5})
    """
    found: dict[int, dict[int, float]] = defaultdict(dict)
    for row in rows:
        seed, step, value = row["seed"], row.get("step"), row.get(column)
        here = all(row.get(key) == wanted for key, wanted in arm.items())
        if here and isinstance(seed, int) and isinstance(step, int) and isinstance(value, float):
            found[seed][step] = value
    return {
        seed: statistics.fmean(by[s] for s in (steps or sorted(by)[-_LAST:]))
        for seed, by in sorted(found.items())
        if set(steps) <= by.keys()
    }


def less(
    one: Mapping[int, float], other: Mapping[int, float], unit: float = 1.0
) -> dict[int, float]:
    """one - other, seed by seed, for the seeds that both have; times ``unit``.

    >>> less({0: 0.75, 1: 0.5}, {0: 0.5}, 100)
    {0: 25.0}
    """
    return {seed: unit * (value - other[seed]) for seed, value in one.items() if seed in other}


def planned(pilot: Parts, least: int) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    needed = [least]
    for part in pilot.values():
        if not set(PILOT_SEEDS) <= part.values.keys():
            return None
        if math.isfinite(part.precision):
            values = [part.values[seed] for seed in PILOT_SEEDS]
            needed.append(planned_n(values, part.precision, least, MOST_SEEDS))
    return max(needed) if pilot else None


def verdict(
    claim: str,
    setting: Setting,
    words: Words,
    fair: Parts,
    pilot: Parts,
    *,
    least: int,
    notes: Sequence[str],
    published: Parts | None = None,
    beside: Mapping[str, Mapping[int, float]] | None = None,
) -> Verdict:
    """The verdict of a claim all of whose parts have to hold; the first is the primary contrast.

    Args:
        published: the parts in the source's own setting; {}: the claim has no other setting than
            the fair one; None: the source's could not be run here.
        beside: numbers by seed that are shown and decide nothing.
    """
    found = answer(
        claim,
        setting,
        words,
        _decided(fair, least),
        {"the source's evaluation": _decided(published, least)} if published else {},
        delta=claims()[claim].thresholds["delta"],
        pilot={name: list(part.values.values()) for name, part in pilot.items()},
        planned=planned(pilot, least),
        notes=notes,
    )
    status = None if published is None else found.published_status
    return with_cells(
        dataclasses.replace(found, published_status=status),
        [cell for name, by in (beside or {}).items() for cell in shown(name, list(by.values()))],
    )


def _decided(parts: Parts, least: int) -> Outcome:
    return joint(
        {
            name: Part(list(p.values.values()), p.rule, p.bound, p.tolerance, p.level)
            for name, p in parts.items()
        },
        least,
    )
