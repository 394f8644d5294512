"""How much a run would compute: each experiment's costs, times what its cells take here.

A cell's cost is relative to the other cells of its experiment. What one unit of it takes on this
machine is measured: on the cells that the run folder has, else on a few that are thrown away.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gammabeta import _runs
from gammabeta._runs import RunError
from gammabeta.studies import _data
from gammabeta.studies._cell import Task, measure
from gammabeta.studies._experiments import Experiment
from gammabeta.studies._plan import Wanted, plan, stored

_ENOUGH = 1.5  # seconds of processor time measured of an experiment
_SPREAD = (0.0, 0.5, 0.25, 0.75, 0.125, 0.625)  # of the way from the cheapest to the costliest


class Wave(NamedTuple):
    """One line of an estimate; `cpu_seconds` is processor time, on all processes together."""

    experiment: str
    wave: int
    cells: int
    cpu_seconds: float


class Estimate(NamedTuple):
    """What a run would do.

    `present` cells are there; `measured_seconds` is the processor time of what was measured for
    the estimate; `stale` cells of other code stay as they are.
    """

    waves: tuple[Wave, ...]
    cells: int
    present: int
    stale: int
    measured_seconds: float
    jobs: int
    data: str
    notice: str

    @property
    def cpu_seconds(self) -> float:
        return sum(wave.cpu_seconds for wave in self.waves)

    @property
    def seconds(self) -> float:
        """About how long it takes on `jobs` processes."""
        return self.cpu_seconds / self.jobs


def estimate(
    chosen: Sequence[Experiment],
    *,
    out: Path,
    budget: str,
    data: str,
    data_dir: Path | None,
    jobs: int,
    seeds: int | None,
    force: bool = False,
    refresh: bool = False,
) -> Estimate:
    """See `_run.estimate`."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: the output must be a folder, got a file. Choose another one.")
    images = _data.load(data, data_dir)
    named = {"name": images.name, "digest": images.digest}
    found = _runs.read_cells([out]) if (out / "cells").is_dir() else []
    present, stale, spent = 0, 0, 0.0
    waves: list[Wave] = []
    for experiment in chosen:
        have = stored(found, experiment, budget, images.digest)
        wanted = plan(experiment, experiment.expected(budget, images.name, seeds), budget, named)
        missing = [w for w in wanted if force or w.name not in have.present]
        present += len(wanted) - len(missing)
        held = 0 if force or refresh else sum(w.name in have.stale for w in missing)
        if held:
            stale += held
            continue
        if not missing:
            continue
        known = [(w.cell.cost, have.present[w.name].spec) for w in wanted if w.name in have.present]
        timed = [(cost, spec["cpu_seconds"]) for cost, spec in known if "cpu_seconds" in spec]
        if not sum(cpu for _, cpu in timed):
            timed = _timed(experiment, missing, out, data_dir)
            spent += sum(cpu for _, cpu in timed)
        rate = sum(cpu for _, cpu in timed) / sum(cost for cost, _ in timed)
        for number in sorted({w.cell.wave for w in missing}):
            costs = [w.cell.cost for w in missing if w.cell.wave == number]
            waves.append(Wave(experiment.id, number, len(costs), rate * sum(costs)))
    cells = sum(wave.cells for wave in waves)
    return Estimate(tuple(waves), cells, present, stale, spent, jobs, images.name, images.notice)


def _timed(
    experiment: Experiment, missing: Sequence[Wanted], out: Path, data_dir: Path | None
) -> list[tuple[float, float]]:
    """Cost and processor time of a few cells, spread over the costs that there are."""
    where = None if data_dir is None else str(data_dir)
    ordered = sorted(missing, key=lambda w: w.cell.cost)

    def timed(wanted: Wanted) -> float:
        task = Task(wanted.spec, experiment, str(out), where)
        return max(measure(task, io.StringIO())[2], 1e-6)

    found: list[tuple[float, float]] = []
    for share in _SPREAD:
        wanted = ordered[int(share * len(ordered))]
        spent, cost = sum(cpu for _, cpu in found), sum(cost for cost, _ in found)
        if found and (spent > _ENOUGH or spent / cost * wanted.cell.cost > 2 * _ENOUGH):
            break
        cpu = timed(wanted)
        if cpu < 2 * _ENOUGH:
            # Whatever it does for the first time in a process, it is slow; a run does it once.
            cpu = min(cpu, timed(wanted))
        found.append((wanted.cell.cost, cpu))
    return found
