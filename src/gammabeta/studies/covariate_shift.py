"""Does batch normalization reduce internal covariate shift, and does it help because of that?

Two things are called by that name: change of the distribution of what a layer receives (Ioffe &
Szegedy 2015), and change of a layer's gradient when the layers below make their step (Santurkar et
al. 2018, Definition 2.1). Both are measured by `gammabeta.probes` along training, and inputs are
disturbed on purpose.

Deep network: pixels-100-100-100-100-100-10, ReLU, batch normalization (BN) before each activation,
no bias where it follows, bias 0.1 elsewhere, weights from a truncated normal distribution with
standard deviation sqrt(2 / fan-in); 5,000 training images drawn for each seed from the first
55,000, batches of 128, 800 steps of SGD without momentum on the mean cross-entropy. Arms: none; BN;
noisy BN, with noise behind each BN; noise without BN; BN with gamma = 1 and beta = 0 frozen. All of
a seed start from the same weights and see the same batches.
    The first three train at their own best learning rate: highest accuracy on the last 5,000
    training images, mean of seeds 800 and 801, from 0.01, 0.03, 0.1, 0.3, 1, 3; a best value at an
    edge extends the grid for all three; a rate at which a loss was not finite is not chosen. The
    last two are shown only, on five seeds, at the rates of none and of BN.
    Noise (Santurkar et al., section 2.1): s a + m; for each unit and batch mu ~ U(-0.5, 0.5),
    sigma ~ U(1, 1.25); for each value m ~ U(mu - 0.1, mu + 0.1), s ~ N(sigma, 0.1). In eval mode
    their means, 1.125 and 0.
    At 15 log-spaced steps, on a batch drawn for it: what the next step would do. "Equal steps":
    each layer moves along -gradient by 1 % of the norm of its parameters (gamma and beta of a layer
    count as one); "own steps": the optimizer's. Distributions are those of the inputs of the weight
    layers, behind the activation, in training mode, on the same batch before and after.
    At the end of each tenth, 1,000 images that are not trained on: drift is the Wasserstein-1
    distance of a unit's distribution to that of the tenth before, over the unit's standard
    deviation (root of the mean of both variances), mean over units and the nine distances, in
    training mode with the noise that belongs to it.

Positive control of the three headline claims: test accuracy (running statistics, mean at 96, 98 and
100 % of the steps), BN - none, superiority, delta = 0.3 points; where that is inconclusive, the
exact sign-flip test (p at most 0.05, mean at least 0.3 points). Where it is not supported there is
nothing to explain, and they are inconclusive. (The sign-flip test is an amendment after the first
rows: two networks of 16 without BN diverged, gains of 85 points that made the t interval reach
below 0.)

ics-reduced. Primary contrast: log ratio none / BN of the shift of distributions when all layers
    make an equal step: W1 over the unit's standard deviation, median over units, mean over the
    five layers, mean of the log over moments; superiority, delta = log 1.2. It is level (a), equal
    steps; the others, each with the same rule: (a) per decrease of the loss: the shifts of the
    network's own steps, summed over training until the loss of 1,000 training images has fallen to
    0.5, over that decrease; (b) gradient, equal steps: 1 - cos of a layer's gradient before and
    after the layers below moved, median over layers; (b) per decrease of the loss. One status if
    all agree, mixed if some are supported and all others refuted.
    Fair, its authors would say: less shift by their definition, (a), at equal steps and per loss
    gained. Embarrassing: if (a) hung on what part of training is looked at; own steps are shown.
cross-layer-stats. One layer's weights alone make an equal step; what moves in each later layer:
    |change of the mean|/sd + |change of log sd|, median over units, mean over later layers and
    over layers, mean of the log over moments. Primary contrast: log ratio none / BN, superiority,
    delta = log 2, at least 8 seeds. Second level: change of the matrix of correlations (Frobenius
    norm, relative), same rule. Mixed if one holds and the other fails. The heat map k by l is drawn
    as curves. Shown: own steps, as the claim's text has it; and the steps of gamma and beta.
    Fair: statistics pinned down but for what a ReLU lets through. Embarrassing: if a BN network
    moved less only because its steps were smaller; hence equal ones.
noisy-bn. Primary contrast: accuracy, noisy BN - none, superiority, delta = 0.3 points; and the
    drift of what the output layer receives has to be larger in noisy BN than in none (log ratio
    above 0).
    Fair, Santurkar et al. would say: their noise, behind every layer, tuned like the others.
    Embarrassing: noise so weak that it brings no shift, or a rate at the end of those tried.
keep-consistent. Supported if and only if noisy-bn is refuted on its accuracy, with the drift
    established; refuted if noisy-bn is supported.
ics-gradient. Two levels: median over moments of the median over layers of 1 - cos at equal steps,
    BN - none, superiority, delta = 0.1, in the deep network (primary) and in the linear one: 25
    layers of 10 x 10 without activations, |W25 ... W1 x - A x|^2, mean over 1,000 Gaussian x,
    Glorot's normal weights, BN behind all but the last, gradient descent on the whole batch at the
    rate at which the loss halves in 500 steps (2,000 at `full`), 12 moments.
    As published: own steps; the linear network, and the deep one at 0.01 and at 0.1 in both arms,
    55,000 images, 500 steps, 20 moments. No control: that shift grows is said whether BN helps or
    not.
    Fair: by their definition and their linear network. Embarrassing: a difference that is only that
    of the weights' scale, which cos and equal steps take out.
gamma-beta-shift. Drift of the outputs of the five normalizations over that of the same places
    without, mean over layers: supported if the interval of the ratio lies above 0.2, refuted if
    below 0.05. Shown: frozen gamma and beta, whose moments cannot drift and whose shape does.
    Fair: the drift that gamma and beta bring back, where none has all of it. Embarrassing: to call
    the change of shape, which they do not cause, theirs; hence moments alone beside it.
not-reduce-shift. Levels: gradient, as ics-gradient in the deep network; distribution, drift of what
    the output layer receives, log ratio BN / none, superiority, delta = log 1.2.
    Fair: worse by both definitions. Embarrassing: if rates made it; each arm has its best.
stats-by-gamma-beta. Exact, float64, eps = 0: arbitrary other weights before a BN change neither
    mean nor standard deviation of its output in training mode (error at most 100 eps times
    1 + the largest |x|/sd), but correlations, skewness, moments behind a ReLU, and eval mode.
constant-dist. pixels-100-100-10, ReLU, no BN, batches of 64, 1,000 steps; each mini-batch times
    1 + 0.5 U(-1, 1), plus 0.5 U(-1, 1), tested on clean images: loss of accuracy, superiority,
    delta = 0.5 points (primary). Second level: slow change, scale 1 to 2 and shift 0 to 1 and back
    in one epoch, which ends at (2, 1), tested there, against (2, 1) throughout. The four are tuned
    as above; amplitudes of 1/4 and 1/2 and periods of 1/2 and 4 epochs are shown. Mixed if one
    holds and the other fails.
    Fair: the disturbance that a first layer would see. Embarrassing: rates that suit one arm.

Seeds 900 to 903 are a pilot: they give the number of seeds (at most 16; 8 at least in the deep
network, else 5; predicted half-width of the 95 % interval delta / 2; 0.05 for the ratio), and
are used for nothing else.

Changed against the registry: 800 steps and 15 moments in the deep network; gamma-beta-shift and the
drift of noisy-bn in the deep network instead of the sigmoid one; noise drawn per unit, as in the
source's algorithm (recalled), not per layer; the drift in training mode, since noise has no other;
both measures of ics-reduced, per step and per decrease, are levels of their own; the chain of four
neurons, where BN leaves nothing but a sign to move, is that of chain-expansion. `full` trains
2,000 steps; `tiny` tries the wiring and decides nothing. The bundled digits are a demonstration.

Rows: arm fields part, group, arm, rate, and optionally width (a factor on the hidden units) and
images ("hard": 14 x 14, turned, noisy).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._covariate_shift import deep, exact, inputs, linear, verdicts
from gammabeta.studies._covariate_shift.contrasts import (
    PUBLISHED_RATES,
    Rates,
    contrasts,
    gather,
    real,
)
from gammabeta.studies._covariate_shift.drawn import influence
from gammabeta.studies._covariate_shift.rules import LEAST, question
from gammabeta.studies._data import Images
from gammabeta.studies._draws import LEAST_SEEDS, MOST_SEEDS, PILOT_SEEDS
from gammabeta.studies._experiments import Cell
from gammabeta.studies._pairs import Tuning, collect, rates_curve
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._tuned import KEYS, TUNING_SEEDS, figure, own, place, settle, trials
from gammabeta.studies._verdict import Verdict, planned_n

CLAIMS = (
    "ics-reduced",
    "cross-layer-stats",
    "noisy-bn",
    "keep-consistent",
    "ics-gradient",
    "gamma-beta-shift",
    "not-reduce-shift",
    "stats-by-gamma-beta",
    "constant-dist",
)
TUNED = {"deep": ("none", "bn", "noisy"), "inputs": ("clean", "random", "final", "slow")}
# arms that are shown, at the rate of another one
SHOWN = {
    ("deep", "noise"): "none",
    ("deep", "frozen"): "bn",
    ("inputs", "random 0.25"): "clean",
    ("inputs", "random 0.5"): "clean",
    ("inputs", "slow 0.5"): "slow",
    ("inputs", "slow 4"): "slow",
}
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_JUDGED = tuple(c for c in CLAIMS if c not in ("keep-consistent", "stats-by-gamma-beta"))


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: Mapping[str, int]
    moments: Mapping[str, int]
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


_MOMENTS = {"deep": 15, "published": 20, "linear": 12}
PLANS = {
    "tiny": Plan(
        {"deep": 10, "published": 5, "linear": 5, "inputs": 10},
        {"deep": 2, "published": 1, "linear": 2}, (0.1,), 500, False,
    ),
    "small": Plan(
        {"deep": 800, "published": 500, "linear": 500, "inputs": 1000},
        _MOMENTS, RATES, 10000, True,
    ),
    "full": Plan(
        {"deep": 2000, "published": 500, "linear": 2000, "inputs": 2000},
        {**_MOMENTS, "deep": 20, "linear": 20}, RATES, 10000, True,
    ),
}  # fmt: skip


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning; what needs none; pilots, and from them the number of seeds of each group."""
    plan = PLANS[budget]
    rows = own(rows, budget, data)
    tunings = _tunings(rows, plan)
    rates = _rates(tunings)
    few = seeds if seeds is not None else LEAST_SEEDS if plan.decides else 1
    wanted = [_cell(plan, 0, s, "exact", "statistics", "bn", 0.0) for s in range(min(few, 3))]
    wanted += [
        _cell(plan, 0, seed, "tuning", group, arm, rate)
        for seed in TUNING_SEEDS
        for group, tuning in tunings.items()
        for rate in tuning.grid
        for arm in TUNED[group]
    ]
    wanted += [
        _cell(plan, 1, seed, "published", "deep", arm, rate)
        for seed in range(few)
        for rate in PUBLISHED_RATES
        for arm in ("none", "bn")
    ]
    for group in LEAST:
        arms = [arm for of, arm in rates if of == group and (of, arm) not in SHOWN]
        if not arms:
            continue
        count: int | None = few
        if seeds is None and plan.decides:
            wanted += [
                _cell(plan, 1, s, "pilot", group, a, rates[group, a])
                for s in PILOT_SEEDS for a in arms
            ]  # fmt: skip
            count = planned(group, rows, rates)
        for seed in range(count or 0):
            more = [a for of, a in SHOWN if of == group and seed < LEAST_SEEDS]
            wanted += [
                _cell(plan, 2, seed, "fair", group, a, rates[group, a]) for a in [*arms, *more]
            ]
    return wanted


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, pilots ask for some more than the least."""
    plan, wanted = PLANS[budget], cells(budget, data, seeds, [])
    for group, tuned in TUNED.items():
        shown = [arm for of, arm in SHOWN if of == group]
        if seeds is None and plan.decides:
            wanted += [
                _cell(plan, 1, s, "pilot", group, a, 0.1) for s in PILOT_SEEDS for a in tuned
            ]
        count = seeds if seeds is not None else LEAST[group] + 2 if plan.decides else 1
        for seed in range(count):
            arms = [*tuned, *shown] if seed < LEAST_SEEDS else tuned
            wanted += [_cell(plan, 2, seed, "fair", group, a, 0.1) for a in arms]
    if seeds is None and plan.decides:
        for seed in range(LEAST["linear"] + 2):
            wanted += [_cell(plan, 2, seed, "fair", "linear", a, 0.0) for a in ("none", "bn")]
    return wanted


def _cell(plan: Plan, wave: int, seed: int, part: str, group: str, arm: str, rate: float) -> Cell:
    fields: Mapping[str, Scalar] = {"part": part, "group": group, "arm": arm, "rate": rate}
    return Cell("covariate-shift", fields, seed, round(_cost(plan, part, group, arm), 3), wave)


def _cost(plan: Plan, part: str, group: str, arm: str) -> float:
    """In seconds, about: steps, evaluations, looks."""
    if group == "statistics":
        return 0.02
    with_bn = arm in ("bn", "noisy", "frozen")
    if group == "linear":
        steps, moments = plan.steps["linear"], plan.moments["linear"]
        return 0.8 + (0.0055 if with_bn else 0.007) * steps + (0.25 if with_bn else 0.1) * moments
    images = 3e-5 * min(plan.images, 5000 if part == "tuning" else 10000) / 2
    if group == "inputs":
        return 0.75e-3 * plan.steps["inputs"] + images
    step = {"none": 1.5e-3, "bn": 2.3e-3, "noisy": 3e-3, "noise": 2.4e-3, "frozen": 2.3e-3}[arm]
    if part == "published":
        return step * plan.steps["published"] + 0.03 * plan.moments["published"]
    cost = step * plan.steps["deep"] + images
    if part == "tuning":
        return cost
    probed = {"bn": 0.3, "none": 0.19}.get(arm, 0.0)
    return cost + 0.7 + probed * plan.moments["deep"]


def _tunings(rows: Sequence[Row], plan: Plan) -> Mapping[str, Tuning]:
    return settle(rows, TUNED, plan).tunings


def _rates(tunings: Mapping[str, Tuning]) -> dict[tuple[str, str], float]:
    """Rates of the arms of the main runs, as far as the searches are settled."""
    rates = {("linear", arm): 0.0 for arm in ("none", "bn")}
    for group, tuning in tunings.items():
        if tuning.best is not None:
            rates |= {(group, arm): rate for arm, rate in tuning.best.items()}
            rates |= {key: tuning.best[of] for key, of in SHOWN.items() if key[0] == group}
    return rates


def planned(group: str, rows: Sequence[Row], rates: Rates) -> int | None:
    """Seeds that the pilot of a group asks for, None before all of its runs are there."""
    pilot = gather([r for r in rows if r.get("part") == "pilot"], rates)
    arms = [key for key in rates if key[0] == group and key not in SHOWN]
    if any(set(PILOT_SEEDS) - pilot.main.get(key, {}).keys() for key in arms):
        return None
    needed = [LEAST[group]]
    for claim in _JUDGED:
        ask, found = question(claim), contrasts(claim, pilot, verdicts.target_loss())
        for name, target in {**ask.targets, **ask.control}.items():
            if _group(claim, name) != group or not math.isfinite(target.precision):
                continue
            values = list(found.get(name, {}).values())
            # Too few numbers to foresee anything, as a loss was not reached: as many as there are.
            few = len(values) < 2
            needed.append(
                MOST_SEEDS if few else planned_n(values, target.precision, LEAST[group], MOST_SEEDS)
            )
    return max(needed)


def _group(claim: str, contrast: str) -> str:
    if claim == "constant-dist":
        return "inputs"
    return "linear" if contrast.startswith("linear") else "deep"


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network and look at what its steps do; or check the statistics."""
    plan = PLANS[budget]
    part, group, name = (str(arm[key]) for key in ("part", "group", "arm"))
    if group == "statistics":
        return exact.measure(seed)
    if group == "linear":
        return linear.measure(name == "bn", seed, plan.steps["linear"], plan.moments["linear"])
    rate, width = float(arm["rate"] or 0.0), float(arm.get("width") or 1.0)
    kind = str(arm.get("images") or "plain")
    if group == "inputs":
        return inputs.measure(
            *(part, name, rate, seed, data),
            steps=plan.steps["inputs"], images=plan.images, width=width, kind=kind,
        )  # fmt: skip
    which = "published" if part == "published" else "deep"
    return deep.measure(
        *(part, name, rate, seed, data),
        steps=plan.steps[which], points=plan.moments[which], images=plan.images, width=width,
        kind=kind,
    )  # fmt: skip


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """All claims; what is missing makes them inconclusive."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    tunings = _tunings(rows, plan)
    rates = _rates(tunings)
    runs = gather(rows, rates)
    found: list[Verdict] = []
    for claim in CLAIMS:
        if claim == "stats-by-gamma-beta":
            found.append(verdicts.exactly(rows))
        elif claim == "keep-consistent":
            found.append(verdicts.consistent(found[-1]))
        else:
            group = "inputs" if claim == "constant-dist" else "deep"
            notes = verdicts.notes_of(claim, group, tunings[group], runs, decides=plan.decides)
            found.append(verdicts.drawn(claim, runs, rows[0], notes))
    return found


_FIGURES = {
    "turn": ("turn_relative", Axes(
        "How far a layer's gradient turns when the layers below make their step",
        "step", "1 − cos, median over layers", True, False, "Steps of 1 % of the weights.",
    )),
    "shift": ("shift_relative", Axes(
        "How far one step of all layers moves what a layer receives",
        "step", "W1 (standard deviations)", True, True, "Steps of 1 % of the weights.",
    )),
    "drift": ("drift", Axes(
        "Drift of what the output layer receives",
        "step", "W1 since the tenth before (standard deviations)", False, True,
    )),
}  # fmt: skip


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Influence of layers on later ones; gradients and distributions on the way; the search."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    where = place(rows)
    tunings = _tunings(rows, plan)
    rates = _rates(tunings)
    runs = gather([r for r in rows if r.get("part") == "fair"], rates)
    labels = {"none": "without", "bn": "with BN", "noisy": "with noisy BN"}
    points: list[Row] = [
        {"kind": "curve", "curve": name, "series": labels[arm], "x": row["step"], "y": row[of]}
        for name, (of, axes) in _FIGURES.items()
        for arm in labels
        for run in runs.main.get(("deep", arm), {}).values()
        for row in run
        if of in row and (not axes.y_log or real(row[of]) > 0)
    ]
    named = {k: a._replace(title=f"{a.title}, {where}") for k, (_, a) in _FIGURES.items()}
    found = [*influence(rows, rates, where), *drawings("covariate-shift", named, points)]
    runs_by_rate = collect(rows, KEYS)
    for group, arms in TUNED.items():
        panels = []
        for arm in arms:
            tried = {
                ("bn", rate): by
                for (name, rate), by in trials(runs_by_rate, group).items()
                if name == arm
            }
            series = rates_curve(tried, "bn", TUNING_SEEDS)
            if series["x"]:
                panels.append(
                    {
                        "title": verdicts.NAMES[arm],
                        "series": [{**series, "name": verdicts.NAMES[arm]}],
                    }
                )
        found += figure(
            "covariate-shift",
            f"tuning-{group}",
            f"Validation accuracy on {where} over learning rates ({group})",
            "How each arm's learning rate was chosen. Mean and range over two seeds.",
            panels,
            "learning rate",
        )
    return found
