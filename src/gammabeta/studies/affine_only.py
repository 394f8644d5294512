"""Can a network learn with gamma and beta alone?

Frankle et al. 2021 (arXiv 2003.00152) train only the gamma and beta of the batch normalizations
(BN) in networks whose weights stay random, and reach far more than by training as many random
weights (bn-only).

Networks: pixels-100-100-10 and pixels-[100]*5-10, ReLU, BN before each activation, no bias where it
follows, weights from a truncated normal distribution with standard deviation sqrt(2 / fan-in),
last bias 0.1. SGD without momentum, mean cross-entropy, batches of 64, 5,000 training images drawn
for each seed from the first 55,000, PyTorch's defaults for the layer (gamma 1, beta 0 at the
start), 500 steps. Trained, everything else staying as it was drawn, the output layer too, as in the
paper:

    gamma and beta   of each hidden unit
    random weights   two for each hidden unit, drawn by chance from those that enter it: as many
    all              everything (shown, not in the second network)
    output           the output layer alone, 1,010 numbers: more than twice as many (likewise)

Beside these, as the paper's networks are convolutional: 5x5 with stride 2 and 8 channels, the same
and 16 channels (3x3 on the digits), one dense layer, BN after each convolution, all arms. There a
unit is a channel: 48 numbers are gamma and beta, and two weights for each channel, as in the paper,
are as many; the output layer has 2,570.

BN normalizes by batch statistics in all arms. Each arm of each network trains at its own best
learning rate: highest accuracy on the last 5,000 training images (mean of seeds 800 and 801) from
1, 3, 10; a best value at an edge extends the grid for all arms of the network. Arms of a seed start
alike and see the same batches.

Primary contrast: test accuracy by running statistics, mean at 96, 98 and 100 % of the steps, gamma
and beta minus random weights, in points, lies above 1, in the first network; and in the second.
5 to 16 seeds by a pilot of seeds 900 to 903, used for nothing else: predicted half-width of the
95 % interval half a point. No positive control: the claim does not say why BN helps. Shown:
accuracy of each arm; what is lost to training all; share of |gamma| below 0.01; the same, and the
contrast, in the convolutional network, with 16 seeds, a number that is fixed. This network never
enters the verdict: the rule was written, and its rows were judged, before it was added. All and
output have 5 seeds everywhere.

What its authors would call fair: two weights for each unit, as in their comparison; an output layer
that stays random in both; a rate for each arm, from a grid that grows. What would embarrass us: a
grid too low for two weights in hundreds, which then seem unable to learn; hence it grows up to 300.
"High accuracy" has no number in the claim: the accuracies are shown, the contrast decides.

The source's networks and images (ResNets on CIFAR-10) cannot be run here: one verdict. Changed
against the registry: no networks of width 400, 500 steps; `full` 4,000; `tiny` a few, it decides
nothing. On the bundled digits each seed splits the 1,797 images anew: a demonstration.

Rows: arm fields part ("tuning", "fair", "pilot", "shown"), group, arm, rate; `step`,
`accuracy`, `diverged`, `small` (share of |gamma| below 0.01).
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row, Scalar
from gammabeta.layers.batch_norm import BatchNorm1d, BatchNorm2d
from gammabeta.studies._answer import Words, span
from gammabeta.studies._asked import Asked, Parts, ends, less, planned, verdict
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._inference.networks import Convolutional
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import accuracy, batches, fair_split, log_steps, pixels, stream
from gammabeta.studies._tuned import (
    LEAST_SEEDS,
    MOST_SEEDS,
    Trained,
    Tuned,
    Wish,
    every,
    guess,
    needed,
    own,
    settle,
    trained_figures,
)
from gammabeta.studies._verdict import Verdict, interval

CLAIMS = ("bn-only",)
AFFINE, RANDOM, ALL, OUTPUT = "gamma and beta", "random weights", "all", "output"
DEPTHS = {"100-100": 2, "[100]*5": 5}  # of the networks that decide
CONVOLUTIONAL = "convolutional"
GROUPS = {
    "100-100": (AFFINE, RANDOM, ALL, OUTPUT),
    "[100]*5": (AFFINE, RANDOM),
    CONVOLUTIONAL: (AFFINE, RANDOM, ALL, OUTPUT),
}
SMALL = 0.01  # |gamma| below it


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    seeds: int
    shown: int  # seeds of the convolutional network
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (1.0, 3.0, 10.0)
PLANS = {
    "tiny": Plan(10, 1, 1, (1.0,), 500, False),
    "small": Plan(500, LEAST_SEEDS, MOST_SEEDS, RATES, 10000, True),
    "full": Plan(4000, LEAST_SEEDS, MOST_SEEDS, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until the grids are settled; then the main runs; pilot; more seeds; what is shown."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    return _wanted(tuned, plan, seeds, planned(_asked(tuned, "pilot"), LEAST_SEEDS))


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: grids grow twice, the pilot asks for half as many more."""
    plan = PLANS[budget]
    return _wanted(guess(GROUPS, plan, (30.0, 100.0)), plan, seeds, LEAST_SEEDS * 3 // 2)


def _wanted(tuned: Tuned, plan: Plan, seeds: int | None, asked: int | None) -> list[Cell]:
    main = {group: GROUPS[group] for group in DEPTHS}
    wanted = needed(tuned, plan.seeds, seeds, [asked], lambda best: every(main, best))
    count = plan.shown if seeds is None else min(seeds, plan.shown)
    rates = tuned.best.get(CONVOLUTIONAL, {})
    wanted += [
        Wish(2, seed, "shown", Trained(CONVOLUTIONAL, arm, rate))
        for seed in range(count)
        for arm, rate in rates.items()
    ]
    return [_cell(plan, *wish) for wish in wanted if not _spare(*wish)]


def _spare(wave: int, seed: int, part: str, what: Trained) -> bool:
    """Arms that are shown need no pilot and no seeds beyond the least."""
    shown = what.arm in (ALL, OUTPUT)
    return shown and (part == "pilot" or (part != "tuning" and seed >= LEAST_SEEDS))


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    # In seconds, about: steps, and looks at the evaluation images.
    if what.group in DEPTHS:
        deep = DEPTHS[what.group] / 2
        step, look = (0.55 + 0.35 * deep) * 1e-3, 4e-6 * deep
    else:
        step, look = 2.4e-3, 2e-5
    looks = 3 * min(plan.images, 5000 if part == "tuning" else 10000)
    return Cell("affine-only", arm, seed, round(plan.steps * step + looks * look, 3), wave)


# -- one cell -----------------------------------------------------------------------------------


def network(count: int, group: str, seed: int) -> MLP:
    """The network of a group, for images of so many pixels, as it is drawn."""
    generator = stream(seed, "weights")
    if group in DEPTHS:
        return MLP((count, *[100] * DEPTHS[group], 10), "relu", True, generator)
    return Convolutional(math.isqrt(count), generator)


def trained(net: MLP, arm: str, seed: int) -> list[tuple[Tensor, Tensor | None]]:
    """The parameters that an arm trains, each with a mask of the numbers that may change.

    Random weights: two of those that enter each hidden unit or channel, without replacement.
    """
    if arm == ALL:
        return [(parameter, None) for parameter in net.parameters()]
    maps = [layer for layer in net.layers if isinstance(layer, nn.Conv2d | nn.Linear)]
    if arm == OUTPUT:
        return [(parameter, None) for parameter in maps[-1].parameters()]
    if arm == AFFINE:
        return [(parameter, None) for norm in _norms(net) for parameter in norm.parameters()]
    generator = stream(seed, "random weights")
    found: list[tuple[Tensor, Tensor | None]] = []
    for layer in maps[:-1]:
        chance = torch.rand(layer.weight.shape, generator=generator).flatten(1)
        mask = torch.zeros_like(chance).scatter_(1, chance.topk(2, dim=1).indices, 1.0)
        found.append((layer.weight, mask.view_as(layer.weight)))
    return found


def _norms(net: MLP) -> list[BatchNorm1d | BatchNorm2d]:
    return [layer for layer in net.layers if isinstance(layer, BatchNorm1d | BatchNorm2d)]


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network in part; its accuracy at the end, three times."""
    plan, tuning = PLANS[budget], arm["part"] == "tuning"
    split = fair_split(data, seed, "validation" if tuning else "test")
    train_x, train_y, held_x, labels = split
    flat, held = train_x.flatten(1), pixels(held_x[: plan.images], data.pixel_max)
    labels, rate = labels[: len(held)], float(arm["rate"] or 0.0)
    net = network(flat.shape[1], str(arm["group"]), seed)
    chosen_ones = trained(net, str(arm["arm"]), seed)
    moving = [parameter for parameter, _ in chosen_ones]
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    for one in moving:
        one.requires_grad_(True)
    stops, order = log_steps(plan.steps, 3)[-3:], batches(len(flat), 64, stream(seed, "order"))
    net.train()
    for step, index in zip(range(1, plan.steps + 1), order, strict=False):
        loss = cross_entropy(net(pixels(flat[index], data.pixel_max)), train_y[index])
        gradients = torch.autograd.grad(loss, moving)
        with torch.no_grad():
            for (one, mask), gradient in zip(chosen_ones, gradients, strict=True):
                one.sub_(gradient if mask is None else gradient * mask, alpha=rate)
        if step in stops:
            gamma = torch.cat([norm.weight.detach() for norm in _norms(net)])
            yield {
                "step": step,
                "accuracy": accuracy(net, held, labels),
                "diverged": not math.isfinite(loss.item()),
                "small": float((gamma.abs() < SMALL).double().mean()),
            }


# -- what it means ------------------------------------------------------------------------------


def _shares(
    tuned: Tuned, part: str, group: str, arm: str, column: str = "accuracy"
) -> dict[int, float]:
    rate = tuned.best.get(group, {}).get(arm, math.nan)
    return ends(tuned.rows, column, {"part": part, "group": group, "arm": arm, "rate": rate})


def _asked(tuned: Tuned, part: str) -> Parts:
    """The parts of the claim, from the fair or the pilot's rows."""
    delta, found = claims()["bn-only"].thresholds["delta"], {}
    for group in DEPTHS:
        gain = _gain(tuned, part, group)
        found[f"{AFFINE} − {RANDOM}, {group}"] = Asked(gain, "above", delta, delta)
    return found


def _gain(tuned: Tuned, part: str, group: str) -> dict[int, float]:
    affine, random = (_shares(tuned, part, group, arm) for arm in (AFFINE, RANDOM))
    return less(affine, random, 100)


def judge(rows: list[Row]) -> list[Verdict]:
    """One claim; what is missing makes it inconclusive."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    beside = {}
    for group, arms in GROUPS.items():
        part = "fair" if group in DEPTHS else "shown"
        for arm in arms:
            share = _shares(tuned, part, group, arm)
            beside[f"accuracy, {arm}, {group}"] = {s: 100 * v for s, v in share.items()}
        small = _shares(tuned, part, group, AFFINE, "small")
        beside[f"share of |gamma| < {SMALL:g} (%), {group}"] = {
            s: 100 * v for s, v in small.items()
        }
    gain = _gain(tuned, "shown", CONVOLUTIONAL)
    beside[f"{AFFINE} − {RANDOM}, {CONVOLUTIONAL}"] = gain
    words = Words(
        "training gamma and beta alone gains more than {delta} point over as many random weights: "
        "{weakest}",
        "training gamma and beta alone does not gain {delta} point over as many random weights: "
        "{refuted}",
        "training gamma and beta alone gains {weakest}",
    )
    return [
        verdict(
            "bn-only",
            tuned.setting(
                "affine-only", "MLP 100-100 and [100]*5", "each arm at its best learning rate"
            ),
            words,
            _asked(tuned, "fair"),
            _asked(tuned, "pilot"),
            least=LEAST_SEEDS,
            notes=[*tuned.notes(), *_note(gain)],
            beside=beside,
        )
    ]


def _note(gain: Mapping[int, float]) -> list[str]:
    """What the convolutional network says; it decides nothing."""
    if len(gain) < 2:
        return []
    found = interval(gain.values())
    said = f"{AFFINE} − {RANDOM} {span(found)} points, n = {found.n}"
    return [f"Shown, {CONVOLUTIONAL} network: {said}."]


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Test accuracy at the end of training, and how the rates were chosen."""
    if not rows:
        return []
    return trained_figures(
        "affine-only",
        settle(rows, GROUPS, PLANS[str(rows[0]["budget"])]),
        "Test accuracy on {where} where only some numbers of a random network are trained",
        "Each arm at its best learning rate.",
        "by what is trained",
        plain=(RANDOM, ALL, OUTPUT),
    )
