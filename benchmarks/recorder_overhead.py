"""What a recorder costs a training: with and without it, and what it says itself.

The same training runs with a recorder (default probes, every 50 steps) and without one, in turns,
from the same start and on the same batches; both have to end with the same parameters, bit for
bit. `measured` is the median over the rounds of the paired ratio of times, less 1, in processor
time of the one thread: what a core gives, whoever else is waiting for it. `reported` is the median
of `rec.overhead`, which the recorder takes from wall time. Once without a limit, once with the
default limit of 5 %, which skips records where 50 steps are too short to pay for one.
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

import gammabeta as gb
from gammabeta.studies._nets import m2
from gammabeta.studies._train import stream

REQUIRED, AGREE = 0.05, 1.5
EVERY = 50


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al. 2015, arXiv 1512.03385, Sec. 4.2)."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        stride = out // inside
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = gb.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = gb.BatchNorm2d(out)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(inside, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.short(x))


class ResNet20(nn.Module):
    """Three stages of three blocks, 16, 32 and 64 channels, for images of 32×32."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16] * 4 + [32] * 3 + [64] * 3
        pairs = itertools.pairwise(widths)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), gb.BatchNorm2d(16))
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in pairs))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(torch.relu(self.stem(x)))
        return self.head(adaptive_avg_pool2d(y, 1).flatten(1))


def perceptron() -> nn.Module:
    return m2(784, "relu", True, stream(0, "weights"))


# name -> network, shape of a batch, steps of a run, rounds
Case = tuple[Callable[[], nn.Module], tuple[int, ...], int, int]
CASES: dict[str, Case] = {
    "M2 (784-100-100-10), batch 64": (perceptron, (64, 784), 3000, 11),
    "ResNet-20, 32x32, batch 16": (ResNet20, (16, 3, 32, 32), 300, 5),
}


def run(case: Case, steps: int, recorded: bool, limit: float | None) -> dict[str, Any]:
    """One training from its start: seconds, final parameters, the recorder's own account."""
    build, shape, _, _ = case
    torch.manual_seed(0)
    net = build().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    x, y = torch.randn(shape), torch.randint(10, shape[:1])
    rec = gb.Recorder(net, optimizer=optimizer, every=EVERY, max_overhead=limit)
    started = time.process_time()
    for _ in range(steps):
        if recorded:
            rec.step(cross_entropy, (x, y))
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    seconds = time.process_time() - started
    result = {"seconds": seconds, "state": net.state_dict(), "overhead": rec.overhead}
    costs = rec.record().series["seconds"].values if recorded else []
    return {**result, "costs": costs, "skipped": rec.skipped}


def measure() -> dict[str, Any]:
    results = []
    for name, case in CASES.items():
        _, _, steps, rounds = case
        run(case, min(steps, 20), True, None)  # what is met for the first time
        for limit in (None, 0.05):
            pairs = []
            for _ in range(rounds):
                pair = {}
                for recorded in random.sample((False, True), 2):
                    pair[recorded] = run(case, steps, recorded, limit)
                for key, value in pair[False]["state"].items():
                    assert torch.equal(value, pair[True]["state"][key]), key
                pairs.append((pair[False], pair[True]))
            ratios = [with_["seconds"] / without["seconds"] - 1 for without, with_ in pairs]
            measured = statistics.median(ratios)
            reported = statistics.median(with_["overhead"] for _, with_ in pairs)
            costs = [cost for _, with_ in pairs for cost in with_["costs"][1:]]
            step = statistics.median(without["seconds"] for without, _ in pairs) / steps
            results.append(
                {
                    "network": name,
                    "max_overhead": limit,
                    "steps": steps,
                    "rounds": rounds,
                    "step_ms": round(step * 1e3, 3),
                    "record_ms": round(statistics.median(costs) * 1e3, 3),
                    "skipped": statistics.median(with_["skipped"] for _, with_ in pairs),
                    "measured": round(measured, 4),
                    "measured_range": [round(min(ratios), 4), round(max(ratios), 4)],
                    "reported": round(reported, 4),
                }
            )
    return {
        "what": f"cost of gb.Recorder with its default probes, every {EVERY} steps",
        "required": REQUIRED,
        "agree_within": AGREE,
        "results": results,
    }


def show(result: dict[str, Any]) -> str:
    heads = ("network", "limit", "step ms", "record ms", "skipped", "measured", "reported")
    lines = [result["what"], _line(heads)]
    for row in result["results"]:
        limit = "none" if row["max_overhead"] is None else f"{row['max_overhead']:.0%}"
        cells = (row["step_ms"], row["record_ms"], row["skipped"])
        shares = (f"{row['measured']:.1%}", f"{row['reported']:.1%}")
        lines.append(_line((row["network"], limit, *cells, *shares)))
        ratio = row["measured"] / row["reported"]
        fine = 1 / result["agree_within"] <= ratio <= result["agree_within"]
        lines.append(f"    agree within {result['agree_within']}: {'met' if fine else 'NOT met'}")
        if row["max_overhead"] is not None:  # the default
            within = max(row["measured"], row["reported"]) <= result["required"]
            verdict = "met" if within else "NOT met"
            lines[-1] += f"; at most {result['required']:.0%}: {verdict}"
    return "\n".join(lines)


def _line(cells: tuple[Any, ...]) -> str:
    return f"{cells[0]:32}" + "".join(f"{cell!s:>11}" for cell in cells[1:])
