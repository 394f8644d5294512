"""CPU kernels that one process of a test run has compiled, loaded by the others.

Compiling one costs a third of a second and is the same everywhere; every kernel is still compiled
once in each run of the tests, by the package's own code.
"""

import ctypes
import functools
import hashlib
import os
from pathlib import Path

from gammabeta.ops._cpu import _compile

FOLDER = "GAMMABETA_TEST_KERNELS"  # a variable, which child processes inherit
FIRST = _compile._build


def share() -> None:
    """Keep machine code in the folder of this run, and take from there what is there."""
    if folder := os.environ.get(FOLDER):
        _compile._build = functools.partial(_build, Path(folder))


def _build(folder, layout, direction, form):
    import llvmlite.binding as llvm

    name = hashlib.sha256(repr((layout, direction, form)).encode()).hexdigest()
    path = folder / f"{name}.o"
    if path.exists():
        return _load(path.read_bytes())
    engines, make = [], llvm.create_mcjit_compiler

    def watched(*arguments):
        engines.append(make(*arguments))
        engines[0].set_object_cache(lambda _, code: _keep(path, code))
        return engines[0]

    llvm.create_mcjit_compiler = watched
    try:
        return FIRST(layout, direction, form)
    finally:
        llvm.create_mcjit_compiler = make


def _keep(path, code):
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(code)
    part.replace(path)


def _load(code):
    import llvmlite.binding as llvm

    llvm.add_symbol("gammabeta_parallel", _compile.runtime() or ctypes.addressof(_compile._nowhere))
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _compile._machine(llvm))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _compile._kept.append(engine)
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)(engine.get_function_address("run"))
