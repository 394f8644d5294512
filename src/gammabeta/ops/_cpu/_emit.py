"""A few words of Python in which vector kernels are written: values, variables, loops, branches.

Running a kernel's Python code once writes the kernel as LLVM's intermediate representation: every
operation below emits one instruction, in the order written. Nothing is reassociated, nothing is
contracted but what says ``fma``: what a kernel computes is what its source says, lane by lane, on
every machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

from llvmlite import ir

from gammabeta.ops._cpu._calls import LANES

Type: TypeAlias = Any  # llvmlite has no types


class _BFloat16(ir.Type):  # type: ignore[misc]
    """llvmlite has no such type."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


BF16, F32, F64 = _BFloat16(), ir.FloatType(), ir.DoubleType()
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
PTR = ir.PointerType()
VOID = ir.VoidType()


def vector(element: Type, lanes: int = LANES) -> Type:
    return ir.VectorType(element, lanes)


VF32, VF64 = vector(F32), vector(F64, 8)  # one register of 64 bytes each


def _element(t: Type) -> Type:
    return t.element if isinstance(t, ir.VectorType) else t


def _is_float(t: Type) -> bool:
    return isinstance(_element(t), ir.FloatType | ir.DoubleType)


class Value:
    """An instruction's result. Operators emit; a plain number beside it becomes its type."""

    __slots__ = ("f", "v")

    def __init__(self, f: Function, v: Any) -> None:
        self.f, self.v = f, v

    @property
    def type(self) -> Type:
        return self.v.type

    def _emit(self, name: str, other: Value | float) -> Value:
        return Value(self.f, getattr(self.f.b, name)(self.v, self._other(other)))

    def _other(self, other: Value | float) -> Any:
        if isinstance(other, Value):
            wide = isinstance(self.type, ir.VectorType) and not isinstance(
                other.type, ir.VectorType
            )
            return self.f.splat(other, self.type.count).v if wide else other.v
        return self.f.const(self.type, other).v

    def __add__(self, other: Value | float) -> Value:
        return self._emit("fadd" if _is_float(self.type) else "add", other)

    def __sub__(self, other: Value | float) -> Value:
        return self._emit("fsub" if _is_float(self.type) else "sub", other)

    def __mul__(self, other: Value | float) -> Value:
        return self._emit("fmul" if _is_float(self.type) else "mul", other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._emit("fdiv", other)

    def __floordiv__(self, other: Value | float) -> Value:
        return self._emit("sdiv", other)

    def __mod__(self, other: Value | float) -> Value:
        return self._emit("srem", other)

    def __and__(self, other: Value | float) -> Value:
        return self._emit("and_", other)

    def __or__(self, other: Value | float) -> Value:
        return self._emit("or_", other)

    def __lshift__(self, other: Value | float) -> Value:
        return self._emit("shl", other)

    def __rshift__(self, other: Value | float) -> Value:
        return self._emit("lshr", other)

    def __neg__(self) -> Value:
        return Value(self.f, self.f.b.fneg(self.v))

    def __lt__(self, other: Value | float) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Value | float) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Value | float) -> Value:
        return self._compare(">", other)

    def _compare(self, sign: str, other: Value | float) -> Value:
        b = self.f.b
        compare = b.fcmp_ordered if _is_float(self.type) else b.icmp_signed
        return Value(self.f, compare(sign, self.v, self._other(other)))

    def equals(self, other: Value | float) -> Value:
        return self._compare("==", other)

    def differs(self, other: Value | float) -> Value:
        """Also where either is NaN."""
        if _is_float(self.type):
            return Value(self.f, self.f.b.fcmp_unordered("!=", self.v, self._other(other)))
        return self._compare("!=", other)

    def to(self, t: Type, how: str) -> Value:
        """Convert by the instruction ``how``: fpext, fptrunc, sitofp, zext, trunc, bitcast ..."""
        return Value(self.f, getattr(self.f.b, how)(self.v, t))

    def part(self, first: int, lanes: int) -> Value:
        """``lanes`` lanes from ``first`` on."""
        index = ir.Constant(vector(I32, lanes), list(range(first, first + lanes)))
        undefined = ir.Constant(self.type, ir.Undefined)
        return Value(self.f, self.f.b.shuffle_vector(self.v, undefined, index))

    def lane(self, i: int) -> Value:
        return Value(self.f, self.f.b.extract_element(self.v, ir.Constant(I32, i)))

    def total(self) -> Value:
        """The sum of all lanes, in pairs: lane 0 + lane n/2 and so on."""
        value, lanes = self, self.type.count
        while lanes > 1:
            lanes //= 2
            value = value.part(0, lanes) + value.part(lanes, lanes)
        return value.lane(0)


class Variable:
    """A value that changes, in a loop for instance; LLVM keeps it in a register."""

    def __init__(self, f: Function, first: Value) -> None:
        self.f, self.type = f, first.type
        with f.b.goto_entry_block():
            self.place = f.b.alloca(first.type)
        self.set(first)

    def get(self) -> Value:
        return Value(self.f, self.f.b.load(self.place, typ=self.type))

    def set(self, value: Value) -> None:
        self.f.b.store(value.v, self.place)

    def add(self, value: Value) -> None:
        self.set(self.get() + value)


