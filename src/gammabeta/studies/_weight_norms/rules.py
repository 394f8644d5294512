"""The rules of the experiment on the weights before BN; the protocol is in ``weight_norms``."""

import math
import statistics
from collections.abc import Mapping, Sequence

from gammabeta._runs import Scalar
from gammabeta.studies._answer import Words, span
from gammabeta.studies._asked import Asked, Parts, ends, less, planned
from gammabeta.studies._beside import answered
from gammabeta.studies._claims import claims
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._outcomes import all_controlled
from gammabeta.studies._tuned import EQUIVALENCE_SEEDS, LEAST_SEEDS, Tuned
from gammabeta.studies._verdict import Outcome, Verdict, lies_above
from gammabeta.studies._weight_norms import factors

WEIGHTS = (0.01, 0.1, 1.0, 10.0, 100.0)  # rates of the hidden weights
_CONTRAST = "accuracy, fixed − free norms"
_FACTOR = "ln of the smallest over the largest best loss"


def _ended(tuned: Tuned, part: str, column: str, scale: float = 1.0) -> list[dict[int, float]]:
    """A number at the end, fixed norms and free ones, by seed."""
    best = tuned.best.get("bn", {})
    rates = {arm: best.get("free" if scale != 1 else arm, math.nan) for arm in ("fixed", "free")}
    arms: list[Mapping[str, Scalar]] = [
        {"part": part, "group": "bn", "arm": arm, "rate": scale * rate}
        for arm, rate in rates.items()
    ]
    return [ends(tuned.rows, column, arm) for arm in arms]


def norms(tuned: Tuned, part: str, scale: float = 1.0) -> Parts:
    """What norm-fixed asks of a part; at so many times the free arm's rate."""
    delta = claims()["norm-fixed"].thresholds["delta"]
    fixed, free = _ended(tuned, part, "accuracy", scale)
    return {_CONTRAST: Asked(less(fixed, free, 100), "equivalence", delta, delta)}


def rates(tuned: Tuned, part: str) -> Parts:
    """What auto-lr asks of a part."""
    bound = math.log(claims()["auto-lr"].thresholds["factor"])
    values = factors.factor(factors.best(tuned.rows, part, "bn"), WEIGHTS)
    return {_FACTOR: Asked(values, "above", -bound, bound)}


def fixed_norms(tuned: Tuned) -> Verdict:
    """Whether norms can be fixed without loss (norm-fixed)."""
    limits = claims()["norm-fixed"].thresholds
    grown = _ended(tuned, "fair", "growth")[1]
    control = lies_above(grown.values(), limits["growth"], EQUIVALENCE_SEEDS)
    notes = tuned.notes()
    if control.interval:
        notes.append(
            "Positive control, ln of the squared norms in the free arm, end over start: "
            f"{span(control.interval)}, {control.status}."
        )
    fair, pilot = norms(tuned, "fair"), norms(tuned, "pilot")
    there = "both at ten times the rate"
    return answered(
        "norm-fixed",
        tuned.setting("weight-norms", "MLP 100-100"),
        Words(
            "the norms of weights before batch normalization can be fixed without loss: {weakest}",
            "fixing the norms of weights before batch normalization changes the accuracy: "
            "{refuted}",
            "the difference is {weakest}",
        ),
        all_controlled(_decided(fair, EQUIVALENCE_SEEDS), control),
        {},
        delta=limits["delta"],
        pilot={name: list(part.values.values()) for name, part in pilot.items()},
        planned=planned(pilot, EQUIVALENCE_SEEDS),
        notes=notes,
        beside={
            f"{_CONTRAST}, {there}": norms(tuned, "shown", 10)[_CONTRAST].values,
            f"ln of the squared norms, {there}": _ended(tuned, "shown", "growth", 10)[1],
        },
    )


def _decided(parts: Parts, least: int) -> Outcome:
    judged = {n: Part(list(p.values.values()), p.rule, p.bound) for n, p in parts.items()}
    return joint(judged, least)


def any_rate(tuned: Tuned, stops: Sequence[int]) -> Verdict:
    """Whether any rate of the hidden weights comes to about the same loss (auto-lr)."""
    rows, bound = tuned.rows, math.log(claims()["auto-lr"].thresholds["factor"])
    fair, pilot = rates(tuned, "rates"), rates(tuned, "rates-pilot")
    beside: dict[str, Mapping[int, float]] = {}
    notes = tuned.notes("bn")
    early = stops[max(len(stops) - 4, 0)]
    for group, where in (("bn", ""), ("none", ", without BN")):
        losses = factors.best(rows, "rates", group)
        if group == "none":
            beside[_FACTOR + where] = factors.factor(losses, WEIGHTS)
        beside[f"the same, rates 0.1 to 10{where}"] = factors.factor(losses, WEIGHTS[1:-1])
        sooner = factors.best(rows, "rates", group, early)
        beside[f"the same, to step {early:,}{where}"] = factors.factor(sooner, WEIGHTS)
        arm: Mapping[str, Scalar] = {"part": "rates", "group": group}
        ended = {w: ends(rows, "accuracy", {**arm, "weights": w}) for w in WEIGHTS}
        beside[f"accuracy, smallest − largest{where} (points)"] = factors.spread(ended)
        said = [
            f"{rate:g}: {statistics.geometric_mean(by.values()):.3g} "
            f"({100 * statistics.fmean(ended[rate].values()):.1f} %)"
            for rate, by in sorted(losses.items())
            if ended[rate]
        ]
        if said:
            notes.append(f"Best loss and test accuracy by rate{where}: {'; '.join(said)}.")
        lost = {
            (r["weights"], r["seed"])
            for r in rows
            if (r.get("part"), r.get("group"), r.get("diverged")) == ("rates", group, True)
        }
        if lost:
            notes.append(f"Runs whose loss was not finite{where}: {len(lost)}.")
    return answered(
        "auto-lr",
        tuned.setting(
            "weight-norms",
            "MLP 100-100",
            "hidden weights at rates from 0.01 to 100, all else at its best",
            "natural logarithm",
        ),
        Words(
            "whatever the rate, training comes to about the same loss: {weakest}",
            "the loss depends on the rate: {refuted}",
            "the losses lie apart by {weakest}",
        ),
        _decided(fair, LEAST_SEEDS),
        {},
        delta=bound,
        pilot={name: list(part.values.values()) for name, part in pilot.items()},
        planned=planned(pilot, LEAST_SEEDS),
        notes=notes,
        beside=beside,
    )
