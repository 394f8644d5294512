"""The record of a training as a file: what is written is read, and what is damaged is named."""

import json
import math
import os
import subprocess
import sys
import tempfile

import pytest
import torch

from gammabeta._runs import RunError, _record, is_record, read_record
from gammabeta._runs._record import RecordFile, encoded, header


def about(**fields):
    given = {"gammabeta": "0.1.0", "torch": "2.13.0", "model": "Net", "parameters": 12}
    given |= {"probes": ["weights"], "every": 50, "max_overhead": 0.05, "notes": ["A step is."]}
    return header(**{**given, **fields})


def row(step, **fields):
    values = {"weights": {"0/norm": 1.5 + step, "mean": step}}
    return {"step": step, "seconds": 0.01, "overhead": 0.02, "values": values, **fields}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "record.jsonl"


def written(path, *rows, **fields):
    file = RecordFile(path, about(**fields))
    for line in rows:
        file.append(line)
    return path


def lines(path):
    return path.read_text().splitlines()


# --- what is written is read ----------------------------------------------------------------


def test_numbers_vectors_matrices_and_what_is_not_finite_come_back(path):
    beyond = [math.nan, math.inf, -math.inf, 1.0]
    given = {"scalar": 1 / 3, "vector": beyond, "matrix": [[1.0, 2.0], [3.0, math.inf]], "n": 7}
    values = {"own": {f"layer/{name}": encoded(value) for name, value in given.items()}}
    written(path, row(0, loss=encoded(math.inf)), row(50, values=values, loss=2.0))
    record = read_record(path)
    assert record.steps == [0, 50]
    assert record.about["model"] == "Net"
    assert record.series["loss"] == ([0, 50], [math.inf, 2.0])
    assert record.series["weights/0/norm"] == ([0], [1.5])
    assert record.series["own/layer/scalar"].values == [pytest.approx(1 / 3, rel=1e-8)]
    assert record.series["own/layer/matrix"].values == [[[1.0, 2.0], [3.0, math.inf]]]
    (vector,) = record.series["own/layer/vector"].values
    assert math.isnan(vector[0])
    assert vector[1:] == beyond[1:]
    assert record.series["own/layer/n"].values == [7]


def test_every_line_is_json_as_the_standard_has_it(path):
    written(path, row(0, loss=encoded(math.nan)))

    def refuse(constant):
        raise AssertionError(constant)

    found = [json.loads(line, parse_constant=refuse) for line in lines(path)]
    assert [*found[0]][:2] == ["kind", "schema"]
    assert found[1]["loss"] == "nan"


def test_float32_comes_back_bit_for_bit():
    value = torch.rand(1000) * torch.logspace(-30, 30, 1000)
    assert torch.equal(torch.tensor(encoded(value.tolist())), value)


def test_errors_are_listed_with_step_and_probe(path):
    written(path, row(0), row(50, errors={"own": "ValueError: no"}))
    assert read_record(path).errors == [(50, "own", "ValueError: no")]


def test_what_stood_after_the_step_of_a_checkpoint_no_longer_counts(path):
    written(path, row(0), row(50), row(100), {"resumed": 50}, row(50, loss=1.0), row(150))
    record = read_record(path)
    assert record.steps == [0, 50, 150]
    assert record.resumed == [50]
    assert record.series["loss"] == ([50], [1.0])


# --- kills, and going on --------------------------------------------------------------------


def test_a_line_without_an_end_is_left_out_and_cut_off_on_going_on(path):
    written(path, row(0), row(50))
    whole = path.read_bytes()
    for cut in range(1, len(lines(path)[-1]) + 1, 7):
        path.write_bytes(whole[:-cut])
        record = read_record(path)
        assert record.steps == [0]
        assert record.dropped > 0
        file = RecordFile(path, about())
        assert (file.last, file.dropped) == (0, record.dropped)
        file.append(row(50))
        assert path.read_bytes() == whole


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_a_kill_within_the_first_line_starts_the_file_again(path, share):
    first = (json.dumps(about()) + "\n").encode()
    path.parent.mkdir()
    path.write_bytes(first[: int(share * len(first))])
    with pytest.raises(RunError, match="line 1"):
        read_record(path)
    RecordFile(path, about()).append(row(0))
    assert path.read_bytes().startswith(first)
    assert read_record(path).steps == [0]


@pytest.mark.parametrize("text", ["notes of mine", '{"schema": 1}\n', "\n", "a,b\n1,2\n", "[]\n"])
def test_a_file_that_is_something_else_is_left_as_it_is(path, text):
    path.parent.mkdir()
    path.write_text(text)
    for act in (read_record, lambda p: RecordFile(p, about())):
        with pytest.raises(RunError, match=r"record\.jsonl: line 1.*Name another file"):
            act(path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("field", "value"), [("model", "Other"), ("probes", ["gradients"]), ("parameters", 13)]
)
def test_the_record_of_another_training_is_not_continued(path, field, value):
    before = written(path, row(0)).read_bytes()
    with pytest.raises(RunError, match=f"line 1: {field}: .*Name another path"):
        RecordFile(path, about(**{field: value}))
    assert path.read_bytes() == before


