"""Six claims that need a small fit: batch statistics, dense regions, deep networks trained briefly.

lln              The MNIST study's network (pixels-100-100-10, ReLU, BN) after 300 steps of SGD
                 (batch of 64, rate 0.1); the population: the first 55,000 training images. Standard
                 deviation over 100 batches of the batch mean and of the (biased) batch variance of
                 what enters each BN, m = 4 ... 4096, divided by the formula for m draws without
                 replacement (for the variance with the population's fourth moment), as slope on a
                 log-log scale: -0.5 plus the slope of the ratio, mean over the units. Moving
                 average with decay rho of means of 8: variance over (1 - rho)/(1 + rho) of theirs,
                 for 0.9, 0.99, 0.999, from chains of 1/(1 - rho) steps (at least 20), corrected for
                 the part of the start that they still hold
minibatch-stats  The same network: RMS difference of values normalized by their own batch and by
                 the population, m = 4 ... 1024, against the formula for finite m (from the
                 population's kurtosis; see `_small_fits.population.theory`), slope as above. Shown:
                 agreement of the predicted class
dense-region     1-32-32-1, tanh, y = sin(3x), x ~ N(-1, 0.3^2), 2,000 steps of Adam (rate 0.01,
                 falling to 0 over the second half), fresh batches of 64. A draw is 5 fits. (a)
                 Spearman correlation of density and absolute error over [-2, 2]; (b) log10 of the
                 loss on N(c, 0.3^2), c = -0.5 ... 2, over that on c = -1; (c) ln of the variance
                 between the fits where |x + 1| >= 0.9 over that where |x + 1| <= 0.3; (d) the fit
                 with the lowest loss on c = 2 is drawn as "the better fit"; (e) control: y = 2x
                 with a linear model fitted around -1 and around +1 the same way (rate 0.1): rms
                 difference of the two over [-2, 2], in standard deviations of 2x. Shown, 5 seeds:
                 both fits for densities around -1, -0.75, ..., 2, one start and the same draws
batch-variance   The same network, 1,000 steps, x ~ N(-1, s^2), s = 0.1, 0.3, 1: ln of the loss on
                 evenly spaced x in [-3, 1], s = 0.1 minus s = 1, same start and draws. The data are
                 as narrow as the batches; shown beside: wide data in narrow batches
bjorck-activations   pixels-[100]*20-10, ReLU, 5,000 images, SGD, batch of 64: (last - none) over
                 (all - none) in test accuracy, with BN before every activation, before the last
                 one alone, nowhere. Control: all - none. Shown: after 10 steps at the rate that the
                 network without BN cannot bear, slope over the layers of log10 of the activations'
                 standard deviation, and the kurtosis of a gradient
residual-identity    Residual towers of dense layers on images pooled 2x2 (see
                 `_small_fits.deep.Towers`). Level "scale": before training, 64 blocks of width 64,
                 256 images: log-log slope of the branch's share of the variance of the sum, blocks
                 8 to 64, as the claim is about large numbers. Level "training": 64 blocks of width
                 16, test accuracy with BN - without, delta 5 points. Shown, 3 seeds: 8 and 32
                 blocks, and SkipInit (the branch times a learned number that starts at 0)

Each draw is a seed. Four pilot seeds (900 to 903), used for nothing else, give their number: at
least 5, at most 16, so that the half-width of the 95 % interval is predicted to be half of what the
rule has to tell apart. Each claim's numbers have a target, and all have to meet theirs, as in
`initialization`.

The two deep ones compare arms each at its own best learning rate: highest validation accuracy (mean
of the last three evaluations, at 96, 98 and 100 % of the steps), mean of seeds 800 and 801, from
0.01 ... 3 (towers: from 0.0001, for each depth and kind); a best value at an edge extends the grid
of all arms. Accuracy by running statistics, the same mean, 5,000 training images. Arms share start
and batches.

As published: the claims about statistics and about fits are arguments, tried as they are stated:
one verdict for both. The two deep ones were found on large residual networks, not tried here.

Budgets: `small` trains the deep networks 150 steps and the towers 120, `full` 500; `tiny` a few, it
decides nothing. Changed against the registry: these numbers of steps, 100 batches instead of 200,
1,000 steps in batch-variance. On the bundled digits all but dense-region and batch-variance, which
see no images, are demonstrations.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._draws import LEAST_SEEDS, PILOT_SEEDS, Question, Words, planned, verdict
from gammabeta.studies._experiments import Cell
from gammabeta.studies._pairs import LADDER, Tuning, collect, tune
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._small_fits import curves, deep, population
from gammabeta.studies._small_fits._common import value
from gammabeta.studies._targets import Target
from gammabeta.studies._train import stream
from gammabeta.studies._verdict import Verdict

CLAIMS = (
    "lln",
    "minibatch-stats",
    "dense-region",
    "batch-variance",
    "bjorck-activations",
    "residual-identity",
)
TUNING_SEEDS = (800, 801)
SHOWN_SEEDS = 3
MOVED_SEEDS = 5
_COSTS = {"lln": 2.5, "minibatch-stats": 2.0, "dense-region": 2.2, "batch-variance": 1.1}
_MOVED_COST = 2.8


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: Mapping[str, int]  # of the deep ones
    rates: Mapping[str, tuple[float, ...]]
    decides: bool


_RATES = {
    "bjorck-activations": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "residual-identity": tuple(rate for rate in LADDER if rate <= 3),
}
PLANS = {
    "tiny": Plan(dict.fromkeys(_RATES, 4), dict.fromkeys(_RATES, (0.01, 0.1)), False),
    "small": Plan({"bjorck-activations": 150, "residual-identity": 120}, _RATES, True),
    "full": Plan(dict.fromkeys(_RATES, 500), _RATES, True),
}
KINDS = {"bjorck-activations": deep.KINDS, "residual-identity": deep.TOWERS}
DEPTHS = {"bjorck-activations": (20,), "residual-identity": (64, 32, 8)}
# Milliseconds of a step, without BN and with it, for each layer or block.
_STEP = {"bjorck-activations": (0.17, 0.27), "residual-identity": (0.12, 0.27)}

Best = Mapping[tuple[str, int], Mapping[str, float]]  # claim, depth -> kind -> learning rate


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """The pilot and the tuning; then as many draws as the pilot asks for."""
    plan = PLANS[budget]
    pilot = seeds is None and plan.decides
    wanted, best = [], _best(rows, plan)
    for claim in KINDS:
        for depth in _depths(claim, plan):
            tuning = _tuning(claim, depth, rows, plan)
            wanted += _trials(budget, claim, depth, tuning.grid)
    for claim in CLAIMS:
        settled = [best.get((claim, depth)) for depth in _depths(claim, plan)]
        if None in settled:
            continue
        if pilot:
            first = 1 if claim in KINDS else 0
            wanted += [_draw(budget, claim, s, "pilot", first, best) for s in PILOT_SEEDS]
            count = planned(question(claim), _own(claim, rows, best)) or 0
        else:
            count = (2 if budget == "tiny" else LEAST_SEEDS) if seeds is None else seeds
        wanted += [_draw(budget, claim, seed, "fair", 2, best) for seed in range(count)]
        if claim == "dense-region":
            arm = {"claim": claim, "part": "shown"}
            shown = range(MOVED_SEEDS if pilot else min(MOVED_SEEDS, count))
            wanted += [Cell("small-fits", arm, seed, _MOVED_COST, 2) for seed in shown]
        if claim == "residual-identity":
            wanted += _shown(budget, range(min(SHOWN_SEEDS, count) if not pilot else SHOWN_SEEDS),
                             plan, best)  # fmt: skip
    return wanted


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for the least."""
    plan = PLANS[budget]
    guess = {(c, depth): dict.fromkeys(KINDS[c], 0.1) for c in KINDS for depth in DEPTHS[c]}
    wanted = cells(budget, data, seeds, [])
    pilot = seeds is None and plan.decides
    count = seeds if seeds is not None else LEAST_SEEDS if plan.decides else 2
    for claim in CLAIMS:
        if pilot and claim in KINDS:
            wanted += [_draw(budget, claim, s, "pilot", 1, guess) for s in PILOT_SEEDS]
        if pilot or claim in KINDS:
            wanted += [_draw(budget, claim, seed, "fair", 2, guess) for seed in range(count)]
    return wanted + _shown(budget, range(min(SHOWN_SEEDS, count)), plan, guess)


