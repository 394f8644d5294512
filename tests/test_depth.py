"""The experiment on depth: its networks, what it measures before training, what it concludes."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gammabeta.studies import _data, depth
from gammabeta.studies._claims import overruled
from gammabeta.studies._depth import starts
from gammabeta.studies._depth.contrasts import GROUPS, NETWORKS
from gammabeta.studies._depth.nets import Network, network
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")
X = torch.rand(200, 64, generator=stream(0, "x"))


# -- networks ---------------------------------------------------------------------------------


def linear(net):
    return [m for m in net.layers if isinstance(m, nn.Linear)]


def test_arms_share_their_start_and_see_standardized_images():
    with_bn, without = (network(X, Network(3), arm, 1) for arm in ("bn", "none"))
    for one, other in zip(linear(with_bn), linear(without), strict=True):
        assert torch.equal(one.weight, other.weight)
    assert [m.bias is None for m in linear(with_bn)] == [True, True, True, False]
    assert not any(m.bias is None for m in linear(without))
    seen = with_bn.layers[0](X)
    assert (seen.mean().item(), seen.std().item()) == pytest.approx((0, 1), abs=1e-5)
    assert [type(m).__name__ for m in with_bn.layers[1:4]] == ["Linear", "BatchNorm1d", "ReLU"]


@pytest.mark.parametrize("group", GROUPS)
def test_weights_are_as_wide_as_the_protocol_says(group):
    of = NETWORKS[group]
    for arm in GROUPS[group]:
        for layer in linear(network(X, of, arm, 2))[:-1]:
            expected = of.std or 0.8796 * math.sqrt(2 / layer.in_features)
            if arm == "selu":
                expected = 1 / math.sqrt(layer.in_features)
                assert not layer.bias.any()
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("arm", ["bn", "selu"])
def test_a_run_is_plain_training(arm, monkeypatch):
    monkeypatch.setitem(depth.PLANS, "small", depth.PLANS["small"]._replace(steps=15))
    x, y, test_x, test_y = fair_split(DIGITS, 4, "test")
    net = network(pixels(x, 16), NETWORKS["8 layers"], arm, 4)
    update = torch.optim.SGD(net.parameters(), lr=0.1)
    for index in itertools.islice(batches(len(x), 64, stream(4, "order")), 15):
        update.zero_grad()
        F.cross_entropy(net(pixels(x[index], 16)), y[index]).backward()
        update.step()
    share = (net.eval()(pixels(test_x, 16)).argmax(1) == test_y).double().mean().item()
    cell = {"part": "fair", "group": "8 layers", "arm": arm, "rate": 0.1}
    *_, last = depth.measure(cell, 4, "small", DIGITS)
    assert (last["step"], last["accuracy"], last["diverged"]) == (15, share, False)


def test_noise_is_one_percent_of_each_matrix_or_of_the_first():
    net = network(X.double(), Network(3), "none", 1).double()
    for first in (True, False):
        moved = starts.shaken(net, first, stream(0, "noise"))
        sizes = [
            float((a.weight - b.weight).detach().norm() / b.weight.detach().norm())
            for a, b in zip(linear(moved), linear(net), strict=True)
        ]
        rest = 0.0 if first else 0.01
        assert sizes == pytest.approx([0.01, rest, rest, rest])
    # what the first activation receives is linear in the noise
    clean, more = starts.received(net, X.double()), starts.received(moved, X.double())
    difference = net.layers[0](X.double()) @ (linear(moved)[0].weight - linear(net)[0].weight).T
    torch.testing.assert_close(more[0] - clean[0], difference.detach())
    assert len(clean) == 3


def test_selu_keeps_the_moments_of_gaussian_input_and_bn_those_it_gives():
    rows = list(starts.moments(0, DIGITS, tiny=True))
    assert rows == list(starts.moments(0, DIGITS, tiny=True))
    found = {row["cell"]: row["value"] for row in rows if row["kind"] == "value"}
    assert found["variance, ReLU with BN, images"] == pytest.approx(1, abs=1e-3)
    # a fixed point of theory: moments of SELU of a standard Gaussian
    z = torch.randn(10**6, generator=stream(0, "z"))
    assert F.selu(z).var().item() == pytest.approx(1, abs=0.01)
    layers = [row["x"] for row in rows if row.get("series") == "SELU"]
    assert layers == list(range(1, 9))


def test_a_slope_is_that_of_least_squares():
    assert starts.slope(torch.tensor([1.0, 3.0, 5.0])) == pytest.approx(2.0)
    assert starts.slope(torch.tensor([0.0, 1.0, 0.0])) == pytest.approx(0.0)


# -- made-up rows -----------------------------------------------------------------------------

HARD = {
    ("2 layers", "bn"): 94,
    ("2 layers", "none"): 94,
    ("8 layers", "bn"): 94,
    ("8 layers", "none"): 91,
    ("8 layers", "selu"): 94,
    ("20 layers", "bn"): 93,
    ("20 layers", "none"): 80,
    ("2 layers, N(0, 0.1)", "none"): 94,
    ("20 layers, N(0, 0.1)", "none"): 11,
    ("8 sigmoid layers", "bn"): 90,
    ("8 sigmoid layers", "none"): 11,
}


def world(levels=(), sd=0.1, slope=0.03, variance=1.0, limit=(90, 10)):
    """Accuracies by network and arm; slope; variance; accuracy of 10 and of 60 layers."""
    levels = {**HARD, **dict(levels)}

    def rows(cell, seed):
        if cell["part"] in ("noise", "moments"):
            name = "noise in all layers, without", "variance, SELU, Gaussian input"
            pair = (name[0], slope) if cell["part"] == "noise" else (name[1], variance)
            number = pair[1] + noise(seed, cell["part"], sd=1e-3)
            return [{"kind": "value", "cell": pair[0], "value": number}]
        key = cell["group"], cell["arm"]
        if cell["part"] == "limit":
            ends = limit if isinstance(limit, tuple) else limit[cell["rate"]]
            level = ends[0] if cell["group"] == "10 layers" else ends[1]
            both = {"accuracy": 0.1, "accuracy_batch": level / 100}
            return [{"step": s, **both, "diverged": False} for s in (1, 2, 3)]
        peak = 0.3 if "sigmoid" in cell["group"] else 0.1
        level = levels[key] - abs(math.log10(cell["rate"] / peak)) + noise(seed, *key, sd=sd)
        return [{"step": s, "accuracy": level / 100, "diverged": False} for s in (1, 2, 3)]

    return rows


def verdicts(budget="small", data="mnist", seeds=None, **changes):
    rows, _ = simulate(depth, world(**changes), budget, data, seeds)
    return judged(depth, rows)


def test_a_world_that_fits_every_claim_supports_all():
    found = verdicts()
    assert {v.status for v in found.values()} == {"supported"}
    assert {v.published_status for v in found.values()} == {None}
    assert found["deep-hard"].effect == pytest.approx(14, abs=0.3)
    assert found["input-norm-shallow-only"].effect == pytest.approx(13, abs=0.3)
    assert found["selu"].effect == pytest.approx(1, abs=0.01)
    assert found["sigmoid-deep"].effect == pytest.approx(79, abs=0.3)
    assert found["mf-depth-limit"].effect == 1
    assert all(v.p is not None and v.p < 0.05 for v in found.values())
    assert any("Test accuracy: 89.9 %" in note or "Test accuracy: 90" in note
               for note in found["sigmoid-deep"].notes)  # fmt: skip


@pytest.mark.parametrize(
    ("claim", "changes", "status"),
    [
        ("deep-hard", {"levels": {("20 layers", "none"): 93}}, "mixed"),
        (
            "deep-hard",
            {"levels": {("20 layers", "none"): 93, ("20 layers, N(0, 0.1)", "none"): 93}},
            "refuted",
        ),
        ("deep-hard", {"levels": {("20 layers", "none"): 89}, "sd": 20.0}, "inconclusive"),
        ("input-norm-shallow-only", {"levels": {("20 layers", "none"): 93}}, "mixed"),
        ("input-norm-shallow-only", {"slope": 0.001}, "mixed"),
        (
            "input-norm-shallow-only",
            {"levels": {("20 layers", "none"): 93}, "slope": 0.001},
            "refuted",
        ),
        # BN does not gain in depth, but loses in the shallow network: nothing that depth needs
        (
            "input-norm-shallow-only",
            {"levels": {("20 layers", "none"): 93, ("2 layers", "bn"): 89}},
            "inconclusive",
        ),
        ("selu", {"levels": {("8 layers", "selu"): 92}}, "mixed"),
        ("selu", {"variance": 0.5}, "mixed"),
        ("selu", {"variance": 0.5, "levels": {("8 layers", "selu"): 92}}, "refuted"),
        # nothing to explain where BN does not gain
        ("selu", {"levels": {("8 layers", "none"): 94}}, "inconclusive"),
        ("sigmoid-deep", {"levels": {("8 sigmoid layers", "none"): 85}}, "refuted"),
        ("sigmoid-deep", {"levels": {("8 sigmoid layers", "bn"): 32}, "sd": 9.0}, "inconclusive"),
        ("mf-depth-limit", {"limit": (90, 60)}, "refuted"),
        ("mf-depth-limit", {"limit": {0.01: (90, 10), 0.1: (90, 70), 1.0: (90, 10)}}, "refuted"),
        # 10 layers do not train either
        ("mf-depth-limit", {"limit": (10, 10)}, "inconclusive"),
        ("mf-depth-limit", {"limit": (10, 60)}, "refuted"),
    ],
)
def test_other_worlds(claim, changes, status):
    found = verdicts(**changes)[claim]
    assert found.status == status
    if status in ("refuted", "mixed"):
        assert found.sentence.startswith("No:" if status == "refuted" else "In part:")


def test_thresholds_are_those_of_the_registry():
    rows, _ = simulate(depth, world())
    other = {
        "deep-hard": {"delta": 20.0},
        "input-norm-shallow-only": {"delta": 20.0, "slope": 0.1},
        "selu": {"low": 1.2},
        "sigmoid-deep": {"delta": 85.0},
        "mf-depth-limit": {"fails": 5.0},
    }
    with overruled(other):
        found = {claim: v.status for claim, v in judged(depth, rows).items()}
    assert found == {
        "deep-hard": "mixed",
        "input-norm-shallow-only": "refuted",
        "selu": "mixed",
        "sigmoid-deep": "refuted",
        "mf-depth-limit": "refuted",
    }


def test_networks_of_two_claims_take_the_larger_number_of_seeds():
    _, asked = simulate(depth, world(sd=1.5))
    count = {
        group: len(
            {c.seed for c in asked if c.arm.get("group") == group and c.arm["part"] == "fair"}
        )
        for group in GROUPS
    }
    # input-norm-shallow-only asks for more than deep-hard
    assert count["2 layers"] == count["20 layers"] > count["20 layers, N(0, 0.1)"]
    assert count["8 sigmoid layers"] == 5


def test_no_grid_grows_for_a_network_at_chance():
    def rows(cell, seed):
        found = world()(cell, seed)
        if "accuracy" in found[0] and cell["arm"] == "none":
            for row in found:  # best at the smallest rate there is
                row["accuracy"] -= math.log10(cell["rate"]) / 100
        return found

    _, asked = simulate(depth, rows)
    tried = {
        group: {c.arm["rate"] for c in asked if c.arm.get("group") == group
                and c.arm["part"] == "tuning"}
        for group in GROUPS
    }  # fmt: skip
    for group in GROUPS:
        first = set(depth.PLANS["small"].rates[group])
        stuck = group in ("8 sigmoid layers", "20 layers, N(0, 0.1)")
        assert (tried[group] == first) == stuck


def test_missing_runs_leave_verdicts_open():
    rows, _ = simulate(depth, world())
    for part in ("tuning", "fair", "noise"):
        found = judged(depth, [r for r in rows if r["part"] == part])
        assert {v.status for v in found.values()} == {"inconclusive"}
    assert depth.judge([]) == []


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in depth.expected("small", "mnist", None))
    _, asked = simulate(depth, world(sd=0.5))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    assert {v.status for v in verdicts(data="digits").values()} == {"demo"}
    assert {v.status for v in verdicts("tiny", seeds=8).values()} == {"inconclusive"}


def test_the_whole_experiment_runs_on_the_digits():
    rows, asked = simulate(
        depth, lambda cell, seed: depth.measure(cell, seed, "tiny", DIGITS), "tiny", "digits", 1
    )
    assert {c.arm["part"] for c in asked} == {"tuning", "fair", "noise", "moments", "limit"}
    found = judged(depth, rows)
    assert set(found) == set(depth.CLAIMS)
    assert {v.status for v in found.values()} == {"demo"}
