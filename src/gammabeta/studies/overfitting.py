"""Does batch normalization reduce overfitting?

The claim (bn-overfit) is a conclusion of the MNIST study (Chang et al. 2017) and of three further
texts; none of them measured it. Overfitting is measured as the gap between training and test
accuracy of a network that has learned its training images by heart.

Network: pixels-200-200-10, ReLU, batch normalization before each activation in one arm, no bias
where it follows, bias 0.1 elsewhere, weights from a truncated normal distribution with standard
deviation sqrt(2 / fan-in). 1,000 training images drawn for each seed from the first 55,000 (2,000
at `full`), batches of 256, stochastic gradient descent without momentum on the mean cross-entropy,
600 steps (1,500 at `full`). PyTorch's defaults for the layer; everything is evaluated by running
statistics. Both arms of a pair start from the same weights and see the same batches.

Matched
    A network that has trained less overfits less, whatever its layers. So the two arms are
    compared at the same training loss: every 10 steps the loss over all training images is taken,
    and the gap is that of the first time that it is at most 0.01. By then every training image is
    labeled rightly, or nearly so; training accuracy and loss at that point are printed. A run that
    does not come so far has no gap and is counted; if that is more than half of the runs of either
    arm, the claim is inconclusive.

Fair (the only verdict: the sources have no setting of their own)
    Each arm trains at its own best learning rate: highest accuracy at the end of training on the
    last 5,000 training images, mean of seeds 800 and 801, from 0.1, 0.3, 1, 3. A best value at
    an edge extends the grid for both arms until it lies inside. A rate that does not reach the
    training loss within the steps, or at which a loss was not finite, is not chosen.
    Seeds 900 to 903 are a pilot: they give the number of seeds (5 to 16; predicted half-width of
    the 95 % interval delta / 2), and are used for nothing else.

Primary contrast: gap (training minus test accuracy, in points) without minus with batch
normalization, at the matched training loss: superiority, delta = 0.3 points.

Positive control: the claim says why batch normalization helps, so it is judged only where it does:
test accuracy at the end of training (mean at 96, 98 and 100 % of the steps), with minus without, in
the same runs: superiority, delta = 0.3 points. Where that is not supported, the verdict is
inconclusive: nothing to explain. With both arms at 100 % training accuracy gap and control differ
only in when they look.

Secondary: the same gap in cross-entropy, test minus training loss.

Changed against the registry: 784-200-200-10 and batches of 256 as its section on budgets says; one
size of the training set for each budget. `tiny` tries the wiring with 300 images and one rate; it
decides nothing. The bundled digits are a demonstration: each seed splits the 1,797 images anew.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import PLACES, Setting, Words, answer, span
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._nets import MLP
from gammabeta.studies._pairs import (
    LABELS,
    NORMS,
    Run,
    Runs,
    Tuning,
    collect,
    curve,
    curves,
    gains,
    rates_curve,
    tune,
)
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._verdict import (
    Outcome,
    Verdict,
    controlled,
    interval,
    planned_n,
    superiority,
)

CLAIMS = ("bn-overfit",)

TUNING_SEEDS = (800, 801)
PILOT_SEEDS = (900, 901, 902, 903)
LEAST_SEEDS, MOST_SEEDS = 5, 16
RATES = (0.1, 0.3, 1.0, 3.0)
LEARNED = 0.01  # the training loss at which arms are compared
EVERY = 10
_ARM = ("part", "norm", "rate")
_CONTRAST = "gap without − with"

Matches = dict[tuple[str, float], dict[int, Row]]  # arm and rate -> seed -> the matched point


class Plan(NamedTuple):
    """What a budget stands for."""

    size: int  # training images
    steps: int
    seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


PLANS = {
    "tiny": Plan(300, 20, 2, (1.0,), 1000, False),
    "small": Plan(1000, 600, 5, RATES, 10000, True),
    "full": Plan(2000, 1500, 5, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until the grid is settled; then the main runs; pilot; more seeds."""
    plan = PLANS[budget]
    rows = [r for r in rows if (r["budget"], r["data"]) == (budget, data)]
    runs = collect(rows, _ARM)
    tuning = _tuning(runs, plan)
    wanted = [
        _cell(plan, 0, seed, "tuning", norm, rate)
        for seed in TUNING_SEEDS
        for rate in tuning.grid
        for norm in NORMS
    ]
    if tuning.best is None:
        return wanted
    wanted += _main(plan, tuning.best, seeds)
    if seeds is None and plan.decides:
        planned = _planned(runs, _matches(rows, "pilot"), tuning.best)
        for seed in range(plan.seeds, planned or 0):
            wanted += [_cell(plan, 3, seed, "fair", n, tuning.best[n]) for n in NORMS]
    return wanted


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for twice the least seeds."""
    plan = PLANS[budget]
    best = dict.fromkeys(NORMS, plan.rates[0])
    wanted = cells(budget, data, seeds, []) + _main(plan, best, seeds)
    if seeds is None and plan.decides:
        for seed in range(plan.seeds, 2 * LEAST_SEEDS):
            wanted += [_cell(plan, 3, seed, "fair", n, best[n]) for n in NORMS]
    return wanted


def _main(plan: Plan, best: Mapping[str, float], seeds: int | None) -> list[Cell]:
    count = plan.seeds if seeds is None else seeds
    wanted = [_cell(plan, 1, s, "fair", n, best[n]) for s in range(count) for n in NORMS]
    if seeds is None and plan.decides:
        wanted += [_cell(plan, 2, s, "pilot", n, best[n]) for s in PILOT_SEEDS for n in NORMS]
    return wanted


def _cell(plan: Plan, wave: int, seed: int, part: str, norm: str, rate: float) -> Cell:
    # In seconds, about: a step, a look at the training images every so often, three evaluations.
    step = (3.4e-3 if norm == "bn" else 3.1e-3) + 8e-6 * plan.size / EVERY
    cost = plan.steps * step + 3 * 0.09 * min(plan.images, 5000 if part == "tuning" else 1e4) / 1e4
    arm: Mapping[str, Scalar] = {"part": part, "norm": norm, "rate": rate}
    return Cell("overfitting", arm, seed, round(cost, 3), wave)


def _tuning(runs: Runs, plan: Plan) -> Tuning:
    return tune(_trials(runs), plan.rates, TUNING_SEEDS, grow=plan.decides)


def _trials(runs: Runs) -> dict[tuple[str, float], dict[int, Run]]:
    return {
        (str(norm), float(rate)): by_seed
        for (part, norm, rate), by_seed in runs.items()
        if part == "tuning" and isinstance(rate, int | float)
    }


def _matches(rows: list[Row], part: str) -> Matches:
    """The point of each run of a part at which the training loss was reached."""
    found: Matches = {}
    for row in rows:
        if row.get("part") == part and row.get("kind") == "matched":
            arm = (str(row["norm"]), _real(row["rate"]))
            found.setdefault(arm, {})[int(_real(row["seed"]))] = row
    return found


def _gap(row: Row, unit: str) -> float:
    if unit == "loss":
        return _real(row["test_loss"]) - _real(row["train_loss"])
    return 100 * (_real(row["train_accuracy"]) - _real(row["test_accuracy"]))


def _differences(
    matches: Matches, best: Mapping[str, float], unit: str = "points"
) -> dict[int, float]:
    """Gap without minus with, by seed, where both arms came so far."""
    bn, none = (matches.get((n, best[n]), {}) for n in NORMS) if best else ({}, {})
    shared = sorted(bn.keys() & none.keys())
    return {s: _gap(none[s], unit) - _gap(bn[s], unit) for s in shared}


def _planned(runs: Runs, pilot: Matches, best: Mapping[str, float]) -> int | None:
    """Seeds that the pilot asks for, None before it is complete; all, if its runs fell short."""
    done = [runs.get(("pilot", n, best.get(n)), {}) for n in NORMS]
    if any(seed not in by_seed for by_seed in done for seed in PILOT_SEEDS):
        return None
    found = _differences(pilot, best)
    if len(found) < 2:
        return MOST_SEEDS
    delta = claims()["bn-overfit"].thresholds["delta"]
    return planned_n(found.values(), delta, LEAST_SEEDS, MOST_SEEDS)


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network: a row where the training loss is reached, and one for each evaluation."""
    part, norm, rate = str(arm["part"]), arm["norm"] == "bn", float(arm["rate"] or 0.0)
    plan = PLANS[budget]
    evaluation = "validation" if part == "tuning" else "test"
    train_x, train_y, held_x, held_y = fair_split(data, seed, evaluation, plan.size)
    held_x, held_y = held_x[: plan.images], held_y[: plan.images]
    seen, held = pixels(train_x, data.pixel_max), pixels(held_x, data.pixel_max)
    net = MLP((seen.shape[1], 200, 200, 10), "relu", norm, stream(seed, "weights"))
    ends = log_steps(plan.steps, 3)[-3:]
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=rate,
        steps=plan.steps,
        order=stream(seed, "order"),
        stops={*range(EVERY, plan.steps + 1, EVERY), *ends},
        batch=256,
    )
    learned = False
    for step, loss in training:
        if not learned and step % EVERY == 0:
            reached = mean_loss(net, seen, train_y)
            learned = reached <= LEARNED
            if learned:
                yield {
                    "kind": "matched",
                    "step": step,
                    "train_loss": reached,
                    "train_accuracy": accuracy(net, seen, train_y),
                    "test_loss": mean_loss(net, held, held_y),
                    "test_accuracy": accuracy(net, held, held_y),
                }
        if step in ends:
            share = accuracy(net, held, held_y)
            # A rate at which the images are not learned is no candidate.
            short = not math.isfinite(loss) or (step == plan.steps and not learned)
            yield {"kind": "end", "step": step, "accuracy": share, "diverged": short}


