"""The digest that names rows: it changes where a number could, and nowhere else."""

import re
from pathlib import Path

import pytest

from gammabeta.studies import _reach
from gammabeta.studies._experiments import BUDGETS, experiments

STUDIES = Path(_reach.__file__).parent
EXPERIMENT = '''
"""A protocol."""

import helper
from helper import twice as double

CLAIMS = ("some",)
PLANS = {"small": (1, 2), "full": (3, 4)}
TUNING_SEEDS = (800, 801)
SHOWN = 3


def cells(budget, data, seeds, rows):
    return list(range(TUNING_SEEDS[0]))


def measure(arm, seed, budget, data):
    """One cell."""
    steps = PLANS[budget]  # of this budget
    if len(TUNING_SEEDS) > 5:
        return []
    return [{"value": double(steps[0]) + helper.once(arm["k"])}]


def figures(rows):
    return [SHOWN]
'''
HELPER = '''
STEP = 1
UNUSED = 2


def twice(x):
    """Of a number."""
    return 2 * x * STEP


def once(x):
    return x


def drawn(x):
    return twice(x) + UNUSED
'''


@pytest.fixture
def digest(tmp_path):
    """The digest with these texts put in place of others, in the experiment or its helper."""

    def of(old="", new="", budget="small"):
        for name, text in (("thing.py", EXPERIMENT), ("helper.py", HELPER)):
            assert not old or old in EXPERIMENT + HELPER
            (tmp_path / name).write_text(text.replace(old, new) if old else text)
        return _reach.code_digest(tmp_path / "thing.py", budget)

    return of


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # of this budget", ""),
        ("A protocol.", "Another one.\n\nIn two paragraphs."),
        ("One cell.", "One cell, measured."),
        ("Of a number.", "Of any."),
        ("return [SHOWN]", "return [SHOWN, 1]"),
        ("SHOWN = 3", "SHOWN = 4"),
        ("(800, 801)", "(800, 801, 802)"),
        ("return list(range(TUNING_SEEDS[0]))", "return []"),
        ("UNUSED = 2", "UNUSED = 3"),
        ('"full": (3, 4)', '"full": (5, 4)'),
        ("def drawn(x):\n    return", "def drawn(x):\n    # more\n    return 1 +"),
        ("\n\n\ndef once", "\n\n\n\n\ndef once"),
    ],
)
def test_what_reaches_no_number_leaves_the_digest(digest, old, new):
    assert digest(old, new) == digest()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("steps[0]", "steps[1]"),
        ('"small": (1, 2)', '"small": (1, 3)'),
        ("STEP = 1", "STEP = 2"),
        ("return 2 * x", "return 3 * x"),
        ("def once(x):\n    return x", "def once(x):\n    return x + 1"),
        ("UNUSED = 2\n", "UNUSED = 2\nprint('imported')\n"),
        ("def drawn(x)", "@once\ndef drawn(x)"),  # whatever that does when it is imported
    ],
)
def test_what_reaches_a_number_changes_the_digest(digest, old, new):
    assert digest(old, new) != digest()


def test_a_budget_counts_for_itself_alone(digest):
    before = {budget: digest(budget=budget) for budget in BUDGETS}
    assert before["small"] != before["full"]
    assert digest('"small": (1, 2)', '"small": (1, 3)', "full") == before["full"]


def test_a_public_name_leads_to_the_part_that_defines_it(tmp_path):
    file = tmp_path / "thing.py"
    file.write_text("import gammabeta\n\ndef measure(arm):\n    return gammabeta.check(arm)\n")
    parts = {place.split("/")[0] for place in _reach.reached(file)}
    assert {"thing.py: measure", "_check", "layers", "ops"} <= parts


def test_without_a_measure_the_whole_file_counts(tmp_path):
    (tmp_path / "thing.py").write_text("x = 1\n")
    before = _reach.code_digest(tmp_path / "thing.py")
    (tmp_path / "thing.py").write_text("x = 2\n")
    assert _reach.code_digest(tmp_path / "thing.py") != before


@pytest.mark.parametrize("name", sorted(experiments()))
def test_an_experiment_reaches_what_it_measures_with_and_not_what_judges(name):
    file = STUDIES / f"{name.replace('-', '_')}.py"
    places = set(_reach.reached(file, "small"))
    assert f"studies/{file.name}: measure" in places
    assert any(place.startswith("ops/") for place in places)
    assert not any(
        re.search(r"studies/_(verdict|claims|joint|answer|outcomes|page)\.py", p) for p in places
    )
    assert not any(p.endswith((": judge", ": figures", ": cells")) for p in places)


def test_every_module_of_the_package_that_a_measurement_imports_is_found():
    """Names that a definition reads, and that are imported from the studies, are all followed."""
    places = _reach.reached(STUDIES / "covariate_shift.py", "small")
    for part in ("deep", "linear", "inputs", "exact"):
        assert any(p.startswith(f"studies/_covariate_shift/{part}.py") for p in places), part
    assert any(p.startswith("probes/") for p in places)
    assert "studies/_train.py: stream" in places
    assert "studies/_nets.py: MLP" in places
