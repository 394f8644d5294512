"""A training step of one layer, case by case: ours, PyTorch's in three ways, and the floor.

All variants of a case take turns in one process, in a new random order every round; what is shown
are medians, and the ratio of two variants as the median of their ratios within a round with its
90 % interval, which is free of what else the machine does at that hour. Correctness is asserted
first. The floor is five passes over memory (read x, write y; read x, read dy, write dx), measured
as 2.5 copies among four distinct tensors used in turn. "kernel" are the two calls of the compiled
code alone, on memory that is mapped.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gammabeta as gb
from gammabeta.ops._cpu import _calls
from tests import cases

THREADS = 2
ROUNDS = 31
TURN = 0.004  # seconds in a turn, at least
LARGE = 4 << 20  # bytes, from which on the cache does not hold a tensor
Step = Callable[[], object]


def measure() -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        rows = [
            row(shape, layout, dtype)
            for dtype in (torch.float32, torch.bfloat16)
            for shape in cases.TIMED
            for layout in layouts(shape)
        ]
    finally:
        torch.set_num_threads(before)
    return {"kernel_threads": THREADS, "rows": rows, "summary": summary(rows)}


def layouts(shape: tuple[int, ...]) -> tuple[str, ...]:
    return ("rows",) if len(shape) == 2 else ("contiguous", "channels_last")


def row(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """One case: times in milliseconds, ratios to PyTorch eager with intervals."""
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        made = torch.randn(shape, generator=generator).to(dtype)
        return made if layout == "rows" else cases.LAYOUTS[layout](made)

    x, dy, extra = normal().requires_grad_(), normal(), normal().requires_grad_()
    steps = variants(x, dy, extra)
    check(steps, x)
    copies = [normal() for _ in range(4)]
    turn = itertools.count()

    def copy() -> None:
        i = next(turn)
        copies[(2 * i + 1) % 4].copy_(copies[2 * i % 4])

    steps["copy"] = copy
    steps["kernel"] = kernel(x.detach(), dy)
    times = take_turns(steps)
    found: dict[str, Any] = {
        "shape": list(shape),
        "layout": layout,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": x.nbytes,
        "ms": {name: round(statistics.median(t) * 1e3, 4) for name, t in times.items()},
    }
    pairs = [(name, name.replace("ours", "eager")) for name in times if name.startswith("ours")]
    pairs += [("ours", other) for other in ("compile", "onednn") if other in times]
    found["ratios"] = {f"{other}/{name}": ratio(times[other], times[name]) for name, other in pairs}
    found["kernel/floor"] = round(
        statistics.median(times["kernel"]) / (2.5 * statistics.median(times["copy"])), 3
    )
    print(
        found["shape"], layout, found["dtype"], found["ratios"], found["kernel/floor"], flush=True
    )
    return found


def variants(x: Tensor, dy: Tensor, extra: Tensor) -> dict[str, Step]:
    """Name -> one training step, buffers, gradients and Python included."""
    channels, axes = x.shape[1], {2: "1d", 3: "1d", 4: "2d", 5: "3d"}[x.dim()]
    theirs: Any = getattr(nn, f"BatchNorm{axes}")
    plain: Any = getattr(gb, f"BatchNorm{axes}")
    fused: Any = getattr(gb, f"BatchNormAct{axes}")
    eager, ours, act = theirs(channels), plain(channels), fused(channels)
    own, plain_own = tuple(act.parameters()), tuple(ours.parameters())
    their = tuple(eager.parameters())
    evaluated, evaluated_act = theirs(channels).eval(), fused(channels).eval()

    def backward(y: Tensor, *more: Tensor) -> Tensor:
        # not y.backward(): adding to x.grad is no part of a layer's step
        torch.autograd.grad(y, (x, *more), dy)
        return y

    def compiled() -> Step:
        layer = theirs(channels)
        run = torch.compile(lambda x: F.relu(layer(x), inplace=True), dynamic=False)
        return lambda: backward(run(x), *layer.parameters())

    def inference(layer: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return layer(x)

    found: dict[str, Step] = {
        "ours": lambda: backward(act(x), *own),
        "eager": lambda: backward(F.relu(eager(x), inplace=True), *their),
        "ours, no activation": lambda: backward(ours(x), *plain_own),
        "eager, no activation": lambda: backward(eager(x), *their),
        "ours, residual": lambda: backward(act(x, extra), extra, *own),
        "eager, residual": lambda: backward(
            F.relu(eager(x).add_(extra), inplace=True), extra, *their
        ),
        "ours, inference": lambda: inference(evaluated_act),
        "eager, inference": lambda: inference(lambda x: F.relu(evaluated(x), inplace=True)),
        "compile": compiled(),
    }
    if x.dim() == 4 and x.dtype == torch.float32:
        found["onednn"] = onednn(x, dy, theirs(channels))
    return found


def onednn(x: Tensor, dy: Tensor, layer: nn.Module) -> Step:
    inside, gradient = x.detach().to_mkldnn(), dy.to_mkldnn()

    def step() -> Tensor:
        leaf = inside.detach().requires_grad_()
        y = torch.relu_(layer(leaf))
        torch.autograd.grad(y, (leaf, *layer.parameters()), gradient)
        return y.detach().to_dense() if check_now else y

    return step


check_now = False


def check(steps: dict[str, Step], x: Tensor) -> None:
    """All compute the same before any is timed: as float64 does, as far as each promises."""
    global check_now
    check_now = True
    wide = x.detach().double().requires_grad_()
    exact = F.relu(F.batch_norm(wide, None, None, training=True))
    for name, tolerance in (("ours", 2e-5), ("eager", 5e-3), ("compile", 5e-3), ("onednn", 5e-3)):
        if name in steps:
            found: Any = steps[name]()
            tolerance = tolerance if x.dtype == torch.float32 else 5e-2
            torch.testing.assert_close(
                found.double(), exact, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
            )
    for name in steps:
        if name.startswith("ours, "):
            a, b = (step() for step in (steps[name], steps[name.replace("ours", "eager")]))
            torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
    check_now = False


def kernel(x: Tensor, dy: Tensor) -> Step:
    """Forward and backward of the compiled code, on memory of its own that is mapped."""
    call = _calls.prepare(x, torch.ones(x.shape[1]), torch.zeros(x.shape[1]), None, None, 1e-5, 0.0)
    count, channels = _calls.count_of(x, None), x.shape[1]
    y, kept, _ = _calls.forward(call, None, count=count)
    dx, dweight, dbias, _ = _calls.backward(dy, call, kept, None, count, False)
    assert call.weight is not None
    assert call.bias is not None
    assert dx is not None
    assert dweight is not None
    assert dbias is not None
    threads = _calls.threads_for(x)
    form = (call.layout, x.shape, x.dtype, True, False, False, threads, 0, count, 1e-5, 0.0)
    there, back = (_calls.recipe(direction, *form) for direction in ("forward", "backward"))
    scratch = torch.empty(max(there.scratch, back.scratch) + 16 * channels, dtype=torch.uint8)
    stats, place = kept.data_ptr(), scratch.data_ptr()
    plan = stats + 16 * channels
    first = _calls.pointers(
        *(x.data_ptr(), y.data_ptr(), 0, 0, 0, 0, 0, 0),
        *(call.weight.data_ptr(), call.bias.data_ptr(), stats, 0, 0, plan, place),
        *(0, 0, 0, 0, 0, 0),
    )
    second = _calls.pointers(
        *(
            x.data_ptr(),
            0,
            dy.data_ptr(),
            dx.data_ptr(),
            0,
            0,
            0,
            0,
            0,
            0,
            stats,
            0,
            0,
            plan,
            place,
        ),
        *(place + back.scratch, dweight.data_ptr(), dbias.data_ptr(), 0, 0, 0),
    )
    held = (x, dy, y, dx, dweight, dbias, kept, call, scratch)

    def run() -> object:
        there.run(first + there.words)
        back.run(second + back.words)
        return held

    return run


def take_turns(steps: dict[str, Step]) -> dict[str, list[float]]:
    """Seconds of one step, by variant, ROUNDS of them."""
    repeats = {}
    for name, step in steps.items():
        step()
        start = time.perf_counter()
        step()
        repeats[name] = max(1, math.ceil(TURN / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for _ in range(ROUNDS):
        shuffle(order)
        for name in order:
            step = steps[name]
            start = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def ratio(slow: list[float], fast: list[float]) -> list[float]:
    """Median of the ratios within a round, and its 90 % interval from the order statistics."""
    values = sorted(a / b for a, b in zip(slow, fast, strict=True))
    n = len(values)
    reach = 1.645 * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return [round(values[i], 3) for i in (n // 2, low, high)]


# name -> (which rows, which ratio, what is required)
BARS: dict[str, tuple[Callable[[dict[str, Any]], bool], str, float]] = {
    "BatchNorm + ReLU, all": (lambda r: True, "eager/ours", 2.2),
    "BatchNorm + ReLU, contiguous": (lambda r: r["layout"] == "contiguous", "eager/ours", 2.8),
    "BatchNorm + ReLU, channels last": (
        lambda r: r["layout"] == "channels_last",
        "eager/ours",
        2.2,
    ),
    "BatchNorm + ReLU, rows": (lambda r: r["layout"] == "rows", "eager/ours", 1.5),
    "BatchNorm + ReLU against torch.compile": (lambda r: True, "compile/ours", 5.0),
    "BatchNorm + ReLU against oneDNN": (lambda r: True, "onednn/ours", 1.5),
    "BatchNorm alone": (lambda r: True, "eager, no activation/ours, no activation", 1.5),
    "BatchNorm + residual + ReLU": (lambda r: True, "eager, residual/ours, residual", 2.5),
    "inference": (lambda r: True, "eager, inference/ours, inference", 1.5),
}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means by dtype, beside what is required, and the worst case."""
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        own = [r for r in rows if r["dtype"] == dtype]
        for name, (belongs, key, bar) in BARS.items():
            values = [r["ratios"][key] for r in own if belongs(r) and key in r["ratios"]]
            if values:
                mean = math.exp(statistics.fmean(math.log(v[0]) for v in values))
                worst = min(v[1] for v in values)
                found[f"{dtype}: {name}"] = {"mean": round(mean, 2), "bar": bar, "worst": worst}
        for layout, bar in (("contiguous", 2.0), ("channels_last", 2.5)):
            values = [
                r["kernel/floor"] for r in own if r["layout"] == layout and r["bytes"] > LARGE
            ]
            if values:
                mean = math.exp(statistics.fmean(map(math.log, values)))
                name = f"{dtype}: kernel in floors, {layout}, over 4 MB"
                found[name] = {"mean": round(mean, 2), "bar": bar, "worst": max(values)}
    return found


def show(result: dict[str, Any]) -> str:
    lines = ["case                                   ours    eager  ratio [90 %]         floors"]
    for r in result["rows"]:
        shape = "x".join(map(str, r["shape"]))
        mean, low, high = r["ratios"]["eager/ours"]
        lines.append(
            f"{shape:18} {r['layout']:13} {r['dtype']:8} {r['ms']['ours']:8.3f} "
            f"{r['ms']['eager']:8.3f}  {mean:.2f} [{low:.2f}, {high:.2f}]  {r['kernel/floor']:.2f}"
        )
    lines.append("")
    for name, s in result["summary"].items():
        lines.append(f"{name:58} {s['mean']:6.2f}  (bar {s['bar']}; worst {s['worst']})")
    return "\n".join(lines)
