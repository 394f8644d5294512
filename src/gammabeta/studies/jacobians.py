"""Does batch normalization move the singular values of the layers' Jacobians to one?

The claim is that of the MNIST study (Chang et al. 2017, repository twcmchang/MLDS_final_2017,
claim 3 and Fig. 3), and a conjecture of Ioffe & Szegedy 2015. Network of the study:
pixels-100-100-10, ReLU or sigmoid, BN before each activation, no bias where it follows, bias 0.1
elsewhere, weights truncated normal with sqrt(2/fan-in); batches of 64, stochastic gradient descent
without momentum. The layers are the two hidden ones, each from its input to its activation. Four
matrices have been called their Jacobian (see `gammabeta.probes.jacobian`, which measures them):
(a) the gradient of the batch's sum, the study's; (b) a sample's own block in training mode; (c) the
same in eval mode; (d) the whole batch's in training mode, the one through which error passes.

Primary contrast: share of ALL singular values in [0.5, 2], definition (d), BN - none, mean over the
start and five log-spaced steps of training; zeros, below 1e-6 of the largest, count as outside.
Superiority, delta = 0.1, universal over both layers and both activations. Shown beside: start and
last step alone, the share by the other definitions, sd(ln s) and mean |ln s| of the values that are
no zeros, rms and share of zeros by definition (d), and the same of the whole network from images
to logits, for the first five seeds.

Fair (it gives the verdict)
    Mean loss, 5,000 training images drawn for each seed, eps 1e-5, momentum 0.1. Each arm of each
    activation at its own best learning rate: highest validation accuracy, mean of seeds 800 and
    801, from 0.01, 0.03, 0.1, 0.3, 1, 3; a best value at an edge extends the grid for both arms.
    Measured on one batch of 64 test images, the same in both arms and at all steps. Both arms have
    the same start and batches. Seeds 900 to 903 are a pilot: they give the number of seeds (at
    least 5, at most 16: predicted half-width of the 95 % interval delta / 2), and serve nothing
    else. At the start also networks of 5 and 10 hidden layers, from end to end: shown.

As published
    Definition (a), the study's, on 8 samples of the batch: loss summed over the batch, 55,000
    training images, eps 1e-3, momentum 0.001, at both candidate learning rates 0.01 and 0.0001 as
    two levels; the same contrast, 5 seeds. It counts all values, where the study's histogram
    dropped those above 1; and the share in a range, where the study looked at a histogram.

Singular values of (d) of a layer are estimated by Lanczos (32 steps from 2 vectors: the matrix has
6,400 rows; beside exact ones, on batches of 20, the share was off by 0.03 at most), the others
computed exactly of 8 samples.

For `gammabeta report --format gif`, with the first three seeds of the fair part, rows of kind
"spectrum": 21 quantiles of the singular values of (d), of layer 1 with ReLU and layer 2 with
sigmoid, at the start and 20 log-spaced steps; they enter no verdict.

Budgets: `small` trains 500 steps, `full` 1,000; `tiny` ten steps, with two rates and a batch of 8:
it decides nothing. Changed against the registry: 500 steps at `small` and 6 moments instead of 20,
so that all fits three minutes. On the bundled digits it is a demonstration.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from gammabeta._runs import Row, Scalar
from gammabeta.probes import jacobian
from gammabeta.probes.step import Step
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._draws import LEAST_SEEDS, PILOT_SEEDS, Question, Words, planned, verdict
from gammabeta.studies._experiments import Cell
from gammabeta.studies._nets import MLP, m2
from gammabeta.studies._pairs import NORMS, Tuning, collect, tune
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._targets import Target
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._verdict import Verdict

CLAIMS = ("jacobian-one",)
ACTIVATIONS = {"relu": "ReLU", "sigmoid": "sigmoid"}
ARMS = {"bn": "with BN", "none": "without"}
TUNING_SEEDS = (800, 801)
PUBLISHED_RATES = (0.01, 0.0001)
PUBLISHED_IMAGES = 55000
# The study's two animations, again: activation -> layer; how many steps, quantiles and seeds.
ANIMATED = {"relu": 1, "sigmoid": 2}
FRAMES, QUANTILES, FRAME_SEEDS = 20, 21, 3
_DEFINITIONS = {"sum": "(a)", "own": "(b)", "eval": "(c)", "batch": "(d)"}


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    batch: int
    rates: tuple[float, ...]
    limit: int  # matrices of more than its square entries are estimated
    decides: bool


PLANS = {
    "tiny": Plan(4, 4, (0.1, 1.0), 200, False),
    "small": Plan(500, 64, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), 2000, True),
    "full": Plan(1000, 64, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), 2000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until every grid is settled; then the pilot and as many seeds as it asks for."""
    plan = PLANS[budget]
    tunings = {a: _tuning(a, rows, plan) for a in ACTIVATIONS}
    wanted = [
        _cell(budget, 0, seed, {"part": "tuning", "activation": a, "norm": norm, "rate": rate})
        for seed in TUNING_SEEDS
        for a, tuning in tunings.items()
        for rate in tuning.grid
        for norm in NORMS
    ]
    best = {a: tuning.best for a, tuning in tunings.items() if tuning.best is not None}
    fixed = seeds if seeds is not None else None if plan.decides else 2
    for seed in range(LEAST_SEEDS if fixed is None else fixed):
        for rate in PUBLISHED_RATES:
            wanted += [_pair(budget, 1, seed, "published", a, (rate, rate)) for a in ACTIVATIONS]
    if len(best) < len(ACTIVATIONS):
        return wanted
    if fixed is None:
        wanted += _fair(budget, 1, PILOT_SEEDS, "pilot", best)
        fixed = planned(question(), _chosen(rows, best)) or 0
    return wanted + _fair(budget, 2, range(fixed), "fair", best)


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for the least."""
    guess = {a: dict.fromkeys(NORMS, 0.1) for a in ACTIVATIONS}
    wanted = cells(budget, data, seeds, [])
    decides = PLANS[budget].decides and seeds is None
    if decides:
        wanted += _fair(budget, 1, PILOT_SEEDS, "pilot", guess)
    count = seeds if seeds is not None else LEAST_SEEDS if decides else 2
    return wanted + _fair(budget, 2, range(count), "fair", guess)


def _fair(
    budget: str, wave: int, seeds: Sequence[int], part: str, best: Mapping[str, Mapping[str, float]]
) -> list[Cell]:
    return [
        _pair(budget, wave, seed, part, a, (best[a]["bn"], best[a]["none"]))
        for seed in seeds
        for a in ACTIVATIONS
    ]


def _pair(
    budget: str, wave: int, seed: int, part: str, activation: str, rates: tuple[float, float]
) -> Cell:
    arm: dict[str, Scalar] = {"part": part, "activation": activation}
    return _cell(budget, wave, seed, {**arm, "rate_bn": rates[0], "rate_none": rates[1]})


def _cell(budget: str, wave: int, seed: int, arm: Mapping[str, Scalar]) -> Cell:
    plan = PLANS[budget]
    trained = plan.steps / 1000
    fair = arm["part"] == "fair"
    if not plan.decides:
        return Cell("jacobians", arm, seed, 0.02 if arm["part"] == "tuning" else 0.4, wave)
    more = 4.7 if fair and seed < LEAST_SEEDS else 1.3
    more += 3.0 if fair and seed < FRAME_SEEDS else 0.0
    costs = {"tuning": trained * 1.1, "published": 2 * trained + 1.0}
    cost = costs.get(str(arm["part"]), 2 * trained + more)
    return Cell("jacobians", arm, seed, round(cost, 3), wave)


def _tuning(activation: str, rows: list[Row], plan: Plan) -> Tuning:
    runs = collect(rows, ("part", "activation", "norm", "rate"))
    trials = {
        (str(norm), float(rate)): by_seed
        for (part, name, norm, rate), by_seed in runs.items()
        if (part, name) == ("tuning", activation) and isinstance(rate, int | float)
    }
    return tune(trials, plan.rates, TUNING_SEEDS, grow=plan.decides)


def _chosen(rows: list[Row], best: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Without rows at learning rates that were once the best of a smaller grid."""

    def fits(row: Row) -> bool:
        if row.get("part") not in ("pilot", "fair"):
            return True
        rates = best.get(str(row.get("activation")), {})
        return (row.get("rate_bn"), row.get("rate_none")) == (rates.get("bn"), rates.get("none"))

    return [row for row in rows if fits(row)]


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Tune one network, or measure a pair of them in training."""
    plan, part = PLANS[budget], str(arm["part"])
    if part == "tuning":
        return _trial(arm, seed, plan, data)
    return _measured(arm, seed, plan, data)


def _trial(arm: Mapping[str, Scalar], seed: int, plan: Plan, data: Images) -> Iterator[Row]:
    train_x, train_y, x, y = fair_split(data, seed, "validation")
    net = m2(
        train_x.flatten(1).shape[1],
        str(arm["activation"]),
        arm["norm"] == "bn",
        stream(seed, "weights"),
    )
    stops = log_steps(plan.steps, 3)[-3:]
    for step, loss in train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=plan.steps,
        order=stream(seed, "order"),
        stops=stops,
    ):
        share = accuracy(net, pixels(x, data.pixel_max), y)
        yield {"step": step, "accuracy": share, "diverged": not math.isfinite(loss)}


def moments(steps: int) -> list[int]:
    """Five steps in equal ratios, from 1 in 250 of them to the last.

    >>> moments(500)
    [2, 8, 32, 126, 500]
    """
    return sorted({max(1, round(steps / 250 * 250 ** (k / 4))) for k in range(5)})


def _measured(arm: Mapping[str, Scalar], seed: int, plan: Plan, data: Images) -> Iterator[Row]:
    part, activation = str(arm["part"]), str(arm["activation"])
    published, name = part == "published", ACTIVATIONS[activation]
    train_x, train_y, test_x, test_y = fair_split(data, seed, "test")
    if published and data.name != "digits":
        train_x, train_y = data.train_x[:PUBLISHED_IMAGES], data.train_y[:PUBLISHED_IMAGES]
    at = torch.randperm(len(test_x), generator=stream(seed, "measured"))[: plan.batch]
    batch = pixels(test_x[at], data.pixel_max), test_y[at]
    eps, momentum = (1e-3, 0.001) if published else (1e-5, 0.1)
    every = moments(plan.steps)
    detailed = part == "fair" and seed < LEAST_SEEDS and plan.decides
    frames = log_steps(plan.steps, FRAMES, 1) if part == "fair" and seed < FRAME_SEEDS else []
    found: dict[tuple[str, str, str], list[float]] = {}  # arm, place, quantity: by step
    for norm, label in ARMS.items():
        sizes = batch[0].shape[1]
        weights = stream(seed, "weights")
        net = m2(sizes, activation, norm == "bn", weights, eps=eps, momentum=momentum)
        records = [(0, _spectra(net, batch, plan.limit, _definitions(part, detailed, 0, every)))]
        if frames:
            yield from _frame(net, batch, plan.limit, ANIMATED[activation], norm, 0)
        for step, _ in train(
            net,
            train_x,
            train_y,
            pixel_max=data.pixel_max,
            rate=float(arm[f"rate_{norm}"] or 0.0),
            steps=plan.steps,
            order=stream(seed, "order"),
            stops={*every, *frames},
            loss="sum" if published else "mean",
            batch=min(64, len(train_x)),
        ):
            if step in frames:
                yield from _frame(net, batch, plan.limit, ANIMATED[activation], norm, step)
            if step not in every:
                continue
            definitions = _definitions(part, detailed, step, every)
            records.append((step, _spectra(net, batch, plan.limit, definitions)))
        for step, record in records:
            for (where, quantity), number in record.items():
                found.setdefault((norm, where, quantity), []).append(number)
                if quantity.endswith("(d): share in [0.5, 2]") and part == "fair":
                    line = f"{where}, {name}, {label}"
                    yield _point("training", line, max(step, 0.5), number)
    prefix = f"rate {float(arm['rate_bn'] or 0.0):g}: " if published else ""
    for where, quantity in sorted({key[1:] for key in found}):
        series = {norm: found.get((norm, where, quantity), []) for norm in NORMS}
        cell = f"{prefix}{where}, {name}, {quantity}"
        for norm, label in ARMS.items():
            if series[norm]:
                yield _value(f"{cell}, {label}", math.fsum(series[norm]) / len(series[norm]))
        if len(series["bn"]) == len(series["none"]) and quantity.endswith("share in [0.5, 2]"):
            gains = [b - n for b, n in zip(series["bn"], series["none"], strict=True)]
            yield _value(cell, math.fsum(gains) / len(gains))
            if quantity.startswith("(d)"):
                yield _value(f"{cell}, at the start", gains[0])
                yield _value(f"{cell}, at the end", gains[-1])
    if detailed:
        yield from _deep(activation, name, seed, batch, plan)


def _definitions(part: str, detailed: bool, step: int, every: Sequence[int]) -> tuple[str, ...]:
    """The decisive one at all moments, all of them at the start, in the middle and at the end."""
    if part == "published":
        return ("sum",)
    if not detailed or step not in (0, every[len(every) // 2], every[-1]):
        return ("batch",)
    return tuple(_DEFINITIONS)


def _spectra(
    net: MLP,
    batch: tuple[torch.Tensor, torch.Tensor],
    limit: int,
    definitions: Sequence[str],
) -> dict[tuple[str, str], float]:
    """Quantities by place and name; the whole network where all definitions are asked for."""
    linear = [n for n, module in net.named_modules() if isinstance(module, nn.Linear)][:2]
    places = dict(zip(linear, ("layer 1", "layer 2"), strict=True))
    if len(definitions) > 1:
        places[""] = "whole network"
    # MLP's running statistics stay as they are: a Step leaves no trace.
    step = Step(net, nn.CrossEntropyLoss(), batch)
    found = jacobian.measure(
        *(step, {}), definitions=definitions, layers=list(places), samples=8, limit=limit, steps=32
    )
    result = {}
    for layer, place in places.items():
        for definition in definitions:
            key = f"{layer}/{definition}" if layer else definition
            letter = _DEFINITIONS[definition]
            names = {"in_range": "share in [0.5, 2]", "spread": "sd of ln s"}
            if definition == "batch":
                names |= {"mean_abs_log": "mean |ln s|", "rms": "rms", "zeros": "share of zeros"}
            for quantity, text in names.items():
                number = float(found.get(f"{key}_{quantity}", math.nan))
                # A network that has diverged has no share of values near one.
                if quantity == "in_range" and not math.isfinite(number):
                    number = 0.0
                if math.isfinite(number):
                    result[place, f"{letter}: {text}"] = number
    return result


def _frame(
    net: MLP, batch: tuple[torch.Tensor, torch.Tensor], limit: int, layer: int, norm: str, step: int
) -> Iterator[Row]:
    """Quantiles of one layer's singular values, (d): x percent of them are at most y."""
    linear = [n for n, module in net.named_modules() if isinstance(module, nn.Linear)]
    name = linear[layer - 1]
    found = jacobian.measure(
        *(Step(net, nn.CrossEntropyLoss(), batch), {}),
        definitions=("batch",), layers=(name,), limit=limit, steps=32, points=QUANTILES,
    )  # fmt: skip
    values = found.get(f"{name}/batch_singular_values")
    # A network that has diverged has none.
    if values is None or not values.isfinite().all():
        return
    head: Row = {"kind": "spectrum", "layer": layer, "norm": norm, "step": step}
    for k, value in enumerate(values.tolist()):
        x = 100 * (1 - k / (len(values) - 1))
        yield {**head, "x": round(x, 3), "y": float(f"{value:.4g}")}


