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
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Words, answer
from gammabeta.studies._beside import answered
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._learning_rate import ladder, speed
from gammabeta.studies._nets import MLP
from gammabeta.studies._outcomes import asked_for, beside
from gammabeta.studies._pairs import LABELS, NORMS, curve, rates_curve
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    BAND,
    EQUIVALENCE_SEEDS,
    LEAST_SEEDS,
    MOST_SEEDS,
    PILOT_SEEDS,
    TUNING_SEEDS,
    Best,
    Trained,
    Tuned,
    Wish,
    complete,
    fair_verdict,
    figure,
    guess,
    minus,
    needed,
    own,
    place,
    settle,
    shown,
    trials,
)
from gammabeta.studies._verdict import Verdict, controlled

CLAIMS = ("bjorck-lr", "bn-speed", "higher-lr")

DEPTHS = {"deep": 10, "shallow": 2}
GROUPS = dict.fromkeys(DEPTHS, NORMS)
SMALL, LARGE, TENTH = "BN − none at the small rate", "each at its best rate", "at a tenth of it"
RATES = (0.03, 0.1, 0.3)
PUBLISHED_RATE = 0.1
TARGETS = {"speed": (0.90, 0.93), "published": (0.90, 0.95)}
_SPEED, _TIME = "steps, none / BN", "processor time, none / BN"


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
    asked = {part: _planned_of(part, tuned, plan) for part in ("speed", "ladder")}
    return _wanted(plan, tuned, seeds, _planned(tuned), asked)


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
        Wish(1, seed, "published", Trained("published", norm, PUBLISHED_RATE))
        for seed in range(count)
        for norm in NORMS
    ]
    parts = {"ladder": (rungs, rungs)}
    if best:
        pair = _shallow(best)
        some = [pair[0]._replace(arm=arm) for arm in ("first", "second")]
        parts["speed"] = ([*pair, *some], pair)
    for part, (all_arms, arms) in parts.items():
        wanted += [Wish(1, seed, part, what) for seed in range(count) for what in all_arms]
        if pilot:
            wanted += [Wish(2, s, f"{part}-pilot", what) for s in PILOT_SEEDS for what in arms]
            for seed in range(count, planned.get(part) or 0):
                wanted += [Wish(3, seed, part, what) for what in arms]
    return wanted


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


def _differences(tuned: Tuned, part: str, group: str) -> dict[str, dict[int, float]]:
    """With minus without BN by condition and seed."""
    if group not in tuned.best:
        return {SMALL: {}, LARGE: {}, TENTH: {}}
    return {
        condition: minus(tuned.runs, part, *(Trained(group, norm, rates[norm]) for norm in NORMS))
        for condition, rates in _rates(tuned.best, group).items()
    }


def _planned(tuned: Tuned) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = _differences(tuned, "pilot", "deep")
    if not complete(pilot):
        return None
    judged = {name: pilot[name] for name in (SMALL, LARGE)}
    deltas = dict.fromkeys(judged, claims()["bjorck-lr"].thresholds["delta"])
    return asked_for(judged, deltas, EQUIVALENCE_SEEDS, MOST_SEEDS)


def _of_part(rows: Sequence[Row], part: str) -> dict[tuple[str, str, float], dict[int, list[Row]]]:
    """Rows of a part by network, arm and rate, then by seed."""
    found: dict[tuple[str, str, float], dict[int, list[Row]]] = {}
    for row in rows:
        rate, seed = row.get("rate"), row["seed"]
        if row.get("part") == part and isinstance(rate, float) and isinstance(seed, int):
            key = (str(row["group"]), str(row["arm"]), rate)
            found.setdefault(key, {}).setdefault(seed, []).append(row)
    return found


