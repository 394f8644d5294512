"""Run folders: whole or absent, the same for everybody, and safe to read from a stranger."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from gammabeta import _runs
from gammabeta._runs import RunError

SPEC = {
    "schema": 1,
    "experiment": "toy",
    "arm": {"bn": True, "rate": 0.1, "act": "relu", "norm": None},
    "seed": 3,
    "budget": "tiny",
    "data": {"name": "digits", "digest": "0123456789abcdef"},
    "code": "fedcba9876543210",
    "versions": {"gammabeta": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
}
ROWS = [{"step": 1, "accuracy": 0.5, "loss": None}, {"step": 2, "accuracy": 1.0, "note": "é\n"}]
CLAIM = {
    "id": "toy-faster",
    **dict.fromkeys(("title", "question", "source", "reported", "rule", "caveats"), "text"),
    "topic": "speed",
    "origin": "beyond",
    "kind": "statistical",
    "experiment": "toy",
    "headline": False,
    "thresholds": {"delta": 0.3},
}
VERDICT = {
    "claim": "toy-faster",
    "experiment": "toy",
    "status": "refuted",
    "published_status": None,
    **dict.fromkeys(("effect", "delta", "half_width"), 0.5),
    "planned_half_width": None,
    "ci": [0.25, None],
    "n": 5,
    **dict.fromkeys(("unit", "reported", "budget", "data", "sentence"), "text"),
    "cells": [{"name": "relu", "part": "fair", "effect": 1.0, "n": 5, "status": "refuted"}],
    "notes": ["a note"],
}
FIGURE = {
    "id": "toy-curves",
    "experiment": "toy",
    "kind": "curves",
    **dict.fromkeys(("title", "caption", "alt"), "text"),
    "x": {"label": "step", "log": True},
    "y": {"label": "accuracy", "log": False},
    "panels": [
        {
            "title": "relu",
            "series": [
                {"name": "with", "style": "bn", "x": [1, 2], "y": [0.5, None], "lo": [0, 1], "n": 5}
            ],
        }
    ],
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small run folder with one cell, one failure and all derived files."""
    path = tmp_path_factory.mktemp("original") / "run"
    _runs.write_cell(path, SPEC, ROWS, "a log")
    _runs.write_failed(path, {**SPEC, "seed": 4}, "Traceback: boom")
    _runs.write_json(path / "claims.json", {"schema": 1, "claims": [CLAIM]})
    verdicts = {"gammabeta": "0.1.0", "verdicts": [VERDICT], "surprises": [], "notice": None}
    _runs.write_json(path / "verdicts.json", {"schema": 1, **verdicts})
    _runs.write_json(path / "figures.json", {"schema": 1, "figures": [FIGURE]})
    return path


