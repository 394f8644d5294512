"""From outcomes to the verdict of a claim in words and numbers.

Nothing here decides: the rules are in ``_verdict``. Changing a word leaves stored rows valid.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta.studies._claims import claims
from gammabeta.studies._verdict import (
    Interval,
    Outcome,
    Verdict,
    half_width,
    interval,
    levels,
)

PLACES = {"mnist": "MNIST", "digits": "the bundled digits"}


class Words(NamedTuple):
    """The answer to a universal claim, as the second half of a sentence.

    ``{weakest}``, ``{refuted}`` and ``{delta}`` are filled in.
    """

    supported: str
    refuted: str
    measured: str  # where no verdict is given: what was seen
    mixed: str = ""


class Setting(NamedTuple):
    """Where and how it was measured."""

    experiment: str
    budget: str
    data: str
    network: str
    condition: str  # "each network at its best learning rate"
    unit: str
    decides: bool = True  # False: this budget gives no verdict


def answer(
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
    combine: Callable[[Sequence[Outcome]], str] = lambda found: levels(found[0], found[-1]),
) -> Verdict:
    """One verdict from outcomes that have cells.

    Args:
        fair: the outcome that gives the status; its weakest cell is the effect.
        published: outcomes by level, joined by ``combine``; none, where the claim is about the
            source's own setting and ``fair`` was measured in it.
        pilot: the pilot's differences by cell; planned: the number of seeds it asked for.
        notes: what else a reader must be told.
    """
    outcomes = list(published.values())
    status, published_status = fair.status, combine(outcomes) if outcomes else fair.status
    if setting.data == "digits":
        status = published_status = "demo"
    elif not setting.decides:
        status = published_status = "inconclusive"
    demo = status == "demo"
    effect = fair.interval
    smallest = min(
        (cell.interval.n if cell.interval else 0 for cell in fair.cells.values()), default=0
    )
    own = list(notes)
    for level, outcome in published.items():
        result = "" if demo else f"{outcome.status} ({outcome.reason}), "
        own.append(f"As published, {level}: {result}weakest {named(outcome)}.")
    predicted = None
    if planned is not None and fair.weakest is not None and len(pilot[fair.weakest]) > 1:
        predicted = half_width(interval(pilot[fair.weakest]).sd, planned)
        if smallest < planned:
            own.append(f"The pilot asked for {planned} seeds; {smallest} were run.")
    return Verdict(
        claim=claim,
        experiment=setting.experiment,
        status=status,
        published_status=published_status,
        effect=effect.mean if effect else None,
        ci=(effect.lo, effect.hi) if effect else None,
        n=smallest,
        unit=setting.unit,
        reported=claims()[claim].reported,
        budget=setting.budget,
        data=setting.data,
        delta=delta,
        half_width=effect.half_width if effect else None,
        planned_half_width=predicted,
        sentence=_sentence(status, setting, words, fair, delta),
        cells=[
            *_cells(fair, "fair", demo),
            *(
                cell
                for level, o in published.items()
                for cell in _cells(o, f"published, {level}", demo)
            ),
        ],
        notes=own,
        p=fair.p,
        n_needed=fair.n_needed if status == "inconclusive" and setting.decides else None,
        place=f"{PLACES.get(setting.data, setting.data)}, {setting.network}",
    )


def _sentence(status: str, setting: Setting, words: Words, fair: Outcome, delta: float) -> str:
    where = f"on {PLACES.get(setting.data, setting.data)}, {setting.network}, {setting.condition}"
    if fair.interval is None:
        return f"Undecided: {where}, there is nothing to compare yet."
    opening, text = {
        "supported": ("Yes", words.supported),
        "refuted": ("No", words.refuted),
        "mixed": ("In part", words.mixed),
        "demo": ("A demonstration, no verdict", words.measured),
    }.get(status, ("Undecided", words.measured))
    refuted = [
        f"{name} ({span(cell.interval)}; {cell.reason})"
        for name, cell in fair.cells.items()
        if cell.status == "refuted" and cell.interval
    ]
    shown = text.format(weakest=named(fair), refuted=listed(refuted), delta=f"{delta:g}")
    sentence = f"{opening}: {where}, {shown}."
    if status == "inconclusive":
        why: dict[str, list[str]] = {}
        for name, cell in fair.cells.items():
            if cell.status == "inconclusive":
                why.setdefault(cell.reason, []).append(name)
        still = "; ".join(f"{listed(names)} ({reason})" for reason, names in why.items())
        sentence += f" Open: {still}." if still else ""
    return sentence


def points(value: float) -> str:
    """A signed number with two digits and a true minus sign.

    >>> points(-0.5)
    '−0.50'
    """
    return f"{value:+.2f}".replace("-", "−")


def span(i: Interval) -> str:
    """Effect and interval in words."""
    return f"{points(i.mean)}, 95 % interval {points(i.lo)} to {points(i.hi)}"


def named(outcome: Outcome) -> str:
    """The weakest cell of a universal outcome, with its effect."""
    return f"{outcome.weakest} ({span(outcome.interval)})" if outcome.interval else "none"


def listed(names: Sequence[str]) -> str:
    """Names as English lists them.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def _cells(outcome: Outcome, part: str, demo: bool) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "part": part,
            "effect": cell.interval.mean if cell.interval else None,
            "lo": cell.interval.lo if cell.interval else None,
            "hi": cell.interval.hi if cell.interval else None,
            "p_signflip": cell.interval.p_signflip if cell.interval else None,
            "n": cell.interval.n if cell.interval else 0,
            "status": "demo" if demo else cell.status,
            "reason": "" if demo else cell.reason,
        }
        for name, cell in outcome.cells.items()
    ]
