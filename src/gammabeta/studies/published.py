"""The MNIST study to the letter: its weights, its gradients, its learning rate.

The claims are those of Chang et al. 2017 (repository twcmchang/MLDS_final_2017): batch
normalization limits the growth of the weights (Fig. 1) and makes the first layer's gradients five
times larger (Fig. 2). And one about the study: its figures 1, 2, 4 and 5 were made with another
learning rate than that of its code (f-lr).

Network: pixels-100-100-10, batch normalization before each activation, no bias where it follows,
bias 0.1 elsewhere, weights from a truncated normal distribution with standard deviation
sqrt(2 / fan-in); one start for all arms of a seed. Batches of 64, cross-entropy.

As published (part "published")
    The loss is the sum over the batch, all 55,000 training images, eps 1e-3, decay 0.999 (momentum
    0.001), the test set as one batch, normalized by its own statistics. Sigmoid and ReLU, with and
    without batch normalization, SGD and Adam, each at both candidate learning rates of f-lr: 0.01,
    that of the code, and 0.0001. The study's other activations are in `activations`, its other
    batch sizes and Batch Renormalization in `batch-size`: each curve is where its claim is decided.
    `gammabeta study show --published` puts all of them beside the published figures.

Fair (parts "tuning", "fair")
    SGD, mean loss, 5,000 training images drawn for each seed, PyTorch's defaults for the layer,
    evaluation by running statistics, each arm at its own best learning rate: the one with the
    highest validation accuracy (5,000 images), mean of seeds 800 and 801, from 0.01, 0.03, 0.1,
    0.3, 1, 3, a grid that grows for both arms while the best value lies at its edge.

weight-growth    mean |W2| at the end over mean |W2| at the start, sigmoid, SGD: log of that ratio
                 without BN minus with it. Superiority, delta log 1.05. As published at step 4,000
                 (40,000 at `full`) at each rate; fair at the last step. The other layers, the
                 Frobenius norm and ReLU are shown.
grad-magnitude   mean |dL/dW1|, averaged over the steps 1 to 1,000, sigmoid, SGD. As published
                 (the summed loss): within 20 % of 0.1 with BN and of 0.02 without, both at one and
                 the same rate; refuted if at neither. Fair: log of the ratio with BN over without,
                 superiority, delta log 2. ReLU and |g| |W|, which no scaling changes, are shown.
f-lr             as published only. For each figure the RMS distance of each seed's curves to its
                 published points (of magnitudes relative to them), over the points that the runs
                 reach, at both rates. A figure is decided if one rate's distance is less than half
                 of the other's in every seed. Supported if all four figures are decided for 0.0001;
                 refuted if one is decided for 0.01. Of Fig. 4 sigmoid and ReLU.

Seeds: 900 to 903 are a pilot, used for nothing else; it gives the number of seeds of the fair part
(5 to 16: predicted half-width of the 95 % interval at most delta / 2). As published: 5 seeds of
sigmoid with SGD at `small`, 3 of all else and at `full`, declared beforehand; f-lr needs 3.

Budgets: `full` trains the source's 40,000 steps. `small` 10,000 with SGD and 5,200 with Adam (the
steps of Fig. 5), so that it reaches Fig. 2, Fig. 5 and the first points of Figs. 1 and 4; its fair
part 1,000 steps. `tiny` tries the wiring: it decides nothing.

Changed against the source: start and batch order vary with the seed (it had one seed); every epoch
is shuffled; log-spaced evaluations, which do not touch the running statistics; w2 and w3 do not
repeat the first draws of w1 (one operation seed for three matrices may have made them do so).
Changed against the registry: 1,000 fair steps in place of 4,000.

Rows: an evaluation each, arm fields part, activation, optimizer ("sgd", "adam"), batch, norm ("bn",
"none"), rate. `step` (0: before training), `accuracy` (published: test-batch statistics; else
running), `loss`, `diverged`, `weight` = mean |W2|, `weight_1`, `weight_3` = mean |W1|, |W3|,
`norm_1` to `norm_3` = Frobenius norms, `gradient` = mean |dL/dW1| averaged over the steps since the
previous row (up to step 1,000; L the loss as trained, so a sum in part published), `gradient_mean`
= the same averaged over all steps so far, `gradient_2` that of W2.

On the bundled digits each seed splits the 1,797 images anew: a demonstration.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Setting, Words, answer, points
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, any_of, joint
from gammabeta.studies._nets import m2
from gammabeta.studies._pairs import NORMS, Runs, Tuning, collect, tune
from gammabeta.studies._published_figures import curves, distances, published
from gammabeta.studies._redrawn import redrawn
from gammabeta.studies._train import (
    accuracy,
    fair_split,
    log_steps,
    pixels,
    published_split,
    stream,
    train,
)
from gammabeta.studies._verdict import Outcome, Verdict, interval, planned_n

CLAIMS = ("weight-growth", "grad-magnitude", "f-lr")

TUNING_SEEDS = (800, 801)
PILOT_SEEDS = (900, 901, 902, 903)
LEAST_SEEDS, MOST_SEEDS = 5, 16
PUBLISHED_RATES = (0.01, 0.0001)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
NAMES = {"sigmoid": "sigmoid", "relu": "ReLU"}
GRADIENT_STEPS = 1000
# Steps of the published figures: what can be compared at the step itself is not interpolated.
FIGURE_STEPS = (1, 1000, 4000, 5200, 10000, 20000, 40000)
FIGURES = ("fig-1", "fig-2", "fig-4", "fig-5")  # that f-lr is about
_ARM = ("part", "activation", "optimizer", "norm", "rate")


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: dict[str, int]  # of the published part, by optimizer
    growth_step: int  # at which the growth of the weights is taken, as published
    fair_steps: int
    evaluations: int
    seeds: int
    published_seeds: int  # of sigmoid with SGD, which two claims are about
    figure_seeds: int  # of everything else
    rates: tuple[float, ...]
    images: int
    decides: bool


PLANS = {
    "tiny": Plan({"sgd": 30, "adam": 30}, 30, 30, 4, 1, 1, 1, (0.1, 1.0), 1000, False),
    "small": Plan({"sgd": 10000, "adam": 5200}, 4000, 1000, 10, 5, 5, 3, RATES, 10000, True),
    "full": Plan({"sgd": 40000, "adam": 40000}, 40000, 1000, 40, 5, 3, 3, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until the grids are settled; the main runs, seed by seed; pilot; more seeds."""
    plan = PLANS[budget]
    runs = collect([r for r in rows if (r["budget"], r["data"]) == (budget, data)], _ARM)
    tunings = {a: _tuning(a, runs, plan) for a in NAMES}
    wanted = [
        _cell(plan, 0, seed, "tuning", a, "sgd", norm, rate)
        for seed in TUNING_SEEDS
        for a, tuning in tunings.items()
        for rate in tuning.grid
        for norm in NORMS
    ]
    best = _best(tunings)
    if len(best) < len(NAMES):
        return wanted
    return wanted + _main(plan, best, seeds, _planned(rows, best))


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for no more seeds."""
    plan = PLANS[budget]
    guess = {a: dict.fromkeys(NORMS, plan.rates[0]) for a in NAMES}
    return cells(budget, data, seeds, []) + _main(plan, guess, seeds, None)


def _main(
    plan: Plan, best: Mapping[str, Mapping[str, float]], seeds: int | None, planned: int | None
) -> list[Cell]:
    fair = plan.seeds if seeds is None else seeds
    last = plan.published_seeds if seeds is None else seeds
    drawn = plan.figure_seeds if seeds is None else seeds
    wanted: list[Cell] = []
    for seed in range(max(fair, last, drawn)):
        wanted += [
            _cell(plan, 1, seed, "published", a, optimizer, norm, rate)
            for optimizer in plan.steps
            for rate in PUBLISHED_RATES
            for a in NAMES
            for norm in NORMS
            if seed < (last if (a, optimizer) == ("sigmoid", "sgd") else drawn)
        ]
        if seed < fair:
            wanted += _fair(plan, 1, seed, "fair", best)
    if seeds is None and plan.decides:
        for seed in PILOT_SEEDS:
            wanted += _fair(plan, 2, seed, "pilot", best)
        for seed in range(fair, planned or 0):
            wanted += _fair(plan, 3, seed, "fair", best)
    return wanted


def _fair(
    plan: Plan, wave: int, seed: int, part: str, best: Mapping[str, Mapping[str, float]]
) -> list[Cell]:
    return [_cell(plan, wave, seed, part, a, "sgd", n, best[a][n]) for a in NAMES for n in NORMS]


def _cell(
    plan: Plan, wave: int, seed: int, part: str, a: str, optimizer: str, norm: str, rate: float
) -> Cell:
    arm: dict[str, Scalar] = {"part": part, "activation": a, "optimizer": optimizer}
    arm |= {"batch": 64, "norm": norm, "rate": rate}
    steps, stops = _steps(plan, part, optimizer)
    # In thousands of plain steps; an evaluation of 10,000 images is worth about 40 of them.
    step = (1.3 if norm == "bn" else 1.0) + (0.35 if optimizer == "adam" else 0.0)
    cost = steps / 1000 * step + 0.04 * plan.images / 10000 * len(stops) + 0.1
    return Cell("published", arm, seed, round(cost, 3), wave)


def _steps(plan: Plan, part: str, optimizer: str) -> tuple[int, list[int]]:
    """Steps of a part, and those after which it evaluates."""
    if part != "published":
        stops = log_steps(plan.fair_steps, 8)
        return plan.fair_steps, stops[-3:] if part == "tuning" else stops
    steps = plan.steps[optimizer]
    at = {*log_steps(steps, plan.evaluations), *(s for s in FIGURE_STEPS if s <= steps)}
    return steps, sorted(at)


def _tuning(activation: str, runs: Runs, plan: Plan) -> Tuning:
    trials = {
        (str(norm), float(rate)): by_seed
        for (part, name, _, norm, rate), by_seed in runs.items()
        if (part, name) == ("tuning", activation) and isinstance(rate, int | float)
    }
    return tune(trials, plan.rates, TUNING_SEEDS, grow=plan.decides)


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network: a row for each evaluation."""
    part, activation, optimizer = str(arm["part"]), str(arm["activation"]), str(arm["optimizer"])
    to_letter, plan = part == "published", PLANS[budget]
    steps, stops = _steps(plan, part, optimizer)
    evaluated = "validation" if part == "tuning" else "test"
    split = published_split(data, seed) if to_letter else fair_split(data, seed, evaluated)
    train_x, train_y, test_x, test_y = split
    test, labels = pixels(test_x[: plan.images], data.pixel_max), test_y[: plan.images]
    eps, momentum = (1e-3, 0.001) if to_letter else (1e-5, 0.1)
    norm, start = arm["norm"] == "bn", stream(seed, "weights")
    net = m2(test.shape[1], activation, norm, start, eps=eps, momentum=momentum)
    weights = [p for p in net.parameters() if p.ndim == 2]

    def sizes() -> Row:
        row: Row = {}
        for k, w in enumerate(weights, 1):
            row["weight" if k == 2 else f"weight_{k}"] = _finite(w.detach().abs().mean().item())
            row[f"norm_{k}"] = _finite(w.detach().norm().item())
        return row

    if part != "tuning":
        yield {"step": 0, **sizes()}
    watched = 0 if part == "tuning" else min(GRADIENT_STEPS, steps)
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=steps,
        order=stream(seed, "order"),
        stops={*stops, *range(1, watched + 1)},
        loss="sum" if to_letter else "mean",
        optimizer=optimizer,
    )
    seen: list[tuple[float, float]] = []  # mean |dL/dW1| and |dL/dW2| of each step
    told = 0
    for step, loss in training:
        if step <= watched:
            one, two = (w.grad.abs().mean().item() for w in weights[:2] if w.grad is not None)
            seen.append((one, two))
        if step not in stops:
            continue
        row: Row = {"step": step, "diverged": not math.isfinite(loss)}
        row["accuracy"] = accuracy(net, test, labels, "batch" if to_letter else "running")
        if math.isfinite(loss):
            row["loss"] = _finite(loss)
        if part != "tuning":
            row |= sizes()
        if len(seen) > told:
            row["gradient"] = _finite(statistics.fmean(one for one, _ in seen[told:]))
            row["gradient_2"] = _finite(statistics.fmean(two for _, two in seen[told:]))
            row["gradient_mean"] = _finite(statistics.fmean(one for one, _ in seen))
            told = len(seen)
        yield row


