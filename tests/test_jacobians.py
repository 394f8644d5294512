"""The experiment on Jacobians: it measures what it says, and its rule decides as written."""

import math

import pytest
import torch
from torch.autograd.functional import jacobian

from gammabeta.studies import _data, _judge, jacobians
from gammabeta.studies._claims import claims
from gammabeta.studies._judge import Judged
from gammabeta.studies._nets import m2
from gammabeta.studies._targets import Target
from gammabeta.studies._train import pixels, stream
from tests import draws

DIGITS = _data.load("digits")
CHOSEN = {"rate_bn": 0.3, "rate_none": 0.1}


def tuning(budget="small", data="mnist", grid=None, bn=0.3, none=0.1):
    """Trials whose best rates are those of CHOSEN."""
    found = []
    for rate in grid or jacobians.PLANS[budget].rates:
        for norm, best in (("bn", bn), ("none", none)):
            for activation in jacobians.ACTIVATIONS:
                for seed in jacobians.TUNING_SEEDS:
                    arm = {"part": "tuning", "activation": activation, "norm": norm, "rate": rate}
                    share = 0.9 - 0.1 * abs(math.log10(rate / best))
                    found.append({**arm, "seed": seed, "step": 500, "accuracy": share,
                                  "diverged": False, "budget": budget, "data": data})  # fmt: skip
    return found


def numbers(fair, published=None):
    """Rows of every deciding cell: the cells get the gains given."""
    asked = jacobians.question()
    by_part = {"fair": (asked.targets, fair), "published": (asked.published, published)}
    found = []
    for part, (targets, gain) in by_part.items():
        if gain is None:
            continue
        for name in targets:
            number = gain(name) if callable(gain) else gain
            activation = "relu" if "ReLU" in name else "sigmoid"
            rates = CHOSEN if part == "fair" else dict.fromkeys(CHOSEN, 0.01)
            found += draws.rows("jacobian-one", {name: number}, part=part, activation=activation,
                                **rates)  # fmt: skip
    return [{k: v for k, v in row.items() if k != "claim"} for row in found]


def verdict_of(rows):
    (verdict,) = jacobians.judge(rows)
    return verdict


def test_the_share_is_that_of_the_jacobian_by_automatic_differentiation():
    net = m2(64, "sigmoid", True, stream(0, "weights"))
    x = pixels(DIGITS.train_x[:6], 16)
    found = jacobians._spectra(net, (x, DIGITS.train_y[:6]), 2000, ("batch", "sum"))
    assert not net.layers[1].num_batches_tracked  # no trace
    whole = jacobian(lambda u: net.layers[:3](u), x)
    s = torch.linalg.svdvals(whole.reshape(600, 384))
    inside = ((s >= 0.5) & (s <= 2) & (s > 1e-6 * s[0])).double().mean()
    assert found["layer 1", "(d): share in [0.5, 2]"] == pytest.approx(float(inside), abs=3e-3)
    summed = torch.linalg.svdvals(whole.sum(0).transpose(0, 1))
    inside = ((summed >= 0.5) & (summed <= 2)).double().mean()
    assert found["layer 1", "(a): share in [0.5, 2]"] == pytest.approx(float(inside), abs=3e-3)


@pytest.mark.parametrize("part", ["published", "fair"])
def test_a_cell_covers_its_targets_and_is_repeatable(part):
    arm = {"part": part, "activation": "sigmoid", "rate_bn": 0.1, "rate_none": 0.01}
    if part == "published":
        arm |= dict.fromkeys(("rate_bn", "rate_none"), 0.0001)
    rows = list(jacobians.measure(arm, 0, "tiny", DIGITS))
    assert rows == list(jacobians.measure(arm, 0, "tiny", DIGITS))
    found = {row["cell"]: row["value"] for row in rows if row["kind"] == "value"}
    asked = jacobians.question()
    targets = asked.targets if part == "fair" else asked.published
    start = "rate 0.0001" if part == "published" else "layer"
    wanted = {name for name in targets if "sigmoid" in name and name.startswith(start)}
    assert len(wanted) == 2
    assert wanted <= set(found)
    for name in wanted:
        assert found[name] == pytest.approx(found[f"{name}, with BN"] - found[f"{name}, without"])
    assert all(math.isfinite(v) for v in found.values())


