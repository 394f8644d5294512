"""Does weight decay act only through the effective learning rate, with batch normalization?

van Laarhoven 2017, Hoffer et al. 2018 (wd-efflr): the output of weights before batch normalization
(BN) does not depend on their norm, so that a decay of them changes nothing but the length of a step
relative to them: with w = |w| u, the direction u moves by (rate / |w|^2) times a gradient that
depends on u alone. Weight decay keeps |w| small, and so this effective rate large.

Network: pixels-100-100-10, ReLU, BN before each activation, no bias where it follows, bias 0.1 at
the output, weights from a truncated normal distribution with standard deviation sqrt(2 / fan-in).
Batches of 64, 300 steps of SGD without momentum (2,000 at `full`), mean cross-entropy, 5,000
training images drawn for each seed from the first 55,000, PyTorch's defaults for the layer,
evaluation by running statistics. All runs of a seed have the same start and batches.

Fair (it gives the verdict). Rate: the best of the network without decay: highest accuracy on the
last 5,000 training images, mean of seeds 800 and 801, from 0.1, 0.3, 1; a best value at an edge
extends the grid. All runs train at it, since the claim compares equal trajectories. With it, six
runs a seed, the decay being 0.01 (a step is w <- w - rate (gradient + decay w)):

    "free"            no decay
    "hidden decay"    decay of the weights before BN alone
    "hidden norms"    no decay; after each step the weights of every hidden unit are given the norm
                      that they have at this step of "hidden decay"
    "all decay"       decay of all parameters, as PyTorch's weight_decay does it
    "all norms"       the same with the norms of "all decay"
    "hidden rates"    no decay, norms are left alone; each unit's rate is multiplied by the squared
                      ratio of its norm to that in "hidden decay", which gives the same effective
                      rate

Primary contrast: test accuracy, decay minus norms, in points, mean of the last three evaluations
(at 96, 98 and 100 % of the steps): equivalence, delta = 0.3. Two levels, declared beforehand: the
weights before BN alone, of which the theory is; and all parameters, of which users are told it. One
level supported and the other refuted is mixed.
Positive control: the decay changes what there is to explain: ln of the ratio of the mean norms of
hidden units at the end, free over decay, lies above 0.1, in both levels. Else nothing to explain.
Seeds 900 to 903 are a pilot: they give the number of seeds (8 to 16; predicted half-width of the
95 % interval delta / 2 at both levels), and are used for nothing else.
Shown: "hidden rates" minus "hidden decay"; decay minus free; the mean angle by which a hidden
unit's weights turn in a step, ln of norms over decay, and of decay over free; its correlation over
time between decay and norms (that of their effective rates is 1 by construction); the primary
contrasts for the decay 0.001, 3 seeds.

As published: not tried; the sources trained convolutional networks on CIFAR-10 and ImageNet.

What its author would call fair: the weights that the theory is about, and a decay that does shrink
them. What would embarrass us: a decay too weak to matter (hence the control), or support that is
the algebra of one step: with the weights before BN alone the runs differ by eps and by a factor
1 - rate decay on the step, and this level can hardly fail. It is the other one that may.

Changed against the registry: decays 0.01 and, shown, 0.001; two levels; "hidden rates". `tiny`
tries the wiring; it decides nothing. On the bundled digits each seed splits the 1,797 images anew:
a demonstration.

Rows: arm fields part ("tuning", "fair", "pilot", "shown"), group, arm, rate, decay, and optionally
width (a factor on the hidden units); `run`, `step`, `accuracy`, `diverged`, and with the last step
`norm` (mean over hidden units), `angle` (degrees, mean over units and every tenth step),
`correlation` (over these steps, of its angle and that of the run with the same decay).
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Words, span
from gammabeta.studies._beside import answered
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._outcomes import asked_for
from gammabeta.studies._pairs import collect, gains
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels
from gammabeta.studies._tuned import (
    EQUIVALENCE_SEEDS,
    KEYS,
    MOST_SEEDS,
    Best,
    Trained,
    Tuned,
    complete,
    every,
    guess,
    needed,
    own,
    settle,
    tuning_figure,
)
from gammabeta.studies._verdict import Outcome, Verdict, controlled, lies_above
from gammabeta.studies._weight_decay.runs import RUNS, Watched, run

CLAIMS = ("wd-efflr",)

GROUPS = {"bn": ("bn",)}
DECAY, WEAK = 0.01, 0.001
LEVELS = {"hidden": "weights before BN alone", "all": "all parameters"}
_BY = ("part", "rate", "decay", "run")


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    seeds: int
    shown: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.1, 0.3, 1.0)
PLANS = {
    "tiny": Plan(10, 1, 1, (0.3,), 500, False),
    "small": Plan(300, EQUIVALENCE_SEEDS, 3, RATES, 10000, True),
    "full": Plan(2000, EQUIVALENCE_SEEDS, 3, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until the grid is settled; then the main runs; pilot; more seeds; what is shown."""
    plan = PLANS[budget]
    tuned = _settled(own(rows, budget, data), plan)
    found = [
        _cell(plan, *wish)
        for wish in needed(tuned, plan.seeds, seeds, [_planned(tuned.rows, tuned.best)])
    ]
    return found + (_shown(plan, tuned.best, seeds) if tuned.best else [])


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: one value more of the grid, the least seeds."""
    plan = PLANS[budget]
    tuned = guess(GROUPS, plan, (3.0,))
    wanted = [_cell(plan, *wish) for wish in needed(tuned, plan.seeds, seeds, [plan.seeds])]
    return wanted + _shown(plan, tuned.best, seeds)


def _settled(rows: Sequence[Row], plan: Plan) -> Tuned:
    tried = collect([r for r in rows if r.get("part") == "tuning"], KEYS)
    return settle(rows, GROUPS, plan, runs=tried)


def _shown(plan: Plan, best: Best, seeds: int | None) -> list[Cell]:
    count = plan.shown if seeds is None else min(seeds, plan.shown)
    (what,) = every(GROUPS, best)
    return [_cell(plan, 2, seed, "shown", what) for seed in range(count)]


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    decay = {"tuning": 0.0, "shown": WEAK}.get(part, DECAY)
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict(), "decay": decay}
    # In seconds, about: steps and evaluations.
    count = 1 if part == "tuning" else len(RUNS)
    cost = count * (plan.steps * 1.3e-3 + 1.5e-5 * min(plan.images, 10000))
    return Cell("weight-decay", arm, seed, round(cost, 3), wave)


def contrasts(
    rows: Sequence[Row], part: str, best: Best, pairs: Mapping[str, tuple[str, str]]
) -> dict[str, dict[int, float]]:
    """Test accuracy of one run minus another's, in points, by name and seed."""
    runs, rate = collect(rows, _BY), best.get("bn", {}).get("bn")
    decay = WEAK if part == "shown" else DECAY
    return {
        name: gains(runs.get((part, rate, decay, a), {}), runs.get((part, rate, decay, b), {}))
        for name, (a, b) in pairs.items()
    }


