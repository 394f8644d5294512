"""From the numbers of the experiment on covariate shift to the verdicts of its claims."""

import dataclasses
import statistics
from collections.abc import Sequence

from gammabeta._runs import Row
from gammabeta.studies._answer import PLACES
from gammabeta.studies._claims import claims
from gammabeta.studies._covariate_shift import exact
from gammabeta.studies._covariate_shift.contrasts import (
    Runs,
    column,
    contrasts,
    real,
)
from gammabeta.studies._covariate_shift.rules import question
from gammabeta.studies._draws import PILOT_SEEDS, Question, verdict
from gammabeta.studies._draws import planned as asked_for
from gammabeta.studies._draws import values as draws_by_cell
from gammabeta.studies._pairs import Tuning
from gammabeta.studies._verdict import Verdict, half_width, interval

NAMES = {"none": "none", "bn": "BN", "noisy": "noisy BN", "noise": "noise", "frozen": "frozen",
         "clean": "clean", "random": "random", "final": "constant", "slow": "slow"}  # fmt: skip
EPS = 2.0**-52


def _values(claim: str, runs: Runs, like: Row) -> list[Row]:
    """The contrasts of a claim as rows of draws."""
    head = {"budget": like["budget"], "data": like["data"], "kind": "value"}
    found = [
        {**head, "seed": seed, "cell": name, "value": value}
        for name, by_seed in contrasts(claim, runs, target_loss()).items()
        for seed, value in by_seed.items()
    ]
    return found or [head | {"kind": "none", "seed": 0}]


def drawn(claim: str, runs: Runs, like: Row, notes: list[str]) -> Verdict:
    """The verdict of a claim whose numbers are draws."""
    values = _values(claim, runs, like)
    ask = question(claim)
    if claim != "gamma-beta-shift":
        found = verdict(ask, "covariate-shift", values, notes=notes)
    else:
        # Between the two bounds nothing is decided, though the interval lies below the upper one.
        (name,) = ask.targets
        x = draws_by_cell(values).get(name, [])
        t = claims()[claim].thresholds
        between = len(x) > 1 and interval(x).hi >= t["lost"] and interval(x).lo <= t["kept"]
        undecided = ("",) if between else ()
        found = verdict(ask, "covariate-shift", values, notes=notes, undecided=undecided)
        if between:
            said = {"status": "inconclusive", "reason": f"not below {t['lost']:g}"}
            cells = [c | (said if c["name"] == name and c["status"] == "refuted" else {})
                     for c in found.cells]  # fmt: skip
            found = dataclasses.replace(found, cells=cells)
    found = _primary(found, next(iter(ask.targets)), ask, values)
    if ask.published == {} and claim in ("gamma-beta-shift", "constant-dist", "cross-layer-stats"):
        # Argued in a text, not measured: there is no setting that could be tried.
        own = [n for n in found.notes if not n.startswith("The source trained other networks")]
        found = dataclasses.replace(found, notes=own)
    return found


def _primary(found: Verdict, name: str, ask: Question, values: Sequence[Row]) -> Verdict:
    """The verdict with the effect of its primary contrast, not of the cell nearest to its limit."""
    draws = {pilot: draws_by_cell(values, pilot=pilot).get(name, []) for pilot in (False, True)}
    if len(draws[False]) < 2:
        return dataclasses.replace(found, effect=None, ci=None, half_width=None)
    i, count = interval(draws[False]), asked_for(ask, values)
    foreseen = half_width(interval(draws[True]).sd, count) if count else None
    return dataclasses.replace(
        found,
        effect=i.mean,
        ci=(i.lo, i.hi),
        half_width=i.half_width,
        planned_half_width=foreseen,
    )


def notes_of(claim: str, group: str, tuning: Tuning, runs: Runs, *, decides: bool) -> list[str]:
    notes = []
    if tuning.best is not None:
        said = ", ".join(f"{NAMES[arm]} {rate:g}" for arm, rate in tuning.best.items())
        notes.append(f"Learning rates: {said}.")
    if tuning.missing:
        notes.append(f"Missing: {tuning.missing} tuning runs.")
    elif tuning.at_edge and decides:
        named = ", ".join(NAMES[arm] for arm in tuning.at_edge)
        notes.append(f"The best rate is at the end of all that is tried: {named}.")
    for (of, arm), by_seed in runs.main.items():
        late = sum(any(bool(row.get("diverged")) for row in run)
                   for seed, run in by_seed.items() if seed not in PILOT_SEEDS)  # fmt: skip
        if of == group and late:
            notes.append(f"Runs with a loss that was not finite ({NAMES.get(arm, arm)}): {late}.")
    if claim == "ics-reduced":
        for arm in ("none", "bn"):
            main = [r for s, r in runs.main.get(("deep", arm), {}).items() if s not in PILOT_SEEDS]
            never = sum(min(column(r, "fixed_loss"), default=0.0) > target_loss() for r in main)
            if never:
                notes.append(
                    f"Did not reach the loss of {target_loss():g} ({NAMES[arm]}): {never}."
                )
    if claim == "ics-gradient":
        for arm in ("none", "bn"):
            main = list(runs.main.get(("linear", arm), {}).values())
            rates = [real(r[0]["rate_found"]) for r in main if r]
            if rates:
                at = statistics.geometric_mean(rates)
                late = sum(not r[0]["halved"] for r in main if r)
                said = f"; not halved in the search: {late}" if late else ""
                notes.append(f"Linear network, {NAMES[arm]}: mean rate {at:.2g}{said}.")
    return notes


