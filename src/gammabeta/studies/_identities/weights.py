"""The weights before BN: biases, scales, steps and whole trajectories."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad

from gammabeta._runs import Row
from gammabeta.moments import Moments
from gammabeta.ops import backends, batch_norm
from gammabeta.studies._identities._compare import (
    RIGHT,
    TRAP,
    WORDED,
    Check,
    cancellation,
    check,
    exact_layers,
    layers,
    normal,
    point,
    put,
    var,
    ways,
    xhat,
)


def preactivation(u: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """z = W u + b, what stands before BN."""
    return u @ w.T + b


def bias_removed(g: torch.Generator) -> Iterator[Row]:
    u, w, dy = normal(g, 32, 10), normal(g, 6, 10), normal(g, 32, 6)
    b = (3 * normal(g, 6)).requires_grad_()
    z, none = preactivation(u, w, b), u @ w.T
    k = torch.maximum(cancellation(z), cancellation(none))
    for name, layer in layers(z).items():
        put(layer, weight=normal(g, 6), bias=normal(g, 6))
        y, without = layer(z), layer(none)
        compared = f"{name}, training: the output with and without the bias"
        yield check(RIGHT, compared, y, without, condition=k)
        (slope,) = grad(y, b, dy, retain_graph=True)
        (dz,) = grad(y, z, dy)
        compared = f"{name}, training: the bias has no gradient"
        size = dz.abs().sum(0).max()
        yield check(RIGHT, compared, slope, 0 * slope, condition=k, scale=size)
        put(layer, running_mean=torch.zeros(6), running_var=torch.ones(6)).eval()
        compared = f'{name}, evaluation, before the running mean has followed: "no bias"'
        yield check(TRAP, compared, layer(z), layer(none), condition=k)
    for name, layer in layers(u).items():
        n = layer(u)
        with_b, without = torch.sigmoid(n @ w.T + b), torch.sigmoid(n @ w.T)
        compared = f"{name}: sigma(W BN(x) + b) with and without the bias"
        yield check(WORDED, compared, with_b, without, condition=k)


def radial(s: Tensor, variance: Tensor, eps: float) -> Tensor:
    """<w, dL/dw> = gamma sum(g xhat) eps / (variance + eps): 0 at eps = 0."""
    return s * eps / (variance + eps)


def weight_pythagoras(g: torch.Generator) -> Iterator[Row]:
    u, start, dy = normal(g, 64, 10), normal(g, 6, 10), normal(g, 64, 6)
    gamma, rate = normal(g, 6), 0.1
    for name, (eps, normalize) in ways(u @ start.T, 1e-5, 1e-3).items():
        # a variance of about 0.1, where eps = 1e-3 shows
        w = (0.1 * start).requires_grad_()
        z = u @ w.T
        dw, dz = grad(normalize(z, gamma, 0 * gamma), (w, z), dy)
        lengths = w.norm(dim=1) * dw.norm(dim=1)
        found = (w * dw).sum(1) / lengths
        along = radial(gamma * (dy * xhat(z, eps)).sum(0), var(z), eps)
        k = cancellation(z) * ((dz.abs().T @ u.abs()).norm(dim=1) / dw.norm(dim=1)).max()
        compared = f"{name}: cosine of w and its gradient"
        yield check(RIGHT, compared, found, along / lengths, condition=k, scale=1.0)
        after = (w - rate * dw).norm(dim=1) ** 2
        wanted = grown(w, dw, rate) - 2 * rate * along
        yield check(RIGHT, f"{name}: squared norm after a step", after, wanted, condition=k)
        if eps == 1e-3:
            compared = f'{name}: "orthogonal" in spite of eps'
            yield check(TRAP, compared, found, 0 * found, condition=k, scale=1.0)


def grown(w: Tensor, dw: Tensor, rate: float) -> Tensor:
    """||w||^2 + lr^2 ||dw||^2, per unit."""
    return w.square().sum(1) + rate**2 * dw.square().sum(1)


def equivalent_eps(eps: float, a: float) -> float:
    """BN of a W u with eps is BN of W u with eps / a^2."""
    return eps / a**2


def scale_invariance(g: torch.Generator) -> Iterator[Row]:
    u, w, dy = normal(g, 64, 10).requires_grad_(), normal(g, 6, 10), normal(g, 64, 6)
    gamma, beta = normal(g, 6), normal(g, 6)
    x = u @ w.T
    k = cancellation(x) * (1 + (u.abs() @ w.abs().T).max() / x.abs().max())
    for name, (eps, normalize) in ways(x, 1e-5, 1e-3).items():
        for a in (1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3):
            scaled = (a * w).requires_grad_()
            y = normalize(u @ scaled.T, gamma, beta)
            du, dw = grad(y, (u, scaled), dy)
            same = gamma * xhat(x, equivalent_eps(eps, a)) + beta
            plain = w.clone().requires_grad_()
            other = gamma * xhat(u @ plain.T, equivalent_eps(eps, a)) + beta
            wanted_u, wanted_w = grad(other, (u, plain), dy)
            where = f"{name}, a = {a:g}"
            yield check(RIGHT, f"{where}: output", y, same, condition=k)
            yield check(RIGHT, f"{where}: gradient of the input", du, wanted_u, condition=k)
            compared = f"{where}: a times the gradient of the weights"
            yield check(RIGHT, compared, a * dw, wanted_w, condition=k)
            unscaled = gamma * xhat(x, eps) + beta
            if eps and a < 1 and name.startswith("torch"):
                moved = (y - unscaled).detach().abs() / gamma.abs()
                yield point("scale", f"eps {eps:g}", a, moved.max())
            if eps and a == 1e-3:
                compared = f'{where}: "blind to the scale" in spite of eps'
                yield check(TRAP, compared, y, unscaled, condition=k)


STEPS, RATE = 500, 0.1


def drift(start: Tensor, slope: Tensor, rate: float, steps: int) -> Tensor:
    """Gradient descent along a gradient that never changes: start - steps rate slope."""
    return start - steps * rate * slope


def detach_explodes(g: torch.Generator) -> Iterator[Row]:
    u, weight = normal(g, 32, 4), normal(g, 32, 4)
    ones = torch.ones(4, dtype=torch.float64)
    for name, normalize in _detached(u).items():
        where, start = f"{name}, statistics detached", normal(g, 4)
        path = _path(normalize, weight, u, start, shift=True)
        last = path[-1]
        k = STEPS * (1 + (u + last.value).abs().max() / var(u).sqrt().min())
        wanted = drift(start, path[0].slope, RATE, STEPS)
        yield check(RIGHT, f"{where}: the bias after 500 steps", last.value, wanted, condition=k)
        yield check(RIGHT, f"{where}: the loss stays", last.loss, path[0].loss, condition=k)
        if name.startswith("torch"):
            yield from _distances("statistics detached", path)
        # A scale: its gradient is C/a with a constant C, so that a^2 moves by -2 lr C a step.
        # The loss is signed so that it grows.
        c = _path(normalize, weight, u, ones, shift=False, steps=0)[0].slope
        path = _path(normalize, -c.sign() * weight, u, ones, shift=False)
        last, wanted, k = path[-1], ones, STEPS * cancellation(u)
        for _ in range(STEPS):
            wanted = wanted + RATE * c.abs() / wanted
        yield check(RIGHT, f"{where}: a scale after 500 steps", last.value, wanted, condition=k)
        yield check(RIGHT, f"{where}: the loss stays", last.loss, path[0].loss, condition=k)
        compared = f'{where}: "a scale before BN stays"'
        yield check(TRAP, compared, last.value, ones, condition=k)
    for name, layer in layers(u).items():
        start = normal(g, 4)
        path = _path(layer, weight, u, start, shift=True)
        k = STEPS * (1 + (u + start).abs().max() / var(u).sqrt().min())
        compared = f"{name}, full gradient: the bias stays"
        yield check(RIGHT, compared, path[-1].value, start, condition=k)
        if name.startswith("torch"):
            yield from _distances("full gradient", path)


def _detached(u: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Normalization by the batch's statistics, through which no gradient flows; eps = 0."""

    def ours(name: str) -> Callable[[Tensor], Tensor]:
        return lambda z: batch_norm(z, moments=Moments.of(z), eps=0.0, backend=name)[0]

    def theirs(z: Tensor) -> Tensor:
        mean, variance = z.detach().mean(0), z.detach().var(0, correction=0)
        return torch.nn.functional.batch_norm(z, mean, variance, eps=0.0)

    given = Moments.of(u)
    can = [n for n, b in backends(u, moments=given, eps=0.0).items() if b.why_not is None]
    found = {f"gammabeta.batch_norm ({name})": ours(name) for name in can}
    return {"torch.nn.functional.batch_norm": theirs, **found}


