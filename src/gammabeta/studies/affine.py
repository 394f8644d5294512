"""What are gamma and beta for, and does batch normalization belong on the layer's input?

After normalizing, batch normalization (BN) multiplies each unit by gamma and adds beta. Viceroy's
article, after Ioffe & Szegedy 2015, Section 3 ("normalizing the inputs of a sigmoid would constrain
them to the linear regime of the nonlinearity"): gamma and beta let the network leave that regime,
with a wider variance and another mean (affine-range). Viceroy and Kathuria: without them the
network loses power (affine-needed). A note on the paper writes a layer with BN as sigma(W BN(x))
(layer-form), where the paper has g(BN(W u)).

Networks: pixels-100-100-10; hidden sigmoids, of which Viceroy speaks, and ReLU, which everybody
uses; a BN in each of the two hidden layers. Weights from a truncated normal distribution with
standard deviation sqrt(2 / fan-in). Batches of 64, 500 steps of SGD without momentum (3,000 at
`full`), mean cross-entropy, 5,000 training images drawn for each seed from the first 55,000,
PyTorch's defaults for the layer, evaluation by running statistics. All arms of a seed have the same
weights, images and batches.
    "learned"   sigma(gamma BN(W x) + beta), gamma = 1 and beta = 0 at the start
    "fixed"     gamma = 1 and beta = 0 throughout; no other bias in the hidden layers
    "gamma", "beta"   only this one is learned (sigmoids; shown)
    "input"     sigma(W (gamma BN(x) + beta) + b): BN on what the layer receives, which for the
                first layer is the pixels; b = 0.1 at the start, as elsewhere without BN behind

Each arm of each network trains at its own best learning rate: highest accuracy on the last 5,000
training images, mean of seeds 800 and 801, from 1, 3, 10 (sigmoids) and 0.1, 0.3, 1 (ReLU); a best
value at an edge extends the grid for all arms of that network. Test accuracy is the mean at 96, 98
and 100 % of the steps. Seeds 900 to 903 are a pilot: they give the number of seeds (8 to 16;
predicted half-width of the 95 % interval delta / 2 in both), and are used for nothing else.

affine-range, sigmoids. Two levels, declared beforehand: the network leaves the linear region, and
    it gains by that. Primary contrast: mean |gamma| over all hidden units at the end, minus the 1
    of the start, lies above 0: then the standard deviation of what arrives at the sigmoids has
    grown. Second level: test accuracy, learned - fixed, in points: superiority, delta = 0.3. One
    supported and the other refuted is mixed. Shown, of the learned arm and its excess over the
    fixed one: standard deviation of beta over the units; bending, 1 - R^2 of the sigmoid's outputs
    against the best straight line in its inputs, mean over units, on 2,000 training images in eval
    mode (0.016 for inputs from N(0, 1), 0.069 from N(0, 2^2), 0.162 from N(0, 4^2)).
affine-needed. Primary contrast: test accuracy, learned - fixed, in points, in both networks, as two
    levels: supported if the 95 % interval excludes 0 and the mean is at least delta = 0.3; refuted
    if the 90 % interval lies inside +-delta (equivalence: nothing that matters is lost), or if the
    fixed arm is better by delta or more with an interval that excludes 0. Shown: gamma alone and
    beta alone minus fixed.
layer-form. Primary contrast: test accuracy, input - learned, in points, in both networks, as two
    levels: superiority, delta = 0.3; refuted says whether the other form is better (reversed) or
    neither (absent). That is the registry's "either way", read as an answer to the question
    whether BN belongs on the layer's input.
No positive control: no claim here explains why BN helps.

What its author would call fair. Viceroy: sigmoids, where a linear regime is a loss, and rates that
are chosen anew without gamma and beta. The note: as many BNs in one form as in the other; a bias
where the paper's argument against it does not hold. What would embarrass us: gamma that grows in
every network whatever it computes, as from noise; hence the second level, and the bending. A gain
of "learned" that is owed to a bias which "fixed" does not have: gamma alone and beta alone tell.
BN on pixels that loses by border pixels alone, whose variance is nearly 0 (they are divided by
sqrt(eps) at least): an objection on the card.

Changed against the registry: 500 steps instead of 3,000 at `small`; the network of the MNIST study
alone; affine-needed and layer-form in two networks; levels. The sources have no setting that could
be run again: one verdict. `tiny` tries the wiring with one rate; it decides nothing. On the bundled
digits each seed splits the 1,797 images anew: a demonstration.

Rows: arm fields part, group (the activation), arm, rate, and optionally width (a factor on the
hidden units); `step`, `accuracy`, `diverged`; sigmoids with BN before them, in the last row but
for tuning: `gamma`, `beta`, `bending`.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gammabeta._runs import Row, Scalar
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.studies._answer import Setting, Words
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._nets import MLP, Norm
from gammabeta.studies._outcomes import asked_for, beside, by_weakest
from gammabeta.studies._pairs import curve
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    BAND,
    EQUIVALENCE_SEEDS,
    KEYS,
    MOST_SEEDS,
    Trained,
    Tuned,
    Wish,
    complete,
    fair_verdict,
    figure,
    guess,
    needed_in,
    own,
    place,
    settle,
    shown,
    tuning_figure,
)
from gammabeta.studies._verdict import (
    Outcome,
    Verdict,
    equivalence,
    levels,
    superiority,
)

CLAIMS = ("affine-range", "affine-needed", "layer-form")

NAMES = {"sigmoid": "sigmoids", "relu": "ReLU"}
JUDGED = ("learned", "fixed", "input")
GROUPS = {"sigmoid": (*JUDGED, "gamma", "beta"), "relu": JUDGED}
# contrast -> first arm, second arm
NEEDED, FORM = ("learned", "fixed"), ("input", "learned")
LOOKED = 2000  # images for the bending
_GROWTH, _GAIN = "growth of mean |γ|", "accuracy, learned − fixed"


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    evaluations: int
    seeds: int
    rates: Mapping[str, tuple[float, ...]]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = {"sigmoid": (1.0, 3.0, 10.0), "relu": (0.1, 0.3, 1.0)}
PLANS = {
    "tiny": Plan(10, 3, 1, {"sigmoid": (3.0,), "relu": (0.3,)}, 500, False),
    "small": Plan(500, 3, EQUIVALENCE_SEEDS, RATES, 10000, True),
    "full": Plan(3000, 12, EQUIVALENCE_SEEDS, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Of each network: tuning until the grid is settled; all arms; pilot; more seeds."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    return _wanted(plan, tuned, seeds, _planned(tuned))


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: grids grow somewhat, and half as many seeds more."""
    plan = PLANS[budget]
    tuned = guess(GROUPS, plan, {"sigmoid": (0.3, 30.0), "relu": (3.0,)}, 1.0)
    return _wanted(plan, tuned, seeds, plan.seeds * 3 // 2)


def _wanted(plan: Plan, tuned: Tuned, seeds: int | None, planned: int | None) -> list[Cell]:
    wanted: list[Wish] = []
    count = plan.seeds if seeds is None else seeds
    for group in GROUPS:
        every = [Trained(group, arm, rate) for arm, rate in tuned.best.get(group, {}).items()]
        judged = [what for what in every if what.arm in JUDGED]
        wanted += needed_in(group, tuned, plan.seeds, seeds, judged or None, planned)
        others = [what for what in every if what.arm not in JUDGED]
        wanted += [Wish(1, seed, "fair", what) for seed in range(count) for what in others]
    return [_cell(plan, *wish) for wish in wanted]


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    # In seconds, about: steps, and looks at the evaluation images.
    step = {"input": 1.25e-3, "gamma": 1.05e-3, "beta": 1.05e-3}.get(what.arm, 0.95e-3)
    looks = len(_stops(plan, part)) * min(plan.images, 5000 if part == "tuning" else 10000)
    return Cell("affine", arm, seed, round(plan.steps * step + 6e-6 * looks, 3), wave)


def _stops(plan: Plan, part: str) -> list[int]:
    """Steps after which a part evaluates."""
    stops = log_steps(plan.steps, plan.evaluations)
    return stops if part == "fair" else stops[-3:]


def _by_network(tuned: Tuned, part: str, pair: tuple[str, str]) -> dict[str, dict[int, float]]:
    """Test accuracy, one arm minus another, by network and seed."""
    return {NAMES[group]: tuned.minus(part, group, *pair) for group in GROUPS}


def _planned(tuned: Tuned) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot, deltas = {}, {}
    for claim, pair in (("affine-needed", NEEDED), ("layer-form", FORM)):
        for name, by_seed in _by_network(tuned, "pilot", pair).items():
            pilot[f"{claim}, {name}"] = by_seed
            deltas[f"{claim}, {name}"] = claims()[claim].thresholds["delta"]
    return asked_for(pilot, deltas, EQUIVALENCE_SEEDS, MOST_SEEDS) if complete(pilot) else None


# -- one cell -----------------------------------------------------------------------------------


class Normalized(nn.Module):
    """BN without gamma and beta; behind it those of them that are learned."""

    def __init__(self, width: int, *, gamma: bool, beta: bool) -> None:
        super().__init__()
        self.norm = BatchNorm1d(width, affine=False)
        self.gamma = nn.Parameter(torch.ones(width)) if gamma else None
        self.beta = nn.Parameter(torch.zeros(width)) if beta else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        y = y if self.gamma is None else y * self.gamma
        return y if self.beta is None else y + self.beta


def network(pixels: int, group: str, arm: str, seed: int, width: float = 1.0) -> MLP:
    """The network of an arm."""
    units = round(100 * width)

    def some(channels: int) -> nn.Module:
        return Normalized(channels, gamma=arm == "gamma", beta=arm == "beta")

    norm: Norm = some if arm in ("fixed", "gamma", "beta") else arm == "learned"
    net = MLP((pixels, units, units, 10), group, norm, stream(seed, "weights"))
    if arm == "input":
        # From the last to the first: what is put in moves what follows.
        net.layers.insert(2, BatchNorm1d(units))
        net.layers.insert(0, BatchNorm1d(pixels))
    return net


def bending(z: Tensor) -> float:
    """1 - R² of the sigmoid against its best straight line on each column of z, mean over them.

    >>> z = torch.randn(200000, 1, generator=stream(0, "z"))
    >>> [round(bending(s * z), 2) for s in (1, 2, 4)]
    [0.02, 0.07, 0.16]
    """
    z = z.double()
    y = z.sigmoid()
    z, y = z - z.mean(0), y - y.mean(0)
    squares = z.square().sum(0) * y.square().sum(0)
    explained = (z * y).sum(0).square() / squares.clamp(min=1e-30)
    return float((1 - explained).mean())


def looked_at(net: MLP, x: Tensor) -> dict[str, float]:
    """Mean |gamma|, standard deviation of beta and bending, over all hidden units, in eval mode."""
    gammas, betas, bent = [], [], []
    gamma: Tensor | None
    beta: Tensor | None
    mode = net.training
    net.eval()
    with torch.no_grad():
        for layer in net.layers:
            if isinstance(layer, nn.Sigmoid):
                bent.append(bending(x))
            x = layer(x)
            if isinstance(layer, BatchNorm1d):
                gamma, beta = layer.weight, layer.bias
            elif isinstance(layer, Normalized):
                gamma, beta = layer.gamma, layer.beta
            else:
                continue
            gammas.append(torch.ones(x.shape[1]) if gamma is None else gamma.abs())
            betas.append(torch.zeros(x.shape[1]) if beta is None else beta.detach())
        numbers = {"gamma": torch.cat(gammas).mean(), "beta": torch.cat(betas).std()}
    net.train(mode)
    return {**{name: float(v) for name, v in numbers.items()}, "bending": statistics.fmean(bent)}


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network: a row for each evaluation."""
    part, group, name, plan = str(arm["part"]), str(arm["group"]), str(arm["arm"]), PLANS[budget]
    evaluation = "validation" if part == "tuning" else "test"
    train_x, train_y, held_x, held_y = fair_split(data, seed, evaluation)
    held, labels = pixels(held_x[: plan.images], data.pixel_max), held_y[: plan.images]
    net = network(held.shape[1], group, name, seed, float(arm.get("width") or 1.0))
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=plan.steps,
        order=stream(seed, "order"),
        stops=_stops(plan, part),
    )
    for step, loss in training:
        row: Row = {"step": step, "accuracy": accuracy(net, held, labels)}
        row["diverged"] = not math.isfinite(loss)
        if part != "tuning" and step == plan.steps and group == "sigmoid" and name != "input":
            found = looked_at(net, pixels(train_x[:LOOKED], data.pixel_max))
            row |= {key: value for key, value in found.items() if math.isfinite(value)}
        yield row


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """All claims, fair; what is missing makes them inconclusive."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    setting, notes = tuned.setting("affine", "MLP 100-100"), tuned.notes()
    return [
        _range_verdict(tuned, setting, notes),
        _needed_verdict(tuned, setting, notes),
        _form_verdict(tuned, setting, notes),
    ]


def _looks(tuned: Tuned, arm: str, key: str, part: str = "fair") -> dict[int, float]:
    """One of the numbers at the end of a sigmoid network's training, by seed."""
    of = (part, "sigmoid", arm, tuned.best.get("sigmoid", {}).get(arm))
    return {
        seed: value
        for row in tuned.rows
        if tuple(row.get(name) for name in KEYS) == of
        and isinstance(value := row.get(key), float)
        and isinstance(seed := row["seed"], int)
    }


def _range_verdict(tuned: Tuned, setting: Setting, notes: Sequence[str]) -> Verdict:
    claim = "affine-range"
    gamma = _looks(tuned, "learned", "gamma")
    gain = tuned.minus("fair", "sigmoid", *NEEDED)
    delta = claims()[claim].thresholds["delta"]
    parts = {
        _GROWTH: Part([gamma[s] - 1 for s in sorted(gamma)], "above", 0.0, level="leaves it"),
        _GAIN: Part(list(gain.values()), "superiority", delta, level="gains by it"),
    }
    more = []
    for key, name in (("beta", "standard deviation of β"), ("bending", "bending of the sigmoids")):
        learned, fixed = (_looks(tuned, arm, key) for arm in NEEDED)
        more += shown(f"{name}, learned", list(learned.values()))
        if key == "bending":
            both = sorted(learned.keys() & fixed.keys())
            more += shown(f"{name}, learned − fixed", [learned[s] - fixed[s] for s in both])
    verdict = fair_verdict(
        claim,
        setting._replace(
            network="MLP 100-100 with sigmoids", unit="mean |γ| − 1 (points for accuracy)"
        ),
        Words(
            "gamma and beta widen what arrives at the sigmoids, and the network gains: {weakest}",
            "gamma and beta do not widen what arrives at the sigmoids, or the network does not "
            "gain {delta} points by them: {refuted}",
            "gamma changes by {weakest}",
            "of the two, leaving the linear region and gaining {delta} points by it, only one is "
            "seen; not {refuted}",
        ),
        joint(parts, EQUIVALENCE_SEEDS),
        pilot={_GROWTH: _looks(tuned, "learned", "gamma", "pilot")},
        planned=_planned(tuned),
        notes=notes,
    )
    return beside(verdict, more)


def needed(values: Sequence[float], delta: float) -> Outcome:
    """Is something lost without gamma and beta? Values: accuracy with them minus without."""
    found = equivalence(values, delta, EQUIVALENCE_SEEDS)
    p = superiority(values, delta, EQUIVALENCE_SEEDS).p
    i = found.interval
    if found.status == "supported":
        return dataclasses.replace(found, status="refuted", p=p)
    if found.status == "refuted" and i is not None and i.mean > 0:
        reason = f"a loss of at least {delta:g}"
        return dataclasses.replace(found, status="supported", reason=reason, p=p)
    reason = "reversed" if found.status == "refuted" else found.reason
    return dataclasses.replace(found, reason=reason, p=p)


def _of_both(found: Mapping[str, Outcome]) -> Outcome:
    """Two networks as levels; the effect is the smaller one's."""
    first, second = found.values()
    ps = [o.p for o in found.values() if o.p is not None]
    needs = [o.n_needed for o in found.values() if o.status == "inconclusive" and o.n_needed]
    return by_weakest(
        Outcome(
            levels(first, second),
            None,
            "; ".join(f"{name}: {o.reason}" for name, o in found.items()),
            max(needs, default=None),
            dict(found),
            None,
            max(ps) if len(ps) == len(found) else None,
        )
    )


def _needed_verdict(tuned: Tuned, setting: Setting, notes: Sequence[str]) -> Verdict:
    claim = "affine-needed"
    delta = claims()[claim].thresholds["delta"]
    found = {
        name: needed(list(by.values()), delta)
        for name, by in _by_network(tuned, "fair", NEEDED).items()
    }
    more = []
    for arm, label in (("gamma", "γ alone"), ("beta", "β alone")):
        alone = tuned.minus("fair", "sigmoid", arm, "fixed")
        more += shown(f"sigmoids, {label} − fixed", list(alone.values()))
    verdict = fair_verdict(
        claim,
        setting,
        Words(
            "without gamma and beta the network loses accuracy, least with {weakest}",
            "without gamma and beta the network does not lose {delta} points: {refuted}",
            "with gamma and beta minus without them is smallest with {weakest}",
            "without gamma and beta one network loses {delta} points, not the other: {refuted}",
        ),
        _of_both(found),
        pilot=_by_network(tuned, "pilot", NEEDED),
        planned=_planned(tuned),
        notes=notes,
    )
    return beside(verdict, more)


def _form_verdict(tuned: Tuned, setting: Setting, notes: Sequence[str]) -> Verdict:
    claim = "layer-form"
    delta = claims()[claim].thresholds["delta"]
    parts = {
        name: Part(list(by.values()), "superiority", delta, level=name)
        for name, by in _by_network(tuned, "fair", FORM).items()
    }
    return fair_verdict(
        claim,
        setting,
        Words(
            "batch normalization on the layer's input gains accuracy over one before the "
            "activation, least with {weakest}",
            "batch normalization on the layer's input does not gain {delta} points over one "
            "before the activation: {refuted}",
            "on the input − before the activation is smallest with {weakest}",
            "batch normalization on the layer's input gains {delta} points over one before the "
            "activation in one network alone; not {refuted}",
        ),
        by_weakest(joint(parts, EQUIVALENCE_SEEDS)),
        pilot=_by_network(tuned, "pilot", FORM),
        planned=_planned(tuned),
        notes=notes,
    )


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Test accuracy of all arms at the end of training, and how the rates were chosen."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    panels = [
        {"title": f"{NAMES[group]}: {arm}", "series": [{**curve(ended, "bn"), "name": arm}]}
        for group, rates in tuned.best.items()
        for arm in rates
        if (ended := tuned.ended("fair", group, arm))
    ]
    how = "with gamma and beta learned, fixed, and on the layer's input"
    title = f"Test accuracy on {place(rows)} {how}"
    return [
        *figure("affine", "fair", title, f"Each network at its best learning rate. {BAND}", panels),
        *tuning_figure("affine", tuned, "forms of batch normalization"),
    ]
