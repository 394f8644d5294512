"""The command line, end to end: what is typed, what is shown, what is left, the exit code.

What a process of its own decides (runs, signals, terminals, pipes, imports) is tried in one; the
rest goes through the same `main` in this process, which has torch imported already.
"""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import joblib
import pytest
from rich.color import Color

import gammabeta as gammabeta_package
from gammabeta import _runs, _terminal, cli
from gammabeta.cli import _study
from gammabeta.studies import _card, _claims, _data, _demo, _run, activations
from gammabeta.studies._card import Card
from gammabeta.studies._verdict import Verdict

ROOT = Path(__file__).resolve().parents[1]

LAST = _data.HOW_TO_GET_MNIST
TINY = ("activations", "--budget", "tiny", "--data", "digits")
SHOWN = {"claim", "experiment", "status", "published_status", "effect", "ci", "n", "unit"}
SHOWN |= {"reported", "budget", "data"}
COMMAND = [sys.executable, "-m", "gammabeta"]


HIDDEN = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", _data.VARIABLE}


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in HIDDEN}
    return kept | {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color"} | more


def gammabeta(*words, cwd=None, command=COMMAND):
    """The command in a process of its own."""
    return subprocess.run(
        [*command, *map(str, words)],
        stdin=subprocess.DEVNULL,  # a terminal there would have a width
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
        timeout=120,
    )


def patched(code: str) -> list[str]:
    """The command line in a process where something was broken before."""
    return [sys.executable, "-c", f"{code}\nfrom gammabeta.cli import main\nmain()"]


def tree(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def here(capsys, monkeypatch):
    """The command in this process."""
    for name in HIDDEN:
        monkeypatch.delenv(name, raising=False)

    def call(*words, cwd=None):
        if cwd is not None:
            monkeypatch.chdir(cwd)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in words])
        shown = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=shown.out, stderr=shown.err)

    return call


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """One tiny run for all tests; test workers side by side are two runners of one folder."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = base / "cli" / "runs" / "tiny"
    out.parent.mkdir(parents=True, exist_ok=True)
    done = gammabeta("study", "run", *TINY, cwd=out.parents[1])
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(done=done, out=out, home=out.parents[1])


@pytest.fixture
def run(shared, tmp_path):
    """A copy of the run, to be changed."""
    out = tmp_path / "copy"
    shutil.copytree(shared.out, out, ignore=shutil.ignore_patterns(".*"))
    return out


# --- a run ----------------------------------------------------------------------------------


def test_a_run_prints_table_page_notice_and_last_how_to_get_mnist(shared):
    lines = shared.done.stdout.splitlines()
    assert lines[-1] == LAST
    assert all(len(line) <= 80 for line in lines[:-1])
    assert re.fullmatch(r"claim +as published +fair +effect \[95 %\] +n +on *", lines[0])
    assert re.match(r"act-all +o demo +o demo +[+-][\d.]+ \[\S+, \S+\] +2 +digits", lines[1])
    page = lines.index(f"Page: {Path('runs/tiny/report.html')}")
    notice = next(i for i, line in enumerate(lines) if line.startswith("These are scikit-learn's"))
    assert page < notice < len(lines) - 1
    assert "note:" not in shared.done.stdout
    assert (shared.out / "report.html").read_bytes().startswith(b"<!DOCTYPE html>")


def test_off_a_terminal_progress_is_a_few_plain_lines_on_stderr(shared):
    lines = shared.done.stderr.splitlines()
    assert re.match(r"\d+ of \d+ cells", lines[0])
    assert re.match(r"\d+ cells done in|Nothing was run", lines[-1])
    assert len(lines) <= 12
    assert "\x1b" not in shared.done.stdout + shared.done.stderr


def test_the_same_command_again_runs_nothing(here, shared):
    done = here("study", "run", *TINY, "--out", shared.out, cwd=shared.home)
    assert done.returncode == 0
    assert "Nothing was run, 100 were there already" in done.stderr
    assert done.stdout.splitlines()[-1] == LAST
    told = here("study", "run", *TINY, "--out", shared.out, "--json", cwd=shared.home)
    assert "Nothing was run" in told.stderr
    assert told.stdout == here("study", "show", shared.out, "--json").stdout


def test_a_dry_run_writes_nothing_and_tells_cpu_seconds(here, tmp_path, monkeypatch):
    made = []
    estimate = _run.estimate

    def once(*args, **settings):
        made[:] = made or [estimate(*args, **settings)]
        return made[0]

    monkeypatch.setattr(_run, "estimate", once)
    words = ("study", "run", *TINY, "--dry-run", "--out", tmp_path / "out")
    done = here(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    lines = done.stdout.splitlines()
    assert re.match(r"experiment +wave +cells +CPU seconds +time", lines[0])
    assert re.match(r"activations +0 +40 +[\d.]+ ", lines[1])
    assert re.match(r"activations +1 +60 +[\d.]+ ", lines[2])
    assert "Nothing was written." in done.stdout
    assert lines[-1] == LAST
    told = json.loads(here(*words, "--json", cwd=tmp_path).stdout)
    assert (told["cells"], told["data"]) == (100, "digits")
    assert told["cpu_seconds"] == pytest.approx(sum(w["cpu_seconds"] for w in told["waves"]))


def test_a_deadline_stops_early_and_says_so(here, tmp_path):
    words = ("act-all", *TINY, "--jobs", "1", "--deadline", "0.001", "--out", tmp_path / "out")
    done = here("study", "run", *words)
    assert done.returncode == 0, done.stderr
    assert "The time was up" in done.stderr
    assert "No verdicts yet" in done.stdout
    assert done.stdout.splitlines()[-1] == LAST


def test_failed_cells_give_exit_code_1_and_each_can_be_repeated_alone(
    here, shared, tmp_path, monkeypatch
):
    out = tmp_path / "my run"
    for cell in _runs.read_cells([shared.out]):
        if cell.spec["arm"]["activation"] != "tanh":
            shutil.copytree(cell.path, out / cell.path.relative_to(shared.out))
    measure = activations.measure

    def broken(arm, seed, budget, data):
        if arm["activation"] == "tanh":
            raise ArithmeticError("planted")
        return measure(arm, seed, budget, data)

    monkeypatch.setattr(activations, "measure", broken)
    done = here("study", "run", *TINY, "--jobs", "1", "--out", out)
    assert done.returncode == 1, done.stderr
    assert "8 failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert 0 < done.stderr.count("ArithmeticError: planted") <= 8
    assert done.stdout.splitlines()[-1] == LAST
    again = next(line for line in done.stderr.splitlines() if "--cell" in line)
    command = shlex.split(again)[1:]
    name = command[command.index("--cell") + 1]
    failed = tree(out / "failed")
    still = here(*command)
    assert still.returncode == 1
    assert "ArithmeticError: planted" in still.stderr
    assert still.stderr.endswith(f"The cell {name} failed again; the run folder is as it was.\n")
    assert tree(out / "failed") == failed
    monkeypatch.undo()
    mended = here(*command)
    assert mended.returncode == 0, mended.stderr
    path = out / "cells" / "activations" / name
    rows = len((path / "rows.jsonl").read_text().splitlines())
    assert mended.stdout.startswith(f"{path}: {rows} rows. ")
    assert not (out / "failed" / "activations" / name).exists()


def test_force_makes_a_cell_again(here, run):
    keep = sorted(path.name for path in (run / "cells" / "activations").iterdir())
    before = (run / "cells" / "activations" / keep[0] / "spec.json").stat().st_mtime_ns
    words = (*TINY, "--force", "--deadline", "1", "--jobs", "1", "--out", run)
    done = here("study", "run", *words)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"(\d+) cells done", done.stderr)[1]) > 0
    after = [(run / "cells" / "activations" / name / "spec.json").stat() for name in keep]
    assert any(stat.st_mtime_ns > before for stat in after)


# --- Ctrl-C ---------------------------------------------------------------------------------


class Typed:
    """A command on a terminal of its own; stdout goes there too, or to a file."""

    def __init__(self, words, cwd, out, **env):
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        self.output = None if out is None else os.open(out, os.O_WRONLY | os.O_CREAT)
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, words)],
            stdin=slave,
            stdout=slave if self.output is None else self.output,
            stderr=slave,
            cwd=cwd,
            env=environment(**env),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.text = ""

    def read(self, until: str | None = None, seconds: float = 60.0) -> str:
        """Wait until a text was shown, or for the end."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and (until is None or not re.search(until, self.text)):
            if not select.select([self.master], [], [], 0.2)[0]:
                if self.process.poll() is not None:
                    break
                continue
            try:
                new = os.read(self.master, 65536)
            except OSError:  # Linux: nobody holds the other end any more
                break
            if not new:
                break
            self.text += new.decode()
        return self.text

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def end(self) -> int:
        self.read()
        if self.output is not None:
            os.close(self.output)
        os.close(self.master)
        return self.process.wait(30)


