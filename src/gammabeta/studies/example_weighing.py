"""Does it help to mix an example's own statistics into the running ones?

Summers & Dinneen 2020, inference example weighing (iew): batch normalization (BN) trains with
statistics that an example is part of, and is evaluated with running ones that it is not. At test
they give the example's own statistics a weight a:

    mean = (1 - a) running mean + a m,   E[x^2] = (1 - a) running E[x^2] + a s

with m and s the mean and the mean square of the example's feature map, channel by channel, and
variance E[x^2] - mean^2. The network is trained as ever; a is chosen on validation images.

Network: 5x5 with stride 2 and 8 channels, 5x5 with stride 2 and 16 channels (3x3 on the digits),
BN and ReLU after both, one dense layer to 10; no bias where BN follows, bias 0.1 at the end,
weights from a truncated normal distribution with standard deviation sqrt(2 / fan-in). SGD without
momentum, mean cross-entropy, PyTorch's defaults for the layer, 5,000 training images drawn for each
seed from the first 55,000. Batches of 64, 400 steps; and, since the gain is said to be larger
there, of 8, 1,600 steps (2,000 and 8,000 at `full`).
Rates: for each batch size its own best one without weighing: highest accuracy on the last 5,000
training images, mean of seeds 800 and 801, from 0.1, 0.3, 1 (0.03, 0.1, 0.3 for batches of 8); a
best value at an edge extends the grid. At that rate the weight is chosen: highest accuracy on the
same images and seeds, mean of the last three evaluations, from 0, 0.05, 0.1, 0.2, 0.3 and 0.5; of
equal ones the smaller. Where it is 0, weighing is not used, and gains nothing.

Primary contrast: test accuracy of one network with minus without weighing, batches of 64, in
points, mean at 96, 98 and 100 % of the steps: superiority, delta = 0.1, at least 5 seeds. Seeds 900
to 903 are a pilot, used for nothing else: predicted half-width of the 95 % interval 0.05, at most
16 seeds. No positive control: the claim does not say why BN helps.
Shown: the same for batches of 8, and the change of the test loss (cross-entropy), where a gain may
show that accuracy is too coarse for.

What its authors would call fair: a convolutional network, since in a dense layer an example has one
value for a feature and no variance; the weight chosen without test images; small batches beside.
What would embarrass us: a weight chosen on the images that it is judged by, or from a grid that is
too coarse for the optimum, which they put below 0.5; the accuracy over the weight is drawn.

The source's networks and images cannot be run here: one verdict. Changed against the registry:
nothing. `tiny` tries the wiring, it decides nothing. On the bundled digits, where the second
feature map is a single pixel, each seed splits the 1,797 images anew: a demonstration.

Rows: arm fields part, group ("B = 64", "B = 8"), arm ("bn"), rate, and but for tuning "weight".
`step`, `accuracy` (without weighing), `diverged`; but for tuning `weighed` (accuracy with), `loss`
and `weighed_loss`; tuning: rows of kind "curve", validation accuracy in percent by weight.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row, Scalar
from gammabeta.layers.batch_norm import BatchNorm2d
from gammabeta.moments import Moments
from gammabeta.ops import batch_norm
from gammabeta.studies._answer import Words
from gammabeta.studies._asked import Asked, Parts, ends, less, planned, verdict
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._inference.networks import Convolutional
from gammabeta.studies._nets import MLP
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._train import fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    EQUIVALENCE_SEEDS,
    LEAST_SEEDS,
    TUNING_SEEDS,
    Trained,
    Tuned,
    Wish,
    guess,
    needed,
    own,
    place,
    settle,
    tuning_figure,
)
from gammabeta.studies._verdict import Verdict

CLAIMS = ("iew",)

MAIN, SHOWN = "B = 64", "B = 8"
BATCHES = {MAIN: 64, SHOWN: 8}
GROUPS = dict.fromkeys(BATCHES, ("bn",))
WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
_PART = 1000  # images in one forward pass
_GAIN = "with − without weighing"


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: Mapping[str, int]  # by group
    seeds: int
    shown: int  # seeds of the small batches
    rates: Mapping[str, tuple[float, ...]]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = {MAIN: (0.1, 0.3, 1.0), SHOWN: (0.03, 0.1, 0.3)}
ONE = dict.fromkeys(BATCHES, (0.1,))
PLANS = {
    "tiny": Plan({MAIN: 6, SHOWN: 6}, 1, 1, ONE, 256, False),
    "small": Plan({MAIN: 400, SHOWN: 1600}, LEAST_SEEDS, EQUIVALENCE_SEEDS, RATES, 10000, True),
    "full": Plan({MAIN: 2000, SHOWN: 8000}, LEAST_SEEDS, EQUIVALENCE_SEEDS, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until the grids are settled; then the main runs; pilot; more seeds; small batches."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    asked = planned(_asked(tuned, "pilot"), LEAST_SEEDS)
    return _wanted(tuned, _weights(tuned), plan, seeds, asked)


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for twice the least seeds."""
    plan, weights = PLANS[budget], dict.fromkeys(GROUPS, 0.1)
    return _wanted(guess(GROUPS, plan), weights, plan, seeds, 2 * LEAST_SEEDS)


