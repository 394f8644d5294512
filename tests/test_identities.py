"""The exact claims: every check gives its verdict, and can give the other one."""

import math
from pathlib import Path

import pytest
import torch

from gammabeta import _runs
from gammabeta.studies import _judge, identities
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._identities import CHECKS, _compare, forward, gradients, inference, weights
from gammabeta.studies._judge import Judged
from gammabeta.studies._run import experiments

WORDINGS = {
    "bn-output-moments": "fails",
    "xhat-inverse": "fails",
    "dense-vs-conv": "mixed",
    "bessel": "fails",
    "bias-removed": "fails",
    **dict.fromkeys(identities.AS_WORDED, "fails"),
}
# claim -> a wrong formula in place of its own
PLANTED = {
    "bn-forward": (forward, "xhat", lambda x, eps: _unbiased(x, eps)),
    "affine-fix": (forward, "relearned", lambda y, c, b, new, shift: y * _over(new / c, y)),
    "bn-output-moments": (forward, "output_std", lambda gamma, variance, eps: gamma.abs()),
    "identity-recover": (forward, "undoing", lambda x, eps: (_compare.var(x), _compare.mean(x))),
    "xhat-inverse": (forward, "read_back", lambda y, c, b: y / _over(c, y) - _over(b, y)),
    "range-example": (forward, "uniform_range", lambda count: 2.0),
    "samuelson": (forward, "bound", lambda m: math.sqrt(m) - 1),
    "dense-vs-conv": (forward, "xhat", lambda x, eps: (x - x.mean()) / x.std()),
    "standardise-weights": (forward, "forward_pass", lambda lin, bn, u: _standardized(lin)),
    "single-sample": (inference, "meaningless", lambda beta, x: x),
    "bessel": (inference, "mean_batch_variance", lambda variance, m: variance),
    "inference-formula": (inference, "at_inference", lambda x, e, v, eps: x / _over(v, x)),
    "test-fixed": (inference, "evaluate", lambda layer, x: _compare.xhat(x, 1e-5)),
    "new-stats-each-batch": (inference, "evaluate", lambda layer, x: layer.train()(x)),
    "fold": (inference, "folded", lambda w, b, c, beta, e, v: (w, b * c + beta)),
    "brn-exact": (inference, "renormed", lambda x, r, d, c, b: c * _compare.xhat(x, 1e-5) + b),
    "whiten-singular": (inference, "expected_rank", lambda m, width: min(m, width)),
    "sgd-form": (gradients, "descent", lambda theta, each, rate: theta + rate * each.mean(0)),
    "gamma-grad": (gradients, "gamma_gradient", lambda x, dy: gradients.beta_gradient(dy * x)),
    "beta-grad": (gradients, "beta_gradient", lambda dy: _compare.mean(dy)),
    "backward": (gradients, "short_form", lambda x, dy, c, eps: dy * _over(c, x)),
    "linear-grad": (gradients, "weight_gradient", lambda upstream, incoming: upstream.sum()),
    "f-jac2": (gradients, "batch_sum_gradient", lambda y, slope, n, factor: factor * slope),
    "grad-identity": (gradients, "squared_norm", lambda dy, n, k, s=1: k**2 * (dy**2).sum(0)),
    "bias-removed": (weights, "preactivation", lambda u, w, b: u @ w.T * (1 + b)),
    "weight-pythagoras": (weights, "grown", lambda w, dw, rate: (w - rate * dw).norm(dim=1)),
    "scale-invariance": (weights, "equivalent_eps", lambda eps, a: eps),
    "detach-explodes": (weights, "drift", lambda start, slope, rate, steps: start),
    "exp-lr": (weights, "growing_rate", lambda rate, decay, step: rate),
    "chain-expansion": (weights, "expansion", lambda w, step: [(step / w).sum() * w.prod()]),
}  # fmt: skip


def _over(values, x):
    return _compare.over(values, x)


def _unbiased(x, eps):
    n = x.numel() // x.shape[1]
    spread = (_compare.var(x) * n / (n - 1) + eps).sqrt()
    return (x - _over(_compare.mean(x), x)) / _over(spread, x)


def _standardized(linear):
    w = linear.weight.detach()
    return (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True), linear.bias


def rows_of(claim, seeds=(0,), **changes):
    """What is stored of a claim, as a judge gets it."""
    head = {"claim": claim, "budget": "tiny", "data": "digits"}
    return [
        {**row, **head, "seed": seed, **changes}
        for seed in seeds
        for row in identities.measure({"claim": claim}, seed, "tiny", None)
    ]


@pytest.fixture(scope="module")
def rows():
    with torch.random.fork_rng(devices=()):
        return {claim: rows_of(claim) for claim in CHECKS}


def verdict_of(rows):
    (verdict,) = identities.judge(rows)
    return verdict


# -- what is found ----------------------------------------------------------------------------


