"""Probes driven from an ordinary training loop: when, at what cost, and where the numbers go."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from gammabeta import __version__
from gammabeta._guard import unwrap
from gammabeta._runs import RunError
from gammabeta._runs._record import (
    MAX_VALUES,
    Record,
    RecordFile,
    encoded,
    header,
    is_text,
    of_rows,
    read_record,
)
from gammabeta.probes import Probe, probe
from gammabeta.probes.step import Step, check_optimizer

Values = dict[str, dict[str, Tensor]]

_KEPT = 1_000_000  # numbers in memory where there is no file
# A record leaves the caches cold, and the next steps pay for it where nobody sees it: a third of
# the record again on networks whose step takes a millisecond, next to nothing on larger ones.
_UNSEEN = 1.4
_STATE = ("steps", "skipped", "memory", "loop", "spent")
_log = logging.getLogger("gammabeta")


class Recorder:
    """Measure a model while it trains, by probes, at chosen steps and at a bounded cost.

    Put `step` first in the body of the loop, before the forward pass::

        rec = gb.Recorder(model, optimizer=optimizer, path="record.jsonl")
        for x, y in batches:
            rec.step(loss_fn, (x, y))
            ...                                # forward, backward, optimizer.step() as ever

    There the numbers of step k are those of the update that is about to be made, number k from 0:
    same parameters, same batch, same dropout masks (the random state is what it was), so the
    gradients are the ones that the backward pass will find. Step 0 is the initialization. After
    optimizer.step() they would be those of the new parameters on the batch just learned from.
    The training is bit for bit the same with and without a recorder.

    A record is due at every step that `every` names. The first two are always taken; a later one
    is skipped where it would bring `overhead` above `max_overhead`, and counted in `skipped`; a
    quarter of the limit is kept for the caches that records leave cold, which is not seen here.
    `overhead` is the time that records took by the time of the rest of the loop, whatever that
    does between the calls of `step`. What a process meets but once, such as kernels that are
    compiled, the training would have met a moment later without a recorder: the first record runs
    forward and backward twice, and what the first of these takes longer does not count.

    Under DistributedDataParallel, and wherever several processes train, rank 0 alone measures and
    writes: statistics, loss and gradients of its own part of each batch. Where layers share their
    statistics between processes all ranks have to measure with it, and call `step` alike. With
    gradient accumulation a step is a call of `step`: call it once per update, and give it all the
    parts with a `forward` that sums their losses, or one part to see that part's numbers. A
    compiled model is measured through its original module. Fully sharded models are refused, since
    no process holds their parameters.

    A probe that raises is warned of once, noted in the record, and tried again at the next; a
    file that cannot be written is warned of once, and one that was removed is begun anew; the
    training goes on. Ctrl-C goes through, and the file holds whole lines. The file of an earlier
    run of the same model and probes is continued: a line that a kill left unfinished is cut off,
    and the steps are counted on from the last one recorded, or from where `load_state_dict` says.

    Args:
        model: the module that is trained; DistributedDataParallel or compiled if it is.
        optimizer: for quantities that need one, such as the effective learning rate.
        every: record each so many steps, or a function of the step that tells whether to.
        probes: names (`gammabeta.probes.PROBES`) or functions `probe(step, memory) -> dict of
            tensors`; functools.partial gives them parameters.
        path: the JSONL file to write; without it the numbers stay in memory, and from a million
            of them on every second record is dropped.
        max_overhead: largest cost, as a share of the time that training takes; None for any.

    Attributes:
        steps: calls of `step` so far; the number of the next step.
        skipped: records that were due and were skipped for their cost.

    Raises:
        TypeError: the model is fully sharded, or no module; the optimizer is none; a probe is
            neither name nor function.
        ValueError: `every` or `max_overhead` is not positive, a probe is unknown or named twice,
            the optimizer holds none of the model's parameters;
            RunError, a ValueError, where the file is no record, or that of another training.
        OSError: the file cannot be written.

    Example:
        >>> import torch, gammabeta as gb
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), gb.BatchNorm1d(1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rec = gb.Recorder(model, optimizer=optimizer, every=2, probes=("weights",))
        >>> x, y = torch.eye(2), torch.ones(2, 1)
        >>> for _ in range(3):
        ...     _ = rec.step(torch.nn.functional.mse_loss, (x, y))
        ...     torch.nn.functional.mse_loss(model(x), y).backward()
        ...     optimizer.step()
        >>> rec.record().series["weights/0/norm"].steps
        [0, 2]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        every: int | Callable[[int], bool] = 50,
        probes: Sequence[str | Probe] = ("weights", "gradients"),
        path: str | os.PathLike[str] | None = None,
        max_overhead: float | None = 0.05,
    ) -> None:
        self._probes = _by_name(probes)
        self._is_due = _schedule(every)
        if max_overhead is not None and not max_overhead > 0:
            raise ValueError(
                "Recorder: max_overhead is a share of the training's time above 0, got "
                f"{max_overhead!r}. 0.05 lets it take 5 % longer; None sets no limit."
            )
        self._model = unwrap(model, "Recorder")
        check_optimizer(optimizer, self._model, "Recorder")
        self.steps = 0
        self.skipped = 0
        self._due = {"taken": 0, "skipped": 0}
        if max_overhead is not None:
            weakref.finalize(self, _tell_skipped, self._due, max_overhead)
        self._optimizer = optimizer
        self._limit = math.inf if max_overhead is None else max_overhead
        self._memory: dict[str, dict[str, Any]] = {name: {} for name in self._probes}
        self._clock = _Clock(self._model)
        self._warned: set[str] = set()
        self._rows: list[dict[str, Any]] = []
        self._held = 0  # numbers in these rows
        self._rank, self._ranks = _place()
        self._together = self._ranks > 1 and any(map(_is_synchronized, self._model.modules()))
        self._about = header(
            gammabeta=__version__,
            torch=torch.__version__,
            model=type(self._model).__name__,
            parameters=sum(p.numel() for p in self._model.parameters()),
            probes=list(self._probes),
            every=every if isinstance(every, int) else None,
            max_overhead=max_overhead,
            notes=self._notes(wrapped=model is not self._model),
        )
        self._file: RecordFile | None = None
        self._resumed: int | None = None  # the step to go on from, until the file says so
        if path is not None and self._rank == 0:
            self._file = RecordFile(Path(path), self._about)
            self._go_on(self._file)

    def __repr__(self) -> str:
        where = "in memory" if self._file is None else str(self._file.path)
        taken = self._due["taken"]
        said = [
            f"{self.steps} step{'s' * (self.steps != 1)} seen",
            f"{taken} record{'s' * (taken != 1)} taken",
            *([f"{self.skipped} skipped"] if self.skipped else []),
            f"probes {' '.join(self._probes) or 'none'}",
            f"{100 * self.overhead:.2g} % of the training's time",
        ]
        return f"<gammabeta.Recorder {where}: {', '.join(said)}>"

    def _go_on(self, file: RecordFile) -> None:
        if file.dropped:
            text = "Recorder: the last line of %s was not finished; its %d bytes were cut off."
            _log.warning(text, file.path, file.dropped)
        if file.last is not None:
            self.steps = self._resumed = file.last + 1
            text = (
                "Recorder: %s is continued from step %d. If this training begins anew, name "
                "another path; if it goes on from a checkpoint, use load_state_dict."
            )
            _log.warning(text, file.path, self.steps)

    def _notes(self, wrapped: bool) -> list[str]:
        notes = [
            "A step is a call of Recorder.step: its numbers are of the parameters at that call and "
            "of the batch given to it, in training mode."
        ]
        if self._optimizer is None:
            notes.append("No optimizer was given: quantities that need one are absent.")
        if wrapped:
            notes.append("Measured is the original module, without its wrapper.")
        if self._ranks > 1:
            what = "Loss and gradients" if self._together else "Statistics, loss and gradients"
            notes.append(f"{what} are of the part of the batch of rank 0 of {self._ranks} alone.")
        if self._together:
            notes.append("The statistics of synchronized layers are those of all ranks together.")
        return notes

    # -- in the loop --------------------------------------------------------------------

    def step(
        self,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        batch: Any,
        *rest: Any,
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> Values | None:
        """Count one step, and measure if a record is due.

        Args:
            loss_fn: loss_fn(model(x), y) -> the loss that is trained; None with `forward`.
            batch: (x, y), or with `forward` anything.
            forward: forward(model, batch) -> the loss, where the above does not describe it.

        Returns:
            The tensors by probe and name where a record was taken, else None.

        Raises:
            TypeError: x and y were given one by one, not as a pair.
        """
        if rest:
            raise TypeError(
                f"Recorder.step: the batch must be one argument, got {1 + len(rest)}: give (x, y) "
                "as a pair, rec.step(loss_fn, (x, y))."
            )
        number = self.steps
        self.steps += 1
        self._clock.start()
        if not self._is_due(number) or not self._measures():
            return None
        with self._clock:
            build = partial(
                Step, self._model, loss_fn, batch, optimizer=self._optimizer, forward=forward
            )
            step = build() if self._clock.records else self._first(build)
            values, plain, errors = self._observe(step)
            row: dict[str, Any] = {"step": number, **self._clock.costs()}
            if "_measured" in vars(step):  # else it would cost a forward and a backward pass
                row["loss"] = encoded(float(step.loss))
            row["values"] = plain
            if errors:
                row["errors"] = errors
            trouble = {f"the probe {name!r}": text for name, text in errors.items()}
            trouble |= self._keep(row)
            for what in trouble.keys() - self._warned:
                self._warned.add(what)
                text = f"Recorder: {what} failed at step {number}: {trouble[what]}. "
                text += "The training goes on; this is said once."
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        return values

    @property
    def overhead(self) -> float:
        """Seconds spent in records per second of the rest of the loop, so far; see the class."""
        return self._clock.overhead()

    def record(self) -> Record:
        """What was recorded so far, as `gammabeta.read_record` gives it.

        Raises:
            FileNotFoundError: the file was removed or renamed, and no record taken since then.
        """
        if self._file is not None:
            if not os.path.lexists(self._file.path):
                raise FileNotFoundError(
                    f"Recorder.record: the file of the record must be where it was written, got "
                    f"none at {self._file.path}: it was removed or renamed. Put it back; else the "
                    "next record begins a new one."
                )
            return read_record(self._file.path)
        return of_rows(self._about, self._rows)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds so that the record goes on as if it had not been interrupted."""
        clock = self._clock
        values = (self.steps, self.skipped, self._memory, clock.loop(), clock.spent)
        return copy.deepcopy(dict(zip(_STATE, values, strict=True)))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; what the file holds from that step on no longer counts."""
        missing = [key for key in _STATE if key not in state]
        if missing:
            raise ValueError(
                f"Recorder.load_state_dict: expected what state_dict() gives, found no "
                f"{missing[0]!r}. Save rec.state_dict() with the checkpoint."
            )
        held = copy.deepcopy(dict(state))
        self.steps, self.skipped = held["steps"], held["skipped"]
        self._memory = {name: held["memory"].get(name, {}) for name in self._probes}
        self._clock = _Clock(self._model, held["loop"], held["spent"])
        self._rows = [row for row in self._rows if row["step"] < self.steps]
        if self._file is not None and self._file.last is not None:
            self._resumed = self.steps

    # -- one record ---------------------------------------------------------------------

    def _measures(self) -> bool:
        """Whether this process measures now: rank 0 alone, or all together."""
        fine = self._rank == 0 and self._clock.next_overhead() <= self._limit
        if self._together:
            # Ranks that trusted clocks of their own would wait for one another for ever.
            answer = torch.tensor(int(fine), device=next(self._model.parameters()).device)
            distributed.broadcast(answer, src=0)
            fine = bool(answer)
        self.skipped += not fine
        self._due["skipped" if not fine else "taken"] += 1
        return fine

    def _first(self, build: Callable[[], Step]) -> Step:
        """The first step that is measured, once what a process meets but once has been met."""
        took = []
        for _ in range(2):
            step = build()
            started = self._clock.now()
            try:
                _ = step.loss
            except Exception:
                return step  # the probes will meet it, and it is told as theirs
            took.append(self._clock.now() - started)
        self._clock.give_back(max(took[0] - took[1], 0.0))
        return step

    def _observe(self, step: Step) -> tuple[Values, dict[str, dict[str, Any]], dict[str, str]]:
        values: Values = {}
        plain: dict[str, dict[str, Any]] = {}
        errors: dict[str, str] = {}
        for name, measure in self._probes.items():
            try:
                returned = measure(step, self._memory[name])
                if not isinstance(returned, Mapping):
                    raise TypeError(
                        f"a probe must return a dict of tensors by name, got {returned!r:.100} "
                        f"from {name!r}. Return {{}} where there is nothing to tell."
                    )
                found = {key: _small(key, value) for key, value in returned.items()}
            except Exception as error:
                text = "".join(c if c.isprintable() else " " for c in str(error))
                errors[name] = f"{type(error).__name__}: {text}"[:300]
            else:
                values[name] = found
                plain[name] = {key: encoded(value.tolist()) for key, value in found.items()}
        return values, plain, errors

    def _keep(self, row: dict[str, Any]) -> dict[str, str]:
        """Write the row, or hold it; what went wrong with it, if anything."""
        if self._rank > 0:
            return {}
        if self._file is None:
            self._rows.append(row)
            self._held += _count(row)
            if self._held > _KEPT:
                # the whole course, more coarsely
                del self._rows[1::2]
                self._held = sum(map(_count, self._rows))
            return {}
        try:
            if self._resumed is not None:
                self._file.append({"resumed": self._resumed})
                self._resumed = None
            self._file.append(row)
        except FileNotFoundError:
            return {"the record": self._begun_anew(row)}
        except OSError as error:
            return {"the record": f"{error.strerror or error}"}
        return {}

    def _begun_anew(self, row: dict[str, Any]) -> str:
        """Write the row to a new file in the place of the one that has gone; what there is to say.

        What was in that one is its remover's; the rows from now on are still ours to keep.
        """
        assert self._file is not None
        path = self._file.path
        try:
            self._file = RecordFile(path, self._about)
            self._file.append(row)
        except (OSError, RunError) as error:
            return f"{path} was removed or renamed, and no new file can be begun: {error}"
        self._resumed = None
        return f"{path} was removed or renamed; a new file begins there with this step"


class _Clock:
    """What the records cost, beside the time of the loop around them."""

    def __init__(self, model: nn.Module, loop: float = 0.0, spent: float = 0.0) -> None:
        self.spent = spent
        self._before = loop  # of earlier processes
        self._model = model
        self._began: float | None = None
        self.records = 0
        self._calls = 0
        self._here = self._latest = self._entered = 0.0

    def start(self) -> None:
        self._calls += 1
        if self._began is None:
            self._began = time.perf_counter()

    def loop(self, now: float | None = None) -> float:
        """Seconds of the loop without the records."""
        if self._began is None:
            return self._before
        now = time.perf_counter() if now is None else now
        return self._before + now - self._began - self._here

    def overhead(self) -> float:
        return self._share(self.spent, self.loop())

    def next_overhead(self) -> float:
        """What it would be after one more record like the latest, the unseen part included."""
        if self.records < 2:
            return 0.0
        return self._share(_UNSEEN * (self.spent + self._latest), self.loop())

    def costs(self) -> dict[str, float]:
        """Of the record that is being taken, for the record itself."""
        cost = self.now() - self._entered
        found = {"seconds": encoded(cost)}
        if self._calls > 1 or self._before > 0:
            found["overhead"] = encoded(self._share(self.spent + cost, self.loop(self._entered)))
        return found

    def _share(self, spent: float, loop: float) -> float:
        # nothing can be said of a loop that has not been once around
        return spent / loop if self._calls > 1 or self._before > 0 else 0.0

    def give_back(self, seconds: float) -> None:
        """Count this much of the record that is being taken as the loop's."""
        self._entered += seconds

    def now(self) -> float:
        """The time when the device has done what it was given: what came before is not ours."""
        device = next((p.device for p in self._model.parameters()), None)
        accelerator = torch.accelerator.current_accelerator()
        if device is not None and accelerator is not None and accelerator.type == device.type:
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def __enter__(self) -> None:
        self._entered = self.now()

    def __exit__(self, *_: object) -> None:
        cost = time.perf_counter() - self._entered
        self._here += cost
        self.spent += cost
        self._latest = cost
        self.records += 1


def _tell_skipped(due: Mapping[str, int], limit: float) -> None:
    """At the end, where most records were skipped: a figure of what is left is a coarse one."""
    if due["skipped"] > due["taken"]:
        _log.info(
            "Recorder: %d of %d records that were due were skipped to keep max_overhead=%g. For "
            "more of them raise it (None for all), or take fewer probes; else a larger every= "
            "loses nothing.",
            due["skipped"],
            due["skipped"] + due["taken"],
            limit,
        )


def _by_name(probes: Sequence[str | Probe]) -> dict[str, Probe]:
    """The probes as functions, by the names that they have in the record."""
    if isinstance(probes, str):
        raise TypeError(
            f"Recorder: probes is a sequence of names or functions, got the text {probes!r}. "
            f"Write probes=({probes!r},)."
        )
    found: dict[str, Probe] = {}
    for given in probes:
        if isinstance(given, str):
            name, function = given, probe(given)
        elif callable(given):
            name, function = _name_of(given), given
        else:
            raise TypeError(
                f"Recorder: a probe is a name or a function probe(step, memory), got {given!r}."
            )
        if name in found:
            raise ValueError(
                f"Recorder: every probe needs a name of its own, got two of the name {name!r}. "
                "A function is named by its __name__."
            )
        found[name] = function
    return found


def _name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, partial):
        function = function.func
    name = str(getattr(function, "__name__", type(function).__name__))
    # a probe of this package is known by its file
    name = function.__module__.rpartition(".")[2] if name == "measure" else name
    return name.replace("/", " ")


