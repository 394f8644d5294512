"""From tensors to calls of kernels: geometry, addresses, what is kept for the backward."""

from __future__ import annotations

import functools
import math
import os
import struct
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from gammabeta.moments import Moments
from gammabeta.ops import _torch
from gammabeta.ops._activations import Parsed
from gammabeta.ops._cpu import _compile
from gammabeta.ops._seen import Held, as_moments

# flags of the kernels: see _operands, which needs LLVM to be imported
GIVEN, HELD, ONLY, TOTALS, FIXED, STREAM = 1, 2, 4, 8, 16, 32
POINTERS = (
    *("x", "y", "dy", "dx", "residual", "dresidual", "bits", "mask", "weight", "bias"),
    "stats",  # float64 (2, C): mean, sum of squared deviations
    *("mean", "var"),  # float32 (C,): running statistics, with the flag HELD
    "plan",  # float32 (5, C): see _operands.PLAN
    "scratch",
    "sums",  # float64 (2, C): Σ dy and Σ dy·x̂
    *("dweight", "dbias"),
    *("running_mean", "running_var", "tracked"),  # a layer's float32 and int64 buffers
)
NUMBERS = ("count", "eps", "slope", "momentum", "correction")
INTEGERS = (
    *("n", "c", "s"),  # samples, channels, positions
    "block",  # planes: channels that one thread takes at a time
    *("rows", "columns", "copies"),  # pixels: the matrix; how often a channel stands in a row
    *("strips", "strip"),  # pixels: parts that the sums are taken over, rows in each
    *("items", "nears", "gathers", "groups", "finals"),  # pieces of work of each stage
    *("threads", "flags"),
)
pointers = struct.Struct(f"{len(POINTERS)}q").pack
_numbers = struct.Struct(f"{len(NUMBERS)}d").pack
_integers = struct.Struct(f"{len(INTEGERS)}q").pack

CPU = torch.device("cpu")  # said everywhere: a default may have been set
BLOCK = 64  # planes: channels at most in a block, what the stack has room for
GROUP = 64  # pixels: channels in an item of the second stage
LANES = 16
PARTS = 8  # pixels: float32 rows in scratch: a value near the mean, the plan, two means
SERIAL = 32768  # elements, below which a second thread costs more than it saves
_RUN = 32768  # bytes that lie side by side, at least, in what a thread reads
_CACHE = 1_200_000  # bytes of a block, at most, as long as it is not one channel
_STRIP = 1 << 18  # bytes in a strip
_HUGE = 1 << 20  # bytes, from which on memory is asked for in large pages


class Operands(NamedTuple):
    """One call in the layout of a kernel."""

    layout: str
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None  # bool, with a channel axis of size 1
    eps: float
    slope: float | None  # of what is fused; None for no activation


class Recipe(NamedTuple):
    """All of a call but its addresses: one lookup instead of much arithmetic for small inputs."""

    run: _compile.Run
    words: bytes  # numbers and integers
    scratch: int  # bytes
    signs: int  # 16-bit words


class Plain(NamedTuple):
    """Both directions of a training call without a mask: all that need not be found out again."""

    layout: str
    act: Parsed
    eps: float
    slope: float | None
    values: float  # per channel
    kept: int  # float64 words
    place: int  # of the plan in them, bytes
    large: bool
    forward: Recipe
    backward: Recipe
    sums: Recipe  # backward without dx


class _Local(threading.local):
    scratch: Tensor = torch.empty(0, dtype=torch.uint8, device=CPU)


_local = _Local()


def prepare(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    slope: float | None,
    layout: str | None = None,
) -> Operands:
    """A call's operands in the layout of x, or in the one given; most need no copy."""
    layout = layout or lies(x)
    x = arranged(x, layout)
    if residual is not None:
        residual = arranged(residual, layout)
    if mask is not None:
        mask = mask.contiguous()
    weight = None if weight is None else _real(weight).contiguous()
    bias = None if bias is None else _real(bias).contiguous()
    return Operands(layout, x, weight, bias, residual, mask, eps, slope)


def lies(x: Tensor) -> str:
    """The layout that x is taken in, after a copy if it lies in none."""
    dense = x.dim() == 2 or x.numel() == x.shape[0] * x.shape[1]
    return layout_of(x) or ("pixels" if dense else "planes")


def at_hand(t: Tensor) -> bool:
    """Whether a kernel can read t, one element after the other, as it lies."""
    return t.is_contiguous() and not t.is_neg() and not t._is_zerotensor()


def readable(held: Held) -> bool:
    """Whether a kernel can read these running statistics as they lie."""
    return all(
        type(t) is Tensor and t.dtype is torch.float32 and t.is_cpu and at_hand(t) for t in held
    )


