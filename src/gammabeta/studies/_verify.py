"""Kept rows are measured again: whoever doubts a number makes it once more, and compares.

A cell is drawn, measured with the present code, and its rows are compared with those that are kept.
"""

import io
import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gammabeta import _runs
from gammabeta._runs import Row, StoredCell
from gammabeta.studies import _data
from gammabeta.studies._cell import Task, measure
from gammabeta.studies._experiments import Experiment, choose, experiments

CLOSE = 1e-4  # relative: another processor rounds otherwise, and training amplifies it
Outcome = Literal["same", "close", "varies", "other"]


class Checked(NamedTuple):
    """One cell that was measured again.

    `outcome` is "same" (every kept row comes again, bit by bit), "close" (numbers differ by at most
    1e-4 of themselves), "varies" (two measurements of today differ as well: it measures time), or
    "other". `difference` is the largest relative one, infinite where rows or words differ;
    `present`: the stored rows were made by the present code.
    """

    experiment: str
    name: str
    arm: Mapping[str, _runs.Scalar]
    seed: int
    budget: str
    present: bool
    rows: int
    outcome: Outcome
    difference: float

    def to_json(self) -> dict[str, Any]:
        """As JSON has it, which knows no infinity."""
        difference = self.difference if math.isfinite(self.difference) else None
        return {**self._asdict(), "arm": dict(self.arm), "difference": difference}


def verify(
    paths: Sequence[Path],
    ids: Sequence[str] | None = None,
    *,
    cells: int = 20,
    seconds: float = 60.0,
    draw: int = 0,
    data_dir: Path | None = None,
    catalogue: Mapping[str, Experiment] | None = None,
) -> Iterator[Checked]:
    """Measure cells again that are drawn at random, the experiments taking turns.

    Args:
        paths: run folders or kept rows; nothing in them is changed.
        ids: experiments; all that have cells there if None.
        cells: how many at most.
        seconds: after which no other cell is begun.
        draw: another number draws other cells.
        data_dir: where the images lie.

    Raises:
        RunError: a folder cannot be read; ValueError: there are no cells, or other images.
    """
    known = experiments() if catalogue is None else catalogue
    stored = [c for c in _runs.read_cells(paths) if c.spec["experiment"] in known]
    chosen = choose(sorted({c.spec["experiment"] for c in stored}) if ids is None else ids, known)
    queues = []
    for experiment in chosen:
        own = [c for c in stored if c.spec["experiment"] == experiment.id]
        random.Random(f"{draw} {experiment.id}").shuffle(own)
        queues.append([(experiment, cell) for cell in own])
    random.Random(draw).shuffle(queues)
    rounds = itertools.zip_longest(*queues)
    turns = [each for one in rounds for each in one if each is not None]
    if not turns:
        raise ValueError(
            f"Cells were expected in {', '.join(map(str, paths))}, but there are none of these "
            "experiments. `gammabeta study status` says what a folder holds."
        )
    _fitting(turns[:cells], data_dir)
    end = time.monotonic() + seconds
    for experiment, cell in turns[:cells]:
        if time.monotonic() > end:
            return
        yield _checked(experiment, cell, data_dir)


def _fitting(turns: Sequence[tuple[Experiment, StoredCell]], data_dir: Path | None) -> None:
    """Say before anything is measured that the images are not those of the rows."""
    for name in dict.fromkeys(cell.spec["data"]["name"] for _, cell in turns):
        _data.load(name, data_dir)


def _checked(experiment: Experiment, cell: StoredCell, data_dir: Path | None) -> Checked:
    spec = cell.spec
    task = Task(spec, experiment, "", None if data_dir is None else str(data_dir))

    def again() -> list[Row]:
        return measure(task, io.StringIO())[0]

    new = again()
    difference = _difference(cell.rows, new)
    outcome: Outcome = "same" if difference == 0 else "close" if difference <= CLOSE else "other"
    if outcome == "other" and _difference(new, again()) > 0:
        outcome = "varies"
    return Checked(
        spec["experiment"],
        cell.path.name,
        spec["arm"],
        spec["seed"],
        spec["budget"],
        spec["code"] == experiment.code_of(spec["budget"]),
        len(cell.rows),
        outcome,
        difference,
    )


def _difference(kept: Sequence[Row], new: Sequence[Row]) -> float:
    """The largest relative difference of a kept row from the one that stands for it; 0: the same.

    Rows that were thinned out are not missed: a row is known by its words and whole numbers.
    """
    by_words: dict[str, list[Row]] = {}
    for row in new:
        by_words.setdefault(_words(row), []).append(row)
    worst = 0.0
    for row in kept:
        same = by_words.get(_words(row), [])
        if not same:
            return math.inf
        worst = max(worst, min(_apart(row, other) for other in same))
    return worst


def _words(row: Row) -> str:
    fixed = {k: "" if isinstance(v, float) else v for k, v in row.items()}
    return json.dumps(fixed, sort_keys=True)


def _apart(one: Row, other: Row) -> float:
    pairs = [(v, float(other[k] or 0.0)) for k, v in one.items() if isinstance(v, float)]
    return max((abs(a - b) / max(abs(a), abs(b)) for a, b in pairs if a != b), default=0.0)
