"""Does batch normalization make dropout unnecessary, is its regularization small, and is it noise?

A lecture (Kainz): with batch normalization (BN) no dropout is needed (no-dropout), and what BN
really does is to regularize by injecting noise (reg-by-noise). An article (Viceroy): BN together
with dropout is a powerful regularization (bn-plus-dropout), and BN's own part in it is very small
(reg-small). The first and the third contradict each other: one contrast decides both. All of them
say that the noise of the statistics regularizes (noise-reg).

Networks: pixels-200-200-10 for dropout, pixels-100-100-10 for the others; ReLU, BN before each
activation in one kind of arms, no bias where it follows, bias 0.1 elsewhere, weights from a
truncated normal distribution with standard deviation sqrt(2 / fan-in). SGD without momentum, mean
cross-entropy, PyTorch's defaults for the layer, evaluation by running statistics. Arms that are
compared have the same start, batches and images, seed by seed.

Dropout (group "dropout")
    2,000 training images drawn for each seed from the first 55,000, batches of 128, 800 steps (51
    epochs). With and without BN, each with: no dropout; dropout of 0.1, 0.2, 0.5 after the last
    hidden activation, behind the last BN; of 0.2 and 0.5 after both hidden activations. Each of
    these twelve trains at its own best learning rate: highest accuracy on the last 5,000 training
    images, mean of seeds 800 and 801, from 0.1, 0.3, 1; a best value at an edge extends the grid
    for all. The dropout of each kind ("best dropout") is the one, of the five, with the highest
    such accuracy at its best rate; it is compared with no dropout on fresh seeds and test images.

Primary contrast of no-dropout and bn-plus-dropout: test accuracy (mean at 96, 98 and 100 % of the
    steps), with BN, best dropout minus none, in points, delta = 0.3. Superiority supports
    bn-plus-dropout. Equivalence supports no-dropout, and a difference of delta or more in favor of
    dropout refutes it; one in favor of none supports it. At least 8 seeds.
Positive control of no-dropout: that dropout is not needed is said of BN only where dropout is
    needed without: the same contrast without BN, superiority, delta. Where that fails, no-dropout
    is not supported but inconclusive (nothing to explain here).
Primary contrast of reg-small: gap between training and test accuracy at the end. Effect of dropout
    0.5 after both activations, without BN, minus twice the effect of BN without dropout, both
    against neither, lies above 0. Positive control: that effect of dropout, superiority, delta.

Noise (group "noise")
    1,000 training images, batches of 64, 400 steps (27 epochs). Three arms: "none"; "bn"; and
    "full", BN without noise: all training images pass through the network at every step, so that
    its statistics are those of all of them, and the loss is that of the same 64 as in the other
    arms. The gradient passes through the statistics, as in BN. Measured every 10 steps: the loss on
    all training images, normalized by their own statistics where there is BN, which are no noise
    either (a loss above 10, or none, counts as 10). Area: its mean over these points. Each arm
    trains at the rate with the smallest area, mean of seeds 800 and 801, from 0.1, 0.3, 1, grown
    as above.
Primary contrast of reg-by-noise: with g = 1 - area / (area of "none"), the share of the area that
    an arm saves, 0.8 g(bn) - g(full) lies above 0 (supported: without noise BN keeps less than
    80 % of what it does for training; refuted: it keeps more). Positive control: g(bn),
    superiority, delta = 0.1. 5 to 16 seeds; predicted half-width delta / 2.
Shown: test accuracy at the end, bn - none and full - none, at these rates. The verdict is about
    training; noise may still be what makes BN generalize.

Ghost batches (group "ghost")
    2,000 training images, batches of 512, 300 steps (100 epochs), pixels-100-100-10; statistics
    over ghost batches of m = 4, 16, 64, 512 images; and "noise of 16": statistics of the whole
    batch and on them, for each ghost of 16 and each channel, a shift and a factor drawn with the
    means and variances that those of such ghosts have. Each arm at its own best rate, as for
    dropout.
Primary contrast of noise-reg: least-squares slope of the gap between training and test accuracy
    (end of training, points) over log2 m: superiority, delta = 0.1. "Supported" needs the gap of
    the noise arm within ±0.2 of that of BN at m = 16 as well (equivalence, at least 8 seeds);
    without it the slope may be owed to something else that small ghosts change, and the verdict
    is inconclusive. Predicted half-widths 0.05 and 0.1, at most 16 seeds. No other control: the
    claim is about noise, not about why BN helps.

What its author would call fair. Kainz: BN wins if the best of five dropouts, chosen with labels
    that BN without dropout never needed, adds less than 0.3 points. Viceroy: the dropout was chosen
    for this network, at a rate chosen for it, where it cannot harm a BN behind it. What would
    embarrass us: a best dropout or rate at the end of all that was tried, or a dropout that does
    not help without BN. Of reg-by-noise: nothing but the noise is taken away, every arm has its
    rate, and what is compared is the speed for which BN is used; its author may say that
    regularization was never meant to speed up training, hence the test accuracy beside. It would
    embarrass us if "full" gained only by seeing more images in each step.

Seeds 900 to 903 are a pilot: they give the number of seeds (at most 16; predicted half-width of
the 95 % interval delta / 2), and are used for nothing else.

Changed against the registry: 200-200 units (its section on budgets) and batches of 128, so that
800 steps fit; dropout behind both activations and its placement chosen like its size; the
one-sided reading of "not needed" above; a control for no-dropout; rates of the noise arms chosen by
what is compared, not by validation accuracy, which says little about speed. The sources have no
setting that could be run again here: one verdict. `full` trains 2,000 steps (noise: 1,000, of 2,000
images); `tiny` tries the wiring and decides nothing. The bundled digits (1,000 training images) are
a demonstration.

Rows: arm fields part, group, arm, rate, and optionally width (a factor on the hidden units);
`step`, `diverged`; dropout: `accuracy`, `train_accuracy`; noise: `train_loss`, and in the last
three rows `accuracy`; ghost: as dropout.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Words, span
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._nets import MLP
from gammabeta.studies._outcomes import alone, asked_for, beside
from gammabeta.studies._pairs import Run, Runs, collect, curve
from gammabeta.studies._regularization import ghosts
from gammabeta.studies._train import accuracy, batches, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    BAND,
    EQUIVALENCE_SEEDS,
    KEYS,
    LEAST_SEEDS,
    MOST_SEEDS,
    TUNING_SEEDS,
    Trained,
    Tuned,
    complete,
    fair_verdict,
    figure,
    guess,
    needed_in,
    own,
    place,
    settle,
    shown,
    trials,
    tuning_figure,
)
from gammabeta.studies._verdict import (
    Outcome,
    Verdict,
    controlled,
    equivalence,
    interval,
    lies_above,
    superiority,
)

CLAIMS = ("no-dropout", "bn-plus-dropout", "reg-small", "reg-by-noise", "noise-reg")

# name of a dropout -> share that is dropped, and whether behind the first activation too
DOSES = {
    "no dropout": (0.0, False),
    "0.1 last": (0.1, False),
    "0.2 last": (0.2, False),
    "0.5 last": (0.5, False),
    "0.2 both": (0.2, True),
    "0.5 both": (0.5, True),
}
NORMS = ("bn", "none")
NONE, HALF = "no dropout", "0.5 both"
DROPOUT = tuple(f"{norm}, {dose}" for norm in NORMS for dose in DOSES)
NOISE = ("none", "bn", "full")
GROUPS = {"dropout": DROPOUT, "noise": NOISE, "ghost": tuple(ghosts.ARMS)}
EVERY = 10  # steps between two looks at the training loss
WORST = 10.0  # a loss above it, or none at all, counts as this
_CONTRAST = "best dropout − none, with BN"
_CONTROL = "best dropout − none, without BN"
_SMALL = "dropout's effect − 2 × BN's"
_NOISE = "needed share of what BN saves − saved without noise"


class Plan(NamedTuple):
    """What a budget stands for."""

    size: int  # training images
    steps: int
    batch: int
    noise_size: int
    noise_steps: int
    noise_batch: int
    ghost_steps: int
    ghost_batch: int
    seeds: Mapping[str, int]  # by group
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.1, 0.3, 1.0)
_SEEDS = {"dropout": EQUIVALENCE_SEEDS, "noise": LEAST_SEEDS, "ghost": EQUIVALENCE_SEEDS}
PLANS = {
    "tiny": Plan(300, 10, 100, 100, 10, 32, 5, 256, dict.fromkeys(GROUPS, 1), (0.3,), 500, False),
    "small": Plan(2000, 800, 128, 1000, 400, 64, 300, 512, _SEEDS, RATES, 10000, True),
    "full": Plan(2000, 2000, 128, 2000, 1000, 64, 1500, 512, _SEEDS, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Of each group: tuning until the grid is settled; then the main runs; pilot; more seeds."""
    plan = PLANS[budget]
    tuned = _settled(own(rows, budget, data), plan)
    wanted = [
        wish
        for group in GROUPS
        for wish in needed_in(
            group, tuned, plan.seeds[group], seeds, _main(tuned, group), _planned(tuned, group)
        )
    ]
    return [_cell(plan, *wish) for wish in wanted]


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, half as many seeds more than the least."""
    plan = PLANS[budget]
    doses = [f"{norm}, {dose}" for norm in NORMS for dose in (NONE, HALF)]
    wanted = [
        wish
        for group, arms in {**GROUPS, "dropout": doses}.items()
        for wish in needed_in(
            group,
            guess(GROUPS, plan),
            plan.seeds[group],
            seeds,
            [Trained(group, arm, plan.rates[0]) for arm in arms],
            plan.seeds[group] * 3 // 2,
        )
    ]
    return [_cell(plan, *wish) for wish in wanted]


def _settled(rows: Sequence[Row], plan: Plan) -> Tuned:
    return settle(rows, GROUPS, plan, runs=_runs_of(rows))


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    # In seconds, about: a step, and looks at the training and the evaluation images.
    if what.group == "noise":
        step = {"none": 0.6e-3, "bn": 0.8e-3, "full": 5.5e-6 * plan.noise_size}[what.arm]
        seen = 3.5e-6 * plan.noise_size / EVERY
        cost = plan.noise_steps * (step + seen) + (0.0 if part == "tuning" else 0.1)
        return Cell("regularization", arm, seed, round(cost, 3), wave)
    if what.group == "ghost":
        step = {"m = 4": 5.0e-3, "noise of 16": 5.0e-3, "m = 16": 4.2e-3}.get(what.arm, 3.8e-3)
        seen = min(plan.images, 5000 if part == "tuning" else 10000) + plan.size
        cost = plan.ghost_steps * step + 1e-5 * seen
        return Cell("regularization", arm, seed, round(cost, 3), wave)
    norm, dose = what.arm.split(", ")
    step = 1.7e-3 + (0.25e-3 if norm == "bn" else 0.0)
    step += 0.5e-3 if dose.endswith("both") else 0.25e-3 if dose.endswith("last") else 0.0
    seen = min(plan.images, 5000 if part == "tuning" else 10000) + plan.size
    return Cell("regularization", arm, seed, round(plan.steps * step + 2e-5 * seen, 3), wave)


def _runs_of(rows: Sequence[Row]) -> Runs:
    """Runs by ``KEYS``; those of group "noise" have minus the area in the place of accuracy."""
    runs = collect([row for row in rows if row.get("group") != "noise"], KEYS)
    losses: dict[tuple[Scalar, ...], dict[int, dict[int, Row]]] = {}
    for row in rows:
        if row.get("group") == "noise" and isinstance(row.get("train_loss"), float):
            seed, step = row["seed"], row["step"]
            if isinstance(seed, int) and isinstance(step, int):
                arm = losses.setdefault(tuple(row[key] for key in KEYS), {})
                arm.setdefault(seed, {})[step] = row
    for key, by_seed in losses.items():
        runs[key] = {seed: _area_run(by_step) for seed, by_step in sorted(by_seed.items())}
    return runs


def _area_run(by_step: Mapping[int, Row]) -> Run:
    steps = sorted(by_step)
    losses = [row["train_loss"] for row in by_step.values()]
    area = math.fsum(x for x in losses if isinstance(x, float)) / len(losses)
    return Run(steps[-1:], [-area], [], any(bool(row["diverged"]) for row in by_step.values()))


def _main(tuned: Tuned, group: str) -> list[Trained] | None:
    """All arms of a group; of dropout: none and the best, with and without BN; 0.5 without BN."""
    if group not in tuned.best:
        return None
    arms = list(GROUPS[group])
    if group == "dropout":
        doses = _doses(tuned)
        both = [f"{norm}, {dose}" for norm in NORMS for dose in (NONE, doses[norm])]
        arms = list(dict.fromkeys([*both, f"none, {HALF}"]))
    return [Trained(group, arm, tuned.best[group][arm]) for arm in arms]


def _doses(tuned: Tuned) -> dict[str, str]:
    """The best dropout with and without BN, chosen on validation; of equals the first."""
    tried, best = trials(tuned.runs, "dropout"), tuned.best["dropout"]

    def score(arm: str) -> float:
        return math.fsum(tried[arm, best[arm]][seed].final for seed in TUNING_SEEDS)

    return {
        norm: max((d for d in DOSES if d != NONE), key=lambda dose: score(f"{norm}, {dose}"))
        for norm in NORMS
    }


def _gain(tuned: Tuned, part: str, norm: str) -> dict[int, float]:
    """Test accuracy, best dropout minus none, by seed."""
    if "dropout" not in tuned.best:
        return {}
    return tuned.minus(part, "dropout", *(f"{norm}, {d}" for d in (_doses(tuned)[norm], NONE)))


def _effects(tuned: Tuned, part: str) -> dict[str, dict[int, float]]:
    """By how much BN, and by how much dropout of 0.5, makes the gap smaller, by seed."""
    gaps, neither = _gaps(tuned), f"none, {NONE}"
    return {
        "BN": gaps.minus(part, "dropout", neither, f"bn, {NONE}"),
        "dropout": gaps.minus(part, "dropout", neither, f"none, {HALF}"),
    }


def _gaps(tuned: Tuned) -> Tuned:
    """Runs whose gap takes the place of the accuracy, so that the same code pairs the seeds."""
    gaps = [
        {**row, "accuracy": seen - held}
        for row in tuned.rows
        if isinstance(seen := row.get("train_accuracy"), float)
        and isinstance(held := row["accuracy"], float)
    ]
    return tuned._replace(runs=_runs_of(gaps))


_SLOPE, _SAME = "gap per doubling of m", f"noise of {ghosts.NOISY} − BN at m = {ghosts.NOISY}"


def _ghost(tuned: Tuned, part: str) -> dict[str, dict[int, float]]:
    """Slope of the gap over log2 of the ghost size, and the noise arm minus BN, by seed."""
    gaps = _gaps(tuned)
    by = {arm: gaps.ended(part, "ghost", arm) for arm in GROUPS["ghost"]}
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in by.values())))
    x = [math.log2(m) for m in ghosts.SIZES]
    slopes = {
        s: statistics.linear_regression(x, [by[f"m = {m}"][s].final for m in ghosts.SIZES]).slope
        for s in shared
    }
    noise, bn = (by[arm] for arm in (f"noise of {ghosts.NOISY}", f"m = {ghosts.NOISY}"))
    return {_SLOPE: slopes, _SAME: {s: noise[s].final - bn[s].final for s in shared}}


def _small(effects: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    bn, dropout = effects["BN"], effects["dropout"]
    return {s: dropout[s] - 2 * bn[s] for s in sorted(bn.keys() & dropout.keys())}


def _saved(tuned: Tuned, part: str) -> dict[str, dict[int, float]]:
    """Shares of the area of the training loss that BN saves, with its noise and without."""
    none, bn, full = (tuned.ended(part, "noise", arm) for arm in NOISE)
    shared = sorted(none.keys() & bn.keys() & full.keys())
    return {
        name: {s: 1 - by_seed[s].final / none[s].final for s in shared}
        for name, by_seed in (("bn", bn), ("full", full))
    }


def _noise(saved: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    share = claims()["reg-by-noise"].thresholds["share"]
    return {s: share * saved["bn"][s] - saved["full"][s] for s in saved["bn"]}


def _planned(tuned: Tuned, group: str) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    delta = {claim: claims()[claim].thresholds["delta"] for claim in CLAIMS}
    if group == "noise":
        pilot = {_NOISE: _noise(_saved(tuned, "pilot"))}
        deltas = {_NOISE: delta["reg-by-noise"]}
    elif group == "ghost":
        pilot = _ghost(tuned, "pilot")
        deltas = {_SLOPE: delta["noise-reg"], _SAME: claims()["noise-reg"].thresholds["same"]}
    else:
        pilot = {
            _CONTRAST: _gain(tuned, "pilot", "bn"),
            _SMALL: _small(_effects(tuned, "pilot")),
        }
        deltas = {_CONTRAST: delta["no-dropout"], _SMALL: delta["reg-small"]}
    return asked_for(pilot, deltas, LEAST_SEEDS, MOST_SEEDS) if complete(pilot) else None


# -- one cell -----------------------------------------------------------------------------------


class Dropout(nn.Module):
    """In training a share p of the numbers is 0 and the others are divided by 1 - p.

    PyTorch's would draw from the global random state; this one draws what the seed says.
    """

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__()
        self.p, self.generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return x * kept / (1 - self.p)


def dropout_net(pixels: int, arm: str, seed: int, width: float = 1.0) -> MLP:
    """The network of an arm of group "dropout"."""
    norm, dose = arm.split(", ")
    p, both = DOSES[dose]
    units = round(200 * width)
    net = MLP((pixels, units, units, 10), "relu", norm == "bn", stream(seed, "weights"))
    if p:
        behind = [k for k, layer in enumerate(net.layers) if isinstance(layer, nn.ReLU)]
        generator = stream(seed, "dropout")
        # From the last to the first: what is put in moves what follows.
        for k in reversed(behind if both else behind[-1:]):
            net.layers.insert(k + 1, Dropout(p, generator))
    return net


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network."""
    plan, part = PLANS[budget], str(arm["part"])
    if arm["group"] == "ghost":
        return ghosts.measure(
            str(arm["arm"]),
            float(arm["rate"] or 0.0),
            seed,
            data,
            validation=part == "tuning",
            size=plan.size,
            steps=plan.ghost_steps,
            batch=plan.ghost_batch,
            images=plan.images,
            width=float(arm.get("width") or 1.0),
        )
    measured = {"dropout": _dropout, "noise": _noisy}[str(arm["group"])]
    return measured(arm, seed, plan, data)


