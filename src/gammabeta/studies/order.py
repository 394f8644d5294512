"""Is batch normalization better after the activation than before it?

The claim (bn-order) is Kathuria's, after user reports and caffenet-benchmark, where it is true of
one architecture and not of another. Ioffe & Szegedy 2015 put batch normalization (BN) before the
activation, and say why: the weighted sum is more nearly Gaussian than what an activation gives.
Kathuria's reason for the other order (post-controls-input): only BN after the activation fixes the
statistics of what the next layer receives.

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

Inputs of the next layer (part "inputs", for post-controls-input)
    Dense networks, both placements, all activations, rate 0.3 on the same images and batches; at
    the start and after 300 steps (1,000 at `full`) the first 2,000 training images pass as one
    batch in training mode and float64. Mean and standard deviation of each hidden unit's value, as
    the next layer receives it, are compared with those that gamma and beta promise: BN after, beta
    and |gamma| sqrt(var / (var + eps)); BN before, those of the activation of a Gaussian with mean
    beta and standard deviation |gamma| (0.3989 and 0.5838 for ReLU at the start, 0.5 and 0.2083 for
    sigmoid, 0 and 0.6279 for tanh). Deviation: root mean square over units and both moments, over
    the root mean square of the promised standard deviations (BN after: of gamma).
    Primary contrast: BN after, the deviation is below 1e-9; BN before, it lies above 0.05: its
    statistics are not fixed but by what arrives. Every activation and both moments of training have
    to hold. 5 seeds, a number that is fixed since nothing is tuned. What would be unfair to the
    claim: to count as fixed what varies little; 5 % is what other numbers of this registry get.

Budgets: `small` trains 800 steps (dense) and 600 (convolutional), `full` 2,000; `tiny` a few, with
one rate: it decides nothing. Changed against the registry: fewer steps at `small`; no arm without
BN; levels. On the bundled digits each seed splits the 1,797 images anew: a demonstration.

Rows: arm fields part, group (the network), arm ("before", "after"), rate, and optionally width (a
factor on units and channels); `step`, `accuracy`, `loss`, `diverged`; part "inputs": `step`,
`deviation`, `mean`, `spread` (means over the units).
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gammabeta._runs import Row, Scalar
from gammabeta.layers.batch_norm import BatchNorm1d, BatchNorm2d
from gammabeta.studies._answer import Setting, Words, answer
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._nets import ACTIVATIONS, MLP
from gammabeta.studies._outcomes import asked_for, by_weakest
from gammabeta.studies._pairs import curve
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    BAND,
    LEAST_SEEDS,
    MOST_SEEDS,
    Trained,
    Tuned,
    complete,
    fair_verdict,
    figure,
    guess,
    needed,
    own,
    place,
    settle,
    tuning_figure,
)
from gammabeta.studies._verdict import Verdict

CLAIMS = ("bn-order", "post-controls-input")

PLACEMENTS = ("before", "after")
NAMES = {"relu": "ReLU", "sigmoid": "sigmoid", "tanh": "tanh"}
LEVELS = {"relu": "ReLU", "sigmoid": "sigmoid and tanh", "tanh": "sigmoid and tanh"}
# group -> kind of the network, activation
NETWORKS = {f"{kind} {a}": (kind, a) for kind in ("dense", "convolutional") for a in NAMES}
GROUPS = dict.fromkeys(NETWORKS, PLACEMENTS)
INPUT_RATE = 0.3
INPUT_IMAGES = 2000


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: Mapping[str, int]  # by kind of the network
    input_steps: int
    evaluations: int
    seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.1, 0.3, 1.0)
PLANS = {
    "tiny": Plan({"dense": 10, "convolutional": 5}, 10, 3, 1, (0.3,), 500, False),
    "small": Plan({"dense": 800, "convolutional": 600}, 300, 3, LEAST_SEEDS, RATES, 10000, True),
    "full": Plan({"dense": 2000, "convolutional": 2000}, 1000, 12, LEAST_SEEDS, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until every grid is settled; then the main runs; pilot; more seeds."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    return _wanted(tuned, plan, seeds, _planned(tuned))


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for twice the least seeds."""
    plan = PLANS[budget]
    return _wanted(guess(GROUPS, plan), plan, seeds, 2 * LEAST_SEEDS)


