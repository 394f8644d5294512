"""The headline claims in brief and varied: which cells, what they measure, and what they tell."""

import collections
import dataclasses
import importlib
import shutil
from pathlib import Path

import pytest
import torch

from gammabeta import _runs
from gammabeta.studies import (
    _card,
    _data,
    _headline,
    _holds,
    _judge,
    _kept,
    _nets,
    _reach,
    _run,
    _variations,
    activations,
    batch_size,
    order,
    regularization,
)
from gammabeta.studies._claims import claims
from gammabeta.studies._experiments import BRIEF, VARIATIONS, experiments
from gammabeta.studies._headline import Chosen
from gammabeta.studies._verdict import Verdict, equivalence, few_seeds
from tests.simulated import noise

RESULTS = Path(__file__).parents[1] / "results"
DIGITS = _data.load("digits")
# rates and seeds that no acceptance changes
GUESS = {
    "covariate-shift": Chosen({"deep": {"none": 0.1, "bn": 0.3, "noisy": 1.0}}, {"fair": 9}, {}),
    "smoothness": Chosen({"deep": {"none": 0.1, "bn": 0.3, "l1": 0.3, "linf": 0.3}}, {}, {}),
    "learning-rate": Chosen(
        {group: {"bn": 1.0, "none": 0.1} for group in ("deep", "shallow")}, {"fair": 16}, {}
    ),
    "regularization": Chosen(
        {
            "dropout": dict.fromkeys(regularization.DROPOUT, 0.3),
            "noise": {"none": 0.3, "bn": 1.0, "full": 3.0},
        },
        {"dropout": 8, "noise": 7},
        {"bn": "0.2 last", "none": "0.5 both"},
    ),
    "order": Chosen({g: {"before": 0.3, "after": 1.0} for g in order.NETWORKS}, {"fair": 6}, {}),
}
ARMS = {
    "activations": 10 + 20,
    "batch-size": 6 + 8,
    "jacobians": 2 + 4,
    "initialization": 1,
    "covariate-shift": 3,
    "smoothness": 2 + 2,
    "learning-rate": 3,
    "regularization": 4 + 3,
    "order": 12,
}


@pytest.fixture
def all_chosen(monkeypatch):
    found = _headline.chosen() | GUESS
    monkeypatch.setattr(_headline, "chosen", lambda: found)


def wanted(name, kind, seeds=None):
    return experiments()[name].cells(kind, "mnist", seeds, [])


def seeds_of(cells):
    by = collections.defaultdict(set)
    for cell in cells:
        by[tuple(cell.arm.items())].add(cell.seed)
    return by


# -- what was chosen, and what is run ------------------------------------------------------------


def test_the_rates_are_those_that_the_accepted_rows_chose():
    text = Path(_headline.__file__).with_name(_headline.FILE).read_text(encoding="utf-8")
    assert text == _headline.written(RESULTS)


@pytest.mark.parametrize("name", list(ARMS))
def test_every_training_in_brief_is_one_of_the_accepted_ones(name):
    """By the arms themselves, in which the experiment has put the rates that it chose."""
    accepted = [
        c.spec
        for c in _runs.read_packed(RESULTS / f"{name}.jsonl.gz")
        if c.spec["budget"] in ("small", "full")
    ]
    assert accepted
    for arm in seeds_of(wanted(name, BRIEF)):
        assert any(tuple(sorted(spec["arm"].items())) == tuple(sorted(arm)) for spec in accepted)


@pytest.mark.parametrize("kind", [BRIEF, "fresh-seeds", "width-half", "images-small"])
@pytest.mark.parametrize("name", list(ARMS))
def test_the_main_runs_of_the_headline_claims_are_wanted_and_nothing_else(name, kind, all_chosen):
    by = seeds_of(wanted(name, kind))
    if kind in (BRIEF, "fresh-seeds"):
        assert len(by) == ARMS[name]
    else:
        assert "published" not in {dict(arm).get("part") for arm in by}
        assert len(by) == {"activations": 10, "batch-size": 6, "jacobians": 2,
                           "smoothness": 2}.get(name, ARMS[name])  # fmt: skip
    changes = _variations.CHANGES[kind]
    for arm, seeds in by.items():
        fields = dict(arm)
        assert changes.items() <= fields.items()
        unit = _headline.unit(name, fields)
        count = {
            BRIEF: 5,
            "fresh-seeds": _headline.chosen()[name].seeds.get(unit, 5),
        }.get(kind, 8 if (name, unit) in _headline._MORE else 5)
        assert seeds == {100 + k for k in range(count)}
        assert "tuning" not in unit
    assert {len(s) for s in seeds_of(wanted(name, kind, 3)).values()} == {3}