def test_two_writers_do_not_mix_their_lines(path):
    one, two = RecordFile(path, about()), RecordFile(path, about())
    one.append(row(0))
    with pytest.raises(OSError, match="somebody else has written"):
        two.append(row(0))
    one.append(row(50))
    assert read_record(path).steps == [0, 50]


def test_a_full_disk_leaves_whole_lines():
    """A limit on the size of files, for a process of its own: the write stops within a line."""
    pytest.importorskip("resource", reason="no limits on the size of files on this system")
    with tempfile.TemporaryDirectory() as folder:
        program = (
            "import resource, signal, sys; from pathlib import Path\n"
            "from tests.test_record import *\n"
            f"path = Path({folder!r}) / 'record.jsonl'\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "file = RecordFile(path, about()); file.append(row(0))\n"
            "size = path.stat().st_size\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))\n"
            "try: file.append(row(50))\n"
            "except OSError as error: print(error.errno, path.stat().st_size - size)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (size + 2000, resource.RLIM_INFINITY))\n"
            "file.append(row(100)); print(read_record(path).steps)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "27 0\n[0, 100]\n", done.stderr


def test_a_record_does_not_grow_beyond_what_is_read(path, monkeypatch):
    file = RecordFile(path, about())
    size = path.stat().st_size
    monkeypatch.setattr(_record, "MAX_RECORD", size + 150)
    file.append(row(0))
    with pytest.raises(OSError, match="the largest record"):
        file.append(row(50))
    assert read_record(path).steps == [0]


# --- what comes from a stranger -------------------------------------------------------------

HUGE = [[0.0] * 101] * 100


@pytest.mark.parametrize(
    ("number", "change", "named"),
    [
        (1, {"kind": "other"}, "line 1: kind"),
        (1, {"schema": 0}, "line 1: schema"),
        (1, {"schema": 2, "gammabeta": "9.1"}, r"schema: expected at most 1.*gammabeta 9\.1"),
        (1, {"model": 3}, "line 1: model"),
        (1, {"model": "a\nb"}, "line 1: model"),
        (1, {"probes": "weights"}, "line 1: probes"),
        (1, {"notes": [1]}, "line 1: notes"),
        (1, {"every": 0}, "line 1: every"),
        (1, {"max_overhead": -1}, "line 1: max_overhead"),
        (1, {"parameters": 1.5}, "line 1: parameters"),
        (2, {"step": -1}, "line 2: step"),
        (2, {"step": True}, "line 2: step"),
        (3, {"step": 0}, "line 3: step: expected a step after 0"),
        (2, {"seconds": None}, "line 2: seconds"),
        (2, {"overhead": "inf"}, "line 2: overhead"),
        (2, {"loss": "big"}, "line 2: loss"),
        (2, {"values": []}, "line 2: values"),
        (2, {"values": {"weights": 1}}, "line 2: values: 'weights'"),
        (2, {"values": {"a/b": {}}}, "line 2: values: 'a/b'"),
        (2, {"values": {"w": {"0/norm": "x"}}}, "line 2: values: 'w': '0/norm'"),
        (2, {"values": {"w": {"0/norm": None}}}, "line 2: values: 'w': '0/norm'"),
        (2, {"values": {"w": {"0/norm": [[1], [1, 2]]}}}, "line 2: values: 'w': '0/norm'"),
        (2, {"values": {"w": {"0/norm": HUGE}}}, "line 2: values: 'w': '0/norm'"),
        (2, {"values": {"w": {"x\u202e": 1}}}, r"line 2: values: 'w': 'x\\u202e'"),
        (2, {"values": {"w": {"n": 2**70}}}, "line 2: values: 'w': 'n'"),
        (2, {"errors": {"w": 3}}, "line 2: errors"),
        (2, {"errors": []}, "line 2: errors"),
        (2, {"resumed": "0"}, "line 2: resumed"),
    ],
)
def test_an_error_names_file_line_and_field(path, number, change, named):
    written(path, row(0), row(50))
    found = [json.loads(line) for line in lines(path)]
    found[number - 1] |= change
    path.write_text("".join(json.dumps(line) + "\n" for line in found))
    with pytest.raises(RunError, match=rf"record\.jsonl: .*{named}"):
        read_record(path)


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"step": NaN}', "\x00\x00", "[" * 100_000, "\ufeff{}"]
)
def test_a_line_that_is_no_object_is_named(path, line):
    written(path, row(0))
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match="line 3: expected"):
        read_record(path)


def test_links_pipes_and_absent_files_are_refused(tmp_path, path):
    written(path)
    (tmp_path / "link.jsonl").symlink_to(path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, came in (("link", "symbolic"), ("pipe", "something else"), ("none", "no such file")):
        with pytest.raises(RunError, match=came):
            read_record(tmp_path / f"{name}.jsonl")


def test_a_record_is_known_by_its_name_or_its_beginning(tmp_path, path):
    other = tmp_path / "record.txt"
    written(path).rename(other)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "page.html").write_text("<html>")
    names = {"record.txt": True, "absent.jsonl": True, "folder.jsonl": False, "page.html": False}
    names |= {"absent": False, "cells.jsonl.gz": False}
    assert {name: is_record(tmp_path / name) for name in names} == names
