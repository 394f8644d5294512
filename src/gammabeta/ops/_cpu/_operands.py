"""What all kernels share: their operands in memory, and the arithmetic of a channel.

Every kernel function takes the address of one array of 64-bit words, named in ``WORDS``. Three
formulas stand here once, so that forward, inference, recomputation and backward give the same bits:
from sums to a mean and a variance, from these to the coefficients of a channel, from x to y.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from llvmlite import ir

from gammabeta.ops._cpu._calls import FIXED, HELD, INTEGERS, LANES, NUMBERS, POINTERS, STREAM
from gammabeta.ops._cpu._emit import (
    BF16,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    PTR,
    VF32,
    VF64,
    VOID,
    Function,
    Type,
    Value,
    vector,
)

WORDS = (*POINTERS, *NUMBERS, *INTEGERS)  # in the order in which _calls packs them

# what normalizes a channel, all float32: x̂ = (x − high)·rstd − low_rstd and
# γ·x̂ + β = (x − high)·scale + shift, where mean = high + low
PLAN = ("high", "scale", "shift", "rstd", "low_rstd")


class Form(NamedTuple):
    """One way to compile a kernel."""

    dtype: str  # "float32" or "bfloat16"
    act: bool  # relu or leaky_relu, by slope
    residual: bool  # forward: added; backward: the signs before the activation are in bits
    masked: bool  # the most general: residual and bits where they are not 0


class Kernel(Function):
    """A function over the words, or over some items of its work."""

    def __init__(
        self,
        module: ir.Module,
        name: str,
        form: Form,
        arguments: list[Type],
        result: Type = VOID,
    ) -> None:
        super().__init__(module, name, [PTR, *arguments], result)
        self.form = form
        self.size = 4 if form.dtype == "float32" else 2
        self.zero = self.const(VF32, 0.0)
        self.streaming = self.relu = False
        self._words: dict[str, Value] = {}

    def word(self, name: str) -> Value:
        """Read once, at the start: a store to y could, for all LLVM knows, change the words."""
        if name not in self._words:
            t = PTR if name in POINTERS else F64 if name in NUMBERS else I64
            with self.b.goto_entry_block():
                place = self.at(self.arguments[0], self.i64(WORDS.index(name)), 8)
                self._words[name] = self.load(place, t, 8)
        return self._words[name]

    def words(self, names: str) -> Iterator[Value]:
        return (self.word(name) for name in names.split())

    def flag(self, bits: int) -> Value:
        return (self.word("flags") & bits).differs(0)

    def present(self, pointer: Value) -> Value:
        return pointer.to(I64, "ptrtoint").differs(0)

    # -- elements: float32 in registers, whatever they are in memory -------------------------

    def get(self, base: Value, i: Value, lanes: Value | None = None, width: int = LANES) -> Value:
        place = self.at(base, i, self.size)
        if self.form.dtype == "float32":
            return self.load(place, vector(F32, width), 4, lanes)
        raw = self.load(place, vector(I16, width), 2, lanes)
        wide = raw.to(vector(I32, width), "zext") << 16
        return wide.to(vector(F32, width), "bitcast")

    def put(self, value: Value, base: Value, i: Value, lanes: Value | None = None) -> None:
        place = self.at(base, i, self.size)
        if self.form.dtype != "float32":
            value = self._rounded(value)
        if self.streaming and lanes is None:
            self.stream(value, place, LANES * self.size)
        else:
            self.store(value, place, self.size, lanes)

    def _rounded(self, value: Value) -> Value:
        """bfloat16, as 16-bit words.

        The instruction that some processors have for it gives 0 for denormal numbers. To look for
        them in every vector makes the kernels 1.4 times slower, more than their loss is worth.
        """
        return value.to(vector(BF16), "fptrunc").to(vector(I16), "bitcast")

    def twice(self, body: Callable[[], None]) -> None:
        """Emit ``body`` for outputs that go past the cache, and for those that stay in it.

        A large output would drive out of the cache what is still to be read, and be read itself
        before it is written to.
        """
        with self.b.if_else(self.flag(STREAM).v) as (past, into):
            with past:
                self.streaming = True
                self.bending(body)
                self.streaming = False
            with into:
                self.bending(body)

    def bending(self, body: Callable[[], None]) -> None:
        """Emit ``body`` for relu, and for any other slope: what relu saves shows in bfloat16."""
        if not self.form.act:
            body()
            return
        slope = self.word("slope")
        with self.b.if_else(slope.equals(0.0).v) as (flat, sloped):
            with flat:
                self.relu = True
                body()
                self.relu = False
            with sloped:
                body()

    def floats(self, base: Value, i: Value, t: Type = VF32, lanes: Value | None = None) -> Value:
        return self.load(self.at(base, i, 4), t, 4, lanes)

    def doubles(self, base: Value, i: Value, t: Type = VF64, lanes: Value | None = None) -> Value:
        return self.load(self.at(base, i, 8), t, 8, lanes)

    def keep(self, value: Value, base: Value, i: Value, lanes: Value | None = None) -> None:
        """base[i] = value, of float32 or float64."""
        single = value.type == F32 or getattr(value.type, "element", None) == F32
        size = 4 if single else 8
        self.store(value, self.at(base, i, size), size, lanes)

    def fold(self, value: Value, base: Value, i: Value) -> None:
        """base[i : i + 16] += value, in float64: what keeps long sums of float32 accurate."""
        for half in (0, 8):
            wide = value.part(half, 8).to(VF64, "fpext")
            self.keep(self.doubles(base, i + half) + wide, base, i + half)

    def valid(self, mask: Value, i: Value, lanes: Value | None = None) -> Value:
        """16 positions of the mask from i on, as <16 x i1>."""
        return self.load(self.at(mask, i, 1), vector(I8), 1, lanes).differs(0)

    # -- a channel's arithmetic, 8 channels at a time ----------------------------------------

    def moments(self, s1: Value, s2: Value, near: Value, count: Value) -> tuple[Value, ...]:
        """Mean, sum of squared deviations and doubt from Σd and Σd², d = x − near, in float64.

        Doubtful are sums that overflowed or underflowed float32, and those of a ``near`` farther
        from the mean than one standard deviation: such a channel is summed again in float64.
        """
        delta = s1 / count
        shifted = s1 * delta
        m2 = s2 - shifted
        tiny = (count * 1e-30) > s2
        some = s1.differs(0.0) | s2.differs(0.0)
        # `not ≤`, so that NaN is doubtful
        sound = (shifted <= m2) & (s2 < 3e38)
        doubt = Value(self, self.b.not_(sound.v)) | (tiny & some)
        zero = self.const(m2.type, 0.0)
        m2 = self.select(m2 < 0.0, zero, m2)
        return near.to(VF64, "fpext") + delta, m2, doubt

    def coefficients(self, c: Value, lanes: Value) -> list[Value]:
        """PLAN for 8 channels from c on, from the statistics in memory."""
        stats, held_mean, held_var = self.words("stats mean var")
        weight, bias, channels = self.words("weight bias c")
        single = vector(F32, 8)
        mean = self.variable(self.const(VF64, 0.0))
        var = self.variable(self.const(VF64, 1.0))
        with self.b.if_else(self.flag(HELD).v) as (held, own):
            with held:
                mean.set(self.floats(held_mean, c, single, lanes).to(VF64, "fpext"))
                var.set(self.floats(held_var, c, single, lanes).to(VF64, "fpext"))
                # the buffers will have changed when a backward asks for them
                self.keep(mean.get(), stats, c, lanes)
                self.keep(var.get(), stats, c + channels, lanes)
            with own:
                mean.set(self.doubles(stats, c, VF64, lanes))
                var.set(self.doubles(stats, c + channels, VF64, lanes) / self.word("count"))
        gamma = self.variable(self.const(VF64, 1.0))
        beta = self.variable(self.const(VF64, 0.0))
        for parameter, variable in ((weight, gamma), (bias, beta)):
            with self.when(self.present(parameter)):
                variable.set(self.floats(parameter, c, single, lanes).to(VF64, "fpext"))
        total = var.get() + self.splat(self.word("eps"), 8)
        rstd = self.const(VF64, 1.0) / self.intrinsic("sqrt", total)
        high = mean.get().to(single, "fptrunc")
        low = mean.get() - high.to(VF64, "fpext")
        scale = rstd * gamma.get()
        rest = (scale, beta.get() - low * scale, rstd, low * rstd)
        return [high, *(value.to(single, "fptrunc") for value in rest)]

    def normalize(self, x: Value, plan: list[Value]) -> Value:
        """γ·x̂ + β: the one formula of forward, inference and recomputation."""
        return self.fma(x - plan[0], plan[1], plan[2])

    def negative(self, z: Value) -> Value:
        """Where the activation bends: a NaN goes through."""
        return z <= 0.0

    def bend(self, value: Value, negative: Value) -> Value:
        """act(z), or dy·act'(z): times the slope where z was negative, exactly 0 for relu."""
        if self.relu:
            return self.select(negative, self.zero, value)
        slope = self.splat(self.word("slope").to(F32, "fptrunc"))
        return self.select(negative, value * slope, value)

    def output(
        self, z: Value, at: Value, signs: Value, lanes: Value | None, valid: Value | None
    ) -> None:
        """y[at] = act(z + residual), and the signs before the activation where they are kept."""
        residual, bits, form = self.word("residual"), self.word("bits"), self.form
        if form.masked:
            extra = self.variable(self.zero)
            with self.when(self.present(residual)):
                extra.set(self.get(residual, at, lanes))
            z = z + extra.get()
        elif form.residual:
            z = z + self.get(residual, at, lanes)
        if form.act:
            negative = self.negative(z)
            if form.residual or form.masked:
                with self.when(self.present(bits)):
                    self.keep_signs(negative, bits, signs)
            z = self.bend(z, negative)
        if form.masked and valid is not None:
            z = self.select(valid, z, self.zero)
        self.put(z, self.word("y"), at, lanes)

    def gradient(
        self, at: Value, signs: Value, lanes: Value | None, valid: Value | None, plan: list[Value]
    ) -> tuple[Value, Value]:
        """dy before the activation, and x̂."""
        bits, form = self.word("bits"), self.form
        away = self.get(self.word("x"), at, lanes) - plan[0]
        dz = self.get(self.word("dy"), at, lanes)
        if form.act:
            if form.residual and not form.masked:
                negative = self.signs(bits, signs)
            else:
                negative = self.negative(self.fma(away, plan[1], plan[2]))
            if form.masked:
                kept = self.variable(negative)
                with self.when(self.present(bits)):
                    kept.set(self.signs(bits, signs))
                negative = kept.get()
            dz = self.bend(dz, negative)
        xhat = self.fma(away, plan[3], -plan[4])
        if form.masked and valid is not None:
            dz, xhat = (self.select(valid, value, self.zero) for value in (dz, xhat))
        return dz, xhat

    def gradients(
        self,
        at: Value,
        dz: Value,
        xhat: Value,
        plan: list[Value],
        means: list[Value],
        lanes: Value | None,
        valid: Value | None,
    ) -> None:
        """dx[at] = γ·rstd·(dz − mean(dz) − x̂·mean(dz·x̂)), and the residual's, where wanted."""
        change = (dz - self.fma(xhat, means[1], means[0])) * plan[1]
        if self.form.masked and valid is not None:
            change = self.select(valid, change, self.zero)
        self.put(change, self.word("dx"), at, lanes)
        if self.form.residual or self.form.masked:
            dresidual = self.word("dresidual")
            with self.when(self.present(dresidual)):
                self.put(dz, dresidual, at, lanes)

    def mean_of(self, total: Value) -> Value:
        """A sum's share of each value, float32; 0 where the statistics do not depend on x."""
        fixed = self.splat(self.flag(FIXED), 8)
        share = total / self.splat(self.word("count"), 8)
        share = self.select(fixed, self.const(VF64, 0.0), share)
        return share.to(vector(F32, 8), "fptrunc")

    def keep_float(self, value: Value, base: Value, i: Value, lanes: Value) -> None:
        """base[i] = value in float32, where base is not 0."""
        with self.when(self.present(base)):
            self.keep(value.to(vector(F32, 8), "fptrunc"), base, i, lanes)

    # -- small things ----------------------------------------------------------------------

    def any(self, lanes: Value) -> Value:
        count = lanes.type.count
        return lanes.to(ir.IntType(count), "bitcast").differs(0)

    def spread(self, base: Value, i: Value) -> Value:
        """One float32 in all lanes."""
        return self.splat(self.floats(base, i, F32))

    def keep_signs(self, negative: Value, bits: Value, i: Value) -> None:
        self.store(negative.to(I16, "bitcast"), self.at(bits, i, 2), 2)

    def signs(self, bits: Value, i: Value) -> Value:
        return self.load(self.at(bits, i, 2), I16, 2).to(vector(ir.IntType(1)), "bitcast")