@pytest.mark.parametrize("claim", CHECKS)
def test_the_claim_has_its_verdicts(claim, rows):
    verdict = verdict_of(rows[claim])
    assert verdict.published_status == WORDINGS.get(claim, "exact")
    assert verdict.status == ("fails" if claim in identities.AS_WORDED else "exact")
    stated = [cell for cell in verdict.cells if cell["part"] == "as rightly stated"]
    assert stated
    assert all(cell["effect"] <= cell["tolerance"] for cell in stated)


@pytest.mark.parametrize("claim", CHECKS)
def test_other_draws_agree(claim, rows):
    # The last digits may differ; a check that depends on luck would show.
    if claim in ("exp-lr", "detach-explodes"):
        seeds = (1,)
    else:
        seeds = (1, 2, 3, 4, 5)
    verdict = verdict_of(rows[claim] + rows_of(claim, seeds))
    first = verdict_of(rows[claim])
    assert (verdict.status, verdict.published_status) == (first.status, first.published_status)
    assert verdict.n == len(seeds) + 1


@pytest.mark.parametrize("claim", PLANTED)
def test_a_planted_wrong_formula_fails(claim, rows, monkeypatch):
    module, name, wrong = PLANTED[claim]
    monkeypatch.setattr(module, name, wrong)
    verdict = verdict_of(rows_of(claim))
    stated = {cell["status"] for cell in verdict.cells if cell["part"] == "as rightly stated"}
    assert "fails" in stated
    assert verdict.sentence.startswith("It fails: not ")
    if claim not in identities.AS_WORDED:
        assert verdict.status == "fails"


def test_every_claim_has_a_planted_formula_words_and_a_rule():
    assert set(PLANTED) == set(identities.WORDS) == set(CHECKS) == set(identities.CLAIMS)
    owned = {i for i, claim in claims().items() if claim.experiment == "identities"}
    assert owned == set(CHECKS)
    for claim in CHECKS:
        assert claims()[claim].kind == "exact"
        assert "Tolerance: 100 eps times K, K = " in claims()[claim].rule
        assert claims()[claim].thresholds == {"roundings": 100, "counterexample": 1000}
        words = identities.WORDS[claim]
        assert bool(words.wrong) == (claim in WORDINGS)


@pytest.mark.parametrize("claim", CHECKS)
def test_the_package_and_torch_are_both_tried(claim, rows):
    tried = " ".join(row["compared"] for row in rows[claim] if row["kind"] == "check")
    assert "gammabeta." in tried
    assert "torch." in tried


@pytest.mark.parametrize("claim", CHECKS)
def test_every_trap_is_a_counterexample(claim, rows):
    traps = [c for c in verdict_of(rows[claim]).cells if c["part"] == "other wordings, wrong"]
    assert [c["name"] for c in traps if c["status"] != "fails"] == []
    assert claim in WORDINGS or traps or claim in ("bn-forward",)


@pytest.mark.parametrize("claim", identities.AS_WORDED)
def test_a_wording_that_held_would_be_exact(claim, rows):
    held = [{**row, "error": 0.0} if row["level"] == "worded" else row for row in rows[claim]]
    verdict = verdict_of(held)
    assert (verdict.status, verdict.published_status) == ("exact", "exact")


# -- numbers that are known ---------------------------------------------------------------------


def test_the_counterexamples_have_the_known_numbers(rows):
    def worded(claim):
        found = [row for row in rows[claim] if row["level"] == "worded"]
        return max(found, key=lambda row: row["error"])

    moments = [r for r in rows["bn-output-moments"] if "at variance = eps" in r.get("compared", "")]
    assert all(row["found"] == pytest.approx(0.70711, abs=1e-5) for row in moments)
    assert moments
    assert worded("range-example")["found"] == pytest.approx(math.sqrt(3), abs=0.02)
    halved = [r for r in rows["bessel"] if r["compared"].startswith("m = 2, torch")]
    by_own = [r for r in halved if r["level"] == "worded"]
    assert by_own[0]["found"] / by_own[0]["wanted"] == pytest.approx(math.sqrt(1 / 2), abs=1e-3)


def test_the_bound_is_that_of_the_registry(rows):
    most = [row for row in rows["samuelson"] if row["kind"] == "curve" and "bound" in row["series"]]
    assert [round(row["y"], 3) for row in most[:4]] == [1.0, 1.414, 1.732, 2.646]
    assert "1.000, 1.414, 1.732, 2.646" in claims()["samuelson"].reported


def test_a_bias_with_detached_statistics_moves_for_ever(rows):
    curve = [row for row in rows["detach-explodes"] if row["kind"] == "curve"]
    way = {name: [r["y"] for r in curve if r["series"] == name] for name in
           ("statistics detached", "full gradient")}  # fmt: skip
    assert way["statistics detached"][10] == pytest.approx(10 * way["statistics detached"][1])
    assert way["statistics detached"][10] > 1
    assert max(way["full gradient"]) < 1e-12


# -- the rule ---------------------------------------------------------------------------------


