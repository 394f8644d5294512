"""How much a run would compute: each experiment's costs, times what its cells take here.

A cell's cost is relative to the other cells of its experiment. What one unit of it takes on this
machine is measured: on the cells that the run folder has, else on a few that are thrown away.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gammabeta import _runs
from gammabeta._runs import RunError
from gammabeta.studies import _data
from gammabeta.studies._cell import Task, measure
from gammabeta.studies._experiments import Experiment
from gammabeta.studies._plan import Wanted, plan, stored

_ENOUGH = 1.0  # seconds of processor time measured of an experiment
_MOST = 6  # cells


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
    """Cost and processor time of a few cells: the cheapest, and some spread over the others."""
    where = None if data_dir is None else str(data_dir)
    ordered = sorted(missing, key=lambda w: w.cell.cost)
    timed: list[tuple[float, float]] = []
    for place in range(min(_MOST, len(ordered))):
        # 0, then 1/2, 1/4, 3/4 ... of the way to the costliest.
        share = (0.0, 0.5, 0.25, 0.75, 0.125, 0.625)[place]
        wanted = ordered[int(share * len(ordered))]
        spent = sum(cpu for _, cpu in timed)
        if timed and spent + spent / sum(c for c, _ in timed) * wanted.cell.cost > 3 * _ENOUGH:
            continue  # too dear a cell for what it tells
        task = Task(wanted.spec, experiment, str(out), where)
        _, _, cpu = measure(task, io.StringIO())
        if not timed and cpu < _ENOUGH:
            _, _, cpu = measure(task, io.StringIO())  # the first one pays for what starts slowly
        timed.append((wanted.cell.cost, max(cpu, 1e-6)))
        if spent + cpu > _ENOUGH:
            break
    return timed


def by_experiment(waves: Sequence[Wave]) -> Mapping[str, float]:
    """Processor time of each experiment."""
    found: dict[str, float] = {}
    for wave in waves:
        found[wave.experiment] = found.get(wave.experiment, 0.0) + wave.cpu_seconds
    return found
