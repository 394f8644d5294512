"""From the rows of the experiment on depth to the verdicts of its claims."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from gammabeta.studies._answer import Words, answer
from gammabeta.studies._claims import claims
from gammabeta.studies._depth.contrasts import MORE, USES, differences, planned
from gammabeta.studies._draws import values
from gammabeta.studies._joint import Part, joint, outcome
from gammabeta.studies._outcomes import beside, by_weakest
from gammabeta.studies._pairs import LABELS, NORMS
from gammabeta.studies._tuned import LEAST_SEEDS, Tuned, fair_verdict, shown
from gammabeta.studies._verdict import Outcome, Verdict, controlled

_SLOPE, _SCALE = "slope without BN, decades in ten layers", "variance of SELU"


class Seen(NamedTuple):
    """What the judges of the claims read."""

    tuned: Tuned
    limits: Sequence[float]  # learning rates of mf-depth-limit
    limit_steps: int


def deep_hard(seen: Seen) -> Verdict:
    claim = "deep-hard"
    delta = claims()[claim].thresholds["delta"]
    parts = {
        name: Part(list(v.values()), "superiority", delta, level=name)
        for name, v in differences(claim, seen.tuned, "fair").items()
    }
    words = Words(
        "a network of 20 layers without batch normalization stays behind one of two, least with "
        "weights {weakest}",
        "20 layers without batch normalization do not stay {delta} points behind two: {refuted}",
        "2 − 20 layers is smallest with weights {weakest}",
        "20 layers stay {delta} points behind two, but not with every initialization; not with "
        "{refuted}",
    )
    found = by_weakest(joint(parts, LEAST_SEEDS))
    return _verdict(seen, claim, "MLPs of 2 and 20 layers without BN", words, found)


def inputs(seen: Seen) -> Verdict:
    claim = "input-norm-shallow-only"
    limits = claims()[claim].thresholds
    (gaps,) = differences(claim, seen.tuned, "fair").values()
    slopes = values([row for row in seen.tuned.rows if row.get("part") == "noise"])
    parts = {
        MORE: Part(list(gaps.values()), "superiority", limits["delta"], level="accuracy"),
        _SLOPE: Part(
            [10 * slope for slope in slopes.pop("noise in all layers, without", [])],
            "superiority",
            10 * limits["slope"],
            level="fluctuations",
        ),
    }
    found = joint(parts, LEAST_SEEDS)
    deep = list(seen.tuned.minus("fair", "20 layers", *NORMS).values())
    control = outcome(Part(deep, "superiority", limits["delta"]), LEAST_SEEDS)
    notes = []
    if found.cells[MORE].status == "supported" and control.status != "supported":
        found = controlled(found, control)
        notes.append("With 20 layers BN − none is not supported: the inputs may be enough there.")
    more = shown("BN − none, 20 layers", deep)
    more += shown(
        "BN − none, 2 layers", list(seen.tuned.minus("fair", "2 layers", *NORMS).values())
    )
    for name, each in slopes.items():
        more += shown(f"slope, {name}", [10 * slope for slope in each], "before training")
    words = Words(
        "batch normalization gains more in deep networks on standardized inputs, and fluctuations "
        "grow with depth: {weakest}",
        "batch normalization does not gain {delta} points more in deep networks on standardized "
        "inputs, or fluctuations do not grow with depth: {refuted}",
        "the difference is {weakest}",
        "only one of two holds, that batch normalization gains more in deep networks on "
        "standardized inputs and that fluctuations grow with depth; not {refuted}",
    )
    return _verdict(seen, claim, "MLPs of 2 and 20 layers", words, found, more, notes)


def selu(seen: Seen) -> Verdict:
    claim = "selu"
    limits = claims()[claim].thresholds
    (accuracies,) = differences(claim, seen.tuned, "fair").values()
    draws = values([row for row in seen.tuned.rows if row.get("part") == "moments"])
    low, high = limits["low"], limits["high"]
    parts = {
        _SCALE: Part(
            draws.pop("variance, SELU, Gaussian input", []),
            "number",
            (low + high) / 2,
            (high - low) / 2,
            level="scale",
        ),
        "SELU − ReLU with BN": Part(
            list(accuracies.values()), "above", -limits["delta"], level="training"
        ),
    }
    gains = list(seen.tuned.minus("fair", "8 layers", *NORMS).values())
    control = outcome(Part(gains, "superiority", limits["gain"]), LEAST_SEEDS)
    found = controlled(joint(parts, LEAST_SEEDS), control)
    notes = []
    if control.status != "supported" and control.interval:
        notes.append("The positive control, BN − none with 8 layers of ReLU, is not supported.")
    more = shown("BN − none with ReLU", gains)
    plain = seen.tuned.minus("fair", "8 layers", "selu", "none")
    more += shown("SELU − ReLU without", list(plain.values()))
    for name, each in draws.items():
        more += shown(name, each, "before training")
    words = Words(
        "SELU keeps the variance of its activations, and trains no worse than batch normalization: "
        "{weakest}",
        "SELU does not keep the variance of its activations, or trains worse than batch "
        "normalization: {refuted}",
        "{weakest}",
        "only one of two holds, that SELU keeps the variance of its activations and that it trains "
        "no worse than batch normalization; not {refuted}",
    )
    return _verdict(
        *(seen, claim, "MLPs of 8 and 32 layers", words, found, more, notes),
        unit="variance, or points of accuracy",
    )


def sigmoid(seen: Seen) -> Verdict:
    claim = "sigmoid-deep"
    bound = claims()[claim].thresholds["delta"]
    found = differences(claim, seen.tuned, "fair")
    parts = {name: Part(list(v.values()), "above", bound) for name, v in found.items()}
    words = Words(
        "eight sigmoid layers train with batch normalization only: {weakest}",
        "eight sigmoid layers do not gain {delta} points by batch normalization: {refuted}",
        "the gain is {weakest}",
    )
    network = "MLP of 8 sigmoid layers"
    verdict = _verdict(seen, claim, network, words, joint(parts, LEAST_SEEDS))
    ends = []
    for arm in NORMS:
        finals = [run.final for run in seen.tuned.ended("fair", "8 sigmoid layers", arm).values()]
        if finals:
            ends.append(f"{math.fsum(finals) / len(finals):.1f} % {LABELS[arm]}")
    note = [f"Test accuracy: {', '.join(ends)}; chance is about 11 %."] if ends else []
    return dataclasses.replace(verdict, notes=[*verdict.notes, *note])


def limit(seen: Seen) -> Verdict:
    claim = "mf-depth-limit"
    limits = claims()[claim].thresholds

    def failed(group: str, rate: float) -> list[float]:
        runs = seen.tuned.runs.get(("limit", group, "bn", rate), {})
        return [float(run.final_batch < limits["fails"]) for run in runs.values()]

    def all_rates(group: str, sign: int) -> Outcome:
        parts = {
            f"{group} at {rate:g}": Part(
                [v if sign > 0 else 1 - v for v in failed(group, rate)], "above", limits["share"]
            )
            for rate in seen.limits
        }
        return joint(parts, LEAST_SEEDS)

    found, control = by_weakest(all_rates("60 layers", 1)), all_rates("10 layers", -1)
    notes, more = [], []
    if found.status == "supported" and control.status != "supported":
        found = controlled(found, control)
        notes.append("Networks of 10 layers do not train at each of these rates either.")
    for group in ("10 layers", "20 layers", "40 layers", "60 layers"):
        for rate in seen.limits:
            runs = seen.tuned.runs.get(("limit", group, "bn", rate), {}).values()
            if not runs:
                continue
            by = [math.fsum(v) / len(runs) for v in ([r.final_batch for r in runs],
                                                     [r.final for r in runs])]  # fmt: skip
            said = f"{by[0]:.1f} % by batch statistics, {by[1]:.1f} % by running ones"
            notes.append(f"{group.capitalize()} at {rate:g}: {said} (seeds: {len(runs)}).")
            if group == "10 layers":
                more += shown(f"{group} at {rate:g}", failed(group, rate))
    notes.append("Seeds: a fixed number, no pilot.")
    words = Words(
        "more than half of the networks of 60 layers with batch normalization fail, at each rate: "
        "{weakest}",
        "networks of 60 layers with batch normalization train: {refuted}",
        "the smallest share of failures is {weakest}",
    )
    verdict = answer(
        claim,
        seen.tuned.setting(
            "depth",
            "MLP of 60 layers with BN",
            f"three learning rates, {seen.limit_steps} steps",
            "share of runs that fail",
        ),
        words,
        found,
        {},
        delta=limits["share"],
        pilot={},
        planned=None,
        notes=notes,
    )
    return beside(dataclasses.replace(verdict, published_status=None), more)


def _verdict(
    seen: Seen,
    claim: str,
    network: str,
    words: Words,
    found: Outcome,
    more: Sequence[dict[str, Any]] = (),
    notes: Sequence[str] = (),
    unit: str = "points of accuracy",
) -> Verdict:
    pilot = differences(claim, seen.tuned, "pilot")
    verdict = fair_verdict(
        claim,
        seen.tuned.setting("depth", network, unit=unit),
        words,
        found,
        pilot={name: pilot.get(name, {}) for name in found.cells},
        planned=planned(claim, seen.tuned),
        notes=[*seen.tuned.notes(*USES[claim]), *notes],
    )
    return beside(verdict, more)
