"""Do auxiliary losses help deep networks, and do the last layers learn first?

Two claims of Kainz's lecture (after D2L) on how deep networks learn, on which it builds its case
for batch normalization (BN). Dense networks, pixels-[100]*L-10, weights from a truncated normal
distribution with standard deviation sqrt(2 / fan-in), BN before the activation where there is any,
no bias where it follows, bias 0.1 elsewhere. SGD without momentum, batches of 64, mean
cross-entropy, 5,000 training images drawn for each seed from the first 55,000, PyTorch's defaults
for the layer. All arms of a seed share start and batches.

Fair (the only verdict: the lecture has no runs, and the network of Lee et al. 2015 is a
convolutional one, trained otherwise)
    Each arm trains at its own best learning rate: highest accuracy on the first 2,000 of the last
    5,000 training images, mean of seeds 800 and 801, from 0.03, 0.1, 0.3 (sigmoid: also 1, 3); a
    best value at an edge extends the grid for all arms of that network, unless it is below 20 %,
    where no rate is better than chance. Seeds 900 to 903 are a pilot: they give the
    number of seeds (5 to 16; predicted half-width of the 95 % interval delta / 2), and are used for
    nothing else.

deep-supervision (auxiliary losses at intermediate layers help to some degree; Lee et al. 2015)
    12 layers, ReLU and sigmoid. Arms: plain; auxiliary heads, linear on the activations of layers
    3, 6 and 9, whose mean cross-entropies enter the loss with weight 0.3 each, left out at test;
    BN; both (shown, at the rate of BN, 5 seeds). Test accuracy (first 5,000 images; all at `full`)
    by running statistics, mean of three evaluations, at 96, 98 and 100 % of the steps.
    Primary contrast, in points, superiority, delta = 1, for each activation: heads - plain (they
    help), and BN - heads (to some degree: less than BN). Levels, declared beforehand: ReLU,
    sigmoid; a level holds if both parts do, and is refuted if any is (at 1 - 0.05/4). Shown: ln of
    the ratio of first-layer gradients at the first step, heads over plain, same start and batch.
    What its author would call fair: heads where the depth hurts, weights of the source's order,
    rates of their own. What would embarrass us: networks that are not deep enough for any aid to be
    needed; hence sigmoid beside ReLU, and the levels.

top-first (the last layers adapt first, the lower ones later, and then the last must adapt again)
    Five layers of ReLUs; the verdict is about networks without BN, as the lecture's story is; BN is
    shown, 5 seeds. What each layer gives to the next (and the logits), on 1,000 test images as one
    batch, at the start and at 30 log-spaced steps: linear CKA with the same at the end of training.
    A layer has settled at the step at which it reaches 0.9 of its final value, interpolated.
    Level "order", the primary contrast: Spearman's correlation, over the 6 layers of one network,
    of that step with the distance from the output; superiority, delta = 0.3 (positive: lower layers
    later). All steps equal counts as 0. Level "re-adaptation": after a tenth of the steps all
    layers train on for 100 steps; ln of the loss of the new lower layers under the old last two
    (last hidden layer and output; 1,000 training images), minus ln of the loss before: superiority,
    delta = 0.05. Shown: 1 and 10 steps; the loss where all layers have moved; steps of the last two
    layers alone until the loss is what it was (100 at most); the correlation where a layer has
    settled once CKA has made 0.9 of its way, since lower layers of random weights resemble their
    final state from the start; speed of the weights.
    What its author would call fair: no BN, the layers' outputs and not their weights, and lower
    layers that move as they do in training. What would embarrass us: an order that is only that of
    similarity at the start; hence the second correlation.

No positive control: neither claim explains why BN helps.

Budgets: `small` trains 300 and 800 steps, `full` 1,000 and 1,500. `tiny` tries the wiring with one
rate; it decides nothing. On the bundled digits each seed splits the 1,797 images anew: a
demonstration. Changed against the registry: these numbers of steps; deltas, where it asks for
intervals above 0 only, which nothing could refute; both arms together at the rate of BN. The
registry holds the last layers while those below train: then these descend on the very loss that is
to rise, which cannot show what is asked; so they move as they do where all layers train.

Networks of one shape train side by side in one cell, each with its own rate; they do not meet.

Rows: arm fields part, group (the network), norm and trials (those side by side), or arm and rate;
`arm`, `rate`, `step`, `accuracy`, `diverged`, `gradient`; part "layers": draws, see `_draws`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies import _draws
from gammabeta.studies._answer import Words
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._deep_layers import heads, layers
from gammabeta.studies._draws import Question
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._outcomes import asked_for, beside, by_weakest
from gammabeta.studies._pairs import NORMS
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._targets import Target
from gammabeta.studies._tuned import (
    LEAST_SEEDS,
    MOST_SEEDS,
    PILOT_SEEDS,
    Best,
    Trained,
    Tuned,
    Wish,
    complete,
    fair_verdict,
    guess,
    minus,
    needed_in,
    own,
    settle,
    shown,
    tuning_figure,
    tuning_notes,
)
from gammabeta.studies._verdict import Verdict, half_width, interval

CLAIMS = ("deep-supervision", "top-first")

ACTIVATIONS = {"ReLU": "relu", "sigmoid": "sigmoid"}
# arm -> whether heads teach it, whether it has BN
ARMS = {"plain": (False, False), "heads": (True, False), "bn": (False, True), "both": (True, True)}
TUNED = ("plain", "heads", "bn")
FIVE = "5 layers"
GROUPS: dict[str, tuple[str, ...]] = {**dict.fromkeys(ACTIVATIONS, TUNED), FIVE: NORMS}
_ORDER = "rank correlation with depth, without"
_AGAIN = "rise of ln loss, layers below 100 steps ahead, without"


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    layer_steps: int
    depth: int
    seeds: int
    rates: Mapping[str, tuple[float, ...]]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


_RATES = dict.fromkeys(GROUPS, (0.03, 0.1, 0.3)) | {"sigmoid": (0.03, 0.1, 0.3, 1.0, 3.0)}
PLANS = {
    "tiny": Plan(3, 20, 6, 1, dict.fromkeys(GROUPS, (0.1,)), 500, False),
    "small": Plan(300, 800, heads.DEPTH, LEAST_SEEDS, _RATES, 5000, True),
    "full": Plan(1000, 1500, heads.DEPTH, LEAST_SEEDS, _RATES, 10000, True),
}
TUNING_IMAGES = 2000
CHANCE = 20.0  # percent: no grid grows for an arm that stays below at every rate


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Each network: tuning until its grid is settled; then its main runs; pilot; more seeds."""
    plan = PLANS[budget]
    tuned = _settled(own(rows, budget, data), plan)
    draws = _draws.planned(_question(), _layer_rows(tuned.rows, tuned.best))
    planned = {group: _planned(group, tuned) for group in ACTIVATIONS}
    return _wanted(plan, seeds, tuned, planned, draws)


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, ReLU needs most seeds, the others least."""
    plan, planned = PLANS[budget], {"ReLU": MOST_SEEDS, "sigmoid": LEAST_SEEDS}
    return _wanted(plan, seeds, guess(GROUPS, plan, rate=0.1), planned, LEAST_SEEDS)


def _settled(rows: Sequence[Row], plan: Plan) -> Tuned:
    return settle(rows, GROUPS, plan, floor=CHANCE)


def _wanted(
    plan: Plan,
    seeds: int | None,
    tuned: Tuned,
    planned: Mapping[str, int | None],
    draws: int | None,
) -> list[Cell]:
    """Heads: ``planned`` seeds by their pilots; layers: ``draws``."""
    wanted: list[Wish] = []
    for group in GROUPS:
        main = _main(group, tuned.best) if group in tuned.best and group != FIVE else None
        wanted += needed_in(group, tuned, plan.seeds, seeds, main, planned.get(group))
    few = range(LEAST_SEEDS if seeds is None else seeds)
    wanted = [w for w in wanted if w.what.arm != "both" or (w.part == "fair" and w.seed in few)]
    found = _bundled(plan, [wish for wish in wanted if wish.what.group != FIVE])
    found += [_layers(plan, *wish) for wish in wanted if wish.what.group == FIVE]
    if FIVE not in tuned.best:
        return found
    none, bn = (Trained(FIVE, norm, tuned.best[FIVE][norm]) for norm in ("none", "bn"))
    count = plan.seeds if seeds is None else seeds
    found += [_layers(plan, 1, s, "layers", what) for s in range(count) for what in (none, bn)]
    if seeds is None and plan.decides:
        found += [_layers(plan, 2, seed, "layers", none) for seed in PILOT_SEEDS]
        found += [_layers(plan, 3, seed, "layers", none) for seed in range(count, draws or 0)]
    return found


def _main(group: str, best: Best) -> list[Trained]:
    rates = {**best[group], "both": best[group]["bn"]}
    return [Trained(group, arm, rate) for arm, rate in rates.items()]


def _bundled(plan: Plan, wanted: Sequence[Wish]) -> list[Cell]:
    """Cells of networks of one shape; rates that a grid grew by come in cells of their own."""
    bundles: dict[tuple[int, int, str, str, bool, float], list[Trained]] = {}
    for wave, seed, part, what in wanted:
        grown = part == "tuning" and what.rate not in plan.rates[what.group]
        norm = ARMS[what.arm][1]
        key = (wave, seed, part, what.group, norm, what.rate if grown else 0.0)
        bundles.setdefault(key, []).append(what)
    found = []
    for (wave, seed, part, group, norm, _), trials in bundles.items():
        said = ", ".join(f"{what.arm} {what.rate:g}" for what in trials)
        arm: dict[str, Scalar] = {"part": part, "group": group, "norm": norm, "trials": said}
        # In seconds, about: steps, and looks at the evaluation images.
        layer = 0.05e-3 + len(trials) * (0.2e-3 if norm else 0.12e-3)
        look = plan.depth * len(trials) * 1e-6 * _evaluated(plan, part)
        cost = plan.steps * (0.5e-3 + plan.depth * layer) + 3 * look
        found.append(Cell("deep-layers", arm, seed, round(cost, 3), wave))
    return found


def _layers(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    step = 0.5e-3 + layers.LAYERS * (0.21e-3 if what.arm == "bn" else 0.1e-3)
    more = 0.0 if part == "tuning" else 0.5
    return Cell("deep-layers", arm, seed, round(plan.layer_steps * step + more, 3), wave)


def _evaluated(plan: Plan, part: str) -> int:
    return min(plan.images, TUNING_IMAGES if part == "tuning" else 10000)


def _differences(tuned: Tuned, part: str) -> dict[str, dict[int, float]]:
    """Heads - plain and BN - heads by activation and seed; empty where a network is missing."""
    return {
        f"{name}, {group}": tuned.minus(part, group, *pair)
        for group in ACTIVATIONS
        for name, pair in (
            ("heads − plain", ("heads", "plain")),
            ("BN − heads", ("bn", "heads")),
        )
    }


def _planned(group: str, tuned: Tuned) -> int | None:
    """Seeds that the pilot of an activation asks for, None before it is complete."""
    found = _differences(tuned, "pilot")
    pilot = {name: by_seed for name, by_seed in found.items() if name.endswith(group)}
    if not complete(pilot):
        return None
    deltas = dict.fromkeys(pilot, claims()["deep-supervision"].thresholds["delta"])
    return asked_for(pilot, deltas, LEAST_SEEDS, MOST_SEEDS)


def _layer_rows(rows: Sequence[Row], best: Best) -> list[Row]:
    """Draws at the rates that are best; those of a smaller grid are left out."""
    rates = best.get(FIVE, {})
    return [
        row
        for row in rows
        if row.get("part") == "layers" and rates.get(str(row["arm"])) == row["rate"]
    ]


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train the networks of one cell: a row for each evaluation, or the numbers of a draw."""
    part, group, plan = str(arm["part"]), str(arm["group"]), PLANS[budget]
    if group == FIVE:
        run = layers.draw if part == "layers" else layers.trial
        yield from run(seed, data, str(arm["arm"]), float(arm["rate"] or 0.0), plan.layer_steps)
        return
    named = [trial.split() for trial in str(arm["trials"]).split(", ")]
    trials = [heads.Trial(ARMS[name][0], float(rate)) for name, rate in named]
    evaluation = "validation" if part == "tuning" else "test"
    for k, row in heads.trained(
        seed,
        data,
        ACTIVATIONS[group],
        bool(arm["norm"]),
        trials,
        evaluation,
        plan.steps,
        _evaluated(plan, part),
        plan.depth,
    ):
        yield {"arm": named[k][0], "rate": trials[k].rate, **row}


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """Two claims, fair; what is missing makes a claim inconclusive."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    tuned = _settled(rows, plan)
    found = [_supervision(tuned)]
    layer_rows = _layer_rows(rows, tuned.best)
    if layer_rows:
        tunings, budget = {FIVE: tuned.tunings[FIVE]}, str(rows[0]["budget"])
        notes = tuning_notes(tunings, budget, decides=plan.decides)
        found.append(_draws.verdict(_question(), "deep-layers", layer_rows, notes=notes))
    return found


def _question() -> Question:
    limits = claims()["top-first"].thresholds
    delta, rise = limits["delta"], limits["rise"]
    return Question(
        "top-first",
        {
            _ORDER: Target("order", 0.0, math.inf, delta, delta),
            _AGAIN: Target("re-adaptation", 0.0, math.inf, rise, rise),
        },
        _draws.Words(
            "lower layers settle later, and where they move on the last layers must follow",
            "lower layers do not settle later, or the last layers need not follow them",
            "rank correlation, or ln of the loss",
            "MLP of five layers without BN, at its best learning rate,",
        ),
        on_images=True,
        published={},
    )


def _supervision(tuned: Tuned) -> Verdict:
    best, pilot = tuned.best, _differences(tuned, "pilot")
    delta = claims()["deep-supervision"].thresholds["delta"]
    parts = {
        name: Part(list(v.values()), "superiority", delta, level=name.split(", ")[1])
        for name, v in _differences(tuned, "fair").items()
    }
    found = by_weakest(joint(parts, LEAST_SEEDS))
    more: list[dict[str, Any]] = []
    for group in ACTIVATIONS:
        if group not in best:
            continue
        both, bn = (Trained(group, arm, best[group]["bn"]) for arm in ("both", "bn"))
        more += shown(f"both − BN, {group}", list(minus(tuned.runs, "fair", both, bn).values()))
        more += shown(f"ln gradient, heads / plain, {group}", _gradients(tuned.rows, group, best))
    words = Words(
        "auxiliary heads gain accuracy and batch normalization gains more; the smallest difference "
        "is {weakest}",
        "not both hold with every activation, that auxiliary heads raise the accuracy, in points, "
        "by at least {delta} and that batch normalization raises it by {delta} more: {refuted}",
        "the smallest difference is {weakest}",
        "auxiliary heads raise the accuracy, in points, by at least {delta}, and batch "
        "normalization by {delta} more, with one activation only; not {refuted}",
    )
    verdict = fair_verdict(
        "deep-supervision",
        tuned.setting("deep-layers", "MLP of 12 layers"),
        words,
        found,
        pilot=pilot,
        planned=None,
        notes=tuned.notes(*ACTIVATIONS),
    )
    # Each activation has a number of seeds of its own.
    asked = _planned(found.weakest.split(", ")[1], tuned) if found.weakest else None
    if asked is not None and found.weakest:
        predicted = half_width(interval(pilot[found.weakest].values()).sd, asked)
        verdict = dataclasses.replace(verdict, planned_half_width=predicted)
    return beside(verdict, more)


def _gradients(rows: Sequence[Row], group: str, best: Best) -> list[float]:
    """ln of heads / plain of the first layer's gradient at the first step, by seed."""
    by: dict[str, dict[int, float]] = {"heads": {}, "plain": {}}
    for row in rows:
        size, seed, name = row.get("gradient"), row["seed"], str(row.get("arm"))
        if (row.get("part"), row.get("group")) != ("fair", group) or name not in by:
            continue
        if row["rate"] == best[group][name] and isinstance(size, float) and isinstance(seed, int):
            by[name][seed] = size
    first, second = by["heads"], by["plain"]
    shared = sorted(first.keys() & second.keys())
    return [math.log(first[s] / second[s]) for s in shared if first[s] > 0 and second[s] > 0]


_FIGURES = {
    f"{norm}{what}": Axes(
        f"{title}, {layers.LABELS[norm]}", "training step", y, x_log=True, y_log=log
    )
    for what, title, y, log in (
        ("", "Similarity of each layer's output with that at the end", "linear CKA", False),
        ("-speed", "Speed of each layer's weights", "relative change per step", True),
    )
    for norm in ("none", "bn")
}


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Layers over time, and how the rates were chosen."""
    if not rows:
        return []
    tuned = _settled(rows, PLANS[str(rows[0]["budget"])])
    drawn = [r for r in _layer_rows(rows, tuned.best) if r["seed"] not in PILOT_SEEDS]
    figures_of_layers = drawings("deep-layers", _FIGURES, drawn)
    return [*figures_of_layers, *tuning_figure("deep-layers", tuned, "all networks")]
