"""Does batch normalization make a network rely less on single units, and generalize by that?

Viceroy's article: the noise of batch normalization (BN) forces later units not to rely on any one
hidden unit, as dropout does, and so regularizes (unit-reliance). Morcos et al. 2018 clamp units,
one after the other, and find that networks which generalize bear more of it, and that BN
"implicitly discourages single direction reliance"; they conclude that reliance on single directions
predicts generalization (single-direction). Both are about networks that learn equally well, so the
arms are compared at equal training loss.

Networks: pixels-100-100-10, in five arms: "none"; "bn", BN before each activation; dropout of 0.2
and of 0.5 behind each activation; "bn, dropout 0.2". Pixels-200-200-10: "none" and "bn". ReLU, bias
0.1 without BN, weights from a truncated normal distribution with standard deviation
sqrt(2 / fan-in). Batches of 64, SGD without momentum, mean cross-entropy, 1,000 training images
drawn for each seed from the first 55,000, PyTorch's defaults for the layer. Arms of a seed have the
same start, images and batches.

Equal training loss: every 5 steps the loss on all training images is taken in eval mode (running
statistics, no dropout); training ends at the first look at which it is 0.1 or less, at the latest
after 800 steps (3,000 at `full`). A run that does not arrive counts as diverged in the search
over rates, and is counted and left out in the comparison.
Rates: each arm trains at its own best one: highest accuracy on the last 5,000 training images, at
that loss, mean of seeds 800 and 801, from 0.1, 0.3, 1; a best value at an edge extends the grid for
all arms of that network. Seeds 900 to 903 are a pilot: they give the number of seeds (8 to 16;
predicted half-width of the 95 % interval delta / 2), and are used for nothing else.

Clamping: at the end the hidden units of both layers together are put in 20 random orders, and the
first 10, 20, ... 90 % of each are clamped: their value behind the activation is replaced by its
mean over the training images. Accuracy on the first 1,000 test images in eval mode, over that of
the network as it is, mean of the orders: the ablation curve. Area: the mean of the curve from 0 to
90 % (trapezoids); 1 if nothing is lost. The orders are the same in all arms of a seed.

Primary contrast of unit-reliance: area, bn - none, superiority, delta = 0.03, in both networks
    (one refuted refutes, at 1 - 0.05/2).
Positive control: "and so regularizes": test accuracy at the same training loss, bn - none, in
    points: superiority, delta = 0.3, in both networks. Where BN does not generalize better, there
    is nothing to explain, and the verdict is inconclusive, whatever the areas say.
Primary contrast of single-direction: Spearman's rank correlation, over the five arms of a seed, of
    the area with test accuracy on all test images; its mean over seeds: superiority, delta = 0.3.
    Within a seed, since seeds differ in their images as well. The second half of the claim, on the
    selectivity of units for classes, is not judged. No control: it is not about why BN helps.
Shown: area and test accuracy of dropout and of both together, minus none; the loss at which the
    arms really ended (a step can pass 0.1 by some) and the steps to it.

What its author would call fair: the loss is equal, the units are clamped to what the next layer is
used to, all arms have their rate, and dropout, of which the mechanism is known, is measured by the
same curve: were its area not larger, the measure would not see what it is for. What would embarrass
us: an area that is larger with BN because BN in eval mode subtracts nothing that is clamped (it
does not: running statistics are constants), or networks so wide that nothing is lost at all.

Changed against the registry: 1,000 training images, where BN and dropout have something to
regularize, and the loss of 0.1 is soon reached; both layers are clamped together; dropout in the
narrower network alone; the control; correlations within seeds. Viceroy has no setting that could be
run again, Morcos et al. trained networks on CIFAR-10 and ImageNet: one verdict. `tiny` tries the
wiring; it decides nothing. The bundled digits (1,000 training images) are a demonstration.

Rows: arm fields part, group (the network), arm, rate, and optionally width (a factor on the hidden
units); one row of `step`, `accuracy`, `train_loss`, `diverged` (not arrived), and but for tuning
`area`; rows of kind "curve", the ablation curve.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Setting, Words, span
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._nets import MLP
from gammabeta.studies._outcomes import all_controlled, alone, asked_for, beside, by_weakest
from gammabeta.studies._pairs import Runs
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._train import accuracy, fair_split, pixels, stream, train
from gammabeta.studies._tuned import (
    EQUIVALENCE_SEEDS,
    MOST_SEEDS,
    Trained,
    Tuned,
    complete,
    fair_verdict,
    guess,
    needed,
    own,
    place,
    settle,
    shown,
    tuning_figure,
    tuning_notes,
)
from gammabeta.studies._verdict import Verdict, superiority
from gammabeta.studies.regularization import Dropout

CLAIMS = ("unit-reliance", "single-direction")

# arm -> BN, share that is dropped
ARMS = {
    "none": (False, 0.0),
    "bn": (True, 0.0),
    "dropout 0.2": (False, 0.2),
    "dropout 0.5": (False, 0.5),
    "bn, dropout 0.2": (True, 0.2),
}
UNITS = {"100-100": 100, "200-200": 200}
NARROW = "100-100"
GROUPS = {NARROW: tuple(ARMS), "200-200": ("none", "bn")}
EVERY = 5  # steps between two looks at the training loss
SHARES = tuple(k / 10 for k in range(10))
CLAMPED_ON = 1000  # test images


class Plan(NamedTuple):
    """What a budget stands for."""

    size: int  # training images
    steps: int  # at most
    loss: float  # at which training ends
    orders: int
    seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.1, 0.3, 1.0)
PLANS = {
    "tiny": Plan(300, 40, 2.0, 2, 1, (0.3,), 500, False),
    "small": Plan(1000, 800, 0.1, 20, EQUIVALENCE_SEEDS, RATES, 10000, True),
    "full": Plan(1000, 3000, 0.1, 20, EQUIVALENCE_SEEDS, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until both grids are settled; then all arms; pilot; more seeds."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    return [_cell(plan, *wish) for wish in needed(tuned, plan.seeds, seeds, [_planned(tuned)])]


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: grids grow by one rate, and half as many seeds more."""
    plan = PLANS[budget]
    wanted = needed(guess(GROUPS, plan, (3.0,), 0.3), plan.seeds, seeds, [plan.seeds * 3 // 2])
    return [_cell(plan, *wish) for wish in wanted]


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    norm, share = ARMS[what.arm]
    # In seconds, about: steps until the loss is reached, looks at the loss, evaluation, clamping.
    steps = {0.0: 125, 0.2: 130, 0.5: 245}[share] * (0.45 if norm else 1.0)
    if what.rate < 0.3:
        steps *= (0.3 / what.rate) ** 0.6
    elif what.rate > 0.3 and not norm:
        steps = plan.steps  # hardly ever arrives
    wide = UNITS[what.group] / 100
    step = (1.2e-3 + (0.6e-3 if norm else 0.0) + (0.4e-3 if share else 0.0)) * wide
    clamping = 0.0 if part == "tuning" else 8e-3 * plan.orders
    cost = min(steps, plan.steps) * step + (0.04 + clamping) * wide
    return Cell("single-units", arm, seed, round(cost, 3), wave)


Values = Mapping[tuple[str, str], Mapping[int, float]]  # network, arm -> by seed


def _values(tuned: Tuned, part: str, key: str) -> Values:
    """A number at the end of the runs that arrived at the loss, in points where it is a share."""
    found: dict[tuple[str, str], dict[int, float]] = {
        (group, arm): {} for group, arms in GROUPS.items() for arm in arms
    }
    for row in tuned.rows:
        of = (str(row.get("group")), str(row.get("arm")))
        rate, seed, value = tuned.best.get(of[0], {}).get(of[1]), row["seed"], row.get(key)
        ours = of in found and (row.get("part"), row.get("rate")) == (part, rate)
        if ours and "area" in row and isinstance(seed, int) and isinstance(value, int | float):
            found[of][seed] = 100 * value if key == "accuracy" else float(value)
    return found


def _minus(values: Values, group: str, arm: str) -> dict[int, float]:
    """An arm minus none, by seed."""
    first, second = values[group, arm], values[group, "none"]
    return {s: first[s] - second[s] for s in sorted(first.keys() & second.keys())}


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's; 0 where one of them does not vary.

    >>> round(rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]), 6)
    0.8
    """
    if min(x) == max(x) or min(y) == max(y):
        return 0.0
    return statistics.correlation(list(rankdata(x)), list(rankdata(y)))


def _correlations(tuned: Tuned, part: str) -> dict[int, float]:
    """Rank correlation of area and test accuracy over the arms of the narrower network, by seed."""
    areas, shares = (_values(tuned, part, key) for key in ("area", "accuracy"))
    arms = [(NARROW, arm) for arm in ARMS]
    seeds = sorted(set.intersection(*(set(areas[arm]) for arm in arms)))
    return {
        s: rank_correlation([areas[a][s] for a in arms], [shares[a][s] for a in arms])
        for s in seeds
    }


def _pilot(tuned: Tuned) -> dict[str, dict[int, float]]:
    areas = _values(tuned, "pilot", "area")
    found = {group: _minus(areas, group, "bn") for group in GROUPS}
    return {**found, _RHO: _correlations(tuned, "pilot")}


def _planned(tuned: Tuned) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = _pilot(tuned)
    if not complete(pilot):
        return None
    deltas = {group: claims()["unit-reliance"].thresholds["delta"] for group in GROUPS}
    deltas[_RHO] = claims()["single-direction"].thresholds["delta"]
    return asked_for(pilot, deltas, EQUIVALENCE_SEEDS, MOST_SEEDS)


# -- one cell -----------------------------------------------------------------------------------


def network(pixels: int, group: str, arm: str, seed: int, width: float = 1.0) -> MLP:
    """The network of an arm."""
    norm, share = ARMS[arm]
    units = round(UNITS[group] * width)
    net = MLP((pixels, units, units, 10), "relu", norm, stream(seed, "weights"))
    if share:
        generator = stream(seed, "dropout")
        behind = [k for k, layer in enumerate(net.layers) if isinstance(layer, nn.ReLU)]
        for k in reversed(behind):  # what is put in moves what follows
            net.layers.insert(k + 1, Dropout(share, generator))
    return net


def ablation(
    net: MLP, reference: Tensor, x: Tensor, labels: Tensor, orders: int, generator: torch.Generator
) -> list[float]:
    """Relative accuracy on x with shares of the hidden units clamped, mean over random orders.

    Clamped: replaced behind the activation by the mean over ``reference``. In eval mode; the
    network's mode stays as it was.
    """
    mode = net.training
    net.eval()
    at = [k + 1 for k, layer in enumerate(net.layers) if isinstance(layer, nn.ReLU)]
    parts = [net.layers[i:j] for i, j in zip([0, *at], [*at, len(net.layers)], strict=True)]
    with torch.no_grad():
        means, h = [], reference
        for part in parts[:-1]:
            h = part(h)
            means.append(h.mean(0))
        first = parts[0](x)
        units = [len(mean) for mean in means]
        totals = [0.0] * len(SHARES)
        for _ in range(orders):
            order = torch.randperm(sum(units), generator=generator)
            for k, share in enumerate(SHARES):
                clamped = torch.zeros(sum(units), dtype=torch.bool)
                clamped[order[: round(share * sum(units))]] = True
                masks = torch.split(clamped, units)
                h = torch.where(masks[0], means[0], first)
                for part, mask, mean in zip(parts[1:-1], masks[1:], means[1:], strict=True):
                    h = torch.where(mask, mean, part(h))
                right = (parts[-1](h).argmax(1) == labels).double().mean()
                totals[k] += float(right) / orders
    net.train(mode)
    return [total / max(totals[0], 1e-9) for total in totals]


def area(curve: Sequence[float]) -> float:
    """Mean of a curve at equal distances, by trapezoids.

    >>> area([1.0, 1.0, 0.5])
    0.875
    """
    return (math.fsum(curve) - (curve[0] + curve[-1]) / 2) / (len(curve) - 1)


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network to the loss; then clamp its units."""
    plan, part = PLANS[budget], str(arm["part"])
    evaluation = "validation" if part == "tuning" else "test"
    train_x, train_y, held_x, held_y = fair_split(data, seed, evaluation, plan.size)
    seen, held = (pixels(x, data.pixel_max) for x in (train_x, held_x[: plan.images]))
    name, group, width = str(arm["arm"]), str(arm["group"]), float(arm.get("width") or 1.0)
    net = network(seen.shape[1], group, name, seed, width)
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=plan.steps,
        order=stream(seed, "order"),
        stops=range(EVERY, plan.steps + 1, EVERY),
    )
    last, loss = 0, math.inf
    for step, _ in training:
        last = step
        with torch.no_grad():
            loss = float(cross_entropy(net.eval()(seen), train_y))
        net.train()
        if not loss > plan.loss:  # NaN ends it as well
            break
    labels = held_y[: plan.images]
    row: Row = {"step": last, "accuracy": accuracy(net, held, labels)}
    row["diverged"] = not loss <= plan.loss
    if math.isfinite(loss):
        row["train_loss"] = loss
    if part != "tuning" and loss <= plan.loss:
        on = (held[:CLAMPED_ON], labels[:CLAMPED_ON])
        found = ablation(net, seen, *on, plan.orders, stream(seed, "clamped"))
        row["area"] = area(found)
        for share, y in zip(SHARES, found, strict=True):
            yield {"kind": "curve", "curve": group, "series": name, "x": share, "y": y}
    yield row


