"""What a rule says, and what a rule is."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from gammabeta._check._evidence import Evidence


class Finding(NamedTuple):
    """One misuse of batch normalization.

    Attributes:
        code: of the rule, "BN001" to "BN010".
        title: the rule in a few words.
        places: qualified names of the modules that it is about, in order of the forward.
        effect: what it does in this model, measured where a batch was given.
        cure: one line of code against it; ``model`` is the model that was checked.
        values: the number measured at each place (which one, the rule's explanation says).
    """

    code: str
    title: str
    places: tuple[str, ...]
    effect: str
    cure: str
    values: dict[str, float]

    def __str__(self) -> str:
        lines = [f"{self.code} {self.title}"]
        for head, text in (("where", listed(self.places)), ("effect", self.effect)):
            lines += _wrapped(head, text)
        return "\n".join([*lines, f"    cure    {self.cure}"])


class Findings(list[Finding]):
    """The findings of one check, in order of their codes; ``str()`` tells all.

    Attributes:
        skipped: rules that could not be tried, and why.
        tried: codes of those that were.
        partly: of those, the ones that were tried in part, and what would make them whole.
    """

    def __init__(
        self,
        findings: Iterable[Finding],
        tried: Iterable[str],
        skipped: Mapping[str, str],
        partly: Mapping[str, str],
    ) -> None:
        super().__init__(findings)
        self.tried, self.skipped, self.partly = tuple(tried), dict(skipped), dict(partly)

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of what was found."""
        return tuple(finding.code for finding in self)

    def __str__(self) -> str:
        number = f"{len(self)} finding{'' if len(self) == 1 else 's'}" if self else "No findings"
        rules = f"{len(self.tried)} rule{'' if len(self.tried) == 1 else 's'} tried"
        rules += f", {len(self.partly)} of them in part" if self.partly else ""
        lines = [*map(str, self), f"{number}, {rules}."]
        lines += [f"In part: {code} {what}." for code, what in self.partly.items()]
        for reason in dict.fromkeys(self.skipped.values()):
            codes = ", ".join(code for code, why in self.skipped.items() if why == reason)
            lines += textwrap.wrap(f"Not tried: {codes}: {reason}.", 80)
        return "\n".join(lines)

    __repr__ = __str__


class Untried(Exception):
    """A rule cannot be tried; the message says why."""


class Rule(NamedTuple):
    """A rule: its docstring is the explanation.

    Attributes:
        without: an argument of the check, and what the rule is tried for where that is not given.
    """

    code: str
    title: str
    find: Callable[[Evidence], Found | None]
    without: tuple[str, str] | None = None


class Found(NamedTuple):
    """What a rule found: the measured number at each place, effect and cure."""

    values: dict[str, float]
    effect: str
    cure: str


def listed(names: Iterable[str], most: int = 4) -> str:
    """Names in words; of many the first."""
    shown = [name or "(model)" for name in names]
    if len(shown) <= most:
        return ", ".join(shown)
    return f"{', '.join(shown[: most - 1])} and {len(shown) - most + 1} more"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if abs(share) >= 0.095 else f"{100 * share:.2g} %"


def worst(values: Mapping[str, float]) -> tuple[str, float]:
    """The place with the largest number, in words, and that number."""
    name = max(values, key=lambda key: values[key])
    return name or "(model)", values[name]


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=f"    {head:<8}", subsequent_indent=" " * 12)


def jsonable(finding: Finding) -> dict[str, Any]:
    """The finding as JSON knows it, which has no infinity."""
    fields = finding._asdict()
    values = {k: v if abs(v) < float("inf") else None for k, v in finding.values.items()}
    return {**fields, "places": list(finding.places), "values": values}
