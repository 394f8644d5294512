"""Fresh seeds for undecided claims: which, how many, and judged by them alone."""

import dataclasses
import os
import pickle

import numpy as np
import pytest

from gammabeta import _runs
from gammabeta.studies import _kept, _run, _second, _verdict
from gammabeta.studies._experiments import SECOND, Experiment, experiments
from gammabeta.studies._judge import judge
from gammabeta.studies._verdict import Verdict


def verdict(claim="precise-bn", **fields):
    plain = {
        "claim": claim,
        "experiment": "population",
        "status": "inconclusive",
        "published_status": None,
        "effect": 0.2,
        "ci": (-0.1, 0.5),
        "n": 16,
        "unit": "points",
        "reported": "",
        "budget": "small",
        "data": "mnist",
        "delta": 0.3,
        "half_width": 0.3,
        "planned_half_width": None,
        "sentence": "Undecided.",
        "n_needed": 20,
    }
    return Verdict(**{**plain, **fields})


@pytest.mark.parametrize(
    ("needed", "seeds"), [(3, 16), (8, 16), (9, 18), (100, 200), (128, 256), (129, None)]
)
def test_twice_as_many_seeds_as_would_decide_within_limits(needed, seeds):
    sample = _second.asked(verdict(n_needed=needed))
    assert (sample and sample.seeds) == seeds


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"status": "refuted"}, "is decided: refuted"),
        ({"status": "mixed"}, "is decided: mixed"),
        ({"claim": "no-dropout"}, "headline claim"),
        ({"claim": "no-dropout", "status": "supported"}, "headline claim"),  # before Holm
        ({"claim": "keep-consistent"}, "decided by one"),
        ({"n_needed": None}, "does not say how many"),
        ({"n_needed": 423}, "about 423 seeds, more than 128"),
        ({"data": "digits", "status": "demo"}, "judged on digits"),
        ({"budget": "full"}, "at full"),
    ],
)
def test_other_verdicts_get_none_and_say_why(fields, why):
    assert _second.asked(verdict(**fields)) is None
    assert why in _second.reason_against(verdict(**fields))


def cell(experiment, arm, seed, value, budget):
    rows = [{"kind": "value", "cell": "ReLU", "value": value}]
    rows += [{"kind": "value", "cell": name, "value": 0.1} for name in ("linear", "tanh")]
    code = experiment.code_of(budget)
    spec = {
        "schema": _runs.SCHEMA,
        "experiment": experiment.id,
        "arm": arm,
        "seed": seed,
        "budget": budget,
        "data": {"name": "mnist", "digest": "0" * 16},
        "code": code,
    }
    return spec, rows


ARM = {"claim": "ortho-isometry"}


@pytest.fixture
def first(tmp_path):
    """A first stage whose interval reaches over the limit at 0.8."""
    experiment = experiments()["initialization"]
    folder = tmp_path / "first"
    values = {seed: 0.6 + 0.24 * (seed % 2) for seed in (*range(8), 900, 901, 902, 903)}
    write(folder, [cell(experiment, ARM, seed, v, "small") for seed, v in values.items()])
    return folder


def write(folder, cells):
    from gammabeta.studies import _claims

    folder.mkdir()
    head = {"schema": _runs.SCHEMA, "gammabeta": "0", "claims": _claims.public()}
    _runs.write_json(folder / "claims.json", head)
    for spec, rows in cells:
        made = {"versions": {"torch": "2"}, "cpu_seconds": 0.1}
        _runs.write_cell(folder, spec | made, rows, "", False)


def again(tmp_path, seeds, value=0.9, spread=0.02):
    experiment = experiments()["initialization"]
    folder = tmp_path / f"second-{seeds}-{value}"
    cells = [cell(experiment, ARM, 200 + k, value + spread * (k % 2), SECOND) for k in range(seeds)]
    write(folder, cells)
    return folder


def found(*paths):
    (own,) = [v for v in judge(paths).verdicts if v.claim == "ortho-isometry"]
    return own


def test_the_second_sample_decides_alone_and_the_first_is_told(first, tmp_path):
    before = found(first)
    assert before.status == "inconclusive"
    assert before.stage == 1
    sample = _second.asked(before)
    after = found(first, again(tmp_path, sample.seeds))
    assert (after.status, after.stage, after.n) == ("supported", 2, sample.seeds)
    assert after.effect == pytest.approx(0.91)  # not a mean with the first stage's 0.72
    assert "undecided (0.72," in after.notes[0]
    assert f"about {before.n_needed}" in after.notes[0]


def test_a_second_sample_may_refute_or_leave_undecided(first, tmp_path):
    seeds = _second.asked(found(first)).seeds
    assert found(first, again(tmp_path, seeds, 0.3)).status == "refuted"
    still = found(first, again(tmp_path, seeds, 0.6, 0.4))
    assert (still.status, still.stage) == ("inconclusive", 2)


def test_an_unfinished_second_sample_decides_nothing(first, tmp_path):
    seeds = _second.asked(found(first)).seeds
    assert found(first, again(tmp_path, seeds - 1)).stage == 1


