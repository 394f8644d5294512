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

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row, Scalar
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._nets import MLP
from gammabeta.studies._pairs import curve
from gammabeta.studies._regularization import ghosts, rules
from gammabeta.studies._train import accuracy, batches, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    BAND,
    EQUIVALENCE_SEEDS,
    KEYS,
    LEAST_SEEDS,
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
from gammabeta.studies._verdict import (
    Verdict,
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
DROPOUT = tuple(f"{norm}, {dose}" for norm in NORMS for dose in DOSES)
NOISE = ("none", "bn", "full")
GROUPS = {"dropout": DROPOUT, "noise": NOISE, "ghost": tuple(ghosts.ARMS)}
EVERY = 10  # steps between two looks at the training loss
WORST = 10.0  # a loss above it, or none at all, counts as this


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
            group, tuned, plan.seeds[group], seeds, _main(tuned, group), rules.planned(tuned, group)
        )
    ]
    return [_cell(plan, *wish) for wish in wanted]


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, half as many seeds more than the least."""
    plan = PLANS[budget]
    doses = [f"{norm}, {dose}" for norm in NORMS for dose in (rules.NONE, rules.HALF)]
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
    return settle(rows, GROUPS, plan, runs=rules.runs_of(rows))


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


def _main(tuned: Tuned, group: str) -> list[Trained] | None:
    """All arms of a group; of dropout: none and the best, with and without BN; 0.5 without BN."""
    if group not in tuned.best:
        return None
    arms = list(GROUPS[group])
    if group == "dropout":
        doses = rules.doses_of(tuned)
        both = [arm for norm in NORMS for arm in (f"{norm}, {rules.NONE}", doses[norm])]
        arms = list(dict.fromkeys([*both, f"none, {rules.HALF}"]))
    return [Trained(group, arm, tuned.best[group][arm]) for arm in arms]


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
    plan = PLANS[str(rows[0]["budget"])]
    tuned = _settled(rows, plan)
    return [
        *rules.dropout(tuned, plan.size),
        rules.noise(tuned, plan.noise_size),
        rules.ghost_batches(tuned, plan.size),
    ]


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Test accuracy at the end of training, and how rates and dropouts were chosen."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    tuned, where = _settled(rows, plan), place(rows)
    panels = []
    for norm, title in (("bn", "with batch normalization"), ("none", "without")):
        if "dropout" not in tuned.best:
            continue
        arms = {rules.doses_of(tuned)[norm]: "bn", f"{norm}, {rules.NONE}": "none"}
        series = [
            {**curve(ended, style), "name": arm.partition(", ")[2]}
            for arm, style in arms.items()
            if (ended := tuned.ended("fair", "dropout", arm))
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
