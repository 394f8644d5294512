"""Kernels for matrices with the channels side by side: rows (N, C), and channels-last images.

The matrix has a row for each sample and position. It is cut into strips of rows, a number that
depends on the shape alone. Three stages: the sums of each strip; the statistics of each channel,
strips added in their order; the output, strips in reverse order, since the last are still in the
cache. Sums run in float32 over 8 rows, and go on in float64.

With fewer channels than a vector has lanes, several rows are taken as one, so that a channel
stands in several columns of the matrix, which the second stage adds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from llvmlite import ir

from gammabeta.ops._cpu._calls import GIVEN, GROUP, HELD, LANES, ONLY, PARTS, TOTALS
from gammabeta.ops._cpu._emit import F32, I64, VF32, VF64, Value, vector
from gammabeta.ops._cpu._operands import PLAN, Form, Kernel, parallel

ROWS = 8  # summed in float32
# float32 rows of `columns` in scratch: a value near the mean, the plan, two means of the gradients
NEAR, WIDE, MEANS = 0, 1, PARTS - 2
_BYTE = ir.IntType(8)
Terms = Callable[[Value, Value | None], tuple[Value, Value]]
Row = Callable[[Value, Value, Value | None], None]


class _Matrix(Kernel):
    def __init__(self, module: ir.Module, name: str, form: Form) -> None:
        super().__init__(module, name, form, [I64, I64])
        self.rows, self.columns, self.strip = self.words("rows columns strip")
        self.mask, self.scratch = self.words("mask scratch")
        self.channels, self.copies = self.words("c copies")
        self.width = (self.columns + (LANES - 1)) // LANES * LANES
        self.signs_in_row = self.width // LANES
        self.sums = self.at(self.scratch, self.width * PARTS, 4)

    def part(self, i: int) -> Value:
        return self.at(self.scratch, self.width * i, 4)

    @contextlib.contextmanager
    def strips(self, *, reverse: bool = False) -> Iterator[tuple[Value, Value, Value]]:
        """Each strip that is to be done: its number, first and last row."""
        _, first, end = self.arguments
        count = (self.rows + self.strip - 1) // self.strip
        with self.loop(first, end) as item:
            number = count - 1 - item if reverse else item
            start = number * self.strip
            yield number, start, self.least(start + self.strip, self.rows)

    def tiles(self, first: Value, end: Value, tile: Callable[..., None]) -> None:
        """``tile(column, lanes, row, rows)`` over up to ROWS rows and 16 columns at a time."""
        whole = self.columns // LANES * LANES
        full = first + (end - first) // ROWS * ROWS

        def across(row: Value, rows: Value | None) -> None:
            with self.loop(self.i64(0), whole, LANES) as column:
                tile(column, None, row, rows)
            with self.when(whole < self.columns):
                tile(whole, self.below(self.columns - whole), row, rows)

        with self.loop(first, full, ROWS) as row:
            across(row, None)
        with self.when(full < end):
            across(full, end - full)

    def down(self, row: Value, rows: Value | None, step: Callable[[Value], None]) -> None:
        if rows is None:
            for i in range(ROWS):
                step(row + i)
        else:
            with self.loop(row, row + rows) as r:
                step(r)

    def valid_at(self, row: Value, lanes: Value | None) -> Value | None:
        if not self.form.masked:
            return lanes
        one = self.load(self.at(self.mask, row, 1), _BYTE, 1).differs(0)
        every = self.splat(one)
        return every if lanes is None else every & lanes

    def sum_up(self, terms_of: Callable[[Value, Value | None], Terms]) -> None:
        """Σ a and Σ a·b for each column of each strip.

        ``terms_of(column, lanes)`` gives the function of (row, lanes) that gives a and b.
        """
        with self.strips() as (number, first, end):
            own = self.at(self.sums, number * self.width * 2, 8)
            with self.loop(self.i64(0), self.width * 2, 8) as i:
                self.keep(self.const(VF64, 0.0), own, i)

            def tile(column: Value, lanes: Value | None, row: Value, rows: Value | None) -> None:
                terms = terms_of(column, lanes)
                a, b = self.variable(self.zero), self.variable(self.zero)

                def step(r: Value) -> None:
                    first, second = terms(r, lanes)
                    a.add(first)
                    b.set(self.fma(first, second, b.get()))

                self.down(row, rows, step)
                self.fold(a.get(), own, column)
                self.fold(b.get(), own, column + self.width)

            self.tiles(first, end, tile)

    @contextlib.contextmanager
    def octets(self) -> Iterator[tuple[Value, Value]]:
        """Eight channels at a time, and which of them exist."""
        _, first, end = self.arguments
        with self.loop(first, end) as item:
            last = self.least(item * GROUP + GROUP, self.channels)
            with self.loop(item * GROUP, last, 8) as c:
                yield c, self.below(last - c, 8)

    def totals(self, c: Value) -> tuple[Value, Value]:
        """Both sums of 8 channels: all strips in order, all columns that hold the channel."""
        found = []
        for half in (0, 1):
            total = self.variable(self.const(VF64, 0.0))
            with self.loop(self.i64(0), self.word("strips")) as strip:
                own = self.at(self.sums, (strip * 2 + half) * self.width, 8)
                with self.loop(self.i64(0), self.copies) as copy:
                    total.add(self.doubles(own, c + copy * self.channels))
            found.append(total.get())
        return found[0], found[1]

    def spread_out(self, value: Value, i: int, c: Value, lanes: Value) -> None:
        """Eight channels' value into every column that holds them."""
        with self.loop(self.i64(0), self.copies) as copy:
            self.keep(value, self.part(i), c + copy * self.channels, lanes)

    def wide_plan(self, column: Value) -> list[Value]:
        return [self.floats(self.part(WIDE + i), column) for i in range(len(PLAN))]

    def place(self, row: Value, column: Value) -> Value:
        return row * self.columns + column

    def signs_place(self, row: Value, column: Value) -> Value:
        return row * self.signs_in_row + column // LANES