def _depths(claim: str, plan: Plan) -> tuple[int, ...]:
    """The first one decides."""
    depths = DEPTHS.get(claim, ())
    return depths if plan.decides else depths[:1]


def _trials(budget: str, claim: str, depth: int, grid: Sequence[float]) -> list[Cell]:
    first = PLANS[budget].rates[claim]
    # Towers train side by side, a rate each; what the grid grows by comes alone.
    together = [first] if claim == "residual-identity" else [(rate,) for rate in first]
    groups = [*together, *((rate,) for rate in grid if rate not in first)]
    wanted = []
    for seed in TUNING_SEEDS:
        for kind in KINDS[claim]:
            for rates in groups:
                arm: dict[str, Scalar] = {"claim": claim, "part": "tuning", "depth": depth}
                arm |= {"kind": kind, "rates": " ".join(f"{rate:g}" for rate in rates)}
                wanted.append(_cell(budget, arm, seed, 0, (kind,), 0.9 + 0.1 * len(rates)))
    return wanted


def _draw(budget: str, claim: str, seed: int, part: str, wave: int, best: Best) -> Cell:
    arm: dict[str, Scalar] = {"claim": claim, "part": part}
    if claim not in KINDS:
        return Cell("small-fits", arm, seed, _COSTS[claim], wave)
    depth = DEPTHS[claim][0]
    kinds = tuple(KINDS[claim]) if claim == "bjorck-activations" else ("bn", "none")
    arm |= {"depth": depth, "rates": _rates(best[claim, depth], kinds)}
    return _cell(budget, arm, seed, wave, kinds)


