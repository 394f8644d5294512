"""One claim in full: what the registry, its experiment and the rows say of it."""

import inspect
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gammabeta
from gammabeta import _runs
from gammabeta.studies import _claims, _provenance
from gammabeta.studies._claims import Claim
from gammabeta.studies._experiments import BRIEF, BUDGETS, VARIATIONS, experiments
from gammabeta.studies._judge import judge, plain
from gammabeta.studies._provenance import Rule
from gammabeta.studies._status import status
from gammabeta.studies._verdict import Verdict


class Card(NamedTuple):
    """What there is to know; `verdict` is None where there are no rows, `missing` says what is.

    `rule` is where the rule comes from, for accepted rows; `rows` are the paths that were judged;
    `make` and `dispute` are commands.
    """

    claim: Claim
    protocol: str
    rule: Rule | None
    verdict: Verdict | None
    rows: list[Path]
    make: str | None
    dispute: str | None
    missing: list[str]

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        value = self._asdict() | {
            "claim": self.claim._asdict() | {"thresholds": dict(self.claim.thresholds)},
            "rule": self.rule and self.rule._asdict(),
            "verdict": self.verdict and self.verdict.to_json(),
            "rows": [str(path) for path in self.rows],
        }
        found: dict[str, Any] = plain(value)
        return found


def card(claim: Claim, paths: Sequence[Path] | None = None, newest: Path | None = None) -> Card:
    """All about a claim, from the rows in `paths`.

    Without paths the accepted rows in results/ are taken (here, or beside the sources), else those
    of the run folder `newest`.

    Raises:
        RunError: a folder cannot be read.
    """
    if claim.experiment is None:
        missing = ["No experiment decides this claim yet."]
        return Card(claim, "", None, None, [], None, None, missing)
    rows = list(paths) if paths else _rows(claim.experiment, newest)
    verdict, missing = _judged(claim, rows)
    budget = verdict.budget if verdict else "small"
    data = f" --data {verdict.data}" if verdict else ""
    how = "--variant" if budget in VARIATIONS else "--budget"
    make = f"gammabeta study run {claim.id} {how} {budget}{data} -o runs/{claim.id}"
    homes = [path if path.is_dir() else path.parent for path in rows]
    rules = [_provenance.recorded(home).get(claim.id) for home in homes]
    rule = next(filter(None, rules), None)
    if rule is not None and rule.digest != _provenance.digest(claim):
        rule = rule._replace(amended=True)  # since the rows were accepted
    return Card(
        claim,
        inspect.cleandoc(experiments()[claim.experiment].protocol),
        rule,
        verdict,
        rows,
        make,
        _dispute(claim, verdict, rows) if verdict else None,
        missing,
    )


def _rows(experiment: str, newest: Path | None) -> list[Path]:
    """The accepted rows of an experiment, else the run folder if it has any of it."""
    beside = Path(gammabeta.__file__).resolve().parents[2] / "results"
    for folder in (Path("results"), beside):
        for file in _runs.packed_files(folder):
            if file.name.partition(".")[0] == experiment:
                return [file]
    if newest is not None and (newest / "cells" / experiment).is_dir():
        return [newest]
    return []


def _judged(claim: Claim, rows: list[Path]) -> tuple[Verdict | None, list[str]]:
    """The verdict, and what is missing to it."""
    own = claim.experiment
    if own is None or not rows:
        return None, [
            f"There are no rows of the experiment {own}: neither accepted ones in results/ nor a "
            "run below runs/."
        ]
    ids = [own]
    paths = rows
    if claim.headline:  # Holm's correction needs what the other headline claims gave
        family = [c.experiment for c in _claims.claims().values() if c.headline and c.experiment]
        ids = list(dict.fromkeys([own, *family]))
        paths = [file for path in rows for file in _beside(path, ids)]
    found = [v for v in judge(paths, ids).verdicts if v.claim == claim.id]
    if not found:
        where = ", ".join(map(str, rows))
        return None, [f"There are no rows of the experiment {own} in {where}."]
    verdict = found[0]
    missing = []
    for entry in status(rows, [own]):
        if (entry.budget, entry.data) == (verdict.budget, verdict.data) and entry.missing:
            missing.append(f"{entry.missing} cells that the experiment wants are not there.")
    if verdict.published_status is None:
        missing.append(
            "A verdict as published: the source has no setting of its own, or it was not run."
        )
    if verdict.data != "mnist":
        missing.append("A verdict: rows on the bundled digits are a demonstration.")
    elif verdict.budget == BUDGETS[0]:
        missing.append(f"A verdict: the budget {verdict.budget} decides nothing.")
    if verdict.budget == BRIEF:
        missing.append("An accepted verdict: these rows are a quick look.")
    return verdict, missing


def _beside(path: Path, ids: Sequence[str]) -> list[Path]:
    """Of a file of accepted rows those beside it, of these experiments; else the path itself."""
    if path.is_dir() or not _runs.packed_files(path):
        return [path]
    return [f for f in _runs.packed_files(path.parent) if f.name.partition(".")[0] in ids]


def _dispute(claim: Claim, verdict: Verdict, rows: Sequence[Path]) -> str:
    """The command that judges the same rows by another rule, or asks for more of them."""
    keys = sorted(claim.thresholds, key=lambda key: key != "delta")
    if not keys:
        return f"gammabeta study run {claim.id} --budget {BUDGETS[-1]} -o runs/{claim.id}"
    factor = 2 if verdict.status == "supported" else 0.5
    value = f"{claim.id}.{keys[0]}={claim.thresholds[keys[0]] * factor:.4g}"
    where = " ".join(shlex.quote(str(path)) for path in rows)
    return f"gammabeta study judge {where} --set {shlex.quote(value)}"
