"""Which of the exact claims about batch normalization are right, and which only nearly?

Algebra decides these claims: equations of the forward and the backward pass, what a bias or a scale
before BN does, what happens at inference. Each has one function (in `_identities`) that computes
both sides in float64 from random numbers and gives the largest difference. Where a claim is about
what BN does, one side is a layer, PyTorch's and this package's, the latter once for each backend
that can run; the other side is the equation, written down again. eps = 0, which no layer takes in
training, is tried with the function `gammabeta.batch_norm`.

Comparisons are of three kinds
    As rightly stated: the statement with all that it needs (the absolute value, eps, the mode).
    As worded: what the source wrote, where that is something else. It gives the verdict "as
    published"; where nothing is listed, the wording is right and has the verdict of the statement.
    Other wordings, of the same texts or of readers, that are wrong: counterexamples, which decide
    nothing.

Exact: every difference, relative to the largest value compared, is at most 100 eps times K. eps is
float64's, 2.2e-16; K is the condition number of the computation, said in each claim's rule (mostly
1 + the largest |x|/sigma, since the subtraction of the mean cancels); 100, because two ways of
computing are compared and each adds up to some hundred terms.
Fails: a difference, the counterexample, exceeds that a thousandfold. In between: inconclusive.
A wording of two declared halves of which one is exact and the other fails is mixed.

Where the right statement contradicts the wording (range-example, standardise-weights, sgd-form,
inference-formula), both verdicts are those of the wording, or a reader would take "exact" for
"yes". The right statement stands beside it.

The images are not looked at: verdicts hold for any data, the bundled digits included. Each seed is
another draw. Budgets differ in their number only: `tiny` one, `small` three, `full` ten.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import listed
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._identities import CHECKS
from gammabeta.studies._identities._compare import RIGHT, TRAP, WORDED
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._train import stream
from gammabeta.studies._verdict import Verdict

CLAIMS = tuple(CHECKS)
SEEDS = {"tiny": 1, "small": 3, "full": 10}
_NAMES = re.compile(r"(?:gammabeta|torch)\.[A-Za-z0-9_.]+")
AS_WORDED = ("range-example", "standardise-weights", "sgd-form", "inference-formula")

# in hundredths of a second
_COSTS = {
    "exp-lr": 208.0,
    "detach-explodes": 99.0,
    "scale-invariance": 4.0,
    "whiten-singular": 4.0,
    "chain-expansion": 3.0,
}
_PARTS = {
    RIGHT: "as rightly stated",
    WORDED: "as worded",
    TRAP: "other wordings, wrong",
}


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """Every claim with every seed; nothing depends on earlier rows."""
    count = SEEDS[budget] if seeds is None else seeds
    return [
        Cell("identities", {"claim": claim}, seed, _COSTS.get(claim, 0.8))
        for seed in range(count)
        for claim in CLAIMS
    ]


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """The comparisons of one claim, a row each; the images are not looked at."""
    claim = str(arm["claim"])
    return CHECKS[claim](stream(seed, claim))


# -- what it means ------------------------------------------------------------------------------


class Words(NamedTuple):
    """What is right, and what is wrong about the wording; "" where nothing is."""

    right: str
    wrong: str = ""


WORDS = {
    "bn-forward": Words("the four equations are what the layers compute, with the biased variance"),
    "affine-fix": Words(
        "whatever gamma and beta have learned, what is left of a layer's values is fixed"
    ),
    "bn-output-moments": Words(
        "the mean is beta and the standard deviation |gamma| sigma / sqrt(sigma^2 + eps)",
        "the standard deviation is not gamma where gamma is negative or eps counts",
    ),
    "identity-recover": Words(
        "gamma = sqrt(Var + eps) and beta = the mean give the same batch back"
    ),
    "xhat-inverse": Words(
        "(y - beta)/gamma is xhat as long as gamma is not 0",
        "at gamma = 0 different inputs have one output, and nothing can be read back",
    ),
    "range-example": Words(
        "uniform values lie within sqrt(3) = 1.73 standard deviations",
        "they do not reach 2",
    ),
    "samuelson": Words("the bound is kept and reached in training, and absent at inference"),
    "dense-vs-conv": Words(
        "one normalization per channel: of a dense layer per unit, of a convolution per map",
        "right for convolutions; in a dense layer it is one per unit, not one for all",
    ),
    "standardise-weights": Words(
        "BN standardizes a node's values; its weights and bias stay as they are",
        "the weights of a node do not get mean 0 and standard deviation 1",
    ),
    "single-sample": Words(
        "one value per channel gives beta whatever it is, and the layers refuse it; an image keeps "
        "its positions"
    ),
    "bessel": Words(
        "m/(m - 1) turns the mean batch variance into the population's, for the running variance",
        "a batch that is normalized by its own statistics is divided by m, at test time too",
    ),
    "inference-formula": Words(
        "it is (x - E)/sqrt(Var + eps)",
        "(x - E)/Var has the standard deviation 1/sigma",
    ),
    "test-fixed": Words("in evaluation mode a sample's output does not depend on its batch"),
    "new-stats-each-batch": Words(
        "in training a sample's output depends on its batch, in evaluation it does not"
    ),
    "fold": Words("BN folds into the linear map before it, dense or convolution"),
    "brn-exact": Words(
        "unclipped, it equals inference in its output and training in its gradient's projection"
    ),
    "whiten-singular": Words(
        "the rank is min(d, m - 1), while every feature keeps a variance of its own"
    ),
    "sgd-form": Words("the sign is minus", "with plus the loss rises"),
    "gamma-grad": Words("the sum runs over the batch and, in a convolution, over positions"),
    "beta-grad": Words("the sum runs over the batch and, in a convolution, over positions"),
    "backward": Words("all six equations are right; the sum of x - mean in one of them is 0"),
    "linear-grad": Words("the gradient of a weight is the upstream gradient times its input"),
    "f-jac2": Words(
        "the gradient of a batch sum is no layer Jacobian; for a linear activation it is 0"
    ),
    "grad-identity": Words("equality, with the factor 1/m (and a small term more for eps)"),
    "bias-removed": Words(
        "in training the bias before BN changes nothing and has no gradient",
        "in the note's own placement, sigma(W BN(x) + b), the bias stays",
    ),
    "weight-pythagoras": Words(
        "orthogonal at eps = 0, so that the squared step adds up; eps leaves a known remainder"
    ),
    "scale-invariance": Words(
        "exactly at eps = 0; with eps, a scale a acts as eps / a^2 would"
    ),
    "detach-explodes": Words(
        "the bias moves by the same amount at every step, for ever, and the loss stays"
    ),
    "exp-lr": Words(
        "the rate lr (1 - lr wd)^(-2t - 1) at step t gives the same functions (eps growing alike)"
    ),
    "chain-expansion": Words(
        "the change is the sum over all subsets of layers, of which a gradient sees the single ones"
    ),
}  # fmt: skip


class Finding(NamedTuple):
    """The worst of all comparisons that say the same."""

    level: str
    half: str
    statement: str
    subject: str
    error: float
    tolerance: float
    found: float
    wanted: float
    n: int
    status: str


def judge(rows: list[Row]) -> list[Verdict]:
    """A verdict for every claim that has rows."""
    by_claim: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("kind") == "check":
            by_claim[str(row["claim"])].append(row)
    return [_verdict(claim, by_claim[claim]) for claim in CLAIMS if claim in by_claim]


def _verdict(claim: str, rows: list[Row]) -> Verdict:
    known = claims()[claim]
    found = _findings(rows, known.thresholds["roundings"], known.thresholds["counterexample"])
    right = [f for f in found if f.level == RIGHT]
    worded = [f for f in found if f.level == WORDED]
    stated = _joined(right)
    published = _halves(worded) if worded else stated
    status = published if claim in AS_WORDED else stated
    shown = _counterexample(worded) if claim in AS_WORDED else None
    shown = shown or _worst(right)
    subjects = sorted({name for row in rows for name in _NAMES.findall(str(row["compared"]))})
    notes = [
        "Does not depend on the data. Tolerances are 100 eps times the condition number."
        if known.thresholds["roundings"] == 100
        else f"Tolerances are {known.thresholds['roundings']:g} eps times the condition number.",
        f"{len(rows)} comparisons, with {listed(subjects)}.",
    ]
    for f in found:
        if f.level == TRAP:
            verb = {"fails": "is wrong", "exact": "holds"}.get(f.status, "is not decided")
            notes.append(f"{f.statement} {verb}: {_numbers(f)}.")
    return Verdict(
        claim=claim,
        experiment="identities",
        status=status,
        published_status=published,
        effect=shown.error if shown else None,
        ci=None,
        n=len({row["seed"] for row in rows}),
        unit="relative error",
        reported=known.reported,
        budget=str(rows[0]["budget"]),
        data=str(rows[0]["data"]),
        delta=None,
        half_width=None,
        planned_half_width=None,
        sentence=_sentence(claim, stated, published, right, worded),
        cells=[_cell(f) for f in found],
        notes=notes,
    )


def _findings(rows: Sequence[Row], roundings: float, counterexample: float) -> list[Finding]:
    """Comparisons that say the same of several layers and draws become one: the worst."""
    groups: dict[tuple[str, str, str], list[Finding]] = defaultdict(list)
    for row in rows:
        level, half = str(row["level"]), str(row["half"])
        subject, _, statement = str(row["compared"]).partition(": ")
        error, rounding, found, wanted = (
            _real(row[key]) for key in ("error", "rounding", "found", "wanted")
        )
        tolerance = roundings * rounding
        status = "inconclusive"
        if error <= tolerance:
            status = "exact"
        elif error > counterexample * tolerance:
            status = "fails"
        finding = Finding(
            level, half, statement, subject, error, tolerance, found, wanted, 1, status
        )
        groups[level, half, statement].append(finding)
    order = list(_PARTS)
    merged = [_merge(group) for group in groups.values()]
    return sorted(merged, key=lambda f: order.index(f.level))


def _merge(group: list[Finding]) -> Finding:
    """The worst of its kind; a wording fails by its largest counterexample."""
    return max(group, key=_excess)._replace(n=len(group))


def _excess(f: Finding) -> float:
    return f.error / f.tolerance


def _worst(found: Sequence[Finding]) -> Finding | None:
    return max(found, key=_excess, default=None)


def _counterexample(worded: Sequence[Finding]) -> Finding | None:
    """The one that is furthest off."""
    return max((f for f in worded if f.status == "fails"), key=lambda f: f.error, default=None)


def _joined(found: Sequence[Finding]) -> str:
    """Exact only if all are; one that fails is enough."""
    has = {f.status for f in found}
    if "fails" in has:
        return "fails"
    return "exact" if has == {"exact"} else "inconclusive"


def _halves(worded: Sequence[Finding]) -> str:
    """The status of a wording, mixed where one declared half is exact and the other fails."""
    by_half: dict[str, list[Finding]] = defaultdict(list)
    for f in worded:
        by_half[f.half].append(f)
    has = {_joined(group) for group in by_half.values()}
    return "mixed" if has == {"exact", "fails"} else _joined(worded)


def _sentence(
    claim: str, stated: str, published: str, right: Sequence[Finding], worded: Sequence[Finding]
) -> str:
    words = WORDS[claim]
    worst = _worst(right)
    if worst is None:
        return "Undecided: there is nothing to compare yet."
    largest = f"largest error {worst.error:.1e} where {worst.tolerance:.1e} is allowed"
    if stated != "exact":
        opening = "It fails" if stated == "fails" else "Undecided"
        place = f"{worst.subject}: {worst.statement}"
        return f"{opening}: not {words.right}: {place}, {_numbers(worst)}; {largest}."
    counter = _counterexample(worded)
    if counter is None:
        return f"Exact: {words.right}; {largest}."
    opening = "Half right as worded" if published == "mixed" else "Wrong as worded"
    right_is = f"Right is: {words.right} ({largest})."
    example = f"{counter.subject}: {counter.statement}, {_numbers(counter)}"
    return f"{opening}: {words.wrong}; {example}. {right_is}"


def _numbers(f: Finding) -> str:
    return f"{f.found:.4g} against {f.wanted:.4g}"


def _cell(f: Finding) -> dict[str, Any]:
    return {
        "name": f.statement,
        "part": f"{_PARTS[f.level]}, {f.half}" if f.half else _PARTS[f.level],
        "effect": f.error,
        "lo": None,
        "hi": None,
        "p_signflip": None,
        "n": f.n,
        "status": f.status,
        "reason": f"{f.subject}: {_numbers(f)}",
        "tolerance": f.tolerance,
        "compared": f.subject,
        "found": f.found,
        "wanted": f.wanted,
    }


def _real(value: Scalar) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"errors must be numbers, got {value!r}. Repeat that cell.")
    return float(value)


# -- figures ------------------------------------------------------------------------------------

_FIGURES = {
    "output-std": Axes(
        "Standard deviation of the output at gamma = 1",
        "variance / eps",
        "standard deviation",
        x_log=True,
        caption="It is sigma / sqrt(sigma^2 + eps): at a variance of eps it is 0.707.",
    ),
    "samuelson": Axes(
        "Largest normalized value of heavy-tailed data, and its bound",
        "batch size m",
        "largest |xhat|",
        x_log=True,
        y_log=True,
        caption="In training no value exceeds sqrt(m - 1), whatever the data.",
    ),
    "scale": Axes(
        "How far the output moves when the weights before BN are scaled",
        "scale a of the weights",
        "largest change of xhat",
        x_log=True,
        y_log=True,
        caption="Not at all at eps = 0; by all of it once a^2 times the variance comes near eps.",
    ),
    "detach": Axes(
        "Way of the bias before BN under gradient descent",
        "step",
        "mean distance from its start",
        caption="With detached statistics it moves for ever while the loss stays.",
    ),
    "chain": Axes(
        "Shares of the orders in the change of y = x w1 w2 w3 w4",
        "length of the step relative to the weights",
        "share of the change",
        x_log=True,
        caption="A gradient sees the first order alone; the others are between layers.",
    ),
}


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """What moves with something: an eps, a batch size, a step."""
    return drawings("identities", _FIGURES, rows)
