"""From stored rows to verdicts and figures: pure reading, which may be done again at any time."""

import dataclasses
import inspect
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gammabeta
from gammabeta import _runs
from gammabeta._runs import Row, StoredCell
from gammabeta.studies import _data
from gammabeta.studies._experiments import BUDGETS, Experiment, choose, experiments

if TYPE_CHECKING:
    from gammabeta.studies._verdict import Verdict

_MOST_SURPRISES = 3


class Judged(NamedTuple):
    """What stored rows say."""

    verdicts: "list[Verdict]"
    figures: list[dict[str, Any]]
    surprises: list[str]
    notice: str | None
    protocols: dict[str, str]  # experiment -> its protocol in plain words


class Selection(NamedTuple):
    """The cells of one experiment that may be judged together, and what was left aside."""

    cells: list[StoredCell]
    notes: list[str]

    def rows(self) -> list[Row]:
        return [row for cell in self.cells for row in cell.flat()]


def select(
    cells: Sequence[StoredCell], code: str, budget: str | None = None, data: str | None = None
) -> Selection:
    """Choose the cells of one experiment that were made alike: one budget, data set and code.

    Where none is named, MNIST goes before the digits and the larger budget before the smaller.
    Of several code digests the present one is taken, else the newest, with a note.
    """
    groups: dict[tuple[str, str, str], list[StoredCell]] = defaultdict(list)
    for cell in cells:
        spec = cell.spec
        if budget in (None, spec["budget"]) and data in (None, spec["data"]["name"]):
            groups[spec["data"]["name"], spec["budget"], spec["data"]["digest"]].append(cell)
    if not groups:
        return Selection([], [])

    def worth(key: tuple[str, str, str]) -> tuple[bool, int, int, str]:
        rank = BUDGETS.index(key[1]) if key[1] in BUDGETS else -1
        return key[0] == "mnist", rank, len(groups[key]), key[2]

    best = max(groups, key=worth)
    notes = [
        f"Not judged here: {len(group)} cells on {name} with the budget {size}."
        for (name, size, digest), group in sorted(groups.items())
        if (name, size, digest) != best
    ]
    by_code: dict[str, list[StoredCell]] = defaultdict(list)
    for cell in groups[best]:
        by_code[cell.spec["code"]].append(cell)
    stale = len(groups[best]) - len(by_code.get(code, []))
    if code in by_code:
        if stale:
            notes.append(f"{stale} cells of other code were left aside.")
        return Selection(by_code[code], notes)
    newest = max(by_code, key=lambda other: (_age(by_code[other]), other))
    notes.append(
        f"These rows were made by other code (digest {newest}) than the present one (digest "
        f"{code}): run the experiment again for rows of the present code."
    )
    return Selection(by_code[newest], notes)


def _age(cells: Iterable[StoredCell]) -> float:
    return max((cell.path / "spec.json").stat().st_mtime for cell in cells)


def judge(
    paths: Sequence[Path],
    ids: Sequence[str] | None = None,
    *,
    budget: str | None = None,
    data: str | None = None,
    catalogue: Mapping[str, Experiment] | None = None,
) -> Judged:
    """Judge what is stored in run folders; nothing is written.

    Args:
        paths: run folders; a cell that lies in several counts once.
        ids: experiments; all that have cells there if None. One without cells has no verdict.
        budget, data: judge only the cells of this budget, of this data set ("mnist", "digits").
        catalogue: experiments by id, in place of the package's own.

    Raises:
        RunError: a run folder cannot be read.
        ValueError: an unknown experiment.
    """
    known = experiments() if catalogue is None else catalogue
    stored: dict[str, list[StoredCell]] = defaultdict(list)
    for cell in _runs.read_cells(paths):
        stored[cell.spec["experiment"]].append(cell)
    chosen = choose([key for key in stored if key in known] if ids is None else ids, known)
    verdicts: list[Verdict] = []
    figures: list[dict[str, Any]] = []
    notice = None
    protocols: dict[str, str] = {}
    for experiment in chosen:
        if experiment.id not in stored:
            continue
        selection = select(stored[experiment.id], experiment.code, budget, data)
        if not selection.cells:
            continue
        rows = selection.rows()
        for verdict in experiment.judge(rows):
            notes = [*verdict.notes, *selection.notes]
            verdicts.append(dataclasses.replace(verdict, notes=notes))
        figures += experiment.figures(rows)
        protocols[experiment.id] = inspect.cleandoc(experiment.protocol)
        if selection.cells[0].spec["data"]["name"] == "digits":
            notice = f"{_data.DIGITS_NOTICE} {_data.HOW_TO_GET_MNIST}"
    return Judged(verdicts, figures, surprises(verdicts), notice, protocols)


def surprises(verdicts: "Sequence[Verdict]") -> list[str]:
    """Up to three sentences about what a reader would not have expected, the strongest first.

    An effect whose interval lies on the other side of zero; a verdict that turns when the
    comparison is made fair; a claim that is refuted; an effect on the other side of zero whose
    interval includes it. One sentence for each claim.
    """
    found: list[tuple[int, str]] = []
    for verdict in verdicts:
        sentence = verdict.sentence
        if verdict.ci is not None and verdict.ci[1] < 0:
            found.append((0, f"{verdict.claim}: the effect points the other way. {sentence}"))
        elif verdict.published_status not in (None, verdict.status):
            turn = f"{verdict.published_status} as published, {verdict.status} in the fair setting"
            found.append((1, f"{verdict.claim}: {turn}. {sentence}"))
        elif verdict.status in ("refuted", "fails"):
            found.append((2, f"{verdict.claim}: {verdict.status}. {sentence}"))
        elif verdict.effect is not None and verdict.effect < 0:
            weak = "the effect points the other way, though its interval includes zero"
            found.append((3, f"{verdict.claim}: {weak}. {sentence}"))
    found.sort(key=lambda item: item[0])
    return [sentence for _, sentence in found[:_MOST_SURPRISES]]


def write_derived(run: Path, judged: Judged) -> None:
    """Write verdicts.json and figures.json into a run folder, over older ones.

    Raises:
        RunError: an experiment gave a verdict or a figure that lacks a field.
        OSError: the folder cannot be written.
    """
    # a newer format must not be overwritten: reading it says which version reads it
    _runs.read_verdicts(run)
    _runs.read_figures(run)
    head = {"schema": _runs.SCHEMA, "gammabeta": gammabeta.__version__}
    verdicts = {
        **head,
        "verdicts": [_plain(verdict.to_json()) for verdict in judged.verdicts],
        "surprises": judged.surprises,
        "notice": judged.notice,
        "protocols": judged.protocols,
    }
    figures = {**head, "figures": _plain(judged.figures)}
    _runs.check_verdicts(verdicts, run / "verdicts.json")
    _runs.check_figures(figures, run / "figures.json")
    _runs.write_json(run / "verdicts.json", verdicts)
    _runs.write_json(run / "figures.json", figures)


def _plain(value: Any) -> Any:
    """JSON has no infinity: the bound of an interval that is not to be had becomes null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
