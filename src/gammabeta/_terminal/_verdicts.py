"""Claims and their verdicts as tables and sentences."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gammabeta._terminal._shared import (
    GAP,
    MARKS,
    SECOND_STAGE,
    Found,
    effect,
    make_console,
    make_table,
    mark,
    one_point,
)

if TYPE_CHECKING:
    from gammabeta.studies._card import Disputed
    from gammabeta.studies._claims import Claim
    from gammabeta.studies._judge import Multiplicity
    from gammabeta.studies._verdict import Verdict

MANY = 12  # verdicts; of more, only the headline claims are answered in sentences


def _by_topic(listed: Iterable[Claim]) -> Iterator[tuple[str, list[Claim]]]:
    from gammabeta.studies._claims import TOPICS

    groups: dict[str, list[Claim]] = {topic: [] for topic in TOPICS}
    for claim in listed:
        groups[claim.topic].append(claim)
    return ((topic, group) for topic, group in groups.items() if group)


def claims(listed: Collection[Claim]) -> None:
    """All claims by topic: id, and what a reader would ask."""
    console = make_console()
    console.print("* = there is an experiment that decides it.\n")
    table = make_table(("", {"no_wrap": True}), ("", {}), header=False)
    for topic, group in _by_topic(listed):
        if table.row_count:
            table.add_row()
        table.add_row(Text(topic.replace("-", " ").capitalize(), style="bold"))
        for claim in group:
            mark = "*" if claim.experiment else " "
            table.add_row(f"{mark} {claim.id}", claim.question)
    console.print(table)
    ready = sum(claim.experiment is not None for claim in listed)
    console.print()
    console.print(
        f"{len(listed)} claims, {ready} with an experiment (*): `gammabeta study "
        "explain CLAIM` tells all about one, `gammabeta study run CLAIM` decides it."
    )


def verdicts(found: Sequence[Found], surprises: Sequence[str], known: Mapping[str, Claim]) -> None:
    """The verdicts: one row a claim, the answers in sentences, and what surprised."""
    console = make_console()
    if not found:
        console.print("No verdicts yet: there are no finished cells to judge.")
        return
    many = len(found) > MANY
    table = None if many else _verdict_table(found, console.width)
    if table is None:
        _in_two_lines(console, found, known, by_topic=many)
    else:
        console.print(table)
    console.print()
    console.print(_caption(found, units=table is not None))
    told = [verdict for verdict in found if not many or known[verdict["claim"]].headline]
    for verdict in told:
        console.print()
        claim = verdict["claim"]
        console.print(Text.assemble((claim, "bold"), "  ", known[claim].question))
        console.print(Padding(Text(verdict["sentence"]), (0, 0, 0, 2)))
    if many:
        console.print("\n`gammabeta study show CLAIM` tells each answer in full.")
    console.print()
    console.print("What surprised", style="bold")
    for text in surprises or ["Nothing: every effect points the way that its claim says."]:
        for verdict in told:  # the answer itself stands above
            text = text.removesuffix(verdict["sentence"]).rstrip()
        console.print(Padding(Text(text), (0, 0, 0, 2)))


_HEADS = ("as published", "fair", "effect [95 %]", "n", "on")


def _cells(found: Sequence[Found]) -> dict[str, tuple[Text, Text, str, str, str]]:
    budgets = {verdict["budget"] for verdict in found}
    return {
        verdict["claim"]: (
            mark(verdict["published_status"]),
            mark(verdict["status"]),
            effect(verdict),
            f"{verdict['n']}{'†' if _second(verdict) else ''}",
            # one budget for all is said below the table, where there is more room
            verdict["data"] if len(budgets) == 1 else f"{verdict['data']}, {verdict['budget']}",
        )
        for verdict in found
    }


def _second(verdict: Found) -> bool:
    """Whether it rests on fresh seeds alone; older files do not say."""
    stage = verdict.get("stage", 1)
    return isinstance(stage, int) and stage > 1


def _widths(rows: Iterable[Sequence[Text | str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(_HEADS, *rows, strict=True)]


def _verdict_table(found: Sequence[Found], width: int) -> Table | None:
    """One line a claim; None where that is too wide."""
    rows = _cells(found)
    widths = [max(len("claim"), *map(len, rows)), *_widths(rows.values())]
    if sum(widths) + (len(widths) - 1) * GAP > width:
        return None
    heads = zip(("claim", *_HEADS), widths, strict=True)
    table = make_table(*((head, {"no_wrap": True, "min_width": w}) for head, w in heads))
    table.columns[4].justify = "right"
    for claim, row in rows.items():
        table.add_row(claim, *row)
    return table


def _in_two_lines(
    console: Console, found: Sequence[Found], known: Mapping[str, Claim], by_topic: bool
) -> None:
    """The effect with its unit below each claim, so that no name is broken."""
    rows = _cells(found)
    units = {verdict["claim"]: verdict["unit"] for verdict in found}
    widths = _widths(rows.values())
    others = sum(widths) - widths[2] + 4 * GAP
    room = max(8, min(max(map(len, rows)), console.width - others))

    def line(claim: str, cells: Sequence[Text | str]) -> Text:
        *above, name = textwrap.wrap(claim, room)  # a name as long as this breaks after a hyphen
        text = Text("".join(f"{part}\n" for part in above) + name.ljust(room))
        for head, cell, wide in zip(_HEADS, cells, widths, strict=True):
            if head.startswith("effect"):
                continue
            pad = " " * (wide - len(cell))
            before, after = (pad, "") if head == "n" else ("", pad)
            text = Text.assemble(text, " " * GAP + before, cell, after)
        text.rstrip()
        return text

    def show(claim: str) -> None:
        console.print(line(claim, rows[claim]))
        size = Text(f"{rows[claim][2]} {units[claim]}".rstrip())
        console.print(Padding(size, (0, 0, 0, 2)))

    heads = line("claim", _HEADS)
    heads.append(f"\n  {_HEADS[2]}, unit")
    heads.stylize("bold")
    console.print(heads)
    if not by_topic:
        for claim in rows:
            show(claim)
        return
    for topic, group in _by_topic(known[claim] for claim in rows):
        console.print(f"\n{topic}", style="bold")
        for one in group:
            show(one.id)


def _caption(found: Sequence[Found], units: bool) -> str:
    """How many there are of each kind; the units too, where no line of its own has them."""
    parts = []
    if len(found) > 3:
        counted = Counter(verdict["status"] for verdict in found)
        kinds = [f"{counted[status]} {status}" for status in MARKS if counted[status]]
        parts.append(f"{len(found)} claims, in the fair setting {', '.join(kinds)}.")
    budgets = sorted({verdict["budget"] for verdict in found})
    if len(budgets) == 1:
        parts.append(f"Budget {budgets[0]}.")
    if any(map(_second, found)):
        parts.append(f"† second stage: {SECOND_STAGE}.")
    by_unit: dict[str, list[str]] = {}
    for verdict in found if units else ():
        if verdict["unit"]:
            by_unit.setdefault(verdict["unit"], []).append(verdict["claim"])
    if len(by_unit) == 1:
        parts.append(f"Effects in {next(iter(by_unit))}.")
    elif by_unit:
        lists = [f"Effects in {unit}: {', '.join(names)}." for unit, names in by_unit.items()]
        return "\n".join([" ".join(parts), *lists]).lstrip()
    return " ".join(parts)


def card(claim: Claim, verdict: Found | None) -> None:
    """All that is known of one claim: what the registry says, then what the runs say."""
    console = make_console()
    console.print(Text.assemble((claim.id, "bold"), "  ", claim.question))
    table = make_table(("", {"style": "bold", "no_wrap": True}), ("", {}), header=False)

    def add(name: str, text: str | Text) -> None:
        if text:
            table.add_row(name, text)

    add("Claim", claim.title)
    add("Source", claim.source)
    add("Reported", claim.reported)
    add("Rule", claim.rule)
    add("Caveats", claim.caveats)
    if verdict is None:
        cure = f"run `gammabeta study run {claim.id}`" if claim.experiment else "no experiment yet"
        add("Verdict", f"none: {cure}")
    else:
        where = f"{verdict['data']}, {verdict['budget']}"
        size = f"{effect(verdict)} {verdict['unit']}, n = {verdict['n']}, on {where}"
        add("Published", mark(verdict["published_status"]))
        add("Fair", mark(verdict["status"]))
        add("Second stage", SECOND_STAGE if _second(verdict) else "")
        add("Effect", size)
        add("Answer", verdict["sentence"])
        for note in verdict["notes"]:
            add("Note", note)
    console.print(Padding(table, (0, 0, 0, 2)))


def disputed(both: Sequence[Disputed], rules: Mapping[str, Mapping[str, float]]) -> None:
    """The claims of `rules` by both rules, in a few lines each, and what else turns."""
    console = make_console()
    console.print("Under another rule. Shown only: what is stored stays as it is.")
    turned = [one for one in both if one.claim.id not in rules]
    for claim, before, after in both:
        if claim.id not in rules:
            continue
        console.print()
        console.print(Text.assemble((claim.id, "bold"), "  ", claim.question))
        old = ", ".join(f"{key} = {claim.thresholds[key]:g}" for key in rules[claim.id])
        new = ", ".join(f"{key} = {value:g}" for key, value in rules[claim.id].items())
        table = make_table(("", {"no_wrap": True}), (f"registry, {old}", {}), (f"now, {new}", {}))
        table.add_row("as published", mark(before.published_status), mark(after.published_status))
        table.add_row("fair", mark(before.status), mark(after.status))
        table.add_row("effect [95 %]", effect(before.to_json()), effect(after.to_json()))
        console.print(Padding(table, (0, 0, 0, 2)))
        place = f"{after.unit}, n = {after.n}, on {after.data}, budget {after.budget}"
        console.print(Padding(Text(place.removeprefix(", ")), (0, 0, 0, 2)))
        for cell, status in _turned_cells(before, after):
            told = Text.assemble(f"{cell}: ", mark(status[0]), ", now ", mark(status[1]))
            console.print(Padding(told, (0, 0, 0, 2)))
        console.print(Padding(Text(f"Now: {one_point(after.sentence)}"), (0, 0, 0, 2)))
    for claim, before, after in turned:
        console.print()
        parts = (("as published", before.published_status, after.published_status),)
        told = Text.assemble("Turned by it: ", (claim.id, "bold"))
        for part, was, now in (*parts, ("fair", before.status, after.status)):
            if was != now:
                told = Text.assemble(told, f", {part} ", mark(was), ", now ", mark(now))
        console.print(told)


def _turned_cells(before: Verdict, after: Verdict) -> list[tuple[str, tuple[str, str]]]:
    """Which contrasts another rule judges otherwise, by part and name."""
    old, new = (
        {f"{cell.get('part')}, {cell.get('name')}": cell["status"] for cell in verdict.cells}
        for verdict in (before, after)
    )
    pairs = {name: (old[name], new[name]) for name in old if name in new}
    return [(name, pair) for name, pair in pairs.items() if pair[0] != pair[1]]


def multiplicity(found: Multiplicity) -> None:
    """How many of the verdicts "supported" chance alone may have given."""
    judged = sum(p is not None for p, _ in found.family.values())
    console = make_console()
    console.print(
        f"\nOf {found.supported} supported claims at most {found.expected_false:.2f} false ones "
        f"are to be expected. {found.how} Headline claims with a p-value: {judged} of "
        f"{len(found.family)}."
    )


def notice(text: str, last: str) -> None:
    """A paragraph, and after it one whole line that no width breaks."""
    text = text.removesuffix(last).strip()
    if text:
        make_console().print(f"\n{text}")
    print(last)
