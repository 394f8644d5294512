"""Deep networks before any training: gradients, ranks, spectra, one step."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row
from gammabeta.ops import batch_norm
from gammabeta.studies._data import Images
from gammabeta.studies._initialization._common import (
    Measure,
    normal,
    orthogonal,
    point,
    slope,
    value,
)
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import fair_split, pixels, stream, train

ARMS = {"with BN": True, "without": False}


def linear(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": linear,
    "ReLU": torch.relu,
    "tanh": torch.tanh,
}


def squared_gradients(
    activation: str,
    batch: int,
    width: int,
    depth: int,
    g: torch.Generator,
    *,
    orthogonal_weights: bool = False,
) -> list[float]:
    """Squared norms of dL/dh, h = W x before each BN, from the first layer to the last.

    x <- f(BN(W x)) from Gaussian input, with a random Gaussian gradient at the end.
    """
    x, before = normal(g, batch, width), []
    for _ in range(depth):
        if orthogonal_weights:
            w = orthogonal(g, width)
        else:
            w = normal(g, width, width) / math.sqrt(width)
        h = (x @ w.T).requires_grad_()
        before.append(h)
        x = ACTIVATIONS[activation](batch_norm(h, eps=1e-10)[0])
    found = torch.autograd.grad(x, before, normal(g, batch, width))
    return [float(d.square().sum()) for d in found]


def factor(squares: list[float], skipped: int = 5) -> float:
    """Mean factor per layer toward the input, without the first layers."""
    kept = squares[skipped:]
    return math.exp(math.log(kept[0] / kept[-1]) / (len(kept) - 1))


def mf_explosion(g: torch.Generator, images: Images, tiny: bool) -> Iterator[Row]:
    for batch in (8, 16, 64, 256):
        for activation in ACTIVATIONS:
            squares = squared_gradients(activation, batch, 32 if tiny else 256, 30, g)
            yield value(f"{activation}, batch {batch}", factor(squares))
            if batch == 64:
                for layer, square in enumerate(squares, 1):
                    yield point("explosion", activation, layer, math.sqrt(square / squares[-1]))


def mf_orthogonal(g: torch.Generator, images: Images, tiny: bool) -> Iterator[Row]:
    for activation in ("linear", "ReLU"):
        for batch in (8, 16, 64):
            depth = 20 if tiny else 60
            by = [
                factor(squared_gradients(activation, batch, 64, depth, g, orthogonal_weights=on))
                for on in (True, False)
            ]
            yield value(f"{activation}, batch {batch}: orthogonal", by[0])
            yield value(f"{activation}, batch {batch}: Gaussian - orthogonal", by[1] - by[0])


NAMES = {"sigmoid": "sigmoid", "tanh": "tanh", "relu": "ReLU"}


def images_of(g: torch.Generator, images: Images, batch: int) -> tuple[Tensor, Tensor]:
    """Random training images in [0, 1], float64, (batch, pixels), and their labels."""
    at = torch.randint(len(images.train_x), (batch,), generator=g)
    x = pixels(images.train_x[at].flatten(1), images.pixel_max).double()
    return x, images.train_y[at]


def vanishing_depth(g: torch.Generator, images: Images, tiny: bool) -> Iterator[Row]:
    x, y = images_of(g, images, 64)
    depth = 8 if tiny else 30
    start = g.get_state()
    for activation, name in NAMES.items():
        for arm, norm in ARMS.items():
            g.set_state(start)  # both arms from the same weights
            net = MLP((x.shape[1], *[100] * depth, 10), activation, norm, g).double()
            yield from _slope_of(net, x, y, f"{name}, {arm}", "vanishing")
    for other in (2, 5) if tiny else (2, 5, 10, 20):
        for activation, name in NAMES.items():
            for arm, norm in ARMS.items():
                g.set_state(start)
                net = MLP((x.shape[1], *[100] * other, 10), activation, norm, g).double()
                yield from _slope_of(net, x, y, f"{other} layers: {name}, {arm}")
    for scheme, std in WEIGHTS.items():
        for activation, name in NAMES.items():
            for arm, norm in ARMS.items():
                g.set_state(start)
                net = MLP((x.shape[1], *[100] * depth, 10), activation, norm, g).double()
                with torch.no_grad():
                    for layer in net.layers:
                        if isinstance(layer, nn.Linear):
                            layer.weight.copy_(normal(g, *layer.weight.shape))
                            layer.weight.mul_(std(layer.in_features, layer.out_features))
                yield from _slope_of(net, x, y, f"{scheme} weights: {name}, {arm}")


WEIGHTS: dict[str, Callable[[int, int], float]] = {
    "He": lambda fan_in, fan_out: math.sqrt(2 / fan_in),
    "Xavier": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "N(0, 0.1)": lambda fan_in, fan_out: 0.1,
}


def trained_gradients(seed: int, images: Images, tiny: bool) -> Iterator[Row]:
    """Slopes after 200 steps; both arms have the same start, batches and images."""
    depth, steps = (8, 10) if tiny else (30, 200)
    train_x, train_y, *_ = fair_split(images, seed, "test")
    x, y = images_of(stream(seed, "vanishing-depth"), images, 64)
    for activation, name in NAMES.items():
        for arm, norm in ARMS.items():
            sizes = (x.shape[1], *[100] * depth, 10)
            net = MLP(sizes, activation, norm, stream(seed, "weights"))
            for _ in train(
                net,
                train_x,
                train_y,
                pixel_max=images.pixel_max,
                rate=0.1,
                steps=steps,
                order=stream(seed, "order"),
                stops=[steps],
            ):
                pass
            label = f"{name}, {arm}"
            yield from _slope_of(net.double(), x, y, f"after {steps} steps: {label}", "trained")


def _slope_of(net: MLP, x: Tensor, y: Tensor, cell: str, curve: str = "") -> Iterator[Row]:
    """Slope of log10 of the gradient norm per layer toward the input, and its curve.

    A gradient that has underflowed to 0, or is not finite, gives no slope.
    """
    norms = [float(d.norm()) for d in layer_gradients(net, x, y)]
    if not all(0 < n < math.inf for n in norms):
        return
    logs = [math.log10(n) for n in norms]
    yield value(cell, -slope(range(len(logs)), logs))
    if curve:
        series = cell.rpartition(": ")[2]
        for layer, log in enumerate(logs, 1):
            yield point(curve, series, layer, 10 ** (log - logs[-1]))


def layer_gradients(net: MLP, x: Tensor, y: Tensor) -> list[Tensor]:
    """dL/dz of every hidden layer, z = W x, in training mode."""
    before = []
    for layer in net.train().layers:
        x = layer(x)
        if isinstance(layer, nn.Linear):
            before.append(x)
    return list(torch.autograd.grad(cross_entropy(x, y), before[:-1]))


def rank_collapse(g: torch.Generator, images: Images, tiny: bool) -> Iterator[Row]:
    width, depth = 64, 10 if tiny else 100
    start = normal(g, 128, width)
    for activation, gain in (("linear", 1.0), ("ReLU", math.sqrt(2))):
        weights = [normal(g, width, width) * gain / math.sqrt(width) for _ in range(depth)]
        for arm, norm in ARMS.items():
            x = start
            for layer, w in enumerate(weights, 1):
                h = x @ w.T
                x = ACTIVATIONS[activation](batch_norm(h, eps=1e-10)[0] if norm else h)
                if layer in (1, 2, 5, 10, 20, 50, 100):
                    yield point("rank", f"{activation}, {arm}", layer, stable_rank(x))
            yield value(f"{activation}, {arm}", stable_rank(x))


def stable_rank(x: Tensor) -> float:
    """||x||_F^2 / ||x||_2^2."""
    s = torch.linalg.svdvals(x)
    return float((s / s[0]).square().sum())


def ortho_isometry(g: torch.Generator, images: Images, tiny: bool) -> Iterator[Row]:
    width = 100
    for depth, label in ((10, ""), (20, "20 layers: ")):
        for activation, gain in (("linear", 1.0), ("tanh", 1.0), ("ReLU", math.sqrt(2))):
            spread = {}
            for kind in ("orthogonal", "Gaussian"):
                x, jacobian = normal(g, width), torch.eye(width, dtype=torch.float64)
                for _ in range(depth):
                    gaussian = normal(g, width, width) / math.sqrt(width)
                    w = gain * (orthogonal(g, width) if kind == "orthogonal" else gaussian)
                    z = (w @ x).requires_grad_()
                    x = ACTIVATIONS[activation](z)
                    (bend,) = torch.autograd.grad(x.sum(), z)
                    x, jacobian = x.detach(), bend[:, None] * (w @ jacobian)
                s = torch.linalg.svdvals(jacobian)
                logs = s[s > 1e-12 * s[0]].log()
                spread[kind] = float(logs.std())
                yield value(f"{label}{activation}: sd of ln s, {kind}", spread[kind])
            yield value(f"{label}{activation}", spread["orthogonal"] / spread["Gaussian"])


def bjorck_divergence(g: torch.Generator, images: Images, tiny: bool) -> Iterator[Row]:
    x, y = images_of(g, images, 64)
    grid = torch.logspace(-5, 4, 19 if tiny else 73, dtype=torch.float64).tolist()
    for depth in (10, 20):
        yield from _one_step(g, x, y, grid, depth)


def _one_step(
    g: torch.Generator, x: Tensor, y: Tensor, grid: list[float], depth: int
) -> Iterator[Row]:
    start, found = g.get_state(), {}
    for arm, norm in ARMS.items():
        g.set_state(start)
        net = MLP((x.shape[1], *[100] * depth, 10), "relu", norm, g).double().train()
        parameters = dict(net.named_parameters())
        before = cross_entropy(net(x), y)
        gradients = torch.autograd.grad(before, list(parameters.values()))
        ratios = []
        for step in grid:
            moved = {
                name: (p - step * d).detach()
                for (name, p), d in zip(parameters.items(), gradients, strict=True)
            }
            with torch.no_grad():
                after = cross_entropy(functional_call(net, moved, (x,)), y)
            ratio = float(after / before.detach())
            ratios.append(ratio if math.isfinite(ratio) else math.inf)
        burst = next((s for s, r in zip(grid, ratios, strict=True) if r > 1000), grid[-1])
        best = grid[ratios.index(min(ratios))]
        found[arm] = math.log10(burst), math.log10(best)
        label = f"{depth} layers: log10 of the"
        yield value(f"{label} step at which the loss grows a thousandfold, {arm}", found[arm][0])
        yield value(f"{label} best step, {arm}", found[arm][1])
        for step, ratio in zip(grid, ratios, strict=True):
            series = f"{depth} layers, {arm}"
            yield point("one-step", series, step, min(max(ratio, 1e-3), 1e6))
    for k, name in enumerate(("step of a thousandfold loss", "best step")):
        yield value(f"{depth} layers: {name}", found["with BN"][k] - found["without"][k])


MEASURES: dict[str, Measure] = {
    "vanishing-depth": vanishing_depth,
    "mf-explosion": mf_explosion,
    "mf-orthogonal": mf_orthogonal,
    "rank-collapse": rank_collapse,
    "ortho-isometry": ortho_isometry,
    "bjorck-divergence": bjorck_divergence,
}
