"""The runner: which cells are missing, in which order, on how many processes.

An experiment is asked what it wants, given the rows so far; what is missing is run, lowest wave
first, and the experiment is asked again, until it wants nothing new. Finished cells are folders
(`gammabeta._runs`), so the same command resumes a run that was killed, and two runners may work
on one folder. Nothing is printed here.
"""

import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gammabeta import __version__, _runs
from gammabeta._runs import Row, RunError, StoredCell
from gammabeta.studies import _data
from gammabeta.studies._cell import Task, make_spec, measure
from gammabeta.studies._experiments import BUDGETS, Experiment, choose, experiments
from gammabeta.studies._experiments import Cell as Cell
from gammabeta.studies._judge import Judged as Judged
from gammabeta.studies._judge import judge as judge
from gammabeta.studies._judge import write_derived as write_derived
from gammabeta.studies._pool import Event as Event
from gammabeta.studies._pool import Failure as Failure
from gammabeta.studies._pool import Job, State, end_workers, in_processes, in_this_process

__all__ = [
    "BUDGETS",
    "Cell",
    "Estimate",
    "Event",
    "Experiment",
    "Failure",
    "Judged",
    "Result",
    "estimate",
    "experiments",
    "judge",
    "run",
    "run_one",
    "write_derived",
]


class Result(NamedTuple):
    """How a run ended.

    `skipped` cells were finished before, `stale` ones are there from other code and do not
    count. `out_of_time`: the deadline left cells undone. `notice` is what a reader must be told
    about the data, "" for nothing.
    """

    done: int
    skipped: int
    stale: int
    failed: tuple[Failure, ...]
    interrupted: bool
    out_of_time: bool
    seconds: float
    data: str
    notice: str


class Wave(NamedTuple):
    """One line of an estimate."""

    experiment: str
    wave: int
    cells: int
    seconds: float  # on all processes together


class Estimate(NamedTuple):
    """What a run would do. `timed_seconds` is what its first cell took, None without a cell."""

    waves: tuple[Wave, ...]
    cells: int
    present: int
    seconds: float
    timed_seconds: float | None
    jobs: int
    data: str
    notice: str


def run(
    ids: Sequence[str],
    *,
    out: Path,
    budget: str = "small",
    data: str = "auto",
    data_dir: Path | None = None,
    jobs: int | None = None,
    seeds: int | None = None,
    force: bool = False,
    deadline_seconds: float | None = None,
    progress: Callable[[Event], None] | None = None,
    catalogue: Mapping[str, Experiment] | None = None,
) -> Result:
    """Run what is missing of some experiments.

    Args:
        ids: experiments, the most important first.
        out: the run folder; made if it is not there.
        budget: "tiny", "small" or "full".
        data: "auto", "mnist" or "digits".
        data_dir: a folder that holds mnist/.
        jobs: worker processes; all cores if None. 1 runs in the caller's process.
        seeds: how many seeds; the experiment's own rule if None.
        force: make cells again that are there.
        deadline_seconds: after so many seconds no cell is started any more.
        progress: called with an `Event` now and then, in the caller's thread.
        catalogue: experiments by id, in place of the package's own.

    Raises:
        ValueError: an argument is not what it has to be; RunError: so is the run folder.
        OSError: the images cannot be read, or the disk is full.
        RuntimeError: an experiment cannot say what it wants.
    """
    started = time.monotonic()
    chosen = choose(ids, catalogue)
    jobs = _check(budget, jobs, seeds)
    _present_claims(out)  # before the images, which may have to be downloaded
    images = _data.load(data, data_dir)
    _open(out)  # after them: without images no folder is left that looks like a run
    deadline = math.inf if deadline_seconds is None else started + deadline_seconds
    where = None if data_dir is None else str(data_dir)
    state = State(out, where, jobs, force, deadline, progress)
    interrupted = False
    try:
        while wave := _next_wave(state, chosen, budget, images, seeds):
            state.report("wave", f"{len(wave)} cells of wave {wave[0].wave}")
            (in_processes if jobs > 1 else in_this_process)(state, wave)
            if state.stopped():
                break
        end_workers(state, kill=False)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        # Also after an error: no worker may outlive the run. Ended first, so that what they
        # leave unfinished belongs to no living process and can be removed.
        end_workers(state, kill=True)
        _runs.remove_dead(out)
    if state.disk is not None:
        raise OSError(
            f"{out}: a finished cell could not be stored ({state.disk}), so the run was stopped. "
            "Make room there and run the same command again: what is stored is kept."
        )
    _forget_mended(state, chosen)
    return Result(
        done=state.done,
        skipped=len(state.skipped),
        stale=len(state.stale),
        failed=tuple(state.failed),
        interrupted=interrupted,
        out_of_time=state.out_of_time,
        seconds=time.monotonic() - started,
        data=images.name,
        notice=images.notice,
    )


