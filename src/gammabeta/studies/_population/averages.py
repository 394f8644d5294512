"""Moving averages of several decays beside precise statistics, in one training."""

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gammabeta._runs import Row
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.models.calibration import calibrate
from gammabeta.studies._data import Images
from gammabeta.studies._nets import MLP, m2
from gammabeta.studies._population.training import cosine, fit
from gammabeta.studies._train import accuracy, fair_split, pixels, stream

DECAYS = (0.9, 0.99, 0.999)
REFERENCE = 2000  # images whose statistics are the precise ones
_BATCH = 256


def column(decay: float) -> str:
    """Where a row has the accuracy by averages of a decay: 0.99 is average_99."""
    return "average_" + f"{decay:g}".removeprefix("0.")


class Averages:
    """Exponential moving averages of the batch statistics that pass through a network.

    Args:
        net: its layers have momentum 1, so that their buffers hold those of the last batch.
    """

    def __init__(self, net: MLP, decays: Sequence[float] = DECAYS) -> None:
        self.layers = [layer for layer in net.layers if isinstance(layer, BatchNorm1d)]
        self.held = {decay: torch.zeros_like(self._last()) for decay in decays}
        self.count = 0

    def _last(self) -> Tensor:
        return torch.stack([torch.stack(tuple(layer._held() or ())) for layer in self.layers])

    def update(self) -> None:
        """Enter the last batch."""
        self.count += 1
        last = self._last()
        for decay, held in self.held.items():
            held.lerp_(last, 1 - decay)

    def put(self, net: MLP, decay: float, *, started: bool) -> None:
        """Write the averages into a network of the same kind.

        started: as PyTorch keeps them, from mean 0 and variance 1; else without that start.
        """
        weight = decay**self.count
        held = self.held[decay].clone()
        if started:
            held[:, 1] += weight
        else:
            held /= 1 - weight
        layers = [layer for layer in net.layers if isinstance(layer, BatchNorm1d)]
        for layer, (mean, var) in zip(layers, held, strict=True):
            layer.load_state_dict({**layer.state_dict(), "running_mean": mean, "running_var": var})


def measure(
    seed: int, data: Images, *, rate: float, steps: int, stops: Sequence[int], images: int
) -> Iterator[Row]:
    """Train one network: accuracy by each kind of statistics after each of the steps."""
    train_x, train_y, held_x, held_y = fair_split(data, seed, "test")
    x, held = pixels(train_x, data.pixel_max), pixels(held_x[:images], data.pixel_max)
    net = m2(x.shape[1], "relu", True, stream(seed, "weights"), momentum=1.0)
    averages, reference = Averages(net), torch.split(x[:REFERENCE], 500)
    training = fit(
        net,
        x,
        train_y,
        rates=cosine(rate, steps),
        batch=min(_BATCH, len(x)),
        order=stream(seed, "order"),
    )
    for step, loss in enumerate(training, 1):
        averages.update()
        if step not in stops:
            continue
        other = copy.deepcopy(net)
        row: Row = {"step": step, "diverged": not math.isfinite(loss)}
        for decay in DECAYS:
            averages.put(other, decay, started=False)
            row[column(decay)] = accuracy(other, held, held_y[:images])
        averages.put(other, DECAYS[0], started=True)
        row["started"] = accuracy(other, held, held_y[:images])
        calibrate(other, reference)
        row["precise"] = accuracy(other, held, held_y[:images])
        yield row
