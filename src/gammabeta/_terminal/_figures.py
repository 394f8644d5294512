"""Published numbers with ours beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gammabeta._terminal._shared import MARKS, make_console, make_table

if TYPE_CHECKING:
    from gammabeta.studies._published_figures import Compared, Shown, Summary


def published(found: Shown) -> None:
    """The published numbers, ours beside them, and each figure's learning rate."""
    from gammabeta.studies import _published_figures as figures

    console = make_console()
    for figure, own in zip(figures.published(), found.figures, strict=True):
        console.print(Text.assemble((figure.name, "bold"), "  ", figure.title))
        points = [point for point in found.points if point.figure == figure.id]
        digits = 3 if figure.kind == "accuracy" else 4
        console.print(Padding(_point_table(points, digits), (0, 0, 0, 2)))
        for line in _agreement(own):
            console.print(Padding(line, (0, 0, 0, 2)))
        console.print()
    agree, compared, count = found.best()
    share = f" ({100 * agree / compared:.0f} %)" if compared else ""
    budgets = ", ".join(f"{name}, budget {budget}" for name, budget in found.budgets.items())
    console.print(
        f"At the better rate of each figure {agree} of {compared} points agree{share}; {count} are "
        f"published. A point agrees (+) within ±{figures.ACCURACY:g} in accuracy or "
        f"±{100 * figures.STEPS:g} % in steps, a magnitude within ±{100 * figures.MAGNITUDE:g} %. "
        f"Read off the figures to ±0.003. On MNIST: {budgets}."
    )
    for note in found.notes:
        console.print(note)


def _point_table(points: Sequence[Compared], digits: int) -> Table:
    """One line for each point and rate; a point that no run has reached has but one."""
    right = {"justify": "right", "no_wrap": True}
    table = make_table(
        ("series", {"no_wrap": True}),
        ("step", right),
        ("published", right),
        ("rate", right),
        ("ours [95 %]", {"no_wrap": True}),
        ("diff.", right),
        ("", {"no_wrap": True, "min_width": 1}),
    )
    names = {"bn": "BN", "none": "none", "brn": "BRN"}
    by_place: dict[tuple[str, str, int], list[Compared]] = {}
    for point in points:
        by_place.setdefault((point.panel, point.norm, point.step), []).append(point)
    for (panel, norm, step), rates in by_place.items():
        series = ", ".join(filter(None, (panel, names[norm])))
        value = f"{rates[0].published:.4g}"
        if rates[0].low < rates[0].high:
            value = f"{rates[0].low:g}-{rates[0].high:g}"
        head = (series, f"{step / 1000:g}k" if step else "0", value)
        for point in [p for p in rates if p.ours is not None] or rates[:1]:
            if point.ours is None or point.difference is None:
                table.add_row(*head, "–", "not reached", "", "")
                continue
            ours = f"{point.ours:.{digits}f}"
            if point.lo is not None and point.hi is not None:
                ours += f" [{point.lo:.{digits}f}, {point.hi:.{digits}f}]"
            sign, color = MARKS["supported" if point.agrees else "refuted"]
            off = f"{point.difference:+.{digits}f}"
            table.add_row(*head, _rate(point.rate), ours, off, Text(sign, style=color))
            head = ("", "", "")
    return table


def _rate(rate: float) -> str:
    return f"{rate:g}" if rate >= 0.001 else f"{rate:.0e}".replace("e-0", "e-")


def _agreement(own: Summary) -> list[str]:
    """How many points agree at each rate, and whether the distances decide on one."""
    shares = [
        f"{own.agree[rate]} of {own.compared[rate]} at rate {_rate(rate)}"
        for rate in own.agree
        if own.compared[rate]
    ]
    lines = [f"agree: {', '.join(shares) or 'none was reached'}; published: {own.points}"]
    means = {rate: sum(by.values()) / len(by) for rate, by in own.distance.items() if by}
    if means:
        off = ", ".join(f"{mean:.2g} at {_rate(rate)}" for rate, mean in means.items())
        made = f"made with rate {_rate(own.rate)}" if own.rate else "rate not decided"
        seeds = len(next(iter(own.distance.values())))
        lines.append(
            f"{made}: RMS distance {off} (on {own.decided_on} points, {seeds} "
            f"seed{'s' * (seeds > 1)})"
        )
    else:
        lines.append("rate not decided: the points of both rates are needed")
    return lines
