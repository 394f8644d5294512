"""Is there a best batch size for batch normalization, and do ghost batches help large ones?

The statistics of batch normalization (BN) are those of a batch, and noisier the smaller it is.
Viceroy's article and Kainz's lecture: a batch of 512 instead of 64 reduces that noise and so the
regularization (bigger-batch-less-reg); a batch that is too large injects too little of it
(batch-too-large); one that is too small, too much: the best lies in the middle, at 50 to 100 in the
D2L book (batch-U). Hoffer et al. 2017, and Summers & Dinneen 2020: large batches generalize worse,
and statistics of small parts of the batch ("ghost batches") win part of that back (ghost-bn).

A larger batch changes SGD as well. What these claims say of BN is tested with the SGD batch fixed
and statistics over m of its images.

Networks: pixels-100-100-10, ReLU, BN before each activation, weights from a truncated normal
distribution with standard deviation sqrt(2 / fan-in). SGD without momentum, mean cross-entropy,
PyTorch's defaults for the layer, evaluation by running statistics; those of ghosts get one update a
step, from all ghosts merged. Arms of a seed have the same start, images and batches.

Sizes (group "size"; the first three claims)
    2,000 training images drawn for each seed from the first 55,000, SGD batches of 512, 100 steps
    (26 epochs; 1,500 at `full`). Arms: m = 4, 16, 64, 128, 512, and "all": statistics of all
    training images, which all pass through the network at every step, with the loss of the same 512
    as in the other arms and the gradient through the statistics.
    bigger-batch-less-reg. Primary contrast: gap between training and test accuracy (points, mean at
        96, 98 and 100 % of the steps) at m = 512 minus at m = 64: superiority, delta = 0.2.
    batch-too-large. The best size in the middle is that of 16, 64, 128 with the highest validation
        accuracy at its best rate. Primary contrast: test accuracy, that size minus "all", in
        points: superiority, delta = 0.3. Shown: the gap, "all" minus that size, which the claim
        gives as the reason.
    batch-U. All of these have to hold (refuted by any at 1 - 0.05/5). Least-squares parabola of
        test accuracy over log2 m, for each seed: its curvature lies below 0; its slope lies above 0
        at m = 8 and below 0 at m = 256, so that the best m lies between them. And test accuracy at
        the best size in the middle, as above, minus that at m = 4, and minus that of "all":
        superiority, delta = 0.3: a parabola through a curve that only levels off has a best point
        as well, and a curve that hardly moves is no sensitivity to the batch size. The primary one
        is the slope at 256, on which the texts differ from "the larger the better".
    Shown: gap and test accuracy at m = 512 minus those of SGD batches of 64, as many images, the
    rate scaled by the batch, as the texts would have done it.
Ghosts of a large batch (group "large"; ghost-bn)
    5,000 images, SGD batches of 2,048, 30 steps (15 epochs: an epoch has two whole batches; 500 at
    `full`). Arms: "whole" (statistics of all 2,048), ghosts of 16, 64, 128; and "small", batches of
    128 for as many images. The best ghost is that with the highest validation accuracy.
    Primary contrast: test accuracy, best ghost - whole, in points: superiority, delta = 0.2.
    Positive control: there is a gap to close, small - whole, superiority, delta = 0.2. Shown: the
    three ghosts on validation, and the share of the gap that is closed.

Each arm trains at its own best learning rate: highest accuracy on the last 5,000 training images,
mean of seeds 800 and 801, from 0.3, 1, 3; a best value at an edge extends the grid for all arms of
the group. Seeds 900 to 903 are a pilot: they give the number of seeds of each group (5 to 16;
predicted half-width of the 95 % interval delta / 2 in each contrast of a size that was chosen, and
in that of the gaps), and are used for nothing else.
No positive control for the first three: they say what the noise of BN does, not why BN helps.

What its author would call fair: nothing but the noise of the statistics differs, each size has its
rate, and the middle may choose its best size while the ends may not. What would embarrass us: an
optimum that is the parabola's and not the curve's (hence the last two parts), or a gap that is
nothing but the test error because training accuracy is 100 % in all arms (the card says where it
ends). Of ghost-bn: ghosts that win by a rate the whole batch was not offered; both have the same
trials. 30 steps are few: Hoffer et al. say themselves that more updates close the gap.

Changed against the registry: these sizes; the slopes of the parabola in place of a bootstrap of its
best point, which is the same question, since below 20 seeds a bootstrap covers too little; the last
two parts of batch-U; delta and the control of ghost-bn, whose rule said no more than "above 0"; one
real batch size beside 512. The sources have no setting that could be run again: one verdict. `tiny`
tries the wiring; it decides nothing. On the bundled digits (1,000 training images) a demonstration.

Rows: arm fields part ("tuning", "fair", "pilot", "real"), group, arm, rate, and optionally width (a
factor on the hidden units); three rows of `step`, `accuracy`, `train_accuracy`, `diverged`.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row, Scalar
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.layers.ghost import GhostBatchNorm1d
from gammabeta.studies._answer import Words
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._nets import MLP
from gammabeta.studies._outcomes import alone, asked_for, beside
from gammabeta.studies._pairs import gains
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._train import accuracy, batches, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    LEAST_SEEDS,
    MOST_SEEDS,
    TUNING_SEEDS,
    Trained,
    Tuned,
    Wish,
    complete,
    fair_verdict,
    guess,
    needed_in,
    own,
    place,
    settle,
    shown,
    trials,
    tuning_figure,
)
from gammabeta.studies._verdict import Verdict, controlled, interval, superiority

CLAIMS = ("bigger-batch-less-reg", "batch-too-large", "batch-U", "ghost-bn")

ALL, WHOLE, SMALL = "all", "whole", "small"
SIZES = {f"m = {m}": m for m in (4, 16, 64, 128, 512)}
MIDDLE = ("m = 16", "m = 64", "m = 128")
GHOSTS = {f"ghosts of {m}": m for m in (16, 64, 128)}
GROUPS = {"size": (*SIZES, ALL), "large": (WHOLE, *GHOSTS, SMALL)}
REAL = 64
LOW, HIGH = 8, 256
_GAPS = "gap at m = 512 − at m = 64"
_TOO_LARGE, _TOO_SMALL = "best in the middle − all", "best in the middle − m = 4"
_GHOST, _CONTROL = "best ghosts − whole batch", "small batch − whole batch"


class Plan(NamedTuple):
    """What a budget stands for."""

    size: int  # training images
    steps: int
    batch: int
    large_size: int
    large_steps: int
    large_batch: int
    small_batch: int
    seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.3, 1.0, 3.0)
PLANS = {
    "tiny": Plan(1000, 2, 512, 1000, 2, 512, 128, 1, (0.3,), 500, False),
    "small": Plan(2000, 100, 512, 5000, 30, 2048, 128, LEAST_SEEDS, RATES, 10000, True),
    "full": Plan(2000, 1500, 512, 5000, 500, 2048, 128, LEAST_SEEDS, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Of each group: tuning until the grid is settled; then the main runs; pilot; more seeds."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    wanted = [
        wish
        for group in GROUPS
        for wish in needed_in(
            group, tuned, plan.seeds, seeds, _main(tuned, group), _planned(tuned, group)
        )
    ]
    return [_cell(plan, *wish) for wish in wanted + _real(plan, tuned, seeds)]


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: grids grow by one rate, the pilot asks for many seeds."""
    plan = PLANS[budget]
    tuned = guess(GROUPS, plan, (10.0,), 1.0)
    main = {"size": GROUPS["size"], "large": (WHOLE, "ghosts of 64", SMALL)}
    wanted = [
        wish
        for group, arms in main.items()
        for wish in needed_in(
            group, tuned, plan.seeds, seeds, [Trained(group, arm, 1.0) for arm in arms], 12
        )
    ]
    return [_cell(plan, *wish) for wish in wanted + _real(plan, tuned, seeds)]


