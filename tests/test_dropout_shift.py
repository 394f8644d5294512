"""The experiment on dropout before BN: where it stands, the formula, what is concluded."""

import math

import pytest
import torch

from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.studies import _data, dropout_shift
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._train import stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


def test_dropout_stands_where_the_arm_says():
    def kinds(arm):
        return [type(m).__name__ for m in dropout_shift.network(64, arm, 0.5, 0).layers]

    block, dropped = ["Linear", "BatchNorm1d", "ReLU"], ["Linear", "Dropout", "BatchNorm1d", "ReLU"]
    assert kinds("none") == [*block, *block, "Linear"]
    assert kinds("before first") == [*dropped, *block, "Linear"]
    assert kinds("before second") == [*block, *dropped, "Linear"]
    assert kinds("before both") == [*dropped, *dropped, "Linear"]
    assert kinds("after both") == [*block, "Dropout", *block, "Dropout", "Linear"]


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_running_statistics_behind_dropout_are_those_of_the_formula(p):
    net = dropout_shift.network(64, "before both", p, 0, 0.2)
    x = torch.rand(4000, 64, generator=stream(1, "x"))
    for layer in net.modules():
        if isinstance(layer, BatchNorm1d):
            layer.momentum = 1.0
    net(x)  # one batch, and nothing learned: the formula is exact but for sampling
    found = dropout_shift.shifts(net, x, p)
    assert net.training
    assert found["error_1"] == pytest.approx(1, abs=0.02)
    # the second one also meets the noise of the first
    assert abs(found["error_2"] - 1) > 0.03
    assert found["ratio_1"] < -0.1
    z = net.layers[0](x).double()
    ratio = (z.var(0, unbiased=False) / net.layers[2].running_var).log().mean().item()
    assert found["ratio_1"] == pytest.approx(ratio)
    plain = dropout_shift.shifts(dropout_shift.network(64, "none", 0.0, 0, 0.2), x, 0.0)
    assert plain["error_1"] == pytest.approx(math.exp(plain["ratio_1"]), rel=0.5)


# -- made-up rows -----------------------------------------------------------------------------


def ratios(error=1.0, shift=-0.3, sd=0.01, **by_arm):
    """Measured ratio over formula at the BN behind the dropout, and its logarithm."""

    def rows(cell, seed):
        off = by_arm.get(cell["arm"].replace(" ", "_"), error) + noise(seed, cell["arm"], sd=sd)
        both = {"ratio_1": shift, "ratio_2": shift, "error_1": off, "error_2": off}
        yield {"step": 300, "accuracy": 0.9, "spread_1": 0.1, "spread_2": 0.1, **both}

    return rows


def verdict(*args, **kwargs):
    options = {k: kwargs.pop(k) for k in ("budget", "data", "seeds") if k in kwargs}
    rows, _ = simulate(dropout_shift, ratios(*args, **kwargs), **options)
    return judged(dropout_shift, rows)["dropout-before-bn"]


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({}, "supported"),
        ({"error": 1.2}, "refuted"),
        ({"before_second": 0.8}, "refuted"),
        ({"error": 1.05}, "inconclusive"),
        ({"sd": 0.5}, "inconclusive"),
        ({"shift": -0.01}, "inconclusive"),
    ],
)
def test_the_ratio_is_that_of_the_formula_or_not(options, status):
    found = verdict(**options)
    assert (found.status, found.published_status) == (status, None)
    assert found.n >= 5
    assert len([c for c in found.cells if c["part"] == "fair"]) == 4
    if options == {"shift": -0.01}:
        assert "nothing to explain here" in found.sentence
    assert found.reported == claims()["dropout-before-bn"].reported


def test_another_tolerance_and_missing_runs():
    rows, _ = simulate(dropout_shift, ratios(1.1))
    with overruled({"dropout-before-bn": {"delta": 0.5}}):
        assert judged(dropout_shift, rows)["dropout-before-bn"].status == "supported"
    for keep in (lambda r: r["part"] == "pilot", lambda r: r["arm"] != "before second"):
        found = judged(dropout_shift, [r for r in rows if keep(r)])
        assert found["dropout-before-bn"].status == "inconclusive"
    assert dropout_shift.judge([]) == []


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in dropout_shift.expected("small", "mnist", None))
    _, asked = simulate(dropout_shift, ratios())
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_digits_are_a_demonstration_and_the_whole_experiment_runs_there():
    assert verdict(data="digits").status == "demo"
    assert verdict(budget="tiny", seeds=8).status == "inconclusive"
    rows, asked = simulate(
        dropout_shift,
        lambda cell, seed: dropout_shift.measure(cell, seed, "tiny", DIGITS),
        "tiny",
        "digits",
        1,
    )
    assert len(asked) == 7
    assert judged(dropout_shift, rows)["dropout-before-bn"].status == "demo"
