"""Figures with a slider over training steps, and matrices, made from rows: plain values, no HTML.

A figure of kind "steps" has `steps` and panels of series whose y, lo and hi hold one list for each
step (None where a series was not measured); all steps and panels share their axes. One of kind
"heat" has panels with rows, columns and z. Both are drawn by `page.js`.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from gammabeta._runs import Row, StoredCell
from gammabeta.report._marks import is_number

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


def alike(cells: Iterable[StoredCell], kinds: set[str]) -> tuple[str, list[Row]]:
    """Rows of these kinds that were made alike, by experiment, data set, budget and code.

    MNIST goes before the digits, then the larger budget, then those of which there are more.
    Returns what they were made on, in words, with them; nothing where there are none.
    """
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for cell in cells:
        rows = [row for row in cell.flat() if row.get("kind") in kinds]
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
        found += _influence(experiment, group)
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
        series = [_series(norm, arms[norm], steps) for norm in _ARMS if norm in arms]
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
    figure |= {"kind": "steps", "x": x, "y": y, "steps": steps, "line": 1, "panels": panels}
    return [figure]


def _series(
    norm: str, by_step: Mapping[int, Mapping[float, list[float]]], steps: list[int]
) -> dict[str, Any]:
    places = sorted({x for values in by_step.values() for x in values})
    frames: dict[str, list[list[float | None] | None]] = {"y": [], "lo": [], "hi": []}
    for step in steps:
        values = by_step.get(step, {})
        for key, fold in (("y", _mean), ("lo", min), ("hi", max)):
            drawn = [fold(values[x]) if x in values else None for x in places]
            frames[key].append(drawn if values else None)
    n = min(len(y) for values in by_step.values() for y in values.values())
    return {"name": _ARMS[norm], "style": norm, "n": n, "x": places, **frames}


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
