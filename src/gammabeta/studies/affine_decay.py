"""Does weight decay on gamma and beta help?

Common practice exempts gamma and beta of batch normalization (BN) from weight decay. Summers &
Dinneen 2020 (wd-gamma-beta) report that decaying them as well can help; in their code gamma decays
toward 1.

Network: pixels-100-100-10, ReLU, BN before each activation, no bias where it follows, bias 0.1 at
the output, weights from a truncated normal distribution with standard deviation sqrt(2 / fan-in).
Batches of 64, 500 steps of SGD without momentum (3,000 at `full`), mean cross-entropy, 2,000
training images drawn for each seed from the first 55,000 (each is seen 16 times and learned by
heart, so that there is something to regularize), PyTorch's defaults for the layer. All runs of a
seed have the same start and batches. A step is w <- w - rate (gradient + decay (w - target)):

    "weights"       decay of all weights, the output layer's too, toward 0; no bias decays
    "affine"        the same, and gamma and beta toward 0, as PyTorch's weight_decay does it
    "toward one"    the same, but gamma toward 1, where it starts
    "none"          no decay

Each arm has its own learning rate and decay: for each decay of 0.0001, 0.001 and 0.01 the best rate
(highest accuracy on the last 5,000 training images, mean of seeds 800 and 801, from 0.1, 0.3, 1; a
best value at an edge extends the grid for all arms of that decay), and of these the decay with the
highest accuracy there, the smaller one of equals. No decay at all is not a choice: the smallest
changes a weight by 5 % in all at the rate 1.

Primary contrast: test accuracy by running statistics, mean at 96, 98 and 100 % of the steps, affine
minus weights, in points: superiority, delta = 0.1. 5 to 16 seeds by a pilot of seeds 900 to 903,
used for nothing else: predicted half-width of the 95 % interval delta / 2.
Shown: toward one minus weights, 16 seeds; affine and toward one minus weights, all at the rate and
the decay of "weights"; weights minus none, 8 seeds each; mean |gamma| and mean |beta| over hidden
units at the end, by arm. No positive control: the claim does not say why BN helps; whether decay
helps at all is shown.

What its author would call fair: few images, so that regularization can help; a rate and a decay for
each arm; gamma toward 1 as in their code, as a secondary contrast declared here. What would
embarrass us: decays so weak that nothing changes, or a choice by two seeds that is noise: what the
arms gain over no decay, and what gamma becomes, tell.

The source's networks and images (CIFAR-100, ImageNet and others) cannot be run here: one verdict.
Changed against the registry: a decay of 0.01 beside; none is no choice but shown; 500 steps. `tiny`
tries the wiring; it decides nothing. On the bundled digits each seed splits the 1,797 images anew:
a demonstration.

Rows: arm fields part ("tuning", "fair", "pilot", "shown"), group (the decay, in words), arm, rate,
and optionally width (a factor on the hidden units); `step`, `accuracy`, `diverged`, in the last row
of other parts than tuning `gamma` and `beta`.
"""

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gammabeta._runs import Row, Scalar
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.studies._answer import Words
from gammabeta.studies._asked import Asked, Parts, ends, less, planned, verdict
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    EQUIVALENCE_SEEDS,
    LEAST_SEEDS,
    MOST_SEEDS,
    TUNING_SEEDS,
    Trained,
    Tuned,
    Wish,
    guess,
    needed,
    own,
    settle,
    trials,
    tuning_figure,
)
from gammabeta.studies._verdict import Verdict

CLAIMS = ("wd-gamma-beta",)

DECAYS = {"decay 0.0001": 0.0001, "decay 0.001": 0.001, "decay 0.01": 0.01}
ARMS = ("weights", "affine", "toward one")
NONE = "none"
GROUPS = {**dict.fromkeys(DECAYS, ARMS), NONE: (NONE,)}
_CONTRAST = "gamma and beta too − weights only"


class Plan(NamedTuple):
    """What a budget stands for."""

    images: int  # for training
    steps: int
    seeds: int
    shown: tuple[int, int]  # seeds of "toward one", and of the rest
    rates: tuple[float, ...]
    held: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES, SHOWN = (0.1, 0.3, 1.0), (MOST_SEEDS, EQUIVALENCE_SEEDS)