def _noisy(arm: Mapping[str, Scalar], seed: int, plan: Plan, data: Images) -> Iterator[Row]:
    """A row every so many steps, with the loss on all training images."""
    part, norm, rate = str(arm["part"]), str(arm["arm"]), float(arm["rate"] or 0.0)
    units = round(100 * float(arm.get("width") or 1.0))
    train_x, train_y, held_x, held_y = fair_split(data, seed, "test", plan.noise_size)
    x, held = pixels(train_x, data.pixel_max), pixels(held_x[: plan.images], data.pixel_max)
    sizes = (x.shape[1], units, units, 10)
    net = MLP(sizes, "relu", norm != "none", stream(seed, "weights"))
    parameters = list(net.parameters())
    ends = log_steps(plan.noise_steps, 3)[-3:]
    drawn = batches(len(x), plan.noise_batch, stream(seed, "order"))
    net.train()
    for step, index in zip(range(1, plan.noise_steps + 1), drawn, strict=False):
        # The same images bear the loss; the statistics are those of what passes the network.
        logits = net(x)[index] if norm == "full" else net(x[index])
        loss = cross_entropy(logits, train_y[index])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)
        row: Row = {"step": step, "diverged": not math.isfinite(loss.item())}
        if step % EVERY == 0:
            with torch.no_grad():
                seen = float(cross_entropy(net.with_batch_statistics(x), train_y))
            row["train_loss"] = min(seen, WORST) if math.isfinite(seen) else WORST
        if step in ends and part != "tuning":
            row["accuracy"] = accuracy(net, held, held_y[: plan.images])
        if len(row) > 2:
            yield row