def test_a_late_seed_measures_the_decisive_definition_only(monkeypatch):
    deciding = jacobians.PLANS["tiny"]._replace(decides=True)
    monkeypatch.setitem(jacobians.PLANS, "tiny", deciding)
    arm = {"part": "fair", "activation": "relu", "rate_bn": 0.1, "rate_none": 0.1}
    early, late = (
        {r["cell"] for r in jacobians.measure(arm, s, "tiny", DIGITS) if r["kind"] == "value"}
        for s in (0, 5)
    )
    assert late < early
    assert set(jacobians.question().targets) & early <= late


def test_a_network_that_diverges_has_no_share_near_one():
    arm = {"part": "pilot", "activation": "relu", "rate_bn": 0.1, "rate_none": 1e20}
    rows = list(jacobians.measure(arm, 0, "tiny", DIGITS))
    assert all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    by = {r["cell"]: r["value"] for r in rows if r["kind"] == "value"}
    assert by["layer 1, ReLU, (d): share in [0.5, 2], at the end"] > 0


# -- the rule ---------------------------------------------------------------------------------


def test_a_larger_share_everywhere_is_supported_and_one_layer_without_refutes():
    asked = jacobians.question()
    assert set(asked.targets.values()) == {Target("", 0, math.inf, 0.1, 0.1)}
    assert len(asked.targets) == 4
    good = verdict_of([*tuning(), *numbers(0.3, 0.3)])
    assert (good.status, good.published_status) == ("supported", "supported")
    assert good.p < 1e-3
    one = verdict_of([*tuning(), *numbers(lambda n: 0.02 if "layer 2, ReLU" in n else 0.3)])
    assert (one.status, one.published_status) == ("refuted", "inconclusive")
    assert "layer 2, ReLU" in one.sentence
    assert one.effect == pytest.approx(0.02, abs=1e-3)
    reversed_ = verdict_of([*tuning(), *numbers(-0.3)])
    assert reversed_.status == "refuted"


def test_the_two_published_rates_may_disagree():
    rows = [*tuning(), *numbers(0.3, lambda n: 0.3 if "rate 0.01" in n else -0.1)]
    verdict = verdict_of(rows)
    assert (verdict.status, verdict.published_status) == ("supported", "mixed")


def test_wide_intervals_few_draws_digits_and_tiny_decide_nothing():
    wide = [{**r, "value": 0.3 * (r["seed"] % 2) - 0.05} if "value" in r else r
            for r in [*tuning(), *numbers(0.3)]]  # fmt: skip
    assert verdict_of(wide).status == "inconclusive"
    few = [r for r in [*tuning(), *numbers(0.3)] if r["seed"] < 4 or r["seed"] >= 800]
    assert verdict_of(few).status == "inconclusive"
    for changes, status in (({"data": "digits"}, "demo"), ({"budget": "tiny"}, "inconclusive")):
        rows = [{**r, **changes} for r in numbers(0.3, 0.3)]
        verdict = verdict_of(rows)
        assert (verdict.status, verdict.published_status) == (status, status)


def test_rows_at_a_rate_that_is_not_the_best_do_not_count():
    other = [{**r, "rate_bn": 1.0} for r in numbers(-0.3)]
    verdict = verdict_of([*tuning(), *other])
    assert verdict.n == 0
    assert verdict_of([*tuning(), *numbers(0.3), *other]).status == "supported"


# -- as an experiment ---------------------------------------------------------------------------


