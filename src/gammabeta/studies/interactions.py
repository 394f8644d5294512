"""All layers move at once: are their updates stale, and does the error grow with depth?

A gradient holds for each layer while all others stay, and then all layers move. Kathuria, and the
lecture after D2L: a layer's update, computed for the old distribution of its input, may not lower
the loss once the layers below have moved; batch normalization (BN) is said to help since it keeps
that distribution (stale-update). The note on Ioffe & Szegedy 2015: to change all parameters at once
violates what a partial derivative assumes, and the errors compound with depth, "eps_0 x ... x
eps_n" (simultaneous-error). Neither measures it.

Networks: pixels, L = 1, 2, 4, 8, 16 layers of 100 units, 10; ReLU, BN before each activation, no
bias where it follows, bias 0.1 elsewhere, weights from a truncated normal distribution with
standard deviation sqrt(2 / fan-in). Batches of 128, 150 steps of SGD without momentum (500 at
`full`), mean cross-entropy, 5,000 training images drawn for each seed from the first 55,000,
PyTorch's defaults for the layer. Both arms have the same start and batches. At the start and after
every 25 steps one step is looked at and not made, in training mode, on a batch of 128 training
images that is the same in both arms; the loss is that of this batch before and after.

Fair
    Each arm at each depth trains at its own best learning rate: highest accuracy on the last 5,000
    training images, mean of seeds 800 and 801, from 0.03, 0.1, 0.3; a best value at an edge extends
    the grid for both arms of that depth. Seeds 900 to 903 are a pilot: they give the number of
    seeds (5 to 16; predicted half-width of the 95 % interval delta / 2), and are used for nothing
    else. What is looked at does not hang on the rate:

    Stale updates: 4 layers; every weight layer moves against its gradient by the same share of its
    own norm, 1, 3, 10 and 30 %, gamma and beta stay. Primary contrast: share of looks, over all
    four lengths, at which the loss rises, without minus with BN: superiority, delta = 0.05.
    Shown: share of layers whose own step raises the loss after those below have made theirs, though
    it lowers it alone; ln |interaction| (joint change minus the sum of the layers' own) over what
    the gradient promises; both without minus with BN, at 3 %.
    Positive control: the claim is why BN helps, so it is judged only where it does: test accuracy
    of the same runs, with minus without, superiority, 0.3 points; where that is inconclusive, the
    exact sign-flip test (p at most 0.05, mean at least 0.3 points).

    Simultaneous error: all parameters move against their gradient, so far that the gradient
    promises a decrease by 10 % of the loss, in every network. Error: |change - promise| / promise,
    at most 100, median over the looks; s, least-squares slope of its logarithm over that of L.
    Primary contrast: s without BN, superiority, delta = 0.2; level "depth". And s without minus s
    with BN, superiority, delta = 0.2; level "BN against it". One level supported and the other
    refuted is mixed. Positive control: test accuracy at 16 layers, with minus without, in the same
    way. Shown: the same where 3 % and 30 % are promised.

As published
    Plain SGD as the texts have it, all parameters, the same learning rate 0.1 (none names one) in
    both arms. stale-update: 4 layers trained at that rate, the step is that of SGD; 5 seeds, same
    contrast, same control. simultaneous-error: the step of that rate at the looks of the fair runs,
    same contrasts. Steps of one rate are longer where gradients are, so that a network with other
    gradients differs without any interaction.

The toy (part "chain"): linear neurons y = x w_1 ... w_L, loss y, w = 1 + 0.1 N(0, 1), x = 1, for
which Goodfellow, Bengio & Courville 2016 (Section 8.7.1) expand one step of gradient descent.
Drawn: error of the first-order promise over L for a step at the rate 0.05, and for one that
promises a decrease by 10 %. 5 draws; it decides nothing.

What its author would call fair: lengths of step up to where steps do fail, the deepest networks
still training, and the texts' own plain SGD. What would embarrass us: a contrast that is owed to
one network having larger gradients (hence the matching), to the small losses of the better network
(hence steps relative to weights and to the loss), or to one length of step.

Changed against the registry: 4 layers and 150 steps for stale updates, since both claims share
runs; looks every 25 steps; a fair arm at its own rate beside three fixed ones. `tiny` tries the
wiring with two looks; it decides nothing. On the bundled digits each seed splits the 1,797 images
anew: a demonstration.

Rows: arm fields part ("tuning", "fair", "pilot", "published", "chain"), group (the depth), arm
("bn", "none"), rate, and optionally width (a factor on the hidden units); `step`; a look: `loss`,
`error_3`, `error_10`, `error_30` (percent promised), `error_rate` (the rate 0.1); with 4 layers for
each length in percent, or "sgd": `raises_1`, `ratio_1` (|interaction| over the promise), `stale_1`;
the last three: `accuracy`, `diverged`. The chain: points of its figure.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Words
from gammabeta.studies._beside import answered, control_note, helped
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._interactions.chain import chain
from gammabeta.studies._interactions.contrasts import (
    Arms,
    Looks,
    Seen,
    error,
    logs,
    raising,
    seen_by,
    slopes,
    stale,
)
from gammabeta.studies._interactions.looks import (
    LENGTHS,
    PROMISES,
    PUBLISHED_RATE,
    equal_steps,
    errors_at,
    plain_step,
)
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._nets import MLP
from gammabeta.studies._outcomes import asked_for
from gammabeta.studies._pairs import NORMS
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._train import accuracy, batches, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    LEAST_SEEDS,
    MOST_SEEDS,
    Best,
    Trained,
    Tuned,
    complete,
    guess,
    needed,
    own,
    place,
    settle,
    tuning_figure,
)
from gammabeta.studies._verdict import Outcome, Verdict, controlled

CLAIMS = ("stale-update", "simultaneous-error")

DEPTHS = {f"{n} layer{'s' if n > 1 else ''}": n for n in (1, 2, 4, 8, 16)}
GROUPS = dict.fromkeys(DEPTHS, NORMS)
STALE, DEEPEST = "4 layers", "16 layers"
BATCH = 128
_RISES = "share of steps that raise the loss, none − BN"
_SLOPE, _CURE = "slope of the error without BN", "slope of the error, none − BN"


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    every: int
    seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.03, 0.1, 0.3)
PLANS = {
    "tiny": Plan(4, 4, 1, (0.1,), 500, False),
    "small": Plan(150, 25, LEAST_SEEDS, RATES, 5000, True),
    "full": Plan(500, 50, LEAST_SEEDS, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """The chain, as published, tuning until the grids are settled; main runs; pilot; more seeds."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    wanted = needed(tuned, plan.seeds, seeds, [_planned(seen_by(tuned.rows), tuned.best)])
    return [_cell(plan, *wish) for wish in wanted] + _others(plan, seeds)


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: one value more of each grid, twice the least seeds."""
    plan = PLANS[budget]
    wanted = needed(guess(GROUPS, plan, (1.0,)), plan.seeds, seeds, [2 * LEAST_SEEDS])
    return [_cell(plan, *wish) for wish in wanted] + _others(plan, seeds)


def _others(plan: Plan, seeds: int | None) -> list[Cell]:
    count = plan.seeds if seeds is None else seeds
    toy = Trained("toy", "none", 0.0)
    return [
        _cell(plan, 1, seed, part, what)
        for seed in range(count)
        for part, what in (
            *(("published", Trained(STALE, norm, PUBLISHED_RATE)) for norm in NORMS),
            ("chain", toy),
        )
    ]


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    if part == "chain":
        return Cell("interactions", arm, seed, 0.1, wave)
    # In seconds, about: steps; looks; evaluations.
    depth = DEPTHS[what.group]
    step = 0.75e-3 + depth * (0.31e-3 if what.arm == "bn" else 0.20e-3)
    looks = plan.steps // plan.every + 1 if part != "tuning" else 0
    each = 6 * step + 4e-3
    if what.group == STALE:
        each += 11 * step * (len(LENGTHS) if part != "published" else 1)
    cost = plan.steps * step + looks * each + 3e-5 * plan.images
    return Cell("interactions", arm, seed, round(cost, 3), wave)


def _arms(seen: Seen, part: str, group: str, rates: Mapping[str, float]) -> Arms:
    """Looks of both arms of a depth, by arm and seed."""
    return {n: seen.get((part, *Trained(group, n, rates[n])), {}) for n in NORMS if n in rates}


def _rises(seen: Seen, part: str, best: Best) -> dict[int, float]:
    return raising(_arms(seen, part, STALE, best.get(STALE, {})), list(LENGTHS))


def error_slopes(
    seen: Seen, part: str, best: Best, name: str = "error_10"
) -> dict[str, dict[int, float]]:
    """The slope without BN, and without minus with, by seed."""
    if len(best) < len(GROUPS):
        return {_SLOPE: {}, _CURE: {}}
    arms = {group: _arms(seen, part, group, best[group]) for group in GROUPS}
    with_bn, without = (
        slopes({DEPTHS[group]: arms[group][norm] for group in GROUPS}, name) for norm in NORMS
    )
    both = sorted(with_bn.keys() & without.keys())
    return {_SLOPE: without, _CURE: {seed: without[seed] - with_bn[seed] for seed in both}}


def _planned(seen: Seen, best: Best) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = {_RISES: _rises(seen, "pilot", best), **error_slopes(seen, "pilot", best)}
    if not complete(pilot):
        return None
    limits = {name: claims()["simultaneous-error"].thresholds["delta"] for name in pilot}
    limits[_RISES] = claims()["stale-update"].thresholds["delta"]
    return asked_for(pilot, limits, LEAST_SEEDS, MOST_SEEDS)


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network, and look at a step of all its layers every so many steps."""
    part, plan = str(arm["part"]), PLANS[budget]
    if part == "chain":
        yield from chain(seed)
        return
    x, y, held_x, held_y = fair_split(data, seed, "validation" if part == "tuning" else "test")
    held, labels = pixels(held_x[: plan.images], data.pixel_max), held_y[: plan.images]
    units = round(100 * float(arm.get("width") or 1.0))
    group, rate = str(arm["group"]), float(arm["rate"] or 0.0)
    sizes = (held.shape[1], *[units] * DEPTHS[group], 10)
    net = MLP(sizes, "relu", arm["arm"] == "bn", stream(seed, "weights"))
    looked = batches(len(x), BATCH, stream(seed, "looks"))

    def look() -> Row:
        if part == "tuning":
            return {}
        index = next(looked)
        batch = pixels(x[index], data.pixel_max), y[index]
        row = errors_at(net, batch)
        if row and group == STALE:
            row |= plain_step(net, batch, rate) if part == "published" else equal_steps(net, batch)
        return row

    ends = log_steps(plan.steps, 3)[-3:]
    at = range(plan.every, plan.steps + 1, plan.every)
    training = train(
        net,
        x,
        y,
        pixel_max=data.pixel_max,
        rate=rate,
        steps=plan.steps,
        order=stream(seed, "order"),
        stops={*at, *ends} if part != "tuning" else ends,
        batch=BATCH,
    )
    yield {"step": 0, **look()}
    for step, loss in training:
        row: Row = {"step": step}
        if step in ends:
            row |= {"accuracy": accuracy(net, held, labels), "diverged": not math.isfinite(loss)}
        if step in at:
            row |= look()
        yield row


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """Both claims, fair and as published; what is missing makes them inconclusive."""
    if not rows:
        return []
    tuned, seen = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])]), seen_by(rows)
    return [_stale_verdict(seen, tuned), _error_verdict(seen, tuned)]