def _shown(budget: str, seeds: Sequence[int], plan: Plan, best: Best) -> list[Cell]:
    found, claim = [], "residual-identity"
    for depth in _depths(claim, plan):
        kinds = ("skipinit",) if depth == DEPTHS[claim][0] else tuple(deep.TOWERS)
        rates = _rates(best[claim, depth], kinds)
        arm: dict[str, Scalar] = {"claim": claim, "part": "shown", "depth": depth, "rates": rates}
        found += [_cell(budget, arm, seed, 2, kinds) for seed in seeds]
    return found


def _rates(best: Mapping[str, float], kinds: Sequence[str]) -> str:
    return " ".join(f"{kind}={best[kind]:g}" for kind in kinds)


def _cell(
    budget: str,
    arm: Mapping[str, Scalar],
    seed: int,
    wave: int,
    kinds: Sequence[str],
    factor: float = 1.0,
) -> Cell:
    claim, depth = str(arm["claim"]), int(arm["depth"] or 0)
    plain, with_bn = _STEP[claim]
    steps = PLANS[budget].steps[claim] / 1000
    layers = sum(with_bn if kind in ("bn", "all") else plain for kind in kinds) * depth
    return Cell("small-fits", arm, seed, round(0.1 + factor * steps * layers, 3), wave)


def _tuning(claim: str, depth: int, rows: list[Row], plan: Plan) -> Tuning:
    tried = [r for r in rows if r.get("part") == "tuning"]
    runs = collect(tried, ("claim", "depth", "kind", "rate"))
    trials = {
        (str(kind), float(rate)): by_seed
        for (name, at, kind, rate), by_seed in runs.items()
        if (name, at) == (claim, depth) and isinstance(rate, int | float)
    }
    return tune(
        trials, plan.rates[claim], TUNING_SEEDS, grow=plan.decides, arms=tuple(KINDS[claim])
    )


def _best(rows: list[Row], plan: Plan) -> dict[tuple[str, int], dict[str, float]]:
    """The rates of each depth whose search has settled."""
    found = {}
    for claim in KINDS:
        for depth in _depths(claim, plan):
            best = _tuning(claim, depth, rows, plan).best
            if best is not None:
                found[claim, depth] = best
    return found


def _own(claim: str, rows: list[Row], best: Best) -> list[Row]:
    """A claim's rows, without those at rates that were once the best of a smaller grid."""

    def fits(row: Row) -> bool:
        if row.get("claim") != claim:
            return False
        if claim not in KINDS or row.get("part") == "tuning":
            return True
        rates = best.get((claim, _whole(row.get("depth"))), {})
        named = dict(pair.split("=") for pair in str(row.get("rates")).split())
        return all(f"{rates.get(kind, math.nan):g}" == rate for kind, rate in named.items())

    return [row for row in rows if fits(row)]


