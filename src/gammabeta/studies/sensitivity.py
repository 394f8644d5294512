"""Does batch normalization make training less sensitive to its settings?

Kathuria: batch normalization (BN) avoids the need for a careful initialization (init-robust; Ioffe
& Szegedy 2015, Section 3.3: a layer's output does not depend on the scale of its weights), and for
careful tuning of hyperparameters (hyper-robust). Neither measures it.

Network: pixels-100-100-10, BN before each activation, no bias where it follows, bias 0.1 elsewhere.
Batches of 64, 500 steps of SGD (2,000 at `full`), mean cross-entropy, 5,000 training images drawn
for each seed from the first 55,000, PyTorch's defaults for the layer, evaluation by running
statistics. Both arms of a setting have the same start and batches.

A seed is a setting. Coordinates are stratified: of the 64 settings, seed k takes a place in the
k-th of 64 equal parts of each range, each range in an order of its own, so that no range is left
out by chance; `full` has 128.

Initialization (part "init")
    All weights Gaussian with the same standard deviation, log-uniform between 0.001 and 10, ReLU or
    sigmoid (even and odd seeds). Each arm at its own best learning rate for that activation with
    usual weights (truncated normal, standard deviation sqrt(2 / fan-in)): highest accuracy on the
    last 5,000 training images, mean of seeds 800 and 801, from 0.1, 0.3, 1; a best value at an edge
    extends the grid for both arms. So both would do well were the initialization right.
Hyperparameters (part "hyper")
    ReLU; learning rate log-uniform between 0.001 and 3; the usual weights times a scale that is
    log-uniform between 0.1 and 10; momentum 0 or 0.9 (even and odd seeds).

Fair (the only verdict: the text trains no network)
    Primary contrast: share of settings at which test accuracy reaches 90 % (mean of the last three
    evaluations, at 96, 98 and 100 % of the steps; 5,000 test images), with minus without BN:
    superiority, delta = 0.2. Interval: paired bootstrap over the settings (percentiles of 20,000
    resamples), which takes them as drawn at random and is therefore wide for stratified ones.
    The number of settings is fixed beforehand: four pilot runs tell nothing of a contrast whose
    values are -1, 0 and 1. If it differs in a third of the settings, the half-width is about 0.12.
    A run that diverges has the accuracy of what is left.
Shown: the same for 85 and 92 %; mean accuracy; each activation, momentum and third of a range
alone; accuracy over each coordinate.

No positive control: the claim compares the arms, and explains nothing by BN. That both reach 90 %
somewhere is asked, else the verdict is inconclusive: at least 5 settings in each arm.

What its author would call fair: the rate that suits each network, wide ranges, and settings at
which both fail, which count for neither. What would embarrass us: a verdict that hangs on 90 %
(hence the others), on ranges that end where one arm stops working (hence the figures), or on rates
that were not chosen anew for each initialization, which is what a careful user would do: "careful"
is what the claim says is not needed.

Changed against the registry: 500 steps for both claims; standard deviations drawn instead of seven
fixed ones; both activations in one contrast; each arm's best rate instead of 0.1. `tiny` tries the
wiring; it decides nothing. On the bundled digits each seed splits the 1,797 images anew: a
demonstration.

Rows: arm fields part ("tuning", "init", "hyper"), group (the activation), arm ("bn", "none"), rate
(0 in "hyper": it belongs to the setting), and optionally width (a factor on the hidden units);
`step`, `accuracy`, `diverged`, and the setting: `scale`, `learning_rate`, `momentum`.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Words
from gammabeta.studies._beside import answered
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._nets import MLP
from gammabeta.studies._pairs import LABELS, NORMS, Run, Runs, collect
from gammabeta.studies._sensitivity.bootstrap import paired
from gammabeta.studies._train import accuracy, batches, fair_split, log_steps, pixels, stream
from gammabeta.studies._tuned import (
    KEYS,
    Best,
    Trained,
    Tuned,
    guess,
    own,
    settle,
    tuning_figure,
    tuning_notes,
    wishes,
)
from gammabeta.studies._tuned import (
    place as place_of,
)
from gammabeta.studies._verdict import Outcome, Verdict

CLAIMS = ("init-robust", "hyper-robust")

PARTS = {"init-robust": "init", "hyper-robust": "hyper"}
ACTIVATIONS = ("relu", "sigmoid")
GROUPS = dict.fromkeys(ACTIVATIONS, NORMS)
LEAST_SETTINGS = 20
LEAST_GOOD = 5  # settings at which each arm has to work
OTHERS = (85.0, 92.0)


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    settings: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no verdict


RATES = (0.1, 0.3, 1.0)
PLANS = {
    "tiny": Plan(6, 2, (0.3,), 500, False),
    "small": Plan(500, 64, RATES, 5000, True),
    "full": Plan(2000, 128, RATES, 10000, True),
}


class Drawn(NamedTuple):
    """A setting: the standard deviation, or scale, of the weights; rate; momentum."""

    scale: float
    rate: float
    momentum: float


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """The settings of all hyperparameters; tuning; then those of the initialization."""
    plan = PLANS[budget]
    return _wanted(plan, seeds, settle(own(rows, budget, data), GROUPS, plan))


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: each grid grows by one value."""
    plan = PLANS[budget]
    return _wanted(plan, seeds, guess(GROUPS, plan, (3.0,)))


