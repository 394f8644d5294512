"""What all that is shown shares: the console, tables, marks of verdicts, numbers in words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

Found = Mapping[str, Any]  # a verdict, as its to_json() gives it

# A word, a sign and a color: the color is never the only cue. The colors are of fixed and middling
# lightness, since nobody knows the background: each has a contrast of 4 or more on white and on
# black, which a terminal's own green, yellow and cyan have not.
MARKS = {
    "supported": ("+", "color(28)"),
    "exact": ("=", "color(28)"),
    "refuted": ("-", "color(161)"),
    "fails": ("-", "color(161)"),
    "mixed": ("~", "color(99)"),
    "inconclusive": ("?", "color(130)"),
    "demo": ("o", "color(30)"),
}
GAP = 2


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        # rich would end the process here, with exit code 1
        raise BrokenPipeError


def make_console(stderr: bool = False) -> Console:
    console = _Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    # Off a terminal rich would take COLUMNS; a wide terminal needs no wider lines.
    console.width = min(console.width, 100) if console.is_terminal else 80
    return console


def mark(status: str | None) -> Text:
    if status is None:
        return Text("–")
    sign, color = MARKS[status]
    return Text(f"{sign} {status}", style=color)


def make_table(*columns: tuple[str, dict[str, Any]], header: bool = True) -> Table:
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, GAP, 0, 0),
        header_style="bold",
        show_header=header,
    )
    for name, options in columns:
        table.add_column(name, **options)
    return table


def number(value: float) -> str:
    """A signed number of three digits or so: +16.87, -0.30, +2.2e-16, +0.00."""
    plain = value == 0 or 0.005 <= abs(value) < 1000
    return f"{value:+.2f}" if plain else f"{value:+.1e}"


def duration(seconds: float) -> str:
    """3 s, 4 min 05 s, 2 h 10 min."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def effect(verdict: Found) -> str:
    """Effect and interval: +16.87 [+13.48, +20.25]."""
    size, ci = verdict["effect"], verdict["ci"]
    if size is None or not math.isfinite(size):
        return "–"
    if ci is None or not all(end is not None and math.isfinite(end) for end in ci):
        return number(size)
    return f"{number(size)} [{number(ci[0])}, {number(ci[1])}]"


SECOND_STAGE = "fresh seeds, judged alone: the first left it undecided (see the notes)"


def one_point(sentence: str) -> str:
    """A sentence whose number was filled in, with the singular where that is 1."""
    return re.sub(r"(?<![\d.,])1 points\b", "1 point", sentence)
