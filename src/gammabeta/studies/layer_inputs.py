"""Do the inputs of a layer drift without normalization, and is one feature at a time enough?

ics-def. The texts define internal covariate shift as the change of the distribution of
activations while parameters change; a definition cannot be tested, so the claim is: without batch
normalization the distribution of layer inputs drifts during training (Ioffe & Szegedy 2015, section
4.1 and Fig. 1). Network: pixels-100-100-100-10, sigmoid, weights from a normal distribution with
standard deviation 0.1, biases 0, pixels brighter than half are 1 and the others 0, the first 55,000
training images, batches of 60, SGD without momentum on the mean cross-entropy, 2,000 steps (10,000
at `full`). The paper gives neither the width of its distribution nor its learning rate.
    Probe: 1,000 images that are not trained on, at the end of each tenth of training, by running
    statistics. What the weights of the output layer receive, the outputs of the last hidden
    sigmoids, is looked at.
    Primary contrast: Wasserstein-1 distance of a unit's distribution between the ends of successive
    tenths, over the unit's standard deviation (root of the mean of both variances), mean over the
    100 units and the nine distances, in the network without batch normalization at its best
    learning rate. What happens in the first tenth does not count. Superiority, delta = 0.1
    standard deviations.
    Secondary: the network with batch normalization, before each sigmoid, as the paired log ratio
    of the two drifts; in both the drift of the sigmoids' inputs (as in the paper's figure), of the
    shape (after each unit is standardized), and of the correlations between units.
    Shown, seeds 0 to 2: the density of those inputs over all units and the images of the probe,
    before training and after each tenth, normalized by the statistics of these images.

feature-independent. Normalizing each feature on its own suffices (the first simplification of
Ioffe & Szegedy 2015, section 3). Network: pixels-100-100-10, ReLU, weights from a truncated normal
distribution with standard deviation sqrt(2 / fan-in), 5,000 training images drawn for each seed
from the first 55,000, batches of 256 (a whitening needs more images than features), SGD without
momentum on the mean cross-entropy, 300 steps (1,000 at `full`). Before each activation stands
nothing, batch normalization, or a whitening: ZCA in groups of 20 features, ZCA of all 100, or
IterNorm (5 iterations) in groups of 20. Three levels, each with its primary contrast:
    speed      mean over targets of the log ratio, none over batch normalization, of the steps to 90
               and 93 % accuracy on 2,000 validation images (about 40 log-spaced looks,
               interpolated): supported if the interval lies above log 1.25, refuted if below. A run
               that does not arrive counts as arriving at the last step; where more than half of an
               arm do not arrive at either target, a sign test over the seeds decides.
    whitening  test accuracy, whitening minus batch normalization. Which whitening is chosen on
               validation, as the learning rates are. The level holds if whitening does not gain
               (superiority with delta = 0.3 points is refuted), and fails if superiority holds.
    identity   batch normalization leaves the matrix of correlations between features unchanged (a
               positive gamma per feature): in float64, error at most 100 eps times
               1 + the largest |x|/sigma. If it fails, the claim is refuted; an identity that holds
               leaves the other two levels to decide. Mixed if one of them is supported and the
               other refuted.
    Secondary: mean absolute correlation of two inputs of the first activation after training.

Fair (the only verdict: the sources have no numbers)
    Each arm of each claim trains at its own best learning rate: highest accuracy on the last 5,000
    training images, mean at 96, 98 and 100 % of the steps and of seeds 800 and 801, from 0.1, 0.3,
    1, 3. A best value at an edge extends the grid for all arms of the claim until it lies inside;
    a rate at which a loss was not finite is not chosen. Seeds 900 to 903 are a pilot: they give
    the number of seeds (5 to 16; predicted half-width of the 95 % interval delta / 2, log(1.25) / 2
    for the speed), and are used for nothing else. All arms of a seed start from the same weights
    and see the same batches.

Changed against the registry: 2,000 steps instead of 4,000 for ics-def; ten looks instead of one
every 100 steps; 300 steps instead of 1,000 for feature-independent, and targets of 90 and 93 %, as
5,000 images do not take this network to the 95 and 97 % of bn-speed; a search that begins with four
rates instead of six. `tiny` tries the wiring with one rate; it decides nothing. The bundled digits
(each seed splits the 1,797 images anew, 1,000 for training) are a demonstration.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import binomtest

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import PLACES, Setting, Words, answer, span
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._layer_inputs import drift, features
from gammabeta.studies._layer_inputs.features import ARMS, steps_to
from gammabeta.studies._pairs import NORMS, Run, Runs, Tuning, collect, gains, tune
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._verdict import (
    Outcome,
    Verdict,
    interval,
    lies_above,
    planned_n,
    superiority,
)

CLAIMS = ("ics-def", "feature-independent")

NETS = {"ics-def": NORMS, "feature-independent": tuple(ARMS)}
WHITENINGS = tuple(arm for arm in ARMS if arm not in NORMS)
NAMES = {
    "bn": "batch normalization",
    "none": "none",
    "zca-20": "ZCA in groups of 20",
    "zca-100": "ZCA of all features",
    "iternorm-20": "IterNorm in groups of 20",
}
TUNING_SEEDS = (800, 801)
PILOT_SEEDS = (900, 901, 902, 903)
LEAST_SEEDS, MOST_SEEDS = 5, 16
RATES = (0.1, 0.3, 1.0, 3.0)
EPS = 2.0**-52
_ARM = ("claim", "part", "norm", "rate")
_DRIFT, _SPEED, _WHITENING, _IDENTITY = (
    "drift without BN",
    "log steps, none − BN",
    "whitening − BN",
    "correlations kept",
)

Best = Mapping[str, float]  # arm -> learning rate


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: Mapping[str, int]
    seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


PLANS = {
    "tiny": Plan({"ics-def": 20, "feature-independent": 8}, 2, (1.0,), 1000, False),
    "small": Plan({"ics-def": 2000, "feature-independent": 300}, 5, RATES, 10000, True),
    "full": Plan({"ics-def": 10000, "feature-independent": 1000}, 5, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until each claim's grid is settled; then its main runs; pilot; more seeds."""
    plan = PLANS[budget]
    rows = [r for r in rows if (r["budget"], r["data"]) == (budget, data)]
    runs = collect(rows, _ARM)
    wanted = [_cell(plan, 0, 0, "feature-independent", "identity", "bn", 0.0)]
    for claim in CLAIMS:
        tuning = _tuning(claim, runs, plan)
        wanted += [
            _cell(plan, 0, seed, claim, "tuning", norm, rate)
            for seed in TUNING_SEEDS
            for rate in tuning.grid
            for norm in NETS[claim]
        ]
        best = _compared(claim, runs, tuning)
        if best:
            planned = _planned(claim, rows, runs, best) if plan.decides else None
            wanted += _main(plan, claim, best, seeds, planned)
    return wanted


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for some more seeds."""
    plan, wanted = PLANS[budget], cells(budget, data, seeds, [])
    for claim in CLAIMS:
        # Of the whitenings the one in the middle by cost.
        guess = {norm: plan.rates[0] for norm in (*NORMS, "iternorm-20") if norm in NETS[claim]}
        # Drift varies little between seeds, accuracies and their times more.
        guessed = LEAST_SEEDS if claim == "ics-def" else 2 * LEAST_SEEDS
        wanted += _main(plan, claim, guess, seeds, guessed)
    return wanted


def _main(plan: Plan, claim: str, best: Best, seeds: int | None, planned: int | None) -> list[Cell]:
    def each(wave: int, part: str, which: Iterable[int]) -> list[Cell]:
        return [_cell(plan, wave, s, claim, part, n, r) for s in which for n, r in best.items()]

    if seeds is not None or not plan.decides:
        return each(1, "fair", range(plan.seeds if seeds is None else seeds))
    more = range(plan.seeds, planned or 0)
    return (
        each(1, "fair", range(plan.seeds)) + each(2, "pilot", PILOT_SEEDS) + each(3, "fair", more)
    )


def _cell(plan: Plan, wave: int, seed: int, claim: str, part: str, norm: str, rate: float) -> Cell:
    arm: Mapping[str, Scalar] = {"claim": claim, "part": part, "norm": norm, "rate": rate}
    # In seconds, about: the steps, looks on the way, three evaluations.
    images = min(plan.images, 5000 if part == "tuning" else 10000)
    main = part != "tuning"
    if part == "identity":
        cost = 0.05
    elif claim == "ics-def":
        step = 1.5e-3 if norm == "bn" else 1.1e-3
        cost = plan.steps[claim] * step + 0.13e-4 * images + 0.15 + 0.2 * main
    else:
        step = {"none": 2.1, "bn": 2.5, "zca-20": 7.0, "zca-100": 11.8, "iternorm-20": 7.0}[norm]
        cost = plan.steps[claim] * step * 1e-3 + 0.12e-4 * images + 0.3 * main
    return Cell("layer-inputs", arm, seed, round(cost, 3), wave)


def _tuning(claim: str, runs: Runs, plan: Plan) -> Tuning:
    trials: dict[tuple[str, float], dict[int, Run]] = {
        (str(norm), float(rate)): by_seed
        for (of, part, norm, rate), by_seed in runs.items()
        if (of, part) == (claim, "tuning") and isinstance(rate, int | float)
    }
    return tune(trials, plan.rates, TUNING_SEEDS, grow=plan.decides, arms=NETS[claim])


def _compared(claim: str, runs: Runs, tuning: Tuning) -> dict[str, float]:
    """The arms of the main runs with their rates: of the whitenings only the best on validation."""
    if tuning.best is None:
        return {}
    best = tuning.best
    if claim == "ics-def":
        return dict(best)

    def score(norm: str) -> float:
        by_seed = runs[claim, "tuning", norm, best[norm]]
        return math.fsum(by_seed[seed].final for seed in TUNING_SEEDS)

    rival = max(WHITENINGS, key=score)
    return {norm: best[norm] for norm in (*NORMS, rival)}


# -- contrasts ----------------------------------------------------------------------------------


def _by_seed(
    rows: Sequence[Row], claim: str, part: str, norm: str, rate: float | None
) -> dict[int, list[Row]]:
    """The rows of an arm by seed, in the order of the steps; each step once."""
    found: dict[int, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row.get("kind") == "run" and tuple(row[key] for key in _ARM) == (
            claim,
            part,
            norm,
            rate,
        ):
            found[int(_real(row["seed"]))][int(_real(row["step"]))] = row
    return {s: [by[step] for step in sorted(by)] for s, by in sorted(found.items())}


def _drifts(
    rows: Sequence[Row], part: str, norm: str, rate: float | None, column: str = "drift"
) -> dict[int, float]:
    """Mean drift over the tenths of each seed that has all nine distances."""
    found = {}
    for seed, by_step in _by_seed(rows, "ics-def", part, norm, rate).items():
        values = [_real(row[column]) for row in by_step if column in row]
        if len(values) == 9:
            found[seed] = math.fsum(values) / 9
    return found


class Speed(NamedTuple):
    """Log ratios of steps, none over batch normalization, by seed; and who did not arrive."""

    ratios: dict[int, float]
    late: dict[str, int]  # arm -> runs that do not arrive at a target, the worse of both targets


def _speed(rows: Sequence[Row], part: str, best: Best) -> Speed:
    t = claims()["feature-independent"].thresholds
    targets = (t["first_target"] / 100, t["second_target"] / 100)
    logs: dict[str, dict[int, float]] = {}
    late = {}
    for norm in NORMS:
        curves = {
            seed: [
                (int(_real(r["step"])), _real(r["validation"])) for r in each if "validation" in r
            ]
            for seed, each in _by_seed(
                rows, "feature-independent", part, norm, best.get(norm)
            ).items()
        }
        reached = {
            seed: [steps_to(target, *zip(*curve, strict=True)) for target in targets]
            for seed, curve in curves.items()
            if curve
        }
        logs[norm] = {s: sum(math.log(step) for step, _ in r) / 2 for s, r in reached.items()}
        late[norm] = max(sum(not r[k][1] for r in reached.values()) for k in range(2))
    shared = sorted(logs["none"].keys() & logs["bn"].keys())
    return Speed({s: logs["none"][s] - logs["bn"][s] for s in shared}, late)


def _further(runs: Runs, part: str, best: Best) -> dict[int, float]:
    """Test accuracy of the whitening minus that of batch normalization, in points."""
    rival = next((norm for norm in best if norm in WHITENINGS), None)
    if rival is None:
        return {}
    arms = [runs.get(("feature-independent", part, norm, best[norm]), {}) for norm in (rival, "bn")]
    return gains(*arms)


def _planned(claim: str, rows: Sequence[Row], runs: Runs, best: Best) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    wanted = [(values, delta) for values, delta in _pilots(claim, rows, runs, best).values()]
    if any(len(values) < len(PILOT_SEEDS) for values, _ in wanted):
        return None
    return max(planned_n(values, delta, LEAST_SEEDS, MOST_SEEDS) for values, delta in wanted)


def _pilots(
    claim: str, rows: Sequence[Row], runs: Runs, best: Best
) -> dict[str, tuple[list[float], float]]:
    """The pilot's values by contrast, and what their half-width is planned by."""
    t = claims()[claim].thresholds
    if claim == "ics-def":
        values = _drifts(rows, "pilot", "none", best.get("none"))
        return {_DRIFT: (list(values.values()), t["delta"])}
    speed = _speed(rows, "pilot", best).ratios
    return {
        _SPEED: (list(speed.values()), math.log(t["ratio"])),
        _WHITENING: (list(_further(runs, "pilot", best).values()), t["delta"]),
    }


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network and look at it; or check the identity."""
    claim, part, norm = (str(arm[key]) for key in ("claim", "part", "norm"))
    rate, plan = float(arm["rate"] or 0.0), PLANS[budget]
    if part == "identity":
        return features.identity(data, seed)
    steps = plan.steps[claim]
    if claim == "ics-def":
        return drift.measure(part, norm == "bn", rate, seed, data, steps, plan.images)
    return features.measure(part, norm, rate, seed, data, steps, plan.images)


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """Both claims, fair; what is missing makes them inconclusive."""
    if not rows:
        return []
    budget, data = str(rows[0]["budget"]), str(rows[0]["data"])
    plan, runs = PLANS[budget], collect(rows, _ARM)
    verdicts = []
    for claim in CLAIMS:
        tuning = _tuning(claim, runs, plan)
        best = _compared(claim, runs, tuning)
        notes: list[str] = []
        if best:
            chosen = ", ".join(f"{NAMES[norm]} {rate:g}" for norm, rate in best.items())
            notes.append(f"Learning rates: {chosen}.")
        if tuning.missing:
            notes.append(f"Missing: {tuning.missing} tuning runs; no fair contrast.")
        elif tuning.at_edge and plan.decides:
            notes.append("A best learning rate is at the end of all that is tried.")
        diverged = sum(
            run.diverged
            for (of, part, *_), by_seed in runs.items()
            for run in by_seed.values()
            if (of, part) == (claim, "fair")
        )
        if diverged:
            notes.append(f"Runs that diverged, and count with the numbers they had: {diverged}.")
        if not plan.decides:
            notes.append(f"The budget {budget} tries the wiring; it decides nothing.")
        how = _drifting if claim == "ics-def" else _suffices
        fair = how(rows, runs, best, notes)
        pilots = _pilots(claim, rows, runs, best)
        verdict = answer(
            claim,
            Setting(
                "layer-inputs",
                budget,
                data,
                *_PLACE[claim],
                plan.decides,
            ),
            WORDS[claim],
            fair,
            {},
            delta=claims()[claim].thresholds["delta"],
            pilot={name: values for name, (values, _) in pilots.items()},
            planned=_planned(claim, rows, runs, best),
            notes=notes,
        )
        verdicts.append(dataclasses.replace(verdict, published_status=None))
    return verdicts


_PLACE = {
    "ics-def": ("MLP 100-100-100", "at its best learning rate", "standard deviations"),
    "feature-independent": (
        "MLP 100-100",
        "each network at its best learning rate",
        "log ratio of steps",
    ),
}
WORDS = {
    "ics-def": Words(
        "the inputs of the last layer drift from each tenth of training to the next: {weakest}",
        "the inputs of the last layer drift by less than {delta} standard deviations: {refuted}",
        "the inputs of the last layer drift so: {weakest}",
    ),
    "feature-independent": Words(
        "batch normalization speeds up training, and whitening does not gain {delta} points more; "
        "the speed: {weakest}",
        "normalizing each feature on its own does not suffice: {refuted}",
        "the speed: {weakest}",
        "one part holds and the other does not: {refuted}",
    ),
}


def _drifting(rows: Sequence[Row], runs: Runs, best: Best, notes: list[str]) -> Outcome:
    delta = claims()["ics-def"].thresholds["delta"]
    own = superiority(_drifts(rows, "fair", "none", best.get("none")).values(), delta, LEAST_SEEDS)
    columns = {
        "drift": "what the output layer receives",
        "drift_of_sigmoid_inputs": "inputs of the last sigmoids",
        "drift_of_shape": "shape",
        "drift_of_correlations": "correlations",
    }
    for column, words in columns.items():
        bn, none = (_drifts(rows, "fair", n, best.get(n), column) for n in NORMS)
        logs = [math.log(bn[s] / none[s]) for s in sorted(bn.keys() & none.keys())
                if bn[s] > 0 and none[s] > 0]  # fmt: skip
        if len(logs) > 1:
            means = [math.fsum(by.values()) / len(by) for by in (none, bn)]
            notes.append(
                f"Secondary, drift of {words}: {means[0]:.3f} without and {means[1]:.3f} with; "
                f"log ratio with over without {span(interval(logs))} (20 % is 0.18)."
            )
    return Outcome(
        own.status,
        own.interval,
        own.reason,
        own.n_needed,
        {_DRIFT: own},
        _DRIFT if own.interval else None,
        own.p,
    )


def _suffices(rows: Sequence[Row], runs: Runs, best: Best, notes: list[str]) -> Outcome:
    t = claims()["feature-independent"].thresholds
    speed = _speed(rows, "fair", best)
    faster = _faster(speed, math.log(t["ratio"]))
    further = _further(runs, "fair", best)
    gain = superiority(further.values(), t["delta"], LEAST_SEEDS)
    turned = {"supported": "refuted", "refuted": "supported"}
    enough = dataclasses.replace(
        gain, status=turned.get(gain.status, gain.status), p=None,
        reason=f"whitening gains {t['delta']:g} points or more" if gain.status == "supported"
        else gain.reason,
    )  # fmt: skip
    for norm, count in speed.late.items():
        if count:
            notes.append(f"Runs that did not arrive at a target ({NAMES[norm]}): {count}.")
    checks = [row for row in rows if row.get("kind") == "identity"]
    # of the identity's values as of the others: the worst decides
    ratio = max((_real(r["error"]) / (EPS * _real(r["condition"])) for r in checks), default=None)
    kept = Outcome("inconclusive", None, "not checked")
    if ratio is not None:
        status = "supported" if ratio <= t["roundings"] else "inconclusive"
        status = "refuted" if ratio > t["counterexample"] * t["roundings"] else status
        kept = Outcome(status, None, f"error of {ratio:.2g} eps times K")
        notes.append(f"Correlations before and after BN: {kept.reason}; {kept.status}.")
    for norm, rate in best.items():
        last = _by_seed(rows, "feature-independent", "fair", norm, rate).values()
        values = [_real(r["correlation"]) for each in last for r in each if "correlation" in r]
        if values:
            mean = math.fsum(values) / len(values)
            notes.append(f"Secondary, mean absolute correlation ({NAMES[norm]}): {mean:.3f}.")
    cells = {_SPEED: faster, _WHITENING: enough}
    statuses = {faster.status, enough.status}
    if kept.status != "supported":
        status = kept.status
        cells[_IDENTITY] = kept
    elif len(statuses) == 1:
        status = statuses.pop()
    else:
        status = "mixed" if statuses == {"supported", "refuted"} else "inconclusive"
    reason = "; ".join(f"{name}: {o.reason}" for name, o in cells.items())
    needs = [o.n_needed for o in cells.values() if o.n_needed is not None]
    return Outcome(
        status,
        faster.interval,
        reason,
        max(needs) if needs and status == "inconclusive" else None,
        cells,
        _SPEED if faster.interval else None,
    )


def _faster(speed: Speed, bound: float) -> Outcome:
    """Above the bound; by a sign test, where more than half of an arm did not arrive."""
    values = list(speed.ratios.values())
    found = lies_above(values, bound, LEAST_SEEDS)
    if len(values) < LEAST_SEEDS or 2 * max(speed.late.values()) <= len(values):
        return found
    up, down = sum(v > 0 for v in values), sum(v < 0 for v in values)
    p = float(binomtest(up, up + down).pvalue) if up + down else 1.0
    status = "inconclusive" if p >= 0.05 else "supported" if up > down else "refuted"
    reason = f"a target was not reached; sign test, {up} up and {down} down, p = {p:.2g}"
    return Outcome(status, found.interval, reason, p=p)


_FIGURES = {
    "drift": Axes(
        "Drift of the inputs of the output layer",
        "step",
        "Wasserstein-1 distance (standard deviations)",
        caption="Since the tenth of training before, mean over the units of the last hidden layer.",
    ),
    "speed": Axes(
        "Validation accuracy on the way",
        "step",
        "accuracy (%)",
        x_log=True,
        caption="2,000 validation images, each network at its best learning rate.",
    ),
}


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Drift over training; validation accuracy over training."""
    if not rows:
        return []
    plan, runs = PLANS[str(rows[0]["budget"])], collect(rows, _ARM)
    points: list[Row] = []
    columns = {
        "ics-def": ("drift", "drift", 1.0),
        "feature-independent": ("speed", "validation", 100.0),
    }
    for claim, (figure, column, scale) in columns.items():
        for norm, rate in _compared(claim, runs, _tuning(claim, runs, plan)).items():
            series = "without" if norm == "none" else NAMES[norm]
            points += [
                {
                    "kind": "curve",
                    "curve": figure,
                    "series": series,
                    "x": row["step"],
                    "y": scale * _real(row[column]),
                }
                for each in _by_seed(rows, claim, "fair", norm, rate).values()
                for row in each
                if column in row
            ]
    where = PLACES.get(str(rows[0]["data"]), str(rows[0]["data"]))
    named = {k: axes._replace(title=f"{axes.title}, {where}") for k, axes in _FIGURES.items()}
    return drawings("layer-inputs", named, points)


def _real(value: Scalar) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a row must have numbers, got {value!r}. Repeat that cell.")
    return float(value)
