"""Is batch normalization better after the activation than before it?

The claim (bn-order) is Kathuria's, after user reports and caffenet-benchmark, where it is true of
one architecture and not of another. Ioffe & Szegedy 2015 put batch normalization (BN) before the
activation, and say why: the weighted sum is more nearly Gaussian than what an activation gives.

Networks: dense, pixels-100-100-10; convolutional, 5x5 with stride 2 and 8 channels, 5x5 with
stride 2 and 16 channels (3x3 on the digits), one dense layer to 10. Each with ReLU, sigmoid and
tanh. "Before": weights, BN, activation. "After": weights and bias, activation, BN. No bias where BN
follows the weights, bias 0.1 elsewhere; weights from a truncated normal distribution with standard
deviation sqrt(2 / fan-in). Batches of 64, SGD without momentum, mean cross-entropy, 5,000 training
images drawn for each seed from the first 55,000, PyTorch's defaults for the layer, evaluation by
running statistics. Both arms of a pair start from the same weights and see the same batches.

Fair (the only verdict: the sources' networks and images cannot be had here)
    Each arm of each of the six networks trains at its own best learning rate: highest accuracy on
    the last 5,000 training images, mean of seeds 800 and 801, from 0.1, 0.3, 1; a best value at an
    edge extends the grid for both arms, so that they have the same number of trials. Seeds 900 to
    903 are a pilot: they give the number of seeds (5 to 16; predicted half-width of the 95 %
    interval delta / 2 in every network), and are used for nothing else.

Primary contrast: test accuracy, BN after minus BN before, in points, mean of the last three
evaluations (at 96, 98 and 100 % of the steps); superiority, delta = 0.3, in each network. Two
levels, declared beforehand: ReLU, of which the source's evidence is (dense and convolutional), and
sigmoid and tanh. A level holds if it holds in all of its networks, and is refuted if it is in any
(refuted at 1 - 0.05/6: six are asked). One level supported and the other refuted is mixed.

What its author would call fair: ReLU in a convolutional network, each placement at its own rate,
and the bias that BN after needs, are there. What would embarrass us: a verdict that hangs on one
activation of which the author never spoke; hence the levels.

No positive control: the claim compares two placements and explains nothing by BN. Whether BN before
is better than none in such networks is asked by act-all.

Budgets: `small` trains 800 steps (dense) and 600 (convolutional), `full` 2,000; `tiny` a few, with
one rate: it decides nothing. Changed against the registry: fewer steps at `small`; no arm without
BN; levels. On the bundled digits each seed splits the 1,797 images anew: a demonstration.

Rows: arm fields part, group (the network), arm ("before", "after"), rate, and optionally width (a
factor on units and channels); `step`, `accuracy`, `loss`, `diverged`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from gammabeta._runs import Row, Scalar
from gammabeta.layers.batch_norm import BatchNorm1d, BatchNorm2d
from gammabeta.studies._answer import PLACES, Setting, Words
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._nets import ACTIVATIONS, MLP
from gammabeta.studies._pairs import Runs, collect, curve, curves
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    KEYS,
    LEAST_SEEDS,
    MOST_SEEDS,
    Best,
    Trained,
    chosen,
    complete,
    diverged_note,
    fair_verdict,
    minus,
    search,
    tuning_figure,
    tuning_notes,
    wishes,
)
from gammabeta.studies._verdict import Verdict, planned_n

CLAIMS = ("bn-order",)

PLACEMENTS = ("before", "after")
NAMES = {"relu": "ReLU", "sigmoid": "sigmoid", "tanh": "tanh"}
LEVELS = {"relu": "ReLU", "sigmoid": "sigmoid and tanh", "tanh": "sigmoid and tanh"}
# group -> kind of the network, activation
NETWORKS = {f"{kind} {a}": (kind, a) for kind in ("dense", "convolutional") for a in NAMES}
GROUPS = dict.fromkeys(NETWORKS, PLACEMENTS)


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: Mapping[str, int]  # by kind of the network
    evaluations: int
    seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.1, 0.3, 1.0)
PLANS = {
    "tiny": Plan({"dense": 10, "convolutional": 5}, 3, 1, (0.3,), 500, False),
    "small": Plan({"dense": 800, "convolutional": 600}, 3, LEAST_SEEDS, RATES, 10000, True),
    "full": Plan({"dense": 2000, "convolutional": 2000}, 12, LEAST_SEEDS, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until every grid is settled; then the main runs; pilot; more seeds."""
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
    """About what a whole run asks for: no grid grows, the pilot asks for twice the least seeds."""
    plan = PLANS[budget]
    wanted = wishes(
        GROUPS,
        search({}, GROUPS, plan.rates, grow=False),
        _main({group: dict.fromkeys(PLACEMENTS, plan.rates[0]) for group in GROUPS}),
        least=plan.seeds,
        seeds=seeds,
        pilot=plan.decides,
        planned=2 * LEAST_SEEDS,
    )
    return [_cell(plan, *wish) for wish in wanted]


