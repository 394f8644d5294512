"""The experiment on learning rates: its rates, what is asked for and what is concluded."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from gammabeta.studies import _data, learning_rate
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


@pytest.mark.parametrize("norm", learning_rate.NORMS)
def test_a_run_is_plain_training_of_ten_layers(norm):
    x, y, test_x, test_y = fair_split(DIGITS, 6, "test")
    net = MLP((64, *[100] * 10, 10), "relu", norm == "bn", stream(6, "weights"))
    update = torch.optim.SGD(net.parameters(), lr=0.1)
    for index in itertools.islice(batches(len(x), 64, stream(6, "order")), 10):
        update.zero_grad()
        F.cross_entropy(net(pixels(x[index], 16)), y[index]).backward()
        update.step()
    net.eval()
    share = (net(pixels(test_x, 16)).argmax(1) == test_y).double().mean().item()
    cell = {"part": "fair", "group": "deep", "arm": norm, "rate": 0.1}
    *_, last = learning_rate.measure(cell, 6, "tiny", DIGITS)
    assert (last["step"], last["accuracy"]) == (10, share)


# -- made-up rows -----------------------------------------------------------------------------

BEST = {"bn": 0.3, "none": 0.1}


def gains(small, large, sd=0.1, best=BEST):
    """BN gains so many points at the best rate without it, and so many at the best rates."""

    def rows(cell, seed):
        bn, rate = cell["arm"] == "bn", cell["rate"]
        if cell["part"] == "tuning":
            level = 90 - 10 * abs(rate - best[cell["arm"]])
        elif not bn:
            level = 90
        else:
            level = 90 + (small if rate == best["none"] else large if rate == best["bn"] else 5)
        level += noise(seed, cell["group"], cell["arm"], rate, sd=sd)
        return [{"step": s, "accuracy": level / 100, "diverged": False} for s in (1, 2, 3)]

    return rows


def verdict(*args, budget="small", data="mnist", seeds=None, **kwargs):
    rows, _ = simulate(learning_rate, gains(*args, **kwargs), budget, data, seeds)
    return judged(learning_rate, rows)["bjorck-lr"]


def test_a_gain_at_the_best_rates_alone_is_supported():
    found = verdict(0.0, 1.0)
    assert (found.status, found.published_status) == ("supported", None)
    assert found.effect == pytest.approx(0.0, abs=0.2)
    assert found.planned_half_width <= 0.15
    assert found.n >= 8
    assert found.reported == claims()["bjorck-lr"].reported
    assert [c["part"] for c in found.cells].count("shown") == 4
    assert "Learning rates chosen (deep): bn 0.3, none 0.1." in found.notes


def test_a_gain_at_the_small_rate_refutes():
    found = verdict(0.8, 1.5)
    assert found.status == "refuted"
    assert learning_rate.SMALL in found.sentence


def test_a_loss_at_the_small_rate_refutes_as_well():
    assert verdict(-0.8, 1.5).status == "refuted"


def test_without_a_gain_at_the_best_rates_there_is_nothing_to_explain():
    for small in (0.0, 0.8, -0.8):
        found = verdict(small, 0.0)
        assert found.status == "inconclusive"
        assert any("positive control" in note for note in found.notes)


def test_the_same_best_rate_refutes_where_bn_helps_and_the_card_says_so():
    found = verdict(1.0, 1.0, best={"bn": 0.1, "none": 0.1})
    assert found.status == "refuted"
    assert any("not larger" in note for note in found.notes)


def test_noise_is_inconclusive():
    found = verdict(0.0, 9.0, sd=1.5)
    assert found.status == "inconclusive"
    assert found.n == 16


def test_both_arms_train_at_the_small_rate_and_no_run_is_asked_for_twice():
    _, asked = simulate(learning_rate, gains(0.0, 1.0))
    fair = [c for c in asked if c.arm["part"] == "fair" and c.seed == 0]
    runs = {(c.arm["group"], c.arm["arm"], round(c.arm["rate"], 5)) for c in fair}
    assert len(runs) == len(fair) == 8
    for group, tenth in (("deep", {0.01}), ("shallow", set())):
        assert {r for g, n, r in runs if (g, n) == (group, "none")} == {0.1} | tenth
        assert {r for g, n, r in runs if (g, n) == (group, "bn")} == {0.1, 0.3} | tenth


def test_another_delta_gives_another_verdict():
    rows, _ = simulate(learning_rate, gains(0.8, 3.0))
    assert judged(learning_rate, rows)["bjorck-lr"].status == "refuted"
    with overruled({"bjorck-lr": {"delta": 1.5}}):
        assert judged(learning_rate, rows)["bjorck-lr"].status == "supported"


def test_missing_runs_leave_the_verdict_open():
    rows, _ = simulate(learning_rate, gains(0.0, 1.0))
    for part in ("tuning", "fair", "pilot"):
        found = judged(learning_rate, [r for r in rows if r["part"] == part])
        assert found["bjorck-lr"].status == "inconclusive"
    assert learning_rate.judge([]) == []


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in learning_rate.expected("small", "mnist", None))
    _, asked = simulate(learning_rate, gains(0.0, 1.0, sd=0.12))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    assert verdict(0.0, 1.0, data="digits").status == "demo"
    assert verdict(0.0, 1.0, budget="tiny", seeds=8).status == "inconclusive"


def test_the_whole_experiment_runs_on_the_digits():
    rows, asked = simulate(
        learning_rate,
        lambda cell, seed: learning_rate.measure(cell, seed, "tiny", DIGITS),
        "tiny",
        "digits",
        1,
    )
    assert {c.arm["part"] for c in asked} == {"tuning", "fair"}
    assert judged(learning_rate, rows)["bjorck-lr"].status == "demo"
