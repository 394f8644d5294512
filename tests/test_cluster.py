"""A cluster gives the rows that one process gives, and what becomes of it costs no stored cell."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from gammabeta import _runs, cli
from gammabeta.studies import _cluster, _run
from gammabeta.studies._run import Experiment

pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
# Dask's own sockets and loops, when it is torn down.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

HERE = Path(__file__).parent
TINY = ("--budget", "tiny", "--data", "digits")
TOY = {"toy": Experiment("toy", "toy_experiment")}


class Dask:
    """A real scheduler and real workers, each a process of its own."""

    def __init__(self, folder: Path, workers: int = 2) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        port = self.address.rpartition(":")[2]
        self.scheduler = self.start(
            "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard", "--no-jupyter"
        )
        self.workers = [self.add_worker() for _ in range(workers)]
        if workers:
            self.wait_for(workers)

    def start(self, *words: str) -> subprocess.Popen:
        paths = os.pathsep.join([str(HERE), str(self.folder), os.environ.get("PYTHONPATH", "")])
        settings = {
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            # One killed worker is enough to blame a cell, and a lost one is known to be soon.
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *words],
            env={**os.environ, **settings},
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def add_worker(self) -> subprocess.Popen:
        return self.start("worker", self.address, "--nthreads", "1", "--no-dashboard")

    def wait_for(self, workers: int) -> None:
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            with contextlib.suppress(ConnectionError), _cluster.connected(self.address) as here:
                if len(here.threads) >= workers:
                    return
            time.sleep(0.2)
        pytest.fail(f"no {workers} workers within a minute")

    def end(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    cluster = Dask(tmp_path_factory.mktemp("dask"))
    yield cluster
    cluster.end()


@pytest.fixture
def make(monkeypatch):
    """Write an experiment where the workers look for modules."""

    def make(folder, name, body, cells="range(4)"):
        text = f"""
            import os, signal, time
            from gammabeta.studies._run import Cell
            CLAIMS = ("some-claim",)
            def cells(budget, data, seeds, rows):
                return [Cell("{name}", {{"k": c}}, 0) for c in {cells}]
            def measure(arm, seed, budget, data):
                k = arm["k"]
                {body}
                return [{{"double": 2 * k}}]
            def judge(rows):
                return []
            def figures(rows):
                return []
            """
        (folder / f"{name}_experiment.py").write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(str(folder))
        return {name: Experiment(name, f"{name}_experiment")}

    return make


def run(catalogue, out, **options):
    given = {"data": "digits", "catalogue": catalogue, **options}
    return _run.run(list(catalogue), out=out, **given)


def rows(out):
    return {
        cell.path.name: [
            {k: v for k, v in row.items() if not k.endswith("_seconds")} for row in cell.flat()
        ]
        for cell in _runs.read_cells([out])
    }


def test_a_cluster_gives_the_rows_that_one_process_gives(dask, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    events = []
    far = run(TOY, tmp_path / "far", seeds=4, dask=dask.address, progress=events.append)
    assert (far.done, far.failed) == (11, ())
    assert events[-1].parts == {"toy": (11, 0, 11)}
    near = run(TOY, tmp_path / "near", seeds=4, jobs=1)
    assert near.done == 11
    assert rows(tmp_path / "far") == rows(tmp_path / "near")
    again = run(TOY, tmp_path / "far", seeds=4, dask=dask.address)
    assert (again.done, again.skipped) == (0, 11)


def test_the_workers_share_no_file_system_with_the_run(dask, tmp_path, make):
    """They store nothing: the run folder is written by the process that reads it."""
    body = f"assert os.getpid() != {os.getpid()}; os.chdir('/'); import torch; " + (
        "assert torch.get_num_threads() == 1"
    )
    catalogue = make(dask.folder, "far", body)
    out = tmp_path / "run"
    result = run(catalogue, out, dask=dask.address)
    assert (result.done, result.failed) == (4, ())
    (spec, *_) = [cell.spec for cell in _runs.read_cells([out])]
    assert spec["cpu_seconds"] >= 0
    assert spec["versions"]["torch"]


def test_a_failed_cell_on_a_cluster_stops_no_other(dask, tmp_path, make):
    out = tmp_path / "run"
    result = run(make(dask.folder, "odd", "assert k != 2, 'two'"), out, dask=dask.address)
    assert (result.done, [f.reason for f in result.failed]) == (3, ["AssertionError: two"])
    (stored,) = _runs.read_failed([out])
    assert "Traceback" in stored["error"]


def test_a_cell_that_kills_its_worker_fails_alone(dask, tmp_path, make):
    body = "if k == 1: os.kill(os.getpid(), signal.SIGKILL)"
    out = tmp_path / "run"
    result = run(make(dask.folder, "deadly", body), out, dask=dask.address)
    assert result.done == 3
    (failure,) = result.failed
    assert "worker process was ended" in failure.reason
    (stored,) = _runs.read_failed([out])
    assert stored["spec"]["arm"] == {"k": 1}


def test_other_sources_on_a_worker_are_a_failure_and_no_rows(dask, tmp_path, make):
    out = tmp_path / "run"
    # so many and so long that each worker takes some, and imports these sources
    catalogue = make(dask.folder, "moving", "time.sleep(0.2)", "range(8)")
    assert run(catalogue, tmp_path / "first", dask=dask.address).done == 8
    changed = make(dask.folder, "moving", "time.sleep(0.1)", "range(2)")
    result = run(changed, out, dask=dask.address)
    assert result.done == 0
    assert all("sources must be the same everywhere" in f.reason for f in result.failed)


def test_a_cluster_that_dies_costs_no_stored_cell(tmp_path, make, monkeypatch):
    monkeypatch.setattr(_cluster, "_PATIENCE", 3)
    dask = Dask(tmp_path, workers=1)
    out = tmp_path / "run"
    try:
        catalogue = make(tmp_path, "long", "time.sleep(0.2)", "range(200)")

        def kill():
            while len(list(out.glob("cells/long/*"))) < 3:
                time.sleep(0.05)
            os.killpg(dask.scheduler.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(ConnectionError, match=r"cluster was lost.*same command goes on"):
            run(catalogue, out, dask=dask.address)
        killer.join()
    finally:
        dask.end()
    assert 3 <= len(rows(out)) < 200
    assert not list(out.rglob(".tmp-*"))
    assert _runs.read_failed([out]) == []


def test_a_cluster_without_workers_left_is_given_up(tmp_path, make, monkeypatch):
    monkeypatch.setattr(_cluster, "_PATIENCE", 3)
    dask = Dask(tmp_path, workers=1)
    out = tmp_path / "run"
    try:
        catalogue = make(tmp_path, "left", "time.sleep(0.2)", "range(200)")

        def stop():
            while len(list(out.glob("cells/left/*"))) < 2:
                time.sleep(0.05)
            os.killpg(dask.workers[0].pid, signal.SIGKILL)

        stopper = threading.Thread(target=stop)
        stopper.start()
        with pytest.raises(ConnectionError, match="cluster was lost"):
            run(catalogue, out, dask=dask.address)
        stopper.join()
    finally:
        dask.end()
    assert len(rows(out)) >= 2


def command(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", "run", "act-all", *TINY, *map(str, words)])
    shown = capsys.readouterr()
    return ended.value.code, shown.out, shown.err


def test_the_command_runs_on_a_cluster_and_says_where_it_cannot(dask, tmp_path, capsys):
    code, shown, said = command(capsys, "--dask", dask.address, "--out", tmp_path / "run")
    assert code == 0, said
    assert "100 cells done" in said
    assert "act-all" in shown
    code, shown, said = command(capsys, "--dask", "localhost", "--out", tmp_path / "other")
    assert (code, shown) == (2, "")
    assert said == (
        "The address of a Dask scheduler must read tcp://HOST:PORT, got 'localhost'. "
        "`dask scheduler` prints its own when it starts.\n"
    )


@pytest.mark.parametrize(
    ("address", "kind", "words"),
    [
        ("tcp://127.0.0.1:9", ConnectionError, r"none answers.*Start one with `dask scheduler`"),
        ("127.0.0.1:9", ValueError, r"must read tcp://HOST:PORT, got '127\.0\.0\.1:9'"),
        ("nonsense://x", ConnectionError, "correct the address"),
    ],
)
def test_a_wrong_address_is_named_and_leaves_no_run_folder(
    tmp_path, monkeypatch, address, kind, words
):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr(_cluster, "_SECONDS", 2)
    with pytest.raises(kind, match=words):
        run(TOY, tmp_path / "run", dask=address)
    assert not (tmp_path / "run").exists()


def test_a_scheduler_without_workers_says_how_to_start_some(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr(_cluster, "_SECONDS", 3)
    dask = Dask(tmp_path, workers=0)
    try:
        limit = time.monotonic() + 30
        while True:  # until it listens
            with pytest.raises(ConnectionError) as caught:
                run(TOY, tmp_path / "run", dask=dask.address)
            if "must have workers" in str(caught.value) or time.monotonic() > limit:
                break
    finally:
        dask.end()
    assert re.search(r"dask worker tcp://127.* --nthreads 1", str(caught.value))
    assert not (tmp_path / "run").exists()
