"""From points in rows to figures: curves over something, one series each, over draws."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gammabeta._runs import Row, Scalar


class Axes(NamedTuple):
    """How one figure is drawn. On a logarithmic y axis the mean is that of the logarithm."""

    title: str
    x: str
    y: str
    x_log: bool = False
    y_log: bool = False
    caption: str = ""


def drawings(
    experiment: str, figures: Mapping[str, Axes], rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """The figures that have points: rows of kind "curve" with curve, series, x and y."""
    points: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.get("kind") == "curve":
            points[str(row["curve"]), str(row["series"])][_real(row["x"])].append(_real(row["y"]))
    found = []
    for name, axes in figures.items():
        series = [
            _series(label, by, axes) for (curve, label), by in points.items() if curve == name
        ]
        if series:
            ends = ", ".join(f"{s['name']} {s['y'][0]:.3g} to {s['y'][-1]:.3g}" for s in series)
            caption = f"{axes.caption} Mean over draws; the band is their range.".strip()
            found.append(
                {
                    "id": f"{experiment}-{name}",
                    "experiment": experiment,
                    "kind": "curves",
                    "title": axes.title,
                    "caption": caption,
                    "alt": f"{axes.title}. From left to right: {ends}.",
                    "x": {"label": axes.x, "log": axes.x_log},
                    "y": {"label": axes.y, "log": axes.y_log},
                    "panels": [{"title": "", "series": series}],
                }
            )
    return found


def _series(label: str, by_x: Mapping[float, list[float]], axes: Axes) -> dict[str, Any]:
    places = sorted(by_x)
    center = statistics.geometric_mean if axes.y_log else statistics.fmean
    return {
        "name": label,
        "style": "none" if label.endswith("without") else "bn",
        "x": places,
        "y": [center(by_x[p]) for p in places],
        "lo": [min(by_x[p]) for p in places],
        "hi": [max(by_x[p]) for p in places],
        "n": min(len(by_x[p]) for p in places),
    }


def _real(value: Scalar) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a point must have numbers, got {value!r}. Repeat that cell.")
    return float(value)