def test_no_kind_takes_a_seed_that_accepted_rows_had_or_that_chose_rates(tmp_path):
    for name in ("activations", "grid"):
        cells = _runs.read_packed(RESULTS / f"{name}.jsonl.gz")
        assert not {cell.spec["seed"] for cell in cells} & set(range(100, 800))
    with pytest.raises(ValueError, match="at most 700 with brief, got 701"):
        _run.run(["activations"], out=tmp_path, budget=BRIEF, data="digits", seeds=701)


def test_the_small_rate_and_the_chosen_dropout_are_compared(all_chosen):
    deep = {(c.arm["arm"], c.arm["rate"]) for c in wanted("learning-rate", BRIEF)}
    assert deep == {("none", 0.1), ("bn", 0.1), ("bn", 1.0)}
    dropouts = {c.arm["arm"] for c in wanted("regularization", BRIEF)}
    assert {"bn, 0.2 last", "bn, no dropout", "none, 0.5 both"} < dropouts


def test_other_experiments_have_no_brief(monkeypatch):
    assert wanted("grid", BRIEF) == []
    (reason,) = _headline.lacking(["grid"], BRIEF)
    assert "decides no headline claim" in reason
    headline = {claim.id for claim in claims().values() if claim.headline}
    assert {claim for own in _headline.decided().values() for claim in own} == headline
    assert set(ARMS) == set(_headline.decided()) == set(_headline.chosen())
    monkeypatch.setattr(_headline, "chosen", dict)
    assert wanted("order", BRIEF) == []
    (reason,) = _headline.lacking(["order"], BRIEF)
    assert "no accepted rows at small yet" in reason


# -- what is measured ------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch):
    """The widths of the networks that are made, each followed by nothing more."""
    found = []

    class Recorded(_nets.MLP):
        def __init__(self, sizes, *args, **options):
            found.append(tuple(sizes))
            super().__init__(sizes, *args, **options)

    for name in ("_nets", "_variations", "_initialization.depth"):
        module = importlib.import_module(f"gammabeta.studies.{name}")
        monkeypatch.setattr(module, "MLP", Recorded)
    return found


@pytest.mark.parametrize(("kind", "units"), [("width-half", 50), ("width-double", 200)])
@pytest.mark.parametrize("name", ["activations", "batch-size", "jacobians", "initialization"])
def test_networks_that_know_no_width_are_made_with_another(name, kind, units, built, monkeypatch):
    experiment = experiments()[name]
    module = importlib.import_module(experiment.module)
    if hasattr(module, "PLANS"):
        monkeypatch.setitem(module.PLANS, "small", module.PLANS["tiny"])
    place, attribute = _variations._MADE[name]
    before = getattr(importlib.import_module(place), attribute)
    cell = wanted(name, kind)[0]
    rows = iter(experiment.measure(cell.arm, cell.seed, kind, DIGITS))
    next(rows)
    rows.close()
    assert {size for sizes in built for size in sizes[1:-1]} == {units}
    assert {(sizes[0], sizes[-1]) for sizes in built} == {(64, 10)}
    assert getattr(importlib.import_module(place), attribute) is before


def test_fresh_seeds_measure_what_small_does_and_brief_less(monkeypatch):
    small = activations.PLANS["small"]._replace(fair_steps=20, images=500)
    monkeypatch.setitem(activations.PLANS, "small", small)
    monkeypatch.setitem(_variations.SHORTER["activations"], "fair_steps", 10)
    experiment, cell = experiments()["activations"], wanted("activations", "fresh-seeds")[0]
    own = list(activations.measure(cell.arm, cell.seed, "small", DIGITS))
    assert list(experiment.measure(cell.arm, cell.seed, "fresh-seeds", DIGITS)) == own
    brief = list(experiment.measure(cell.arm, cell.seed, BRIEF, DIGITS))
    assert (own[-1]["step"], brief[-1]["step"]) == (20, 10)
    assert activations.PLANS["small"] is small
    with pytest.raises(ValueError, match="activation must be one of"):
        list(experiment.measure({**cell.arm, "activation": "none"}, 0, BRIEF, DIGITS))
    assert activations.PLANS["small"] is small


