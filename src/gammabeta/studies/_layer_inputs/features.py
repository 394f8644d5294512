"""Normalizing features one by one, or together (the protocol is the experiment's)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from gammabeta._runs import Row
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.layers.whiten import DecorrelatedBatchNorm1d, IterNorm1d
from gammabeta.ops import batch_norm
from gammabeta.studies._data import Images
from gammabeta.studies._nets import MLP, m2
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train

BATCH = 256  # more than the 100 features, which a full whitening needs
VALIDATION = 2000
ARMS: Mapping[str, Callable[[int], nn.Module] | bool] = {
    "none": False,
    "bn": BatchNorm1d,
    "zca-20": lambda width: DecorrelatedBatchNorm1d(width, group_size=20),
    "zca-100": lambda width: DecorrelatedBatchNorm1d(width, group_size=100),
    "iternorm-20": lambda width: IterNorm1d(width, group_size=20),
}


def measure(
    part: str, norm: str, rate: float, seed: int, data: Images, steps: int, images: int
) -> Iterator[Row]:
    """Rows of accuracy at the end; in the main parts also of validation accuracy on the way."""
    evaluation = "validation" if part == "tuning" else "test"
    train_x, train_y, held_x, held_y = fair_split(data, seed, evaluation)
    _, _, early_x, early_y = fair_split(data, seed, "validation")
    held, early = (pixels(x, data.pixel_max) for x in (held_x[:images], early_x[:VALIDATION]))
    net = m2(held.shape[1], "relu", ARMS[norm], stream(seed, "weights"))
    ends = log_steps(steps, 3)[-3:]
    looks = [] if part == "tuning" else log_steps(steps, 40, first=2)
    training = train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=rate,
        steps=steps,
        order=stream(seed, "order"),
        stops={*looks, *ends},
        batch=BATCH,
    )
    for step, loss in training:
        row: Row = {"kind": "run", "step": step, "diverged": not math.isfinite(loss)}
        if step in ends:
            row["accuracy"] = accuracy(net, held, held_y[:images])
        if step in looks:
            row["validation"] = accuracy(net, early, early_y[:VALIDATION])
        if part != "tuning" and step == steps:
            row["correlation"] = correlation(net, held)
        yield row


def correlation(net: MLP, x: Tensor) -> float:
    """Mean absolute correlation of two different inputs of the first activation."""
    mode = net.training
    with torch.no_grad():
        try:
            net.eval()
            for layer in net.layers:
                if isinstance(layer, nn.ReLU):
                    break
                x = layer(x)
        finally:
            net.train(mode)
    matrix = _correlations(x.double())
    off = matrix - torch.diag(matrix.diagonal())
    return float(torch.nan_to_num(off.abs().sum() / (off.numel() - len(off)), nan=1.0))


def identity(data: Images, seed: int) -> Iterator[Row]:
    """Correlations of the first pre-activations before and after batch normalization, float64."""
    train_x, _, _, _ = fair_split(data, seed, "test")
    net = m2(train_x[0].numel(), "relu", True, stream(seed, "weights")).double()
    with torch.no_grad():
        z = net.layers[0](pixels(train_x[:1000], data.pixel_max).double())
        draw = stream(seed, "affine")
        weight = torch.rand(z.shape[1], generator=draw, dtype=torch.float64) + 0.5
        bias = torch.randn(z.shape[1], generator=draw, dtype=torch.float64)
        y, _ = batch_norm(z, weight, bias)
    error = (_correlations(z) - _correlations(y)).abs().max()
    # The subtraction of the mean cancels: rounding of a value is relative to its size.
    condition = max(float(1 + (v.abs().amax(0) / v.std(0, correction=0)).max()) for v in (z, y))
    yield {"kind": "identity", "error": float(error), "condition": condition}


def _correlations(x: Tensor) -> Tensor:
    centered = x - x.mean(0)
    unit = centered / centered.norm(dim=0).clamp_min(1e-300)
    product: Tensor = unit.T @ unit
    return product


def steps_to(target: float, steps: Sequence[int], shares: Sequence[float]) -> tuple[float, bool]:
    """The step at which the accuracy first reaches the target, and whether it does.

    Interpolated between two looks; a run that does not arrive counts as arriving at its last step.
    """
    for k, share in enumerate(shares):
        if share >= target:
            if k == 0:
                return float(steps[0]), True
            part = (target - shares[k - 1]) / (share - shares[k - 1])
            return steps[k - 1] + part * (steps[k] - steps[k - 1]), True
    return float(steps[-1]), False