def _deep(
    activation: str, name: str, seed: int, batch: tuple[torch.Tensor, torch.Tensor], plan: Plan
) -> Iterator[Row]:
    """Deeper networks at the start, from end to end."""
    for depth in (5, 10):
        for norm, label in ARMS.items():
            sizes = (batch[0].shape[1], *[100] * depth, 10)
            net = MLP(sizes, activation, norm == "bn", stream(seed, "weights"))
            found = jacobian.measure(
                *(Step(net, nn.CrossEntropyLoss(), batch), {}),
                definitions=("batch",), layers=("",), limit=plan.limit, steps=32,
            )  # fmt: skip
            cell = f"{depth} hidden layers from end to end, {name}, (d) at the start"
            for quantity, text in (("in_range", "share in [0.5, 2]"), ("rms", "rms")):
                number = float(found.get(f"batch_{quantity}", math.nan))
                if math.isfinite(number):
                    yield _value(f"{cell}: {text}, {label}", number)


def _value(cell: str, number: float) -> Row:
    return {"kind": "value", "cell": cell, "value": number}


def _point(curve: str, series: str, x: float, y: float) -> Row:
    return {"kind": "curve", "curve": curve, "series": series, "x": x, "y": y}


# -- what it means ------------------------------------------------------------------------------


