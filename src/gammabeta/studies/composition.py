"""What do batches do that are not independent and identically distributed?

Ioffe 2017 (arXiv 1702.03275), section 4.3: with batches made of few labels a network with batch
normalization (BN) learns from the company that an image keeps, and Batch Renormalization fixes
it (brn-noniid). Ioffe, Wu & Johnson 2021, section 6, and Wu & He 2018: the network exploits the
composition of the batch, excellent in training mode and poor in evaluation mode (leakage).

Network: pixels-100-100-10, ReLU, normalization before each activation, no bias where it follows,
bias 0.1 at the end, weights from a truncated normal distribution with standard deviation
sqrt(2 / fan-in). SGD without momentum, mean cross-entropy, 5,000 training images drawn for each
seed from the first 55,000, decay 0.99 of the running statistics (momentum 0.01) for all, 800 steps
of batches of 32:

    two digits   16 images of each of two digits, drawn anew for every batch: BN; Batch
                 Renormalization with its limits from r = 1, d = 0 (until 5 % of the steps) to
                 3 (at 40 %) and 5 (at 25 %); GroupNorm with 10 groups (shown)
    one digit    32 images of one digit: BN
    all digits   32 images drawn from all, independently: BN (shown)

Each of these five arms trains at its own best learning rate: highest accuracy by running statistics
on the last 5,000 training images (mean of seeds 800 and 801) from 0.03, 0.1, 0.3; a best value at
an edge extends the grid, for all arms of two digits alike. With one digit the rate is chosen by
accuracy in training mode on batches alike: in eval mode it is near chance at all rates. All arms of
a seed start alike; those of two digits see the same batches.

brn-noniid
    Primary contrast: test accuracy by running statistics, mean at 96, 98 and 100 % of the steps,
    Batch Renormalization minus BN, both on two digits, lies above 1 point. Shown: the same by
    precise statistics (those of all training images at fixed weights, gb.calibrate), which tells
    what is owed to training and what to the moving average; BN on all digits, the level to be
    reached, minus Batch Renormalization; GroupNorm minus BN.
leakage
    Primary contrast: accuracy in training mode on test batches composed like those of training (by
    their own statistics) minus accuracy in eval mode, lies above 10 points. Fair: eval mode by
    precise statistics, so that a bad moving average does not count as a leak. As published: by
    running statistics. Two levels, declared beforehand: batches of two digits and of one.
    Shown: the same with shuffled test batches in place of eval mode; both accuracies.

5 to 16 seeds by a pilot of seeds 900 to 903, used for nothing else: predicted half-width of the
95 % interval half a point (brn-noniid), 2 points (leakage). No positive control: neither claim says
why BN helps.

What the authors would call fair: Batch Renormalization with the limits of its paper as shares of
the training, each arm at its own rate, and a leak measured at fixed weights. What would embarrass
us: a gain of Batch Renormalization that precise statistics would have given BN as well; a rate
chosen for accuracy in eval mode, which works against a leak with two digits: it is what a user
would choose, and the leak at that rate is what a user would get. Tried on one seed that is used for
nothing else: more steps make the leak with one digit larger.

The source's batches are 16 labels with 2 images each, on ImageNet, which cannot be run here; two
digits with 16 images each keep what matters, that a batch tells its labels. Changed against the
registry: no BN on halves of the batch (halves of such a batch have the same two digits), 800 steps;
`full` 4,000; `tiny` a few, it decides nothing. On the bundled digits each seed splits the 1,797
images anew: a demonstration.

Rows: arm fields part, group, arm, rate; `step`, `accuracy` (running), `diverged`; but for
tuning also `precise`, `like` (training mode, composed like in training), `mixed` (shuffled).
"""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row, Scalar
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.models.calibration import calibrate
from gammabeta.studies._answer import Words
from gammabeta.studies._asked import Asked, Parts, ends, less, planned, verdict
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._nets import MLP, Norm, m2, renorm
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream
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

