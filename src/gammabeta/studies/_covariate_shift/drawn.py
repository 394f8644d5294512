"""The influence of layers on later ones, drawn."""

import statistics
from collections.abc import Sequence
from typing import Any

from gammabeta._runs import Row
from gammabeta.studies._covariate_shift.contrasts import Rates, real


def influence(rows: Sequence[Row], rates: Rates, where: str) -> list[dict[str, Any]]:
    """The matrix k by l of each arm as curves: a panel for each arm, a curve for each layer k."""
    by: dict[tuple[str, int], dict[int, list[float]]] = {}
    for row in rows:
        key = ("deep", str(row.get("arm")))
        if (
            row.get("kind") == "influence"
            and row.get("part") == "fair"
            and rates.get(key) == row["rate"]
        ):
            series = by.setdefault((key[1], int(real(row["from"]))), {})
            series.setdefault(int(real(row["to"])), []).append(real(row["shift"]))
    panels: list[dict[str, Any]] = []
    ends = []
    for arm, title in (("none", "without"), ("bn", "with BN")):
        drawn: list[dict[str, Any]] = []
        for (name, k), cells in sorted(by.items()):
            if name == arm:
                places = sorted(cells)
                drawn.append(
                    {"name": f"step of layer {k}", "style": arm, "x": places,
                     "y": [statistics.fmean(cells[x]) for x in places],
                     "lo": [min(cells[x]) for x in places],
                     "hi": [max(cells[x]) for x in places],
                     "n": min(len(cells[x]) for x in places)}
                )  # fmt: skip
        if drawn:
            panels.append({"title": title, "series": drawn})
            ends.append(f"{title} {drawn[0]['y'][-1]:.3g}")
    if not panels:
        return []
    title = f"What the step of one layer alone does to later layers, {where}"
    return [
        {
            "id": "covariate-shift-influence",
            "experiment": "covariate-shift",
            "kind": "curves",
            "title": title,
            "caption": "Change of mean and spread of what layer l receives, in standard "
            "deviations, at steps of 1 % of the weights; mean over training and seeds; the band is "
            "the range over seeds.",
            "alt": f"{title}. First layer's step, at the last layer: {'; '.join(ends)}.",
            "x": {"label": "later layer", "log": False},
            "y": {"label": "change (standard deviations)", "log": False},
            "panels": panels,
        }
    ]