class Function:
    """One function under construction; its methods emit at the end of what is there."""

    def __init__(self, module: Any, name: str, arguments: list[Type], result: Type = VOID) -> None:
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(result, arguments), name)
        self.function.attributes.add("nounwind")
        self.b = ir.IRBuilder(self.function.append_basic_block())
        self.arguments = [Value(self, a) for a in self.function.args]

    # -- values --------------------------------------------------------------------------

    def const(self, t: Type, number: float) -> Value:
        lanes = [number] * t.count if isinstance(t, ir.VectorType) else number
        return Value(self, ir.Constant(t, lanes))

    def i64(self, number: int) -> Value:
        return self.const(I64, number)

    def splat(self, scalar: Value, lanes: int = LANES) -> Value:
        t = vector(scalar.type, lanes)
        undefined = ir.Constant(t, ir.Undefined)
        one = self.b.insert_element(undefined, scalar.v, ir.Constant(I32, 0))
        zeros = ir.Constant(vector(I32, lanes), [0] * lanes)
        return Value(self, self.b.shuffle_vector(one, undefined, zeros))

    def below(self, count: Value, lanes: int = LANES) -> Value:
        """The lanes with a number smaller than ``count``, as <lanes x i1>."""
        numbers = Value(self, ir.Constant(vector(I64, lanes), list(range(lanes))))
        return numbers < count

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        return Value(self, self.b.select(condition.v, yes.v, no.v))

    def least(self, a: Value, b: Value) -> Value:
        return self.select(a < b, a, b)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a·b + c, rounded once."""
        return self.intrinsic("fma", a, b, c)

    def intrinsic(self, name: str, *operands: Value) -> Value:
        t = operands[0].type
        suffix = "f32" if _element(t) == F32 else "f64"
        lanes = f"v{t.count}" if isinstance(t, ir.VectorType) else ""
        return self.call(f"llvm.{name}.{lanes}{suffix}", t, *operands)

    def call(self, name: str, result: Type, *operands: Value) -> Value:
        known = self.module.globals.get(name)
        if known is None:
            signature = ir.FunctionType(result, [o.type for o in operands])
            known = ir.Function(self.module, signature, name)
        return Value(self, self.b.call(known, [o.v for o in operands]))

    def variable(self, first: Value) -> Variable:
        return Variable(self, first)

    # -- memory --------------------------------------------------------------------------

    def space(self, element: Type, count: int) -> Value:
        """Room on the stack, for the whole function."""
        with self.b.goto_entry_block():
            place = self.b.alloca(ir.ArrayType(element, count))
        place.align = 64
        place.type = PTR  # llvmlite would keep the array's type, which a plain pointer has not
        return Value(self, place)

    def at(self, base: Value, index: Value, size: int) -> Value:
        return Value(self, self.b.gep(base.v, [(index * size).v], source_etype=I8))

    def load(self, place: Value, t: Type, align: int, lanes: Value | None = None) -> Value:
        """Of the masked-out lanes nothing is touched; they are 0."""
        if lanes is None:
            return Value(self, self.b.load(place.v, typ=t, align=align))
        zero = Value(self, ir.Constant(t, None))
        name = f"llvm.masked.load.{_suffix(t)}.p0"
        return self.call(name, t, place, self.const(I32, align), lanes, zero)

    def stream(self, value: Value, place: Value, align: int) -> None:
        """Store past the cache; the place must be aligned as ``align`` says."""
        instruction = self.b.store(value.v, place.v, align=align)
        mark = self.module.add_metadata([ir.Constant(I32, 1)])
        instruction.set_metadata("nontemporal", mark)

    def store(self, value: Value, place: Value, align: int, lanes: Value | None = None) -> None:
        if lanes is None:
            self.b.store(value.v, place.v, align=align)
        else:
            name = f"llvm.masked.store.{_suffix(value.type)}.p0"
            self.call(name, VOID, value, place, self.const(I32, align), lanes)

    # -- control -------------------------------------------------------------------------

    @contextlib.contextmanager
    def loop(self, first: Value, end: Value, step: int = 1) -> Iterator[Value]:
        """for i in range(first, end, step)."""
        b = self.b
        head, body, done = (b.append_basic_block() for _ in range(3))
        before = b.block
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(first.v, before)
        b.cbranch(b.icmp_signed("<", i, end.v), body, done)
        b.position_at_end(body)
        yield Value(self, i)
        following = b.add(i, ir.Constant(I64, step))
        i.add_incoming(following, b.block)
        b.branch(head)
        b.position_at_end(done)

    @contextlib.contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.b.if_then(condition.v):
            yield

    def end(self, value: Value | None = None) -> None:
        if value is None:
            self.b.ret_void()
        else:
            self.b.ret(value.v)


def _suffix(t: Type) -> str:
    element = t.element
    name = {F32: "f32", F64: "f64"}.get(element) or f"i{element.width}"
    return f"v{t.count}{name}"
