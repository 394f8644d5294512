"""Do batch statistics that each device takes alone matter?

A lecture (Kainz, after D2L) says that it is irrelevant on one GPU and matters a lot on several
(multi-gpu): plain data parallelism normalizes by the statistics of each device's own shard.

Identity (part "exact"): real processes that talk over gloo, float64, 1, 2 and 8 ranks, gradients
    averaged and buffers those of rank 0, as in DistributedDataParallel; pixels-100-100-10, ReLU,
    batch normalization (BN), batches of 32 shared in equal parts, 5 steps of SGD at rate 0.3. Ranks
    with gb.sync_statistics against one process on the whole batch: output, gradients and running
    statistics of the first step. And ranks
    without, against ghost batches in one process with the running statistics of the first shard,
    which is how the accuracies below are had. Largest error, relative to the largest value,
    at most 100 eps K; K = 1 + max |mean| / standard deviation of what enters a BN. The variance
    from shards, sum n_k (v_k + mu_k^2) / n - mu^2, against that of the batch: K = 1 + max mean^2 /
    variance. Five draws, a fixed number: nothing is tuned. Shown: the same after five steps.
Accuracy: batches of 32 on 1, 2, 4, 8 devices, 32, 16, 8 or 4 images each; the same network; SGD
    without momentum, mean cross-entropy, 5,000 training images drawn for each seed from the first
    55,000, PyTorch's defaults, 400 steps; test accuracy by the running statistics of the first
    device, mean at 96, 98 and 100 % of the steps. All numbers of devices have the same start and
    batches, and each its own best learning rate: highest accuracy on the last 5,000 training images
    (mean of seeds 800 and 801) from 0.1, 0.3, 1; a best value at an edge extends the grid for all.

Primary contrast: accuracy on one device, which is that of synchronized statistics on any number,
    minus accuracy on 8 devices: superiority, delta = 0.3 points. And, as in batch-small, accuracy
    rises with log2 of the shard: its least-squares slope lies above 0; and the identities hold
    ("irrelevant on one GPU" is the one of 1 rank). All have to hold. 5 to 16 seeds by a pilot of
    seeds 900 to 903, used for nothing else: predicted half-widths 0.15 and 0.05.
No positive control: the claim does not say why BN helps.

What its author would call fair: real ranks, gradients and buffers as in DistributedDataParallel,
each number of devices at its best rate. "A lot" is read as 0.3 points, the smallest effect of
interest; shards of 4 are the smallest that most readers meet. What would embarrass us: a loss from
the running statistics of one shard alone and not from training; hence accuracies by precise
statistics (all training images at fixed weights) are shown beside.

The lecture has no setting: one verdict for both. Changed against the registry: 400 steps at `small`
(2,000 at `full`); `tiny` a few, with 2 ranks: it decides nothing. The ranks' processor time is not
in the cell's. On the bundled digits each seed splits the 1,797 images anew: a demonstration.

Rows: arm fields part, group, arm ("8 devices"), rate: `step`, `accuracy`, `diverged`, at the end
`precise`. Part "exact": `step`, and errors over K eps (see `_devices.exact`), `..._last` relative.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from gammabeta._runs import Row, Scalar
from gammabeta.models.calibration import calibrate
from gammabeta.studies._answer import Words
from gammabeta.studies._asked import Asked, Parts, ends, less, planned, verdict
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._devices.exact import errors
from gammabeta.studies._devices.shards import parallel
from gammabeta.studies._experiments import Cell
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    LEAST_SEEDS,
    Trained,
    Tuned,
    guess,
    needed,
    own,
    settle,
    trained_figures,
)
from gammabeta.studies._verdict import Verdict

CLAIMS = ("multi-gpu",)
BATCH = 32
DEVICES = {"1 device": 1, "2 devices": 2, "4 devices": 4, "8 devices": 8}
GROUPS = {"devices": tuple(DEVICES)}
_ONE, _MOST = "1 device", "8 devices"


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    exact: tuple[int, ...]  # numbers of ranks
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.1, 0.3, 1.0)
PLANS = {
    "tiny": Plan(10, 1, (0.3,), 500, (2,), False),
    "small": Plan(400, LEAST_SEEDS, RATES, 10000, (1, 2, 8), True),
    "full": Plan(2000, LEAST_SEEDS, RATES, 10000, (1, 2, 8), True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """The identities; tuning until the grid is settled; then the main runs; pilot; more seeds."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    wanted = needed(tuned, plan.seeds, seeds, [planned(_asked(tuned, "pilot"), LEAST_SEEDS)])
    return [*_exact(plan, seeds), *(_cell(plan, *wish) for wish in wanted)]


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for twice the least seeds."""
    plan = PLANS[budget]
    wanted = needed(guess(GROUPS, plan), plan.seeds, seeds, [2 * LEAST_SEEDS])
    return [*_exact(plan, seeds), *(_cell(plan, *wish) for wish in wanted)]


def _exact(plan: Plan, seeds: int | None) -> list[Cell]:
    # The time of this process alone, which is what a run adds up; the ranks take about 7 s.
    count = plan.seeds if seeds is None else seeds
    return [Cell("devices", {"part": "exact"}, seed, 0.1) for seed in range(count)]


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    # In seconds, about: steps, and looks at the evaluation images.
    step = 0.75e-3 if what.arm == _ONE else 1.9e-3
    look = 5e-6 * (3 * min(plan.images, 5000) if part == "tuning" else 4 * plan.images + 10000)
    return Cell("devices", arm, seed, round(plan.steps * step + look, 3), wave)


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """One draw of the identities, or one training."""
    part, plan = str(arm["part"]), PLANS[budget]
    if part == "exact":
        yield {"step": 0, **errors(seed, data, BATCH, plan.exact)}
        return
    split = fair_split(data, seed, "validation" if part == "tuning" else "test")
    train_x, train_y, held_x, held_y = split
    held, labels = pixels(held_x[: plan.images], data.pixel_max), held_y[: plan.images]
    net = parallel(held.shape[1], seed, BATCH, DEVICES[str(arm["arm"])])
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=plan.steps,
        order=stream(seed, "order"),
        stops=log_steps(plan.steps, 3)[-3:],
        batch=BATCH,
    )
    for step, loss in training:
        row: Row = {"step": step, "accuracy": accuracy(net, held, labels)}
        row["diverged"] = not math.isfinite(loss)
        if part != "tuning" and step == plan.steps and math.isfinite(loss):
            other = copy.deepcopy(net)
            calibrate(other, torch.split(pixels(train_x, data.pixel_max), 1000))
            row["precise"] = accuracy(other, held, labels)
        yield row


# -- what it means ------------------------------------------------------------------------------


def _asked(tuned: Tuned, part: str) -> Parts:
    """The parts of the claim, from the fair or the pilot's rows."""
    limits = claims()["multi-gpu"].thresholds
    by = _accuracies(tuned, part, "accuracy")
    found = {
        "1 device − 8 devices": Asked(
            less(by[_ONE], by[_MOST], 100), "superiority", limits["delta"], limits["delta"]
        ),
        "slope per doubling of the shard": Asked(_slope(by), "above", 0.0, limits["slope"]),
    }
    if part == "pilot":
        return found
    exact = [row for row in tuned.rows if row.get("part") == "exact"]
    for name, column in (("synchronized ranks", "synchronized"), ("local ranks", "local"),
                         ("variance from shards", "formula")):  # fmt: skip
        worst = {}
        for row in exact:
            found_here = [
                float(value)
                for key, value in row.items()
                if key.startswith(column) and not key.endswith("last") and isinstance(value, float)
            ]
            if found_here and isinstance(row["seed"], int):
                worst[row["seed"]] = -max(found_here)
        found[f"error of {name} (−, in K eps)"] = Asked(worst, "above", -limits["roundings"])
    return found


