"""Small changes to outcomes and verdicts that several experiments make."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gammabeta.studies._verdict import Outcome, Verdict, controlled, planned_n


def alone(name: str, found: Outcome) -> Outcome:
    """An outcome of one cell, with that cell."""
    weakest = name if found.interval else None
    return dataclasses.replace(found, cells={name: found}, weakest=weakest)


def by_weakest(found: Outcome) -> Outcome:
    """The effect of a claim of several networks is that of the one with the smallest mean."""
    means = {name: c.interval.mean for name, c in found.cells.items() if c.interval}
    if not means:
        return found
    weakest = min(means, key=lambda name: means[name])
    return dataclasses.replace(found, weakest=weakest, interval=found.cells[weakest].interval)


def beside(verdict: Verdict, more: Sequence[dict[str, Any]]) -> Verdict:
    """The verdict with cells that decide nothing, as a demonstration where it is one."""
    demo = verdict.status == "demo"
    added = [{**cell, "status": "demo", "reason": ""} if demo else cell for cell in more]
    return dataclasses.replace(verdict, cells=[*verdict.cells, *added])


def asked_for(
    pilot: Mapping[str, Mapping[int, float]], deltas: Mapping[str, float], least: int, most: int
) -> int:
    """Seeds that a complete pilot asks for: as many as its most uncertain contrast needs."""
    return max(planned_n(by_seed.values(), deltas[n], least, most) for n, by_seed in pilot.items())


def all_controlled(found: Outcome, control: Outcome) -> Outcome:
    """The outcome with its cells, where the positive control is supported; else inconclusive."""
    cells = {name: controlled(cell, control) for name, cell in found.cells.items()}
    return dataclasses.replace(controlled(found, control), cells=cells)
