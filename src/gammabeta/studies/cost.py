"""What does batch normalization cost: a training step with it, and with statistics of all images?

Replications of Ioffe & Szegedy 2015 on MNIST found training steps with batch normalization (BN) to
take 1.47 to 1.69 times as long (bn-cost). Viceroy: the whole data set is not used for the
statistics, because that is computationally too heavy (full-stats-cost).

bn-cost          pixels-100-100-10, ReLU, batches of 16, 64, 256: processor time of a whole training
                 step (drawing the batch, forward, mean cross-entropy, backward, SGD), with BN over
                 without, for the layer of this package and for PyTorch's own
full-stats-cost  the same network with BN, all training images, batch of 64: processor time of a
                 step whose BN uses the mean and variance of all images, layer by layer, over that
                 of a step as usual. Only what statistics need is computed: a forward pass without
                 gradient up to the last BN, with all pixels already floating

One thread, float32. A draw is a seed: its weights and images, and its own timing. The kinds of step
take turns, 30 times after one that does not count (all images: 3 times); a time is the median.
Processor time, so that other programs count for little.

Fair (the verdict)
    bn-cost: the ratio lies above 1.1 at all three batch sizes; two levels, declared beforehand, the
    layer of this package and PyTorch's. One level supported and the other refuted is mixed.
    full-stats-cost: the ratio lies above 100.
    Four pilot draws (900 to 903), used for nothing else, give the number of draws: at least 5, at
    most 16, so that the half-width of the 95 % interval is predicted to be at most 0.05 (bn-cost),
    or 25.
As published
    bn-cost: the replications' network, pixels-100-100-100-10 with sigmoid units and batches of 60,
    the layer of this package: the ratio lies above 1.1; their machines and TensorFlow cannot be had
    here. full-stats-cost is an argument, tried as it is stated: one verdict for both.
Shown: full-stats-cost at batches of 16 and 256; with statistics that are made anew every 10 steps;
and a step on all images as one batch, through which the gradient flows, as it would have to.

No positive control: neither explains anything by BN.

What their authors would call fair: whole steps of their own small network, where BN is a large part
of the work, on one thread. What would embarrass us: a ratio that is that of a careless
implementation (hence two), or of a machine that was busy (hence processor time, and turns).

Changed against the registry: PyTorch's layer beside this package's. `tiny` tries the wiring; it
decides nothing. The time of full-stats-cost depends on the number of images: on the bundled digits,
1,797, it is a demonstration.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from gammabeta._runs import Row, Scalar
from gammabeta.studies._claims import claims
from gammabeta.studies._cost.steps import bn_cost, full_statistics_cost
from gammabeta.studies._data import Images
from gammabeta.studies._draws import LEAST_SEEDS, PILOT_SEEDS, Question, Words, planned, verdict
from gammabeta.studies._experiments import Cell
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._targets import Target
from gammabeta.studies._verdict import Verdict

CLAIMS = ("bn-cost", "full-stats-cost")

# in seconds, about
_COSTS = {"bn-cost": 0.6, "full-stats-cost": 2.2}
_TINY = {"bn-cost": 0.08, "full-stats-cost": 0.3}
_LAYERS = {"this package": "this package's layer", "PyTorch": "PyTorch's layer"}


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """The pilot; then as many draws as it asks for."""
    wanted = []
    for claim in CLAIMS:
        if seeds is None and budget != "tiny":
            wanted += [_cell(budget, claim, seed, 0) for seed in PILOT_SEEDS]
            count = planned(question(claim), [r for r in rows if r.get("claim") == claim]) or 0
        else:
            count = seeds or 2
        wanted += [_cell(budget, claim, seed, 1) for seed in range(count)]
    return wanted


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: the least number of draws."""
    if seeds is not None or budget == "tiny":
        return cells(budget, data, seeds, [])
    main = [_cell(budget, claim, seed, 1) for claim in CLAIMS for seed in range(LEAST_SEEDS)]
    return cells(budget, data, None, []) + main


def _cell(budget: str, claim: str, seed: int, wave: int) -> Cell:
    costs = _TINY if budget == "tiny" else _COSTS
    return Cell("cost", {"claim": claim}, seed, costs[claim], wave)


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """One draw of one claim: its ratios, a row each, and the points of its figure."""
    if arm["claim"] == "bn-cost":
        return bn_cost(seed, data, budget == "tiny")
    return full_statistics_cost(seed, data, budget == "tiny")


def question(claim: str) -> Question:
    """The rule of a claim."""
    bound = claims()[claim].thresholds["ratio"]
    if claim == "bn-cost":
        slower = {
            f"{kind}, batch {size}": Target(level, bound, math.inf, 0.1)
            for kind, level in _LAYERS.items()
            for size in (16, 64, 256)
        }
        published = {"the replications' network": Target("", bound, math.inf, 0.1)}
        return Question(claim, slower, _WORDS[claim], published=published)
    target = {"statistics of all images": Target("", bound, math.inf, 50.0)}
    return Question(claim, target, _WORDS[claim], on_images=True)


_WORDS = {
    "bn-cost": Words(
        "a training step with batch normalization takes longer",
        "a training step with batch normalization does not take a tenth longer",
        "ratio of processor times",
        "in an MLP 100-100, on one thread",
    ),
    "full-stats-cost": Words(
        "statistics of all images make a step at least a hundred times as long",
        "statistics of all images do not make a step a hundred times as long",
        "ratio of processor times",
        "in an MLP 100-100, batch of 64, on one thread",
    ),
}


def judge(rows: list[Row]) -> list[Verdict]:
    """A verdict for every claim that has rows."""
    found = []
    for claim in CLAIMS:
        own = [row for row in rows if row["claim"] == claim]
        if own:
            found.append(verdict(question(claim), "cost", own))
    return found


_FIGURES = {
    "step": Axes(
        "Processor time of a training step, MLP 100-100",
        "batch size",
        "seconds",
        x_log=True,
        y_log=True,
    ),
    "statistics": Axes(
        "Processor time of a training step with statistics of all images",
        "batch size",
        "seconds",
        x_log=True,
        y_log=True,
    ),
}


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """What is drawn of each measurement, over the draws that count."""
    return drawings("cost", _FIGURES, [r for r in rows if r["seed"] not in PILOT_SEEDS])