def test_between_tolerance_and_counterexample_nothing_is_decided(rows):
    def with_errors(factor):
        return [{**row, "error": factor * 100 * row["rounding"]} for row in plain]

    plain = [row for row in rows["bn-forward"] if row["kind"] == "check"]
    assert verdict_of(with_errors(1.0)).status == "exact"
    assert verdict_of(with_errors(1.001)).status == "inconclusive"
    assert verdict_of(with_errors(1000.0)).status == "inconclusive"
    assert verdict_of(with_errors(1000.1)).status == "fails"
    one = [{**plain[0], "error": 1.0}, *plain[1:]]
    verdict = verdict_of(one)
    assert (verdict.status, verdict.effect) == ("fails", 1.0)
    with overruled({"bn-forward": {"roundings": 1e-6, "counterexample": 1000}}):
        strict = verdict_of(plain)
    assert strict.status == "fails"
    assert "1e-06 eps" in strict.notes[0]


def test_a_wording_is_mixed_only_if_its_halves_disagree(rows):
    def with_half(error):
        return [
            {**row, "error": error} if row.get("half") == "dense layers" else row
            for row in rows["dense-vs-conv"]
        ]

    assert verdict_of(with_half(1.0)).published_status == "mixed"
    assert verdict_of(with_half(0.0)).published_status == "exact"
    assert verdict_of(with_half(1e-11)).published_status == "inconclusive"
    every = [{**row, "error": 1.0} for row in rows["dense-vs-conv"]]
    assert verdict_of(every).published_status == "fails"


def test_rows_of_some_claims_give_these_verdicts_only(rows):
    found = identities.judge(rows["fold"] + rows["bessel"])
    assert [verdict.claim for verdict in found] == ["bessel", "fold"]
    assert identities.judge([]) == []
    assert identities.figures([]) == []
    only = [row for row in rows["inference-formula"] if row["level"] == "worded"]
    assert verdict_of(only).sentence.startswith("Undecided")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_as_wrong_as_can_be(value):
    x = torch.ones(3, dtype=torch.float64)
    row = _compare.check("right", "a: b", x * value, x)
    assert row["error"] > 1e300
    assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))


def test_the_error_is_relative_to_the_largest_value():
    found, wanted = torch.tensor([1.0, 4.0 + 1e-3]), torch.tensor([1.0, 4.0])
    row = _compare.check("right", "a: b", found, wanted, condition=2.0)
    assert row["error"] == pytest.approx(2.5e-4, rel=1e-3)
    assert row["rounding"] == 2 * torch.finfo(torch.float64).eps
    assert (row["found"], row["wanted"]) == (pytest.approx(4.001), 4.0)


# -- as an experiment ---------------------------------------------------------------------------


def test_verdicts_do_not_depend_on_the_data(rows):
    for data in ("digits", "mnist"):
        renamed = [{**row, "data": data} for row in rows["bn-forward"]]
        assert verdict_of(renamed).status == "exact"


def test_the_same_seed_gives_the_same_rows_and_another_one_others(rows):
    assert rows_of("fold") == rows["fold"]
    assert rows_of("fold", (1,)) != rows["fold"]


def test_a_check_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    for claim in ("fold", "standardise-weights", "linear-grad", "sgd-form"):
        rows_of(claim)
    assert torch.equal(before, torch.get_rng_state())


def test_budgets_differ_in_their_seeds_only():
    for budget, count in identities.SEEDS.items():
        wanted = identities.cells(budget, "digits", None, [])
        assert {cell.seed for cell in wanted} == set(range(count))
        assert len(wanted) == count * len(CHECKS)
    assert len(identities.cells("full", "mnist", 2, [])) == 2 * len(CHECKS)


def test_what_it_derives_can_be_stored(rows, tmp_path):
    every = [row for found in rows.values() for row in found]
    run = tmp_path / "run"
    (run / "cells").mkdir(parents=True)
    verdicts, drawn = identities.judge(every), identities.figures(every)
    assert {verdict.claim for verdict in verdicts} == set(CHECKS)
    assert {f["id"].removeprefix("identities-") for f in drawn} == set(identities._FIGURES)
    _judge.write_derived(run, Judged(verdicts, drawn, [], None, {"identities": "text"}))
    stored = _runs.read_verdicts(run)
    assert [v["delta"] for v in stored["verdicts"]] == [None] * len(CHECKS)
    assert all("demo" not in (v["status"], v["published_status"]) for v in stored["verdicts"])
    for row in every:
        assert all(value is None or isinstance(value, str | float) or type(value) in (int, bool)
                   for value in row.values())  # fmt: skip


def test_the_folder_of_the_experiment_holds_its_checks():
    folder = Path(identities.__file__).parent / "_identities"
    assert {p.stem for p in folder.glob("[!_]*.py")} == {
        "forward",
        "inference",
        "gradients",
        "weights",
    }
    assert "identities" in experiments()
