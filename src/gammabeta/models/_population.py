"""Pooled statistics of what enters each layer of a model, over batches and over ranks.

A layer may be called several times in one forward pass; a *call* is its name and how many of
its calls came before in that pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from gammabeta.layers._running import RunningMoments
from gammabeta.layers.renorm import _Renorm
from gammabeta.moments import Moments

if TYPE_CHECKING:  # torch leaves this class without types

    class _Mode:
        def __enter__(self) -> object: ...
        def __exit__(self, *error: object) -> None: ...
else:
    from torch.utils._python_dispatch import TorchDispatchMode as _Mode

Call: TypeAlias = tuple[str, int]
Forward: TypeAlias = Callable[[nn.Module, Any], Any]


def run(model: nn.Module, batch: Any) -> Any:
    """The output for a batch: of a tuple or list the first element is the input, as everywhere
    in PyTorch's tools; a mapping holds keyword arguments; anything else is the one argument.
    """
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


@contextmanager
def watch(
    layers: Mapping[str, nn.Module],
    enter: Callable[[Call, Tensor, Tensor | None], None],
    leave: Callable[[Call, Tensor], None] | None = None,
) -> Iterator[Callable[[], None]]:
    """Call ``enter(call, x, mask)`` with what each layer is given, as long as the block lasts.

    The input is seen after all other hooks of the layer. ``leave(call, y)`` sees the output.
    Yields a function that has to be called before each forward pass.
    """
    counts: dict[str, int] = {}
    handles = []

    def before(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = name, counts.get(name, 0)
            counts[name] = call[1] + 1
            enter(call, *_operands(layer, args, kwargs))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if leave is not None and isinstance(output, Tensor):
                leave((name, counts[name] - 1), output)

        return hook

    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(layer.register_forward_hook(after(name)))
        yield counts.clear
    finally:
        for handle in handles:
            handle.remove()


def _operands(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    x: Tensor = next(iter(given.values()))
    return x, given.get("mask") if isinstance(layer, RunningMoments) else None


class Pool(dict[Call, Moments]):
    """The moments of everything that came in with each call, merged exactly."""

    def add(self, call: Call, x: Tensor, mask: Tensor | None) -> None:
        self.enter(call, Moments.of(x, mask))

    def enter(self, call: Call, seen: Moments) -> None:
        held = self.get(call)
        self[call] = seen if held is None else held.merge(seen)

    def of(self, name: str) -> Moments:
        """All calls of one layer together."""
        first, *others = (self[call] for call in sorted(self) if call[0] == name)
        for other in others:
            first = first.merge(other)
        return first

    def on_cpu(self) -> Pool:
        return Pool({call: Moments(*(part.cpu() for part in m)) for call, m in self.items()})


def gather(value: Any, group: Any = None) -> list[Any]:
    """``value`` of every rank of ``group``, in their order; of this one without any group.

    All ranks must call it equally often. The objects travel by pickle, between processes of one
    job that trust each other.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) <= 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class Origins(_Mode):
    """Which calls' outputs each tensor was computed from, while a model runs.

    Follows the data through every operation, unlike a graph of gradients, which ends at
    ``detach``, ``no_grad`` and integers. A number that Python reads from a tensor may decide what
    runs next: from then on everything depends on it. What another library computes (NumPy) is
    not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Begin a forward pass."""
        self._of: dict[int, frozenset[Call]] = {}
        self._all: frozenset[Call] = frozenset()

    def of(self, x: Tensor) -> frozenset[Call]:
        return self._all | self._of.get(_memory(x), frozenset())

    def mark(self, call: Call, x: Tensor) -> None:
        """``x`` is the output of ``call``."""
        self._note(x, self.of(x) | {call})

    def _note(self, x: Tensor, origins: frozenset[Call]) -> None:
        if _memory(x):
            # always written: memory that was freed comes back at the same address
            self._of[_memory(x)] = origins
        else:
            self._all |= origins

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = list(tensors((args, kwargs)))
        made = list(tensors(result))
        origins = self._all.union(*(self.of(x) for x in given))
        if func._schema.is_mutable:
            written = [
                a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments
            ]
            made += tensors([a for a, w in zip(args, written, strict=False) if w])
            made += tensors(kwargs.get("out"))
        elif not made:
            self._all = origins
        for x in made:
            self._note(x, origins)
        return result


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


def _memory(x: Tensor) -> int:
    """What views of one memory have in common; 0 for tensors without memory of their own."""
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and opaque layouts
        return 0


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Keep our layers from meeting other ranks, who may have more batches or fewer."""
    layers = [module for module in model.modules() if isinstance(module, RunningMoments)]
    held = [(layer, layer._group) for layer in layers if layer._group is not None]
    try:
        for layer, _ in held:
            layer._group = None
        yield
    finally:
        for layer, group in held:
            layer._group = group


@contextmanager
def by_batch(layers: Iterable[_BatchNorm | RunningMoments]) -> Iterator[None]:
    """Let ``layers``, in eval mode, normalize by each batch's own statistics and enter none.

    Frozen layers and batch renormalization too. The mode is left to the caller to restore.
    """
    with ExitStack() as undo:
        for layer in layers:
            if isinstance(layer, RunningMoments):
                undo.callback(setattr, layer, "_blocked", layer._blocked)
                layer._blocked += 1
                if layer._frozen:
                    undo.callback(setattr, layer, "_frozen", True)
                    layer._frozen = False
                if isinstance(layer, _Renorm):
                    # with these limits it is batch normalization, not drawn to old statistics
                    for key, least in (("r_max", 1.0), ("d_max", 0.0)):
                        undo.callback(setattr, layer, key, getattr(layer, key))
                        setattr(layer, key, least)
                layer.training = True
            elif isinstance(layer, nn.SyncBatchNorm):
                # in training mode it would meet the other ranks; without statistics it takes
                # the batch's in eval mode too
                for key in ("running_mean", "running_var"):
                    undo.callback(layer._buffers.__setitem__, key, layer._buffers[key])
                    layer._buffers[key] = None
            else:  # PyTorch's layers leave buffers alone that they do not track
                undo.callback(setattr, layer, "track_running_stats", layer.track_running_stats)
                layer.track_running_stats = False
                layer.training = True
        yield


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run compiled parts of ``model`` as Python: hooks do not fire in compiled code."""
    compiled = any(
        getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
        for module in model.modules()
    )
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
