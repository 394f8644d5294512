"""Does batch normalization train to a higher accuracy, and in 7 % of the steps?

Ioffe & Szegedy 2015, Section 4.2, repeated by the note on it and by Viceroy: with batch
normalization (BN) Inception reaches 72.7 to 74.8 % on ImageNet instead of 72.2 % (higher-accuracy),
and with five times the learning rate it needs 2.1 million steps for what took 31 million
(imagenet-7pct). BN-x5 is more than BN: no dropout, a fifth of the weight decay, a rate that decays
six times faster, no local response normalization, better shuffling, less distortion.

Network: pixels-100-100-10, ReLU, BN before each activation, no bias where it follows, bias 0.1
elsewhere, weights from a truncated normal distribution with standard deviation sqrt(2 / fan-in).
Batches of 64, 1,000 steps of SGD (6,000 at `full`), mean cross-entropy, 5,000 training images drawn
for each seed from the first 55,000, PyTorch's defaults for the layer, evaluation by running
statistics. All arms have the same start and batches.

Arms; r is the best rate of the arm without BN, and s that of "Inception": highest accuracy on the
last 5,000 training images, mean of seeds 800 and 801, from 0.03, 0.1, 0.3; a best value at an edge
extends the grid. With BN the same search has its own best rate. Momentum 0, as everywhere here.

    nothing else changed                                    rate
    "none", "bn"                  without, with BN          r, and BN's own best
    "bn x1", "bn x5", "bn x30"    with BN                   r, 5 r, 30 r
    "none x5"                     without                   5 r
    "sigmoid x5"                  without, sigmoid          5 r
    "bn sigmoid x5"               with BN, sigmoid          5 r
    with the rest of the recipe
    "inception"      without BN; dropout 0.4 before the last layer, weight decay 5e-4 on all weight
                     matrices, the rate halves once                           s
    "baseline"       the same with BN                                         s
    "recipe x5"      BN, no dropout, weight decay 1e-4, the rate halves six times         5 s
    "recipe x30"     the same                                                 30 s
    "recipe none"    the recipe without BN                                    5 s
    convolutional (5x5 with stride 2 and 8 channels, the same and 16 channels, one dense layer; 3x3
    on the digits; 400 steps, 2,000 at `full`), nothing else changed
    "none", "bn"     each at its own best rate, searched in the same way
    "bn x5"          five times that without BN

Higher accuracy (fair; the sources' network and images cannot be had here)
    Primary contrast: test accuracy at the end, "bn" minus "none", each at its own best rate, in
    points, mean of the last three evaluations (at 96, 98 and 100 % of the steps): lies above 0.3.

Share of the steps
    Accuracy on 2,000 validation images at 40 log-spaced steps. Target, for each seed: the median of
    the last five of them of the arm without BN, which is what that arm is worth; steps until an arm
    first reaches it, interpolated. A run that does not arrive counts as arriving at its last step,
    which is against the claim, and is counted.
    As published: "recipe x5" against "inception", whose accuracy is the target. Fair: "bn x5"
    against "none": what BN and the rate do alone. Primary contrast: ln of the ratio of the steps,
    without over with, lies above ln 2: BN-x5 needs less than half. The number, 7 %, is that of
    another network on a million images and 31 million steps; it is shown beside, not tested.
    Shown: share of the steps of every other arm; whether "none x5" and "sigmoid x5" fail, as in the
    source, where the one reached "machine infinity" and the other stayed at chance.

Seeds 900 to 903 are a pilot: they give the number of seeds for all of these contrasts (5 to 16;
predicted half-width of the 95 % interval 0.15 points, and ln 2 / 2), and are used for nothing else.
What is only shown has 3 seeds.

Positive control: none for accuracy, the claim is the control of others. For the share of the steps
it is in the target: "none" reaches it by definition.

What its author would call fair: the recipe as a whole, at five times the rate, against a network
without BN at its own best rate. What would embarrass us: a target that the network without BN
passes long before its end, so that both are done early; a verdict that is owed to the decay of the
rate; training that stops before the slower network is done, which makes a higher final accuracy a
matter of speed (the training loss at the end stands beside).

Changed against the registry: 1,000 steps for 4,000 and 6,000; the rest of the recipe is dropout,
weight decay and decay of the rate, since MNIST needs no local response normalization and was
neither distorted nor badly shuffled; the convolutional network, of which the sources speak, is only
shown: it takes twice the time. `tiny` tries the wiring; it decides
nothing. On the bundled digits each seed splits the 1,797 images anew: a demonstration.

Rows: arm fields part ("tuning", "fair", "pilot", "shown"), group ("plain", "recipe",
"convolutional"), arm, rate, and optionally width (a factor on the hidden units); `step`,
`validation` (not in tuning), and at the last three evaluations `accuracy`, `loss`, `diverged`.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Setting, Words
from gammabeta.studies._beside import answered
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._learning_rate.speed import reached
from gammabeta.studies._outcomes import asked_for
from gammabeta.studies._pairs import collect
from gammabeta.studies._recipe.training import Recipe, network, trainings
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels
from gammabeta.studies._tuned import (
    KEYS,
    LEAST_SEEDS,
    MOST_SEEDS,
    Best,
    Trained,
    Tuned,
    Wish,
    complete,
    figure,
    guess,
    minus,
    needed,
    own,
    place,
    settle,
    tuning_figure,
)
from gammabeta.studies._verdict import Verdict, interval

CLAIMS = ("higher-accuracy", "imagenet-7pct")

GROUPS = {"plain": ("bn", "none"), "recipe": ("inception",), "convolutional": ("bn", "none")}


REFERENCE = {"plain": "none", "recipe": "inception", "convolutional": "none"}
FIVE = {"plain": "bn x5", "recipe": "recipe x5"}
RECIPES = {
    "plain": {
        "none": Recipe(False),
        "bn": Recipe(True),
        "bn x1": Recipe(True),
        "bn x5": Recipe(True, 5),
        "bn x30": Recipe(True, 30),
        "none x5": Recipe(False, 5),
        "sigmoid x5": Recipe(False, 5, "sigmoid"),
        "bn sigmoid x5": Recipe(True, 5, "sigmoid"),
    },
    "recipe": {
        "inception": Recipe(False, 1, "relu", 0.4, 5e-4, 1),
        "baseline": Recipe(True, 1, "relu", 0.4, 5e-4, 1),
        "recipe x5": Recipe(True, 5, "relu", 0.0, 1e-4, 6),
        "recipe x30": Recipe(True, 30, "relu", 0.0, 1e-4, 6),
        "recipe none": Recipe(False, 5, "relu", 0.0, 1e-4, 6),
    },
    "convolutional": {
        "none": Recipe(False, convolutional=True),
        "bn": Recipe(True, convolutional=True),
        "bn x5": Recipe(True, 5, convolutional=True),
    },
}
MAIN: Mapping[str, Sequence[str]] = {
    "plain": ("none", "bn", "bn x5"),
    "recipe": ("inception", "recipe x5"),
    "convolutional": (),  # is shown
}
SHOWN_SEEDS = 3
LOOKS, VALIDATION = 40, 2000
_GAIN = "BN − none"
_SHARE = "ln of the steps, without over with BN x5"


# KEYS -> seed -> steps with validation accuracy
Seen = dict[tuple[Scalar, ...], dict[int, list[tuple[int, float]]]]


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    convolutional: int  # steps of those networks
    looks: int
    seeds: int
    shown: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.03, 0.1, 0.3)
PLANS = {
    "tiny": Plan(8, 8, 6, 1, 1, (0.1,), 500, False),
    "small": Plan(1000, 400, LOOKS, LEAST_SEEDS, SHOWN_SEEDS, RATES, 10000, True),
    "full": Plan(6000, 2000, LOOKS, LEAST_SEEDS, SHOWN_SEEDS, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until the grids are settled; then the main runs; pilot; more seeds; what is shown."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    return _wanted(tuned, plan, seeds, _planned(tuned.rows, tuned.best))


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: one value more of each grid, half as many seeds more."""
    plan = PLANS[budget]
    tuned = guess(GROUPS, plan, (1.0,), plan.rates[-1])
    return _wanted(tuned, plan, seeds, LEAST_SEEDS * 3 // 2)


def _wanted(tuned: Tuned, plan: Plan, seeds: int | None, planned: int | None) -> list[Cell]:
    wanted = needed(tuned, plan.seeds, seeds, [planned], lambda best: trained(best, MAIN))
    settled = len(tuned.best) == len(GROUPS)
    more = _shown(plan, tuned.best, seeds) if settled else []
    return [_cell(plan, *wish) for wish in wanted + more]


def trained(best: Best, arms: Mapping[str, Sequence[str]]) -> list[Trained]:
    """Arms at their rates: BN's own best one, else a multiple of the reference's."""
    return [
        Trained(
            group,
            arm,
            best[group]["bn"]
            if arm == "bn"
            else round(best[group][REFERENCE[group]] * RECIPES[group][arm].factor, 8),
        )
        for group, names in arms.items()
        for arm in names
    ]


def _rest(group: str) -> list[str]:
    """Arms that are only shown."""
    return [arm for arm in RECIPES[group] if arm not in MAIN[group]]


def _shown(plan: Plan, best: Best, seeds: int | None) -> list[Wish]:
    rest = {group: _rest(group) for group in RECIPES}
    count = plan.shown if seeds is None else min(seeds, plan.shown)
    return [Wish(2, s, "shown", what) for s in range(count) for what in trained(best, rest)]


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    recipe = RECIPES[what.group][what.arm]
    # In seconds, about: steps, looks, evaluations.
    step = (1.05e-3 if recipe.bn else 0.85e-3) + (0.2e-3 if recipe.dropout else 0.0)
    looks, look = 0 if part == "tuning" else plan.looks, 4e-6
    if recipe.convolutional:
        step, look = 2.5 * step, 8e-6
    images = 3 * min(plan.images, 5000 if part == "tuning" else 10000)
    cost = _steps(plan, what.group) * step + (looks * VALIDATION + images) * look
    return Cell("recipe", arm, seed, round(cost, 3), wave)


def _steps(plan: Plan, group: str) -> int:
    return plan.convolutional if group == "convolutional" else plan.steps


def seen_by(rows: Sequence[Row]) -> Seen:
    """Validation accuracy at increasing steps, by arm and seed."""
    found: dict[tuple[Scalar, ...], dict[int, dict[int, float]]] = {}
    for row in rows:
        seed, step, share = row["seed"], row.get("step"), row.get("validation")
        if isinstance(seed, int) and isinstance(step, int) and isinstance(share, float):
            arm = found.setdefault(tuple(row[key] for key in KEYS), {})
            arm.setdefault(seed, {})[step] = share
    return {
        arm: {seed: sorted(by_step.items()) for seed, by_step in seeds.items()}
        for arm, seeds in found.items()
    }


def log_ratios(
    seen: Seen, part: str, reference: Trained, other: Trained, its_part: str | None = None
) -> tuple[dict[int, float], dict[str, int]]:
    """ln of the steps to the reference's own accuracy, its over the other's; who is late."""
    first = seen.get((part, *reference), {})
    second = seen.get((its_part or part, *other), {})
    found: dict[int, float] = {}
    late = {reference.arm: 0, other.arm: 0}
    for seed in sorted(first.keys() & second.keys()):
        target = statistics.median(share for _, share in first[seed][-5:])
        ends = []
        for what, looks in ((reference, first[seed]), (other, second[seed])):
            place, arrived = reached(target, *zip(*looks, strict=True))
            ends.append(place)
            late[what.arm] += not arrived
        found[seed] = math.log(ends[0] / ends[1])
    return found, late


def _pairs(best: Best) -> dict[str, tuple[Trained, Trained]]:
    """Reference and BN x5 of each group whose search is settled."""
    return {
        group: (a, b)
        for group, five in FIVE.items()
        if group in best
        for a, b in [trained(best, {group: (REFERENCE[group], five)})]
    }


def gains_of(rows: Sequence[Row], part: str, best: Best, group: str = "plain") -> dict[int, float]:
    """Test accuracy with minus without BN, each at its own best rate, by seed."""
    if group not in best:
        return {}
    return minus(collect(rows, KEYS), part, *trained(best, {group: ("bn", "none")}))


def _pilot(rows: Sequence[Row], best: Best) -> dict[str, dict[int, float]]:
    found, seen = {_GAIN: gains_of(rows, "pilot", best)}, seen_by(rows)
    for group, pair in _pairs(best).items():
        found[f"{_SHARE} ({group})"] = log_ratios(seen, "pilot", *pair)[0]
    return found


def _planned(rows: Sequence[Row], best: Best) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = _pilot(rows, best)
    if len(best) < len(GROUPS) or not complete(pilot):
        return None
    limits = dict.fromkeys(pilot, math.log(1 / claims()["imagenet-7pct"].thresholds["share"]))
    limits[_GAIN] = claims()["higher-accuracy"].thresholds["points"]
    return asked_for(pilot, limits, LEAST_SEEDS, MOST_SEEDS)


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one arm: a row for each look, and for the evaluations at the end."""
    plan, tuning = PLANS[budget], arm["part"] == "tuning"
    recipe = RECIPES[str(arm["group"])][str(arm["arm"])]
    x, y, held_x, held_y = fair_split(data, seed, "validation" if tuning else "test")
    held, labels = pixels(held_x[: plan.images], data.pixel_max), held_y[: plan.images]
    _, _, looked_x, looked_y = fair_split(data, seed, "validation")
    looked, its_labels = pixels(looked_x[:VALIDATION], data.pixel_max), looked_y[:VALIDATION]
    net = network(held.shape[1], recipe, seed, float(arm.get("width") or 1.0))
    steps = _steps(plan, str(arm["group"]))
    looks = log_steps(steps, plan.looks, first=2)
    training = trainings(
        net,
        x,
        y,
        recipe,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=steps,
        seed=seed,
        stops=looks[-3:] if tuning else looks,
    )
    for step, loss in training:
        row: Row = {"step": step}
        if not tuning:
            row["validation"] = accuracy(net, looked, its_labels)
        if step in looks[-3:]:
            row |= {"accuracy": accuracy(net, held, labels), "diverged": not math.isfinite(loss)}
            if math.isfinite(loss):
                row["loss"] = loss
        yield row


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """Both claims; what is missing makes them inconclusive."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    best, notes = tuned.best, tuned.notes()
    setting = tuned.setting("recipe", "MLP 100-100")
    return [
        _accuracy_verdict(rows, best, setting, [*notes, *_losses(rows, best)]),
        _steps_verdict(rows, best, setting, notes),
    ]


def _accuracy_verdict(
    rows: Sequence[Row], best: Best, setting: Setting, notes: Sequence[str]
) -> Verdict:
    bound = claims()["higher-accuracy"].thresholds["points"]
    values = list(gains_of(rows, "fair", best).values())
    return answered(
        "higher-accuracy",
        setting,
        Words(
            "batch normalization gives a higher final accuracy: {weakest}",
            "batch normalization does not give {delta} points more in the end: {refuted}",
            "the difference is {weakest}",
        ),
        joint({_GAIN: Part(values, "above", bound)}, LEAST_SEEDS),
        {},
        delta=bound,
        pilot={_GAIN: list(_pilot(rows, best)[_GAIN].values())},
        planned=_planned(rows, best),
        notes=notes,
        beside={f"{_GAIN}, convolutional": gains_of(rows, "shown", best, "convolutional")},
    )


def _losses(rows: Sequence[Row], best: Best) -> list[str]:
    """Mean training loss of the batch at the end, of both arms."""
    found = []
    for what in trained(best, {"plain": ("bn", "none")}) if "plain" in best else ():
        key = ("fair", *what)
        last = [r["loss"] for r in rows if tuple(r.get(k) for k in KEYS) == key and "loss" in r]
        if last:
            mean = statistics.fmean(x for x in last if isinstance(x, float))
            found.append(f"{what.arm} {mean:.3g}")
    return [f"Training loss at the end: {', '.join(found)}."] if found else []


def _steps_verdict(
    rows: Sequence[Row], best: Best, setting: Setting, notes: Sequence[str]
) -> Verdict:
    share = claims()["imagenet-7pct"].thresholds["share"]
    bound, own, seen = math.log(1 / share), list(notes), seen_by(rows)
    found: dict[str, list[float]] = {group: [] for group in FIVE}
    for group, pair in _pairs(best).items():
        by_seed, late = log_ratios(seen, "fair", *pair)
        found[group] = list(by_seed.values())
        own += _said(group, pair[1].arm, found[group], late)
    beside = {}
    for group in best if len(best) == len(GROUPS) else ():
        (reference,) = trained(best, {group: (REFERENCE[group],)})
        its_part = "fair" if MAIN[group] else "shown"
        others = [(what, "shown") for what in trained(best, {group: _rest(group)})]
        if group == "plain":  # at its own best rate
            others += [(what, "fair") for what in trained(best, {group: ["bn"]})]
        for what, part in others:
            if what.arm == reference.arm:
                continue
            by_seed, late = log_ratios(seen, its_part, reference, what, part)
            beside[f"ln of the steps, {group}, {reference.arm} over {what.arm}"] = by_seed
            own += _said(group, what.arm, list(by_seed.values()), late)
    outcomes = {
        group: joint({_SHARE: Part(values, "above", bound)}, LEAST_SEEDS)
        for group, values in found.items()
    }
    pilot = _pilot(rows, best).get(f"{_SHARE} (plain)", {})
    return answered(
        "imagenet-7pct",
        setting._replace(
            condition="five times the best rate without batch normalization, nothing else changed",
            unit="natural logarithm of the ratio of steps",
        ),
        Words(
            "batch normalization needs less than half of the steps to the accuracy at which the "
            "network without it ends: {weakest}",
            "batch normalization needs half of the steps or more to the accuracy at which the "
            "network without it ends: {refuted}",
            "the ratio is {weakest}",
        ),
        outcomes["plain"],
        {"with the rest of the recipe": outcomes["recipe"]},
        delta=bound,
        pilot={_SHARE: list(pilot.values())},
        planned=_planned(rows, best),
        notes=own,
        beside=beside,
    )


def _said(group: str, arm: str, logs: Sequence[float], late: Mapping[str, int]) -> list[str]:
    """Share of the steps in percent, and who did not arrive."""
    if not logs:
        return []
    span = ""
    if len(logs) > 1:
        i = interval(logs)
        span = f", 95 % interval {100 * math.exp(-i.hi):.1f} to {100 * math.exp(-i.lo):.1f}"
    mean = 100 * math.exp(-statistics.fmean(logs))
    missed = late[arm]
    tail = f"; {missed} of {len(logs)} did not arrive, counted as the last step" if missed else ""
    where = f" ({group})" if group == "convolutional" else ""
    return [f"{arm}{where}: {mean:.1f} % of the steps of {REFERENCE[group]}{span}{tail}."]


_TITLES = {
    "plain": "nothing else changed",
    "recipe": "with the rest of the recipe",
    "convolutional": "convolutional, nothing else changed",
}


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Validation accuracy over steps, with and without the rest of the recipe; the tuning."""
    if not rows:
        return []
    tuned, seen = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])]), seen_by(rows)
    best = tuned.best
    panels = []
    for group in best if len(best) == len(GROUPS) else ():
        series = []
        for what in trained(best, {group: tuple(RECIPES[group])}):
            part = "fair" if what.arm in MAIN[group] else "shown"
            by_seed = list(seen.get((part, *what), {}).values())
            if by_seed:
                series.append(_series(what.arm, RECIPES[group][what.arm].bn, by_seed))
        title = _TITLES[group]
        if series:
            panels.append({"title": title, "series": series})
    title = f"Validation accuracy on {place(rows)} over training, by recipe"
    return [
        *figure("recipe", "steps", title, "Mean and range over seeds.", panels),
        *tuning_figure("recipe", tuned, "by recipe"),
    ]


def _series(name: str, bn: bool, by_seed: Sequence[Sequence[tuple[int, float]]]) -> dict[str, Any]:
    steps = [step for step, _ in by_seed[0]]
    shares = [[100 * dict(looks)[step] for looks in by_seed] for step in steps]
    return {
        "name": name,
        "style": "bn" if bn else "none",
        "x": steps,
        "y": [statistics.fmean(each) for each in shares],
        "lo": [min(each) for each in shares],
        "hi": [max(each) for each in shares],
        "n": len(by_seed),
    }
