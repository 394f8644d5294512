"""Does batch normalization suffer where test data have other class ratios than training data?

The claims are those of Chang et al. 2017 (repository twcmchang/MLDS_final_2017, conclusion 4): a
mismatch between training and test distribution worsens batch normalization (mismatch), and Batch
Renormalization fixes that (brn-mismatch, concluded without an experiment). And one about the study:
the effect exists only because the test set is normalized by its own statistics (f-mismatch).

Task: digits 0 and 1, 5,000 training images of each, drawn for each seed; the network answers with
all ten classes. Test sets: all 980 zeros of the test images and a part of the ones, 20 random
subsamples for each count. Counts: those that the study's code really has, 1,135, 500, 250 and 50
(53.7, 33.8, 20.3 and 4.9 % ones), and those it meant, 980, 109, 52 and 10 (50, 10, 5 and 1 %).

Network: pixels-100-100-10, sigmoid, normalization before each activation, no bias where it follows,
bias 0.1 elsewhere, weights from a truncated normal distribution with standard deviation
sqrt(2 / fan-in). Batches of 64, SGD, cross-entropy; decay 0.99 (momentum 0.01), since a decay of
0.999 would still hold 0.37 of its start after 1,000 steps. All arms of a seed start alike and see
the same order: "none", "bn", "brn" (Batch Renormalization, its limits at the study's shares of the
steps; evaluated as the study evaluates it, with r = 1 and d = 0), "ln" (layer normalization).

Evaluation modes, after the last step: "whole" (the test set as one batch, normalized by its own
statistics, as the study did), "running", "precise" (the statistics of all training images), "64"
(shuffled batches of 64 by their own statistics). Balanced accuracy, the mean over both classes, in
points; its least-squares slope over log10(ones / zeros): a positive one means that accuracy falls
as ones become rare. The study's true counts decide, the intended ones are shown.

mismatch      Fair: three levels. Whole: slope, superiority, delta 0.3 points per decade. Running
              and precise: fall of the balanced accuracy from 53.7 to 4.9 % ones, superiority, delta
              0.3 points. Mixed if it hurts with the one and not with the others. As published: the
              slope with "whole".
brn-mismatch  Slope of BN minus that of Batch Renormalization, whole: superiority, delta 0.3; judged
              only where BN's own slope is supported, else there is nothing to mend. The other modes
              are shown.
f-mismatch    Both: slope with "whole", superiority, delta 0.3; slope with "running", equivalence
              within 0.3 points per decade.

As published: the summed loss, eps 1e-3, at the rates 0.01 (the code's) and 0.0001 (the other
candidate, see f-lr), two levels. Fair: mean loss, eps 1e-5, each arm at its own best learning rate:
highest validation accuracy (the zeros and ones among the last 5,000 training images, running
statistics), mean of seeds 800 and 801, from 0.01, 0.03, 0.1, 0.3, 1, 3, a grid that grows for all
arms while the best value of any lies at its edge. Seeds 900 to 903 are a pilot, used for nothing
else; it gives the number of fair seeds, 8 to 16, so that the predicted half-width of each contrast
is at most half its delta. As published: 8 seeds.

Budgets: `small` 500 steps (where the study cuts its plot), `full` its 1,000; `tiny` tries the
wiring and decides nothing.

Changed against the source: training images, start and order vary with the seed; 20 subsamples of
the ones in place of the first; balanced accuracy beside accuracy; evaluation leaves the running
statistics alone; decay 0.99. On the digits, counts in proportion: a demonstration.

Rows: arm fields part, norm, rate; a tuning row has `step`, `accuracy`, `diverged`; another one
`step`, `ratios` ("true", "intended"), `ones` (how many), `odds` (ones / zeros), `mode`, `balanced`,
`accuracy` (means over the subsamples), `diverged`. Where normalization does not depend on the other
images ("none", "ln") there is the mode "running" only.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import PLACES, Setting, answer
from gammabeta.studies._claims import claims
from gammabeta.studies._class_ratio.contrasts import (
    ARMS,
    PUBLISHED_RATES,
    WHOLE,
    WORDS,
    Found,
    contrasts,
    found_in,
    notes_of,
    planned,
    shown,
)
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint, outcome
from gammabeta.studies._nets import MLP, Norm, m2, renorm
from gammabeta.studies._pairs import Tuning, collect, tune
from gammabeta.studies._train import accuracy, log_steps, pixels, stream, train
from gammabeta.studies._tuned import EQUIVALENCE_SEEDS, PILOT_SEEDS, TUNING_SEEDS, own
from gammabeta.studies._verdict import Verdict, controlled, interval

CLAIMS = ("mismatch", "brn-mismatch", "f-mismatch")
MODES = ("whole", "running", "precise", "64")
COUNTS = {"true": (1135, 500, 250, 50), "intended": (980, 109, 52, 10)}  # ones beside 980 zeros
ZEROS, SUBSAMPLES = 980, 20
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_COST = {"none": 0.6, "bn": 0.8, "brn": 1.9, "ln": 0.8}  # ms a step
_EVALUATION = {"none": 0.1, "bn": 1.8, "brn": 1.8, "ln": 0.1}  # s


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    seeds: int
    rates: tuple[float, ...]
    subsamples: int
    decides: bool


PLANS = {
    "tiny": Plan(20, 1, (0.1, 1.0), 2, False),
    "small": Plan(500, 8, RATES, SUBSAMPLES, True),
    "full": Plan(1000, 8, RATES, SUBSAMPLES, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until the grid is settled; the main runs, seed by seed; pilot; more seeds."""
    plan, rows = PLANS[budget], own(rows, budget, data)
    tuning = _tuning(rows, plan)
    wanted = [
        _cell(plan, 0, seed, "tuning", norm, rate)
        for seed in TUNING_SEEDS
        for rate in tuning.grid
        for norm in ARMS
    ]
    if tuning.best is None:
        return wanted
    return wanted + _main(plan, tuning.best, seeds, planned(rows, tuning.best))


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: the grid does not grow, the pilot asks for no more seeds."""
    plan = PLANS[budget]
    guess = dict.fromkeys(ARMS, plan.rates[0])
    return cells(budget, data, seeds, []) + _main(plan, guess, seeds, None)


def _main(
    plan: Plan, best: Mapping[str, float], seeds: int | None, planned: int | None
) -> list[Cell]:
    count = plan.seeds if seeds is None else seeds
    wanted: list[Cell] = []
    for seed in range(count):
        wanted += [_cell(plan, 1, seed, "fair", norm, best[norm]) for norm in ARMS]
        wanted += [
            _cell(plan, 1, seed, "published", norm, rate)
            for rate in PUBLISHED_RATES
            for norm in ("none", "bn", "brn")
        ]
    if seeds is None and plan.decides:
        for seed in PILOT_SEEDS:
            wanted += [_cell(plan, 2, seed, "pilot", norm, best[norm]) for norm in ("bn", "brn")]
        for seed in range(count, planned or 0):
            wanted += [_cell(plan, 3, seed, "fair", norm, best[norm]) for norm in ARMS]
    return wanted


def _cell(plan: Plan, wave: int, seed: int, part: str, norm: str, rate: float) -> Cell:
    cost = plan.steps / 1000 * _COST[norm] + 0.1
    if part != "tuning":
        cost += _EVALUATION[norm] * plan.subsamples / SUBSAMPLES
    arm: Mapping[str, Scalar] = {"part": part, "norm": norm, "rate": rate}
    return Cell("class-ratio", arm, seed, round(cost, 3), wave)


def _tuning(rows: Sequence[Row], plan: Plan) -> Tuning:
    trials = {
        (str(norm), float(rate)): by_seed
        for (part, norm, rate), by_seed in collect(rows, ("part", "norm", "rate")).items()
        if part == "tuning" and isinstance(rate, int | float)
    }
    return tune(trials, plan.rates, TUNING_SEEDS, grow=plan.decides, arms=ARMS)


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network on zeros and ones; evaluate it at every class ratio, in every mode."""
    part, norm, plan = str(arm["part"]), str(arm["norm"]), PLANS[budget]
    train_x, train_y, test_x, test_y = split(part, seed, data)
    eps = 1e-3 if part == "published" else 1e-5
    width, steps = train_x.flatten(1).shape[1], plan.steps
    stops = log_steps(steps, 4)[-3:] if part == "tuning" else [steps]
    start = stream(seed, "weights")
    net = m2(width, "sigmoid", norm_of(norm, steps, eps), start, eps=eps, momentum=0.01)
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=steps,
        order=stream(seed, "order"),
        stops=stops,
        loss="sum" if part == "published" else "mean",
    )
    x = pixels(test_x, data.pixel_max)
    for step, loss in training:
        head: Row = {"step": step, "diverged": not math.isfinite(loss)}
        if part == "tuning":
            yield {**head, "accuracy": accuracy(net, x, test_y)}
        else:
            modes = MODES if norm in ("bn", "brn") else ("running",)
            reference = pixels(train_x, data.pixel_max)
            draws = stream(seed, "subsamples")
            for row in evaluate(net, x, test_y, reference, modes, plan.subsamples, draws):
                yield {**head, **row}