def _wanted(plan: Plan, seeds: int | None, tuned: Tuned) -> list[Cell]:
    count = plan.settings if seeds is None else seeds
    trials = wishes(GROUPS, tuned.tunings, None, least=0, seeds=None, pilot=False, planned=None)
    wanted = [_cell(plan, *wish) for wish in trials]
    for seed in range(count):
        for norm in NORMS:
            wanted.append(_cell(plan, 1, seed, "hyper", Trained("relu", norm, 0.0)))
            group = ACTIVATIONS[seed % len(ACTIVATIONS)]
            if len(tuned.best) == len(GROUPS):
                what = Trained(group, norm, tuned.best[group][norm])
                wanted.append(_cell(plan, 1, seed, "init", what))
    return wanted


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    # In seconds, about: steps and evaluations.
    step = 1.0e-3 if what.arm == "bn" else 0.75e-3
    return Cell("sensitivity", arm, seed, round(plan.steps * step + 2e-5 * plan.images, 3), wave)


# -- one cell -----------------------------------------------------------------------------------


def place(seed: int, count: int, coordinate: str) -> float:
    """Where in (0, 1) a setting lies: in the seed-th of ``count`` parts, in a shuffled order.

    Seeds beyond ``count`` go round once more, shuffled anew.
    """
    turn, k = divmod(seed, count)
    generator = stream(turn, f"{coordinate} of {count}")
    order = torch.randperm(count, generator=generator)
    jitter = torch.rand(count, generator=generator, dtype=torch.float64)
    return float((order[k] + jitter[k]) / count)


def between(low: float, high: float, share: float) -> float:
    """Log-uniform."""
    return float(low * (high / low) ** share)


