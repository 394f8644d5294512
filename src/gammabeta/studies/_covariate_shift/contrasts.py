"""From the rows of runs to one number for each contrast and seed."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._covariate_shift.deep import integrals
from gammabeta.studies._draws import PILOT_SEEDS

CONTROL = "accuracy, BN − none"
TINY = 1e-12  # what a logarithm is taken of at least
PUBLISHED_RATES = (0.01, 0.1)

Rates = Mapping[tuple[str, str], float]  # (group, arm) -> learning rate


class Runs(NamedTuple):
    """The rows of each main run by (group, arm), at its chosen rate, and by seed."""

    main: dict[tuple[str, str], dict[int, list[Row]]]
    published: dict[tuple[str, float], dict[int, list[Row]]]  # by (arm, rate)


def gather(rows: Sequence[Row], rates: Rates) -> Runs:
    """Sort rows by run and step; those at rates that are no longer the best are left out."""
    runs = Runs({}, {})
    steps: dict[tuple[object, ...], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row.get("kind") == "run":
            key = tuple(row[k] for k in ("part", "group", "arm", "rate", "seed"))
            steps[key][int(real(row["step"]))] = row
    for (part, group, arm, rate, seed), by_step in steps.items():
        ordered = [by_step[step] for step in sorted(by_step)]
        if part == "published":
            runs.published.setdefault((str(arm), real(rate)), {})[int(real(seed))] = ordered
        elif part in ("fair", "pilot") and rates.get((str(group), str(arm))) == rate:
            runs.main.setdefault((str(group), str(arm)), {})[int(real(seed))] = ordered
    return runs


def column(run: Sequence[Row], name: str) -> list[float]:
    return [real(row[name]) for row in run if name in row]


def accuracy(run: Sequence[Row]) -> float:
    """Mean of the last three evaluations, in percent."""
    return 100 * statistics.fmean(column(run, "accuracy")[-3:])


def _mean_log(run: Sequence[Row], name: str) -> float:
    return statistics.fmean(math.log(max(v, TINY)) for v in column(run, name))


def _per_decrease(run: Sequence[Row], name: str, target: float) -> tuple[float, float] | None:
    """Sum over the steps to the target loss, over the decrease of the loss; and that step."""
    looks = [row for row in run if name in row and "fixed_loss" in row]
    steps = [real(row["step"]) for row in looks]
    return integrals(steps, column(looks, "fixed_loss"), column(looks, name), target)


def contrasts(claim: str, runs: Runs, target: float) -> dict[str, dict[int, float]]:
    """Numbers by contrast and seed; a seed that lacks one of the runs, or the number, is absent.

    Args:
        target: the training loss to which shifts are summed.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    if claim == "constant-dist":
        return _inputs(runs)
    none, bn = (runs.main.get(("deep", arm), {}) for arm in ("none", "bn"))
    for seed in sorted(none.keys() & bn.keys()):
        each = _deep(claim, none[seed], bn[seed], target)
        for arm in ("noisy", "noise", "frozen"):
            other = runs.main.get(("deep", arm), {}).get(seed)
            if other:
                each |= _beside(claim, arm, none[seed], bn[seed], other)
        for name, value in each.items():
            found[name][seed] = value
    if claim == "ics-gradient":
        found.update(_gradients(runs))
    return dict(found)


def _deep(claim: str, none: list[Row], bn: list[Row], target: float) -> dict[str, float]:
    found = {}
    if all(len(column(run, "accuracy")) >= 3 for run in (none, bn)):
        found[CONTROL] = accuracy(bn) - accuracy(none)
    if claim == "ics-reduced":
        for level, name in (("(a) distribution", "shift"), ("(b) gradient", "turn")):
            found |= _less(f"{level}, equal steps", none, bn, f"{name}_relative")
            found |= _less(f"{level}, each network's own steps", none, bn, f"{name}_own")
            sums = [_per_decrease(run, f"{name}_own", target) for run in (none, bn)]
            if sums[0] and sums[1]:
                ratio = math.log(max(sums[0][0], TINY) / max(sums[1][0], TINY))
                found[f"{level}, per decrease of the loss"] = ratio
                found["log steps to the loss, none / BN"] = math.log(sums[0][1] / sums[1][1])
    if claim == "cross-layer-stats":
        found |= _less("mean and spread", none, bn, "moments_relative")
        found |= _less("correlations", none, bn, "correlations_relative")
        found |= _less("mean and spread, the optimizer's own steps", none, bn, "moments_own")
        name = "mean and spread, weights without BN / gamma and beta with"
        found |= _less(name, none, bn, "moments_relative", "affine_relative")
    if claim in ("ics-gradient", "not-reduce-shift"):
        name = "deep network" if claim == "ics-gradient" else "gradient"
        found |= _turned(name, none, bn, "turn_relative")
    if claim == "not-reduce-shift":
        found |= _ratio("distribution", bn, none, "drift", log=True)
    if claim == "gamma-beta-shift":
        found |= _ratio("drift of the layers' outputs, BN / none", bn, none, "drift_outputs")
        found |= _ratio("drift of their moments, BN / none", bn, none, "drift_moments")
    return found


