"""The laws of the verdicts: each rule gives each status where it should, and errs rarely."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from gammabeta.studies._verdict import (
    Outcome,
    Verdict,
    controlled,
    equivalence,
    half_width,
    helps,
    holm,
    interval,
    levels,
    lies_above,
    number,
    p_of_interval,
    planned_n,
    sign_flip,
    superiority,
    universal,
)

DELTA = 0.3
# Wrong "supported" at a nominal 5 %: two standard errors of 1,000 draws above it.
MOST_WRONG = 0.064


def spread(mean: float, sd: float, n: int) -> list[float]:
    """n values with exactly this mean and sample standard deviation."""
    z = np.arange(n) - (n - 1) / 2
    return list(mean + sd * z / z.std(ddof=1))


# --- the interval -------------------------------------------------------------------------------


def test_interval_matches_a_computation_by_hand():
    # 1, 2, 3, 4, 5: mean 3, sd sqrt(2.5), t(4, 0.975) = 2.776445 from a printed table.
    i = interval([1, 2, 3, 4, 5])
    assert i.mean == 3
    assert i.n == 5
    assert i.sd == pytest.approx(math.sqrt(2.5), rel=1e-12)
    assert i.hi - 3 == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)
    assert i.half_width == pytest.approx(3 - i.lo, rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("level", [0.90, 0.95, 0.99])
def test_interval_matches_scipy(n, level):
    x = np.random.default_rng(n).normal(0.4, 2.0, n)
    lo, hi = stats.t.interval(level, n - 1, loc=x.mean(), scale=stats.sem(x))
    i = interval(x, level)
    assert (i.lo, i.hi) == pytest.approx((lo, hi), rel=1e-12)


def test_equal_values_give_an_interval_of_no_width():
    i = interval([0.1] * 7)
    assert i.sd == 0
    assert i.lo == i.hi == i.mean


@pytest.mark.parametrize(
    ("values", "level", "message"),
    [
        ([1.0], 0.95, "n >= 2"),
        ([], 0.95, "n >= 2"),
        ([1.0, math.nan], 0.95, "finite"),
        ([1.0, 2.0], 1.0, "level"),
    ],
)
def test_interval_refuses_what_has_none(values, level, message):
    with pytest.raises(ValueError, match=message):
        interval(values, level)


@pytest.mark.parametrize("n", [6, 7, 10])
def test_sign_flip_is_the_share_of_all_assignments_of_signs(n):
    # Integers, so that ties occur and are exact.
    for seed in range(5):
        x = np.random.default_rng(seed).integers(-3, 6, n)
        sums = [abs(sum(s * v for s, v in zip(signs, x, strict=True)))
                for signs in itertools.product((1, -1), repeat=n)]  # fmt: skip
        expected = np.mean([s >= abs(x.sum()) for s in sums])
        assert sign_flip(x) == pytest.approx(expected, abs=1e-15)


def test_sign_flip_is_given_from_six_seeds_on():
    assert interval([0.1] * 5).p_signflip is None
    assert interval(np.full(6, 0.1)).p_signflip == 2 / 64
    assert sign_flip(iter([0.1] * 30)) == 2 / 2**30
    assert sign_flip([0.1] * 41) is None


# --- each rule gives each status -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "sd", "status", "reason"),
    [
        (1.0, 0.3, "supported", "above 0"),
        (0.3, 0.1, "supported", "at least 0.3"),
        (0.1, 0.05, "refuted", "too small to matter"),
        (0.0, 0.1, "refuted", "absent"),
        (-1.0, 0.3, "refuted", "reversed"),
        (1.0, 2.0, "inconclusive", "seeds would decide"),
        (0.25, 0.1, "inconclusive", "seeds would decide"),
    ],
)
def test_superiority(mean, sd, status, reason):
    outcome = superiority(spread(mean, sd, 5), DELTA)
    assert outcome.status == status
    assert reason in outcome.reason


@pytest.mark.parametrize(
    ("mean", "sd", "status"),
    [
        (0.0, 0.1, "supported"),
        (0.5, 0.1, "refuted"),
        (-0.5, 0.1, "refuted"),
        (0.2, 0.3, "inconclusive"),
        (0.5, 1.0, "inconclusive"),
    ],
)
def test_equivalence(mean, sd, status):
    assert equivalence(spread(mean, sd, 8), DELTA).status == status


@pytest.mark.parametrize(
    ("mean", "sd", "status"),
    [
        (2.0, 0.05, "supported"),
        (2.5, 0.05, "refuted"),
        (1.5, 0.05, "refuted"),
        (2.0, 0.5, "inconclusive"),
        (2.15, 0.1, "inconclusive"),
    ],
)
def test_number_with_its_default_tolerance_of_five_percent(mean, sd, status):
    assert number(spread(mean, sd, 6), 2.0).status == status


@pytest.mark.parametrize("rule", [superiority, equivalence])
@pytest.mark.parametrize(("mean", "sd"), [(0.2, 0.5), (0.5, 1.5), (0.29, 1.0), (-0.1, 0.9)])
def test_the_number_of_seeds_that_would_decide_does_and_one_less_does_not(rule, mean, sd):
    outcome = rule(spread(mean, sd, 4), DELTA)
    assert outcome.status == "inconclusive"
    if mean == 0.29:
        assert outcome.n_needed is None
        assert "more than 1000" in outcome.reason
        return
    assert rule(spread(mean, sd, outcome.n_needed), DELTA).status != "inconclusive"
    assert rule(spread(mean, sd, outcome.n_needed - 1), DELTA).status == "inconclusive"


@pytest.mark.parametrize("values", [[], [5.0], spread(5, 0.1, 4)])
def test_too_few_seeds_are_inconclusive_and_say_how_many_came(values):
    outcome = superiority(values, DELTA, least=5)
    assert outcome.status == "inconclusive"
    assert outcome.reason == f"{len(values)} of at least 5 seeds"
    assert (outcome.interval is None) == (len(values) < 2)


@pytest.mark.parametrize("delta", [0.0, -0.3, math.nan])
def test_delta_is_positive(delta):
    with pytest.raises(ValueError, match="positive"):
        superiority([1.0, 2.0], delta)


@pytest.mark.parametrize(
    ("mean", "sd", "status"),
    [(2.5, 0.1, "supported"), (1.5, 0.1, "refuted"), (2.1, 0.5, "inconclusive")],
)
def test_lies_above(mean, sd, status):
    assert lies_above(spread(mean, sd, 5), 2.0).status == status
    below = lies_above([-x for x in spread(mean, sd, 5)], -2.0).status
    opposite = {"supported": "refuted", "refuted": "supported"}
    assert below == opposite.get(status, status)


def test_without_its_positive_control_a_claim_is_not_judged():
    why = superiority(spread(1.0, 0.1, 5), DELTA)
    assert controlled(why, superiority(spread(2.0, 0.1, 5), DELTA)) == why
    for mean in (0.0, 0.29):
        outcome = controlled(why, superiority(spread(mean, 0.5, 5), DELTA))
        assert outcome.status == "inconclusive"
        assert "nothing to explain here" in outcome.reason
        assert outcome.interval == why.interval


@pytest.mark.parametrize("n", [4, 9])
@pytest.mark.parametrize("mean", [-0.4, 0.05, 0.3, 0.6, 4.0])
def test_p_is_below_five_percent_exactly_where_the_interval_decides(mean, n):
    for sd in (0.05, 0.2, 0.5, 2.0):
        x = spread(mean, sd, n)
        assert (superiority(x, 1e-9).p < 0.05) == (interval(x).lo > 0)
        assert (lies_above(x, 0.1).p < 0.05) == (interval(x).lo > 0.1)
        assert (equivalence(x, DELTA).p < 0.05) == (equivalence(x, DELTA).status == "supported")
        assert (number(x, 4.0).p < 0.05) == (number(x, 4.0).status == "supported")
        i = interval(x)
        assert p_of_interval(i.mean, i.lo, i.hi, n) == pytest.approx(
            stats.ttest_1samp(x, 0.0).pvalue, rel=1e-9
        )
    assert superiority([1.0, 1.0, 1.0], DELTA).p == 0
    assert superiority([1.0], DELTA).p is None


def test_the_p_of_a_universal_claim_is_its_largest():
    cells = {"a": spread(2.0, 0.2, 5), "b": spread(0.6, 0.4, 5)}
    assert universal(cells, DELTA).p == superiority(cells["b"], DELTA).p
    assert universal(cells | {"c": []}, DELTA).p is None


# --- universal, Holm, levels ---------------------------------------------------------------------


def test_universal_is_supported_only_if_every_cell_is_and_shows_the_weakest():
    cells = {"a": spread(2.0, 0.2, 5), "b": spread(0.6, 0.2, 5)}
    outcome = universal(cells, DELTA)
    assert outcome.status == "supported"
    assert outcome.weakest == "b"
    assert outcome.interval == interval(cells["b"])

    cells["c"] = spread(0.6, 2.0, 5)
    outcome = universal(cells, DELTA)
    assert outcome.status == "inconclusive"
    assert outcome.n_needed == superiority(cells["c"], DELTA).n_needed

    cells["d"] = spread(-1.0, 0.1, 5)
    outcome = universal(cells, DELTA)
    assert outcome.status == "refuted"
    assert outcome.reason == "d: reversed"
    assert outcome.cells["a"].status == "supported"


def test_a_cell_refuted_only_before_the_correction_does_not_refute_the_claim():
    # One-sided p just under 0.025: enough alone, not among five.
    sd = 0.2
    edge = DELTA - half_width(sd, 5) * 1.02
    assert superiority(spread(edge, sd, 5), DELTA).status == "refuted"
    cells = {name: spread(2.0, 0.2, 5) for name in "abcd"} | {"e": spread(edge, sd, 5)}
    outcome = universal(cells, DELTA)
    assert outcome.status == "inconclusive"
    assert "Holm" in outcome.cells["e"].reason
    assert universal({"e": cells["e"]}, DELTA).status == "refuted"


def test_universal_without_cells_or_with_an_empty_one_is_inconclusive():
    assert universal({}, DELTA).status == "inconclusive"
    outcome = universal({"a": spread(2.0, 0.2, 5), "b": []}, DELTA, least=5)
    assert outcome.status == "inconclusive"
    assert outcome.reason == "b: 0 of at least 5 seeds"
    assert outcome.weakest == "a"
    assert outcome.n_needed == 5


def test_holm_matches_its_published_example_and_keeps_the_order_of_the_names():
    # Holm 1979 by hand: 4 * 0.005, 3 * 0.01, 2 * 0.03, then the maximum so far.
    adjusted = holm({"c": 0.03, "a": 0.01, "b": 0.04, "d": 0.005})
    assert list(adjusted) == ["c", "a", "b", "d"]
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("a", "b", "status"),
    [
        ("supported", "supported", "supported"),
        ("refuted", "refuted", "refuted"),
        ("supported", "refuted", "mixed"),
        ("refuted", "supported", "mixed"),
        ("supported", "inconclusive", "inconclusive"),
        ("inconclusive", "refuted", "inconclusive"),
    ],
)
def test_levels_are_mixed_only_between_supported_and_refuted(a, b, status):
    assert levels(Outcome(a, None, ""), Outcome(b, None, "")) == status


# --- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sd", [0.01, 0.12, 0.2, 0.25, 0.5])
def test_planned_n_is_the_smallest_that_reaches_half_of_delta(sd):
    n = planned_n(spread(1.0, sd, 4), DELTA)
    assert 5 <= n <= 16
    if n < 16:
        assert half_width(sd, n) <= DELTA / 2
    if n > 5:
        assert half_width(sd, n - 1) > DELTA / 2
    assert planned_n(spread(1.0, sd, 4), DELTA, least=8) == max(n, 8)


# --- calibration: 1,000 data sets on the boundary of each rule -----------------------------------


def wrongly_supported(rule, truth: float, n: int) -> float:
    draws = np.random.default_rng(20240 + n).normal(truth, 0.2, (1000, n))
    return float(np.mean([rule(list(x)).status == "supported" for x in draws]))


@pytest.mark.parametrize("n", [5, 8, 16])
@pytest.mark.parametrize(
    ("rule", "truth"),
    [
        (lambda x: superiority(x, 1e-9), 0.0),
        (lambda x: superiority(x, DELTA), 0.0),
        (lambda x: equivalence(x, DELTA), DELTA),
        (lambda x: equivalence(x, DELTA), -DELTA),
        (lambda x: number(x, 5.0, DELTA), 5.0 + DELTA),
        (lambda x: number(x, 5.0, DELTA), 5.0 - DELTA),
        (lambda x: universal({"big": spread(9, 0.2, 5), "none": x}, DELTA), 0.0),
        (lambda x: lies_above(x, 2.0), 2.0),
        (lambda x: lies_above([-v for v in x], -2.0), 2.0),
        (lambda x: controlled(superiority(x, DELTA), superiority(spread(9, 1, 5), DELTA)), 0.0),
    ],
    ids=[
        *("above-0", "above-0-by-delta", "eq+", "eq-", "number+", "number-", "universal"),
        *("lies-above", "lies-below", "controlled"),
    ],
)
def test_supported_on_the_boundary_is_rare(rule, truth, n):
    assert wrongly_supported(rule, truth, n) <= MOST_WRONG


@pytest.mark.parametrize("n", [5, 8])
def test_refuted_on_the_boundary_is_rare(n):
    # Every cell at exactly delta: the claim holds, and Holm keeps the family at 2.5 %.
    rng = np.random.default_rng(7)
    draws = rng.normal(DELTA, 0.2, (1000, 5, n))
    single = [superiority(x[0], DELTA).status == "refuted" for x in draws]
    family = [universal(dict(zip("abcde", x, strict=True)), DELTA).status for x in draws]
    assert np.mean(single) <= 0.036
    assert np.mean([s == "refuted" for s in family]) <= 0.036


def test_the_calibration_sees_a_rule_without_an_interval():
    # The naive rule "the mean is above 0" supports half of all empty claims.
    naive = lambda x: Outcome("supported" if np.mean(x) > 0 else "refuted", None, "")  # noqa: E731
    assert wrongly_supported(naive, 0.0, 5) > 0.4


def test_sign_flip_rejects_at_its_level_under_symmetry():
    draws = np.random.default_rng(3).normal(0.0, 1.0, (1000, 8))
    assert np.mean([sign_flip(x) <= 0.05 for x in draws]) <= MOST_WRONG


# --- the verdict as it is written ----------------------------------------------------------------


def verdict(**changes) -> Verdict:
    fields = {
        "claim": "act-all", "experiment": "activations", "status": "supported",
        "published_status": "mixed", "effect": 0.5, "ci": (0.3, 0.7), "n": 5,
        "unit": "points of accuracy", "reported": "", "budget": "small", "data": "mnist",
        "delta": 0.3, "half_width": 0.2, "planned_half_width": None, "sentence": "Yes.",
    }  # fmt: skip
    return Verdict(**(fields | changes))


def test_a_verdict_survives_json():
    plain = verdict(cells=[{"name": "relu"}], notes=["n"]).to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["ci"] == [0.3, 0.7]
    assert verdict(ci=None, effect=None).to_json()["ci"] is None


@pytest.mark.parametrize("field", ["status", "published_status"])
def test_a_verdict_has_a_known_status(field):
    with pytest.raises(ValueError, match="status must be one of"):
        verdict(**{field: "proven"})


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_a_positive_control_is_wrongly_supported_seldom(tails):
    """No effect, by either way of being supported: 2.5 % each at most."""
    random = np.random.default_rng(0)
    draw = random.standard_normal if tails == "normal" else lambda n: random.standard_t(2, n)
    wrong = sum(helps(draw(12), 1e-9).status == "supported" for _ in range(1000))
    assert 5 <= wrong <= 1000 * MOST_WRONG


def test_one_network_that_diverged_does_not_hide_that_the_others_were_helped():
    gains = [0.9, 1.1, 1.0, 1.3, 0.8, 1.2, 85.0]
    assert superiority(gains, 0.3).status == "inconclusive"
    found = helps(gains, 0.3)
    assert found.status == "supported"
    assert found.p == pytest.approx(2 / 2**7)
    assert helps([*gains[:4], -85.0, 85.0], 0.3).status == "inconclusive"
    assert helps([0.01] * 5 + [0.02, 0.5], 0.3).status != "supported"  # too small to matter
    assert helps(gains, 0.3, least=8).status == "inconclusive"
