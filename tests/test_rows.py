"""Kept rows: small, the same bytes again, read with suspicion, and judged as the run itself."""

import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gammabeta import _runs, cli
from gammabeta._runs import RunError, StoredCell
from gammabeta.studies import _claims, _judge, _kept, _page, _provenance, _run
from gammabeta.studies._run import Experiment
from gammabeta.studies._verdict import Verdict, superiority

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = ROOT / "results"
TOY = {"toy": Experiment("toy", "toy_experiment")}


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the toy on the digits."""
    out = tmp_path_factory.mktemp("rows") / "run"
    sys.path.insert(0, str(HERE))
    try:
        result = _run.run(["toy"], out=out, data="digits", seeds=3, jobs=1, catalogue=TOY)
    finally:
        sys.path.remove(str(HERE))
    assert (result.done, result.failed) == (9, ())
    return out


@pytest.fixture
def results(run, tmp_path):
    _kept.accept([run], tmp_path / "results", data="digits", catalogue=TOY)
    return tmp_path / "results"


def plain(cells):
    specs = [{k: v for k, v in cell.spec.items() if k != "cpu_seconds"} for cell in cells]
    return [(spec, cell.rows, cell.path.name) for spec, cell in zip(specs, cells, strict=True)]


# --- the same, packed -----------------------------------------------------------------------


def test_packed_cells_are_read_as_the_run_folder_is(run, results):
    (file,) = results.glob("*.jsonl.gz")
    whole = plain(_runs.read_cells([run]))
    assert len(whole) == 9
    for path in (results, file):
        assert plain(_runs.read_cells([path])) == whole
        assert plain(_runs.read_cells([path, run])) == whole
        assert _runs.read_cells([path], "another") == []
        assert _runs.read_failed([path]) == []
        assert _runs.read_claims(path) == []
        assert _runs.read_verdicts(path) is None
        assert _runs.read_figures(path) is None


def test_the_same_cells_give_the_same_bytes(run, results, tmp_path):
    (file,) = results.glob("*.jsonl.gz")
    first, written = file.read_bytes(), file.stat().st_mtime_ns
    _kept.accept([results], results, data="digits", catalogue=TOY)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (first, written)
    cells = _runs.read_cells([run])
    random.Random(1).shuffle(cells)
    assert _runs.pack(cells, "0.1.0") == first
    assert first[3] & 8 == 0  # no name
    assert first[4:8] == bytes(4)  # no time
    # Another zlib packs otherwise: no reason to touch the file.
    file.write_bytes(gzip.compress(gzip.decompress(first), 1, mtime=0))
    other = file.read_bytes()
    _kept.accept([run], results, data="digits", catalogue=TOY)
    assert file.read_bytes() == other != first


def test_kept_rows_give_the_verdicts_of_the_run(run, results):
    kept = _judge.judge([results], catalogue=TOY)
    assert kept.verdicts == _judge.judge([run], catalogue=TOY).verdicts
    assert kept.figures == _judge.judge([run], catalogue=TOY).figures
    _judge.write_derived(results, kept)
    assert len(_runs.read_verdicts(results)["verdicts"]) == 1
    assert len(_runs.read_claims(results)) > 50


def test_the_page_is_the_same_again_and_whatever_code_comes_later(results, monkeypatch):
    """Of the registry's claims it would show the rule too; the toy's claim is not there."""
    page = _kept.page(results, TOY, data="digits")
    assert "| [toy-faster](#toy-faster-small) | – | demo |" in page
    assert "The larger rate gains" in page
    assert _kept.page(results, TOY, data="digits") == page
    monkeypatch.setattr(Experiment, "code_of", lambda *_: "0" * 16)
    later = {"toy": Experiment("toy", "toy_experiment")}
    assert _kept.page(results, later, data="digits") == page
    assert "other code" in _judge.judge([results], catalogue=later).verdicts[0].notes[0]
    assert "toy-faster" not in _kept.page(results, TOY)  # MNIST only


def test_accepting_again_replaces_the_same_budget_and_keeps_others(run, results, tmp_path):
    tiny = tmp_path / "tiny"
    options = {"data": "digits", "seeds": 1, "jobs": 1, "catalogue": TOY}
    _run.run(["toy"], out=tiny, budget="tiny", **options)
    (kept,) = _kept.accept([tiny], results, data="digits", catalogue=TOY)
    assert (kept.cells, kept.experiment, kept.thinned) == (9 + 5, "toy", 0)
    (kept,) = _kept.accept([tiny], results, data="digits", catalogue=TOY)
    assert kept.cells == 9 + 5


def test_what_may_not_be_accepted_is_refused_and_nothing_written(run, tmp_path, monkeypatch):
    out = tmp_path / "results"
    with pytest.raises(ValueError, match=r"toy: rows on mnist were expected.*demonstration"):
        _kept.accept([run], out, catalogue=TOY)
    with pytest.raises(ValueError, match="with the budget full were expected"):
        _kept.accept([run], out, budget="full", data="digits", catalogue=TOY)
    monkeypatch.setattr(Experiment, "code_of", lambda *_: "0" * 16)
    other = {"toy": Experiment("toy", "toy_experiment")}
    with pytest.raises(ValueError, match=r"got those of other code.*--refresh"):
        _kept.accept([run], out, data="digits", catalogue=other)
    assert not out.exists()


def test_no_run_goes_into_a_folder_of_kept_rows(results):
    with pytest.raises(RunError, match=r"holds kept rows \(toy\.jsonl\.gz\)"):
        _run.run(["toy"], out=results, data="digits", catalogue=TOY)
    assert not (results / "cells").exists()


# --- small ----------------------------------------------------------------------------------


def test_thinning_keeps_the_ends_and_all_rows_of_a_kept_step():
    rows = [{"step": s, "layer": k} for s in range(1, 1001) for k in (1, 2)] + [{"note": "x"}]
    for most in (5, 12, 40):
        kept = _runs.thin(rows, most)
        steps = sorted({row["step"] for row in kept if "step" in row})
        assert len(steps) <= most
        assert steps[0] == 1
        assert steps[-3:] == [998, 999, 1000]
        assert len(kept) == 2 * len(steps) + 1
        assert kept == [row for row in rows if row in kept]  # in their order
    assert _runs.thin(rows[:20], 12) == rows[:20]
    with pytest.raises(ValueError, match="5 or more"):
        _runs.thin(rows, 4)


LONG = """
import random
from gammabeta.studies._run import Cell
CLAIMS = ()
def cells(budget, data, seeds, rows):
    return [Cell("long", {}, seed) for seed in range(4)]
