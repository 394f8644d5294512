"""Figures with a slider, and matrices, made from rows: plain values, no HTML.

A figure of kind "steps" has `slider` (what the slider moves), `steps` (its places) and panels of
series whose y, lo and hi hold one list for each place (None where a series was not measured). A
series that is `fixed` has one list for all places; one that lies `below` is drawn in a strip under
the curves. All places share their axes, and all panels but where the figure says `each`. One of
kind "heat" has panels with rows, columns and z. Both are drawn by `figures.js`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar, StoredCell
from gammabeta.report._marks import is_number, number

_BUDGETS = ("tiny", "small", "full")
_NAMES = {"relu": "ReLU", "leaky_relu": "leaky ReLU"}
_ARMS = {"bn": "with batch normalization", "none": "without"}
_SORTED = {"sv_10": 10.0, "sv_30": 30.0, "sv_70": 70.0, "sv_90": 90.0, "largest": 1.0}
_MATRICES = {
    "sum": "the whole batch's gradient",
    "own": "each sample's own block",
}

# panel, then arm, then step, then x -> the values of the seeds
Spectra = dict[str, dict[str, dict[int, dict[float, list[float]]]]]
Series = dict[str, Any]
# place of the slider, None for all of them -> x -> the values of the seeds
Frames = Mapping[Any, Mapping[float, list[float]]]


def alike(
    cells: Iterable[StoredCell], kinds: set[str], curve: str | None = None
) -> tuple[str, list[Row]]:
    """Rows of these kinds, and of this curve, that were made alike: by data, budget and code.

    MNIST goes before the digits, then the larger budget, then those of which there are more.
    Returns what they were made on, in words, with them; nothing where there are none.
    """
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for cell in cells:
        rows = [row for row in cell.flat() if row.get("kind") in kinds]
        rows = [row for row in rows if curve is None or row.get("curve") == curve]
        if rows:
            spec = cell.spec
            groups[spec["data"]["name"], spec["budget"], spec["code"]] += rows
    if not groups:
        return "", []

    def worth(key: tuple[str, str, str]) -> tuple[bool, int, int, str]:
        rank = _BUDGETS.index(key[1]) if key[1] in _BUDGETS else -1
        return key[0] == "mnist", rank, len(groups[key]), key[2]

    best = max(groups, key=worth)
    names = {"mnist": "MNIST", "digits": "the bundled digits, a demonstration"}
    return f"{names.get(best[0], best[0])}, budget {best[1]}", groups[best]


def stepped(cells: Iterable[StoredCell]) -> list[dict[str, Any]]:
    """The figures that these cells have rows for."""
    by: dict[str, list[StoredCell]] = defaultdict(list)
    for cell in cells:
        by[cell.spec["experiment"]].append(cell)
    found = []
    for experiment, group in by.items():
        found += _spectra(experiment, group) + _indices(experiment, group)
        found += _influence(experiment, group) + _sliding(experiment, group)
    return found


def _head(experiment: str, name: str, title: str, caption: str, alt: str) -> dict[str, Any]:
    head = {"id": f"{experiment}-{name}", "experiment": experiment, "title": title}
    return {**head, "caption": caption, "alt": alt, "run": ""}


def _spectra(experiment: str, cells: list[StoredCell]) -> list[dict[str, Any]]:
    """Quantiles of singular values: rows "spectrum" (layer, activation, norm, step, x, y)."""
    where, rows = alike(cells, {"spectrum"})
    found: Spectra = {}
    for row in rows:
        name = str(row.get("activation"))
        _put(found, f"layer {row.get('layer')}, {_NAMES.get(name, name)}", row, row.get("x"), "y")
    title = "Singular values of a layer's Jacobian while training"
    x = {"label": "% of the singular values that are at most so large", "log": False}
    return _figure(experiment, "spectra", title, where, found, x)


def _indices(experiment: str, cells: list[StoredCell]) -> list[dict[str, Any]]:
    """Some singular values by their place in the order: columns sv_10, sv_30 ... and `largest`."""
    where, rows = alike(cells, set(_MATRICES))
    found: Spectra = {}
    for row in rows:
        if not row.get("pilot"):
            panel = f"{_MATRICES[str(row['kind'])]}, rate {row.get('rate')}"
            for column, place in _SORTED.items():
                _put(found, panel, row, place, column)
    title = "Singular values by their place in the order while training"
    x = {"label": "place in the order, the largest first", "log": False}
    return _figure(experiment, "places", title, where, found, x)


def _put(found: Spectra, panel: str, row: Row, x: Any, column: str) -> None:
    norm, step, y = row.get("norm"), row.get("step"), row.get(column)
    if norm in _ARMS and isinstance(step, int) and is_number(x) and isinstance(y, int | float):
        arm = found.setdefault(panel, {}).setdefault(str(norm), {})
        arm.setdefault(step, {}).setdefault(float(x), []).append(float(y))


def _figure(
    experiment: str, name: str, title: str, where: str, found: Spectra, x: dict[str, Any]
) -> list[dict[str, Any]]:
    steps = sorted({s for arms in found.values() for by_step in arms.values() for s in by_step})
    if len(steps) < 2:
        return []
    panels, ends = [], []
    for panel, arms in sorted(found.items()):
        series = [_series(_ARMS[n], n, arms[n], steps) for n in _ARMS if n in arms]
        panels.append({"title": panel, "series": series})
        for s in series:
            tops = [max(y) for y in s["y"] if y]
            if tops:
                ends.append(f"{panel}, {s['name']}: {tops[0]:.3g} to {tops[-1]:.3g}")
    caption = (
        f"On {where}. Mean over seeds, the band is their range; dotted, the start. One slider "
        "moves all arms and panels, whose axes do not change; the line at 1 is where nothing is "
        "stretched or shrunk."
    )
    alt = f"{title}, at {len(steps)} steps from {steps[0]} to {steps[-1]}. The largest: "
    figure = _head(experiment, name, title, caption, alt + "; ".join(ends) + ".")
    y = {"label": "singular value", "log": False}
    figure |= {"kind": "steps", "x": x, "y": y, "steps": steps, "slider": "step", "panels": panels}
    return [{**figure, "line": 1, "start": True}]


def _series(name: str, style: str, by_step: Frames, steps: Sequence[float | None]) -> Series:
    places = sorted({x for values in by_step.values() for x in values})
    frames: dict[str, list[list[float | None] | None]] = {"y": [], "lo": [], "hi": []}
    for step in steps:
        values = by_step.get(step, {})
        for key, fold in (("y", _mean), ("lo", min), ("hi", max)):
            drawn = [fold(values[x]) if x in values else None for x in places]
            frames[key].append(drawn if values else None)
    n = min(len(y) for values in by_step.values() for y in values.values())
    return {"name": name, "style": style, "n": n, "x": places, **frames}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)  # of a stranger's numbers it may be infinite, and no error


def _influence(experiment: str, cells: list[StoredCell]) -> list[dict[str, Any]]:
    """What the step of layer k does to layer l: rows of kind "influence" (arm, from, to, shift)."""
    where, rows = alike(cells, {"influence"})
    found: dict[str, dict[tuple[int, int], list[float]]] = {}
    for row in rows:
        k, later, value = row.get("from"), row.get("to"), row.get("shift")
        fair = row.get("part") == "fair" and row.get("arm") in _ARMS
        if fair and isinstance(k, int) and isinstance(later, int) and isinstance(value, float):
            arm = found.setdefault(str(row["arm"]), {})
            arm.setdefault((k, later), []).append(value)
    panels: list[dict[str, Any]] = []
    ends: list[str] = []
    for norm, name in _ARMS.items():
        by_place = found.get(norm)
        if by_place is None:
            continue
        own, columns = (sorted({place[side] for place in by_place}) for side in (0, 1))
        z = [[_mean(v) if (v := by_place.get((k, to))) else None for to in columns] for k in own]
        panels.append({"title": name, "rows": own, "columns": columns, "z": z})
        largest = max(value for line in z for value in line if value is not None)
        ends.append(f"{name}, at most {largest:.3g}")
    if not panels:
        return []
    title = "What the step of one layer alone does to each later layer"
    caption = (
        f"On {where}. Row: the layer that makes a step of 1 % of its weights; column: the layer "
        "whose inputs change, in standard deviations of mean and spread. Mean over training and "
        "seeds; both arms share the scale."
    )
    figure = _head(experiment, "heat", title, caption, f"{title}: {'; '.join(ends)}.")
    x, y = {"label": "later layer", "log": False}, {"label": "layer that steps", "log": False}
    return [{**figure, "kind": "heat", "x": x, "y": y, "panels": panels}]


# -- curves by a slider over anything ------------------------------------------------------------


class Line(NamedTuple):
    """How one series is drawn: its look, whether below the curves, and whether it is a formula."""

    style: str
    below: bool = False
    formula: bool = False


class Sliding(NamedTuple):
    """A figure of rows of kind "curve" with columns panel, series, at, x, y.

    The slider moves `at`; a row in which it is null holds at every place.
    """

    title: str
    x: str
    y: str
    slider: str
    caption: str
    lines: Mapping[str, Line]  # by the name of the series, in the order of the legend
    strip: tuple[str, float]  # what lies below the curves, and its share of the height
    told: Callable[[str, dict[str, Series], Sequence[float]], str]  # a panel in words
    images: bool
    each: bool = False  # a y axis for each panel
    first: str = ""  # the name of what lies below at the first place, if it stays in sight
    opens: bool = True  # at the last place, else at the first


def _sliding(experiment: str, cells: list[StoredCell]) -> list[dict[str, Any]]:
    """The figures whose slider moves something, as `_SLIDING` lists them."""
    found = []
    for (of, curve), how in _SLIDING.items():
        if of == experiment:
            where, rows = alike(cells, {"curve"}, curve)
            found += _slid(experiment, curve, how, where, rows)
    return found


def _slid(
    experiment: str, curve: str, how: Sliding, where: str, rows: list[Row]
) -> list[dict[str, Any]]:
    by: dict[str, dict[str, dict[float | None, dict[float, list[float]]]]] = {}
    places: set[float] = set()
    for row in rows:
        panel, name = row.get("panel"), row.get("series")
        at, x, y = (_measured(row.get(column)) for column in ("at", "x", "y"))
        everywhere = row.get("at") is None
        known = isinstance(panel, str) and name in how.lines and (everywhere or at is not None)
        if known and x is not None and y is not None:
            frame = by.setdefault(str(panel), {}).setdefault(str(name), {}).setdefault(at, {})
            frame.setdefault(float(x), []).append(float(y))
            places |= set() if at is None else {at}
    steps = sorted(places)
    if len(steps) < 2:
        return []
    panels, told = [], []
    for title, lines in by.items():
        series: dict[str, Series] = {}
        for name, line in how.lines.items():
            if name in lines:
                series[name] = _slid_series(name, line, lines[name], steps)
        if how.first:
            for name in [n for n, line in how.lines.items() if line.below and n in series]:
                start = _series(how.first, "before", lines[name], steps[:1])
                series[how.first] = {**start, "fixed": True, "below": True}
        panels.append({"title": title, "series": list(series.values())})
        told.append(how.told(title, series, steps))
    words = " ".join(filter(None, told))
    on = f"On {where}. " if how.images else f"Made with {where.rpartition(', ')[2]}. "
    seeds = "Mean over seeds, the band is their range."
    alt = f"{how.title}, for {len(steps)} places of {how.slider}, {number(steps[0])} to "
    figure = _head(
        experiment,
        curve,
        how.title,
        f"{on}{how.caption} {seeds} {words}".strip(),
        f"{alt}{number(steps[-1])}. {words}".strip(),
    )
    strip, share = how.strip
    figure |= {"kind": "steps", "steps": steps, "slider": how.slider, "panels": panels}
    figure |= {"x": {"label": how.x, "log": False}, "y": {"label": how.y, "log": False}}
    figure |= {"strip": {"label": strip, "share": share}, "each": how.each}
    return [{**figure, "opens": len(steps) - 1 if how.opens else 0}]


def _measured(value: Scalar) -> float | None:
    """The value, if it is a number; whole ones stay whole, as steps are."""
    return value if isinstance(value, int | float) and is_number(value) else None


def _slid_series(name: str, line: Line, frames: Frames, steps: Sequence[float]) -> Series:
    fixed = None in frames
    series = _series(name, line.style, frames, [None] if fixed else steps)
    if line.formula:
        series |= {"n": None, "lo": None, "hi": None}
    return {**series, "fixed": fixed, "below": line.below}


def _distances(title: str, series: dict[str, Series], steps: Sequence[float]) -> str:
    """Mean distance of fit and target where the inputs are dense, and elsewhere."""
    if not {"fit", "target", _DENSITY} <= series.keys():
        return ""
    fit, density = series["fit"], series[_DENSITY]
    target = dict(zip(series["target"]["x"], series["target"]["y"][0], strict=True))
    apart: tuple[list[float], list[float]] = ([], [])
    for place in range(len(steps)):
        if not (fit["y"][place] and density["y"][place]):
            continue
        dense = dict(zip(density["x"], density["y"][place], strict=True))
        most = max(value for value in dense.values() if value is not None)
        for x, y in zip(fit["x"], fit["y"][place], strict=True):
            if None not in (y, dense.get(x), target.get(x)):
                apart[dense[x] < most / 10].append(abs(y - target[x]))
    if not all(apart):
        return ""
    near, far = (
        number(float(f"{mean:.2g}")) if mean >= 0.001 else "below 0.001"
        for mean in map(_mean, apart)
    )
    told = f"mean distance to the target {near} where the inputs are dense, {far} elsewhere."
    return f"{title[:1].upper()}{title[1:]}: {told}"


def _moments(title: str, series: dict[str, Series], steps: Sequence[float]) -> str:
    """Mean and standard deviation of what is measured at the first place and at the last."""
    if "density" not in series:
        return ""
    drawn, told = series["density"], []
    for place in (0, -1):
        pairs = zip(drawn["x"], drawn["y"][place] or [], strict=False)
        weights = [(x, y) for x, y in pairs if y]
        total = sum(y for _, y in weights)
        if not total > 0:
            return ""
        mean = sum(x * y for x, y in weights) / total
        sd = (sum((x - mean) * (x - mean) * y for x, y in weights) / total) ** 0.5
        told.append(f"{number(round(mean, 1))} ± {number(round(sd, 1))}")
    at = number(steps[-1])
    told[0] = f"mean ± standard deviation {told[0]} before training"
    return f"{title[:1].upper()}{title[1:]}: {told[0]}, {told[1]} at step {at}."


_DENSITY = "density of the inputs"
# experiment and the rows' column `curve` -> the figure
_SLIDING = {
    ("small-fits", "moved"): Sliding(
        title="What is fitted as the density of the inputs moves",
        x="x",
        y="y; below it, the density of the inputs",
        slider="center m of the density",
        caption="Each place of the slider is a training of its own with inputs x ~ N(m, 0.3²), "
        "from the same start. Dense is where the density is above a tenth of its peak.",
        lines={
            "fit": Line("fit"),
            "target": Line("target", formula=True),
            _DENSITY: Line("density", below=True, formula=True),
        },
        strip=("density", 0.26),
        told=_distances,
        images=False,
        each=True,
        opens=False,
    ),
    ("layer-inputs", "sigmoid-inputs"): Sliding(
        title="What the sigmoids of the last hidden layer receive",
        x="input of the sigmoid",
        y="output of the sigmoid; below it, the density of its inputs",
        slider="step",
        caption="Below the sigmoid, the inputs of all units of the last hidden layer for images "
        "that are not trained on, normalized by the statistics of these images, as in training; "
        "what is beyond ±12 is left out.",
        lines={
            "sigmoid": Line("target", formula=True),
            "density": Line("density", below=True),
        },
        strip=("density", 0.55),
        told=_moments,
        images=True,
        first="density before training",
    ),
}