def _wanted(
    tuned: Tuned, weights: Mapping[str, float], plan: Plan, seeds: int | None, asked: int | None
) -> list[Cell]:
    def main(best: Mapping[str, Mapping[str, float]]) -> list[Trained]:
        return [Trained(MAIN, "bn", best[MAIN]["bn"])]

    wanted = needed(tuned, plan.seeds, seeds, [asked], main)
    count = plan.shown if seeds is None else min(seeds, plan.shown)
    wanted += [
        Wish(2, seed, "shown", Trained(SHOWN, "bn", tuned.best[SHOWN]["bn"]))
        for seed in range(count if SHOWN in tuned.best else 0)
    ]
    return [_cell(plan, weights.get(wish.what.group, 0.0), *wish) for wish in wanted]


def _cell(plan: Plan, weight: float, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: dict[str, Scalar] = {"part": part, **what._asdict()}
    # In seconds, about: steps, and looks at the evaluation images.
    steps, step = plan.steps[what.group], 0.8e-3 + 3e-5 * BATCHES[what.group]
    looks = 3 * (len(WEIGHTS) if part == "tuning" else 2)
    images = min(plan.images, 5000 if part == "tuning" else 10000)
    if part != "tuning":
        arm["weight"] = weight
    return Cell("example-weighing", arm, seed, round(steps * step + looks * images * 2e-5, 3), wave)


# -- one cell -----------------------------------------------------------------------------------


def weighed(net: MLP, x: Tensor, weight: float) -> Tensor:
    """Logits with each example's own statistics mixed into the running ones.

    The variance that follows from the mixed mean and mean square, with the example's mean m and
    variance v, is (1 - a) running variance + a v + a (1 - a) (running mean - m)^2. The network
    stays as it is, whatever its mode.
    """
    found = []
    with torch.no_grad():
        for h in torch.split(x, _PART):
            for layer in net.layers:
                h = _mixed(layer, h, weight) if isinstance(layer, BatchNorm2d) else layer(h)
            found.append(h)
    return torch.cat(found)


def _mixed(layer: BatchNorm2d, x: Tensor, weight: float) -> Tensor:
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        raise ValueError("running statistics were expected, got none. Build the layer anew.")
    wide, before, spread = x.double(), mean.double(), var.double()
    own_mean, own_var = wide.mean((2, 3)), wide.var((2, 3), unbiased=False)
    mixed = torch.lerp(before.expand_as(own_mean), own_mean, weight)
    apart = weight * (1 - weight) * (before - own_mean).square()
    variance = torch.lerp(spread.expand_as(own_var), own_var, weight) + apart
    # Every channel of every example is a channel of its own.
    y, _ = batch_norm(
        x.flatten(0, 1)[None],
        layer.weight.repeat(len(x)),
        layer.bias.repeat(len(x)),
        moments=Moments.given(mixed.flatten(), variance.flatten()),
        eps=layer.eps,
    )
    return y.view_as(x)


def _scored(net: MLP, x: Tensor, labels: Tensor, weight: float) -> tuple[float, float]:
    """Share of right labels, and cross-entropy."""
    logits = weighed(net, x, weight)
    right = float((logits.argmax(1) == labels).double().mean())
    return right, float(cross_entropy(logits.double(), labels))


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network; accuracy with and without weighing at the end, three times."""
    plan, group = PLANS[budget], str(arm["group"])
    tuning, steps = arm["part"] == "tuning", plan.steps[group]
    split = fair_split(data, seed, "validation" if tuning else "test")
    train_x, train_y, held_x, held_y = split
    held, labels = pixels(held_x[: plan.images], data.pixel_max), held_y[: plan.images]
    net = Convolutional(math.isqrt(held.shape[1]), stream(seed, "weights"))
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=steps,
        order=stream(seed, "order"),
        stops=log_steps(steps, 3)[-3:],
        batch=BATCHES[group],
    )
    shares: dict[float, list[float]] = defaultdict(list)
    for step, loss in training:
        right, without = _scored(net, held, labels, 0.0)
        row: Row = {"step": step, "accuracy": right, "diverged": not math.isfinite(loss)}
        if tuning:
            for weight in WEIGHTS:
                share = right if weight == 0 else _scored(net, held, labels, weight)[0]
                shares[weight].append(100 * share)
        else:
            row["weighed"], with_own = _scored(net, held, labels, float(arm["weight"] or 0.0))
            if math.isfinite(without) and math.isfinite(with_own):
                row["loss"], row["weighed_loss"] = without, with_own
        yield row
    for weight, each in shares.items():
        head = {"kind": "curve", "curve": "weight", "series": group}
        yield {**head, "x": weight, "y": statistics.fmean(each)}


# -- what it means ------------------------------------------------------------------------------


def _curves(tuned: Tuned) -> list[Row]:
    """Validation accuracy by weight, at the chosen rates."""
    return [
        row
        for row in tuned.rows
        if row.get("kind") == "curve"
        and row["seed"] in TUNING_SEEDS
        and row["rate"] == tuned.best.get(str(row["group"]), {}).get("bn")
    ]


def _weights(tuned: Tuned) -> dict[str, float]:
    """The weight of each group whose rate is chosen: the best on validation, of equals the least.

    Means are rounded to 1e-9 points, far below one image: sums of shares that are equal round
    differently.
    """
    by: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in _curves(tuned):
        by[str(row["group"])][float(row["x"] or 0.0)].append(float(row["y"] or 0.0))
    return {
        group: min(shares, key=lambda weight: (-round(statistics.fmean(shares[weight]), 9), weight))
        for group, shares in by.items()
    }


def _arm(tuned: Tuned, group: str, part: str) -> dict[str, Scalar]:
    rate = tuned.best.get(group, {}).get("bn", math.nan)
    weight = _weights(tuned).get(group, math.nan)
    return {"part": part, "group": group, "rate": rate, "weight": weight}


def _gain(tuned: Tuned, group: str, part: str) -> dict[int, float]:
    """Test accuracy with minus without weighing, in points, by seed."""
    arm = _arm(tuned, group, part)
    return less(ends(tuned.rows, "weighed", arm), ends(tuned.rows, "accuracy", arm), 100)


def _asked(tuned: Tuned, part: str) -> Parts:
    """The part of the claim, from the fair or the pilot's rows."""
    delta = claims()["iew"].thresholds["delta"]
    return {_GAIN: Asked(_gain(tuned, MAIN, part), "superiority", delta, delta)}


def judge(rows: list[Row]) -> list[Verdict]:
    """One claim; what is missing makes it inconclusive."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    beside = {f"{_GAIN}, {SHOWN}": _gain(tuned, SHOWN, "shown")}
    for group, part in ((MAIN, "fair"), (SHOWN, "shown")):
        arm = _arm(tuned, group, part)
        change = less(ends(rows, "weighed_loss", arm), ends(rows, "loss", arm))
        beside[f"test loss, {_GAIN}, {group}"] = change
    notes = [f"Weight chosen ({group}): {a:g}." for group, a in _weights(tuned).items()]
    return [
        verdict(
            "iew",
            tuned.setting("example-weighing", "two convolutions", "weight chosen on validation"),
            WORDS,
            _asked(tuned, "fair"),
            _asked(tuned, "pilot"),
            least=LEAST_SEEDS,
            notes=[*tuned.notes(), *notes],
            beside=beside,
        )
    ]


WORDS = Words(
    "the example's own statistics, mixed into the running ones, gain accuracy: {weakest}",
    "the example's own statistics, mixed into the running ones, do not gain {delta} points: "
    "{refuted}",
    "the example's own statistics, mixed into the running ones, change accuracy so: {weakest}",
)


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Validation accuracy over the weight, and how the rates were chosen."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    axes = Axes(
        f"Validation accuracy on {place(rows)} over the weight of an example's own statistics",
        "weight",
        "accuracy (%)",
        caption="How the weight was chosen, by the size of the training batches.",
    )
    drawn = drawings("example-weighing", {"weight": axes}, _curves(tuned))
    return [*drawn, *tuning_figure("example-weighing", tuned, "by batch size")]
