"""The deep network: its arms, and what is looked at while it trains (the protocol is elsewhere)."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from gammabeta._runs import Row
from gammabeta.layers._running import RunningMoments
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.ops import batch_norm
from gammabeta.probes import covariate_shift, influence
from gammabeta.probes._moves import layers_of, received, targets
from gammabeta.probes.step import Step
from gammabeta.studies._data import Images
from gammabeta.studies._nets import MLP, Norm
from gammabeta.studies._train import accuracy, fair_split, log_steps, pixels, stream, train

HIDDEN, UNITS, BATCH, LOOK = 5, 100, 128, 1000
# lengths of each layer's step, as a share of its weights; None: the optimizer's own
LENGTHS: Mapping[str, float | None] = {"relative": 0.01, "own": None}
_LEAST = 1e-6  # below it a unit is constant, up to rounding


class Noise(nn.Module):
    """s a + m, with a distribution of s and m that every unit and every batch has for itself.

    Santurkar et al. 2018, section 2.1: mu ~ U(-0.5, 0.5) and sigma ~ U(1, 1.25) for each unit and
    step; m ~ U(mu - 0.1, mu + 0.1) and s ~ N(sigma, 0.1) for each value. In eval mode their means.
    """

    def __init__(self, draw: torch.Generator) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * 1.125
        mu = torch.rand(x.shape[1], generator=self.draw) - 0.5
        sigma = 1 + 0.25 * torch.rand(x.shape[1], generator=self.draw)
        m = mu + 0.2 * torch.rand(x.shape, generator=self.draw) - 0.1
        s = sigma + 0.1 * torch.randn(x.shape, generator=self.draw)
        return s * x + m


def deep(inputs: int, arm: str, seed: int, width: float = 1.0) -> MLP:
    """inputs-[100]*5-10, ReLU; ``arm`` says what stands before each activation."""
    norms: dict[str, Norm] = {
        "bn": True,
        "noisy": True,
        "frozen": lambda units: BatchNorm1d(units, affine=False),
    }
    sizes = (inputs, *[round(UNITS * width)] * HIDDEN, 10)
    net = MLP(sizes, "relu", norms.get(arm, False), stream(seed, "weights"))
    if arm in ("noisy", "noise"):
        draw = stream(seed, "noise")
        layers: list[nn.Module] = []
        for layer in net.layers:
            layers += [Noise(draw), layer] if isinstance(layer, nn.ReLU) else [layer]
        net.layers = nn.Sequential(*layers)
    return net


def varied(images: Tensor, kind: str, seed: int, purpose: str, pixel_max: int) -> Tensor:
    """The images as they are ("plain"), or "hard": half the size, turned, with noise.

    Mean of 2 x 2 pixels, turned by up to 15 degrees either way, Gaussian noise with standard
    deviation 0.1 of the brightest pixel. Depends on the seed and the purpose alone.
    """
    if kind == "plain":
        return images
    draw = stream(seed, f"{kind} {purpose}")
    x = avg_pool2d(images[:, None].float(), 2)
    angle = (2 * torch.rand(len(x), generator=draw) - 1) * math.radians(15)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(len(x))
    turn = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    x = grid_sample(x, affine_grid(turn, list(x.shape), align_corners=False), align_corners=False)
    x = x + 0.1 * pixel_max * torch.randn(x.shape, generator=draw)
    return x[:, 0].clamp(0, pixel_max).round().to(torch.uint8)


def moments_of_training(steps: int, count: int, *, even: bool = False) -> list[int]:
    """About ``count`` steps from 1 to ``steps``, in equal ratios, or at equal distances.

    >>> moments_of_training(100, 5)
    [1, 3, 10, 32, 100]
    """
    if even:
        return sorted({max(round(steps * k / count), 1) for k in range(1, count + 1)})
    return sorted({round(steps ** (k / (count - 1))) for k in range(count)})


def measure(
    part: str,
    arm: str,
    rate: float,
    seed: int,
    data: Images,
    *,
    steps: int,
    points: int,
    images: int,
    width: float = 1.0,
    kind: str = "plain",
) -> Iterator[Row]:
    """Train one network; rows of accuracy, drift and what its steps do, by ``part``.

    "tuning": accuracy at the last three evaluations. "fair" and "pilot": also the drift between the
    ends of successive tenths, and, with and without batch normalization, what steps do at so many
    ``points``. "published": only the gradients' change by the optimizer's own steps.
    """
    published = part == "published"
    evaluation = "validation" if part == "tuning" else "test"
    train_x, train_y, held_x, held_y = fair_split(
        data, seed, evaluation, 55000 if published else 5000
    )
    held_x, held_y = held_x[:images], held_y[:images]
    # What drift is looked at is never trained on; on MNIST it is the same for all seeds.
    look_x = data.train_x[55000 : 55000 + LOOK] if data.name == "mnist" else held_x
    train_x = varied(train_x, kind, seed, "training", data.pixel_max)
    held_x = varied(held_x, kind, seed, evaluation, data.pixel_max)
    look = pixels(varied(look_x, kind, seed, "look", data.pixel_max), data.pixel_max)
    held = pixels(held_x, data.pixel_max)
    net = deep(held.shape[1], arm, seed, width)
    ends = [] if published else log_steps(steps, 3)[-3:]
    tenths = [] if part in ("tuning", "published") else moments_of_training(steps, 10, even=True)
    probed = part != "tuning" and arm in ("none", "bn")
    looks = moments_of_training(steps, points, even=published) if probed else []
    fixed = (pixels(train_x[:LOOK], data.pixel_max), train_y[:LOOK])
    batches = stream(seed, "probed batches")
    sums: dict[tuple[int, int], list[float]] = {}
    before: dict[str, Tensor] | None = None
    for step, loss in train(
        net,
        train_x,
        train_y,
        pixel_max=data.pixel_max,
        rate=rate,
        steps=steps,
        order=stream(seed, "order"),
        stops={*ends, *tenths, *looks},
        batch=BATCH,
    ):
        row: Row = {"kind": "run", "step": step, "diverged": not math.isfinite(loss)}
        if step in ends:
            row["accuracy"] = accuracy(net, held, held_y)
        if step in tenths:
            row["batch_loss"] = loss if math.isfinite(loss) else 1e6
            now = layer_inputs(net, look, stream(seed, f"look {step}"))
            if before is not None:
                row |= drifts(before, now)
            before = now
        if step in looks:
            at = torch.randperm(len(train_x), generator=batches)[:BATCH]
            batch = (pixels(train_x[at], data.pixel_max), train_y[at])
            if not finite(net):
                pass  # nothing to look at: what it lacks leaves the seed out
            elif published:
                row |= turns(one_step(net, nn.CrossEntropyLoss(), batch, rate), {"own": None})
            else:
                row |= what_steps_do(net, batch, rate, fixed, sums)
        yield row
    for (k, later), values in sorted(sums.items()):
        yield {
            "kind": "influence",
            "from": k,
            "to": later,
            "shift": math.fsum(values) / len(values),
        }


# -- drift ------------------------------------------------------------------------------------


def layer_inputs(net: MLP, x: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """Inputs of each activation, and of the output layer, in training mode; nothing changes.

    float64 (units, values) in ascending order by "1" to "5" and "last"; noise is that of ``draw``.
    """
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for layer in net.layers:
            if isinstance(layer, nn.ReLU):
                found[str(len(found) + 1)] = x.double()
            if isinstance(layer, RunningMoments):
                x, _ = batch_norm(x, layer.weight, layer.bias, eps=layer._epsilon())
            elif isinstance(layer, Noise):
                # another one of the same kind: the training's draws go on as they would have
                x = Noise(draw)(x)
            else:
                last, x = x, layer(x)
    found["last"] = last.double()
    return {key: values.T.contiguous().sort(1).values for key, values in found.items()}


def drifts(before: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, float]:
    """Drift of what the output layer receives; of layers' outputs, of their moments and shape."""
    each = {key: _drift(before[key], now[key]) for key in now}
    hidden = [found for key, found in each.items() if key != "last"]
    found = {"drift": each["last"]["drift"]}
    for column, what in (("outputs", "drift"), ("moments", "moments"), ("shape", "shape")):
        found[f"drift_{column}"] = statistics.fmean(by[what] for by in hidden)
    return found


