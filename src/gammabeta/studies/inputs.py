"""Do networks learn better from inputs that are zero-centered, or normalized?

Two claims about the inputs of a network, from which the texts then argue for batch normalization
(BN) inside it. Kathuria's article opens with "layers learn better when their inputs are
zero-centered" (zero-centred; LeCun et al. 1998, Efficient BackProp, Section 4.3: inputs of one sign
make all weights of a unit move in one direction). Viceroy's article starts from "normalized inputs
train better and faster" and names two kinds: scaled to a range, standardized (input-norm-speed).

Networks without BN: pixels-100-100-10, ReLU, bias 0.1, weights from a truncated normal distribution
with standard deviation sqrt(2 / fan-in) whatever the input. Batches of 64, 500 steps of SGD without
momentum (1,000 at `full`), mean cross-entropy, 5,000 training images drawn for each seed from the
first 55,000. All arms of a seed have the same start, images and batches; statistics of pixels are
those of the seed's training images.

Inputs, x being a pixel in [0, 1]
    "[0, 1]"               x
    "centered"             x minus the mean of that pixel
    "x + 1", "x + 3"       a constant added
    "0 to 255"             raw: 255 x
    "[-2, 2]"              4 x - 2
    "standardized"         minus the mean and over the standard deviation of all pixels together
    "z-score"              minus the mean and over (standard deviation + 0.01) of each pixel, cut to
                           +-5: the pixels at the border hardly vary
    "sigmoid of z-score"   between 0 and 1 again
    Beside them, as the registry asks: inputs in [0, 1] and hidden sigmoids, whose outputs are
    positive, against hidden tanh, whose outputs are centered.

Each arm trains at its own best learning rate: highest accuracy on the last 5,000 training images,
mean of seeds 800 and 801. The rate that an input can bear falls with the mean square of the input,
over five decades here. Hence each arm has its own unit of the rate, ``UNITS``, fixed beforehand on
a seed that is used for nothing else (990); the rates tried are 0.1, 0.3, 1 units, and a best value
at an edge of the grid extends it for all arms, so that all have the same number of trials, each
around rates that suit it.

Primary contrast of zero-centred: test accuracy (mean at 96, 98 and 100 % of the steps), input
    [0, 1] minus input x + 3, in points: superiority, delta = 0.3. Both have the same contrasts
    between pixels; what differs is the distance of the mean from 0 alone. Shown: centered - [0, 1],
    [0, 1] - (x + 1), hidden tanh - sigmoid; the share of the largest eigenvalue in the trace of the
    second moment of the inputs, which is what limits the rate.
Primary contrast of input-norm-speed: test accuracy, normalized minus 0 to 255: superiority,
    delta = 0.3. Two levels, declared beforehand, since the text names both: scaled to a range
    ([0, 1], [-2, 2], sigmoid of z-score), standardized (standardized, z-score). A level holds if
    all of its inputs do, and is refuted by any (at 1 - 0.05/5: five are asked). One level supported
    and the other refuted is mixed. The effect shown is the smallest of the five. Shown: natural
    logarithm of the ratio of the steps to 90 % (on 1,000 validation images), 0 to 255 over each; a
    run that does not arrive counts as arriving at its last step, which makes the ratio smaller if
    it is the raw one, and is counted.
No positive control: neither claim explains anything by BN.
Seeds 900 to 903 are a pilot: they give the number of seeds of each claim (5 to 16; predicted
    half-width of the 95 % interval delta / 2 in each of its contrasts), and are used for nothing
    else. Inputs that are only shown have 5.

What its author would call fair: the rate is chosen anew for each input, with trials as many for the
raw as for the normalized one. What would embarrass us: an arm that loses because its unit was
ill-chosen (its best rate then lies at the end of a grid that grew, and the card says so), or raw
inputs that lose by the scale of the first layer's outputs alone. That is the third objection on the
card: an initialization that is matched to the input would do the same as scaling it.

Changed against the registry: 500 steps instead of 1,000 at `small`; rates in units; the largest
stable rate is not searched for, the eigenvalue stands in for it; no border pixel is left out. The
sources have no setting that could be run again: one verdict. `tiny` tries the wiring with one rate;
it decides nothing. On the bundled digits each seed splits the 1,797 images anew: a demonstration.

Rows: arm fields part, group ("input", "activation"), arm, rate (in units), and optionally width (a
factor on the hidden units); `step`, `accuracy`, `diverged`; in part "fair" also `validation` at
log-spaced steps and, at step 0, `largest` (the share of the largest eigenvalue).
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Setting, Words
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._learning_rate.speed import reached
from gammabeta.studies._nets import MLP
from gammabeta.studies._outcomes import alone, asked_for, beside, by_weakest
from gammabeta.studies._pairs import collect, curve
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train
from gammabeta.studies._tuned import (
    BAND,
    KEYS,
    LEAST_SEEDS,
    MOST_SEEDS,
    PILOT_SEEDS,
    Trained,
    Tuned,
    Wish,
    complete,
    diverged_note,
    fair_verdict,
    figure,
    guess,
    own,
    place,
    settle,
    shown,
    tuning_figure,
    tuning_notes,
    wishes,
)
from gammabeta.studies._verdict import Verdict, superiority

CLAIMS = ("zero-centred", "input-norm-speed")

RAW, PLAIN, FAR = "0 to 255", "[0, 1]", "x + 3"
# input -> unit of the learning rate
UNITS = {
    PLAIN: 1.0,
    "centered": 1.0,
    "x + 1": 0.03,
    FAR: 0.01,
    RAW: 3e-5,
    "[-2, 2]": 0.03,
    "standardized": 0.1,
    "z-score": 0.3,
    "sigmoid of z-score": 0.1,
}
ACTIVATIONS = ("tanh", "sigmoid")
GROUPS = {"input": tuple(UNITS), "activation": ACTIVATIONS}
LEVELS = {
    PLAIN: "scaled to a range",
    "[-2, 2]": "scaled to a range",
    "sigmoid of z-score": "scaled to a range",
    "standardized": "standardized",
    "z-score": "standardized",
}
# claim -> its contrasts: name -> two inputs
CONTRASTS = {
    "zero-centred": {f"{PLAIN} − ({FAR})": (PLAIN, FAR)},
    "input-norm-speed": {f"{name} − {RAW}": (name, RAW) for name in LEVELS},
}
TARGET = 0.90
VALIDATION = 1000
_EPS, _CUT = 0.01, 5.0


class Plan(NamedTuple):
    """What a budget stands for."""

    steps: int
    looks: int  # of accuracy on validation images
    seeds: int
    rates: tuple[float, ...]
    images: int  # evaluated at most
    decides: bool  # False: fixed grid, no pilot, no verdict


RATES = (0.1, 0.3, 1.0)
PLANS = {
    "tiny": Plan(10, 3, 1, (0.3,), 500, False),
    "small": Plan(500, 14, LEAST_SEEDS, RATES, 10000, True),
    "full": Plan(1000, 20, LEAST_SEEDS, RATES, 10000, True),
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Tuning until both grids are settled; then all arms; pilot; more seeds of what decides."""
    plan = PLANS[budget]
    tuned = settle(own(rows, budget, data), GROUPS, plan)
    return _wanted(plan, tuned, seeds, {claim: _planned(tuned, claim) for claim in CLAIMS})


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: grids grow by one rate, the pilot asks for many seeds."""
    plan = PLANS[budget]
    planned = {"zero-centred": 10, "input-norm-speed": MOST_SEEDS}
    return _wanted(plan, guess(GROUPS, plan, (3.0,)), seeds, planned)


def _wanted(
    plan: Plan, tuned: Tuned, seeds: int | None, planned: Mapping[str, int | None]
) -> list[Cell]:
    best, count = tuned.best, plan.seeds if seeds is None else seeds
    wanted = wishes(GROUPS, tuned.tunings, None, least=0, seeds=seeds, pilot=False, planned=None)
    for group, rates in best.items():
        every = [Trained(group, arm, rate) for arm, rate in rates.items()]
        wanted += [Wish(1, seed, "fair", what) for seed in range(count) for what in every]
    if seeds is None and plan.decides and "input" in best:
        for claim, asked in planned.items():
            arms = dict.fromkeys(arm for pair in CONTRASTS[claim].values() for arm in pair)
            judged = [Trained("input", arm, best["input"][arm]) for arm in arms]
            wanted += [Wish(2, seed, "pilot", what) for seed in PILOT_SEEDS for what in judged]
            more = range(count, asked or 0)
            wanted += [Wish(3, seed, "fair", what) for seed in more for what in judged]
    return [_cell(plan, *wish) for wish in dict.fromkeys(wanted)]


def _cell(plan: Plan, wave: int, seed: int, part: str, what: Trained) -> Cell:
    arm: Mapping[str, Scalar] = {"part": part, **what._asdict()}
    # In seconds, about: steps, and looks at the evaluation images.
    step = 0.6e-3 if what.group == "input" else 0.65e-3
    seen = 3 * min(plan.images, 5000 if part == "tuning" else 10000)
    seen += plan.looks * VALIDATION if part == "fair" else 0
    return Cell("inputs", arm, seed, round(plan.steps * step + 4e-6 * seen, 3), wave)


def _differences(
    tuned: Tuned, part: str, pairs: Mapping[str, tuple[str, str]], group: str = "input"
) -> dict[str, dict[int, float]]:
    """Test accuracy, one arm minus another, by contrast and seed."""
    return {name: tuned.minus(part, group, *pair) for name, pair in pairs.items()}


def _planned(tuned: Tuned, claim: str) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = _differences(tuned, "pilot", CONTRASTS[claim])
    if not complete(pilot):
        return None
    deltas = dict.fromkeys(pilot, claims()[claim].thresholds["delta"])
    return asked_for(pilot, deltas, LEAST_SEEDS, MOST_SEEDS)


# -- one cell -----------------------------------------------------------------------------------


class Prepared(nn.Module):
    """(x - shift) * scale, then cut to ±``cut``, then a sigmoid: what is asked for."""

    def __init__(
        self,
        shift: Tensor | float,
        scale: Tensor | float,
        cut: float = math.inf,
        sigmoid: bool = False,
    ) -> None:
        super().__init__()
        self.shift, self.scale, self.cut, self.sigmoid = shift, scale, cut, sigmoid

    def forward(self, x: Tensor) -> Tensor:
        z = (x - self.shift) * self.scale
        if math.isfinite(self.cut):
            z = z.clamp(-self.cut, self.cut)
        return z.sigmoid() if self.sigmoid else z


def prepared(arm: str, x: Tensor) -> Prepared:
    """How an arm changes its inputs; ``x`` are the training images, in [0, 1]."""
    if arm in ("z-score", "sigmoid of z-score"):
        spread = x.std(0, unbiased=False) + _EPS
        return Prepared(x.mean(0), 1 / spread, _CUT, arm != "z-score")
    if arm == "standardized":
        return Prepared(x.mean(), 1 / x.std(unbiased=False))
    if arm == "centered":
        return Prepared(x.mean(0), 1.0)
    shift, scale = {
        PLAIN: (0.0, 1.0),
        "x + 1": (-1.0, 1.0),
        FAR: (-3.0, 1.0),
        RAW: (0.0, 255.0),
        "[-2, 2]": (0.5, 4.0),
    }[arm]
    return Prepared(shift, scale)


def largest_share(z: Tensor) -> float:
    """Largest eigenvalue of the mean of z zᵀ over its trace, by power iteration."""
    rows = z.double()
    v = rows.mean(0) + 1e-3
    value = 0.0
    for _ in range(30):
        v = v / v.norm()
        v = rows.T @ (rows @ v) / len(rows)
        value = float(v.norm())
    return value / float(rows.square().sum(1).mean())


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network on its kind of inputs."""
    part, group, name, plan = str(arm["part"]), str(arm["group"]), str(arm["arm"]), PLANS[budget]
    evaluation = "validation" if part == "tuning" else "test"
    train_x, train_y, held_x, held_y = fair_split(data, seed, evaluation)
    seen, held = pixels(train_x, data.pixel_max), pixels(held_x[: plan.images], data.pixel_max)
    change = prepared(name if group == "input" else PLAIN, seen)
    units = round(100 * float(arm.get("width") or 1.0))
    net = network(seen.shape[1], name if group == "activation" else "relu", change, seed, units)
    ends, looks = log_steps(plan.steps, 3)[-3:], log_steps(plan.steps, plan.looks)
    if part == "fair":
        _, _, look_x, look_y = fair_split(data, seed, "validation")
        look, labels = pixels(look_x[:VALIDATION], data.pixel_max), look_y[:VALIDATION]
        yield {"step": 0, "largest": largest_share(change(seen[:1000]))}
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0) * (UNITS[name] if group == "input" else 1.0),
        steps=plan.steps,
        order=stream(seed, "order"),
        stops={*ends, *(looks if part == "fair" else ())},
    )
    for step, loss in training:
        row: Row = {"step": step, "diverged": not math.isfinite(loss)}
        if part == "fair":
            row["validation"] = accuracy(net, look, labels)
        if step in ends:
            row["accuracy"] = accuracy(net, held, held_y[: plan.images])
        yield row