def _dropout(arm: Mapping[str, Scalar], seed: int, plan: Plan, data: Images) -> Iterator[Row]:
    """Three rows, at the end of training."""
    part, rate = str(arm["part"]), float(arm["rate"] or 0.0)
    width = float(arm.get("width") or 1.0)
    evaluation = "validation" if part == "tuning" else "test"
    train_x, train_y, held_x, held_y = fair_split(data, seed, evaluation, plan.size)
    seen, held = (pixels(x, data.pixel_max) for x in (train_x, held_x[: plan.images]))
    net = dropout_net(seen.shape[1], str(arm["arm"]), seed, width)
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=rate,
        steps=plan.steps,
        order=stream(seed, "order"),
        stops=log_steps(plan.steps, 3)[-3:],
        batch=plan.batch,
    )
    for step, loss in training:
        yield {
            "step": step,
            "accuracy": accuracy(net, held, held_y[: plan.images]),
            "train_accuracy": accuracy(net, seen, train_y),
            "diverged": not math.isfinite(loss),
        }


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """All claims; what is missing makes them inconclusive."""
    if not rows:
        return []
    tuned = _settled(rows, PLANS[str(rows[0]["budget"])])
    return [*_dropout_verdicts(tuned), _noise_verdict(tuned), _ghost_verdict(tuned)]


