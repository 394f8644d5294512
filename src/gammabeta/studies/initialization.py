"""What does batch normalization do to a network that has not been trained yet?

Nine claims about gradients, Jacobians, ranks and noise at initialization. Each has one measurement
(in `_initialization`), which draws a network or data and gives numbers; a draw is a seed. Both arms
of a pair have the same weights and the same input. Arithmetic in float64. Nothing is trained.

vanishing-depth    784-[100]*30-10 on 64 images, weights truncated normal with sqrt(2/fan-in),
                   cross-entropy: slope of log10 ||dL/dz|| per layer toward the input, z = W x
jacobian-one       the MNIST study's network, 20 images: all singular values of the whole batch's
                   training-mode Jacobian of each hidden layer (input to activation), exact
mf-explosion       30 layers of 256, Gaussian input and upstream gradient: factor per layer of
                   ||dL/dh||^2, h before BN, the first 5 layers skipped, against mean-field theory
mf-orthogonal      the same with orthogonal weights, 60 layers of 64, beside Gaussian ones
rank-collapse      100 layers of 64, 128 Gaussian samples: stable rank ||X||_F^2/||X||_2^2
ortho-isometry     10 layers of 100 without BN: spread of ln s of the end-to-end Jacobian
noise-structure    statistics of batches of m Gaussian values, 2,000,000/m batches a draw
whiten-nondiff     gradient through whitening of 2 features whose eigenvalues lie close together
bjorck-divergence  10 hidden layers of 100, ReLU, 64 images: loss after one step over loss before

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
jacobian-one, bjorck-divergence) its own setting is not tried here.

Three claims look at images (vanishing-depth, jacobian-one, bjorck-divergence): on the bundled
digits they are a demonstration. `tiny` tries the wiring with small networks; it decides nothing.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import PLACES, span
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._initialization import MEASURES
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._targets import Found, Target, decide, overall
from gammabeta.studies._train import stream
from gammabeta.studies._verdict import Interval, Verdict, half_width, interval, planned_n

CLAIMS = tuple(MEASURES)
PILOT_SEEDS = (900, 901, 902, 903)
MOST_SEEDS = 16
ON_IMAGES = ("vanishing-depth", "jacobian-one", "bjorck-divergence")

# in seconds, about
_COSTS = {
    "jacobian-one": 2.1,
    "mf-explosion": 0.8,
    "bjorck-divergence": 0.3,
    "noise-structure": 0.3,
    "mf-orthogonal": 0.23,
    "vanishing-depth": 0.16,
    "rank-collapse": 0.06,
    "ortho-isometry": 0.04,
    "whiten-nondiff": 0.013,
}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """The pilot; then as many draws as it asks for."""
    wanted = []
    for claim in CLAIMS:
        if seeds is None and budget != "tiny":
            wanted += [_cell(claim, seed, 0) for seed in PILOT_SEEDS]
            pilot = _values([r for r in rows if r.get("claim") == claim], pilot=True)
            planned = _planned(claim, pilot)
            wanted += [_cell(claim, seed, 1) for seed in range(planned or 0)]
        else:
            wanted += [_cell(claim, seed, 1) for seed in range(seeds or 2)]
    return wanted


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: the least number of draws of every claim."""
    if seeds is not None or budget == "tiny":
        return cells(budget, data, seeds, [])
    main = [_cell(claim, seed, 1) for claim in CLAIMS for seed in range(_least(claim))]
    return cells(budget, data, None, []) + main


def _cell(claim: str, seed: int, wave: int) -> Cell:
    return Cell("initialization", {"claim": claim}, seed, _COSTS[claim], wave)


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """One draw of one claim: its numbers, a row each, and the points of its figure."""
    claim = str(arm["claim"])
    return MEASURES[claim](stream(seed, claim), data, budget == "tiny")


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
            f"{name}, with BN, {level}": Target(level, low, high, t["kept"])
            for name in ("sigmoid", "tanh", "ReLU")
            for level, low, high in (("vanishing", -t["kept"], inf), ("explosion", -inf, t["kept"]))
        }
    if claim == "jacobian-one":
        layers = [f"layer {n}, {a}" for n in (1, 2) for a in ("ReLU", "sigmoid")]
        return {name: Target("", 0, inf, t["delta"], t["delta"]) for name in layers}
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
    bound = t["bound"]
    names = ("step of a thousandfold loss", "best step")
    return {name: Target("", bound, inf, 0.5) for name in names}


