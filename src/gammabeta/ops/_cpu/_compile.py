"""Compiling kernels when they are first needed, and running them on PyTorch's own threads."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from gammabeta.ops._torch import known_to_the_compiler

Run = Callable[[bytes], int]
_lock = threading.Lock()
_kept: list[Any] = []  # LLVM's engines own the machine code
_forked = False
_nowhere = ctypes.c_int()


def _after_fork() -> None:
    # the threads of the parent do not exist here, and the runtime does not know it
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@known_to_the_compiler
def missing() -> str | None:
    """Why no kernel can be compiled here, or None."""
    return _missing()


def ready() -> bool:
    """Whether :func:`missing` has said that nothing is; quick."""
    return _ready


_ready = False


@functools.cache
def _missing() -> str | None:
    try:
        import llvmlite.binding as llvm
    except Exception as error:
        return f"llvmlite, which compiles the kernels, cannot be imported ({error})"
    try:
        _machine(llvm)
    except Exception as error:
        return f"LLVM does not know this processor ({error})"
    global _ready
    _ready = True
    return None


@functools.cache
def runtime() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that PyTorch links, if it has one.

    Looked up through PyTorch's library: another runtime of the same name may be in the process
    (scikit-learn brings one), with threads of its own.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(found, ctypes.c_void_p).value


def together() -> bool:
    """Whether a kernel runs on as many threads as PyTorch's own operations do."""
    return threads() == torch.get_num_threads()


def advise(address: int, size: int) -> None:
    """Ask for large pages under fresh memory, where the system gives them on request.

    Those that it shares with its neighbours too: of some MB between two others few are whole.
    """
    if _madvise is not None:
        first = address // _PAGE * _PAGE
        _madvise(first, -(-(address + size) // _PAGE) * _PAGE - first, _HUGEPAGE)


_PAGE, _HUGEPAGE = 1 << 21, 14  # bytes of a large page; Linux's MADV_HUGEPAGE


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    return cast(Callable[[int, int, int], int], found)


_madvise = _find_madvise()


def threads() -> int:
    """How many threads a kernel may use now."""
    return 1 if _forked or runtime() is None else torch.get_num_threads()


@functools.cache
def _machine(llvm: Any) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    features = llvm.get_host_cpu_features().flatten()
    name = llvm.get_host_cpu_name()
    return target.create_target_machine(cpu=name, features=features, opt=3, jit=True)


_compiled: dict[tuple[Any, ...], Run] = {}


def kernel(layout: str, direction: str, form: tuple[Any, ...]) -> Run:
    """The compiled kernel: call it with an array of words."""
    key = (layout, direction, form)
    run = _compiled.get(key)
    if run is None:
        with _lock:
            run = _compiled.get(key)
            if run is None:
                run = _compiled[key] = _build(layout, direction, form)
    return run


def _build(layout: str, direction: str, form: tuple[Any, ...]) -> Run:
    from llvmlite import ir

    from gammabeta.ops._cpu import _pixels, _planes, _running
    from gammabeta.ops._cpu._operands import Form

    module = ir.Module(name=f"{layout}_{direction}")
    source = {"planes": _planes, "pixels": _pixels, "running": _running}[layout]
    getattr(source, direction)(module, Form(*form))
    return _finish(module)


def _finish(module: Any) -> Run:
    import llvmlite.binding as llvm

    machine = _machine(llvm)
    # without a runtime nothing calls it, one thread being all there is, but it must have a place
    llvm.add_symbol("gammabeta_parallel", runtime() or ctypes.addressof(_nowhere))
    module.triple = machine.triple
    parsed = llvm.parse_assembly(str(module))
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False  # vectors are explicit
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    _kept.append(engine)
    address = engine.get_function_address("run")
    # ctypes gives the interpreter's lock away while the kernel runs
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)(address)