def test_control_c_on_a_terminal_leaves_a_command_that_finishes_the_run(
    here, shared, tmp_path, monkeypatch
):
    words = ("study", "run", *TINY, "--out", "a run")
    typed = Typed(words, tmp_path, tmp_path / "stdout")
    typed.read(until=r"[1-9]\d*/\d+.*about \d+ s left")
    typed.type("\x03")
    assert typed.end() == 130, typed.text
    assert "Traceback" not in typed.text
    assert (tmp_path / "stdout").read_text() == ""
    out = tmp_path / "a run"
    done = {cell.path.name for cell in _runs.read_cells([out])}
    assert 0 < len(done) < 100
    command = shlex.split(typed.text.splitlines()[-1])
    assert command == [*COMMAND, *words]
    for cell in list(_runs.read_cells([shared.out]))[:-3]:  # to save time: all but three
        with contextlib.suppress(FileExistsError):
            shutil.copytree(cell.path, out / cell.path.relative_to(shared.out))
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)  # to save time: in this process
    resumed = here(*command[len(COMMAND) :], cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "No verdicts" not in resumed.stdout
    names = {cell.path.name for cell in _runs.read_cells([out])}
    assert names == {cell.path.name for cell in _runs.read_cells([shared.out])}
    assert done < names


def test_an_interrupt_by_signal_is_the_same_off_a_terminal(tmp_path):
    words = [*COMMAND, "study", "run", *TINY, "--jobs", "1", "--out", "out"]
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path, env=environment()
    )
    cells = tmp_path / "out" / "cells" / "activations"
    limit = time.monotonic() + 60
    while not list(cells.glob("[!.]*")) and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == b""
    assert stderr.decode().splitlines()[-1].strip() == shlex.join(words)
    assert b"Traceback" not in stderr


