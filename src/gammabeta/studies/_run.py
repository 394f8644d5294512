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
from gammabeta._runs import RunError, StoredCell
from gammabeta.studies import _data, _estimate
from gammabeta.studies._cell import Task, make_spec, measure
from gammabeta.studies._cluster import connected
from gammabeta.studies._estimate import Estimate as Estimate
from gammabeta.studies._experiments import (
    BRIEF,
    BUDGETS,
    SECOND,
    VARIATIONS,
    Experiment,
    choose,
    experiments,
)
from gammabeta.studies._experiments import Cell as Cell
from gammabeta.studies._judge import Judged as Judged
from gammabeta.studies._judge import judge as judge
from gammabeta.studies._judge import write_derived as write_derived
from gammabeta.studies._plan import interleave, plan, stored
from gammabeta.studies._pool import Event as Event
from gammabeta.studies._pool import Failure as Failure
from gammabeta.studies._pool import Job, State, end_workers, in_processes, in_this_process
from gammabeta.studies._status import Status as Status
from gammabeta.studies._status import status as status

__all__ = [
    "BUDGETS",
    "Cell",
    "Estimate",
    "Event",
    "Experiment",
    "Failure",
    "Judged",
    "Result",
    "Status",
    "estimate",
    "experiments",
    "judge",
    "run",
    "run_one",
    "status",
    "write_derived",
]


_MOST_VARIED = 700  # seeds 100 to 799


