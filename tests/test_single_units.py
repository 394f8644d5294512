"""The experiment on clamped units: runs, what is asked for and what is concluded."""

import pytest
import torch
from torch.nn import functional as F

from gammabeta.studies import _data, single_units
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._train import fair_split, pixels, stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


# -- one cell ---------------------------------------------------------------------------------


def test_arms_are_what_their_names_say():
    def kinds(arm):
        return [type(m).__name__ for m in single_units.network(64, "100-100", arm, 0).layers]

    assert kinds("none") == ["Linear", "ReLU"] * 2 + ["Linear"]
    assert kinds("bn, dropout 0.2") == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2 + ["Linear"]
    net = single_units.network(64, "200-200", "bn", 0, 0.5)
    assert net.layers[0].out_features == 100


def test_clamping_replaces_units_by_their_mean_behind_the_activation():
    net = single_units.network(64, "100-100", "bn", 1, 0.1)  # 10 and 10 units
    x, y, test_x, test_y = fair_split(DIGITS, 1, "test", 300)
    x, held, labels = pixels(x, 16), pixels(test_x, 16), test_y
    for _ in range(20):
        F.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.5 * p.grad
        net.zero_grad()
    found = single_units.ablation(net, x, held, labels, 3, stream(5, "clamped"))
    assert net.training
    net.eval()

    def hidden(h, units, k):
        for layer in net.layers[3 * k : 3 * k + 3]:
            h = layer(h)
        mean = reference[k].mean(0)
        return torch.stack(
            [mean[u].expand(len(h)) if u in units else h[:, u] for u in range(10)], 1
        )

    with torch.no_grad():
        one = net.layers[:3](x)
        reference = [one, net.layers[3:6](one)]
        generator, curve = stream(5, "clamped"), [0.0] * 10
        for _ in range(3):
            order = torch.randperm(20, generator=generator).tolist()
            for k in range(10):
                units = order[: 2 * k]
                h = hidden(held, {u for u in units if u < 10}, 0)
                h = hidden(h, {u - 10 for u in units if u >= 10}, 1)
                right = (net.layers[6](h).argmax(1) == labels).double().mean().item()
                curve[k] += right / 3
    assert found == pytest.approx([c / curve[0] for c in curve])
    assert found[0] == 1
    assert found[9] < 1


def test_training_ends_at_the_loss_or_is_marked(monkeypatch):
    plan = single_units.PLANS["small"]._replace(size=300, loss=0.5, orders=1, steps=400)
    monkeypatch.setitem(single_units.PLANS, "small", plan)
    cell = {"part": "fair", "group": "100-100", "arm": "bn", "rate": 0.1}
    *curve, last = single_units.measure(cell, 0, "small", DIGITS)
    assert last["step"] % 5 == 0
    assert last["step"] < 400
    assert last["train_loss"] <= 0.5
    assert not last["diverged"]
    assert [row["x"] for row in curve] == list(single_units.SHARES)
    ys = [row["y"] for row in curve]
    assert last["area"] == pytest.approx((sum(ys) - (ys[0] + ys[-1]) / 2) / 9)
    # the loss one look before was larger: it is the first that arrives
    monkeypatch.setitem(
        single_units.PLANS, "small", plan._replace(steps=last["step"] - 5, loss=0.5)
    )
    (row,) = single_units.measure(cell, 0, "small", DIGITS)
    assert row["diverged"]
    assert "area" not in row
    assert row["train_loss"] > 0.5
    (row,) = single_units.measure({**cell, "rate": 1e9, "arm": "none"}, 0, "small", DIGITS)
    assert row["diverged"]


# -- made-up rows -----------------------------------------------------------------------------

AREAS = {"none": 0.0, "bn": 0.1, "dropout 0.2": 0.05, "dropout 0.5": 0.2, "bn, dropout 0.2": 0.15}


def clamped(bn=0.1, gain=1.0, follows=1.0, sd=0.005, late=()):
    """BN adds to the area and to accuracy; accuracy of the arms follows their areas, or not."""

    def rows(cell, seed):
        arm, group = cell["arm"], cell["group"]
        size = bn if arm == "bn" else AREAS[arm]
        share = gain if arm == "bn" else follows * 10 * AREAS[arm]
        best = 1.0 if arm.startswith("bn") else 0.3
        share += 90 - abs(cell["rate"] - best) + noise(seed, group, arm, "share", sd=20 * sd)
        arrived = (arm, seed) not in late
        row = {"step": 100, "accuracy": share / 100, "diverged": not arrived, "train_loss": 0.1}
        if cell["part"] != "tuning" and arrived:
            row["area"] = 0.6 + size + noise(seed, group, arm, sd=sd)
            head = {"kind": "curve", "curve": group, "series": arm}
            yield from ({**head, "x": x, "y": 1 - x / 2} for x in (0.0, 0.9))
        yield row

    return rows


