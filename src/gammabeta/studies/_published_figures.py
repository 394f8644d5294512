"""The published figures of the MNIST study beside our runs: agreement, and learning rates.

The numbers lie in ``published_figures.toml``. Our curve is the mean over seeds at each step that
all seeds have, interpolated linearly in the logarithm of the step. A published accuracy agrees if
our curve is within 0.01 of it at its step, or meets it within 5 % of its step; a magnitude agrees
if ours is within 12 % of it. A point at which no run has arrived is not compared.

Which learning rate a figure was made with: the RMS distance of each seed's curves to the points
that both rates have (of accuracies the difference, of magnitudes the relative one); decided for a
figure if one rate's distance is less than half of the other's in every seed.
"""

import bisect
import functools
import importlib.resources
import math
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gammabeta import _runs
from gammabeta._runs import Row
from gammabeta.studies._verdict import interval

RATES = (0.01, 0.0001)  # on the summed loss: that of the committed code, and the other candidate
EXPERIMENTS = ("published", "activations", "batch-size")  # the first that has a curve gives it
ACCURACY, STEPS, MAGNITUDE = 0.01, 0.05, 0.12

_FILE = "published_figures.toml"
_ACTIVATIONS = {
    "relu": "ReLU",
    "leaky_relu": "leaky ReLU",
    "sigmoid": "sigmoid",
    "softplus": "softplus",
    "tanh": "tanh",
}
_OPTIMIZERS = {"sgd": "SGD", "adam": "Adam"}
NORMS = {
    "bn": "with batch normalization",
    "none": "without",
    "brn": "with Batch Renormalization",
}
# quantity of a figure -> column of the rows
COLUMNS = {"accuracy": "accuracy", "weight": "weight", "gradient": "gradient"}

Curve = tuple[tuple[int, float], ...]  # (step, value) at increasing steps


class Arm(NamedTuple):
    """What a curve of the study was made with, but for its learning rate."""

    activation: str
    optimizer: str
    batch: int
    norm: str


class Point(NamedTuple):
    """One number of a figure; low < high where the figure gives a range."""

    step: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return (self.low + self.high) / 2


class Series(NamedTuple):
    arm: Arm
    points: tuple[Point, ...]


class Figure(NamedTuple):
    """One published figure."""

    id: str
    title: str
    quantity: str
    kind: str
    label: str
    source: str
    series: tuple[Series, ...]

    @property
    def name(self) -> str:
        """As the study names it.

        >>> published()[0].name
        'Fig. 1'
        """
        return f"Fig. {self.id.removeprefix('fig-')}"

    def panel(self, arm: Arm) -> str:
        """What tells the arm from the figure's others, beside batch normalization."""
        words = {
            "activation": _ACTIVATIONS[arm.activation],
            "optimizer": _OPTIMIZERS[arm.optimizer],
            "batch": f"batch {arm.batch}",
        }
        differ = [k for k in words if len({getattr(s.arm, k) for s in self.series}) > 1]
        return ", ".join(words[key] for key in differ)


Curves = Mapping[tuple[Arm, float, str], Mapping[int, Curve]]  # (arm, rate, quantity) -> by seed


@functools.cache
def published() -> tuple[Figure, ...]:
    """The published figures, in their order."""
    text = importlib.resources.files("gammabeta.studies").joinpath(_FILE).read_text("utf-8")
    return tuple(_figure(entry) for entry in tomllib.loads(text)["figure"])


def _figure(entry: Mapping[str, Any]) -> Figure:
    series = []
    for one in entry["series"]:
        arm = {**entry["default"], **{k: v for k, v in one.items() if k != "points"}}
        points = tuple(Point(step, min(v), max(v)) for step, *v in one["points"])
        series.append(Series(Arm(**arm), points))
    names = ("id", "title", "quantity", "kind", "label", "source")
    return Figure(**{name: entry[name] for name in names}, series=tuple(series))


# -- our curves ---------------------------------------------------------------------------------


