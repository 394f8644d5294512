"""What a forward pass keeps for its backward, and what keeping less costs.

Three variants of two networks: PyTorch's layers, ours (``gb.convert(net, fuse=True)``), ours inside
``gb.recompute_outputs``. Kept bytes are counted in two ways that know nothing of each other: as the
storages that the nodes of the graph hold, without parameters, buffers and the batch, and as what
the allocator has given out more after the forward pass than before. The steps of the variants take
turns in a new random order every round; a ratio is the median of those within a round, with its
90 % interval. The table of layers counts what the nodes of one layer and its activation hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gammabeta as gb
from benchmarks.layer_overhead import median_interval
from gammabeta.ops._recompute import _Again, _Kept

THREADS, ROUNDS = 2, 21
BATCH = (64, 3, 32, 32)
FEWER = {"ResNet-20": 0.20, "plain stack": 0.45}  # bytes, with recompute_outputs
AS_FAST = 1.0  # of PyTorch's speed, at least
VARIANTS = ("torch", "gammabeta", "recompute")
LAYER = (32, 64, 28, 28)
C = LAYER[1]


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al. 2015, arXiv 1512.03385, section 4.2)."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        stride = out // inside
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU(inplace=True)
        shortcut = (nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.short = nn.Identity() if stride == 1 else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.short(x))


def resnet_20() -> nn.Module:
    """Three stages of three blocks, 16, 32 and 64 channels, for images of 32×32."""
    pairs = itertools.pairwise([16] * 4 + [32] * 3 + [64] * 3)
    stem = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    return nn.Sequential(*stem, *(Block(a, b) for a, b in pairs), *_head(64))


def plain_stack() -> nn.Module:
    """Eight times convolution, normalization and ReLU."""
    layers: list[nn.Module] = []
    for inside, out in itertools.pairwise([3] + [32] * 8):
        layers += [nn.Conv2d(inside, out, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *_head(32))


def _head(width: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)


NETWORKS = {"ResNet-20": resnet_20, "plain stack": plain_stack}


# -- counting ---------------------------------------------------------------------------------


def kept_bytes(output: Tensor, model: nn.Module, *others: Tensor) -> int:
    """Bytes that the graph behind ``output`` holds, but for the model's own and ``others``."""
    own = (*model.parameters(), *model.buffers(), *others)
    known = {t.untyped_storage().data_ptr() for t in own}
    total = 0
    for tensor in _held(output):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _held(output: Tensor) -> Iterator[Tensor]:
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                saved = getattr(node, name)
                for one in saved if isinstance(saved, list | tuple) else (saved,):
                    yield from _inside(one.data)


def _inside(packed: object) -> Iterator[Tensor]:
    """The tensors of what stands for a saved one."""
    if isinstance(packed, Tensor):
        yield packed
    elif isinstance(packed, _Kept):
        yield packed.tensor
    elif isinstance(packed, _Again):
        if packed.ready is not None:
            yield packed.ready
        for one in packed.recipe.inputs:
            yield from _inside(one)
    else:
        assert packed is None, f"an unknown way to save a tensor: {packed!r}"


class _Heap(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> int | None:
    """Bytes that the process's allocator has given out; None where it is not glibc's."""
    count = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if count is None:
        return None
    count.restype = _Heap
    heap = count()
    return int(heap.uordblks + heap.hblkhd)


# -- networks ---------------------------------------------------------------------------------


class Variant:
    """One network's training step, in one of the three ways."""

    def __init__(self, name: str, build: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        net = build()
        self.net = net if name == "torch" else gb.convert(net, fuse=True)
        self.context = gb.recompute_outputs if name == "recompute" else contextlib.nullcontext
        self.x, self.y = torch.randn(BATCH), torch.randint(10, BATCH[:1])

    def forward(self) -> Tensor:
        with self.context():
            return F.cross_entropy(self.net(self.x), self.y)

    def step(self) -> list[Tensor]:
        self.net.zero_grad()
        self.forward().backward()
        return [p.grad for p in self.net.parameters()]

    def kept(self) -> tuple[int, int | None]:
        """Counted in the graph, and by the allocator."""
        before = allocated()
        loss = self.forward()
        after = allocated()
        grown = None if before is None or after is None else after - before
        return kept_bytes(loss, self.net, self.x, self.y), grown


def network(name: str, build: Callable[[], nn.Module]) -> dict[str, Any]:
    variants = {kind: Variant(kind, build) for kind in VARIANTS}
    gradients = {kind: [g.clone() for g in v.step()] for kind, v in variants.items()}
    for ours, again, theirs in zip(
        *(gradients[kind] for kind in ("gammabeta", "recompute", "torch")), strict=True
    ):
        assert torch.equal(ours, again), "recomputing changed a gradient"
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
    for v in variants.values():
        v.step()
    kept = {kind: v.kept() for kind, v in variants.items()}
    times: dict[str, list[float]] = {kind: [] for kind in VARIANTS}
    for _ in range(ROUNDS):
        for kind in random.sample(VARIANTS, len(VARIANTS)):
            started = time.perf_counter()
            variants[kind].step()
            times[kind].append(time.perf_counter() - started)
    return {
        "network": name,
        "batch": list(BATCH),
        "kept_bytes": {kind: counted for kind, (counted, _) in kept.items()},
        "allocated_bytes": {kind: grown for kind, (_, grown) in kept.items()},
        "step_ms": {k: round(statistics.median(v) * 1e3, 3) for k, v in times.items()},
        "speed_beside_torch": {
            kind: [
                round(ratio, 4)
                for ratio in median_interval(
                    [a / b for a, b in zip(times["torch"], times[kind], strict=True)]
                )
            ]
            for kind in VARIANTS[1:]
        },
    }


# -- layers -----------------------------------------------------------------------------------

_ACTS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda u: u,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
}


def layer(act: str | None, added: bool) -> dict[str, Any]:
    """Bytes for each element of x that one normalization keeps, with all that belongs to it."""
    x = torch.randn(LAYER, requires_grad=True)
    residual = torch.randn(LAYER, requires_grad=True) if added else None
    ours, theirs = gb.BatchNormAct2d(C, act=act), nn.BatchNorm2d(C)
    y = ours(x, residual)
    u = theirs(x)
    z = _ACTS[act](u if residual is None else u + residual)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
    count = x.numel()
    return {
        "activation": act,
        "residual": added,
        "torch": round(kept_bytes(z, theirs) / count, 4),
        "gammabeta": round(kept_bytes(y, ours) / count, 4),
    }


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "torch.nn.BatchNorm2d": lambda: nn.BatchNorm2d(C),
    "BatchNorm2d": lambda: gb.BatchNorm2d(C),
    "BatchNorm2d in eval mode": lambda: gb.BatchNorm2d(C).eval(),
    'BatchNorm2d, backend="native"': lambda: gb.BatchNorm2d(C, backend="native"),
    'BatchNorm2d, backend="reference"': lambda: gb.BatchNorm2d(C, backend="reference"),
    'BatchNormAct2d, backend="native"': lambda: gb.BatchNormAct2d(C, backend="native"),
    'BatchNormAct2d, backend="reference"': lambda: gb.BatchNormAct2d(C, backend="reference"),
    "BatchRenorm2d": lambda: gb.BatchRenorm2d(C),
    "GhostBatchNorm2d, batches of 8": lambda: gb.GhostBatchNorm2d(C, virtual_batch_size=8),
    "DecorrelatedBatchNorm2d, groups of 16": lambda: gb.DecorrelatedBatchNorm2d(C, group_size=16),
    "IterNorm2d, groups of 16": lambda: gb.IterNorm2d(C, group_size=16),
}


