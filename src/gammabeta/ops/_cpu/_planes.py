"""Kernels for (N, C, S) with the positions of a channel side by side: NCL, NCHW, NCDHW.

A thread takes a block of channels through all passes while they are in its cache: statistics,
normalization, residual and activation; backward the two sums, then dx. Sums run in 64 lanes of
float32 over at most 512 elements and go on in 16 lanes of float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from llvmlite import ir

from gammabeta.ops._cpu._calls import BLOCK, GIVEN, HELD, LANES, ONLY, TOTALS
from gammabeta.ops._cpu._emit import F32, F64, I64, VF32, VF64, Value, vector
from gammabeta.ops._cpu._operands import PLAN, Form, Kernel, parallel

_CHUNK = 512
Pair = Callable[[Value, Value | None], tuple[Value, Value]]
Step = Callable[[Value, int, Value | None], None]


class _Stage(Kernel):
    """A block of channels, c0 to c1, of the samples n0 to n1."""

    c0: Value
    c1: Value
    n0: Value
    n1: Value

    def __init__(self, module: ir.Module, form: Form) -> None:
        super().__init__(module, "stage", form, [I64, I64])
        self.n, self.c, self.s = self.words("n c s")
        self.mask, self.block = self.words("mask block")
        self.local = self.space(F32, BLOCK * len(PLAN))  # the plan of this block's channels
        self.sums = self.space(F64, BLOCK * 2 * LANES)
        self.pair = self.space(F64, BLOCK * 2)

    @contextlib.contextmanager
    def items(self) -> Iterator[Value]:
        """Each item: which part of the samples it is, 0 if they are not divided."""
        _, first, end = self.arguments
        blocks = (self.c + self.block - 1) // self.block
        parts = self.word("items") // blocks
        with self.loop(first, end) as item:
            self.c0 = item % blocks * self.block
            self.c1 = self.least(self.c0 + self.block, self.c)
            part = item // blocks
            self.n0 = part * self.n // parts
            self.n1 = (part + 1) * self.n // parts
            yield part

    @contextlib.contextmanager
    def planes(self) -> Iterator[tuple[Value, Value, Value]]:
        """Sample, channel and place of its first element, in the order of memory."""
        with self.loop(self.n0, self.n1) as n, self.loop(self.c0, self.c1) as c:
            yield n, c, (n * self.c + c) * self.s

    @contextlib.contextmanager
    def octets(self) -> Iterator[tuple[Value, Value, Value]]:
        """Eight channels at a time: the first, its place in the block, those of this block."""
        with self.loop(self.c0, self.c1, 8) as c:
            yield c, c - self.c0, self.below(self.c1 - c, 8)

    def along(self, first: Value, end: Value, step: Step) -> None:
        """``step(position, accumulator, lanes)`` over positions, four vectors at a time."""
        fours = first + (end - first) // 64 * 64
        ones = first + (end - first) // 16 * 16
        with self.loop(first, fours, 64) as j:
            for u in range(4):
                step(j + 16 * u, u, None)
        with self.loop(fours, ones, 16) as j:
            step(j, 0, None)
        with self.when(ones < end):
            step(ones, 1, self.below(end - ones))

    def valid_at(self, n: Value, j: Value, lanes: Value | None) -> Value | None:
        """The lanes that count: inside the row and, with a mask, valid."""
        return self.valid(self.mask, n * self.s + j, lanes) if self.form.masked else lanes

    def sum_up(self, pair_of: Callable[[Value, Value, Value], Pair]) -> None:
        """Σ a and Σ a·b over all elements of each channel, into ``pair``.

        ``pair_of(n, c, place)`` gives the function of (position, lanes) that gives a and b.
        """
        with self.loop(self.i64(0), (self.c1 - self.c0) * (2 * LANES), 8) as i:
            self.keep(self.const(VF64, 0.0), self.sums, i)
        with self.planes() as (n, c, place):
            pair = pair_of(n, c, place)
            row = (c - self.c0) * (2 * LANES)
            with self.loop(self.i64(0), self.s, _CHUNK) as chunk:
                first = [self.variable(self.zero) for _ in range(4)]
                second = [self.variable(self.zero) for _ in range(4)]

                def step(j: Value, u: int, lanes: Value | None) -> None:
                    a, b = pair(j, lanes)
                    first[u].add(a)
                    second[u].set(self.fma(a, b, second[u].get()))

                self.along(chunk, self.least(chunk + _CHUNK, self.s), step)
                for sums, at in ((first, row), (second, row + LANES)):
                    one, two, three, four = (v.get() for v in sums)
                    self.fold((one + two) + (three + four), self.sums, at)
        with self.loop(self.c0, self.c1) as c:
            at = c - self.c0
            for half in (0, 1):
                place = at * (2 * LANES) + LANES * half
                lanes = self.doubles(self.sums, place) + self.doubles(self.sums, place + 8)
                self.keep(lanes.total(), self.pair, at + BLOCK * half)

    def local_plan(self, c: Value) -> list[Value]:
        return [self.spread(self.local, c - self.c0 + BLOCK * i) for i in range(len(PLAN))]


def forward(module: ir.Module, form: Form) -> None:
    """Statistics, unless they are given; then y."""
    exact = _exact(module, form)
    k = _Stage(module, form)
    near = k.space(F32, BLOCK)
    with k.items() as part:
        with k.when((k.word("flags") & (GIVEN | HELD)).equals(0)):
            _take_near(k, near)
            k.sum_up(lambda n, c, place: _deviations(k, near, n, c, place))
            _take_statistics(k, near, exact)
        with k.when((k.word("flags") & ONLY).equals(0)):
            plan = k.word("plan")
            with k.octets() as (c, at, lanes):
                for i, value in enumerate(k.coefficients(c, lanes)):
                    k.keep(value, k.local, at + BLOCK * i, lanes)
                    with k.when(part.equals(0)):
                        k.keep(value, plan, c + k.c * i, lanes)
            k.twice(lambda: _normalize_planes(k))
    k.end()
    parallel(module, [(k, "items")], form)


def _take_near(k: _Stage, near: Value) -> None:
    """A value near the mean of each channel: the average of one vector from up to 8 samples.

    A power of two of them, so that the average of equal values is that value.
    """
    samples = k.variable(k.i64(1))
    for power in (2, 4, 8):
        with k.when(k.n > power - 1):
            samples.set(k.i64(power))
    middle = k.select(k.s > 31, k.s // 2 - 8, k.i64(0))
    lanes = k.below(k.s - middle)
    x = k.word("x")
    with k.loop(k.c0, k.c1) as c:
        total, count = k.variable(k.zero), k.variable(k.zero)
        with k.loop(k.i64(0), samples.get()) as i:
            n = i * k.n // samples.get()
            value = k.get(x, (n * k.c + c) * k.s + middle, lanes)
            valid = k.valid_at(n, middle, lanes) or lanes
            total.add(k.select(valid, value, k.zero))
            count.add(k.select(valid, k.const(VF32, 1.0), k.zero))
        seen = count.get().total()
        seen = k.select(seen < 1.0, k.const(F32, 1.0), seen)
        k.keep(total.get().total() / seen, near, c - k.c0)


def _deviations(k: _Stage, near: Value, n: Value, c: Value, place: Value) -> Pair:
    x, center = k.word("x"), k.spread(near, c - k.c0)

    def pair(j: Value, lanes: Value | None) -> tuple[Value, Value]:
        d = k.get(x, place + j, lanes) - center
        valid = k.valid_at(n, j, lanes)
        d = d if valid is None else k.select(valid, d, k.zero)
        return d, d

    return pair


def _take_statistics(k: _Stage, near: Value, exact: Kernel) -> None:
    stats = k.word("stats")
    count = k.splat(k.word("count"), 8)
    with k.octets() as (c, at, lanes):
        s1, s2 = k.doubles(k.pair, at), k.doubles(k.pair, at + BLOCK)
        close = k.floats(near, at, vector(F32, 8))
        mean, m2, doubt = k.moments(s1, s2, close, count)
        k.keep(mean, stats, c, lanes)
        k.keep(m2, stats, c + k.c, lanes)
        doubt = doubt & lanes
        with k.when(k.any(doubt)):
            for i in range(8):
                with k.when(doubt.lane(i)):
                    k.b.call(exact.function, [k.arguments[0].v, (c + i).v])


def _exact(module: ir.Module, form: Form) -> Kernel:
    """The statistics of one channel in float64, the mean taken twice."""
    k = Kernel(module, "exact", form, [I64])
    c = k.arguments[1]
    x, mask, stats = k.words("x mask stats")
    samples, channels, positions = k.words("n c s")
    count = k.word("count")
    wide = vector(F64)

    def total(term: Callable[[Value], Value]) -> Value:
        sums = k.variable(k.const(wide, 0.0))
        with k.loop(k.i64(0), samples) as n, k.loop(k.i64(0), positions, LANES) as j:
            lanes = k.below(positions - j)
            value = k.get(x, (n * channels + c) * positions + j, lanes).to(wide, "fpext")
            valid = k.valid(mask, n * positions + j, lanes) if form.masked else lanes
            sums.add(k.select(valid, term(value), k.const(wide, 0.0)))
        return sums.get().total()

    first = total(lambda value: value) / count
    mean = first + total(lambda value: value - first) / count
    m2 = total(lambda value: (value - mean) * (value - mean))
    k.keep(mean, stats, c)
    k.keep(m2, stats, c + channels)
    k.end()
    return k


def _normalize_planes(k: _Stage) -> None:
    x = k.word("x")
    with k.planes() as (n, c, place):
        plan = k.local_plan(c)
        row = (n * k.c + c) * ((k.s + 15) // 16)  # in the signs: 16 positions a word

        def step(j: Value, u: int, lanes: Value | None) -> None:
            z = k.normalize(k.get(x, place + j, lanes), plan)
            k.output(z, place + j, row + j // 16, lanes, k.valid_at(n, j, lanes))

        k.along(k.i64(0), k.s, step)


def backward(module: ir.Module, form: Form) -> None:
    """Σ dy and Σ dy·x̂, unless they are given; then dx and the residual's gradient."""
    k = _Stage(module, form)
    means = k.space(F32, BLOCK * 2)
    with k.items():
        plan, sums = k.words("plan sums")
        with k.octets() as (c, at, lanes):
            for i in range(len(PLAN)):
                value = k.floats(plan, c + k.c * i, vector(F32, 8), lanes)
                k.keep(value, k.local, at + BLOCK * i, lanes)
        with k.when((k.word("flags") & TOTALS).equals(0)):
            k.bending(lambda: k.sum_up(lambda n, c, place: _terms(k, n, c, place)))
            with k.octets() as (c, at, lanes):
                for i, name in enumerate(("dbias", "dweight")):
                    value = k.doubles(k.pair, at + BLOCK * i)
                    k.keep(value, sums, c + k.c * i, lanes)
                    k.keep_float(value, k.word(name), c, lanes)
        with k.when((k.word("flags") & ONLY).equals(0)):
            with k.octets() as (c, at, lanes):
                for i in (0, 1):
                    value = k.doubles(sums, c + k.c * i, VF64, lanes)
                    k.keep(k.mean_of(value), means, at + BLOCK * i, lanes)
            k.twice(lambda: _gradient_planes(k, means))
    k.end()
    parallel(module, [(k, "items")], form)


def _gradient_planes(k: _Stage, means: Value) -> None:
    with k.planes() as (n, c, place):
        pair = _terms(k, n, c, place)
        local = k.local_plan(c)
        both = [k.spread(means, c - k.c0 + BLOCK * i) for i in (0, 1)]

        def step(j: Value, u: int, lanes: Value | None) -> None:
            dz, xhat = pair(j, lanes)
            valid = k.valid_at(n, j, lanes)
            k.gradients(place + j, dz, xhat, local, both, lanes, valid)

        k.along(k.i64(0), k.s, step)


def _terms(k: _Stage, n: Value, c: Value, place: Value) -> Pair:
    plan = k.local_plan(c)
    row = (n * k.c + c) * ((k.s + 15) // 16)

    def pair(j: Value, lanes: Value | None) -> tuple[Value, Value]:
        dz, xhat = k.gradient(place + j, row + j // 16, lanes, k.valid_at(n, j, lanes), plan)
        # beyond the row x is 0, of which x̂ can be infinite, and 0·∞ would enter the sum
        return dz, xhat if lanes is None else k.select(lanes, xhat, k.zero)

    return pair