def parallel(module: ir.Module, stages: Iterable[tuple[Kernel, str]], form: Form) -> None:
    """Emit ``run(words)``: each stage over all its items, on as many threads as are asked for.

    A stage is a function of ``(words, first, end)`` and the word that counts its items. They go to
    whichever thread is free, which changes no sum, since an item is never divided.
    """
    run = Kernel(module, "run", form, [])
    for stage, items in stages:
        _launch(run, stage, run.arguments[0], run.word(items))
    run.end()


def _launch(run: Kernel, stage: Kernel, words: Value, total: Value) -> None:
    threads = run.word("threads")
    alone = (threads < 2) | (total < 2)
    with run.b.if_else(alone.v) as (serial, many):
        with serial:
            run.b.call(stage.function, [words.v, run.i64(0).v, total.v])
        with many:
            pool = run.space(I64, 3)
            run.store(words, run.at(pool, run.i64(0), 8), 8)
            run.store(run.i64(0), run.at(pool, run.i64(1), 8), 8)
            run.store(total, run.at(pool, run.i64(2), 8), 8)
            worker = _worker(run.module, stage)
            count = run.least(threads, total).to(I32, "trunc")
            known = run.module.globals.get("gammabeta_parallel")
            if known is None:
                signature = ir.FunctionType(VOID, [PTR, PTR, I32, I32])
                known = ir.Function(run.module, signature, "gammabeta_parallel")
            run.b.call(known, [worker.function, pool.v, count.v, run.const(I32, 0).v])


def _worker(module: ir.Module, stage: Kernel) -> Function:
    """Takes items of a pool (words, next item, how many) until none is left."""
    worker = Function(module, f"{stage.function.name}_worker", [PTR])
    (pool,) = worker.arguments
    words = worker.load(worker.at(pool, worker.i64(0), 8), PTR, 8)
    total = worker.load(worker.at(pool, worker.i64(2), 8), I64, 8)
    following = worker.at(pool, worker.i64(1), 8)
    b = worker.b
    head, body, done = (b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    item = Value(worker, b.atomic_rmw("add", following.v, worker.i64(1).v, "monotonic"))
    b.cbranch((item < total).v, body, done)
    b.position_at_end(body)
    b.call(stage.function, [words.v, item.v, (item + 1).v])
    b.branch(head)
    b.position_at_end(done)
    worker.end()
    return worker
