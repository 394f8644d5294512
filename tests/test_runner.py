"""The runner: the same rows however often it is killed, and no cell that takes others with it."""

import importlib
import itertools
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch

from gammabeta import _runs
from gammabeta._runs import RunError
from gammabeta._runs._atomic import HOST
from gammabeta.studies import _experiments, _judge, _run
from gammabeta.studies._run import Experiment
from gammabeta.studies._verdict import Verdict

HERE = Path(__file__).parent
TOY = {"toy": Experiment("toy", "toy_experiment")}


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Also in worker processes, which inherit the path."""
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed, in this process: what all others are compared with."""
    out = tmp_path_factory.mktemp("whole") / "run"
    sys.path.insert(0, str(HERE))
    try:
        result = run_toy(out, jobs=1)
    finally:
        sys.path.remove(str(HERE))
    assert (result.done, result.failed, result.interrupted) == (11, (), False)
    return out


def run_toy(out, **options):
    return _run.run(["toy"], out=out, **{"data": "digits", "seeds": 4, "catalogue": TOY, **options})


def rows(*paths):
    """What was measured, by cell, timings aside."""
    return {
        cell.path.name: [
            {k: v for k, v in row.items() if not k.endswith("_seconds")} for row in cell.flat()
        ]
        for cell in _runs.read_cells(paths)
    }


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Write an experiment of a few plain cells; give the catalogue with it."""
    numbers = itertools.count()

    def make(body, cells="range(3)", name="plain", key="k", module=None):
        module = module or f"experiment_{name}_{os.getpid()}_{next(numbers)}"
        text = f"""
            import os, signal, time
            from gammabeta.studies._run import Cell
            CLAIMS = ("some-claim",)
            def cells(budget, data, seeds, rows):
                return [Cell("{name}", {{"{key}": c}}, 0, wave=c % 10) for c in {cells}]
            def measure(arm, seed, budget, data):
                {key} = arm["{key}"]
                {body}
                return [{{"double": 2 * {key}}}]
            def judge(rows):
                return []
            def figures(rows):
                return []
            """
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        sys.modules.pop(module, None)
        monkeypatch.syspath_prepend(str(tmp_path))
        return {name: Experiment(name, module)}

    return make


def run_plain(catalogue, out, **options):
    ids = list(catalogue)
    return _run.run(ids, out=out, catalogue=catalogue, **{"data": "digits", "jobs": 1, **options})


# --- the same rows --------------------------------------------------------------------------


def test_processes_give_the_rows_that_one_process_gives(whole, tmp_path):
    events = []
    result = run_toy(tmp_path / "run", jobs=2, progress=events.append)
    assert result.done == 11
    assert rows(tmp_path / "run") == rows(whole)
    assert [event.text.split()[-1] for event in events if event.kind == "wave"] == ["0", "1"]
    assert (events[-1].done, events[-1].total, events[-1].eta_seconds) == (11, 11, 0)
    assert all(event.eta_seconds >= 0 for event in events if event.done)


def test_what_is_finished_is_not_run_again_unless_forced(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("rows.jsonl")}
    result = run_toy(out, jobs=1)
    assert (result.done, result.skipped) == (0, 11)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("rows.jsonl")} == before
    result = run_toy(out, jobs=1, seeds=1, force=True)
    assert (result.done, result.skipped) == (5, 0)
    assert rows(out) == rows(whole)
    newer = [path for path in before if path.stat().st_mtime_ns > before[path]]
    assert len(newer) == 5


def test_runs_of_two_machines_are_merged_by_copying(whole, tmp_path):
    cells = sorted(whole.glob("cells/toy/*"))
    for part, chosen in (("a", cells[:7]), ("b", cells[5:])):
        for cell in chosen:
            shutil.copytree(cell, tmp_path / part / "cells" / "toy" / cell.name)
    assert rows(tmp_path / "a", tmp_path / "b") == rows(whole)
    shutil.copytree(tmp_path / "b", tmp_path / "a", dirs_exist_ok=True)
    assert rows(tmp_path / "a") == rows(whole)
    assert run_toy(tmp_path / "a", jobs=1).done == 0


def test_a_cell_leaves_no_trace_in_the_caller(tmp_path, make):
    body = "import torch; torch.set_default_dtype(torch.float64); torch.set_num_threads(2)"
    torch.set_num_threads(2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    python = random.Random(7)
    random.seed(7)
    shown, handlers = warnings.showwarning, logging.getLogger().handlers[:]
    assert run_plain(make(body), tmp_path / "run").done == 3
    assert torch.equal(torch.rand(3), expected)
    assert random.random() == python.random()
    assert torch.get_num_threads() == 2
    assert torch.get_default_dtype() == torch.float32
    assert warnings.showwarning is shown
    assert logging.getLogger().handlers == handlers


def test_a_worker_has_one_thread_a_log_and_gets_nothing_after_the_deadline(tmp_path, make):
    body = (
        "import logging, torch, warnings; warnings.warn('beware'); time.sleep(0.1); "
        "logging.getLogger('gammabeta.x').info('hello'); "
        "assert torch.get_num_threads() == 1; assert os.environ.get('OMP_NUM_THREADS') == '1'"
    )
    catalogue = make(body, "range(0, 4000, 10)")
    # Starting the two workers alone takes longer than the time that the run has.
    result = run_plain(catalogue, tmp_path / "run", jobs=2, deadline_seconds=1)
    assert result.failed == ()
    assert result.out_of_time
    assert 2 <= result.done < 20
    logs = [path.read_text() for path in (tmp_path / "run").rglob("run.log")]
    assert len(logs) == result.done
    assert all("UserWarning: beware" in log and "gammabeta.x: hello" in log for log in logs)


# --- killed, interrupted, crowded -----------------------------------------------------------

SCRIPT = """
import sys, warnings
sys.path.insert(0, {here!r})
from pathlib import Path
from gammabeta.studies import _run
toy = {{"toy": _run.Experiment("toy", "toy_experiment")}}
result = _run.run(["toy"], out=Path({out!r}), data="digits", seeds={seeds}, jobs={jobs},
                  catalogue=toy)
