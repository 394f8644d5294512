"""One cell, in whatever process: on one thread, with random numbers and a log of its own."""

import contextlib
import functools
import io
import logging
import os
import random
import shlex
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from gammabeta import _runs
from gammabeta._runs import Row
from gammabeta.studies import _data
from gammabeta.studies._experiments import Experiment


class Task(NamedTuple):
    """All that a worker needs, as plain values: it is another process."""

    spec: dict[str, Any]
    experiment: Experiment
    out: str
    data_dir: str | None = None
    replace: bool = False
    owner: int | None = None  # the process whose worker this is; None: the caller's own process
    away: bool = False  # on a cluster: what was measured comes back with the outcome


class Outcome(NamedTuple):
    """How a cell ended: "done", "failed", or "disk" where its result could not be stored.

    `seconds` is the time that it took, `cpu` the processor time; `rows`, `text` (the log, or what
    was raised) and `versions` are there as long as they are not stored.
    """

    name: str
    status: str
    seconds: float
    reason: str = ""
    cpu: float = 0.0
    rows: Sequence[Row] = ()
    text: str = ""
    versions: Mapping[str, str] = {}


# A cluster's worker may have several threads; generators, logging and warnings are the process's.
_one_at_a_time = threading.Lock()


def run_cell(task: Task) -> Outcome:
    """Measure one cell and store it; what it raises is stored too, and not raised here."""
    if task.owner is not None:
        _become_worker(task.owner)
    with _one_at_a_time:
        outcome = _measured(task)
    return outcome if task.away else keep(task, outcome)


def _measured(task: Task) -> Outcome:
    name = _runs.cell_name(task.spec)
    log = io.StringIO()
    try:
        elsewhere = task.away or task.owner is not None
        if elsewhere and _code(task) != task.spec["code"]:
            raise RuntimeError(
                "The sources must be the same everywhere, and stay as they are while a run lasts, "
                "but this worker has others. Install the same ones there, and run the same "
                "command again."
                if task.away
                else "The sources must stay as they are while a run lasts, but they were changed. "
                "Run the same command again."
            )
        rows, seconds, cpu = measure(task, log)
        log.write(f"{len(rows)} rows, {seconds:.2f} s, {cpu:.2f} s of processor time\n")
        # Here, where it is the cell's fault: later, it is the disk's.
        _runs.rows_text(task.spec, rows)
    except (Exception, SystemExit) as error:
        text = f"{traceback.format_exc()}\n{log.getvalue()}"
        return Outcome(name, "failed", 0.0, summary(error), text=text)
    return Outcome(name, "done", seconds, "", cpu, rows, log.getvalue(), versions())


def keep(task: Task, outcome: Outcome) -> Outcome:
    """Store what a cell gave, or what it raised; the outcome without it."""
    kept = outcome._replace(rows=(), text="")
    try:
        if outcome.status == "failed":
            store_failure(task, outcome.text)
        else:
            made = {"cpu_seconds": round(outcome.cpu, 3), "versions": dict(outcome.versions)}
            spec = {**task.spec, **made}
            _runs.write_cell(Path(task.out), spec, outcome.rows, outcome.text, task.replace)
    except OSError as error:
        return kept._replace(status="disk", reason=f"{error.strerror or error}")
    return kept


def _code(task: Task) -> str:
    """The digest of what this process has imported, taken once: later edits do not reach it."""
    return _imported(task.experiment.id, task.experiment.module, task.spec["budget"])


@functools.cache
def _imported(experiment: str, module: str, budget: str) -> str:
    return Experiment(experiment, module).code_of(budget)