def test_every_shorter_plan_is_one():
    for name, fields in _variations.SHORTER.items():
        module = importlib.import_module(experiments()[name].module)
        with _variations.planned(name, module, BRIEF):
            short = module.PLANS["small"]
        small = module.PLANS["small"]
        assert short == small._replace(**fields) != small
        for field, value in fields.items():
            steps = getattr(small, field)
            pairs = [(value, steps)]
            if isinstance(value, dict):
                pairs = [(value[key], steps[key]) for key in steps]
            assert all(0 < less <= more for less, more in pairs)
            assert any(less < more for less, more in pairs)


def test_images_are_halved_turned_and_noisy_and_the_digits_refused():
    images = torch.full((3, 28, 28), 200, dtype=torch.uint8)
    data = _data.Images("mnist", "0" * 16, images, torch.arange(3), images[:2], torch.arange(2))
    found = _variations.hard(data)
    assert (found.train_x.shape, found.test_x.shape) == ((3, 14, 14), (2, 14, 14))
    assert found.train_x.float().std() > 10
    assert not torch.equal(found.train_x[0], found.train_x[1])
    assert found.train_y is data.train_y
    with pytest.raises(ValueError, match="halves the images of MNIST, got digits"):
        _variations.hard(DIGITS)


def test_the_code_of_varied_cells_covers_what_varies_them():
    experiment = experiments()["activations"]
    varied = experiment.code_of(BRIEF)
    assert varied == experiment.code_of("width-half") != experiment.code_of("small")
    places = _reach.reached(Path(_variations.__file__))
    assert {f"studies/_variations.py: {name}" for name in ("SHORTER", "hard", "_m2")} <= set(places)


# -- verdicts ----------------------------------------------------------------------------------


def rows_of(name, kind, score, seeds=None, data="mnist"):
    """Rows of all wanted cells: accuracy in percent by arm, with a little noise."""
    found = []
    for cell in wanted(name, kind, seeds):
        accuracy = (score(cell.arm) + noise(cell.seed, *cell.arm.values(), sd=0.02)) / 100
        head = {**cell.arm, "seed": cell.seed, "budget": kind, "data": data}
        found += [
            {**head, "step": step, "accuracy": accuracy, "train_accuracy": 1.0, "diverged": False}
            for step in (1, 2, 3)
        ]
    return found


def judged(name, kind, score, seeds=None, data="mnist"):
    found = experiments()[name].judge(rows_of(name, kind, score, seeds, data))
    assert [v.claim for v in found] == _headline.decided()[name] or name != "activations"
    return {v.claim: v for v in found}


def with_bn(arm):
    return 91.0 + (arm.get("norm") == "bn")


def test_a_brief_verdict_says_that_it_is_a_quick_look():
    verdict = judged("activations", BRIEF, with_bn)["act-all"]
    assert (verdict.status, verdict.budget, verdict.n) == ("supported", BRIEF, 5)
    assert verdict.published_status == "supported"
    assert _headline.NOTICE in verdict.notes
    assert "no accepted verdict" in _headline.NOTICE
    assert any(note.startswith("Learning rates chosen, with and") for note in verdict.notes)
    steps = _variations.SHORTER["activations"]["published_steps"]
    assert f"As published, but {steps:,} steps for the source's 40,000." in verdict.notes
    assert judged("activations", BRIEF, lambda arm: 91.0)["act-all"].status == "refuted"
    assert judged("activations", BRIEF, with_bn, data="digits")["act-all"].status == "demo"


def test_a_variation_is_judged_by_the_full_rule_and_says_what_it_is():
    verdict = judged("activations", "width-half", with_bn)["act-all"]
    assert (verdict.status, verdict.budget, verdict.n) == ("supported", "width-half", 5)
    assert verdict.sentence.startswith("Half the width: Yes")
    assert "A variation of the accepted runs: half the width." in verdict.notes
    assert _headline.NOTICE not in verdict.notes
    assert verdict.published_status is None
    assert not any("ublished" in note for note in verdict.notes)
    assert verdict.n < judged("activations", "fresh-seeds", with_bn)["act-all"].n


def larger_rate(arm):
    """Batch normalization gains at its own rate alone."""
    return 93.0 if (arm["arm"], arm["rate"]) == ("bn", 1.0) else 91.0


