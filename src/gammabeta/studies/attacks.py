"""Are networks with batch normalization easier to fool?

Galloway et al. 2019 (adversarial): batch normalization (BN) "is a cause of adversarial
vulnerability". On five data sets networks with BN lose accuracy in double digits of percent under
small perturbations of the images and under noise; a single layer of BN suffices, and eps matters.

Network: pixels-100-100-10, ReLU, BN before each activation ("bn") or without ("none"); no bias
where BN follows, bias 0.1 elsewhere, weights from a truncated normal distribution with standard
deviation sqrt(2 / fan-in). Batches of 64, SGD without momentum or weight decay, mean cross-entropy,
5,000 training images drawn for each seed from the first 55,000, 600 steps (2,000 at `full`),
PyTorch's defaults for the layer. Both arms of a seed share start, images and batches.
Rates: each arm has its own best one: highest accuracy on the last 5,000 training images, mean of
seeds 800 and 801, from 0.1, 0.3, 1; a best value at an edge extends the grid for both arms.

Equal clean accuracy: 2,000 test images are drawn by the seed. Where training ends, the arm that
labels more of them rightly is taken back along its training to where it labels as many as the
other: of its looks every 10 steps the first that reaches the other's accuracy and the one before
are joined by a straight line of all parameters and running statistics, which is halved 8 times. A
pair that is still more than 0.2 points apart, or has a network that diverged, is left out and
counted. The same images are attacked, so that as many are there to be lost in both arms; clean
accuracy on all test images, most of which chose nothing, is shown.

Attacks, in eval mode, each network by its own gradient of the cross-entropy: FGSM (one step) and
PGD-5 (5 steps of half the bound, from the image itself, put back into the bound), in the norms Linf
(bound 0.05 of pixels in [0, 1]) and L2 (bound 1); Gaussian noise of standard deviation 0.5, the
same for both. All cut to [0, 1]. Bounds were chosen, by seeds that are used for nothing else, so
that about half of the images are lost.

Primary contrast: accuracy under PGD-5 in Linf, none - bn, in points: the interval lies above 1
point (that of BN - none below -1). The other attacks likewise, in two levels, declared beforehand:
adversarial examples (four attacks) and noise. A level holds if all of its attacks hold, and is
refuted if one is (at 1 - 0.05/5); one supported and the other refuted is mixed. At least 5 seeds;
seeds 900 to 903 are a pilot, used for nothing else (predicted half-width of the 95 % interval 0.5,
at most 16 seeds). No positive control: the claim does not say why BN helps.
Shown, 5 seeds each at the rate of "bn", taken to equal accuracy with "none" in the same way: BN in
the first layer alone, and eps = 1 in place of 1e-5. Shown for all: the difference where training
ends, accuracies as they are, and the step to which an arm was taken back.

What its authors would call fair: each arm at its rate, no weight decay in either, more than one
attack and norm, and equal clean accuracy, so that nobody can say that the better network had more
to lose. What would embarrass us: gradients that vanish because a network is sure of its labels (the
loss is taken in float64), or an arm that is only farther in its training; hence the comparison
where training ends beside the one at equal accuracy.

The source's networks and images cannot be run here: one verdict. Changed against the registry: one
bound for each attack decides, the rest of the curve is drawn; two variants of BN are shown, with
eps = 1 alone. `tiny` tries the wiring, it decides nothing. On the bundled digits each seed splits
the 1,797 images anew: a demonstration.

Rows: arm fields part, group, arm, rate, and but for tuning "against", the rate of "none". Tuning:
`step`, `accuracy`, `diverged`. A pair: for each `net` ("bn", "none") at each `stage` ("equal",
"end") `step`, `diverged`, `clean` and accuracy by attack; at "equal" `clean_all` (all test images)
and, in part "fair", rows of kind "curve".
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Words
from gammabeta.studies._asked import Asked, Parts, planned, verdict
from gammabeta.studies._attacks.contrasts import NAMES, Pairs, less, notes, pairs
from gammabeta.studies._attacks.robust import State, curves, kept, network, take_back, under_attack
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._pairs import LABELS, NORMS
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    LEAST_SEEDS,
    Trained,
    Tuned,
    Wish,
    guess,
    needed,
    own,
    place,
    settle,
    tuning_figure,
)
from gammabeta.studies._verdict import Verdict

CLAIMS = ("adversarial",)

DENSE = "dense"
GROUPS = {DENSE: NORMS}
SHOWN = ("bn, first layer", "bn, eps 1")
EVERY = 10  # steps between two looks along training


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    seeds: int
    rates: tuple[float, ...]
    images: int  # attacked
    held: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.1, 0.3, 1.0)
PLANS = {
    "tiny": Plan(20, 1, (0.3,), 100, 500, False),
    "small": Plan(600, LEAST_SEEDS, RATES, 2000, 10000, True),
    "full": Plan(2000, LEAST_SEEDS, RATES, 2000, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until the grid is settled; then pairs; pilot; more seeds; variants of BN."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    return _wanted(tuned, plan, seeds, planned(_asked(tuned, "pilot"), LEAST_SEEDS))


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for three times the least."""
    plan = PLANS[budget]
    return _wanted(guess(GROUPS, plan), plan, seeds, 3 * LEAST_SEEDS)


