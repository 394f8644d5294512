"""What run folders hold of each experiment: done, missing, stale, failed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gammabeta import _runs
from gammabeta.studies._experiments import Experiment, choose, experiments
from gammabeta.studies._plan import plan, stored


class Status(NamedTuple):
    """One experiment with one budget on one data set.

    `done`: cells of the present code. `missing`: wanted, given the rows there are, and neither
    done nor failed nor stale (an experiment may want more when these are there). `stale`: cells
    of other code that the present one has not made again. `failed`: cells of the present code
    that raised. `cpu_seconds` is the processor time of the cells that are done.
    """

    experiment: str
    budget: str
    data: str
    done: int
    missing: int
    stale: int
    failed: int
    cpu_seconds: float


def status(
    paths: Sequence[Path],
    ids: Sequence[str] | None = None,
    *,
    seeds: int | None = None,
    catalogue: Mapping[str, Experiment] | None = None,
) -> list[Status]:
    """What run folders, taken together, hold of some experiments; all that they hold if None.

    Raises:
        RunError: a run folder cannot be read; ValueError: an unknown experiment.
        RuntimeError: an experiment cannot say what it wants.
    """
    known = experiments() if catalogue is None else catalogue
    cells = _runs.read_cells(paths)
    failed = [item["spec"] for item in _runs.read_failed(paths)]
    specs = [cell.spec for cell in cells] + failed
    held = sorted({spec["experiment"] for spec in specs} & known.keys())
    groups = sorted(
        {(s["experiment"], s["budget"], s["data"]["name"], s["data"]["digest"]) for s in specs}
    )
    found = []
    for experiment in choose(held if ids is None else ids, known):
        for name, budget, data, digest in groups:
            if name != experiment.id:
                continue
            have = stored(cells, experiment, budget, digest)
            wanted = plan(
                experiment,
                experiment.cells(budget, data, seeds, have.rows),
                budget,
                {"name": data, "digest": digest},
            )
            broken = {
                _runs.cell_name(spec)
                for spec in failed
                if spec["code"] == experiment.code_of(budget)
                and (spec["experiment"], spec["budget"]) == (name, budget)
                and spec["data"]["digest"] == digest
            } - have.present.keys()
            known_names = have.present.keys() | have.stale | broken
            spent = [cell.spec.get("cpu_seconds", 0.0) for cell in have.present.values()]
            found.append(
                Status(
                    experiment.id,
                    budget,
                    data,
                    len(have.present),
                    sum(w.name not in known_names for w in wanted),
                    len(have.stale),
                    len(broken),
                    float(sum(spent)),
                )
            )
    return found
