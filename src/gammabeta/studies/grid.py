"""How much does batch normalization gain with every activation, optimizer and batch size?

The claims are conclusions of a study on MNIST (Chang et al. 2017, repository
twcmchang/MLDS_final_2017, part B): batch normalization helps whatever the activation or the
optimizer (bn-improves-any), with it the activation matters more than the optimizer (opt-less, and
for the gain which-factor), and ReLU with SGD and batch normalization is about as good as ReLU with
Adam and without (sgd-bn-vs-adam).

The grid: ReLU, leaky ReLU (slope 0.2), sigmoid, softplus and tanh; SGD without momentum and Adam
(PyTorch's defaults but for the rate); batches of 4, 16, 64 and 256; each with and without batch
normalization. Network: pixels-100-100-10, batch normalization before each activation, no bias where
it follows, bias 0.1 elsewhere, weights from a truncated normal distribution with standard deviation
sqrt(2 / fan-in), mean cross-entropy. Both arms of a pair start from the same weights and see the
same batches, seed by seed.

Steps. With equal epochs a batch of 4 would have 64 times the updates of a batch of 256; with equal
updates, as in the source, it would see a 64th of the images. The grid takes the middle: the steps
are in proportion to 1/sqrt(batch), so that updates and images each differ by a factor of 8 only,
in opposite directions. At `small` 1,000, 500, 250 and 125 steps for batches of 4, 16, 64 and 256,
at `full` twice as many. A gain is always a difference between two arms of equal steps.

Fair (it gives the verdict)
    5,000 training images drawn for each seed from the first 55,000, PyTorch's defaults for the
    layer, evaluation by running statistics. Each of the 80 combinations trains at its own best
    learning rate: highest accuracy on the last 5,000 training images, mean of seeds 800 and 801,
    from 0.03, 0.1, 0.3, 1 (SGD) or 0.0003, 0.001, 0.003, 0.01 (Adam). A best value at an edge
    extends the grid for both arms, so that they have the same number of trials, until it lies
    inside; a rate at which a loss was not finite is not chosen. No rate is carried over from one
    batch size to another.
    Seeds 900 to 903 are a pilot: they give the number of seeds (at least 5, for equivalence 8, at
    most 16; the predicted half-width of the 95 % interval shall be delta / 2), and are used for
    nothing else. Each place of the grid has as many seeds as the claims that rest on it ask for.

Primary contrasts, in test accuracy, mean of the last three evaluations (at 96, 98 and 100 % of the
steps), in points:
    bn-improves-any  with minus without, delta 0.3, in each of the 40 places; universal. The share
                     of places with a positive mean is printed.
    which-factor     omega squared of the main effects on the gain, from the 40 gains of one seed
                     (all interactions are the error): share of the activation minus that of the
                     optimizer, and minus that of the batch size: two levels, superiority,
                     delta 0.1.
    opt-less         with batch normalization, batch 64, ReLU and sigmoid crossed with both
                     optimizers: main effect of the activation minus main effect of the optimizer,
                     each signed so that its mean is positive. Above 0 is supported, below 0
                     refuted; the number of seeds is planned for a half-width of 0.15 points.
    sgd-bn-vs-adam   batch 64: ReLU, SGD, with, minus ReLU, Adam, without: equivalence, delta 0.5.

As published (opt-less and sgd-bn-vs-adam)
    The source's code: sum loss, all 55,000 training images, batch 64, eps 1e-3, momentum 0.001,
    the test set as one batch, normalized by its own statistics, one learning rate for both
    optimizers: 0.01 and 0.0001 (finding f-lr), two levels declared beforehand. The published
    numbers are those after 5,200 steps: so many at `full` (3 seeds), 1,000 at `small`.
    bn-improves-any sums up figures that act-all and batch-small try as published; which-factor has
    no published number. These two have the fair verdict only.

Changed against the registry: steps by batch size instead of 1,000 for all (above; 250 at batch 64,
so that 1,600 runs and the search fit); a search that begins with four rates instead of six, in
every place of the grid; "the largest share over the next" became two levels with the activation
named beforehand, since the largest is known only from the same rows; opt-less at 250 steps (2,000
in the registry), signed means instead of absolute values of single seeds, which noise alone makes
positive. Changed against the source: as in the experiment on activations.

`tiny` tries the wiring on a grid of 2 x 2 x 2 with one learning rate: it decides nothing. The
bundled digits (1,797 images, each seed splits them anew) are a demonstration.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import PLACES, Setting, Words, answer
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._grid.contrasts import (
    CROSSED,
    FACTORS,
    OPTIMIZERS,
    Gains,
    Place,
    Rates,
    arm_of,
    contrasts,
    factors,
    gains_of,
    own_rates,
    published_arms,
    same_rate,
    shares_by_seed,
)
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._nets import ACTIVATIONS, m2
from gammabeta.studies._pairs import NORMS, Run, Runs, Tuning, collect, tune, unpaired
from gammabeta.studies._train import (
    accuracy,
    fair_split,
    log_steps,
    pixels,
    published_split,
    stream,
    train,
)
from gammabeta.studies._verdict import Outcome, Verdict, interval, planned_n, universal

CLAIMS = ("opt-less", "sgd-bn-vs-adam", "bn-improves-any", "which-factor")

NAMES = {
    "relu": "ReLU",
    "leaky_relu": "leaky ReLU",
    "sigmoid": "sigmoid",
    "softplus": "softplus",
    "tanh": "tanh",
    "sgd": "SGD",
    "adam": "Adam",
}
TUNING_SEEDS = (800, 801)
PILOT_SEEDS = (900, 901, 902, 903)
LEAST_SEEDS, MOST_SEEDS, LEAST_EQUIVALENCE = 5, 16, 8
PUBLISHED_RATES = (0.01, 0.0001)
RATES = {"sgd": (0.03, 0.1, 0.3, 1.0), "adam": (0.0003, 0.001, 0.003, 0.01)}
_ARM = ("part", "activation", "optimizer", "batch", "norm", "rate")


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int  # at batch 64
    published_steps: int
    seeds: int
    published_seeds: int
    activations: tuple[str, ...]
    batches: tuple[int, ...]
    rates: Mapping[str, tuple[float, ...]]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict

    @property
    def places(self) -> list[Place]:
        return list(itertools.product(self.activations, OPTIMIZERS, self.batches))


_ALL = (tuple(ACTIVATIONS), (4, 16, 64, 256))
PLANS = {
    "tiny": Plan(6, 6, 2, 2, CROSSED, (16, 64), {"sgd": (0.1,), "adam": (0.01,)}, 1000, False),
    "small": Plan(250, 1000, 5, 5, *_ALL, RATES, 10000, True),
    "full": Plan(500, 5200, 5, 3, *_ALL, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until every grid is settled; then the main runs, seed by seed; pilot; more seeds."""
    plan = PLANS[budget]
    runs = collect([r for r in rows if (r["budget"], r["data"]) == (budget, data)], _ARM)
    tunings = _tunings(runs, plan)
    wanted = [
        _cell(plan, 0, seed, "tuning", place, norm, rate)
        for seed in TUNING_SEEDS
        for place, tuning in tunings.items()
        for rate in tuning.grid
        for norm in NORMS
    ]
    best = _best(tunings)
    if len(best) < len(plan.places):
        return wanted
    wanted += _main(plan, best, seeds)
    planned = _planned(runs, best, plan) if seeds is None and plan.decides else None
    for seed in range(plan.seeds, MOST_SEEDS if planned else 0):
        more = [place for place in plan.places if planned and seed < planned[place]]
        wanted += [c for place in more for c in _pair(plan, 3, seed, "fair", place, best[place])]
    return wanted


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for twice the least seeds."""
    plan = PLANS[budget]
    guess = {p: dict.fromkeys(NORMS, plan.rates[p[1]][0]) for p in plan.places}
    wanted = cells(budget, data, seeds, []) + _main(plan, guess, seeds)
    if seeds is None and plan.decides:
        for seed in range(plan.seeds, 2 * LEAST_SEEDS):
            for place in plan.places:
                wanted += _pair(plan, 3, seed, "fair", place, guess[place])
    return wanted


def _main(plan: Plan, best: Rates, seeds: int | None) -> list[Cell]:
    """The whole grid has one seed before any of it has the next; then the pilot."""
    count = plan.seeds if seeds is None else seeds
    published = plan.published_seeds if seeds is None else seeds
    wanted: list[Cell] = []
    for seed in range(max(count, published)):
        for place in plan.places if seed < count else ():
            wanted += _pair(plan, 1, seed, "fair", place, best[place])
        if seed < published:
            wanted += [
                _cell(plan, 1, seed, "published", (activation, optimizer, 64), norm, rate)
                for rate in PUBLISHED_RATES
                for activation, optimizer, norm in published_arms()
            ]
    if seeds is None and plan.decides:
        for seed in PILOT_SEEDS:
            for place in plan.places:
                wanted += _pair(plan, 2, seed, "pilot", place, best[place])
    return wanted


def _pair(
    plan: Plan, wave: int, seed: int, part: str, place: Place, rates: Mapping[str, float]
) -> list[Cell]:
    return [_cell(plan, wave, seed, part, place, norm, rates[norm]) for norm in NORMS]


def _cell(
    plan: Plan, wave: int, seed: int, part: str, place: Place, norm: str, rate: float
) -> Cell:
    activation, optimizer, batch = place
    arm: Mapping[str, Scalar] = {
        "part": part,
        "activation": activation,
        "optimizer": optimizer,
        "batch": batch,
        "norm": norm,
        "rate": rate,
    }
    # In seconds, about: a step has fixed parts, and one in proportion to the batch.
    step = 0.32e-3 + 6e-6 * batch + 0.2e-3 * (norm == "bn") + 0.12e-3 * (optimizer == "adam")
    images = min(plan.images, 5000 if part == "tuning" else 10000)
    cost = _steps(plan, part, batch) * step + 3 * 0.04 * images / 10000
    return Cell("grid", arm, seed, round(cost, 4), wave)


def _steps(plan: Plan, part: str, batch: int) -> int:
    if part == "published":
        return plan.published_steps
    return round(plan.steps * 8 / math.sqrt(batch))


def _tunings(runs: Runs, plan: Plan) -> dict[Place, Tuning]:
    trials: dict[Place, dict[tuple[str, float], Mapping[int, Run]]] = {p: {} for p in plan.places}
    for (part, activation, optimizer, batch, norm, rate), by_seed in runs.items():
        place = (activation, optimizer, batch)
        if part == "tuning" and place in trials and isinstance(rate, int | float):
            trials[place][str(norm), float(rate)] = by_seed
    return {
        place: tune(found, plan.rates[place[1]], TUNING_SEEDS, grow=plan.decides)
        for place, found in trials.items()
    }


def _best(tunings: Mapping[Place, Tuning]) -> Rates:
    return {place: tuning.best for place, tuning in tunings.items() if tuning.best is not None}


def _planned(runs: Runs, best: Rates, plan: Plan) -> dict[Place, int] | None:
    """Seeds that the pilot asks for in each place, None before it is complete."""
    pilot = gains_of("pilot", runs, best, plan.places)
    if any(seed not in by_seed for by_seed in pilot.values() for seed in PILOT_SEEDS):
        return None

    def asked(values: Sequence[float], delta: float, least: int = LEAST_SEEDS) -> int:
        return planned_n(values, delta, least, MOST_SEEDS)

    known = {claim: claims()[claim].thresholds for claim in CLAIMS}
    delta = known["which-factor"]["delta"]
    everywhere = max(asked(values, delta) for values in factors(pilot).values())
    delta = known["bn-improves-any"]["delta"]
    found = {p: max(everywhere, asked(list(by.values()), delta)) for p, by in pilot.items()}
    compared = contrasts("pilot", runs, own_rates(best))
    crossed = asked(compared["opt-less"], known["opt-less"]["precision"])
    delta = known["sgd-bn-vs-adam"]["delta"]
    beside = asked(compared["sgd-bn-vs-adam"], delta, LEAST_EQUIVALENCE)
    for activation, optimizer in itertools.product(CROSSED, OPTIMIZERS):
        place = (activation, optimizer, 64)
        needed = max(crossed, beside if activation == "relu" else 0)
        found[place] = max(found[place], needed)
    return found


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network and evaluate it: a row for each evaluation."""
    part, activation, rate = str(arm["part"]), str(arm["activation"]), float(arm["rate"] or 0.0)
    optimizer, batch = str(arm["optimizer"]), int(arm["batch"] or 0)
    published = part == "published"
    plan = PLANS[budget]
    steps = _steps(plan, part, batch)
    evaluation = "validation" if part == "tuning" else "test"
    split = published_split(data, seed) if published else fair_split(data, seed, evaluation)
    train_x, train_y, test_x, test_y = split
    test_x, test_y = test_x[: plan.images], test_y[: plan.images]
    test = pixels(test_x, data.pixel_max)
    eps, momentum = (1e-3, 0.001) if published else (1e-5, 0.1)
    weights = stream(seed, "weights")
    net = m2(test.shape[1], activation, arm["norm"] == "bn", weights, eps=eps, momentum=momentum)
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=rate,
        steps=steps,
        order=stream(seed, "order"),
        stops=log_steps(steps, 3)[-3:],
        batch=batch,
        loss="sum" if published else "mean",
        optimizer=optimizer,
    )
    for step, loss in training:
        share = accuracy(net, test, test_y, "batch" if published else "running")
        row: Row = {"step": step, "accuracy": share, "diverged": not math.isfinite(loss)}
        if math.isfinite(loss):
            row["loss"] = loss
        yield row