def test_a_second_sample_of_other_code_or_images_decides_nothing(first, tmp_path):
    seeds = _second.asked(found(first)).seeds
    whole = again(tmp_path, seeds)
    experiment = experiments()["initialization"]
    before = _runs.read_cells([first])
    verdicts = experiment.judge([row for cell in before for row in cell.flat()])
    for key, other in (("code", "f" * 16), ("data", {"name": "mnist", "digest": "1" * 16})):
        after = [c._replace(spec={**c.spec, key: other}) for c in _runs.read_cells([whole])]
        assert all(v.stage == 1 for v in _second.judged(experiment, before, after, verdicts))
    same = _second.judged(experiment, before, _runs.read_cells([whole]), verdicts)
    assert [v.claim for v in same if v.stage == 2] == ["ortho-isometry"]


def test_rows_of_a_second_stage_alone_decide_nothing(first, tmp_path):
    assert judge([again(tmp_path, 16)]).verdicts == []


def test_what_is_published_is_that_of_the_first_stage_alone():
    def with_published(status):
        part = {"name": "a", "part": "published, x", "status": status}
        return dataclasses.replace(
            verdict("ortho-isometry", status="inconclusive", published_status=status),
            cells=[{"name": "a", "part": "fair", "status": "inconclusive"}, part],
            notes=["The pilot asked for 9 seeds.", f"As published, x: {status}."],
        )

    both = with_published("supported"), with_published("inconclusive")
    own = _second._joined(*both, _second.Asked("ortho-isometry", "initialization", 40))
    assert own.published_status == "supported"
    assert [c["status"] for c in own.cells] == ["inconclusive", "supported"]
    assert own.notes[1:] == ["As published, x: supported."]
    same = [dataclasses.replace(v, cells=v.cells[:1]) for v in both]  # no setting but the fair one
    assert _second._joined(*same, _second.Asked("a", "b", 40)).published_status == "inconclusive"


def test_a_decided_claim_takes_no_second_sample(tmp_path):
    experiment = experiments()["initialization"]
    write(tmp_path / "sure", [cell(experiment, ARM, s, 0.95 + 0.01 * (s % 2), "small") for s in
                              (*range(8), 900, 901, 902, 903)])  # fmt: skip
    own = found(tmp_path / "sure", again(tmp_path, 64, 0.3))
    assert (own.status, own.stage) == ("supported", 1)


def test_two_tests_count_twice_among_the_expected_false(first, tmp_path):
    seeds = _second.asked(found(first)).seeds
    second = again(tmp_path, seeds)
    one, two = judge([first]).multiplicity, judge([first, second]).multiplicity
    assert two.expected_false == pytest.approx(one.expected_false + 0.05)


def test_the_plan_has_fresh_seeds_and_only_the_arms_that_decide(first):
    samples, _ = _second.samples([first], None)
    assert [sample.claim for sample in samples] == ["ortho-isometry"]
    (plan,) = _second.catalogue([first], samples).values()
    assert {repr(c.arm) for c in plan.wanted} == {repr(ARM)}
    assert [c.seed for c in plan.wanted] == list(range(200, 200 + samples[0].seeds))
    assert type(pickle.loads(pickle.dumps(plan))) is Experiment  # a worker needs no plan


def test_there_is_no_third_stage(first, tmp_path):
    (sample,), _ = _second.samples([first], None)
    done = again(tmp_path, sample.seeds, 0.6, 0.4)  # undecided again
    none, against = _second.samples([first, done], None)
    assert none == []
    assert "There is no third" in against["ortho-isometry"]


def test_its_cells_are_those_of_small_under_a_name_of_their_own(first):
    experiment = experiments()["initialization"]
    assert experiment.code_of(SECOND) == experiment.code_of("small")
    assert experiment.cells(SECOND, "mnist", None, []) == []


@pytest.mark.skipif("GAMMABETA_DATA" not in os.environ, reason="needs MNIST: set GAMMABETA_DATA")
def test_run_accept_and_judge_with_real_cells(first, tmp_path):
    samples, _ = _second.samples([first], None)
    few = [dataclasses.replace(found(first), n_needed=8)]
    sample = _second.asked(few[0])
    catalogue = _second.catalogue([first], [sample])
    out = tmp_path / "run"
    options = {"out": out, "budget": SECOND, "data": "mnist", "jobs": 1}
    result = _run.run(["initialization"], catalogue=catalogue, **options)
    assert (result.done, result.failed) == (16, ())
    assert _run.run(["initialization"], catalogue=catalogue, **options).done == 0
    (kept,) = _kept.accept([out], tmp_path / "kept")
    assert kept.cells == 16
    assert samples


def test_both_stages_together_err_no_more_than_two_tests_may(monkeypatch):
    """No effect at all, on the boundary of superiority: "supported" as often as the page allows."""
    monkeypatch.setattr(_verdict, "sign_flip", lambda values: None)  # decides nothing here
    chance, wrong, second, trials = np.random.default_rng(2), 0, 0, 2000
    for _ in range(trials):
        own = _verdict.superiority(chance.normal(0.0, 0.6, 16), 0.3)
        sample = _second.asked(verdict(status=own.status, n_needed=own.n_needed))
        if sample is not None:
            second += 1
            own = _verdict.superiority(chance.normal(0.0, 0.6, sample.seeds), 0.3)
        wrong += own.status == "supported"
    assert second > 400
    allowed = 2 * 0.025
    assert wrong / trials <= allowed + 3 * (allowed * (1 - allowed) / trials) ** 0.5
