"""The private names of torch that this package uses: here only, each with a fallback."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch as dispatch

F = TypeVar("F", bound=Callable[..., object])


def known_to_the_compiler(function: F) -> F:
    """Mark a function whose result the compiler may take once, without looking into it.

    The public way, ``torch.compiler.assume_constant_result``, sets the same mark, and imports the
    whole compiler to do so.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def transform_active() -> bool:
    """Whether torch.func or forward-mode differentiation is at work.

    Both need plain differentiable operations: neither a custom backward nor buffers that are
    written in place. Without the private names, fall back to "no", which raises rather than
    computes wrong numbers: PyTorch itself refuses what it cannot transform.
    """
    if torch.compiler.is_compiling():  # the compiler traces transforms on its own
        return False
    functorch = getattr(torch._C, "_functorch", None)
    level = getattr(functorch, "maybe_current_level", None)
    if level is not None and level() is not None:
        return True
    return getattr(forward_ad, "_current_level", -1) >= 0


def is_batched(t: Tensor) -> bool:
    """Whether ``t`` stands for a stack of tensors inside ``torch.func.vmap``."""
    if torch.compiler.is_compiling():
        return False
    functorch = getattr(torch._C, "_functorch", None)
    check = getattr(functorch, "is_batchedtensor", None)
    return bool(check(t)) if check is not None else False


def in_backward() -> bool:
    """Whether this thread is executing a backward pass.

    A forward pass in there is the recomputation of activation checkpointing. Without the
    private name every forward counts, as in PyTorch's own layers.
    """
    if torch.compiler.is_compiling():  # there the forward is recomputed without its side effects
        return False
    return _graph_task() != -1


def _no_task() -> int:
    return -1


_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", _no_task)


def saved_by(pack: Callable[..., object]) -> bool:
    """Whether this hook is the one that now gets what autograd saves; without the name, "yes"."""
    top = _saving_hooks(True)
    return top is None or top[0] is pack


def _no_hooks(_: bool) -> None:
    return None


_saving_hooks: Callable[[bool], tuple[object, object] | None] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", _no_hooks
)


def recorded() -> bool:
    """Whether a tracer or a dispatch mode sees the operations instead of their values."""
    if torch.compiler.is_compiling():
        return True
    mode = getattr(dispatch, "_get_current_dispatch_mode", None)
    tracing: Callable[[], bool] = getattr(torch.jit, "is_tracing", lambda: False)
    return (mode is not None and mode() is not None) or tracing()


def host_readable(t: Tensor) -> bool:
    """Whether reading a value of ``t`` costs nothing and hides nothing from a tracer."""
    if type(t) is not Tensor or t.device.type != "cpu":
        return False
    return not (recorded() or transform_active())


def _none() -> int:
    return 0


def _found(place: object, name: str) -> Callable[[], object]:
    """A private question of torch, or one whose answer is always no."""
    return getattr(place, name, _none)


_dispatch_modes = _found(torch._C, "_len_torch_dispatch_stack")
_function_modes = _found(torch._C, "_len_torch_function_stack")
_transforms = _found(getattr(torch._C, "_functorch", None), "peek_interpreter_stack")
_jit_tracing = _found(torch._C, "_is_tracing")
_profiling = _found(torch._C._autograd, "_profiler_enabled")


def addresses_count() -> bool:
    """Whether operations run at once, on the values that tensors hold, and nobody looks on.

    False under a tracer, a mode, a transform or the profiler. Asked at every call of a kernel,
    hence from the shortest answers there are.
    """
    return not (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms()
        or getattr(forward_ad, "_current_level", -1) >= 0
        or _jit_tracing()
        or _profiling()
    )


def written(*tensors: Tensor) -> None:
    """Tell autograd that the values of these were changed behind its back."""
    _increment(tensors)


_increment: Callable[[tuple[Tensor, ...]], None] = getattr(
    torch._C, "_increment_version", torch.autograd.graph.increment_version
)
