"""Are the panels of the MNIST study's Jacobian figure indices of singular values, not steps?

Fig. 3 of Chang et al. 2017 (repository twcmchang/MLDS_final_2017) shows singular values of the
first layer's Jacobian, with batch normalization and without, in panels named "Step 0100", "0300",
"0700" and "0900": about 1.85, 1.33, 0.55, 0.2 with it and 1.43, 1.23, 0, 0 without. They look like
the 10th, 30th, 70th and 90th sorted singular value at any step (f-jac).

To the letter: pixels-100-100-10 with ReLU, batch normalization before each activation, no bias
where it follows, bias 0.1 elsewhere, weights from a truncated normal distribution with standard
deviation sqrt(2 / fan-in); the loss summed over batches of 64, SGD, all 55,000 training images, eps
1e-3, decay 0.999, 1,000 steps, at both learning rates of f-lr (0.01 and 0.0001) as two levels.
The Jacobian of a sample is the source's: the gradient of the sum over the batch of each unit of the
first layer's activation with respect to that sample's pixels, 100 x 784; of the same 64 training
images at all steps.

Two readings of a panel, each compared with all eight published numbers (RMS distance) in the most
favorable of three ways:
    index   mean over the samples of the 10th, 30th, 70th and 90th largest singular value: at the
            start, after the last step, or averaged over the steps that are measured
    step    all singular values after 100, 300, 700 and 900 steps: their mean, their median, or the
            mean over the samples of the largest
Primary contrast: log of the step's distance over the index's, for each seed; supported if it lies
above log 2 (the index's distance is below half of the step's), refuted if below; at both rates.
This claim has a published setting only. A sample's own block of the Jacobian (without the other
samples' terms, which only the sum over the batch brings in) is shown.

Seeds 900 to 903 are a pilot, used for nothing else: it gives the number of seeds, 5 to 16, so that
the predicted half-width of the 95 % interval is at most log 2 / 2. `small` and `full` are the same
(1,000 steps); `tiny` takes 10 steps and decides nothing. Changed against the source: start and
order vary with the seed, one batch is looked at in place of each step's own. On the digits, a
demonstration.

Rows: arm fields norm, rate, pilot; `step`, `kind` ("sum", "own"), `sv_10`, `sv_30`, `sv_70`,
`sv_90`, `mean`, `median`, `largest`; and points of the figure (kind "curve").
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gammabeta._runs import Row, Scalar
from gammabeta.studies._answer import Setting, Words, answer, points
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._experiments import Cell
from gammabeta.studies._joint import Part, joint
from gammabeta.studies._nets import MLP, m2
from gammabeta.studies._points import Axes, drawings
from gammabeta.studies._train import pixels, published_split, stream, train
from gammabeta.studies._verdict import Verdict, planned_n

CLAIMS = ("f-jac",)

PILOT_SEEDS = (900, 901, 902, 903)
LEAST_SEEDS, MOST_SEEDS = 5, 16
RATES = (0.01, 0.0001)
NORMS = {"bn": "with BN", "none": "without"}
PANELS = (10, 30, 70, 90)  # as indices; as steps ten times that
STEPS = (0, 100, 300, 500, 700, 900, 1000)
PUBLISHED = {"bn": (1.85, 1.33, 0.55, 0.2), "none": (1.43, 1.23, 0.0, 0.0)}


# -- what is to be run --------------------------------------------------------------------------


def cells(budget: str, data: str, seeds: int | None, rows: list[Row]) -> list[Cell]:
    """The pilot; then as many seeds as it asks for."""
    if seeds is not None or budget == "tiny":
        return _of_seeds(budget, range(seeds or 1), False, 1)
    own = [r for r in rows if (r["budget"], r["data"]) == (budget, data)]
    pilot = _of_seeds(budget, PILOT_SEEDS, True, 0)
    return pilot + _of_seeds(budget, range(_planned(own) or 0), False, 1)


def expected(budget: str, data: str, seeds: int | None) -> list[Cell]:
    """About what a whole run asks for: the pilot asks for no more than the least."""
    wanted = cells(budget, data, seeds, [])
    if seeds is None and budget != "tiny":
        wanted += _of_seeds(budget, range(LEAST_SEEDS), False, 1)
    return wanted


def _of_seeds(budget: str, seeds: Sequence[int], pilot: bool, wave: int) -> list[Cell]:
    cost = {"bn": 1.1, "none": 0.85}  # seconds, about
    return [
        Cell(
            "singular-values",
            {"norm": norm, "rate": rate, "pilot": pilot},
            seed,
            cost[norm] / (8 if budget == "tiny" else 1),
            wave,
        )
        for seed in seeds
        for rate in RATES
        for norm in NORMS
    ]


# -- one cell -----------------------------------------------------------------------------------


def measure(arm: Mapping[str, Scalar], seed: int, budget: str, data: Images) -> Iterator[Row]:
    """Train one network; the first layer's singular values at the start and after some steps."""
    norm = arm["norm"] == "bn"
    x, y, _, _ = published_split(data, seed)
    at = (0, 10) if budget == "tiny" else STEPS
    start = stream(seed, "weights")
    net = m2(x.flatten(1).shape[1], "relu", norm, start, eps=1e-3, momentum=0.001)
    drawn = torch.randperm(len(x), generator=stream(seed, "jacobian"))[:64]
    seen = pixels(x[drawn], data.pixel_max)
    yield from _spectra(net, seen, 0, at[-1], NORMS[str(arm["norm"])])
    training = train(
        net,
        x,
        y,
        pixel_max=data.pixel_max,
        rate=float(arm["rate"] or 0.0),
        steps=at[-1],
        order=stream(seed, "order"),
        stops=at[1:],
        loss="sum",
    )
    for step, _ in training:
        yield from _spectra(net, seen, step, at[-1], NORMS[str(arm["norm"])])


