"""The CPU kernels on PyTorch's threads: from any thread, after a fork, and where none are found."""

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch

from gammabeta.ops._cpu import _compile

pytestmark = pytest.mark.skipif(
    _compile.missing() is not None, reason=f"no CPU kernels: {_compile.missing()}"
)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
# above the size from which several threads work; channels-last, rows and contiguous images
SHAPES = ((12, 70, 9, 9), (3, 16, 31, 33), (700, 67), (2, 3, 90, 91))


def _calls():
    for shape in SHAPES:
        for layout in ("contiguous", "channels_last"):
            yield cases.call(shape, dtype=torch.float32, layout=layout, residual=True)


def _results(call, act="relu"):
    y, grads, moments = cases.run(call, act=act, backend="cpu")
    return [y, *grads.values(), *moments]


def _equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def _python(code, **variables):
    """Run a program in a process of its own, with what the programs below have in common."""
    start = """
        import ctypes, os, sys, threading
        import torch
        import gammabeta as gb
        torch.manual_seed(0)

        def tasks():
            return len(os.listdir("/proc/self/task"))

        def step(norm):
            x = torch.randn(8, 64, 30, 30, requires_grad=True)
            y = norm(x)
            y.backward(torch.ones_like(y))
            return y, x.grad

        def ours(x):
            return gb.batch_norm(x, backend="cpu")[0]

        def theirs(x):
            return torch.nn.functional.batch_norm(x, None, None, training=True)
    """
    code = textwrap.dedent(code)
    if "# before everything" not in code:
        code = textwrap.dedent(start) + code
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split("\n")[:-1]


# --- from any thread -----------------------------------------------------------------------------


def test_several_python_threads_at_once_get_the_bits_of_one():
    calls = list(_calls())
    alone = [_results(call) for call in calls]
    start = threading.Barrier(4)

    def work(first):
        torch.set_num_threads(2)
        start.wait()
        for i in range(3 * len(calls)):
            which = (first + i) % len(calls)
            if not _equal(_results(calls[which]), alone[which]):
                return which
        return None

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [None] * 4


def test_inside_autograds_own_threads_the_bits_are_the_same():
    # reentrant backward passes deeper than 60 go to threads that autograd makes
    call = next(_calls())
    expected = _results(call)
    seen = set()

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, depth):
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.add(threading.get_ident())
            with torch.enable_grad():
                if ctx.depth % 20 == 0:
                    torch.set_num_threads(2)
                    assert _equal(_results(call), expected)
                if ctx.depth:
                    x = torch.ones(1, requires_grad=True)
                    Nested.apply(x, ctx.depth - 1).sum().backward()
            return dy, None

    Nested.apply(torch.ones(1, requires_grad=True), 100).sum().backward()
    assert len(seen) > 1


def test_a_kernel_is_compiled_once_when_many_threads_ask_for_it_first():
    (same, compiled) = _python(
        """
        from gammabeta.ops._cpu import _compile
        built = []
        build = _compile._build
        _compile._build = lambda *key: built.append(key) or build(*key)
        x = torch.randn(8, 5, 7, 3)
        found, start = [], threading.Barrier(6)

        def work():
            start.wait()
            found.append(gb.batch_norm(x, backend="cpu")[0])

        threads = [threading.Thread(target=work) for _ in range(6)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        print(all(torch.equal(found[0], y) for y in found))
        print(len(built))
        """
    )
    assert (same, compiled) == ("True", "1")


# --- whose threads -------------------------------------------------------------------------------


@on_linux
def test_there_are_as_many_threads_as_after_pytorchs_own_operation():
    alone = _counted("theirs")
    assert int(alone[0]) > 1
    assert _counted("ours") == alone


def _counted(norms):
    """The threads of a process after some steps, in its first thread and in another one."""
    program = """
        torch.set_num_threads(3)

        def work():
            torch.set_num_threads(3)
            for norm in (NORMS,):
                step(norm)

        work()
        print(tasks())
        other = threading.Thread(target=lambda: [work(), print(tasks(), flush=True)])
        other.start()
        other.join()
        work()
        print(tasks())
    """
    return _python(program.replace("NORMS", norms))


