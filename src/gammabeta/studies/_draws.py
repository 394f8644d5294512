"""Claims about numbers of independent draws: how many draws, and from numbers to a verdict.

A draw is a seed and gives a number for each cell (a layer, a batch size ...), as rows of kind
"value" with columns "cell" and "value". Each cell has a target. Four pilot draws, used for nothing
else, give the number of draws.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import PLACES, listed
from gammabeta.studies._claims import claims
from gammabeta.studies._targets import Found, Target, decide, needed, overall, p_value
from gammabeta.studies._verdict import (
    Interval,
    Verdict,
    enough,
    half_width,
    helps,
    interval,
    planned_n,
)

PILOT_SEEDS = (900, 901, 902, 903)
LEAST_SEEDS, MOST_SEEDS = 5, 16


class Words(NamedTuple):
    """The answer as the second half of a sentence, by status; and the unit of its numbers."""

    supported: str
    refuted: str
    unit: str
    where: str = ""  # begins the sentence: "at initialization"


class Question(NamedTuple):
    """A claim with its rule.

    Args:
        targets: what decides, by cell; a cell of several levels bears the level in brackets.
        words: the answer.
        least: draws at least: 5, for equivalence 8.
        on_images: whether the answer depends on the data (the digits are a demonstration then).
        published: targets in the source's own setting; None: it has none but the fair one, {}:
            it was not tried.
        control: cells without which there is nothing to explain.
        control_by_signs: where superiority is inconclusive there, the sign-flip test decides.
    """

    claim: str
    targets: Mapping[str, Target]
    words: Words
    least: int = LEAST_SEEDS
    on_images: bool = False
    published: Mapping[str, Target] | None = None
    control: Mapping[str, Target] = {}
    control_by_signs: bool = False


def measured(name: str, target: Target) -> str:
    """The number that a cell is about; two levels may ask about one number."""
    return name.removesuffix(f" ({target.level})")


def values(rows: Sequence[Row], *, pilot: bool = False) -> dict[str, list[float]]:
    """Numbers by cell, in the order of the seeds; a draw that was made twice counts once."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        seed = row["seed"]
        if row.get("kind") == "value" and isinstance(seed, int) and (seed in PILOT_SEEDS) == pilot:
            found[str(row["cell"])][seed] = _real(row["value"])
    return {cell: [by_seed[s] for s in sorted(by_seed)] for cell, by_seed in found.items()}


def planned(question: Question, rows: Sequence[Row]) -> int | None:
    """Draws that the pilot asks for, None before it is complete."""
    pilot, needed = values(rows, pilot=True), [question.least]
    for name, target in {**question.targets, **question.control}.items():
        x = pilot.get(measured(name, target), [])
        if len(x) < len(PILOT_SEEDS):
            return None
        if math.isfinite(target.precision):
            needed.append(planned_n(x, target.precision, question.least, MOST_SEEDS))
    return max(needed)


def verdict(
    question: Question,
    experiment: str,
    rows: Sequence[Row],
    *,
    notes: Sequence[str] = (),
    undecided: Sequence[str] = (),
) -> Verdict:
    """The verdict of a claim from its rows, of one budget and data set.

    Args:
        notes: what else a reader must be told.
        undecided: levels that stay open, whatever their cells say.
    """
    budget, data = str(rows[0]["budget"]), str(rows[0]["data"])
    claim, x, own = question.claim, values(rows), list(notes)
    fair = _found(question.targets, x, question.least)
    control = _found(question.control, x, question.least)
    if question.control_by_signs:
        control = [_helped(f, question.least) for f in control]
    status = overall(fair, undecided)
    if control and {f.status for f in control} != {"supported"}:
        status = "inconclusive"
        said = listed([f"{f.name} ({f.status})" for f in control if f.status != "supported"])
        own.append(f"Nothing to explain here: the positive control, {said}, is not supported.")
    published, tried = status, _found(question.published or {}, x, LEAST_SEEDS)
    if question.published is not None:
        published = overall(tried)
    if question.on_images and data == "digits":
        status = published = "demo"
    elif budget == "tiny":
        status = published = "inconclusive"
        own.append("The budget tiny tries the wiring; it decides nothing.")
    weakest = min(fair, key=lambda f: f.margin, default=None)
    effect = weakest.interval if weakest else None
    count, predicted = planned(question, rows), None
    if count is not None and weakest is not None:
        pilot = values(rows, pilot=True)[measured(weakest.name, weakest.target)]
        predicted = half_width(interval(pilot).sd, count)
        if len(weakest.values) < count:
            own.append(f"The pilot asked for {count} draws; {len(weakest.values)} were made.")
    if not question.on_images:
        own.append("Does not depend on the data.")
    elif question.published == {}:
        own.append("The source trained other networks; its own setting was not tried here.")
    parts = [("control", control), ("fair", fair), ("published", tried)]
    judged = {measured(f.name, f.target) for _, found in parts for f in found}
    return Verdict(
        claim=claim,
        experiment=experiment,
        status=status,
        published_status=None if question.published == {} else published,
        effect=effect.mean if effect else None,
        ci=(effect.lo, effect.hi) if effect else None,
        n=min((len(f.values) for f in fair), default=0),
        unit=question.words.unit,
        reported=claims()[claim].reported,
        budget=budget,
        data=data,
        delta=claims()[claim].thresholds.get("delta"),
        half_width=effect.half_width if effect else None,
        planned_half_width=predicted,
        sentence=_sentence(question, status, data, fair, weakest),
        n_needed=_needed(fair, control) if status == "inconclusive" and budget != "tiny" else None,
        cells=[
            *(
                _cell(measured(f.name, f.target), _part(part, f), f.interval, f.status, f.reason)
                for part, found in parts
                for f in found
            ),
            *(
                _cell(name, "shown", interval(v), "inconclusive", "shown")
                for name, v in x.items()
                if name not in judged and len(v) > 1
            ),
        ]
        if status != "demo"
        else [_cell(n, "shown", interval(v), "demo", "") for n, v in x.items() if len(v) > 1],
        notes=own,
        p=_p(fair, control),
        place=", ".join(
            part
            for part in (
                PLACES.get(data, data) if question.on_images else "",
                question.words.where.strip(" ,"),
            )
            if part
        ),
    )


