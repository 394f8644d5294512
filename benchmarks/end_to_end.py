"""A whole training step of a ResNet-20 for 32x32 images: PyTorch's layers, ours, and the ceiling.

Batch 64, SGD with momentum, on two threads. "ours" is the same network after
``gb.convert(model, fuse=True)``. The ceiling is the step without any normalization or activation:
what no layer can be faster than. "PyTorch, compiled" and "ours, compiled" are the same two under
``torch.compile``. All take turns, in a new random order every round; ratios are those within a
round, medians with the 90 % interval.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gammabeta as gb
from benchmarks._networks import images, resnet20
from benchmarks.kernels import ratio

THREADS = 2
ROUNDS = 25
STEPS = 2  # in a turn
BAR = 1.1


def measure() -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return _measure()
    finally:
        torch.set_num_threads(before)


def _measure() -> dict[str, Any]:
    torch.manual_seed(0)
    theirs = resnet20()
    x, y = images()
    ours = gb.convert(copy.deepcopy(theirs), fuse=True)
    bare = resnet20(lambda width: nn.Identity(), nn.Identity)
    report = gb.report_of(ours)
    agreement = _agree(copy.deepcopy(theirs), gb.convert(copy.deepcopy(theirs), fuse=True), x, y)
    models: dict[str, Callable[[Tensor], Tensor]] = {
        "PyTorch": theirs,
        "ours": ours,
        "ceiling": bare,
        "PyTorch, compiled": torch.compile(copy.deepcopy(theirs), dynamic=False),
        "ours, compiled": torch.compile(
            gb.convert(copy.deepcopy(theirs), fuse=True), dynamic=False
        ),
    }
    steps = {name: _step(model, x, y) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for _ in range(ROUNDS):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            for _ in range(STEPS):
                steps[name]()
            times[name].append((time.perf_counter() - start) / STEPS)
    return {
        "threads_used": THREADS,
        "converted": str(report).splitlines()[0],
        "largest_difference_of_gradients": agreement,
        "ms": {name: round(statistics.median(t) * 1e3, 2) for name, t in times.items()},
        "ratios": {
            "PyTorch/ours": ratio(times["PyTorch"], times["ours"]),
            "PyTorch/ceiling": ratio(times["PyTorch"], times["ceiling"]),
            "compiled: PyTorch/ours": ratio(times["PyTorch, compiled"], times["ours, compiled"]),
        },
        "bar": BAR,
    }


def _step(model: Any, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _agree(theirs: nn.Module, ours: nn.Module, x: Tensor, y: Tensor) -> float:
    """The largest difference of a gradient, in units of the largest; asserted to be small."""
    for model in (theirs, ours):
        nn.functional.cross_entropy(model(x), y).backward()
    worst = 0.0
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        worst = max(worst, float((a.grad - b.grad).abs().max() / a.grad.abs().max()))
    assert worst < 1e-2, f"the converted network has other gradients: {worst}"
    return worst


def show(result: dict[str, Any]) -> str:
    lines = [f"{name:20} {ms:8.1f} ms" for name, ms in result["ms"].items()]
    for name, (middle, low, high) in result["ratios"].items():
        lines.append(f"{name:26} {middle:.3f} [{low:.3f}, {high:.3f}]")
    return "\n".join([*lines, f"bar for PyTorch/ours: {result['bar']}"])