def forward(module: ir.Module, form: Form) -> None:
    """Statistics, unless they are given; then y."""
    near = _near(module, form)
    first = _Matrix(module, "gather", form)
    x = first.word("x")

    def terms_of(column: Value, lanes: Value | None) -> Terms:
        center = first.floats(first.part(NEAR), column)

        def terms(row: Value, lanes: Value | None) -> tuple[Value, Value]:
            d = first.get(x, first.place(row, column), lanes) - center
            valid = first.valid_at(row, lanes)
            d = d if valid is None else first.select(valid, d, first.zero)
            return d, d

        return terms

    first.sum_up(terms_of)
    first.end()

    exact = _exact(module, form)
    second = _Matrix(module, "finish", form)
    stats, plan = second.words("stats plan")
    with second.octets() as (c, lanes):
        with second.when((second.word("flags") & (GIVEN | HELD)).equals(0)):
            close = second.floats(second.part(NEAR), c, vector(F32, 8))
            count = second.splat(second.word("count"), 8)
            mean, m2, doubt = second.moments(*second.totals(c), close, count)
            second.keep(mean, stats, c, lanes)
            second.keep(m2, stats, c + second.channels, lanes)
            doubt = doubt & lanes
            with second.when(second.any(doubt)):
                second.b.call(exact.function, [second.arguments[0].v, c.v, doubt.v])
        with second.when((second.word("flags") & ONLY).equals(0)):
            for i, value in enumerate(second.coefficients(c, lanes)):
                second.keep(value, plan, c + second.channels * i, lanes)
                second.spread_out(value, WIDE + i, c, lanes)
    second.end()

    third = _Matrix(module, "scatter", form)
    _outputs(third)
    third.end()
    parallel(
        module, [(near, "nears"), (first, "gathers"), (second, "groups"), (third, "finals")], form
    )


def _near(module: ir.Module, form: Form) -> Kernel:
    """A value near the mean of each channel: the average of up to 16 rows.

    A power of two of them, so that the average of equal values is that value.
    """
    k = _Matrix(module, "near", form)
    samples = k.variable(k.i64(1))
    for power in (2, 4, 8, 16):
        with k.when(k.rows > power - 1):
            samples.set(k.i64(power))
    x = k.word("x")
    with k.loop(k.i64(0), k.channels, LANES) as c:
        lanes = k.below(k.channels - c)
        total, count = k.variable(k.zero), k.variable(k.zero)
        with k.loop(k.i64(0), samples.get()) as i:
            row = i * k.rows // samples.get()
            valid = k.valid_at(row, lanes) or lanes
            total.add(k.select(valid, k.get(x, k.place(row, c), lanes), k.zero))
            count.add(k.select(valid, k.const(VF32, 1.0), k.zero))
        one = k.const(VF32, 1.0)
        seen = k.select(count.get() < 1.0, one, count.get())
        with k.loop(k.i64(0), k.copies) as copy:
            k.keep(total.get() / seen, k.part(NEAR), c + copy * k.channels, lanes)
    k.end()
    return k