def _stale_verdict(seen: Seen, tuned: Tuned) -> Verdict:
    runs, best = tuned.runs, tuned.best
    limits = claims()["stale-update"].thresholds
    rates, same = best.get(STALE, {}), dict.fromkeys(NORMS, PUBLISHED_RATE)
    control = helped(runs, "fair", STALE, rates, limits["control"])
    control_there = helped(runs, "published", STALE, same, limits["control"])
    arms, plain = _arms(seen, "fair", STALE, rates), _arms(seen, "published", STALE, same)
    fair, published = (
        joint({_RISES: Part(list(by.values()), "superiority", limits["delta"])}, LEAST_SEEDS)
        for by in (_rises(seen, "fair", best), raising(plain, ["sgd"]))
    )
    beside = {
        "share of stale layers, none − BN, at 3 %": stale(arms, "3"),
        "ln of the relative interaction, none − BN, at 3 %": logs(arms, "3"),
        f"share of stale layers, none − BN, plain SGD at {PUBLISHED_RATE:g}": stale(plain, "sgd"),
    }
    beside |= {
        f"share of steps that raise the loss, none − BN, at {at} %": raising(arms, [at])
        for at in LENGTHS
    }
    rising = [
        f"{100 * _mean_share(arms.get(norm, {})):.0f} % {name}"
        for norm, name in (("none", "without"), ("bn", "with"))
    ]
    more = [f"Steps that raise the loss, all lengths: {', '.join(rising)} BN."] if arms else []
    return answered(
        "stale-update",
        tuned.setting(
            "interactions",
            "MLP of four layers",
            "each network at its best learning rate, at equal relative steps",
            "share of steps",
        ),
        Words(
            "steps of all layers raise the loss less often with batch normalization: {weakest}",
            "steps of all layers raise the loss about as often with batch normalization as "
            "without, or more: {refuted}",
            "{weakest}",
        ),
        controlled(fair, control),
        {f"plain SGD at the rate {PUBLISHED_RATE:g}": controlled(published, control_there)},
        delta=limits["delta"],
        pilot={_RISES: list(_rises(seen, "pilot", best).values())},
        planned=_planned(seen, best),
        notes=[*tuned.notes(), *control_note(control), *more],
        beside=beside,
    )


