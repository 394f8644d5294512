"""Rounding errors beside PyTorch's: every situation of docs/numerics.md, measured in its units.

An error is told in the unit of its promise: y in |γ|·max(1, |x̂*|) + |β|, dx in |γ|·rstd·max|dy|,
dγ in Σ|dy·x̂*|, dβ in Σ|dy|, each the largest over shapes, layouts and gradients; the stars are
float64 results for the same input. "dx far" counts |x̂*| > 1 into the unit, "dγ near" counts
|x̂*| below its root mean square as that. The tests call the same functions. ``python -m benchmarks
numerics`` prints the tables of docs/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import gammabeta as gb

PROMISED = {"y": 2e-6, "dx": 4e-6, "dγ": 2e-6, "dβ": 1e-6}
WIDER = {"dx": "dx far", "dγ": "dγ near"}  # where the first cannot hold of any float32 result
BACKENDS = ("cpu", "torch", "reference")
SHAPES = ((2, 5), (60, 100), (2048, 24), (7, 3, 33), (31, 17, 13, 11), (16, 8, 32, 31))
EPS = 1e-5
Figures = dict[str, float]
Values = Callable[[tuple[int, ...], torch.Generator], Tensor]


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    eps: float = EPS


class Truth(NamedTuple):
    y: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    xhat: Tensor
    rstd: Tensor


# -- inputs: float64 values, rounded to float32 once ----------------------------------------------


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def mean_of(size: float) -> Values:
    return lambda shape, generator: normal(shape, generator) + size


def scaled(size: float) -> Values:
    return lambda shape, generator: (normal(shape, generator) + 1) * size


def images_differ(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Each sample has a mean of its own, about which its positions hardly move."""
    own = normal((*shape[:2], *(1 for _ in shape[2:])), generator)
    return own + 0.05 * normal(shape, generator)