def curves(rows: Sequence[Row]) -> Curves:
    """Curves of the rows that were made as published, by arm, rate and quantity, then by seed.

    A row is one evaluation: the arm's activation, norm and rate (and optimizer and batch, unless
    they are the defaults SGD and 64), step, and one column or more of quantities.
    """
    found: dict[tuple[Arm, float, str], dict[int, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        arm, rate, seed, step = _arm(row), row.get("rate"), row.get("seed"), row.get("step")
        if arm is None or not isinstance(rate, float | int):
            continue
        if not isinstance(seed, int) or not isinstance(step, int):
            continue
        for quantity, column in COLUMNS.items():
            value = row.get(column)
            if isinstance(value, float | int):
                found[arm, float(rate), quantity][seed][step] = float(value)
    return {
        key: {seed: tuple(sorted(by_step.items())) for seed, by_step in sorted(seeds.items())}
        for key, seeds in found.items()
    }


def _arm(row: Row) -> Arm | None:
    """The arm of a row that was made as published, else None."""
    activation, norm = row.get("activation"), row.get("norm")
    optimizer, batch = row.get("optimizer", "sgd"), row.get("batch", 64)
    if row.get("part") != "published" or activation not in _ACTIVATIONS or norm not in NORMS:
        return None
    if optimizer not in _OPTIMIZERS or not isinstance(batch, int):
        return None
    return Arm(str(activation), str(optimizer), batch, str(norm))


def at(curve: Curve, step: float) -> float | None:
    """The curve's value at a step, linear in log step; None outside of its steps.

    The first evaluation stands for the start (step 0) if it was made after one step at most.

    >>> at(((1, 0.0), (10, 1.0), (1000, 3.0)), 100)
    2.0
    >>> at(((10, 1.0), (100, 2.0)), 200) is None
    True
    """
    steps = [s for s, _ in curve]
    if step == 0 and steps[:1] == [1]:
        return curve[0][1]
    if not steps or not steps[0] <= step <= steps[-1]:
        return None
    right = bisect.bisect_left(steps, step)
    if steps[right] == step:
        return curve[right][1]
    (before, low), (after, high) = curve[right - 1], curve[right]
    start = max(before, 1)
    share = math.log(step / start) / math.log(after / start)
    return low + share * (high - low)


def mean_curve(by_seed: Mapping[int, Curve]) -> Curve:
    """Mean over the seeds at the steps that all of them have."""
    values = [dict(curve) for curve in by_seed.values()]
    shared = set.intersection(*(set(v) for v in values)) if values else set()
    return tuple((step, statistics.fmean(v[step] for v in values)) for step in sorted(shared))


# -- point by point -----------------------------------------------------------------------------


class Compared(NamedTuple):
    """One published point beside ours at one learning rate; ours is None where no run arrived.

    `difference` is ours minus the published value (the middle of a range).
    """

    figure: str
    panel: str
    norm: str
    step: int
    published: float
    low: float
    high: float
    rate: float
    ours: float | None
    lo: float | None
    hi: float | None
    n: int
    difference: float | None
    agrees: bool | None


def compare(found: Curves) -> list[Compared]:
    """Every published point at every learning rate."""
    return [
        _compared(figure, series.arm, point, rate, found.get((series.arm, rate, figure.quantity)))
        for figure in published()
        for rate in RATES
        for series in figure.series
        for point in series.points
    ]


def _compared(
    figure: Figure, arm: Arm, point: Point, rate: float, by_seed: Mapping[int, Curve] | None
) -> Compared:
    values = [v for c in (by_seed or {}).values() if (v := at(c, point.step)) is not None]
    where = (figure.id, figure.panel(arm), arm.norm, point.step, point.value, point.low, point.high)
    if not values:
        return Compared(*where, rate, None, None, None, 0, None, None)
    ours = statistics.fmean(values)
    band = interval(values) if len(values) > 1 else None
    return Compared(
        *where,
        rate,
        ours,
        band.lo if band else None,
        band.hi if band else None,
        len(values),
        ours - point.value,
        agrees(figure.kind, point, ours, mean_curve(by_seed or {})),
    )


def agrees(kind: str, point: Point, ours: float, curve: Curve) -> bool:
    """Whether ours, the curve's value at the point's step, counts as the published number."""
    if kind == "magnitude":
        return point.low * (1 - MAGNITUDE) <= ours <= point.high * (1 + MAGNITUDE)
    if point.low - ACCURACY <= ours <= point.high + ACCURACY:
        return True
    ends = (1 - STEPS) * point.step, (1 + STEPS) * point.step
    near = [v for s, v in curve if ends[0] <= s <= ends[1]]
    near += [v for end in ends if (v := at(curve, end)) is not None]
    return bool(near) and min(near) <= point.high and max(near) >= point.low


class Summary(NamedTuple):
    """One figure: agreeing, compared and all points by rate, and what its distances say.

    `distance` has the RMS distance by rate and seed over the `decided_on` points that both rates
    have. `rate` is the learning rate that the runs decide on, None where they do not.
    """

    figure: str
    agree: dict[float, int]
    compared: dict[float, int]
    points: int
    distance: dict[float, dict[int, float]]
    decided_on: int
    rate: float | None


def summarize(found: Curves) -> list[Summary]:
    """Each figure: how many points agree at each rate, and which rate it was made with."""
    all_points, summaries = compare(found), []
    for figure in published():
        own = [c for c in all_points if c.figure == figure.id]
        by_rate = {rate: [c for c in own if c.rate == rate] for rate in RATES}
        distance, shared = distances(figure, found)
        summaries.append(
            Summary(
                figure.id,
                {rate: sum(c.agrees is True for c in cs) for rate, cs in by_rate.items()},
                {rate: sum(c.agrees is not None for c in cs) for rate, cs in by_rate.items()},
                len(own) // len(RATES),
                distance,
                shared,
                decided(distance),
            )
        )
    return summaries


def distances(figure: Figure, found: Curves) -> tuple[dict[float, dict[int, float]], int]:
    """RMS distance to the points by rate and seed, and how many points it is taken over.

    Only points and seeds that both rates have: over different points there are no two distances of
    one figure to compare.
    """
    everywhere: set[int] | None = None
    used: list[tuple[Series, Point]] = []
    for series in figure.series:
        by_rate = [found.get((series.arm, rate, figure.quantity), {}) for rate in RATES]
        for point in series.points:
            arrived = [
                {seed for seed, c in curves_.items() if at(c, point.step) is not None}
                for curves_ in by_rate
            ]
            both = set.intersection(*arrived)
            if both:
                used.append((series, point))
                everywhere = both if everywhere is None else everywhere & both
    result: dict[float, dict[int, float]] = {rate: {} for rate in RATES}
    for rate in RATES:
        for seed in sorted(everywhere or ()):
            off = [
                _off(figure, point, found[series.arm, rate, figure.quantity][seed])
                for series, point in used
            ]
            result[rate][seed] = math.sqrt(statistics.fmean(d * d for d in off))
    return result, len(used) if everywhere else 0


def _off(figure: Figure, point: Point, curve: Curve) -> float:
    """Distance of the curve from a point, 0 within a range; of magnitudes relative."""
    ours = at(curve, point.step)
    if ours is None:
        raise ValueError(f"the curve does not reach step {point.step}. Compare others.")
    gap = max(point.low - ours, ours - point.high, 0.0)
    return gap / point.value if figure.kind == "magnitude" else gap


def decided(distance: Mapping[float, Mapping[int, float]]) -> float | None:
    """The rate whose distance is less than half of the other's in every seed, else None.

    >>> decided({0.01: {0: 0.1, 1: 0.2}, 0.0001: {0: 0.01, 1: 0.09}})
    0.0001
    >>> decided({0.01: {0: 0.1, 1: 0.2}, 0.0001: {0: 0.01, 1: 0.11}}) is None
    True
    """
    for rate in RATES:
        (other,) = (r for r in RATES if r != rate)
        ours, theirs = distance.get(rate, {}), distance.get(other, {})
        if ours and ours.keys() == theirs.keys() and all(2 * ours[s] < theirs[s] for s in ours):
            return rate
    return None


# -- run folders --------------------------------------------------------------------------------


class Shown(NamedTuple):
    """What `study show --published` tells."""

    points: list[Compared]
    figures: list[Summary]
    budgets: dict[str, str]  # experiment -> budget of its rows
    notes: list[str]

    def best(self) -> tuple[int, int, int]:
        """Points that agree at the better rate of each figure, those compared there, and all."""
        agree = compared = 0
        for figure in self.figures:
            rate = max(RATES, key=lambda r: (figure.agree[r], figure.compared[r]))
            agree, compared = agree + figure.agree[rate], compared + figure.compared[rate]
        return agree, compared, sum(figure.points for figure in self.figures)

    def to_json(self) -> dict[str, Any]:
        agree, compared, points = self.best()
        return {
            "tolerance": {"accuracy": ACCURACY, "steps": STEPS, "magnitude": MAGNITUDE},
            "budgets": self.budgets,
            "notes": self.notes,
            "agree_at_the_better_rate_of_each_figure": agree,
            "compared": compared,
            "points": points,
            "figures": [
                {
                    "figure": figure.id,
                    "title": figure.title,
                    "source": figure.source,
                    "quantity": figure.quantity,
                    "kind": figure.kind,
                    "decided_rate": summary.rate,
                    "decided_on_points": summary.decided_on,
                    "points": summary.points,
                    "rates": [
                        {
                            "rate": rate,
                            "agree": summary.agree[rate],
                            "compared": summary.compared[rate],
                            "distance": {str(s): d for s, d in summary.distance[rate].items()},
                        }
                        for rate in RATES
                    ],
                }
                for figure, summary in zip(published(), self.figures, strict=True)
            ],
            "rows": [point._asdict() for point in self.points],
        }


def of_runs(paths: Sequence[Path]) -> Shown:
    """Compare the rows on MNIST that lie in these run folders with the published numbers.

    Raises:
        RunError: a folder cannot be read.
        ValueError: none of the rows were made as published on MNIST.
    """
    from gammabeta.studies._experiments import experiments
    from gammabeta.studies._judge import select

    stored, known = _runs.read_cells(paths), experiments()
    merged: dict[tuple[Arm, float, str], Mapping[int, Curve]] = {}
    budgets: dict[str, str] = {}
    notes: list[str] = []
    for name in EXPERIMENTS:
        cells = [cell for cell in stored if cell.spec["experiment"] == name]
        if name not in known or not cells:
            continue
        selection = select(cells, known[name].code_of, data="mnist")
        found = curves(selection.rows())
        if found:
            budgets[name] = selection.cells[0].spec["budget"]
            notes += [f"{name}: {note}" for note in selection.notes]
            merged = {**found, **merged}
    if not merged:
        raise ValueError(
            "Rows made as published on MNIST were expected, and these run folders have none. "
            f"Make some with `gammabeta study run {EXPERIMENTS[0]} --data mnist`."
        )
    return Shown(compare(merged), summarize(merged), budgets, notes)