def _beside(
    claim: str, arm: str, none: list[Row], bn: list[Row], other: list[Row]
) -> dict[str, float]:
    """Contrasts with the other arms."""
    found = {}
    scored = all(len(column(run, "accuracy")) >= 3 for run in (none, bn, other))
    if claim == "noisy-bn" and arm == "noisy":
        if scored:
            found["accuracy, noisy BN − none"] = accuracy(other) - accuracy(none)
            found["accuracy, noisy BN − BN"] = accuracy(other) - accuracy(bn)
        found |= _ratio("log drift, noisy BN / none", other, none, "drift", log=True)
        losses = [column(run, "batch_loss") for run in (none, other)]
        if all(len(x) == 10 for x in losses):
            area = statistics.fmean(losses[0]) - statistics.fmean(losses[1])
            found["mean training loss, none − noisy BN"] = area
    if claim == "noisy-bn" and arm == "noise" and scored:
        found["accuracy, noise without BN − none"] = accuracy(other) - accuracy(none)
    if claim == "gamma-beta-shift" and arm == "frozen":
        if scored:
            found["accuracy, frozen − learned"] = accuracy(other) - accuracy(bn)
        for name in ("moments", "shape"):
            values = column(other, f"drift_{name}")
            if len(values) == 9:
                found[f"drift of the {name}, gamma and beta frozen"] = statistics.fmean(values)
    return found


def _less(
    name: str, none: list[Row], bn: list[Row], of: str, of_bn: str | None = None
) -> dict[str, float]:
    """Mean log at the moments of training, none - BN; nothing where a moment is missing."""
    counts = len(column(none, of)), len(column(bn, of_bn or of))
    if not _all_moments(none) or not _all_moments(bn) or counts[0] != counts[1] or not counts[0]:
        return {}
    return {name: _mean_log(none, of) - _mean_log(bn, of_bn or of)}


def _all_moments(run: list[Row]) -> bool:
    """A run whose weights left the finite numbers has moments without numbers: it is left out."""
    return not any(bool(row.get("diverged")) for row in run)


def _turned(name: str, none: list[Row], bn: list[Row], of: str) -> dict[str, float]:
    values = [column(run, of) for run in (bn, none)]
    if not values[0] or len(values[0]) != len(values[1]):
        return {}
    return {name: statistics.median(values[0]) - statistics.median(values[1])}


def _ratio(
    name: str, over: list[Row], under: list[Row], of: str, *, log: bool = False
) -> dict[str, float]:
    """Of the mean drifts over the nine distances between tenths."""
    values = [column(run, of) for run in (over, under)]
    if any(len(x) != 9 for x in values):
        return {}
    means = [max(statistics.fmean(x), TINY) for x in values]
    return {name: math.log(means[0] / means[1]) if log else means[0] / means[1]}


def _gradients(runs: Runs) -> dict[str, dict[int, float]]:
    """Of the linear network, and as published."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    pairs = [("linear network", "turn_relative", [runs.main.get(("linear", a), {}) for a in ARMS]),
             ("linear network, own steps", "turn_own",
              [runs.main.get(("linear", a), {}) for a in ARMS])]  # fmt: skip
    for rate in PUBLISHED_RATES:
        arms = [runs.published.get((a, rate), {}) for a in ARMS]
        pairs.append((f"rate {rate:g}: deep network, own steps", "turn_own", arms))
    for name, of, (none, bn) in pairs:
        for seed in sorted(none.keys() & bn.keys()):
            if seed in PILOT_SEEDS and of == "turn_own":
                continue
            value = _turned(name, none[seed], bn[seed], of).get(name)
            if value is not None:
                found[name][seed] = value
    return dict(found)


ARMS = ("none", "bn")


def _inputs(runs: Runs) -> dict[str, dict[int, float]]:
    """Loss of accuracy under inputs that change, in points."""
    by = {
        arm: {s: accuracy(run) for s, run in seeds.items() if len(column(run, "accuracy")) >= 3}
        for (group, arm), seeds in runs.main.items()
        if group == "inputs"
    }
    pairs = {
        "clean − changing at random": ("clean", "random"),
        "constant − changing slowly": ("final", "slow"),
        "clean − a quarter as random": ("clean", "random 0.25"),
        "clean − half as random": ("clean", "random 0.5"),
        "constant − changing twice an epoch": ("final", "slow 0.5"),
        "constant − changing in four epochs": ("final", "slow 4"),
    }
    return {
        name: {s: by[a][s] - by[b][s] for s in sorted(by[a].keys() & by[b].keys())}
        for name, (a, b) in pairs.items()
        if a in by and b in by
    }


def real(value: Scalar | object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a row must have numbers, got {value!r}. Repeat that cell.")
    return float(value)