def _real(plan: Plan, tuned: Tuned, seeds: int | None) -> list[Wish]:
    """Small SGD batches, at the rate of m = 512 scaled by the batch."""
    if "size" not in tuned.best:
        return []
    count = plan.seeds if seeds is None else seeds
    return [Wish(1, seed, "real", _real_arm(plan, tuned)) for seed in range(count)]


def _real_arm(plan: Plan, tuned: Tuned) -> Trained:
    return Trained("size", f"batch of {REAL}", tuned.best["size"]["m = 512"] * REAL / plan.batch)


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    # In seconds, about: steps, by their images and by what each costs, and evaluations.
    steps, batch, ghost = _shape(plan, part, what.group, what.arm)
    size = plan.size if what.group == "size" else plan.large_size
    passed = size if ghost == 0 else batch
    step = 1.0e-3 + 6.3e-6 * passed + (1.2e-3 if 0 < ghost < batch else 0.0)
    seen = 3 * (min(plan.images, 5000 if part == "tuning" else 10000) + size)
    return Cell("batch-noise", arm, seed, round(steps * step + 4e-6 * seen, 3), wave)


def _shape(plan: Plan, part: str, group: str, arm: str) -> tuple[int, int, int]:
    """Steps, SGD batch, and images whose statistics normalize (0: all of the training set)."""
    if part == "real":
        return plan.steps * plan.batch // REAL, REAL, REAL
    if group == "size":
        return plan.steps, plan.batch, SIZES.get(arm, 0)
    if arm == SMALL:
        steps = plan.large_steps * plan.large_batch // plan.small_batch
        return steps, plan.small_batch, plan.small_batch
    return plan.large_steps, plan.large_batch, GHOSTS.get(arm, plan.large_batch)


