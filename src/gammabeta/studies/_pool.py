"""Running cells: in this process, in joblib's or on a cluster, and what happened to them."""

import contextlib
import dataclasses
import os
import signal
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gammabeta import _runs
from gammabeta.studies._cell import Outcome, Task, command, keep, run_cell, store_failure

if TYPE_CHECKING:
    from gammabeta.studies._cluster import Cluster


class Part(NamedTuple):
    """How far one experiment is; `total` is what is planned so far."""

    done: int
    failed: int
    total: int


class Event(NamedTuple):
    """What a progress callback gets.

    `kind` is "wave" (new cells are planned), "done" or "failed" (a cell ended), or "note".
    `total` is what is planned so far; it grows when an experiment asks for more. `parts` says the
    same of each experiment.
    """

    kind: str
    text: str
    done: int
    failed: int
    total: int
    eta_seconds: float | None
    parts: Mapping[str, Part] = {}


class Failure(NamedTuple):
    """A cell that failed: why, in one line, and the command that repeats it alone."""

    experiment: str
    name: str
    reason: str
    command: str


class Job(NamedTuple):
    name: str
    task: Task
    cost: float
    wave: int


@dataclasses.dataclass
class _Tally:
    """What one experiment's cells came to, and their time beside their cost."""

    done: int = 0
    failed: int = 0
    cost: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass
class State:
    """What is asked of one run, and what happened so far."""

    out: Path
    data_dir: str | None
    jobs: int
    deadline: float
    progress: Callable[[Event], None] | None
    force: bool = False
    refresh: bool = False
    retry_failed: bool = False
    cluster: "Cluster | None" = None
    ended: set[str] = dataclasses.field(default_factory=set)  # by this run, well or not: once only
    skipped: set[str] = dataclasses.field(default_factory=set)
    stale: set[str] = dataclasses.field(default_factory=set)
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    failed_before: set[str] = dataclasses.field(default_factory=set)
    waiting: dict[str, Job] = dataclasses.field(default_factory=dict)  # planned
    flying: dict[str, Job] = dataclasses.field(default_factory=dict)  # handed to a worker
    failed: list[Failure] = dataclasses.field(default_factory=list)
    done: int = 0
    disk: str | None = None
    lost: str | None = None
    out_of_time: bool = False
    workers: bool = False
    tallies: dict[str, _Tally] = dataclasses.field(default_factory=lambda: defaultdict(_Tally))

    def stopped(self) -> bool:
        return self.disk is not None or self.lost is not None or self.out_of_time

    def may_start(self, job: Job) -> bool:
        """Whether this cell is still to be run; called also from joblib's own threads."""
        if self.disk is not None or self.lost is not None:
            return False
        if not self.force and _runs.has_cell(self.out, job.task.spec):
            self.skipped.add(job.name)  # another runner was faster
            self.waiting.pop(job.name, None)
            return False
        if time.monotonic() > self.deadline:
            self.out_of_time = True
            return False
        return True

    def end(self, job: Job, outcome: Outcome) -> None:
        self.flying.pop(job.name, None)
        self.waiting.pop(job.name, None)
        self.ended.add(job.name)
        tally = self.tallies[job.task.experiment.id]
        label = f"{job.task.experiment.id} {job.name}"
        if outcome.status == "disk":
            self.disk = outcome.reason
        elif outcome.status == "failed":
            again = command(job.name, job.task.out, job.task.data_dir)
            failure = Failure(job.task.experiment.id, job.name, outcome.reason, again)
            self.failed.append(failure)
            tally.failed += 1
            self.report("failed", f"{label}: {outcome.reason}")
        else:
            self.done += 1
            tally.done += 1
            tally.cost += job.cost
            tally.seconds += outcome.seconds
            self.report("done", f"{label}: {outcome.seconds:.1f} s")

    def report(self, kind: str, text: str) -> None:
        if self.progress is None:
            return
        waiting = list(self.waiting.values())
        left: dict[str, int] = dict.fromkeys(self.tallies, 0)
        for job in waiting:
            left[job.task.experiment.id] = left.get(job.task.experiment.id, 0) + 1
        parts = {}
        for name, count in left.items():
            tally = self.tallies.get(name, _Tally())
            parts[name] = Part(tally.done, tally.failed, tally.done + tally.failed + count)
        total = self.done + len(self.failed) + len(waiting)
        eta = self._eta(waiting)
        self.progress(Event(kind, text, self.done, len(self.failed), total, eta, parts))

    def _eta(self, waiting: Sequence[Job]) -> float | None:
        """By what each experiment's own cells took; one that has none goes by the others'."""
        cost = sum(tally.cost for tally in self.tallies.values())
        if not cost:
            return None
        rate = sum(tally.seconds for tally in self.tallies.values()) / cost
        seconds = 0.0
        for job in waiting:
            own = self.tallies.get(job.task.experiment.id)
            seconds += job.cost * (own.seconds / own.cost if own and own.cost else rate)
        return seconds / self.jobs