def _drift(a: Tensor, b: Tensor) -> dict[str, float]:
    """Means over units: Wasserstein-1 distance, change of the moments, distance of shapes.

    Of (units, values) in ascending order; in standard deviations, the root of the mean of both
    variances. A run that diverged has moved all the way.
    """
    spreads = [x.std(1, correction=0) for x in (a, b)]
    means = [x.mean(1) for x in (a, b)]
    spread = ((spreads[0].square() + spreads[1].square()) / 2).sqrt().clamp_min(_LEAST)
    distance = covariate_shift.wasserstein(a, b)
    moments = (means[0] - means[1]).abs() + (spreads[0] - spreads[1]).abs()
    alike = [
        (x - m[:, None]) / s.clamp_min(_LEAST)[:, None]
        for x, m, s in zip((a, b), means, spreads, strict=True)
    ]
    shape = covariate_shift.wasserstein(*alike)
    found = {"drift": distance / spread, "moments": moments / spread, "shape": shape}
    return {key: float(torch.nan_to_num(v, nan=1e6, posinf=1e6).mean()) for key, v in found.items()}


# -- what steps do ------------------------------------------------------------------------------


def finite(net: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in net.parameters())


def one_step(net: nn.Module, loss: nn.Module, batch: tuple[Tensor, Tensor], rate: float) -> Step:
    return Step(net, loss, batch, optimizer=torch.optim.SGD(net.parameters(), lr=rate))


