"""Does batch normalization fail with small batches, and does Batch Renormalization mend it?

The claims are those of Chang et al. 2017 (repository twcmchang/MLDS_final_2017, part B, Figs. 6 and
9): with batches of 4 batch normalization is worse than none, because the statistics are not
representative (batch-small); Batch Renormalization fixes it (brn-small). And one about the study:
its batch size is confounded with the learning rate and the number of epochs (f-batch).

Network: pixels-100-100-10, sigmoid, normalization before each activation, no bias where it follows,
bias 0.1 elsewhere, weights from a truncated normal distribution with standard deviation
sqrt(2 / fan-in). SGD, cross-entropy. All arms of a seed start alike and see the same order.

batch-small, fair (part "ghost"): the statistics alone
    SGD with batches of 256, the statistics over ghost batches of m = 2, 4, 16, 64, 256 images, and
    no normalization; mean loss, 5,000 training images drawn for each seed, PyTorch's defaults
    (eps 1e-5, momentum 0.1), evaluation by running statistics, each arm at its own best learning
    rate. Primary contrast: test accuracy without minus with batch normalization at m = 4, in
    points, mean of the last three evaluations, lies above 0.3. And the gain, with minus without,
    rises with log2 m: its least-squares slope lies above 0. Both have to hold.
brn-small, fair (part "renorm"): batches of 4
    Mean loss, 5,000 images, decay 0.99 (momentum 0.01), running statistics, each arm at its own
    best rate; Batch Renormalization with its limits from r = 1, d = 0 (until 5 % of the steps) to
    3 (at 40 %) and 5 (at 25 %). Primary contrast: Batch Renormalization minus batch normalization,
    superiority, delta 0.3 points. The problem is "solved", not only "reduced", if none minus Batch
    Renormalization is equivalent within 0.5 points.
As published (part "published")
    The summed loss at the code's rate 0.01, all 55,000 images, eps 1e-3, decay 0.999, the test set
    as one batch by its own statistics; batches of 4, 16, 64, 256, equal steps; at 4 also Batch
    Renormalization as the study wrote it, r and d after gamma and beta ("brn"), and the correct one
    ("brn_right", shown). batch-small: none minus BN at 4 and the slope of the gain over log2 B, as
    above; brn-small: "brn" minus BN. At `full` also at the rate 0.0001 (batches of 64 are in
    `published`), shown: Figs. 6 and 9 end where the code's rate does.
f-batch
    Effect of the batch size: gain at 256 minus gain at 4. Change of it between the published part
    (rate on the mean loss and number of images both in proportion to the batch) and part "held":
    the rate of batch 64 (0.64 on the mean loss) and the same number of images for all. The change
    is at least 0.5 points, whatever its sign. As published by test-batch statistics; fair by the
    statistics of 5,000 training images. Part "images" (equal images, rate in proportion;
    4 and 256) is shown.
Secondary (part "text"): the text's own defaults, ReLU and Adam (0.001, Adam's own), batches of 4,
    16, 64, 256, mean loss, 5,000 images, running statistics.

Learning rates: highest validation accuracy, mean of seeds 800 and 801, from 0.01, 0.03, 0.1, 0.3,
1, 3, a grid that grows for all arms of a part while the best value of any lies at its edge.
Seeds 900 to 903 are a pilot, used for nothing else; it gives the number of seeds, 5 to 16, so that
the predicted half-width of each primary contrast is at most half of its bound.

Budgets: what is published takes the source's 40,000 steps (3 seeds) at `full`, and 55,000 images in
"held" and "images"; at `small` 1,500 steps and 8,000 images, its Batch Renormalization with decay
0.99 and the limits at the same shares of the steps. The tuned parts are the same at both. `tiny`
tries the wiring and decides nothing.

Changed against the registry: sigmoid alone in the fair parts (ReLU in "text"); 400 steps with ghost
batches and 2,000 of batch 4; no ghost batches of 8, 32 and 128, no GroupNorm; equal
numbers of images, drawn from all, in place of equal epochs of fewer. Against the source: start and
order vary with the seed, every epoch is shuffled, and evaluation does not touch the running
statistics.

Rows: arm fields part, activation, optimizer, batch, norm ("bn", "none", "brn", "brn_right"), ghost
(images whose statistics normalize), rate; `step`, `accuracy`, `loss`, `diverged`, and in the last
three rows of a published, held or images part `accuracy_precise`. On the digits: a demonstration.
"""