def _error_verdict(seen: Seen, tuned: Tuned) -> Verdict:
    limits, best = claims()["simultaneous-error"].thresholds, tuned.best
    control = helped(tuned.runs, "fair", DEEPEST, best.get(DEEPEST, {}), limits["control"])

    def judged(name: str) -> Outcome:
        found = error_slopes(seen, "fair", best, name)
        levels = {_SLOPE: "depth", _CURE: "BN against it"}
        parts = {
            part: Part(list(v.values()), "superiority", limits["delta"], level=levels[part])
            for part, v in found.items()
        }
        return controlled(joint(parts, LEAST_SEEDS), control)

    beside = {
        f"{part}, {100 * promise:g} % promised": values
        for name, promise in PROMISES.items()
        if name != "error_10"
        for part, values in error_slopes(seen, "fair", best, name).items()
    }
    return answered(
        "simultaneous-error",
        tuned.setting(
            "interactions",
            "MLPs of 1 to 16 layers",
            "each network at its best learning rate, where 10 % less loss is promised",
            "slope of ln error over ln depth",
        ),
        Words(
            "the error of the first-order promise grows with depth, and less so with batch "
            "normalization: {weakest}",
            "the error of the first-order promise does not grow with depth, or batch "
            "normalization is not what helps: {refuted}",
            "{weakest}",
            "one holds and the other does not; {refuted}",
        ),
        judged("error_10"),
        {f"a step of the rate {PUBLISHED_RATE:g}": judged("error_rate")},
        delta=limits["delta"],
        pilot={n: list(v.values()) for n, v in error_slopes(seen, "pilot", best).items()},
        planned=_planned(seen, best),
        notes=[*tuned.notes(), *control_note(control)],
        beside=beside,
    )


