"""Does batch normalization help whatever the activation, and does it help sigmoid most?

The claims are those of a study on MNIST (Chang et al. 2017, repository twcmchang/MLDS_final_2017,
part B and Fig. 4): networks with ReLU, leaky ReLU (slope 0.2), sigmoid, softplus and tanh, each
with and without batch normalization. The difference in test accuracy between the two is the gain.

Network: pixels-100-100-10, batch normalization before each activation, no bias where it follows,
bias 0.1 elsewhere, weights from a truncated normal distribution with standard deviation
sqrt(2 / fan-in). Batches of 64, stochastic gradient descent without momentum, cross-entropy. Both
arms of a pair start from the same weights and see the same batches, seed by seed.

Fair (it gives the verdict)
    Mean loss, 5,000 training images drawn for each seed from the first 55,000, PyTorch's defaults
    for the layer (eps 1e-5, momentum 0.1), evaluation by running statistics. Each arm of each
    activation trains at its own best learning rate: the one with the highest validation accuracy
    (the last 5,000 training images), mean of seeds 800 and 801, from 0.01, 0.03, 0.1, 0.3, 1, 3. A
    best value at an edge extends the grid for both arms, so that they have the same number of
    trials, until it lies inside; a rate at which a loss was not finite is not chosen.
    Seeds 900 to 903 are a pilot: they give the spread of the gains and so the number of seeds (at
    least 5, at most 16: the predicted half-width of the 95 % interval shall be delta / 2, in every
    contrast), and are used for nothing else.

As published
    The source's code: the loss is the sum over the batch, all 55,000 training images, eps 1e-3,
    momentum 0.001, and the test set as one batch, normalized by its own statistics. One learning
    rate for all; since the published figures do not seem to come from the committed rate, both
    candidates are run, 0.01 and 0.0001 (on the sum), as two levels declared beforehand.

Primary contrast: test accuracy with minus without batch normalization, in points, mean of the last
three evaluations (at 96, 98 and 100 % of the steps), fair setting. Smallest effect of interest:
delta = 0.3 points. Batch normalization helps whatever the activation if superiority holds for all
five; it helps sigmoid most if superiority holds for gain(sigmoid) - gain(k) for the other four.

Budgets: `small` trains 1,000 steps, `full` the source's 40,000 (with 3 seeds) in the published part
and is `small` in the fair one; `tiny` a few, with two learning rates and 1,000 test images, to try
the wiring: it decides nothing.

Changed against the registry: 1,000 steps instead of 2,000, so that everything fits five
minutes on two cores. Changed against the source: weights and batch order vary with the seed (its
seed was fixed, one run each), every epoch is shuffled (its first was not), about ten to forty
evaluations instead of one every 50 steps, and evaluation does not touch the running statistics.

On the bundled digits each seed splits the 1,797 images anew (1,000 training, 297 validation, 500
test) and both parts train on the 1,000: a demonstration, which supports and refutes nothing.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import PLACES, Setting, Words, answer, points
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._nets import ACTIVATIONS, m2
from gammabeta.studies._pairs import (
    NORMS,
    Run,
    Runs,
    Tuning,
    collect,
    curve,
    curves,
    gains,
    rates_curve,
    tune,
    unpaired,
)
from gammabeta.studies._train import (
    accuracy,
    fair_split,
    log_steps,
    pixels,
    published_split,
    stream,
    train,
)
from gammabeta.studies._verdict import Verdict, planned_n, universal

CLAIMS = ("act-all", "act-sigmoid-most")

NAMES = {
    "relu": "ReLU",
    "leaky_relu": "leaky ReLU",
    "sigmoid": "sigmoid",
    "softplus": "softplus",
    "tanh": "tanh",
}
TUNING_SEEDS = (800, 801)
PILOT_SEEDS = (900, 901, 902, 903)
LEAST_SEEDS, MOST_SEEDS = 5, 16
PUBLISHED_RATES = (0.01, 0.0001)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_ARM = ("part", "activation", "norm", "rate")

Rates = Mapping[str, Mapping[str, float]]  # activation -> arm -> learning rate


class Plan(NamedTuple):
    """What a budget stands for."""

    fair_steps: int
    published_steps: int
    evaluations: int
    published_evaluations: int
    seeds: int
    published_seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


PLANS = {
    "tiny": Plan(30, 30, 4, 4, 2, 2, (0.1, 1.0), 1000, False),
    "small": Plan(1000, 1000, 9, 9, 5, 5, RATES, 10000, True),
    "full": Plan(1000, 40000, 9, 40, 5, 3, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until every grid is settled; then the main runs, seed by seed; pilot; more seeds."""
    plan = PLANS[budget]
    runs = collect([r for r in rows if (r["budget"], r["data"]) == (budget, data)], _ARM)
    tunings = {a: _tuning(a, runs, plan) for a in ACTIVATIONS}
    wanted = [
        _cell(plan, 0, seed, "tuning", activation, norm, rate)
        for seed in TUNING_SEEDS
        for activation, tuning in tunings.items()
        for rate in tuning.grid
        for norm in NORMS
    ]
    best = {a: tuning.best for a, tuning in tunings.items() if tuning.best is not None}
    if len(best) < len(ACTIVATIONS):
        return wanted
    count = plan.seeds if seeds is None else seeds
    published = plan.published_seeds if seeds is None else seeds
    wanted += _main(plan, best, range(max(count, published)), count, published)
    if seeds is None and plan.decides:
        for seed in PILOT_SEEDS:
            wanted += _pairs(plan, 2, seed, "pilot", best)
        planned = _planned(runs, best)
        for seed in range(count, planned or 0):
            wanted += _pairs(plan, 3, seed, "fair", best)
    return wanted


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for no more seeds."""
    plan = PLANS[budget]
    guess = _same(plan.rates[0])
    count = plan.seeds if seeds is None else seeds
    published = plan.published_seeds if seeds is None else seeds
    wanted = cells(budget, data, seeds, [])
    wanted += _main(plan, guess, range(max(count, published)), count, published)
    if seeds is None and plan.decides:
        for seed in PILOT_SEEDS:
            wanted += _pairs(plan, 2, seed, "pilot", guess)
    return wanted


def _main(plan: Plan, best: Rates, seeds: range, fair: int, published: int) -> list[Cell]:
    """Every activation of both parts has one seed before any has the next."""
    wanted: list[Cell] = []
    for seed in seeds:
        if seed < fair:
            wanted += _pairs(plan, 1, seed, "fair", best)
        if seed < published:
            for rate in PUBLISHED_RATES:
                wanted += _pairs(plan, 1, seed, "published", _same(rate))
    return wanted


def _pairs(plan: Plan, wave: int, seed: int, part: str, rates: Rates) -> list[Cell]:
    return [_cell(plan, wave, seed, part, a, n, rates[a][n]) for a in ACTIVATIONS for n in NORMS]


def _cell(
    plan: Plan, wave: int, seed: int, part: str, activation: str, norm: str, rate: float
) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, "activation": activation, "norm": norm, "rate": rate}
    steps, stops = _steps(plan, part)
    # In thousands of plain steps; an evaluation of 10,000 images is worth about 40 of them.
    images = min(plan.images, 5000 if part == "tuning" else 10000)
    cost = steps / 1000 * (1.3 if norm == "bn" else 1.0) + 0.04 * images / 10000 * len(stops)
    return Cell("activations", arm, seed, round(cost, 3), wave)


def _steps(plan: Plan, part: str) -> tuple[int, list[int]]:
    """Steps of a part, and those after which it evaluates."""
    if part == "published":
        return plan.published_steps, log_steps(plan.published_steps, plan.published_evaluations)
    # Only the metric is needed of the others: its three evaluations.
    count = plan.evaluations if part == "fair" else 3
    stops = log_steps(plan.fair_steps, count)
    return plan.fair_steps, stops if part == "fair" else stops[-3:]


def _tuning(activation: str, runs: Runs, plan: Plan) -> Tuning:
    return tune(_trials(activation, runs), plan.rates, TUNING_SEEDS, grow=plan.decides)


def _trials(activation: str, runs: Runs) -> dict[tuple[str, float], dict[int, Run]]:
    return {
        (str(norm), float(rate)): by_seed
        for (part, name, norm, rate), by_seed in runs.items()
        if (part, name) == ("tuning", activation) and isinstance(rate, int | float)
    }


def _same(rate: float) -> Rates:
    """One learning rate for all."""
    return {a: dict.fromkeys(NORMS, rate) for a in ACTIVATIONS}


def _gains(
    part: str, runs: Runs, rates: Rates, *, batch: bool = False
) -> dict[str, dict[int, float]]:
    """Gain in points by activation and seed; empty where an arm or its rate is missing."""
    found: dict[str, dict[int, float]] = {}
    for a in ACTIVATIONS:
        arms = [runs.get((part, a, n, rates.get(a, {}).get(n)), {}) for n in NORMS]
        found[a] = gains(*arms, batch=batch)
    return found


def _contrasts(claim: str, by: Mapping[str, Mapping[int, float]]) -> dict[str, list[float]]:
    """The cells of a claim: one difference per seed each."""
    if claim == "act-all":
        return {NAMES[a]: list(by[a].values()) for a in ACTIVATIONS}
    sigmoid = by["sigmoid"]
    return {
        f"sigmoid − {NAMES[a]}": [sigmoid[s] - by[a][s] for s in sorted(sigmoid.keys() & by[a])]
        for a in ACTIVATIONS
        if a != "sigmoid"
    }


def _delta(claim: str) -> float:
    return claims()[claim].thresholds["delta"]


def _planned(runs: Runs, best: Rates) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = _gains("pilot", runs, best)
    if any(seed not in by_seed for by_seed in pilot.values() for seed in PILOT_SEEDS):
        return None
    return max(
        planned_n(values, _delta(claim), LEAST_SEEDS, MOST_SEEDS)
        for claim in CLAIMS
        for values in _contrasts(claim, pilot).values()
    )


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network and evaluate it: a row for each evaluation."""
    part, activation, rate = str(arm["part"]), str(arm["activation"]), float(arm["rate"] or 0.0)
    published, norm = part == "published", arm["norm"] == "bn"
    plan = PLANS[budget]
    steps, stops = _steps(plan, part)
    train_x, train_y, test_x, test_y = split(part, seed, data)
    test_x, test_y = test_x[: plan.images], test_y[: plan.images]
    test = pixels(test_x, data.pixel_max)
    eps, momentum = (1e-3, 0.001) if published else (1e-5, 0.1)
    weights = stream(seed, "weights")
    net = m2(test.shape[1], activation, norm, weights, eps=eps, momentum=momentum)
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=rate,
        steps=steps,
        order=stream(seed, "order"),
        stops=stops,
        loss="sum" if published else "mean",
    )
    for step, loss in training:
        share = accuracy(net, test, test_y, "batch" if published else "running")
        row: Row = {"step": step, "accuracy": share, "diverged": not math.isfinite(loss)}
        if math.isfinite(loss):
            row["loss"] = loss
        if part == "fair" and step in stops[-3:]:
            row["accuracy_batch"] = accuracy(net, test, test_y, "batch") if norm else share
        yield row