import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from gammabeta._runs import Row, Scalar
from gammabeta.layers.ghost import GhostBatchNorm1d
from gammabeta.studies._answer import PLACES, Setting, Words, answer, points, span
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint, outcome
from gammabeta.studies._nets import LateRenorm1d, Norm, m2, renorm, renorm_limits
from gammabeta.studies._pairs import Run, Runs, Tuning, collect, tune
from gammabeta.studies._redrawn import redrawn
from gammabeta.studies._train import (
    accuracy,
    fair_split,
    log_steps,
    pixels,
    published_split,
    stream,
    train,
)
from gammabeta.studies._verdict import Verdict, interval, planned_n

CLAIMS = ("batch-small", "brn-small", "f-batch")

TUNING_SEEDS = (800, 801)
PILOT_SEEDS = (900, 901, 902, 903)
LEAST_SEEDS, MOST_SEEDS = 5, 16
GHOSTS = (2, 4, 16, 64, 256)
BATCHES = (4, 16, 64, 256)
CODE_RATE, OTHER_RATE = 0.01, 0.0001
HELD_RATE = 0.64  # on the mean loss: that of the code's rate on the sum of 64
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_ARM = ("part", "batch", "norm", "ghost", "rate")
# arm of a tuned part -> norm, ghost size
GHOST_ARMS = {"none": ("none", 0), **{f"m = {m}": ("bn", m) for m in GHOSTS}}
RENORM_ARMS = {"none": ("none", 0), "bn": ("bn", 4), "brn_right": ("brn_right", 4)}
TUNED = {"ghost": GHOST_ARMS, "renorm": RENORM_ARMS}
# in ms on one core: a step of the network without normalization, by batch, on 5,000 and on 55,000
# images
_STEP_COST = {4: (0.3, 0.35), 16: (0.35, 0.46), 64: (0.45, 0.75), 256: (1.5, 2.2)}


class Plan(NamedTuple):
    """What a budget stands for."""

    ghost_steps: int
    renorm_steps: int
    text_steps: int
    published_steps: int
    images: int  # seen in the parts "held" and "images"
    evaluations: int
    seeds: int
    published_seeds: int
    published_rates: tuple[float, ...]
    rates: tuple[float, ...]
    shortened: bool  # Batch Renormalization as published with decay 0.99
    evaluated: int
    decides: bool


