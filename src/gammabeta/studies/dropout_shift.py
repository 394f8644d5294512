"""Does dropout before batch normalization shift the variance between training and testing?

Li et al. 2018 (dropout-before-bn): dropout changes the variance of a unit in training, not in
testing; batch normalization (BN) behind it divides by a running variance that holds in training
alone, and the network computes something else when tested. They measure the ratio of the real to
the moving variance in large networks. Of dropout directly before BN the ratio follows: with
inverted dropout (a value x is 0 with probability p, else x / (1 - p)) the variance in training is
E[x^2] / (1 - p) - E[x]^2, in testing E[x^2] - E[x]^2.

Network: pixels-100-100-10, ReLU, BN before each activation, weights from a truncated normal
distribution with standard deviation sqrt(2 / fan-in). Batches of 64, 300 steps of SGD without
momentum (2,000 at `full`) at the rate 0.1, mean cross-entropy, 5,000 training images drawn for each
seed from the first 55,000, PyTorch's defaults for the layer. One rate: what is compared is a ratio
within a network with the formula for that network, and no arm has to win.
    "before first", "before second"   dropout of p directly before that BN: weights, dropout, BN,
                                      activation; p = 0.2 and 0.5
    "before both", "after both"       dropout of 0.5 before each BN, or behind each activation
    "none"                            no dropout

At the end the test images pass in eval mode. For each unit that BN sees, in each layer: real
variance of what arrives there, over the running variance; and the formula with the moments of the
same images. Measured: geometric mean over the units of the layer of (ratio over formula).
Primary contrast: that number at the BN behind the dropout is 1 up to 5 %, in "before first" and
    "before second" with both p: these are the direct cases, of which the formula is. All four have
    to hold (refuted by any at 1 - 0.05/4).
Control: the formula has to differ from 1, or there is no shift to find: natural logarithm of the
    measured ratio below -0.1 in each of the four (at p = 0.2 a zero mean gives -0.22).
Shown: the measured ratio itself in all arms, also at the second BN of "before both", which sees the
    noise of the first one's dropout as well, and of "after both"; test accuracy, before both minus
    none, after both minus none, before both minus after both, in points, at this one rate.
Seeds 900 to 903 are a pilot: they give the number of seeds (5 to 16; predicted half-width of the
    95 % interval half of the tolerance), and are used for nothing else.

What its author would call fair: the case of which the formula is, in a trained network, with the
running statistics as training leaves them, of a momentum of 0.1 and of weights that still move.
What would embarrass us: a formula that holds only since nothing has been trained, or a mean over
units that hides opposite errors; the standard deviation of the logarithm over units is shown.

Changed against the registry: one rate; the formula's case in each layer apart from the case that is
met in practice. The source trained large networks on CIFAR, not tried here: one verdict. `tiny`
tries the wiring; it decides nothing. On the bundled digits a demonstration.

Rows: arm fields part, arm, share (p), and optionally width (a factor on the hidden units); one row:
`step`, `accuracy`, `ratio_1`, `ratio_2` (ln of the measured ratio, by layer), `error_1`, `error_2`
(ratio over formula; 1 where no dropout stands before), `spread_1`, `spread_2`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gammabeta._runs import Row, Scalar
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.studies._answer import Setting, Words
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._nets import MLP
from gammabeta.studies._outcomes import all_controlled, asked_for, beside
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._train import accuracy, fair_split, pixels, stream, train
from gammabeta.studies._tuned import (
    LEAST_SEEDS,
    MOST_SEEDS,
    PILOT_SEEDS,
    complete,
    fair_verdict,
    own,
    place,
    shown,
)
from gammabeta.studies._verdict import Verdict
from gammabeta.studies.regularization import Dropout

CLAIMS = ("dropout-before-bn",)

RATE = 0.1
SHARES = (0.2, 0.5)
# arm -> layers with dropout before BN, layers with dropout behind the activation
PLACED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "before first": ((1,), ()),
    "before second": ((2,), ()),
    "before both": ((1, 2), ()),
    "after both": ((), (1, 2)),
    "none": ((), ()),
}
ARMS = (
    *((arm, p) for arm in ("before first", "before second") for p in SHARES),
    ("before both", 0.5),
    ("after both", 0.5),
    ("none", 0.0),
)
# name of a judged cell -> arm, share, layer
JUDGED = {
    f"p = {p:g} before {'first' if layer == 1 else 'second'} BN": (arm, p, layer)
    for layer, arm in ((1, "before first"), (2, "before second"))
    for p in SHARES
}


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    seeds: int
    images: int  # evaluated at most
    decides: bool  # False: no pilot, no verdict


PLANS = {
    "tiny": Plan(10, 1, 500, False),
    "small": Plan(300, LEAST_SEEDS, 10000, True),
    "full": Plan(2000, LEAST_SEEDS, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """All arms; pilot; more seeds."""
    plan = PLANS[budget]
    planned = _planned(own(rows, budget, data))
    return _wanted(plan, seeds, planned)


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: the pilot asks for the least."""
    return _wanted(PLANS[budget], seeds, None)


