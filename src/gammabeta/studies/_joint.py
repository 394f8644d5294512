"""Claims with several parts: each part has a rule of its own, and all of them have to hold.

The first part is the claim's primary contrast: its effect and interval are those of the verdict.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from gammabeta.studies._verdict import (
    Outcome,
    equivalence,
    half_width,
    lies_above,
    number,
    superiority,
)

RULES = ("superiority", "above", "equivalence", "number", "differs")


class Part(NamedTuple):
    """One part: its values, one per seed, and what they have to be.

    rule: "superiority" (bound: delta), "above" (bound: what the mean lies above), "equivalence"
    (bound: delta), "number" (bound: the value, with ``tolerance``) or "differs" (bound: delta;
    the mean is at least delta in size, whatever its sign, and the interval excludes 0; refuted if
    the interval lies inside ±delta). ``level``: parts of one level have to hold together.
    """

    values: Sequence[float]
    rule: str
    bound: float
    tolerance: float | None = None
    level: str = ""


def joint(parts: Mapping[str, Part], least: int) -> Outcome:
    """Supported if every part is, refuted if any is; the effect is that of the first part.

    Refuted counts at 1 - 0.05/k for k parts (Bonferroni), so that many parts do not refute by
    chance. Levels: mixed if the parts of one level are supported and one of another is refuted.
    """
    if not parts:
        return Outcome("inconclusive", None, "no cells")
    cells = {name: outcome(part, least, len(parts)) for name, part in parts.items()}
    said = {
        level: _all_of([cells[name].status for name, part in parts.items() if part.level == level])
        for level in {part.level for part in parts.values()}
    }
    statuses = set(said.values())
    if len(statuses) == 1:
        status = statuses.pop()
    else:
        status = "mixed" if statuses == {"supported", "refuted"} else "inconclusive"
    if status == "supported":
        few = {1: cells[next(iter(cells))].reason, 2: "both parts supported"}
        reason = few.get(len(cells), f"all {len(cells)} parts supported")
    else:
        reason = "; ".join(f"{n}: {c.reason}" for n, c in cells.items() if c.status != "supported")
    first = next(iter(cells))
    ps = [cell.p for cell in cells.values()]
    known = [p for p in ps if p is not None]
    needs = [cell.n_needed for cell in cells.values() if cell.status == "inconclusive"]
    counts = [n for n in needs if n is not None]
    return Outcome(
        status,
        cells[first].interval,
        reason,
        max(counts) if status == "inconclusive" and counts and len(counts) == len(needs) else None,
        cells,
        first,
        max(known) if len(known) == len(ps) else None,
    )


def outcome(part: Part, least: int, parts: int = 1) -> Outcome:
    """What a part's rule says, where so many parts are judged together."""
    bound = part.bound
    rules: Mapping[str, Callable[[], Outcome]] = {
        "superiority": lambda: superiority(part.values, bound, least),
        "above": lambda: lies_above(part.values, bound, least),
        "equivalence": lambda: equivalence(part.values, bound, least),
        "number": lambda: number(part.values, bound, part.tolerance, least),
        "differs": lambda: _differs(part.values, bound, least),
    }
    found = rules[part.rule]()
    i = found.interval
    if found.status != "refuted" or i is None or parts == 1:
        return found
    strict = half_width(i.sd, i.n, 1 - 0.05 / parts)
    lo, hi = i.mean - strict, i.mean + strict
    tolerance = 0.05 * abs(bound) if part.tolerance is None else part.tolerance
    still = {
        "superiority": hi < bound,
        "above": hi < bound,
        "equivalence": lo > 0 or hi < 0,
        "number": hi < bound - tolerance or lo > bound + tolerance,
        "differs": -bound < lo and hi < bound,
    }[part.rule]
    if still:
        return found
    reason = f"{found.reason} alone, but not among {parts} parts"
    return dataclasses.replace(found, status="inconclusive", reason=reason)


def _differs(values: Sequence[float], delta: float, least: int) -> Outcome:
    """Superiority in whatever direction the mean lies; two-sided."""
    up = superiority(values, delta, least)
    i = up.interval
    if i is None or i.n < max(least, 2):
        return up
    down = superiority([-v for v in values], delta, least)
    ahead = up if i.mean >= 0 else down
    if ahead.status == "supported":
        return dataclasses.replace(ahead, interval=i, reason=f"a difference of {delta:g} or more")
    if up.status == down.status == "refuted":
        return dataclasses.replace(up, reason=f"within ±{delta:g}")
    return dataclasses.replace(
        ahead, status="inconclusive", interval=i, reason="the interval is too wide"
    )


def _all_of(statuses: Sequence[str]) -> str:
    if "refuted" in statuses:
        return "refuted"
    return "supported" if set(statuses) == {"supported"} else "inconclusive"


def any_of(outcomes: Sequence[Outcome]) -> str:
    """One status of alternatives ("at one of the two rates"): supported if one is."""
    statuses = [o.status for o in outcomes]
    if "supported" in statuses:
        return "supported"
    return "refuted" if statuses and set(statuses) == {"refuted"} else "inconclusive"