def _dropout_verdicts(tuned: Tuned) -> list[Verdict]:
    """no-dropout, bn-plus-dropout and reg-small."""
    of = {claim: claims()[claim].thresholds["delta"] for claim in CLAIMS}
    planned, notes = _planned(tuned, "dropout"), tuned.notes("dropout")
    size = PLANS[str(tuned.rows[0]["budget"])].size
    setting = tuned.setting("regularization", f"MLP 200-200 on {size:,} images")
    gain, without = (_gain(tuned, "fair", norm) for norm in NORMS)
    helped = superiority(without.values(), of["no-dropout"], LEAST_SEEDS)
    told = list(notes)
    if "dropout" in tuned.best:
        doses = _doses(tuned)
        told.append(f"Best dropout: {doses['bn']} with BN, {doses['none']} without.")
        alone_bn = tuned.minus("fair", "dropout", f"bn, {NONE}", f"none, {NONE}")
        if len(alone_bn) > 1:
            told.append(f"BN − none, both without dropout: {span(interval(alone_bn.values()))}.")
    if helped.interval:
        told.append(f"Positive control, {_CONTROL}: {span(helped.interval)}, {helped.status}.")
    outcomes = {
        "no-dropout": _unneeded(list(gain.values()), of["no-dropout"], helped),
        "bn-plus-dropout": superiority(gain.values(), of["bn-plus-dropout"], EQUIVALENCE_SEEDS),
    }
    found = [
        beside(
            fair_verdict(
                claim,
                setting,
                WORDS[claim],
                alone(_CONTRAST, one),
                pilot={_CONTRAST: _gain(tuned, "pilot", "bn")},
                planned=planned,
                notes=told,
            ),
            shown(_CONTROL, list(without.values()), "control"),
        )
        for claim, one in outcomes.items()
    ]
    effects = _effects(tuned, "fair")
    for name, by_seed in effects.items():
        if len(by_seed) > 1:
            notes.append(f"Gap made smaller by {name}: {span(interval(by_seed.values()))} points.")
    works = superiority(effects["dropout"].values(), of["reg-small"], LEAST_SEEDS)
    small = controlled(lies_above(_small(effects).values(), 0.0, LEAST_SEEDS), works)
    third = fair_verdict(
        "reg-small",
        setting,
        WORDS["reg-small"],
        alone(_SMALL, small),
        pilot={_SMALL: _small(_effects(tuned, "pilot"))},
        planned=planned,
        notes=notes,
    )
    return [*found, third]


