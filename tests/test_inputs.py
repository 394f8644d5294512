"""The experiment on the inputs of networks: what they are, what is asked for and concluded."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from gammabeta.studies import _data, inputs
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


# -- one cell ---------------------------------------------------------------------------------


def test_every_input_is_what_its_name_says():
    x = pixels(fair_split(DIGITS, 0, "test")[0], 16)
    z = {arm: inputs.prepared(arm, x)(x) for arm in inputs.UNITS}
    assert torch.equal(z["[0, 1]"], x)
    assert z["centered"].mean(0).abs().max() < 1e-6
    torch.testing.assert_close(z["x + 1"], x + 1)
    torch.testing.assert_close(z["x + 3"], x + 3)
    assert (z["0 to 255"].min().item(), z["0 to 255"].max().item()) == (0, 255)
    assert (z["[-2, 2]"].min().item(), z["[-2, 2]"].max().item()) == (-2, 2)
    assert z["standardized"].mean().item() == pytest.approx(0, abs=1e-5)
    assert z["standardized"].std().item() == pytest.approx(1, abs=1e-3)
    spread = x.std(0, unbiased=False)
    wanted = ((x - x.mean(0)) / (spread + 0.01)).clamp(-5, 5)
    torch.testing.assert_close(z["z-score"], wanted)
    assert wanted.abs().max() == 5  # something is cut, and a pixel that never varies is 0
    assert wanted[:, spread == 0].abs().max() == 0
    torch.testing.assert_close(z["sigmoid of z-score"], wanted.sigmoid())


def test_the_largest_share_is_that_of_the_eigenvalues():
    z = torch.rand(300, 20, generator=stream(0, "z")) + 0.5
    values = torch.linalg.eigvalsh(z.T.double() @ z.double() / 300)
    assert inputs.largest_share(z) == pytest.approx(float(values[-1] / values.sum()), rel=1e-6)


@pytest.mark.parametrize("arm", ["0 to 255", "z-score"])
def test_a_run_is_plain_training_on_these_inputs_at_a_rate_in_units(arm, monkeypatch):
    monkeypatch.setitem(inputs.PLANS, "small", inputs.PLANS["small"]._replace(steps=20, looks=5))
    x, y, test_x, test_y = fair_split(DIGITS, 3, "test")
    seen, held = pixels(x, 16), pixels(test_x, 16)
    change = inputs.prepared(arm, seen)
    net = inputs.network(64, "relu", torch.nn.Identity(), 3)
    rate = 0.3 * inputs.UNITS[arm]
    for index in itertools.islice(batches(len(x), 64, stream(3, "order")), 20):
        loss = F.cross_entropy(net(change(seen[index])), y[index])
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= rate * p.grad
    share = (net(change(held)).argmax(1) == test_y).double().mean().item()
    cell = {"part": "fair", "group": "input", "arm": arm, "rate": 0.3}
    first, *_, last = inputs.measure(cell, 3, "small", DIGITS)
    assert 0 < first["largest"] < 1
    assert (last["step"], last["accuracy"], last["diverged"]) == (20, share, False)
    assert 0 <= last["validation"] <= 1


# -- made-up rows -----------------------------------------------------------------------------


def gained(level, sd=0.1, steps=None):
    """Inputs that end so many points above 90 %; steps to the target by input."""

    def rows(cell, seed):
        arm = cell["arm"]
        best = 1.0 if arm == "standardized" else 0.3
        more = level.get(arm, 0.0) - abs(cell["rate"] - best) + noise(seed, arm, sd=sd)
        arrives = (steps or {}).get(arm, 100)
        for step in (50, 100, 200, 576, 588, 600):
            row = {"step": step, "diverged": False, "validation": min(1.0, 0.9 * step / arrives)}
            yield row | ({"accuracy": 0.9 + more / 100} if step > 500 else {})

    return rows


def verdicts(*args, **kwargs):
    options = {k: kwargs.pop(k) for k in ("budget", "data", "seeds") if k in kwargs}
    rows, _ = simulate(inputs, gained(*args, **kwargs), **options)
    return judged(inputs, rows)


@pytest.mark.parametrize(
    ("far", "sd", "status"),
    [(-1.0, 0.1, "supported"), (0.0, 0.05, "refuted"), (1.0, 0.1, "refuted"),
     (-0.4, 2.0, "inconclusive")],
)  # fmt: skip
def test_inputs_near_zero_are_better_or_not(far, sd, status):
    found = verdicts({"x + 3": far}, sd)["zero-centred"]
    assert (found.status, found.published_status) == (status, None)
    if sd < 1:
        assert found.effect == pytest.approx(-far, abs=0.15)
        assert found.planned_half_width <= 0.15
    assert found.reported == claims()["zero-centred"].reported
    assert [c["name"] for c in found.cells if c["part"] == "shown"][-1] == "hidden tanh − sigmoid"


@pytest.mark.parametrize(
    ("level", "status"),
    [
        ({"0 to 255": -3.0}, "supported"),
        ({}, "refuted"),
        ({"0 to 255": -3.0, "z-score": -3.0}, "mixed"),
        ({"0 to 255": -3.0, "[-2, 2]": -3.0}, "mixed"),
        ({"0 to 255": -3.0, "[-2, 2]": -3.0, "z-score": -5.0}, "refuted"),
    ],
)
def test_both_kinds_of_normalized_inputs_have_to_be_better(level, status):
    found = verdicts(level)["input-norm-speed"]
    assert found.status == status
    assert len([c for c in found.cells if c["part"] == "fair"]) == 5
    assert verdicts({"0 to 255": -0.4}, 2.5)["input-norm-speed"].status == "inconclusive"


def test_the_speed_is_shown_and_who_came_late_is_counted():
    found = verdicts({"0 to 255": -3.0}, steps={"0 to 255": 200})["input-norm-speed"]
    (cell,) = [c for c in found.cells if c["name"].endswith("0 to 255 / standardized")]
    assert cell["effect"] == pytest.approx(math.log(2))
    late = verdicts({"0 to 255": -3.0}, steps={"0 to 255": 1000})["input-norm-speed"]
    assert any(note.startswith("Runs that did not reach 90 %") for note in late.notes)


def test_all_arms_have_the_same_trials_and_the_card_tells_the_rates_as_they_were():
    rows, asked = simulate(inputs, gained({"0 to 255": -3.0}))
    tried = {}
    for cell in asked:
        if (cell.arm["part"], cell.arm["group"]) == ("tuning", "input"):
            tried.setdefault(cell.arm["arm"], set()).add(cell.arm["rate"])
    assert len(tried) == 9
    assert {frozenset(v) for v in tried.values()} == {frozenset({0.1, 0.3, 1.0, 3.0})}
    notes = " ".join(judged(inputs, rows)["zero-centred"].notes)
    assert "x + 3 at 0.003; 0 to 255 at 9e-06" in notes
    assert "standardized at 0.1" in notes


def test_another_delta_and_missing_runs():
    rows, _ = simulate(inputs, gained({"x + 3": -1.0}))
    with overruled({"zero-centred": {"delta": 3.0}}):
        assert judged(inputs, rows)["zero-centred"].status == "refuted"
    for part in ("tuning", "fair", "pilot"):
        found = judged(inputs, [r for r in rows if r["part"] == part])
        assert {v.status for v in found.values()} == {"inconclusive"}
    assert inputs.judge([]) == []


def test_the_estimate_is_about_what_a_run_asks_for():
    for claim, sd in (("small", 0.25), ("full", 0.25)):
        expected = sum(c.cost for c in inputs.expected(claim, "mnist", None))
        _, asked = simulate(inputs, gained({"0 to 255": -3.0}, sd), claim)
        assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    level = {"0 to 255": -3.0}
    assert {v.status for v in verdicts(level, data="digits").values()} == {"demo"}
    found = verdicts(level, budget="tiny", seeds=8)
    assert {v.status for v in found.values()} == {"inconclusive"}


def test_the_whole_experiment_runs_on_the_digits():
    rows, asked = simulate(
        inputs, lambda cell, seed: inputs.measure(cell, seed, "tiny", DIGITS), "tiny", "digits", 1
    )
    assert len(asked) == 11 * 3
    assert {v.status for v in judged(inputs, rows).values()} == {"demo"}
