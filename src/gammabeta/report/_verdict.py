"""One verdict in a reader's words and numbers: what follows from it alone, without its claim."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta.report import _next
from gammabeta.report._marks import STATUSES, Scale, is_number

Verdict = dict[str, Any]
Parts = dict[str, list[dict[str, Any]]]
_MANY_PARTS = 24  # of one verdict: more are folded away
_DECIDING = ("fair", "level", "control", "as rightly stated", "as worded")
PLACES = {"mnist": "MNIST", "digits": "the bundled digits"}

_HELD = re.compile(
    r"Holds in (\d+) of (\d+) variations tried(?: \((\d+) of (\d+) not run: ([^()]+)\))?: (.+)\."
)
_ASIDE = re.compile(r"\s*\([^()]*\)")
_SHORT = 220  # letters of an answer beside others
_NEAREST = "nearest to its limit is "  # and then the name of a part
_TIMES = re.compile(r"(?<=\d) x (?=\d)")
_UNTOLD = {  # letter -> what stands behind it where no variations are told
    "A": "an identity or a proof",
    "B": "holds in at least 3 of 4 variations",
    "C": "no variation tried",
    "D": "undecided",
}


class Held(NamedTuple):
    """In which variations a verdict holds: in short, and one by one (None: not run)."""

    words: str
    each: list[tuple[bool | None, str, str]]


def add_words(verdict: Verdict, exact: bool) -> None:
    """Add to a verdict what the page says of it."""
    verdict["lo"], verdict["hi"] = verdict["ci"] or (None, None)
    verdict["parts"], verdict["more_parts"] = _parts(verdict["cells"])
    verdict["at"] = _at(verdict)
    verdict["exact"] = exact
    verdict["place"] = _place(verdict)
    verdict["short"] = _short(verdict)
    stage = verdict.get("stage")
    verdict["second"] = isinstance(stage, int) and stage > 1
    verdict["where"] = f"{verdict['place']} · budget {verdict['budget']}"
    verdict["variations"] = _varied(verdict)
    held = _held_in(verdict["variations"], verdict["status"])
    verdict["certainty"] = _certainty(verdict, held)
    verdict["held"] = held.each if held else []
    verdict["ratio"] = _ratio(verdict, verdict["effect"])
    verdict["nearest"] = _nearest(verdict)
    verdict["todo"] = _next.steps(verdict)
    verdict["first_stage"] = _next.first_stage(verdict)
    deciding = [cell for cells in verdict["parts"].values() for cell in cells]
    verdict["scale"] = Scale(ratios(verdict, [c for c in deciding if c["reason"] != "shown"]))


def _at(verdict: Verdict) -> str:
    """Which of several parts the effect is of: the first one with the same numbers."""
    known = [cell for cell in verdict["cells"] if cell.get("effect") is not None]
    judged = [cell for cell in known if cell.get("reason") != "shown"]
    fair = [cell for cell in judged if str(cell.get("part")).startswith(("fair", "level"))]
    fair = fair or [cell for cell in known if cell.get("part") == known[0].get("part")]
    same = (cell["name"] for cell in fair if cell["effect"] == verdict["effect"])
    return str(next(same, "")) if len(fair) > 1 else ""


def _nearest(verdict: Verdict) -> dict[str, Any] | None:
    """The part that the short answer names as nearest to its limit, if it is not the effect's."""
    named = verdict["sentence"].partition(_NEAREST)[2]
    for cell in verdict["cells"]:
        fits = named.startswith(f"{cell['name']} (") and cell.get("reason") != "shown"
        fits = fits and str(cell["name"]) in verdict["short"]
        if fits and is_number(cell.get("effect")) and cell["effect"] != verdict["effect"]:
            return {key: cell.get(key) for key in ("name", "effect", "lo", "hi")}
    return None


def _short(verdict: Verdict) -> str:
    """The answer without its numbers and without the place, which stands beside it.

    >>> _short({"sentence": "No: on MNIST, it gains less (+0.1): a, b.", "place": "MNIST"})
    'No: it gains less.'
    """
    text = _ASIDE.sub("", verdict["sentence"])
    place = verdict.get("place")
    if isinstance(place, str) and place:
        text = text.replace(f" on {place},", "", 1)
    head, colon, rest = text.partition(": ")
    rest = re.split(r"; |: |\. ", rest)[0].rstrip(" .")
    short = f"{head}{colon}{rest}" if rest else head.rstrip(" .")
    return f"{short}." if len(short) < _SHORT else f"{short[:_SHORT].rpartition(' ')[0]} …"


