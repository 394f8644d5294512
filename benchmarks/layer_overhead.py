"""What control over the updates costs a plain layer that uses none of it: a training step.

The layer as it is, the layer of the commit ``BEFORE`` (the op and the drop-in layers alone) and
``torch.nn``'s take turns in one process, a few steps each, in a new random order every round. The
ratio of two turns of a round is free of what else the machine does at that hour; the interval is
that of the median of the ratios. A second layer of the old commit is the control: its ratio to the
first is 1 as far as the method can tell. Time is processor time of the one thread.
"""

import gc
import importlib
import io
import math
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import gammabeta

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "e23ce0d"
REQUIRED = 0.95  # of the old speed, at least, with a certainty of 90 %
ROUNDS = 301
# shape -> steps in a turn, some milliseconds
CASES = {(64, 100): 40, (32, 64, 28, 28): 1}

# of times, each with its interval
RATIOS = (("before", "gammabeta"), ("before", "control"), ("torch.nn", "gammabeta"))

Step = Callable[[int], float]


def old_package(folder: str) -> ModuleType:
    """The package as it was, beside the present one: under a name of its own."""
    archive = subprocess.run(
        ["git", "archive", BEFORE, "src/gammabeta"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    name = f"gammabeta_{BEFORE}"
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    package = Path(folder) / "src" / "gammabeta"
    for path in package.rglob("*.py"):
        path.write_text(path.read_text().replace("gammabeta", name))
    package.rename(package.with_name(name))
    sys.path.insert(0, str(package.parent))
    try:
        # while the folder lasts: every module that a step needs
        loaded = importlib.import_module(name)
        loaded.BatchNorm1d(2)(torch.randn(4, 2))
    finally:
        sys.path.remove(str(package.parent))
    return loaded


def stepper(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Step:
    """Forward and backward, so many times: processor seconds of one."""

    def run(steps: int) -> float:
        started = time.process_time()
        for step in range(-warm_up(steps), steps):
            if step == 0:
                started = time.process_time()
            x.grad = layer.weight.grad = layer.bias.grad = None
            layer(x).backward(dy)
        return (time.process_time() - started) / steps

    return run


def warm_up(steps: int) -> int:
    """Untimed steps of a turn: what ran before it must not matter."""
    return max(1, steps // 4)


def turns(steppers: dict[str, Step], steps: int) -> dict[str, list[float]]:
    """Time by variant and round."""
    times: dict[str, list[float]] = {name: [] for name in steppers}
    order, shuffle = list(steppers), random.Random(0).shuffle
    for run in steppers.values():
        run(5 * steps)
    gc.collect()
    gc.disable()
    try:
        for _ in range(ROUNDS):
            shuffle(order)
            for name in order:
                times[name].append(steppers[name](steps))
    finally:
        gc.enable()
    return times


def median_interval(values: list[float], level: float = 0.9) -> tuple[float, float, float]:
    """(low, median, high): the order statistics between which the median lies, whatever the law."""
    ranked, n = sorted(values), len(values)
    below, k = 0.0, 0
    while below + math.comb(n, k) / 2**n <= (1 - level) / 2:
        below += math.comb(n, k) / 2**n
        k += 1
    return ranked[max(k - 1, 0)], statistics.median(ranked), ranked[n - max(k, 1)]


def measure() -> dict[str, Any]:
    results = []
    with tempfile.TemporaryDirectory() as folder:
        before = old_package(folder)
        for shape, steps in CASES.items():
            torch.manual_seed(0)
            x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
            kind = "BatchNorm1d" if len(shape) == 2 else "BatchNorm2d"
            layers = {
                "before": getattr(before, kind)(shape[1]),
                "control": getattr(before, kind)(shape[1]),
                "gammabeta": getattr(gammabeta, kind)(shape[1]),
                "torch.nn": getattr(nn, kind)(shape[1]),
            }
            outputs = {name: layer(x) for name, layer in layers.items()}
            for output in outputs.values():
                torch.testing.assert_close(output, outputs["torch.nn"])
            times = turns({name: stepper(v, x, dy) for name, v in layers.items()}, steps)
            row: dict[str, Any] = {"shape": list(shape), "layer": kind}
            for name, values in times.items():
                row[f"{name}_ms"] = round(statistics.median(values) * 1e3, 4)
            for name, by in RATIOS:
                pairs = zip(times[name], times[by], strict=True)
                found = median_interval([one / other for one, other in pairs])
                row[f"{name}_by_{by}"] = [round(v, 4) for v in found]
            results.append(row)
    return {
        "what": f"a training step of the plain layer beside commit {BEFORE} and torch.nn",
        "rounds": ROUNDS,
        "required": REQUIRED,
        "ratios": "90 % interval of the median paired ratio of times: low, median, high",
        "results": results,
    }


def show(result: dict[str, Any]) -> str:
    heads = ["before / now", "before / before", "torch.nn / now"]
    lines = [result["what"], "".join(f"{head:24}" for head in ["", *heads, "now, ms"])]
    for row in result["results"]:
        cells = ["x".join(map(str, row["shape"]))]
        for name, by in RATIOS:
            low, median, high = row[f"{name}_by_{by}"]
            cells.append(f"{median:.3f} [{low:.3f}, {high:.3f}]")
        lines.append("".join(f"{c:24}" for c in [*cells, f"{row['gammabeta_ms']:.3f}"]))
    worst = min(row["before_by_gammabeta"][0] for row in result["results"])
    verdict = "met" if worst > result["required"] else "NOT met"
    lines.append(f"required: before / now above {result['required']} throughout, {verdict}")
    return "\n".join(lines)