def turns(step: Step, lengths: Mapping[str, float | None]) -> dict[str, float]:
    """``turn``: median over layers of 1 - cos of the gradient before and after layers below moved.

    For each length of their steps: as a share of the weights, or None, the optimizer's own.
    """
    found: dict[str, float] = {}
    for name, relative in lengths.items():
        turned = covariate_shift.measure(step, {}, by=("gradient",), relative=relative)
        cosines = [float(v) for key, v in turned.items() if key.endswith("/gradient_cos")]
        value = 1 - statistics.median(cosines) if cosines else math.nan
        # a network whose gradients have all vanished has no directions
        found |= {f"turn_{name}": value} if math.isfinite(value) else {}
    return found


def what_steps_do(
    net: nn.Module,
    batch: tuple[Tensor, Tensor],
    rate: float,
    fixed: tuple[Tensor, Tensor],
    sums: dict[tuple[int, int], list[float]],
) -> dict[str, float]:
    """Numbers of one training step at equal relative lengths, and at the optimizer's own.

    ``turn``: see above. ``shift``: what the step of all layers does to the distribution of what a
    layer receives, W1 in standard deviations, median over units, mean over layers. ``moments``,
    ``correlations`` (of relative steps only): what the step of one layer's weights does to later
    layers, mean over both; ``affine``: the first of these for the steps of gamma and beta.
    ``fixed_loss``: of the batch ``fixed``. ``sums`` collects moments by layer and later layer, of
    relative steps.
    """
    step = one_step(net, nn.CrossEntropyLoss(), batch, rate)
    found = turns(step, LENGTHS)
    for name, relative in LENGTHS.items():
        found[f"shift_{name}"] = joint_shift(step, relative)
        found |= {f"{key}_{name}": v for key, v in alone(step, relative, sums).items()}
    found["fixed_loss"] = float(Step(net, nn.CrossEntropyLoss(), fixed).run().loss)
    return {key: value for key, value in found.items() if math.isfinite(value)}


