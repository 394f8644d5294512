"""What does batch normalization do to a network that has not been trained yet?

Nine claims about gradients, ranks, noise and cost at initialization. Each has one measurement (in
`_initialization`), which draws a network or data and gives numbers; a draw is a seed. Both arms of
a pair have the same weights and the same input. Arithmetic in float64. Nothing is trained, but for
what vanishing-depth shows beside.

vanishing-depth    784-[100]*30-10 on 64 images, weights truncated normal with sqrt(2/fan-in),
                   cross-entropy: slope of log10 ||dL/dz|| per layer toward the input, z = W x.
                   Shown beside: depths 2, 5, 10, 20; weights He, Xavier and N(0, 0.1^2), the same
                   way; and 30 layers after 200 steps of stochastic gradient descent (batch of 64,
                   rate 0.1 in both arms, which for many an arm is not its best), 3 draws
mf-explosion       30 layers of 256, Gaussian input and upstream gradient: factor per layer of
                   ||dL/dh||^2, h before BN, the first 5 layers skipped, against mean-field theory
mf-orthogonal      the same with orthogonal weights, 60 layers of 64, beside Gaussian ones
rank-collapse      100 layers of 64, 128 Gaussian samples: stable rank ||X||_F^2/||X||_2^2
ortho-isometry     10 layers of 100 without BN: spread of ln s of the end-to-end Jacobian; 20 layers
                   are shown
noise-structure    statistics of batches of m Gaussian values, 2,000,000/m batches a draw
whiten-nondiff     gradient through whitening of 2 features whose eigenvalues lie close together
bjorck-divergence  10 and 20 hidden layers of 100, ReLU, 64 images: loss after one step over loss
                   before
whiten-cost        float32, batch of 256, one thread: seconds of forward and backward of BN, of
                   whitening by eigenvectors (ZCA) and by Newton's iteration (IterNorm, 5 steps) of
                   all d features together, and ZCA in groups of 16; median of 15 repeats after one
                   that does not count, the kinds taking turns. Log-log slope over d = 64, 128, 256

Every claim has cells (a batch size, an activation ...), a target for each of them and so a rule
of the registry. A target is an interval: supported if the cell's 95 % t interval over the draws
lies inside it (90 % where it has two ends, two one-sided tests), refuted if the interval lies
outside, at a level that accounts for the number of cells (Holm: the smallest of k p-values
against 0.05/k decides whether any is refuted). Or a superiority: refuted below delta. A level is
supported if all of its cells are, refuted if any is; two levels are mixed only if one is
supported and the other refuted.

Four pilot draws (900 to 903), used for nothing else, give the number of draws: at least 5 (8 for
equivalence), at most 16, so that the half-width of the 95 % interval is predicted to be at most
half of what the rule has to tell apart.

As published: claims of theory, and of an argument, are tried as they are stated, and have one
verdict for both. Where the source trained its networks or used others (vanishing-depth,
bjorck-divergence) its own setting is not tried here: the MNIST study drew its conclusion from the
gradients of a network of two hidden layers, in which nothing vanishes (that is grad-magnitude).

Two claims look at images (vanishing-depth, bjorck-divergence): on the bundled digits they are a
demonstration. `tiny` tries the wiring with small networks; it decides nothing.

Changed against the registry: vanishing-depth does not train for 1,000 steps to compare accuracies,
which deep-hard does; whiten-cost has 15 repeats a draw, not 20.
"""

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from gammabeta._runs import Row, Scalar
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._draws import PILOT_SEEDS, Question, Words, planned, values, verdict
from gammabeta.studies._experiments import Cell
from gammabeta.studies._initialization import MEASURES
from gammabeta.studies._initialization.depth import trained_gradients
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._targets import Target
from gammabeta.studies._train import stream
from gammabeta.studies._verdict import Verdict, interval

CLAIMS = tuple(MEASURES)
ON_IMAGES = ("vanishing-depth", "bjorck-divergence")
TRAINED_SEEDS = 3
LINES = ("sigmoid", "tanh", "ReLU")

