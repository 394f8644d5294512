"""The experiment on decay of gamma and beta: what decays, and what is concluded."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.studies import _data, affine_decay
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


def network():
    return MLP((64, 20, 20, 10), "relu", True, stream(0, "weights"))


@pytest.mark.parametrize(
    ("arm", "weights", "gammas", "betas"),
    [("none", 0, 0, 0), ("weights", 3, 0, 0), ("affine", 3, 2, 2), ("toward one", 3, 2, 2)],
)
def test_what_decays_and_where_to(arm, weights, gammas, betas):
    net = network()
    found = affine_decay.decayed(net, arm)
    norms = [layer for layer in net.layers if isinstance(layer, BatchNorm1d)]
    by = {id(p): target for p, target in found}
    assert len(found) == len(by) == weights + gammas + betas
    assert sum(p.dim() == 2 for p, _ in found) == weights
    targets = [by[id(layer.weight)] for layer in norms if id(layer.weight) in by]
    assert targets == [1.0 if arm == "toward one" else 0.0] * gammas
    assert [by[id(layer.bias)] for layer in norms if id(layer.bias) in by] == [0.0] * betas
    (last,) = (p for p in net.layers[-1].parameters() if p.dim() == 1)
    assert id(last) not in by


def test_decay_of_all_three_is_that_of_pytorchs_sgd(monkeypatch):
    seen = []
    monkeypatch.setattr(affine_decay, "accuracy", lambda net, *_: seen.append(net) or 0.5)
    cell = {"part": "fair", "group": "decay 0.01", "arm": "affine", "rate": 0.3}
    *_, row = affine_decay.measure(cell, 0, "tiny", DIGITS)
    plan = affine_decay.PLANS["tiny"]
    x, y, *_ = fair_split(DIGITS, 0, "test", plan.images)
    net = MLP((64, 100, 100, 10), "relu", True, stream(0, "weights"))
    kept = [net.layers[-1].bias]
    rest = [p for p in net.parameters() if p is not kept[0]]
    groups = [{"params": rest, "weight_decay": 0.01}, {"params": kept}]
    update = torch.optim.SGD(groups, lr=0.3)
    for index in itertools.islice(batches(plan.images, 64, stream(0, "order")), plan.steps):
        update.zero_grad()
        F.cross_entropy(net(pixels(x[index], 16)), y[index]).backward()
        update.step()
    for a, b in zip(seen[-1].parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    gammas = [layer.weight for layer in net.layers if isinstance(layer, BatchNorm1d)]
    assert row["gamma"] == pytest.approx(torch.cat(gammas).abs().mean().item(), rel=1e-3)


def test_without_a_gradient_only_the_distance_to_the_target_shrinks():
    parameter = nn.Parameter(torch.tensor([3.0, -1.0, 1.0]))
    parameter.grad = torch.zeros(3)
    with torch.no_grad():
        for _ in range(10):
            affine_decay.step_back(parameter, 1.0, 0.5, 0.2)
    left = 0.9**10
    torch.testing.assert_close(parameter.data, 1 + left * torch.tensor([2.0, -2.0, 0.0]))
    with pytest.raises(ValueError, match="a gradient was expected"):
        affine_decay.step_back(nn.Parameter(torch.ones(1)), 0.0, 0.5, 0.2)


# -- made-up rows -------------------------------------------------------------------------------


def made(affine=0.0, toward=0.0, sd=0.02, best=None):
    """What decaying gamma and beta too gains, in points; the decay that is best, by arm."""
    best = {"weights": 0.001, "affine": 0.01, "toward one": 0.001, **(best or {})}

    def rows(cell, seed):
        level = 93 + {"affine": affine, "toward one": toward}.get(cell["arm"], 0.0)
        level -= abs(math.log10(cell["rate"] / 0.3))
        if cell["group"] != affine_decay.NONE:
            off = math.log10(affine_decay.DECAYS[cell["group"]] / best[cell["arm"]])
            level -= 0.5 * abs(off)
        level += noise(seed, cell["arm"], cell["part"], sd=sd)
        found = [{"step": s, "accuracy": level / 100, "diverged": False} for s in (480, 490, 500)]
        found[-1] |= {"gamma": 0.9, "beta": 0.1}
        return found

    return rows


def verdict(*args, budget="small", data="mnist", seeds=None, **kwargs):
    rows, _ = simulate(affine_decay, made(*args, **kwargs), budget, data, seeds)
    return judged(affine_decay, rows)["wd-gamma-beta"]


@pytest.mark.parametrize(
    ("affine", "sd", "status"),
    [(0.4, 0.02, "supported"), (0.0, 0.02, "refuted"), (-0.4, 0.02, "refuted"),
     (0.1, 0.6, "inconclusive")],
)  # fmt: skip
def test_decay_of_gamma_and_beta_has_to_help(affine, sd, status):
    found = verdict(affine, sd=sd)
    assert (found.status, found.published_status) == (status, None)
    assert found.n == (16 if sd == 0.6 else 5)


def test_each_arm_has_its_own_decay_and_rate_and_the_rest_is_shown():
    rows, asked = simulate(affine_decay, made(0.4, -2.0))
    fair = {(c.arm["arm"], c.arm["group"], c.arm["rate"]) for c in asked if c.arm["part"] == "fair"}
    assert fair == {("weights", "decay 0.001", 0.3), ("affine", "decay 0.01", 0.3)}
    found = judged(affine_decay, rows)["wd-gamma-beta"]
    assert found.status == "supported"
    cells = {c["name"]: c for c in found.cells}
    assert cells["toward one − weights only"]["effect"] == pytest.approx(-2, abs=0.1)
    same = "affine − weights only, both at the rate and decay of weights only"
    assert cells[same]["effect"] == pytest.approx(-0.1, abs=0.1)
    assert cells["weights only − no decay"]["n"] == 5
    assert any("The largest decay tried: affine." in note for note in found.notes)
    without = [r for r in rows if r["part"] != "shown"]
    assert judged(affine_decay, without)["wd-gamma-beta"].effect == found.effect


def test_digits_tiny_missing_rows_another_delta_and_the_estimate():
    assert verdict(data="digits").status == "demo"
    assert verdict(budget="tiny", seeds=10).status == "inconclusive"
    rows, asked = simulate(affine_decay, made(0.2))
    assert judged(affine_decay, rows)["wd-gamma-beta"].status == "supported"
    with overruled({"wd-gamma-beta": {"delta": 0.3}}):
        assert judged(affine_decay, rows)["wd-gamma-beta"].status == "refuted"
    for part in ("tuning", "fair", "pilot", "shown"):
        left = [r for r in rows if r["part"] == part]
        assert judged(affine_decay, left)["wd-gamma-beta"].status == "inconclusive"
    _, asked = simulate(affine_decay, made(sd=1.0))
    expected = sum(c.cost for c in affine_decay.expected("small", "mnist", None))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_the_registry_agrees_and_the_whole_experiment_runs_on_the_digits():
    owned = {i for i, claim in claims().items() if claim.experiment == "affine-decay"}
    assert owned == set(affine_decay.CLAIMS)
    rows, _ = simulate(
        affine_decay, lambda cell, seed: affine_decay.measure(cell, seed, "tiny", DIGITS),
        "tiny", "digits", 2,
    )  # fmt: skip
    assert {v.status for v in judged(affine_decay, rows).values()} == {"demo"}
    assert [f["id"] for f in affine_decay.figures(rows)] == ["affine-decay-tuning"]
    assert affine_decay.judge([]) == affine_decay.figures([]) == []
