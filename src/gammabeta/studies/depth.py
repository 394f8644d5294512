"""Are deep networks hard to train, and does batch normalization make them trainable?

Five claims about dense networks, pixels-[100]*L-10, of several depths L. Pixels are standardized
(their mean subtracted, divided by their standard deviation, one number each for the training
images). Batch normalization (BN) before each activation, no bias where it follows, bias 0.1
elsewhere; weights from a truncated normal distribution with standard deviation sqrt(2 / fan-in)
("He") where nothing else is said. SGD without momentum, batches of 64, mean cross-entropy, 5,000
training images drawn for each seed from the first 55,000, PyTorch's defaults for the layer,
evaluation by running statistics unless said. Arms share start and batches where their shapes agree.

Fair (the only verdict: one source is a lecture, one an article without runs, the others trained
other networks on other images)
    Each arm of each network trains at its own best learning rate: highest accuracy on the first
    2,000 of the last 5,000 training images, mean of seeds 800 and 801, from three to five rates
    around 0.1; a best value at an edge extends the grid for all arms of that network, unless it is
    below 20 %, where no rate is better than chance. Test accuracy (first 5,000 images; all at
    `full`) is the mean of three evaluations, at 96, 98 and 100 % of the steps. Seeds 900 to 903 are
    a pilot: they give the number of seeds of each claim (5 to 16; predicted half-width of the 95 %
    interval delta / 2), and are used for nothing else; networks that serve two claims take the
    larger number.

deep-hard (Kainz's lecture after D2L: very deep networks have a hard time converging)
    ReLU without BN. Primary contrast: test accuracy with 2 minus with 20 hidden layers, in points;
    superiority, delta = 5. Two levels, declared beforehand: weights He, weights N(0, 0.1^2). What
    its author would call fair: each depth at its own rate, the same number of steps. What would
    embarrass us: a verdict on one initialization, which is what decides; hence the levels.
input-norm-shallow-only (Kathuria: normalizing the inputs is enough only if the network is not deep)
    ReLU, He. Level "accuracy", the primary contrast: (BN - none with 20 layers) minus (BN - none
    with 2), superiority, delta = 2 points. It counts as supported only where BN - none with 20
    layers is (positive control): else inputs alone are enough there. Level "fluctuations": 20
    layers without BN before training, 256 images, float64; all weight matrices change by Gaussian
    noise of 1 % of their norm; slope over the layers of log10 of the relative change of what the
    activations receive (root mean square of 4 changes), superiority, delta = 0.02 decade per layer.
    Shown: the same with BN, and with noise in the first layer alone, since independent noise in
    each layer adds up (as the root of the layer's number, about 0.03 decade per layer) even where
    nothing is amplified. What would embarrass us: to call that amplification; hence the second.
selu (Kathuria after Klambauer et al. 2017: SELU does implicitly what BN does explicitly)
    Level "scale", the primary contrast: before training, 32 layers of 256 units, 1,024 samples of
    Gaussian input with mean 0.3 and variance 2, weights N(0, 1/fan-in): variance over the samples
    of a unit's activation in the last layer, mean over the units, within [0.8, 1.5]. Shown: the
    mean; standardized images as input; ReLU (He), tanh (1/fan-in), and what BN gives. Level
    "training": 8 layers, SELU (same weights, biases 0) minus ReLU with BN, test accuracy at best
    rates: lies above -1 point. Positive control: ReLU with BN minus ReLU without, superiority,
    delta = 0.3. Shown: SELU minus ReLU. What its author would call fair: the initialization that
    SELU needs, standardized inputs, no dropout. What would embarrass us: a variance of units and
    samples together, which stays 1 where all samples become one; hence that over the samples.
sigmoid-deep (Ioffe & Szegedy 2015, Section 4.2.2: Inception with sigmoid learns only with BN)
    8 sigmoid layers. Primary contrast: test accuracy with minus without BN lies above 20 points.
    What would be unfair to the network without BN: a small rate or too few steps; its rates go up
    to 3, and it has twice the steps of the others. What would embarrass us: a network without BN
    that trains at a rate that was not tried; hence the whole curve over the rates.
mf-depth-limit (Yang et al. 2019, Fig. 2: networks with BN and without skip connections cannot be
trained beyond about 50 layers on MNIST)
    ReLU with BN, He; rates 0.01, 0.1, 1: a decade around what is good with 10 layers. A run fails
    if its accuracy, by the statistics of 2,000 test images as one batch (since the claim is about
    training, not about running statistics), is below 20 %, twice chance, at the end (mean as
    above). Primary contrast: the share of failures with 60 layers lies above 0.5, at each of the
    three rates; one that lies below refutes (at 1 - 0.05/3). It counts as supported only where
    networks of 10 layers train at the same rates (share below 0.5). 5 seeds, a fixed number: the
    fewest with which a share can be told from one half (all of 5: 1/32); a pilot has nothing to
    add. Shown: 20 and 40 layers at 0.1, one seed; failures by running statistics. What would
    embarrass us: 60 layers that fail since the training is short; hence a threshold near chance.

The two parts before training take 16 and 8 draws, numbers that are fixed since nothing is trained.

Budgets: `small` trains 400 steps, 800 for sigmoid-deep, 300 for mf-depth-limit; `full` 1,000, 1,500
and 1,000. `tiny` tries the wiring with one rate; it decides nothing. On the bundled digits each
seed splits the 1,797 images anew: a demonstration. Changed against the registry: these numbers of
steps; ReLU alone for deep-hard (sigmoid is asked by sigmoid-deep); depths 2 and 20 only, of those
that the rules do not name; the registry has no rule for the training level of selu.

Rows: arm fields part, group (the network), arm, rate; `step`, `accuracy`, `loss`, `diverged`, and
`accuracy_batch` in part "limit"; parts "noise" and "moments": draws, see `_draws`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._data import Images
from gammabeta.studies._depth import rules, starts
from gammabeta.studies._depth.contrasts import DECIDING, DEPTHS, GROUPS, NETWORKS, USES, planned
from gammabeta.studies._depth.nets import Network, network
from gammabeta.studies._experiments import Cell
from gammabeta.studies._pairs import LABELS, NORMS, band
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    BAND,
    LEAST_SEEDS,
    MOST_SEEDS,
    Trained,
    Tuned,
    figure,
    guess,
    needed_in,
    own,
    place,
    settle,
    tuning_figure,
)
from gammabeta.studies._verdict import Verdict

CLAIMS = ("deep-hard", "input-norm-shallow-only", "selu", "sigmoid-deep", "mf-depth-limit")


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    sigmoid_steps: int
    limit_steps: int
    seeds: int
    draws: Mapping[str, int]  # before training, by part
    rates: Mapping[str, tuple[float, ...]]
    limits: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


_RATES = {
    "2 layers": (0.03, 0.1, 0.3),
    "8 layers": (0.03, 0.1, 0.3),
    "20 layers": (0.01, 0.03, 0.1, 0.3),
    "2 layers, N(0, 0.1)": (0.03, 0.1, 0.3),
    "20 layers, N(0, 0.1)": (0.03, 0.1, 0.3, 1.0),
    "8 sigmoid layers": (0.1, 0.3, 1.0, 3.0),
}
LIMITS = (0.01, 0.1, 1.0)
DRAWS = {"noise": MOST_SEEDS, "moments": 8}
PLANS = {
    "tiny": Plan(
        4, 4, 2, 1, dict.fromkeys(DRAWS, 2), dict.fromkeys(GROUPS, (0.1,)), (0.1,), 500, False
    ),
    "small": Plan(400, 800, 300, LEAST_SEEDS, DRAWS, _RATES, LIMITS, 5000, True),
    "full": Plan(1000, 1500, 1000, LEAST_SEEDS, DRAWS, _RATES, LIMITS, 10000, True),
}
TUNING_IMAGES = LIMIT_IMAGES = 2000
CHANCE = 20.0  # percent: no grid grows for an arm that stays below at every rate


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Each network: tuning until its grid is settled; then its main runs; pilot; more seeds."""
    plan = PLANS[budget]
    tuned = _settled(own(rows, budget, data), plan)
    return _wanted(plan, seeds, tuned, {claim: planned(claim, tuned) for claim in USES})


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for twice the least seeds."""
    plan = PLANS[budget]
    asked = dict.fromkeys(USES, 2 * LEAST_SEEDS) | {"sigmoid-deep": LEAST_SEEDS}
    return _wanted(plan, seeds, guess(GROUPS, plan, rate=0.1), asked)


def _settled(rows: Sequence[Row], plan: Plan) -> Tuned:
    return settle(rows, GROUPS, plan, floor=CHANCE)


def _wanted(
    plan: Plan, seeds: int | None, tuned: Tuned, asked: Mapping[str, int | None]
) -> list[Cell]:
    wanted = []
    for group in GROUPS:
        most = max(asked[claim] or 0 for claim, groups in USES.items() if group in groups)
        main = [Trained(group, arm, rate) for arm, rate in tuned.best.get(group, {}).items()]
        wanted += needed_in(group, tuned, plan.seeds, seeds, main or None, most)
    found = [_cell(plan, *wish) for wish in wanted]
    for part, cost in (("noise", 0.26), ("moments", 0.82)):
        arm: dict[str, Scalar] = {"part": part}
        found += [Cell("depth", arm, seed, cost, 1) for seed in range(plan.draws[part])]
    count = plan.seeds if seeds is None else seeds
    for group in DEPTHS:
        decides = group in DECIDING
        for seed in range(count if decides else min(count, 1)):
            found += [
                _cell(plan, 1, seed, "limit", Trained(group, "bn", rate))
                for rate in (plan.limits if decides else (0.1,))
            ]
    return found


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    # In seconds, about: steps, and looks at the evaluation images.
    depth = DEPTHS[what.group] if part == "limit" else NETWORKS[what.group].depth
    step = 0.5e-3 + depth * (0.21e-3 if what.arm == "bn" else 0.1e-3)
    look = (3e-6 + depth * 1e-6) * _evaluated(plan, part)
    return Cell(
        "depth", arm, seed, round(_steps(plan, part, what.group) * step + 3 * look, 3), wave
    )


def _steps(plan: Plan, part: str, group: str) -> int:
    if part == "limit":
        return plan.limit_steps
    return plan.sigmoid_steps if "sigmoid" in group else plan.steps


def _evaluated(plan: Plan, part: str) -> int:
    most = {"tuning": TUNING_IMAGES, "limit": LIMIT_IMAGES}.get(part, 10000)
    return min(plan.images, most)


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network, a row for each evaluation; or one draw of what is seen before training."""
    part, plan = str(arm["part"]), PLANS[budget]
    if part in ("noise", "moments"):
        draw = starts.noise if part == "noise" else starts.moments
        return draw(seed, data, budget == "tiny")
    return _trained(part, Trained(str(arm["group"]), str(arm["arm"]), float(arm["rate"] or 0.0)),
                    seed, plan, data)  # fmt: skip