def _finite(value: float) -> float | None:
    """Seven digits, what float32 has; numbers of a run that diverged are left out."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


# -- what it means ------------------------------------------------------------------------------

Rows = Mapping[tuple[Scalar, ...], Mapping[int, Mapping[int, Row]]]  # arm -> seed -> step


def _table(rows: Sequence[Row]) -> Rows:
    found: dict[tuple[Scalar, ...], dict[int, dict[int, Row]]] = {}
    for row in rows:
        seed, step = row.get("seed"), row.get("step")
        if isinstance(seed, int) and isinstance(step, int) and all(k in row for k in _ARM):
            arm = tuple(row[key] for key in _ARM)
            found.setdefault(arm, {}).setdefault(seed, {})[step] = row
    return found


def _best(tunings: Mapping[str, Tuning]) -> dict[str, dict[str, float]]:
    return {a: t.best for a, t in tunings.items() if t.best is not None}


def growth(run: Mapping[int, Row], step: int, column: str = "weight") -> float | None:
    """Logarithm of a weight's size at a step over that at the start."""
    first, last = (run.get(s, {}).get(column) for s in (0, step))
    if not isinstance(first, float) or not isinstance(last, float) or not first > 0 < last:
        return None
    return math.log(last / first)


def gradient(run: Mapping[int, Row]) -> float | None:
    """Mean |dL/dW1| over all steps that are watched."""
    means = [v for s in sorted(run) if isinstance(v := run[s].get("gradient_mean"), float)]
    return means[-1] if means else None