@on_linux
def test_the_openmp_runtime_is_the_one_that_pytorch_links():
    pytest.importorskip("sklearn")
    found = _python(
        """
        # before everything
        import sklearn.cluster  # with an OpenMP runtime of its own
        import os, subprocess, torch
        import gammabeta as gb
        from gammabeta.ops._cpu import _compile
        torch.set_num_threads(2)
        gb.batch_norm(torch.randn(8, 64, 30, 30), backend="cpu")
        address = _compile.runtime()
        mapped, holder = set(), ""
        for line in open("/proc/self/maps"):
            span, *_, path = (line.split(maxsplit=5) + [""])[:6]
            low, high = (int(end, 16) for end in span.split("-"))
            if low <= address < high:
                holder = os.path.realpath(path.strip())
            if "omp" in os.path.basename(path):
                mapped.add(os.path.realpath(path.strip()))
        print(holder)
        print(len(mapped))
        print(torch.__file__)
        """
    )
    holder, runtimes, package = found
    place = os.path.dirname(os.path.dirname(os.path.realpath(package)))
    assert holder.startswith((f"{place}/torch/", f"{place}/torch.libs/")), holder
    assert int(runtimes) > 1, "scikit-learn no longer brings one of its own"


# --- after a fork --------------------------------------------------------------------------------


@on_linux
def test_a_forked_child_runs_serially_and_gets_the_same_bits():
    found = _python(
        """
        import warnings
        warnings.simplefilter("ignore")  # newer versions of Python warn of every such fork
        torch.set_num_threads(2)
        x, dy = torch.randn(8, 64, 30, 30, requires_grad=True), torch.randn(8, 64, 30, 30)

        def results():
            y, _ = gb.batch_norm(x, act="relu", backend="cpu")
            return y.detach(), torch.autograd.grad(y, x, dy)[0]

        def same():
            # PyTorch's own comparison would wait in the child for threads that are not there
            pairs = zip(results(), expected)
            return all((a.numpy() == b.numpy()).all() for a, b in pairs)

        expected = results()
        print(tasks() > 1, flush=True)
        child = os.fork()
        if child == 0:
            os._exit(0 if same() and tasks() == 1 else 7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(same())
        """
    )
    assert found == ["True", "0", "True"]


# --- where something is missing ------------------------------------------------------------------

WORKS = """
        x = torch.randn(8, 5, 7, requires_grad=True)
        mask = torch.ones(8, 7, dtype=torch.bool)
        for options in ({}, {"mask": mask}, {"act": "relu", "residual": x.detach()}):
            gb.batch_norm(x, **options)[0].sum().backward()
        for layer in (gb.BatchNorm1d(5), gb.BatchNormAct1d(5)):
            layer(x).sum().backward()
            layer.eval()(x)
            assert layer.num_batches_tracked == 1
        print("works")
"""


def test_without_llvmlite_the_reason_is_given_and_everything_works():
    found = _python(
        """
        # before everything
        import sys
        sys.modules["llvmlite"] = None
        import torch
        import gammabeta as gb
        told = gb.backends(torch.randn(8, 5))
        print(told["cpu"].why_not)
        print(told["native"].chosen)
        try:
            gb.batch_norm(torch.randn(8, 5), backend="cpu")
        except ValueError as error:
            print(error)
        torch.compile(gb.BatchNorm1d(5), backend="aot_eager", fullgraph=True)(torch.randn(8, 5))
        """
        + WORKS
    )
    assert "llvmlite" in found[0]
    assert found[1] == "True"
    assert "llvmlite" in found[2]
    assert "native" in found[2]
    assert found[3] == "works"


def test_without_pytorchs_runtime_large_tensors_are_refused_where_several_threads_are_asked_for():
    found = _python(
        """
        # before everything
        import ctypes, os
        import torch
        real = ctypes.CDLL

        def without(name, *args, **options):
            if "libtorch_cpu" in str(name):
                raise OSError("no such library")
            return real(name, *args, **options)

        ctypes.CDLL = without
        del os.register_at_fork
        import gammabeta as gb
        large, smaller = torch.randn(1 << 10, 1 << 10), torch.randn(300, 200)
        torch.set_num_threads(2)
        for x in (large, smaller):
            told = gb.backends(x)
            print(told["cpu"].why_not, told["cpu"].chosen, told["native"].chosen)
        gb.batch_norm(large)
        try:
            gb.batch_norm(large, backend="cpu")
        except ValueError as error:
            print(error)
        y, _ = gb.batch_norm(smaller, backend="cpu")
        torch.set_num_threads(1)
        print(gb.backends(large)["cpu"].why_not)
        assert torch.equal(y, gb.batch_norm(smaller, backend="cpu")[0])
        gb.batch_norm(large, backend="cpu")
        """
        + WORKS
    )
    assert "OpenMP" in found[0]
    assert found[0].endswith("False True")
    assert found[1] == "None True False"
    assert "OpenMP" in found[2]
    assert "set_num_threads(1)" in found[2]
    assert found[3:] == ["None", "works"]
