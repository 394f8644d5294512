"""What the command line shows: tables that read well at 80 columns, and progress on stderr."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import textwrap
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from gammabeta.studies._claims import Claim
    from gammabeta.studies._judge import Multiplicity
    from gammabeta.studies._kept import Kept
    from gammabeta.studies._published_figures import Compared, Shown, Summary
    from gammabeta.studies._run import Estimate, Event, Result, Status

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
MANY = 12  # verdicts; of more, only the headline claims are answered in sentences
_GAP = 2


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        # rich would end the process here, with exit code 1
        raise BrokenPipeError


def _console(stderr: bool = False) -> Console:
    console = _Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    # Off a terminal rich would take COLUMNS; a wide terminal needs no wider lines.
    console.width = min(console.width, 100) if console.is_terminal else 80
    return console


def _status(status: str | None) -> Text:
    if status is None:
        return Text("–")
    sign, color = MARKS[status]
    return Text(f"{sign} {status}", style=color)


def _table(*columns: tuple[str, dict[str, Any]], header: bool = True) -> Table:
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, _GAP, 0, 0),
        header_style="bold",
        show_header=header,
    )
    for name, options in columns:
        table.add_column(name, **options)
    return table


def _by_topic(listed: Iterable[Claim]) -> Iterator[tuple[str, list[Claim]]]:
    from gammabeta.studies._claims import TOPICS

    groups: dict[str, list[Claim]] = {topic: [] for topic in TOPICS}
    for claim in listed:
        groups[claim.topic].append(claim)
    return ((topic, group) for topic, group in groups.items() if group)


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


# --- claims and verdicts --------------------------------------------------------------------


def claims(listed: Collection[Claim]) -> None:
    """All claims by topic: id, and what a reader would ask."""
    console = _console()
    table = _table(("", {"no_wrap": True}), ("", {}), header=False)
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
        f"{len(listed)} claims; those with * ({ready}) have an experiment: "
        "`gammabeta study run CLAIM` decides one, `gammabeta study show CLAIM` tells all about it."
    )


def verdicts(found: Sequence[Found], surprises: Sequence[str], known: Mapping[str, Claim]) -> None:
    """The verdicts: one row a claim, the answers in sentences, and what surprised."""
    console = _console()
    if not found:
        console.print("No verdicts yet: there are no finished cells to judge.")
        return
    many = len(found) > MANY
    console.print(_verdict_table(found, known, console.width, by_topic=many))
    console.print()
    console.print(_caption(found))
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


def _verdict_table(
    found: Sequence[Found], known: Mapping[str, Claim], width: int, by_topic: bool
) -> Table:
    budgets = {verdict["budget"] for verdict in found}
    rows = {
        verdict["claim"]: (
            _status(verdict["published_status"]),
            _status(verdict["status"]),
            effect(verdict),
            f"{verdict['n']}",
            # one budget for all is said below the table, where there is more room
            verdict["data"] if len(budgets) == 1 else f"{verdict['data']}, {verdict['budget']}",
        )
        for verdict in found
    }
    heads = ("as published", "fair", "effect [95 %]", "n", "on")
    widths = [
        max(len(head), *(len(row[i]) for row in rows.values())) for i, head in enumerate(heads)
    ]
    # What is left for the claim and its effect; the interval goes below the effect if it must.
    left = width - sum(widths) + widths[2] - len(heads) * _GAP
    longest = max(map(len, rows))
    narrow = longest + widths[2] > left
    if narrow:
        widths[2] = max(len(part) for row in rows.values() for part in _halves(row[2]))
    room = max(8, min(longest, left - widths[2]))
    table = _table(
        ("claim", {"min_width": room}),
        *((head, {"no_wrap": True, "min_width": w}) for head, w in zip(heads, widths, strict=True)),
    )
    table.columns[4].justify = "right"

    def add(claim: str) -> None:
        published, fair, size, n, on = rows[claim]
        size = "\n".join(_halves(size)) if narrow else size
        name = "\n".join(textwrap.wrap(claim, room))  # breaks after a hyphen
        table.add_row(name, published, fair, size, n, on)

    if not by_topic:
        for claim in rows:
            add(claim)
        return table
    for topic, group in _by_topic(known[claim] for claim in rows):
        if table.row_count:
            table.add_row()
        table.add_row(Text("\n".join(textwrap.wrap(topic, room)), style="bold"))
        for one in group:
            add(one.id)
    return table


def _halves(size: str) -> list[str]:
    return size.split(" ", 1)


def _caption(found: Sequence[Found]) -> str:
    parts = []
    if len(found) > 3:
        counted = Counter(verdict["status"] for verdict in found)
        kinds = [f"{counted[status]} {status}" for status in MARKS if counted[status]]
        parts.append(f"{len(found)} claims, in the fair setting {', '.join(kinds)}.")
    budgets = sorted({verdict["budget"] for verdict in found})
    if len(budgets) == 1:
        parts.append(f"Budget {budgets[0]}.")
    units: dict[str, list[str]] = {}
    for verdict in found:
        if verdict["unit"]:
            units.setdefault(verdict["unit"], []).append(verdict["claim"])
    if len(units) == 1:
        parts.append(f"Effects in {next(iter(units))}.")
    elif units and len(found) <= MANY:
        lists = [f"Effects in {unit}: {', '.join(names)}." for unit, names in units.items()]
        return "\n".join([" ".join(parts), *lists]).lstrip()
    return " ".join(parts)


def effect(verdict: Found) -> str:
    """Effect and interval: +16.87 [+13.48, +20.25]."""
    size, ci = verdict["effect"], verdict["ci"]
    if size is None or not math.isfinite(size):
        return "–"
    if ci is None or not all(end is not None and math.isfinite(end) for end in ci):
        return number(size)
    return f"{number(size)} [{number(ci[0])}, {number(ci[1])}]"


def card(claim: Claim, verdict: Found | None) -> None:
    """All that is known of one claim: what the registry says, then what the runs say."""
    console = _console()
    console.print(Text.assemble((claim.id, "bold"), "  ", claim.question))
    table = _table(("", {"style": "bold", "no_wrap": True}), ("", {}), header=False)

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
        add("Published", _status(verdict["published_status"]))
        add("Fair", _status(verdict["status"]))
        add("Effect", size)
        add("Answer", verdict["sentence"])
        for note in verdict["notes"]:
            add("Note", note)
    console.print(Padding(table, (0, 0, 0, 2)))


def other_rules(rules: Mapping[str, Mapping[str, float]], known: Mapping[str, Claim]) -> None:
    """Say that what follows is not the registry's verdict."""
    changes = [
        f"{claim}.{key} = {value:g} (in the registry {known[claim].thresholds[key]:g})"
        for claim, thresholds in rules.items()
        for key, value in thresholds.items()
    ]
    console = _console()
    console.print(
        f"Under another rule: {'; '.join(changes)}. Shown only: what is stored stays as it is."
    )
    console.print()


