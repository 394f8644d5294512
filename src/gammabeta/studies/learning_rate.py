"""Is the benefit of batch normalization that it allows larger learning rates?

The claim (bjorck-lr) is that of Bjorck et al. 2018, Fig. 1: a ResNet-110 on CIFAR-10 trained with
the small rate that it needs without batch normalization (BN) gains nothing by BN; with BN it may
take larger rates, and gains by them. Fig. 4 of the MNIST study (Chang et al. 2017) shows a gain at
a small rate.

Networks, ReLU: deep, pixels and ten layers of 100 units, as the claim is about deep networks; it
gives the verdict. Shallow, two layers of 100: shown. BN before each activation, no bias where it
follows, bias 0.1 elsewhere, weights from a truncated normal distribution with standard deviation
sqrt(2 / fan-in). Batches of 64, 1,000 steps of SGD without momentum (1,500 at `full`), mean
cross-entropy, 5,000 training images drawn for each seed from the first 55,000, PyTorch's defaults
for the layer, evaluation by running statistics. Both arms have the same start and batches.

Fair (the only verdict: the source's network and images cannot be had here)
    Best rate of each arm: highest accuracy on the last 5,000 training images, mean of seeds 800 and
    801, from 0.03, 0.1, 0.3; a best value at an edge extends the grid for both arms, until it lies
    inside. A rate at which a loss was not finite is not chosen.
    Small rate: the best rate of the arm without BN, as in the source, whose network without BN
    was at its best at 1e-4 and failed at larger rates. Both arms train at it.
    Seeds 900 to 903 are a pilot: they give the number of seeds (8 to 16; predicted half-width of
    the 95 % interval of both contrasts delta / 2), and are used for nothing else.

Primary contrast: test accuracy with minus without BN in the deep network, in points, mean of the
last three evaluations (at 96, 98 and 100 % of the steps), delta = 0.3: at the small rate
equivalence; and each arm at its best rate superiority. Both have to hold; one refuted part refutes
(at 1 - 0.05/2).
Positive control: the second part. Where BN does not gain at the best rates, the verdict is
inconclusive: nothing to explain.
Shown: the same of the shallow network; the deep one at a tenth of the small rate; its gain at the
best rates minus that at the small one.

What its author would call fair: a deep network, the small rate chosen where the network without BN
does best, each arm free to take its own. What would embarrass us: best rates of both arms that are
the same (the two parts then ask for opposite answers, and the claim is refuted wherever BN helps),
or a best rate at the end of all that was tried.

Changed against the registry: 1,000 steps, the small rate as above instead of a fixed one. `tiny`
tries the wiring with two rates; it decides nothing. On the bundled digits each seed splits the
1,797 images anew: a demonstration.

Rows: arm fields part, group (the network), arm ("bn", "none"), rate, and optionally width (a factor
on the hidden units); `step`, `accuracy`, `loss`, `diverged`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import PLACES, Setting, Words
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._nets import MLP
from gammabeta.studies._pairs import NORMS, Runs, collect, curve, curves, rates_curve
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    EQUIVALENCE_SEEDS,
    KEYS,
    MOST_SEEDS,
    TUNING_SEEDS,
    Best,
    Trained,
    chosen,
    complete,
    diverged_note,
    fair_verdict,
    minus,
    search,
    shown,
    trials,
    tuning_notes,
    wishes,
)
from gammabeta.studies._verdict import Verdict, controlled, planned_n

CLAIMS = ("bjorck-lr",)

DEPTHS = {"deep": 10, "shallow": 2}
GROUPS = dict.fromkeys(DEPTHS, NORMS)
SMALL, LARGE, TENTH = "BN − none at the small rate", "each at its best rate", "at a tenth of it"
RATES = (0.03, 0.1, 0.3)


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    evaluations: int
    seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


PLANS = {
    "tiny": Plan(10, 3, 1, (0.1, 0.3), 500, False),
    "small": Plan(1000, 3, EQUIVALENCE_SEEDS, RATES, 10000, True),
    "full": Plan(1500, 12, EQUIVALENCE_SEEDS, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until both grids are settled; then the main runs; pilot; more seeds."""
    plan = PLANS[budget]
    runs = collect([r for r in rows if (r["budget"], r["data"]) == (budget, data)], KEYS)
    tunings = search(runs, GROUPS, plan.rates, grow=plan.decides)
    best = chosen(tunings)
    wanted = wishes(
        GROUPS,
        tunings,
        _main(best) if len(best) == len(GROUPS) else None,
        least=plan.seeds,
        seeds=seeds,
        pilot=plan.decides,
        planned=_planned(runs, best),
    )
    return [_cell(plan, *wish) for wish in wanted]


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, half as many seeds more than the least."""
    plan = PLANS[budget]
    guess = {group: {"bn": plan.rates[-1], "none": plan.rates[0]} for group in GROUPS}
    wanted = wishes(
        GROUPS,
        search({}, GROUPS, plan.rates, grow=False),
        _main(guess),
        least=plan.seeds,
        seeds=seeds,
        pilot=plan.decides,
        planned=plan.seeds * 3 // 2,
    )
    return [_cell(plan, *wish) for wish in wanted]


def _rates(best: Best, group: str) -> dict[str, dict[str, float]]:
    """The rates of both arms, by condition."""
    small = best[group]["none"]
    found = {SMALL: dict.fromkeys(NORMS, small), LARGE: dict(best[group])}
    return found | ({TENTH: dict.fromkeys(NORMS, small / 10)} if group == "deep" else {})


def _main(best: Best) -> list[Trained]:
    """Both arms under all conditions, each network at each rate once."""
    wanted = [
        Trained(group, norm, rates[norm])
        for group in GROUPS
        for rates in _rates(best, group).values()
        for norm in NORMS
    ]
    return list(dict.fromkeys(wanted))


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    depth, bn = DEPTHS[what.group], what.arm == "bn"
    # In seconds, about: steps, and looks at the evaluation images.
    step = 0.5e-3 + depth * (0.21e-3 if bn else 0.1e-3)
    look = (3e-6 + depth * 1e-6) * min(plan.images, 5000 if part == "tuning" else 10000)
    cost = plan.steps * step + len(_stops(plan, part)) * look
    return Cell("learning-rate", arm, seed, round(cost, 3), wave)


def _stops(plan: Plan, part: str) -> list[int]:
    """Steps after which a part evaluates."""
    stops = log_steps(plan.steps, plan.evaluations)
    return stops if part == "fair" else stops[-3:]


def _differences(runs: Runs, part: str, best: Best, group: str) -> dict[str, dict[int, float]]:
    """With minus without BN by condition and seed."""
    if group not in best:
        return {SMALL: {}, LARGE: {}, TENTH: {}}
    return {
        condition: minus(runs, part, *(Trained(group, norm, rates[norm]) for norm in NORMS))
        for condition, rates in _rates(best, group).items()
    }


def _planned(runs: Runs, best: Best) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = _differences(runs, "pilot", best, "deep")
    if not complete(pilot):
        return None
    delta = claims()["bjorck-lr"].thresholds["delta"]
    return max(
        planned_n(pilot[name].values(), delta, EQUIVALENCE_SEEDS, MOST_SEEDS)
        for name in (SMALL, LARGE)
    )


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network: a row for each evaluation."""
    part, plan = str(arm["part"]), PLANS[budget]
    evaluation = "validation" if part == "tuning" else "test"
    train_x, train_y, held_x, held_y = fair_split(data, seed, evaluation)
    held, labels = pixels(held_x[: plan.images], data.pixel_max), held_y[: plan.images]
    units = round(100 * float(arm.get("width") or 1.0))
    sizes = (held.shape[1], *[units] * DEPTHS[str(arm["group"])], 10)
    net = MLP(sizes, "relu", arm["arm"] == "bn", stream(seed, "weights"))
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=plan.steps,
        order=stream(seed, "order"),
        stops=_stops(plan, part),
    )
    for step, loss in training:
        row: Row = {"step": step, "accuracy": accuracy(net, held, labels)}
        row["diverged"] = not math.isfinite(loss)
        if math.isfinite(loss):
            row["loss"] = loss
        yield row


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """One claim, fair; what is missing makes it inconclusive."""
    if not rows:
        return []
    budget, data = str(rows[0]["budget"]), str(rows[0]["data"])
    plan, runs = PLANS[budget], collect(rows, KEYS)
    tunings = search(runs, GROUPS, plan.rates, grow=plan.decides)
    best = chosen(tunings)
    delta = claims()["bjorck-lr"].thresholds["delta"]
    found = _differences(runs, "fair", best, "deep")
    parts = {
        SMALL: Part(list(found[SMALL].values()), "equivalence", delta),
        LARGE: Part(list(found[LARGE].values()), "superiority", delta),
    }
    outcome = joint(parts, EQUIVALENCE_SEEDS)
    outcome = controlled(outcome, outcome.cells[LARGE])

    notes = tuning_notes(tunings, budget, decides=plan.decides) + diverged_note(runs)
    if "deep" in best and best["deep"]["bn"] <= best["deep"]["none"]:
        notes.append("The best rate with BN is not larger than the one without.")
    if outcome.cells[LARGE].status != "supported" and outcome.cells[LARGE].interval:
        notes.append(f"The positive control, BN − none {LARGE}, is not supported.")
    more = shown(f"deep, {TENTH}", list(found[TENTH].values()))
    both = sorted(found[SMALL].keys() & found[LARGE].keys())
    more += shown(
        "deep, gain at the best rates − gain at the small one",
        [found[LARGE][seed] - found[SMALL][seed] for seed in both],
    )
    for name, by_seed in _differences(runs, "fair", best, "shallow").items():
        more += shown(f"shallow, {name}", list(by_seed.values()))
    setting = Setting(
        "learning-rate",
        budget,
        data,
        "MLP of ten layers",
        "at the rate that is best without batch normalization, and each network at its own",
        "points of accuracy",
        plan.decides,
    )
    words = Words(
        "batch normalization gains nothing at the small rate, and gains accuracy where each "
        "network has its best rate: {weakest}",
        "the gain of batch normalization is not that of a larger learning rate alone: {refuted}",
        "the gain is {weakest}",
    )
    pilot = {
        name: list(by_seed.values())
        for name, by_seed in _differences(runs, "pilot", best, "deep").items()
    }
    verdict = fair_verdict(
        "bjorck-lr", setting, words, outcome, pilot=pilot, planned=_planned(runs, best), notes=notes
    )
    if verdict.status == "demo":
        more = [{**cell, "status": "demo", "reason": ""} for cell in more]
    return [dataclasses.replace(verdict, cells=[*verdict.cells, *more])]


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Accuracy over learning rates, the claim at one glance; and at the end of training."""
    if not rows:
        return []
    plan, runs = PLANS[str(rows[0]["budget"])], collect(rows, KEYS)
    where = PLACES.get(str(rows[0]["data"]), str(rows[0]["data"]))
    best = chosen(search(runs, GROUPS, plan.rates, grow=plan.decides))
    over_rates, ends = [], []
    for group in GROUPS:
        tried = trials(runs, group)
        if tried:
            series = [rates_curve(tried, norm, TUNING_SEEDS) for norm in NORMS]
            over_rates.append({"title": group, "series": series})
        for condition, rates in _rates(best, group).items() if group in best else ():
            arms = [(runs.get(("fair", group, n, rates[n]), {}), n) for n in NORMS]
            series = [curve(arm, n) for arm, n in arms if arm]
            if series:
                ends.append({"title": f"{group}, {condition}", "series": series})
    all_figures = [
        curves(
            "learning-rate",
            "rates",
            f"Validation accuracy on {where} over learning rates, deep and shallow",
            "The small rate is the best one without batch normalization. Mean and range over two "
            "seeds.",
            "learning rate",
            over_rates,
        ),
        curves(
            "learning-rate",
            "fair",
            f"Test accuracy on {where} at the small rate and at each network's best",
            "Mean over seeds; the band is its 95 % interval.",
            "training step",
            ends,
        ),
    ]
    return [figure for figure in all_figures if figure["panels"]]
