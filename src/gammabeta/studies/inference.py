"""With which statistics should a network that was trained with batch normalization be used?

Articles and lectures (Kathuria; Kainz after D2L; Ioffe & Szegedy 2015, section 3.1) say that
inference needs moving averages of mean and variance, since a single sample has no batch
(inference-running), and that the flag that tells training from evaluation must be set right
(train-flag). Wu & Johnson 2021, section 5, and Li et al. 2016 say that on a shifted domain the
population statistics should be taken again from it (domain-stats).

Networks: dense, pixels-100-100-10; convolutional, 5x5 with stride 2 and 8 channels, 5x5 with stride
2 and 16 channels (3x3 on the digits), one dense layer to 10. ReLU, batch normalization (BN) before
each, no bias where it follows, weights from a truncated normal distribution with standard
deviation sqrt(2 / fan-in), last bias 0.1. SGD without momentum, batches of 64, mean cross-entropy,
5,000 training images drawn for each seed from the first 55,000, PyTorch's defaults for the layer.
The learning rate of each network: highest accuracy by running statistics on the last 5,000 training
images (mean of seeds 800 and 801) from 0.1, 0.3, 1; a best value at an edge extends the grid. All
that is compared is the same trained network with other statistics, on the same test images (4,096
drawn for each seed), in points of accuracy; so there is one rate for both sides of each contrast.

inference-running
    Primary contrast: accuracy by running statistics minus by precise ones (those of all 5,000
    training images at fixed weights, gb.calibrate), mean at 96, 98 and 100 % of the steps:
    equivalence, delta = 0.3 points, at least 8 seeds. And a single sample in training mode fails:
    accuracy by running statistics minus that in training mode with batches of 1 lies above 5
    points (1,024 of the images). The layer refuses a batch of one value per channel; what it would
    give, beta, is evaluated through the pure function. Two levels, declared beforehand: the dense
    network, where a sample has one value per channel, and the convolutional one, where it has one
    for each position.
    Shown: batches of 2, 8, 64 and all test images.
train-flag
    Primary contrast: accuracy in eval mode minus accuracy in training mode on test images sorted by
    class, batches of 64, lies above 0, in the dense network; and in the convolutional one. And
    batches of 1 give chance (10 ± 3 %) in the dense network, where the registry asks for it.
    Shown: shuffled batches; accuracy in eval mode after somebody evaluated all test images once in
    training mode, shuffled or sorted, and how far the running means moved; whether gb.check names
    it (BN003); a dense network trained in eval mode (mean 0 and variance 1 for ever), tuned too.
domain-stats
    Test images with Gaussian noise (standard deviation 0.6), a third of the contrast, or blur (2
    pixels of 28). Primary contrast: accuracy by statistics of 2,000 training images of the same
    kind, without labels, minus accuracy by those of the same 2,000 clean ones: lies above 1 point,
    for each kind. So only the domain differs, not the number of images nor their age. Two levels:
    the dense network and the convolutional one (the sources' are convolutional). 2,048 of the test
    images. Shown: clean images by statistics of a shifted domain. On a seed used for nothing else
    the error by clean statistics was 15 to 67 % (the sources': 40 to 64 %).

No positive control: none of the claims explains why BN helps. 5 to 16 seeds (8 for equivalence), by
a pilot of seeds 900 to 903 that are used for nothing else: predicted half-width of the 95 %
interval delta / 2 (train-flag, domain-stats: half a point).

What the authors would call fair: running statistics with PyTorch's defaults after an ordinary
training; a flag forgotten on data in the order of a test set that is sorted; the unlabeled images
of the new domain are not those of the test. What would embarrass us: an equivalence that holds
because the rate was chosen by running statistics (precise ones are shown beside, at the same
rate), or a class-sorted test set that nobody has (most folders of images are read class by class).

The first two are told as facts, without a setting: one verdict for both. The third was found on
ImageNet-C and Cityscapes-like domains, which cannot be run here. Changed against the registry: a
convolutional network beside the dense one; 4,096 test images, so that the whole test set is one
batch of 4,096; 600 steps (dense) and 400 (convolutional), `full` 2,000; `tiny` a few, it decides
nothing. On the bundled digits each seed splits the 1,797 images anew: a demonstration.

Rows: arm fields part, group, arm ("bn", or "eval": trained in eval mode), rate; `step`,
`accuracy` (running statistics), `diverged`; arm "bn": `precise`, and at the last step `running`
(that accuracy again) and shares by other statistics (see `_inference.modes`).
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from gammabeta._runs import Row, Scalar
from gammabeta.models.freezing import freeze
from gammabeta.studies._answer import Words
from gammabeta.studies._asked import Asked, Parts, ends, less, planned, verdict
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._inference.modes import DOMAINS, REFERENCE, domains, flags, with_population
from gammabeta.studies._inference.networks import GROUPS, built
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    EQUIVALENCE_SEEDS,
    LEAST_SEEDS,
    Trained,
    Tuned,
    guess,
    needed,
    own,
    place,
    settle,
    tuning_figure,
)
from gammabeta.studies._verdict import Verdict

CLAIMS = ("inference-running", "train-flag", "domain-stats")
LEAST = {"inference-running": EQUIVALENCE_SEEDS, "train-flag": LEAST_SEEDS,
         "domain-stats": LEAST_SEEDS}  # fmt: skip
NETWORKS = tuple(GROUPS)
CHANCE = 10.0
DOMAIN_IMAGES = 2048


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: Mapping[str, int]  # by network
    seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.1, 0.3, 1.0)
PLANS = {
    "tiny": Plan({"dense": 10, "convolutional": 5}, 1, (0.3,), 256, False),
    "small": Plan({"dense": 600, "convolutional": 400}, EQUIVALENCE_SEEDS, RATES, 4096, True),
    "full": Plan(dict.fromkeys(NETWORKS, 2000), EQUIVALENCE_SEEDS, RATES, 4096, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until every grid is settled; then the main runs; pilot; more seeds."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    asked = [planned(_asked(claim, tuned, "pilot"), LEAST[claim]) for claim in CLAIMS]
    return [
        _cell(plan, *wish) for wish in needed(tuned, plan.seeds, seeds, asked) if not _spare(*wish)
    ]


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: no grid grows, the pilot asks for half as many more."""
    plan = PLANS[budget]
    wanted = needed(guess(GROUPS, plan), plan.seeds, seeds, [EQUIVALENCE_SEEDS * 3 // 2])
    return [_cell(plan, *wish) for wish in wanted if not _spare(*wish)]


def _spare(wave: int, seed: int, part: str, what: Trained) -> bool:
    """The network trained in eval mode, which is shown, needs no pilot and few seeds."""
    few = part == "pilot" or (part == "fair" and seed >= LEAST_SEEDS)
    return what.arm == "eval" and few


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    # In seconds, about: steps, looks at the evaluation images, all that is measured at the end.
    dense = what.group == "dense"
    step, look, end = (1.1e-3, 5e-6, 0.65) if dense else (3.2e-3, 2.2e-5, 1.35)
    cost = plan.steps[what.group] * step + 3 * plan.images * look
    if part != "tuning" and what.arm == "bn":
        cost += end * max(plan.images / 4096, 0.1)
    return Cell("inference", arm, seed, round(cost, 3), wave)


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network; accuracies at the end, three times, and by all statistics at the last."""
    part, group, plan = str(arm["part"]), str(arm["group"]), PLANS[budget]
    steps = plan.steps[group]
    tuning = part == "tuning"
    split = fair_split(data, seed, "validation" if tuning else "test")
    train_x, train_y, held_x, held_y = split
    chosen_images = torch.randperm(len(held_x), generator=stream(seed, "held"))
    at = chosen_images[: min(plan.images, len(held_x)) // 64 * 64]
    held, labels = pixels(held_x[at], data.pixel_max), held_y[at]
    seen = pixels(train_x, data.pixel_max)
    net = built(held.shape[1], group, seed)
    if arm["arm"] == "eval":
        freeze(net)
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=steps,
        order=stream(seed, "order"),
        stops=log_steps(steps, 3)[-3:],
    )
    for step, loss in training:
        row: Row = {"step": step, "accuracy": accuracy(net, held, labels)}
        row["diverged"] = not math.isfinite(loss)
        if not tuning and arm["arm"] == "bn" and math.isfinite(loss):
            row["precise"] = accuracy(with_population(net, seen), held, labels)
            if step == steps:
                row["running"] = row["accuracy"]
                row |= flags(net, held, labels)
                generator = stream(seed, "noise")
                shown = slice(DOMAIN_IMAGES)
                row |= domains(net, held[shown], labels[shown], seen[:REFERENCE], generator)
        yield row


# -- what it means ------------------------------------------------------------------------------


def _asked(claim: str, tuned: Tuned, part: str) -> Parts:
    """The parts of a claim, from the fair or the pilot's rows; none before the rates are chosen."""
    if len(tuned.best) < len(GROUPS):
        return {}
    limits = claims()[claim].thresholds
    delta, found = limits["delta"], {}

    def by(group: str, column: str) -> dict[int, float]:
        return ends(tuned.rows, column, _arm(tuned, group, part=part))

    def lost(group: str, of: str, to: str) -> dict[int, float]:
        return less(by(group, of), by(group, to), 100)

    for group in NETWORKS:
        if claim == "inference-running":
            near = lost(group, "accuracy", "precise")
            found[f"running − precise, {group}"] = Asked(near, "equivalence", delta, delta, group)
            name = f"running − batches of 1, {group}"
            fails = lost(group, "running_few", "batch_1")
            found[name] = Asked(fails, "above", limits["fails"], level=group)
        elif claim == "train-flag":
            name = f"eval − training mode on sorted images, {group}"
            found[name] = Asked(lost(group, "running", "sorted"), "above", 0.0, delta)
        else:
            for kind in DOMAINS:
                gain = lost(group, f"{kind}_after", f"{kind}_before")
                found[f"{kind}, {group}"] = Asked(gain, "above", delta, delta, group)
    if claim == "train-flag":
        alone = {seed: 100 * share for seed, share in by("dense", "batch_1").items()}
        name = "accuracy on batches of 1, dense"
        found[name] = Asked(alone, "number", CHANCE, tolerance=limits["chance"])
    return found


def _arm(tuned: Tuned, group: str, arm: str = "bn", part: str = "fair") -> dict[str, Scalar]:
    return {"part": part, "group": group, "arm": arm, "rate": tuned.best[group][arm]}


def _beside(claim: str, tuned: Tuned) -> dict[str, dict[int, float]]:
    """What is shown: accuracy lost in points, by seed."""
    rows = tuned.rows
    found: dict[str, dict[int, float]] = {}
    if len(tuned.best) < len(GROUPS):
        return found
    for group in NETWORKS:
        arm = _arm(tuned, group)
        last = ends(rows, "running", arm)
        lost = {
            "inference-running": {
                "batch_2": "running − batches of 2",
                "batch_8": "running − batches of 8",
                "batch_64": "running − batches of 64",
                "whole": "running − all test images",
            },
            "train-flag": {
                "batch_64": "eval − training mode on shuffled images",
                "batch_1": "eval − training mode on batches of 1",
                "after_shuffled": "lost in eval mode after training mode on shuffled images",
                "after_sorted": "lost in eval mode after training mode on sorted images",
            },
        }.get(claim, {})
        few = ends(rows, "running_few", arm)
        for column, name in lost.items():
            like = few if column in ("batch_1", "batch_2") else last
            found[f"{name}, {group}"] = less(like, ends(rows, column, arm), 100)
        if claim == "train-flag":
            for kind in ("shuffled", "sorted"):
                name = f"drift of the running means, {kind} (standard deviations), {group}"
                found[name] = ends(rows, f"drift_{kind}", arm)
            found[f"share of networks where gb.check names it, {group}"] = ends(rows, "named", arm)
            found[f"share of networks that refuse a batch of 1, {group}"] = ends(
                rows, "raised", arm
            )
        if claim == "domain-stats":
            for kind in DOMAINS:
                wrong = less(ends(rows, "clean", arm), ends(rows, f"{kind}_wrong", arm), 100)
                found[f"lost on clean images by statistics of {kind}, {group}"] = wrong
                left = ends(rows, f"{kind}_before", arm)
                error = {seed: 100 * (1 - share) for seed, share in left.items()}
                found[f"error by clean statistics, {kind}, {group}"] = error
    if claim == "train-flag":
        properly, wrongly = (
            ends(rows, "accuracy", _arm(tuned, "dense", a)) for a in tuned.best["dense"]
        )
        found["trained in training − in eval mode, dense"] = less(properly, wrongly, 100)
    return found


def judge(rows: list[Row]) -> list[Verdict]:
    """All claims; what is missing makes them inconclusive."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    return [
        verdict(
            claim,
            tuned.setting("inference", "MLP 100-100 and two convolutions"),
            WORDS[claim],
            _asked(claim, tuned, "fair"),
            _asked(claim, tuned, "pilot"),
            least=LEAST[claim],
            notes=tuned.notes(),
            published=None if claim == "domain-stats" else {},
            beside=_beside(claim, tuned),
        )
        for claim in CLAIMS
    ]


WORDS = {
    "inference-running": Words(
        "running statistics are as good as precise ones, and a single sample in training mode "
        "fails: {weakest}",
        "running statistics are not as good as precise ones, or a single sample in training mode "
        "does not fail: {refuted}",
        "running statistics differ from precise ones: {weakest}",
        "in one of the two networks alone running statistics are as good as precise ones and a "
        "single sample in training mode fails; not so: {refuted}",
    ),
    "train-flag": Words(
        "training mode at evaluation costs accuracy on images sorted by class, and a single sample "
        "gives chance in the dense network: {weakest}",
        "training mode at evaluation does not cost accuracy everywhere: {refuted}",
        "training mode at evaluation costs {weakest}",
    ),
    "domain-stats": Words(
        "statistics of the shifted domain gain more than {delta} point: {weakest}",
        "statistics of the shifted domain do not gain {delta} point everywhere: {refuted}",
        "statistics of the shifted domain gain {weakest}",
        "statistics of the shifted domain gain more than {delta} point in one network alone; not "
        "so: {refuted}",
    ),
}


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Accuracy by the size of the test batches, and how the rates were chosen."""
    if not rows:
        return []
    plan = PLANS[str(rows[0]["budget"])]
    tuned = settle(rows, GROUPS, plan)
    sizes = {"batch_1": 1, "batch_2": 2, "batch_8": 8, "batch_64": 64, "whole": plan.images}
    panels: list[dict[str, Any]] = []
    for group in tuned.best:
        arm = _arm(tuned, group)
        series = []
        by = {m: list(ends(rows, column, arm).values()) for column, m in sizes.items()}
        running = list(ends(rows, "running", arm).values())
        if running and all(by.values()):
            for name, style, values in (
                ("by the batch's own statistics", "none", by),
                ("by running statistics", "bn", dict.fromkeys(by, running)),
            ):
                x = sorted(values)
                series.append(
                    {
                        "name": name,
                        "style": style,
                        "x": x,
                        "y": [100 * math.fsum(values[m]) / len(values[m]) for m in x],
                        "lo": [100 * min(values[m]) for m in x],
                        "hi": [100 * max(values[m]) for m in x],
                        "n": len(running),
                    }
                )
            panels.append({"title": group, "series": series})
    title = f"Test accuracy on {place(rows)} by the statistics that normalize"
    said = "; ".join(
        f"{p['title']} {s['y'][0]:.1f} to {s['y'][-1]:.1f} % {s['name']}"
        for p in panels
        for s in p["series"]
    )
    drawn = {
        "id": "inference-batches",
        "experiment": "inference",
        "kind": "curves",
        "title": title,
        "caption": "Shuffled test batches of so many images. Mean over seeds; the band is their "
        "range.",
        "alt": f"{title}. From left to right: {said}.",
        "x": {"label": "test batch", "log": True},
        "y": {"label": "accuracy (%)", "log": False},
        "panels": panels,
    }
    return [
        *([drawn] if panels else []),
        *tuning_figure("inference", tuned, "for each network"),
    ]
