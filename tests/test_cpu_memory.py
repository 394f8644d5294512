"""No CPU kernel reads or writes outside its tensors: each lies against a page that is not there.

Run as a program, this file is the child process that such an access would end.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import signal
import struct
import subprocess
import sys
from typing import Any

import cases
import kernels
import pytest
import torch
from torch import Tensor

from gammabeta import ops
from gammabeta.ops import _cpu
from gammabeta.ops._cpu import _calls, _compile

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="protects pages by Linux's mprotect"),
    pytest.mark.skipif(
        _compile.missing() is not None, reason=f"no CPU kernels: {_compile.missing()}"
    ),
]

PAGE = mmap.PAGESIZE
# channels, rows and positions around the lengths of vectors, blocks and groups; nothing even
SHAPES = (
    (2, 1),
    (7, 5),
    (9, 17),
    (33, 3),
    (64, 65),
    (3, 129),
    (2, 7, 1, 1),
    (3, 1, 7, 7),
    (31, 17, 13, 1),
    (2, 3, 1, 130),
    (1, 66, 3, 3),
    (5, 9, 15),
    (2, 3, 3, 5, 7),
    (1, 2, 1031),
)
LARGE = ((3, 33, 19, 23), (701, 67))  # for two threads
SIDES = ("below", "above")
FRESH = {name: getattr(torch, name) for name in ("empty", "empty_like", "stack")}
empty, kernel = torch.empty, _compile.kernel


# --- the child -----------------------------------------------------------------------------------


class Fence:
    """Hands out tensors of which one end touches a page that may not be touched."""

    def __init__(self, side: str) -> None:
        self.side = side
        self.held: dict[int, tuple[mmap.mmap, Any, int]] = {}

    def memory(self, size: int) -> int:
        pages = -(-size // PAGE)
        mapped = mmap.mmap(-1, (pages + 2) * PAGE)
        mapped.write(b"\xff" * len(mapped))  # NaN in every floating dtype
        raw = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        first = ctypes.addressof(raw)
        for page in (first, first + (pages + 1) * PAGE):
            if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE, 0):
                raise OSError("mprotect refused")
        address = first + PAGE + (0 if self.side == "below" else pages * PAGE - size)
        self.held[address] = (mapped, raw, size)
        return address

    def like(self, t: Tensor) -> Tensor:
        """Memory of the size, strides and values of a tensor without holes."""
        if t.numel() == 0:
            return t
        address = self.memory(t.nbytes)
        raw = (ctypes.c_char * t.nbytes).from_address(address)
        flat = torch.frombuffer(raw, dtype=t.dtype)
        made = empty(0, dtype=t.dtype).set_(flat.untyped_storage(), 0, t.shape, t.stride())
        return made.copy_(t)

    def fenced(self, function: Any) -> Any:
        return lambda *args, **options: self.like(function(*args, **options))

    def holds(self, address: int) -> bool:
        return any(first <= address < first + size for first, (*_, size) in self.held.items())

    @contextlib.contextmanager
    def around(self):
        """All that torch.empty gives is fenced too; no kernel gets an address that is not."""
        seen: set[tuple[str, str]] = set()

        def fenced_kernel(layout, direction, form):
            run = kernel(layout, direction, form)

            def checked(words):
                addresses = struct.unpack_from(f"{len(_calls.POINTERS)}q", words)
                for name, address in zip(_calls.POINTERS, addresses, strict=True):
                    assert address == 0 or self.holds(address), f"{name} is not fenced"
                    if address:
                        seen.add((layout, name))
                return run(words)

            return checked

        for name, function in FRESH.items():
            setattr(torch, name, self.fenced(function))
        _compile.kernel = fenced_kernel
        _forget()
        try:
            yield seen
        finally:
            _compile.kernel = kernel
            for name, function in FRESH.items():
                setattr(torch, name, function)
            _forget()

    def release(self) -> None:
        self.held.clear()


def _forget() -> None:
    """No scratch memory and no kernel of an earlier call is used again."""
    _calls._local.scratch = empty(0, dtype=torch.uint8)
    for cached in vars(_calls).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def _everything(call: cases.Call, act: Any, stats: Any) -> list[Tensor]:
    """Through the operator, forward and backward, and the seam."""
    leaves = cases.leaves(call)
    weight, bias, residual = (leaves.get(k) for k in ("weight", "bias", "residual"))
    y, _ = ops.run(leaves["x"], weight, bias, stats, 1e-5, act, residual, call.mask, None, "cpu")
    found = [y.detach(), *torch.autograd.grad(y, list(leaves.values()), call.dy)]
    if stats is not None or call.residual is not None:
        return found
    valid = None if call.mask is None else call.mask.unsqueeze(1)
    parsed = ops._activations.parse(act)
    with torch.no_grad():
        own = _cpu.moments(call.x, valid)
        rest = (call.weight, call.bias, 1e-5, parsed, None, valid)
        sums = _cpu.reduce_grads(call.dy, call.x, own, *rest)
        n = own.n.reshape(-1)[:1]
        dx, _ = _cpu.grad_input(call.dy, call.x, own, sums, n, *rest)
    return [*found, *own, *sums, dx]


def _fenced(fence: Fence, call: cases.Call) -> cases.Call:
    return cases.Call(*(None if t is None else fence.like(t) for t in call))


def _buffers(channels: int) -> list[Tensor]:
    return [t.float() for t in cases.given(channels, torch.float32)]


def _enter(fence: Fence, call: cases.Call) -> list[Tensor]:
    """The update of running statistics."""
    held = [fence.like(t) for t in _buffers(call.x.shape[1])]
    tracked = fence.like(torch.tensor(3))
    _, seen = ops.run(call.x, None, None, None, 1e-5, None, None, None, None, "cpu")
    for momentum in (0.1, None):
        assert ops.enter(seen, *held, tracked, momentum, False) is True
    return [*held, tracked]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) and p.isfinite().all() for p, q in zip(a, b, strict=True))


def _calls_of(dtype: torch.dtype) -> Any:
    forms = itertools.product((False, True), (None, "relu"), (False, True))
    shapes = SHAPES if dtype == torch.float32 else SHAPES[::3]  # they differ in load and store
    for mask, act, residual in forms:
        if mask and act is None:  # the kernels for relu serve it
            continue
        for shape, layout in itertools.product(shapes, ("contiguous", "channels_last")):
            if layout == "contiguous" or len(shape) > 2:
                call = cases.call(shape, dtype=dtype, layout=layout, residual=residual, mask=mask)
                yield f"{shape} {layout} {act} residual={residual} mask={mask}", call, act
    for shape, layout in itertools.product(LARGE, ("contiguous", "channels_last")):
        yield f"{shape} {layout}", cases.call(shape, dtype=dtype, layout=layout), "relu"


def _walk(dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    kernels.share()
    ran, reached = 0, set()
    for name, call, act in _calls_of(dtype):
        stats = ops.Held(*_buffers(call.x.shape[1]))
        plain = [_everything(call, act, None), _everything(call, act, stats)]
        for side in SIDES:
            print(side, name, flush=True)  # the last line is where it ended
            fence = Fence(side)
            with fence.around() as seen:
                fenced = _fenced(fence, call)
                held = ops.Held(*map(fence.like, _buffers(call.x.shape[1])))
                found = [_everything(fenced, act, None), _everything(fenced, act, held)]
                entered = _enter(fence, fenced)
            assert all(map(_same, plain, found)), name
            assert all(t.isfinite().all() for t in entered), name
            reached |= seen
            fence.release()
            ran += 2
    names = {name for _, name in reached}
    assert names == set(_calls.POINTERS), set(_calls.POINTERS) - names
    print(f"all {len(names)} operands fenced in {ran} calls")


def _trespass(side: str) -> None:
    fence = Fence(side)
    t = fence.like(torch.arange(5.0))
    assert t.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    print("inside", flush=True)
    ctypes.string_at(t.data_ptr() + (-1 if side == "below" else t.nbytes), 1)
    print("outside", flush=True)


# --- the tests -----------------------------------------------------------------------------------


def _child(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", __file__, *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.parametrize("side", SIDES)
def test_one_byte_outside_ends_the_process(side):
    done = _child("trespass", side)
    assert done.returncode == -signal.SIGSEGV
    assert done.stdout.split() == ["inside"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_kernel_reads_or_writes_outside_its_tensors(dtype):
    done = _child("walk", dtype)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]}\n{done.stderr[-3000:]}"
    assert lines[-1].startswith("all ")


if __name__ == "__main__":
    what, which = sys.argv[1:]
    if what == "walk":
        _walk(getattr(torch, which))
    else:
        _trespass(which)