def _accuracies(tuned: Tuned, part: str, column: str) -> dict[str, dict[int, float]]:
    """A share by number of devices and seed; none before the rates are chosen."""
    rates = tuned.best.get("devices", {})
    return {
        arm: ends(tuned.rows, column, {"part": part, "arm": arm, "rate": rates[arm]})
        if arm in rates
        else {}
        for arm in DEVICES
    }


def _slope(by: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """Points of accuracy per doubling of the shard: least squares over log2 of its size."""
    x = [math.log2(BATCH / k) for k in DEVICES.values()]
    center = math.fsum(x) / len(x)
    shared = set.intersection(*(set(v) for v in by.values()))
    square = math.fsum((a - center) ** 2 for a in x)
    return {
        seed: 100
        * math.fsum((a - center) * by[arm][seed] for a, arm in zip(x, by, strict=True))
        / square
        for seed in sorted(shared)
    }


def judge(rows: list[Row]) -> list[Verdict]:
    """One claim; what is missing makes it inconclusive."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    tuned = settle(rows, GROUPS, plan)
    beside = {}
    for column, how in (("accuracy", "running statistics"), ("precise", "precise statistics")):
        by = _accuracies(tuned, "fair", column)
        for arm in DEVICES:
            if arm != _ONE and (column, arm) != ("accuracy", _MOST):
                beside[f"1 device − {arm}, {how}"] = less(by[_ONE], by[arm], 100)
    for mode in ("synchronized", "local"):
        for size in plan.exact:
            last = ends(rows, f"{mode}_{size}_last", {"part": "exact"})
            beside[f"relative error after 5 steps, {mode}, {size} ranks"] = last
    setting = tuned.setting(
        "devices", "MLP 100-100, batches of 32", "each number of devices at its best learning rate"
    )
    words = Words(
        "statistics that each of 8 devices takes alone cost accuracy, and synchronized ones are "
        "those of one device: {weakest}",
        "statistics that each device takes alone do not cost {delta} points at 8 devices, or do "
        "not cost more the smaller the shards, or synchronized ones are not exact: {refuted}",
        "statistics that each device takes alone cost {weakest}",
    )
    return [
        verdict(
            "multi-gpu",
            setting,
            words,
            _asked(tuned, "fair"),
            _asked(tuned, "pilot"),
            least=LEAST_SEEDS,
            notes=tuned.notes(),
            published={},
            beside=beside,
        )
    ]


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Test accuracy at the end of training, and how the rates were chosen."""
    if not rows:
        return []
    return trained_figures(
        "devices",
        settle(rows, GROUPS, PLANS[str(rows[0]["budget"])]),
        "Test accuracy on {where} with batches of 32 on several devices",
        "Statistics of each device's own shard, each number at its best learning rate.",
        "by the number of devices",
        plain=(_ONE,),
        panel="MLP 100-100",
    )