def _place(verdict: Verdict) -> str:
    """Where it was found, in a reader's words."""
    told = verdict.get("place")
    if isinstance(told, str) and told:
        return told
    if verdict["exact"]:
        return "for any data"
    data: str = verdict["data"]
    return PLACES.get(data, data)


def _certainty(verdict: Verdict, held: Held | None) -> tuple[str, str]:
    """How sure a reader may be: a letter, and what stands behind it."""
    told = verdict.get("certainty")
    letter = {"exact": "A", "fails": "A", "inconclusive": "D", "demo": "D"}.get(verdict["status"])
    if letter is None:
        letter = told if told in ("B", "C") else "C"
    return letter, held.words if held and letter in "BC" else _UNTOLD[letter]


def _varied(verdict: Verdict) -> str:
    """In which variations of its setting the verdict holds, if that was tried."""
    told = verdict.get("variations")
    return told if isinstance(told, str) else ""


def _held_in(text: str, status: str) -> Held | None:
    """The variations one by one, from the sentence about them; None if it is not of that form.

    >>> _held_in("Holds in 1 of 1 variations tried: 2 x 2, turned refuted.", "refuted")
    Held(words='holds in 1 of 1 tried', each=[(True, '2×2, turned', 'refuted')])
    """
    found = _HELD.fullmatch(text)
    if found is None:
        return None
    held, tried, absent, of, names, each = found.groups()
    words = f"holds in {held} of {tried} tried" + (f" ({absent} of {of} not run)" if of else "")
    items: list[tuple[bool | None, str, str]] = []
    for item in each.split("; "):
        name, _, other = item.rpartition(" ")
        if other not in STATUSES:
            return None
        items.append((other == status, name, STATUSES[other][0]))
    items += [(None, name, "not run") for name in (names.split("; ") if names else ())]
    return Held(words, [(fits, _TIMES.sub("×", name), word) for fits, name, word in items])


def _ratio(verdict: Verdict, value: Any) -> float | None:
    """A number in units of the smallest effect that matters."""
    delta = verdict["delta"]
    if not (is_number(delta) and delta > 0 and is_number(value)):
        return None
    found = value / delta
    return found if is_number(found) else None


def _parts(cells: list[dict[str, Any]]) -> tuple[Parts, Parts]:
    """The outcomes of a verdict under the headings they carry; of many, first what decides."""
    found: Parts = {}
    keys = ("name", "status", "effect", "lo", "hi", "n", "p_signflip", "reason")
    by_sign = any(_by_sign(cell) for cell in cells)
    for cell in cells:
        known = {key: cell.get(key) for key in keys}
        p = cell.get("p_signflip")
        if _by_sign(cell):
            known["reason"] = f"{cell['reason']}: a control may be decided so, and this one was"
        elif by_sign and cell["status"] == "inconclusive" and is_number(p) and float(str(p)) < 0.05:
            known["reason"] = f"{cell['reason']}; here the interval decides, not the sign-flip test"
        found.setdefault(str(cell.get("part") or ""), []).append(known)
    if len(cells) <= _MANY_PARTS:
        return found, {}
    first = {part: found[part] for part in found if part.startswith(_DECIDING)}
    return first, {part: found[part] for part in found if part not in first}


def _by_sign(cell: Mapping[str, Any]) -> bool:
    """Whether a control is supported though its interval is not above 0."""
    return cell.get("part") == "control" and "by the exact sign-flip test" in str(
        cell.get("reason")
    )


def ratios(verdict: Verdict, cells: Sequence[Mapping[str, Any]] = ()) -> list[float]:
    """The effect and its interval, and those of parts, in units of what matters."""
    values = [verdict["effect"], verdict["lo"], verdict["hi"]]
    for cell in cells:
        values += [cell.get("effect"), cell.get("lo"), cell.get("hi")]
    found = [_ratio(verdict, value) for value in values]
    return [ratio for ratio in found if ratio is not None]