class Result(NamedTuple):
    """How a run ended.

    `skipped` cells were finished before; `stale` ones are there from other code and do not count,
    and `held` are the experiments that were left alone because of them, with their number;
    `failed_before` cells failed in an earlier run and were not tried again. `out_of_time`: the
    deadline left cells undone. `notice` is what a reader must be told about the data, "" for
    nothing.
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
    held: Mapping[str, int] = {}
    failed_before: int = 0


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
    refresh: bool = False,
    retry_failed: bool = False,
    dask: str | None = None,
    deadline_seconds: float | None = None,
    progress: Callable[[Event], None] | None = None,
    catalogue: Mapping[str, Experiment] | None = None,
) -> Result:
    """Run what is missing of some experiments.

    Args:
        ids: experiments, the most important first.
        out: the run folder; made if it is not there.
        budget: "tiny", "small" or "full"; or "brief" or a variation, of headline claims alone.
        data: "auto", "mnist" or "digits".
        data_dir: a folder that holds mnist/.
        jobs: worker processes; all cores if None. 1 runs in the caller's process.
        seeds: how many seeds; the experiment's own rule if None.
        force: make cells again that are there.
        refresh: make those cells again that other code made. Otherwise an experiment that has
            such cells, and not yet its own, is left as it is.
        retry_failed: try cells again that failed with the present code.
        dask: the address of a Dask scheduler, whose workers then run the cells.
        deadline_seconds: after so many seconds no cell is started any more.
        progress: called with an `Event` now and then, in the caller's thread.
        catalogue: experiments by id, in place of the package's own.

    Raises:
        ValueError: an argument is not what it has to be; RunError: so is the run folder.
        OSError: the images cannot be read, the disk is full, or the cluster does not answer.
        RuntimeError: an experiment cannot say what it wants.
    """
    started = time.monotonic()
    chosen = choose(ids, catalogue)
    own = _check(budget, jobs, seeds)
    _present_claims(out)  # before the images, which may have to be downloaded
    images = _data.load(data, data_dir)
    if budget == "images-small" and images.name != "mnist":
        raise ValueError(f"images-small halves the images of MNIST, got {images.name}.")
    deadline = math.inf if deadline_seconds is None else started + deadline_seconds
    where = None if data_dir is None else str(data_dir)
    interrupted = False
    with connected(dask) as cluster:
        _open(out)  # last: without images or cluster no folder is left that looks like a run
        if cluster is not None:
            own = cluster.jobs if jobs is None else min(jobs, cluster.jobs)
        state = State(out, where, own, deadline, progress, force, refresh, retry_failed, cluster)
        if cluster is not None and max(cluster.threads.values()) > 1:
            state.report("note", "A cell takes one thread: each worker works on one at a time.")
        several = cluster is not None or own > 1
        try:
            while wave := _next_wave(state, chosen, budget, images, seeds):
                state.report("wave", f"{len(wave)} cells of wave {wave[0].wave}")
                (in_processes if several else in_this_process)(state, wave)
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
    if state.lost is not None:
        raise ConnectionError(
            f"The Dask cluster was lost ({state.lost}), so the run was stopped. The "
            f"{state.done} cells that it finished are kept: the same command goes on, with a "
            "scheduler that answers, or without --dask."
        )
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
        held=dict(state.held),
        failed_before=len(state.failed_before),
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
    old = found[0]
    # Its own data set: `measure` compares it with the images that there are.
    spec = make_spec(experiment, old["arm"], old["seed"], old["budget"], old["data"])
    task = Task(spec, experiment, str(out), None if data_dir is None else str(data_dir))
    log = io.StringIO()
    rows, _, cpu = measure(task, log)
    spec = {**spec, "cpu_seconds": round(cpu, 3)}
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
    refresh: bool = False,
    catalogue: Mapping[str, Experiment] | None = None,
) -> Estimate:
    """Say what `run` would do and how much it computes; nothing is written into `out`.

    Where the run folder has no cells of an experiment yet, a few are measured and thrown away;
    the others are scaled from them by their cost.
    """
    return _estimate.estimate(
        choose(ids, catalogue),
        out=out,
        budget=budget,
        data=data,
        data_dir=data_dir,
        jobs=_check(budget, jobs, seeds),
        seeds=seeds,
        force=force,
        refresh=refresh,
    )


# --- before the first cell ------------------------------------------------------------------


def _check(budget: str, jobs: int | None, seeds: int | None) -> int:
    """Check what `run` and `estimate` share; the number of processes."""
    kinds = (*BUDGETS, BRIEF, *VARIATIONS, SECOND)
    if budget not in kinds:
        raise ValueError(f"budget must be one of {', '.join(kinds)}, got {budget!r}.")
    if budget not in BUDGETS and seeds is not None and seeds > _MOST_VARIED:
        raise ValueError(
            f"seeds must be at most {_MOST_VARIED} with {budget}, got {seeds}: those from 800 on "
            "have chosen learning rates."
        )
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
    if packed := _runs.packed_files(out):
        raise RunError(
            f"{out}: the output must be a run folder, got one that holds kept rows "
            f"({packed[0].name}). Choose another one; `gammabeta study accept` adds to this one."
        )
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


def _next_wave(
    state: State,
    chosen: Sequence[Experiment],
    budget: str,
    images: _data.Images,
    seeds: int | None,
) -> list[Job]:
    """The missing cells of the lowest wave that any experiment still wants."""
    missing: list[Job] = []
    data = {"name": images.name, "digest": images.digest}
    again = state.force or state.refresh
    for experiment in chosen:
        cells = _runs.read_cells([state.out], experiment.id)
        found = stored(cells, experiment, budget, images.digest)
        state.stale |= found.other
        rows = found.rows
        if state.force:
            made = [cell for name, cell in found.present.items() if name in state.ended]
            rows = [row for cell in made for row in cell.flat()]
        wanted = plan(experiment, experiment.cells(budget, images.name, seeds, rows), budget, data)
        jobs: list[Job] = []
        held = 0
        for name, cell, spec in wanted:
            if name in state.ended:
                continue
            if not state.force and _runs.has_cell(state.out, spec):
                state.skipped.add(name)
                continue
            if not (state.force or state.retry_failed) and _runs.has_failed(state.out, spec):
                state.failed_before.add(name)
                continue
            held += name in found.stale
            task = Task(spec, experiment, str(state.out), state.data_dir, state.force)
            jobs.append(Job(name, task, cell.cost, cell.wave))
        if held and not again:
            # Half of its cells by each code would be two halves of an answer.
            state.held[experiment.id] = held
        else:
            missing += jobs
    state.waiting = {job.name: job for job in missing}
    lowest = min((job.wave for job in missing), default=0)
    return interleave([job for job in missing if job.wave == lowest])


def _forget_mended(state: State, chosen: Sequence[Experiment]) -> None:
    """Remove failures of older code where the same cell has come right with the present code."""
    known = {experiment.id: experiment for experiment in chosen}
    for failed in _runs.read_failed([state.out]):
        spec = failed["spec"]
        experiment = known.get(spec["experiment"])
        if experiment is None:
            continue
        if _runs.has_cell(state.out, {**spec, "code": experiment.code_of(spec["budget"])}):
            _runs.forget_failure(state.out, spec)
