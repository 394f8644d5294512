"""Verdicts checked by plain scripts of PyTorch's own layers, written from the registry's words.

The scripts lie in tests/independent and know nothing of gammabeta. Those that need no images are
compared with rows measured on the spot; all of them with the verdicts of the kept rows, where there
are some and MNIST is at hand: overlapping intervals, and the same direction where both tell one.
GAMMABETA_SLOW=1 asks for the scripts that train as well, and for every draw of the others.
"""

import ast
import functools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from gammabeta.studies import _claims, _judge, initialization
from gammabeta.studies._data import VARIABLE, load
from gammabeta.studies._verdict import interval

HERE = Path(__file__).parent
SHARED = ["networks", "plain"]
SCRIPTS = sorted(
    path.stem for path in (HERE / "independent").glob("*.py") if path.stem not in SHARED
)
SLOW = bool(os.environ.get("GAMMABETA_SLOW"))
RESULTS = HERE.parent / "results"
# claim -> how its experiment names the script's cells, where it does otherwise
NAMES = {
    "bjorck-divergence": "10 layers: {}",
    "jacobian-one": "{}, (d): share in [0.5, 2], at the start",
    "weight-growth": "sigmoid",
}
# By chance 1 in 200 pairs of 95 % intervals do not overlap; numbers at rounding have no width.
ROUNDING = 1e-6


def source(script):
    return (HERE / "independent" / f"{script}.py").read_text()


NEED_IMAGES = [
    script for script in SCRIPTS if "mnist(" in source(script) or "images()" in source(script)
]
OWN_DATA = [script for script in SCRIPTS if script not in NEED_IMAGES]


@functools.cache  # two tests ask for it
def told(script):
    """What a script prints, by claim and cell."""
    arguments = [os.environ[VARIABLE]] if script in NEED_IMAGES else [] if SLOW else ["quick"]
    done = subprocess.run(
        [sys.executable, str(HERE / "independent" / f"{script}.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=1200 if SLOW else 280,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def disagreement(one, mean, lo, hi):
    """Why two measurements of one cell cannot both be right; "" if they can."""
    if one["lo"] > hi + ROUNDING or lo > one["hi"] + ROUNDING:
        return f"the intervals do not overlap: {one} and {mean:.4g} [{lo:.4g}, {hi:.4g}]"
    sides = {
        above
        for low, high in ((one["lo"], one["hi"]), (lo, hi))
        for above, tells in ((True, low > one["null"]), (False, high < one["null"]))
        if tells
    }
    return f"opposite directions: {one} and {mean:.4g}" if len(sides) > 1 else ""


def test_ten_claims_and_more_are_checked_by_scripts_that_do_not_know_the_package():
    tree = {script: ast.parse(source(script)) for script in [*SCRIPTS, *SHARED]}
    for script, parsed in tree.items():
        names = [
            name
            for node in ast.walk(parsed)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
        ]
        assert not any("gammabeta" in str(name) for name in names), script
    claims = {
        node.args[0].value
        for parsed in tree.values()
        for node in ast.walk(parsed)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tell"
    }
    assert len(claims) >= 10
    known = _claims.claims()
    assert all(known[claim].experiment for claim in claims)


def test_a_disagreement_is_seen():
    one = {"mean": 1.0, "lo": 0.5, "hi": 1.5, "null": 0.0}
    assert disagreement(one, 1.2, 0.9, 1.5) == ""
    assert "overlap" in disagreement(one, 2.0, 1.6, 2.4)
    assert "overlap" in disagreement(one, 0.0, -0.4, 0.4)
    assert disagreement(one, 0.4, -0.1, 0.9) == ""  # tells no direction
    wide = {"mean": 0.1, "lo": 0.05, "hi": 0.2, "null": 0.15}
    assert disagreement(wide, 0.18, 0.16, 0.2) == ""
    far = {"mean": -1.0, "lo": -2.0, "hi": -1e-7, "null": 0.0}
    assert "opposite" in disagreement(far, 1.0, 1e-7, 2.0)


@pytest.mark.parametrize("script", OWN_DATA)
def test_rows_measured_now_agree_with_a_plain_script(script):
    """Those claims whose networks see Gaussian data only."""
    if script == "mf_explosion" and not SLOW:
        pytest.skip("takes long: set GAMMABETA_SLOW=1; its kept rows are compared below")
    digits = load("digits")
    found = told(script)
    (claim,) = {one["claim"] for one in found}
    values = {}
    for seed in range(5):
        for row in initialization.measure({"claim": claim}, seed, "small", digits):
            if row["kind"] == "value":
                values.setdefault(row["cell"], []).append(row["value"])
    assert found
    for one in found:
        i = interval(values[one["cell"]])
        assert i.mean == pytest.approx(statistics.fmean(values[one["cell"]]))
        assert disagreement(one, i.mean, i.lo, i.hi) == ""


@functools.cache  # an experiment is judged as a whole
def judged(experiment):
    return _judge.judge([RESULTS], [experiment]).verdicts


def kept_cells(claim):
    """Cells of a claim's verdict from the kept rows."""
    experiment = _claims.claims()[claim].experiment
    assert experiment is not None
    if not (RESULTS / f"{experiment}.jsonl.gz").exists():
        pytest.skip(f"no rows of {experiment} are kept in results/ yet")
    (verdict,) = [v for v in judged(experiment) if v.claim == claim]
    return verdict.cells


def cell_of(one, cells):
    """The cell of a verdict that a script's number is about."""
    name = NAMES.get(one["claim"], "{}").format(one["cell"])
    part = one["cell"] if one["claim"] == "weight-growth" else None
    found = [
        cell
        for cell in cells
        if (cell["name"] == name or cell["name"].startswith(f"{name} ("))
        and (part is None or part in cell["part"])
        and cell["effect"] is not None
    ]
    assert found, f"no cell {name} among {[cell['name'] for cell in cells]}"
    return found[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_verdicts_agree_with_a_plain_script(script):
    """Kept rows on MNIST; on other data their cells are of another network."""
    if script in NEED_IMAGES and not os.environ.get(VARIABLE):
        pytest.skip(f"needs MNIST: set {VARIABLE}")
    if script in NEED_IMAGES and not SLOW:
        pytest.skip("trains for a minute: set GAMMABETA_SLOW=1")
    tree = ast.parse(source(script))
    first = next(
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "tell"
    )
    kept_cells(first)  # skips before anything is trained
    for one in told(script):
        cell = cell_of(one, kept_cells(one["claim"]))
        assert disagreement(one, cell["effect"], cell["lo"], cell["hi"]) == ""
