"""Which statistics: one sample, Bessel's correction, running statistics, folding, whitening."""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import fusion

from gammabeta._runs import Row
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.layers.renorm import BatchRenorm1d
from gammabeta.layers.whiten import DecorrelatedBatchNorm1d
from gammabeta.moments import Moments
from gammabeta.ops import batch_norm
from gammabeta.studies._identities._compare import (
    RIGHT,
    TRAP,
    WORDED,
    Check,
    cancellation,
    check,
    data,
    layers,
    mean,
    normal,
    over,
    put,
    usable,
    var,
    xhat,
)


def meaningless(beta: Tensor, x: Tensor) -> Tensor:
    """What is left of one value per channel: beta, whatever the value."""
    return over(beta, x).expand_as(x)


def single_sample(g: torch.Generator) -> Iterator[Row]:
    x = 100 * normal(g, 1, 6)
    gamma, beta = normal(g, 6), normal(g, 6)
    for name in usable(x):
        y, _ = batch_norm(x, gamma, beta, backend=name)
        compared = f"gammabeta.batch_norm ({name}): the output is beta"
        yield check(RIGHT, compared, y, meaningless(beta, x))
    for name, layer in layers(x).items():
        raises = 0.0
        try:
            layer(x)
        except ValueError:
            raises = 1.0
        yield check(RIGHT, f"{name}: one sample raises ValueError", raises, 1.0)
    image = data(g, 1, 6, 4, 4)
    k = cancellation(image)
    instance = nn.InstanceNorm2d(6).double()(image)
    for name, layer in layers(image).items():
        compared = f"{name}: one image, instance normalization"
        yield check(RIGHT, compared, layer(image), instance, condition=k)
        compared = f'{name}: "one image gives beta"'
        yield check(TRAP, compared, layer(image), 0 * image, condition=k, scale=1.0)


def mean_batch_variance(variance: float, m: int) -> float:
    """E of the biased variance of m independent draws: (m - 1)/m of the population's."""
    return variance * (m - 1) / m


def bessel(g: torch.Generator) -> Iterator[Row]:
    low, high, share = (float(v) for v in normal(g, 3))
    share = 1 / (1 + math.exp(share))
    variance = (high - low) ** 2 * share * (1 - share)
    for m in (2, 4, 8, 64):
        # Channel j is the batch with j high values: all batches there are, up to their order.
        x = low + (high - low) * (torch.arange(m)[:, None] < torch.arange(m + 1)).double()
        chance = torch.tensor(
            [math.comb(m, j) * share**j * (1 - share) ** (m - j) for j in range(m + 1)],
            dtype=torch.float64,
        )
        k = 1 + max(abs(low), abs(high)) / math.sqrt(variance)
        biased = mean_batch_variance(variance, m)
        found = (chance * Moments.of(x).var()).sum()
        compared = (
            f"m = {m}, gammabeta.Moments: mean biased variance is (m-1)/m of the population's"
        )
        yield check(RIGHT, compared, found, biased, condition=k)
        for name, layer in layers(x, momentum=1.0).items():
            layer(x)
            kept = (chance * layer.get_buffer("running_var")).sum()
            compared = f"m = {m}, {name}: the mean running variance is the population's"
            yield check(RIGHT, compared, kept, variance, condition=k)
        for name in usable(x):
            keras = BatchNorm1d(m + 1, momentum=1.0, stored_variance="biased", backend=name)
            keras.double()(x)
            kept = (chance * keras.get_buffer("running_var")).sum()
            compared = f"m = {m}, gammabeta.BatchNorm1d ({name}), biased storage"
            yield check(RIGHT, f"{compared}: (m-1)/m of it", kept, biased, condition=k)
            compared = f'{compared}: "the population\'s"'
            yield check(TRAP, compared, kept, variance, condition=k)
        # A test batch normalized by its own statistics, which a layer without running ones does.
        test = data(g, m, 5)
        theirs = nn.BatchNorm1d(5, track_running_stats=False).double().eval()
        ours = BatchNorm1d(5, track_running_stats=False).double().eval()
        rest = test - mean(test)
        worded = rest / (var(test) * m / (m - 1) + 1e-5).sqrt()
        for name, layer in (("torch.nn.BatchNorm1d", theirs), ("gammabeta.BatchNorm1d", ours)):
            y, k = layer(test), float(cancellation(test))
            compared = f"m = {m}, {name}: test batch normalized"
            yield check(RIGHT, f"{compared} with 1/m", xhat(test, 1e-5), y, condition=k)
            yield check(WORDED, f"{compared} with 1/(m-1)", worded, y, condition=k)