def sparse(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    x = normal(shape, generator).abs() * 5
    x = x.masked_fill(torch.rand(shape, generator=generator) > 0.02, 0.0)
    x[0], x[-1] = 0.5, 1.5  # no channel is constant
    return x


def alternating(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    signs = torch.arange(math.prod(shape)).view(shape) % 2 * 2 - 1
    return signs * (1 + 1e-3 * normal(shape, generator)) + 0.3


def rising(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return normal(shape, generator).flatten().sort().values.view(shape)


def outliers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Where the kernels look for a value near the mean: the first samples, the middle."""
    x = normal(shape, generator)
    x[0] += 1e4
    if len(shape) > 2:
        x.flatten(2)[: shape[0] // 2 + 1, :, math.prod(shape[2:]) // 2] -= 1e3
    return x


def wide(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return normal(shape, generator).mul(3).exp()


SITUATIONS: dict[str, Values] = {
    "mean 0, standard deviation 1": normal,
    "mean 1e3 std": mean_of(1e3),
    "mean 1e6 std": mean_of(1e6),
    "means of images differ": images_differ,
    "outliers of 1e4 std": outliers,
    "sparse: 2 % not zero": sparse,
    "signs alternate": alternating,
    "sorted": rising,
    "log-normal, σ = 3": wide,
    "scale 1e30": scaled(1e30),
    "scale 1e-18, eps dominates": scaled(1e-18),
}
WORST = "every rounding of the sums in one direction"


def cases() -> Iterator[tuple[str, Case]]:
    """Every situation in every shape, each with three kinds of gradient."""
    for number, (name, values) in enumerate(SITUATIONS.items()):
        for shape in SHAPES:
            generator = torch.Generator().manual_seed(number)
            x = values(shape, generator)
            weight, bias = (normal(shape[1:2], generator).float() for _ in range(2))
            dy = normal(shape, generator)
            for kind in (dy, dy.abs(), (x - x.mean()).sign()):
                yield name, Case(x.float(), weight, bias, kind.float())
    for sign in (1, -1):
        for x in lined_up(sign):
            weight, bias = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
            generator = torch.Generator().manual_seed(0)
            high = (x > x.max() / 2).float()
            for dy in (normal(tuple(x.shape), generator).float(), high, 2 * high - 1, x):
                yield WORST, Case(x, weight, bias, dy, 1e-30)


def lined_up(sign: int) -> tuple[Tensor, Tensor]:
    """Values chosen one by one, so that all sums of 8 round in the direction that does most harm.

    Half of them are about 1, half about 1e-4, and a ``near`` of 0, one standard deviation from the
    mean, is what the kernels find: Σd is to come out too large and Σd² too small, or (sign −1) the
    reverse, so that both errors move the variance the same way. As rows, and as one long channel.
    """
    random = np.random.default_rng(0)
    first = second = np.float32(0)
    chosen = []
    for i in range(8):
        spread = random.random(20_000) - 0.5
        size = 1 + 0.02 * spread if i < 4 else np.sqrt(np.spacing(second) / 2) * (1 + 0.05 * spread)
        size = size.astype(np.float32)
        exact = size.astype(np.float64)
        one, two = first + size, (exact**2 + second).astype(np.float32)
        harm = (one - (first + exact)) - (two - (second + exact**2))
        best = np.argmax(sign * harm)
        first, second = one[best], two[best]
        chosen.append(size[best])
    pattern = torch.from_numpy(np.array(chosen, np.float32))
    rows = pattern.repeat(512).unsqueeze(1).repeat(1, 16)
    rows[:: len(rows) // 16] = 0
    long = pattern.repeat_interleave(64).repeat(64, 1, 1)
    long[::8, :, 240:272] = 0
    return rows, long


# -- results --------------------------------------------------------------------------------------


def over(values: Tensor, x: Tensor) -> Tensor:
    return values.view((1, -1) + (1,) * (x.dim() - 2))


def truth(case: Case) -> Truth:
    x, weight, bias, dy = (value.double() for value in case[:4])
    axes = [0, *range(2, x.dim())]
    n = x.numel() // x.shape[1]
    deviation = x - over(x.mean(axes), x)
    deviation = deviation - over(deviation.mean(axes), x)  # the first mean was rounded
    rstd = (deviation.square().mean(axes) + case.eps).rsqrt()
    xhat = deviation * over(rstd, x)
    dbias, dweight = dy.sum(axes), (dy * xhat).sum(axes)
    dx = dy - over(dbias / n, x) - xhat * over(dweight / n, x)
    y = xhat * over(weight, x) + over(bias, x)
    return Truth(y, dx * over(weight * rstd, x), dweight, dbias, xhat, rstd)


def layouts(case: Case) -> Iterator[Case]:
    """Contiguous, and with the channels side by side."""
    yield case
    if case.x.dim() > 2:
        moved = (v.movedim(1, -1).contiguous().movedim(-1, 1) for v in (case.x, case.dy))
        x, dy = moved
        yield case._replace(x=x, dy=dy)


def run(backend: str, case: Case) -> tuple[Tensor, ...]:
    """y, dx, dγ and dβ."""
    x, weight, bias = (v.detach().requires_grad_() for v in (case.x, case.weight, case.bias))
    if backend == "torch":
        y = nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=case.eps)
    else:
        y, _ = gb.batch_norm(x, weight, bias, eps=case.eps, backend=backend)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), case.dy)


def figures(found: tuple[Tensor, ...], true: Truth, case: Case) -> Figures:
    """The largest error of each result, in the unit of its promise."""
    axes = [0, *range(2, case.x.dim())]
    weight, bias = (over(v.double().abs(), case.x) for v in (case.weight, case.bias))
    dy, size = case.dy.double().abs(), true.xhat.abs()
    far = size.clamp(min=1)
    rms = over(true.xhat.square().mean(axes).sqrt(), case.x)
    units = {
        "y": weight * far + bias,
        "dx": weight * over(true.rstd * dy.amax(axes), case.x),
        "dγ": (dy * size).sum(axes),
        "dβ": dy.sum(axes),
    }
    largest = {}
    for i, (name, unit) in enumerate(units.items()):
        error = (found[i].double() - true[i]).abs().nan_to_num(nan=math.inf)
        largest[name] = _largest(error, unit)
        if name == "dx":
            largest["dx far"] = _largest(error, unit * far)
        if name == "dγ":
            largest["dγ near"] = _largest(error, (dy * torch.maximum(size, rms)).sum(axes))
    return largest


def _largest(error: Tensor, unit: Tensor) -> float:
    # a constant channel has a unit of 0, and must have an error of 0
    return torch.where(error == 0, 0.0, error / unit).max().item()


def situations() -> dict[str, dict[str, Figures]]:
    """situation -> backend -> the largest figure of each result."""
    worst: dict[str, dict[str, Figures]] = {}
    for name, case in cases():
        true = truth(case)
        for backend in BACKENDS:
            largest = worst.setdefault(name, {}).setdefault(backend, {})
            for moved in layouts(case):
                for result, figure in figures(run(backend, moved), true, moved).items():
                    largest[result] = max(largest.get(result, 0.0), figure)
    return worst


def exceptions() -> dict[str, dict[str, Figures]]:
    """result -> backend -> its figure and the wider one, for what breaks the first."""
    shape = (16384, 16)
    generator = torch.Generator().manual_seed(0)
    ones, zeros = torch.ones(16), torch.zeros(16)
    x = normal(shape, generator).sign() * (1 + 0.1 * torch.rand(shape, generator=generator))
    x[17], x[33] = 50.0, -50.0
    outlier = Case((3.3 * x + 1).float(), ones, zeros, x.sign().float())
    x = (normal((64, 16), generator) + 3).float()
    away = (x - x.mean(0)).abs()
    inside = Case(x, ones, zeros, (away == away.amin(0)).float())
    found: dict[str, dict[str, Figures]] = {}
    for name, case in (("dx", outlier), ("dγ", inside)):
        for backend in BACKENDS:
            all_ = figures(run(backend, case), truth(case), case)
            found.setdefault(name, {})[backend] = {k: all_[k] for k in (name, WIDER[name])}
    return found


def inference() -> dict[str, Figures]:
    """Eval mode, float32 buffers, against the float64 statistics that they were rounded from."""
    worst = {backend: dict.fromkeys(("0", "10", "1e6"), 0.0) for backend in BACKENDS}
    for mean in worst["cpu"]:
        for shape in SHAPES[1:]:
            generator = torch.Generator().manual_seed(0)
            x = (normal(shape, generator) + float(mean)).float()
            weight, bias = (normal(shape[1:2], generator).float() for _ in range(2))
            case = Case(x, weight, bias, torch.ones_like(x))
            true = truth(case)
            unit = over(weight.double().abs(), x) * true.xhat.abs().clamp(min=1)
            unit = unit + over(bias.double().abs(), x)
            axes = [0, *range(2, x.dim())]
            stats = x.double().mean(axes).float(), x.double().var(axes, correction=0).float()
            for backend in BACKENDS:
                for moved in layouts(case):
                    y = _eval(backend, moved, *stats)
                    error = ((y.double() - true.y).abs() / unit).max().item()
                    worst[backend][mean] = max(worst[backend][mean], error)
    return worst


def _eval(backend: str, case: Case, mean: Tensor, var: Tensor) -> Tensor:
    if backend == "torch":
        return nn.functional.batch_norm(case.x, mean, var, case.weight, case.bias, eps=case.eps)
    stats = gb.Moments.given(mean, var)
    options: dict[str, Any] = {"eps": case.eps, "backend": backend}
    return gb.batch_norm(case.x, case.weight, case.bias, moments=stats, **options)[0]


def constant() -> Figures:
    """A channel of one value: the largest |y − β|."""
    worst = dict.fromkeys(BACKENDS, 0.0)
    for value in (100.1, 1e6):
        for shape in SHAPES[1:]:
            bias = normal(shape[1:2], torch.Generator().manual_seed(0)).float()
            x = torch.full(shape, value)
            for backend in BACKENDS:
                for moved in layouts(Case(x, torch.ones_like(bias), bias, x)):
                    off = (run(backend, moved)[0] - over(bias, x)).abs()
                    worst[backend] = max(worst[backend], off.nan_to_num(nan=math.inf).max().item())
    return worst


def bfloat16() -> dict[str, Figures]:
    """The largest error beside what the rule allows: twice the naive formula's, and one rounding.

    Naive is the formula in bfloat16 throughout, differentiated by autograd.
    """
    worst = {backend: dict.fromkeys(PROMISED, 0.0) for backend in BACKENDS}
    for shape in ((60, 10), (4, 5, 30), (3, 4, 9, 9)):
        generator = torch.Generator().manual_seed(3)
        x, dy = (normal(shape, generator).bfloat16() for _ in range(2))
        weight, bias = (normal(shape[1:2], generator).bfloat16().float() for _ in range(2))
        case = Case(x, weight, bias, dy)
        true = truth(case)
        plain = _naive(case)
        for backend in BACKENDS:
            for moved in layouts(case):
                for i, name in enumerate(PROMISED):
                    ours, allowed = (
                        (v[i].double() - true[i]).abs().max().item()
                        for v in (run(backend, moved), plain)
                    )
                    allowed = 2 * allowed + 2.0**-7 * true[i].abs().max().item()
                    worst[backend][name] = max(worst[backend][name], ours / allowed)
    return worst


def _naive(case: Case) -> tuple[Tensor, ...]:
    leaves = [v.bfloat16().requires_grad_() for v in (case.x, case.weight, case.bias)]
    x, weight, bias = leaves
    axes = [0, *range(2, x.dim())]
    mean = x.mean(axes, keepdim=True)
    var = (x - mean).square().mean(axes, keepdim=True)
    y = (x - mean) / torch.sqrt(var + case.eps) * over(weight, x) + over(bias, x)
    return y.detach(), *torch.autograd.grad(y, leaves, case.dy)


# -- the tables -----------------------------------------------------------------------------------


def measure() -> dict[str, Any]:
    found = situations()
    for name, row in found.items():
        for result, limit in PROMISED.items():
            assert row["cpu"][result] <= limit, (name, result, row["cpu"][result])
    return {
        "what": "largest rounding errors, in the units of docs/numerics.md, beside PyTorch's",
        "promised": PROMISED,
        "situations": found,
        "exceptions": exceptions(),
        "inference": inference(),
        "constant": constant(),
        "bfloat16": bfloat16(),
    }


def show(result: dict[str, Any]) -> str:
    """The table of the situations, and the one of everything else."""
    heads = [f"{name}, ≤ {text(limit)}" for name, limit in result["promised"].items()]
    lines = [
        f"| training, float32 | {' | '.join(heads)} |",
        "|---|" + "---|" * len(heads),
    ]
    pairs: dict[str, list[Figures]] = {
        name: [row["cpu"], row["torch"]] for name, row in result["situations"].items()
    }
    for name, both in pairs.items():
        cells = [" / ".join(text(f[head]) for f in both) for head in result["promised"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    rows = result["situations"].values()
    cells = [text(max(r["reference"][h] for r in rows)) for h in result["promised"]]
    lines += [f"| `reference`, the largest of its column | {' | '.join(cells)} |", ""]
    lines += ["| also | `cpu` | `reference` | PyTorch |", "|---|---|---|---|"]
    names = ("cpu", "reference", "torch")
    for mean in result["inference"]["cpu"]:
        cells = [text(result["inference"][n][mean]) for n in names]
        lines.append(f"| eval, running mean {mean} std: y | {' | '.join(cells)} |")
    said = {
        "dx": "outliers of 42 std among ±1, dy = sign(x̂): dx (in units·\\|x̂*\\|)",
        "dγ": "dy only at the value nearest the mean: dγ (in Σ\\|dy\\|·max(\\|x̂*\\|, rms x̂*))",
    }
    for head, words in said.items():
        found = result["exceptions"][head]
        cells = [f"{text(found[n][head])} ({text(found[n][WIDER[head]])})" for n in names]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    cells = [text(result["constant"][n]) for n in names]
    lines.append(f"| constant channel: largest \\|y − β\\| | {' | '.join(cells)} |")
    for head in result["promised"]:
        cells = [text(result["bfloat16"][n][head]) for n in names]
        lines.append(f"| bfloat16: {head}, share of what is allowed | {' | '.join(cells)} |")
    return "\n".join(lines)


def text(figure: float) -> str:
    if not math.isfinite(figure):
        return "not finite"
    if figure == 0 or 0.01 <= figure < 1000:
        return f"{figure:.2g}"
    return f"{figure:.1e}".replace("e-0", "e-").replace("e+0", "e")