def test_five_seeds_are_enough_in_brief_alone(all_chosen):
    brief = judged("learning-rate", BRIEF, larger_rate)["bjorck-lr"]
    assert (brief.status, brief.n) == ("supported", 5)
    five = judged("learning-rate", "width-half", larger_rate, seeds=5)["bjorck-lr"]
    assert five.status == "inconclusive"
    assert "5 of at least 8 seeds" in five.sentence
    eight = judged("learning-rate", "width-half", larger_rate)["bjorck-lr"]
    assert (eight.status, eight.n) == ("supported", 8)
    values = [0.0, 0.1, -0.1, 0.05, 0.0]
    assert equivalence(values, 0.5, 8).status == "inconclusive"
    with few_seeds(5):
        assert equivalence(values, 0.5, 8).status == "supported"
        assert equivalence(values[:4], 0.5, 8).status == "inconclusive"
    assert equivalence(values, 0.5, 8).status == "inconclusive"


def test_searches_that_were_not_made_lead_to_the_chosen_rates(all_chosen):
    for name in ARMS:
        row = {"step": 1, "seed": 100, "budget": BRIEF, "data": "mnist", "kind": "none"}
        for verdict in experiments()[name].judge([row | {"claim": "vanishing-depth"}]):
            assert verdict.claim in _headline.decided()[name]
            assert not any("tuning runs" in note for note in verdict.notes)
    dropout = judged("regularization", BRIEF, lambda arm: 91.0)["no-dropout"]
    assert "Best dropout: 0.2 last with BN, 0.5 both without." in dropout.notes
    afterwards = judged("order", BRIEF, lambda arm: 91.0 + (arm["arm"] == "after"))
    assert (afterwards["bn-order"].status, list(afterwards)) == ("supported", ["bn-order"])
    ghosts = judged("batch-size", BRIEF, lambda arm: 91.0 - (arm["ghost"] == 4))["batch-small"]
    assert ghosts.effect == pytest.approx(1.0, abs=0.05)


def test_no_figure_shows_a_search_that_was_not_made():
    rows = rows_of("activations", BRIEF, with_bn)
    shown = {figure["id"] for figure in experiments()["activations"].figures(rows)}
    assert "activations-fair" in shown
    assert "activations-tuning" not in shown
    varied = rows_of("activations", "width-half", with_bn, seeds=2)
    assert experiments()["activations"].figures(varied) == []


def verdict_of(claim, status, budget="small", **more):
    own = claims()[claim].experiment
    head = (claim, own, status, None, 1.0, (0.5, 1.5), 5, "points", "", budget, "mnist", 0.3, 0.5)
    return Verdict(*head, None, "Yes.", p=0.01, **more)


def test_in_brief_nothing_is_corrected_and_the_expected_false_are_counted():
    both = [verdict_of(c, "supported", BRIEF) for c in ("act-all", "bn-order")]
    verdicts, counted = _judge.corrected(both)
    assert verdicts == both
    assert (counted.expected_false, counted.supported) == (0.1, 2)
    assert "nothing is corrected" in counted.how
    alone, _ = _judge.corrected([dataclasses.replace(v, budget="width-half") for v in both])
    assert {v.status for v in alone} == {"supported"}
    for whole in ("small", "fresh-seeds"):
        found, _ = _judge.corrected([dataclasses.replace(v, budget=whole) for v in both])
        assert {v.status for v in found} == {"inconclusive"}  # 12 times 0.01


# -- in how many variations a verdict holds ----------------------------------------------------


@pytest.mark.parametrize(
    ("status", "elsewhere", "letter", "held"),
    [
        ("supported", ["supported"] * 4, "B", 4),
        ("refuted", ["refuted", "refuted", "inconclusive", "refuted"], "B", 3),
        ("supported", ["supported", "supported", "inconclusive", "refuted"], "C", 2),
        ("supported", ["supported", "supported"], "C", 2),
        ("mixed", ["mixed", "mixed", "mixed", "supported"], "B", 3),
        ("inconclusive", ["inconclusive"] * 4, "D", None),
        ("exact", [], "A", None),
        ("refuted", [], "C", None),
    ],
)
def test_certainty_is_what_variations_leave_of_a_verdict(status, elsewhere, letter, held):
    by = dict(zip(VARIATIONS, elsewhere, strict=False))
    (found,) = _holds.certain([verdict_of("act-all", status)], {"act-all": by} if by else {})
    assert found.certainty == letter
    if held is None:
        assert found.variations == ""
    else:
        names = "twice the width; 14 x 14, turned, noisy"
        absent = "" if len(by) == 4 else f" (2 of 4 not run: {names})"
        start = f"Holds in {held} of {len(by)} variations tried{absent}: fresh seeds "
        assert found.variations.startswith(start)