PLANS = {
    "tiny": Plan(10, 20, 10, 20, 512, 4, 1, 1, (CODE_RATE,), (0.1, 1.0), True, 1000, False),
    "small": Plan(400, 2000, 300, 1500, 8000, 8, 5, 5, (CODE_RATE,), RATES, True, 10000, True),
    "full": Plan(
        *(400, 2000, 300, 40000, 55000, 40, 5, 3),
        *((CODE_RATE, OTHER_RATE), RATES, False, 10000, True),
    ),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until both grids are settled; the main runs, seed by seed; pilot; more seeds."""
    plan = PLANS[budget]
    runs = collect([r for r in rows if (r["budget"], r["data"]) == (budget, data)], _ARM)
    tunings = {part: _tuning(part, runs, plan) for part in TUNED}
    wanted = [
        _cell(plan, 0, seed, f"{part}-tuning", *_of(part, name), rate)
        for seed in TUNING_SEEDS
        for part, arms in TUNED.items()
        for rate in tunings[part].grid
        for name in arms
    ]
    best = _best(tunings)
    if len(best) < len(TUNED):
        return wanted
    return wanted + _main(plan, best, seeds, _planned(rows, best))


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for no more seeds."""
    plan = PLANS[budget]
    guess = {part: dict.fromkeys(arms, plan.rates[0]) for part, arms in TUNED.items()}
    return cells(budget, data, seeds, []) + _main(plan, guess, seeds, {})


Best = Mapping[str, Mapping[str, float]]  # tuned part -> arm -> rate


def _of(part: str, name: str) -> tuple[int, str, int]:
    """Batch, norm and ghost size of an arm of a tuned part."""
    norm, ghost = TUNED[part][name]
    return 256 if part == "ghost" else 4, norm, ghost


def _main(plan: Plan, best: Best, seeds: int | None, planned: Mapping[str, int]) -> list[Cell]:
    fair = plan.seeds if seeds is None else seeds
    last = plan.published_seeds if seeds is None else seeds
    wanted: list[Cell] = []
    for seed in range(max(fair, last)):
        if seed < fair:
            for part in TUNED:
                wanted += _tuned(plan, 1, seed, part, part, best)
            wanted += _both(plan, 1, seed, "text", BATCHES, (0.001,))
        if seed < last:
            wanted += _letter(plan, seed)
            wanted += _both(plan, 1, seed, "held", BATCHES, (HELD_RATE,))
            wanted += _both(plan, 1, seed, "images", (4, 256), (CODE_RATE,))
    if seeds is None and plan.decides:
        for seed in PILOT_SEEDS:
            for part in TUNED:
                wanted += _tuned(plan, 2, seed, f"{part}-pilot", part, best)
            if not plan.shortened:
                continue  # the source's 40,000 steps have the source's number of seeds
            wanted += _both(plan, 2, seed, "published-pilot", (4, 256), (CODE_RATE,))
            wanted += _both(plan, 2, seed, "held-pilot", (4, 256), (HELD_RATE,))
        for part in TUNED:
            for seed in range(fair, planned.get(part, 0)):
                wanted += _tuned(plan, 3, seed, part, part, best)
        for seed in range(last, planned.get("batch", 0)):
            wanted += _both(plan, 3, seed, "published", (4, 256), (CODE_RATE,))
            wanted += _both(plan, 3, seed, "held", (4, 256), (HELD_RATE,))
    return wanted


def _letter(plan: Plan, seed: int) -> list[Cell]:
    """The published part; at the other rate what `published` does not have."""
    wanted = []
    for rate in plan.published_rates:
        own = rate == CODE_RATE
        wanted += _both(plan, 1, seed, "published", BATCHES if own else (4, 16, 256), (rate,))
        for norm in ("brn", "brn_right") if own else ("brn",):
            wanted.append(_cell(plan, 1, seed, "published", 4, norm, 4, rate))
    return wanted


def _tuned(plan: Plan, wave: int, seed: int, name: str, part: str, best: Best) -> list[Cell]:
    arms = TUNED[part]
    return [_cell(plan, wave, seed, name, *_of(part, arm), best[part][arm]) for arm in arms]


def _both(
    plan: Plan, wave: int, seed: int, part: str, sizes: Sequence[int], rates: Sequence[float]
) -> list[Cell]:
    """With batch normalization and without, at these batch sizes and rates."""
    return [
        _cell(plan, wave, seed, part, batch, norm, batch if norm == "bn" else 0, rate)
        for batch in sizes
        for rate in rates
        for norm in ("bn", "none")
    ]


def _cell(
    plan: Plan, wave: int, seed: int, part: str, batch: int, norm: str, ghost: int, rate: float
) -> Cell:
    adam = part == "text"
    arm: dict[str, Scalar] = {"part": part, "activation": "relu" if adam else "sigmoid"}
    arm |= {"optimizer": "adam" if adam else "sgd", "batch": batch}
    arm |= {"norm": norm, "ghost": ghost, "rate": rate}
    steps, stops = _steps(plan, part, batch)
    more = {"none": 0.0, "bn": 0.15 + batch / 1600, "brn": 0.45, "brn_right": 0.95}[norm]
    if norm == "bn" and ghost < batch:
        more = 0.8 if ghost > 2 else 1.6
    base = _STEP_COST[batch][part.split("-")[0] in ("published", "held", "images")]
    cost = steps / 1000 * (base + more + (0.2 if adam else 0.0))
    cost += 0.03 * plan.evaluated / 10000 * len(stops) + 0.1
    return Cell("batch-size", arm, seed, round(cost, 3), wave)


def _steps(plan: Plan, part: str, batch: int) -> tuple[int, list[int]]:
    """Steps of a part, and those after which it evaluates."""
    kind = part.split("-")[0]
    if kind in ("held", "images"):
        steps = round(plan.images / batch)
    else:
        steps = {
            "ghost": plan.ghost_steps,
            "renorm": plan.renorm_steps,
            "text": plan.text_steps,
            "published": plan.published_steps,
        }[kind]
    stops = log_steps(steps, plan.evaluations)
    return steps, stops[-3:] if part.endswith(("tuning", "pilot")) else stops


def _tuning(part: str, runs: Runs, plan: Plan) -> Tuning:
    names = {spec: name for name, spec in TUNED[part].items()}
    trials = {
        (names[str(norm), int(ghost)], float(rate)): by_seed
        for (name, _, norm, ghost, rate), by_seed in runs.items()
        if name == f"{part}-tuning" and isinstance(ghost, int) and isinstance(rate, int | float)
    }
    return tune(trials, plan.rates, TUNING_SEEDS, grow=plan.decides, arms=tuple(TUNED[part]))


def _best(tunings: Mapping[str, Tuning]) -> dict[str, dict[str, float]]:
    return {part: t.best for part, t in tunings.items() if t.best is not None}


# -- one cell -----------------------------------------------------------------------------------


def norm_of(norm: str, ghost: int, batch: int, steps: int, eps: float, momentum: float) -> Norm:
    """What stands before each activation."""
    if norm == "none":
        return False
    if norm == "brn":

        def late(width: int) -> nn.Module:
            limits = functools.partial(renorm_limits, steps)
            return LateRenorm1d(width, limits, eps=eps, momentum=momentum)

        return late
    if norm == "brn_right":
        return renorm(steps, eps, momentum)
    if ghost < batch:

        def small(width: int) -> nn.Module:
            return GhostBatchNorm1d(width, eps, momentum, virtual_batch_size=ghost)

        return small
    return True


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network: a row for each evaluation."""
    part, norm, plan = str(arm["part"]), str(arm["norm"]), PLANS[budget]
    size, ghost, rate = int(arm["batch"] or 0), int(arm["ghost"] or 0), float(arm["rate"] or 0.0)
    steps, stops = _steps(plan, part, size)
    kind = part.split("-")[0]
    of_study = kind in ("published", "held", "images")
    split = (
        published_split(data, seed)
        if of_study
        else fair_split(data, seed, "validation" if part.endswith("tuning") else "test")
    )
    train_x, train_y, test_x, test_y = split
    test, labels = pixels(test_x[: plan.evaluated], data.pixel_max), test_y[: plan.evaluated]
    eps, momentum = (1e-3, 0.001) if of_study else (1e-5, 0.1)
    if kind == "renorm" or (of_study and norm.startswith("brn") and plan.shortened):
        momentum = 0.01
    net = m2(
        test.shape[1],
        str(arm["activation"]),
        norm_of(norm, ghost, size, steps, eps, momentum),
        stream(seed, "weights"),
        eps=eps,
        momentum=momentum,
    )
    reference = pixels(train_x[:5000], data.pixel_max)
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=rate,
        steps=steps,
        order=stream(seed, "order"),
        stops=stops,
        batch=size,
        loss="sum" if kind in ("published", "images") else "mean",
        optimizer=str(arm["optimizer"]),
    )
    for step, loss in training:
        share = accuracy(net, test, labels, "batch" if of_study else "running")
        row: Row = {"step": step, "accuracy": share, "diverged": not math.isfinite(loss)}
        if math.isfinite(loss):
            row["loss"] = loss
        if of_study and step in stops[-3:]:
            with torch.no_grad():
                logits = net.with_statistics_of(reference, test)
            row["accuracy_precise"] = float((logits.argmax(1) == labels).double().mean())
        yield row


# -- what it means ------------------------------------------------------------------------------


def _runs_of(
    runs: Runs, part: str, batch: int, norm: str, ghost: int, rate: float
) -> Mapping[int, Run]:
    return runs.get((part, batch, norm, ghost, rate), {})


def _gain(runs: Runs, part: str, batch: int, rate: float) -> dict[int, float]:
    """With minus without batch normalization by seed, in points."""
    with_bn = _runs_of(runs, part, batch, "bn", batch, rate)
    return _minus(with_bn, _runs_of(runs, part, batch, "none", 0, rate))


def _minus(a: Mapping[int, Run], b: Mapping[int, Run]) -> dict[int, float]:
    return {s: a[s].final - b[s].final for s in sorted(a.keys() & b.keys())}


def _tuned_gain(
    runs: Runs, part: str, name: str, other: str, best: Best, end: str = ""
) -> dict[int, float]:
    """One arm of a tuned part minus another, by seed; ``end`` is "-pilot" for the pilot."""
    if part not in best:
        return {}
    a, b = (_runs_of(runs, part + end, *_of(part, arm), best[part][arm]) for arm in (name, other))
    return _minus(a, b)


def slope(by_size: Mapping[int, Mapping[int, float]]) -> list[float]:
    """Least-squares slope over log2 of the size, for each seed that all sizes have.

    >>> slope({2: {0: 1.0}, 4: {0: 2.0}, 8: {0: 3.0}})
    [1.0]
    """
    seeds = set.intersection(*(set(by) for by in by_size.values())) if by_size else set()
    x = [math.log2(size) for size in by_size]
    return [
        statistics.linear_regression(x, [by[seed] for by in by_size.values()]).slope
        for seed in sorted(seeds)
    ]


def _small(gains: Mapping[int, Mapping[int, float]]) -> dict[str, Part]:
    """Both parts of batch-small, from the gains with minus without at each size."""
    t = claims()["batch-small"].thresholds
    return {
        "none − BN at 4": Part([-v for v in gains.get(4, {}).values()], "above", t["harm"]),
        "rise of BN − none per doubling": Part(slope(gains), "above", 0.0),
    }


def _change(rows: Sequence[Row], end: str = "") -> list[float]:
    """f-batch: the effect of the batch size in part published minus that in part held."""
    runs = collect(rows, _ARM)
    by = [
        _gain(runs, part + end, batch, rate)
        for part, rate in (("published", CODE_RATE), ("held", HELD_RATE))
        for batch in (256, 4)
    ]
    shared = sorted(set.intersection(*(set(g) for g in by)))
    return [by[0][s] - by[1][s] - (by[2][s] - by[3][s]) for s in shared]


def _precise(rows: Sequence[Row]) -> list[Row]:
    """The same rows, evaluated by the statistics of training images."""
    return [{**r, "accuracy": r["accuracy_precise"]} for r in rows if "accuracy_precise" in r]


def _pilots(rows: Sequence[Row], best: Best) -> dict[str, list[float]]:
    runs = collect(rows, _ARM)
    harm = _tuned_gain(runs, "ghost", "none", "m = 4", best, "-pilot")
    mends = _tuned_gain(runs, "renorm", "brn_right", "bn", best, "-pilot")
    return {
        "ghost": list(harm.values()),
        "renorm": list(mends.values()),
        "batch": _change(_precise(rows), "-pilot"),
    }


def _planned(rows: Sequence[Row], best: Best) -> dict[str, int]:
    """Seeds that the pilot asks for, by what they are for; without those it is not complete for."""
    bound = {"ghost": ("batch-small", "harm"), "renorm": ("brn-small", "delta")}
    bound["batch"] = ("f-batch", "delta")
    return {
        name: planned_n(
            values, claims()[bound[name][0]].thresholds[bound[name][1]], LEAST_SEEDS, MOST_SEEDS
        )
        for name, values in _pilots(rows, best).items()
        if len(values) == len(PILOT_SEEDS)
    }


def judge(rows: list[Row]) -> list[Verdict]:
    """The three claims; what is missing makes them inconclusive."""
    if not rows:
        return []
    budget, data = str(rows[0]["budget"]), str(rows[0]["data"])
    plan, every = PLANS[budget], collect(rows, _ARM)
    tunings = {part: _tuning(part, every, plan) for part in TUNED}
    best, pilots = _best(tunings), _pilots(rows, _best(tunings))
    planned = _planned(rows, best)
    runs = collect(rows, _ARM)
    notes = _notes(plan, budget, tunings, runs)
    least = plan.published_seeds if plan.decides else LEAST_SEEDS
    thresholds = {claim: claims()[claim].thresholds for claim in CLAIMS}

    def setting(condition: str) -> Setting:
        where = ("batch-size", budget, data, "MLP 100-100, sigmoid", condition)
        return Setting(*where, "points of accuracy", plan.decides)

    gains = {m: _tuned_gain(runs, "ghost", f"m = {m}", "none", best) for m in GHOSTS}
    letter = {b: _gain(runs, "published", b, CODE_RATE) for b in BATCHES}
    small = answer(
        "batch-small",
        setting("SGD with 256 images a step, each network at its best learning rate"),
        WORDS["batch-small"],
        joint(_small(gains), LEAST_SEEDS),
        {f"rate {CODE_RATE:g}": joint(_small(letter), least)},
        delta=thresholds["batch-small"]["harm"],
        pilot={"none − BN at 4": pilots["ghost"]},
        planned=planned.get("ghost"),
        notes=[
            *notes,
            *_shown("Gain by ghost size, fair", {f"m = {m}": g for m, g in gains.items()}),
            *_shown("Gain by batch size, as published", {str(b): g for b, g in letter.items()}),
            *_shown(
                "Gain by batch size with the text's defaults, ReLU and Adam (secondary)",
                {str(b): _gain(runs, "text", b, 0.001) for b in BATCHES},
            ),
            *_shown(
                "Gain by batch size with equal numbers of images (secondary)",
                {str(b): _gain(runs, "images", b, CODE_RATE) for b in (4, 256)},
            ),
        ],
    )

    delta = thresholds["brn-small"]["delta"]
    mends = _tuned_gain(runs, "renorm", "brn_right", "bn", best)
    left = _tuned_gain(runs, "renorm", "none", "brn_right", best)
    whole = outcome(
        Part(list(left.values()), "equivalence", thresholds["brn-small"]["solved"]), LEAST_SEEDS
    )
    at_four = {
        n: _runs_of(runs, "published", 4, n, 4, CODE_RATE) for n in ("bn", "brn", "brn_right")
    }
    without = _runs_of(runs, "published", 4, "none", 0, CODE_RATE)
    told = list(notes)
    if whole.interval:
        said = "" if data == "digits" or not plan.decides else f": {_SOLVED[whole.status]}"
        told.append(f"None − Batch Renormalization, fair: {span(whole.interval)}{said}.")
    told += _shown(
        "As published, over BN",
        {
            "none": _minus(without, at_four["bn"]),
            "the correct form": _minus(at_four["brn_right"], at_four["bn"]),
        },
    )
    renorm = answer(
        "brn-small",
        setting("batches of 4, each network at its best learning rate"),
        WORDS["brn-small"],
        joint({_MENDS: Part(list(mends.values()), "superiority", delta)}, LEAST_SEEDS),
        {
            f"rate {CODE_RATE:g}": joint(
                {
                    _MENDS: Part(
                        list(_minus(at_four["brn"], at_four["bn"]).values()), "superiority", delta
                    )
                },
                least,
            )
        },
        delta=delta,
        pilot={_MENDS: pilots["renorm"]},
        planned=planned.get("renorm"),
        notes=told,
    )

    delta = thresholds["f-batch"]["delta"]
    study = answer(
        "f-batch",
        setting("as published against equal learning rates and numbers of images"),
        WORDS["f-batch"],
        joint({_CHANGE: Part(_change(_precise(rows)), "differs", delta)}, least),
        {"test-batch statistics": joint({_CHANGE: Part(_change(rows), "differs", delta)}, least)},
        delta=delta,
        pilot={_CHANGE: pilots["batch"]},
        planned=planned.get("batch"),
        notes=[
            *notes,
            *_shown(
                "Gain by batch size, rate and number of images held",
                {str(b): _gain(runs, "held", b, HELD_RATE) for b in BATCHES},
            ),
        ],
    )
    return [small, renorm, study]


_MENDS = "Batch Renormalization − BN"
_CHANGE = "change of the effect"
_SOLVED = {
    "supported": "solved",
    "refuted": "reduced at most, not solved",
    "inconclusive": "open whether it is solved",
}
WORDS = {
    "batch-small": Words(
        "batch normalization by the statistics of few images is worse than none, and less so the "
        "more they are: {weakest}",
        "batch normalization by the statistics of few images is not worse than none by {delta} "
        "points, or not in order of their number: {refuted}",
        "the accuracy that batch normalization costs is, of {weakest}",
    ),
    "brn-small": Words(
        "Batch Renormalization gains accuracy over batch normalization: {weakest}",
        "Batch Renormalization does not gain {delta} points: {refuted}",
        "the gain is that of {weakest}",
    ),
    "f-batch": Words(
        "the effect of the batch size is another where learning rate and number of images are "
        "held: {weakest}",
        "the effect of the batch size stays within {delta} points where learning rate and number "
        "of images are held: {refuted}",
        "gain at 256 minus gain at 4, as published minus held: {weakest}",
    ),
}


def _shown(what: str, by: Mapping[str, Mapping[int, float]]) -> list[str]:
    each = [f"{name} {points(statistics.fmean(g.values()))}" for name, g in by.items() if g]
    return [f"{what}: {', '.join(each)}."] if each else []


def _notes(plan: Plan, budget: str, tunings: Mapping[str, Tuning], runs: Runs) -> list[str]:
    notes = []
    for part, tuning in tunings.items():
        if tuning.best is not None:
            chosen = ", ".join(f"{arm} {rate:g}" for arm, rate in tuning.best.items())
            notes.append(f"Learning rates chosen ({part}): {chosen}.")
        if tuning.missing:
            notes.append(f"Missing: {tuning.missing} tuning runs ({part}); nothing fair.")
        elif tuning.at_edge and plan.decides:
            arms = ", ".join(tuning.at_edge)
            notes.append(f"The best rate is at the end of all that is tried ({part}): {arms}.")
    diverged = sum(
        run.diverged
        for arm, by in runs.items()
        if "tuning" not in str(arm[0])
        for run in by.values()
    )
    if diverged:
        notes.append(f"Runs that diverged, and count with the accuracy they had: {diverged}.")
    if not plan.decides:
        notes.append(f"The budget {budget} tries the wiring; it decides nothing.")
    elif plan.published_steps < PLANS["full"].published_steps:
        notes.append(
            f"As published, but {plan.published_steps:,} steps for the source's 40,000, and Batch "
            "Renormalization with decay 0.99."
        )
    return notes


# -- figures ------------------------------------------------------------------------------------


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Gains over the size that the statistics are of; the published figures again."""
    if not rows:
        return []
    budget, data = str(rows[0]["budget"]), str(rows[0]["data"])
    plan, every = PLANS[budget], collect(rows, _ARM)
    best = _best({part: _tuning(part, every, plan) for part in TUNED})
    runs = collect(rows, _ARM)
    drawn = {
        "ghost batches of SGD with batches of 256, tuned": {
            m: _tuned_gain(runs, "ghost", f"m = {m}", "none", best) for m in GHOSTS
        },
        "as published": {b: _gain(runs, "published", b, CODE_RATE) for b in BATCHES},
        "learning rate and images held": {b: _gain(runs, "held", b, HELD_RATE) for b in BATCHES},
        "images held": {b: _gain(runs, "images", b, CODE_RATE) for b in (4, 256)},
        "the text's defaults, ReLU and Adam": {b: _gain(runs, "text", b, 0.001) for b in BATCHES},
    }
    panels: list[dict[str, Any]] = [
        {"title": name, "series": [series]}
        for name, by in drawn.items()
        if (series := _series({k: list(g.values()) for k, g in by.items() if g}))["x"]
    ]
    title = f"Gain of batch normalization over batch size, on {PLACES.get(data, data)}"
    wanted = ("batch-size-fig-6", "batch-size-fig-9")
    found = [figure for figure in redrawn("batch-size", rows) if figure["id"] in wanted]
    if panels:
        found.append(
            {
                "id": "batch-size-gains",
                "experiment": "batch-size",
                "kind": "curves",
                "title": title,
                "caption": "Test accuracy with minus without. Mean over seeds; the band is its "
                "95 % interval.",
                "alt": f"{title}. "
                + "; ".join(
                    f"{p['title']}: {p['series'][0]['y'][0]:+.1f} points at the smallest"
                    for p in panels
                )
                + ".",
                "x": {"label": "images whose statistics normalize", "log": True},
                "y": {"label": "gain (points)", "log": False},
                "panels": panels,
            }
        )
    return found


def _series(by_size: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    bands = [interval(v) if len(v) > 1 else None for v in by_size.values()]
    means = [statistics.fmean(v) for v in by_size.values()]
    return {
        "name": "with − without",
        "style": "bn",
        "x": list(by_size),
        "y": means,
        "lo": [b.lo if b else m for b, m in zip(bands, means, strict=True)],
        "hi": [b.hi if b else m for b, m in zip(bands, means, strict=True)],
        "n": min((len(v) for v in by_size.values()), default=0),
    }
