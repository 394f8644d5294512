"""From stored rows to verdicts and figures: pure reading, which may be done again at any time."""

import dataclasses
import inspect
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gammabeta
from gammabeta import _runs
from gammabeta._runs import Row, StoredCell
from gammabeta.studies import _data
from gammabeta.studies._experiments import (
    AGAIN,
    BRIEF,
    BUDGETS,
    VARIATIONS,
    Experiment,
    choose,
    experiments,
)

if TYPE_CHECKING:
    from gammabeta.studies._verdict import Verdict

_MOST_SURPRISES = 3
_LEVEL = 0.05
_TESTED = ("supported", "refuted", "mixed", "inconclusive")
_HOW = (
    "An upper bound, for claims none of which is true: 5 % for each statistical claim outside of "
    "the headline family that was judged (superiority errs at 2.5 %, equivalence and number at "
    "5 %), and 5 % for that family as a whole (Holm). A claim with a second stage was tested twice "
    "and counts twice. Fair verdicts only."
)
_HOW_IN_BRIEF = (
    "An upper bound, for claims none of which is true: 5 % for each claim that was judged, since "
    "nothing is corrected here for their number."
)


class Multiplicity(NamedTuple):
    """What testing many claims at once does to the word "supported".

    `family` has p and Holm's p for each headline claim, None for one that gave no p (it counts
    as 1). `expected_false` bounds the expected number of false "supported"; `how` says how.
    """

    family: dict[str, tuple[float | None, float | None]]
    expected_false: float
    supported: int
    how: str

    def to_json(self) -> dict[str, Any]:
        plain = {claim: {"p": p, "p_holm": adj} for claim, (p, adj) in self.family.items()}
        return {**self._asdict(), "family": plain}


class Judged(NamedTuple):
    """What stored rows say."""

    verdicts: "list[Verdict]"
    figures: list[dict[str, Any]]
    surprises: list[str]
    notice: str | None
    protocols: dict[str, str]  # experiment -> its protocol in plain words
    multiplicity: Multiplicity | None = None  # None: nothing was tested
    varied: Mapping[str, Mapping[str, str]] = {}  # claim -> variation -> status there


class Selection(NamedTuple):
    """The cells of one experiment that may be judged together, and what was left aside."""

    cells: list[StoredCell]
    notes: list[str]

    def rows(self) -> list[Row]:
        return [row for cell in self.cells for row in cell.flat()]


