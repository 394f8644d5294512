"""The experiment on recipes: arms are trained as written, its rules decide as written."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from gammabeta.studies import _data, recipe
from gammabeta.studies._claims import overruled
from gammabeta.studies._recipe import training
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, measured, noise, simulate

DIGITS = _data.load("digits")


# -- training -----------------------------------------------------------------------------------


def test_an_arm_is_sgd_with_decay_of_matrices_and_a_rate_that_halves(monkeypatch):
    plan = recipe.PLANS["tiny"]._replace(steps=12)
    monkeypatch.setitem(recipe.PLANS, "tiny", plan)
    kind = recipe.RECIPES["recipe"]["recipe x5"]
    assert (kind.dropout, kind.decay, kind.halvings) == (0.0, 1e-4, 6)
    monkeypatch.setitem(recipe.RECIPES["recipe"], "recipe x5", kind._replace(decay=0.1))
    x, y, test_x, test_y = fair_split(DIGITS, 5, "test")
    net = training.network(64, kind, 5)
    decayed = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() == 1]
    update = torch.optim.SGD([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr=1)
    for step, index in enumerate(itertools.islice(batches(len(x), 64, stream(5, "order")), 12)):
        for group in update.param_groups:
            group["lr"] = 0.5 * 2 ** (-6 * step / 12)
        update.zero_grad()
        F.cross_entropy(net(pixels(x[index], 16)), y[index]).backward()
        update.step()
    share = (net.eval()(pixels(test_x, 16)).argmax(1) == test_y).double().mean().item()
    arm = {"part": "fair", "group": "recipe", "arm": "recipe x5", "rate": 0.5}
    *_, last = recipe.measure(arm, 5, "tiny", DIGITS)
    assert last["accuracy"] == pytest.approx(share, abs=0.005)


def test_dropout_stands_before_the_last_layer_and_draws_from_its_own_numbers():
    kind = recipe.RECIPES["recipe"]["inception"]
    net = training.network(64, kind, 0)
    *_, dropped, last = net.layers
    assert (dropped.p, type(last).__name__) == (0.4, "Linear")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    y = dropped(torch.ones(200, 100))
    assert torch.equal(torch.get_rng_state(), state)
    assert (y == 0).double().mean().item() == pytest.approx(0.4, abs=0.02)
    assert y.max().item() == pytest.approx(1 / 0.6)
    assert torch.equal(dropped.eval()(torch.ones(3, 3)), torch.ones(3, 3))
    plain = training.network(64, recipe.RECIPES["plain"]["none"], 0)
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("side", [8, 14, 28])
def test_convolutional_arms_start_alike_and_bias_is_where_bn_does_not_follow(side):
    kinds = recipe.RECIPES["convolutional"]
    nets = [training.network(side**2, kinds[arm], 3) for arm in ("bn", "none")]
    weights = [[p for p in net.parameters() if p.dim() > 1] for net in nets]
    assert [len(w) for w in weights] == [3, 3]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    convs = [[m for m in net.layers if isinstance(m, torch.nn.Conv2d)] for net in nets]
    assert [[m.bias is None for m in c] for c in convs] == [[True, True], [False, False]]
    assert [sum("BatchNorm2d" in str(type(m)) for m in net.layers) for net in nets] == [2, 0]
    assert nets[0](torch.rand(5, side**2)).shape == (5, 10)


def test_rates_are_multiples_of_the_best_one_without_bn():
    both = {"bn": 0.3, "none": 0.1}
    best = {"plain": {"bn": 1.0, "none": 0.3}, "recipe": {"inception": 0.1}, "convolutional": both}
    rates = {(w.group, w.arm): w.rate for w in recipe.trained(best, recipe.RECIPES)}
    assert rates["plain", "none"] == rates["plain", "bn x1"] == 0.3
    assert rates["plain", "bn"] == 1.0
    assert rates["plain", "bn x5"] == rates["plain", "sigmoid x5"] == 1.5
    assert rates["plain", "bn x30"] == 9.0
    assert rates["convolutional", "bn x5"] == 0.5
    assert (rates["recipe", "baseline"], rates["recipe", "recipe x30"]) == (0.1, 3.0)


# -- made-up rows -------------------------------------------------------------------------------


def made(gain=1.0, speed=5.0, recipe_speed=5.0, sd=0.05):
    """BN gains so many points, and learns so many times as fast."""

    def rows(cell, seed):
        kind = recipe.RECIPES[cell["group"]][cell["arm"]]
        jitter = noise(seed, *cell.values(), sd=sd)
        best = 0.3 if kind.bn else 0.1
        end = (
            92
            + gain * kind.bn
            + jitter
            - (5 * abs(cell["rate"] - best) * (cell["part"] == "tuning"))
        )
        fast = {"recipe": recipe_speed}.get(cell["group"], speed) if kind.bn else 1.0
        found = []
        for step in recipe.log_steps(1000, 24, first=2):
            reach = 0.9 * (1 - math.exp(-fast * step / 200 * math.exp(jitter)))
            row = {"step": step, "validation": reach}
            if step >= 960:
                row |= {"accuracy": end / 100, "diverged": False, "loss": 0.01}
            found.append(row)
        return found[-3:] if cell["part"] == "tuning" else found

    return rows


def verdicts(*args, budget="small", data="mnist", seeds=None, **kwargs):
    rows, _ = simulate(recipe, made(*args, **kwargs), budget, data, seeds)
    return judged(recipe, rows)


def test_a_higher_accuracy_is_supported_or_refuted():
    found = verdicts()["higher-accuracy"]
    assert (found.status, found.published_status) == ("supported", None)
    assert found.effect == pytest.approx(1.0, abs=0.1)
    assert "loss at the end: bn 0.01" in " ".join(found.notes)
    assert verdicts(gain=0.1)["higher-accuracy"].status == "refuted"
    assert verdicts(gain=-1.0)["higher-accuracy"].status == "refuted"
    wide = verdicts(gain=0.5, sd=1.0)["higher-accuracy"]
    assert (wide.status, wide.n) == ("inconclusive", 16)


def test_a_fifth_of_the_steps_is_supported_and_both_settings_have_their_own_verdict():
    found = verdicts()["imagenet-7pct"]
    assert (found.status, found.published_status) == ("supported", "supported")
    assert math.exp(-found.effect) == pytest.approx(0.2, rel=0.15)
    assert any(n.startswith("bn x5: ") and "% of the steps of none" in n for n in found.notes)
    other = verdicts(speed=1.2)["imagenet-7pct"]
    assert (other.status, other.published_status) == ("refuted", "supported")
    other = verdicts(recipe_speed=0.2)["imagenet-7pct"]
    assert (other.status, other.published_status) == ("supported", "refuted")
    assert "did not arrive" in " ".join(other.notes)
    assert verdicts(speed=2.1, sd=0.4)["imagenet-7pct"].status == "inconclusive"


def test_the_target_is_the_median_of_the_references_last_five_looks():
    best = {"plain": {"bn": 0.3, "none": 0.1}, "recipe": {"inception": 0.1}}
    none, five = recipe.trained(best, {"plain": ("none", "bn x5")})

    def rows(what, shares):
        head = {"part": "fair", **what._asdict(), "seed": 0}
        return [{**head, "step": 10 * (k + 1), "validation": s} for k, s in enumerate(shares)]

    first = rows(none, [0.5, 0.7, 0.8, 0.9, 0.85, 0.8])  # median of the last five: 0.8
    second = rows(five, [0.6, 0.8, 0.9, 0.9, 0.9, 0.9])
    (log,) = recipe.log_ratios(recipe.seen_by([*first, *second]), "fair", none, five)[0].values()
    assert math.exp(log) == pytest.approx(30 / 20)


def test_digits_tiny_missing_rows_another_rule_and_the_estimate():
    assert {v.status for v in verdicts(data="digits").values()} == {"demo"}
    assert {v.status for v in verdicts(budget="tiny", seeds=8).values()} == {"inconclusive"}
    rows, asked = simulate(recipe, made())
    for part in ("tuning", "fair", "pilot", "shown"):
        found = judged(recipe, [r for r in rows if r["part"] == part])
        assert {v.status for v in found.values()} == {"inconclusive"}
    assert recipe.judge([]) == recipe.figures([]) == []
    with overruled({"higher-accuracy": {"points": 2.0}, "imagenet-7pct": {"share": 0.05}}):
        assert {v.status for v in judged(recipe, rows).values()} == {"refuted"}
    expected = sum(c.cost for c in recipe.expected("small", "mnist", None))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_real_rows_of_the_digits_are_judged_and_drawn():
    same = {"bn": 0.1, "none": 0.1}
    best = {"plain": same, "recipe": {"inception": 0.1}, "convolutional": same}
    arms = [
        {"part": "fair" if what.arm in recipe.MAIN[what.group] else "shown", **what._asdict()}
        for what in recipe.trained(best, recipe.RECIPES)
    ]
    rows = measured(recipe, arms, DIGITS)
    tuned = [{"part": "tuning", "group": g, "arm": a, "rate": 0.1}
             for g, names in recipe.GROUPS.items() for a in names]  # fmt: skip
    rows += measured(recipe, tuned, DIGITS, seeds=(800, 801))
    assert {v.status for v in judged(recipe, rows).values()} == {"demo"}
    assert {f["id"] for f in recipe.figures(rows)} == {"recipe-steps", "recipe-tuning"}
