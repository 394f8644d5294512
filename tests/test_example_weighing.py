"""The experiment on inference example weighing: the arithmetic, and what is concluded."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gammabeta.studies import _data, example_weighing
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._inference.networks import Convolutional
from gammabeta.studies._train import stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


# -- the arithmetic ---------------------------------------------------------------------------


def some(count=20):
    return torch.rand(count, 784, generator=stream(0, "x"))


@pytest.fixture
def net():
    found = Convolutional(28, stream(0, "weights"))
    with torch.no_grad():
        for layer in found.layers:
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5, generator=stream(1, "gamma"))
                layer.bias.uniform_(-1, 1, generator=stream(1, "beta"))
        for part in some(60).split(20):
            found.train()(part)
    return found


def by_hand(net, x, weight):
    """The source's words, in float64: mean and mean square are mixed."""
    h = x.double()
    for layer in copy.deepcopy(net).double().layers:
        if isinstance(layer, nn.BatchNorm2d):
            mean, var = (v[:, None, None] for v in (layer.running_mean, layer.running_var))
            first = (1 - weight) * mean + weight * h.mean((2, 3), keepdim=True)
            second = (1 - weight) * (var + mean**2) + weight * (h**2).mean((2, 3), keepdim=True)
            h = (h - first) / (second - first**2 + layer.eps).sqrt()
            h = h * layer.weight[:, None, None] + layer.bias[:, None, None]
        else:
            h = layer(h)
    return h


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 1.0])
def test_mean_and_mean_square_of_each_example_are_mixed_in(net, weight, monkeypatch):
    x, state = some(), copy.deepcopy(net.state_dict())
    wanted = by_hand(net, x, weight)
    found = example_weighing.weighed(net, x, weight)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert net.training
    assert all(torch.equal(v, state[name]) for name, v in net.state_dict().items())
    # no example sees another one, however they are split
    monkeypatch.setattr(example_weighing, "_PART", 7)
    torch.testing.assert_close(example_weighing.weighed(net, x, weight), found)
    torch.testing.assert_close(example_weighing.weighed(net, x[3:4], weight), found[3:4])


def test_without_weight_it_is_eval_mode_and_with_all_of_it_instance_normalization(net):
    x = some()
    torch.testing.assert_close(example_weighing.weighed(net, x, 0.0), copy.deepcopy(net).eval()(x))
    h = x
    for layer in net.layers:
        if isinstance(layer, nn.BatchNorm2d):
            h = F.instance_norm(h, weight=layer.weight, bias=layer.bias, eps=layer.eps)
        else:
            h = layer(h)
    torch.testing.assert_close(example_weighing.weighed(net, x, 1.0), h, rtol=1e-4, atol=1e-5)


def test_tuning_tries_all_weights_and_the_main_run_has_its_own():
    cell = {"part": "tuning", "group": "B = 64", "arm": "bn", "rate": 0.3}
    rows = list(example_weighing.measure(cell, 0, "tiny", DIGITS))
    runs = [row for row in rows if "step" in row]
    curve = {row["x"]: row["y"] for row in rows if row.get("kind") == "curve"}
    assert tuple(curve) == example_weighing.WEIGHTS
    assert curve[0.0] == pytest.approx(100 * sum(r["accuracy"] for r in runs) / len(runs))
    cell = {**cell, "part": "fair", "weight": 0.5}
    with_own = list(example_weighing.measure(cell, 0, "tiny", DIGITS))
    without = list(example_weighing.measure({**cell, "weight": 0.0}, 0, "tiny", DIGITS))
    assert [r["accuracy"] for r in with_own] == [r["accuracy"] for r in without]
    assert all((r["weighed"], r["weighed_loss"]) == (r["accuracy"], r["loss"]) for r in without)
    assert all(r["weighed_loss"] != r["loss"] for r in with_own)


# -- made-up rows -----------------------------------------------------------------------------


def simulated(gain=0.3, sd=0.03, best=0.1, small=0.0):
    """Weighing gains so many points, and is best at a weight on validation."""

    def rows(cell, seed):
        share = 97 - abs(math.log10(cell["rate"] / 0.3)) + noise(seed, cell["group"], sd=0.3)
        runs = [{"step": s, "accuracy": share / 100, "diverged": False} for s in (1, 2, 3)]
        if cell["part"] == "tuning":
            for weight in example_weighing.WEIGHTS:
                head = {"kind": "curve", "curve": "weight", "series": cell["group"]}
                # at other rates another weight would be the best
                off = abs(weight - (best if cell["rate"] == 0.3 else 0.5))
                yield {**head, "x": weight, "y": share - off}
        else:
            more = gain if cell["group"] == "B = 64" else small
            more = (more + noise(seed, cell["group"], "more", sd=sd)) if cell["weight"] else 0.0
            for row in runs:
                row |= {"weighed": (share + more) / 100, "loss": 0.1, "weighed_loss": 0.09}
        yield from runs

    return rows


