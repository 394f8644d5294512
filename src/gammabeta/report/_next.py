"""What a reader can do about a claim that is undecided, and what a second stage had before it."""

from collections.abc import Mapping
from typing import Any

from gammabeta.report._marks import STATUSES, is_number, number

# As in the studies, whose rule this is.
ASKED = 128  # seeds: a second stage is run where so many are asked for at most
BY_HEADLINE = {"keep-consistent": "noisy-bn"}  # claims that a headline claim decides

_FRESH = "fresh-seeds"
_STAGE = "Second stage: "  # how the note on it begins

Steps = tuple[str, str]


def steps(verdict: Mapping[str, Any]) -> Steps | None:
    """What can be done about an undecided verdict, and a command for it ("" where there is none).

    None for a verdict that is decided, or decides nothing anyway.
    """
    plain = (verdict["data"], verdict["budget"]) == ("mnist", "small")
    if verdict["status"] != "inconclusive" or verdict["exact"] or not plain:
        return None
    claim, asked = verdict["claim"], _asked(verdict)
    forecast = ""
    if asked is not None:
        forecast = (
            f"About {number(asked)} seeds would decide it: a forecast, which holds if mean and "
            "spread stay as they were in the seeds that were judged; neither is known exactly."
        )
    if verdict["second"]:
        told = "It has had its second stage, and there is no third: it stays undecided here."
        return f"{told} {forecast or _NO_FORECAST}".strip(), ""
    leading = claim if verdict["text"]["headline"] else BY_HEADLINE.get(claim)
    if leading is not None:
        return f"{_headline(verdict, leading)} {forecast}".strip(), (
            f"gammabeta study run {leading} --variant {_FRESH} -o runs/{_FRESH}"
        )
    if asked is None:
        return f"{_NO_FORECAST} Hence no second stage.", ""
    if asked > ASKED:
        return f"{forecast} A second stage takes claims that ask for {ASKED} at most.", ""
    return (
        f"{forecast} A second stage runs twice as many fresh ones, once, and judges them alone:",
        f"gammabeta study more {claim}",
    )


_NO_FORECAST = (
    "No number of seeds up to 1000 is known that would decide it: what is open stands in the "
    "answer and beside its parts."
)


def _asked(verdict: Mapping[str, Any]) -> int | None:
    found = verdict.get("n_needed")
    return found if isinstance(found, int) and is_number(found) and found > 0 else None


def _headline(verdict: Mapping[str, Any], leading: str) -> str:
    """Why there is no second stage, and what fresh seeds gave where the run tells it."""
    own = leading == verdict["claim"]
    why = (
        "A headline claim has no second stage"
        if own
        else f"It is decided by {leading}, a headline claim, and those have no second stage"
    )
    told = f"{why}: their p-values are one family. Fresh seeds repeat them all, as a variation"
    status = verdict.get("fresh")
    if status not in STATUSES:
        return f"{told}."
    said = STATUSES[status][0]
    same = "also " if status == verdict["status"] else ""
    more = "" if same else ", which does not replace the verdict here"
    return f"{told}; that gave: {same}{said}{more}."


def first_stage(verdict: Mapping[str, Any]) -> str:
    """What the first stage had found, as the notes of the studies tell it, or ""."""
    if not verdict["second"]:
        return ""
    notes = [n.removeprefix(_STAGE) for n in verdict["notes"] if n.startswith(_STAGE)]
    return notes[0] if notes else ""
