"""Stored cells are measured again and compared."""

import itertools
import json
import os
import textwrap
from pathlib import Path

import pytest

from gammabeta import _runs, cli
from gammabeta.studies import _data, _verify
from gammabeta.studies._cell import Task, make_spec, measure
from gammabeta.studies._experiments import Experiment
from gammabeta.studies._run import run

NUMBERS = itertools.count()  # a module's name, once imported, is taken
RESULTS = Path(__file__).parents[1] / "results"


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A run of four cells by an experiment of this text; the catalogue with it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def stored(value="random.random() + arm['k']"):
        module = f"verified_{os.getpid()}_{next(NUMBERS)}"
        text = f"""
            import random, time
            from gammabeta.studies._run import Cell
            CLAIMS = ("some-claim",)
            def cells(budget, data, seeds, rows):
                return [Cell("plain", {{"k": k}}, 0) for k in range(4)]
            def measure(arm, seed, budget, data):
                return [{{"step": s, "value": {value}}} for s in range(9)]
            def judge(rows):
                return []
            def figures(rows):
                return []
            """
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(text))
        known = {"plain": Experiment("plain", module)}
        out = tmp_path / module
        run(["plain"], out=out, data="digits", jobs=1, catalogue=known)
        return out, known

    return stored


def altered(out, to, change):
    """The same cells with changed rows, stored elsewhere as if they had been measured so."""
    for cell in _runs.read_cells([out]):
        _runs.write_cell(to, cell.spec, [change(dict(row)) for row in cell.rows], "")
    return to


def outcomes(paths, known, **options):
    return [one.outcome for one in _verify.verify(paths, catalogue=known, **options)]


def test_the_same_code_gives_the_same_rows_bit_by_bit(stored):
    out, known = stored()
    assert outcomes([out], known) == ["same"] * 4
    assert outcomes([out], known, cells=2) == ["same"] * 2
    (one,) = _verify.verify([out], catalogue=known, cells=1)
    assert (one.experiment, one.rows, one.present, one.difference) == ("plain", 9, True, 0.0)


def test_another_draw_takes_other_cells(stored):
    out, known = stored()
    drawn = {
        tuple(one.name for one in _verify.verify([out], catalogue=known, cells=2, draw=draw))
        for draw in range(6)
    }
    assert len(drawn) > 1
    again = [one.name for one in _verify.verify([out], catalogue=known, cells=2, draw=3)]
    assert tuple(again) in drawn


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (lambda row: row | {"value": row["value"] * (1 + 1e-7)}, "close"),
        (lambda row: row | {"value": row["value"] * 1.01}, "other"),
        (lambda row: row | {"step": row["step"] + 100}, "other"),
        (lambda row: row | {"word": "more"}, "other"),
    ],
)
def test_rows_that_were_changed_are_told(stored, tmp_path, change, outcome):
    out, known = stored()
    assert outcomes([altered(out, tmp_path / "changed", change)], known) == [outcome] * 4


def test_what_differs_each_time_is_no_change(stored):
    out, known = stored("float(time.perf_counter_ns() % 99991)")
    assert outcomes([out], known) == ["varies"] * 4


def test_rows_that_were_thinned_out_are_not_missed(stored, tmp_path):
    out, known = stored()
    thin = tmp_path / "thin"
    for cell in _runs.read_cells([out]):
        _runs.write_cell(thin, cell.spec, _runs.thin(cell.rows, 5), "")
    assert outcomes([thin], known) == ["same"] * 4


def test_a_new_name_of_the_code_changes_no_number(stored):
    """The generators of a cell begin alike whatever code its specification names."""
    out, known = stored()
    images = _data.load("digits")
    named = {"name": "digits", "digest": images.digest}
    spec = make_spec(known["plain"], {"k": 1}, 0, "small", named)
    with open(os.devnull, "w") as log:
        one, other = (
            measure(Task({**spec, "code": code}, known["plain"], str(out), None), log)[0]
            for code in ("0" * 16, "1" * 16)
        )
    assert one == other


def test_nothing_is_begun_after_the_time_and_nothing_is_changed(stored):
    out, known = stored("time.sleep(0.02) or 1.5")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert len(outcomes([out], known, seconds=0.1)) == 1
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_without_cells_it_says_so(stored, tmp_path):
    out, known = stored()
    with pytest.raises(ValueError, match="Cells were expected in"):
        outcomes([out], {**known, "toy": Experiment("toy", "toy")}, ids=["toy"])


def test_kept_rows_come_again():
    """Of whatever experiments a draw takes: on another processor they may be close only."""
    if not os.environ.get(_data.VARIABLE):
        pytest.skip(f"needs MNIST: set {_data.VARIABLE}")
    found = list(_verify.verify([RESULTS], cells=6, seconds=15, draw=len(list(RESULTS.iterdir()))))
    assert found
    assert {one.outcome for one in found} <= {"same", "close", "varies"}, found


def test_the_command_tells_and_ends_with_1_where_rows_are_others(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(SystemExit) as ended:
            cli.main(["study", *words])
        return ended.value.code, *capsys.readouterr()

    quick = ("--data", "digits", "--budget", "tiny", "--seeds", "1", "-j", "1")
    assert call("run", "single-sample", *quick, "-o", "runs/one")[0] == 0
    code, out, _ = call("verify", "runs/one", "--cells", "2")
    assert code == 0
    assert "2 cells were measured again: 2 gave the same rows, bit by bit." in out
    assert all(len(line) <= 80 for line in out.splitlines())
    wrong = altered(Path("runs/one"), Path("runs/wrong"), lambda row: row | {"step": 77})
    (wrong / "claims.json").write_bytes(Path("runs/one/claims.json").read_bytes())
    code, out, _ = call("verify", "runs/wrong", "--cells", "2", "--json")
    assert code == 1
    assert [one["outcome"] for one in json.loads(out)] == ["other"] * 2
    code, out, _ = call("verify", "runs/wrong", "--cells", "1")
    assert code == 1
    assert "rows are others." in out
    code, _, err = call("verify", "nothing-here")
    assert code == 2
    assert "nothing-here" in err