CLAIMS = ("brn-noniid", "leakage")
BATCH = 32
MOMENTUM = 0.01
# arm -> digits in a batch (0: drawn from all), what normalizes
ARMS = {
    "BN, two digits": (2, "bn"),
    "BRN, two digits": (2, "brn"),
    "GN, two digits": (2, "gn"),
    "BN, one digit": (1, "bn"),
    "BN, all digits": (0, "bn"),
}
BN, BRN, GN, ONE, ALL = ARMS
GROUPS = {"two digits": (BN, BRN, GN), "one digit": (ONE,), "all digits": (ALL,)}
GROUP_OF = {arm: group for group, arms in GROUPS.items() for arm in arms}


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.03, 0.1, 0.3)
PLANS = {
    "tiny": Plan(10, 1, (0.1,), 500, False),
    "small": Plan(800, LEAST_SEEDS, RATES, 5000, True),
    "full": Plan(4000, LEAST_SEEDS, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until the grid is settled; then the main runs; pilot; more seeds."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    asked = [planned(_asked(claim, tuned, "pilot"), LEAST_SEEDS) for claim in CLAIMS]
    return [
        _cell(plan, *wish) for wish in needed(tuned, plan.seeds, seeds, asked) if not _spare(*wish)
    ]


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for half as many more."""
    plan = PLANS[budget]
    wanted = needed(guess(GROUPS, plan), plan.seeds, seeds, [LEAST_SEEDS * 3 // 2])
    return [_cell(plan, *wish) for wish in wanted if not _spare(*wish)]


def _spare(wave: int, seed: int, part: str, what: Trained) -> bool:
    """Arms that are shown need no pilot and no seeds beyond the least."""
    shown = what.arm in (GN, ALL)
    return shown and (part == "pilot" or (part == "fair" and seed >= LEAST_SEEDS))


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    # In seconds, about: steps, and looks at images.
    step = {"bn": 1.5e-3, "brn": 2.1e-3, "gn": 1.3e-3}[ARMS[what.arm][1]]
    look = 3 * (plan.images if part == "tuning" else 4 * plan.images + 10000) * 5e-6
    return Cell("composition", arm, seed, round(plan.steps * step + look, 3), wave)


# -- one cell -----------------------------------------------------------------------------------


def composed(labels: Tensor, kinds: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of one batch after another, for ever: so many digits, an equal number of each.

    The digits of a batch are drawn without replacement, the images of a digit too (if there are
    enough). With ``kinds`` 0 the images are drawn from all.
    """
    classes = [(labels == digit).nonzero().flatten() for digit in range(int(labels.max()) + 1)]
    while True:
        if not kinds:
            yield torch.randperm(len(labels), generator=generator)[:BATCH]
            continue
        digits = torch.randperm(len(classes), generator=generator)[:kinds].tolist()
        parts = []
        for digit in digits:
            of = classes[digit]
            count = BATCH // kinds
            at = torch.randperm(len(of), generator=generator)[:count]
            if len(of) < count:
                at = torch.randint(len(of), (count,), generator=generator)
            parts.append(of[at])
        yield torch.cat(parts)


def network(pixels: int, norm: str, seed: int, steps: int) -> MLP:
    """The network with one kind of normalization; batch statistics have the decay 0.99."""
    layers: Mapping[str, Norm] = {
        "bn": lambda width: BatchNorm1d(width, momentum=MOMENTUM),
        "brn": renorm(steps, 1e-5, MOMENTUM),
        "gn": lambda width: nn.GroupNorm(10, width),
    }
    return m2(pixels, "relu", layers[norm], stream(seed, "weights"))


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network; accuracies by several statistics at the end, three times."""
    plan, tuning = PLANS[budget], arm["part"] == "tuning"
    kinds, norm = ARMS[str(arm["arm"])]
    split = fair_split(data, seed, "validation" if tuning else "test")
    train_x, train_y, held_x, labels = split
    x, held = (pixels(images, data.pixel_max) for images in (train_x, held_x[: plan.images]))
    labels, rate, steps = labels[: len(held)], float(arm["rate"] or 0.0), plan.steps
    net = network(x.shape[1], norm, seed, steps)
    parameters, stops = list(net.parameters()), log_steps(steps, 3)[-3:]
    draw = composed(train_y, kinds, stream(seed, f"batches of {kinds}"))
    net.train()
    for step, index in zip(range(1, steps + 1), draw, strict=False):
        loss = cross_entropy(net(x[index]), train_y[index])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)
        if step not in stops:
            continue
        row: Row = {"step": step, "accuracy": accuracy(net, held, labels)}
        if tuning and kinds == 1:
            draw_held = composed(labels, kinds, stream(seed, "test batches"))
            row["accuracy"] = _composed_share(net, held, labels, draw_held)
        row["diverged"] = not math.isfinite(loss.item())
        if not tuning and norm != "gn" and math.isfinite(loss.item()):
            row |= _by_others(net, x, held, labels, kinds, stream(seed, "test batches"))
        yield row


def _by_others(
    net: MLP, x: Tensor, held: Tensor, labels: Tensor, kinds: int, generator: torch.Generator
) -> dict[str, Scalar]:
    """Shares by precise statistics, and by those of test batches of both compositions."""
    population = copy.deepcopy(net)
    calibrate(population, torch.split(x, 1000))
    found: dict[str, Scalar] = {"precise": accuracy(population, held, labels)}
    for name, digits in (("like", kinds), ("mixed", 0)):
        found[name] = _composed_share(net, held, labels, composed(labels, digits, generator))
    return found


def _composed_share(net: MLP, held: Tensor, labels: Tensor, draw: Iterator[Tensor]) -> float:
    """Accuracy by the statistics of batches that are drawn so, as many images as there are."""
    at = torch.cat([next(draw) for _ in range(len(held) // BATCH)])
    with torch.no_grad():
        logits = net.with_batch_statistics(held[at], BATCH)
    return float((logits.argmax(1) == labels[at]).double().mean())


# -- what it means ------------------------------------------------------------------------------


def _shares(tuned: Tuned, part: str, arm: str, column: str) -> dict[int, float]:
    group = GROUP_OF[arm]
    rate = tuned.best.get(group, {}).get(arm, math.nan)
    return ends(tuned.rows, column, {"part": part, "group": group, "arm": arm, "rate": rate})


def _asked(claim: str, tuned: Tuned, part: str, against: str = "precise") -> Parts:
    """The parts of a claim, from the fair or the pilot's rows."""
    limits = claims()[claim].thresholds

    def by(arm: str, column: str) -> dict[int, float]:
        return _shares(tuned, part, arm, column)

    if claim == "brn-noniid":
        gain = less(by(BRN, "accuracy"), by(BN, "accuracy"), 100)
        return {"BRN − BN, two digits": Asked(gain, "above", limits["delta"], limits["delta"])}
    found = {}
    for arm, level in ((BN, "two digits"), (ONE, "one digit")):
        leak = less(by(arm, "like"), by(arm, against), 100)
        name = f"training mode on batches alike − eval mode, {level}"
        found[name] = Asked(leak, "above", limits["delta"], limits["precision"], level)
    return found


def judge(rows: list[Row]) -> list[Verdict]:
    """Both claims; what is missing makes them inconclusive."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    setting = tuned.setting(
        "composition", "MLP 100-100, batches of 32", "each arm at its best learning rate"
    )

    def by(arm: str, column: str) -> dict[int, float]:
        return _shares(tuned, "fair", arm, column)

    beside = {
        "brn-noniid": {
            "BRN − BN, two digits, precise statistics": less(
                by(BRN, "precise"), by(BN, "precise"), 100
            ),
            "BN, all digits − BRN, two digits": less(by(ALL, "accuracy"), by(BRN, "accuracy"), 100),
            "GN − BN, two digits": less(by(GN, "accuracy"), by(BN, "accuracy"), 100),
        },
        "leakage": {
            f"{name}, {arm}": less(by(arm, column), dict.fromkeys(by(arm, column), 0.0), 100)
            for arm in (BN, ONE, ALL)
            for column, name in (
                ("like", "accuracy in training mode on batches alike"),
                ("mixed", "accuracy in training mode on shuffled batches"),
                ("precise", "accuracy in eval mode, precise statistics"),
                ("accuracy", "accuracy in eval mode, running statistics"),
            )
        },
    }
    return [
        verdict(
            claim,
            setting,
            WORDS[claim],
            _asked(claim, tuned, "fair"),
            _asked(claim, tuned, "pilot"),
            least=LEAST_SEEDS,
            notes=tuned.notes(),
            published=_asked(claim, tuned, "fair", "accuracy") if claim == "leakage" else None,
            beside=beside[claim],
        )
        for claim in CLAIMS
    ]


WORDS = {
    "brn-noniid": Words(
        "on batches of two digits Batch Renormalization gains more than {delta} point over batch "
        "normalization: {weakest}",
        "on batches of two digits Batch Renormalization does not gain {delta} point over batch "
        "normalization: {refuted}",
        "on batches of two digits Batch Renormalization gains {weakest}",
    ),
    "leakage": Words(
        "networks that were trained on batches of few digits lose more than {delta} points in eval "
        "mode: {weakest}",
        "networks that were trained on batches of few digits do not lose {delta} points in eval "
        "mode: {refuted}",
        "in eval mode networks that were trained on batches of few digits lose {weakest}",
        "only networks trained on one of the two kinds of batches lose more than {delta} points in "
        "eval mode; not so: {refuted}",
    ),
}


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Test accuracy at the end of training, and how the rates were chosen."""
    if not rows:
        return []
    return trained_figures(
        "composition",
        settle(rows, GROUPS, PLANS[str(rows[0]["budget"])]),
        "Test accuracy on {where} after training on batches of few digits",
        "Running statistics, each arm at its best learning rate.",
        "by composition",
        plain=(GN, ALL),
        panel="MLP 100-100",
    )