def speeds(
    rows: Sequence[Row], part: str, arms: Sequence[Trained], at: str = "step"
) -> tuple[dict[int, float], dict[str, int]]:
    """Mean over the targets of ln(second / first arm) of where they are reached; who is not."""
    by = _of_part(rows, part)
    first, second = (by.get((arm.group, arm.arm, arm.rate), {}) for arm in arms)
    found: dict[int, float] = {}
    late = {arm.arm: 0 for arm in arms}
    for seed in sorted(first.keys() & second.keys()):
        logs = []
        for target in TARGETS[part.removesuffix("-pilot")]:
            where = []
            for arm, by_seed in zip(arms, (first, second), strict=True):
                looks = {_number(row["step"]): row for row in by_seed[seed]}
                x = [_number(looks[s][at]) for s in sorted(looks)]
                y = [_number(looks[s]["validation"]) for s in sorted(looks)]
                place, arrived = speed.reached(target, x, y)
                where.append(max(place, 1e-9))
                late[arm.arm] += not arrived
            logs.append(math.log(where[1] / where[0]))
        found[seed] = statistics.fmean(logs)
    return found, late


def climbs(rows: Sequence[Row], part: str) -> tuple[dict[str, dict[int, float]], int]:
    """log2 of the ratio with / without of the largest rates, by network; searches without end."""
    by = _of_part(rows, part)
    found: dict[str, dict[int, float]] = {group: {} for group in GROUPS}
    open_ended = 0
    for group, ratios in found.items():
        bn, none = (by.get((group, norm, 0.0), {}) for norm in NORMS)
        for seed in sorted(bn.keys() & none.keys()):
            ends = [ladder.largest(arm[seed]) for arm in (bn, none)]
            ratios[seed] = float(ends[0][0] - ends[1][0])
            open_ended += sum(not ended for _, ended in ends)
    return found, open_ended


def _shallow(best: Best) -> list[Trained]:
    return [Trained("shallow", norm, best["shallow"][norm]) for norm in NORMS]


def _planned_of(part: str, tuned: Tuned, plan: Plan) -> int | None:
    """Seeds that the pilot of another part asks for, None before it is complete."""
    if part == "ladder":
        pilot, delta = (
            climbs(tuned.rows, "ladder-pilot")[0],
            claims()["higher-lr"].thresholds["log2"],
        )
    elif "shallow" in tuned.best:
        pilot = {"speed": speeds(tuned.rows, "speed-pilot", _shallow(tuned.best))[0]}
        delta = math.log(claims()["bn-speed"].thresholds["ratio"])
    else:
        return None
    if not complete(pilot):
        return None
    return asked_for(pilot, dict.fromkeys(pilot, delta), plan.other_seeds, MOST_SEEDS)


def _number(value: Scalar) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a look must have numbers, got {value!r}. Repeat that cell.")
    return float(value)


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
        _rates_verdict(tuned),
        _speed_verdict(tuned, plan),
        _ladder_verdict(tuned, plan),
    ]


def _rates_verdict(tuned: Tuned) -> Verdict:
    delta, best = claims()["bjorck-lr"].thresholds["delta"], tuned.best
    found = _differences(tuned, "fair", "deep")
    parts = {
        SMALL: Part(list(found[SMALL].values()), "equivalence", delta),
        LARGE: Part(list(found[LARGE].values()), "superiority", delta),
    }
    outcome = joint(parts, EQUIVALENCE_SEEDS)
    outcome = controlled(outcome, outcome.cells[LARGE])

    notes = tuned.notes()
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
    for name, by_seed in _differences(tuned, "fair", "shallow").items():
        more += shown(f"shallow, {name}", list(by_seed.values()))
    words = Words(
        "batch normalization gains nothing at the small rate, and gains accuracy where each "
        "network has its best rate: {weakest}",
        "the gain of batch normalization is not that of a larger learning rate alone: {refuted}",
        "the gain is {weakest}",
    )
    verdict = fair_verdict(
        "bjorck-lr",
        tuned.setting(
            "learning-rate",
            "MLP of ten layers",
            "at the rate that is best without batch normalization, and each network at its own",
        ),
        words,
        outcome,
        pilot=_differences(tuned, "pilot", "deep"),
        planned=_planned(tuned),
        notes=notes,
    )
    return beside(verdict, more)


