"""Rows are kept: those of accepted runs, packed, and the verdicts that follow from them as a page.

`accept` packs the cells of run folders into results/<experiment>.jsonl.gz, those of variations into
results/robustness/; `page` makes docs/verdicts.md from them, which anybody can make again without
training.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import gammabeta
from gammabeta import _runs
from gammabeta._runs import Row, StoredCell
from gammabeta.studies import _holds, _provenance
from gammabeta.studies._experiments import (
    BRIEF,
    BUDGETS,
    SECOND,
    VARIATIONS,
    Experiment,
    choose,
    experiments,
)
from gammabeta.studies._judge import judge, select
from gammabeta.studies._status import status
from gammabeta.studies._verdict import Verdict

_THINNED = (0, 60, 40, 30, 20, 15, 12)  # steps that are left of each cell; 0: all of them
_DATA = "mnist"  # the bundled digits are a demonstration
# no figure is drawn of variations and of a second stage
_FIGURE_ROWS = ("curve", "spectrum", "influence")
_DIGITS = 6


class Kept(NamedTuple):
    """One file of accepted rows. `open_cells` were wanted but are missing, or failed."""

    experiment: str
    path: Path
    cells: int
    size: int
    thinned: int
    open_cells: int


def accept(
    paths: Sequence[Path],
    out: Path,
    ids: Sequence[str] | None = None,
    *,
    budget: str | None = None,
    data: str = _DATA,
    catalogue: Mapping[str, Experiment] | None = None,
) -> list[Kept]:
    """Pack the cells of run folders into `out`, one file for each experiment.

    Only cells of the present code, of one budget (the largest unless named) and of one data set;
    they replace those of the same budget there, and others stay. A file that would be too large is
    thinned (see `_runs.thin`) as far as its verdicts stay the same. Nothing is written unless all
    experiments can be accepted. Folders that hold variations go, lean, into `out`/robustness;
    those of a second stage go, lean, beside the rows of the first.

    Raises:
        RunError: a folder cannot be read, or what is kept there.
        ValueError: an unknown experiment, rows of other code, no rows, a rule that is not
            committed, or rows that do not fit.
    """
    known = experiments() if catalogue is None else catalogue
    cells = _runs.read_cells(paths)
    held = sorted({cell.spec["experiment"] for cell in cells} & known.keys())
    chosen = choose(held if ids is None else ids, known)
    kinds = {cell.spec["budget"] for cell in cells}
    if budget is None and kinds and kinds <= set(VARIATIONS):
        return _accept_variations(cells, chosen, out / _holds.FOLDER, data)
    ready = []
    for experiment in chosen:
        own = [cell for cell in cells if cell.spec["experiment"] == experiment.id]
        new = _acceptable(experiment, own, budget, data)
        if new[0].spec["budget"] == SECOND:
            new = [cell._replace(rows=_lean(cell.rows)) for cell in new]
        file = out / f"{experiment.id}.jsonl.gz"
        old = _runs.read_packed(file) if file.exists() else []
        ready.append((experiment, new, *_fitting(experiment, _merged(old, new), catalogue)))
    if not ready:
        raise ValueError(
            f"Rows on {data} were expected in {', '.join(map(str, paths))}, but there are none. "
            "Run the experiments first: gammabeta study run."
        )
    for experiment, _, _, _ in ready:
        _provenance.commits(experiment.CLAIMS)  # says before anything is written what is wrong
    out.mkdir(parents=True, exist_ok=True)
    found = []
    for experiment, new, contents, thinned in ready:
        path = _runs.write_packed(out, experiment.id, contents)
        oldest = min(_made(cell) for cell in new)
        _provenance.record(out, experiment.CLAIMS, oldest)
        groups = status(paths, [experiment.id], catalogue=catalogue)
        mine = [g for g in groups if (g.budget, g.data) == (new[0].spec["budget"], data)]
        count = len(_runs.read_packed(path))
        unfinished = sum(group.missing + group.failed for group in mine)
        found.append(Kept(experiment.id, path, count, len(contents), thinned, unfinished))
    return found


def _accept_variations(
    cells: Sequence[StoredCell], chosen: Sequence[Experiment], out: Path, data: str
) -> list[Kept]:
    """Pack cells of variations; of the variations that they are of they replace what is there."""
    ready = []
    for experiment in chosen:
        own = [cell for cell in cells if cell.spec["experiment"] == experiment.id]
        new = [
            cell
            for variation in VARIATIONS
            if any(cell.spec["budget"] == variation for cell in own)
            for cell in _acceptable(experiment, own, variation, data)
        ]
        file = out / f"{experiment.id}.jsonl.gz"
        old = _runs.read_packed(file) if file.exists() else []
        merged = _merged(old, new)
        lean = [cell._replace(rows=_lean(cell.rows)) for cell in merged]
        contents = _runs.pack(lean, gammabeta.__version__)
        statuses = [[v.status for v in found] for found in _judged(experiment, lean)]
        if statuses != [[v.status for v in found] for found in _judged(experiment, merged)]:
            raise ValueError(
                f"{experiment.id}: rows with {_DIGITS} digits must give the same verdicts, but "
                "give others. Keep more digits."
            )
        ready.append((experiment, contents, len(merged)))
    found = []
    for experiment, contents, count in ready:
        path = _runs.write_packed(out, experiment.id, contents)
        found.append(Kept(experiment.id, path, count, len(contents), 0, 0))
    return found


def _lean(rows: Sequence[Row]) -> list[Row]:
    """What verdicts are made of, with few digits; a cell keeps one row at least."""
    kept = [row for row in rows if row.get("kind") not in _FIGURE_ROWS] or list(rows[:1])
    return [
        {k: float(f"{v:.{_DIGITS}g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in kept
    ]


def _acceptable(
    experiment: Experiment, cells: Sequence[StoredCell], budget: str | None, data: str
) -> list[StoredCell]:
    chosen = select(cells, experiment.code_of, budget, data).cells
    if chosen and chosen[0].spec["budget"] == BRIEF:
        raise ValueError(
            f"{experiment.id}: accepted rows decide, and those of the budget {BRIEF} are a quick "
            "look. Run it with the budget small."
        )
    if not chosen:
        of = f" with the budget {budget}" if budget else ""
        raise ValueError(
            f"{experiment.id}: rows on {data}{of} were expected, but there are none. Only {_DATA} "
            "decides; the bundled digits are a demonstration."
        )
    if chosen[0].spec["code"] != experiment.code_of(chosen[0].spec["budget"]):
        raise ValueError(
            f"{experiment.id}: rows of the present code were expected, got those of other code. "
            "Make them again first: gammabeta study run --refresh."
        )
    return chosen


def _made(cell: StoredCell) -> float:
    spec = cell.path / "spec.json"
    return (spec if spec.exists() else cell.path.parent).stat().st_mtime


def _merged(old: Sequence[StoredCell], new: Sequence[StoredCell]) -> list[StoredCell]:
    def group(cell: StoredCell) -> tuple[str, str]:
        return cell.spec["budget"], cell.spec["data"]["name"]

    replaced = set(map(group, new))
    return [*(cell for cell in old if group(cell) not in replaced), *new]


def _fitting(
    experiment: Experiment,
    cells: Sequence[StoredCell],
    catalogue: Mapping[str, Experiment] | None,
) -> tuple[bytes, int]:
    """The contents of the file, and to how many steps it had to be thinned."""
    contents = b""
    for most in _THINNED:
        fewer = [c._replace(rows=_runs.thin(c.rows, most)) for c in cells] if most else cells
        contents = _runs.pack(fewer, gammabeta.__version__, most)
        if len(contents) <= _runs.MAX_PACKED:
            if most and _answers(experiment, fewer) != _answers(experiment, cells):
                break
            return contents, most
    raise ValueError(
        f"{experiment.id}: the rows must fit {_runs.MAX_PACKED:,} bytes with the same verdicts, "
        f"but thinned to {most} steps they take {len(contents):,}, or give others. Measure fewer "
        "columns or steps."
    )


def _answers(experiment: Experiment, cells: Sequence[StoredCell]) -> list[object]:
    return [v.to_json() for found in _judged(experiment, cells) for v in found]


def _judged(experiment: Experiment, cells: Sequence[StoredCell]) -> list[list[Verdict]]:
    """The verdicts of each budget."""
    found = []
    for budget in (*BUDGETS, *VARIATIONS):
        rows = [row for cell in cells if cell.spec["budget"] == budget for row in cell.flat()]
        found += [experiment.judge(rows)] if rows else []
    return found


# --- the page -------------------------------------------------------------------------------


def page(folder: Path, catalogue: Mapping[str, Experiment] | None = None, data: str = _DATA) -> str:
    """docs/verdicts.md, made from kept rows; the same rows and rules give the same text.

    Raises:
        RunError: the folder cannot be read; ValueError: a rule is not committed.
    """
    from gammabeta.studies import _page

    cells = [cell for cell in _runs.read_cells([folder]) if cell.spec["data"]["name"] == data]
    # Without the notes on other code: the page is of these rows, whatever came after them.
    found = judge([folder], data=data, notes=False, catalogue=catalogue)
    rules = _provenance.record(folder, dict.fromkeys(v.claim for v in found.verdicts))
    return _page.write(cells, found, rules)
