"""Runs: what one would do, how it goes on, how it ended, what is there; and this machine."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from rich.padding import Padding

from gammabeta._terminal._shared import duration, make_console, make_table

if TYPE_CHECKING:
    from gammabeta.studies._kept import Kept
    from gammabeta.studies._run import Estimate, Event, Result, Status
    from gammabeta.studies._verify import Checked


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


def estimate(found: Estimate) -> None:
    """What a run would do and about how long it takes."""
    console = make_console()
    right = {"justify": "right", "no_wrap": True}
    names = ("wave", "cells", "CPU seconds", "time")
    table = make_table(("experiment", {}), *((name, right) for name in names))

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
    console = make_console()
    if not found:
        console.print("There are no cells of these experiments yet: `gammabeta study run`.")
        return
    right = {"justify": "right", "no_wrap": True}
    names = ("done", "missing", "stale", "failed", "CPU seconds")
    table = make_table(("experiment", {}), ("on", {}), *((name, right) for name in names))
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


def verifying(begun: Iterable[Checked]) -> Iterator[Checked]:
    """Tell on a terminal's stderr how far it is; the cells as they come."""
    told = make_console(stderr=True)
    for count, one in enumerate(begun, 1):
        if told.is_terminal:
            told.print(f"{count}: {one.experiment} {one.name} {one.outcome}", highlight=False)
        yield one


_OUTCOMES = {
    "same": "the same rows, bit by bit",
    "close": "rows within 1e-4: another processor rounds otherwise",
    "varies": "other rows each time: it measures time",
    "other": "OTHER rows than those that are stored",
}


def verified(found: Sequence[Checked]) -> None:
    """What measuring cells again gave, by experiment, and each cell that differs."""
    console = make_console()
    right = {"justify": "right", "no_wrap": True}
    table = make_table(("experiment", {}), *((name, right) for name in ("cells", *_OUTCOMES)))
    for name in sorted({one.experiment for one in found}):
        own = [one.outcome for one in found if one.experiment == name]
        counts = (sum(outcome == word for outcome in own) for word in _OUTCOMES)
        table.add_row(name, f"{len(own)}", *(f"{count or ''}" for count in counts))
    console.print(table)
    console.print()
    for one in found:
        if one.outcome == "other":
            far = (
                f"differ by {one.difference:.1e}" if math.isfinite(one.difference) else "are others"
            )
            by = "" if one.present else "; the stored ones were made by other code"
            arm = ", ".join(f"{key} {value}" for key, value in one.arm.items())
            console.print(f"{one.experiment} {one.name}: rows {far}{by}. {arm}, seed {one.seed}.")
    said = [
        f"{n} gave {words}"
        for outcome, words in _OUTCOMES.items()
        if (n := sum(one.outcome == outcome for one in found))
    ]
    console.print(f"{len(found)} cells were measured again: {'; '.join(said)}.")


def kept(found: Sequence[Kept]) -> None:
    """What was packed, and what a reader of it must know."""
    console = make_console()
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
        self._console = make_console(stderr=True)
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
    console = make_console(stderr=True)
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