def _wanted(plan: Plan, seeds: int | None, planned: int | None) -> list[Cell]:
    count = plan.seeds if seeds is None else seeds
    judged = dict.fromkeys((arm, share) for arm, share, _ in JUDGED.values())
    wanted = [_cell(plan, 1, seed, "fair", *what) for seed in range(count) for what in ARMS]
    if seeds is None and plan.decides:
        wanted += [_cell(plan, 0, seed, "pilot", *what) for seed in PILOT_SEEDS for what in judged]
        more = range(count, planned or 0)
        wanted += [_cell(plan, 2, seed, "fair", *what) for seed in more for what in judged]
    return wanted


def _cell(plan: Plan, wave: int, seed: int, part: str, arm: str, share: float) -> Cell:
    before, after = PLACED[arm]
    # In seconds, about: steps, and passes of the evaluation images.
    cost = plan.steps * (0.8e-3 + 0.2e-3 * len(before + after)) + 1e-5 * plan.images
    return Cell("dropout-shift", {"part": part, "arm": arm, "share": share}, seed,
                round(cost, 3), wave)  # fmt: skip


def _numbers(rows: Sequence[Row], part: str, arm: str, share: float, key: str) -> dict[int, float]:
    """A number of one arm by seed."""
    return {
        seed: value
        for row in rows
        if (row.get("part"), row.get("arm"), row.get("share")) == (part, arm, share)
        and isinstance(seed := row["seed"], int)
        and isinstance(value := row.get(key), float)
    }


def _errors(rows: Sequence[Row], part: str) -> dict[str, dict[int, float]]:
    """Measured ratio over the formula by judged cell and seed."""
    return {
        name: _numbers(rows, part, arm, share, f"error_{layer}")
        for name, (arm, share, layer) in JUDGED.items()
    }


def _planned(rows: Sequence[Row]) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = _errors(rows, "pilot")
    if not complete(pilot):
        return None
    deltas = dict.fromkeys(pilot, claims()["dropout-before-bn"].thresholds["delta"])
    return asked_for(pilot, deltas, LEAST_SEEDS, MOST_SEEDS)


# -- one cell -----------------------------------------------------------------------------------


def network(pixels: int, arm: str, share: float, seed: int, width: float = 1.0) -> MLP:
    """The network of an arm."""
    units = round(100 * width)
    net = MLP((pixels, units, units, 10), "relu", True, stream(seed, "weights"))
    before, after = PLACED[arm]
    generator = stream(seed, "dropout")
    # Weights, BN, activation: three places for each layer; what is put in moves what follows.
    for layer in (2, 1):
        if layer in after:
            net.layers.insert(3 * layer, Dropout(share, generator))
        if layer in before:
            net.layers.insert(3 * layer - 2, Dropout(share, generator))
    return net