def _spectra(net: MLP, x: Tensor, step: int, last: int, name: str) -> Iterator[Row]:
    for kind, factors in zip(("sum", "own"), slopes(net, x), strict=True):
        weight = net.layers[0].weight
        if not isinstance(weight, Tensor):
            raise TypeError("a linear first layer was expected. Build the network by m2.")
        values = singular_values(weight.detach().double(), factors)
        if not bool(values.isfinite().all()):
            continue
        row: Row = {"step": step, "kind": kind, "mean": _short(values.mean())}
        row["median"], row["largest"] = _short(values.median()), _short(values[:, 0].mean())
        row |= {f"sv_{k}": _short(values[:, k - 1].mean()) for k in PANELS}
        yield row
        if kind == "sum" and step in (0, last):
            when = "at the start" if step == 0 else "at the end"
            for k, value in enumerate(values.mean(0), 1):
                head = {"kind": "curve", "curve": when, "series": name}
                yield {**head, "x": float(k), "y": _short(value)}


def _short(value: Tensor) -> float:
    """Seven digits: what the float32 weights carry."""
    return float(f"{value.item():.7g}")


def slopes(net: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Factors c (samples, units), float64, with which a sample's Jacobian is diag(c) W.

    The first gives the gradient of the sum over the batch, with f' the activation's derivative:
    c = gamma/sigma (f' - mean f' - xhat mean(f' xhat)) by batch normalization, f' without; the
    second the sample's own block, gamma/sigma f' (1 - 1/m - xhat^2/m), and f'.
    """
    with torch.no_grad():
        z = net.layers[0](x).double()
        layer = net.layers[1]
        if isinstance(layer, nn.ReLU):
            plain = (z > 0).double()
            return plain, plain
        gamma, beta = layer.weight.double(), layer.bias.double()
        sigma = (z.var(0, unbiased=False) + layer.eps).sqrt()
        xhat = (z - z.mean(0)) / sigma
        slope, m = (gamma * xhat + beta > 0).double(), len(z)
        summed = slope - slope.mean(0) - xhat * (slope * xhat).mean(0)
        own = slope * (1 - 1 / m - xhat.square() / m)
        return gamma / sigma * summed, gamma / sigma * own


def singular_values(weight: Tensor, factors: Tensor) -> Tensor:
    """Singular values of diag(c) W for each sample's c, largest first: (samples, units)."""
    gram = weight @ weight.T
    products = factors[:, :, None] * gram * factors[:, None, :]
    if not bool(products.isfinite().all()):
        return torch.full_like(factors, math.nan)
    found: Tensor = torch.linalg.eigvalsh(products).clamp(min=0).sqrt().flip(1)
    return found


# -- what it means ------------------------------------------------------------------------------

# (norm, rate, pilot) -> seed -> step -> row
Found = dict[tuple[Scalar, ...], dict[int, dict[int, Row]]]


def _found(rows: Sequence[Row], kind: str = "sum") -> Found:
    found: Found = {}
    for row in rows:
        seed, step = row.get("seed"), row.get("step")
        if row.get("kind") == kind and isinstance(seed, int) and isinstance(step, int):
            arm = (row["norm"], row["rate"], row["pilot"])
            found.setdefault(arm, {}).setdefault(seed, {})[step] = row
    return found


def _distance(numbers: Mapping[str, Sequence[float]]) -> float:
    """RMS over the panels of both arms."""
    off = [
        ours - theirs
        for norm in NORMS
        for ours, theirs in zip(numbers[norm], PUBLISHED[norm], strict=True)
    ]
    return math.sqrt(statistics.fmean(d * d for d in off))


def contrast(by_norm: Mapping[str, Mapping[int, Row]]) -> float | None:
    """Log of the step's distance over the index's, from the rows of both arms by step."""
    steps = sorted(set.intersection(*(set(by) for by in by_norm.values())))
    wanted = [k * 10 for k in PANELS]
    if not steps or not set(wanted) <= set(steps):
        return None

    def indices(at: Sequence[int]) -> dict[str, list[float]]:
        return {
            norm: [statistics.fmean(_real(by[s][f"sv_{k}"]) for s in at) for k in PANELS]
            for norm, by in by_norm.items()
        }

    index = min(_distance(indices(at)) for at in (steps[:1], steps[-1:], steps))
    step = min(
        _distance({n: [_real(by[s][what]) for s in wanted] for n, by in by_norm.items()})
        for what in ("mean", "median", "largest")
    )
    return math.log(max(step, 1e-9) / max(index, 1e-9))


def _contrasts(rows: Sequence[Row], pilot: bool, kind: str = "sum") -> dict[str, list[float]]:
    found, values = _found(rows, kind), {}
    for rate in RATES:
        arms = {norm: found.get((norm, rate, pilot), {}) for norm in NORMS}
        seeds = sorted(set.intersection(*(set(by) for by in arms.values())))
        each = [contrast({norm: by[seed] for norm, by in arms.items()}) for seed in seeds]
        values[f"rate {rate:g}"] = [v for v in each if v is not None]
    return values


def _bound() -> float:
    return -math.log(claims()["f-jac"].thresholds["share"])


def _planned(rows: Sequence[Row]) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = _contrasts(rows, True)
    if any(len(values) < len(PILOT_SEEDS) for values in pilot.values()):
        return None
    return max(planned_n(v, _bound(), LEAST_SEEDS, MOST_SEEDS) for v in pilot.values())


def judge(rows: list[Row]) -> list[Verdict]:
    """The claim, at both learning rates."""
    if not rows:
        return []
    budget, data = str(rows[0]["budget"]), str(rows[0]["data"])
    decides = budget != "tiny"
    notes = ["Has a published setting only.", *_shown(rows)]
    if not decides:
        notes.append(f"The budget {budget} tries the wiring; it decides nothing.")
    parts = {
        name: Part(values, "above", _bound(), level=name)
        for name, values in _contrasts(rows, False).items()
    }
    setting = Setting(
        *("singular-values", budget, data, "MLP 100-100, ReLU", "as published"),
        "log of the ratio of distances",
        decides,
    )
    return [
        answer(
            "f-jac",
            setting,
            Words(
                "the panels are nearer to singular values of these indices than to those after "
                "these steps, by more than a factor of two: {weakest}",
                "the panels are not twice as near to singular values of these indices: {refuted}",
                "the log of the distance by step over that by index is, at {weakest}",
                "the panels are twice as near to singular values of these indices at one learning "
                "rate only: {weakest}; not: {refuted}",
            ),
            joint(parts, LEAST_SEEDS),
            {},
            delta=_bound(),
            pilot=_contrasts(rows, True),
            planned=_planned(rows),
            notes=notes,
        )
    ]


def _shown(rows: Sequence[Row]) -> list[str]:
    notes = []
    for kind, name in (("sum", "Of the batch's sum"), ("own", "Of a sample's own block")):
        for rate in RATES:
            each = []
            for norm, label in NORMS.items():
                runs = _found(rows, kind).get((norm, rate, False), {}).values()
                first = [by[0] for by in runs if 0 in by]
                if first:
                    numbers = [statistics.fmean(_real(r[f"sv_{k}"]) for r in first) for k in PANELS]
                    each.append(f"{label} {', '.join(f'{v:.2f}' for v in numbers)}")
            if each and rate == RATES[0]:
                notes.append(f"{name}, sv 10, 30, 70, 90 at the start: {'; '.join(each)}.")
    own = {name: v for name, v in _contrasts(rows, False, "own").items() if v}
    if own:
        each = [f"{name} {points(statistics.fmean(v))}" for name, v in own.items()]
        notes.append(f"The contrast with a sample's own block (secondary): {', '.join(each)}.")
    return notes


def _real(value: Scalar) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a singular value must be a number, got {value!r}. Repeat that cell.")
    return float(value)


def figures(rows: list[Row]) -> list[dict[str, Any]]:
    """The sorted singular values, before and after training at the code's rate."""
    drawn = [r for r in rows if r.get("pilot") is False and r.get("rate") == RATES[0]]
    caption = "Gradient of the batch's sum, mean over 64 samples; learning rate 0.01."
    axes = {
        when: Axes(
            f"Singular values of the first layer, ReLU, {when} of training",
            "sorted index",
            "singular value",
            caption=caption,
        )
        for when in ("at the start", "at the end")
    }
    found = drawings("singular-values", axes, drawn)
    return [{**figure, "id": str(figure["id"]).replace(" ", "-")} for figure in found]