def _ghost_verdict(tuned: Tuned) -> Verdict:
    limits, notes = claims()["noise-reg"].thresholds, tuned.notes("ghost")
    by, size = _ghost(tuned, "fair"), PLANS[str(tuned.rows[0]["budget"])].size
    found = superiority(by[_SLOPE].values(), limits["delta"], LEAST_SEEDS)
    same = equivalence(by[_SAME].values(), limits["same"], EQUIVALENCE_SEEDS)
    if found.status == "supported" and same.status != "supported":
        reason = f"noise of the same size is not shown to do the same: {same.status}"
        found = dataclasses.replace(
            found, status="inconclusive", reason=reason, n_needed=same.n_needed
        )
    if same.interval:
        notes.append(f"Gap, {_SAME}: {span(same.interval)} points, {same.status}.")
    for name, of in (("Gap", _gaps(tuned)), ("Test accuracy", tuned)):
        means = [
            f"{arm} {statistics.fmean(run.final for run in ended.values()):.2f}"
            for arm in GROUPS["ghost"]
            if (ended := of.ended("fair", "ghost", arm))
        ]
        if means:
            notes.append(f"{name} (points): {', '.join(means)}.")
    verdict = fair_verdict(
        "noise-reg",
        tuned.setting(
            "regularization",
            f"MLP 100-100 on {size:,} images",
            unit="points of the gap per doubling of m",
        ),
        Words(
            "the gap between training and test accuracy grows as the noise of the statistics "
            "falls: {weakest}",
            "the gap between training and test accuracy does not grow by {delta} points per "
            "doubling of the ghost size: {refuted}",
            "the gap between training and test accuracy changes so: {weakest}",
        ),
        alone(_SLOPE, found),
        pilot=_ghost(tuned, "pilot"),
        planned=_planned(tuned, "ghost"),
        notes=notes,
    )
    return beside(verdict, shown(_SAME, list(by[_SAME].values()), "control"))