def select(
    cells: Sequence[StoredCell],
    code: str | Callable[[str], str],
    budget: str | None = None,
    data: str | None = None,
) -> Selection:
    """Choose the cells of one experiment that were made alike: one budget, data set and code.

    `code` is that of the present code, or what tells it from the budget.

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
    code = code if isinstance(code, str) else code(best[1])
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
    files = {
        spec if (spec := cell.path / "spec.json").exists() else cell.path.parent for cell in cells
    }
    return max(file.stat().st_mtime for file in files)


def judge(
    paths: Sequence[Path],
    ids: Sequence[str] | None = None,
    *,
    budget: str | None = None,
    data: str | None = None,
    notes: bool = True,
    catalogue: Mapping[str, Experiment] | None = None,
) -> Judged:
    """Judge what is stored in run folders; nothing is written.

    Args:
        paths: run folders; a cell that lies in several counts once.
        ids: experiments; all that have cells there if None. One without cells has no verdict.
        budget, data: judge only the cells of this budget, of this data set ("mnist", "digits").
        notes: say with each verdict which cells were left aside, and which code made the others.
        catalogue: experiments by id, in place of the package's own.

    Raises:
        RunError: a run folder cannot be read.
        ValueError: an unknown experiment.
    """
    from gammabeta.studies import _headline, _holds, _second

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
        own, fresh = _second.apart(stored[experiment.id])
        selection = select(own, experiment.code_of, budget, data)
        if not selection.cells:
            continue
        rows = selection.rows()
        first = experiment.judge(rows)
        for verdict in _second.judged(experiment, selection.cells, fresh, first):
            also = selection.notes if notes else []
            verdicts.append(dataclasses.replace(verdict, notes=[*verdict.notes, *also]))
        figures += experiment.figures(rows)
        protocols[experiment.id] = inspect.cleandoc(experiment.protocol)
        if selection.cells[0].spec["data"]["name"] == "digits":
            notice = f"{_data.DIGITS_NOTICE} {_data.HOW_TO_GET_MNIST}"
    verdicts, counted = corrected(verdicts)
    if any(verdict.budget == BRIEF for verdict in verdicts):
        notice = " ".join(filter(None, (_headline.NOTICE, notice)))
    varied = _varied(_holds.folders(paths), verdicts, catalogue)
    if all(verdict.budget in BUDGETS for verdict in verdicts):
        verdicts = _holds.certain(verdicts, varied)
    return Judged(verdicts, figures, surprises(verdicts), notice, protocols, counted, varied)


def _varied(
    folders: Sequence[Path],
    verdicts: "Sequence[Verdict]",
    catalogue: Mapping[str, Experiment] | None,
) -> dict[str, dict[str, str]]:
    """The status of each headline claim in each variation, where rows of it were kept."""
    ids = list(dict.fromkeys(verdict.experiment for verdict in verdicts if verdict.data == "mnist"))
    found: dict[str, dict[str, str]] = {}
    for variation in VARIATIONS if folders else ():
        for verdict in judge(
            folders, ids, budget=variation, data="mnist", catalogue=catalogue
        ).verdicts:
            found.setdefault(verdict.claim, {})[variation] = verdict.status
    return found


def corrected(verdicts: "Sequence[Verdict]") -> "tuple[list[Verdict], Multiplicity | None]":
    """Holm's correction over the headline claims, and how many false "supported" to expect.

    The family is always all headline claims of the registry; those that were not judged, or gave
    no p, count with p = 1. One that is supported alone but not after the correction becomes
    inconclusive. All other claims stand unadjusted, and so do all in brief and in variations
    but for that with fresh seeds, which repeats the whole.
    """
    from gammabeta.studies._claims import claims
    from gammabeta.studies._verdict import holm

    known = claims()
    tested = [v for v in verdicts if v.status in _TESTED and v.claim in known]
    if not tested:
        return list(verdicts), None
    own = {v.claim: _p(v) for v in tested if known[v.claim].headline}
    family = [claim.id for claim in known.values() if claim.headline]
    adjusted = holm({claim: 1.0 if (p := own.get(claim)) is None else p for claim in family})
    pairs = {
        claim: (own.get(claim), None if own.get(claim) is None else adjusted[claim])
        for claim in family
    }
    if tested[0].budget not in (*BUDGETS, AGAIN):
        count = sum(verdict.status == "supported" for verdict in verdicts)
        bound = round(_LEVEL * len(tested), 3)
        return list(verdicts), Multiplicity(pairs, bound, count, _HOW_IN_BRIEF)
    found = []
    for verdict in verdicts:
        p = own.get(verdict.claim)
        if verdict.status == "supported" and verdict.claim in own:
            note = f"one of {len(family)} headline claims"
            if p is None:
                note = f"As {note} it needs a p-value, and has none: Holm's correction is not made."
            else:
                note = f"Holm's correction as {note}: p = {p:.2g}, {adjusted[verdict.claim]:.2g}."
            verdict = dataclasses.replace(verdict, notes=[*verdict.notes, note])
            if p is not None and adjusted[verdict.claim] >= _LEVEL:
                sentence = (
                    f"Undecided after Holm's correction over the {len(family)} headline claims. "
                    f"Alone: {verdict.sentence}"
                )
                verdict = dataclasses.replace(verdict, status="inconclusive", sentence=sentence)
        found.append(verdict)
    others = sum(
        not known[v.claim].headline and known[v.claim].kind == "statistical" for v in tested
    )
    again = sum(v.stage > 1 for v in tested)
    bound = round(_LEVEL * (others + again + bool(own)), 3)
    return found, Multiplicity(pairs, bound, sum(v.status == "supported" for v in found), _HOW)


def _p(verdict: "Verdict") -> float | None:
    """The verdict's own p; without one, that of fair cells whose intervals all lie above 0."""
    from gammabeta.studies._verdict import p_of_interval

    if verdict.p is not None:
        return verdict.p
    found = []
    for cell in verdict.cells:
        if cell.get("part") == "fair":
            mean, lo, hi = cell.get("effect"), cell.get("lo"), cell.get("hi")
            if mean is None or lo is None or hi is None or not lo > 0:
                return None
            found.append(p_of_interval(mean, lo, hi, cell["n"]))
    return max(found, default=None)