def _found(targets: Mapping[str, Target], x: Mapping[str, list[float]], least: int) -> list[Found]:
    found = []
    for name, target in targets.items():
        v = x.get(measured(name, target), [])
        status, reason = decide(target, v, len(targets))
        if len(v) < enough(least):
            status, reason = "inconclusive", f"{len(v)} of at least {enough(least)} draws"
        found.append(Found(name, target, v, interval(v) if len(v) > 1 else None, status, reason))
    return found


def _needed(found: Sequence[Found], control: Sequence[Found]) -> int | None:
    """Draws that would decide all open cells; None where a cell, or the control, says nothing."""
    if any(f.status != "supported" for f in control):
        return None
    each = [needed(f.target, f.values, len(found)) for f in found if f.status == "inconclusive"]
    known = [count for count in each if count is not None]
    return max(known) if known and len(known) == len(each) else None


def _helped(found: Found, least: int) -> Found:
    """A cell of the positive control, with the sign-flip test (see `helps`)."""
    if found.target.delta is None or found.status != "inconclusive":
        return found
    by_signs = helps(found.values, found.target.delta, enough(least))
    return found._replace(status=by_signs.status, reason=by_signs.reason)


def _p(found: Sequence[Found], control: Sequence[Found]) -> float | None:
    """All have to be supported: the largest p, None where one has none."""
    each = [p_value(f.target, f.values) for f in found]
    for f in control:
        by_signs = f.interval.p_signflip if f.interval and "sign-flip" in f.reason else None
        each.append(p_value(f.target, f.values) if by_signs is None else by_signs)
    known = [p for p in each if p is not None]
    return max(known, default=None) if len(known) == len(each) else None


def _sentence(
    question: Question, status: str, data: str, found: Sequence[Found], weakest: Found | None
) -> str:
    if weakest is None or weakest.interval is None:
        return "Undecided: there is nothing to compare yet."
    words = question.words
    on = f"on {PLACES.get(data, data)}" if question.on_images else ""
    place = " ".join(part for part in (words.where, on) if part)
    place = f"{place}, " if place else ""
    near = f"the cell nearest to its limit is {weakest.name} ({_span(weakest.interval)})"
    against = [f for f in found if f.status == "refuted" and f.interval]
    against_listed = "; ".join(f"{f.name} {_span(f.interval)}" for f in against[:4] if f.interval)
    more = f"; and {len(against) - 4} more" if len(against) > 4 else ""
    if status == "supported":
        return f"Yes: {place}{words.supported}; {near}."
    if status == "refuted":
        return f"No: {place}{words.refuted}: {against_listed}{more}."
    if status == "mixed":
        levels = sorted({f.target.level for f in found if f.status == "refuted"})
        return f"In part: {place}not for {', '.join(levels)}: {against_listed}{more}."
    if status == "demo":
        return f"A demonstration, no verdict: {place}{near}."
    still = "; ".join(f"{f.name} ({f.reason})" for f in found if f.status == "inconclusive")
    return f"Undecided: {place}{near}." + (f" Open: {still}." if still else "")


def _span(i: Interval) -> str:
    """Effect and interval with three digits that count: some numbers here are small."""

    def said(value: float) -> str:
        return f"{value:+.3g}".replace("-", "−")

    return f"{said(i.mean)}, 95 % interval {said(i.lo)} to {said(i.hi)}"


def _part(part: str, f: Found) -> str:
    if not f.target.level:
        return part
    return f"level: {f.target.level}" if part == "fair" else f"{part}, {f.target.level}"


def _cell(name: str, part: str, i: Interval | None, status: str, reason: str) -> dict[str, Any]:
    return {
        "name": name,
        "part": part,
        "effect": i.mean if i else None,
        "lo": i.lo if i else None,
        "hi": i.hi if i else None,
        "p_signflip": i.p_signflip if i and part in ("fair", "control") else None,
        "n": i.n if i else 0,
        "status": status,
        "reason": reason,
    }


def _real(value: Scalar) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a measured value must be a number, got {value!r}. Repeat that cell.")
    return float(value)