def run_one(
    name: str,
    out: Path,
    *,
    data_dir: Path | None = None,
    catalogue: Mapping[str, Experiment] | None = None,
) -> StoredCell:
    """Repeat one failed or stored cell alone, in this process, with the present code.

    Raises:
        RunError: the run folder has no such cell.
        Exception: whatever the cell raises; the folder is then left as it was.
    """
    failed = [cell["spec"] for cell in _runs.read_failed([out])]
    specs = [cell.spec for cell in _runs.read_cells([out])] + failed
    found = [spec for spec in specs if _runs.cell_name(spec) == name]
    if not found:
        raise RunError(
            f"{out}: the name of a stored or failed cell was expected (16 hex digits, a folder's "
            f"name under cells/ or failed/), got {name!r}."
        )
    (experiment,) = choose([found[0]["experiment"]], catalogue)
    images = _data.load(found[0]["data"]["name"], data_dir)
    old = found[0]
    spec = make_spec(experiment, old["arm"], old["seed"], old["budget"], images)
    spec["data"] = old["data"]  # `measure` compares it with the images
    task = Task(spec, experiment, str(out), None if data_dir is None else str(data_dir))
    log = io.StringIO()
    rows, _ = measure(task, log)
    path = _runs.write_cell(out, spec, rows, log.getvalue(), replace=True)
    _runs.forget_failure(out, old)
    return StoredCell(spec, rows, path)


def estimate(
    ids: Sequence[str],
    *,
    out: Path,
    budget: str = "small",
    data: str = "auto",
    data_dir: Path | None = None,
    jobs: int | None = None,
    seeds: int | None = None,
    force: bool = False,
    catalogue: Mapping[str, Experiment] | None = None,
) -> Estimate:
    """Say what `run` would do and about how long it takes; nothing is written into `out`.

    One cell, the first missing one, is measured and thrown away; the others are scaled from it
    by their cost.
    """
    chosen = choose(ids, catalogue)
    jobs = _check(budget, jobs, seeds)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: the output must be a folder, got a file. Choose another one.")
    images = _data.load(data, data_dir)
    where = None if data_dir is None else str(data_dir)
    missing: list[Job] = []
    present = 0
    for experiment in chosen:
        plan = _plan(experiment, experiment.expected(budget, images.name, seeds), budget, images)
        for name, cell, spec in plan:
            if not force and _runs.has_cell(out, spec):
                present += 1
            else:
                task = Task(spec, experiment, str(out), where)
                missing.append(Job(name, task, cell.cost, cell.wave))
    missing = _interleave(missing)
    timed: float | None = None
    rate = 0.0
    if missing:
        first = min(missing, key=lambda job: job.wave)
        _, timed = measure(first.task, io.StringIO())
        rate = timed / first.cost
    waves = []
    for key, group in _group(missing).items():
        waves.append(Wave(*key, len(group), rate * sum(job.cost for job in group) / jobs))
    seconds = sum(wave.seconds for wave in waves)
    return Estimate(
        tuple(waves), len(missing), present, seconds, timed, jobs, images.name, images.notice
    )


# --- before the first cell ------------------------------------------------------------------


def _check(budget: str, jobs: int | None, seeds: int | None) -> int:
    """Check what `run` and `estimate` share; the number of processes."""
    if budget not in BUDGETS:
        raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}.")
    for name, value in (("jobs", jobs), ("seeds", seeds)):
        if value is not None and value < 1:
            raise ValueError(
                f"{name} must be 1 or more, got {value}. Leave it out for the default."
            )
    if jobs is None:
        import joblib

        jobs = int(joblib.cpu_count())
    return jobs