def _exact(module: ir.Module, form: Form) -> Kernel:
    """The statistics of some of 8 channels in float64, the mean taken twice."""
    k = Kernel(module, "exact", form, [I64, vector(ir.IntType(1), 8)])
    _, c, wanted = k.arguments
    x, mask, stats = k.words("x mask stats")
    channels = k.word("c")
    rows = k.word("rows") * k.word("copies")
    count = k.splat(k.word("count"), 8)

    def total(term: Callable[[Value], Value]) -> Value:
        sums = k.variable(k.const(VF64, 0.0))
        with k.loop(k.i64(0), rows) as row:
            value = k.get(x, row * channels + c, wanted, 8).to(VF64, "fpext")
            here = wanted
            if form.masked:
                one = k.load(k.at(mask, row, 1), _BYTE, 1).differs(0)
                here = k.splat(one, 8) & wanted
            sums.add(k.select(here, term(value), k.const(VF64, 0.0)))
        return sums.get()

    first = total(lambda value: value) / count
    mean = first + total(lambda value: value - first) / count
    m2 = total(lambda value: (value - mean) * (value - mean))
    k.keep(mean, stats, c, wanted)
    k.keep(m2, stats, c + channels, wanted)
    k.end()
    return k


def _outputs(k: _Matrix) -> None:
    x = k.word("x")

    def tile(column: Value, lanes: Value | None, row: Value, rows: Value | None) -> None:
        plan = k.wide_plan(column)

        def step(r: Value) -> None:
            at = k.place(r, column)
            z = k.normalize(k.get(x, at, lanes), plan)
            k.output(z, at, k.signs_place(r, column), lanes, k.valid_at(r, lanes))

        k.down(row, rows, step)

    with k.strips(reverse=True) as (_, first, end):
        k.twice(lambda: k.tiles(first, end, tile))


def backward(module: ir.Module, form: Form) -> None:
    """Σ dy and Σ dy·x̂, unless they are given; then dx and the residual's gradient."""
    plans = _Matrix(module, "plans", form)
    with plans.octets() as (c, lanes):
        for i in range(len(PLAN)):
            value = plans.floats(plans.word("plan"), c + plans.channels * i, vector(F32, 8), lanes)
            plans.spread_out(value, WIDE + i, c, lanes)
    plans.end()

    first = _Matrix(module, "gather", form)

    def terms_of(column: Value, lanes: Value | None) -> Terms:
        plan = first.wide_plan(column)

        def terms(row: Value, lanes: Value | None) -> tuple[Value, Value]:
            signs, valid = first.signs_place(row, column), first.valid_at(row, lanes)
            return first.gradient(first.place(row, column), signs, lanes, valid, plan)

        return terms

    first.bending(lambda: first.sum_up(terms_of))
    first.end()

    second = _Matrix(module, "finish", form)
    sums = second.word("sums")
    with second.octets() as (c, lanes):
        with second.when((second.word("flags") & TOTALS).equals(0)):
            for i, value in enumerate(second.totals(c)):
                second.keep(value, sums, c + second.channels * i, lanes)
                second.keep_float(value, second.word(("dbias", "dweight")[i]), c, lanes)
        for i in (0, 1):
            value = second.doubles(sums, c + second.channels * i, VF64, lanes)
            second.spread_out(second.mean_of(value), MEANS + i, c, lanes)
    second.end()

    third = _Matrix(module, "scatter", form)

    def tile(column: Value, lanes: Value | None, row: Value, rows: Value | None) -> None:
        plan = third.wide_plan(column)
        means = [third.floats(third.part(MEANS + i), column) for i in (0, 1)]

        def step(r: Value) -> None:
            at, signs = third.place(r, column), third.signs_place(r, column)
            valid = third.valid_at(r, lanes)
            dz, xhat = third.gradient(at, signs, lanes, valid, plan)
            third.gradients(at, dz, xhat, plan, means, lanes, valid)

        third.down(row, rows, step)

    with third.strips(reverse=True) as (_, start, end):
        third.twice(lambda: third.tiles(start, end, tile))
    third.end()
    stages = [(plans, "groups"), (first, "gathers"), (second, "groups"), (third, "finals")]
    parallel(module, stages, form)