def test_tuning_comes_first_then_the_pilot_and_it_alone_gives_the_number_of_seeds():
    first = jacobians.cells("small", "mnist", None, [])
    assert {c.arm["part"] for c in first} == {"tuning", "published"}
    assert sum(c.arm["part"] == "tuning" for c in first) == 48
    rows = tuning()
    second = jacobians.cells("small", "mnist", None, rows)
    pilot = [c for c in second if c.arm["part"] == "pilot"]
    assert {c.seed for c in pilot} == {900, 901, 902, 903}
    assert all((c.arm["rate_bn"], c.arm["rate_none"]) == (0.3, 0.1) for c in pilot)
    assert not [c for c in second if c.arm["part"] == "fair"]
    tried = [{**r, "part": "pilot", "seed": 900 + r["seed"]} for r in numbers(0.3) if r["seed"] < 4]
    third = jacobians.cells("small", "mnist", None, [*rows, *tried])
    assert len([c for c in third if c.arm["part"] == "fair"]) == 10
    noisy = [{**r, "value": 0.1 * (r["seed"] % 2)} for r in tried]
    more = jacobians.cells("small", "mnist", None, [*rows, *noisy])
    assert 10 < len([c for c in more if c.arm["part"] == "fair"]) <= 32
    assert verdict_of([*rows, *tried, *numbers(-0.3)]).effect < 0
    foreseen = jacobians.expected("small", "mnist", None)
    assert len(foreseen) == len(third)
    names = {(str(c.arm), c.seed) for c in jacobians.cells("small", "mnist", 2, rows)}
    assert len([n for n in names if "'fair'" in n[0]]) == 4


def test_a_best_rate_at_the_edge_extends_the_grid():
    edge = tuning(none=3.0)
    wanted = jacobians.cells("small", "mnist", None, edge)
    rates = {c.arm["rate"] for c in wanted if c.arm["part"] == "tuning"}
    assert 10.0 in rates
    assert not [c for c in wanted if c.arm["part"] == "pilot"]


def test_the_registry_agrees_and_what_it_derives_can_be_stored(tmp_path):
    owned = {i for i, claim in claims().items() if claim.experiment == "jacobians"}
    assert owned == set(jacobians.CLAIMS)
    arm = {"part": "fair", "activation": "relu", **CHOSEN}
    head = {**arm, "seed": 0, "budget": "tiny", "data": "digits"}
    rows = [{**r, **head} for r in jacobians.measure(arm, 0, "tiny", DIGITS)]
    rows += [{**r, "seed": 1} for r in rows]
    trials = tuning("tiny", "digits", (0.1, 0.3))
    trial = {"part": "tuning", "activation": "relu", "norm": "bn", "rate": 0.1}
    measured = list(jacobians.measure(trial, 800, "tiny", DIGITS))
    assert [set(r) for r in measured] == [{"step", "accuracy", "diverged"}] * len(measured)
    run = tmp_path / "run"
    (run / "cells").mkdir(parents=True)
    verdicts, drawn = jacobians.judge([*trials, *rows]), jacobians.figures(rows)
    assert [v.status for v in verdicts] == ["demo"]
    assert [figure["id"] for figure in drawn] == ["jacobians-training"]
    _judge.write_derived(run, Judged(verdicts, drawn, [], None, {"jacobians": "text"}))
    assert jacobians.judge([]) == jacobians.figures([]) == []


@pytest.mark.parametrize(("activation", "layer"), jacobians.ANIMATED.items())
def test_quantiles_over_training_are_kept_for_the_animation(activation, layer):
    """Both arms at the same steps, from the smallest singular value to the largest."""
    arm = {"part": "fair", "activation": activation, "rate_bn": 0.1, "rate_none": 0.3}
    rows = [r for r in jacobians.measure(arm, 0, "tiny", DIGITS) if r["kind"] == "spectrum"]
    by = {}
    for row in rows:
        assert row["layer"] == layer
        by.setdefault((row["norm"], row["step"]), []).append((row["x"], row["y"]))
    steps = {norm: [step for n, step in by if n == norm] for norm in ("bn", "none")}
    assert steps["bn"] == steps["none"] == [*range(jacobians.PLANS["tiny"].steps + 1)]
    for points in by.values():
        assert [x for x, _ in points] == [100 - 5 * k for k in range(21)]
        values = [y for _, y in points]
        assert values == sorted(values, reverse=True)
    # other seeds and parts have none
    assert not any(
        row["kind"] == "spectrum"
        for row in jacobians.measure(arm, jacobians.FRAME_SEEDS, "tiny", DIGITS)
    )