def shifts(net: MLP, x: Tensor, share: float) -> dict[str, float]:
    """ln of real over running variance of each BN, over the formula, and its spread over units.

    In eval mode and float64; a unit that does not vary is left out.
    """
    found: dict[str, float] = {}
    mode, number, dropped = net.training, 0, False
    net.eval()
    with torch.no_grad():
        for layer in net.layers:
            if isinstance(layer, BatchNorm1d) and layer.running_var is not None:
                number += 1
                z = x.double()
                mean, square = z.mean(0), z.square().mean(0)
                real, running = square - mean.square(), layer.running_var.double()
                p = share if dropped else 0.0
                formula = real / (square / (1 - p) - mean.square())
                kept = (real > 1e-12) & (running > 1e-12)
                logs = (real / running).log()[kept]
                off = logs - formula.log()[kept]
                found[f"ratio_{number}"] = float(logs.mean())
                found[f"error_{number}"] = float(off.mean().exp())
                found[f"spread_{number}"] = float(off.std())
            dropped = isinstance(layer, Dropout)
            x = layer(x)
    net.train(mode)
    return found


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network, and compare what BN meets in testing with what it remembers."""
    plan, share = PLANS[budget], float(arm["share"] or 0.0)
    train_x, train_y, held_x, held_y = fair_split(data, seed, "test")
    held, labels = pixels(held_x[: plan.images], data.pixel_max), held_y[: plan.images]
    width = float(arm.get("width") or 1.0)
    net = network(held.shape[1], str(arm["arm"]), share, seed, width)
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=RATE,
        steps=plan.steps,
        order=stream(seed, "order"),
        stops=[plan.steps],
    )
    for step, _ in training:
        found = shifts(net, held, share)
        numbers = {key: value for key, value in found.items() if math.isfinite(value)}
        yield {"step": step, "accuracy": accuracy(net, held, labels), **numbers}


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """One claim; what is missing makes it inconclusive."""
    if not rows:
        return []
    budget, data = str(rows[0]["budget"]), str(rows[0]["data"])
    plan, limits = PLANS[budget], claims()["dropout-before-bn"].thresholds
    parts = {
        name: Part(list(by_seed.values()), "number", 1.0, limits["delta"])
        for name, by_seed in _errors(rows, "fair").items()
    }
    shift = {
        name: Part(
            [-v for v in _numbers(rows, "fair", arm, share, f"ratio_{layer}").values()],
            "above",
            limits["shift"],
        )
        for name, (arm, share, layer) in JUDGED.items()
    }
    control = joint(shift, LEAST_SEEDS)
    notes = []
    for name, cell in control.cells.items():
        if cell.interval:
            ratio = math.exp(-cell.interval.mean)
            notes.append(f"Real over running variance, {name}: {ratio:.3f} ({cell.status}).")
    more: list[dict[str, Any]] = []
    for arm in ("before both", "after both"):
        for layer in (1, 2):
            logs = _numbers(rows, "fair", arm, 0.5, f"ratio_{layer}")
            more += shown(f"ln of the ratio, p = 0.5 {arm}, BN {layer}", list(logs.values()))
    for name, (arm, share, layer) in JUDGED.items():
        spread = _numbers(rows, "fair", arm, share, f"spread_{layer}")
        more += shown(f"{name}: standard deviation over units", list(spread.values()))
    tested = {
        arm: _numbers(rows, "fair", arm, share, "accuracy")
        for arm, share in ARMS
        if share in (0.0, 0.5)
    }
    for first, second in (
        ("before both", "none"),
        ("after both", "none"),
        ("before both", "after both"),
    ):
        both = sorted(tested[first].keys() & tested[second].keys())
        gain = [100 * (tested[first][s] - tested[second][s]) for s in both]
        more += shown(f"test accuracy, {first} − {second} (points)", gain)
    if not plan.decides:
        notes.append(f"The budget {budget} tries the wiring; it decides nothing.")
    verdict = fair_verdict(
        "dropout-before-bn",
        Setting(
            "dropout-shift",
            budget,
            data,
            "MLP 100-100",
            f"one learning rate, {RATE:g}",
            "measured ratio of variances over the formula",
            plan.decides,
        ),
        Words(
            "the variance that batch normalization meets in testing is smaller than the one it "
            "remembers, by what the formula says: {weakest}",
            "the variance that batch normalization meets in testing over the one it remembers is "
            "not what the formula says: {refuted}",
            "the measured ratio over the formula is {weakest}",
        ),
        all_controlled(joint(parts, LEAST_SEEDS), control),
        pilot=_errors(rows, "pilot"),
        planned=_planned(rows),
        notes=notes,
    )
    return [beside(verdict, more)]


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Real over running variance for each share that is dropped."""
    if not rows:
        return []
    where = place(rows)
    points: list[Row] = []
    for name, (arm, share, layer) in JUDGED.items():
        series = name.split(" before ")[1]
        head: Row = {"kind": "curve", "curve": "ratio", "x": share}
        logs = _numbers(rows, "fair", arm, share, f"ratio_{layer}")
        errors = _numbers(rows, "fair", arm, share, f"error_{layer}")
        for seed in sorted(logs.keys() & errors.keys()):
            ratio = math.exp(logs[seed])
            points.append({**head, "series": f"{series}, measured", "y": ratio})
            points.append({**head, "series": f"{series}, formula", "y": ratio / errors[seed]})
    axes = Axes(
        f"Real over running variance on {where} behind dropout",
        "share that is dropped",
        "ratio of variances",
    )
    return drawings("dropout-shift", {"ratio": axes}, points)