# -- what it means ------------------------------------------------------------------------------

WORDS = {
    "opt-less": Words(
        "with BN the choice between ReLU and sigmoid matters more than that between SGD and Adam: "
        "{weakest}",
        "with BN the choice between SGD and Adam matters more than that between ReLU and sigmoid: "
        "{refuted}",
        "{weakest}",
    ),
    "sgd-bn-vs-adam": Words(
        "ReLU with SGD and BN is as good as ReLU with Adam and without BN, within {delta} points: "
        "{weakest}",
        "ReLU with SGD and BN and ReLU with Adam and without BN differ by {delta} points or more: "
        "{refuted}",
        "{weakest}",
    ),
    "bn-improves-any": Words(
        "batch normalization gains accuracy everywhere in the grid, least with {weakest}",
        "batch normalization does not gain {delta} points with {refuted}",
        "the smallest gain is that with {weakest}",
    ),
    "which-factor": Words(
        "the activation has the largest share of the variance of the gain: {weakest}",
        "the activation's share of the variance of the gain is not larger: {refuted}",
        "shares of the variance of the gain differ so: {weakest}",
        "the activation has the larger share of the variance of the gain in one comparison only; "
        "not larger: {refuted}",
    ),
}


def judge(rows: list[Row]) -> list[Verdict]:
    """The four claims; what is missing makes them inconclusive."""
    if not rows:
        return []
    budget, data = str(rows[0]["budget"]), str(rows[0]["data"])
    plan, runs = PLANS[budget], collect(rows, _ARM)
    tunings = _tunings(runs, plan)
    best = _best(tunings)
    fair, pilot = (gains_of(part, runs, best, plan.places) for part in ("fair", "pilot"))
    planned = _planned(runs, best, plan)
    notes: list[str] = []
    missing = sum(tuning.missing for tuning in tunings.values())
    if missing:
        notes.append(f"Missing: {missing} tuning runs; no gain where one is missing.")
    at_edge = [name(p) for p, t in tunings.items() if t.at_edge and not t.missing]
    if at_edge and plan.decides:
        notes.append(f"The best learning rate is at the end of all that is tried: {at_edge}.")
    alone = sum(
        len(unpaired(*(arm_of("fair", runs, p, n, by[n]) for n in NORMS))) for p, by in best.items()
    )
    if alone:
        notes.append(f"Left out, as one arm is missing: {alone} runs.")
    diverged = sum(
        run.diverged
        for (part, *_), by_seed in runs.items()
        for run in by_seed.values()
        if part in ("fair", "published")
    )
    if diverged:
        notes.append(f"Runs that diverged, and count with the accuracy they had: {diverged}.")
    if not plan.decides:
        notes.append(f"The budget {budget} tries the wiring; it decides nothing.")

    own, trial = (contrasts(part, runs, own_rates(best)) for part in ("fair", "pilot"))
    published = {rate: contrasts("published", runs, same_rate(rate)) for rate in PUBLISHED_RATES}
    # The source's protocol has three seeds at `full`, declared beforehand.
    least = min(LEAST_SEEDS, plan.published_seeds) if plan.decides else LEAST_SEEDS
    label = {
        "opt-less": "activation − optimizer",
        "sgd-bn-vs-adam": "ReLU, SGD, with BN − ReLU, Adam, without",
    }

    def one(claim: str, values: Sequence[float], least: int) -> Outcome:
        t = claims()[claim].thresholds
        if claim == "opt-less":
            return joint({label[claim]: Part(values, "above", 0.0)}, least)
        return joint({label[claim]: Part(values, "equivalence", t["delta"])}, least)

    verdicts = []
    for claim in ("opt-less", "sgd-bn-vs-adam"):
        verdicts.append(
            answer(
                claim,
                _setting(plan, budget, data, "points of accuracy"),
                WORDS[claim],
                one(claim, own[claim], LEAST_EQUIVALENCE if claim[0] == "s" else LEAST_SEEDS),
                {f"rate {r:g}": one(claim, by[claim], least) for r, by in published.items()},
                delta=claims()[claim].thresholds.get("delta", 0.0),
                pilot={label[claim]: trial[claim]},
                planned=planned["relu", "sgd", 64] if planned else None,
                notes=notes,
            )
        )

    delta = claims()["bn-improves-any"].thresholds["delta"]
    by_name = {name(p): list(by.values()) for p, by in fair.items()}
    everywhere = universal(by_name, delta, LEAST_SEEDS)
    weakest = {name(p): p for p in plan.places}.get(everywhere.weakest or "")
    means = [sum(values) / len(values) for values in by_name.values() if values]
    positive = f"Places with a positive mean gain: {sum(m > 0 for m in means)} of {len(means)}."
    supported = sum(cell.status == "supported" for cell in everywhere.cells.values())
    verdicts.append(
        answer(
            "bn-improves-any",
            _setting(plan, budget, data, "points of accuracy"),
            WORDS["bn-improves-any"],
            everywhere,
            {},
            delta=delta,
            pilot={name(p): list(by.values()) for p, by in pilot.items()},
            planned=planned[weakest] if planned and weakest else None,
            notes=[*notes, f"{positive} Supported alone: {supported}."],
        )
    )

    delta = claims()["which-factor"].thresholds["delta"]
    levels = {
        key: Part(values, "superiority", delta, level=key) for key, values in factors(fair).items()
    }
    found = shares_by_seed(fair)
    parts = [
        f"{factor} {sum(each[k] for each in found) / len(found):.2f}"
        for k, factor in enumerate(FACTORS)
        if found
    ]
    verdicts.append(
        answer(
            "which-factor",
            _setting(plan, budget, data, "share of the variance"),
            WORDS["which-factor"],
            joint(levels, LEAST_SEEDS),
            {},
            delta=delta,
            pilot=factors(pilot),
            planned=min(planned.values()) if planned else None,
            notes=[*notes, f"Shares of the variance of the gain: {', '.join(parts) or 'none'}."],
        )
    )
    # These two have no setting of the source's own.
    return [
        v if v.claim in label else dataclasses.replace(v, published_status=None) for v in verdicts
    ]


