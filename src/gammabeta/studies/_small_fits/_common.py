"""What the measurements share: their rows, random numbers, fits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gammabeta._runs import Row, Scalar


def value(cell: str, number: float | Tensor) -> Row:
    """One number of one draw; cells are judged, or shown, over the draws."""
    return {"kind": "value", "cell": cell, "value": float(number)}


def point(curve: str, series: str, x: float, y: float | Tensor, **place: Scalar) -> Row:
    """One point of a figure; ``place``: its panel, and where the slider stands."""
    row: Row = {"kind": "curve", "curve": curve, "series": series, "x": float(x), "y": float(y)}
    return {**row, **place}


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of y over x."""
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a * a).sum())