@pytest.fixture
def run(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def cell_of(run):
    return run / "cells" / "toy" / _runs.cell_name(SPEC)


def read_all(run):
    return (
        _runs.read_cells([run]),
        _runs.read_failed([run]),
        _runs.read_claims(run),
        _runs.read_verdicts(run),
        _runs.read_figures(run),
    )


def lose_rows(run, count):
    path = cell_of(run) / "rows.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-count]))


def edit_rows(run):
    path = cell_of(run) / "rows.jsonl"
    text = path.read_text()
    edited = text.replace("0.", "7.", 1)
    assert edited != text
    path.write_text(edited)


def test_what_was_written_is_read_again(run):
    (cell,), (failed,), claims, verdicts, figures = read_all(run)
    assert cell.spec == SPEC
    assert cell.rows == ROWS
    assert cell.path == cell_of(run)
    assert cell.flat()[0] == {
        **SPEC["arm"],
        "seed": 3,
        "budget": "tiny",
        "data": "digits",
        **ROWS[0],
    }
    assert failed["spec"]["seed"] == 4
    assert failed["error"] == "Traceback: boom"
    assert (claims, figures) == ([CLAIM], [FIGURE])
    assert verdicts["verdicts"] == [VERDICT]


def test_a_claim_may_have_capitals(run):
    change(run / "claims.json", claims=[{**CLAIM, "id": "batch-U"}])
    verdict_with(claim="batch-U")(run)
    assert [claim["id"] for claim in _runs.read_claims(run)] == ["batch-U"]
    assert [v["claim"] for v in _runs.read_verdicts(run)["verdicts"]] == ["batch-U"]


def test_the_name_hashes_what_decides_the_rows_and_nothing_else():
    name = _runs.cell_name(SPEC)
    assert name == "ef8520540808dd38"  # fixed for ever: other machines' folders carry it
    shuffled = dict(reversed(SPEC.items()))
    assert _runs.cell_name({**shuffled, "versions": {}}) == name
    for field, value in {"seed": 4, "budget": "full", "code": "0" * 16, "arm": {}}.items():
        assert _runs.cell_name({**SPEC, field: value}) != name


def test_the_first_to_finish_wins_unless_asked_to_replace(run):
    _runs.write_cell(run, SPEC, [{"step": 9}], "")
    assert _runs.read_cells([run])[0].rows == ROWS
    _runs.write_cell(run, SPEC, [{"step": 9}], "", replace=True)
    assert _runs.read_cells([run])[0].rows == [{"step": 9}]
    assert not list(run.rglob(".tmp-*"))


def test_writers_at_the_same_time_leave_one_whole_cell(run):
    def write(number):
        for _ in range(5):
            _runs.write_cell(run, SPEC, [{"step": number}] * 50, "", replace=True)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (cell,) = _runs.read_cells([run])
    assert len(cell.rows) == 50
    assert len({row["step"] for row in cell.rows}) == 1
    assert not list(run.rglob(".tmp-*"))


def test_a_cell_that_comes_right_is_no_failure_any_more(run, tmp_path):
    elsewhere = tmp_path / "other"
    _runs.write_failed(elsewhere, SPEC, "only here")
    assert len(_runs.read_failed([elsewhere])) == 1
    assert [f["spec"]["seed"] for f in _runs.read_failed([elsewhere, run])] == [4]
    _runs.write_cell(elsewhere, SPEC, ROWS, "")
    assert _runs.read_failed([elsewhere]) == []


def test_cells_of_several_folders_count_once_and_come_in_one_order(run, tmp_path):
    other = tmp_path / "other"
    for seed in (7, 3, 1):
        _runs.write_cell(other, {**SPEC, "seed": seed}, [{"step": seed}], "")
    seeds = [cell.spec["seed"] for cell in _runs.read_cells([run, other])]
    assert seeds == [1, 3, 7]
    assert _runs.read_cells([run, other])[1].rows == ROWS
    assert _runs.read_cells([run, other], "another") == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"loss": float("nan")}, "row 2: loss: expected text, true, false, null or a finite"),
        ({"loss": float("-inf")}, "got -inf"),
        ({"loss": [1.0]}, r"got \[1.0\]"),
        ({"loss": 10**400}, "got 1000"),
        ({"rate": 0.1}, "other than the arm's"),
        ({"seed": 1}, "other than the arm's"),
        ({"a b": 1}, "names of letters"),
    ],
)
def test_a_row_that_could_not_be_read_again_is_not_written(tmp_path, row, words):
    with pytest.raises(RunError, match=words) as caught:
        _runs.write_cell(tmp_path / "run", SPEC, [{"step": 1}, row], "")
    assert str(caught.value).endswith("Mend the experiment.")
    assert not (tmp_path / "run").exists()