def _wanted(tuned: Tuned, plan: Plan, seeds: int | None, asked: int | None) -> list[Cell]:
    wanted = needed(
        tuned, plan.seeds, seeds, [asked], lambda best: [Trained(DENSE, "bn", best[DENSE]["bn"])]
    )
    best = tuned.best.get(DENSE, {})
    count = plan.seeds if seeds is None else min(seeds, plan.seeds)
    wanted += [
        Wish(2, seed, "shown", Trained(DENSE, arm, best["bn"]))
        for seed in range(count if best else 0)
        for arm in SHOWN
    ]
    return [_cell(plan, best.get("none", math.nan), *wish) for wish in wanted]


def _cell(plan: Plan, against: float, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: dict[str, Scalar] = {"part": part, **what._asdict()}
    # In seconds, about: steps, and looks at the evaluation images.
    if part == "tuning":
        cost = plan.steps * 1e-3 + 3 * 5e-6 * min(plan.held, 5000)
        return Cell("attacks", arm, seed, round(cost, 3), wave)
    cost = plan.steps * 2e-3 + 8e-4 * plan.images
    return Cell("attacks", {**arm, "against": against}, seed, round(cost, 3), wave)


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network; or two, take one back to the other's accuracy, and attack both."""
    plan, part, name = PLANS[budget], str(arm["part"]), str(arm["arm"])
    tuning = part == "tuning"
    split = fair_split(data, seed, "validation" if tuning else "test")
    train_x, train_y, held_x, held_y = split
    held, labels = pixels(held_x[: plan.held], data.pixel_max), held_y[: plan.held]
    rates = {name: float(arm["rate"] or 0.0)}
    stops = log_steps(plan.steps, 3)[-3:]
    if not tuning:
        rates["none"] = float(arm["against"] or 0.0)
        stops = list(range(EVERY, plan.steps + 1, EVERY))
    nets = {each: network(held.shape[1], each, seed) for each in rates}
    looks: dict[str, list[tuple[int, State]]] = {each: [(0, kept(nets[each]))] for each in rates}
    diverged: dict[str, bool] = {}
    for each, rate in rates.items():
        training = train(
            nets[each],
            train_x,
            train_y,
            pixel_max=data.pixel_max,
            rate=rate,
            steps=plan.steps,
            order=stream(seed, "order"),
            stops=stops,
        )
        for step, loss in training:
            diverged[each] = not math.isfinite(loss)
            if tuning:
                share = accuracy(nets[each], held, labels)
                yield {"step": step, "accuracy": share, "diverged": diverged[each]}
            else:
                looks[each].append((step, kept(nets[each])))
    if tuning:
        return
    at = torch.randperm(len(held), generator=stream(seed, "attacked"))[: plan.images]
    x, y = held[at], labels[at]
    found = {each: under_attack(net, x, y, seed) for each, net in nets.items()}
    steps = dict.fromkeys(nets, plan.steps)
    for each in nets:
        yield {**_head(each, "end", steps, diverged), **found[each]}
    worse, better = sorted(nets, key=lambda each: float(found[each]["clean"] or 0.0))
    target = float(found[worse]["clean"] or 0.0)
    steps[better] = take_back(nets[better], looks[better], x, y, target)
    found[better] = under_attack(nets[better], x, y, seed)
    for each, net in nets.items():
        row = {**_head(each, "equal", steps, diverged), **found[each]}
        yield {**row, "clean_all": accuracy(net, held, labels)}
        if part == "fair":
            yield from curves(net, x, y, seed, LABELS["none" if each == "none" else "bn"])


def _head(
    name: str, stage: str, steps: Mapping[str, int], diverged: Mapping[str, bool]
) -> dict[str, Scalar]:
    net = "none" if name == "none" else "bn"
    return {"net": net, "stage": stage, "step": steps[name], "diverged": diverged[name]}


# -- what it means ------------------------------------------------------------------------------


def _lost(
    tuned: Tuned, column: str, part: str = "fair", arm: str = "bn", stage: str = "equal"
) -> dict[int, float]:
    """Accuracy, none - bn, in points, by seed, for the pairs that count."""
    counted, _ = _pairs(tuned, part, arm)
    return {seed: less(both[stage], column) for seed, both in counted.items() if stage in both}


def _pairs(tuned: Tuned, part: str, arm: str) -> tuple[Pairs, int]:
    """The pairs at the chosen rates that count; and how many were left out."""
    best = tuned.best.get(DENSE)
    if best is None:
        return {}, 0
    arms: dict[str, Scalar] = {
        "part": part,
        "arm": arm,
        "rate": best["bn"],
        "against": best["none"],
    }
    return pairs(tuned.rows, arms, claims()["adversarial"].thresholds["clean"])


def _asked(tuned: Tuned, part: str) -> Parts:
    """The parts of the claim, from the fair or the pilot's rows."""
    bound = claims()["adversarial"].thresholds["delta"]
    return {
        name: Asked(_lost(tuned, column, part), "above", bound, bound, level)
        for column, (name, level) in NAMES.items()
    }


def judge(rows: list[Row]) -> list[Verdict]:
    """One claim; what is missing makes it inconclusive."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    beside = {f"{name}, where training ends": _lost(tuned, column, stage="end")
              for column, (name, _) in NAMES.items()}  # fmt: skip
    for column, name in (("clean", "clean accuracy, attacked images"),
                         ("clean_all", "clean accuracy, all test images")):  # fmt: skip
        beside[name] = _lost(tuned, column)
    for arm in SHOWN:
        for column in ("pgd_linf", "noise"):
            beside[f"{NAMES[column][0]}, none − {arm}"] = _lost(tuned, column, "shown", arm)
    return [
        verdict(
            "adversarial",
            tuned.setting(
                "attacks",
                "MLP 100-100",
                "at equal clean accuracy, each network at its best learning rate",
                "points of accuracy lost, none − bn",
            ),
            WORDS,
            _asked(tuned, "fair"),
            _asked(tuned, "pilot"),
            least=LEAST_SEEDS,
            notes=[*tuned.notes(), *notes(*_pairs(tuned, "fair", "bn"))],
            beside=beside,
        )
    ]


WORDS = Words(
    "networks with batch normalization lose more than {delta} point more to adversarial examples "
    "and to noise: {weakest}",
    "networks with batch normalization do not lose {delta} point more to every attack: {refuted}",
    "accuracy under attack without − with batch normalization is {weakest}",
    "networks with batch normalization lose more than {delta} point more to adversarial examples "
    "or to noise, not to both; not so: {refuted}",
)


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Accuracy over the size of the attack, and how the rates were chosen."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    caption = "At equal clean accuracy, each network at its best learning rate."
    texts: Sequence[tuple[str, str, str]] = (
        ("pgd", "under PGD-5 in Linf", "bound of each pixel's change"),
        ("noise", "under Gaussian noise", "standard deviation of the noise"),
    )
    axes = {
        key: Axes(f"Accuracy on {place(rows)} {what}", x, "accuracy (%)", caption=caption)
        for key, what, x in texts
    }
    return [*drawings("attacks", axes, rows), *tuning_figure("attacks", tuned, "by arm")]