def sign_flipped(
    cells: Sequence[StoredCell], key: str, chance: random.Random, beside: Sequence[str] = ("rate",)
) -> list[Row]:
    """Rows in which each pair of cells has changed places or not, by chance.

    A pair is two cells that differ in the arm's `key`, and at most in `beside`: the same as
    flipping the sign of their difference. Groups that are no pairs (a search over rates) stay.
    Where a judge finds "supported" in more than 5 % of such draws, it errs.

    Args:
        key: what tells the two arms of a pair apart, such as "norm".
        chance: draws; seeded, so that a failure can be repeated.
        beside: what may differ as well, such as each arm's own best learning rate.
    """
    groups: dict[str, list[StoredCell]] = defaultdict(list)
    for cell in cells:
        arm = {k: v for k, v in cell.spec["arm"].items() if k != key and k not in beside}
        groups[json.dumps([cell.spec["seed"], arm], sort_keys=True)].append(cell)
    rows: list[Row] = []
    for group in groups.values():
        values = {cell.spec["arm"].get(key) for cell in group}
        if len(group) == 2 and len(values) == 2 and chance.random() < 0.5:
            first, second = group
            group = [first._replace(rows=second.rows), second._replace(rows=first.rows)]
        rows += [row for cell in group for row in cell.flat()]
    return rows


def surprises(verdicts: "Sequence[Verdict]") -> list[str]:
    """Up to three sentences about what a reader would not have expected, the strongest first.

    A verdict that is the opposite once the comparison is made fair, above all with an effect on the
    other side of zero; an effect whose interval lies there; a verdict that turns otherwise; a claim
    that is refuted; an effect on the other side of zero whose interval includes it; of equals the
    headline claims. The sign counts only where a claim says which it should be and does not hold.
    One sentence for each claim.
    """
    from gammabeta.studies._claims import claims

    headline = {claim.id for claim in claims().values() if claim.headline}
    found: list[tuple[int, str]] = []
    for verdict in sorted(verdicts, key=lambda verdict: verdict.claim not in headline):
        sentence = verdict.sentence
        signed = verdict.status not in ("supported", "exact") and _directed(verdict.claim)
        opposite = {verdict.published_status, verdict.status} == {"supported", "refuted"}
        if signed and verdict.ci is not None and verdict.ci[1] < 0:
            rank = 0 if opposite else 2
            found.append((rank, f"{verdict.claim}: the effect points the other way. {sentence}"))
        elif verdict.published_status not in (None, verdict.status):
            turn = f"{verdict.published_status} as published, {verdict.status} in the fair setting"
            found.append((1 if opposite else 3, f"{verdict.claim}: {turn}. {sentence}"))
        elif verdict.status in ("refuted", "fails"):
            found.append((4, f"{verdict.claim}: {verdict.status}. {sentence}"))
        elif signed and verdict.effect is not None and verdict.effect < 0:
            weak = "the effect points the other way, though its interval includes zero"
            found.append((5, f"{verdict.claim}: {weak}. {sentence}"))
    found.sort(key=lambda item: item[0])
    return [sentence for _, sentence in found[:_MOST_SURPRISES]]


def _directed(claim: str) -> bool:
    """Whether the rule of a claim is about the sign of its effect; the registry has the words."""
    from gammabeta.studies._claims import claims

    known = claims()
    if claim not in known:
        return True
    rule = known[claim].rule.lower()
    return "superiority" in rule and "equivalence" not in rule


def write_derived(run: Path, judged: Judged) -> None:
    """Write verdicts.json and figures.json into a run folder, over older ones.

    Raises:
        RunError: an experiment gave a verdict or a figure that lacks a field.
        OSError: the folder cannot be written.
    """
    from gammabeta.studies import _claims

    # a newer format must not be overwritten: reading it says which version reads it
    _runs.read_verdicts(run)
    _runs.read_figures(run)
    head = {"schema": _runs.SCHEMA, "gammabeta": gammabeta.__version__}
    verdicts = {
        **head,
        "verdicts": [plain(verdict.to_json()) for verdict in judged.verdicts],
        "surprises": judged.surprises,
        "notice": judged.notice,
        "protocols": judged.protocols,
        "multiplicity": judged.multiplicity.to_json() if judged.multiplicity else None,
        "varied": judged.varied,  # claim -> variation -> status
    }
    figures = {**head, "figures": plain(judged.figures)}
    _runs.check_verdicts(verdicts, run / "verdicts.json")
    _runs.check_figures(figures, run / "figures.json")
    if _runs.packed_files(run):
        # Beside kept rows there is no registry as it was; that of the verdicts goes with them.
        _runs.write_json(run / "claims.json", {**head, "claims": _claims.public()})
    _runs.write_json(run / "verdicts.json", verdicts)
    _runs.write_json(run / "figures.json", figures)


def plain(value: Any) -> Any:
    """JSON has no infinity: the bound of an interval that is not to be had becomes null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