def _setting(plan: Plan, budget: str, data: str, unit: str) -> Setting:
    condition = "each network at its best learning rate"
    return Setting("grid", budget, data, "MLP 100-100", condition, unit, plan.decides)


def name(place: Place) -> str:
    """A place of the grid in words.

    >>> name(("relu", "sgd", 64))
    'ReLU, SGD, batch 64'
    """
    activation, optimizer, batch = place
    return f"{NAMES[activation]}, {NAMES[optimizer]}, batch {batch}"


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """The gain over the batch size, a panel for each optimizer, a curve for each activation."""
    if not rows:
        return []
    plan, runs = PLANS[str(rows[0]["budget"])], collect(rows, _ARM)
    fair = gains_of("fair", runs, _best(_tunings(runs, plan)), plan.places)
    where = PLACES.get(str(rows[0]["data"]), str(rows[0]["data"]))
    panels: list[dict[str, Any]] = []
    for optimizer in OPTIMIZERS:
        series = [_curve(fair, a, optimizer, plan.batches) for a in plan.activations]
        if shown := [s for s in series if s["x"]]:
            panels.append({"title": NAMES[optimizer], "series": shown})
    if not panels:
        return []
    title = f"Gain of batch normalization on {where}, each network at its best learning rate"
    ends = "; ".join(
        f"{p['title']}: " + ", ".join(f"{s['name']} {s['y'][0]:+.1f}" for s in p["series"])
        for p in panels
    )
    return [
        {
            "id": "grid-gain",
            "experiment": "grid",
            "kind": "curves",
            "title": title,
            "caption": "Test accuracy with minus without, in points. Mean over seeds; the band is "
            "its 95 % interval.",
            "alt": f"{title}. At the smallest batch, in points: {ends}.",
            "x": {"label": "batch size", "log": True},
            "y": {"label": "gain (points)", "log": False},
            "panels": panels,
        }
    ]


def _curve(fair: Gains, activation: str, optimizer: str, batches: Sequence[int]) -> dict[str, Any]:
    by = {b: list(fair[activation, optimizer, b].values()) for b in batches}
    shown = {b: values for b, values in by.items() if values}
    bands = [interval(v) if len(v) > 1 else None for v in shown.values()]
    middle = [sum(v) / len(v) for v in shown.values()]
    return {
        "name": NAMES[activation],
        "style": "bn",
        "x": list(shown),
        "y": middle,
        "lo": [b.lo if b else y for b, y in zip(bands, middle, strict=True)],
        "hi": [b.hi if b else y for b, y in zip(bands, middle, strict=True)],
        "n": min((len(v) for v in shown.values()), default=0),
    }
