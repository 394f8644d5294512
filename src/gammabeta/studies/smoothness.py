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

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row, Scalar
from gammabeta.layers.ghost import GhostBatchNorm1d
from gammabeta.probes import smoothness
from gammabeta.probes.step import Step
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._nets import MLP, Norm
from gammabeta.studies._pairs import LABELS, NORMS
from gammabeta.studies._smoothness import rules
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
    LEAST_SEEDS,
    Trained,
    Tuned,
    guess,
    needed,
    own,
    place,
    settle,
    tuning_figure,
)
from gammabeta.studies._verdict import (
    Verdict,
)

CLAIMS = ("smoother", "lp-norm", "ghost-less-smooth")

LP = ("l1", "linf")
GROUPS = {"deep": (*NORMS, *LP)}
DISTANCES = (0.5, 1.0, 2.0, 4.0)  # in learning rates
RELATIVE = (0.003, 0.01, 0.03, 0.1)  # in norms of each weight
BATCH = 128


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


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """As published, and tuning until the grid is settled; the main runs; pilot; more seeds."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    return _wanted(tuned, plan, seeds, rules.planned(tuned))


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
        for m in rules.GHOSTS
    ]


def _published(plan: Plan, seeds: int | None) -> list[Cell]:
    count = min(plan.seeds, LEAST_SEEDS) if seeds is None else seeds
    return [
        _cell(plan, 1, seed, "published", Trained("deep", norm, rules.PUBLISHED_RATE))
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
        rules.smoother(tuned),
        rules.other_norms(tuned, setting),
        rules.ghosts(tuned, setting, BATCH),
    ]


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """The three quantities over training, scale-free and as published; the tuning."""
    if not rows:
        return []
    tuned, seen = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])]), rules.looks(rows)
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
            dict.fromkeys(NORMS, rules.PUBLISHED_RATE),
            "raw_",
            f"as published, both at the rate {rules.PUBLISHED_RATE:g}",
            "The walk is that of the source, up to 4 learning rates; it depends on the scale.",
        ),
    ]
    found = []
    for part, by_norm, prefix, how, caption in both:
        panels: list[dict[str, Any]] = []
        ends: list[str] = []
        for name, title in rules.QUANTITIES.items():
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


def _series(by_seed: Mapping[int, rules.Looks], norm: str, name: str) -> dict[str, Any]:
    by_step: dict[int, list[float]] = {}
    for seen in by_seed.values():
        for step, row in seen.items():
            by_step.setdefault(step, []).append(math.exp(rules.log(row, name)))
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