def _mean_share(by_seed: Mapping[int, Looks], lengths: Sequence[str] = tuple(LENGTHS)) -> float:
    rises = [
        bool(row[f"raises_{at}"])
        for looks in by_seed.values()
        for row in looks.values()
        for at in lengths
    ]
    return statistics.fmean(rises) if rises else 0.0


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Errors over depth, failing steps over their length, the chain, the tuning."""
    if not rows:
        return []
    tuned, seen = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])]), seen_by(rows)
    where, best = place(rows), tuned.best
    names = {"bn": "with", "none": "without"}
    drawn = [row for row in rows if row.get("kind") == "curve"]

    def point(curve: str, norm: str, x: float, y: float) -> Row:
        return {"kind": "curve", "curve": curve, "series": names[norm], "x": x, "y": y, "seed": 0}

    for group in best:
        for norm, by_seed in _arms(seen, "fair", group, best[group]).items():
            for looks in by_seed.values():
                off = max(error(looks, "error_10"), 1e-6)
                drawn.append(point("depth", norm, float(DEPTHS[group]), off))
                for at, share in LENGTHS.items() if group == STALE else ():
                    drawn.append(point("lengths", norm, share, _mean_share({0: looks}, [at])))
    axes = {
        "depth": Axes(
            f"Error of the first-order promise on {where}, where 10 % less loss is promised",
            "layers",
            "error / promise",
            x_log=True,
            y_log=True,
        ),
        "lengths": Axes(
            f"Share of steps of all layers that raise the loss on {where}, 4 layers",
            "length of each layer's step, in norms of its weights",
            "share",
            x_log=True,
        ),
        "chain": Axes(
            "The toy: error of the first-order promise in a chain of linear neurons",
            "neurons",
            "error / promise",
        ),
    }
    return [
        *drawings("interactions", axes, drawn),
        *tuning_figure("interactions", tuned, "by depth"),
    ]