@pytest.fixture
def few_arms(monkeypatch):
    """Two networks of the experiment on activations, trained for a few steps."""
    monkeypatch.setattr(
        _headline, "needed", lambda _, arm: (arm["part"], arm["activation"]) == ("fair", "relu")
    )
    short = activations.PLANS["tiny"]._replace(decides=True)
    monkeypatch.setitem(activations.PLANS, "small", short)


def test_rows_of_variations_are_kept_beside_the_accepted_ones(tmp_path, few_arms):
    runs, results = [], tmp_path / "results"
    for kind in ("fresh-seeds", "width-half", BRIEF):
        runs.append(tmp_path / kind)
        result = _run.run(
            ["activations"], out=runs[-1], budget=kind, data="digits", seeds=2, jobs=1
        )
        assert (result.done, result.failed) == (4, ())
        (verdict,) = _judge.judge([runs[-1]]).verdicts
        assert (verdict.claim, verdict.budget, verdict.status) == ("act-all", kind, "demo")
    assert "quick look" in _judge.judge([runs[2]]).notice
    claim = claims()["act-all"]
    (varied, brief) = (_card.card(claim, [run]) for run in runs[1:])
    assert "study run act-all --variant width-half --data digits" in varied.make
    assert "study run act-all --budget brief --data digits" in brief.make
    assert "An accepted verdict: these rows are a quick look." in brief.missing
    with pytest.raises(ValueError, match="brief are a quick look"):
        _kept.accept(runs[2:], results, data="digits")
    (kept,) = _kept.accept(runs[:2], results, data="digits")
    assert kept.path == results / "robustness" / "activations.jsonl.gz"
    assert (kept.cells, not list(results.glob("*.gz"))) == (8, True)
    first = kept.path.read_bytes()
    (again,) = _kept.accept(runs[1:2], results, data="digits")
    assert (again.cells, kept.path.read_bytes()) == (8, first)
    rows = [row for cell in _runs.read_packed(kept.path) for row in cell.rows]
    assert all(len(f"{row['loss']:.9g}".replace(".", "")) <= 8 for row in rows)
    assert _holds.folders([results / "activations.jsonl.gz", results]) == [results / "robustness"]


def test_the_page_tells_what_holds():
    from gammabeta.studies import _page

    by = dict.fromkeys(VARIATIONS, "supported") | {"width-half": "refuted"}
    varied = {"act-all": by}
    verdicts = _holds.certain([verdict_of("act-all", "supported")], varied)
    judged = _judge.Judged(verdicts, [], [], None, {}, None, varied)
    text = _page.write([], judged, {})
    row = "| act-all | supported | supported | refuted | supported | supported | 3 of 4 | B |"
    assert row in text
    assert (
        "The same verdict as the accepted rows: fresh seeds 1 of 1; half the width 0 of 1" in text
    )
    assert "- Certainty: B. Holds in 3 of 4 variations tried: fresh seeds supported; half" in text


def test_batch_size_names_its_arms_as_the_rates_do():
    for group, arms in _headline.chosen()["batch-size"].rates.items():
        assert set(arms) == set(batch_size.TUNED[group])


def test_accepted_rows_taken_for_a_variation_give_the_accepted_verdict_again(tmp_path):
    """The same trainings, with the search given by its result: effect and interval are the same."""
    name = "activations"
    shutil.copy(RESULTS / f"{name}.jsonl.gz", tmp_path)
    cells = [
        cell._replace(spec=spec, rows=_kept._lean(cell.rows))
        for cell in _runs.read_packed(RESULTS / f"{name}.jsonl.gz")
        if cell.spec["budget"] == "full" and _headline.needed(name, cell.spec["arm"])
        for spec in [{**cell.spec, "seed": cell.spec["seed"] + 100, "budget": "fresh-seeds"}]
    ]
    _runs.write_packed(tmp_path / "robustness", name, _runs.pack(cells, "0.1.0"))
    accepted, more = _judge.judge([tmp_path], [name]).verdicts
    (again,) = _judge.judge([tmp_path / "robustness"]).verdicts
    assert (again.claim, again.status, again.n) == ("act-all", accepted.status, accepted.n)
    assert again.published_status == accepted.published_status
    assert again.ci == pytest.approx(accepted.ci, rel=1e-4)
    assert accepted.certainty == "C"
    status = f"fresh seeds {accepted.status}."
    start = "Holds in 1 of 1 variations tried (3 of 4 not run: half the width; "
    assert accepted.variations.startswith(start)
    assert accepted.variations.endswith(f": {status}")
    assert (more.claim, more.certainty, more.variations) == ("act-sigmoid-most", "C", "")