def verdict(budget="small", data="mnist", seeds=None, **given):
    rows, _ = simulate(example_weighing, simulated(**given), budget, data, seeds)
    return judged(example_weighing, rows)["iew"]


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({}, "supported"),
        ({"gain": 0.0}, "refuted"),
        ({"gain": -0.3, "small": 1.0}, "refuted"),
        ({"gain": 0.04, "sd": 0.01}, "refuted"),
        ({"gain": 0.11, "sd": 0.4}, "inconclusive"),
    ],
)
def test_weighing_has_to_gain_with_batches_of_64(given, status):
    found = verdict(**given)
    assert (found.status, found.published_status) == (status, None)
    assert found.n >= 5
    if status != "inconclusive":
        assert found.effect == pytest.approx(given.get("gain", 0.3), abs=0.05)
        assert found.planned_half_width <= 0.05
    (small,) = [c for c in found.cells if c["name"] == "with − without weighing, B = 8"]
    assert (small["part"], small["n"]) == ("shown", 8)
    (loss,) = [c for c in found.cells if c["name"].startswith("test loss") and "64" in c["name"]]
    assert loss["effect"] == pytest.approx(-0.01)


def test_the_weight_is_chosen_on_validation_at_the_chosen_rate():
    for best in example_weighing.WEIGHTS:
        rows, asked = simulate(example_weighing, simulated(best=best))
        main = [c for c in asked if c.arm["part"] != "tuning"]
        assert {c.arm["weight"] for c in main} == {best}
        assert {c.arm["rate"] for c in main} == {0.3}
        assert f"Weight chosen (B = 64): {best:g}." in judged(example_weighing, rows)["iew"].notes
    rows, asked = simulate(example_weighing, simulated())
    for row in rows:  # of equal weights the least
        if row.get("kind") == "curve":
            row["y"] = 97.0 + (1e-13 if row["x"] == 0.2 else 0.0)
    wanted = example_weighing.cells("small", "mnist", None, rows)
    assert {c.arm["weight"] for c in wanted if c.arm["part"] != "tuning"} == {0.0}


def test_where_no_weight_is_best_nothing_is_gained():
    found = verdict(best=0.0)
    assert (found.status, found.effect) == ("refuted", 0.0)


def test_rows_of_another_weight_do_not_count():
    rows, _ = simulate(example_weighing, simulated())
    changed = [{**r, "weight": 0.2} if r.get("weight") == 0.1 else r for r in rows]
    assert judged(example_weighing, changed)["iew"].n == 0


def test_the_pilot_plans_and_missing_runs_leave_the_verdict_open():
    rows, asked = simulate(example_weighing, simulated(sd=0.07))
    by = {}
    for cell in asked:
        by.setdefault(cell.arm["part"], set()).add(cell.seed)
    assert (by["tuning"], by["pilot"]) == ({800, 801}, {900, 901, 902, 903})
    assert 5 < len(by["fair"]) <= 16
    for part in ("tuning", "fair", "pilot"):
        found = judged(example_weighing, [r for r in rows if r["part"] == part])
        assert found["iew"].status == "inconclusive"
    with overruled({"iew": {"delta": 1.0}}):
        assert judged(example_weighing, rows)["iew"].status == "refuted"
    assert verdict(data="digits").status == "demo"
    assert verdict(budget="tiny", seeds=8).status == "inconclusive"


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in example_weighing.expected("small", "mnist", None))
    _, asked = simulate(example_weighing, simulated(sd=0.05))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.35)


def test_the_registry_agrees_and_the_whole_experiment_runs_on_the_digits():
    owned = {i for i, claim in claims().items() if claim.experiment == "example-weighing"}
    assert owned == set(example_weighing.CLAIMS)
    rows, asked = simulate(
        example_weighing, lambda cell, seed: example_weighing.measure(cell, seed, "tiny", DIGITS),
        "tiny", "digits", 2,
    )  # fmt: skip
    assert len(asked) == 4 + 2 + 1
    assert judged(example_weighing, rows)["iew"].status == "demo"
    assert example_weighing.judge([]) == example_weighing.figures([]) == []
