"""How far the inputs of a layer move during training (the protocol is the experiment's)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gammabeta._runs import Row
from gammabeta.studies._data import Images
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train

PROBE = 1000
DENSITY_SEEDS = 3
EDGE, BINS = 12.0, 96  # of the density: from -EDGE to EDGE
SPREAD = 0.1  # standard deviation of the weights
# Below this a unit is constant, up to rounding: its drift is not divided by nothing.
_LEAST = 1e-6


def m3(pixels: int, norm: bool, generator: torch.Generator) -> MLP:
    """Ioffe & Szegedy's network: three hidden layers of 100 sigmoids, Gaussian weights."""
    net = MLP((pixels, 100, 100, 100, 10), "sigmoid", norm, generator)
    with torch.no_grad():
        for layer in net.layers:
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0, SPREAD, generator=generator)
                if layer.bias is not None:
                    layer.bias.zero_()
    return net


def binary(images: Tensor, pixel_max: int) -> Tensor:
    """1 where a pixel is brighter than half, else 0, as uint8."""
    return (images > pixel_max / 2).to(torch.uint8)


def measure(
    part: str, norm: bool, rate: float, seed: int, data: Images, steps: int, images: int
) -> Iterator[Row]:
    """Rows of accuracy at the end; in the main parts also the drift over each tenth of training."""
    mnist = data.name == "mnist"
    evaluation = "validation" if part == "tuning" else "test"
    train_x, train_y, held_x, held_y = fair_split(data, seed, evaluation)
    if mnist:
        train_x, train_y = data.train_x[:55000], data.train_y[:55000]
    train_x, held_x = binary(train_x, data.pixel_max), binary(held_x, data.pixel_max)[:images]
    held, held_y = pixels(held_x, 1), held_y[:images]
    # The probe is never trained on; on MNIST it is the same for all seeds.
    probe = pixels(binary(data.train_x[55000 : 55000 + PROBE], data.pixel_max), 1)
    probe = probe if mnist else held
    net = m3(held.shape[1], norm, stream(seed, "weights"))
    ends = log_steps(steps, 3)[-3:]
    tenths = [] if part == "tuning" else [round(steps * k / 10) for k in range(1, 11)]
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=1,
        rate=rate,
        steps=steps,
        order=stream(seed, "order"),
        stops={*tenths, *ends},
        batch=60,
    )
    drawn = part == "fair" and seed < DENSITY_SEEDS
    if drawn:
        yield from density(net, probe, norm, 0)
    if drawn and seed == 0:
        yield from sigmoid(norm)
    before: tuple[Tensor, Tensor] | None = None
    for step, loss in training:
        row: Row = {"kind": "run", "step": step, "diverged": not math.isfinite(loss)}
        if step in ends:
            row["accuracy"] = accuracy(net, held, held_y)
        if step in tenths:
            now = last_hidden(net, probe)
            if before is not None:
                row["drift"] = drift(before[1], now[1])
                row["drift_of_sigmoid_inputs"] = drift(before[0], now[0])
                row["drift_of_shape"] = drift(standardized(before[1]), standardized(now[1]))
                row["drift_of_correlations"] = turned(before[1], now[1])
            before = now
        yield row
        if drawn and step in tenths:
            yield from density(net, probe, norm, step)


def last_hidden(net: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of the last activation, by running statistics, in float64."""
    mode = net.training
    inputs = x
    with torch.no_grad():
        try:
            net.eval()
            for layer in list(net.layers)[:-1]:
                inputs, x = x, layer(x)
        finally:
            net.train(mode)
    return inputs.double(), x.double()


def sigmoid_inputs(net: MLP, x: Tensor) -> Tensor:
    """Inputs of the last activation, normalized as in training: by the statistics of x itself.

    Running statistics know nothing before the first step.
    """
    found: list[Tensor] = []
    last = net.layers[-2]
    hook = last.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        with torch.no_grad():
            net.with_batch_statistics(x)
    finally:
        hook.remove()
    return found[0]


def density(net: MLP, x: Tensor, norm: bool, step: int) -> Iterator[Row]:
    """Density of the inputs of the last sigmoids, over all units and images, on a fixed grid."""
    z = sigmoid_inputs(net, x).flatten()
    counts = torch.histc(z[z.abs() < EDGE], BINS, -EDGE, EDGE)
    for place, share in zip(_places(), (counts / len(z)).tolist(), strict=True):
        yield _point(norm, "density", place, share * BINS / (2 * EDGE), step)


def sigmoid(norm: bool) -> Iterator[Row]:
    for x in _places():
        yield _point(norm, "sigmoid", x, 1 / (1 + math.exp(-x)), None)


def _places() -> list[float]:
    return [-EDGE + 2 * EDGE * (k + 0.5) / BINS for k in range(BINS)]


def _point(norm: bool, series: str, x: float, y: float, at: int | None) -> Row:
    panel = "with batch normalization" if norm else "without"
    place: Row = {"kind": "curve", "curve": "sigmoid-inputs", "panel": panel, "at": at}
    return {**place, "series": series, "x": x, "y": round(y, 5)}


def drift(before: Tensor, after: Tensor) -> float:
    """Mean over units of the Wasserstein-1 distance, in standard deviations of the unit.

    In one dimension W1 of two samples of equal size is the mean distance of their sorted values.
    The standard deviation is the root of the mean of both variances.
    """
    distance = (before.sort(0).values - after.sort(0).values).abs().mean(0)
    spread = ((before.var(0, correction=0) + after.var(0, correction=0)) / 2).sqrt()
    return _finite((distance / spread.clamp_min(_LEAST)).mean())


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0, correction=0).clamp_min(_LEAST)


def turned(before: Tensor, after: Tensor) -> float:
    """Frobenius norm of the change of the correlation matrix, relative to the earlier one."""
    a, b = (standardized(x).T @ standardized(x) / len(x) for x in (before, after))
    return _finite((a - b).norm() / a.norm().clamp_min(_LEAST))


def _finite(value: Tensor) -> float:
    """A diverged run has no distance: it counts as having moved all the way."""
    return float(torch.nan_to_num(value, nan=1e6, posinf=1e6))