def mean_loss(net: MLP, x: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy over x by running statistics; the network keeps its mode."""
    mode = net.training
    with torch.no_grad():
        try:
            return float(cross_entropy(net.eval()(x), labels))
        finally:
            net.train(mode)


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """One claim, fair; what is missing makes it inconclusive."""
    if not rows:
        return []
    budget, data = str(rows[0]["budget"]), str(rows[0]["data"])
    plan, runs = PLANS[budget], collect(rows, _ARM)
    tuning = _tuning(runs, plan)
    best = tuning.best or {}
    matches, pilot = _matches(rows, "fair"), _matches(rows, "pilot")
    delta = claims()["bn-overfit"].thresholds["delta"]
    differences = _differences(matches, best)
    arms = [runs.get(("fair", n, best.get(n)), {}) for n in NORMS]
    control = superiority(gains(*arms).values(), delta, LEAST_SEEDS)
    found = controlled(superiority(differences.values(), delta, LEAST_SEEDS), control)

    notes: list[str] = []
    if best:
        notes.append(f"Learning rates, with and without BN: {best['bn']:g} and {best['none']:g}.")
    if tuning.missing:
        notes.append(f"Missing: {tuning.missing} tuning runs; no fair contrast.")
    elif tuning.at_edge and plan.decides:
        notes.append("The best learning rate is at the end of all that is tried.")
    for norm, by_seed in zip(NORMS, arms, strict=True):
        at = matches.get((norm, best.get(norm, 0.0)), {})
        short = sorted(by_seed.keys() - at.keys())
        if short:
            notes.append(f"Did not reach the training loss ({LABELS[norm]}): seeds {short}.")
        if 2 * len(short) > len(by_seed):
            reason = "more than half of the runs of an arm did not reach the training loss"
            found = dataclasses.replace(found, status="inconclusive", reason=reason)
        if at:
            step, loss, share = (
                sum(_real(row[key]) for row in at.values()) / len(at)
                for key in ("step", "train_loss", "train_accuracy")
            )
            notes.append(
                f"Matched {LABELS[norm]}: step {step:.0f}, training loss {loss:.4f}, training "
                f"accuracy {100 * share:.2f} % (means)."
            )
    if control.interval:
        helped = f"{span(control.interval)} points, {control.status}"
        notes.append(f"Positive control, test accuracy with − without at the end: {helped}.")
    losses = list(_differences(matches, best, "loss").values())
    if len(losses) > 1:
        notes.append(f"Secondary, gap in loss without − with: {span(interval(losses))}.")
    if not plan.decides:
        notes.append(f"The budget {budget} tries the wiring; it decides nothing.")
    fair = Outcome(
        found.status,
        found.interval,
        found.reason,
        found.n_needed,
        {_CONTRAST: found},
        _CONTRAST if found.interval else None,
        found.p,
    )
    setting = Setting(
        "overfitting",
        budget,
        data,
        "MLP 200-200",
        "each network at its best learning rate, at the same training loss",
        "points of accuracy",
        plan.decides,
    )
    words = Words(
        f"the gap between training and test accuracy on {plan.size:,} images is smaller with "
        "batch normalization: {weakest}",
        "batch normalization does not make the gap between training and test accuracy smaller by "
        "{delta} points: {refuted}",
        "the gaps differ so: {weakest}",
    )
    verdict = answer(
        "bn-overfit",
        setting,
        words,
        fair,
        {},
        delta=delta,
        pilot={_CONTRAST: list(_differences(pilot, best).values())},
        planned=_planned(runs, pilot, best),
        notes=notes,
    )
    return [dataclasses.replace(verdict, published_status=None)]


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Test accuracy of both arms at the end of training, and how the rates were chosen."""
    if not rows:
        return []
    plan, runs = PLANS[str(rows[0]["budget"])], collect(rows, _ARM)
    where = PLACES.get(str(rows[0]["data"]), str(rows[0]["data"]))
    best = _tuning(runs, plan).best or {}
    trials = _trials(runs)
    ends = [curve(runs["fair", n, r], n) for n, r in best.items() if ("fair", n, r) in runs]
    tried = [rates_curve(trials, n, TUNING_SEEDS) for n in NORMS if trials]
    all_figures = [
        curves(
            "overfitting",
            "fair",
            f"Test accuracy on {where} after {plan.size:,} images were learned by heart",
            "Each network at its best learning rate. Mean over seeds; the band is its 95 % "
            "interval.",
            "training step",
            [{"title": "MLP 200-200", "series": ends}] if ends else [],
        ),
        curves(
            "overfitting",
            "tuning",
            f"Validation accuracy on {where} over learning rates, {plan.size:,} training images",
            "How each network's learning rate was chosen. Mean and range over two seeds.",
            "learning rate",
            [{"title": "MLP 200-200", "series": tried}] if tried else [],
        ),
    ]
    return [figure for figure in all_figures if figure["panels"]]


def _real(value: Scalar) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a matched point must have numbers, got {value!r}. Repeat that cell.")
    return float(value)