def measure(task: Task, log: TextIO) -> tuple[list[Row], float, float]:
    """The cell's rows, the seconds that they took and those of the processor; nothing is stored.

    Both are without the imports and the reading of images, which a process does once.

    Raises:
        ValueError: the images are not those that the specification names, or there are no rows.
        Exception: whatever the experiment raises.
    """
    spec = task.spec
    # Of the same cell, whatever the code: a digest that is renamed changes no number.
    with isolated(int(_runs.cell_name({**spec, "code": ""}), 16), log):
        images = _data.load(spec["data"]["name"], task.data_dir)
        if images.digest != spec["data"]["digest"]:
            raise ValueError(
                f"The images must be those of the cell (digest {spec['data']['digest']}), got "
                f"digest {images.digest}. Give the data folder that the cell was made with."
            )
        started, before = time.monotonic(), time.process_time()
        found = task.experiment.measure(dict(spec["arm"]), spec["seed"], spec["budget"], images)
        rows = [dict(row) for row in found]
        seconds, cpu = time.monotonic() - started, time.process_time() - before
    if not rows:
        raise ValueError(f"measure() of {task.experiment.id} must give rows, gave none.")
    return rows, seconds, cpu


def store_failure(task: Task, text: str) -> None:
    """Keep what went wrong beside the command that repeats the cell alone."""
    again = command(_runs.cell_name(task.spec), task.out, task.data_dir)
    text = f"{text.rstrip()}\n\nTo repeat this cell alone:\n    {again}\n"
    _runs.write_failed(Path(task.out), task.spec, text)


def command(name: str, out: str, data_dir: str | None = None) -> str:
    """The command that repeats one cell alone."""
    where = f" --data-dir {shlex.quote(data_dir)}" if data_dir is not None else ""
    return f"gammabeta study run --cell {name} --out {shlex.quote(out)}{where}"


def summary(error: BaseException) -> str:
    """One line for an error."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextlib.contextmanager
def isolated(seed: int, log: TextIO) -> Iterator[None]:
    """Run on one thread, with seeded generators, logging and warnings going to `log`.

    All of it is put back afterwards, so that a cell that runs in the caller's process leaves no
    trace, and the second cell of a worker begins where the first one began.
    """
    import numpy
    import torch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    states = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    handler = logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("gammabeta")
    level = ours.level

    def note(message: Any, category: Any, filename: Any, lineno: Any, *_: Any) -> None:
        log.write(warnings.formatwarning(message, category, Path(filename).name, lineno, ""))

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        # An assignment, as the standard library documents it; catch_warnings takes it back.
        setattr(warnings, "showwarning", note)  # noqa: B010
        root.addHandler(handler)
        ours.setLevel(min(level or logging.INFO, logging.INFO))
        try:
            torch.set_num_threads(1)
            torch.manual_seed(seed)
            numpy.random.seed(seed % 2**32)
            random.seed(seed)
            yield
        finally:
            root.removeHandler(handler)
            ours.setLevel(level)
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            torch.set_rng_state(states[0])
            numpy.random.set_state(states[1])
            random.setstate(states[2])


_watched: set[int] = set()


def _become_worker(owner: int) -> None:
    """Leave Ctrl-C to the owner, and end when it is gone.

    An orphan would go on computing for nobody: a killed owner can tell it nothing, so it looks.
    """
    if os.getpid() == owner:
        return  # joblib found no way to start processes (it may itself run in a worker)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if owner in _watched or os.getppid() != owner:
        return  # somebody else's child (another start method): nobody to watch

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(0.5)
        os._exit(1)

    _watched.add(owner)
    threading.Thread(target=watch, name="watch-owner", daemon=True).start()


def make_spec(
    experiment: Experiment,
    arm: Mapping[str, _runs.Scalar],
    seed: int,
    budget: str,
    data: Mapping[str, str],
) -> dict[str, Any]:
    """The specification of a cell made by the present code; `data` is name and digest."""
    return {
        "schema": _runs.SCHEMA,
        "experiment": experiment.id,
        "arm": dict(arm),
        "seed": seed,
        "budget": budget,
        "data": dict(data),
        "code": experiment.code_of(budget),
        "versions": dict(versions()),
    }


@functools.cache
def versions() -> dict[str, str]:
    """What this process computes with."""
    import platform

    import torch

    import gammabeta

    return {
        "gammabeta": gammabeta.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