def network(size: int, activation: str, change: nn.Module, seed: int, units: int = 100) -> MLP:
    """The network of the MNIST study without BN, behind the change of its inputs."""
    net = MLP((size, units, units, 10), activation, False, stream(seed, "weights"))
    net.layers.insert(0, change)
    return net


# -- what it means ------------------------------------------------------------------------------


def judge(rows: list[Row]) -> list[Verdict]:
    """Both claims, fair; what is missing makes them inconclusive."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    notes = _tuning_notes(tuned) + diverged_note(tuned.runs)
    setting = tuned.setting(
        "inputs",
        "MLP 100-100 without batch normalization",
        "each kind of input at its best learning rate",
    )
    return [
        _centered_verdict(tuned, setting, notes),
        _normalized_verdict(tuned, setting, notes),
    ]


def _tuning_notes(tuned: Tuned) -> list[str]:
    """Rates as they were used, not in units."""
    real = {}
    for group, tuning in tuned.tunings.items():
        best = tuning.best
        if best is not None and group == "input":
            best = {arm: rate * UNITS[arm] for arm, rate in best.items()}
        real[group] = tuning._replace(best=best)
    return tuning_notes(real, str(tuned.rows[0]["budget"]), decides=tuned.plan.decides)


def _centered_verdict(tuned: Tuned, setting: Setting, common: Sequence[str]) -> Verdict:
    claim, notes = "zero-centred", list(common)
    (name,) = CONTRASTS[claim]
    found = _differences(tuned, "fair", CONTRASTS[claim])[name]
    others = {
        f"centered − {PLAIN}": ("centered", PLAIN),
        f"{PLAIN} − (x + 1)": (PLAIN, "x + 1"),
    }
    seen = _differences(tuned, "fair", others)
    seen |= _differences(tuned, "fair", {"hidden tanh − sigmoid": ACTIVATIONS}, "activation")
    more = [cell for other, by in seen.items() for cell in shown(other, list(by.values()))]
    shares = _shares(tuned.rows)
    if shares:
        said = ", ".join(f"{arm} {shares[arm]:.3f}" for arm in UNITS if arm in shares)
        notes.append(f"Share of the largest eigenvalue in the inputs' second moment: {said}.")
    verdict = fair_verdict(
        claim,
        setting,
        Words(
            "inputs near zero gain accuracy over the same inputs plus 3: {weakest}",
            "inputs near zero do not gain {delta} points over the same inputs plus 3: {refuted}",
            "the difference is {weakest}",
        ),
        alone(name, superiority(found.values(), claims()[claim].thresholds["delta"], LEAST_SEEDS)),
        pilot=_differences(tuned, "pilot", CONTRASTS[claim]),
        planned=_planned(tuned, claim),
        notes=notes,
    )
    return beside(verdict, more)


def _normalized_verdict(tuned: Tuned, setting: Setting, common: Sequence[str]) -> Verdict:
    claim, notes, more = "input-norm-speed", list(common), []
    delta = claims()[claim].thresholds["delta"]
    pairs = CONTRASTS[claim]
    parts = {
        name: Part(list(by_seed.values()), "superiority", delta, level=LEVELS[pairs[name][0]])
        for name, by_seed in _differences(tuned, "fair", pairs).items()
    }
    late = 0
    for arm in LEVELS:
        logs, missed = _speed(tuned, arm)
        more += shown(f"ln of the steps to 90 %, {RAW} / {arm}", list(logs.values()), "speed")
        late += missed
    if late:
        notes.append(
            f"Runs that did not reach 90 %, counted as their last step: {late}, those of "
            f"{RAW} once for each input that they are compared with."
        )
    verdict = fair_verdict(
        claim,
        setting,
        Words(
            "normalized inputs gain accuracy over raw ones, least {weakest}",
            "normalized inputs do not gain {delta} points over raw ones: {refuted}",
            "the smallest difference is {weakest}",
            "one kind of normalized inputs gains {delta} points over raw ones; the other does "
            "not: {refuted}",
        ),
        by_weakest(joint(parts, LEAST_SEEDS)),
        pilot=_differences(tuned, "pilot", pairs),
        planned=_planned(tuned, claim),
        notes=notes,
    )
    return beside(verdict, more)


def _shares(rows: Sequence[Row]) -> dict[str, float]:
    """Share of the largest eigenvalue by input, mean over seeds."""
    found: dict[str, list[float]] = {}
    for row in rows:
        value = row.get("largest")
        if row.get("group") == "input" and isinstance(value, float):
            found.setdefault(str(row["arm"]), []).append(value)
    return {arm: statistics.fmean(values) for arm, values in found.items()}


def _speed(tuned: Tuned, arm: str) -> tuple[dict[int, float], int]:
    """ln of the ratio of steps to the target, raw over an input, by seed; how many came late."""
    rates = tuned.best.get("input", {})
    looks: dict[str, dict[int, dict[int, float]]] = {RAW: {}, arm: {}}
    for row in tuned.rows:
        name, seed, step = str(row.get("arm")), row["seed"], row["step"]
        ours = name in looks and (row.get("part"), row.get("rate")) == ("fair", rates.get(name))
        share = row.get("validation")
        if ours and isinstance(share, float) and isinstance(seed, int) and isinstance(step, int):
            looks[name].setdefault(seed, {})[step] = share
    found, late = {}, 0
    for seed in sorted(looks[RAW].keys() & looks[arm].keys()):
        places = []
        for by_step in (looks[RAW][seed], looks[arm][seed]):
            steps = sorted(by_step)
            place, arrived = reached(TARGET, steps, [by_step[s] for s in steps])
            places.append(place)
            late += not arrived
        found[seed] = math.log(places[0] / places[1])
    return found, late


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """Validation accuracy over the steps for each input, and how the rates were chosen."""
    if not rows:
        return []
    tuned = settle(rows, GROUPS, PLANS[str(rows[0]["budget"])])
    looks = collect(
        [{**row, "accuracy": row["validation"]} for row in rows if "validation" in row], KEYS
    )
    panels = []
    for group, rates in tuned.best.items():
        for arm, rate in rates.items():
            if ended := looks.get(("fair", group, arm, rate)):
                title = arm if group == "input" else f"hidden {arm}"
                panels.append({"title": title, "series": [{**curve(ended, "none"), "name": arm}]})
    title = (
        f"Validation accuracy on {place(rows)} for each kind of input, without batch normalization"
    )
    inputs, what = {"input": GROUPS["input"]}, "in units of each kind of input"
    return [
        *figure("inputs", "fair", title, f"Each at its best learning rate. {BAND}", panels),
        *tuning_figure("inputs", tuned, what, inputs),
    ]
