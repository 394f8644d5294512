"""The forward pass in training: what it computes, what its output is like, how it is undone."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gammabeta._runs import Row
from gammabeta.studies._identities._compare import (
    RIGHT,
    TRAP,
    WORDED,
    Check,
    cancellation,
    check,
    data,
    exact_layers,
    layers,
    mean,
    normal,
    over,
    point,
    put,
    var,
    xhat,
)

SHAPES = ((48, 6), (8, 5, 3, 4))


def affine(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """y = gamma xhat + beta."""
    return over(gamma, x) * xhat(x, eps) + over(beta, x)


def bn_forward(g: torch.Generator) -> Iterator[Row]:
    for shape in SHAPES:
        x = data(g, *shape)
        gamma, beta = normal(g, shape[1]), normal(g, shape[1])
        k = cancellation(x)
        for eps in (1e-5, 1e-3):
            for name, layer in layers(x, eps=eps).items():
                y = put(layer, weight=gamma, bias=beta)(x)
                yield check(RIGHT, f"{name}: y", y, affine(x, gamma, beta, eps), condition=k)
        for name, layer in layers(x).items():
            z = layer(x)  # gamma = 1, beta = 0
            yield check(RIGHT, f"{name}: xhat sums to 0", mean(z), 0 * mean(z), condition=k)
            share = var(x) / (var(x) + 1e-5)
            yield check(RIGHT, f"{name}: mean square of xhat", mean(z * z), share, condition=k)


def affine_fix(g: torch.Generator) -> Iterator[Row]:
    for shape in SHAPES:
        x = data(g, *shape)
        first, second = (normal(g, 2, shape[1]) for _ in range(2))
        a, c = normal(g, shape[1]).exp(), normal(g, shape[1])
        k = cancellation(x)
        for name, layer in layers(x).items():
            one = put(layer, weight=first[0], bias=first[1])(x)
            two = put(layer, weight=second[0], bias=second[1])(x)
            # Whatever gamma and beta have learned, the rest is fixed: one output is affine in the
            # other, by their gammas and betas alone.
            wanted = relearned(one, *first, *second)
            loss = (1 + (first[1] / first[0]).abs().max()) * (1 + (second / first).abs().max())
            yield check(RIGHT, f"{name}: learned maps apart", two, wanted, condition=k * loss)
            wrong = over(second[0], x) * (x - over(mean(x), x)) / over(var(x) + 1e-5, x)
            wrong = wrong + over(second[1], x)
            yield check(TRAP, f'{name}: "divided by the variance"', wrong, two, condition=k)
        moved = over(a, x) * x + over(c, x)
        for name, normalize in exact_layers(x).items():
            wider = torch.maximum(k, cancellation(moved))
            compared = f"{name}: an affine map of the input changes nothing"
            yield check(RIGHT, compared, normalize(moved), normalize(x), condition=wider)


def relearned(y: Tensor, gamma: Tensor, beta: Tensor, new: Tensor, shift: Tensor) -> Tensor:
    """What y becomes when gamma and beta become new and shift: new (y - beta)/gamma + shift."""
    return over(new, y) * (y - over(beta, y)) / over(gamma, y) + over(shift, y)


GAMMAS = (1.0, 1.5, -2.0, 0.0)


def output_std(gamma: Tensor, variance: Tensor, eps: float) -> Tensor:
    """|gamma| sigma / sqrt(sigma^2 + eps)."""
    return gamma.abs() * (variance / (variance + eps)).sqrt()


def bn_output_moments(g: torch.Generator) -> Iterator[Row]:
    variances = torch.logspace(-6, 2, 9, dtype=torch.float64)
    gamma = torch.tensor(GAMMAS, dtype=torch.float64).repeat_interleave(9)
    beta = normal(g, 36)
    base = normal(g, 64, 36)
    # of exactly these variances, up to rounding
    x = (base - mean(base)) / var(base).sqrt() * variances.repeat(4).sqrt()
    x = x + normal(g, 36) * variances.repeat(4).sqrt()
    k = cancellation(x)
    for name, normalize in exact_layers(x).items():
        y = normalize(x, gamma, beta)
        yield from _moments(name, y, gamma, beta, output_std(gamma, var(x), 0.0), k)
    for eps in (1e-5, 1e-3):
        for name, layer in layers(x, eps=eps).items():
            y = put(layer, weight=gamma, bias=beta)(x)
            std = output_std(gamma, var(x), eps)
            yield from _moments(f"{name}, eps {eps:g}", y, gamma, beta, std, k)
            if name.startswith("torch"):
                shown = var(y).detach().sqrt()[:9]
                for v, s in zip(variances, shown, strict=True):
                    yield point("output-std", f"eps {eps:g}", float(v) / eps, s)
    equal = (base - mean(base)) / var(base).sqrt() * math.sqrt(1e-3)
    for name, layer in layers(equal, eps=1e-3).items():
        y = put(layer, weight=gamma.abs() + 1, bias=beta)(equal)
        compared = f"{name}: std is gamma, at variance = eps"
        std = var(y).sqrt() / (gamma.abs() + 1)
        yield check(WORDED, compared, std, torch.ones_like(std), condition=cancellation(equal))


def _moments(
    name: str, y: Tensor, gamma: Tensor, beta: Tensor, std: Tensor, k: Tensor
) -> Iterator[Row]:
    # Relative to the output's own size: at beta = 0.01 and gamma = 2 the mean is a difference.
    measured, size = var(y).sqrt(), (gamma.abs() + beta.abs()).max()
    k = k * (1 + beta.abs().max())
    yield check(RIGHT, f"{name}: mean is beta", mean(y), beta, condition=k, scale=size)
    compared = f"{name}: std is |gamma| sigma / sqrt(sigma^2 + eps)"
    yield check(RIGHT, compared, measured, std, condition=k, scale=size)
    yield check(WORDED, f"{name}: std is gamma", measured, gamma, condition=k, scale=size)
    yield check(TRAP, f'{name}: "gamma is the mean"', mean(y), gamma, condition=k, scale=size)


def undoing(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gamma and beta that give x back: sqrt(var + eps) and the mean."""
    return (var(x) + eps).sqrt(), mean(x)


