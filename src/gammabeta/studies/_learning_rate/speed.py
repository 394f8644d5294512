"""Steps and time to reach an accuracy (the protocol is the experiment's)."""

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gammabeta._runs import Row
from gammabeta.studies._data import Images
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import (
    accuracy,
    fair_split,
    log_steps,
    pixels,
    published_split,
    stream,
    train,
)

VALIDATION = 2000
LOOKS = 40
# arm -> behind which hidden layers BN stands
ARMS = {"bn": (1, 2, 3), "none": (), "first": (1,), "second": (2,)}


def fair(arm: str, rate: float, seed: int, data: Images, steps: int, width: float) -> Iterator[Row]:
    """The network of the MNIST study, BN behind some of its layers."""
    x, y, _, _ = fair_split(data, seed, "test")
    _, _, held_x, held_y = fair_split(data, seed, "validation")
    units = round(100 * width)
    net = partly((x[0].numel(), units, units, 10), ARMS[arm], seed)
    return _run(net, x, y, held_x, held_y, data, rate, steps, 64, seed)


def published(arm: str, rate: float, seed: int, data: Images, steps: int) -> Iterator[Row]:
    """Ioffe & Szegedy's network: sigmoid, small Gaussian weights, binary pixels, batches of 60."""
    x, y, _, _ = published_split(data, seed)
    _, _, held_x, held_y = fair_split(data, seed, "validation")
    half = data.pixel_max / 2
    x, held_x = ((v > half).to(torch.uint8) * data.pixel_max for v in (x, held_x))
    generator = stream(seed, "weights")
    net = MLP((x[0].numel(), 100, 100, 100, 10), "sigmoid", arm == "bn", generator)
    for layer in net.layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.1, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return _run(net, x, y, held_x, held_y, data, rate, steps, 60, seed)


def partly(sizes: Sequence[int], behind: Sequence[int], seed: int) -> MLP:
    """A network of ReLUs with BN before some of its activations, counted from 1."""
    hidden = len(sizes) - 2
    with_bn = MLP(sizes, "relu", True, stream(seed, "weights"))
    without = MLP(sizes, "relu", False, stream(seed, "weights"))
    if not behind:
        return without
    # Blocks of both: linear, BN, ReLU; and linear, ReLU.
    layers: list[nn.Module] = []
    for k in range(hidden):
        block = with_bn.layers[3 * k : 3 * k + 3], without.layers[2 * k : 2 * k + 2]
        layers += list(block[0 if k + 1 in behind else 1].children())
    with_bn.layers = nn.Sequential(*layers, with_bn.layers[-1])
    return with_bn


def _run(
    net: MLP,
    x: Tensor,
    y: Tensor,
    held_x: Tensor,
    held_y: Tensor,
    data: Images,
    rate: float,
    steps: int,
    batch: int,
    seed: int,
) -> Iterator[Row]:
    """Validation accuracy at log-spaced steps, and the processor time of training up to there."""
    held, labels = pixels(held_x[:VALIDATION], data.pixel_max), held_y[:VALIDATION]
    training = train(
        net,
        x,
        y,
        pixel_max=data.pixel_max,
        rate=rate,
        steps=steps,
        order=stream(seed, "order"),
        stops=log_steps(steps, LOOKS, first=2),
        batch=batch,
    )
    spent, before = 0.0, time.process_time()
    for step, loss in training:
        spent += time.process_time() - before
        share = accuracy(net, held, labels)
        finite = math.isfinite(loss)
        yield {"step": step, "validation": share, "finite": finite, "cpu_time": round(spent, 4)}
        before = time.process_time()


def reached(target: float, at: Sequence[float], shares: Sequence[float]) -> tuple[float, bool]:
    """Where the accuracy first reaches the target, and whether it does.

    ``at`` is steps or seconds. Interpolated between two looks; a run that does not arrive counts
    as arriving at its end.

    >>> reached(0.9, [10, 20, 30], [0.1, 0.8, 1.0])
    (25.0, True)
    """
    for k, share in enumerate(shares):
        if share >= target:
            if k == 0:
                return float(at[0]), True
            part = (target - shares[k - 1]) / (share - shares[k - 1])
            return at[k - 1] + part * (at[k] - at[k - 1]), True
    return float(at[-1]), False
