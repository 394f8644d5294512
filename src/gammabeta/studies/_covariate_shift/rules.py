"""The rules of the claims whose numbers are draws (in words in claims.toml)."""

import math

from gammabeta.studies._claims import claims
from gammabeta.studies._covariate_shift.contrasts import CONTROL, PUBLISHED_RATES
from gammabeta.studies._draws import LEAST_SEEDS, Question, Words
from gammabeta.studies._targets import Target

# seeds at least, by group of runs
LEAST = {"deep": 8, "linear": LEAST_SEEDS, "inputs": LEAST_SEEDS}
_DEEP = "five hidden layers, "
WORDS = {
    "ics-reduced": Words(
        "there is less shift with batch normalization, of distributions and of gradients, at equal "
        "steps and for the loss that is gained",
        "batch normalization does not reduce the shift by what matters",
        "log ratio of the shifts, none over BN",
        _DEEP + "each network at its best learning rate,",
    ),
    "cross-layer-stats": Words(
        "the step of one layer's weights moves the statistics of later layers half as much or less "
        "with batch normalization, their correlations too",
        "batch normalization does not halve what one layer's step does to later layers",
        "log ratio of the changes, none over BN",
        _DEEP + "steps of equal relative length,",
    ),
    "noisy-bn": Words(
        "batch normalization with noise behind it, and more drift, is still better than none",
        "batch normalization with noise behind it is not better than none, or does not drift more",
        "points of accuracy",
        _DEEP + "each network at its best learning rate,",
    ),
    "ics-gradient": Words(
        "gradients turn more with batch normalization when the layers below make their step",
        "gradients do not turn more with batch normalization when the layers below move",
        "1 − cos, BN − none",
        "steps of equal relative length,",
    ),
    "gamma-beta-shift": Words(
        "the outputs of the normalizations drift, by more than a fifth of what they do without",
        "the outputs of the normalizations drift by less than a twentieth of what they do without",
        "ratio of drifts, BN over none",
        _DEEP + "each network at its best learning rate,",
    ),
    "not-reduce-shift": Words(
        "there is more shift with batch normalization, of distributions and of gradients",
        "there is not more shift with batch normalization",
        "1 − cos, or log ratio of drifts",
        _DEEP + "each network at its best learning rate,",
    ),
    "constant-dist": Words(
        "changing inputs cost accuracy, from one mini-batch to the next and slowly",
        "changing inputs do not cost accuracy that matters",
        "points of accuracy",
        "MLP 100-100 without batch normalization, each arm at its best learning rate,",
    ),
}


def question(claim: str) -> Question:
    """The rule of a claim whose numbers are draws."""
    t = claims()[claim].thresholds

    def more(level: str, precision: float | None = None) -> Target:
        return Target(level, 0, math.inf, precision or t["delta"], t["delta"])

    control: dict[str, Target] = {}
    published: dict[str, Target] | None = {}
    if claim == "ics-reduced":
        levels = [f"{level}, {per}" for level in ("(a) distribution", "(b) gradient")
                  for per in ("equal steps", "per decrease of the loss")]  # fmt: skip
        targets = {level: more(level) for level in levels}
    elif claim == "cross-layer-stats":
        targets = {name: more(name) for name in ("mean and spread", "correlations")}
    elif claim == "noisy-bn":
        targets = {
            "accuracy, noisy BN − none": more(""),
            "log drift, noisy BN / none": Target("", 0, math.inf, math.inf),
        }
    elif claim == "ics-gradient":
        targets = {name: more(name) for name in ("deep network", "linear network")}
        names = ["linear network, own steps"]
        names += [f"rate {rate:g}: deep network, own steps" for rate in PUBLISHED_RATES]
        published = {name: more(name.removesuffix(", own steps")) for name in names}
    elif claim == "gamma-beta-shift":
        name = "drift of the layers' outputs, BN / none"
        targets = {name: Target("", t["kept"], math.inf, 0.1)}
    elif claim == "not-reduce-shift":
        ratio = Target("distribution", 0, math.inf, t["ratio"], t["ratio"])
        targets = {"gradient": more("gradient"), "distribution": ratio}
    else:
        targets = {
            "clean − changing at random": more("mini-batches"),
            "constant − changing slowly": more("over training"),
        }
    if "control" in t:
        control = {CONTROL: Target("", 0, math.inf, t["control"], t["control"])}
    least = LEAST["deep"] if claim == "cross-layer-stats" else LEAST_SEEDS
    return Question(claim, targets, WORDS[claim], least, True, published, control, True)