def _wanted(tuned: Tuned, plan: Plan, seeds: int | None, planned: int | None) -> list[Cell]:
    wanted = needed(tuned, plan.seeds, seeds, [planned])
    return [_cell(plan, *wish) for wish in wanted] + _inputs(plan, seeds)


def _inputs(plan: Plan, seeds: int | None) -> list[Cell]:
    """What the next layer receives: dense networks, both placements."""
    count = plan.seeds if seeds is None else seeds
    return [
        _cell(plan, 1, seed, "inputs", Trained(group, arm, INPUT_RATE))
        for seed in range(count)
        for group, (kind, _) in NETWORKS.items()
        if kind == "dense"
        for arm in PLACEMENTS
    ]


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    kind, activation = NETWORKS[what.group]
    if part == "inputs":
        return Cell("order", arm, seed, round(plan.input_steps * 0.8e-3 + 0.1, 3), wave)
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


def _differences(tuned: Tuned, part: str) -> dict[str, dict[int, float]]:
    """After minus before, by network and seed; empty where an arm is missing."""
    return {group: tuned.minus(part, group, "after", "before") for group in GROUPS}


def _planned(tuned: Tuned) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot, delta = _differences(tuned, "pilot"), claims()["bn-order"].thresholds["delta"]
    if not complete(pilot):
        return None
    return asked_for(pilot, dict.fromkeys(pilot, delta), LEAST_SEEDS, MOST_SEEDS)


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
    """Train one network: a row for each evaluation, or for each look at its layers' inputs."""
    part, group, plan = str(arm["part"]), str(arm["group"]), PLANS[budget]
    if part == "inputs":
        yield from _measure_inputs(arm, seed, plan, data)
        return
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


def _measure_inputs(
    arm: Mapping[str, Scalar], seed: int, plan: Plan, data: Images
) -> Iterator[Row]:
    train_x, train_y, _, _ = fair_split(data, seed, "test")
    x = pixels(train_x, data.pixel_max)
    group, placement = str(arm["group"]), str(arm["arm"])
    net = placed(x.shape[1], group, placement, seed, float(arm.get("width") or 1.0))
    yield {"step": 0, **received(net, group, placement, x[:INPUT_IMAGES])}
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=plan.input_steps,
        order=stream(seed, "order"),
        stops=[plan.input_steps],
    )
    for step, _ in training:
        yield {"step": step, **received(net, group, placement, x[:INPUT_IMAGES])}


def received(net: MLP, group: str, placement: str, x: Tensor) -> dict[str, float]:
    """How far moments of what the next layers receive lie from those that gamma and beta promise.

    x is one batch; the network stays as it is.
    """
    activation = ACTIVATIONS[NETWORKS[group][1]]()
    off, units, means, spreads = [], [], [], []
    h = x.double()
    net = copy.deepcopy(net).double().train()
    with torch.no_grad():
        for layer in net.layers:
            arrived, h = h, layer(h)
            if isinstance(layer, BatchNorm1d):
                gamma, beta = layer.weight.abs(), layer.bias
                var = arrived.var(0, unbiased=False)
                promised = beta.detach(), gamma * (var / (var + layer.eps)).sqrt()
                unit = gamma
            if type(layer) is type(activation) and placement == "before":
                promised = gaussian(activation, beta, gamma)
                unit = promised[1]
            if isinstance(layer, BatchNorm1d if placement == "after" else type(activation)):
                mean, spread = h.mean(0), h.std(0, unbiased=False)
                off += [mean - promised[0], spread - promised[1]]
                units.append(unit)
                means.append(mean)
                spreads.append(spread)
    found = {"mean": torch.cat(means).mean(), "spread": torch.cat(spreads).mean()}
    squares = (torch.cat(off).square().mean(), torch.cat(units).square().mean())
    found["deviation"] = (squares[0] / squares[1]).sqrt()
    return {name: float(value) for name, value in found.items()}


