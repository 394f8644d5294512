"""The words and verdicts of the page as Markdown: no figures, no rows."""

import re
from typing import Any

from gammabeta.report._content import Content, Section
from gammabeta.report._marks import STATUSES, number

_SIGNS = re.compile(r"([\\`*_<>|\[\]#&~])")


def text(page: Content) -> str:
    """The whole document, ending in a line break."""
    title = "Batch normalization, claim by claim" if page.runs else "What a training showed"
    lines = [f"# {title}", *([_plain(page.opening)] if page.runs else [])]
    lines += [_plain(notice) for notice in page.notices]
    lines += [f"**Missing.** {_plain(missing)}" for missing in page.missing]
    if page.comparison:
        lines += ["## Two runs beside each other", _compared(page)]
    if page.runs:
        lines += ["## Verdicts", _table(page.first)]
        if page.waiting:
            waiting = ", ".join(f"`{claim['id']}`" for claim in page.waiting)
            lines.append(f"Not decided here, of the headline claims: {waiting}.")
    if page.surprises:
        lines.append("## What surprised")
        told = [(v["text"]["question"] if v else "", words) for v, words in page.surprises]
        lines.append("\n".join(f"- {_plain(f'{asked} {words}')}" for asked, words in told))
    if page.verdicts:
        lines += [
            "## All that was judged",
            *(_plain(" ".join(told)) for told in page.expected),
            _table(page.verdicts),
        ]
    for section in page.sections:
        lines += _section(section)
    for record in page.records:
        lines.append(f"## {_plain(record.model)} while training")
        lines.append("\n".join(f"- {name}: {_plain(told)}" for name, told in record.facts))
        lines += [_plain(note) for note in [*record.errors, *record.notes]]
    if page.facts:
        lines += ["## Made from", "\n".join(f"- {a}: {_plain(told)}" for a, told in page.facts)]
    return "\n\n".join(line for line in lines if line) + "\n"


def _table(verdicts: list[dict[str, Any]]) -> str:
    if not verdicts:
        return "No claim has been judged."
    head = "| question | as published | fair | effect | 95 % interval | δ | n | certainty | place |"
    lines = [head, "|---" * 9 + "|"]
    for verdict in verdicts:
        ends = "–"
        if verdict["lo"] is not None and verdict["hi"] is not None:
            ends = f"{number(verdict['lo'], sign=True)} to {number(verdict['hi'], sign=True)}"
        columns = (
            f"{_plain(verdict['text']['question'])} (`{verdict['claim']}`)"
            + " **rule amended after data**" * verdict["text"]["amended"]
            + " **second stage**" * verdict["second"],
            _both(verdict)[0],
            _both(verdict)[1],
            f"{number(verdict['effect'], sign=True)} {_plain(verdict['unit'])}".strip(),
            ends,
            number(verdict["delta"]),
            number(verdict["n"]),
            f"{verdict['certainty'][0]} ({_plain(verdict['certainty'][1])})",
            _plain(verdict["where"]),
        )
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _both(verdict: dict[str, Any]) -> tuple[str, str]:
    words = [
        "not tried" if status is None else STATUSES[status][0]
        for status in (verdict["published_status"], verdict["status"])
    ]
    if verdict["exact"]:
        words = [f"as worded: {words[0]}", f"as rightly stated: {words[1]}"]
    return words[0], words[1]


def _compared(page: Content) -> str:
    found = page.comparison
    assert found is not None
    a, b = (_plain(name) for name in found.names)
    lines = [f"| question | {a} | {b} | |", "|---|---|---|---|"]
    for pair in found.pairs:
        told = [
            "not judged"
            if side is None
            else f"{_both(side)[1]}, {number(side['effect'], sign=True)} {_plain(side['unit'])}"
            for side in pair.verdicts
        ]
        lines.append(f"| {_plain(pair.question)} | {told[0]} | {told[1]} | {pair.words} |")
    return "\n".join(lines)


def _section(section: Section) -> list[str]:
    lines = [f"## {_plain(section.question)}"]
    for verdict in section.verdicts:
        if verdict["text"]["question"] != section.question:
            lines.append(f"### {_plain(verdict['text']['question'])}")
        lines.append(f"**{_plain(verdict['sentence'])}**")
        if verdict["todo"]:
            told, command = verdict["todo"]
            lines.append(f"What can be done: {_plain(told)}{f' `{command}`' if command else ''}")
        if verdict["text"]["amended"] and verdict["text"]["why"]:
            lines.append(f"Rule amended after data: {_plain(verdict['text']['why'])}")
        known = [("The source reports", verdict["reported"]), ("Rule", verdict["text"]["rule"])]
        known.append(("Caveats", verdict["text"]["caveats"]))
        known.append(("Variations", verdict["variations"]))
        told = [f"- {name}: {_plain(words)}" for name, words in known if words]
        lines.append("\n".join([*told, *(f"- {_plain(note)}" for note in verdict["notes"])]))
    for claim in section.unjudged:
        lines.append(f"{_plain(claim['question'])} No verdict here on `{claim['id']}`.")
    if section.failed:
        lines.append(f"{len(section.failed)} cells failed: {_plain(section.failed[0]['line'])}")
    commands = [*section.reproduce, *(command for _, command in section.dispute)]
    lines.append("\n".join(f"    {_one_line(command)}" for command in commands))
    return [*lines, f"Cite: {_plain(section.cite)}"]


def _one_line(words: str) -> str:
    return " ".join(words.split())


def _plain(words: str) -> str:
    """Text that Markdown leaves as it is, on one line."""
    return _SIGNS.sub(r"\\\1", _one_line(words))