def _log_ratios(
    table: Rows, part: str, a: str, rates: Mapping[str, float], claim: str, step: int
) -> dict[int, float]:
    """The contrast of a claim by seed: without - with for growth, with - without for gradients."""
    by_norm: dict[str, dict[int, float]] = {}
    for norm in NORMS:
        runs = table.get((part, a, "sgd", norm, rates.get(norm)), {})
        by_norm[norm] = {}
        for seed, run in runs.items():
            value = growth(run, step) if claim == "weight-growth" else gradient(run)
            if value is not None and (claim == "weight-growth" or value > 0):
                by_norm[norm][seed] = value if claim == "weight-growth" else math.log(value)
    sign = -1 if claim == "weight-growth" else 1
    shared = sorted(by_norm["bn"].keys() & by_norm["none"].keys())
    return {s: sign * (by_norm["bn"][s] - by_norm["none"][s]) for s in shared}


def _delta(claim: str) -> float:
    return math.log(claims()[claim].thresholds["ratio"])


def _planned(rows: Sequence[Row], best: Mapping[str, Mapping[str, float]]) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    needed = []
    for claim in ("weight-growth", "grad-magnitude"):
        pilot = _pilot(_table(rows), best, claim)
        if len(pilot) < len(PILOT_SEEDS):
            return None
        needed.append(planned_n(pilot, _delta(claim), LEAST_SEEDS, MOST_SEEDS))
    return max(needed)