def _present_claims(out: Path) -> list[dict[str, Any]]:
    """The claims that the run folder holds, none if it is new; says why it cannot be used."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: the output must be a folder, got a file. Choose another one.")
    return _runs.read_claims(out) if (out / "claims.json").exists() else []


def _open(out: Path) -> None:
    """Make the run folder ready, or say before any cell why it cannot be."""
    from gammabeta.studies import _claims

    claims = _claims.public()
    # Read first: a newer format must not be overwritten, and what is there needs no space.
    present = _present_claims(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if present != claims:
            value = {"schema": _runs.SCHEMA, "gammabeta": __version__, "claims": claims}
            _runs.write_json(out / "claims.json", value)
    except OSError as error:
        raise RunError(
            f"{out}: the output folder must be writable, got: {error.strerror or error}. "
            "Choose another one."
        ) from error
    _runs.remove_dead(out)


# --- which cells ----------------------------------------------------------------------------


def _plan(
    experiment: Experiment, wanted: Sequence[Cell], budget: str, images: _data.Images
) -> list[tuple[str, Cell, dict[str, Any]]]:
    """Name, cell and specification of each wanted cell, each once."""
    plan: dict[str, tuple[str, Cell, dict[str, Any]]] = {}
    for cell in wanted:
        spec = make_spec(experiment, cell.arm, cell.seed, budget, images)
        _runs.rows_text(spec, [])  # a specification that cannot be stored ends the run now
        name = _runs.cell_name(spec)
        plan.setdefault(name, (name, cell, spec))
    return list(plan.values())


def _rows(state: State, experiment: Experiment, budget: str, images: _data.Images) -> list[Row]:
    """The stored rows that belong to this run; cells of other code are only counted."""
    code = experiment.code
    rows: list[Row] = []
    for cell in _runs.read_cells([state.out], experiment.id):
        spec, name = cell.spec, cell.path.name
        if spec["budget"] != budget or spec["data"]["digest"] != images.digest:
            continue
        if spec["code"] != code:
            state.stale.add(name)
        elif not state.force or name in state.ended:
            rows += cell.flat()
    return rows


def _next_wave(
    state: State,
    chosen: Sequence[Experiment],
    budget: str,
    images: _data.Images,
    seeds: int | None,
) -> list[Job]:
    """The missing cells of the lowest wave that any experiment still wants."""
    missing: list[Job] = []
    for experiment in chosen:
        rows = _rows(state, experiment, budget, images)
        wanted = experiment.cells(budget, images.name, seeds, rows)
        for name, cell, spec in _plan(experiment, wanted, budget, images):
            if name in state.ended:
                continue
            if not state.force and _runs.has_cell(state.out, spec):
                state.skipped.add(name)
                continue
            task = Task(spec, experiment, str(state.out), state.data_dir, state.force)
            missing.append(Job(name, task, cell.cost, cell.wave))
    state.waiting = {job.name: job.cost for job in missing}
    lowest = min((job.wave for job in missing), default=0)
    return _interleave([job for job in missing if job.wave == lowest])


def _interleave(jobs: Sequence[Job]) -> list[Job]:
    """Take turns among the experiments: none waits until another one has all of its cells."""
    queues: dict[str, list[Job]] = {}
    for job in jobs:
        queues.setdefault(job.task.experiment.id, []).append(job)
    longest = max(map(len, queues.values()), default=0)
    return [queue[i] for i in range(longest) for queue in queues.values() if i < len(queue)]


def _group(jobs: Sequence[Job]) -> dict[tuple[str, int], list[Job]]:
    groups: dict[tuple[str, int], list[Job]] = {}
    for job in sorted(jobs, key=lambda job: job.wave):
        groups.setdefault((job.task.experiment.id, job.wave), []).append(job)
    return groups


def _forget_mended(state: State, chosen: Sequence[Experiment]) -> None:
    """Remove failures of older code where the same cell has come right with the present code."""
    codes = {experiment.id: experiment.code for experiment in chosen}
    for failed in _runs.read_failed([state.out]):
        spec = failed["spec"]
        code = codes.get(spec["experiment"])
        if code is not None and _runs.has_cell(state.out, {**spec, "code": code}):
            _runs.forget_failure(state.out, spec)
