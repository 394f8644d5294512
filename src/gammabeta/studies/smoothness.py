"""Does batch normalization make the loss surface smoother?

The claim (smoother) is that of Santurkar et al. 2018, Sections 3.1 and 3.2, repeated by Kathuria:
along the gradient of a step, with batch normalization (BN), the loss varies less, the gradient
changes less, and by less per distance. `gammabeta.probes.smoothness` measures all three. Their
Section 3.3: normalization by other norms, which do not control the variance, does as well
(lp-norm). Dimitriou & Arandjelovic 2020: statistics of ghost batches make the loss less smooth and
generalize better all the same (ghost-less-smooth).

Network: pixels, five layers of 100 units, 10; ReLU, BN before each activation, no bias where it
follows, bias 0.1 elsewhere, weights from a truncated normal distribution with standard deviation
sqrt(2 / fan-in). Batches of 128, 600 steps of SGD without momentum (1,500 at `full`), mean
cross-entropy, 5,000 training images drawn for each seed from the first 55,000, PyTorch's defaults
for the layer. Both arms of a pair have the same start and batches. Every 20 steps (30 times) the
loss is looked at along its gradient, in training mode, on a batch of 128 training images that is
the same in both arms.

Fair (it gives the verdict)
    Each arm at its own best learning rate: highest accuracy on the last 5,000 training images, mean
    of seeds 800 and 801, from 0.03, 0.1, 0.3, 1; a best value at an edge extends the grid for both
    arms. Scale-free: every weight matrix moves by the same share of its own norm, 0.3, 1, 3 and
    10 %, all else stays, and gradients are those with respect to W / |W|. For a network of another
    scale that computes the same, the numbers are the same; those of the source are not.
    Seeds 900 to 903 are a pilot: they give the number of seeds (5 to 16; predicted half-width of
    the 95 % interval delta / 2), and are used for nothing else.

As published
    Both arms at the rate 0.1. From the parameters the walk goes 1/2, 1, 2 and 4 learning rates down
    the gradient of all parameters, as far as the source's on VGG; the numbers are not scale-free.

Primary contrast: natural logarithm of each quantity, mean over the 30 looks, without minus with BN:
(a) range of the loss along the walk; (b) largest change of the gradient; (c) effective beta, the
largest change of the gradient per distance. Superiority, delta = 0.22 (a factor of 1.25), in all
three (universal).
Positive control: the claim is why BN helps, so it is judged only where it does: test accuracy of
the same fair runs, with minus without, mean of the last three evaluations (at 96, 98 and 100 % of
the steps, running statistics), superiority, 0.3 points; where that is inconclusive, the exact
sign-flip test (p at most 0.05, mean at least 0.3 points). Where that fails: nothing to explain.
(Amended after the first rows: one network of 16 without BN diverged, which is a gain of 85 points
and made the t interval reach below 0.)
Shown: the contrasts at equal training loss. BN learns faster, a smaller loss has a smaller range
    and gradient, and this alone would pass for smoothness; so the three are also compared at ten
    values of the looked-at batch's loss that both arms of a seed pass through (the logarithms,
    interpolated over that of the loss). And the source's walk, at each arm's best rate.

Other norms (lp-norm)
    Two more arms in the place of BN: the mean is subtracted and the rest divided by the mean of its
    absolute values times sqrt(pi / 2) ("l1"), or by its largest absolute value over sqrt(2 ln m) of
    m images ("linf"), so that a Gaussian keeps its size; gamma, beta and running statistics as in
    BN. (l2 is BN.) Area: mean of the loss of the training batch, before its update, at the 30 steps
    of the looks. Primary contrast: area of the arm minus that of BN, over the mean area that BN
    saves (none - BN, all seeds): equivalence, ±0.2, for both. Positive control: BN - none, share of
    the area of none that BN saves, superiority, 0.1. At least 8 seeds.

Ghost batches (part "ghost", for ghost-less-smooth)
    Statistics over ghosts of m = 4, 8, 16, 32, 64 images, and of the whole batch of 128, all at the
    best rate of BN, looked at in the same way. Primary contrast: Spearman correlation over the six
    values of m, of the means over 5 seeds (fixed beforehand), of (i) ln of the scale-free effective
    beta and (ii) test accuracy at the end. Supported if both fall as m grows with p < 0.05, the
    exact one-sided permutation test; refuted if either rises with p < 0.05. The effect shown is the
    larger of the two correlations, its interval that of the seeds' own correlations.

What its author would call fair: all three of the source's quantities, in its own setting too, and
the scale-free ones only beside. What would embarrass us: a verdict that turns at equal loss, or
one that is owed to distances at which every network is linear, or none.

Changed against the registry: delta; 4 distances of each walk; no sigmoid and no linear network; all
arms with at least 8 seeds, since they share runs and one claim is an equivalence. `tiny` tries the
wiring with two looks; it decides nothing. On the bundled digits each seed splits the 1,797 images
anew: a demonstration.

Rows: arm fields part ("tuning", "fair", "pilot", "published"), group, arm ("bn", "none", "l1",
"linf", "ghost m"), rate, and optionally width (a factor on the hidden units). Every so many steps
`train_loss`, and but for "l1", "linf" a look: `loss` (of its batch), `range`, `change`, `beta`
(scale-free), `raw_range`, `raw_change`, `raw_beta`. The last three: `accuracy`.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row, Scalar
from gammabeta.layers.ghost import GhostBatchNorm1d
from gammabeta.probes import smoothness
from gammabeta.probes.step import Step
from gammabeta.studies._answer import Setting, Words, answer, span
from gammabeta.studies._beside import answered, control_note, helped
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._nets import MLP, Norm
from gammabeta.studies._outcomes import asked_for
from gammabeta.studies._pairs import LABELS, NORMS, collect
from gammabeta.studies._train import (
    accuracy,
    batches,
    fair_split,
    log_steps,
    pixels,
    stream,
    train,
)
from gammabeta.studies._tuned import (
    EQUIVALENCE_SEEDS,
    KEYS,
    LEAST_SEEDS,
    MOST_SEEDS,
    Best,
    Trained,
    Tuned,
    complete,
    fair_verdict,
    guess,
    needed,
    own,
    place,
    settle,
    tuning_figure,
)
from gammabeta.studies._verdict import (
    Outcome,
    Verdict,
    controlled,
    interval,
    superiority,
    universal,
)

CLAIMS = ("smoother", "lp-norm", "ghost-less-smooth")

LP = ("l1", "linf")
GROUPS = {"deep": (*NORMS, *LP)}
QUANTITIES = {
    "range": "(a) range of the loss",
    "change": "(b) change of the gradient",
    "beta": "(c) effective beta",
}
PUBLISHED_RATE = 0.1
DISTANCES = (0.5, 1.0, 2.0, 4.0)  # in learning rates
GHOSTS = (4, 8, 16, 32, 64)
RELATIVE = (0.003, 0.01, 0.03, 0.1)  # in norms of each weight
BATCH = 128
TINY = 1e-12  # a quantity that is smaller, as where the loss has vanished, counts as this
_GRID = 10  # values of the loss at which arms are compared


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    every: int
    seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.03, 0.1, 0.3, 1.0)
PLANS = {
    "tiny": Plan(10, 5, 2, (0.1,), 500, False),
    "small": Plan(600, 20, EQUIVALENCE_SEEDS, RATES, 10000, True),
    "full": Plan(1500, 50, EQUIVALENCE_SEEDS, RATES, 10000, True),
}

Looks = Mapping[int, Row]  # by step
Seen = dict[tuple[Scalar, ...], dict[int, dict[int, Row]]]  # KEYS -> seed -> step -> look


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """As published, and tuning until the grid is settled; the main runs; pilot; more seeds."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    return _wanted(tuned, plan, seeds, _planned(tuned.rows, tuned.best))


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, half as many seeds more than the least."""
    plan = PLANS[budget]
    return _wanted(guess(GROUPS, plan), plan, seeds, plan.seeds * 3 // 2)


def _wanted(tuned: Tuned, plan: Plan, seeds: int | None, planned: int | None) -> list[Cell]:
    wanted = [_cell(plan, *wish) for wish in needed(tuned, plan.seeds, seeds, [planned])]
    ghost = _ghosts(plan, seeds, tuned.best["deep"]["bn"]) if tuned.best else []
    return wanted + _published(plan, seeds) + ghost


def _ghosts(plan: Plan, seeds: int | None, rate: float) -> list[Cell]:
    count = min(plan.seeds, LEAST_SEEDS) if seeds is None else seeds
    return [
        _cell(plan, 1, seed, "ghost", Trained("deep", f"ghost {m}", rate))
        for seed in range(count)
        for m in GHOSTS
    ]


def _published(plan: Plan, seeds: int | None) -> list[Cell]:
    count = min(plan.seeds, LEAST_SEEDS) if seeds is None else seeds
    return [
        _cell(plan, 1, seed, "published", Trained("deep", norm, PUBLISHED_RATE))
        for seed in range(count)
        for norm in NORMS
    ]


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    # In seconds, about: steps; looks, a step for each distance and more; evaluations.
    step = {"none": 1.4e-3, "bn": 1.9e-3, "l1": 2.5e-3, "linf": 2.5e-3}.get(what.arm, 3.5e-3)
    walks = {"tuning": 0, "published": len(DISTANCES)}.get(part, len(DISTANCES) + len(RELATIVE))
    look = (walks + 2) * 1.5 * step + 0.01 if walks and what.arm not in LP else 0.0
    cost = plan.steps * step + plan.steps / plan.every * look + 2e-5 * min(plan.images, 10000)
    return Cell("smoothness", arm, seed, round(cost, 3), wave)


def looks(rows: Sequence[Row]) -> Seen:
    """The looks along the gradient, by arm, seed and step; those that have numbers."""
    found: Seen = {}
    for row in rows:
        seed, step = row["seed"], row["step"]
        if "loss" in row and isinstance(seed, int) and isinstance(step, int):
            key = tuple(row[name] for name in KEYS)
            found.setdefault(key, {}).setdefault(seed, {})[step] = row
    return found


def _pair(seen: Seen, part: str, rates: Mapping[str, float]) -> dict[int, tuple[Looks, Looks]]:
    """Looks with and without BN, by seed; none where a rate is missing."""
    if not set(NORMS) <= set(rates):
        return {}
    bn, none = (seen.get((part, *Trained("deep", n, rates[n])), {}) for n in NORMS)
    return {seed: (bn[seed], none[seed]) for seed in sorted(bn.keys() & none.keys())}


def smoother_by(
    seen: Seen, part: str, rates: Mapping[str, float], prefix: str = ""
) -> dict[str, dict[int, float]]:
    """Mean over the looks of ln(without) - ln(with), by quantity and seed."""
    pairs = _pair(seen, part, rates)
    found: dict[str, dict[int, float]] = {name: {} for name in QUANTITIES}
    for name, by_seed in found.items():
        for seed, (bn, none) in pairs.items():
            shared = sorted(bn.keys() & none.keys())
            logs = [_log(none[s], prefix + name) - _log(bn[s], prefix + name) for s in shared]
            if logs:
                by_seed[seed] = statistics.fmean(logs)
    return found


def at_equal_loss(seen: Seen, part: str, rates: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """The same, at losses that both arms pass through; a seed without such losses has none."""
    found: dict[str, dict[int, float]] = {name: {} for name in QUANTITIES}
    for seed, arms in _pair(seen, part, rates).items():
        ordered = [sorted(arm.values(), key=lambda row: _log(row, "loss")) for arm in arms]
        x = [[_log(row, "loss") for row in arm] for arm in ordered]
        low, high = max(v[0] for v in x), min(v[-1] for v in x)
        if low >= high:
            continue
        grid = np.linspace(low, high, _GRID)
        for name, by_seed in found.items():
            bn, none = (
                np.interp(grid, at, [_log(row, name) for row in arm])
                for at, arm in zip(x, ordered, strict=True)
            )
            by_seed[seed] = float(np.mean(none - bn))
    return found


def _log(row: Row, name: str) -> float:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a look must have the number {name}, got {value!r}. Repeat that cell.")
    return math.log(max(value, TINY))


def areas(rows: Sequence[Row], part: str, best: Best) -> dict[str, dict[int, float]]:
    """Area of the training loss of each arm by seed, for the seeds that all arms have."""
    found: dict[str, dict[int, dict[int, float]]] = {arm: {} for arm in GROUPS["deep"]}
    for row in rows:
        arm, seed, step, loss = row.get("arm"), row["seed"], row["step"], row.get("train_loss")
        rate = best.get("deep", {}).get(str(arm))
        ours = (row.get("part"), row.get("group"), row.get("rate")) == (part, "deep", rate)
        if ours and isinstance(loss, float) and isinstance(seed, int) and isinstance(step, int):
            found[str(arm)].setdefault(seed, {})[step] = loss
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
    return {
        arm: {seed: statistics.fmean(by_seed[seed].values()) for seed in shared}
        for arm, by_seed in found.items()
    }


def _norms(area: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
    """Area of l1 and linf minus that of BN, in mean areas that BN saves."""
    bn, none = area["bn"], area["none"]
    saved = statistics.fmean(none[s] - bn[s] for s in bn) if bn else 0.0
    if saved <= 0:
        return {arm: {} for arm in LP}
    return {arm: {s: (area[arm][s] - bn[s]) / saved for s in bn} for arm in LP}


def _planned(rows: Sequence[Row], best: Best) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = smoother_by(looks(rows), "pilot", best.get("deep", {}))
    area = areas(rows, "pilot", best)
    if not complete(pilot) or not complete(area):
        return None
    limits = {claim: claims()[claim].thresholds["delta"] for claim in ("smoother", "lp-norm")}
    wanted = [asked_for(pilot, dict.fromkeys(pilot, limits["smoother"]), LEAST_SEEDS, MOST_SEEDS)]
    norms = {arm: by_seed for arm, by_seed in _norms(area).items() if by_seed}
    if norms:
        deltas = dict.fromkeys(norms, limits["lp-norm"])
        wanted.append(asked_for(norms, deltas, EQUIVALENCE_SEEDS, MOST_SEEDS))
    return max(wanted)


# -- one cell -----------------------------------------------------------------------------------


class LpNorm1d(nn.Module):
    """y = gamma (x - mean) / (size + eps) + beta, by the batch; running mean and size in eval mode.

    size: "l1", sqrt(pi / 2) mean |x - mean|; "linf", max |x - mean| / sqrt(2 ln m), m samples.
    """

    mean: Tensor
    size: Tensor

    def __init__(self, width: int, kind: str, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.kind, self.eps, self.momentum = kind, eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("size", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return (x - self.mean) / (self.size + self.eps) * self.weight + self.bias
        mean = x.mean(0)
        off = (x - mean).abs()
        if self.kind == "l1":
            size = math.sqrt(math.pi / 2) * off.mean(0)
        else:
            size = off.amax(0) / math.sqrt(2 * math.log(len(x)))
        with torch.no_grad():
            self.mean.lerp_(mean, self.momentum)
            self.size.lerp_(size, self.momentum)
        return (x - mean) / (size + self.eps) * self.weight + self.bias


def norm_of(arm: str) -> Norm:
    """What stands before each activation."""
    if arm.startswith("ghost"):
        size = int(arm.split()[1])
        return lambda width: GhostBatchNorm1d(width, virtual_batch_size=size)
    return (lambda width: LpNorm1d(width, arm)) if arm in LP else arm == "bn"


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network, and look along the gradient every so many steps."""
    part, rate, plan = str(arm["part"]), float(arm["rate"] or 0.0), PLANS[budget]
    evaluation = "validation" if part == "tuning" else "test"
    train_x, train_y, held_x, held_y = fair_split(data, seed, evaluation)
    held, labels = pixels(held_x[: plan.images], data.pixel_max), held_y[: plan.images]
    units = round(100 * float(arm.get("width") or 1.0))
    sizes = (held.shape[1], *[units] * 5, 10)
    net = MLP(sizes, "relu", norm_of(str(arm["arm"])), stream(seed, "weights"))
    ends = log_steps(plan.steps, 3)[-3:]
    at = range(plan.every, plan.steps + 1, plan.every) if part != "tuning" else ()
    looked = batches(len(train_x), BATCH, stream(seed, "looks"))
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=rate,
        steps=plan.steps,
        order=stream(seed, "order"),
        stops={*at, *ends},
        batch=BATCH,
    )
    for step, loss in training:
        row: Row = {"step": step, "diverged": not math.isfinite(loss)}
        if step in ends:
            row["accuracy"] = accuracy(net, held, labels)
        if step in at and math.isfinite(loss):
            row["train_loss"] = loss
        if step in at and arm["arm"] not in LP:
            index = next(looked)
            batch = pixels(train_x[index], data.pixel_max), train_y[index]
            row |= _look(net, batch, rate, () if part == "published" else RELATIVE)
        yield row