# -- what it means ------------------------------------------------------------------------------

_RHO = "rank correlation of area and accuracy"


def judge(rows: list[Row]) -> list[Verdict]:
    """Both claims, fair; what is missing makes them inconclusive."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    tuned = settle(rows, GROUPS, plan)
    notes = tuning_notes(tuned.tunings, str(rows[0]["budget"]), decides=plan.decides)
    notes += _late(tuned.runs)
    setting = tuned.setting(
        "single-units",
        f"MLPs of two layers on {plan.size:,} images",
        f"at a training loss of {plan.loss:g}, each network at its best learning rate",
        "area under relative accuracy",
    )
    return [
        _reliance_verdict(tuned, setting, notes),
        _correlation_verdict(tuned, setting, notes),
    ]


def _late(runs: Runs) -> list[str]:
    """How many of the fair runs did not arrive at the loss."""
    count = sum(r.diverged for key, by in runs.items() if key[0] == "fair" for r in by.values())
    return [f"Runs that did not arrive at the loss, and are left out: {count}."] if count else []


def _reliance_verdict(tuned: Tuned, setting: Setting, common: Sequence[str]) -> Verdict:
    claim, notes, more = "unit-reliance", list(common), []
    limits = claims()[claim].thresholds
    areas, shares, losses, steps = (
        _values(tuned, "fair", key) for key in ("area", "accuracy", "train_loss", "step")
    )
    found, control = (
        joint(
            {
                group: Part(list(_minus(values, group, "bn").values()), "superiority", limits[key])
                for group in GROUPS
            },
            EQUIVALENCE_SEEDS,
        )
        for values, key in ((areas, "delta"), (shares, "gain"))
    )
    for group, cell in control.cells.items():
        if cell.interval:
            notes.append(
                f"Positive control, test accuracy at equal loss, bn − none, {group}: "
                f"{span(cell.interval)} points, {cell.status}."
            )
        gain = list(_minus(shares, group, "bn").values())
        more += shown(f"test accuracy, bn − none, {group}", gain, "control")
    for arm in (arm for arm in ARMS if arm not in ("none", "bn")):
        for label, values in (("area", areas), ("test accuracy", shares)):
            more += shown(f"{label}, {arm} − none", list(_minus(values, NARROW, arm).values()))
    ends = (("Area", areas, 3), ("Training loss", losses, 3), ("Steps to it", steps, 0))
    for label, values, digits in ends:
        said = [
            f"{arm} {statistics.fmean(by.values()):.{digits}f}"
            for (group, arm), by in values.items()
            if group == NARROW and by
        ]
        if said:
            notes.append(f"{label}, {NARROW}: {', '.join(said)}.")
    # Without the control a verdict on the areas would stand for one on regularization.
    outcome = all_controlled(by_weakest(found), control)
    verdict = fair_verdict(
        claim,
        setting,
        Words(
            "networks with batch normalization bear clamped units better, least {weakest}",
            "networks with batch normalization do not bear clamped units better: {refuted}",
            "with − without batch normalization is smallest in {weakest}",
        ),
        outcome,
        pilot=_pilot(tuned),
        planned=_planned(tuned),
        notes=notes,
    )
    return beside(verdict, more)


def _correlation_verdict(tuned: Tuned, setting: Setting, notes: Sequence[str]) -> Verdict:
    claim = "single-direction"
    rho = list(_correlations(tuned, "fair").values())
    delta = claims()[claim].thresholds["delta"]
    return fair_verdict(
        claim,
        setting._replace(unit="rank correlation", network=f"MLP {NARROW} in five arms"),
        Words(
            "the networks that bear clamped units better are those that generalize better: "
            "{weakest}",
            "to bear clamped units does not go with generalizing better: {refuted}",
            "they go together by {weakest}",
        ),
        alone(_RHO, superiority(rho, delta, EQUIVALENCE_SEEDS)),
        pilot=_pilot(tuned),
        planned=_planned(tuned),
        notes=notes,
    )


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """The ablation curves, and how the rates were chosen."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    fair = [row for row in rows if row.get("part") == "fair"]
    axes = {
        group: Axes(
            f"Relative accuracy on {place(rows)} with hidden units clamped, {group}",
            "share of the hidden units",
            "relative accuracy",
            caption="At equal training loss, each network at its best learning rate.",
        )
        for group in GROUPS
    }
    drawn = drawings("single-units", axes, fair)
    return [*drawn, *tuning_figure("single-units", tuned, "at equal loss")]