def _noise_verdict(tuned: Tuned) -> Verdict:
    limits, notes = claims()["reg-by-noise"].thresholds, tuned.notes("noise")
    saved = _saved(tuned, "fair")
    control = superiority(saved["bn"].values(), limits["delta"], LEAST_SEEDS)
    found = controlled(lies_above(_noise(saved).values(), 0.0, LEAST_SEEDS), control)
    if control.interval:
        bn, full = (math.fsum(saved[a].values()) / len(saved[a]) for a in ("bn", "full"))
        kept = f", which is {100 * full / bn:.0f} % of it" if bn > 0 else ""
        notes.append(
            f"Positive control, share of the area of the training loss that BN saves: "
            f"{span(control.interval)}, {control.status}. Without noise: {full:.2f}{kept}."
        )
    tested = tuned._replace(runs=collect(tuned.rows, KEYS))
    more = [
        cell
        for arm in ("bn", "full")
        for cell in shown(
            f"test accuracy, {arm} − none (points)",
            list(tested.minus("fair", "noise", arm, "none").values()),
        )
    ]
    size = PLANS[str(tuned.rows[0]["budget"])].noise_size
    much = f"{100 * limits['share']:.0f} %"
    what = "of the area of the training loss that batch normalization saves"
    verdict = fair_verdict(
        "reg-by-noise",
        tuned.setting(
            "regularization",
            f"MLP 100-100 on {size:,} images",
            unit="share of the area of the training loss",
        ),
        Words(
            f"statistics without noise keep less than {much} {what}: {{weakest}}",
            f"statistics without noise keep more than {much} {what}: {{refuted}}",
            f"needed to keep {much} {what}, minus kept without noise: {{weakest}}",
        ),
        alone(_NOISE, found),
        pilot={_NOISE: _noise(_saved(tuned, "pilot"))},
        planned=_planned(tuned, "noise"),
        notes=notes,
    )
    return beside(verdict, more)


