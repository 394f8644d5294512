"""The examples run as a reader would run them, say what is wrong, and the cure restores it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gammabeta as gb

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name, *words, folder):
    # offline, and on the bundled digits
    env = {key: value for key, value in os.environ.items() if key != "GAMMABETA_DATA"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**env, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("fault", "code", "lost"),
    [("twice", "BN001", 3), ("stale", "BN005", 3), ("frozen", "BN002", 15)],
)
def test_the_check_names_the_fault_and_the_cure_restores_the_accuracy(fault, code, lost, tmp_path):
    planted, cured = run("repair.py", fault, folder=tmp_path).split("\ncured: ")
    before, after = (float(re.search(r"accuracy ([\d.]+)%", t)[1]) for t in (planted, cured))
    assert planted.startswith("as planted: ")
    assert code in re.findall(r"BN\d{3}", planted)
    assert "cure" in planted
    assert "No findings" in cured
    assert after > 93
    assert after - before > lost


def test_a_training_is_watched_and_its_gap_cured(tmp_path):
    text = run("watch_your_training.py", "seen.jsonl", folder=tmp_path)
    before, after = text.split("after gb.calibrate")
    assert re.search(r"records cost \d+\.\d%, \d+ more were skipped", before)
    assert "stale: gb.calibrate(model, batches)" in before
    assert "stale:" not in after
    gaps = [float(re.search(r"\(output\) +([\d.]+)", part)[1]) for part in (before, after)]
    assert gaps[1] < gaps[0] / 2
    accuracies = [float(found) for found in re.findall(r"weights ([\d.]+)%", text)]
    assert accuracies[1] > 96
    record = gb.read_record(tmp_path / "seen.jsonl")
    assert record.steps[0] == 0
    assert record.errors == []


@pytest.mark.parametrize(("name", "most"), [("repair.py", 60), ("watch_your_training.py", 40)])
def test_an_example_is_short(name, most):
    assert len((EXAMPLES / name).read_text().splitlines()) <= most