def gaussian(activation: nn.Module, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the activation of Gaussian values, by the trapezoidal rule.

    >>> zero, one = torch.zeros(1).double(), torch.ones(1).double()
    >>> [round(v.item(), 4) for v in gaussian(nn.ReLU(), zero, one)]
    [0.3989, 0.5838]
    """
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weights = torch.exp(-z.square() / 2)
    weights /= weights.sum()
    values = activation(z[:, None] * spread + mean)
    first = weights @ values
    return first, (weights @ (values - first).square()).sqrt()


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """One claim, fair; what is missing makes it inconclusive."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    delta = claims()["bn-order"].thresholds["delta"]
    parts = {
        group: Part(list(v.values()), "superiority", delta, level=LEVELS[NETWORKS[group][1]])
        for group, v in _differences(tuned, "fair").items()
    }
    setting = tuned.setting("order", "MLP 100-100 and two convolutions")
    words = Words(
        "batch normalization after the activation gains accuracy over before it in every network, "
        "least in {weakest}",
        "batch normalization after the activation does not gain {delta} points over before it: "
        "{refuted}",
        "after − before is smallest in {weakest}",
        "batch normalization after the activation gains {delta} points over before it with some "
        "activations alone; it does not: {refuted}",
    )
    found = fair_verdict(
        "bn-order",
        setting,
        words,
        by_weakest(joint(parts, LEAST_SEEDS)),
        pilot=_differences(tuned, "pilot"),
        planned=_planned(tuned),
        notes=tuned.notes(),
    )
    return [found, _inputs_verdict(rows, setting)]


def _inputs_verdict(rows: Sequence[Row], setting: Setting) -> Verdict:
    limits = claims()["post-controls-input"].thresholds
    by: dict[str, dict[int, float]] = {}
    moments: dict[str, list[Row]] = {}
    for row in rows:
        deviation, seed = row.get("deviation"), row["seed"]
        if row.get("part") == "inputs" and isinstance(deviation, float) and isinstance(seed, int):
            name = NAMES[NETWORKS[str(row["group"])][1]]
            when = "start" if row["step"] == 0 else "trained"
            by.setdefault(f"{row['arm']}, {name}, {when}", {})[seed] = deviation
            if (row["arm"], when) == ("before", "start"):
                moments.setdefault(name, []).append(row)
    parts = {
        f"{arm}, {name}, {when}": Part(
            [v if arm == "before" else -v for v in by.get(f"{arm}, {name}, {when}", {}).values()],
            "above",
            limits["varies"] if arm == "before" else -limits["exact"],
        )
        for arm in ("before", "after")
        for name in NAMES.values()
        for when in ("start", "trained")
    }
    found = joint(parts, LEAST_SEEDS)
    # The effect is that of the placement and activation nearest to its limit.
    measured = {n: c.interval.mean for n, c in found.cells.items() if c.interval and "before" in n}
    if measured:
        weakest = min(measured, key=lambda name: measured[name])
        found = dataclasses.replace(found, weakest=weakest, interval=found.cells[weakest].interval)
    notes = ["BN after: the numbers are minus the deviation.", "Seeds: a fixed number, no pilot."]
    for name, seen in moments.items():
        mean, spread = (
            sum(v for r in seen if isinstance(v := r[key], float)) / len(seen)
            for key in ("mean", "spread")
        )
        notes.append(f"BN before, {name}, start: mean {mean:.4f}, spread {spread:.4f} (of units).")
    verdict = answer(
        "post-controls-input",
        setting._replace(
            network="MLP 100-100",
            condition="one learning rate",
            unit="promised standard deviations",
        ),
        Words(
            "mean and standard deviation of what the next layer receives are those that gamma and "
            "beta promise with batch normalization after the activation, not before it; the "
            "smallest deviation before it is {weakest}",
            "mean and standard deviation of what the next layer receives are nearly fixed before "
            "the activation as well, or not fixed after it: {refuted}",
            "the smallest deviation is {weakest}",
        ),
        found,
        {},
        delta=limits["varies"],
        pilot={},
        planned=None,
        notes=notes,
    )
    return dataclasses.replace(verdict, published_status=None)


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Test accuracy of both placements at the end of training, and how the rates were chosen."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    panels = [panel for group in tuned.best if (panel := _panel(tuned, group))["series"]]
    title = (
        f"Test accuracy on {place(rows)} with batch normalization before and after the activation"
    )
    return [
        *figure("order", "fair", title, f"Each network at its best learning rate. {BAND}", panels),
        *tuning_figure("order", tuned, "before and after the activation"),
    ]


def _panel(tuned: Tuned, group: str) -> dict[str, Any]:
    series = []
    for placement, style in zip(PLACEMENTS, ("none", "bn"), strict=True):
        if ended := tuned.ended("fair", group, placement):
            series.append({**curve(ended, style), "name": f"{placement} the activation"})
    return {"title": group, "series": series}