def consistent(noisy: Verdict) -> Verdict:
    """The claim that noisy-bn contradicts: what refutes one supports the other."""
    by = {cell["name"]: cell["status"] for cell in noisy.cells}
    status = {"supported": "refuted", "demo": "demo"}.get(noisy.status, "inconclusive")
    drifted = by.get("log drift, noisy BN / none") == "supported"
    helped = by.get("accuracy, noisy BN − none")
    if noisy.status == "refuted" and drifted and helped == "refuted":
        status = "supported"
    opening = {"supported": "Yes", "refuted": "No", "demo": "A demonstration, no verdict"}
    said = {
        "supported": "with inconsistent layer inputs batch normalization no longer helps",
        "refuted": "with inconsistent layer inputs batch normalization still helps",
    }.get(status, "it is decided by noisy-bn, which is not decided")
    return dataclasses.replace(
        noisy,
        claim="keep-consistent",
        status=status,
        published_status=None,
        reported=claims()["keep-consistent"].reported,
        sentence=f"{opening.get(status, 'Undecided')}: five hidden layers, "
        f"{PLACES.get(noisy.data, noisy.data)}, {said}.",
        notes=["The opposite of noisy-bn, of whose runs the numbers are.", *noisy.notes],
        p=None,
    )


def exactly(rows: Sequence[Row]) -> Verdict:
    """Of each half the largest error, in units of what rounding allows."""
    t = claims()["stats-by-gamma-beta"].thresholds
    checks = [r for r in rows if r.get("kind") == "check"]
    shares: dict[str, dict[str, list[float]]] = {exact.MARGINAL: {}, exact.JOINT: {}}
    for row in checks:
        share = real(row["error"]) / (t["roundings"] * EPS * real(row["condition"]))
        shares[str(row["half"])].setdefault(str(row["compared"]), []).append(share)

    def said(each: Sequence[float]) -> str:
        if max(each) <= 1:
            return "exact"
        return "fails" if max(each) > t["counterexample"] else "inconclusive"

    halves = {half: {said(v) for v in by.values()} for half, by in shares.items()}
    marginal, joint = (halves[half] for half in (exact.MARGINAL, exact.JOINT))
    if marginal == {"exact"} and joint == {"fails"}:
        status = "mixed"
    elif "fails" in marginal:
        status = "fails"
    else:
        status = "exact" if marginal == joint == {"exact"} else "inconclusive"
    sentence = {
        "mixed": "In part: whatever the weights before, gamma and beta alone set mean and standard "
        "deviation of each unit in training mode; not correlations, higher moments, moments behind "
        "an activation, or anything in eval mode.",
        "fails": "It fails: other weights before a layer change its mean or standard deviation.",
        "exact": "Exact: other weights before a layer change nothing that was compared.",
    }.get(status, "Undecided: the comparisons are missing or in between.")
    examples = {str(r["compared"]): r for r in checks if r["half"] == exact.JOINT}
    notes = [f"{name}: {real(r['before']):.3g} before, {real(r['after']):.3g} after."
             for name, r in examples.items()]  # fmt: skip
    return Verdict(
        claim="stats-by-gamma-beta",
        experiment="covariate-shift",
        status=status,
        published_status=status,
        effect=None,
        ci=None,
        n=len({r["seed"] for r in checks}),
        unit="relative error",
        reported=claims()["stats-by-gamma-beta"].reported,
        budget=str(rows[0]["budget"]),
        data=str(rows[0]["data"]),
        delta=None,
        half_width=None,
        planned_half_width=None,
        sentence=sentence,
        cells=[
            {"name": name, "part": half, "effect": max(each), "lo": None, "hi": None,
             "p_signflip": None, "n": len(each), "status": said(each),
             "reason": "largest error over what rounding allows"}
            for half, by in shares.items()
            for name, each in by.items()
        ],
        notes=[*notes, "Does not depend on the data."],
    )  # fmt: skip


def target_loss() -> float:
    return claims()["ics-reduced"].thresholds["loss"]