def _pilot(table: Rows, best: Mapping[str, Mapping[str, float]], claim: str) -> list[float]:
    steps = PLANS["small"].fair_steps  # the same at every budget that has a pilot
    by_seed = _log_ratios(table, "pilot", "sigmoid", best.get("sigmoid", {}), claim, steps)
    return [by_seed[s] for s in PILOT_SEEDS if s in by_seed]


def judge(rows: list[Row]) -> list[Verdict]:
    """The three claims; what is missing makes them inconclusive."""
    if not rows:
        return []
    budget, data = str(rows[0]["budget"]), str(rows[0]["data"])
    plan, runs, table = PLANS[budget], collect(rows, _ARM), _table(rows)
    tunings = {a: _tuning(a, runs, plan) for a in NAMES}
    best = _best(tunings)
    notes = _notes(plan, budget, tunings, runs)
    least = plan.published_seeds if plan.decides else LEAST_SEEDS

    def setting(condition: str, unit: str) -> Setting:
        return Setting("published", budget, data, "MLP 100-100", condition, unit, plan.decides)

    verdicts = []
    for claim, words in WORDS.items():
        delta = _delta(claim)

        def contrast(
            part: str, a: str, rates: Mapping[str, float], step: int, claim: str = claim
        ) -> list[float]:
            return list(_log_ratios(table, part, a, rates, claim, step).values())

        fair = contrast("fair", "sigmoid", best.get("sigmoid", {}), plan.fair_steps)
        published_: dict[str, Outcome] = {}
        for rate in PUBLISHED_RATES:
            if claim == "weight-growth":
                values = contrast("published", "sigmoid", _same(rate), plan.growth_step)
                parts = {"sigmoid": Part(values, "superiority", delta)}
            else:
                parts = _magnitudes(table, rate)
            published_[f"rate {rate:g}"] = joint(parts, least)
        also = [*notes]
        for part, rates, step in (
            ("fair", best.get("relu", {}), plan.fair_steps),
            *(("published", _same(rate), plan.growth_step) for rate in PUBLISHED_RATES),
        ):
            values = contrast(part, "relu", rates, step)
            if values:
                where = part if part == "fair" else f"{part}, rate {rates['bn']:g}"
                also.append(f"ReLU ({where}; secondary): {points(statistics.fmean(values))}.")
        also += _secondary(table, plan, best, claim)
        verdicts.append(
            answer(
                claim,
                setting("each network at its best learning rate", "log of the ratio"),
                words,
                joint({"sigmoid": Part(fair, "superiority", delta)}, LEAST_SEEDS),
                published_,
                delta=delta,
                pilot={"sigmoid": _pilot(table, best, claim)},
                planned=_planned(rows, best),
                notes=also,
                **({} if claim == "weight-growth" else {"combine": any_of}),
            )
        )
    figures_, told = _decided(rows, plan.figure_seeds if plan.decides else LEAST_SEEDS)
    verdicts.append(
        answer(
            "f-lr",
            setting("in the study's own setting", "log of the ratio of distances"),
            Words(
                "every figure that was tried fits the learning rate 0.0001 better than that of "
                "the code; the first is {weakest}",
                "a figure fits the learning rate of the code: {refuted}",
                "the logarithm of distance at 0.01 over distance at 0.0001 is, of {weakest}",
            ),
            figures_,
            {},
            delta=math.log(1 / claims()["f-lr"].thresholds["share"]),
            pilot={},
            planned=None,
            notes=[*notes, *told, "Has a published setting only."],
        )
    )
    return verdicts