def at_inference(x: Tensor, expected: Tensor, variance: Tensor, eps: float) -> Tensor:
    """(x - E)/sqrt(Var + eps)."""
    return (x - over(expected, x)) / over((variance + eps).sqrt(), x)


def inference_formula(g: torch.Generator) -> Iterator[Row]:
    for shape in ((48, 6), (8, 5, 3, 4)):
        x = data(g, *shape)
        expected, variance = mean(x), var(x) * 48 / 47
        k = cancellation(x)
        for name, layer in layers(x).items():
            y = put(layer, running_mean=expected, running_var=variance).eval()(x)
            right = at_inference(x, expected, variance, 1e-5)
            yield check(RIGHT, f"{name}: (x - E)/sqrt(Var + eps)", y, right, condition=k)
            wrong = (x - over(expected, x)) / over(variance, x)
            yield check(WORDED, f"{name}: (x - E)/Var", wrong, y, condition=k)
            std, one = var(wrong).sqrt(), var(y).sqrt()
            compared = f"{name}: std of the output of (x - E)/Var"
            yield check(WORDED, compared, std, one, condition=k)


def evaluate(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output in evaluation mode."""
    y: Tensor = layer.eval()(x)
    return y


def test_fixed(g: torch.Generator) -> Iterator[Row]:
    u = normal(g, 1000, 12)
    order = torch.randperm(1000, generator=g)
    w = normal(g, 8, 12)
    x = u @ w.T
    for name, layer in layers(x).items():
        put(layer, running_mean=normal(g, 8), running_var=normal(g, 8).exp())
        put(layer, weight=normal(g, 8), bias=normal(g, 8))
        layer.eval()
        y = layer(x)
        singles = torch.cat([evaluate(layer, x[i : i + 1]) for i in range(20)])
        yield check(RIGHT, f"{name}: twice", evaluate(layer, x), y)
        yield check(RIGHT, f"{name}: permuted", evaluate(layer, x[order]), y[order])
        yield check(RIGHT, f"{name}: batches of 1 for one of 1,000", singles, y[:20])
        singles = torch.cat([evaluate(layer, u[i : i + 1] @ w.T) for i in range(20)])
        k = ((u.abs() @ w.abs().T).max() + 1) / y.abs().max()
        compared = f"{name} after a dense layer: batches of 1 for one of 1,000"
        yield check(RIGHT, compared, singles, y[:20], condition=1 + k)
        state = {key: value.clone() for key, value in layer.state_dict().items()}
        evaluate(layer, x)
        moved = sum(float((layer.state_dict()[key] - v).abs().sum()) for key, v in state.items())
        yield check(RIGHT, f"{name}: evaluation changes no state", moved, 0.0)
        layer.train()
        compared = f'{name} in training mode: "the same for another batch"'
        yield check(TRAP, compared, layer(x[:20]), layer(x)[:20], condition=cancellation(x))


def new_stats_each_batch(g: torch.Generator) -> Iterator[Row]:
    common = data(g, 1, 6)
    one, two = (torch.cat((common, data(g, 15, 6))) for _ in range(2))
    k = torch.maximum(cancellation(one), cancellation(two))
    for name, layer in layers(one).items():
        a, b = layer(one)[0], layer(two)[0]
        compared = f"{name}: in training by each batch's own statistics"
        found, wanted = torch.stack((a, b)), torch.stack((xhat(one, 1e-5)[0], xhat(two, 1e-5)[0]))
        yield check(RIGHT, compared, found, wanted, condition=k)
        compared = f'{name}: "one output for the sample common to two batches"'
        yield check(TRAP, compared, a, b, condition=k)
        a, b = evaluate(layer, one)[0], evaluate(layer, two)[0]
        yield check(RIGHT, f"{name}: in evaluation one output for the sample", a, b)


def folded(
    w: Tensor, b: Tensor, gamma: Tensor, beta: Tensor, expected: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """The linear map with BN folded in: weight a w and bias a (b - E) + beta."""
    a = gamma / (variance + 1e-5).sqrt()
    return w * a.reshape((-1,) + (1,) * (w.dim() - 1)), (b - expected) * a + beta


def fold(g: torch.Generator) -> Iterator[Row]:
    images, rows = normal(g, 4, 3, 8, 8), normal(g, 16, 10)
    with torch.random.fork_rng(devices=()):
        dense, conv = (
            nn.Linear(10, 6).double().eval(),
            nn.Conv2d(3, 6, 3, padding=1).double().eval(),
        )
    for first, x in ((dense, rows), (conv, images)):
        w, b, gamma, beta = normal(g, *first.weight.shape), *normal(g, 3, 6)
        put(first, weight=w, bias=b)
        z = first(x).detach()
        expected, variance = mean(z), var(z)
        with torch.no_grad():
            sizes = put(copy.deepcopy(first), weight=w.abs(), bias=b.abs())(x.abs())
        k = sizes.max() / z.abs().max() + cancellation(z)
        weight, bias = folded(w, b, gamma, beta, expected, variance)
        plain = put(copy.deepcopy(first), weight=weight, bias=bias)(x)
        for name, layer in layers(z).items():
            put(layer, weight=gamma, bias=beta, running_mean=expected, running_var=variance)
            y, what = evaluate(layer, z), "dense" if x is rows else "convolution"
            yield check(RIGHT, f"{name}: {what}, folded by the formula", plain, y, condition=k)
            by_tool = _by_torch(first, layer)
            compared = f"{name}: {what}, folded by torch.nn.utils.fusion"
            yield check(RIGHT, compared, by_tool(x), y, condition=k)
    yield from _before_padding(g, images)


def _by_torch(first: nn.Linear | nn.Conv2d, layer: nn.Module) -> nn.Module:
    if not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        raise TypeError(f"torch folds batch normalization only, got {type(layer).__name__}.")
    if isinstance(first, nn.Linear):
        return fusion.fuse_linear_bn_eval(first, layer)
    return fusion.fuse_conv_bn_eval(first, layer)


def _before_padding(g: torch.Generator, images: Tensor) -> Iterator[Row]:
    """BN first, then a padded convolution: at the border the zeros are not normalized."""
    w = normal(g, 6, 3, 3, 3)
    for name, layer in layers(images).items():
        expected, variance = normal(g, 3), normal(g, 3).exp()
        bn = put(layer, running_mean=expected, running_var=variance).eval()
        y = nn.functional.conv2d(bn(images), w, padding=1)
        a = (variance + 1e-5).rsqrt()
        bias = -(w.sum((2, 3)) * (a * expected)).sum(1)
        found = nn.functional.conv2d(images, w * a[:, None, None], bias, padding=1)
        k = 1 + nn.functional.conv2d(bn(images).abs(), w.abs(), padding=1).max() / y.abs().max()
        inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
        compared = f"{name}: before a padded convolution, inside"
        yield check(RIGHT, compared, found[inner], y[inner], condition=k)
        compared = f'{name}: "before a padded convolution, at its border"'
        yield check(TRAP, compared, found, y, condition=k)


def renormed(x: Tensor, r: Tensor, d: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """y = gamma (xhat r + d) + beta."""
    return gamma * (xhat(x, 1e-5) * r + d) + beta


def brn_exact(g: torch.Generator) -> Iterator[Row]:
    x, dy = data(g, 32, 6), normal(g, 32, 6)
    held = {"running_mean": mean(x) + normal(g, 6), "running_var": var(x) * normal(g, 6).exp()}
    learned = {"weight": normal(g, 6), "bias": normal(g, 6)}
    gamma, beta = learned.values()
    wide = (held["running_var"] + 1e-5).sqrt()
    k = cancellation(x) + (x - held["running_mean"]).abs().max() / wide.min()
    r = (var(x) + 1e-5).sqrt() / wide
    d = (mean(x) - held["running_mean"]) / wide
    ours = layers(x)
    for backend in usable(x):
        name = f"gammabeta.BatchRenorm1d ({backend})"
        free = BatchRenorm1d(6, r_max=math.inf, d_max=math.inf, backend=backend).double()
        tight = BatchRenorm1d(6, r_max=1.0, d_max=0.0, backend=backend).double()
        z = x.clone().requires_grad_()
        y = put(free, **held, **learned)(z)
        for other, layer in ours.items():
            compared = f"{name} unclipped, training: {other} in evaluation"
            wanted = put(layer, **held, **learned).eval()(x)
            yield check(RIGHT, compared, y, wanted, condition=k)
            compared = f"{name}, r_max 1, d_max 0: {other} in training"
            wanted = put(layer, **held, **learned).train()(x)
            found = put(tight, **held, **learned)(x)
            yield check(RIGHT, compared, found, wanted, condition=k)
        wanted = renormed(x, r, d, gamma, beta)
        yield check(RIGHT, f"{name}: gamma (xhat r + d) + beta", y, wanted, condition=k)
        (dx,) = torch.autograd.grad(y, z, dy)
        n = xhat(x, 1e-5)
        scale = gamma * r / (var(x) + 1e-5).sqrt()
        wanted = scale * (dy - mean(dy) - n * mean(dy * n))
        compared = f"{name}: r and d are constants in the gradient"
        yield check(RIGHT, compared, dx, wanted, condition=k)
        compared = f'{name}: "the gradient is that of inference"'
        yield check(TRAP, compared, gamma / wide * dy, dx, condition=k)
        compared = f"{name}: the MNIST study's order, (gamma xhat + beta) r + d"
        yield check(TRAP, compared, (gamma * n + beta) * r + d, y, condition=k)


WIDTH = 100


def expected_rank(m: int, width: int) -> int:
    """min(d, m - 1)."""
    return min(width, m - 1)


def whiten_singular(g: torch.Generator) -> Iterator[Row]:
    for m in (4, 10, 50, 100, 101, 200, 400):
        x = normal(g, m, WIDTH)
        whitening = DecorrelatedBatchNorm1d(WIDTH, group_size=WIDTH).double()
        wanted = float(expected_rank(m, WIDTH))
        for name, z in (("data", x), ("gammabeta.DecorrelatedBatchNorm1d", whitening(x).detach())):
            compared = f"{name}, m = {m}: rank of the covariance is min(d, m - 1)"
            yield check(RIGHT, compared, _rank(z), wanted)
        for name, layer in layers(x).items():
            kept = (var(layer(x).detach()) > 0.5).sum()
            compared = f"{name}, m = {m}: features that keep their variance"
            yield check(RIGHT, compared, kept, float(WIDTH))
            if m <= WIDTH:
                compared = f'{name}, m = {m}: "the covariance has full rank"'
                yield check(TRAP, compared, _rank(layer(x).detach()), float(WIDTH))


def _rank(x: Tensor) -> Tensor:
    centered = x - mean(x)
    spectrum: Tensor = torch.linalg.eigvalsh(centered.T @ centered / len(x))
    return (spectrum > 1e-8 * spectrum[-1]).sum()


CHECKS: dict[str, Check] = {
    "single-sample": single_sample,
    "bessel": bessel,
    "inference-formula": inference_formula,
    "test-fixed": test_fixed,
    "new-stats-each-batch": new_stats_each_batch,
    "fold": fold,
    "brn-exact": brn_exact,
    "whiten-singular": whiten_singular,
}
