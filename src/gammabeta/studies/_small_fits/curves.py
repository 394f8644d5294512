"""Fits of a function of one number: where the data are dense, and where they are not.

Several networks are trained at once, as one product of stacked matrices; they do not meet.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gammabeta._runs import Row
from gammabeta.studies._small_fits._common import normal, point, slope, value

CENTER, SPREAD = -1.0, 0.3
SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
FITS = 5
BATCH = 64
# Of the figure in which the density moves; the linear model's fits are straight lines.
CENTERS = tuple(CENTER + 0.25 * k for k in range(13))
GRID = tuple(-2 + 0.125 * k for k in range(41))
_NETWORK, _LINEAR = "a network fits sin(3x)", "control: a linear model fits 2x"


def network(g: torch.Generator, count: int, width: int = 32) -> list[Tensor]:
    """Weights and biases of ``count`` 1-width-width-1 networks: N(0, 1/fan-in), biases N(0, 1).

    The first layer has weights N(0, 1) and so looks at about [-2, 2] at once.
    """
    sizes = (1, width, width, 1)
    parameters = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        parameters.append(normal(g, count, fan_in, fan_out) / math.sqrt(fan_in))
        parameters.append(normal(g, count, 1, fan_out) if fan_in == 1 else
                          torch.zeros(count, 1, fan_out, dtype=torch.float64))  # fmt: skip
    return [p.float().requires_grad_() for p in parameters]


def output(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """(count, n) for x of (count, n) or (n,); tanh between the layers, none in a linear model."""
    count = len(parameters[0])
    h = x.expand(count, x.shape[-1])[..., None]
    for at in range(0, len(parameters), 2):
        h = torch.baddbmm(parameters[at + 1], h, parameters[at])
        if at + 2 < len(parameters):
            h = torch.tanh(h)
    return h[..., 0]


def fit(
    parameters: list[Tensor],
    draw: Callable[[], Tensor],
    target: Callable[[Tensor], Tensor],
    steps: int,
    rate: float = 0.01,
) -> None:
    """Adam on the squared error, fresh batches; over the last half the rate falls to 0."""
    optimizer = torch.optim.Adam(parameters, lr=rate, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 2 * (steps - step) / steps)
        x = draw()
        loss = (output(parameters, x) - target(x)).square().mean(1).sum()
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


def sine(x: Tensor) -> Tensor:
    return torch.sin(3 * x)


def dense_region(g: torch.Generator, tiny: bool) -> Iterator[Row]:
    steps = 50 if tiny else 2000
    nets = network(g, FITS)
    fit(nets, lambda: (CENTER + SPREAD * normal(g, FITS, BATCH)).float(), sine, steps)
    with torch.no_grad():
        places = torch.linspace(-2, 2, 161)
        found = output(nets, places)
        errors = (found - sine(places)).abs()
        # Density falls with the distance from the center.
        rank = spearman(-(places - CENTER).abs(), errors)
        yield value("correlation of density and error", rank.mean())
        losses = {}
        for shift in SHIFTS:
            x = (shift + SPREAD * normal(g, 1000)).float()
            losses[shift] = (output(nets, x) - sine(x)).square().mean(1)
            ratio = (losses[shift] / losses[CENTER]).log10().mean()
            if shift != CENTER:
                yield value(f"log10 of the loss, shifted to {shift:g} over unshifted", ratio)
            yield point("shifted", "loss", shift, losses[shift].log().mean().exp())
        variance = found.var(0)
        dense = (places - CENTER).abs() <= SPREAD
        sparse = (places - CENTER).abs() >= 3 * SPREAD
        contrast = (variance[sparse].mean() / variance[dense].mean()).log()
        yield value("ln of the variance between fits, sparse over dense", contrast)
        better = int(losses[2.0].argmin())
        for at in range(0, len(places), 4):
            place = float(places[at])
            yield point("fits", "the better fit", place, found[better, at])
            yield point("fits", "all fits", place, found[:, at].mean())
            yield point("fits", "sin(3x)", place, sine(places[at]))
    models = [(normal(g, 2, 1, 1) * 0.1).float(), torch.zeros(2, 1, 1)]
    models = [p.requires_grad_() for p in models]
    centers = torch.tensor([[CENTER], [-CENTER]])
    fit(
        models,
        lambda: (centers + SPREAD * normal(g, 2, BATCH)).float(),
        lambda x: 2 * x,
        steps,
        rate=0.1,  # far apart directions: at 0.01 the model is still on its way
    )
    with torch.no_grad():
        found = output(models, places)
        # Against the standard deviation of 2x over the range.
        yield value("control: fits of 2x from two places, rms difference",
                    (found[0] - found[1]).square().mean().sqrt() / (2 * places).std())  # fmt: skip


def moved(g: torch.Generator, tiny: bool, formulas: bool) -> Iterator[Row]:
    """The fits for each center of the density, from one start and the same draws.

    With ``formulas`` also what they are drawn beside: the targets, the densities.
    """
    steps, count = 50 if tiny else 2000, len(CENTERS)
    centers = torch.tensor(CENTERS)[:, None]

    def draw() -> Tensor:
        return (centers + SPREAD * normal(g, 1, BATCH)).float()

    nets = [p.detach().repeat(count, 1, 1).requires_grad_() for p in network(g, 1)]
    fit(nets, draw, sine, steps)
    slope_, bias = (normal(g, 1, 1, 1) * 0.1).float(), torch.zeros(1, 1, 1)
    models = [p.repeat(count, 1, 1).requires_grad_() for p in (slope_, bias)]
    fit(models, draw, _double, steps, rate=0.1)
    for panel, parameters, target, grid in (
        (_NETWORK, nets, sine, GRID),
        (_LINEAR, models, _double, GRID[::4]),
    ):
        with torch.no_grad():
            found = output(parameters, torch.tensor(grid))
        for center, line in zip(CENTERS, found.tolist(), strict=True):
            for x, y in zip(grid, line, strict=True):
                yield point("moved", "fit", x, round(y, 4), panel=panel, at=center)
        if not formulas:
            continue
        for x in GRID:
            y = float(target(torch.tensor(x)))
            yield point("moved", "target", x, round(y, 4), panel=panel, at=None)
            for center in CENTERS:
                y = math.exp(-(((x - center) / SPREAD) ** 2) / 2) / (
                    SPREAD * math.sqrt(2 * math.pi)
                )
                yield point(
                    "moved", "density of the inputs", x, round(y, 4), panel=panel, at=center
                )


def _double(x: Tensor) -> Tensor:
    return 2 * x


def spearman(x: Tensor, ys: Tensor) -> Tensor:
    """Rank correlation of x (n,) with each row of ys (count, n), without ties in ys."""

    def ranks(v: Tensor) -> Tensor:
        low = (v[..., None, :] < v[..., :, None]).double().sum(-1)
        ties = (v[..., None, :] == v[..., :, None]).double().sum(-1)
        return low + (ties - 1) / 2

    a, b = ranks(x), ranks(ys)
    a, b = a - a.mean(), b - b.mean(-1, keepdim=True)
    correlation: Tensor = (a * b).sum(-1) / (a.norm() * b.norm(dim=-1))
    return correlation


SPREADS = (0.1, 0.3, 1.0)


def batch_variance(g: torch.Generator, tiny: bool) -> Iterator[Row]:
    """Three spreads of the data; and wide data that come in narrow batches."""
    arms = len(SPREADS) + 1
    first = network(g, FITS)
    # The same start and the same draws for every arm: (arm, fit), one after the other.
    nets = [p.detach().repeat(arms, 1, 1).requires_grad_() for p in first]
    narrow, wide = SPREADS[0], SPREADS[-1]

    def draw() -> Tensor:
        z = normal(g, FITS, BATCH)
        place = normal(g, FITS, 1) * math.sqrt(wide**2 - narrow**2)
        return torch.cat([CENTER + s * z for s in SPREADS] + [CENTER + place + narrow * z]).float()

    fit(nets, draw, sine, 50 if tiny else 1000)
    with torch.no_grad():
        x = torch.linspace(-3, 1, 401)
        loss = (output(nets, x) - sine(x)).square().mean(1).view(arms, FITS).log().mean(1).tolist()
    for spread, log in zip(SPREADS, loss, strict=False):
        yield value(f"ln of the loss, spread {spread:g}", log)
        yield point("wide", "loss on the wide range", spread, math.exp(log))
    yield value("ln of the loss, spread 0.1 over 1", loss[0] - loss[2])
    yield value("slope of ln loss over ln spread", slope([math.log(s) for s in SPREADS], loss[:3]))
    yield value("ln of the loss, batches of spread 0.1 from data of spread 1, over spread 1",
                loss[3] - loss[2])  # fmt: skip
