"""Settings that all tests share."""

import os
import signal

import kernels
import pytest
import torch

# Started in the background of a script, this process ignores Ctrl-C and hands that on to the
# programs that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that take long: begun first, lest one of two workers be left alone with them at the end.
LONG = (
    *("independent", "runner", "sync", "cli", "examples", "cluster", "report", "check"),
    *("report_view", "report_sliding", "rows", "documents", "cpu_memory", "cpu_threads", "verify"),
)


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # it would begin the files of many tests first


def pytest_collection_modifyitems(items):
    """Files stay together, those of LONG come first."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True, scope="session")
def _kernels_compiled_once(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (base / "kernels").mkdir(exist_ok=True)
    os.environ[kernels.FOLDER] = str(base / "kernels")
    kernels.share()


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    """Two test workers share two cores; a seed makes every failure repeatable."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
