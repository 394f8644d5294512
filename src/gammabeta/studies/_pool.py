"""Running cells: in this process, or in joblib's, and what happened to them."""

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gammabeta import _runs
from gammabeta.studies._cell import Outcome, Task, command, run_cell, store_failure


class Event(NamedTuple):
    """What a progress callback gets.

    `kind` is "wave" (new cells are planned), "done" or "failed" (a cell ended), or "note".
    `total` is what is planned so far; it grows when an experiment asks for more.
    """

    kind: str
    text: str
    done: int
    failed: int
    total: int
    eta_seconds: float | None


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


class State:
    """What happened so far in one run."""

    def __init__(
        self,
        out: Path,
        data_dir: str | None,
        jobs: int,
        force: bool,
        deadline: float,
        progress: Callable[[Event], None] | None,
    ) -> None:
        self.out, self.data_dir, self.jobs, self.force = out, data_dir, jobs, force
        self.deadline, self.progress = deadline, progress
        self.ended: set[str] = set()  # by this run, well or not: never tried twice in one run
        self.skipped: set[str] = set()
        self.stale: set[str] = set()
        self.waiting: dict[str, float] = {}  # planned cells and their cost
        self.flying: dict[str, Job] = {}  # handed to a worker
        self.failed: list[Failure] = []
        self.done = 0
        self.disk: str | None = None
        self.out_of_time = False
        self.workers = False
        self._cost = self._seconds = 0.0

    def stopped(self) -> bool:
        return self.disk is not None or self.out_of_time

    def may_start(self, job: Job) -> bool:
        """Whether this cell is still to be run; called also from joblib's own threads."""
        if self.disk is not None:
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
        self._cost += job.cost
        self._seconds += outcome.seconds
        label = f"{job.task.experiment.id} {job.name}"
        if outcome.status == "disk":
            self.disk = outcome.reason
        elif outcome.status == "failed":
            again = command(job.name, job.task.out, job.task.data_dir)
            failure = Failure(job.task.experiment.id, job.name, outcome.reason, again)
            self.failed.append(failure)
            self.report("failed", f"{label}: {outcome.reason}")
        else:
            self.done += 1
            self.report("done", f"{label}: {outcome.seconds:.1f} s")

    def report(self, kind: str, text: str) -> None:
        if self.progress is None:
            return
        left = sum(list(self.waiting.values()))
        eta = self._seconds / self._cost * left / self.jobs if self._cost else None
        total = self.done + len(self.failed) + len(self.waiting)
        self.progress(Event(kind, text, self.done, len(self.failed), total, eta))


def in_this_process(state: State, wave: Sequence[Job]) -> None:
    for job in wave:
        if state.may_start(job):
            state.end(job, run_cell(job.task))


def in_processes(state: State, wave: Sequence[Job]) -> None:
    """Run the cells in joblib's processes; those that end their process are tried alone."""
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    queue = list(wave)
    while queue and not state.stopped():
        try:
            _parallel(state, queue)
            return
        except TerminatedWorkerError as error:
            # All that was handed out is lost, but only one cell is to blame.
            suspects = list(state.flying.values())
            state.flying.clear()
            state.report("note", f"A worker process was ended: {_first_line(error)}")
        for job in suspects:
            try:
                _parallel(state, [job])
            except TerminatedWorkerError as error:
                state.end(job, _blame(job, error))
        queue = [job for job in queue if job.name not in state.ended | state.skipped]


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

    def feed() -> Iterator[Any]:
        # Drawn from only when a process is free: what is not drawn has not been started.
        for job in queue:
            if state.may_start(job):
                state.flying[job.name] = job
                yield joblib.delayed(run_cell)(job.task._replace(owner=os.getpid()))

    # inner_max_num_threads also sets OMP_NUM_THREADS, MKL_NUM_THREADS and their like.
    with joblib.parallel_config("loky", n_jobs=state.jobs, inner_max_num_threads=1):
        parallel = joblib.Parallel(
            return_as="generator_unordered", batch_size=1, pre_dispatch=state.jobs
        )
        state.workers = True
        with _interrupts_wait():
            outcomes = parallel(feed())
        try:
            for outcome in outcomes:
                state.end(by_name[outcome.name], outcome)
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