def test_json_files_are_replaced_whole_or_not_at_all(run):
    before = (run / "claims.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        _runs.write_json(run / "claims.json", {"x": float("inf")})
    assert (run / "claims.json").read_bytes() == before
    assert not list(run.glob(".tmp-*"))


def test_a_full_disk_leaves_nothing_half_written(run):
    """A limit on the size of files stands in for the disk; the error comes in the same place."""
    before = sorted(run.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError):
            _runs.write_cell(run, {**SPEC, "seed": 9}, [{"step": n} for n in range(999)], "")
        with pytest.raises(OSError):
            _runs.write_json(run / "claims.json", ["long"] * 999)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(run.rglob("*")) == before
    read_all(run)


# --- what a stranger may have put there -----------------------------------------------------


def put(path, text):
    path.write_text(text)


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def spec_with(**fields):
    return lambda run: change(cell_of(run) / "spec.json", **fields)


def rows_with(text):
    return lambda run: put(cell_of(run) / "rows.jsonl", text)


def verdict_with(**fields):
    return lambda run: change(run / "verdicts.json", verdicts=[{**VERDICT, **fields}])


def figure_with(**fields):
    return lambda run: change(run / "figures.json", figures=[{**FIGURE, **fields}])


def link_to(run, victim):
    target = run.parent / "secret"
    victim.rename(target) if victim.exists() else target.mkdir()
    victim.symlink_to(target)


def series_with(**fields):
    series = {**FIGURE["panels"][0]["series"][0], **fields}
    return figure_with(panels=[{"title": "relu", "series": [series]}])


def big_file(run):
    with open(cell_of(run) / "rows.jsonl", "wb") as file:
        file.truncate(60_000_000)


def pipe(run):
    (cell_of(run) / "rows.jsonl").unlink()
    os.mkfifo(cell_of(run) / "rows.jsonl")


HOSTILE = {
    "a cell that is a link": (lambda r: link_to(r, cell_of(r)), "symbolic link"),
    "cells/ that is a link": (lambda r: link_to(r, r / "cells"), "symbolic link"),
    "rows that are a link": (lambda r: link_to(r, cell_of(r) / "rows.jsonl"), "symbolic link"),
    "a specification that is a link": (
        lambda r: link_to(r, cell_of(r) / "spec.json"),
        "symbolic link",
    ),
    "a registry that is a link": (lambda r: link_to(r, r / "claims.json"), "symbolic link"),
    "a traceback that is a link": (
        lambda r: link_to(r, next(r.glob("failed/*/*/error.txt"))),
        "symbolic link",
    ),
    "a registry that hangs in the air": (
        lambda r: ((r / "claims.json").unlink(), (r / "claims.json").symlink_to("nowhere")),
        "symbolic link",
    ),
    "a pipe in place of rows": (pipe, "regular file"),
    "rows of 60 MB": (big_file, "at most 50 MB, got 60 MB"),
    "a million rows": (rows_with("{}\n" * 1_000_000), "the rows: expected at most 500000"),
    "rows that lost their last line": (lambda r: lose_rows(r, 1), "SHA-256 of the rows"),
    "rows that lost all lines": (lambda r: lose_rows(r, len(ROWS)), "at least one"),
    "rows with another number": (edit_rows, "SHA-256 of the rows"),
    "rows that are absent": (lambda r: (cell_of(r) / "rows.jsonl").unlink(), "no such file"),
    "rows cut off": (rows_with('{"step": 1}\n{"step'), "line 2: expected JSON"),
    "rows of NaN": (rows_with('{"loss": NaN}\n'), "line 1: expected JSON.*NaN is not a finite"),
    "rows of 1e999": (rows_with('{"step": 1}\n{"loss": 1e999}\n'), "line 2: loss: .*got inf"),
    "rows that are lists": (rows_with("[1]\n"), "line 1: expected an object"),
    "rows that nest": (rows_with('{"a": {"b": 1}}\n'), "line 1: a: "),
    "rows too deep": (rows_with('{"a":' * 100_000 + "1" + "}" * 100_000), "line 1: expected JSON"),
    "a number of 5000 digits": (rows_with('{"a": ' + "9" * 5000 + "}\n"), "line 1: expected JSON"),
    "a number of 30 digits": (rows_with('{"a": ' + "9" * 30 + "}\n"), "line 1: a: .*finite"),
    "rows that are not text": (
        lambda r: (cell_of(r) / "rows.jsonl").write_bytes(b"\xff\xfe{}\n"),
        "line 1: expected JSON in UTF-8",
    ),
    "a column that hides a seed": (rows_with('{"seed": 1}\n'), "other than the arm's, seed"),
    "escape codes": (rows_with('{"a\\u001b[31m": 1}\n'), r"got 'a\\x1b\[31m'"),
    "another seed": (spec_with(seed=4), "the hash: expected"),
    "a negative seed": (spec_with(seed=-1), "seed: expected an integer"),
    "a seed that is true": (spec_with(seed=True), "seed: expected an integer"),
    "no arm": (spec_with(arm=None), "arm: expected an object"),
    "an arm of lists": (spec_with(arm={"a": []}), "arm: a: "),
    "no data": (spec_with(data=None), "data: expected an object of texts"),
    "no digest": (spec_with(data={"name": "mnist"}), "data.digest"),
    "another code": (spec_with(code="../../etc"), "code: expected 16 hex digits"),
    "another experiment": (spec_with(experiment="../x"), "experiment: expected an experiment's id"),
    "a copied cell": (
        lambda r: cell_of(r).rename(cell_of(r).with_name("0" * 16)),
        "the hash: expected 0000000000000000",
    ),
    "a moved cell": (lambda r: cell_of(r).parent.rename(r / "cells" / "b"), "experiment: expected"),
    "a wrong folder": (lambda r: (r / "cells" / "Not an id").mkdir(), "its name, got 'Not an id'"),
    "a file among the cells": (lambda r: put(r / "cells" / "x", ""), "expected a folder"),
    "a specification that is a list": (
        lambda r: put(cell_of(r) / "spec.json", "[]"),
        "the specification: expected an object",
    ),
    "a newer cell": (spec_with(schema=2), "at most 1, got 2. Read it with gammabeta 0.1.0"),
    "a newer registry": (
        lambda r: change(r / "claims.json", schema=7, gammabeta="3.2.1"),
        "schema: expected at most 1, got 7. Read it with gammabeta 3.2.1 or newer",
    ),
    "newer verdicts": (lambda r: change(r / "verdicts.json", schema=2), "0.1.0 or newer"),
    "newer figures": (lambda r: change(r / "figures.json", schema=2), "a newer gammabeta"),
    "no schema": (lambda r: put(r / "figures.json", "{}"), "schema: expected a whole number"),
    "a schema of text": (lambda r: change(r / "figures.json", schema="1"), "got '1'"),
    "claims that are a text": (lambda r: change(r / "claims.json", claims="x"), "a list"),
    "a claim that is a text": (lambda r: change(r / "claims.json", claims=["x"]), r"claims\[0\]"),
    "a claim without title": (
        lambda r: change(r / "claims.json", claims=[{**CLAIM, "title": None}]),
        r"claims\[0\]: title: expected text, got None",
    ),
    "a claim with a colored id": (
        lambda r: change(r / "claims.json", claims=[{**CLAIM, "id": "a\x1b[31m"}]),
        r"claims\[0\]: id: expected a claim's id, got 'a\\x1b\[31m'",
    ),
    "a claim of an experiment in capitals": (
        lambda r: change(r / "claims.json", claims=[{**CLAIM, "experiment": "Toy"}]),
        r"claims\[0\]: experiment: expected an id or null, got 'Toy'",
    ),
    "a verdict on no claim": (verdict_with(claim="a claim"), "claim: expected a claim's id"),
    "another status": (verdict_with(status="proven"), "status: expected supported or refuted"),
    "a status that is a list": (verdict_with(status=[]), "status: expected supported"),
    "an interval of text": (verdict_with(ci=["a", "b"]), "ci: expected"),
    "a negative n": (verdict_with(n=-1), "n: expected an integer"),
    "cells of lists": (verdict_with(cells=[[1]]), r"cells\[0\]: expected an object"),
    "another kind of figure": (figure_with(kind="pie"), "kind: expected curves"),
    "an axis without label": (figure_with(x={"log": True}), r"x: label: expected text"),
    "a series of text": (series_with(y=["1", "2"]), "y: expected a list of numbers"),
    "a series too short": (series_with(y=[1]), "lists of one length"),
    "a band too short": (series_with(hi=[1]), "lists of one length"),
    "panels that are a number": (figure_with(panels=3), "panels: expected a list"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_folder_is_refused_with_file_and_field(run, what):
    spoil, words = HOSTILE[what]
    read_all(run)
    spoil(run)
    with pytest.raises(RunError, match=words) as caught:
        read_all(run)
    message = str(caught.value)
    assert message.startswith(str(run))
    assert message.isprintable()
    assert len(message) < 600


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.touch()])
def test_a_place_that_is_no_run_folder_is_refused(tmp_path, make):
    path = tmp_path / "x"
    make(path)
    for read in (_runs.read_claims, _runs.read_verdicts, lambda p: _runs.read_cells([p])):
        with pytest.raises(RunError, match="expected a run folder"):
            read(path)


def test_hidden_and_unfinished_entries_are_passed_over(run):
    (run / "cells" / ".DS_Store").touch()
    (cell_of(run).parent / f".tmp-{'0' * 16}-host-1-ab").mkdir()
    assert len(_runs.read_cells([run])) == 1


def test_what_the_dead_left_is_removed_and_the_rest_stays(run):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    zombie = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    zombie.stdout.read()  # it has ended (or is about to), and nobody has asked after it
    time.sleep(0.2)
    host, folder = socket.gethostname(), cell_of(run).parent
    names = {
        f"{host}-{gone.pid}-ab": False,
        f"{host}-{zombie.pid}-ab": False,
        f"{host}-{os.getpid()}-ab": True,
        f"another.host-{gone.pid}-ab": True,
        "without-number": True,
    }
    for name in names:
        (folder / f".tmp-{'0' * 16}-{name}").mkdir()
    (run / f".tmp-{'0' * 16}-{host}-{gone.pid}-ab").touch()
    if not os.path.exists("/proc/self/stat"):
        zombie.wait()
    assert _runs.remove_dead(run) == 3
    zombie.communicate()
    left = {path.name for path in folder.glob(".tmp-*")}
    assert left == {f".tmp-{'0' * 16}-{name}" for name, stays in names.items() if stays}
    assert len(_runs.read_cells([run])) == 1
