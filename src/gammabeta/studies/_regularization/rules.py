"""From the rows of the experiment on regularization to the verdicts of its claims."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Words, span
from gammabeta.studies._claims import claims
from gammabeta.studies._outcomes import alone, asked_for, beside
from gammabeta.studies._pairs import NORMS, Run, Runs, collect
from gammabeta.studies._regularization import ghosts
from gammabeta.studies._tuned import (
    EQUIVALENCE_SEEDS,
    KEYS,
    LEAST_SEEDS,
    MOST_SEEDS,
    Tuned,
    complete,
    fair_verdict,
    shown,
)
from gammabeta.studies._verdict import (
    Outcome,
    Verdict,
    controlled,
    equivalence,
    interval,
    lies_above,
    superiority,
)

_CONTRAST = "best dropout − none, with BN"
_CONTROL = "best dropout − none, without BN"
_SMALL = "dropout's effect − 2 × BN's"
_NOISE = "needed share of what BN saves − saved without noise"
_SLOPE, _SAME = "gap per doubling of m", f"noise of {ghosts.NOISY} − BN at m = {ghosts.NOISY}"
NONE, HALF = "no dropout", "0.5 both"


def runs_of(rows: Sequence[Row]) -> Runs:
    """Runs by ``KEYS``; those of group "noise" have minus the area in the place of accuracy."""
    runs = collect([row for row in rows if row.get("group") != "noise"], KEYS)
    losses: dict[tuple[Scalar, ...], dict[int, dict[int, Row]]] = {}
    for row in rows:
        if row.get("group") == "noise" and isinstance(row.get("train_loss"), float):
            seed, step = row["seed"], row["step"]
            if isinstance(seed, int) and isinstance(step, int):
                arm = losses.setdefault(tuple(row[key] for key in KEYS), {})
                arm.setdefault(seed, {})[step] = row
    for key, by_seed in losses.items():
        runs[key] = {seed: _area_run(by_step) for seed, by_step in sorted(by_seed.items())}
    return runs


def _area_run(by_step: Mapping[int, Row]) -> Run:
    steps = sorted(by_step)
    losses = [row["train_loss"] for row in by_step.values()]
    area = math.fsum(x for x in losses if isinstance(x, float)) / len(losses)
    return Run(steps[-1:], [-area], [], any(bool(row["diverged"]) for row in by_step.values()))


def doses_of(tuned: Tuned) -> dict[str, str]:
    """The arms with the best dropout, with and without BN, by validation; of equals the first."""
    arms = [arm for arm in tuned.groups["dropout"] if not arm.endswith(NONE)]
    return {
        norm: tuned.champion("dropout", [arm for arm in arms if arm.startswith(norm)])
        for norm in NORMS
    }


def _gain(tuned: Tuned, part: str, norm: str) -> dict[int, float]:
    """Test accuracy, best dropout minus none, by seed."""
    if "dropout" not in tuned.best:
        return {}
    return tuned.minus(part, "dropout", doses_of(tuned)[norm], f"{norm}, {NONE}")


def _effects(tuned: Tuned, part: str) -> dict[str, dict[int, float]]:
    """By how much BN, and by how much dropout of 0.5, makes the gap smaller, by seed."""
    gaps, neither = tuned.gaps(), f"none, {NONE}"
    return {
        "BN": gaps.minus(part, "dropout", neither, f"bn, {NONE}"),
        "dropout": gaps.minus(part, "dropout", neither, f"none, {HALF}"),
    }


def _ghost(tuned: Tuned, part: str) -> dict[str, dict[int, float]]:
    """Slope of the gap over log2 of the ghost size, and the noise arm minus BN, by seed."""
    gaps = tuned.gaps()
    by = {arm: gaps.ended(part, "ghost", arm) for arm in ghosts.ARMS}
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in by.values())))
    x = [math.log2(m) for m in ghosts.SIZES]
    slopes = {
        s: statistics.linear_regression(x, [by[f"m = {m}"][s].final for m in ghosts.SIZES]).slope
        for s in shared
    }
    noise, bn = (by[arm] for arm in (f"noise of {ghosts.NOISY}", f"m = {ghosts.NOISY}"))
    return {_SLOPE: slopes, _SAME: {s: noise[s].final - bn[s].final for s in shared}}


def _small(effects: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    bn, dropout = effects["BN"], effects["dropout"]
    return {s: dropout[s] - 2 * bn[s] for s in sorted(bn.keys() & dropout.keys())}


def _saved(tuned: Tuned, part: str) -> dict[str, dict[int, float]]:
    """Shares of the area of the training loss that BN saves, with its noise and without."""
    none, bn, full = (tuned.ended(part, "noise", arm) for arm in tuned.groups["noise"])
    shared = sorted(none.keys() & bn.keys() & full.keys())
    return {
        name: {s: 1 - by_seed[s].final / none[s].final for s in shared}
        for name, by_seed in (("bn", bn), ("full", full))
    }


def _noise(saved: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    share = claims()["reg-by-noise"].thresholds["share"]
    return {s: share * saved["bn"][s] - saved["full"][s] for s in saved["bn"]}


def planned(tuned: Tuned, group: str) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    limits = {name: claim.thresholds for name, claim in claims().items()}
    if group == "noise":
        pilot = {_NOISE: _noise(_saved(tuned, "pilot"))}
        deltas = {_NOISE: limits["reg-by-noise"]["delta"]}
    elif group == "ghost":
        pilot = _ghost(tuned, "pilot")
        deltas = {_SLOPE: limits["noise-reg"]["delta"], _SAME: limits["noise-reg"]["same"]}
    else:
        pilot = {
            _CONTRAST: _gain(tuned, "pilot", "bn"),
            _SMALL: _small(_effects(tuned, "pilot")),
        }
        deltas = {
            _CONTRAST: limits["no-dropout"]["delta"],
            _SMALL: limits["reg-small"]["delta"],
        }
    return asked_for(pilot, deltas, LEAST_SEEDS, MOST_SEEDS) if complete(pilot) else None


def dropout(tuned: Tuned, size: int) -> list[Verdict]:
    """no-dropout, bn-plus-dropout and reg-small, on so many training images."""
    of = {claim: claims()[claim].thresholds["delta"] for claim in WORDS}
    seeds, notes = planned(tuned, "dropout"), tuned.notes("dropout")
    setting = tuned.setting("regularization", f"MLP 200-200 on {size:,} images")
    gain, without = (_gain(tuned, "fair", norm) for norm in NORMS)
    helped = superiority(without.values(), of["no-dropout"], LEAST_SEEDS)
    told = list(notes)
    if "dropout" in tuned.best:
        doses = {norm: arm.partition(", ")[2] for norm, arm in doses_of(tuned).items()}
        told.append(f"Best dropout: {doses['bn']} with BN, {doses['none']} without.")
        alone_bn = tuned.minus("fair", "dropout", f"bn, {NONE}", f"none, {NONE}")
        if len(alone_bn) > 1:
            told.append(f"BN − none, both without dropout: {span(interval(alone_bn.values()))}.")
    if helped.interval:
        told.append(f"Positive control, {_CONTROL}: {span(helped.interval)}, {helped.status}.")
    outcomes = {
        "no-dropout": _unneeded(list(gain.values()), of["no-dropout"], helped),
        "bn-plus-dropout": superiority(gain.values(), of["bn-plus-dropout"], EQUIVALENCE_SEEDS),
    }
    found = [
        beside(
            fair_verdict(
                claim,
                setting,
                WORDS[claim],
                alone(_CONTRAST, one),
                pilot={_CONTRAST: _gain(tuned, "pilot", "bn")},
                planned=seeds,
                notes=told,
            ),
            shown(_CONTROL, list(without.values()), "control"),
        )
        for claim, one in outcomes.items()
    ]
    effects = _effects(tuned, "fair")
    for name, by_seed in effects.items():
        if len(by_seed) > 1:
            notes.append(f"Gap made smaller by {name}: {span(interval(by_seed.values()))} points.")
    works = superiority(effects["dropout"].values(), of["reg-small"], LEAST_SEEDS)
    small = controlled(lies_above(_small(effects).values(), 0.0, LEAST_SEEDS), works)
    third = fair_verdict(
        "reg-small",
        setting,
        WORDS["reg-small"],
        alone(_SMALL, small),
        pilot={_SMALL: _small(_effects(tuned, "pilot"))},
        planned=seeds,
        notes=notes,
    )
    return [*found, third]


def ghost_batches(tuned: Tuned, size: int) -> Verdict:
    """noise-reg, on so many training images."""
    limits, notes = claims()["noise-reg"].thresholds, tuned.notes("ghost")
    by = _ghost(tuned, "fair")
    found = superiority(by[_SLOPE].values(), limits["delta"], LEAST_SEEDS)
    same = equivalence(by[_SAME].values(), limits["same"], EQUIVALENCE_SEEDS)
    if found.status == "supported" and same.status != "supported":
        reason = f"noise of the same size is not shown to do the same: {same.status}"
        found = dataclasses.replace(
            found, status="inconclusive", reason=reason, n_needed=same.n_needed
        )
    if same.interval:
        notes.append(f"Gap, {_SAME}: {span(same.interval)} points, {same.status}.")
    for name, of in (("Gap", tuned.gaps()), ("Test accuracy", tuned)):
        means = [
            f"{arm} {statistics.fmean(run.final for run in ended.values()):.2f}"
            for arm in ghosts.ARMS
            if (ended := of.ended("fair", "ghost", arm))
        ]
        if means:
            notes.append(f"{name} (points): {', '.join(means)}.")
    verdict = fair_verdict(
        "noise-reg",
        tuned.setting(
            "regularization",
            f"MLP 100-100 on {size:,} images",
            unit="points of the gap per doubling of m",
        ),
        Words(
            "the gap between training and test accuracy grows as the noise of the statistics "
            "falls: {weakest}",
            "the gap between training and test accuracy does not grow by {delta} points per "
            "doubling of the ghost size: {refuted}",
            "the gap between training and test accuracy changes so: {weakest}",
        ),
        alone(_SLOPE, found),
        pilot=_ghost(tuned, "pilot"),
        planned=planned(tuned, "ghost"),
        notes=notes,
    )
    return beside(verdict, shown(_SAME, list(by[_SAME].values()), "control"))


def noise(tuned: Tuned, size: int) -> Verdict:
    """reg-by-noise, on so many training images."""
    limits, notes = claims()["reg-by-noise"].thresholds, tuned.notes("noise")
    saved = _saved(tuned, "fair")
    control = superiority(saved["bn"].values(), limits["delta"], LEAST_SEEDS)
    found = controlled(lies_above(_noise(saved).values(), 0.0, LEAST_SEEDS), control)
    if control.interval:
        bn, full = (math.fsum(saved[a].values()) / len(saved[a]) for a in ("bn", "full"))
        kept = f", which is {100 * full / bn:.0f} % of it" if bn > 0 else ""
        notes.append(
            f"Positive control, share of the area of the training loss that BN saves: "
            f"{span(control.interval)}, {control.status}. Without noise: {full:.2f}{kept}."
        )
    tested = tuned._replace(runs=collect(tuned.rows, KEYS))
    more = [
        cell
        for arm in ("bn", "full")
        for cell in shown(
            f"test accuracy, {arm} − none (points)",
            list(tested.minus("fair", "noise", arm, "none").values()),
        )
    ]
    much = f"{100 * limits['share']:.0f} %"
    what = "of the area of the training loss that batch normalization saves"
    verdict = fair_verdict(
        "reg-by-noise",
        tuned.setting(
            "regularization",
            f"MLP 100-100 on {size:,} images",
            unit="share of the area of the training loss",
        ),
        Words(
            f"statistics without noise keep less than {much} {what}: {{weakest}}",
            f"statistics without noise keep more than {much} {what}: {{refuted}}",
            f"needed to keep {much} {what}, minus kept without noise: {{weakest}}",
        ),
        alone(_NOISE, found),
        pilot={_NOISE: _noise(_saved(tuned, "pilot"))},
        planned=planned(tuned, "noise"),
        notes=notes,
    )
    return beside(verdict, more)


def _unneeded(gain: Sequence[float], delta: float, helped: Outcome) -> Outcome:
    """no-dropout: equivalence, one-sided where dropout harms, and only where it helps without."""
    found = equivalence(gain, delta, EQUIVALENCE_SEEDS)
    if found.status == "refuted" and found.interval is not None and found.interval.mean < 0:
        p = lies_above([-v for v in gain], -delta).p
        found = dataclasses.replace(found, status="supported", reason="dropout harms", p=p)
    return controlled(found, helped) if found.status == "supported" else found


WORDS = {
    "no-dropout": Words(
        "with batch normalization the best dropout adds less than {delta} points: {weakest}",
        "with batch normalization the best dropout still adds accuracy: {refuted}",
        "with batch normalization the best dropout adds {weakest}",
    ),
    "bn-plus-dropout": Words(
        "dropout adds accuracy to batch normalization: {weakest}",
        "the best dropout does not add {delta} points to batch normalization: {refuted}",
        "with batch normalization the best dropout adds {weakest}",
    ),
    "reg-small": Words(
        "batch normalization makes the gap between training and test accuracy smaller by less "
        "than half of what dropout of 0.5 does: {weakest}",
        "batch normalization makes the gap between training and test accuracy smaller by half of "
        "what dropout of 0.5 does, or more: {refuted}",
        "the effects on the gap between training and test accuracy differ so: {weakest}",
    ),
}