class Stop(NamedTuple):
    """A place on the way of gradient descent."""

    value: Tensor
    loss: Tensor
    slope: Tensor


def _path(
    normalize: Callable[..., Tensor],
    weight: Tensor,
    u: Tensor,
    start: Tensor,
    *,
    shift: bool,
    steps: int = STEPS,
) -> list[Stop]:
    """Gradient descent on v in sum(weight sigmoid(BN(u + v))), or of BN(v u): all its places."""
    value, found = start, []
    for _ in range(steps + 1):
        v = value.clone().requires_grad_()
        loss = (weight * torch.sigmoid(normalize(u + v if shift else v * u))).sum()
        (slope,) = grad(loss, v)
        found.append(Stop(value, loss.detach(), slope))
        value = value - RATE * slope
    return found


def _distances(name: str, path: Sequence[Stop]) -> Iterator[Row]:
    for step in range(0, STEPS + 1, 50):
        yield point("detach", name, step, (path[step].value - path[0].value).abs().mean())


def growing_rate(rate: float, decay: float, step: int) -> float:
    """lr (1 - lr wd)^(-2t - 1): what plays the part of weight decay, at step t = 0, 1, ..."""
    return rate * (1 - rate * decay) ** (-2 * step - 1)


class Task(NamedTuple):
    """Two layers, each before a BN, fitted to targets; `normalize` is called with z and eps."""

    u: Tensor
    target: Tensor
    normalize: Callable[[Tensor, float], Tensor]

    def output(self, weights: Sequence[Tensor], eps: float) -> Tensor:
        first, second = weights
        hidden = torch.tanh(self.normalize(self.u @ first.T, eps))
        return self.normalize(hidden @ second.T, eps)

    def trained(
        self,
        weights: Sequence[Tensor],
        rates: Sequence[float],
        epses: Sequence[float],
        decay: float = 0.0,
    ) -> Tensor:
        """Output after gradient descent; `epses` is one longer, for that output."""
        for rate, eps in zip(rates, epses[:-1], strict=True):
            leaves = [w.clone().requires_grad_() for w in weights]
            loss = ((self.output(leaves, eps) - self.target) ** 2).mean()
            slopes = grad(loss, leaves)
            weights = [
                (1 - rate * decay) * w - rate * s for w, s in zip(weights, slopes, strict=True)
            ]
        return self.output(weights, epses[-1])


