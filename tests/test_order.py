"""The experiment on the placement of BN: networks, what is asked for and what is concluded."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gammabeta.studies import _data, order
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


# -- networks ---------------------------------------------------------------------------------


def kinds(group, placement, side=28):
    return [type(m).__name__ for m in order.placed(side**2, group, placement, 0).layers]


def test_bn_stands_before_or_after_every_hidden_activation():
    assert kinds("dense tanh", "before") == ["Linear", "BatchNorm1d", "Tanh"] * 2 + ["Linear"]
    assert kinds("dense tanh", "after") == ["Linear", "Tanh", "BatchNorm1d"] * 2 + ["Linear"]
    hidden = {
        "before": ["Conv2d", "BatchNorm2d", "ReLU"],
        "after": ["Conv2d", "ReLU", "BatchNorm2d"],
    }
    for placement, layers in hidden.items():
        found = kinds("convolutional relu", placement)
        assert found == ["Unflatten", *layers, *layers, "Flatten", "Linear"]


@pytest.mark.parametrize("group", order.GROUPS)
@pytest.mark.parametrize("side", [8, 14, 28])
def test_both_placements_start_alike_and_bias_is_where_bn_does_not_follow(group, side):
    before, after = (order.placed(side**2, group, p, 3) for p in order.PLACEMENTS)
    weighted = [
        [m for m in net.layers if isinstance(m, nn.Linear | nn.Conv2d)] for net in (before, after)
    ]
    for one, other in zip(*weighted, strict=True):
        assert torch.equal(one.weight, other.weight)
        std = (2 / one.weight[0].numel()) ** 0.5
        assert one.weight.abs().max() <= 2 * std
        assert one.weight.std().item() == pytest.approx(0.88 * std, rel=0.2)
    assert [m.bias is None for m in weighted[0]] == [True, True, False]
    assert all(torch.equal(m.bias, torch.full_like(m.bias, 0.1)) for m in weighted[1])
    assert before(torch.rand(7, side**2)).shape == (7, 10)
    assert order.placed(side**2, group, "after", 3, 0.5)(torch.rand(7, side**2)).shape == (7, 10)


@pytest.mark.parametrize("placement", order.PLACEMENTS)
def test_a_convolutional_run_is_plain_training(placement, monkeypatch):
    small = order.PLANS["small"]._replace(steps={"convolutional": 20})
    monkeypatch.setitem(order.PLANS, "small", small)
    x, y, test_x, test_y = fair_split(DIGITS, 4, "test")
    net = order.placed(64, "convolutional relu", placement, 4)
    update = torch.optim.SGD(net.parameters(), lr=0.3)
    for index in itertools.islice(batches(len(x), 64, stream(4, "order")), 20):
        update.zero_grad()
        F.cross_entropy(net(pixels(x[index], 16)), y[index]).backward()
        update.step()
    share = (net.eval()(pixels(test_x, 16)).argmax(1) == test_y).double().mean().item()
    cell = {"part": "fair", "group": "convolutional relu", "arm": placement, "rate": 0.3}
    *_, last = order.measure(cell, 4, "small", DIGITS)
    assert (last["step"], last["accuracy"], last["diverged"]) == (20, share, False)


@pytest.mark.parametrize("group", [g for g, (kind, _) in order.NETWORKS.items() if kind == "dense"])
def test_only_after_the_activation_are_the_moments_those_of_gamma_and_beta(group):
    x = torch.rand(300, 64, generator=stream(0, "x"))
    for placement in order.PLACEMENTS:
        net = order.placed(64, group, placement, 1)
        state = {name: value.clone() for name, value in net.state_dict().items()}
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d)]
        with torch.no_grad():
            for norm in norms:
                norm.weight.uniform_(-2, 2, generator=stream(2, "gamma"))
                norm.bias.uniform_(-1, 1, generator=stream(3, "beta"))
        changed = {name: value.clone() for name, value in net.state_dict().items()}
        found = order.received(net, group, placement, x)
        assert all(torch.equal(v, changed[k]) for k, v in net.state_dict().items())
        assert changed.keys() == state.keys()
        if placement == "after":
            assert found["deviation"] < 1e-9
        else:
            assert 0.003 < found["deviation"] < 1


@pytest.mark.parametrize(
    ("activation", "mean", "spread"),
    [(nn.ReLU(), 0.3989, 0.5838), (nn.Sigmoid(), 0.5, 0.2083), (nn.Tanh(), 0.0, 0.6279)],
)
def test_the_moments_of_an_activated_gaussian_are_those_of_the_registry(activation, mean, spread):
    one = torch.ones(1, dtype=torch.float64)
    found = order.gaussian(activation, 0 * one, one)
    assert [v.item() for v in found] == pytest.approx([mean, spread], abs=5e-5)
    z = torch.randn(200000, generator=stream(0, "z"), dtype=torch.float64)
    y = activation(0.7 * z - 0.4)
    found = order.gaussian(activation, -0.4 * one, 0.7 * one)
    assert [v.item() for v in found] == pytest.approx([y.mean().item(), y.std().item()], abs=5e-3)


def test_before_the_activation_gaussian_sums_do_keep_the_promise():
    net = order.placed(64, "dense relu", "before", 1)
    net.layers = net.layers[:3]  # one layer: a sum of Gaussian inputs is Gaussian
    x = torch.randn(40000, 64, generator=stream(0, "x"))
    found = order.received(net, "dense relu", "before", x)
    assert found["deviation"] < 0.02
    assert found["mean"] == pytest.approx(0.3989, abs=5e-3)


# -- made-up rows -----------------------------------------------------------------------------


def after_gains(gain, sd=0.1, **by_activation):
    """BN after gains so many points, or others with some activations."""

    def rows(cell, seed):
        if cell["part"] == "inputs":
            return received(0.2)(cell, seed)
        more = by_activation.get(cell["group"].split()[1], gain) if cell["arm"] == "after" else 0
        level = 92 + more - abs(cell["rate"] - 0.3) + noise(seed, cell["group"], cell["arm"], sd=sd)
        return [{"step": s, "accuracy": level / 100, "diverged": False} for s in (1, 2, 3)]

    return rows


def received(before, after=1e-14, sd=0.01):
    """Deviations from what gamma and beta promise."""

    def rows(cell, seed):
        if cell["part"] != "inputs":
            return after_gains(1.0)(cell, seed)
        jitter = 1 + noise(seed, cell["group"], sd=sd)
        off = {"before": before, "after": after}[cell["arm"]] * jitter
        both = {"deviation": off, "mean": 0.4, "spread": 0.6}
        return [{"step": s, **both} for s in (0, 300)]

    return rows


@pytest.mark.parametrize(
    ("before", "after", "sd", "status"),
    [
        (0.2, 1e-14, 0.01, "supported"),
        (0.01, 1e-14, 0.01, "refuted"),
        (0.2, 1e-3, 0.01, "refuted"),
        (0.06, 1e-14, 0.5, "inconclusive"),
    ],
)
def test_only_bn_after_fixes_the_inputs(before, after, sd, status):
    rows, _ = simulate(order, received(before, after, sd))
    found = judged(order, rows)["post-controls-input"]
    assert (found.status, found.published_status) == (status, None)
    assert len(found.cells) == 12
    assert found.effect == pytest.approx(before, rel=0.5)
    assert any("BN before, tanh, start: mean 0.4000" in note for note in found.notes)


def verdict(*args, budget="small", data="mnist", seeds=None, **kwargs):
    rows, _ = simulate(order, after_gains(*args, **kwargs), budget, data, seeds)
    return judged(order, rows)["bn-order"]


def test_a_gain_in_every_network_is_supported():
    found = verdict(1.0)
    assert (found.status, found.published_status) == ("supported", None)
    assert found.effect == pytest.approx(1.0, abs=0.2)
    assert found.planned_half_width <= 0.15
    assert found.p < 0.05
    assert len(found.cells) == 6
    assert found.reported == claims()["bn-order"].reported


def test_no_gain_or_a_loss_is_refuted():
    assert verdict(0.0).status == "refuted"
    found = verdict(-1.0)
    assert found.status == "refuted"
    assert "reversed" in found.sentence


def test_a_gain_with_relu_alone_is_mixed():
    found = verdict(0.0, relu=1.0)
    assert found.status == "mixed"
    assert found.sentence.startswith("In part: on MNIST")
    assert "dense sigmoid" in found.sentence
    assert verdict(1.0, relu=0.0).status == "mixed"
    # within a level one refuted network refutes it
    assert verdict(1.0, relu=0.0, tanh=0.0).status == "refuted"


def test_noise_is_inconclusive():
    found = verdict(0.4, sd=2.0)
    assert found.status == "inconclusive"
    assert found.n == 16


def test_each_arm_has_its_own_best_rate_from_the_same_trials():
    def rows(cell, seed):
        if cell["part"] == "inputs":
            return received(0.2)(cell, seed)
        best = 1.0 if cell["arm"] == "after" else 0.3
        share = 0.9 - abs(cell["rate"] - best) / 100
        return [{"step": s, "accuracy": share, "diverged": False} for s in (1, 2, 3)]

    _, asked = simulate(order, rows)
    rates = {c.arm["arm"]: c.arm["rate"] for c in asked if c.arm["part"] == "fair"}
    assert rates == {"after": 1.0, "before": 0.3}
    tried = {(c.arm["arm"], c.arm["rate"]) for c in asked if c.arm["part"] == "tuning"}
    assert len(tried) == 2 * 4  # 3.0 came in for both


def test_another_delta_gives_another_verdict():
    rows, _ = simulate(order, after_gains(1.0))
    with overruled({"bn-order": {"delta": 2.0}}):
        assert judged(order, rows)["bn-order"].status == "refuted"


def test_missing_runs_leave_the_verdict_open():
    rows, _ = simulate(order, after_gains(1.0))
    for part in ("tuning", "fair", "pilot"):
        found = judged(order, [r for r in rows if r["part"] == part])
        assert {v.status for v in found.values()} == {"inconclusive"}
    one = [r for r in rows if (r["part"], r["group"]) != ("fair", "dense tanh")]
    assert judged(order, one)["bn-order"].status == "inconclusive"
    assert order.judge([]) == []


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in order.expected("small", "mnist", None))
    _, asked = simulate(order, after_gains(1.0, sd=0.12))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    assert verdict(1.0, data="digits").status == "demo"
    assert verdict(1.0, budget="tiny", seeds=8).status == "inconclusive"


def test_the_whole_experiment_runs_on_the_digits():
    rows, asked = simulate(
        order,
        lambda cell, seed: order.measure(cell, seed, "tiny", DIGITS),
        "tiny",
        "digits",
        1,
    )
    assert len(asked) == 6 * (2 * 2 + 2) + 6
    assert judged(order, rows)["bn-order"].status == "demo"
