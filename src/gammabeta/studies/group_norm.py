"""Is Group Normalization independent of the batch size?

Wu & He 2018 (gn-small): the error of ResNet-50 with GroupNorm stays at 24.0 to 24.2 % from 32 down
to 2 images per GPU, where that of batch normalization rises.

Network: pixels-100-100-10, ReLU, GroupNorm of 10 groups of 10 features before each activation, no
bias where it follows, bias 0.1 at the end, weights from a truncated normal distribution with
standard deviation sqrt(2 / fan-in). SGD without momentum, mean cross-entropy, batches of 2, 8 and
64; all train on the same 1,000 images, drawn for each seed from the first 55,000, and see each 10
times (an equal number of epochs, as in the source), so that batches of 64 are near the end of what
they can learn as well.

Beside it, as the source's network is convolutional: 5x5 with stride 2 and 8 channels, the same and
16 channels (3x3 on the digits), one dense layer; GroupNorm of 4 groups after each convolution, a
fixed number as in the source. The same images, batches and epochs.

Each batch size of each network has its own best learning rate: highest accuracy on the last 5,000
training images (mean of seeds 800 and 801) from 0.03, 0.1, 0.3; a best value at an edge extends the
grid for all batch sizes of the network. The source scales the rate with the batch.
All arms of a seed start alike; GroupNorm normalizes each image alone, so what may depend on the
batch is SGD, not the layer: the claim is about the accuracy that a user gets.

Primary contrast: test accuracy with GroupNorm in the dense network, mean at 96, 98 and 100 % of the
steps, least-squares slope over log2 of the batch, in points per doubling: equivalence, delta = 0.1,
at least 8 seeds, by a pilot of seeds 900 to 903, used for nothing else: predicted half-width of the
95 % interval 0.05. Shown: accuracy at 2 and 8 minus that at 64; the same, and the slope, in the
convolutional network, with 16 seeds, a number that is fixed. This network never enters the verdict:
the rule was written, and its rows were judged, before it was added. No positive control: the claim
does not say why batch normalization (BN) helps; what BN loses at small batches is asked by
batch-small.

What its authors would call fair: equal epochs, and a rate for each batch size. What would embarrass
us: a slope that is one of SGD, by too few steps of large batches or too low a rate for small ones.
If it is not flat, "independent" is wrong about networks that are trained, and right about the
layer.

The source's network and images cannot be run here: one verdict. Changed against the registry: the
dense network decides, three batch sizes, 1,000 images. `full` has 5,000 images; `tiny` tries the
wiring and decides nothing. On the bundled digits each seed splits the 1,797 images anew: a
demonstration.

Rows: arm fields part ("tuning", "fair", "pilot", "shown"), group ("GroupNorm": the
dense network; "convolutional"), arm ("B = 2"), rate; `step`, `accuracy`, `diverged`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from gammabeta._runs import Row, Scalar
from gammabeta.layers.batch_norm import BatchNorm2d
from gammabeta.studies._answer import Words, span
from gammabeta.studies._asked import Asked, Parts, ends, less, planned, verdict
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._inference.networks import Convolutional
from gammabeta.studies._nets import MLP, m2
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    EQUIVALENCE_SEEDS,
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

CLAIMS = ("gn-small",)
BATCHES = {"B = 2": 2, "B = 8": 8, "B = 64": 64}
GN, CONVOLUTIONAL = "GroupNorm", "convolutional"
GROUPS = dict.fromkeys((GN, CONVOLUTIONAL), tuple(BATCHES))
_SLOPE = "slope per doubling of the batch"


class Plan(NamedTuple):
    """What a budget stands for."""

    images: int  # for training
    epochs: int
    seeds: int
    shown: int  # seeds of the convolutional network
    rates: tuple[float, ...]
    held: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.03, 0.1, 0.3)
PLANS = {
    "tiny": Plan(64, 2, 1, 1, (0.1,), 500, False),
    "small": Plan(1000, 10, EQUIVALENCE_SEEDS, MOST_SEEDS, RATES, 10000, True),
    "full": Plan(5000, 10, EQUIVALENCE_SEEDS, MOST_SEEDS, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until the grids are settled; then the main runs; pilot; more seeds; what is shown."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    return _wanted(tuned, plan, seeds, planned(_asked(tuned, "pilot"), EQUIVALENCE_SEEDS))


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: grids grow once, the pilot asks for half as many more."""
    plan = PLANS[budget]
    return _wanted(guess(GROUPS, plan, (0.01,)), plan, seeds, EQUIVALENCE_SEEDS * 3 // 2)


def _wanted(tuned: Tuned, plan: Plan, seeds: int | None, asked: int | None) -> list[Cell]:
    wanted = needed(tuned, plan.seeds, seeds, [asked], lambda best: every({GN: GROUPS[GN]}, best))
    count = plan.shown if seeds is None else min(seeds, plan.shown)
    rates = tuned.best.get(CONVOLUTIONAL, {})
    wanted += [
        Wish(2, seed, "shown", Trained(CONVOLUTIONAL, arm, rate))
        for seed in range(count)
        for arm, rate in rates.items()
    ]
    return [_cell(plan, *wish) for wish in wanted]


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    # In seconds, about: steps, and looks at the evaluation images.
    batch = BATCHES[what.arm]
    step, look = 0.5e-3 + 8e-6 * batch, 6e-6
    if what.group == CONVOLUTIONAL:
        step, look = 1e-3 + 2e-5 * batch, 2e-5
    steps = plan.epochs * (plan.images // batch)
    looks = 3 * min(plan.held, 5000 if part == "tuning" else 10000)
    return Cell("group-norm", arm, seed, round(steps * step + looks * look, 3), wave)


# -- one cell -----------------------------------------------------------------------------------


def network(count: int, group: str, seed: int) -> MLP:
    """The network of a group, for images of so many pixels, before training."""
    generator = stream(seed, "weights")
    if group == GN:
        return m2(count, "relu", _group_norm, generator)
    net = Convolutional(math.isqrt(count), generator)
    for k, layer in enumerate(net.layers):
        if isinstance(layer, BatchNorm2d):
            net.layers[k] = nn.GroupNorm(4, layer.num_features)
    return net


def _group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(10, width)


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network; its accuracy at the end, three times."""
    plan, batch = PLANS[budget], BATCHES[str(arm["arm"])]
    evaluation = "validation" if arm["part"] == "tuning" else "test"
    train_x, train_y, held_x, labels = fair_split(data, seed, evaluation, plan.images)
    held, labels = pixels(held_x[: plan.held], data.pixel_max), labels[: plan.held]
    net = network(held.shape[1], str(arm["group"]), seed)
    steps = plan.epochs * (len(train_x) // batch)
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=steps,
        order=stream(seed, "order"),
        stops=log_steps(steps, 3)[-3:],
        batch=batch,
    )
    for step, loss in training:
        row: Row = {"step": step, "accuracy": accuracy(net, held, labels)}
        row["diverged"] = not math.isfinite(loss)
        yield row


# -- what it means ------------------------------------------------------------------------------


def _shares(tuned: Tuned, part: str, group: str = GN) -> dict[str, dict[int, float]]:
    """Accuracy by batch size and seed."""
    found = {}
    for name in BATCHES:
        rate = tuned.best.get(group, {}).get(name, math.nan)
        arm: Mapping[str, Scalar] = {"part": part, "group": group, "arm": name, "rate": rate}
        found[name] = ends(tuned.rows, "accuracy", arm)
    return found


def slope(by: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """Points of accuracy per doubling of the batch, least squares over log2, by seed.

    >>> slope({"B = 2": {0: 0.90}, "B = 8": {0: 0.92}, "B = 64": {0: 0.95}})
    {0: 1.0}
    """
    x = {name: math.log2(batch) for name, batch in BATCHES.items()}
    center = math.fsum(x.values()) / len(x)
    square = math.fsum((v - center) ** 2 for v in x.values())
    shared = set.intersection(*(set(of) for of in by.values()))
    return {
        seed: round(100 * math.fsum((x[n] - center) * by[n][seed] for n in by) / square, 9)
        for seed in sorted(shared)
    }


def _asked(tuned: Tuned, part: str) -> Parts:
    """The part of the claim, from the fair or the pilot's rows."""
    delta = claims()["gn-small"].thresholds["delta"]
    values = slope(_shares(tuned, part))
    return {_SLOPE: Asked(values, "equivalence", delta, delta)}


def judge(rows: list[Row]) -> list[Verdict]:
    """One claim; what is missing makes it inconclusive."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    tuned = settle(rows, GROUPS, plan)
    dense, other = _shares(tuned, "fair"), _shares(tuned, "shown", CONVOLUTIONAL)
    beside = {
        f"{name} − B = 64 (points){where}": less(by[name], by["B = 64"], 100)
        for where, by in (("", dense), (f", {CONVOLUTIONAL}", other))
        for name in ("B = 2", "B = 8")
    }
    beside[f"{_SLOPE}, {CONVOLUTIONAL}"] = slopes = slope(other)
    setting = tuned.setting(
        "group-norm",
        f"MLP 100-100 on {plan.images:,} images",
        "each batch size at its best learning rate, equal epochs",
        "points of accuracy per doubling of the batch",
    )
    words = Words(
        "accuracy with GroupNorm does not depend on the batch: {weakest}",
        "accuracy with GroupNorm depends on the batch: {refuted}",
        "accuracy with GroupNorm changes so: {weakest}",
    )
    return [
        verdict(
            "gn-small",
            setting,
            words,
            _asked(tuned, "fair"),
            _asked(tuned, "pilot"),
            least=EQUIVALENCE_SEEDS,
            notes=[*tuned.notes(), *_note(slopes)],
            beside=beside,
        )
    ]


def _note(slopes: Mapping[int, float]) -> list[str]:
    """What the convolutional network says; it decides nothing."""
    if len(slopes) < 2:
        return []
    found = interval(slopes.values())
    return [f"Shown, {CONVOLUTIONAL} network: {_SLOPE} {span(found)}, n = {found.n}."]


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Test accuracy at the end of training, and how the rates were chosen."""
    if not rows:
        return []
    return trained_figures(
        "group-norm",
        settle(rows, GROUPS, PLANS[str(rows[0]["budget"])]),
        "Test accuracy on {where} with GroupNorm, by batch size",
        "Equal epochs, each batch size at its best learning rate.",
        "by batch size",
    )