@pytest.mark.parametrize("words", [("list", "--json"), ("run",)])
def test_an_interrupt_within_an_import_gives_the_same_exit_code(tmp_path, words):
    # with -m: only there CPython ends by the signal after an interrupt within some exec()
    (tmp_path / "broken.py").write_text(
        "import os, signal\n"
        "import gammabeta.studies._claims as claims\n"
        "import gammabeta.studies._experiments as experiments\n"
        "class Swallows:\n"
        "    @property\n"
        "    def CLAIMS(self):\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        except KeyboardInterrupt:\n"
        "            raise ImportError('half made')\n"
        "        return ()\n"
        "experiments.experiments = lambda: {'toy': Swallows()}\n"
        "claims.listing = lambda: exec('raise KeyboardInterrupt')\n"
        "from gammabeta.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-m", "broken", "study"]
    done = gammabeta(*words, command=command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("Interrupted.")


# --- showing and judging --------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("runs/tiny",)])
def test_show_prints_what_the_run_printed(here, shared, words):
    done = here("study", "show", *words, cwd=shared.home)
    assert (done.returncode, done.stderr) == (0, "")
    run = shared.done.stdout.splitlines()
    page = next(i for i, line in enumerate(run) if line.startswith("Page:"))
    assert done.stdout.splitlines() == run[: page - 1] + run[page + 1 :]


def test_show_json_has_exactly_these_fields_and_no_nan(here, shared):
    done = here("study", "show", shared.out, "--json")
    assert done.returncode == 0, done.stderr

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(done.stdout, parse_constant=refuse)
    assert [verdict["claim"] for verdict in found] == ["act-all", "act-sigmoid-most"]
    for verdict in found:
        assert verdict.keys() == SHOWN
        assert (verdict["status"], verdict["data"], verdict["budget"]) == ("demo", "digits", "tiny")
        lo, hi = verdict["ci"]
        assert lo <= verdict["effect"] <= hi
        assert verdict["n"] == 2


def test_what_is_not_to_be_had_is_null(here, run):
    for cell in _runs.read_cells([run]):
        if cell.spec["seed"] == 1:
            shutil.rmtree(cell.path)
    done = here("study", "show", run, "--json")
    assert done.returncode == 0, done.stderr
    assert [(v["effect"], v["ci"]) for v in json.loads(done.stdout)] == [(None, None)] * 2
    assert re.search(r"act-all +o demo +o demo +– +0 +digits", here("study", "show", run).stdout)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_json_has_no_nan(bad):
    shown = _study.public(dict.fromkeys(SHOWN) | {"effect": bad, "ci": (-bad, 1.0), "n": 1})
    assert (shown["effect"], shown["ci"], shown["n"]) == (None, None, 1)


def test_show_tells_one_claim_in_full(here, shared):
    done = here("study", "show", "ACT-ALL", cwd=shared.home)
    assert done.returncode == 0, done.stderr
    claim = _claims.claims()["act-all"]
    folded = " ".join(done.stdout.split())
    for text in (claim.question, claim.title, claim.source, claim.reported, claim.rule, "Note"):
        assert text in folded
    assert "o demo" in folded
    assert "act-sigmoid-most" not in folded
    only = here("study", "show", "act-all", "runs/tiny", "--json", cwd=shared.home)
    assert [verdict["claim"] for verdict in json.loads(only.stdout)] == ["act-all"]


def test_show_tells_of_a_claim_without_any_run(here, tmp_path):
    without = [claim.id for claim in _claims.claims().values() if not claim.experiment][:1]
    done = here("study", "show", "act-all", *without, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "none: run `gammabeta study run act-all`" in done.stdout
    assert done.stdout.count("none: no experiment yet") == len(without)
    assert json.loads(here("study", "show", "act-all", "--json", cwd=tmp_path).stdout) == []


def test_explain_tells_all_about_a_claim_at_80_columns(here, shared):
    done = here("study", "explain", "act-all", "runs/tiny", cwd=shared.home)
    assert (done.returncode, done.stderr) == (0, "")
    claim = _claims.claims()["act-all"]
    folded = " ".join(done.stdout.split())
    for text in (claim.question, claim.title, claim.source, claim.reported, claim.rule):
        assert text in folded
    assert "Primary contrast" in folded or "primary contrast" in folded  # the protocol
    heads = ["Answer", "Verdicts", "Numbers", "Missing", "Claim", "Rule"]
    heads += ["Protocol of the experiment activations", "Make it", "Dispute it"]
    lines = done.stdout.splitlines()
    assert [line for line in lines if line in heads] == heads
    commands = [lines[lines.index(head) + 1].strip() for head in heads[-2:]]
    assert commands == [
        "gammabeta study run act-all --budget tiny --data digits -o runs/act-all",
        "gammabeta study judge runs/tiny --set act-all.delta=0.15",
    ]
    assert all(len(line) <= 80 for line in lines if line.strip() not in commands)
    numbers = lines[lines.index("Numbers") : lines.index("Missing")]
    for activation in ("ReLU", "sigmoid", "tanh"):
        assert any(re.match(rf" +{activation} +[+-]\d", line) for line in numbers)
    assert "demonstration" in lines[lines.index("Missing") + 1]
    disputed = here(*shlex.split(commands[1])[1:], cwd=shared.home)
    assert "now, delta = 0.15" in disputed.stdout


def test_explain_says_why_a_control_holds_and_what_is_only_shown(capsys):
    cells = [
        {"name": name, "part": part, "effect": 11.31, "lo": -4.04, "hi": 26.67, "n": 16}
        | {"status": status, "p_signflip": p, "reason": reason}
        for name, part, status, p, reason in (
            ("BN − none", "control", "supported", 0.0005, "above 0 by the exact sign-flip test"),
            ("a contrast with a name that is too long for a line", "fair", "inconclusive", 0.4, ""),
            ("noise − none", "shown", "inconclusive", None, "shown"),
        )
    ]
    claim = _claims.claims()["noisy-bn"]
    rest = {"experiment": "covariate-shift", "reported": "", "delta": 0.3, "half_width": None}
    found = verdict(claim.id, status="inconclusive", planned_half_width=None, ci=(-1.0, 1.0))
    one = Verdict(**found | rest | {"cells": cells, "place": "", "certainty": "D"})
    _terminal.explain(Card(claim, "", None, one, [], None, None, []))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2:4] == ["Answer", f"  {one.sentence}".ljust(80)]
    at = next(i for i, line in enumerate(lines) if line.startswith("    BN − none"))
    assert lines[at].rstrip().endswith("16  + supported")
    folded = " ".join(" ".join(lines[at:]).split())
    assert folded.count("by the sign-flip test, p = 0.0005") == 1
    assert folded.count("by the sign-flip test, p = ") == 1
    (shown,) = (line for line in lines if line.startswith("    noise − none"))
    assert shown.rstrip().endswith("16  shown only")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_second_stage_is_told_with_its_verdict(capsys, stage):
    claim = _claims.claims()["noisy-bn"]
    rest = {"experiment": "covariate-shift", "reported": "", "delta": 0.3, "half_width": None}
    found = verdict(claim.id, planned_half_width=None, ci=(-1.0, 1.0))
    one = Verdict(**found | rest | {"cells": [], "place": "", "stage": stage})
    _terminal.explain(Card(claim, "", None, one, [], None, None, []))
    _terminal.card(claim, one.to_json())
    explained, shown = capsys.readouterr().out.split("Claim   ")
    assert ["fresh seeds, judged alone" in part for part in (explained, shown)] == [stage == 2] * 2
    _terminal.verdicts([one.to_json()], [], {claim.id: claim})
    out = capsys.readouterr().out
    assert (f"{one.n}†" in out) == (stage == 2)
    assert ("† second stage: fresh seeds" in out) == (stage == 2)


def test_of_a_protocol_what_is_about_other_claims_is_left_out():
    protocol = (
        "Set-up.\n\na-one. First\n    and more.\na-two. Second\n    more.\nAll: seeds.\n\nEnd."
    )
    ids = ("a-one", "a-two", "a-three")
    kept = "Set-up.\n\na-one. First\n    and more.\nAll: seeds.\n\nEnd."
    assert _card._about("a-one", ids, protocol) == kept
    assert _card._about("a-three", ids, protocol) == protocol  # it has no entry


def test_explain_has_all_of_the_protocol_on_request(here, tmp_path, monkeypatch):
    monkeypatch.setattr(gammabeta_package, "__file__", str(tmp_path / "src/gammabeta/__init__.py"))
    words = ("study", "explain", "noisy-bn")
    short = here(*words, cwd=tmp_path).stdout
    whole = here(*words, "--protocol", cwd=tmp_path).stdout
    assert "gammabeta study explain noisy-bn --protocol" in short
    assert "  noisy-bn. Primary contrast" in short
    assert "Definition 2.1" in short  # what stands before the entries
    assert "  gamma-beta-shift. Drift" not in short
    assert "  gamma-beta-shift. Drift" in whole


def test_explain_takes_accepted_rows_first_and_says_where_the_rule_comes_from(
    here, shared, tmp_path, monkeypatch
):
    (tmp_path / "results").mkdir()
    for name in ("rules.json", "overfitting.jsonl.gz"):
        shutil.copy(ROOT / "results" / name, tmp_path / "results" / name)
    shutil.copytree(shared.out, tmp_path / "runs" / "tiny")
    monkeypatch.setattr(gammabeta_package, "__file__", str(tmp_path / "src/gammabeta/__init__.py"))
    (found,) = json.loads(here("study", "explain", "bn-overfit", "--json", cwd=tmp_path).stdout)
    assert found["rows"] == ["results/overfitting.jsonl.gz"]
    assert found["verdict"]["status"] in ("supported", "refuted", "inconclusive")
    assert found["verdict"]["data"] == "mnist"
    assert found["rule"]["commit"] == found["rule"]["commit"].lower() != ""
    assert "published" in " ".join(found["missing"])
    text = " ".join(here("study", "explain", "bn-overfit", cwd=tmp_path).stdout.split())
    assert f"in commit {found['rule']['commit'][:10]}" in text
    kept = tmp_path / "results" / "rules.json"
    kept.write_text(kept.read_text().replace(found["rule"]["digest"], "0" * 16))
    text = here("study", "explain", "bn-overfit", cwd=tmp_path).stdout
    assert "amended after data" in text
    # what is not accepted is taken from the newest run
    (other,) = json.loads(here("study", "explain", "act-all", "--json", cwd=tmp_path).stdout)
    assert (other["rows"], other["rule"]) == (["runs/tiny"], None)


def test_explain_says_what_is_missing(here, run, tmp_path, monkeypatch):
    monkeypatch.setattr(gammabeta_package, "__file__", str(tmp_path / "src/gammabeta/__init__.py"))
    without = [claim.id for claim in _claims.claims().values() if not claim.experiment][:1]
    words = ("act-all", *without)
    first, *rest = json.loads(here("study", "explain", *words, "--json", cwd=tmp_path).stdout)
    assert (first["verdict"], first["rows"], first["dispute"]) == (None, [], None)
    assert "no rows of the experiment activations" in first["missing"][0]
    assert first["make"] == "gammabeta study run act-all --budget small -o runs/act-all"
    assert "Primary" in first["protocol"] or "primary" in first["protocol"]
    assert all(card["missing"] == ["No experiment decides this claim yet."] for card in rest)
    shown = " ".join(here("study", "explain", *words, cwd=tmp_path).stdout.split())
    assert "no rows of the experiment activations" in shown
    # a run that was stopped
    for cell in _runs.read_cells([run])[-2:]:
        shutil.rmtree(cell.path)
    (partial,) = json.loads(here("study", "explain", "act-all", run, "--json").stdout)
    assert "2 cells that the experiment wants are not there." in partial["missing"]


def test_judge_keeps_the_verdicts(here, run):
    (run / "verdicts.json").unlink()
    (run / "figures.json").unlink()
    done = here("study", "judge", run)
    assert done.returncode == 0, done.stderr
    assert [v["claim"] for v in _runs.read_verdicts(run)["verdicts"]] == [
        "act-all",
        "act-sigmoid-most",
    ]
    assert _runs.read_figures(run)


def test_judge_by_another_rule_says_so_and_changes_nothing(here, run):
    before = tree(run)
    done = here("study", "judge", run, "--set", "act-all.delta=0.5")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Under another rule.")
    assert re.match(r" +registry, delta = 0.3 +now, delta = 0.5 *$", lines[3])
    assert re.match(r"  fair +o demo +o demo *$", lines[5])
    assert "act-sigmoid-most" not in done.stdout  # it has a rule of its own
    assert len(lines) < 20
    assert max(map(len, lines)) <= 80
    assert tree(run) == before
    done = here("study", "judge", run, "--set", "bn-overfit.delta=1")
    check_misuse(done, ["There are no rows of bn-overfit", "`gammabeta study run bn-overfit`"])


def test_a_verdict_that_another_rule_turns_stands_beside_the_registrys(here):
    words = ("study", "judge", ROOT / "results" / "overfitting.jsonl.gz")
    other = ("--set", "bn-overfit.delta=1000")
    marks = []
    for rule in ((), other):
        found = json.loads(here(*words, *rule, "--json").stdout)
        status = {one["claim"]: one["status"] for one in found}["bn-overfit"]
        marks.append(f"{_terminal.MARKS[status][0]} {status}")
    assert marks[0] != marks[1]
    lines = here(*words, *other).stdout.splitlines()
    assert "  fair " + " ".join(marks) in [
        re.sub(r"(?<=\S) +", " ", line).rstrip() for line in lines
    ]
    assert any(line.startswith("  fair, ") and ", now " in line for line in lines)


def test_one_point_is_no_plural():
    assert _terminal.one_point("gains 1 points, not 1.1 points") == "gains 1 point, not 1.1 points"
    assert _terminal.one_point("0.1 points, 11 points") == "0.1 points, 11 points"


@pytest.mark.parametrize("whole", [False, True])
def test_judge_shows_what_it_cannot_keep(here, run, whole):
    if whole:
        run.chmod(0o500)
        if os.access(run, os.W_OK):
            pytest.skip("this user may write everywhere")
    else:
        (run / "verdicts.json").unlink()
        (run / "verdicts.json").mkdir()
    done = here("study", "judge", run)
    run.chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == LAST
    assert "The verdicts were not kept" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_report_of_two_folders_is_one_file(here, shared, run, tmp_path):
    done = here("report", shared.out, run, "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'page.html'}\n"
    assert b"act-sigmoid-most" in (tmp_path / "page.html").read_bytes()
    again = here("report", shared.out, "-o", tmp_path / "page.html", "--json")
    assert json.loads(again.stdout) == [str(tmp_path / "page.html")]


# --- the registry ---------------------------------------------------------------------------


def test_list_json_has_all_claims_and_exactly_these_fields(here):
    done = here("study", "list", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert [claim["id"] for claim in found] == list(_claims.claims())
    fields = {"id", "title", "origin", "source", "experiment", "kind"}
    assert all(claim.keys() == fields for claim in found)
    assert {claim["origin"] for claim in found} == {"text", "beyond"}
    assert {claim["kind"] for claim in found} == {"statistical", "exact"}
    experiments = {claim["id"]: claim["experiment"] for claim in found}
    assert experiments["act-all"] == "activations"
    assert experiments == {i: claim.experiment for i, claim in _claims.claims().items()}


def test_list_finds_claims_by_words(here):
    found = json.loads(here("study", "list", "Covariate", "shift", "--json").stdout)
    assert {"ics-reduced", "not-reduce-shift"} <= {claim["id"] for claim in found}
    assert len(found) < 20
    shown = here("study", "list", "covariate", "shift").stdout
    assert "* ics-reduced " in shown
    assert "act-all" not in shown
    assert here("study", "list", "covariate-shift").stdout == shown  # as the page names the topic


def test_list_reads_well_at_80_columns(here):
    done = here("study", "list")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    for claim in _claims.claims().values():
        mark = "* " if claim.experiment else "  "
        assert sum(line.startswith(f"{mark}{claim.id} ") for line in lines) == 1
        assert claim.question in " ".join(done.stdout.split())
    topics = {claim.topic for claim in _claims.claims().values()}
    assert {line.strip().lower().replace(" ", "-") for line in lines} >= topics


# --- wrong input ----------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path):
    """A folder with things that are not what they should be."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "newer").mkdir()
    newer = {"schema": 99, "gammabeta": "9.9", "claims": []}
    (tmp_path / "newer" / "claims.json").write_text(json.dumps(newer))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("stduy", ['"stduy"', 'Did you mean "study"?', "`gammabeta --help`"]),
        ("study rnu", ['"rnu"', 'Did you mean "run"?', "`gammabeta study --help`"]),
        ("study run --bugdet tiny", ["--bugdet", "--budget?", "`gammabeta study run --help`"]),
        ("study run --budget big", ['"big"', '"tiny", "brief", "small"', '"full"']),
        ("study run --data cifar", ['"cifar"', '"auto", "mnist", "digits"']),
        ("study run --seeds 0", ['"0"', "--seeds", ">= 1"]),
        ("study run --seeds 801", ['"801"', "--seeds", "<= 800"]),
        ("study run --seeds three", ['"three"', "--seeds"]),
        ("study run --seeds", ["--seeds requires an argument"]),
        ("study run --jobs -1", ['"-1"', "--jobs", ">= 1"]),
        ("study run --deadline 0", ["--deadline", "> 0"]),
        ("study run --deadline nan", ["--deadline", "> 0"]),
        ("study run act-all --cell 0123456789abcdef", ["--cell repeats one cell"]),
        ("env extra", ["`gammabeta env` takes no 'extra'"]),
        ("study list no-such-word", ["No claim has the words no-such-word", "study list` has all"]),
        ("study show act-al", ["'act-al'", "Did you mean act-all?", "`gammabeta study list`"]),
        ("study show", ["A run folder was expected", "`gammabeta study run headline`"]),
        ("study judge", ["A run folder was expected"]),
        ("report", ["A run folder was expected"]),
        ("study show ./nowhere", ["nowhere", "got nothing", "`gammabeta study run --out`"]),
        ("study show empty", ["empty", "expected a run folder"]),
        ("study show file", ["file", "expected a run folder", "got a file"]),
        ("study show newer", ["claims.json", "at most 1, got 99", "gammabeta 9.9 or newer"]),
        ("study judge newer", ["claims.json", "at most 1, got 99", "gammabeta 9.9 or newer"]),
        ("report newer", ["claims.json", "at most 1, got 99", "gammabeta 9.9 or newer"]),
        ("study explain", ["A claim was expected", "`gammabeta study list`"]),
        ("study explain act-al", ["'act-al'", "Did you mean act-all?"]),
        ("study explain ics", ["Did you mean ics-def, ics-gradient or ics-reduced?"]),
        (
            "study show bn",
            [" claims and experiments have 'bn' in their id: bn-", ", … `gammabeta study list`"],
        ),
        ("study list smoohter", ["Did you mean smoother?", "`gammabeta study list`"]),
        ("study explain act-all ./nowhere", ["nowhere", "got nothing"]),
        ("study judge --set delta=1", ["CLAIM.THRESHOLD=VALUE", "'delta=1'"]),
        ("study judge --set act-all.delta=x", ["finite number", "'act-all.delta=x'"]),
        ("study judge --set act-al.delta=1", ["'act-al'", "Did you mean act-all?"]),
        ("study judge --set act-all.delt=1", ["no threshold 'delt'", "it has delta"]),
        ("data path --data-dir nowhere", ["no folder nowhere"]),
        ("data verify --data-dir empty", ["empty has none"]),
    ],
)
def test_wrong_input_gives_exit_code_2_and_says_what_to_do(here, odd, words, says):
    check_misuse(here(*words.split(), cwd=odd), says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("act-al", ["'act-al'", "Did you mean act-all?", "`gammabeta study list`"]),
        ("ics", ["Did you mean ics-def, ics-gradient or ics-reduced?"]),
        ("--out newer", ["at most 1, got 99", "gammabeta 9.9 or newer"]),
        ("--out file", ["file", "must be a folder"]),
        ("--out file/below", ["file/below", "output"]),
        ("--data mnist --data-dir nowhere --out new", ["no folder nowhere", "Correct it"]),
        ("--dry-run --data mnist --data-dir empty --out new", ["empty has none"]),
        ("--cell 0123 --out newer", ["16 hex digits", "'0123'"]),
    ],
)
def test_a_run_that_cannot_be_begun_gives_exit_code_2(here, odd, words, says):
    check_misuse(here("study", "run", *words.split(), "--budget", "tiny", cwd=odd), says)


def check_misuse(done, says):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    for text in says:
        assert text in done.stderr


def test_a_rule_that_cannot_be_is_answered(here, shared):
    done = here("study", "judge", shared.out, "--set", "act-all.delta=-1")
    check_misuse(done, ["cannot be judged by this rule", "must be positive", "-1"])


def test_an_unwritable_folder_is_named(here, tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    done = here("study", "run", *TINY, "--out", tmp_path / "out")
    tmp_path.chmod(0o700)
    check_misuse(done, [str(tmp_path / "out"), "must be writable", "Choose another"])


@pytest.mark.parametrize(
    ("package", "words"),
    [("scipy", ("run", "act-all")), ("joblib", ("run", *TINY, "-o", "out")), ("scipy", ("show",))],
)
def test_a_missing_package_is_named_in_one_line(shared, tmp_path, package, words):
    command = patched(f"import sys; sys.modules[{package!r}] = None")
    cwd = shared.home if words == ("show",) else tmp_path
    done = gammabeta("study", *words, command=command, cwd=cwd)
    check_misuse(done, [package, 'pip install "gammabeta[study]"'])


# --- output that cannot be written ----------------------------------------------------------


def test_a_page_that_cannot_be_written_costs_no_row(here, run):
    shutil.rmtree(run / "report.html", ignore_errors=True)
    (run / "report.html").unlink(missing_ok=True)
    (run / "report.html").mkdir()
    done = here("study", "run", *TINY, "--out", run)
    assert done.returncode == 2
    assert "The rows are kept" in done.stderr
    assert "report.html" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("claim ")
    assert done.stdout.splitlines()[-1] == LAST
    assert len(_runs.read_cells([run])) == 100


@pytest.mark.parametrize("words", [("study", "list"), ("study", "list", "--json"), ("--help",)])
def test_a_reader_who_leaves_early_sees_no_traceback(words):
    process = subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0


def test_a_run_does_not_end_because_nobody_reads_its_progress(run):
    shutil.rmtree(_runs.read_cells([run])[-1].path)
    process = subprocess.Popen(
        [*COMMAND, "study", "run", *TINY, "--jobs", "1", "--out", str(run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    process.stderr.close()
    assert process.wait(60) == 0
    assert len(_runs.read_cells([run])) == 100


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "study", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
    assert done.returncode == 1
    assert done.stderr.startswith("The output cannot be written:")
    assert len(done.stderr.splitlines()) == 1


# --- help and looks -------------------------------------------------------------------------

COMMANDS = ["", "study", "study list", "study run", "study show", "study judge", "study status"]
COMMANDS += [
    "demo",
    "study accept",
    "study verify",
    "study explain",
    "report",
    "data",
    "data fetch",
    "data verify",
    "data path",
    "env",
    "--install-completion",
]


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_help_with_examples_at_80_columns(here, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "80")
    done = here(*words.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    start = lines.index("Examples:")
    examples = [line for line in lines[start + 1 :] if line.strip()]
    assert examples
    assert all(line.startswith(f"    gammabeta {words}".rstrip()) for line in examples)
    assert not any(line.endswith("\\") for line in lines)


@pytest.mark.parametrize("words", ["--help", "study run --help", "--version", "study list --json"])
def test_what_needs_no_training_imports_no_heavy_package(words):
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    done = gammabeta(*words.split(), command=patched(code))
    assert done.returncode == 0
    heavy = {"torch", "numpy", "scipy", "joblib", "sklearn", "plotly", "jinja2", "pooch"}
    assert not heavy & set(done.stderr.split())


def test_every_command_that_tells_something_takes_json(here):
    for words in COMMANDS:
        if words not in ("", "study", "data", "--install-completion"):
            assert "--json" in here(*words.split(), "--help").stdout, words


def test_version_and_no_command_at_all(here):
    from gammabeta import __version__

    assert gammabeta("--version").stdout == f"{__version__}\n"
    assert here().stdout == here("--help").stdout


def test_env_tells_what_an_account_of_a_defect_needs(here):
    facts = json.loads(here("env", "--json").stdout)
    assert {"gammabeta", "python", "torch", "platform", "threads", "backends"} <= facts.keys()
    assert facts["threads"] == 1
    assert "torch " in here("env").stdout


def test_data_path_is_that_of_the_folder_or_says_how_to_get_one(here, tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = here("data", "path", "--data-dir", tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'mnist'}\n")
    none = here("data", "path")
    assert (none.returncode, none.stdout) == (1, "")
    assert none.stderr.endswith(f"{LAST}\n")
    told = json.loads(here("data", "path", "--data-dir", tmp_path, "--json").stdout)
    assert told == [str(tmp_path / "mnist")]
    files = json.loads(here("data", "verify", "--data-dir", tmp_path, "--json").stdout)
    assert [(file.keys(), file["ok"]) for file in files] == [({"file", "ok", "detail"}, False)] * 4
    done = here("data", "verify", "--data-dir", tmp_path)
    assert done.returncode == 1
    assert Counter(line.split()[0] for line in done.stdout.splitlines()) == {"BAD": 4}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_words_of_all_commands_can_be_completed(shell, tmp_path):
    script = cli.app.generate_completion(shell=shell)
    for word in ("study", "explain", "verify", "demo", "retry-failed", "small"):
        assert word in script, word
    if shell == "bash":
        (tmp_path / "completion").write_text(script)
        subprocess.run(["bash", "-n", tmp_path / "completion"], check=True)


# --- the demonstration ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def race():
    return _demo.race()


def test_the_demonstration_shows_a_gain_at_a_high_rate_that_a_fair_rate_takes_back(race):
    with_bn, without, usual = (sum(curve.last()) / race.seeds for curve in race.curves)
    assert with_bn > 0.9
    assert without < 0.5
    assert usual > 0.9
    assert _demo.race(20, 1) == _demo.race(20, 1)


def test_the_demonstration_draws_what_it_measured_and_says_where_to_go(here, race, monkeypatch):
    monkeypatch.setattr(_demo, "race", lambda: race)
    done = here("demo")
    assert (done.returncode, done.stderr) == (0, "")  # quiet: nothing on stderr off a terminal
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    chart = [line[8:] for line in lines if re.match(r" *(\d+ %)? *[+|]", line)]
    assert len(chart) == 11
    looks = len(race.steps)
    for number, (sign, curve) in enumerate(zip("ox.", race.curves, strict=True)):
        for look, mean in enumerate(curve.mean()):
            column = "".join(row.ljust(3 * looks)[3 * look + number] for row in chart)
            assert column.strip(" -") == sign
            assert column.index(sign) == 10 - round(10 * mean)
        shown = f"{sum(curve.last()) / race.seeds:.1%}"
        assert any(line.startswith(f"{sign}  ") and shown in line for line in lines)
    for command in re.findall(r"^  (gammabeta .*?)  ", done.stdout, re.M):
        cli.app.parse_args(command.split()[1:], exit_on_error=False, print_error=False)
    found = json.loads(here("demo", "--json").stdout)
    assert found["data"] == "digits"
    assert [curve["norm"] for curve in found["curves"]] == [True, False, False]


def colors(text: str) -> set[str]:
    codes = {code for found in re.findall(r"\x1b\[([\d;]+)m", text) for code in found.split(";")}
    return codes & {*map(str, range(30, 39)), *map(str, range(90, 98))}


def test_color_on_a_terminal_only_and_never_with_no_color(here, shared):
    words = ("study", "show", shared.out)
    typed = Typed(words, shared.home, None)
    assert typed.end() == 0
    assert colors(typed.text)
    plain = Typed(words, shared.home, None, NO_COLOR="1")
    assert plain.end() == 0
    assert not colors(plain.text)
    assert "o demo" in plain.text
    piped = here(*words)
    assert "\x1b" not in piped.stdout
    assert re.sub(r"\x1b\[[\d;]*m", "", typed.text).split() == piped.stdout.split()


@pytest.mark.parametrize("background", [0.0, 1.0])
def test_the_colors_of_verdicts_read_well_on_black_and_on_white(background):
    def linear(channel):
        c = channel / 255
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    for _, name in _terminal.MARKS.values():
        r, g, b = (linear(c) for c in Color.parse(name).get_truecolor())
        luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b
        light, dark = max(luminance, background), min(luminance, background)
        assert (light + 0.05) / (dark + 0.05) >= 4, name


def verdict(claim, number=0, **changes):
    status = sorted(_runs.STATUSES)[number % len(_runs.STATUSES)]
    plain = {
        "claim": claim,
        "status": status,
        "published_status": None if number % 5 == 4 else "inconclusive",
        "effect": -12.345,
        "ci": [-141.53, 162.66],
        "n": 16,
        "unit": f"unit {number % 3}",
        "budget": "small",
        "data": "mnist",
        "sentence": f"The answer to {claim}.",
        "notes": ["a note"],
    }
    return plain | changes


@pytest.mark.parametrize("count", [1, 4, 12, 132])
@pytest.mark.parametrize("mixed", [False, True])
def test_any_number_of_verdicts_fits_80_columns(capsys, count, mixed):
    known = _claims.claims()
    longest = sorted(known, key=len, reverse=True)[:count]
    found = [verdict(claim, number) for number, claim in enumerate(longest)]
    if mixed:
        found[0] |= {"data": "digits", "budget": "tiny"}
    surprise = f"{longest[0]}: refuted. The answer to {longest[0]}."
    _terminal.verdicts(found, [surprise], known)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines)
    for one in found:
        assert one["status"] in text
        named = [n for n, line in enumerate(lines) if line.startswith(f"{one['claim']} ")]
        row = named[0]  # the answers come later
        assert _terminal.MARKS[one["status"]][0] in lines[row]
        assert one["unit"] in f"{lines[row]} {lines[row + 1]}"
    assert text.count("-12.35") == count
    assert text.count("[-141.53, +162.66]") == count
    answered = [one["claim"] for one in found if count <= 12 or known[one["claim"]].headline]
    for claim in longest:
        assert text.count(f"The answer to {claim}.") == (claim in answered or claim == longest[0])
    assert "a note" not in text
    assert ("`gammabeta study show CLAIM`" in text) == (count > 12)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "+0.00"),
        (-0.3, "-0.30"),
        (16.868, "+16.87"),
        (2.2e-16, "+2.2e-16"),
        (-12345.0, "-1.2e+04"),
    ],
)
def test_numbers_of_any_size_are_short(value, text):
    assert _terminal.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (245, "4 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations_are_in_words(seconds, text):
    assert _terminal.duration(seconds) == text