def identity_recover(g: torch.Generator) -> Iterator[Row]:
    for shape in SHAPES:
        x, other = data(g, *shape), data(g, *shape)
        for eps in (1e-5, 1e-3):
            gamma, beta = undoing(x, eps)
            for name, layer in layers(x, eps=eps).items():
                put(layer, weight=gamma, bias=beta)
                k, where = cancellation(x), f"{name}, eps {eps:g}"
                yield check(RIGHT, f"{where}: the same batch", layer(x), x, condition=k)
                yield check(TRAP, f"{where}: another batch", layer(other), other, condition=k)
                put(layer, weight=var(x).sqrt())
                compared = f'{where}: "gamma = sqrt(Var)", eps left out'
                yield check(TRAP, compared, layer(x), x, condition=k)


def read_back(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """xhat = (y - beta)/gamma."""
    return (y - over(beta, y)) / over(gamma, y)


def xhat_inverse(g: torch.Generator) -> Iterator[Row]:
    for shape in SHAPES:
        x = data(g, *shape)
        beta, one = normal(g, shape[1]), torch.ones(shape[1], dtype=torch.float64)
        z = xhat(x, 1e-5)
        for name, layer in layers(x).items():
            k = cancellation(x)
            compared = f"{name}: y is xhat at gamma 1, beta 0"
            yield check(RIGHT, compared, layer(x), z, condition=k)
            for gamma in (1.0, -2.0, 1e-8):
                y = put(layer, weight=gamma * one, bias=beta)(x)
                more = k + (beta / gamma).abs().max()
                found = read_back(y, gamma * one, beta)
                yield check(RIGHT, f"{name}: gamma {gamma:g}", found, z, condition=more)
            put(layer, weight=0 * one, bias=beta)
            # Two inputs with one output: whatever is read back is wrong for one of the two.
            same = layer(x) == layer(-x)
            found = torch.where(same, -z, z)
            compared = f"{name}: gamma 0, the inputs x and -x give one y"
            yield check(WORDED, compared, found, z, condition=k)


def uniform_range(count: int) -> float:
    """Largest |z-score| of a uniform grid: sqrt(3 (N - 1)/(N + 1)), below sqrt(3) = 1.73."""
    return math.sqrt(3 * (count - 1) / (count + 1))


def range_example(g: torch.Generator) -> Iterator[Row]:
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    shuffled = grid[torch.randperm(101, generator=g)]
    x = torch.stack((60 * grid, 200 * shuffled - 200), 1)
    k = cancellation(x)
    wanted = uniform_range(101) * (var(x) / (var(x) + 1e-5)).sqrt()
    two = torch.full_like(wanted, 2.0)
    for name, layer in layers(x).items():
        most = layer(x).abs().amax(0)
        yield check(RIGHT, f"{name}: the range is ±sqrt(3 (N-1)/(N+1))", most, wanted, condition=k)
        yield check(WORDED, f"{name}: the range is ±2", most, two, condition=k)


def bound(m: int) -> float:
    """Samuelson's inequality: |xhat| <= sqrt(m - 1)."""
    return math.sqrt(m - 1)


def samuelson(g: torch.Generator) -> Iterator[Row]:
    for m in (2, 3, 4, 8, 64):
        heavy = (normal(g, m, 200) / normal(g, m, 200)) ** 3
        outlier = torch.zeros(m, 1, dtype=torch.float64)
        outlier[0] = 1e6
        most = torch.tensor(bound(m), dtype=torch.float64)
        normalizers: dict[str, Callable[..., Tensor]] = {**exact_layers(heavy), **layers(heavy)}
        for name, normalize in normalizers.items():
            z = normalize(heavy).detach().abs().amax()
            # Below the bound is right as well: the excess alone is an error.
            k = cancellation(heavy, 1e-5)
            yield check(RIGHT, f"{name}, m = {m}: kept", torch.maximum(z, most), most, condition=k)
            if name.startswith("torch"):
                yield point("samuelson", "heavy-tailed data, training", m, z)
        reaching: dict[str, Callable[..., Tensor]] = {**exact_layers(outlier), **layers(outlier)}
        for name, normalize in reaching.items():
            z = normalize(outlier).abs().amax()
            k = cancellation(outlier, 1e-5)
            yield check(RIGHT, f"{name}, m = {m}: reached by one outlier", z, most, condition=k)
            if isinstance(normalize, nn.Module):
                # fresh running statistics: mean 0, variance 1
                normalize.get_buffer("running_mean").zero_()
                normalize.get_buffer("running_var").fill_(1)
                free = normalize.eval()(outlier).abs().amax()
                wanted = outlier.amax() / math.sqrt(1 + 1e-5)
                compared = f"{name}, m = {m}: no bound at inference"
                yield check(RIGHT, compared, free, wanted)
                yield check(TRAP, f'{name}, m = {m}: "bounded at inference"', free, most)
        yield point("samuelson", "bound sqrt(m - 1)", m, most)


def dense_vs_conv(g: torch.Generator) -> Iterator[Row]:
    dense, conv = "dense layers", "convolutions"
    for shape, half in zip(SHAPES, (dense, conv), strict=True):
        x = data(g, *shape)
        k = cancellation(x)
        for name, layer in layers(x).items():
            mine, y = xhat(x, 1e-5), layer(x)
            compared = f"{name}: one normalization per channel"
            yield check(RIGHT, compared, y, mine, condition=k)
            entries = [layer.get_buffer("running_mean"), layer.get_parameter("weight")]
            count = torch.tensor([float(e.numel()) for e in entries], dtype=torch.float64)
            wanted = torch.full_like(count, float(shape[1]))
            compared = f"{name}: statistics and gammas, one per channel"
            yield check(RIGHT, compared, count, wanted)
            if half == dense:
                one = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
                compared = f"{name}: one normalization for all activations"
                yield check(WORDED, compared, one, y, condition=k, half=half)
            else:
                compared = f"{name}: one normalization per channel"
                yield check(WORDED, compared, y, mine, condition=k, half=half)
    x = data(g, *SHAPES[1])
    gamma = normal(g, SHAPES[1][1])
    for name, layer in layers(x).items():
        put(layer, weight=gamma)
        found, wanted = layer(x.roll(1, -1)), layer(x).roll(1, -1)
        k = cancellation(x)
        yield check(RIGHT, f"{name}: commutes with a shift", found, wanted, condition=k)
    flat = x.flatten(1)
    for name, layer in layers(flat).items():
        put(layer, weight=normal(g, flat.shape[1]))
        found = layer(x.roll(1, -1).flatten(1)).reshape(x.shape)
        wanted = layer(flat).reshape(x.shape).roll(1, -1)
        compared = f'{name} on every position: "commutes with a shift"'
        yield check(TRAP, compared, found, wanted, condition=cancellation(flat))


def standardise_weights(g: torch.Generator) -> Iterator[Row]:
    u = normal(g, 32, 20)
    for name, layer in layers(normal(g, 32, 8)).items():
        with torch.random.fork_rng(devices=()):
            linear = nn.Linear(20, 8).double()
        put(linear, weight=0.3 * normal(g, 8, 20) + 0.1, bias=normal(g, 8))
        w, b = forward_pass(linear, layer, u)
        yield check(RIGHT, f"{name}: the weights stay", w, linear.weight)
        yield check(RIGHT, f"{name}: the bias stays", b, linear.bias)
        shown = torch.stack((w.mean(1), w.std(1, correction=0)))
        wanted = torch.stack((torch.zeros(8), torch.ones(8))).double()
        yield check(WORDED, f"{name}: mean and std of a node's weights, 0 and 1", shown, wanted)
        z = layer(linear(u))
        shown = torch.stack((mean(z), var(z)))
        v = var(linear(u))
        wanted = torch.stack((0 * v, v / (v + 1e-5)))
        compared = f"{name}: mean and variance of a node's values"
        yield check(RIGHT, compared, shown, wanted, condition=cancellation(linear(u)))


def forward_pass(linear: nn.Linear, layer: nn.Module, u: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and bias of the linear layer after a training forward through both."""
    before = linear.weight.detach().clone(), linear.bias.detach().clone()
    layer(linear(u))
    after = linear.weight.detach().clone(), linear.bias.detach().clone()
    put(linear, weight=before[0], bias=before[1])
    return after


CHECKS: dict[str, Check] = {
    "bn-forward": bn_forward,
    "affine-fix": affine_fix,
    "bn-output-moments": bn_output_moments,
    "identity-recover": identity_recover,
    "xhat-inverse": xhat_inverse,
    "range-example": range_example,
    "samuelson": samuelson,
    "dense-vs-conv": dense_vs_conv,
    "standardise-weights": standardise_weights,
}