def _trained(part: str, what: Trained, seed: int, plan: Plan, data: Images) -> Iterator[Row]:
    evaluation = "validation" if part == "tuning" else "test"
    train_x, train_y, held_x, held_y = fair_split(data, seed, evaluation)
    count = _evaluated(plan, part)
    held, labels = pixels(held_x[:count], data.pixel_max), held_y[:count]
    limit = part == "limit"
    kind = Network(DEPTHS[what.group]) if limit else NETWORKS[what.group]
    steps = _steps(plan, part, what.group)
    net = network(pixels(train_x, data.pixel_max), kind, what.arm, seed)
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=what.rate,
        steps=steps,
        order=stream(seed, "order"),
        stops=log_steps(steps, 3)[-3:],
    )
    for step, loss in training:
        row: Row = {"step": step, "accuracy": accuracy(net, held, labels)}
        row["diverged"] = not math.isfinite(loss)
        if limit:
            row["accuracy_batch"] = accuracy(net, held, labels, "batch")
        if math.isfinite(loss):
            row["loss"] = loss
        yield row


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """Five claims, fair; what is missing makes a claim inconclusive."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    seen = rules.Seen(_settled(rows, plan), plan.limits, plan.limit_steps)
    return [
        rules.deep_hard(seen),
        rules.inputs(seen),
        rules.selu(seen),
        rules.sigmoid(seen),
        rules.limit(seen),
    ]


# -- figures ------------------------------------------------------------------------------------

_FIGURES = {
    "noise": Axes(
        "Relative change of what activations receive, weights changed by 1 %, before training",
        "layer",
        "relative change",
        y_log=True,
    ),
    "moments": Axes(
        "Variance of activations by layer, from Gaussian input of variance 2, before training",
        "layer",
        "variance over the samples",
        y_log=True,
    ),
}


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Accuracy over depth; what is seen before training; how the rates were chosen."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    tuned = _settled(rows, plan)
    panels = []
    for weights, more in (("ReLU, He", ""), ("ReLU, N(0, 0.1)", ", N(0, 0.1)")):
        series = []
        for arm in NORMS:
            ends: dict[int, list[float]] = {}
            for group, net in NETWORKS.items():
                if group == f"{net.depth} layers{more}" and arm in tuned.best.get(group, {}):
                    by_seed = tuned.ended("fair", group, arm)
                    ends[net.depth] = [run.final for run in by_seed.values()]
            series += _over_depth(LABELS[arm], arm, ends)
        panels.append({"title": weights, "series": series})
    limit = []
    for rate in plan.limits:
        tried = {
            d: tuned.runs.get(("limit", g, "bn", rate), {}).values() for g, d in DEPTHS.items()
        }
        ends = {d: [run.final_batch for run in by_seed] for d, by_seed in tried.items()}
        limit += _over_depth(f"rate {rate:g}", "bn", ends)
    panels.append({"title": "ReLU with BN, by batch statistics", "series": limit})
    return [
        *figure(
            "depth",
            "accuracy",
            f"Test accuracy on {place(rows)} over the number of hidden layers",
            f"Each network at its best learning rate, but for the last panel. {BAND}",
            [panel for panel in panels if panel["series"]],
            "number of hidden layers",
        ),
        *drawings("depth", _FIGURES, rows),
        *tuning_figure("depth", tuned, "networks of several depths"),
    ]


def _over_depth(name: str, style: str, ends: Mapping[int, Sequence[float]]) -> list[dict[str, Any]]:
    """One series of a figure: final accuracy by depth."""
    depths = sorted(depth for depth, finals in ends.items() if finals)
    bands = [band(ends[depth]) for depth in depths]
    columns = {key: [each[k] for each in bands] for k, key in enumerate(("y", "lo", "hi"))}
    n = min((len(ends[depth]) for depth in depths), default=0)
    return [{"name": name, "style": style, "x": depths, "n": n, **columns}] if depths else []