def _main(best: Best) -> list[Trained]:
    return [Trained(group, arm, best[group][arm]) for group in GROUPS for arm in PLACEMENTS]


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    kind, activation = NETWORKS[what.group]
    steps, stops = _steps(plan, part, kind)
    # In seconds, about: steps, and looks at the evaluation images.
    dense = kind == "dense"
    step = (0.75e-3 if dense else 1.9e-3) + (0.0 if activation == "relu" else 0.05e-3)
    look = (5e-6 if dense else 2.2e-5) * min(plan.images, 5000 if part == "tuning" else 10000)
    return Cell("order", arm, seed, round(steps * step + len(stops) * look, 3), wave)


def _steps(plan: Plan, part: str, kind: str) -> tuple[int, list[int]]:
    """Steps of a part, and those after which it evaluates."""
    steps = plan.steps[kind]
    stops = log_steps(steps, plan.evaluations)
    return steps, stops if part == "fair" else stops[-3:]


def _differences(runs: Runs, part: str, best: Best) -> dict[str, dict[int, float]]:
    """After minus before, by network and seed; empty where an arm is missing."""
    return {
        group: minus(
            runs,
            part,
            Trained(group, "after", best[group]["after"]),
            Trained(group, "before", best[group]["before"]),
        )
        if group in best
        else {}
        for group in GROUPS
    }


def _planned(runs: Runs, best: Best) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = _differences(runs, "pilot", best)
    if not complete(pilot):
        return None
    delta = claims()["bn-order"].thresholds["delta"]
    return max(planned_n(v.values(), delta, LEAST_SEEDS, MOST_SEEDS) for v in pilot.values())


# -- one cell -----------------------------------------------------------------------------------


class Convolutional(MLP):
    """Two convolutions with stride 2 and a dense layer; takes rows of pixels, as ``MLP`` does.

    Args:
        side: height and width of the images.
        after: whether BN stands after the activation.
        width: a factor on the channels.
    """

    def __init__(
        self, side: int, activation: str, after: bool, generator: torch.Generator, width: float
    ) -> None:
        nn.Module.__init__(self)
        kernel = 5 if side >= 13 else 3
        channels = (1, round(8 * width), round(16 * width))
        layers: list[nn.Module] = [nn.Unflatten(1, (1, side, side))]
        # PyTorch's own initialization would draw from the global random state.
        with torch.random.fork_rng(devices=()):
            for fan, out in itertools.pairwise(channels):
                layers.append(nn.Conv2d(fan, out, kernel, stride=2, bias=after))
                norm: nn.Module = BatchNorm2d(out)
                act = ACTIVATIONS[activation]()
                layers += [act, norm] if after else [norm, act]
                side = (side - kernel) // 2 + 1
            last = nn.Linear(channels[-1] * side**2, 10)
        self.layers = nn.Sequential(*layers, nn.Flatten(), last)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                std = math.sqrt(2 / layer.weight[0].numel())
                nn.init.trunc_normal_(
                    layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator
                )
                if layer.bias is not None:
                    nn.init.constant_(layer.bias, 0.1)