PLANS = {
    "tiny": Plan(200, 10, 1, (1, 1), (0.3,), 500, False),
    "small": Plan(2000, 500, LEAST_SEEDS, SHOWN, RATES, 10000, True),
    "full": Plan(2000, 3000, LEAST_SEEDS, SHOWN, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until the grids are settled; then the main runs; pilot; more seeds; what is shown."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    return _wanted(tuned, plan, seeds, planned(_asked(tuned, "pilot"), LEAST_SEEDS))


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: grids grow once, and all the seeds there are."""
    plan = PLANS[budget]
    return _wanted(guess(GROUPS, plan, (3.0,)), plan, seeds, MOST_SEEDS)


def _wanted(tuned: Tuned, plan: Plan, seeds: int | None, asked: int | None) -> list[Cell]:
    chosen = choices(tuned)
    judged = [chosen[arm] for arm in ARMS[:2]] if chosen else []
    wanted = needed(tuned, plan.seeds, seeds, [asked], lambda best: judged)
    if chosen:
        counts = [n if seeds is None else min(seeds, n) for n in plan.shown]
        beside = [(chosen["toward one"], counts[0]), (chosen[NONE], counts[1])]
        beside += [(chosen["weights"]._replace(arm=arm), counts[1]) for arm in ARMS[1:]]
        wanted += [Wish(2, s, "shown", what) for what, count in beside for s in range(count)]
    return [_cell(plan, wish) for wish in wanted]


def _cell(plan: Plan, wish: Wish) -> Cell:
    arm: Mapping[str, Scalar] = {"part": wish.part, **wish.what._asdict()}
    # In seconds, about: steps, and looks at the evaluation images.
    looks = 3 * 6e-6 * min(plan.held, 5000 if wish.part == "tuning" else 10000)
    return Cell("affine-decay", arm, wish.seed, round(plan.steps * 1.2e-3 + looks, 3), wish.wave)


def choices(tuned: Tuned) -> dict[str, Trained]:
    """The decay and the rate of each arm; nothing before all searches are settled."""
    if len(tuned.best) < len(GROUPS):
        return {}
    found = {NONE: Trained(NONE, NONE, tuned.best[NONE][NONE])}
    for arm in ARMS:
        each = [Trained(group, arm, tuned.best[group][arm]) for group in DECAYS]
        found[arm] = max(each, key=lambda what: _validation(tuned, what))  # the first of equals
    return found


def _validation(tuned: Tuned, what: Trained) -> float:
    by_seed = trials(tuned.runs, what.group).get((what.arm, what.rate), {})
    return math.fsum(by_seed[seed].final for seed in TUNING_SEEDS if seed in by_seed)


# -- one cell -----------------------------------------------------------------------------------


def decayed(net: nn.Module, arm: str) -> list[tuple[Tensor, float]]:
    """The parameters that decay in an arm, each with what it decays toward."""
    found: list[tuple[Tensor, float]] = []
    for layer in net.modules():
        if isinstance(layer, nn.Linear) and arm != NONE:
            found.append((layer.weight, 0.0))
        elif isinstance(layer, BatchNorm1d) and arm in ARMS[1:]:
            found.append((layer.weight, float(arm == "toward one")))
            found.append((layer.bias, 0.0))
    return found


def step_back(parameter: Tensor, target: float, rate: float, decay: float) -> None:
    """What decay adds, in place, to a step that has been made by the gradient alone."""
    if parameter.grad is None:
        raise ValueError("a gradient was expected, got none. Train with a stop at every step.")
    before = parameter + rate * parameter.grad
    parameter.sub_(before - target, alpha=rate * decay)


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network; its accuracy at the end, three times."""
    plan, tuning, rate = PLANS[budget], arm["part"] == "tuning", float(arm["rate"] or 0.0)
    evaluation = "validation" if tuning else "test"
    x, y, held_x, labels = fair_split(data, seed, evaluation, plan.images)
    held, labels = pixels(held_x[: plan.held], data.pixel_max), labels[: plan.held]
    units = round(100 * float(arm.get("width") or 1.0))
    sizes = (held.shape[1], units, units, 10)
    net = MLP(sizes, "relu", True, stream(seed, "weights"))
    pulled, decay = decayed(net, str(arm["arm"])), DECAYS.get(str(arm["group"]), 0.0)
    stops = log_steps(plan.steps, 3)[-3:]
    diverged, every, order = False, range(1, plan.steps + 1), stream(seed, "order")
    training = train(
        net, x, y, pixel_max=data.pixel_max, rate=rate, steps=plan.steps, order=order, stops=every
    )
    for step, loss in training:
        diverged = diverged or not math.isfinite(loss)
        with torch.no_grad():
            for parameter, target in pulled:
                step_back(parameter, target, rate, decay)
        if step in stops:
            row: Row = {"step": step, "accuracy": accuracy(net, held, labels)}
            row["diverged"] = diverged
            if step == stops[-1] and not (tuning or diverged):
                row |= _sizes(net)
            yield row


def _sizes(net: MLP) -> Row:
    """Mean |gamma| and mean |beta| over hidden units."""
    norms = [layer for layer in net.layers if isinstance(layer, BatchNorm1d)]
    with torch.no_grad():
        gamma = torch.cat([layer.weight.abs() for layer in norms]).mean()
        beta = torch.cat([layer.bias.abs() for layer in norms]).mean()
    return {"gamma": float(f"{float(gamma):.6g}"), "beta": float(f"{float(beta):.6g}")}


# -- what it means ------------------------------------------------------------------------------


def _ended(t: Tuned, part: str, what: Trained | None, of: str = "accuracy") -> dict[int, float]:
    """A number at the end of training, by seed."""
    return ends(t.rows, of, {"part": part, **what._asdict()}) if what else {}


def _asked(tuned: Tuned, part: str) -> Parts:
    """The part of the claim, from the fair or the pilot's rows."""
    chosen, delta = choices(tuned), claims()["wd-gamma-beta"].thresholds["delta"]
    weights, affine = (_ended(tuned, part, chosen.get(arm)) for arm in ARMS[:2])
    return {_CONTRAST: Asked(less(affine, weights, 100), "superiority", delta, delta)}


def judge(rows: list[Row]) -> list[Verdict]:
    """One claim; what is missing makes it inconclusive."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    chosen = choices(tuned)
    weights = _ended(tuned, "fair", chosen.get("weights"))
    shown = {arm: _ended(tuned, "shown", chosen.get(arm)) for arm in ("toward one", NONE)}
    beside: dict[str, Mapping[int, float]] = {
        "toward one − weights only": less(shown["toward one"], weights, 100)
    }
    for arm in ARMS[1:]:
        same = chosen["weights"]._replace(arm=arm) if chosen else None
        name = f"{arm} − weights only, both at the rate and decay of weights only"
        beside[name] = less(_ended(tuned, "shown", same), weights, 100)
    beside["weights only − no decay"] = less(weights, shown[NONE], 100)
    return [
        verdict(
            "wd-gamma-beta",
            tuned.setting(
                "affine-decay",
                "MLP 100-100 on 2,000 images",
                "each at its best learning rate and decay",
            ),
            Words(
                "weight decay on gamma and beta helps: {weakest}",
                "weight decay on gamma and beta does not help: {refuted}",
                "the difference is {weakest}",
            ),
            _asked(tuned, "fair"),
            _asked(tuned, "pilot"),
            least=LEAST_SEEDS,
            notes=[*_chosen_notes(chosen), *_size_notes(tuned, chosen), *tuned.notes()],
            beside=beside,
        )
    ]


def _chosen_notes(chosen: Mapping[str, Trained]) -> list[str]:
    if not chosen:
        return []
    said = "; ".join(f"{arm}: {w.group} at rate {w.rate:g}" for arm, w in chosen.items())
    edge = [arm for arm in ARMS if DECAYS[chosen[arm].group] == max(DECAYS.values())]
    more = f" The largest decay tried: {', '.join(edge)}." if edge else ""
    return [f"Chosen: {said}.{more}"]


def _size_notes(tuned: Tuned, chosen: Mapping[str, Trained]) -> list[str]:
    said = []
    for arm, what in chosen.items():
        part = "fair" if arm in ARMS[:2] else "shown"
        gamma, beta = (_ended(tuned, part, what, name).values() for name in ("gamma", "beta"))
        if gamma and beta:
            said.append(f"{arm} {statistics.fmean(gamma):.2f} and {statistics.fmean(beta):.2f}")
    return [f"Mean |gamma| and mean |beta| at the end: {'; '.join(said)}."] if said else []


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """How rates and decays were chosen."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    return tuning_figure("affine-decay", tuned, "by decay and by what decays")