def setting_of(part: str, seed: int, count: int, rate: float) -> Drawn:
    """The setting of a seed."""
    if part == "init":
        return Drawn(between(1e-3, 10, place(seed, count, "deviation")), rate, 0.0)
    if part == "hyper":
        return Drawn(
            between(0.1, 10, place(seed, count, "scale")),
            between(1e-3, 3, place(seed, count, "rate")),
            (0.0, 0.9)[seed % 2],
        )
    return Drawn(1.0, rate, 0.0)


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network at one setting: a row for each evaluation."""
    part, plan = str(arm["part"]), PLANS[budget]
    x, y, held_x, held_y = fair_split(data, seed, "validation" if part == "tuning" else "test")
    held, labels = pixels(held_x[: plan.images], data.pixel_max), held_y[: plan.images]
    drawn = setting_of(part, seed, plan.settings, float(arm["rate"] or 0.0))
    units = round(100 * float(arm.get("width") or 1.0))
    sizes = (held.shape[1], units, units, 10)
    net = started(sizes, str(arm["group"]), arm["arm"] == "bn", part, seed, drawn)
    stops = log_steps(plan.steps, 3)[-3:]
    flat, order = x.flatten(1), batches(len(x), 64, stream(seed, "order"))
    moved = {p: torch.zeros_like(p) for p in net.parameters()} if drawn.momentum else {}
    finite = True
    net.train()
    for step, index in zip(range(1, plan.steps + 1), order, strict=False):
        if finite:  # what is not finite stays so
            loss = _step(net, drawn, moved, pixels(flat[index], data.pixel_max), y[index])
            finite = step not in stops or math.isfinite(loss.item())
        if step in stops:
            yield {
                "step": step,
                "accuracy": accuracy(net, held, labels),
                "diverged": not finite,
                "scale": drawn.scale,
                "learning_rate": drawn.rate,
                "momentum": drawn.momentum,
            }


def _step(
    net: MLP, drawn: Drawn, moved: dict[nn.Parameter, Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """One step of SGD; with momentum each parameter moves along the decaying sum of gradients."""
    parameters = list(net.parameters())
    loss = cross_entropy(net(x), y)
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if moved:
                gradient = moved[parameter].mul_(drawn.momentum).add_(gradient)
            parameter.sub_(gradient, alpha=drawn.rate)
    return loss.detach()


def started(
    sizes: Sequence[int], activation: str, bn: bool, part: str, seed: int, drawn: Drawn
) -> MLP:
    """The network of a setting; the draws of its weights are those of both arms."""
    generator = stream(seed, "weights")
    net = MLP(sizes, activation, bn, generator)
    with torch.no_grad():
        for layer in net.layers:
            if isinstance(layer, nn.Linear) and part == "init":
                layer.weight.normal_(0, drawn.scale, generator=generator)
            elif isinstance(layer, nn.Linear):
                layer.weight.mul_(drawn.scale)
    return net


# -- what it means ------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Both arms of a setting: accuracies in percent."""

    bn: float
    none: float
    drawn: Drawn


def pairs(rows: Sequence[Row], part: str, best: Best) -> dict[int, Pair]:
    """The settings that both arms have, by seed; initializations at the chosen rates only."""
    runs, found = collect(rows, KEYS), {}
    at = {int(str(row["seed"])): row for row in rows if row.get("part") == part}
    for group in ACTIVATIONS:
        rates = best.get(group, {}) if part == "init" else dict.fromkeys(NORMS, 0.0)
        bn, none = (_runs_of(runs, part, group, norm, rates.get(norm)) for norm in NORMS)
        for seed in bn.keys() & none.keys():
            names = ("scale", "learning_rate", "momentum")
            drawn = Drawn(*(float(str(at[seed][name])) for name in names))
            found[seed] = Pair(bn[seed].final, none[seed].final, drawn)
    return {seed: found[seed] for seed in sorted(found)}


def _runs_of(runs: Runs, part: str, group: str, norm: str, rate: float | None) -> Mapping[int, Run]:
    return runs.get((part, group, norm, rate), {}) if rate is not None else {}


def wins(found: Mapping[int, Pair], target: float) -> dict[int, float]:
    """1 where only BN reaches the target, -1 where only the other arm does, else 0."""
    return {s: float(p.bn >= target) - float(p.none >= target) for s, p in found.items()}


def decide(found: Mapping[int, Pair], target: float, delta: float) -> Outcome:
    """Superiority by the paired bootstrap; open where an arm hardly works at all."""
    x = list(wins(found, target).values())
    if len(x) < LEAST_SETTINGS:
        return Outcome("inconclusive", None, f"{len(x)} of at least {LEAST_SETTINGS} settings")
    outcome = paired(x, delta)
    good = min(sum(getattr(p, norm) >= target for p in found.values()) for norm in NORMS)
    if good < LEAST_GOOD:
        reason = f"an arm reaches {target:g} % in {good} settings, not {LEAST_GOOD}"
        return Outcome("inconclusive", outcome.interval, reason, p=outcome.p)
    return outcome