def exp_lr(g: torch.Generator) -> Iterator[Row]:
    u, target = normal(g, 64, 12), normal(g, 64, 6)
    start = [normal(g, 8, 12), normal(g, 6, 8)]
    near = [start[0] * (1 + 1e-9 * normal(g, 8, 12)), start[1]]
    rate, decay, steps = 0.1, 0.05, 200
    shrink = 1 - rate * decay
    constant = [rate] * steps
    rates = [growing_rate(rate, decay, t) for t in range(steps)]
    for name, (eps, normalize) in _with_any_eps(u, start).items():
        task = Task(u, target, normalize)
        same = [eps] * (steps + 1)
        decayed = task.trained(start, constant, same, decay)
        moved = task.trained(near, constant, same, decay) - decayed
        k = 1 + moved.abs().max() / decayed.abs().max() / 1e-9
        # eps is a scale as well: as the weights grow it has to grow with their square.
        growing = [eps * shrink ** (-2 * t) for t in range(steps + 1)]
        found = task.trained(start, rates, growing)
        compared = f"{name}: the network after 200 steps"
        yield check(RIGHT, compared, found, decayed, condition=k)
        if eps:
            compared = f'{name}: "the same" with an eps that stays'
            found = task.trained(start, rates, same)
        else:
            compared = f'{name}: "the rate grows as the weights shrink", once'
            found = task.trained(start, [rate * shrink**-t for t in range(steps)], same)
        yield check(TRAP, compared, found, decayed, condition=k)


