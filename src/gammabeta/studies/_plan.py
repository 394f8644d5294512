"""Which cells an experiment wants, under which names, and in which order they take turns."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta import _runs
from gammabeta._runs import Row, StoredCell
from gammabeta.studies._cell import make_spec
from gammabeta.studies._experiments import Cell, Experiment
from gammabeta.studies._pool import Job


class Wanted(NamedTuple):
    """One wanted cell with its specification and the name that this gives it."""

    name: str
    cell: Cell
    spec: dict[str, Any]


class Stored(NamedTuple):
    """The cells of one experiment, budget and data set, those of other code apart.

    `stale` are the names that cells of other code would have if the present code made them.
    """

    rows: list[Row]
    present: dict[str, StoredCell]
    other: set[str]
    stale: set[str]


def plan(
    experiment: Experiment, cells: Sequence[Cell], budget: str, data: Mapping[str, str]
) -> list[Wanted]:
    """Name and specification of each wanted cell, each once; `data` is name and digest."""
    found: dict[str, Wanted] = {}
    for cell in cells:
        spec = make_spec(experiment, cell.arm, cell.seed, budget, data)
        _runs.rows_text(spec, [])  # a specification that cannot be stored ends the run now
        name = _runs.cell_name(spec)
        found.setdefault(name, Wanted(name, cell, spec))
    return list(found.values())


def stored(cells: Sequence[StoredCell], experiment: Experiment, budget: str, digest: str) -> Stored:
    """Sort cells by whether the present code made them."""
    code = experiment.code_of(budget)
    found = Stored([], {}, set(), set())
    for cell in cells:
        spec = cell.spec
        if (spec["experiment"], spec["budget"], spec["data"]["digest"]) != (
            experiment.id,
            budget,
            digest,
        ):
            continue
        if spec["code"] == code:
            found.present[cell.path.name] = cell
            found.rows.extend(cell.flat())
        else:
            found.other.add(cell.path.name)
            found.stale.add(_runs.cell_name({**spec, "code": code}))
    found.stale.difference_update(found.present)
    return found


def interleave(jobs: Sequence[Job]) -> list[Job]:
    """Take turns among the experiments: none waits until another one has all of its cells."""
    queues: dict[str, list[Job]] = {}
    for job in jobs:
        queues.setdefault(job.task.experiment.id, []).append(job)
    turns = itertools.zip_longest(*queues.values())
    return [job for turn in turns for job in turn if job is not None]
