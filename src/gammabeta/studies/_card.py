"""One claim in full: what the registry, its experiment and the rows say of it."""

import inspect
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
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
    `make` and `dispute` are commands. `about` is the protocol without the paragraphs that are about
    other claims alone.
    """

    claim: Claim
    protocol: str
    rule: Rule | None
    verdict: Verdict | None
    rows: list[Path]
    make: str | None
    dispute: str | None
    missing: list[str]
    about: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        value = self._asdict() | {
            "claim": self.claim._asdict() | {"thresholds": dict(self.claim.thresholds)},
            "rule": self.rule and self.rule._asdict(),
            "verdict": self.verdict and self.verdict.to_json(),
            "rows": [str(path) for path in self.rows],
        }
        del value["about"]
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
    experiment = experiments()[claim.experiment]
    protocol = inspect.cleandoc(experiment.protocol)
    return Card(
        claim,
        protocol,
        rule,
        verdict,
        rows,
        make,
        _dispute(claim, verdict, rows) if verdict else None,
        missing,
        _about(claim.id, experiment.CLAIMS, protocol),
    )


def _about(own: str, ids: Iterable[str], protocol: str) -> str:
    """A protocol without the entries of other claims; all of it where the claim has no entry.

    An entry begins with the claim's id and ends where another begins, a paragraph ends, or the
    lines that are indented below it end.
    """
    names = "|".join(map(re.escape, ids))
    begins = re.compile(rf"( *)({names})(?=[.,]| \(|  |$)")
    kept: list[str] = []
    found = skip = False
    first = deeper = 0  # the entry's indent, and whether its lines are indented below it
    for line in protocol.splitlines():
        indent = len(line) - len(line.lstrip())
        if entry := begins.match(line):
            found = found or entry[2] == own
            skip, first, deeper = entry[2] != own, indent, -1
        elif not line:
            skip = False
        elif deeper == -1:
            deeper = indent > first
        elif deeper and indent <= first:
            skip = False
        if not skip and (line or (kept and kept[-1])):
            kept.append(line)
    return "\n".join(kept).strip("\n") if found else protocol


class Disputed(NamedTuple):
    """One claim by two rules: the registry's `before`, another one `after`."""

    claim: Claim
    before: Verdict
    after: Verdict


def disputed(paths: Sequence[Path], rules: Mapping[str, Mapping[str, float]]) -> list[Disputed]:
    """The claims whose thresholds `rules` changes, then those whose verdict changes with them.

    Raises:
        RunError: a folder cannot be read.
        ValueError: there are no rows of a claim.
        RuntimeError: a claim cannot be judged by this rule.
    """
    known = _claims.claims()
    own = dict.fromkeys(e for claim in rules if (e := known[claim].experiment))
    ids = _with_family([known[claim] for claim in rules])
    files = [file for path in paths for file in _files(path, ids)]
    before = {v.claim: v for v in judge(files, ids).verdicts}
    with _claims.overruled(rules):
        after = {v.claim: v for v in judge(files, ids).verdicts}
    for claim in rules:
        if claim not in before:
            raise ValueError(
                f"There are no rows of {claim} in {', '.join(map(str, paths))}. "
                f"`gammabeta study run {claim}` makes them."
            )
    also = [
        claim
        for claim, verdict in before.items()
        if claim not in rules and _said(verdict) != _said(after[claim])
    ]
    also.sort(key=lambda claim: before[claim].experiment not in own)
    return [Disputed(known[claim], before[claim], after[claim]) for claim in (*rules, *also)]


def _said(verdict: Verdict) -> tuple[str | None, str]:
    return verdict.published_status, verdict.status


def _with_family(asked: Sequence[Claim]) -> list[str]:
    """The experiments of claims; Holm's correction needs what all headline claims gave."""
    family = _claims.claims().values() if any(claim.headline for claim in asked) else ()
    both = (*asked, *(claim for claim in family if claim.headline))
    return list(dict.fromkeys(claim.experiment for claim in both if claim.experiment))


def _files(path: Path, ids: Sequence[str]) -> list[Path]:
    """Of kept rows the files of these experiments; a run folder as it is."""
    files = _runs.packed_files(path if path.is_dir() else path.parent)
    return [f for f in files if f.name.partition(".")[0] in ids] or [path]


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
    ids = _with_family([claim])
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
