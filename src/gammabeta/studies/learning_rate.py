"""Is the benefit of batch normalization that it allows larger learning rates? Does it speed up?

Three claims: that it speeds up training (bn-speed), that it allows much larger learning rates
(higher-lr), both of five texts and of Ioffe & Szegedy 2015; and that the second is all of the
benefit. The last (bjorck-lr) is that of Bjorck et al. 2018, Fig. 1: a ResNet-110 on CIFAR-10
trained with the small rate that it needs without batch normalization (BN) gains nothing by BN; with
BN it may take larger rates, and gains by them. Fig. 4 of the MNIST study (Chang et al. 2017) shows
a gain at a small rate.

Networks, ReLU: deep, pixels and ten layers of 100 units, as the claim is about deep networks; it
gives the verdict. Shallow, two layers of 100: shown. BN before each activation, no bias where it
follows, bias 0.1 elsewhere, weights from a truncated normal distribution with standard deviation
sqrt(2 / fan-in). Batches of 64, 800 steps of SGD without momentum (1,500 at `full`), mean
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

Speed (part "speed", for bn-speed)
    The shallow network, both arms at their best rates as above; accuracy on 2,000 validation images
    at 40 log-spaced steps. Shown, at BN's rate: BN on the first layer only, on the second only.
    Primary contrast: natural logarithm of the ratio without / with of the steps to 90 and to 93 %,
    mean of both targets, lies above ln 1.25. The same of the processor time of training, apart.
    5 to 16 seeds by the pilot (predicted half-width ln 1.25 / 2). As published: Ioffe & Szegedy's
    network, Section 4.1: binary pixels, three layers of 100 sigmoid units, Gaussian weights (0.1;
    they name no number), all training images, batches of 60, rate 0.1 (nor this), 2,000 steps of
    their 50,000; targets 90 and 95 %; 5 seeds. A run that does not arrive counts as arriving at its
    last step, which makes the ratio smaller if it is one without BN, and is counted.
Largest rate (part "ladder", for higher-lr)
    Both networks, 200 steps, rates 1/16, 1/8, ... doubled until two in a row fail, halved if none
    works; a rate works if every loss is finite and accuracy on 1,000 validation images is above
    85 %. Primary contrast: log2 of the ratio with / without of the largest rate that works lies
    above 2, in both networks (one refuted refutes, at 1 - 0.05/2). 5 to 16 seeds by the pilot
    (predicted half-width 1). A search that ends at 2^10 without failures is counted.

What its author would call fair: a deep network, the small rate chosen where the network without BN
does best, each arm free to take its own. What would embarrass us: best rates of both arms that are
the same (the two parts then ask for opposite answers, and the claim is refuted wherever BN helps),
or a best rate at the end of all that was tried.

Changed against the registry: 800 steps, the small rate as above instead of a fixed one; no target
of 97 %, which 5,000 images do not reach; 200 steps and two networks for the largest rate. `tiny`
tries the wiring with two rates; it decides nothing. On the bundled digits each seed splits the
1,797 images anew: a demonstration.

Rows: arm fields part, group (the network), arm ("bn", "none"), rate, and optionally width (a factor
on the hidden units); `step`, `accuracy`, `loss`, `diverged`; speed: `step`, `validation`,
`finite`, `cpu_time`; ladder: `power`, `works`, `validation`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._learning_rate import ladder, rules, speed
from gammabeta.studies._nets import MLP
from gammabeta.studies._pairs import NORMS, curve, rates_curve
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    BAND,
    EQUIVALENCE_SEEDS,
    LEAST_SEEDS,
    PILOT_SEEDS,
    TUNING_SEEDS,
    Best,
    Trained,
    Tuned,
    Wish,
    figure,
    guess,
    needed,
    own,
    place,
    settle,
    trials,
)
from gammabeta.studies._verdict import Verdict

CLAIMS = ("bjorck-lr", "bn-speed", "higher-lr")

DEPTHS = {"deep": 10, "shallow": 2}
GROUPS = dict.fromkeys(DEPTHS, NORMS)
RATES = (0.03, 0.1, 0.3)


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    evaluations: int
    published_steps: int
    ladder_steps: int
    ladder_last: int  # power of two
    seeds: int
    other_seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


PLANS = {
    "tiny": Plan(10, 3, 10, 3, -3, 1, 1, (0.1, 0.3), 500, False),
    "small": Plan(
        *(800, 3, 2000, 200, ladder.LAST),
        *(EQUIVALENCE_SEEDS, LEAST_SEEDS, RATES, 10000, True),
    ),
    "full": Plan(
        *(1500, 12, 50000, 300, ladder.LAST),
        *(EQUIVALENCE_SEEDS, LEAST_SEEDS, RATES, 10000, True),
    ),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until both grids are settled; then the main runs; pilot; more seeds."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    asked = {part: rules.planned_of(part, tuned, plan.other_seeds) for part in ("speed", "ladder")}
    return _wanted(plan, tuned, seeds, rules.planned(tuned), asked)


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, half as many seeds more than the least."""
    plan = PLANS[budget]
    best = {group: {"bn": plan.rates[-1], "none": plan.rates[0]} for group in GROUPS}
    tuned = guess(GROUPS, plan)._replace(best=best)
    return _wanted(plan, tuned, seeds, plan.seeds * 3 // 2, {})


def _wanted(
    plan: Plan,
    tuned: Tuned,
    seeds: int | None,
    planned: int | None,
    asked: Mapping[str, int | None],
) -> list[Cell]:
    wanted = needed(tuned, plan.seeds, seeds, [planned], _main)
    settled = tuned.best if len(tuned.best) == len(GROUPS) else None
    return [_cell(plan, *wish) for wish in wanted + _others(plan, settled, seeds, asked)]


def _others(
    plan: Plan, best: Best | None, seeds: int | None, planned: Mapping[str, int | None]
) -> list[Wish]:
    """The parts "ladder" and "published", and "speed" once its rates are known."""
    count = plan.other_seeds if seeds is None else seeds
    pilot = seeds is None and plan.decides
    rungs = [Trained(group, norm, 0.0) for group in GROUPS for norm in NORMS]
    wanted = [
        Wish(1, seed, "published", Trained("published", norm, rules.PUBLISHED_RATE))
        for seed in range(count)
        for norm in NORMS
    ]
    parts = {"ladder": (rungs, rungs)}
    if best:
        pair = rules.shallow(best)
        some = [pair[0]._replace(arm=arm) for arm in ("first", "second")]
        parts["speed"] = ([*pair, *some], pair)
    for part, (all_arms, arms) in parts.items():
        wanted += [Wish(1, seed, part, what) for seed in range(count) for what in all_arms]
        if pilot:
            wanted += [Wish(2, s, f"{part}-pilot", what) for s in PILOT_SEEDS for what in arms]
            for seed in range(count, planned.get(part) or 0):
                wanted += [Wish(3, seed, part, what) for what in arms]
    return wanted


def _main(best: Best) -> list[Trained]:
    """Both arms under all conditions, each network at each rate once."""
    wanted = [
        Trained(group, norm, rates[norm])
        for group in GROUPS
        for rates in rules.rates_of(best, group).values()
        for norm in NORMS
    ]
    return list(dict.fromkeys(wanted))


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    depth, bn = DEPTHS.get(what.group, 3), what.arm == "bn"
    # In seconds, about: steps, and looks at the evaluation images.
    step = 0.5e-3 + depth * (0.21e-3 if bn else 0.1e-3)
    if part.startswith(("speed", "published")):
        steps = plan.published_steps if part == "published" else plan.steps
        return Cell("learning-rate", arm, seed, round(steps * step + 0.2, 3), wave)
    if part.startswith("ladder"):
        rates = (8 if bn else 5) if plan.decides else 2
        return Cell("learning-rate", arm, seed, round(rates * plan.ladder_steps * step, 3), wave)
    look = (3e-6 + depth * 1e-6) * min(plan.images, 5000 if part == "tuning" else 10000)
    cost = plan.steps * step + len(_stops(plan, part)) * look
    return Cell("learning-rate", arm, seed, round(cost, 3), wave)


def _stops(plan: Plan, part: str) -> list[int]:
    """Steps after which a part evaluates."""
    stops = log_steps(plan.steps, plan.evaluations)
    return stops if part == "fair" else stops[-3:]


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network: a row for each evaluation, or look, or learning rate tried."""
    part, plan = str(arm["part"]), PLANS[budget]
    name, rate = str(arm["arm"]), float(arm["rate"] or 0.0)
    width = float(arm.get("width") or 1.0)
    if part.startswith("ladder"):
        depth = DEPTHS[str(arm["group"])]
        steps, last = plan.ladder_steps, plan.ladder_last
        return ladder.climb(depth, name == "bn", seed, data, steps, width, last)
    if part == "published":
        return speed.published(name, rate, seed, data, plan.published_steps)
    if part.startswith("speed"):
        return speed.fair(name, rate, seed, data, plan.steps, width)
    return _measure(arm, seed, plan, data)


def _measure(arm: Mapping[str, Scalar], seed: int, plan: Plan, data: Images) -> Iterator[Row]:
    part = str(arm["part"])
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
    plan = PLANS[str(rows[0]["budget"])]
    tuned = settle(rows, GROUPS, plan)
    return [
        rules.small_rate(tuned),
        rules.fewer_steps(tuned, plan.other_seeds, plan.published_steps),
        rules.larger_rates(tuned, plan.other_seeds, plan.ladder_steps),
    ]


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Accuracy over learning rates, the claim at one glance; and at the end of training."""
    if not rows:
        return []
    tuned, where = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])]), place(rows)
    runs, best = tuned.runs, tuned.best
    over_rates, ends = [], []
    for group in GROUPS:
        tried = trials(runs, group)
        if tried:
            series = [rates_curve(tried, norm, TUNING_SEEDS) for norm in NORMS]
            over_rates.append({"title": group, "series": series})
        for condition, rates in rules.rates_of(best, group).items() if group in best else ():
            arms = [(runs.get(("fair", group, n, rates[n]), {}), n) for n in NORMS]
            series = [curve(arm, n) for arm, n in arms if arm]
            if series:
                ends.append({"title": f"{group}, {condition}", "series": series})
    return [
        *figure(
            "learning-rate",
            "rates",
            f"Validation accuracy on {where} over learning rates, deep and shallow",
            "The small rate is the best one without batch normalization. Mean and range over two "
            "seeds.",
            over_rates,
            "learning rate",
        ),
        *figure(
            "learning-rate",
            "fair",
            f"Test accuracy on {where} at the small rate and at each network's best",
            BAND,
            ends,
        ),
    ]