PAIRS = {level: (f"{key} decay", f"{key} norms") for key, level in LEVELS.items()}
BESIDE = {
    "same effective rates − decay, weights before BN alone": ("hidden rates", "hidden decay"),
    "decay − free, weights before BN alone": ("hidden decay", "free"),
    "decay − free, all parameters": ("all decay", "free"),
}


def ends(rows: Sequence[Row], part: str, best: Best, column: str) -> dict[str, dict[int, float]]:
    """A number of the end of training by run and seed."""
    rate = best.get("bn", {}).get("bn")
    found: dict[str, dict[int, float]] = {name: {} for name in RUNS}
    for row in rows:
        seed, number = row["seed"], row.get(column)
        if (row.get("part"), row.get("rate")) == (part, rate) and isinstance(number, float):
            found[str(row["run"])][int(str(seed))] = number
    return found


def log_ratio(numbers: Mapping[str, Mapping[int, float]], a: str, b: str) -> dict[int, float]:
    """ln of a over b, by seed."""
    both = sorted(numbers[a].keys() & numbers[b].keys())
    return {s: math.log(numbers[a][s] / numbers[b][s]) for s in both if numbers[b][s] > 0}


def _planned(rows: Sequence[Row], best: Best) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = contrasts(rows, "pilot", best, PAIRS)
    if not best or not complete(pilot):
        return None
    delta = claims()["wd-efflr"].thresholds["delta"]
    return asked_for(pilot, dict.fromkeys(pilot, delta), EQUIVALENCE_SEEDS, MOST_SEEDS)


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """All runs of a seed, one after the other; for tuning the one without decay."""
    plan, tuning = PLANS[budget], arm["part"] == "tuning"
    x, y, held_x, held_y = fair_split(data, seed, "validation" if tuning else "test")
    held, labels = pixels(held_x[: plan.images], data.pixel_max), held_y[: plan.images]
    stops = log_steps(plan.steps, 3)[-3:]
    norms: dict[str, Any] = {}
    seen: dict[str, Watched] = {}
    for name in RUNS[:1] if tuning else RUNS:
        watched = seen[name] = Watched()
        training = run(
            name,
            x,
            y,
            pixel_max=data.pixel_max,
            rate=float(arm["rate"] or 0.0),
            decay=float(arm["decay"] or 0.0),
            steps=plan.steps,
            seed=seed,
            width=float(arm.get("width") or 1.0),
            norms=norms,
            watched=watched,
        )
        for net, step, loss in training:
            if step in stops:
                row: Row = {"run": name, "step": step, "accuracy": accuracy(net, held, labels)}
                row["diverged"] = not math.isfinite(loss)
                if step == stops[-1] and not row["diverged"]:
                    row |= watched.ends(seen.get(f"{name.partition(' ')[0]} decay"))
                yield row
        if arm["part"] == "fair":
            yield from watched.points(name)


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """One claim, fair; what is missing makes it inconclusive."""
    if not rows:
        return []
    tuned = _settled(rows, PLANS[str(rows[0]["budget"])])
    best, limits = tuned.best, claims()["wd-efflr"].thresholds
    outcome = joint(
        {
            level: Part(list(v.values()), "equivalence", limits["delta"], level=level)
            for level, v in contrasts(rows, "fair", best, PAIRS).items()
        },
        EQUIVALENCE_SEEDS,
    )
    norms, angles = (ends(rows, "fair", best, column) for column in ("norm", "angle"))
    notes = tuned.notes()
    for key, level in LEVELS.items():
        control = lies_above(
            log_ratio(norms, "free", f"{key} decay").values(), limits["control"], EQUIVALENCE_SEEDS
        )
        outcome = controlled(outcome, control) if control.status != "supported" else outcome
        notes += _control(level, control)
    alike = ends(rows, "fair", best, "correlation")
    for key, level in LEVELS.items():
        if of := list(alike[f"{key} norms"].values()):
            notes.append(
                "Correlation over time of the angles, decay and norms, "
                f"{level}: {statistics.fmean(of):.2f}."
            )
    beside = contrasts(rows, "fair", best, BESIDE)
    for a, b in (("hidden norms", "hidden decay"), ("all norms", "all decay"),
                 ("hidden decay", "free")):  # fmt: skip
        beside[f"ln of the angle of a step, {a} over {b}"] = log_ratio(angles, a, b)
    beside |= {
        f"{level}, decay {WEAK:g}": v for level, v in contrasts(rows, "shown", best, PAIRS).items()
    }
    return [
        answered(
            "wd-efflr",
            tuned.setting(
                "weight-decay",
                "MLP 100-100",
                f"decay {DECAY:g} against no decay and the same norms of hidden units",
            ),
            Words(
                "weight decay does what the norms of the hidden units do: {weakest}",
                "weight decay does more than the norms of the hidden units do: {refuted}",
                "the difference is {weakest}",
                "for the weights before batch normalization alone weight decay does what their "
                "norms do, but not for all parameters: {refuted}",
            ),
            outcome,
            {},
            delta=limits["delta"],
            pilot={n: list(v.values()) for n, v in contrasts(rows, "pilot", best, PAIRS).items()},
            planned=_planned(rows, best),
            notes=notes,
            beside=beside,
        )
    ]


def _control(level: str, control: Outcome) -> list[str]:
    if control.interval is None:
        return []
    return [
        f"Positive control, {level}: ln of the norms, free over decay: {span(control.interval)}, "
        f"{control.status}."
    ]


_FIGURES = {
    "norm": Axes("Norm of a hidden unit's weights", "training step", "norm", y_log=True),
    "angle": Axes(
        "Angle by which a hidden unit's weights turn in a step", "training step", "degrees",
        y_log=True,
    ),
}  # fmt: skip


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Norms and angles of all runs over training; the tuning."""
    if not rows:
        return []
    tuned = _settled(rows, PLANS[str(rows[0]["budget"])])
    of = tuned.best.get("bn", {}).get("bn")
    drawn = [r for r in rows if (r.get("part"), r.get("rate")) == ("fair", of)]
    return [
        *drawings("weight-decay", _FIGURES, drawn),
        *tuning_figure("weight-decay", tuned, "without decay"),
    ]