def multiplicity(found: Multiplicity) -> None:
    """How many of the verdicts "supported" chance alone may have given."""
    judged = sum(p is not None for p, _ in found.family.values())
    console = _console()
    console.print(
        f"\nOf {found.supported} supported claims at most {found.expected_false:.2f} false ones "
        f"are to be expected. {found.how} Headline claims with a p-value: {judged} of "
        f"{len(found.family)}."
    )


def notice(text: str, last: str) -> None:
    """A paragraph, and after it one whole line that no width breaks."""
    text = text.removesuffix(last).strip()
    if text:
        _console().print(f"\n{text}")
    print(last)


def published(found: Shown) -> None:
    """The published numbers, ours beside them, and each figure's learning rate."""
    from gammabeta.studies import _published_figures as figures

    console = _console()
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
    table = _table(
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


def environment() -> dict[str, Any]:
    """Versions, processor, threads and backends of this machine."""
    import torch

    import gammabeta

    facts: dict[str, Any] = {
        "gammabeta": gammabeta.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    for package in ("torch", "numpy", "scipy", "joblib", "scikit-learn", "plotly"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    found = gammabeta.backends(torch.zeros(2, 1))
    facts["backends"] = ", ".join(
        f"{name} ({backend.why_not})" if backend.why_not else name
        for name, backend in found.items()
    )
    return facts


# --- runs -----------------------------------------------------------------------------------


def estimate(found: Estimate) -> None:
    """What a run would do and about how long it takes."""
    console = _console()
    right = {"justify": "right", "no_wrap": True}
    names = ("wave", "cells", "CPU seconds", "time")
    table = _table(("experiment", {}), *((name, right) for name in names))

    def add(name: str, wave: str, cells: int, cpu: float) -> None:
        shown = f"{cpu:.0f}" if cpu >= 10 else f"{cpu:.1f}"
        table.add_row(name, wave, f"{cells}", shown, duration(max(cpu / found.jobs, 1)))

    for name in dict.fromkeys(wave.experiment for wave in found.waves):
        waves = [wave for wave in found.waves if wave.experiment == name]
        for wave in waves:
            add(name, f"{wave.wave}", wave.cells, wave.cpu_seconds)
        if len(waves) > 1:
            total = sum(wave.cpu_seconds for wave in waves)
            add(name, "all", sum(wave.cells for wave in waves), total)
    if len({wave.experiment for wave in found.waves}) > 1:
        table.add_row()
        add("all", "", found.cells, found.cpu_seconds)
    if found.waves:
        console.print(table)
        console.print()
    have = f" {found.present} are there already." if found.present else ""
    if found.stale:
        have += f" {found.stale} were made by other code: --refresh makes them again."
    cost = f"about {duration(max(found.seconds, 1))}" if found.cells else "no time"
    console.print(
        f"{found.cells} cells to run on {found.data}: {cost} on {found.jobs} processes.{have} "
        "Nothing was written."
    )


def status(found: Sequence[Status]) -> None:
    """What run folders hold of each experiment."""
    console = _console()
    if not found:
        console.print("There are no cells of these experiments yet: `gammabeta study run`.")
        return
    right = {"justify": "right", "no_wrap": True}
    names = ("done", "missing", "stale", "failed", "CPU seconds")
    table = _table(("experiment", {}), ("on", {}), *((name, right) for name in names))
    for entry in found:
        counts = (entry.done, entry.missing, entry.stale, entry.failed)
        where = f"{entry.data}, {entry.budget}"
        cpu = f"{entry.cpu_seconds:.0f}"
        table.add_row(entry.experiment, where, *(f"{n}" for n in counts), cpu)
    console.print(table)
    hints = [
        (any(e.missing for e in found), "missing: the same `gammabeta study run` goes on"),
        (any(e.stale for e in found), "stale, made by other code: --refresh makes them again"),
        (any(e.failed for e in found), "failed: --retry-failed tries them again"),
    ]
    for shown, text in hints:
        if shown:
            console.print(f"  {text}")


def kept(found: Sequence[Kept]) -> None:
    """What was packed, and what a reader of it must know."""
    console = _console()
    for entry in found:
        extra = f", thinned to {entry.thinned} steps a cell" if entry.thinned else ""
        extra += f"; {entry.open_cells} wanted cells are missing" if entry.open_cells else ""
        console.print(
            f"{entry.path}: {entry.cells} cells, {entry.size / 1000:.0f} KB{extra}", soft_wrap=True
        )


class Progress:
    """Follows a run on stderr: a bar on a terminal, else a plain line now and then."""

    SECONDS = 10.0  # between two plain lines
    FAILURES = 3  # told as they come; the others are counted, and listed at the end

    def __init__(self) -> None:
        self._console = _console(stderr=True)
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._told = -math.inf
        self._failures = 0

    def __enter__(self) -> Progress:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("cells{task.fields[rest]}"),
                console=self._console,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()

    def __call__(self, event: Event) -> None:
        # A run does not stop because nobody reads how it goes on (`2>&1 | head`).
        with contextlib.suppress(OSError):
            self._show(event)

    def _show(self, event: Event) -> None:
        self._failures += event.kind == "failed"
        if event.kind == "note" or (event.kind == "failed" and self._failures <= self.FAILURES):
            self._console.print(event.text)
        rest = f", {event.failed} failed" if event.failed else ""
        if event.eta_seconds is not None and event.done + event.failed < event.total:
            rest += f", about {duration(event.eta_seconds)} left"
        ended = event.done + event.failed
        if self._bar is not None:
            self._draw(event, rest)
        elif time.monotonic() - self._told >= self.SECONDS:
            self._told = time.monotonic()
            self._console.print(f"{ended} of {event.total} cells{rest}", soft_wrap=True)

    def _draw(self, event: Event, rest: str) -> None:
        """One bar for all, and below it one for each experiment that still has cells to run."""
        lines = {"": (event.done + event.failed, event.total, rest)}
        if len(event.parts) > 1:
            for name, part in event.parts.items():
                failed = f", {part.failed} failed" if part.failed else ""
                lines[name] = (part.done + part.failed, part.total, f" of {name}{failed}")
        for name, (count, total, text) in lines.items():
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task("", total=None, rest="")
            going = not name or count < total
            self._bar.update(
                self._tasks[name], completed=count, total=total, rest=text, visible=going
            )


def ended(result: Result) -> None:
    """How a run ended: what was done, what failed and how to repeat it, what was left out."""
    console = _console(stderr=True)
    parts = [f"{result.done} cells done in {duration(result.seconds)}"]
    if not result.done and not result.failed:
        parts = ["Nothing was run"]
    if result.failed:
        parts.append(f"{len(result.failed)} failed")
    if result.skipped:
        parts.append(f"{result.skipped} were there already")
    if result.failed_before:
        parts.append(f"{result.failed_before} failed before (--retry-failed tries them again)")
    if result.stale:
        parts.append(f"{result.stale} made by other code are not used")
    console.print(f"{', '.join(parts)}.")
    for name, count in result.held.items():
        console.print(
            f"{name} was left as it is: {count} of its cells were made by other code. "
            "--refresh makes them again with the present one."
        )
    if result.out_of_time:
        console.print("The time was up before all cells were run. The same command goes on.")
    shown = result.failed[:5]
    for failure in shown:
        console.print(
            Padding(f"{failure.experiment} {failure.name}: {failure.reason}", (0, 0, 0, 2))
        )
        console.print(f"    {failure.command}", soft_wrap=True)  # one line, to be copied
    if len(result.failed) > len(shown):
        more = len(result.failed) - len(shown)
        console.print(f"  and {more} more; their folders lie below failed/.")