def _real(t: Tensor) -> Tensor:
    """``t`` with values of its own: not a view whose signs are still to be changed, not a stand-in
    for zeros without memory.
    """
    if t._is_zerotensor():
        return t.clone()
    return t.resolve_neg() if t.is_neg() else t


def layout_of(x: Tensor) -> str | None:
    """Which kernels can walk over x as it lies in memory; None if it has to be copied."""
    if x.is_contiguous():
        return "pixels" if x.dim() == 2 or x.numel() == x.shape[0] * x.shape[1] else "planes"
    if x.dim() == 4:
        return "pixels" if x.is_contiguous(memory_format=torch.channels_last) else None
    return "pixels" if x.movedim(1, -1).is_contiguous() else None


def arranged(t: Tensor, layout: str) -> Tensor:
    """``t``, copied if it does not lie in that layout."""
    t = _real(t)
    if layout == "planes" or t.dim() == 2:
        return t.contiguous()
    if t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@functools.lru_cache(maxsize=4096)
def recipe(
    direction: str,
    layout: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    act: bool,
    residual: bool,
    masked: bool,
    threads: int,
    flags: int,
    *numbers: float,
) -> Recipe:
    """How the work is divided. Sums depend on the shape alone, never on the threads."""
    size = 4 if dtype == torch.float32 else 2
    words, scratch, signs = _divide(layout, shape, size, masked, threads, flags)
    form = ("float32" if size == 4 else "bfloat16", act or masked, residual or masked, masked)
    run = _compile.kernel(layout, direction, form)
    return Recipe(run, _numbers(*numbers, 0.0, 0.0) + words, scratch, signs)


