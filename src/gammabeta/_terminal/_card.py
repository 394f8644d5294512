"""The card of one claim: answer, verdicts, numbers, caveats, source, protocol, commands."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gammabeta._terminal._shared import (
    MARKS,
    SECOND_STAGE,
    effect,
    make_console,
    make_table,
    mark,
    number,
)

if TYPE_CHECKING:
    from gammabeta.studies._card import Card
    from gammabeta.studies._provenance import Rule
    from gammabeta.studies._verdict import Verdict


_CERTAIN = {
    "A": "A: exact, by proof or counterexample",
    "B": "B: the same in at least three of four variations",
    "C": "C: not in three of the four variations, or none tried",
    "D": "D: undecided",
}


def explain(card: Card, protocol: bool = False) -> None:
    """All about one claim, the answer first; of the protocol what is about it, or all of it."""
    console = make_console()
    claim, verdict = card.claim, card.verdict
    console.print(Text.assemble((claim.id, "bold"), "  ", claim.question))

    def section(name: str) -> None:
        console.print(f"\n{name}", style="bold")

    def show(*entries: tuple[str, str | Text]) -> None:
        table = make_table(("", {"no_wrap": True, "min_width": 12}), ("", {}), header=False)
        for name, text in entries:
            if text:
                table.add_row(name, text)
        console.print(Padding(table, (0, 0, 0, 2)))

    if verdict is not None:
        section("Answer")
        console.print(Padding(Text(verdict.sentence), (0, 0, 0, 2)))
        if told := _todo(verdict):
            section("What can be done")
            for text in told:
                console.print(Padding(Text(text), (0, 0, 0, 2)))
        section("Verdicts")
        show(
            ("as published", mark(verdict.published_status)),
            ("fair", mark(verdict.status)),
            ("second stage", SECOND_STAGE if verdict.stage > 1 else ""),
            ("effect", _effect(verdict)),
            ("precision", _precision(verdict)),
            ("place", f"{verdict.place or verdict.data}, budget {verdict.budget}"),
            ("certainty", _CERTAIN.get(verdict.certainty, "")),
            ("variations", verdict.variations),
        )
        section("Numbers")
        console.print(Padding(_numbers(verdict), (0, 0, 0, 2)))
    if verdict is not None and verdict.notes:
        section("Notes")
        for note in verdict.notes:
            console.print(Padding(Text(note), (0, 0, 0, 2)))
    if claim.caveats:
        section("Caveats")
        console.print(Padding(Text(claim.caveats), (0, 0, 0, 2)))
    if card.missing:
        section("Missing")
        for text in card.missing:
            console.print(Padding(Text(text), (0, 0, 0, 2)))
    section("Claim")
    show(("claim", claim.title), ("source", claim.source), ("reported", claim.reported))
    section("Rule")
    thresholds = ", ".join(f"{key} = {value:g}" for key, value in claim.thresholds.items())
    show(("rule", claim.rule), ("thresholds", thresholds), ("fixed", _fixed(card.rule)))
    if card.rule is not None and card.rule.amended:
        show(("why", claim.amended))
    if card.protocol:
        section(f"Protocol of the experiment {claim.experiment}")
        text = card.protocol if protocol else card.about
        for line in _reflowed(text, console.width - 2):
            console.print(f"  {line}".rstrip(), soft_wrap=True)
        if text != card.protocol:
            console.print("\n  What is about other claims is left out:")
            console.print(f"  gammabeta study explain {claim.id} --protocol", soft_wrap=True)
    for name, command in (("Make it", card.make), ("Dispute it", card.dispute)):
        if command:
            section(name)
            console.print(f"  {command}", soft_wrap=True)  # one line, to be copied


def _todo(verdict: Verdict) -> list[str]:
    """What a reader can do about an undecided verdict, and how far its forecast can be trusted."""
    if verdict.status != "inconclusive":
        return []
    from gammabeta.studies import _second

    if verdict.stage > 1:
        told = ["It has had its second stage, and there is no third: it stays undecided here."]
    elif reason := _second.reason_against(verdict):
        told = [reason]
    else:
        told = [
            "A second stage runs twice as many fresh seeds as it asks for, and judges these alone:",
            f"gammabeta study more {verdict.claim}",
        ]
    if verdict.n_needed is not None:
        told.append(
            f"That about {verdict.n_needed} seeds would decide it is a forecast: it holds if mean "
            "and spread stay as they were in the seeds that were judged."
        )
    return told


def _fixed(rule: Rule | None) -> str:
    if rule is None:
        return ""
    if rule.amended:
        return f"amended after data: changed after the first row ({rule.rows_since}) was made"
    when = f"in commit {rule.commit[:10]} of {rule.changed}" if rule.commit else "no history"
    return f"{when}, before the first row ({rule.rows_since})"


def _numbers(verdict: Verdict) -> Table:
    right = {"justify": "right", "no_wrap": True}
    table = make_table(
        ("contrast", {}),
        ("effect [95 %]", {"no_wrap": True}),
        ("n", right),
        ("", {"no_wrap": True}),
    )
    part = None
    for cell in verdict.cells:
        if cell.get("part") != part:
            part = cell.get("part")
            table.add_row(Text(str(part or ""), style="bold"))
        table.add_row(
            Padding(Text(str(cell.get("name", ""))), (0, 0, 0, 2)),
            effect(_interval(cell)),
            f"{cell.get('n', '')}",
            _judged(cell),
        )
        p = cell.get("p_signflip")
        if p is not None and "sign-flip" in str(cell.get("reason")):
            why = f"by the sign-flip test, p = {p:.2g}"
            table.add_row(Padding(Text(why), (0, 0, 0, 4)))
    return table


def _judged(cell: Mapping[str, Any]) -> Text:
    if cell.get("reason") == "shown":
        return Text("shown only")
    status = cell.get("status")
    return mark(status) if status in MARKS else Text(str(status or ""))


def _interval(cell: Mapping[str, Any]) -> dict[str, Any]:
    lo, hi = cell.get("lo"), cell.get("hi")
    return {"effect": cell.get("effect"), "ci": None if lo is None or hi is None else (lo, hi)}


def _effect(verdict: Verdict) -> str:
    size = effect(verdict.to_json())
    least = "" if verdict.delta is None else f"; smallest of interest {verdict.delta:g}"
    where = f"on {verdict.data}, budget {verdict.budget}"
    return f"{size} {verdict.unit}{least}; n = {verdict.n}, {where}"


def _precision(verdict: Verdict) -> str:
    if verdict.half_width is None:
        return ""
    reached = f"half-width of the interval {number(verdict.half_width)[1:]}"
    planned = verdict.planned_half_width
    return reached if planned is None else f"{reached}, planned {number(planned)[1:]}"


def _reflowed(text: str, width: int) -> Iterator[str]:
    """Paragraphs for a narrower page: lines of one indent that follow each other become one."""
    run: list[str] = []

    def flush() -> Iterator[str]:
        if run:
            indent = " " * (len(run[0]) - len(run[0].lstrip()))
            joined = " ".join(line.strip() for line in run)
            yield from textwrap.wrap(joined, width, initial_indent=indent, subsequent_indent=indent)
            run.clear()

    for line in text.splitlines():
        stripped = line.strip()
        indent = len(line) - len(stripped)
        opens = stripped.startswith(("- ", "* "))
        if not stripped or opens or (run and indent != len(run[0]) - len(run[0].lstrip())):
            yield from flush()
        if stripped:
            run.append(line.rstrip())
        else:
            yield ""
    yield from flush()