def _unneeded(gain: Sequence[float], delta: float, helped: Outcome) -> Outcome:
    """no-dropout: equivalence, one-sided where dropout harms, and only where it helps without."""
    found = equivalence(gain, delta, EQUIVALENCE_SEEDS)
    if found.status == "refuted" and found.interval is not None and found.interval.mean < 0:
        p = lies_above([-v for v in gain], -delta).p
        found = dataclasses.replace(found, status="supported", reason="dropout harms", p=p)
    return controlled(found, helped) if found.status == "supported" else found


WORDS = {
    "no-dropout": Words(
        "with batch normalization the best dropout adds less than {delta} points: {weakest}",
        "with batch normalization the best dropout still adds accuracy: {refuted}",
        "with batch normalization the best dropout adds {weakest}",
    ),
    "bn-plus-dropout": Words(
        "dropout adds accuracy to batch normalization: {weakest}",
        "the best dropout does not add {delta} points to batch normalization: {refuted}",
        "with batch normalization the best dropout adds {weakest}",
    ),
    "reg-small": Words(
        "batch normalization makes the gap between training and test accuracy smaller by less "
        "than half of what dropout of 0.5 does: {weakest}",
        "batch normalization makes the gap between training and test accuracy smaller by half of "
        "what dropout of 0.5 does, or more: {refuted}",
        "the effects on the gap between training and test accuracy differ so: {weakest}",
    ),
}


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Test accuracy at the end of training, and how rates and dropouts were chosen."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    tuned, where = _settled(rows, plan), place(rows)
    panels = []
    for norm, title in (("bn", "with batch normalization"), ("none", "without")):
        doses = (_doses(tuned)[norm], NONE) if "dropout" in tuned.best else ()
        series = [
            {**curve(ended, style), "name": dose}
            for dose, style in zip(doses, ("bn", "none"), strict=False)
            if (ended := tuned.ended("fair", "dropout", f"{norm}, {dose}"))
        ]
        if series:
            panels.append({"title": title, "series": series})
    return [
        *figure(
            "regularization",
            "dropout",
            f"Test accuracy on {where} with the best dropout and with none",
            f"{plan.size:,} training images, each network at its best learning rate. {BAND}",
            panels,
        ),
        *_losses(tuned, where),
        *tuning_figure("regularization", tuned, "with and without dropout", {"dropout": DROPOUT}),
    ]