def joint_shift(step: Step, relative: float | None) -> float:
    """Shift of what layers receive when all layers make their step, the first layer apart."""
    moved = targets(step, layers_of(step), relative) or {}
    pairs = [received(step, step.run(p, watch=step.weights).inputs) for p in ({}, moved)]
    shifts = []
    for layer in list(step.weights)[1:]:
        old, new = (p[layer].double().sort(1).values for p in pairs)
        spread = old.std(1, correction=0)
        alive = spread > _LEAST
        shift = covariate_shift.wasserstein(old, new)[alive] / spread[alive]
        shifts.append(float(shift.median()) if len(shift) else 0.0)
    return math.fsum(shifts) / len(shifts)


def alone(
    step: Step, relative: float | None, sums: dict[tuple[int, int], list[float]]
) -> dict[str, float]:
    """What the step of one layer alone does to the statistics of what later layers receive."""
    seen = influence.measure(step, {}, relative=relative)
    matrix = seen["mean"] + seen["spread"]
    names = [key.removesuffix("/sent_mean") for key in seen if key.endswith("/sent_mean")]
    weights, affine, turned = [], [], []
    columns = list(step.weights)
    before = {} if relative is None else _correlations(step, {})
    for k, row in enumerate(layers_of(step)):
        if row.name != names[k]:
            raise ValueError(f"rows of the influence must be layers, got {row.name}, {names[k]}.")
        if not row.later:
            continue
        shifts = [float(matrix[k, columns.index(later)]) for later in row.later]
        mean = math.fsum(shifts) / len(shifts)
        if row.name not in step.weights:
            affine.append(mean)
            continue
        weights.append(mean)
        if relative is None:
            continue
        after = _correlations(step, targets(step, [row], relative) or {})
        changes = [
            float((after[x] - before[x]).norm() / before[x].norm().clamp_min(_LEAST))
            for x in row.later
        ]
        turned.append(math.fsum(changes) / len(changes))
        own = columns.index(row.name) + 1
        for at, shift in enumerate(shifts, own + 1):
            sums.setdefault((own, at), []).append(shift)
    found = {"moments": weights, "correlations": turned, "affine": affine}
    return {key: math.fsum(v) / len(v) for key, v in found.items() if v}


def _correlations(step: Step, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Correlations between the units that each weight layer receives; 0 of a constant unit."""
    found = {}
    for layer, x in received(step, step.run(parameters, watch=step.weights).inputs).items():
        centered = x.double() - x.double().mean(1, keepdim=True)
        unit = centered / centered.norm(dim=1, keepdim=True).clamp_min(_LEAST)
        found[layer] = unit @ unit.T
    return found


def integrals(
    steps: Sequence[float], losses: Sequence[float], values: Sequence[float], target: float
) -> tuple[float, float] | None:
    """Sum of ``values`` over the steps until the loss first falls to ``target``, and that step.

    Linear between the points; the sum is divided by how much the loss fell. None: not reached.

    >>> integrals([1, 2, 4], [2.0, 1.0, 0.0], [1.0, 1.0, 4.0], 0.5)
    (1.8333333333333333, 3.0)
    """
    if not losses or losses[0] <= target:
        return None
    total = 0.0
    for k in range(1, len(steps)):
        (s0, s1), (l0, l1) = steps[k - 1 : k + 1], losses[k - 1 : k + 1]
        v0, v1 = values[k - 1 : k + 1]
        share = 1.0 if l1 > target else (l0 - target) / (l0 - l1)
        total += share * (s1 - s0) * (v0 + share * (v1 - v0) / 2)
        if l1 <= target:
            return total / (losses[0] - target), s0 + share * (s1 - s0)
    return None