def _schedule(every: int | Callable[[int], bool]) -> Callable[[int], bool]:
    if isinstance(every, int) and not isinstance(every, bool):
        if every < 1:
            raise ValueError(f"Recorder: every is a number of steps from 1 on, got {every}.")
        return lambda step: step % every == 0
    if not callable(every):
        raise TypeError(
            "Recorder: every is a whole number of steps or a function of the step that tells "
            f"whether to record it, got {every!r}."
        )
    return every


def _place() -> tuple[int, int]:
    """Rank and number of the processes that train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _is_synchronized(module: nn.Module) -> bool:
    return isinstance(module, nn.SyncBatchNorm) or getattr(module, "_group", None) is not None


def _small(key: object, value: object) -> Tensor:
    """A probe's value as it is recorded: on the CPU, and nobody else's memory."""
    if not is_text(key):
        raise ValueError(f"a quantity has a printable name, got {key!r}")
    tensor = torch.as_tensor(value).detach()
    if tensor.is_complex() or tensor.dim() > 2 or tensor.numel() > MAX_VALUES:
        raise ValueError(
            f"{key} is a real number, vector or matrix of at most {MAX_VALUES} entries, got "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    return tensor.to("cpu", copy=True)


def _count(row: Mapping[str, Any]) -> int:
    return sum(_entries(v) for found in row["values"].values() for v in found.values())


def _entries(value: Any) -> int:
    return sum(map(_entries, value)) if isinstance(value, list) else 1