def _losses(tuned: Tuned, where: str) -> list[dict[str, Any]]:
    """Training loss of the noise arms over the steps: geometric mean and range over seeds."""
    series: list[dict[str, Any]] = []
    for name, style, label in (
        ("none", "none", "without"),
        ("bn", "bn", "with batch normalization"),
        ("full", "bn", "with statistics of all images"),
    ):
        by_step: dict[int, list[float]] = {}
        rate = tuned.best.get("noise", {}).get(name)
        for row in tuned.rows:
            loss, step = row.get("train_loss"), row["step"]
            drawn = tuple(row.get(key) for key in KEYS) == ("fair", "noise", name, rate)
            if drawn and isinstance(loss, float) and isinstance(step, int):
                by_step.setdefault(step, []).append(max(loss, 1e-9))
        if by_step:
            steps = sorted(by_step)
            series.append(
                {
                    "name": label,
                    "style": style,
                    "x": steps,
                    "y": [statistics.geometric_mean(by_step[s]) for s in steps],
                    "lo": [min(by_step[s]) for s in steps],
                    "hi": [max(by_step[s]) for s in steps],
                    "n": min(len(by_step[s]) for s in steps),
                }
            )
    title = f"Training loss on {where}, with the noise of batch statistics and without"
    ends = ", ".join(f"{s['y'][-1]:.3g} {s['name']}" for s in series)
    figure = {
        "id": "regularization-noise",
        "experiment": "regularization",
        "kind": "curves",
        "title": title,
        "caption": "All arms see the same images in their loss; each at its best learning rate. "
        "Geometric mean over seeds; the band is their range.",
        "alt": f"{title}. At the end: {ends}.",
        "x": {"label": "training step", "log": True},
        "y": {"label": "loss on all training images", "log": True},
        "panels": [{"title": "MLP 100-100", "series": series}],
    }
    return [figure] if series else []