def split(part: str, seed: int, data: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zeros and ones: up to 5,000 of each for training, and those to be evaluated."""
    order = torch.randperm(len(data.train_x), generator=stream(seed, "images"))
    if data.name == "digits":
        train_at, validation_at, test_at = torch.split(order[:1797], [1000, 297, 500])
        test_x, test_y = data.train_x[test_at], data.train_y[test_at]
    else:
        train_at, validation_at = order[order < 55000], torch.arange(55000, 60000)
        test_x, test_y = data.test_x, data.test_y
    if part == "tuning":
        test_x, test_y = data.train_x[validation_at], data.train_y[validation_at]
    labels = data.train_y[train_at]
    kept = torch.cat([train_at[labels == digit][:5000] for digit in (0, 1)])
    seen = test_y < 2
    return data.train_x[kept], data.train_y[kept], test_x[seen], test_y[seen]


def norm_of(norm: str, steps: int, eps: float) -> Norm:
    """What stands before each activation."""
    if norm == "brn":
        return renorm(steps, eps, 0.01)
    if norm == "ln":
        return lambda width: nn.LayerNorm(width, eps=eps)
    return norm == "bn"


def evaluate(
    net: MLP,
    x: Tensor,
    labels: Tensor,
    reference: Tensor,
    modes: Sequence[str],
    subsamples: int,
    draws: torch.Generator,
) -> Iterator[Row]:
    """A row for each count of ones and each mode."""
    zeros, ones = x[labels == 0], x[labels == 1]
    both = torch.cat([zeros, ones])
    is_one = torch.cat([torch.zeros(len(zeros)), torch.ones(len(ones))]).long()

    def whole(at: Tensor) -> tuple[Tensor, Tensor]:
        return net.with_batch_statistics(both[at]), at

    def small(at: Tensor) -> tuple[Tensor, Tensor]:
        size = min(64, len(at))
        kept = at[torch.randperm(len(at), generator=draws)][: len(at) - len(at) % size]
        return net.with_batch_statistics(both[kept], size), kept

    with torch.no_grad():
        fixed = {"precise": net.with_statistics_of(reference, both)} if len(modes) > 1 else {}
        fixed["running"] = net.eval()(both)
        answers: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
            "whole": whole,
            "64": small,
            "precise": lambda at: (fixed["precise"][at], at),
            "running": lambda at: (fixed["running"][at], at),
        }
        for ratios, counts in COUNTS.items():
            for wanted in counts:
                # On the digits in proportion to their zeros.
                count = min(max(round(wanted * len(zeros) / ZEROS), 1), len(ones))
                shares: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
                for _ in range(subsamples if count < len(ones) else 1):
                    drawn = torch.randperm(len(ones), generator=draws)[:count] + len(zeros)
                    at = torch.cat([torch.arange(len(zeros)), drawn])
                    for mode in modes:
                        logits, kept = answers[mode](at)
                        shares[mode].append(_shares(logits, is_one[kept]))
                for mode, found in shares.items():
                    yield {
                        "ratios": ratios,
                        "ones": count,
                        "odds": count / len(zeros),
                        "mode": mode,
                        "balanced": statistics.fmean(b for b, _ in found),
                        "accuracy": statistics.fmean(a for _, a in found),
                    }


def _shares(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Balanced accuracy and accuracy; a class that is not there does not count."""
    right = (logits.argmax(1) == labels).double()
    each = [float(right[labels == digit].mean()) for digit in (0, 1) if (labels == digit).any()]
    return statistics.fmean(each), float(right.mean())


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """The three claims; what is missing makes them inconclusive."""
    if not rows:
        return []
    budget, data = str(rows[0]["budget"]), str(rows[0]["data"])
    plan, found = PLANS[budget], found_in(rows)
    tuning = _tuning(rows, plan)
    best = tuning.best or {}
    fair, pilot = contrasts(found, "fair", best), contrasts(found, "pilot", best)
    letter = {
        f"rate {rate:g}": contrasts(found, "published", dict.fromkeys(ARMS, rate))
        for rate in PUBLISHED_RATES
    }
    notes = notes_of(tuning, rows, plan.steps, decides=plan.decides)
    where = ("class-ratio", budget, data, "MLP 100-100, sigmoid, digits 0 and 1")
    setting = Setting(
        *where,
        "each network at its best learning rate",
        "points of balanced accuracy",
        plan.decides,
    )
    verdicts = []
    for claim in CLAIMS:

        def said(parts: Mapping[str, Mapping[str, Part]], claim: str = claim) -> Any:
            whole = joint(parts[claim], EQUIVALENCE_SEEDS)
            if claim != "brn-mismatch":
                return whole
            hurt = outcome(parts["f-mismatch"][WHOLE], EQUIVALENCE_SEEDS)
            return controlled(whole, hurt)

        first = next(iter(fair[claim]))
        verdicts.append(
            answer(
                claim,
                setting,
                WORDS[claim],
                said(fair),
                {level: said(parts) for level, parts in letter.items()},
                delta=claims()[claim].thresholds["delta"],
                pilot={first: list(pilot[claim][first].values)},
                planned=planned(rows, best),
                notes=[*notes, *shown(found, best, claim, MODES)],
            )
        )
    return verdicts


# -- figures ------------------------------------------------------------------------------------


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Balanced accuracy over the class ratio: one panel for each mode."""
    if not rows:
        return []
    plan, data, found = PLANS[str(rows[0]["budget"])], str(rows[0]["data"]), found_in(rows)
    best = _tuning(rows, plan).best or {}
    settings = [("fair", "fair", best)]
    settings += [
        (
            f"published-{rate:g}".replace(".", "-"),
            f"as published, rate {rate:g}",
            dict.fromkeys(ARMS, rate),
        )
        for rate in PUBLISHED_RATES
    ]
    drawn = []
    for key, name, rates in settings:
        part = key.split("-")[0]
        panels: list[dict[str, Any]] = []
        for mode in MODES:
            series = [
                s for norm in ARMS if (s := _series(found, part, norm, rates.get(norm), mode))
            ]
            if series:
                panels.append({"title": _MODES[mode], "series": series})
        if panels:
            title = f"Balanced accuracy over the share of ones, {name}, on {PLACES.get(data, data)}"
            ends = [
                f"{panel['title']}: {one['name']} {one['y'][0]:.1f} %"
                for panel in panels
                for one in panel["series"]
            ]
            drawn.append(
                {
                    "id": f"class-ratio-{key}",
                    "experiment": "class-ratio",
                    "kind": "curves",
                    "title": title,
                    "caption": "Digits 0 and 1; the study's true counts and the intended ones. "
                    "Mean over seeds; the band is its 95 % interval.",
                    "alt": f"{title}. With the fewest ones: {'; '.join(ends)}.",
                    "x": {"label": "ones per zero in the test set", "log": True},
                    "y": {"label": "balanced accuracy (%)", "log": False},
                    "panels": panels,
                }
            )
    return drawn


_MODES = {
    "whole": "the test set's own statistics",
    "running": "running statistics",
    "precise": "statistics of the training images",
    "64": "statistics of test batches of 64",
}
_NAMES = {"none": "without", "bn": "with batch normalization", "brn": "Batch Renormalization"}


def _series(
    found: Found, part: str, norm: str, rate: float | None, mode: str
) -> dict[str, Any] | None:
    mode_of = "running" if norm in ("none", "ln") else mode
    by_odds: dict[float, list[float]] = {}
    for sets in found.get((part, norm, rate), {}).values():
        for ratios in COUNTS:
            for odds, value in sets.get((ratios, mode_of), {}).items():
                by_odds.setdefault(odds, []).append(value)
    if not by_odds:
        return None
    places = sorted(by_odds)
    bands = [interval(by_odds[p]) if len(by_odds[p]) > 1 else None for p in places]
    means = [statistics.fmean(by_odds[p]) for p in places]
    return {
        "name": _NAMES.get(norm, "layer normalization"),
        "style": norm,
        "x": places,
        "y": means,
        "lo": [max(b.lo, 0.0) if b else m for b, m in zip(bands, means, strict=True)],
        "hi": [min(b.hi, 100.0) if b else m for b, m in zip(bands, means, strict=True)],
        "n": min(len(v) for v in by_odds.values()),
    }