def placed(pixels: int, group: str, placement: str, seed: int, width: float = 1.0) -> MLP:
    """The network of a group with BN before or after each activation."""
    kind, activation = NETWORKS[group]
    generator, after = stream(seed, "weights"), placement == "after"
    if kind == "convolutional":
        return Convolutional(math.isqrt(pixels), activation, after, generator, width)
    units = round(100 * width)
    net = MLP((pixels, units, units, 10), activation, not after, generator)
    if after:
        act = type(ACTIVATIONS[activation]())
        behind = [k for k, layer in enumerate(net.layers) if isinstance(layer, act)]
        for k in reversed(behind):  # what is put in moves what follows
            net.layers.insert(k + 1, BatchNorm1d(units))
    return net


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network: a row for each evaluation."""
    part, group, plan = str(arm["part"]), str(arm["group"]), PLANS[budget]
    steps, stops = _steps(plan, part, NETWORKS[group][0])
    evaluation = "validation" if part == "tuning" else "test"
    train_x, train_y, held_x, held_y = fair_split(data, seed, evaluation)
    held, labels = pixels(held_x[: plan.images], data.pixel_max), held_y[: plan.images]
    width = float(arm.get("width") or 1.0)
    net = placed(held.shape[1], group, str(arm["arm"]), seed, width)
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=steps,
        order=stream(seed, "order"),
        stops=stops,
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
    delta = claims()["bn-order"].thresholds["delta"]
    parts = {
        group: Part(list(v.values()), "superiority", delta, level=LEVELS[NETWORKS[group][1]])
        for group, v in _differences(runs, "fair", best).items()
    }
    found = joint(parts, LEAST_SEEDS)
    # The effect of a claim of several networks is that of the weakest one.
    means = {name: c.interval.mean for name, c in found.cells.items() if c.interval}
    if means:
        weakest = min(means, key=lambda name: means[name])
        found = dataclasses.replace(found, weakest=weakest, interval=found.cells[weakest].interval)
    setting = Setting(
        "order",
        budget,
        data,
        "MLP 100-100 and two convolutions",
        "each network at its best learning rate",
        "points of accuracy",
        plan.decides,
    )
    words = Words(
        "batch normalization after the activation gains accuracy over before it in every network, "
        "least in {weakest}",
        "batch normalization after the activation does not gain {delta} points over before it: "
        "{refuted}",
        "after − before is smallest in {weakest}",
        "batch normalization after the activation gains {delta} points over before it with some "
        "activations alone; it does not: {refuted}",
    )
    notes = tuning_notes(tunings, budget, decides=plan.decides) + diverged_note(runs)
    pilot = {g: list(v.values()) for g, v in _differences(runs, "pilot", best).items()}
    planned = _planned(runs, best)
    return [
        fair_verdict("bn-order", setting, words, found, pilot=pilot, planned=planned, notes=notes)
    ]


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Test accuracy of both placements at the end of training, and how the rates were chosen."""
    if not rows:
        return []
    plan, runs = PLANS[str(rows[0]["budget"])], collect(rows, KEYS)
    where = PLACES.get(str(rows[0]["data"]), str(rows[0]["data"]))
    best = chosen(search(runs, GROUPS, plan.rates, grow=plan.decides))
    panels = [panel for group in best if (panel := _panel(runs, group, best))["series"]]
    drawn = curves(
        "order",
        "fair",
        f"Test accuracy on {where} with batch normalization before and after the activation",
        "Each network at its best learning rate. Mean over seeds; the band is its 95 % interval.",
        "training step",
        panels,
    )
    tuned = tuning_figure("order", "tuning", rows, runs, GROUPS, "before and after the activation")
    return [*([drawn] if panels else []), *tuned]


def _panel(runs: Runs, group: str, best: Best) -> dict[str, Any]:
    series = []
    for placement, style in zip(PLACEMENTS, ("none", "bn"), strict=True):
        ended = runs.get(("fair", *Trained(group, placement, best[group][placement])), {})
        if ended:
            series.append({**curve(ended, style), "name": f"{placement} the activation"})
    return {"title": group, "series": series}
