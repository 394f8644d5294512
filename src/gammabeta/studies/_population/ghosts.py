"""Small ghosts in training, and two repairs of what they leave at test."""

import copy
import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from gammabeta._runs import Row, Scalar
from gammabeta.layers.ghost import GhostBatchNorm1d
from gammabeta.models.calibration import calibrate
from gammabeta.models.freezing import freeze
from gammabeta.probes.train_eval import gap
from gammabeta.studies._data import Images
from gammabeta.studies._nets import m2
from gammabeta.studies._population.training import cosine, fit
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream

ARMS = {"m = 2": 2, "m = 4": 4, "m = 64": 64}
_BATCH = 64


def measure(
    arm: Mapping[str, Scalar], seed: int, data: Images, *, steps: int, images: int
) -> Iterator[Row]:
    """Train one network, and from 80 % of the steps on a copy with frozen statistics beside.

    `accuracy` is by the statistics of all training images, `batch` by those of test batches of m,
    `frozen` that of the copy. Tuning: `accuracy` alone.
    """
    tuning, size = arm["part"] == "tuning", ARMS[str(arm["arm"])]
    train_x, train_y, held_x, labels = fair_split(data, seed, "validation" if tuning else "test")
    x, held = pixels(train_x, data.pixel_max), pixels(held_x[:images], data.pixel_max)
    held = held[: len(held) // 64 * 64]
    labels = labels[: len(held)]

    def norm(width: int) -> nn.Module:
        return GhostBatchNorm1d(width, virtual_batch_size=size)

    net = m2(x.shape[1], "relu", norm, stream(seed, "weights"))
    rates, cut = cosine(float(arm["rate"] or 0.0), steps), round(0.8 * steps)
    stops, order = log_steps(steps, 3)[-3:], stream(seed, "order")
    loss = math.nan
    for value in fit(net, x, train_y, rates=rates[:cut], batch=_BATCH, order=order):
        loss = value
    repaired = copy.deepcopy(net)
    calibrate(repaired, torch.split(x, 1000))
    freeze(repaired)
    # Both go on with the same batches.
    ends = [stream(seed, "last order"), stream(seed, "last order")]
    both = [
        fit(n, x, train_y, rates=rates[cut:], batch=_BATCH, order=o)
        for n, o in zip((net, repaired), ends, strict=True)
    ]
    for step, (loss, other) in enumerate(zip(*both, strict=True), cut + 1):
        if step not in stops:
            continue
        ends_well = math.isfinite(loss)
        population = copy.deepcopy(net)
        row: Row = {"step": step, "diverged": not ends_well}
        if ends_well:
            calibrate(population, torch.split(x, 1000))
        row["accuracy"] = accuracy(population, held, labels)
        if not tuning and ends_well and math.isfinite(other):
            with torch.no_grad():
                logits = net.with_batch_statistics(held, size)
            row["batch"] = float((logits.argmax(1) == labels).double().mean())
            row["frozen"] = accuracy(repaired, held, labels)
            if step == steps:
                table = gap(population, torch.split(x[: 8 * _BATCH], _BATCH))
                if table.output is not None:
                    row |= {"gap": table.output.gap, "systematic": table.output.systematic}
        yield row
