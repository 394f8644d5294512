"""Outputs of normalizations that nobody keeps: computed again when a backward asks for them.

PyTorch hands each tensor that it keeps for a backward to ``_pack``, and what that gave to
``_unpack`` when the backward wants the tensor. It then no longer notices what is written in the
meantime: the versions of all tensors are compared here.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gammabeta.ops import _torch
from gammabeta.ops._cpu import _autograd
from gammabeta.ops._cpu._autograd import How


@contextmanager
def recompute_outputs() -> Iterator[None]:
    """Let layers after a normalization not keep its output, but compute it again from its input.

    y = act(γ·x̂ + β) is what the next layer keeps for its backward pass, a convolution for
    instance, while the normalization keeps x, which is as large. Inside, y is not kept: when a
    backward pass asks for it, inside or later, the same kernel computes it again, bit for bit, and
    so are all gradients (with smooth activations for the same number of threads, by which PyTorch
    divides their work). That takes about the time of a normalization in eval mode; half the memory
    of a chain of convolutions, normalizations and activations goes. See ``docs/memory.md``.

    It takes effect where the backend ``cpu`` computes y and its activation in one call
    (``BatchNormAct``, ``gb.convert(model, fuse=True)``), or there is no activation; also for views
    of y. y is kept as ever if it was made with a residual or a ``group``, by another backend, under
    the profiler, a mode or ``torch.compile``, once it was written to in place, and where it is
    detached. May be nested; holds for the thread that enters it, and gives way to hooks of others
    inside, such as those of ``torch.utils.checkpoint``.

    Raises:
        RuntimeError: in the backward pass: x, γ, β or y was changed in place after the forward
            pass. As in PyTorch, writes through ``.data`` or NumPy go unnoticed.

    >>> import torch, gammabeta as gb
    >>> bn, linear = gb.BatchNormAct1d(100), torch.nn.Linear(100, 10)
    >>> x = torch.randn(60, 100)
    >>> with gb.recompute_outputs():
    ...     y = bn(x)
    ...     loss = linear(y).sum()
    >>> del y  # nobody holds it now, and yet
    >>> loss.backward()
    >>> linear.weight.grad.shape
    torch.Size([10, 100])

    Source: Chen et al. 2016, arXiv:1604.06174, compute kept values again; Pleiss et al. 2017,
    section 3, arXiv:1707.06990, the outputs of normalizations.
    """
    outer = _here.outputs
    _here.outputs = outputs = {} if outer is None else outer
    _count(1)
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _count(-1)
        _here.outputs = outer
        if outer is None:
            outputs.clear()  # each entry's reference knows the table: nothing else frees it at once


class _Kept:
    """A tensor that is kept as it is."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # an output that its own node keeps must not know that node again
        self.tensor = tensor if tensor.grad_fn is None else tensor.detach()
        self.version = tensor._version

    def get(self) -> Tensor:
        t = self.tensor
        if t._version != self.version:
            raise RuntimeError(_changed(tuple(t.shape), t._version, self.version))
        return t


class _Recipe:
    """How to make an output again; knows the output itself only as long as somebody holds it."""

    __slots__ = ("askers", "how", "inputs", "output", "place", "shape", "version", "witness")

    def __init__(self, y: Tensor, inputs: tuple[Tensor | None, ...], how: How) -> None:
        self.output = weakref.ref(y, _forget(id(y)))
        self.place, self.version, self.shape = y.data_ptr(), y._version, tuple(y.shape)
        self.inputs = tuple(None if t is None else _pack(t) for t in inputs)
        self.how = how
        # shares the version with y, not the memory
        self.witness: Tensor | None = None
        self.askers: list[weakref.ref[_Again]] = []

    def gives(self, t: Tensor, y: Tensor) -> bool:
        """Whether ``t``, which is y or a view of it, holds what would be computed again."""
        return (
            self.output() is y
            and t._version == self.version
            and type(t) is Tensor
            and t.dtype is y.dtype
            and not t.is_neg()
            and y.data_ptr() == self.place
        )

    def make(self) -> Tensor:
        x, weight, bias, valid, kept = (None if p is None else p.get() for p in self.inputs)
        assert x is not None
        assert kept is not None
        with torch.no_grad():
            return _autograd.repeat(x, weight, bias, valid, kept, self.how)


class _Again:
    """An output, or a view of one, that is not kept."""

    __slots__ = ("__weakref__", "geometry", "ready", "recipe")

    def __init__(self, t: Tensor, y: Tensor, recipe: _Recipe) -> None:
        self.recipe = recipe
        self.geometry = None if t is y else (t.shape, t.stride(), t.storage_offset())
        self.ready: Tensor | None = None
        if recipe.witness is None:
            recipe.witness = y.detach()
            recipe.witness.data = _EMPTY
        recipe.askers.append(weakref.ref(self))

    def get(self) -> Tensor:
        recipe = self.recipe
        assert recipe.witness is not None
        if recipe.witness._version != recipe.version:
            raise RuntimeError(_changed(recipe.shape, recipe.witness._version, recipe.version))
        y, self.ready = self.ready, None
        if y is None:
            y = recipe.make()
            # the others will ask in the same pass, most likely
            for ask in recipe.askers:
                other = ask()
                if other is not None and other is not self:
                    other.ready = y
        return y if self.geometry is None else y.as_strided(*self.geometry)


_Packed: TypeAlias = _Kept | _Again


class _Here(threading.local):
    """The outputs made inside, by id, of this thread; None outside."""

    outputs: dict[int, _Recipe] | None = None


_here = _Here()
_EMPTY = torch.empty(0)
_lock = threading.Lock()
_inside = 0  # contexts that are entered, in all threads


def _count(change: int) -> None:
    """The kernels tell of their outputs only while somebody is inside."""
    global _inside
    with _lock:
        _inside += change
        _autograd.made = _note if _inside else None


def _note(y: Tensor, inputs: tuple[Tensor | None, ...], how: How) -> None:
    outputs = _here.outputs
    # hooks of others inside decide themselves what is kept, of our input too
    if outputs is not None and _torch.saved_by(_pack):
        outputs[id(y)] = _Recipe(y, inputs, how)


def _forget(key: int) -> Callable[[weakref.ref[Tensor]], object]:
    outputs = _here.outputs
    assert outputs is not None
    return lambda _: outputs.pop(key, None)


def _pack(t: Tensor) -> _Packed:
    outputs = _here.outputs
    if outputs:
        recipe, y = outputs.get(id(t)), t
        if recipe is None and t._base is not None:
            y = t._base
            recipe = outputs.get(id(y))
        if recipe is not None and recipe.gives(t, y):
            return _Again(t, y, recipe)
    return _Kept(t)


def _unpack(packed: _Packed) -> Tensor:
    return packed.get()


def _changed(shape: tuple[int, ...], now: int, then: int) -> str:
    return (
        "gammabeta.recompute_outputs: one of the variables needed for gradient computation has "
        f"been modified by an inplace operation: a tensor of shape {shape} is at version {now}; "
        f"expected version {then} instead. Call backward before parameters or activations are "
        "changed, or change a clone."
    )