def in_this_process(state: State, wave: Sequence[Job]) -> None:
    for job in wave:
        if state.may_start(job):
            state.end(job, run_cell(job.task))


def in_processes(state: State, wave: Sequence[Job]) -> None:
    """Run the cells on workers; those that end their process are tried alone."""
    from gammabeta.studies._cluster import ENDED, LOST

    queue = list(wave)
    try:
        while queue and not state.stopped():
            try:
                _parallel(state, queue)
                return
            except ENDED as error:
                # All that was handed out is lost, but only one cell is to blame.
                suspects = list(state.flying.values())
                state.flying.clear()
                state.report("note", f"A worker process was ended: {_first_line(error)}")
            for job in suspects:
                try:
                    _parallel(state, [job])
                except ENDED as error:
                    state.end(job, _blame(job, error))
            queue = [job for job in queue if job.name not in state.ended | state.skipped]
    except LOST as error:
        state.lost = f"{type(error).__name__}: {_first_line(error)}"


def _blame(job: Job, error: BaseException) -> Outcome:
    reason = f"The worker process was ended: {_first_line(error)}"
    try:
        store_failure(job.task, f"{reason}\nIs there enough memory for this cell?")
    except OSError as full:
        return Outcome(job.name, "disk", 0.0, f"{full.strerror or full}")
    return Outcome(job.name, "failed", 0.0, reason)


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    start = text.find("The exit codes")
    return text[start:] if start >= 0 else text[:200]


def _parallel(state: State, queue: Sequence[Job]) -> None:
    import joblib

    by_name = {job.name: job for job in queue}
    cluster = state.cluster
    where: dict[str, Any] = {"owner": os.getpid()} if cluster is None else {"away": True}

    def feed() -> Iterator[Any]:
        # Drawn from only when a process is free: what is not drawn has not been started.
        for job in queue:
            if state.may_start(job):
                state.flying[job.name] = job
                yield joblib.delayed(run_cell)(job.task._replace(**where))

    # inner_max_num_threads also sets OMP_NUM_THREADS, MKL_NUM_THREADS and their like.
    config = (
        joblib.parallel_config("loky", n_jobs=state.jobs, inner_max_num_threads=1)
        if cluster is None
        else joblib.parallel_config(cluster.backend(), n_jobs=state.jobs)
    )
    with config:
        parallel = joblib.Parallel(
            return_as="generator_unordered", batch_size=1, pre_dispatch=state.jobs
        )
        state.workers = cluster is None
        with _interrupts_wait():
            outcomes = parallel(feed())
        try:
            for outcome in outcomes:
                job = by_name[outcome.name]
                state.end(job, outcome if cluster is None else keep(job.task, outcome))
        finally:
            # After an interrupt: now, not when memory is cleaned up, and without joblib's regret.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                outcomes.close()


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Hold Ctrl-C back while workers are started: they inherit this, and never see one."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_workers(state: State, kill: bool) -> None:
    if state.workers:
        from joblib.externals.loky import get_reusable_executor

        # reuse=True: the executor that there is; else it would be replaced, after waiting for it.
        executor = get_reusable_executor(reuse=True, kill_workers=kill)
        executor.shutdown(wait=True, kill_workers=kill)
        state.workers = False
