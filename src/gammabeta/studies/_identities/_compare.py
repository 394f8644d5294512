"""What the checks share: rows, and the layers that each check is tried on."""

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gammabeta._runs import Row
from gammabeta.layers.batch_norm import BatchNorm1d, BatchNorm2d
from gammabeta.ops import backends, batch_norm

Check = Callable[[torch.Generator], Iterator[Row]]

EPS = torch.finfo(torch.float64).eps
RIGHT, WORDED, TRAP = "right", "worded", "trap"


def check(
    level: str,
    compared: str,
    found: Tensor | float,
    wanted: Tensor | float,
    *,
    condition: Tensor | float = 1.0,
    scale: Tensor | float | None = None,
    half: str = "",
) -> Row:
    """One comparison: the largest |found - wanted|, relative to the largest |wanted|.

    Args:
        level: RIGHT, the statement as it should be made; WORDED, as its source makes it; TRAP,
            another wrong wording that the sources have.
        compared: what with what, in words.
        condition: the condition number K of the rule; `rounding` is eps times K.
        scale: what the error is relative to, where wanted is 0 or says too little.
        half: the part of a wording that is judged by itself.
    """
    wanted = torch.as_tensor(wanted, dtype=torch.float64).detach()
    found = torch.as_tensor(found, dtype=torch.float64).detach().expand_as(wanted)
    difference = torch.nan_to_num((found - wanted).abs().flatten(), nan=sys.float_info.max)
    place = int(difference.argmax())
    size = float(wanted.abs().max() if scale is None else torch.as_tensor(scale).detach()) or 1.0
    k = float(torch.as_tensor(condition).detach().max())
    return {
        "kind": "check",
        "level": level,
        "half": half,
        "compared": compared,
        "error": _finite(float(difference[place]) / size),
        "condition": _finite(k),
        "rounding": _finite(EPS * k),
        "found": _finite(float(found.flatten()[place])),
        "wanted": _finite(float(wanted.flatten()[place])),
    }


def point(curve: str, series: str, x: float, y: float | Tensor) -> Row:
    """One point of a figure."""
    return {
        "kind": "curve",
        "curve": curve,
        "series": series,
        "x": float(x),
        "y": _finite(float(y)),
    }


def _finite(value: float) -> float:
    """JSON has no infinity; a comparison that gives one is as wrong as can be."""
    most = sys.float_info.max
    return most if value != value else max(-most, min(most, value))


# -- what is tried --------------------------------------------------------------------------------


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def data(g: torch.Generator, *shape: int) -> Tensor:
    """Channels (axis 1) of different means and spreads."""
    wide = (1, -1) + (1,) * (len(shape) - 2)
    std = (0.7 * normal(g, shape[1])).exp().reshape(wide)
    return std * (normal(g, *shape) + 2 * normal(g, shape[1]).reshape(wide))


def usable(x: Tensor) -> list[str]:
    """The backends of gammabeta that can run on this input."""
    return [name for name, backend in backends(x).items() if backend.why_not is None]


def layers(x: Tensor, *, eps: float = 1e-5, momentum: float = 0.1) -> dict[str, nn.Module]:
    """PyTorch's layer and gammabeta's, once for each backend, for input like x, in float64."""
    channels = x.shape[1]
    theirs, ours = (nn.BatchNorm1d, BatchNorm1d) if x.dim() < 4 else (nn.BatchNorm2d, BatchNorm2d)
    found: dict[str, nn.Module] = {
        f"torch.nn.{theirs.__name__}": theirs(channels, eps=eps, momentum=momentum)
    }
    for name in usable(x):
        layer = ours(channels, eps=eps, momentum=momentum, backend=name)
        found[f"gammabeta.{ours.__name__} ({name})"] = layer
    return {name: layer.double() for name, layer in found.items()}


def exact_layers(x: Tensor) -> dict[str, Callable[..., Tensor]]:
    """gammabeta.batch_norm with eps = 0, for each backend that can: no layer takes it."""

    def of(name: str) -> Callable[..., Tensor]:
        def normalize(z: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
            return batch_norm(z, gamma, beta, eps=0.0, backend=name)[0]

        return normalize

    can = [n for n in usable(x) if backends(x, eps=0.0)[n].why_not is None]
    return {f"gammabeta.batch_norm (eps 0, {name})": of(name) for name in can}


class Way(NamedTuple):
    """One way to normalize: with this eps, called as normalize(z, gamma, beta)."""

    eps: float
    normalize: Callable[[Tensor, Tensor, Tensor], Tensor]


def ways(x: Tensor, *epses: float) -> dict[str, Way]:
    """For eps = 0 the pure function, for others the layers, PyTorch's and gammabeta's."""

    def by(layer: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def normalize(z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
            y: Tensor = put(layer, weight=gamma, bias=beta)(z)
            return y

        return normalize

    found = {name: Way(0.0, function) for name, function in exact_layers(x).items()}
    for eps in epses:
        for name, layer in layers(x, eps=eps).items():
            found[f"{name}, eps {eps:g}"] = Way(eps, by(layer))
    return found


def put(layer: nn.Module, **values: Tensor) -> nn.Module:
    """Set parameters and buffers of a layer by name, in place."""
    with torch.no_grad():
        for name, value in values.items():
            getattr(layer, name).copy_(value)
    return layer


# -- the equations, as they are written -----------------------------------------------------------


def over(values: Tensor, x: Tensor) -> Tensor:
    """Values per channel, (C,), shaped to broadcast over x (N, C, ...)."""
    return values.reshape((1, -1) + (1,) * (x.dim() - 2))


def mean(x: Tensor) -> Tensor:
    """(1/m) sum x over all axes but the channels, axis 1."""
    return x.mean([0, *range(2, x.dim())])


def var(x: Tensor) -> Tensor:
    """(1/m) sum (x - mean)^2."""
    return mean((x - over(mean(x), x)) ** 2)


def xhat(x: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps)."""
    return (x - over(mean(x), x)) / over((var(x) + eps).sqrt(), x)


def cancellation(x: Tensor, eps: float = 0.0) -> Tensor:
    """1 + largest |x| / sigma: what the subtraction of the mean costs."""
    spread = over((var(x.detach()) + eps).sqrt(), x)
    return 1 + (x.detach() / spread).abs().max()