print("interrupted" if result.interrupted else "finished", result.done)
"""


def start(out, jobs, seeds=4):
    code = SCRIPT.format(here=str(HERE), out=str(out), jobs=jobs, seeds=seeds)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-c", code], text=True, start_new_session=True, **pipes
    )


def wait_for_cells(out, count, process):
    deadline = time.monotonic() + 60
    while len(list(out.glob("cells/*/[!.]*"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no cells within a minute"
        time.sleep(0.01)


def wait_until_gone(group):
    """Until no process of the group is left (one that nobody waits for still counts)."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        states = subprocess.run(
            ["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True, check=False
        ).stdout.split()
        if all(state.startswith("Z") for state in states):
            return
        time.sleep(0.05)
    pytest.fail(f"processes of the group are left: {states}")


@pytest.mark.parametrize(
    ("jobs", "everybody"), [(1, True), (2, True), (2, False)], ids=["one", "group", "parent"]
)
def test_a_run_killed_at_a_random_moment_ends_with_the_same_rows(whole, tmp_path, jobs, everybody):
    chance = random.SystemRandom()
    out = tmp_path / "run"
    process = start(out, jobs)
    wait_for_cells(out, chance.randrange(0, 10), process)
    time.sleep(chance.random() * 0.15)
    (os.killpg if everybody else os.kill)(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until_gone(process.pid)
    present = rows(out) if out.exists() else {}
    assert present.items() <= rows(whole).items()
    result = run_toy(out, jobs=1)
    assert (result.done, result.skipped) == (11 - len(present), len(present))
    assert rows(out) == rows(whole)
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.parametrize("everybody", [True, False], ids=["group", "parent"])
def test_an_interrupt_ends_all_processes_and_says_nothing_more(whole, tmp_path, everybody):
    out = tmp_path / "run"
    process = start(out, jobs=2, seeds=100)
    wait_for_cells(out, 4, process)
    (os.killpg if everybody else os.kill)(process.pid, signal.SIGINT)
    started = time.monotonic()
    output, errors = process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert (output.split()[0], errors, process.returncode) == ("interrupted", "", 0)
    wait_until_gone(process.pid)
    assert not list(out.rglob(".tmp-*"))
    assert len(_runs.read_cells([out])) >= 4


def test_an_interrupt_between_two_results_does_not_wait_for_running_cells(tmp_path, make):
    def stop(event):
        if event.kind == "done":
            raise KeyboardInterrupt

    out = tmp_path / "run"
    catalogue = make("if k > 0: time.sleep(60)", "(0, 10, 20, 30)")
    result = run_plain(catalogue, out, jobs=2, progress=stop)
    assert (result.interrupted, result.done) == (True, 1)
    assert result.seconds < 40
    assert len(_runs.read_cells([out])) == 1


def test_two_runners_in_one_folder_share_the_work(whole, tmp_path):
    out = tmp_path / "run"
    runners = [start(out, jobs=1) for _ in range(2)]
    done = 0
    for runner in runners:
        output, errors = runner.communicate(timeout=60)
        assert (output.split()[0], errors) == ("finished", "")
        done += int(output.split()[1])
    assert rows(out) == rows(whole)
    # Whoever comes late finds the cells of the first: not each of the two made all eleven, unless
    # the machine let them work in step from the first cell to the last.
    assert 11 <= done <= 22


# --- cells that go wrong --------------------------------------------------------------------


def test_a_failed_cell_stops_no_other_and_its_command_repeats_it(tmp_path, make):
    out = tmp_path / "a run"
    catalogue = make("if k == 1: raise MemoryError('too much')", name="often")
    result = run_plain(catalogue, out)
    assert (result.done, len(result.failed)) == (2, 1)
    (failure,) = result.failed
    assert failure.reason == "MemoryError: too much"
    assert failure.command == f"gammabeta study run --cell {failure.name} --out '{out}'"
    (stored,) = _runs.read_failed([out])
    assert "Traceback" in stored["error"]
    assert failure.command in stored["error"]
    with pytest.raises(MemoryError, match="too much"):
        _run.run_one(failure.name, out, catalogue=catalogue)
    again = run_plain(catalogue, out)
    assert (again.done, again.skipped, again.failed, again.failed_before) == (0, 2, (), 1)
    again = run_plain(catalogue, out, retry_failed=True)
    assert (again.done, again.skipped, len(again.failed), again.failed_before) == (0, 2, 1, 0)


def test_a_mended_cell_is_a_failure_no_more(tmp_path, make):
    out = tmp_path / "run"
    broken = make("raise SystemExit('no')", "range(2)", module="to_mend")
    assert len(run_plain(broken, out).failed) == 2
    name = _runs.cell_name(_runs.read_failed([out])[0]["spec"])
    mended = make("pass", "range(2)", module="to_mend")
    cell = _run.run_one(name, out, catalogue=mended)
    assert cell.rows[0]["double"] in (0, 2)
    assert len(_runs.read_failed([out])) == 1
    result = run_plain(mended, out)
    assert (result.done, result.skipped, result.failed) == (1, 1, ())
    assert _runs.read_failed([out]) == []
    with pytest.raises(RunError, match="name of a stored or failed cell"):
        _run.run_one("0" * 16, out, catalogue=mended)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [{'loss': float('nan')}]", "expected text, true, false, null or a finite"),
        ("return []", "must give rows, gave none"),
        ("open('/nowhere/to/be/found')", "FileNotFoundError"),  # no fault of the disk
    ],
)
def test_rows_that_cannot_be_stored_are_a_failure(tmp_path, make, body, words):
    result = run_plain(make(body, "[5]"), tmp_path / "run")
    assert words in result.failed[0].reason