def _with_any_eps(
    u: Tensor, weights: Sequence[Tensor]
) -> dict[str, tuple[float, Callable[[Tensor, float], Tensor]]]:
    """The function at eps = 0, and the layers at 1e-5, which may change."""

    def pure(name: str) -> Callable[[Tensor, float], Tensor]:
        exact = exact_layers(u)[name]
        return lambda z, eps: exact(z)

    def layered(name: str) -> Callable[[Tensor, float], Tensor]:
        by_width = {len(w): layers(u[:, :1].expand(-1, len(w)))[name] for w in weights}

        def normalize(z: Tensor, eps: float) -> Tensor:
            layer = by_width[z.shape[1]]
            vars(layer)["eps"] = eps
            y: Tensor = layer(z)
            return y

        return normalize

    found = {name: (0.0, pure(name)) for name in exact_layers(u)}
    return found | {f"{name}, eps 1e-05": (1e-5, layered(name)) for name in layers(u)}


def expansion(w: Tensor, step: Tensor) -> list[Tensor]:
    """The change of w1 ... wL under w + step, by order: sums over subsets of the layers."""
    depth = len(w)
    orders = [torch.zeros((), dtype=torch.float64) for _ in range(depth)]
    for size in range(1, depth + 1):
        for subset in itertools.combinations(range(depth), size):
            factors = [step[i] if i in subset else w[i] for i in range(depth)]
            orders[size - 1] = orders[size - 1] + torch.stack(factors).prod()
    return orders


def chain_expansion(g: torch.Generator) -> Iterator[Row]:
    for depth in (2, 4, 8):
        w = (1 + 0.3 * normal(g, depth)).requires_grad_()
        x, target = 1.0 + float(normal(g, 1).abs()), float(normal(g, 1)) - 2.0
        y = x * w.prod()
        loss = (y - target) ** 2 / 2
        (slope,) = grad(loss, w)
        w, y, loss = w.detach(), y.detach(), loss.detach()
        for move in (1e-3, 1e-2, 0.1, 1.0):  # length of the step relative to that of the weights
            step = -move * w.norm() / slope.norm() * slope
            orders = torch.stack(expansion(w, step)) * x
            change = x * ((w + step).prod() - w.prod())
            exact = (y - target) * orders.sum() + orders.sum() ** 2 / 2
            later = (x * (w + step).prod() - target) ** 2 / 2
            after = later - loss
            size = x * (w.abs() + step.abs()).prod()
            k = depth * (1 + size / change.abs())
            where = f"depth {depth}, step {move:g} of the weights"
            compared = f"{where}: sum over all subsets of layers"
            yield check(RIGHT, compared, orders.sum(), change, condition=k)
            compared = f"{where}: the change of the loss"
            slopes = (y - target).abs() + change.abs()
            more = 1 + (loss + later + depth * slopes * (size + change.abs())) / after.abs()
            yield check(RIGHT, compared, exact, after, condition=more)
            first = (slope * step).sum()
            compared = f'{where}: "the loss changes by what the gradient says"'
            yield check(TRAP, compared, first, after, condition=more)
            if depth == 4:
                shares = orders.abs() / orders.abs().sum()
                for order, share in enumerate(shares, 1):
                    yield point("chain", f"order {order}", move, share)
    yield from _between(g)


def _between(g: torch.Generator) -> Iterator[Row]:
    """BN after each of the neurons: the weights before it leave its output up to the sign."""
    x = normal(g, 32, 1)
    one, nil = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for name, (eps, normalize) in ways(x, 1e-5).items():
        for depth in (2, 4, 8):
            value, share, sign = x, var(x), 1.0
            for w in (float(v) for v in normal(g, depth - 1)):
                value = normalize(w * value, one, nil)
                # variance of what comes out; eps takes a little at each layer
                share, sign = w**2 * share / (w**2 * share + eps), sign * math.copysign(1, w)
            wanted = sign * share.sqrt() * xhat(x, 0.0)
            compared = f"{name}, depth {depth}: unchanged up to sign"
            k = depth * cancellation(x)
            yield check(RIGHT, compared, value, wanted, condition=k)


CHECKS: dict[str, Check] = {
    "bias-removed": bias_removed,
    "weight-pythagoras": weight_pythagoras,
    "detach-explodes": detach_explodes,
    "scale-invariance": scale_invariance,
    "exp-lr": exp_lr,
    "chain-expansion": chain_expansion,
}