def _main(tuned: Tuned, group: str) -> list[Trained] | None:
    """All sizes; of the large batch: whole, the best ghosts, small."""
    if group not in tuned.best:
        return None
    arms = GROUPS[group] if group == "size" else (WHOLE, _champion(tuned, group), SMALL)
    return [Trained(group, arm, tuned.best[group][arm]) for arm in arms]


def _champion(tuned: Tuned, group: str) -> str:
    """The size in the middle, or the ghosts, that are best on validation."""
    return tuned.champion(group, MIDDLE if group == "size" else tuple(GHOSTS))


def parabola(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Curvature, slope at log2 m = 3 and slope at log2 m = 8 of the least-squares parabola.

    >>> [round(v, 6) for v in parabola([2, 4, 6, 7, 9], [-9, -1, -1, -4, -16])]
    [-2.0, 4.0, -6.0]
    """
    second, first, _ = np.polyfit(x, y, 2)
    low, high = (2 * second * math.log2(m) + first for m in (LOW, HIGH))
    return float(2 * second), float(low), float(high)


def _u_parts(tuned: Tuned, part: str) -> dict[str, dict[int, float]]:
    """The five numbers of batch-U by seed, all of them in the direction of the claim."""
    names = (f"−slope at m = {HIGH}", f"slope at m = {LOW}", "−curvature")
    size = PLANS[str(tuned.rows[0]["budget"])].size if tuned.rows else 1
    by = {arm: tuned.ended(part, "size", arm) for arm in GROUPS["size"]}
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in by.values())))
    x = [math.log2(m) for m in (*SIZES.values(), size)]
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    for seed in shared:
        bend, low, high = parabola(x, [by[arm][seed].final for arm in GROUPS["size"]])
        for name, value in zip(names, (-high, low, -bend), strict=True):
            found[name][seed] = value
    champion = _champion(tuned, "size")
    for name, other in ((_TOO_SMALL, "m = 4"), (_TOO_LARGE, ALL)):
        found[name] = gains(by[champion], by[other])
    return found


def _planned(tuned: Tuned, group: str) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    of = {claim: claims()[claim].thresholds["delta"] for claim in CLAIMS}
    champion = _champion(tuned, group)
    if group == "large":
        pilot = {_GHOST: tuned.minus("pilot", group, champion, WHOLE)}
        deltas = {_GHOST: of["ghost-bn"]}
    else:
        pilot = {
            _GAPS: tuned.gaps().minus("pilot", group, "m = 512", "m = 64"),
            _TOO_SMALL: tuned.minus("pilot", group, champion, "m = 4"),
            _TOO_LARGE: tuned.minus("pilot", group, champion, ALL),
        }
        deltas = {_GAPS: of["bigger-batch-less-reg"], _TOO_SMALL: of["batch-U"]}
        deltas[_TOO_LARGE] = of["batch-too-large"]
    return asked_for(pilot, deltas, LEAST_SEEDS, MOST_SEEDS) if complete(pilot) else None


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network; training and held-out accuracy at the end, three times."""
    plan, part, group, name = PLANS[budget], str(arm["part"]), str(arm["group"]), str(arm["arm"])
    steps, batch, ghost = _shape(plan, part, group, name)
    size = plan.size if group == "size" else plan.large_size
    evaluation = "validation" if part == "tuning" else "test"
    train_x, train_y, held_x, held_y = fair_split(data, seed, evaluation, size)
    seen, held = (pixels(x, data.pixel_max) for x in (train_x, held_x[: plan.images]))
    batch = min(batch, len(train_x))

    def norm(width: int) -> nn.Module:
        if 0 < ghost < batch:
            return GhostBatchNorm1d(width, virtual_batch_size=ghost)
        return BatchNorm1d(width)

    units = round(100 * float(arm.get("width") or 1.0))
    net = MLP((seen.shape[1], units, units, 10), "relu", norm, stream(seed, "weights"))
    rate, order = float(arm["rate"] or 0.0), stream(seed, "order")
    stops = log_steps(steps, 3)[-3:]
    if ghost == 0:
        training = _with_all(net, seen, train_y, rate, steps, order, stops, batch)
    else:
        training = train(
            net,
            train_x,
            train_y,
            pixel_max=data.pixel_max,
            rate=rate,
            steps=steps,
            order=order,
            stops=stops,
            batch=batch,
        )
    for step, loss in training:
        yield {
            "step": step,
            "accuracy": accuracy(net, held, held_y[: plan.images]),
            "train_accuracy": accuracy(net, seen, train_y),
            "diverged": not math.isfinite(loss),
        }


def _with_all(
    net: MLP,
    x: Tensor,
    labels: Tensor,
    rate: float,
    steps: int,
    order: torch.Generator,
    stops: Sequence[int],
    batch: int,
) -> Iterator[tuple[int, float]]:
    """Training as ``train`` does it, with the statistics of all of x at every step."""
    parameters = list(net.parameters())
    net.train()
    for step, index in zip(range(1, steps + 1), batches(len(x), batch, order), strict=False):
        # The same images bear the loss; the statistics are those of what passes the network.
        loss = cross_entropy(net(x)[index], labels[index])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)
        if step in stops:
            yield step, loss.item()


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """All claims, fair; what is missing makes them inconclusive."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    return [*_size_verdicts(tuned), _ghost_verdict(tuned)]


def _ended(tuned: Tuned, arms: Sequence[str], label: str) -> list[str]:
    """A note with what each size ends with."""
    said = [
        f"{arm} {statistics.fmean(run.final for run in ended.values()):.2f}"
        for arm in arms
        if (ended := tuned.ended("fair", "size", arm))
    ]
    return [f"{label}: {', '.join(said)}."] if said else []


def _size_verdicts(tuned: Tuned) -> list[Verdict]:
    plan, gaps, notes = PLANS[str(tuned.rows[0]["budget"])], tuned.gaps(), tuned.notes("size")
    setting = tuned.setting(
        "batch-noise",
        f"MLP 100-100 on {plan.size:,} images, SGD batches of {plan.batch}",
        "each size at its best learning rate",
    )
    of = {claim: claims()[claim].thresholds["delta"] for claim in CLAIMS}
    notes += _ended(tuned, GROUPS["size"], "Test accuracy (%)")
    notes += _ended(gaps, GROUPS["size"], "Gap (points)")
    planned, middle = _planned(tuned, "size"), _champion(tuned, "size")
    if "size" in tuned.best:
        notes.append(f"Best size in the middle, chosen on validation: {middle}.")
    by_gap = gaps.minus("fair", "size", "m = 512", "m = 64")
    first = fair_verdict(
        "bigger-batch-less-reg",
        setting._replace(unit="points of the gap between training and test accuracy"),
        Words(
            "the gap between training and test accuracy is larger with the smaller noise: "
            "{weakest}",
            "the gap between training and test accuracy does not grow by {delta} points with "
            "statistics of 512 images instead of 64: {refuted}",
            "the gap changes by {weakest}",
        ),
        alone(_GAPS, superiority(by_gap.values(), of["bigger-batch-less-reg"], LEAST_SEEDS)),
        pilot={_GAPS: gaps.minus("pilot", "size", "m = 512", "m = 64")},
        planned=planned,
        notes=notes,
    )
    real = []
    for label, what in (("gap", gaps), ("test accuracy", tuned)) if "size" in tuned.best else ():
        small = what.runs.get(("real", *_real_arm(plan, tuned)), {})
        change = gains(what.ended("fair", "size", "m = 512"), small)
        name = f"{label} at m = 512 − with SGD batches of {REAL}"
        real += shown(name, list(change.values()))

    parts, pilot = (_u_parts(tuned, part) for part in ("fair", "pilot"))
    large = parts[_TOO_LARGE]
    second = fair_verdict(
        "batch-too-large",
        setting,
        Words(
            "statistics of a middle size gain test accuracy over those of all images: {weakest}",
            "statistics of a middle size do not gain {delta} points over those of all images: "
            "{refuted}",
            "the difference is {weakest}",
        ),
        alone(_TOO_LARGE, superiority(large.values(), of["batch-too-large"], LEAST_SEEDS)),
        pilot={_TOO_LARGE: pilot[_TOO_LARGE]},
        planned=planned,
        notes=notes,
    )
    wider = gaps.minus("fair", "size", ALL, middle)
    why = shown("gap, all − best in the middle", list(wider.values()))
    outcome = joint(
        {
            name: Part(
                list(by_seed.values()),
                *(("superiority", of["batch-U"]) if "best" in name else ("above", 0.0)),
            )
            for name, by_seed in parts.items()
        },
        LEAST_SEEDS,
    )
    third = fair_verdict(
        "batch-U",
        setting._replace(unit="points of accuracy (per doubling of m, for slopes)"),
        Words(
            "test accuracy has its best size between 8 and 256, and falls on both sides: {weakest}",
            "test accuracy has no best size between 8 and 256 from which it falls on both sides: "
            "{refuted}",
            "beyond the middle test accuracy changes so: {weakest}",
        ),
        outcome,
        pilot=pilot,
        planned=planned,
        notes=notes,
    )
    return [beside(first, real), beside(second, why), beside(third, real)]


def _ghost_verdict(tuned: Tuned) -> Verdict:
    claim, plan = "ghost-bn", PLANS[str(tuned.rows[0]["budget"])]
    delta, notes = claims()[claim].thresholds["delta"], tuned.notes("large")
    ghosts = _champion(tuned, "large")
    gain = tuned.minus("fair", "large", ghosts, WHOLE)
    gap = tuned.minus("fair", "large", SMALL, WHOLE)
    control = superiority(gap.values(), delta, LEAST_SEEDS)
    if "large" in tuned.best:
        tried = trials(tuned.runs, "large")
        said = []
        for arm, rate in tuned.best["large"].items():
            finals = [tried[arm, rate][seed].final for seed in TUNING_SEEDS]
            said.append(f"{arm} {statistics.fmean(finals):.2f}")
        notes.append(f"Validation accuracy at the best rate (%): {', '.join(said)}.")
        notes.append(f"Best ghosts, chosen on validation: {ghosts}.")
    if len(gap) > 1 and len(gain) > 1:
        open_, closed = interval(gap.values()).mean, interval(gain.values()).mean
        part = f"{100 * closed / open_:.0f} % of it is closed" if open_ > 0 else "nothing to close"
        notes.append(f"Gap to small batches: {open_:.2f} points, {control.status}; {part}.")
    verdict = fair_verdict(
        claim,
        tuned.setting(
            "batch-noise",
            f"MLP 100-100 on {plan.large_size:,} images, SGD batches of {plan.large_batch:,}",
            "each size at its best learning rate",
        ),
        Words(
            "ghost batches win back accuracy that large batches lose: {weakest}",
            "ghost batches do not gain {delta} points over statistics of the whole batch: "
            "{refuted}",
            "the gain is {weakest}",
        ),
        alone(_GHOST, controlled(superiority(gain.values(), delta, LEAST_SEEDS), control)),
        pilot={_GHOST: tuned.minus("pilot", "large", ghosts, WHOLE)},
        planned=_planned(tuned, "large"),
        notes=notes,
    )
    return beside(verdict, shown(_CONTROL, list(gap.values()), "control"))


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Test accuracy and gap over the ghost size, and how the rates were chosen."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    tuned, where = settle(rows, GROUPS, plan), place(rows)
    points: list[Row] = []
    for curve, what in (("accuracy", tuned), ("gap", tuned.gaps())):
        for arm in GROUPS["size"]:
            ended = what.ended("fair", "size", arm)
            head: Row = {"kind": "curve", "curve": curve, "series": "ghost batches"}
            head["x"] = float(SIZES.get(arm, plan.size))
            points += [{**head, "y": run.final} for run in ended.values()]
    caption = f"SGD batches of {plan.batch}; the last size is all training images."
    x = "images whose statistics normalize"
    axes = {
        "accuracy": Axes(f"Test accuracy on {where} over the size of the statistics' batch", x,
                         "accuracy (%)", x_log=True, caption=caption),
        "gap": Axes(f"Gap between training and test accuracy on {where} over that size", x,
                    "gap (points)", x_log=True, caption=caption),
    }  # fmt: skip
    drawn = drawings("batch-noise", axes, points)
    return [*drawn, *tuning_figure("batch-noise", tuned, "sizes")]