def other(name: str) -> dict[str, Any]:
    """Bytes for each element of x that a layer keeps, and with a next one that keeps y."""
    found: dict[str, Any] = {"layer": name}
    for kind, context in (("next", contextlib.nullcontext), ("recompute", gb.recompute_outputs)):
        model = OTHERS[name]()
        x, scale = torch.randn(LAYER, requires_grad=True), torch.ones((), requires_grad=True)
        with context():
            y = model(x)
            z = y * scale
        found.setdefault("alone", round(kept_bytes(y, model) / x.numel(), 4))
        found[kind] = round(kept_bytes(z, model, scale) / x.numel(), 4)
    return found


def measure() -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        networks = [network(name, build) for name, build in NETWORKS.items()]
    finally:
        torch.set_num_threads(before)
    return {
        "what": "bytes kept for the backward pass, and the time of a training step",
        "step_threads": THREADS,
        "rounds": ROUNDS,
        "required": {"fewer_bytes": FEWER, "speed_beside_torch": AS_FAST},
        "ratios": "median of PyTorch's time by that of the variant, with its 90 % interval",
        "networks": networks,
        "layer_shape": list(LAYER),
        "bytes_per_element": [layer(act, added) for added in (False, True) for act in _ACTS],
        "with_next_layer": [other(name) for name in OTHERS],
    }


def show(result: dict[str, Any]) -> str:
    lines = [result["what"]]
    for row in result["networks"]:
        name, kept, grown = row["network"], row["kept_bytes"], row["allocated_bytes"]
        lines.append(f"{name}, batch {'x'.join(map(str, row['batch']))}")
        for kind in VARIANTS:
            text = f"  {kind:10} {kept[kind] / 2**20:7.2f} MiB kept"
            if grown[kind] is not None:
                text += f", {grown[kind] / 2**20:7.2f} MiB allocated"
            text += f", {row['step_ms'][kind]:7.1f} ms"
            if kind != "torch":
                low, middle, high = row["speed_beside_torch"][kind]
                text += f", {middle:.3f} [{low:.3f}, {high:.3f}] times PyTorch's speed"
            lines.append(text)
        fewer = 1 - kept["recompute"] / kept["torch"]
        wanted = result["required"]["fewer_bytes"][name]
        speed = row["speed_beside_torch"]["recompute"][1]
        met = fewer >= wanted and speed >= result["required"]["speed_beside_torch"]
        lines.append(
            f"  {fewer:.1%} fewer bytes than PyTorch at {speed:.2f} times its speed "
            f"(required {wanted:.0%} at {AS_FAST}): {'met' if met else 'NOT met'}"
        )
    lines.append(f"bytes for each element of x, {'x'.join(map(str, result['layer_shape']))}")
    for row in result["bytes_per_element"]:
        name = f"{row['activation']}{' behind a residual' if row['residual'] else ''}"
        lines.append(f"  {name:28} torch {row['torch']:.3f}  gammabeta {row['gammabeta']:.3f}")
    for row in result["with_next_layer"]:
        lines.append(
            f"  {row['layer']:38} alone {row['alone']:.3f}  with a next layer {row['next']:.3f}  "
            f"recomputed {row['recompute']:.3f}"
        )
    return "\n".join(lines)