def _whole(number: Scalar) -> int:
    return number if isinstance(number, int) else 0


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """One trial of a learning rate, or one draw of a claim."""
    claim, tiny, plan = str(arm["claim"]), budget == "tiny", PLANS[budget]
    if claim == "lln":
        yield from population.lln(seed, data, tiny)
    elif claim == "minibatch-stats":
        yield from population.minibatch_statistics(seed, data, tiny)
    elif claim == "dense-region" and arm["part"] == "shown":
        yield from curves.moved(stream(seed, f"{claim} moved"), tiny, seed == 0)
    elif claim == "dense-region":
        yield from curves.dense_region(stream(seed, claim), tiny)
    elif claim == "batch-variance":
        yield from curves.batch_variance(stream(seed, claim), tiny)
    elif arm["part"] == "tuning":
        rates = [float(rate) for rate in str(arm["rates"]).split()]
        yield from _trained(arm, str(arm["kind"]), rates, seed, "validation", plan, data)
    elif claim == "bjorck-activations":
        yield from _bjorck(arm, seed, plan, data)
    else:
        yield from _residual(arm, seed, tiny, plan, data)


def _trained(
    arm: Mapping[str, Scalar],
    kind: str,
    rates: Sequence[float],
    seed: int,
    evaluation: str,
    plan: Plan,
    data: Images,
) -> Iterator[Row]:
    claim, depth = str(arm["claim"]), int(arm["depth"] or 0)
    steps = plan.steps[claim]
    if claim == "residual-identity":
        yield from deep.towers_trial(seed, data, kind, depth, rates, evaluation, steps)
    else:
        (rate,) = rates
        yield from deep.trial(seed, data, kind, rate, evaluation, steps, depth)


def _finals(arm: Mapping[str, Scalar], seed: int, plan: Plan, data: Images) -> dict[str, float]:
    """Test accuracy in points of each kind at its rate, mean of the last three evaluations."""
    found = {}
    for pair in str(arm["rates"]).split():
        kind, rate = pair.split("=")
        rows = list(_trained(arm, kind, [float(rate)], seed, "test", plan, data))
        shares = [float(row["accuracy"] or 0.0) for row in rows]
        found[kind] = 100 * math.fsum(shares) / len(shares)
    return found


def _bjorck(arm: Mapping[str, Scalar], seed: int, plan: Plan, data: Images) -> Iterator[Row]:
    final = _finals(arm, seed, plan, data)
    for kind, label in deep.KINDS.items():
        yield value(f"accuracy, {label}", final[kind])
    gain = final["all"] - final["none"]
    yield value("accuracy, BN everywhere - without", gain)
    if gain:
        yield value("share of the gain", (final["last"] - final["none"]) / gain)
    if arm["part"] == "fair":
        yield from deep.large_steps(seed, data, int(arm["depth"] or 0))


def _residual(
    arm: Mapping[str, Scalar], seed: int, tiny: bool, plan: Plan, data: Images
) -> Iterator[Row]:
    final = _finals(arm, seed, plan, data)
    for kind, accuracy in final.items():
        yield value(f"{arm['depth']} blocks: accuracy, {deep.TOWERS[kind]}", accuracy)
    if "bn" in final:
        yield value(f"{arm['depth']} blocks: with BN - without", final["bn"] - final["none"])
    if arm["part"] != "shown":
        yield from deep.branch_shares(seed, data, tiny)


# -- the rules ----------------------------------------------------------------------------------


def question(claim: str) -> Question:
    """The rule of a claim."""
    t, inf = claims()[claim].thresholds, math.inf
    if claim in ("lln", "minibatch-stats"):
        width = t["tolerance"]
        slope = Target("", -0.5 - width, -0.5 + width, width)
        kinds = ["rms difference"]
        if claim == "lln":
            kinds = ["spread of the mean", "spread of the variance"]
        found = {f"layer {n}: slope of the {kind}": slope for n in (1, 2) for kind in kinds}
        if claim == "lln":
            near = Target("", 1 - t["average"], 1 + t["average"], t["average"])
            for rho in population.DECAYS:
                found[f"decay {rho:g}: variance of the moving average over the formula"] = near
        words = _WORDS[claim]
        return Question(claim, found, words, on_images=True)
    if claim == "dense-region":
        found = {"correlation of density and error": Target("", -inf, 0, 0.2)}
        for shift in curves.SHIFTS:
            if shift != curves.CENTER:
                name = f"log10 of the loss, shifted to {shift:g} over unshifted"
                found[name] = Target("", 0, inf, 0.5)
        delta, bound = math.log(t["variance_ratio"]), t["control"]
        found["ln of the variance between fits, sparse over dense"] = _more(delta)
        control = {"control: fits of 2x from two places, rms difference":
                   Target("", -inf, bound, bound)}  # fmt: skip
        return Question(claim, found, _WORDS[claim], control=control)
    if claim == "batch-variance":
        more = _more(math.log(t["ratio"]))
        return Question(claim, {"ln of the loss, spread 0.1 over 1": more}, _WORDS[claim])
    if claim == "bjorck-activations":
        low, high = t["low"], t["high"]
        share = {"share of the gain": Target("", low, high, (high - low) / 2)}
        # The control has to be supported; the number of draws is not planned by it.
        gain = Target("", 0, inf, inf, t["gain"])
        control = {"accuracy, BN everywhere - without": gain}
        return Question(claim, share, _WORDS[claim], on_images=True, published={}, control=control)
    width = t["tolerance"]
    level = Target("scale", t["slope"] - width, t["slope"] + width, width)
    more = _more(t["delta"])._replace(level="training")
    both = {"slope of the branch's share, with BN": level, "64 blocks: with BN - without": more}
    return Question(claim, both, _WORDS[claim], on_images=True, published={})