@functools.lru_cache(maxsize=4096)
def plain(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    eps: float,
    act: Parsed,
    slope: float | None,
    residual: bool,
    threads: int,
) -> Plain:
    size, channels = math.prod(shape), shape[1]
    count, bytes_ = float(size // channels), size * dtype.itemsize
    row = channels if layout == "pixels" else size // (shape[0] * channels)
    flags = _streams(bytes_, row)
    form = (layout, shape, dtype, slope is not None)
    numbers = (max(count, 1.0), eps, 1.0 if slope is None else slope)
    signs = residual and slope is not None
    there = recipe("forward", *form, residual, False, threads, flags, *numbers)
    back, sums = (
        recipe("backward", *form, signs, False, threads, flags | extra, *numbers)
        for extra in (0, ONLY)
    )
    large = bytes_ >= _HUGE
    kept = kept_size(channels)
    return Plain(layout, act, eps, slope, count, kept, 16 * channels, large, there, back, sums)


@functools.lru_cache(maxsize=4096)
def held(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    eps: float,
    slope: float | None,
    residual: bool,
    threads: int,
) -> tuple[Recipe, bool]:
    """Inference with a layer's running statistics, and whether the output is large."""
    size, channels = math.prod(shape), shape[1]
    bytes_ = size * dtype.itemsize
    row = channels if layout == "pixels" else size // (shape[0] * channels)
    form = (layout, shape, dtype, slope is not None, residual, False, threads)
    numbers = (1.0, eps, 1.0 if slope is None else slope)
    return recipe("forward", *form, HELD | _streams(bytes_, row), *numbers), bytes_ >= _HUGE


def _divide(
    layout: str, shape: tuple[int, ...], size: int, masked: bool, threads: int, flags: int
) -> tuple[bytes, int, int]:
    """The integers of a call, its scratch in bytes, its signs in words."""
    n, c, *positions = shape
    s = math.prod(positions)
    given = bool(flags & (GIVEN | HELD))
    if layout == "planes":
        return _planes(n, c, s, size, threads, flags, given)
    rows, copies = n * s, 1
    if c < LANES and not masked:
        copies = _copies(rows, c)
    columns = c * copies
    rows //= copies
    bytes_ = rows * columns * size
    strips = max(1, min(64, bytes_ // _STRIP, bytes_ // (256 * columns)))
    strip = _up(_up(rows, strips) // strips, 8)
    strips = _up(rows, strip) // strip
    width = _up(columns, LANES)
    gathers = 0 if given or flags & TOTALS else strips
    finals = 0 if flags & ONLY else strips
    # the last vectors may reach beyond: 64 bytes that are read and never used
    scratch = width * (4 * PARTS + 16 * strips) + 64
    words = (n, c, s, 0, rows, columns, copies, strips, strip)
    work = (0, int(not given), gathers, -(-c // GROUP), finals)
    return _integers(*words, *work, threads, flags), scratch, rows * width // LANES


def _planes(
    n: int, c: int, s: int, size: int, threads: int, flags: int, given: bool
) -> tuple[bytes, int, int]:
    block = min(BLOCK, -(-_RUN // (s * size)))
    # what is read once goes in the order of memory
    block = BLOCK if given else max(1, min(block, _CACHE // (s * size * n)))
    block = max(1, min(block, c // threads))
    blocks = -(-c // block)
    # nothing has to be summed: few channels are no reason for idle threads
    parts = max(1, min(n, 4 * threads // blocks)) if given else 1
    words = (n, c, s, block, 0, 0, 0, 0, 0, blocks * parts, 0, 0, 0, 0)
    return _integers(*words, threads, flags), 0, n * c * -(-s // LANES)


def _up(number: int, unit: int) -> int:
    """The next multiple of ``unit``."""
    return -(-number // unit) * unit


def _copies(rows: int, c: int) -> int:
    """How many rows of few channels to take as one, so that vectors are full."""
    whole = LANES // math.gcd(c, LANES)
    wanted = [whole, *range(64 // c, 1, -1)]
    return next((copies for copies in wanted if rows % copies == 0), 1)


def threads_for(x: Tensor) -> int:
    return 1 if x.numel() < SERIAL else _compile.threads()


def scratch(size: int) -> int:
    if size > _local.scratch.numel():
        _local.scratch = torch.empty(size, dtype=torch.uint8, device=CPU)
    return _local.scratch.data_ptr()


def fresh_like(x: Tensor) -> Tensor:
    """Memory in the layout of x; a large one in large pages, which are mapped in less time."""
    return fresh(x, x.nbytes >= _HUGE)


def fresh(x: Tensor, large: bool) -> Tensor:
    made = torch.empty_like(x)
    if large:
        _compile.advise(made.data_ptr(), made.nbytes)
    return made


def _streams(size: int, row: int) -> int:
    """STREAM, for an output of ``size`` bytes that with its inputs is more than the last cache.

    Whole vectors are then stored at multiples of their size, where all rows begin at one; entering
    rows with a shorter vector cost more than it saved.
    """
    return STREAM if 3 * size > _LAST_CACHE and row % LANES == 0 else 0


def _row(x: Tensor, layout: str) -> int:
    return x.shape[1] if layout == "pixels" else x.numel() // (x.shape[0] * x.shape[1])


def _last_cache() -> int:
    """Bytes of the largest cache, as the system tells; else what is usual."""
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or 1 << 25
    except (AttributeError, ValueError, OSError):
        return 1 << 25


_LAST_CACHE = _last_cache()


def kept_size(channels: int) -> int:
    """float64 words: the statistics (2, C), in float32 the plan (5, C); what an operator adds."""
    return 2 * channels + (5 * channels + 1) // 2 + 2


def signs_of(x: Tensor, masked: bool) -> int:
    """16-bit words for one bit of each element; rows begin with a new word."""
    n, c, *positions = x.shape
    s = math.prod(positions)
    if lies(x) == "planes":
        return n * c * (_up(s, LANES) // LANES)
    copies = 1 if c >= LANES or masked else _copies(n * s, c)
    return n * s // copies * (_up(c * copies, LANES) // LANES)


def count_of(x: Tensor, mask: Tensor | None) -> float:
    if mask is None:
        return float(x.numel() // x.shape[1])
    return float(mask.sum())


def forward(
    call: Operands,
    given: Moments | Held | None,
    *,
    count: float,
    want_y: bool = True,
    want_signs: bool = False,
    again: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, what is kept (statistics and plan), and the signs before the activation if wanted.

    ``again`` is what an earlier call kept: the same output once more, bit for bit.
    """
    layout, x, weight, bias, residual, mask, eps, slope = call
    channels = x.shape[1]
    kept = torch.empty(kept_size(channels), dtype=torch.float64, device=CPU)
    flags = 0 if want_y else ONLY
    held_mean = held_var = 0
    divisor = count if count > 1.0 else 1.0
    if again is not None:
        flags |= GIVEN
        kept.copy_(again)
    elif type(given) is Held:
        flags |= HELD
        held_mean, held_var = given.mean.data_ptr(), given.var.data_ptr()
    elif given is not None:
        flags |= GIVEN
        kept[:channels] = given.mean
        kept[channels : 2 * channels] = as_moments(given).var()
        divisor = 1.0
    act, added, masked = slope is not None, residual is not None, mask is not None
    flags |= _streams(x.nbytes, _row(x, layout))
    form = (layout, x.shape, x.dtype, act, added, masked, threads_for(x), flags)
    run, words, room, size = recipe("forward", *form, divisor, eps, 1.0 if slope is None else slope)
    y = fresh_like(x) if want_y else kept
    signs = (
        torch.empty(size, dtype=torch.int16, device=CPU) if want_signs and added and act else None
    )
    stats = kept.data_ptr()
    addresses = pointers(
        x.data_ptr(),
        y.data_ptr(),
        *(0, 0),
        0 if residual is None else residual.data_ptr(),
        0,
        0 if signs is None else signs.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        stats,
        held_mean,
        held_var,
        stats + 16 * channels,
        scratch(room),
        *(0, 0, 0, 0, 0, 0),
    )
    run(addresses + words)
    return y, kept, signs


def negative(signs: Tensor, x: Tensor, masked: bool, layout: str) -> Tensor:
    """The kept signs as bool, in the shape of x, which the forward took in that layout."""
    n, c, *positions = x.shape
    numbers = torch.arange(LANES, dtype=torch.int32, device=CPU)
    bits = ((signs.to(torch.int32).unsqueeze(-1) >> numbers) & 1).bool()
    if layout == "planes":
        rows = bits.view(n * c, -1)[:, : math.prod(positions)]
        return rows.reshape(x.shape)
    copies = 1 if c >= LANES or masked else _copies(n * math.prod(positions), c)
    width = _up(c * copies, LANES)
    rows = bits.view(-1, width)[:, : c * copies]
    return rows.reshape(n, *positions, c).movedim(-1, 1)


def backward(
    dy: Tensor,
    call: Operands,
    kept: Tensor,
    signs: Tensor | None,
    count: float,
    fixed: bool,
    *,
    sums: Tensor | None = None,
    given: bool = False,
    want_dx: bool = True,
    want_dresidual: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dγ, dβ, and the residual's gradient where it is not dy itself.

    ``sums`` (float64, (2, C)) takes Σ dy and Σ dy·x̂, or, ``given``, holds those of all ranks.
    """
    layout, x, weight, bias, _, mask, eps, slope = call
    channels = x.shape[1]
    flags = (0 if want_dx else ONLY) | (FIXED if fixed else 0) | (TOTALS if given else 0)
    act, masked = slope is not None, mask is not None
    flags |= _streams(x.nbytes, _row(x, layout))
    form = (layout, x.shape, x.dtype, act, signs is not None, masked, threads_for(x), flags)
    divisor = count if count > 1.0 else 1.0
    run, words, room, _ = recipe("backward", *form, divisor, eps, 1.0 if slope is None else slope)
    dx = fresh_like(x) if want_dx else None
    dresidual = fresh_like(x) if want_dresidual else None
    dweight = (
        None if weight is None or given else torch.empty(channels, dtype=torch.float32, device=CPU)
    )
    dbias = (
        None if bias is None or given else torch.empty(channels, dtype=torch.float32, device=CPU)
    )
    stats = kept.data_ptr()
    place = scratch(room + 16 * channels)
    addresses = pointers(
        x.data_ptr(),
        0,
        dy.data_ptr(),
        0 if dx is None else dx.data_ptr(),
        0,
        0 if dresidual is None else dresidual.data_ptr(),
        0 if signs is None else signs.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        *(0, 0),
        stats,
        *(0, 0),
        stats + 16 * channels,
        place,
        place + room if sums is None else sums.data_ptr(),
        0 if dweight is None else dweight.data_ptr(),
        0 if dbias is None else dbias.data_ptr(),
        *(0, 0, 0),
    )
    run(addresses + words)
    return dx, dweight, dbias, dresidual


def enter(
    stats: Tensor,
    channels: int,
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    momentum: float | None,
    correction: float,
) -> bool:
    """Enter a batch into a layer's buffers, or nothing of it: whether it was finite."""
    if momentum is None:  # 1/count, or where nothing is counted, as in PyTorch, no change
        momentum = 0.0 if tracked is None else -1.0
    run, words = _update(channels, momentum, correction)
    count = 0 if tracked is None else tracked.data_ptr()
    mean, var = running_mean.data_ptr(), running_var.data_ptr()
    addresses = pointers(*_TEN, stats.data_ptr(), *_SEVEN, mean, var, count)
    if not run(addresses + words):
        return False
    if tracked is None:
        _torch.written(running_mean, running_var)
    else:
        _torch.written(running_mean, running_var, tracked)
    return True


_TEN, _SEVEN = (0,) * 10, (0,) * 7


@functools.lru_cache(maxsize=4096)
def _update(channels: int, momentum: float, correction: float) -> tuple[_compile.Run, bytes]:
    integers = _integers(0, channels, *(0,) * (len(INTEGERS) - 2))
    run = _compile.kernel("running", "update", ("float32", False, False, False))
    return run, _numbers(0.0, 0.0, 0.0, momentum, correction) + integers
