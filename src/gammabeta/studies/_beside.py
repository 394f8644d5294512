"""A verdict with what is shown beside it, and positive controls: used by several experiments."""

import dataclasses
from collections.abc import Mapping, Sequence

from gammabeta.studies._answer import Setting, Words, answer, span
from gammabeta.studies._outcomes import beside as with_cells
from gammabeta.studies._pairs import NORMS, Runs
from gammabeta.studies._tuned import LEAST_SEEDS, Trained, minus, shown
from gammabeta.studies._verdict import Outcome, Verdict, helps


def answered(
    claim: str,
    setting: Setting,
    words: Words,
    fair: Outcome,
    published: Mapping[str, Outcome],
    *,
    delta: float,
    pilot: Mapping[str, Sequence[float]],
    planned: int | None,
    notes: Sequence[str],
    beside: Mapping[str, Mapping[int, float]],
) -> Verdict:
    """The answer to a claim; ``beside``: contrasts by name and seed that decide nothing.

    Without ``published`` the claim has no verdict as published.
    """
    found = answer(
        claim,
        setting,
        words,
        fair,
        published,
        delta=delta,
        pilot=pilot,
        planned=planned,
        notes=notes,
    )
    return with_cells(
        dataclasses.replace(found, published_status=found.published_status if published else None),
        [cell for name, by in beside.items() for cell in shown(name, list(by.values()))],
    )


def helped(runs: Runs, part: str, group: str, rates: Mapping[str, float], delta: float) -> Outcome:
    """Positive control: test accuracy with minus without batch normalization (see ``helps``)."""
    if not set(NORMS) <= set(rates):
        return helps([], delta, LEAST_SEEDS)
    both = [Trained(group, norm, rates[norm]) for norm in NORMS]
    return helps(minus(runs, part, *both).values(), delta, LEAST_SEEDS)


def control_note(control: Outcome) -> list[str]:
    """What the positive control said."""
    if control.interval is None:
        return []
    return [
        f"Positive control, test accuracy with − without: {span(control.interval)} points, "
        f"{control.status}."
    ]
