"""The update of a layer's running statistics, in one call."""

from __future__ import annotations

from llvmlite import ir

from gammabeta.ops._cpu._emit import F32, F64, I64, Value, Variable, vector
from gammabeta.ops._cpu._operands import Form, Kernel


def update(module: ir.Module, form: Form) -> None:
    """Emit ``run(words)``: running ← running + momentum·(batch − running), all channels or none.

    The new values are the mean and m2·correction, in float32. Returns 1, and counts the batch; or
    0, with nothing changed, where a new value is NaN or infinite.
    """
    k = Kernel(module, "run", form, [], ir.IntType(32))
    channels = k.word("c")
    stats, mean, var = k.words("stats running_mean running_var")
    correction = k.word("correction")

    def new(i: Value, half: int, lanes: Value) -> Value:
        value = k.doubles(stats, i + channels * half, lanes=lanes)
        if half:
            value = value * k.splat(correction, 8)
        return value.to(vector(F32, 8), "fptrunc")

    sound = k.variable(k.const(ir.IntType(1), 1))
    with k.loop(k.i64(0), channels, 8) as i:
        lanes = k.below(channels - i, 8)
        for half in (0, 1):
            value = new(i, half, lanes)
            finite = k.intrinsic("fabs", value) < float("inf")
            missing = Value(k, k.b.not_(finite.v)) & lanes
            sound.set(sound.get() & k.any(missing).equals(0))
    tracked: Value = k.word("tracked")
    with k.when(sound.get()):
        share = k.splat(_weight(k, tracked).get(), 8)
        with k.loop(k.i64(0), channels, 8) as i:
            lanes = k.below(channels - i, 8)
            for half, held in enumerate((mean, var)):
                old = k.floats(held, i, vector(F32, 8), lanes)
                now = new(i, half, lanes)
                change = now - old
                far = k.const(change.type, 1.0) - share
                # from the nearer end, so that a weight of 1 gives the new value itself
                low, high = k.fma(change, share, old), k.fma(-change, far, now)
                k.keep(k.select(share < 0.5, low, high), held, i, lanes)
    k.end(sound.get().to(ir.IntType(32), "zext"))


def _weight(k: Kernel, tracked: Value) -> Variable:
    """Count the batch; the weight of the new value, 1/count where momentum is negative (None)."""
    momentum = k.word("momentum")
    weight = k.variable(momentum.to(F32, "fptrunc"))
    with k.when(k.present(tracked)):
        count = k.load(tracked, I64, 8) + 1
        k.store(count, tracked, 8)
        with k.when(momentum < 0.0):
            share = k.const(F64, 1.0) / count.to(F64, "sitofp")
            weight.set(share.to(F32, "fptrunc"))
    return weight
