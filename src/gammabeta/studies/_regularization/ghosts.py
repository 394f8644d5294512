"""Statistics of small parts of a batch, and the noise of them alone (see the experiment)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gammabeta._runs import Row
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.layers.ghost import GhostBatchNorm1d
from gammabeta.studies._data import Images
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train

SIZES = (4, 16, 64, 512)
NOISY = 16  # the size whose noise is put on the statistics of the whole batch
# arm -> ghost size, and whether it is noise alone
ARMS = {**{f"m = {m}": (m, False) for m in SIZES}, f"noise of {NOISY}": (NOISY, True)}


class NoisyBatchNorm1d(BatchNorm1d):
    """BN of the whole batch, and on it the noise that statistics of its ghosts would bring.

    xhat is normalized by the whole batch, with the gradient through its statistics. Each ghost of
    ``size`` samples and each channel has a mean a and a standard deviation s of xhat; constants for
    the derivative. In training y = gamma (xhat - A) R + beta, where A and ln R are drawn for each
    ghost and channel from Gaussian distributions with the means and variances, over the ghosts, of
    a and -ln s. Eval mode is that of BN.
    """

    def __init__(self, width: int, size: int, generator: torch.Generator) -> None:
        super().__init__(width, affine=False)
        self.size, self.generator = size, generator
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        xhat = super().forward(input, mask)
        if self.training:
            shift, scale = self.noise(xhat.detach())
            xhat = (xhat - shift) * scale
        return self.gamma * xhat + self.beta

    def noise(self, xhat: Tensor) -> tuple[Tensor, Tensor]:
        """A and R for each row of xhat."""
        ghosts = xhat.view(-1, self.size, xhat.shape[1])
        means, logs = ghosts.mean(1), -ghosts.var(1, unbiased=False).add(self.eps).log() / 2
        draws = []
        for values in (means, logs):
            normal = torch.randn(values.shape, generator=self.generator)
            draws.append(values.mean(0) + normal * values.std(0, unbiased=False))
        shift, scale = (d.repeat_interleave(self.size, dim=0) for d in draws)
        return shift, scale.exp()


def measure(
    arm: str,
    rate: float,
    seed: int,
    data: Images,
    *,
    validation: bool,
    size: int,
    steps: int,
    batch: int,
    images: int,
    width: float,
) -> Iterator[Row]:
    """Train one network; training and held-out accuracy at the end, three times."""
    evaluation = "validation" if validation else "test"
    train_x, train_y, held_x, held_y = fair_split(data, seed, evaluation, size)
    seen, held = (pixels(x, data.pixel_max) for x in (train_x, held_x[:images]))
    ghost, noise = ARMS[arm]
    generator = stream(seed, "noise")

    def norm(units: int) -> nn.Module:
        if noise:
            return NoisyBatchNorm1d(units, ghost, generator)
        return GhostBatchNorm1d(units, virtual_batch_size=ghost)

    units = round(100 * width)
    net = MLP((seen.shape[1], units, units, 10), "relu", norm, stream(seed, "weights"))
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=rate,
        steps=steps,
        order=stream(seed, "order"),
        stops=log_steps(steps, 3)[-3:],
        batch=batch,
    )
    for step, loss in training:
        yield {
            "step": step,
            "accuracy": accuracy(net, held, held_y[:images]),
            "train_accuracy": accuracy(net, seen, train_y),
            "diverged": not math.isfinite(loss),
        }