WORDS = {
    "weight-growth": Words(
        "the second layer's weights grow more without batch normalization than with it: {weakest}",
        "batch normalization does not limit the growth of the weights: {refuted}",
        "growth without over growth with batch normalization, as a logarithm: {weakest}",
    ),
    "grad-magnitude": Words(
        "the first layer's gradients are at least twice as large with batch normalization: "
        "{weakest}",
        "the first layer's gradients are not twice as large with batch normalization: {refuted}",
        "gradients with over gradients without batch normalization, as a logarithm: {weakest}",
    ),
}


def _same(rate: float) -> dict[str, float]:
    return dict.fromkeys(NORMS, rate)


def _magnitudes(table: Rows, rate: float) -> dict[str, Part]:
    """Both published gradient magnitudes at one rate."""
    t = claims()["grad-magnitude"].thresholds
    parts = {}
    for norm, key in (("bn", "with"), ("none", "without")):
        runs = table.get(("published", "sigmoid", "sgd", norm, rate), {})
        values = [v for run in runs.values() if (v := gradient(run)) is not None]
        parts[f"{key} BN"] = Part(values, "number", t[key], t["tolerance"] * t[key])
    return parts


def _secondary(
    table: Rows, plan: Plan, best: Mapping[str, Mapping[str, float]], claim: str
) -> list[str]:
    """Other layers and norms, fair: what is shown beside the primary contrast."""
    found = []
    columns = {"weight_1": "mean |W1|", "weight_3": "mean |W3|"}
    columns |= {f"norm_{k}": f"Frobenius norm of W{k}" for k in (1, 2, 3)}
    for column, name in columns.items():
        means = []
        for norm in NORMS:
            rate = best.get("sigmoid", {}).get(norm)
            runs = table.get(("fair", "sigmoid", "sgd", norm, rate), {})
            grown = [growth(run, plan.fair_steps, column) for run in runs.values()]
            known = [g for g in grown if g is not None]
            means.append(statistics.fmean(known) if known else None)
        if claim == "weight-growth" and None not in means:
            shown = " and ".join(f"{math.exp(m):.3f}" for m in means if m is not None)
            found.append(f"{name}, fair (secondary): grows by {shown}, with and without BN.")
    if claim == "grad-magnitude":
        free = []
        for norm in NORMS:
            rate = best.get("sigmoid", {}).get(norm)
            runs = table.get(("fair", "sigmoid", "sgd", norm, rate), {})
            both = [(gradient(run), run.get(0, {}).get("weight_1")) for run in runs.values()]
            free += [[g * w for g, w in both if g is not None and isinstance(w, float)]]
        if all(free):
            shown = " and ".join(f"{statistics.fmean(v):.3g}" for v in free)
            found.append(f"Gradient times weight at the start, fair: {shown}, with and without.")
    return found