def _least(claim: str) -> int:
    return 8 if claim in ("ortho-isometry",) else 5


def _planned(claim: str, pilot: Mapping[str, Sequence[float]]) -> int | None:
    """Draws that the pilot asks for, None before it is complete."""
    needed = [_least(claim)]
    for name, target in targets(claim).items():
        values = pilot.get(_measured(name), [])
        if len(values) < len(PILOT_SEEDS):
            return None
        if math.isfinite(target.precision):
            needed.append(planned_n(values, target.precision, _least(claim), MOST_SEEDS))
    return max(needed)


def _measured(name: str) -> str:
    """The number that a cell is about; two levels may ask about one number."""
    return name.removesuffix(", vanishing").removesuffix(", explosion")


# -- what it means ------------------------------------------------------------------------------


class Words(NamedTuple):
    """The answer as the second half of a sentence, by status; and the unit of its numbers."""

    supported: str
    refuted: str
    unit: str


WORDS = {
    "vanishing-depth": Words(
        "gradients that vanish without BN do not vanish with it, nor do they explode",
        "gradients vanish or explode with BN",
        "decades per layer",
    ),
    "jacobian-one": Words(
        "more singular values lie in [0.5, 2] with BN, in both layers and with both activations",
        "BN does not move the singular values to one in every layer",
        "share of the singular values",
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
}


def judge(rows: list[Row]) -> list[Verdict]:
    """A verdict for every claim that has rows."""
    by_claim: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_claim[str(row["claim"])].append(row)
    return [_verdict(claim, by_claim[claim]) for claim in CLAIMS if claim in by_claim]


def _values(rows: Sequence[Row], *, pilot: bool) -> dict[str, list[float]]:
    """Numbers by cell, in the order of the seeds; a draw that was made twice counts once."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        seed = row["seed"]
        if row.get("kind") == "value" and isinstance(seed, int) and (seed in PILOT_SEEDS) == pilot:
            found[str(row["cell"])][seed] = _real(row["value"])
    return {cell: [by_seed[s] for s in sorted(by_seed)] for cell, by_seed in found.items()}


def _verdict(claim: str, rows: list[Row]) -> Verdict:
    budget, data = str(rows[0]["budget"]), str(rows[0]["data"])
    values, pilot = _values(rows, pilot=False), _values(rows, pilot=True)
    wanted = targets(claim)
    notes: list[str] = []
    if claim == "vanishing-depth":
        wanted = _lines(wanted, values, notes)
    found = []
    for name, target in wanted.items():
        x = values.get(_measured(name), [])
        status, reason = decide(target, x, len(wanted))
        found.append(Found(name, target, x, interval(x) if len(x) > 1 else None, status, reason))
    status = overall(found)
    if claim in ON_IMAGES and data == "digits":
        status = "demo"
    elif budget == "tiny":
        status = "inconclusive"
        notes.append("The budget tiny tries the wiring; it decides nothing.")
    weakest = min(found, key=lambda f: f.margin, default=None)
    effect = weakest.interval if weakest else None
    planned = _planned(claim, pilot)
    predicted = None
    if planned is not None and weakest is not None:
        predicted = half_width(interval(pilot[_measured(weakest.name)]).sd, planned)
        if len(weakest.values) < planned:
            notes.append(f"The pilot asked for {planned} draws; {len(weakest.values)} were made.")
    if claim in ON_IMAGES:
        notes.append("The source trained its networks; its own setting was not tried here.")
    else:
        notes.append("Does not depend on the data.")
    decided = {_measured(f.name) for f in found}
    shown = {name: x for name, x in values.items() if name not in decided and len(x) > 1}
    return Verdict(
        claim=claim,
        experiment="initialization",
        status=status,
        published_status=None if claim in ON_IMAGES else status,
        effect=effect.mean if effect else None,
        ci=(effect.lo, effect.hi) if effect else None,
        n=min((len(f.values) for f in found), default=0),
        unit=WORDS[claim].unit,
        reported=claims()[claim].reported,
        budget=budget,
        data=data,
        delta=claims()[claim].thresholds.get("delta"),
        half_width=effect.half_width if effect else None,
        planned_half_width=predicted,
        sentence=_sentence(claim, status, data, found, weakest),
        cells=[
            *(_cell_of(f.name, _part(f), f.interval, f.status, f.reason) for f in found),
            *(_cell_of(n, "shown", interval(x), "inconclusive", "shown") for n, x in shown.items()),
        ]
        if status != "demo"
        else [
            _cell_of(n, "shown", interval(x), "demo", "") for n, x in values.items() if len(x) > 1
        ],
        notes=notes,
    )


def _lines(
    wanted: Mapping[str, Target], values: Mapping[str, Sequence[float]], notes: list[str]
) -> dict[str, Target]:
    """Without the lines on which gradients do not vanish without BN: nothing to solve there."""
    limit = -claims()["vanishing-depth"].thresholds["vanishing"]
    kept = dict(wanted)
    for name in ("sigmoid", "tanh", "ReLU"):
        x = values.get(f"{name}, without", [])
        if len(x) > 1 and interval(x).hi < limit:
            continue
        kept.pop(f"{name}, with BN, vanishing")
        slope = f"{statistics.fmean(x):+.3f} decades per layer" if x else "not measured"
        notes.append(f"Nothing to solve with {name}: without BN the slope is {slope}.")
    return kept


def _sentence(
    claim: str, status: str, data: str, found: Sequence[Found], weakest: Found | None
) -> str:
    if weakest is None or weakest.interval is None:
        return "Undecided: there is nothing to compare yet."
    words = WORDS[claim]
    place = f" on {PLACES.get(data, data)}" if claim in ON_IMAGES else ""
    measured = f"the cell nearest to its limit is {weakest.name} ({span(weakest.interval)})"
    against = [f for f in found if f.status == "refuted" and f.interval]
    listed = "; ".join(f"{f.name} {span(f.interval)}" for f in against[:4] if f.interval)
    more = f"; and {len(against) - 4} more" if len(against) > 4 else ""
    if status == "supported":
        return f"Yes: at initialization{place}, {words.supported}; {measured}."
    if status == "refuted":
        return f"No: at initialization{place}, {words.refuted}: {listed}{more}."
    if status == "mixed":
        levels = sorted({f.target.level for f in found if f.status == "refuted"})
        return f"In part: at initialization{place}, not for {', '.join(levels)}: {listed}{more}."
    opening = "A demonstration, no verdict" if status == "demo" else "Undecided"
    return f"{opening}: at initialization{place}, {measured}."


def _part(f: Found) -> str:
    return f"level: {f.target.level}" if f.target.level else "fair"


def _cell_of(name: str, part: str, i: Interval | None, status: str, reason: str) -> dict[str, Any]:
    return {
        "name": _measured(name),
        "part": part,
        "effect": i.mean if i else None,
        "lo": i.lo if i else None,
        "hi": i.hi if i else None,
        "p_signflip": None,
        "n": i.n if i else 0,
        "status": status,
        "reason": reason,
    }


def _real(value: Scalar) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a measured value must be a number, got {value!r}. Repeat that cell.")
    return float(value)


# -- figures ------------------------------------------------------------------------------------

_FIGURES = {
    "vanishing": Axes("Gradient norm by layer, relative to the last", "layer", "norm", y_log=True),
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
    "jacobian": Axes(
        "Singular values of the layer Jacobians, sorted",
        "share of the values (%)",
        "singular value",
    ),
    "noise": Axes(
        "Variance of the noise of batch statistics",
        "batch size m",
        "variance",
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
