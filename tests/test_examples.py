"""The examples run as a reader would run them, say what is wrong, and the cure restores it."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import gammabeta as gb

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name, *words, folder):
    """In a process of its own; offline, and on the bundled digits."""
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


def script(name, capsys, *words):
    """What a script prints; in this process, which has torch imported already."""
    path = EXAMPLES / name
    with mock.patch.object(sys, "argv", [str(path), *words]):
        runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def lecture(name, capsys):
    return script(f"lecture/{name}", capsys)


@pytest.mark.parametrize(
    ("fault", "code", "lost"),
    [("twice", "BN001", 3), ("stale", "BN005", 3), ("frozen", "BN002", 15)],
)
def test_the_check_names_the_fault_and_the_cure_restores_the_accuracy(
    fault, code, lost, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("GAMMABETA_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    planted, cured = script("repair.py", capsys, fault).split("\ncured: ")
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


def test_the_equations_by_hand_are_those_of_autograd_and_of_the_package(capsys):
    text = lecture("equations.py", capsys)
    differences = [float(v) for v in re.findall(r"largest difference from [\w.]+: (\S+)", text)]
    assert len(differences) == 2
    assert max(differences) < 1e-12
    assert "mean 5.000, variance 14.000" in text
    assert float(re.search(r"less y of x: (\S+)", text)[1]) < 1e-12


def test_a_batch_of_two_gives_plus_and_minus_one(capsys):
    text = lecture("batch_of_two.py", capsys)
    pairs = re.findall(r"becomes \[(\S+), (\S+)\], gradient (\S+)", text)
    assert len(pairs) == 3
    for low, high, gradient in pairs:
        assert abs(float(low) + 1) < 1e-9
        assert abs(float(high) - 1) < 1e-9
        assert float(gradient) < 1e-6
    gaps = [float(v) for v in re.findall(r"([\d.]+)%", text)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 50 > 10 > gaps[-1]


def test_noise_brings_the_shift_back_and_not_the_loss_of_accuracy(capsys):
    found = re.findall(
        r"input +([\d.]+) sd, accuracy ([\d.]+)%", lecture("covariate_shift.py", capsys)
    )
    (plain, _), (bn, accuracy), (noisy, with_noise) = [tuple(map(float, pair)) for pair in found]
    assert bn < plain
    assert noisy > bn
    assert accuracy > 85
    assert with_noise > 85


def test_dropout_moves_the_variance_as_the_formula_says(capsys):
    text = lecture("dropout_and_noise.py", capsys)
    rows = re.findall(r"^(0\.\d) +([\d.]+) times +([\d.]+) +([\d.]+)$", text, re.M)
    assert [row[0] for row in rows] == ["0.1", "0.3", "0.5"]
    for _, ratio, formula, scale in rows:
        assert float(ratio) == pytest.approx(float(formula), rel=0.05)
        assert float(scale) == pytest.approx(float(formula) ** -0.5, rel=0.05)
    assert "gb.check calls it BN008" in text
    noise = re.findall(r"^ *(16|64|256|1024) +([\d.]+) +([\d.]+) ", text, re.M)
    for size, multiplicative, additive in noise:
        assert float(additive) * int(size) == pytest.approx(1, rel=0.35)
        assert float(multiplicative) < float(additive)
    assert len(noise) == 4


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *(("repair.py", 60), ("watch_your_training.py", 40)),
        *((f"lecture/{path.name}", 65) for path in sorted((EXAMPLES / "lecture").glob("*.py"))),
    ],
)
def test_an_example_is_short(name, most):
    assert len((EXAMPLES / name).read_text().splitlines()) <= most
