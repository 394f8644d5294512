"""The demonstration's chart, and where to go from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.text import Text

from gammabeta._terminal._shared import make_console, make_table

if TYPE_CHECKING:
    from gammabeta.studies._demo import Curve, Race

# a sign and a color each, of those that read well on any background
_SIGNS = (("o", "color(28)"), ("x", "color(161)"), (".", "color(130)"))
_ROWS = 10  # of the chart, for 0 to 100 %
_NEXT = (
    ("gammabeta study explain act-all", "one claim, with its evidence"),
    ("gammabeta study list", "all claims"),
    ("gammabeta study run headline", "decide the headline claims"),
    ("gammabeta check train:build", "misuse in a model of yours"),
)


@contextmanager
def working(text: str) -> Iterator[None]:
    """Say on stderr what takes a while, and only on a terminal."""
    console = make_console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    with console.status(text):
        yield


def demo(race: Race) -> None:
    """Accuracy over the steps, as a chart; the numbers; what to do next."""
    console = make_console()
    with_bn, without, usual = race.curves
    console.print(
        f"Accuracy on held-out digits, learning rate {with_bn.rate:g}, mean of {race.seeds} seeds",
        style="bold",
    )
    console.print()
    for line in _chart(race):
        console.print(line)
    console.print()
    table = make_table(
        ("", {}), ("", {}), ("rate", {"justify": "right"}), ("at the end", {"justify": "right"}),
        (f"{race.seeds} seeds", {}),
    )  # fmt: skip
    for curve, (sign, color) in zip(race.curves, _SIGNS, strict=True):
        name = "with batch normalization" if curve.norm else "without"
        span = f"{min(curve.last()):.1%} to {max(curve.last()):.1%}"
        table.add_row(Text(sign, style=color), name, f"{curve.rate:g}", f"{_end(curve):.1%}", span)
    console.print(table)
    gain = 100 * (_end(with_bn) - _end(without))
    rest = 100 * (_end(with_bn) - _end(usual))
    console.print(
        f"\nAt the same high rate batch normalization gains {gain:+.1f} points; against a network "
        f"without it at a rate that suits that one, {rest:+.1f}. Which comparison is fair is what "
        "the studies are about: each claim gets both verdicts. These are 1,797 small images of 8 "
        "x 8 pixels: a demonstration, which supports and refutes nothing.\n"
    )
    console.print("Next", style="bold")
    width = max(len(command) for command, _ in _NEXT)
    for command, what in _NEXT:
        console.print(f"  {command:<{width}}   {what}")


def _end(curve: Curve) -> float:
    return sum(curve.last()) / len(curve.last())


def _chart(race: Race) -> Iterator[Text]:
    """Rows from 100 % down to 0 %; each look has a column for every curve, so none hides one."""
    curves = list(zip(race.curves, _SIGNS, strict=True))
    rows = [[round(_ROWS * value) for value in curve.mean()] for curve, _ in curves]
    for row in range(_ROWS, -1, -1):
        label = f"{100 * row // _ROWS:>4} % " if row % 5 == 0 else " " * 7
        line = Text(f"{label}{'+' if row % 5 == 0 else '|'}")
        for look in range(len(race.steps)):
            for (_, (sign, color)), at in zip(curves, rows, strict=True):
                here = at[look] == row
                line.append(sign if here else "-" if row == 0 else " ", color if here else "")
        yield line
    width = len(curves) * len(race.steps)
    yield Text(f"{'':7}0{f'{race.steps[-1]} steps':>{width}}")