def verdicts(*args, **kwargs):
    options = {k: kwargs.pop(k) for k in ("budget", "data", "seeds") if k in kwargs}
    rows, _ = simulate(single_units, clamped(*args, **kwargs), **options)
    return judged(single_units, rows)


@pytest.mark.parametrize(
    ("bn", "gain", "sd", "status"),
    [
        (0.1, 1.0, 0.005, "supported"),
        (0.0, 1.0, 0.005, "refuted"),
        (-0.1, 1.0, 0.005, "refuted"),
        (0.1, 0.0, 0.005, "inconclusive"),
        (0.0, -1.0, 0.005, "inconclusive"),
        (0.04, 9.0, 0.08, "inconclusive"),
    ],
)
def test_bn_relies_less_on_units_where_it_also_regularizes(bn, gain, sd, status):
    found = verdicts(bn, gain, sd=sd)["unit-reliance"]
    assert (found.status, found.published_status) == (status, None)
    if gain <= 0:
        assert "nothing to explain here" in found.sentence
    if sd < 0.01:
        assert found.effect == pytest.approx(bn, abs=0.01)
        assert found.planned_half_width <= 0.015
    assert found.n >= 8
    assert sum(note.startswith("Positive control") for note in found.notes) == 2


@pytest.mark.parametrize(
    ("gain", "follows", "sd", "status"),
    [
        (1.0, 1.0, 0.001, "supported"),
        (-1.0, -1.0, 0.001, "refuted"),
        (0.0, 0.0, 0.03, "inconclusive"),
    ],
)
def test_networks_that_bear_clamping_generalize_or_not(gain, follows, sd, status):
    found = verdicts(0.1, gain, follows, sd)["single-direction"]
    assert found.status in ((status, "refuted") if status == "inconclusive" else (status,))
    if sd < 0.01:
        assert found.effect == pytest.approx(1.0 if follows > 0 else -1.0, abs=0.2)


def test_runs_that_did_not_arrive_are_left_out_and_counted():
    found = verdicts(late={("bn", 3), ("dropout 0.5", 4)})
    assert (
        "Runs that did not arrive at the loss, and are left out: 3." in found["unit-reliance"].notes
    )  # seed 3 in both networks
    assert found["unit-reliance"].n == 7
    assert found["single-direction"].n == 6


def test_all_arms_have_the_same_trials():
    _, asked = simulate(single_units, clamped())
    tried = {}
    for cell in asked:
        if cell.arm["part"] == "tuning":
            tried.setdefault((cell.arm["group"], cell.arm["arm"]), set()).add(cell.arm["rate"])
    assert len(tried) == 7
    assert {frozenset(v) for v in tried.values()} == {frozenset({0.1, 0.3, 1.0, 3.0})}


def test_another_delta_and_missing_runs():
    rows, _ = simulate(single_units, clamped())
    with overruled({"unit-reliance": {"delta": 0.5}}):
        assert judged(single_units, rows)["unit-reliance"].status == "refuted"
    with overruled({"unit-reliance": {"gain": 5.0}}):
        assert judged(single_units, rows)["unit-reliance"].status == "inconclusive"
    for part in ("tuning", "fair", "pilot"):
        found = judged(single_units, [r for r in rows if r["part"] == part])
        assert {v.status for v in found.values()} == {"inconclusive"}
    assert single_units.judge([]) == []
    reported = judged(single_units, rows)["unit-reliance"].reported
    assert reported == claims()["unit-reliance"].reported


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in single_units.expected("small", "mnist", None))
    _, asked = simulate(single_units, clamped(sd=0.014))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    assert {v.status for v in verdicts(data="digits").values()} == {"demo"}
    assert {v.status for v in verdicts(budget="tiny", seeds=8).values()} == {"inconclusive"}


def test_the_whole_experiment_runs_on_the_digits():
    rows, asked = simulate(
        single_units,
        lambda cell, seed: single_units.measure(cell, seed, "tiny", DIGITS),
        "tiny",
        "digits",
        1,
    )
    assert len(asked) == 7 * 3
    assert {v.status for v in judged(single_units, rows).values()} == {"demo"}
    assert sum("area" in row for row in rows) == 7