def judge(rows: list[Row]) -> list[Verdict]:
    """Both claims; what is missing makes them inconclusive."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    tuned = settle(rows, GROUPS, plan)
    searched = tuning_notes(tuned.tunings, str(rows[0]["budget"]), decides=plan.decides)
    verdicts = []
    for claim, part in PARTS.items():
        limits, found = claims()[claim].thresholds, pairs(rows, part, tuned.best)
        target = 100 * limits["accuracy"]
        name = f"share of settings with {target:g} %, BN − none"
        outcome = decide(found, target, limits["delta"])
        whole = dataclasses.replace(outcome, cells={name: outcome}, weakest=name)
        setting = tuned.setting(
            "sensitivity",
            "MLP 100-100",
            {
                "init": "weights of any scale, each network at the rate best for usual ones",
                "hyper": "random rates, scales and momenta",
            }[part],
            "share of settings",
        )
        verdicts.append(
            answered(
                claim,
                setting,
                _WORDS[claim],
                whole,
                {},
                delta=limits["delta"],
                pilot={},
                planned=None,
                notes=[
                    *(searched if part == "init" else searched[-1:] * (not plan.decides)),
                    *_shares(found, target),
                ],
                beside=_beside(found, part, target),
            )
        )
    return verdicts


_WORDS = {
    "init-robust": Words(
        "batch normalization works with more initializations: {weakest}",
        "batch normalization does not work with many more initializations: {refuted}",
        "{weakest}",
    ),
    "hyper-robust": Words(
        "batch normalization works at more settings: {weakest}",
        "batch normalization does not work at many more settings: {refuted}",
        "{weakest}",
    ),
}


def _shares(found: Mapping[int, Pair], target: float) -> list[str]:
    """Each arm's share of settings, as a note."""
    if not found:
        return []
    said = ", ".join(
        f"{100 * statistics.fmean(getattr(p, norm) >= target for p in found.values()):.0f} % "
        f"{LABELS[norm]}"
        for norm in NORMS
    )
    return [f"Settings that reach {target:g} %: {said}, of {len(found)}, a number that was fixed."]


def _beside(found: Mapping[int, Pair], part: str, target: float) -> dict[str, dict[int, float]]:
    beside = {f"share of settings with {other:g} %": wins(found, other) for other in OTHERS}
    beside["accuracy in points"] = {s: p.bn - p.none for s, p in found.items()}
    won = wins(found, target)
    halves = ACTIVATIONS if part == "init" else ("momentum 0", "momentum 0.9")
    for k, half in enumerate(halves):
        beside[f"share of settings with {target:g} %, {half}"] = {
            s: v for s, v in won.items() if s % 2 == k
        }
    coordinates = {"scale": "weights"} | ({"rate": "learning rate"} if part == "hyper" else {})
    for name, label in coordinates.items():
        order = sorted(won, key=lambda s: getattr(found[s].drawn, name))
        thirds = np.array_split(np.array(order, dtype=int), 3)
        for size, third in zip(("small", "middle", "large"), thirds, strict=True):
            beside[f"share of settings with {target:g} %, {size} {label}"] = {
                int(s): won[int(s)] for s in third
            }
    return beside


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Accuracy over each coordinate; the tuning."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    init, hyper = (pairs(rows, part, tuned.best) for part in PARTS.values())
    drawn = []
    for key, found, name, label, halves in (
        ("init", init, "scale", "standard deviation of the weights", ACTIVATIONS),
        ("scale", hyper, "scale", "scale of the weights", ("momentum 0", "momentum 0.9")),
        ("rate", hyper, "rate", "learning rate", ("momentum 0", "momentum 0.9")),
    ):
        panels = []
        for k, half in enumerate(halves):
            of = sorted((getattr(p.drawn, name), p) for seed, p in found.items() if seed % 2 == k)
            if of:
                series = [
                    _series([x for x, _ in of], [getattr(p, norm) for _, p in of], norm)
                    for norm in NORMS
                ]
                panels.append({"title": half, "series": series})
        if panels:
            title = f"Test accuracy on {place_of(rows)} over the {label}"
            drawn.append(
                {
                    "id": f"sensitivity-{key}",
                    "experiment": "sensitivity",
                    "kind": "curves",
                    "title": title,
                    "caption": "Each point is a setting; all other coordinates vary too.",
                    "alt": f"{title}, with and without batch normalization, one point a setting.",
                    "x": {"label": label, "log": True},
                    "y": {"label": "accuracy (%)", "log": False},
                    "panels": panels,
                }
            )
    return drawn + tuning_figure("sensitivity", tuned, "usual weights")


def _series(x: Sequence[float], y: Sequence[float], norm: str) -> dict[str, Any]:
    both = {"name": LABELS[norm], "style": norm, "x": list(x), "n": 1}
    return both | {name: list(y) for name in ("y", "lo", "hi")}