def _more(delta: float) -> Target:
    return Target("", 0, math.inf, delta, delta)


_WORDS = {
    "lln": Words(
        "the noise falls as one over the root of the batch, and the moving average evens it out",
        "the noise of batch statistics does not follow the law of large numbers everywhere",
        "slope, or ratio to the formula",
        "in a trained network",
    ),
    "minibatch-stats": Words(
        "the difference to the statistics of all images falls as one over the root of the batch",
        "the difference to the statistics of all images does not fall as the formula says",
        "log-log slope",
        "in a trained network",
    ),
    "dense-region": Words(
        "the fit is better where the data are dense, and the loss rises when they move",
        "not all of it holds",
        "rank correlation, decades, or ln of a ratio",
        "fitting a sine",
    ),
    "batch-variance": Words(
        "wider data give a lower loss on a wide range",
        "wider data do not give a much lower loss on a wide range",
        "ln of a ratio of losses",
        "fitting a sine",
    ),
    "bjorck-activations": Words(
        "BN at the last layer alone keeps about two thirds of the gain",
        "BN at the last layer alone does not keep 40 to 90 % of the gain",
        "share of the gain",
        "with 20 layers, each network at its best learning rate",
    ),
    "residual-identity": Words(
        "with BN the branch's share falls as one over the block's number, and 64 blocks train",
        "residual blocks do not behave so",
        "log-log slope, or points",
        "with residual towers, each at its best learning rate",
    ),
}


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """A verdict for every claim that has draws."""
    found = []
    for claim in CLAIMS:
        if not any(row["claim"] == claim for row in rows):
            continue
        plan = PLANS[str(rows[0]["budget"])]
        best, notes = _best(rows, plan), []
        for depth in _depths(claim, plan) if claim in KINDS else ():
            tuning = _tuning(claim, depth, rows, plan)
            if tuning.best is None:
                notes.append(f"Missing: {tuning.missing} tuning runs, {depth} layers or blocks.")
                continue
            rates = ", ".join(f"{KINDS[claim][k]} {r:g}" for k, r in tuning.best.items())
            notes.append(f"Learning rates chosen, {depth} layers or blocks: {rates}.")
            if tuning.at_edge and plan.decides:
                at = ", ".join(KINDS[claim][kind] for kind in tuning.at_edge)
                notes.append(f"Best at the end of all that is tried, {depth}: {at}.")
        own = _own(claim, rows, best)
        if own:
            found.append(verdict(question(claim), "small-fits", own, notes=notes))
    return found


_FIGURES = {
    "spread": Axes(
        "Spread of batch statistics, in units of the population",
        "batch size m",
        "standard deviation",
        x_log=True,
        y_log=True,
    ),
    "difference": Axes(
        "Difference between values normalized by their batch and by all images",
        "batch size m",
        "rms difference",
        x_log=True,
        y_log=True,
    ),
    "shifted": Axes("Loss where the data are moved to", "center of the data", "loss", y_log=True),
    "fits": Axes("Fits of a sine, data around -1", "x", "y"),
    "wide": Axes(
        "Loss on a wide range by the spread of the data",
        "standard deviation of the data",
        "loss",
        x_log=True,
        y_log=True,
    ),
    "branch": Axes(
        "Share of the variance that a residual branch adds, before training",
        "block",
        "share",
        x_log=True,
        y_log=True,
    ),
}


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """What is drawn of each measurement, over the draws that count."""
    return drawings("small-fits", _FIGURES, [r for r in rows if r["seed"] not in PILOT_SEEDS])
