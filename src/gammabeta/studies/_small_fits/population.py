"""Batch statistics of a trained network, beside those of all its training images."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gammabeta._runs import Row
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.studies._data import Images
from gammabeta.studies._nets import MLP, m2
from gammabeta.studies._small_fits._common import point, slope, value
from gammabeta.studies._train import fair_split, pixels, stream, train

RESAMPLES = 100
DECAYS = (0.9, 0.99, 0.999)


def trained(seed: int, images: Images, tiny: bool) -> tuple[MLP, Tensor]:
    """The network of the MNIST study with ReLU and BN after a short training, and all its images.

    The population: the images from which those of the training were drawn, (N, pixels).
    """
    train_x, train_y, *_ = fair_split(images, seed, "test")
    net = m2(train_x.flatten(1).shape[1], "relu", True, stream(seed, "weights"))
    steps = 20 if tiny else 300
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
    return net, pixels(images.train_x[:55000], images.pixel_max)


def before_norms(net: MLP, x: Tensor) -> list[Tensor]:
    """What enters each BN, (N, units) each, with statistics of the whole of x."""
    found = []
    with torch.no_grad():
        for layer in net.train().layers:
            if isinstance(layer, BatchNorm1d):
                found.append(x)
                mean, var = x.mean(0), x.var(0, correction=0)
                x = (x - mean) * (var + layer.eps).rsqrt() * layer.weight + layer.bias
            else:
                x = layer(x)
    return found


def sizes(most: int, population: int) -> list[int]:
    """Batch sizes 4, 8 ... up to ``most``, at most a quarter of the population."""
    return [2**k for k in range(2, 13) if 2**k <= min(most, population // 4)]


def lln(seed: int, images: Images, tiny: bool) -> Iterator[Row]:
    net, x = trained(seed, images, tiny)
    g = stream(seed, "resamples")
    inputs = before_norms(net, x)
    count, batches = len(x), sizes(4096, len(x))
    z = torch.cat(inputs, 1)
    mean, var = z.mean(0), z.var(0, correction=0)
    fourth = (z - mean).pow(4).mean(0)
    kurtosis = fourth / var.square()
    means: dict[int, list[Tensor]] = {m: [] for m in batches}
    variances: dict[int, list[Tensor]] = {m: [] for m in batches}
    # Batches of all sizes from one random order do not overlap: draws without replacement.
    whole = sum(batches) <= count
    for _ in range(20 if tiny else RESAMPLES):
        order = torch.randperm(count, generator=g)
        begin = 0
        for m in batches:
            if not whole:
                order, begin = torch.randperm(count, generator=g), 0
            part = z[order[begin : begin + m]] - mean
            begin += m
            means[m].append(part.mean(0))
            variances[m].append(part.var(0, correction=0))
    units = z.shape[1] // 2
    for layer in (1, 2):
        at = slice((layer - 1) * units, layer * units)
        logs: dict[str, list[float]] = {"mean": [], "variance": []}
        for m in batches:
            left = (count - m) / (count - 1)  # drawn without replacement
            wanted = {
                "mean": (left / m) ** 0.5,
                # of the biased variance of m independent values, in units of var
                "variance": ((m - 1) / m)
                * ((kurtosis[at] - (m - 3) / (m - 1)) / m * left).clamp(min=0).sqrt(),
            }
            measured = {
                "mean": torch.stack(means[m])[:, at].square().mean(0).sqrt() / var[at].sqrt(),
                "variance": torch.stack(variances[m])[:, at].std(0) / var[at],
            }
            for name, spread in measured.items():
                logs[name].append(float((spread / wanted[name]).log().mean()))
                yield point("spread", f"{name}, layer {layer}", m, spread.log().mean().exp())
        for name, ratios in logs.items():
            off = slope([math.log(m) for m in batches], ratios)
            yield value(f"layer {layer}: slope of the spread of the {name}", off - 0.5)
    yield from _moving_average(z, var, g, tiny)


def _moving_average(z: Tensor, var: Tensor, g: torch.Generator, tiny: bool) -> Iterator[Row]:
    """Variance of the moving average of batch means (m = 8) over that of a batch mean.

    From many short chains beside one another: each starts at the population's mean, and after t
    steps has (1 - rho)/(1 + rho) (1 - rho^2t) of the variance, which is divided out.
    """
    mean, m = z.mean(0), 8
    total = 400 if tiny else 4000
    for decay in DECAYS:
        steps = min(total, max(20, round(1 / (1 - decay))))
        chains = min(total // steps * 4, 200)
        weights = (1 - decay) * decay ** torch.arange(steps - 1, -1, -1.0)
        ends = []
        for _ in range(chains):
            at = torch.randint(len(z), (steps, m), generator=g)
            batches = z[at.flatten()].view(steps, m, -1).mean(1)
            ends.append(weights @ (batches - mean))
        reached = 1 - decay ** (2 * steps)
        wanted = (1 - decay) / (1 + decay) * reached * var / m
        ratio = (torch.stack(ends).square().mean(0) / wanted).mean()
        yield value(f"decay {decay:g}: variance of the moving average over the formula", ratio)
        yield value(f"decay {decay:g}: share of the start left after {steps} steps",
                    1 - weights.sum())  # fmt: skip


def minibatch_statistics(seed: int, images: Images, tiny: bool) -> Iterator[Row]:
    net, x = trained(seed, images, tiny)
    g = stream(seed, "resamples")
    inputs, count = before_norms(net, x), len(x)
    norms = [layer for layer in net.layers if isinstance(layer, BatchNorm1d)]
    batches = sizes(1024, count)
    population = [(z.mean(0), z.var(0, correction=0)) for z in inputs]
    logs: dict[int, list[float]] = {1: [], 2: []}
    with torch.no_grad():
        for m in batches:
            squares: dict[int, list[Tensor]] = {1: [], 2: []}
            agreed: list[float] = []
            for _ in range(10 if tiny else max(20, min(RESAMPLES, 8192 // m))):
                at = torch.randperm(count, generator=g)[:m]
                for layer, (z, (mean, var), norm) in enumerate(
                    zip(inputs, population, norms, strict=True), 1
                ):
                    batch = z[at]
                    own = (batch - batch.mean(0)) * (
                        batch.var(0, correction=0) + norm.eps
                    ).rsqrt()  # fmt: skip
                    all_of = (batch - mean) * (var + norm.eps).rsqrt()
                    squares[layer].append((own - all_of).square().mean(0))
                agreed.append(_agreement(net, x[at], population))
            for layer, found in squares.items():
                mean, var = population[layer - 1]
                rms = torch.stack(found).mean(0).sqrt()
                kurtosis = (inputs[layer - 1] - mean).pow(4).mean(0) / var.square()
                wanted = theory(kurtosis, m, count)
                logs[layer].append(float((rms / wanted).log().mean()))
                yield point("difference", f"layer {layer}, measured", m, rms.log().mean().exp())
                yield point("difference", f"layer {layer}, theory", m, wanted.log().mean().exp())
            if m in (4, 64, 1024):
                yield value(f"m = {m}: same predicted class", sum(agreed) / len(agreed))
                yield value(f"m = {m}: rms difference, layer 1", rms_of(squares[1]))
    for layer, ratios in logs.items():
        off = slope([math.log(m) for m in batches], ratios)
        yield value(f"layer {layer}: slope of the rms difference", off - 0.5)


def rms_of(squares: Sequence[Tensor]) -> float:
    return float(torch.stack(list(squares)).mean().sqrt())


def theory(kurtosis: Tensor, m: int, count: int) -> Tensor:
    """RMS difference between values normalized by their batch and by the population, in a batch.

    Exactly it is sqrt(2 (1 - E[sigma_B / sigma])), whatever the distribution. To first order in
    1/m, 2 (1 - E[sigma_B / sigma]) = (1 + (kurtosis - 1)/4)/m; the higher orders are taken from
    the Gaussian, where E[sigma_B / sigma] = sqrt(2/m) Gamma(m/2)/Gamma((m - 1)/2); drawn without
    replacement from a population of ``count``, (count - m)/(count - 1) of it.
    """
    ratio = math.sqrt(2 / m) * math.exp(math.lgamma(m / 2) - math.lgamma((m - 1) / 2))
    higher = 2 * (1 - ratio) / (1.5 / m)
    square = (1 + (kurtosis - 1) / 4) / m * higher * (count - m) / (count - 1)
    found: Tensor = square.sqrt()
    return found


def _agreement(net: MLP, x: Tensor, population: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Share of samples with the same predicted class under both statistics."""
    own, of_all, number = x, x, 0
    for layer in net.layers:
        if isinstance(layer, BatchNorm1d):
            (mean, var), number = population[number], number + 1
            gamma, beta, eps = layer.weight, layer.bias, layer.eps
            batch_var = own.var(0, correction=0)
            own = (own - own.mean(0)) * (batch_var + eps).rsqrt() * gamma + beta
            of_all = (of_all - mean) * (var + eps).rsqrt() * gamma + beta
        else:
            own, of_all = layer(own), layer(of_all)
    return float((own.argmax(1) == of_all.argmax(1)).double().mean())