def test_a_cell_that_ends_its_process_fails_alone(tmp_path, make):
    body = "if k == 1: os.kill(os.getpid(), signal.SIGKILL)"
    result = run_plain(make(body, "(1, 11, 21)"), tmp_path / "run", jobs=2)
    # a cell that another worker had just stored is found there and not made again
    assert result.done + result.skipped == 2
    (failure,) = result.failed
    assert "SIGKILL" in failure.reason
    (stored,) = _runs.read_failed([tmp_path / "run"])
    assert stored["spec"]["arm"] == {"k": 1}
    assert failure.command in stored["error"]


def test_a_full_disk_stops_the_run_and_keeps_what_is_there(whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system is needed; mount says: {mounted.stderr.strip()}")
    try:
        out = disk / "run"
        assert run_toy(out, jobs=1, seeds=1).done == 5
        space = os.statvfs(disk)
        (disk / "filler").write_bytes(b"x" * (space.f_bavail * space.f_frsize - 20_000))
        with pytest.raises(OSError, match=r"No space left on device.*Make room there"):
            run_toy(out, jobs=1)
        assert 5 <= len(rows(out)) < 11
        assert not list(out.rglob(".tmp-*"))
        (disk / "filler").unlink()
        run_toy(out, jobs=1)
        assert rows(out) == rows(whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- order and time -------------------------------------------------------------------------


def test_waves_come_in_order_and_experiments_take_turns(tmp_path, make):
    both = make("pass", "(12, 0, 11, 2, 1)", name="one") | make("pass", "(1, 0, 10)", name="two")
    specs, events = {}, []
    run_plain(both, tmp_path / "run", progress=events.append)
    for cell in _runs.read_cells([tmp_path / "run"]):
        specs[cell.path.name] = (cell.spec["experiment"], cell.spec["arm"]["k"])
    order = [specs[event.text.split()[1].rstrip(":")] for event in events if event.kind == "done"]
    first = [("one", 0), ("two", 0), ("two", 10)]
    second = [("one", 11), ("two", 1), ("one", 1)]
    assert order == [*first, *second, ("one", 12), ("one", 2)]


def test_after_the_deadline_nothing_is_started(tmp_path, make):
    catalogue = make("time.sleep(0.1)", "range(0, 400, 10)")
    result = run_plain(catalogue, tmp_path / "run", deadline_seconds=0.5)
    assert result.out_of_time
    assert 0 < result.done < 10
    late = run_plain(catalogue, tmp_path / "late", jobs=2, deadline_seconds=0)
    assert (late.done, late.out_of_time) == (0, True)


def test_a_run_that_ends_in_time_is_not_out_of_time(whole):
    assert not run_toy(whole, jobs=1, deadline_seconds=0).out_of_time


def test_an_estimate_counts_all_waves_and_writes_nothing(whole, tmp_path):
    options = {"data": "digits", "seeds": 4, "catalogue": TOY, "jobs": 2}
    guess = _run.estimate(["toy"], out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    assert [wave[:3] for wave in guess.waves] == [("toy", 0, 3), ("toy", 1, 8)]
    assert guess.seconds == pytest.approx(guess.cpu_seconds / 2)
    assert guess.measured_seconds > 0
    before = sorted(whole.rglob("*"))
    known = _run.estimate(["toy"], out=whole, **options)
    assert (known.present, known.cells, known.measured_seconds) == (3, 8, 0)
    assert sorted(whole.rglob("*")) == before


BURN = """
import time
from gammabeta.studies._run import Cell
CLAIMS = ()
def cells(budget, data, seeds, rows):
    return [Cell("{name}", {{"k": k}}, s, cost=k * {unit}) for k in range(1, 6) for s in range(2)]
def measure(arm, seed, budget, data):
    end = time.process_time() + {seconds} * arm["k"]
    while time.process_time() < end:
        pass
    time.sleep(0.02)
    return [{{"k_seen": arm["k"]}}]
def judge(rows):
    return []
def figures(rows):
    return []
"""


def test_an_estimate_is_near_the_processor_time_of_each_experiment(tmp_path, monkeypatch):
    """Each experiment counts its costs in a unit of its own."""
    catalogue = {}
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, unit, seconds in (("seconds", 0.02, 0.02), ("steps", 1000, 0.005)):
        text = BURN.format(name=name, unit=unit, seconds=seconds)
        (tmp_path / f"burn_{name}.py").write_text(text)
        catalogue[name] = Experiment(name, f"burn_{name}")
    options = {"out": tmp_path / "run", "data": "digits", "jobs": 1, "catalogue": catalogue}
    guess = _run.estimate(list(catalogue), **options)
    assert not (tmp_path / "run").exists()
    assert _run.run(list(catalogue), **options).done == 20
    found = _run.status([tmp_path / "run"], catalogue=catalogue)
    measured = {entry.experiment: entry.cpu_seconds for entry in found}
    expected = {wave.experiment: wave.cpu_seconds for wave in guess.waves}
    assert expected == pytest.approx(measured, rel=0.3)
    assert sum(measured.values()) == pytest.approx(30 * (0.02 + 0.005), rel=0.3)


def test_progress_tells_how_far_each_experiment_is(tmp_path, make):
    both = make("pass", "range(3)", name="one")
    both |= make("assert k != 1, 'no'", "range(2)", name="two")
    events = []
    run_plain(both, tmp_path / "run", progress=events.append)
    assert events[-1].parts == {"one": (3, 0, 3), "two": (1, 1, 2)}
    assert all(sum(p.total for p in e.parts.values()) == e.total for e in events)


# --- what a run folder holds ----------------------------------------------------------------


def test_status_tells_done_missing_stale_and_failed(tmp_path, make):
    out, other = tmp_path / "run", tmp_path / "other"
    first = make("assert k != 1, 'no'", "range(4)", module="to_count")
    assert run_plain(first, out, deadline_seconds=None).done == 3

    def counts(*paths, catalogue=first):
        return [
            (e.done, e.missing, e.stale, e.failed) for e in _run.status(paths, catalogue=catalogue)
        ]

    assert counts(out) == [(3, 0, 0, 1)]
    gone = _runs.read_cells([out])[0].path
    shutil.move(gone, other / "cells" / "plain" / gone.name)
    assert counts(out) == [(2, 1, 0, 1)]
    assert counts(out, other) == [(3, 0, 0, 1)]
    changed = make("pass", "range(5)", module="to_count")
    assert counts(out, other, catalogue=changed) == [(0, 2, 3, 0)]
    assert run_plain(changed, out).done == 0
    assert run_plain(changed, out, refresh=True).done == 5
    assert counts(out, other, catalogue=changed) == [(5, 0, 0, 0)]
    (entry,) = _run.status([out], ["plain"], catalogue=changed)
    assert (entry.experiment, entry.budget, entry.data) == ("plain", "small", "digits")
    with pytest.raises(ValueError, match=r"got 'plan'\. Did you mean plain"):
        _run.status([out], ["plan"], catalogue=changed)


def test_one_experiment_of_other_code_does_not_hold_the_others(tmp_path, make):
    out = tmp_path / "run"
    old = make("pass", name="old", module="grown_old") | make("pass", name="new")
    run_plain({"old": old["old"]}, out)
    both = make("k += 0", name="old", module="grown_old") | {"new": old["new"]}
    result = run_plain(both, out)
    assert (result.done, result.held) == (3, {"old": 3})
    assert _run.estimate(list(both), out=out, data="digits", jobs=1, catalogue=both).stale == 3
    result = run_plain(both, out, force=True)
    assert (result.done, result.held) == (6, {})


# --- before any work ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seeds": 0}, "seeds must be 1 or more, got 0"),
        ({"jobs": -2}, "jobs must be 1 or more, got -2"),
        ({"budget": "huge"}, "budget must be one of tiny, small, full, .*got 'huge'"),
        ({"data": "cifar"}, "data must be one of auto, mnist, digits, got 'cifar'"),
        ({"ids": ["toi"]}, "got 'toi'. Did you mean toy?"),
        ({"ids": ["quite-other"]}, "There are: toy"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, options, words):
    given = {"ids": ["toy"], "data": "digits", "catalogue": TOY, **options}
    with pytest.raises(ValueError, match=words):
        _run.run(out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_images_that_are_not_there_leave_no_run_folder(tmp_path):
    """A folder with nothing in it but the claims would count as the newest run."""
    missing = {"data": "mnist", "data_dir": tmp_path / "nowhere"}
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        run_toy(tmp_path / "run", **missing)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_no_run_folder_is_refused_before_images_are_looked_for(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="must be a folder, got a file"):
        run_toy(tmp_path / "file", data="mnist", data_dir=tmp_path / "nowhere")


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, make):
    marked = tmp_path / "mark"
    catalogue = make(f"open({str(marked)!r}, 'w')")
    (tmp_path / "file").touch()
    for out, words in (
        (tmp_path / "file", "must be a folder, got a file"),
        (tmp_path / "file" / "below", "must be writable"),
        (Path("/proc/nobody/writes/here"), "must be writable"),
    ):
        with pytest.raises(RunError, match=words):
            run_plain(catalogue, out)
    newer = tmp_path / "newer"
    newer.mkdir()
    _runs.write_json(newer / "claims.json", {"schema": 2, "gammabeta": "9.1", "claims": []})
    with pytest.raises(RunError, match=r"Read it with gammabeta 9\.1 or newer"):
        run_plain(catalogue, newer)
    assert not marked.exists()


def test_the_registry_lies_in_the_run_folder(whole):
    claims = _runs.read_claims(whole)
    assert len(claims) > 50
    assert {"act-all", "act-sigmoid-most"} <= {claim["id"] for claim in claims}


def test_dead_folders_are_removed_at_the_start(whole):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    temp = whole / "cells" / "toy" / f".tmp-{'0' * 16}-{HOST}-{gone.pid}-ab"
    temp.mkdir()
    run_toy(whole, jobs=1)
    assert not temp.exists()


# --- experiments and their code -------------------------------------------------------------


def test_experiments_are_the_modules_without_underscore():
    folder = Path(_experiments.__file__).parent
    names = {p.stem.replace("_", "-") for p in folder.glob("*.py") if p.stem[0] != "_"}
    assert set(_run.experiments()) == names


def test_a_broken_module_is_named_with_its_reason(tmp_path, make):
    catalogue = make("pass", module="broken_module")
    (tmp_path / "broken_module.py").write_text("import absent_package")
    with pytest.raises(ModuleNotFoundError, match=r"plain \(broken_module\).*absent_package"):
        run_plain(catalogue, tmp_path / "run")
    (tmp_path / "broken_module.py").write_text("CLAIMS = 3 +")
    with pytest.raises(ImportError, match=r"plain \(broken_module\).*SyntaxError"):
        catalogue["plain"].cells("tiny", "digits", None, [])
    (tmp_path / "broken_module.py").write_text("cells = 1")
    with pytest.raises(AttributeError, match="broken_module has no CLAIMS"):
        _ = catalogue["plain"].CLAIMS
    with pytest.raises(RuntimeError, match=r"cells\(\) must give an answer"):
        catalogue["plain"].cells("tiny", "digits", None, [])


def test_the_digest_sees_what_measures_and_not_what_judges(tmp_path):
    text = (HERE / "toy_experiment.py").read_text()
    rule = text.replace("The larger rate gains", "A higher rate wins")
    rule = rule.replace('"Does a larger rate help?"', '"?"')
    digests = {}
    for name, changed in {
        "same": text,
        "windows": text.replace("\n", "\r\n"),
        "rule": rule,
        "code": text.replace("0.002", "0.003"),
    }.items():
        path = tmp_path / name / "toy.py"
        path.parent.mkdir()
        path.write_bytes(changed.encode())
        digests[name] = _experiments.code_digest(path)
    assert rule != text
    assert digests["same"] == digests["windows"] == digests["rule"]
    assert digests["code"] != digests["same"]
    assert len(digests["same"]) == 16


def test_rows_of_other_code_are_counted_and_never_mixed(tmp_path, make):
    out = tmp_path / "run"
    run_plain(make("pass", "range(2)", module="moving"), out)
    changed = make("k += 1; k -= 1", "range(3)", module="moving")
    code = changed["plain"].code_of("small")
    old = _judge.select(_runs.read_cells([out]), code)
    assert len(old.cells) == 2
    assert "made by other code" in old.notes[0]
    result = run_plain(changed, out)
    assert (result.done, result.skipped, result.stale, result.held) == (0, 0, 2, {"plain": 2})
    result = run_plain(changed, out, refresh=True)
    assert (result.done, result.skipped, result.stale, result.held) == (3, 0, 2, {})
    new = _judge.select(_runs.read_cells([out]), code)
    assert {cell.spec["code"] for cell in new.cells} == {code}
    assert len(new.rows()) == 3
    assert new.notes == ["2 cells of other code were left aside."]


# --- verdicts -------------------------------------------------------------------------------


def test_verdicts_are_derived_from_rows_and_written_once_asked(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    judged = _run.judge([out], catalogue=TOY)
    assert not (out / "verdicts.json").exists()
    (verdict,) = judged.verdicts
    assert (verdict.claim, verdict.n, verdict.budget) == ("toy-faster", 4, "small")
    assert "demonstration" in judged.notice
    assert "gammabeta data fetch" in judged.notice
    _run.write_derived(out, judged)
    stored = _runs.read_verdicts(out)
    assert stored["notice"] == judged.notice
    assert stored["verdicts"][0]["ci"][1] is None  # infinity is no JSON
    assert _runs.read_figures(out)[0]["id"] == "toy-accuracy"
    assert _run.judge([whole], ["toy"], budget="full", catalogue=TOY).verdicts == []


def test_budgets_are_never_judged_together(whole, tmp_path):
    tiny = tmp_path / "tiny"
    run_toy(tiny, jobs=1, seeds=1, budget="tiny")
    (verdict,) = _run.judge([whole, tiny], catalogue=TOY).verdicts
    assert (verdict.budget, verdict.n) == ("small", 4)
    assert verdict.notes == ["Not judged here: 5 cells on digits with the budget tiny."]
    (verdict,) = _run.judge([whole, tiny], budget="tiny", catalogue=TOY).verdicts
    assert (verdict.budget, verdict.n, verdict.notes) == ("tiny", 1, [])


def verdict_of(claim, status, published, ci):
    texts = dict.fromkeys(("unit", "reported", "budget", "data"), "")
    numbers = {"effect": 0.0, "n": 5, "delta": 0.3, "half_width": None, "planned_half_width": None}
    return Verdict(
        claim=claim,
        experiment="toy",
        status=status,
        published_status=published,
        ci=ci,
        sentence=f"About {claim}.",
        **texts,
        **numbers,
    )


def test_surprises_are_the_three_strongest_one_for_each_claim():
    expected = verdict_of("plain", "supported", "supported", (0.1, 0.4))
    refuted = verdict_of("wrong", "refuted", "refuted", (-0.1, 0.2))
    turned = verdict_of("turned", "supported", "refuted", (0.1, 0.9))
    reverse = verdict_of("reverse", "refuted", "supported", (-0.9, -0.1))
    assert _judge.surprises([expected]) == []
    assert _judge.surprises([refuted, expected, turned, refuted, reverse, refuted]) == [
        "reverse: the effect points the other way. About reverse.",
        "turned: refuted as published, supported in the fair setting. About turned.",
        "wrong: refuted. About wrong.",
    ]


def test_a_verdict_that_the_fair_test_reverses_surprises_most():
    signs = [verdict_of(f"sign{n}", "refuted", None, (-0.9, -0.1)) for n in range(3)]
    turned = verdict_of("turned", "supported", "refuted", (0.1, 0.9))
    mixed = verdict_of("mixed", "supported", "mixed", (0.1, 0.9))
    told = [text.split(":")[0] for text in _judge.surprises([mixed, *signs, turned])]
    assert told == ["turned", "sign0", "sign1"]


def test_of_equal_surprises_those_of_headline_claims_come_first():
    pair = [verdict_of(c, "refuted", "refuted", (-0.9, -0.1)) for c in ("brn-small", "act-all")]
    assert [text.split(":")[0] for text in _judge.surprises(pair)] == ["act-all", "brn-small"]


def test_a_negative_effect_surprises_only_where_the_claim_says_a_sign():
    def told(claim, status):
        return _judge.surprises([verdict_of(claim, status, status, (-0.9, -0.1))])

    assert told("act-all", "refuted") == [
        "act-all: the effect points the other way. About act-all."
    ]
    assert told("f-batch", "supported") == []  # a change of the effect, whatever its sign
    assert told("minibatch-stats", "supported") == []  # a slope of -1/2
    assert told("sgd-bn-vs-adam", "inconclusive") == []  # equivalence
    assert told("sgd-bn-vs-adam", "refuted") == ["sgd-bn-vs-adam: refuted. About sgd-bn-vs-adam."]
