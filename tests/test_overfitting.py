"""The experiment on overfitting: the matched point, what is asked for and what is concluded."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from gammabeta.studies import _data, overfitting
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


def arm(**changes):
    return {"part": "fair", "norm": "bn", "rate": 0.3, **changes}


# -- one cell ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["bn", "none"])
def test_the_gap_is_taken_where_the_training_loss_is_first_reached(norm, monkeypatch):
    monkeypatch.setitem(
        overfitting.PLANS, "small", overfitting.PLANS["small"]._replace(size=600, steps=200)
    )
    x, y, test_x, test_y = fair_split(DIGITS, 3, "test", 600)
    seen, held = pixels(x, 16), pixels(test_x, 16)
    net = MLP((64, 200, 200, 10), "relu", norm == "bn", stream(3, "weights"))
    update, wanted = torch.optim.SGD(net.parameters(), lr=1.0), None
    order = itertools.islice(batches(600, 256, stream(3, "order")), 200)
    for step, index in enumerate(order, start=1):
        update.zero_grad()
        F.cross_entropy(net(pixels(x[index], 16)), y[index]).backward()
        update.step()
        net.eval()
        loss = F.cross_entropy(net(seen), y).item()
        if wanted is None and step % 10 == 0 and loss <= 0.01:
            right = (net(held).argmax(1) == test_y).double().mean().item()
            wanted = (step, loss, F.cross_entropy(net(held), test_y).item(), right)
        net.train()
    rows = list(overfitting.measure(arm(norm=norm, rate=1.0), 3, "small", DIGITS))
    (matched,) = (row for row in rows if row["kind"] == "matched")
    found = [matched[key] for key in ("step", "train_loss", "test_loss", "test_accuracy")]
    assert found == pytest.approx(list(wanted), rel=1e-3)
    assert matched["train_accuracy"] > 0.99
    assert [row["step"] for row in rows if row["kind"] == "end"] == [192, 196, 200]
    assert not any(row["diverged"] for row in rows if row["kind"] == "end")


def test_a_run_that_does_not_learn_its_images_is_no_candidate():
    rows = list(overfitting.measure(arm(rate=1e-4, part="tuning"), 0, "tiny", DIGITS))
    assert [row["kind"] for row in rows] == ["end"] * len(rows)
    assert rows[-1]["diverged"] is True


# -- made-up rows -----------------------------------------------------------------------------


def answer(gap, end=1.0, sd=0.1, late=()):
    """BN's test accuracy is ahead by gap points at the matched loss, and by end points at last."""

    def rows(cell, seed):
        bn, jitter = cell["norm"] == "bn", noise(seed, cell["norm"], sd=sd)
        lost = abs(cell["rate"] - 1.0)
        share = (88 + (end if bn else 0) + jitter - lost) / 100
        found = [
            {"kind": "end", "step": s, "accuracy": share, "diverged": False} for s in (1, 2, 3)
        ]
        if (cell["norm"], seed) not in late:
            found.append(
                {
                    "kind": "matched",
                    "step": 100,
                    "train_loss": 0.01,
                    "train_accuracy": 1.0,
                    "test_loss": 0.4 - (0.1 if bn else 0),
                    "test_accuracy": (88 + (gap if bn else 0) + jitter) / 100,
                }
            )
        return found

    return rows


def verdict(*args, **kwargs):
    options = {key: kwargs.pop(key) for key in ("data", "budget", "seeds") if key in kwargs}
    rows, _ = simulate(overfitting, answer(*args, **kwargs), **options)
    return judged(overfitting, rows)["bn-overfit"]


def test_a_smaller_gap_is_supported():
    found = verdict(1.0)
    assert (found.status, found.published_status) == ("supported", None)
    assert found.effect == pytest.approx(1.0, abs=0.2)
    assert found.planned_half_width <= 0.15
    assert found.sentence.startswith("Yes: on MNIST, MLP 200-200")
    assert "Secondary, gap in loss without − with: +0.10" in " ".join(found.notes)
    assert found.reported == claims()["bn-overfit"].reported


def test_an_equal_gap_is_refuted_where_bn_helps_in_the_end():
    found = verdict(0.0)
    assert found.status == "refuted"
    assert "absent" in found.sentence or "too small" in found.sentence


def test_where_bn_does_not_help_there_is_nothing_to_explain():
    for gap in (0.0, 1.0):
        found = verdict(gap, end=0.0)
        assert found.status == "inconclusive"
        assert "nothing to explain here" in found.sentence


def test_noise_is_inconclusive():
    found = verdict(0.4, end=9.0, sd=1.5)
    assert found.status == "inconclusive"
    assert found.n == 16


def test_runs_that_do_not_learn_are_counted_and_many_decide_nothing():
    few = verdict(1.0, late=[("none", 0)])
    assert few.status == "inconclusive"  # four of at least five
    assert any("(without): seeds [0]" in note for note in few.notes)
    many = verdict(1.0, sd=0.5, late=[("none", seed) for seed in range(9)])
    assert many.status == "inconclusive"
    assert "more than half" in many.sentence


def test_a_rate_that_does_not_learn_is_not_chosen():
    def rows(cell, seed):
        found = answer(1.0)(cell, seed)
        if cell["rate"] == 1.0:
            found = [{**row, "diverged": True} if row["kind"] == "end" else row for row in found]
        return found

    _, asked = simulate(overfitting, rows)
    assert {c.arm["rate"] for c in asked if c.arm["part"] == "fair"} == {0.3}


def test_another_delta_gives_another_verdict():
    rows, _ = simulate(overfitting, answer(1.0, end=5.0))
    with overruled({"bn-overfit": {"delta": 2.0}}):
        assert judged(overfitting, rows)["bn-overfit"].status == "refuted"


def test_missing_runs_leave_the_verdict_open():
    rows, _ = simulate(overfitting, answer(1.0))
    for part in ("tuning", "fair", "pilot"):
        found = judged(overfitting, [r for r in rows if r["part"] == part])
        assert found["bn-overfit"].status == "inconclusive"
    assert overfitting.judge([]) == []


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in overfitting.expected("small", "mnist", None))
    _, asked = simulate(overfitting, answer(1.0, sd=0.25))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    assert verdict(1.0, data="digits").status == "demo"
    assert verdict(1.0, budget="tiny", seeds=8).status == "inconclusive"


def test_the_whole_experiment_runs_on_the_digits():
    rows, asked = simulate(
        overfitting,
        lambda cell, seed: overfitting.measure(cell, seed, "tiny", DIGITS),
        "tiny",
        "digits",
        1,
    )
    assert len(asked) == 2 * 2 + 2
    assert judged(overfitting, rows)["bn-overfit"].status == "demo"