def split(part: str, seed: int, data: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and evaluation images and labels of a part; the choice depends on the seed alone."""
    if part == "published":
        return published_split(data, seed)
    return fair_split(data, seed, "validation" if part == "tuning" else "test")


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """Both claims, fair and as published; what is missing makes them inconclusive."""
    if not rows:
        return []
    budget, data = str(rows[0]["budget"]), str(rows[0]["data"])
    plan, runs = PLANS[budget], collect(rows, _ARM)
    tunings = {a: _tuning(a, runs, plan) for a in ACTIVATIONS}
    best = {a: tuning.best for a, tuning in tunings.items() if tuning.best is not None}
    fair, pilot = _gains("fair", runs, best), _gains("pilot", runs, best)
    beside = _gains("fair", runs, best, batch=True)
    published = {rate: _gains("published", runs, _same(rate)) for rate in PUBLISHED_RATES}

    notes: list[str] = []
    if best:
        chosen = [f"{NAMES[a]} {b['bn']:g} and {b['none']:g}" for a, b in best.items()]
        notes.append(f"Learning rates chosen, with and without BN: {', '.join(chosen)}.")
    for a, tuning in tunings.items():
        if tuning.missing:
            notes.append(f"Missing: {tuning.missing} tuning runs of {NAMES[a]}; no fair gain.")
        elif tuning.at_edge and plan.decides:
            notes.append(
                f"The best learning rate of {NAMES[a]} is at the end of all that is tried."
            )
    parts = [("fair", best), *(("published", _same(rate)) for rate in PUBLISHED_RATES)]
    diverged = 0
    for part, rates in parts:
        for a, b in rates.items():
            arms = [runs.get((part, a, n, b[n]), {}) for n in NORMS]
            where = f"{part}, {NAMES[a]}" + (f", rate {b['bn']:g}" if part == "published" else "")
            seeds = ", ".join(str(s) for s in unpaired(*arms))
            if not any(arms):
                notes.append(f"Missing: all runs ({where}).")
            elif seeds:
                notes.append(f"Left out, as one arm is missing: seed {seeds} ({where}).")
            diverged += sum(run.diverged for arm in arms for run in arm.values())
    if diverged:
        notes.append(f"Runs that diverged, and count with the accuracy they had: {diverged}.")
    if not plan.decides:
        notes.append(f"The budget {budget} tries the wiring; it decides nothing.")
    elif plan.published_steps < PLANS["full"].published_steps:
        source = PLANS["full"].published_steps
        notes.append(
            f"As published, but {plan.published_steps:,} steps for the source's {source:,}."
        )

    words = {
        "act-all": Words(
            "batch normalization gains accuracy with every activation, least with {weakest}",
            "batch normalization does not gain {delta} points with {refuted}",
            "the smallest gain is that with {weakest}",
        ),
        "act-sigmoid-most": Words(
            "sigmoid gains more than every other activation; the smallest contrast is {weakest}",
            "sigmoid does not gain {delta} points more than every other activation: {refuted}",
            "the smallest contrast of gains is {weakest}",
        ),
    }
    setting = Setting(
        experiment="activations",
        budget=budget,
        data=data,
        network="MLP 100-100",
        condition="each network at its best learning rate",
        unit="points of accuracy",
        decides=plan.decides,
    )
    verdicts = []
    for claim in CLAIMS:
        delta, also = _delta(claim), list(notes)
        means = {n: sum(v) / len(v) for n, v in _contrasts(claim, beside).items() if v}
        if means:
            each = ", ".join(f"{name} {points(mean)}" for name, mean in means.items())
            also.append(f"Fair but for test-batch statistics (secondary): {each}.")
        # The source's protocol has three seeds at `full`, declared beforehand.
        least = min(LEAST_SEEDS, plan.published_seeds) if plan.decides else LEAST_SEEDS
        verdicts.append(
            answer(
                claim,
                setting,
                words[claim],
                universal(_contrasts(claim, fair), delta, LEAST_SEEDS),
                {
                    f"rate {rate:g}": universal(_contrasts(claim, by), delta, least)
                    for rate, by in published.items()
                },
                delta=delta,
                pilot=_contrasts(claim, pilot),
                planned=_planned(runs, best),
                notes=also,
            )
        )
    return verdicts


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Accuracy over training, fair and at each published rate, over rates, and Fig. 4 again."""
    if not rows:
        return []
    plan, runs = PLANS[str(rows[0]["budget"])], collect(rows, _ARM)
    where = PLACES.get(str(rows[0]["data"]), str(rows[0]["data"]))
    tunings = {a: _tuning(a, runs, plan) for a in ACTIVATIONS}
    best = {a: tuning.best for a, tuning in tunings.items() if tuning.best is not None}

    def panels(part: str, rates: Rates) -> list[dict[str, Any]]:
        found = []
        for a, by_norm in rates.items():
            arms = [(runs.get((part, a, n, by_norm[n]), {}), n) for n in NORMS]
            series = [curve(arm, n) for arm, n in arms if arm]
            if series:
                found.append({"title": NAMES[a], "series": series})
        return found

    band = "Mean over seeds; the band is its 95 % interval."
    all_figures = [
        curves(
            "activations",
            "fair",
            f"Test accuracy on {where}, each network at its best learning rate",
            f"Fair setting: evaluated by running statistics. {band}",
            "training step",
            panels("fair", best),
        ),
        *(
            curves(
                "activations",
                f"published-{str(rate).replace('.', '-')}",
                f"Test accuracy on {where} as published, learning rate {rate:g} on the summed loss",
                f"The source's setting: the test set is normalized by its own statistics. {band}",
                "training step",
                panels("published", _same(rate)),
            )
            for rate in PUBLISHED_RATES
        ),
        curves(
            "activations",
            "tuning",
            f"Validation accuracy on {where} over learning rates",
            "How each network's learning rate was chosen. Mean and range over two seeds.",
            "learning rate",
            [
                {
                    "title": NAMES[a],
                    "series": [rates_curve(_trials(a, runs), n, TUNING_SEEDS) for n in NORMS],
                }
                for a in ACTIVATIONS
                if _trials(a, runs)
            ],
        ),
    ]
    # Imported here: how rows are drawn does not make them others.
    from gammabeta.studies._redrawn import redrawn

    again = redrawn("activations", rows, only=("fig-4",))
    return [figure for figure in all_figures if figure["panels"]] + again