def _look(net: MLP, batch: Any, rate: float, relative: Sequence[float]) -> Row:
    """Both walks from here; nothing where a number is not finite."""
    step = Step(net, cross_entropy, batch)
    found = smoothness.measure(step, {}, distances=DISTANCES, relative=relative, lr=rate)
    names = {"range": "loss_range", "change": "gradient_change", "beta": "beta"}
    numbers = {"loss": step.loss.item()}
    numbers |= {f"raw_{short}": found[name].item() for short, name in names.items()}
    if relative:
        numbers |= {s: found[f"relative_{name}"].item() for s, name in names.items()}
    if not all(map(math.isfinite, numbers.values())):
        return {}
    # Kept rows have a limit of size; no contrast needs more digits.
    return {name: float(f"{value:.7g}") for name, value in numbers.items()}


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """One claim, fair and as published; what is missing makes it inconclusive."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    setting = tuned.setting(
        "smoothness",
        "MLP of five layers",
        unit="share of the area of the training loss that batch normalization saves",
    )
    return [
        _smoother_verdict(tuned),
        _norms_verdict(tuned, setting),
        _ghost_verdict(tuned, setting),
    ]


def _smoother_verdict(tuned: Tuned) -> Verdict:
    seen, rates = looks(tuned.rows), tuned.best.get("deep", {})
    same = dict.fromkeys(NORMS, PUBLISHED_RATE)
    limits = claims()["smoother"].thresholds
    control = helped(tuned.runs, "fair", "deep", rates, limits["control"])
    fair, raw = (
        universal(_named(by), limits["delta"], LEAST_SEEDS)
        for by in (smoother_by(seen, "fair", rates), smoother_by(seen, "published", same, "raw_"))
    )
    beside = {
        "at equal loss": at_equal_loss(seen, "fair", rates),
        "at each best rate, not scale-free": smoother_by(seen, "fair", rates, "raw_"),
    }
    return answered(
        "smoother",
        tuned.setting(
            "smoothness",
            "MLP of five layers",
            unit="natural logarithm of the ratio without / with",
        ),
        Words(
            "loss and gradient change less along the gradient with batch normalization, "
            "scale-free; least so {weakest}",
            "loss and gradient do not all change less along the gradient with batch normalization, "
            "scale-free: {refuted}",
            "the smallest contrast, scale-free, is {weakest}",
        ),
        controlled(fair, control),
        {f"rate {PUBLISHED_RATE:g}, not scale-free": raw},
        delta=limits["delta"],
        pilot=_named(smoother_by(seen, "pilot", rates)),
        planned=_planned(tuned.rows, tuned.best),
        notes=[*tuned.notes(), *control_note(control)],
        beside={
            f"{QUANTITIES[name]}, {where}": by_seed
            for where, by in beside.items()
            for name, by_seed in by.items()
        },
    )


def by_ghost(rows: Sequence[Row], best: Best) -> dict[str, dict[int, list[float]]]:
    """ln of the scale-free beta, and final accuracy in points, by m; one number for each seed."""
    rate = best.get("deep", {}).get("bn")
    runs, seen = collect(rows, KEYS), looks(rows)
    arms = {m: ("ghost", "deep", f"ghost {m}", rate) for m in GHOSTS}
    arms[BATCH] = ("fair", "deep", "bn", rate)  # a ghost as large as the batch
    shared = sorted(set.intersection(*(set(runs.get(a, {})) & set(seen.get(a, {}))
                                       for a in arms.values())))  # fmt: skip
    return {
        "ln beta": {
            m: [statistics.fmean(_log(r, "beta") for r in seen[a][s].values()) for s in shared]
            for m, a in arms.items()
        },
        "accuracy": {m: [runs[a][s].final for s in shared] for m, a in arms.items()},
    }


def spearman(values: Sequence[float]) -> tuple[float, float]:
    """Correlation of the ranks with the order, and the exact p of one that is so small or smaller.

    Of all orders of the values; equal values have the mean of their ranks. All equal: 0 and 1.

    >>> spearman([5, 4, 3, 2])
    (-1.0, 0.041666666666666664)
    """
    ranks = rankdata(values) - (len(values) + 1) / 2
    order = np.arange(len(values)) - (len(values) - 1) / 2
    scale = math.sqrt(float(ranks @ ranks) * float(order @ order))
    if scale == 0:
        return 0.0, 1.0
    every = np.array(list(itertools.permutations(ranks))) @ order
    found = float(ranks @ order)
    return found / scale, float(np.mean(every <= found + 1e-9))


def _ghost_verdict(tuned: Tuned, setting: Setting) -> Verdict:
    level = claims()["ghost-less-smooth"].thresholds["p"]
    sizes = ", ".join(str(m) for m in (*GHOSTS, BATCH))
    notes = [*tuned.notes(), f"Ghost sizes {sizes}; 5 seeds, no pilot."]
    cells: dict[str, Outcome] = {}
    for name, by_m in by_ghost(tuned.rows, tuned.best).items():
        count = min(len(values) for values in by_m.values())
        if count < LEAST_SEEDS:
            cells[name] = Outcome("inconclusive", None, f"{count} of at least {LEAST_SEEDS} seeds")
            continue
        means = [statistics.fmean(values) for values in by_m.values()]
        rho, falls = spearman(means)
        _, rises = spearman([-mean for mean in means])
        status = "supported" if falls < level else "refuted" if rises < level else "inconclusive"
        reason = f"correlation of the means {rho:+.2f}, p = {falls:.3f}"
        own = [spearman(one)[0] for one in zip(*by_m.values(), strict=True)]
        cells[name] = Outcome(status, interval(own), reason, p=min(1.0, 2 * falls))
        each = ", ".join(f"{m}: {mean:.2f}" for m, mean in zip(by_m, means, strict=True))
        notes.append(f"Mean {name} by m: {each}; {reason} (falls), {rises:.3f} (rises).")
    statuses = {cell.status for cell in cells.values()}
    status = (
        "refuted" if "refuted" in statuses
        else "supported" if statuses == {"supported"} else "inconclusive"
    )  # fmt: skip
    means_of = {n: c.interval.mean for n, c in cells.items() if c.interval}
    weakest = max(means_of, key=lambda name: means_of[name]) if means_of else None
    ps = [cell.p for cell in cells.values() if cell.p is not None]
    verdict = answer(
        "ghost-less-smooth",
        setting._replace(
            condition="all ghost sizes at the best rate of the whole batch",
            unit="Spearman correlation with m",
        ),
        Words(
            "with smaller ghosts effective beta is larger and test accuracy higher: {weakest}",
            "with smaller ghosts effective beta is not larger, or test accuracy not higher: "
            "{refuted}",
            "correlations with the ghost size are at most {weakest}",
        ),
        Outcome(
            status,
            cells[weakest].interval if weakest else None,
            "; ".join(f"{name}: {cell.reason}" for name, cell in cells.items()),
            cells=cells,
            weakest=weakest,
            p=max(ps) if len(ps) == len(cells) else None,
        ),
        {},
        delta=level,
        pilot={},
        planned=None,
        notes=notes,
    )
    return dataclasses.replace(verdict, published_status=None, delta=None)


def _norms_verdict(tuned: Tuned, setting: Setting) -> Verdict:
    limits, notes = claims()["lp-norm"].thresholds, tuned.notes()
    rows, best = tuned.rows, tuned.best
    area = areas(rows, "fair", best)
    saved = superiority(
        [1 - area["bn"][s] / area["none"][s] for s in area["bn"]], limits["control"], LEAST_SEEDS
    )
    if saved.interval:
        notes.append(
            f"Positive control, share of the area of none that BN saves: {span(saved.interval)}, "
            f"{saved.status}."
        )
    parts = {
        f"{arm} − BN": Part(list(v.values()), "equivalence", limits["delta"])
        for arm, v in _norms(area).items()
    }
    found = joint(parts, EQUIVALENCE_SEEDS)
    sizes = {n: abs(c.interval.mean) for n, c in found.cells.items() if c.interval}
    if sizes:
        far = max(sizes, key=lambda name: sizes[name])
        found = dataclasses.replace(found, weakest=far, interval=found.cells[far].interval)
    pilot = {f"{arm} − BN": v for arm, v in _norms(areas(rows, "pilot", best)).items()}
    return fair_verdict(
        "lp-norm",
        setting,
        Words(
            "other norms train as well as batch normalization: farthest is {weakest}",
            "other norms do not train as batch normalization does: {refuted}",
            "the area of the training loss differs most for {weakest}",
        ),
        controlled(found, saved),
        pilot=pilot,
        planned=_planned(rows, best),
        notes=notes,
    )


def _named(by: Mapping[str, Mapping[int, float]]) -> dict[str, list[float]]:
    return {QUANTITIES[name]: list(values.values()) for name, values in by.items()}


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """The three quantities over training, scale-free and as published; the tuning."""
    if not rows:
        return []
    tuned, seen = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])]), looks(rows)
    rates = {norm: tuned.best["deep"][norm] for norm in NORMS} if tuned.best else {}
    both = [
        (
            "fair",
            rates,
            "",
            "scale-free, each network at its best rate",
            "Every weight moves by up to 10 % of its norm.",
        ),
        (
            "published",
            dict.fromkeys(NORMS, PUBLISHED_RATE),
            "raw_",
            f"as published, both at the rate {PUBLISHED_RATE:g}",
            "The walk is that of the source, up to 4 learning rates; it depends on the scale.",
        ),
    ]
    found = []
    for part, by_norm, prefix, how, caption in both:
        panels: list[dict[str, Any]] = []
        ends: list[str] = []
        for name, title in QUANTITIES.items():
            series = [
                _series(seen.get((part, *Trained("deep", n, r)), {}), n, prefix + name)
                for n, r in by_norm.items()
            ]
            series = [s for s in series if s["x"]]
            if series:
                panels.append({"title": title, "series": series})
                last = ", ".join(f"{s['y'][-1]:.3g} {s['name']}" for s in series)
                ends.append(f"{title} {last}")
        title = f"Smoothness of the loss along its gradient on {place(rows)}, {how}"
        if panels:
            found.append(
                {
                    "id": f"smoothness-{part}",
                    "experiment": "smoothness",
                    "kind": "curves",
                    "title": title,
                    "caption": f"{caption} Geometric mean over seeds; the band is their range.",
                    "alt": f"{title}. At the end of training: {'; '.join(ends)}.",
                    "x": {"label": "training step", "log": False},
                    "y": {"label": "along the gradient", "log": True},
                    "panels": panels,
                }
            )
    return found + tuning_figure("smoothness", tuned, "five layers")


def _series(by_seed: Mapping[int, Looks], norm: str, name: str) -> dict[str, Any]:
    by_step: dict[int, list[float]] = {}
    for seen in by_seed.values():
        for step, row in seen.items():
            by_step.setdefault(step, []).append(math.exp(_log(row, name)))
    steps = sorted(by_step)
    return {
        "name": LABELS[norm],
        "style": norm,
        "x": steps,
        "y": [statistics.geometric_mean(by_step[s]) for s in steps],
        "lo": [min(by_step[s]) for s in steps],
        "hi": [max(by_step[s]) for s in steps],
        "n": len(by_seed),
    }