def measure(arm, seed, budget, data):
    chance = random.Random(seed)
    return [{"step": s, "x": chance.random()} for s in range(1, 20_001)]
def judge(rows):
    from gammabeta.studies._verdict import Verdict
    used = [row["x"] for row in rows if USED]
    return [Verdict("a", "long", "demo", None, sum(used), None, len(used), "", "", "small",
                    "digits", None, None, None, "")]
def figures(rows):
    return []
"""


@pytest.mark.parametrize(
    ("name", "used"), [("ends", "row['step'] > 19_997"), ("all", "row['step'] > 9")]
)
def test_long_rows_are_thinned_as_far_as_the_verdicts_stay(tmp_path, monkeypatch, name, used):
    module = f"long_{name}_experiment"
    (tmp_path / f"{module}.py").write_text(LONG.replace("USED", used))
    monkeypatch.syspath_prepend(str(tmp_path))
    long = {"long": Experiment("long", module)}
    _run.run(["long"], out=tmp_path / "run", data="digits", jobs=1, catalogue=long)
    if name == "all":
        with pytest.raises(ValueError, match="must fit 300,000 bytes with the same verdicts"):
            _kept.accept([tmp_path / "run"], tmp_path / "kept", data="digits", catalogue=long)
        return
    (kept,) = _kept.accept([tmp_path / "run"], tmp_path / "kept", data="digits", catalogue=long)
    assert kept.thinned == 60
    assert kept.size == kept.path.stat().st_size <= _runs.MAX_PACKED
    assert json.loads(gzip.decompress(kept.path.read_bytes()).split(b"\n")[0])["thinned"] == 60


# --- read with suspicion --------------------------------------------------------------------


def repacked(change):
    """Spoil the lines of a file, and make its header fit again."""

    def spoil(file):
        head, *lines = gzip.decompress(file.read_bytes()).split(b"\n")
        lines = change(lines[:-1])
        body = b"".join(line + b"\n" for line in lines)
        fitting = {"sha256": hashlib.sha256(body).hexdigest(), "cells": len(lines)}
        head = json.dumps({**json.loads(head), **fitting}).encode()
        file.write_bytes(gzip.compress(head + b"\n" + body))

    return spoil


def edited(place, **changes):
    """Change one cell: fields of its specification, or its rows."""

    def change(lines):
        cell = json.loads(lines[place])
        own = {k: v for k, v in changes.items() if k in ("rows", "float32")}
        spec = {**cell["spec"], **{k: v for k, v in changes.items() if k not in own}}
        lines[place] = json.dumps({**cell, **own, "spec": spec}).encode()
        return lines

    return repacked(change)


def head_with(**changes):
    def spoil(file):
        head, _, body = gzip.decompress(file.read_bytes()).partition(b"\n")
        head = json.dumps({**json.loads(head), **changes}).encode()
        file.write_bytes(gzip.compress(head + b"\n" + body))

    return spoil


def bomb(file):
    packer = zlib.compressobj(9, wbits=31)
    zeros = bytes(1_000_000)
    text = b"".join(packer.compress(zeros) for _ in range(400)) + packer.flush()
    assert len(text) < 2_000_000
    file.write_bytes(text)


HOSTILE = {
    "no gzip": (lambda f: f.write_bytes(b"hello"), "the file: expected gzip"),
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:-9]), "one whole gzip stream"),
    "longer": (lambda f: f.write_bytes(f.read_bytes() * 2), "one whole gzip stream"),
    "a bomb": (bomb, "the size: expected at most 50 MB, got 'more'"),
    "too large": (lambda f: f.write_bytes(os.urandom(3_000_000)), "at most 2 MB, got 3 MB"),
    "a link": (lambda f: (f.rename(f.parent / "x"), f.symlink_to("x")), "a symbolic link"),
    "another name": (lambda f: f.rename(f.parent / "b.jsonl.gz"), "line 1: experiment"),
    "empty": (lambda f: f.write_bytes(gzip.compress(b"")), "line 1: expected JSON"),
    "a newer file": (head_with(schema=2), r"line 1: schema.*Read it with gammabeta 0\.1\.0"),
    "a lost line": (head_with(cells=10), "line 1: cells: expected 9"),
    "an edit": (head_with(sha256="0" * 64), "the SHA-256 of the cells"),
    "no JSON": (repacked(lambda lines: [b"{", *lines]), "line 2: expected JSON"),
    "a number too large": (
        repacked(lambda lines: [*lines, lines[0].replace(b'"step":20', b'"step":Infinity')]),
        "line 11: expected JSON",
    ),
    "a list": (repacked(lambda lines: [*lines, b"[1]"]), "line 11: expected an object of spec"),
    "twice": (repacked(lambda lines: [*lines, lines[3]]), "line 11: expected every cell once"),
    "a seed of text": (edited(4, seed="1"), r"line 6: spec: seed: expected an integer"),
    "of another experiment": (edited(0, experiment="b"), "line 2: spec: experiment"),
    "no rows": (edited(2, rows=[]), "line 4: rows: expected a list of rows"),
    "a row that is a list": (edited(2, rows=[[1]]), "line 4: row 1: expected an object"),
    "a row of lists": (edited(2, rows=[{"a": 1}, {"a": [1]}]), "line 4: row 2: a: expected text"),
    "names that are none": (edited(2, float32="a"), "line 4: float32: expected a list of columns"),
    "a text of single precision": (
        edited(2, rows=[{"a": "1"}], float32=["a"]),
        "line 4: row 1: a: expected a number of single precision",
    ),
    "too large for single precision": (
        edited(2, rows=[{"a": 1e300}], float32=["a"]),
        "line 4: row 1: a: expected a number of single precision",
    ),
    "a row with a seed": (edited(2, rows=[{"seed": 1}]), "line 4: row 1: expected columns other"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_with_file_and_line(results, what):
    (file,) = results.glob("*.jsonl.gz")
    spoil, words = HOSTILE[what]
    spoil(file)
    with pytest.raises(RunError, match=words) as caught:
        _runs.read_cells([results])
    message = str(caught.value)
    assert message.startswith(str(results))
    assert message.isprintable()
    assert len(message) < 600


def test_numbers_of_single_precision_take_few_digits_and_keep_every_bit(results):
    powers = [np.float32(10.0**k) for k in range(-38, 38)]
    drawn = np.random.default_rng(0).standard_normal((76, 500), np.float32)
    numbers = [float(v) for draw, power in zip(drawn, powers, strict=True) for v in draw * power]
    numbers += [0.0, -0.0, 1.401298464324817e-45, 3.4028234663852886e38, 0.10000000149011612]
    mixed = [*numbers[1:], 0.1]  # one of double precision: all of them stay
    rows = [{"a": a, "b": b, "n": 1} for a, b in zip(numbers, mixed, strict=True)]
    (cell, *_) = _runs.read_cells([results])
    packed = _runs.pack([cell._replace(rows=rows)], "0")
    lines = gzip.decompress(packed).splitlines()
    assert json.loads(lines[1])["float32"] == ["a"]
    (file,) = results.glob("*.jsonl.gz")
    file.write_bytes(packed)
    (again,) = _runs.read_packed(file)
    assert [list(map(repr, row.values())) for row in again.rows] == [
        list(map(repr, row.values())) for row in rows
    ]
    assert len(repr(json.loads(lines[1])["rows"][500]["a"])) < len(repr(numbers[500]))


def test_a_bomb_is_not_unpacked_before_it_is_refused(results):
    (file,) = results.glob("*.jsonl.gz")
    bomb(file)
    tracemalloc.start()
    try:
        with pytest.raises(RunError, match="at most 50 MB"):
            _runs.read_packed(file)
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()


# --- where a rule comes from ----------------------------------------------------------------

CLAIM = '[[claim]]\nid = "act-all"\nrule = "{}"\n[claim.thresholds]\ndelta = {}\n'


@pytest.fixture
def history(tmp_path):
    """A repository with a registry of one claim; each call commits one state at a given time."""
    registry = tmp_path / "repo" / "claims.toml"
    registry.parent.mkdir()

    def git(*words, seconds=0):
        date = f"{1_700_000_000 + seconds} +0000"
        env = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date, "HOME": str(tmp_path)}
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", *who, *words], cwd=registry.parent, env={**os.environ, **env},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    git("init", "-q")

    def commit(text, seconds):
        registry.write_text(text)
        git("add", ".")
        git("commit", "-q", "--allow-empty", "-m", "x", seconds=seconds)
        return git("rev-parse", "HEAD")

    return registry, commit


def test_the_commit_of_a_rule_is_the_one_that_last_changed_it(history):
    registry, commit = history
    commit(CLAIM.format("old", 0.3), 0)
    changed = commit(CLAIM.format("new", 0.3), 10)
    commit("# a comment\n" + CLAIM.format(" new ", "0.30"), 20)
    assert _provenance.commits(["act-all"], registry) == {"act-all": (changed, 1_700_000_010)}
    threshold = commit(CLAIM.format("new", 0.5), 30)
    assert _provenance.commits(["act-all"], registry)["act-all"][0] == threshold
    registry.write_text(CLAIM.format("newer", 0.5))
    with pytest.raises(ValueError, match=r"that of act-all is not\. Commit claims\.toml first"):
        _provenance.commits(["act-all"], registry)


def test_a_rule_that_is_changed_after_the_first_row_is_marked_for_ever(
    history, tmp_path, monkeypatch
):
    registry, commit = history
    rule = _claims.claims()["act-all"]
    text = json.dumps(rule.rule, ensure_ascii=False)
    mine = f'[[claim]]\nid = "act-all"\nrule = {text}\n[claim.thresholds]\ndelta = {{}}\n'
    first = commit(mine.format(rule.thresholds["delta"]), 0)
    folder = tmp_path / "results"
    folder.mkdir()

    def marks(oldest=None):
        return _provenance.record(folder, ["act-all"], oldest, registry)["act-all"]

    fresh = marks(1_700_000_005)
    assert (fresh.commit, fresh.amended) == (first, False)
    assert fresh.rows_since == "2023-11-14 22:13:25 UTC"
    assert marks() == fresh
    assert marks(1_700_000_900).rows_since == fresh.rows_since
    changed = commit(mine.format(0.9), 50)
    with _claims.overruled({"act-all": {"delta": 0.9}}):
        amended = marks()
        assert (amended.commit, amended.amended) == (changed, True)
    # Also when the old rule comes back, and where there is no git.
    back = commit(mine.format(rule.thresholds["delta"]), 60)
    assert (marks().commit, marks().amended) == (back, True)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert marks().amended
        assert marks().commit == back
    # Also when the change is taken out of the history.
    subprocess.run(["git", "reset", "-q", "--hard", first], cwd=registry.parent, check=True)
    assert (marks().commit, marks().amended) == (first, True)


def test_rows_that_are_older_than_their_rule_are_marked(history, tmp_path):
    registry, commit = history
    commit(CLAIM.format("x", 0.3), 100)
    rule = _provenance.record(tmp_path, ["act-all"], 1_700_000_050, registry)["act-all"]
    assert rule.amended


@pytest.mark.parametrize("text", ["[]", '{"schema": 1}', '{"schema": 1, "rules": {"a": {}}}'])
def test_a_damaged_record_of_rules_is_refused(tmp_path, text):
    (tmp_path / "rules.json").write_text(text)
    with pytest.raises(RunError, match=r"rules\.json"):
        _provenance.recorded(tmp_path)


# --- many claims ----------------------------------------------------------------------------


def verdict_of(claim, status="supported", p=0.01, **changes):
    texts = dict.fromkeys(("unit", "reported", "sentence"), "text")
    numbers = {"effect": 1.0, "ci": (0.5, 1.5), "n": 5, "delta": 0.3, "p": p}
    rest = {"half_width": 0.5, "planned_half_width": None, "published_status": None}
    fields = {"claim": claim, "experiment": "toy", "status": status, "budget": "small"}
    return Verdict(**{**texts, **numbers, **rest, **fields, "data": "mnist", **changes})


def headline():
    return [claim.id for claim in _claims.claims().values() if claim.headline]


def test_holm_is_taken_over_all_twelve_headline_claims():
    a, b = headline()[:2]
    assert len(headline()) == 12
    alone, counted = _judge.corrected([verdict_of(a, p=0.004)])
    assert alone[0].status == "supported"
    assert counted.family[a] == (0.004, pytest.approx(0.048))
    lost, _ = _judge.corrected([verdict_of(a, p=0.005)])
    assert lost[0].status == "inconclusive"
    assert lost[0].sentence.startswith("Undecided after Holm's correction over the 12")
    both, _ = _judge.corrected([verdict_of(a, p=0.0001), verdict_of(b, p=0.0044)])
    assert [v.status for v in both] == ["supported", "supported"]
    (refuted,), _ = _judge.corrected([verdict_of(a, "refuted", p=0.9)])
    assert refuted.status == "refuted"


def test_only_headline_claims_are_corrected_and_false_ones_are_counted():
    (exact, *others) = ["bn-forward", "bn-speed", "higher-lr"]
    verdicts = [verdict_of(claim, p=0.04) for claim in others]
    verdicts += [verdict_of(exact, "supported", p=None), verdict_of(headline()[0], p=1e-6)]
    found, counted = _judge.corrected(verdicts)
    assert [v.status for v in found] == ["supported"] * 4
    assert (counted.expected_false, counted.supported) == (0.15, 4)  # two, and the family
    assert _judge.corrected([verdict_of(headline()[0], "demo")]) == (
        [verdict_of(headline()[0], "demo")],
        None,
    )


def test_a_verdict_without_p_takes_that_of_its_fair_cells():
    x = [0.9, 1.0, 1.1, 1.2, 0.8]
    outcome = superiority(x, 0.3)
    cell = {"part": "fair", "effect": outcome.interval.mean, "n": 5, "status": "supported"}
    cell |= {"lo": outcome.interval.lo, "hi": outcome.interval.hi, "name": "x"}
    _, counted = _judge.corrected([verdict_of(headline()[0], p=None, cells=[cell])])
    assert counted.family[headline()[0]][0] == pytest.approx(outcome.p, rel=1e-6)
    (found,), counted = _judge.corrected([verdict_of(headline()[0], p=None)])
    assert found.status == "supported"
    assert "has none" in found.notes[-1]
    assert counted.family[headline()[0]] == (None, None)


def test_the_bound_on_false_supported_holds_for_claims_of_which_none_is_true():
    """40 empty claims, judged again and again: no more are supported than the bound says."""
    draws = np.random.default_rng(11).normal(0.0, 0.2, (200, 40, 6))
    supported = [sum(superiority(x, 1e-9).status == "supported" for x in draw) for draw in draws]
    assert 0 < np.mean(supported) <= 0.05 * 40


# --- sign flips -----------------------------------------------------------------------------


def pair_of(seed, gain, shift=0.0):
    spec = {"seed": seed, "budget": "small", "data": {"name": "mnist"}}
    arms = {"bn": (0.3, gain + shift), "none": (0.1, shift)}
    return [
        StoredCell(
            {**spec, "arm": {"norm": norm, "rate": rate}}, [{"x": x}], Path(f"{norm}-{seed}")
        )
        for norm, (rate, x) in arms.items()
    ]


def difference(rows):
    by = {(row["seed"], row["norm"]): row["x"] for row in rows}
    return [by[s, "bn"] - by[s, "none"] for s in sorted({s for s, _ in by})]


def test_a_sign_flip_exchanges_the_rows_of_a_pair_and_nothing_else():
    cells = [cell for seed in range(8) for cell in pair_of(seed, 1.0 + seed, 10.0)]
    alone = pair_of(9, 5.0)[:1]
    seen = set()
    for draw in range(50):
        rows = _judge.sign_flipped([*cells, *alone], "norm", random.Random(draw))
        assert len(rows) == 17
        assert {row["norm"]: row["rate"] for row in rows} == {"bn": 0.3, "none": 0.1}
        assert [row["x"] for row in rows if row["seed"] == 9] == [5.0]
        found = difference([row for row in rows if row["seed"] != 9])
        assert np.abs(found).tolist() == [1.0 + seed for seed in range(8)]
        seen.add(tuple(np.sign(found)))
    assert len(seen) > 40


def test_sign_flips_of_a_large_effect_are_rarely_supported():
    cells = [cell for seed in range(10) for cell in pair_of(seed, 1.0 + seed / 10)]
    assert superiority(difference([r for c in cells for r in c.flat()]), 0.3).status == "supported"
    draws = [
        superiority(difference(_judge.sign_flipped(cells, "norm", random.Random(k))), 1e-9).status
        for k in range(1000)
    ]
    assert draws.count("supported") / 1000 <= 0.064


# --- the committed rows ---------------------------------------------------------------------


def committed():
    return sorted(RESULTS.glob("*.jsonl.gz"))


needs_rows = pytest.mark.skipif(not committed(), reason="no rows are committed in results/ yet")


@needs_rows
def test_the_page_of_verdicts_is_made_from_the_committed_rows(tmp_path):
    copy = tmp_path / "results"
    copy.mkdir()
    for file in (*committed(), RESULTS / "rules.json"):
        (copy / file.name).write_bytes(file.read_bytes())
    if (RESULTS / "robustness").exists():
        shutil.copytree(RESULTS / "robustness", copy / "robustness")
    made = "Make it again: gammabeta study judge results -o docs/verdicts.md"
    assert _kept.page(copy) == (ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8"), made


@needs_rows
def test_committed_rows_are_small_and_read_well():
    assert sum(file.stat().st_size for file in RESULTS.rglob("*.jsonl.gz")) < 2_000_000
    for file in committed():
        assert file.stat().st_size <= _runs.MAX_PACKED
        assert _runs.read_packed(file)


@pytest.mark.parametrize(
    ("statuses", "told"),
    [
        (("supported", "refuted"), "ics-reduced"),
        (("refuted", "supported"), "not-reduce-shift"),
        (("supported", "supported"), "both"),
        (("refuted", "mixed"), "neither"),
        (("refuted", "inconclusive"), "undecided"),
    ],
)
def test_of_claims_that_contradict_each_other_the_page_tells_what_the_runs_support(statuses, told):
    known = _claims.claims()
    assert all(side in known for _, *sides in _page.DISPUTES for side in sides)
    sides = zip(("ics-reduced", "not-reduce-shift"), statuses, strict=True)
    page = _page._disputes([SimpleNamespace(claim=c, status=s) for c, s in sides])
    assert page.splitlines()[-1].endswith(f"| {told} |")
    assert _page._disputes([]) == ""


def test_the_page_of_kept_rows_needs_no_verdicts_beside_them(tmp_path, capsys):
    """As after a clone: what is derived from the rows is not kept."""
    kept = tmp_path / "results"
    kept.mkdir()
    names = {"identities.jsonl.gz", "rules.json"}
    for name in names:
        shutil.copy(RESULTS / name, kept)
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(kept), "-o", str(tmp_path / "page.html")])
    assert ended.value.code == 0, capsys.readouterr().err
    text = (tmp_path / "page.html").read_text()
    assert "has no verdicts.json" not in text
    assert "No claim has been judged" not in text
    assert {path.name for path in kept.iterdir()} == names
