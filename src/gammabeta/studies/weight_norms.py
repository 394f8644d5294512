"""Can the norms of weights before BN be fixed, and their learning rate be any constant?

Both claims rest on one identity: batch normalization (BN) divides by the standard deviation of what
it gets, so that BN(a W x) = BN(W x), and the gradient at a W is 1/a of that at W. A step of rate r
turns the weights w of a unit as one of rate r / |w|^2 turns w / |w|, its effective rate; as
gradients are orthogonal to w, each step makes |w| longer and the effective rate smaller.

Network: pixels-100-100-10, ReLU, BN before each activation, no bias where it follows, bias 0.1 at
the output, weights from a truncated normal distribution with standard deviation sqrt(2 / fan-in).
Batches of 64, 1,000 steps of SGD (5,000 at `full`) without momentum or weight decay, mean
cross-entropy, 5,000 training images drawn for each seed from the first 55,000, PyTorch's defaults
for the layer. All runs of a seed have the same start and batches. Accuracy by running statistics on
the test images, mean at 96, 98 and 100 % of the steps.

Rates. One for all parameters, the best of each arm: highest accuracy on the last 5,000 training
images, mean of seeds 800 and 801, from 0.1, 0.3, 1; a best value at an edge extends the grid for
the arms of a network. Arms: "free" and "fixed" with BN; "free" without BN (bias 0.1 everywhere).
Seeds 900 to 903 are a pilot: they give the numbers of seeds, and are used for nothing else.

norm-fixed (Hoffer et al. 2018). "fixed": after each step the weights of every hidden unit are
    multiplied so that they have the norm of their start. Primary contrast: accuracy, fixed minus
    free, in points, each at its best rate: equivalence, delta = 0.3; 8 to 16 seeds (predicted
    half-width of the 95 % interval delta / 2). Positive control: there is something to fix. In the
    free arm ln of the squared norm, end over start, mean over hidden units, lies above 0.05: its
    effective rate falls by 5 %; else inconclusive. Shown: the same contrast where both train at ten
    times the free arm's best rate, 5 seeds, and that control there.
auto-lr (Arora et al. 2019). The rate of the hidden weights is 0.01, 0.1, 1, 10 or 100, that of all
    else (gamma, beta, output layer) the best of "free". The loss is what is trained: mean
    cross-entropy over the training images (all full batches of 64), by batch statistics, taken
    before training, at about 8 log-spaced steps and at the end; of each run the lowest, its best
    loss. Primary contrast: for each seed ln of the smallest over the largest best loss of its five
    rates; lies above -ln 1.5 (supported: at most a factor of 1.5; refuted: the whole 95 % interval
    says more). 5 to 16 seeds (predicted half-width ln(1.5) / 2). Largest and smallest are taken
    within a seed, so that noise makes the factor larger, never smaller. Shown: the same for the
    rates 0.1 to 10; by the losses up to an earlier step, which tells slow from never; the accuracy,
    smallest minus largest; and all this without BN, 3 seeds.
    No positive control: neither claim says that BN helps.

What its author would call fair. Hoffer et al.: a rate chosen anew for fixed norms. Arora, Li & Lyu:
SGD, a good rate for what is not scale-invariant, and the training loss. Their theorems bound the
gradient after T steps up to constants that depend on the rate; a factor of 1.5 at one T is the
registry's reading of "flat". What would embarrass us: norms that hardly grow in 1,000 steps, so
that fixing them is no change (hence the control, and the shown rate); and training losses near 0,
where a factor of 1.5 is a matter of a few steps. So the accuracies stand beside it.

The sources' networks and images cannot be run here: one verdict each. Changed against the registry:
1,000 steps in place of 1,500; "best loss" and its factor for each seed; BN with l1 and l-infinity
is asked by lp-norm. `tiny` tries the wiring; it decides nothing. On the bundled digits each seed
splits the 1,797 images anew: a demonstration.

Rows: arm fields part ("tuning", "fair", "pilot", "shown"; "rates", "rates-pilot"), group ("bn",
"none"), arm, rate, with "rates" `weights` (the rate of the hidden weights), and optionally width (a
factor on the hidden units); `step`, `accuracy`, `diverged`, at the end `growth` (of the control);
with "rates" `loss`, `diverged`, at the last three steps `accuracy`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._asked import planned
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels
from gammabeta.studies._tuned import (
    EQUIVALENCE_SEEDS,
    LEAST_SEEDS,
    PILOT_SEEDS,
    Best,
    Trained,
    Tuned,
    Wish,
    guess,
    needed,
    own,
    settle,
    trained_figures,
)
from gammabeta.studies._verdict import Verdict
from gammabeta.studies._weight_norms import factors, rules
from gammabeta.studies._weight_norms.runs import growth, hidden, lengths, network, objective, run

CLAIMS = ("norm-fixed", "auto-lr")

GROUPS = {"bn": ("free", "fixed"), "none": ("free",)}


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    evaluations: int
    seeds: int  # of norm-fixed
    other_seeds: int  # of auto-lr
    shown: tuple[int, int]  # seeds at ten times the rate, and without BN
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES, SHOWN = (0.1, 0.3, 1.0), (5, 3)
PLANS = {
    "tiny": Plan(10, 4, 1, 1, (1, 1), (0.3,), 500, False),
    "small": Plan(1000, 8, EQUIVALENCE_SEEDS, LEAST_SEEDS, SHOWN, RATES, 10000, True),
    "full": Plan(5000, 12, EQUIVALENCE_SEEDS, LEAST_SEEDS, SHOWN, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until the grids are settled; then the main runs; pilot; more seeds; what is shown."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    asked = planned(rules.norms(tuned, "pilot"), plan.seeds)
    return _wanted(
        tuned, plan, seeds, asked, planned(rules.rates(tuned, "rates-pilot"), LEAST_SEEDS)
    )


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: grids grow once, norm-fixed takes half as many more."""
    plan = PLANS[budget]
    return _wanted(guess(GROUPS, plan, (3.0,)), plan, seeds, plan.seeds * 3 // 2, plan.other_seeds)


def _wanted(
    tuned: Tuned, plan: Plan, seeds: int | None, asked: int | None, other: int | None
) -> list[Cell]:
    wanted = needed(tuned, plan.seeds, seeds, [asked], _main)
    found = [_cell(plan, wish) for wish in wanted]
    if len(tuned.best) < len(GROUPS):
        return found
    large, without = (n if seeds is None else min(seeds, n) for n in plan.shown)
    tenfold = 10 * tuned.best["bn"]["free"]
    found += [
        _cell(plan, Wish(2, seed, "shown", Trained("bn", arm, tenfold)))
        for seed in range(large)
        for arm in GROUPS["bn"]
    ]
    count = plan.other_seeds if seeds is None else seeds
    bn, none = (Trained(group, "free", tuned.best[group]["free"]) for group in GROUPS)
    runs = [Wish(1, seed, "rates", bn) for seed in range(count)]
    runs += [Wish(2, seed, "rates", none) for seed in range(without)]
    if seeds is None and plan.decides:
        runs += [Wish(2, seed, "rates-pilot", bn) for seed in PILOT_SEEDS]
        runs += [Wish(3, seed, "rates", bn) for seed in range(count, other or 0)]
    return found + [_cell(plan, wish, rate) for wish in runs for rate in rules.WEIGHTS]


def _main(best: Best) -> list[Trained]:
    return [Trained("bn", arm, best["bn"][arm]) for arm in GROUPS["bn"]]


def _cell(plan: Plan, wish: Wish, weights: float | None = None) -> Cell:
    arm: dict[str, Scalar] = {"part": wish.part, **wish.what._asdict()}
    # In seconds, about: steps, and looks at the evaluation and training images.
    looks = 3 * 6e-6 * min(plan.images, 5000 if wish.part == "tuning" else 10000)
    if weights is not None:
        arm["weights"] = weights
        looks += 0.04 * plan.evaluations
    return Cell("weight-norms", arm, wish.seed, round(plan.steps * 1.1e-3 + looks, 3), wish.wave)


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network: a row for each look."""
    plan, part, weights = PLANS[budget], str(arm["part"]), arm.get("weights")
    x, y, held_x, held_y = fair_split(data, seed, "validation" if part == "tuning" else "test")
    held, labels = pixels(held_x[: plan.images], data.pixel_max), held_y[: plan.images]
    net = network(held.shape[1], arm["group"] == "bn", seed, float(arm.get("width") or 1.0))
    first = [lengths(w) for w in hidden(net)]
    stops = log_steps(plan.steps, plan.evaluations)
    last = stops[-3:]
    if weights is not None:
        yield {"step": 0, "loss": objective(net, x, y, data.pixel_max), "diverged": False}
    training = run(
        net,
        x,
        y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=plan.steps,
        seed=seed,
        stops=last if weights is None else stops,
        weights=None if weights is None else float(weights),
        fixed=arm["arm"] == "fixed",
    )
    for step, diverged in training:
        row: Row = {"step": step, "diverged": diverged}
        if step in last:
            row["accuracy"] = accuracy(net, held, labels)
        if weights is not None:
            row |= _finite("loss", objective(net, x, y, data.pixel_max))
        elif step == last[-1]:
            row |= _finite("growth", growth(net, first))
        yield row


def _finite(name: str, value: float) -> Row:
    """The number with six digits, nothing if it is not finite."""
    return {name: float(f"{value:.6g}")} if math.isfinite(value) else {}


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """Two claims; what is missing makes them inconclusive."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    tuned = settle(rows, GROUPS, plan)
    return [
        rules.fixed_norms(tuned),
        rules.any_rate(tuned, log_steps(plan.steps, plan.evaluations)),
    ]


_AXES = {
    "loss": Axes(
        "Lowest training loss by the rate of the hidden weights", "rate of the hidden weights",
        "training loss", True, True, "All else at its best rate.",
    )
}  # fmt: skip


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Best losses over the rates of the hidden weights; accuracies; how rates were chosen."""
    if not rows:
        return []
    points: list[Row] = [
        {"kind": "curve", "curve": "loss", "series": name, "x": rate, "y": loss}
        for group, name in (("bn", "with BN"), ("none", "without"))
        for rate, by in factors.best(rows, "rates", group).items()
        for loss in by.values()
    ]
    return [
        *drawings("weight-norms", _AXES, points),
        *trained_figures(
            "weight-norms",
            settle(rows, GROUPS, PLANS[str(rows[0]["budget"])]),
            "Test accuracy on {where} with fixed and with free norms",
            "Each arm at its best learning rate.",
            "by network",
            plain=("none",),
        ),
    ]
