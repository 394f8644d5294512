"""The published figures of the MNIST study redrawn on their own axes, our band over the points."""

import statistics
from collections.abc import Collection, Sequence
from typing import Any

from gammabeta._runs import Row
from gammabeta.studies._published_figures import (
    NORMS,
    RATES,
    Curves,
    Figure,
    curves,
    mean_curve,
    published,
    summarize,
)
from gammabeta.studies._verdict import interval


def redrawn(
    experiment: str, rows: Sequence[Row], only: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Each published figure (of those named in `only`) that the rows have a curve of.

    Our band lies over its points, in one panel for each panel of the figure and each learning
    rate, on the figure's own axes: linear steps from 0 to its last one. Rows on the bundled
    digits have nothing to do with these numbers and give no figure.
    """
    found = curves([row for row in rows if row.get("data") != "digits"])
    figures = []
    for figure in published():
        if only is not None and figure.id not in only:
            continue
        names = list(dict.fromkeys(figure.panel(series.arm) for series in figure.series))
        panels = [
            {"title": ", ".join(filter(None, (name, f"rate {rate:g}"))), "series": drawn}
            for name in names
            for rate in RATES
            if (drawn := _drawn(figure, name, rate, found))
        ]
        if not panels:
            continue
        own = {s.figure: s for s in summarize(found)}[figure.id]
        share = "; ".join(
            f"{own.agree[rate]} of {own.compared[rate]} points compared agree at rate {rate:g}"
            for rate in RATES
        )
        decision = f"The runs decide on rate {own.rate:g}." if own.rate else "Not decided."
        figures.append(
            {
                "id": f"{experiment}-{figure.id}",
                "experiment": experiment,
                "kind": "curves",
                "title": f"{figure.name} of the MNIST study again: {_lower(figure.title)}",
                "caption": f"Marks: {figure.source}, read off the image to ±0.003. Curves: "
                "mean over seeds, the band is its 95 % interval; one panel for each learning rate "
                f"(on the summed loss). {share}. {decision}",
                "alt": f"{figure.name}: {figure.title}, published points and our curves. {share}.",
                "x": {"label": "training step", "log": False},
                "y": {"label": figure.label, "log": False},
                "panels": panels,
            }
        )
    return figures


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]


def _drawn(figure: Figure, panel: str, rate: float, found: Curves) -> list[dict[str, Any]]:
    """Curves and points of one panel; empty where there is no curve of ours."""
    lines, marks = [], []
    last = max(point.step for series in figure.series for point in series.points)
    for series in figure.series:
        if figure.panel(series.arm) != panel:
            continue
        norm, points = series.arm.norm, series.points
        marks.append(
            {
                "name": f"published, {NORMS[norm]}",
                "style": f"{norm}-points",
                "x": [p.step for p in points],
                "y": [p.value for p in points],
                "lo": [p.low for p in points],
                "hi": [p.high for p in points],
                "n": 1,
            }
        )
        by_seed = found.get((series.arm, rate, figure.quantity), {})
        steps = [step for step, _ in mean_curve(by_seed) if step <= last]
        if not steps:
            continue
        values = [[dict(curve)[step] for curve in by_seed.values()] for step in steps]
        bands = [interval(v) if len(v) > 1 else None for v in values]
        means = [statistics.fmean(v) for v in values]
        lines.append(
            {
                "name": NORMS[norm],
                "style": norm,
                "x": steps,
                "y": means,
                "lo": [b.lo if b else m for b, m in zip(bands, means, strict=True)],
                "hi": [b.hi if b else m for b, m in zip(bands, means, strict=True)],
                "n": len(by_seed),
            }
        )
    return [*lines, *marks] if lines else []
