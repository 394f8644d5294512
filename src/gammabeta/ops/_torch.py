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
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


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


def addresses_count() -> bool:
    """Whether operations run at once, on the values that tensors hold, and nobody looks on.

    False under a tracer, a mode, a transform or the profiler. Without the private names: True only
    as far as the public ones tell.
    """
    if torch.compiler.is_compiling() or recorded() or transform_active():
        return False
    functions = getattr(torch._C, "_len_torch_function_stack", None)
    if functions is not None and functions() > 0:
        return False
    profiling = getattr(torch._C._autograd, "_profiler_enabled", None)
    return not (profiling is not None and profiling())