def _speed_verdict(tuned: Tuned, plan: Plan) -> Verdict:
    rows, bound = tuned.rows, math.log(claims()["bn-speed"].thresholds["ratio"])
    notes: list[str] = []
    more: list[dict[str, Any]] = []
    steps: dict[int, float] = {}
    pilot: dict[int, float] = {}
    if "shallow" in tuned.best:
        bn, none = _shallow(tuned.best)
        steps, late = speeds(rows, "speed", (bn, none))
        notes += _late("", late)
        pilot, _ = speeds(rows, "speed-pilot", (bn, none))
        times, _ = speeds(rows, "speed", (bn, none), "cpu_time")
        more += shown(_TIME, list(times.values()), "time")
        for arm in ("first", "second"):
            other, _ = speeds(rows, "speed", (bn._replace(arm=arm), none))
            more += shown(f"steps, none / BN on the {arm} layer only", list(other.values()))
    both = [Trained("published", norm, PUBLISHED_RATE) for norm in NORMS]
    old, late = speeds(rows, "published", both)
    notes += _late("As published, ", late)
    if plan.decides and plan.published_steps < PLANS["full"].published_steps:
        notes.append(f"As published, but {plan.published_steps:,} steps for the source's 50,000.")
    if steps:
        ratio = math.exp(statistics.fmean(steps.values()))
        notes.append(f"Geometric mean of the ratio of steps: {ratio:.2f}.")
    verdict = answer(
        "bn-speed",
        tuned.setting(
            "learning-rate", "MLP 100-100", unit="natural logarithm of the ratio of steps"
        ),
        Words(
            "batch normalization reaches the accuracies in fewer steps: {weakest}",
            "batch normalization does not save a fifth of the steps: {refuted}",
            "the ratio is {weakest}",
        ),
        joint({_SPEED: Part(list(steps.values()), "above", bound)}, LEAST_SEEDS),
        {
            "Ioffe & Szegedy's network": joint(
                {_SPEED: Part(list(old.values()), "above", bound)}, LEAST_SEEDS
            )
        },
        delta=bound,
        pilot={_SPEED: list(pilot.values())},
        planned=_planned_of("speed", tuned, plan),
        notes=notes,
    )
    return beside(verdict, more)


def _late(where: str, late: Mapping[str, int]) -> list[str]:
    """How many targets were not reached, by arm."""
    said = ", ".join(f"{count} {LABELS[arm]}" for arm, count in late.items())
    text = f"{where}targets not reached, counted as the last step: {said}."
    return [text[0].upper() + text[1:]] if any(late.values()) else []


def _ladder_verdict(tuned: Tuned, plan: Plan) -> Verdict:
    bound = claims()["higher-lr"].thresholds["log2"]
    found, open_ended = climbs(tuned.rows, "ladder")
    pilot, _ = climbs(tuned.rows, "ladder-pilot")
    notes = []
    for group, by_seed in found.items():
        if by_seed:
            median = statistics.median(by_seed.values())
            notes.append(f"Median log2 ratio of the largest rates, {group}: {median:g}.")
    if open_ended:
        notes.append(f"Searches that found no rate, or none too large: {open_ended}.")
    return answered(
        "higher-lr",
        tuned.setting(
            "learning-rate",
            "MLPs of two and ten layers",
            f"{plan.ladder_steps} steps at each rate",
            "log2 of the ratio of the largest learning rates",
        ),
        Words(
            "batch normalization works at much larger learning rates: {weakest}",
            "batch normalization does not work at four times the learning rate: {refuted}",
            "the ratio is {weakest}",
        ),
        joint(
            {group: Part(list(v.values()), "above", bound) for group, v in found.items()},
            LEAST_SEEDS,
        ),
        {},
        delta=bound,
        pilot={group: list(v.values()) for group, v in pilot.items()},
        planned=_planned_of("ladder", tuned, plan),
        notes=notes,
        beside={},
    )


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
        for condition, rates in _rates(best, group).items() if group in best else ():
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
