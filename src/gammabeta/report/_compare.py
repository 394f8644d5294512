"""Two run folders beside each other, claim by claim: plain values, no HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# what changed -> its words, what a reader looks for first
CHANGES = {
    "verdict": "another verdict",
    "effect": "the same verdict, intervals apart",
    "only": "in one of them only",
    "same": "the same",
}


@dataclass(frozen=True)
class Pair:
    """One claim in two run folders; None where a folder does not judge it."""

    claim: str
    question: str
    verdicts: tuple[dict[str, Any] | None, dict[str, Any] | None]
    change: str

    @property
    def words(self) -> str:
        """What changed."""
        return CHANGES[self.change]


@dataclass(frozen=True)
class Comparison:
    """Two run folders: their names, and a pair for each claim that either judges."""

    names: tuple[str, str]
    pairs: list[Pair]

    @property
    def counts(self) -> list[tuple[str, int]]:
        """How many claims changed in which way."""
        changes = [pair.change for pair in self.pairs]
        found = [(words, changes.count(key)) for key, words in CHANGES.items()]
        return [(words, count) for words, count in found if count]


def compared(
    names: Sequence[str], verdicts: Mapping[str, Sequence[dict[str, Any]]], order: Sequence[str]
) -> Comparison:
    """Pair the verdicts of two run folders, those that changed first, else in the given order."""
    first, second = names
    sides = [{v["claim"]: v for v in reversed(verdicts.get(name, ()))} for name in names]
    rank = {claim: place for place, claim in enumerate(order)}
    pairs = []
    for claim in dict.fromkeys([*sides[0], *sides[1]]):
        a, b = sides[0].get(claim), sides[1].get(claim)
        known = a or b
        assert known is not None
        pairs.append(Pair(claim, known["text"]["question"], (a, b), _change(a, b)))
    kinds = list(CHANGES)
    pairs.sort(key=lambda pair: (kinds.index(pair.change), rank.get(pair.claim, len(rank))))
    return Comparison((first, second), pairs)


def _change(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> str:
    if a is None or b is None:
        return "only"
    if a["status"] != b["status"] or a["published_status"] != b["published_status"]:
        return "verdict"
    ends = (a["lo"], a["hi"], b["lo"], b["hi"])
    if a["unit"] == b["unit"] and all(end is not None for end in ends):
        apart = a["hi"] < b["lo"] or b["hi"] < a["lo"]
        return "effect" if apart else "same"
    return "same"