def _decided(rows: Sequence[Row], least: int) -> tuple[Outcome, list[str]]:
    """What f-lr's four figures say; the logarithm of the ratio of distances is shown."""
    share, found = claims()["f-lr"].thresholds["share"], curves(rows)
    cells: dict[str, Outcome] = {}
    notes = []
    for figure in published():
        if figure.id not in FIGURES:
            continue
        by_rate, over = distances(figure, found)
        code, other = (by_rate[rate] for rate in PUBLISHED_RATES)
        seeds = sorted(code.keys() & other.keys())
        ratios = [math.log(max(code[s], 1e-9) / max(other[s], 1e-9)) for s in seeds]
        if len(seeds) < max(least, 2):
            status, reason = "inconclusive", f"{len(seeds)} of at least {least} seeds"
        elif all(other[s] < share * code[s] for s in seeds):
            status, reason = "supported", "decided for 0.0001 in every seed"
        elif all(code[s] < share * other[s] for s in seeds):
            status, reason = "refuted", "decided for 0.01 in every seed"
        else:
            status, reason = "inconclusive", "not decided in every seed"
        band = interval(ratios) if len(ratios) > 1 else None
        cells[figure.name] = Outcome(status, band, reason)
        total = sum(len(series.points) for series in figure.series)
        notes.append(f"{figure.name}: compared at {over} of {total} points.")
    said = {cell.status for cell in cells.values()}
    status = "refuted" if "refuted" in said else "inconclusive"
    if said == {"supported"}:
        status = "supported"
    known = {name: c.interval.mean for name, c in cells.items() if c.interval}
    weakest = min(known, key=lambda name: known[name]) if known else None
    band = cells[weakest].interval if weakest else None
    reason = "; ".join(f"{name}: {cell.reason}" for name, cell in cells.items())
    return Outcome(status, band, reason, None, cells, weakest), notes


def _notes(plan: Plan, budget: str, tunings: Mapping[str, Tuning], runs: Runs) -> list[str]:
    notes = []
    best = _best(tunings)
    if best:
        chosen = [f"{NAMES[a]} {b['bn']:g} and {b['none']:g}" for a, b in best.items()]
        notes.append(f"Learning rates chosen, with and without BN: {', '.join(chosen)}.")
    for a, tuning in tunings.items():
        if tuning.missing:
            notes.append(f"Missing: {tuning.missing} tuning runs of {NAMES[a]}; nothing fair.")
        elif tuning.at_edge and plan.decides:
            notes.append(f"The best rate of {NAMES[a]} is at the end of all that is tried.")
    diverged = sum(
        run.diverged for arm, by in runs.items() if arm[0] != "tuning" for run in by.values()
    )
    if diverged:
        notes.append(f"Runs that diverged: {diverged}.")
    if not plan.decides:
        notes.append(f"The budget {budget} tries the wiring; it decides nothing.")
    elif plan.steps["sgd"] < PLANS["full"].steps["sgd"]:
        steps = f"{plan.steps['sgd']:,} steps (SGD) and {plan.steps['adam']:,} (Adam)"
        notes.append(f"As published, but {steps} for the source's 40,000.")
    return notes


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """The published figures that f-lr is about, again; Fig. 4 with two of its activations."""
    wanted = {f"published-{figure}" for figure in FIGURES}
    return [figure for figure in redrawn("published", rows) if figure["id"] in wanted]
