"""Inputs whose distribution changes during training (the protocol is the experiment's)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gammabeta._runs import Row
from gammabeta.studies._covariate_shift.deep import varied
from gammabeta.studies._data import Images
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train

BATCH = 64
# name -> largest change of the random kind; period of the slow kind, in epochs (0: constant)
RANDOM = {"clean": 0.0, "random 0.25": 0.25, "random 0.5": 0.5, "random": 1.0}
SLOW = {"final": 0.0, "slow 0.5": 0.5, "slow": 1.0, "slow 4": 4.0}


class Changed(nn.Module):
    """Images times a scale plus a shift, which change from one mini-batch to the next.

    Random: scale 1 + 0.5 u U(-1, 1), shift 0.5 u U(-1, 1), one draw each for a batch; in eval mode
    the images as they are. Slow: scale 1 to 2 and shift 0 to 1 and back, together, a cosine of so
    many steps; at the last step, and in eval mode, scale 2 and shift 1.
    """

    def __init__(self, arm: str, draw: torch.Generator, steps: int, epoch: int) -> None:
        super().__init__()
        self.arm, self.draw, self.steps, self.epoch, self.seen = arm, draw, steps, epoch, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        scale, shift = self.now()
        return x * scale + shift

    def now(self) -> tuple[float, float]:
        """Scale and shift of the batch at hand."""
        if self.arm in RANDOM:
            if not self.training:
                return 1.0, 0.0
            a, b = (0.5 * RANDOM[self.arm] * (2 * torch.rand(2, generator=self.draw) - 1)).tolist()
            return 1 + a, b
        period = SLOW[self.arm] * self.epoch
        if not self.training or not period:
            return 2.0, 1.0
        phase = (1 + math.cos(2 * math.pi * (self.seen - self.steps) / period)) / 2
        return 1 + phase, phase


def measure(
    part: str,
    arm: str,
    rate: float,
    seed: int,
    data: Images,
    *,
    steps: int,
    images: int,
    width: float = 1.0,
    kind: str = "plain",
) -> Iterator[Row]:
    """Train the MNIST study's network, without BN: accuracy at the last three evaluations."""
    evaluation = "validation" if part == "tuning" else "test"
    train_x, train_y, held_x, held_y = fair_split(data, seed, evaluation)
    train_x = varied(train_x, kind, seed, "training", data.pixel_max)
    held = pixels(varied(held_x[:images], kind, seed, evaluation, data.pixel_max), data.pixel_max)
    units = round(100 * width)
    net = MLP((held.shape[1], units, units, 10), "relu", False, stream(seed, "weights"))
    changed = Changed(arm, stream(seed, "changes"), steps, len(train_x) // BATCH)
    net.layers = nn.Sequential(changed, *net.layers)
    for step, loss in train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=rate,
        steps=steps,
        order=stream(seed, "order"),
        stops=log_steps(steps, 3)[-3:],
        batch=BATCH,
    ):
        share = accuracy(net, held, held_y[:images])
        yield {"kind": "run", "step": step, "accuracy": share, "diverged": not math.isfinite(loss)}