# in seconds, about
_COSTS = {
    "whiten-cost": 2.6,
    "mf-explosion": 1.2,
    "bjorck-divergence": 1.1,
    "noise-structure": 0.36,
    "mf-orthogonal": 0.28,
    "vanishing-depth": 1.15,
    "rank-collapse": 0.06,
    "ortho-isometry": 0.15,
    "whiten-nondiff": 0.013,
}
_TRAINED_COST = 7.7


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """The pilot; then as many draws as it asks for."""
    wanted = []
    for claim in CLAIMS:
        if seeds is None and budget != "tiny":
            wanted += [_cell(claim, seed, 0) for seed in PILOT_SEEDS]
            count = planned(question(claim), [r for r in rows if r.get("claim") == claim]) or 0
        else:
            count = seeds or 2
        wanted += [_cell(claim, seed, 1) for seed in range(count)]
    return wanted + _trained(budget, seeds)


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: the least number of draws of every claim."""
    if seeds is not None or budget == "tiny":
        return cells(budget, data, seeds, [])
    main = [_cell(c, seed, 1) for c in CLAIMS for seed in range(question(c).least)]
    return cells(budget, data, None, []) + main


def _cell(claim: str, seed: int, wave: int) -> Cell:
    return Cell("initialization", {"claim": claim}, seed, _COSTS[claim], wave)


def _trained(budget: str, seeds: int | None) -> list[Cell]:
    count = (2 if budget == "tiny" else TRAINED_SEEDS) if seeds is None else seeds
    arm = {"claim": "vanishing-depth", "part": "trained"}
    return [Cell("initialization", arm, seed, _TRAINED_COST, 1) for seed in range(count)]


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """One draw of one claim: its numbers, a row each, and the points of its figure."""
    claim, tiny = str(arm["claim"]), budget == "tiny"
    if arm.get("part") == "trained":
        return trained_gradients(seed, data, tiny)
    return MEASURES[claim](stream(seed, claim), data, tiny)


# -- the rules ----------------------------------------------------------------------------------


def theory(activation: str, batch: int) -> float:
    """Factor per layer of the squared gradient at this batch size (Yang et al. 2019)."""
    if activation == "linear":
        return (batch - 2) / (batch - 3)
    return {8: 1.788, 16: 1.590, 64: 1.493, 256: 1.473}[batch]


def targets(claim: str) -> dict[str, Target]:
    """The cells that decide a claim, with their targets; all others are shown."""
    t = claims()[claim].thresholds
    inf = math.inf
    if claim == "vanishing-depth":
        return {
            f"{name}, with BN ({level})": Target(level, low, high, t["kept"])
            for name in LINES
            for level, low, high in (("vanishing", -t["kept"], inf), ("explosion", -inf, t["kept"]))
        }
    if claim == "mf-explosion":
        found = {}
        for activation in ("ReLU", "linear"):
            for batch in (8, 16, 64, 256):
                value = theory(activation, batch)
                width = t["tolerance"] * value
                name = f"{activation}, batch {batch}"
                found[name] = Target("", value - width, value + width, width)
        return found
    if claim == "mf-orthogonal":
        tolerance, delta = t["tolerance"], t["delta"]
        one = Target("", 1 - tolerance, 1 + tolerance, tolerance)
        more = Target("", 0, inf, delta, delta)
        return {
            f"linear, batch {batch}: {kind}": target
            for batch in (8, 16, 64)
            for kind, target in (("orthogonal", one), ("Gaussian - orthogonal", more))
        }
    if claim == "rank-collapse":
        kept = Target("", t["kept"] * 8, inf, inf, every=True)  # sqrt(64) = 8
        lost = Target("", -inf, t["collapsed"], inf, every=True)
        return {
            f"{a}, {arm}": target
            for a in ("linear", "ReLU")
            for arm, target in (("with BN", kept), ("without", lost))
        }
    if claim == "ortho-isometry":
        return {
            "linear": Target("", -inf, t["linear"], 0.1),
            "tanh": Target("", -inf, t["tanh"], 0.1),
            "ReLU": Target("", 1 - t["relu"], 1 + t["relu"], t["relu"]),
        }
    if claim == "noise-structure":
        width = t["tolerance"]
        return {
            f"{part}, m = {m}": Target("", 1 - width, 1 + width, width)
            for part in ("additive", "multiplicative")
            for m in (8, 32, 128, 512)
        }
    if claim == "whiten-nondiff":
        return {
            "PCA": Target("PCA", -inf, -t["steep"], 0.1),
            # The claim is that it is not differentiable: a flat slope refutes it.
            "ZCA": Target("ZCA", -inf, -t["flat"], 0.1),
        }
    if claim == "whiten-cost":
        return {"ZCA of all features": Target("", t["exponent"], inf, 0.2)}
    bound = t["bound"]
    names = ("step of a thousandfold loss", "best step")
    return {f"{n} layers: {name}": Target("", bound, inf, 0.5) for n in (10, 20) for name in names}


WORDS = {
    "vanishing-depth": Words(
        "gradients that vanish without BN do not vanish with it, nor do they explode",
        "gradients vanish or explode with BN",
        "decades per layer",
    ),
    "mf-explosion": Words(
        "BN multiplies the squared gradient by the factor of the theory at every layer",
        "the factor per layer is not that of the theory everywhere",
        "factor per layer",
    ),
    "mf-orthogonal": Words(
        "with orthogonal weights gradients neither explode nor vanish, with Gaussian ones they do",
        "orthogonal weights alone do not end the explosion at every batch size",
        "factor per layer",
    ),
    "rank-collapse": Words(
        "the rank collapses without BN and is kept with it",
        "the rank does not behave so everywhere",
        "stable rank",
    ),
    "ortho-isometry": Words(
        "orthogonal weights narrow the spectrum of linear and tanh networks, and not of ReLU ones",
        "orthogonal weights do not do so everywhere",
        "ratio of spreads",
    ),
    "noise-structure": Words(
        "the noise is additive and multiplicative, each as large as the theory says",
        "the noise is not as large as the theory says",
        "variance over theory",
    ),
    "whiten-nondiff": Words(
        "the gradient of whitening has no bound where eigenvalues meet",
        "the gradient of whitening stays bounded where eigenvalues meet",
        "log-log slope",
    ),
    "bjorck-divergence": Words(
        "with BN the best step and the step that ruins the loss are both larger",
        "with BN the best step and the step that ruins the loss are not both larger",
        "decades of step size",
    ),
    "whiten-cost": Words(
        "the time of whitening grows faster than the square of the number of features",
        "the time of whitening grows no faster than the square of the number of features",
        "log-log slope of the time",
        "up to 256 features, batch of 256, on one thread",
    ),
}


def question(claim: str) -> Question:
    """The rule of a claim."""
    on_images = claim in ON_IMAGES
    words = WORDS[claim]
    return Question(
        claim,
        targets(claim),
        words if words.where else words._replace(where="at initialization"),
        least=8 if claim == "ortho-isometry" else 5,
        on_images=on_images,
        published={} if on_images else None,
    )


def judge(rows: list[Row]) -> list[Verdict]:
    """A verdict for every claim that has rows."""
    by_claim: dict[str, list[Row]] = {}
    for row in rows:
        by_claim.setdefault(str(row["claim"]), []).append(row)
    return [_verdict(claim, by_claim[claim]) for claim in CLAIMS if claim in by_claim]


def _verdict(claim: str, rows: list[Row]) -> Verdict:
    asked = question(claim)
    if claim != "vanishing-depth":
        return verdict(asked, "initialization", rows)
    # Lines on which gradients do not vanish without BN have nothing to solve.
    limit, x = -claims()[claim].thresholds["vanishing"], values(rows)
    kept, notes = dict(asked.targets), []
    for name in LINES:
        without = x.get(f"{name}, without", [])
        if len(without) > 1 and interval(without).hi < limit:
            continue
        del kept[f"{name}, with BN (vanishing)"]
        slope = f"{statistics.fmean(without):+.3f} decades per layer" if without else "not measured"
        notes.append(f"Nothing to solve with {name}: without BN the slope is {slope}.")
    none = len(notes) == len(LINES)
    return verdict(
        asked._replace(targets=kept),
        "initialization",
        rows,
        notes=notes,
        undecided=["vanishing"] if none else [],
    )


# -- figures ------------------------------------------------------------------------------------

_FIGURES = {
    "vanishing": Axes("Gradient norm by layer, relative to the last", "layer", "norm", y_log=True),
    "trained": Axes(
        "Gradient norm by layer after 200 steps, relative to the last",
        "layer",
        "norm",
        y_log=True,
    ),
    "explosion": Axes(
        "Gradient norm by layer with BN, batch 64, relative to the last",
        "layer",
        "norm",
        y_log=True,
    ),
    "rank": Axes("Stable rank by layer", "layer", "stable rank", x_log=True, y_log=True),
    "one-step": Axes(
        "Loss after one step over loss before",
        "step size",
        "ratio (cut at 0.001 and 1,000,000)",
        x_log=True,
        y_log=True,
    ),
    "noise": Axes(
        "Variance of the noise of batch statistics",
        "batch size m",
        "variance",
        x_log=True,
        y_log=True,
    ),
    "cost": Axes(
        "Time of forward and backward by the number of features, batch of 256",
        "features",
        "seconds",
        x_log=True,
        y_log=True,
    ),
    "whitening": Axes(
        "Gradient through whitening where two eigenvalues meet",
        "gap between the eigenvalues",
        "gradient norm",
        x_log=True,
        y_log=True,
    ),
}


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """What is drawn of each measurement, over the draws that count."""
    drawn = [row for row in rows if row["seed"] not in PILOT_SEEDS]
    return drawings("initialization", _FIGURES, drawn)