def question() -> Question:
    """The rule, with the study's own setting beside."""
    delta = claims()["jacobian-one"].thresholds["delta"]
    places = [f"layer {n}, {name}" for n in (1, 2) for name in ACTIVATIONS.values()]
    return Question(
        "jacobian-one",
        {f"{place}, (d): share in [0.5, 2]": Target("", 0, math.inf, delta, delta)
         for place in places},
        Words(
            "more singular values lie in [0.5, 2] with BN, in both layers, with both activations",
            "BN does not move the singular values to one in every layer",
            "share of the singular values",
            "over training, the whole batch's Jacobian of each layer",
        ),
        on_images=True,
        published={
            f"rate {rate:g}: {place}, (a): share in [0.5, 2]":
                Target(f"rate {rate:g}", 0, math.inf, delta, delta)
            for rate in PUBLISHED_RATES
            for place in places
        },
    )  # fmt: skip


def judge(rows: list[Row]) -> list[Verdict]:
    """The verdict, fair and as published."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    tunings = {a: _tuning(a, rows, plan) for a in ACTIVATIONS}
    best = {a: tuning.best for a, tuning in tunings.items() if tuning.best is not None}
    notes = []
    if best:
        listed = [f"{ACTIVATIONS[a]} {b['bn']:g} and {b['none']:g}" for a, b in best.items()]
        notes.append(f"Learning rates chosen, with and without BN: {', '.join(listed)}.")
    for a, tuning in tunings.items():
        if tuning.missing:
            notes.append(f"Missing: {tuning.missing} tuning runs of {ACTIVATIONS[a]}.")
        elif tuning.at_edge and plan.decides:
            notes.append(f"The best rate of {ACTIVATIONS[a]} is at the end of all that is tried.")
    notes.append("As published: definition (a), at both candidate learning rates.")
    return [verdict(question(), "jacobians", _chosen(rows, best), notes=notes)]


_FIGURES = {
    "training": Axes(
        "Share of a layer's singular values in [0.5, 2], whole batch",
        "step (0.5 is the start)",
        "share of the singular values",
        x_log=True,
    )
}


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """The share over training, both arms of every layer."""
    return drawings("jacobians", _FIGURES, [r for r in rows if r["seed"] not in PILOT_SEEDS])
