"""What depth does before any training: fluctuations of the weights, moments of activations."""

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gammabeta._runs import Row
from gammabeta.ops import batch_norm
from gammabeta.studies._data import Images
from gammabeta.studies._depth.nets import Network, Standardized, network
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import pixels, stream

NORMS = {"bn": "with BN", "none": "without"}
WHERE = ("all layers", "the first layer")
NOISE, REPEATS = 0.01, 4
# kind -> what the activation does, gain: standard deviation of the weights times sqrt(fan-in)
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "SELU": (F.selu, 1.0),
    "ReLU without": (torch.relu, math.sqrt(2)),
    "tanh without": (torch.tanh, 1.0),
    "ReLU with BN": (torch.relu, math.sqrt(2)),
}
LAYERS, WIDTH, SAMPLES = 32, 256, 1024


def noise(seed: int, images: Images, tiny: bool) -> Iterator[Row]:
    """Relative change, by layer, of what the activations receive when weights change by 1 %."""
    depth, g = (5 if tiny else 20), stream(seed, "noise")
    x = _some(images, 256, g).double()
    for arm, label in NORMS.items():
        net = network(x, Network(depth), arm, seed).double().train()
        clean = received(net, x)
        for where in WHERE:
            squares = torch.zeros(depth, dtype=torch.float64)
            for _ in range(REPEATS):
                moved = received(shaken(net, where == "the first layer", g), x)
                for k, (a, b) in enumerate(zip(clean, moved, strict=True)):
                    squares[k] += (b - a).square().sum() / a.square().sum() / REPEATS
            change = squares.sqrt()
            yield _value(f"noise in {where}, {label}", slope(change.log10()))
            for layer, size in enumerate(change, 1):
                yield _point("noise", f"noise in {where}, {label}", layer, size)


def shaken(net: MLP, first: bool, g: torch.Generator) -> MLP:
    """A copy with Gaussian noise of 1 % of their norm on its weight matrices, or on the first."""
    other = copy.deepcopy(net)
    weights = [m.weight for m in other.layers if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for w in weights[:1] if first else weights:
            change = torch.randn(w.shape, generator=g, dtype=w.dtype)
            w.add_(change, alpha=float(NOISE * w.norm() / change.norm()))
    return other


def received(net: MLP, x: Tensor) -> list[Tensor]:
    """What each activation receives in training mode."""
    found, h = [], x
    with torch.no_grad():
        for layer in net.layers:
            if isinstance(layer, nn.ReLU):
                found.append(h)
            h = layer(h)
    return found


def moments(seed: int, images: Images, tiny: bool) -> Iterator[Row]:
    """Mean and variance of activations of 32 layers, from Gaussian input and from images.

    Variance over the samples, mean over the units; with BN that of what BN gives.
    """
    layers, width = (8, 64) if tiny else (LAYERS, WIDTH)
    g = stream(seed, "moments")
    gaussian = 0.3 + math.sqrt(2) * torch.randn(SAMPLES, width, generator=g)
    real = _some(images, SAMPLES, g)
    inputs = {"Gaussian input": gaussian, "images": Standardized(real)(real)}
    start = g.get_state()
    for name, x in inputs.items():
        for kind, (activation, gain) in KINDS.items():
            g.set_state(start)
            h = x
            for layer in range(1, layers + 1):
                w = torch.randn(h.shape[1], width, generator=g)
                z = h @ w * (gain / math.sqrt(h.shape[1]))
                if kind.endswith("with BN"):
                    z, _ = batch_norm(z)
                h = activation(z)
                seen = z if kind.endswith("with BN") else h
                spread = seen.var(0, unbiased=False).mean()
                if name == "Gaussian input":
                    yield _point("moments", kind, layer, max(float(spread), 1e-12))
            yield _value(f"variance, {kind}, {name}", spread)
            yield _value(f"mean, {kind}, {name}", seen.mean())
            yield _value(f"variance over samples and units, {kind}, {name}", seen.var())


def slope(y: Tensor) -> float:
    """Least-squares slope of y over 0, 1, 2 ..."""
    x = torch.arange(len(y), dtype=y.dtype) - (len(y) - 1) / 2
    return float((x * (y - y.mean())).sum() / x.square().sum())


def _some(images: Images, count: int, g: torch.Generator) -> Tensor:
    at = torch.randint(len(images.train_x), (count,), generator=g)
    return pixels(images.train_x[at], images.pixel_max)


def _value(cell: str, number: float | Tensor) -> Row:
    return {"kind": "value", "cell": cell, "value": float(number)}


def _point(curve: str, series: str, x: float, y: float | Tensor) -> Row:
    # Drawn, not judged: four digits keep the rows small.
    return {"kind": "curve", "curve": curve, "series": series, "x": x, "y": float(f"{y:.4g}")}
