"""The experiment on gamma and beta: networks, what is asked for and what is concluded."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gammabeta.studies import _data, affine
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


# -- networks ---------------------------------------------------------------------------------


def kinds(arm):
    return [type(layer).__name__ for layer in affine.network(64, "sigmoid", arm, 0).layers]


def test_bn_stands_before_the_activation_or_on_the_layers_input():
    before = ["Linear", "BatchNorm1d", "Sigmoid"] * 2 + ["Linear"]
    assert kinds("learned") == before
    assert kinds("input") == ["BatchNorm1d", "Linear", "Sigmoid"] * 2 + ["Linear"]
    for arm in ("fixed", "gamma", "beta"):
        assert kinds(arm) == [k.replace("BatchNorm1d", "Normalized") for k in before]
    net = affine.network(64, "relu", "input", 0, 0.5)
    assert [m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm1d)] == [64, 50]


def test_arms_start_alike_and_learn_what_they_are_named_after():
    nets = {arm: affine.network(64, "sigmoid", arm, 5) for arm in affine.GROUPS["sigmoid"]}
    weights = {
        arm: [m.weight for m in net.layers if isinstance(m, nn.Linear)] for arm, net in nets.items()
    }
    for own in weights.values():
        assert all(torch.equal(a, b) for a, b in zip(own, weights["learned"], strict=True))
    count = {arm: sum(p.numel() for p in net.parameters()) for arm, net in nets.items()}
    assert count["learned"] - count["fixed"] == 400
    assert count["gamma"] - count["fixed"] == count["beta"] - count["fixed"] == 200
    # gammas and betas of 64 pixels and 100 units, biases of 200 units
    assert count["input"] - count["fixed"] == 2 * 164 + 200
    x = torch.rand(50, 64, generator=stream(0, "x"))
    out = [nets[arm](x) for arm in ("learned", "fixed", "gamma", "beta")]
    for other in out[1:]:
        torch.testing.assert_close(other, out[0])


@pytest.mark.parametrize("arm", ["fixed", "gamma", "beta", "input"])
def test_a_run_is_plain_training(arm, monkeypatch):
    monkeypatch.setitem(affine.PLANS, "small", affine.PLANS["small"]._replace(steps=20))
    x, y, test_x, test_y = fair_split(DIGITS, 4, "test")
    x, held = pixels(x, 16), pixels(test_x, 16)
    units, g = [64, 100, 100, 10], stream(4, "weights")
    ws = []
    for fan, out in itertools.pairwise(units):
        std = (2 / fan) ** 0.5
        w = nn.init.trunc_normal_(torch.empty(out, fan), std=std, a=-2 * std, b=2 * std,
                                  generator=g)  # fmt: skip
        ws.append(w.requires_grad_())
    sizes = [64, 100] if arm == "input" else [100, 100]
    learns = {"gamma": arm in ("gamma", "input"), "beta": arm in ("beta", "input")}
    gammas = [torch.ones(n, requires_grad=learns["gamma"]) for n in sizes]
    betas = [torch.zeros(n, requires_grad=learns["beta"]) for n in sizes]
    biases = [torch.full((n,), 0.1).requires_grad_() for n in units[1:]]
    running = [(torch.zeros(n), torch.ones(n)) for n in sizes]

    def forward(h, training):
        for k in range(2):
            if arm != "input":
                h = h @ ws[k].T
            h = F.batch_norm(h, *running[k], gammas[k], betas[k], training)
            if arm == "input":
                h = h @ ws[k].T + biases[k]
            h = h.sigmoid()
        return h @ ws[2].T + biases[2]

    learned = [*ws, biases[2], *(biases[:2] if arm == "input" else ())]
    learned += [p for p in (*gammas, *betas) if p.requires_grad]
    update = torch.optim.SGD(learned, lr=0.3)
    for index in itertools.islice(batches(len(x), 64, stream(4, "order")), 20):
        update.zero_grad()
        F.cross_entropy(forward(x[index], True), y[index]).backward()
        update.step()
    with torch.no_grad():
        share = (forward(held, False).argmax(1) == test_y).double().mean().item()
    cell = {"part": "fair", "group": "sigmoid", "arm": arm, "rate": 0.3}
    *_, last = affine.measure(cell, 4, "small", DIGITS)
    assert (last["step"], last["diverged"]) == (20, False)
    assert last["accuracy"] == pytest.approx(share, abs=0.004)
    if arm == "input":
        assert "gamma" not in last
    else:
        assert last["gamma"] == pytest.approx(torch.cat(gammas).abs().mean().item(), rel=1e-3)
        assert last["beta"] == pytest.approx(torch.cat(betas).std().item(), rel=1e-2, abs=1e-9)
        assert 0 < last["bending"] < 0.5


# -- made-up rows -----------------------------------------------------------------------------


def arms(needed=0.0, form=0.0, gamma=1.2, sd=0.1, **by_group):
    """Points that learned gains over fixed, and input over learned; gamma at the end."""

    def rows(cell, seed):
        arm, group = cell["arm"], cell["group"]
        need, more = by_group.get(group, (needed, form))
        level = {"learned": need, "input": need + more, "gamma": need / 2}.get(arm, 0.0)
        best = {"fixed": 1.0}.get(arm, 3.0) if group == "sigmoid" else 0.3
        level += 92 - abs(cell["rate"] - best) + noise(seed, group, arm, sd=sd)
        for step in (1, 2, 3):
            row = {"step": step, "accuracy": level / 100, "diverged": False}
            if step == 3 and group == "sigmoid" and arm != "input" and cell["part"] != "tuning":
                end = gamma + noise(seed, arm, sd=0.01) if arm == "learned" else 1.0
                row |= {"gamma": end, "beta": 0.2, "bending": 0.05 if arm == "learned" else 0.02}
            yield row

    return rows


def verdicts(*args, **kwargs):
    options = {k: kwargs.pop(k) for k in ("budget", "data", "seeds") if k in kwargs}
    rows, _ = simulate(affine, arms(*args, **kwargs), **options)
    return judged(affine, rows)


@pytest.mark.parametrize(
    ("needed", "gamma", "status"),
    [
        (1.0, 1.2, "supported"),
        (0.0, 1.2, "mixed"),
        (1.0, 0.9, "mixed"),
        (0.0, 0.9, "refuted"),
        (1.0, 1.0, "inconclusive"),
    ],
)
def test_gamma_has_to_grow_and_the_network_to_gain(needed, gamma, status):
    found = verdicts(needed, gamma=gamma)["affine-range"]
    assert (found.status, found.published_status) == (status, None)
    assert found.effect == pytest.approx(gamma - 1, abs=0.02)
    assert found.planned_half_width < 0.05
    (bent,) = [c for c in found.cells if c["name"].endswith("sigmoids, learned − fixed")]
    assert bent["effect"] == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("sigmoid", "relu", "status"),
    [
        (1.0, 1.0, "supported"),
        (0.0, 0.0, "refuted"),
        (-1.0, -1.0, "refuted"),
        (1.0, 0.0, "mixed"),
        (0.3, 0.3, None),
    ],
)
def test_power_is_lost_without_gamma_and_beta_or_not(sigmoid, relu, status):
    found = verdicts(sigmoid=(sigmoid, 0.0), relu=(relu, 0.0))["affine-needed"]
    if status is None:  # on the boundary: never refuted as if nothing were lost
        assert found.status != "refuted"
    else:
        assert found.status == status
    assert found.n >= 8
    assert found.reported == claims()["affine-needed"].reported


def test_noise_decides_nothing():
    found = verdicts(0.2, 0.4, sd=2.0)
    assert found["affine-needed"].status == found["layer-form"].status == "inconclusive"
    assert found["affine-needed"].n == 16


@pytest.mark.parametrize(
    ("sigmoid", "relu", "status"),
    [(1.0, 1.0, "supported"), (0.0, 0.0, "refuted"), (-1.0, -1.0, "refuted"), (1.0, -1.0, "mixed")],
)
def test_the_form_of_the_layer(sigmoid, relu, status):
    found = verdicts(sigmoid=(0.5, sigmoid), relu=(0.5, relu))["layer-form"]
    assert found.status == status
    assert found.effect == pytest.approx(min(sigmoid, relu), abs=0.15)
    if sigmoid == relu == -1.0:
        assert "reversed" in found.sentence


def test_every_arm_of_a_network_has_the_same_trials():
    _, asked = simulate(affine, arms(1.0))
    tried = {}
    for cell in asked:
        if cell.arm["part"] == "tuning":
            tried.setdefault((cell.arm["group"], cell.arm["arm"]), set()).add(cell.arm["rate"])
    assert len(tried) == 8
    assert {frozenset(v) for (g, _), v in tried.items() if g == "relu"} == {frozenset(
        {0.1, 0.3, 1.0}
    )}  # fmt: skip


def test_another_delta_and_missing_runs():
    rows, _ = simulate(affine, arms(1.0, 1.0))
    with overruled({"affine-needed": {"delta": 3.0}, "layer-form": {"delta": 3.0}}):
        found = judged(affine, rows)
        assert found["affine-needed"].status == found["layer-form"].status == "refuted"
    for part in ("tuning", "fair", "pilot"):
        found = judged(affine, [r for r in rows if r["part"] == part])
        assert {v.status for v in found.values()} == {"inconclusive"}
    assert affine.judge([]) == []


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in affine.expected("small", "mnist", None))
    _, asked = simulate(affine, arms(1.0, sd=0.13))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    assert {v.status for v in verdicts(1.0, data="digits").values()} == {"demo"}
    assert {v.status for v in verdicts(1.0, budget="tiny", seeds=8).values()} == {"inconclusive"}


def test_the_whole_experiment_runs_on_the_digits():
    rows, asked = simulate(
        affine, lambda cell, seed: affine.measure(cell, seed, "tiny", DIGITS), "tiny", "digits", 1
    )
    assert len(asked) == 8 * 3
    assert {v.status for v in judged(affine, rows).values()} == {"demo"}
