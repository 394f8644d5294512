"""The experiment on simultaneous updates: its looks are right, its rules decide as written."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gammabeta.studies import _data, interactions
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._interactions import chain, looks
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, measured, noise, simulate

DIGITS = _data.load("digits")


# -- looks --------------------------------------------------------------------------------------


def test_the_chain_is_the_expansion_of_the_textbook():
    weights = [1.1, 0.9, 1.2, 0.8]
    rate, slopes = 0.05, chain.gradients(weights)
    for k, slope in enumerate(slopes):
        assert slope == pytest.approx(math.prod(weights) / weights[k])
    moved = math.prod(w - rate * g for w, g in zip(weights, slopes, strict=True))
    promise = -rate * sum(g * g for g in slopes)
    change = moved - math.prod(weights)
    assert chain.measured(weights, rate) == pytest.approx(abs(change / promise - 1), rel=1e-9)
    assert chain.measured([2.0], rate) == pytest.approx(0.0, abs=1e-12)


def test_in_the_chain_errors_grow_with_depth_at_one_rate_and_hardly_at_one_promise():
    points = {(r["series"], r["x"]): r["y"] for r in chain.chain(0)}
    assert points[chain.SAME_RATE, 16] > 5 * points[chain.SAME_RATE, 2]
    assert points[chain.SAME_PROMISE, 16] < 2.5 * points[chain.SAME_PROMISE, 2]


def net_and_batch(bn):
    net = MLP((64, 20, 20, 10), "relu", bn, stream(0, "weights"))
    x = torch.rand(30, 64, generator=stream(0, "x"))
    return net, (x, torch.arange(30) % 10)


def loss_of(net, moved, batch):
    return F.cross_entropy(torch.func.functional_call(net, moved, batch[0]), batch[1]).item()


@pytest.mark.parametrize("bn", [True, False])
def test_a_look_is_a_step_by_hand_and_leaves_no_trace(bn):
    net, batch = net_and_batch(bn)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found = looks.errors_at(net, batch) | looks.equal_steps(net, batch)
    plain = looks.plain_step(net, batch, 5.0)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())

    named = dict(net.named_parameters())
    loss = F.cross_entropy(net(batch[0]), batch[1])
    grads = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    squared = sum((g**2).sum().item() for g in grads.values())
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, length in (("error_30", 0.3 * loss.item() / squared), ("error_rate", 0.1)):
        moved = {n: p - length * grads[n] for n, p in named.items()}
        change = loss_of(net, moved, batch) - loss.item()
        assert found[name] == pytest.approx(abs(change / (length * squared) + 1), rel=1e-2)
    moved = dict(named)
    for module in (n for n, m in net.named_modules() if isinstance(m, nn.Linear)):
        own = [n for n in named if n.startswith(f"{module}.")]
        size, slope = (sum((t[n] ** 2).sum() for n in own) ** 0.5 for t in (named, grads))
        moved |= {n: named[n] - 0.3 * size / slope * grads[n] for n in own}
    assert found["raises_30"] == (loss_of(net, moved, batch) > loss.item())
    moved = {n: p - 5.0 * grads[n] for n, p in named.items()}
    assert plain["raises_sgd"] == (loss_of(net, moved, batch) > loss.item())
    assert not found["raises_1"]


def test_a_run_is_plain_training_whatever_is_looked_at(monkeypatch):
    plan = interactions.PLANS["tiny"]._replace(steps=12, every=5)
    monkeypatch.setitem(interactions.PLANS, "tiny", plan)
    x, y, test_x, test_y = fair_split(DIGITS, 3, "test")
    net = MLP((64, *[100] * 4, 10), "relu", True, stream(3, "weights"))
    update = torch.optim.SGD(net.parameters(), lr=0.1)
    for index in itertools.islice(batches(len(x), 128, stream(3, "order")), 12):
        update.zero_grad()
        F.cross_entropy(net(pixels(x[index], 16)), y[index]).backward()
        update.step()
    share = (net.eval()(pixels(test_x, 16)).argmax(1) == test_y).double().mean().item()
    arm = {"part": "fair", "group": "4 layers", "arm": "bn", "rate": 0.1}
    rows = list(interactions.measure(arm, 3, "tiny", DIGITS))
    assert rows[-1]["accuracy"] == share
    assert [r["step"] for r in rows if "loss" in r] == [0, 5, 10]


# -- made-up rows -------------------------------------------------------------------------------


def made(gain=2.0, rises=(0.4, 0.1), raw=(0.4, 0.1), powers=(1.0, 0.2), sd=0.02):
    """Rows of arms (without, with): shares of rising steps, powers of the depth."""

    def rows(cell, seed):
        if cell["part"] == "chain":
            return []
        at, depth = 0 if cell["arm"] == "none" else 1, interactions.DEPTHS[cell["group"]]
        jitter = noise(seed, *cell.values(), sd=sd)
        level = 90 + gain * at + jitter - 5 * abs(cell["rate"] - 0.1)
        found = [{"step": s, "accuracy": level / 100, "diverged": False} for s in (197, 198, 200)]
        for k in range(10) if cell["part"] != "tuning" else ():
            off = 0.05 * depth ** powers[at] * math.exp(jitter)
            look = {"loss": 1.0, **dict.fromkeys(looks.PROMISES, off), "error_rate": off**2}
            for name in (*looks.LENGTHS, "sgd"):
                share = (raw if name == "sgd" else rises)[at] + jitter
                look |= {f"raises_{name}": (k + 0.5) / 10 < share}
                look |= {f"ratio_{name}": 1.0 + at, f"stale_{name}": share}
            found.append({"step": 20 * k, **look})
        return found

    return rows


def verdicts(*args, budget="small", data="mnist", seeds=None, **kwargs):
    rows, _ = simulate(interactions, made(*args, **kwargs), budget, data, seeds)
    return judged(interactions, rows)


def test_fewer_failing_steps_with_bn_are_supported():
    found = verdicts()["stale-update"]
    assert (found.status, found.published_status) == ("supported", "supported")
    assert found.effect == pytest.approx(0.3, abs=0.04)
    assert found.planned_half_width <= claims()["stale-update"].thresholds["delta"] / 2
    assert "40 % without, 10 % with BN" in " ".join(found.notes)


def test_as_many_failing_steps_are_refuted_and_both_settings_have_their_own_verdict():
    found = verdicts(rises=(0.3, 0.3), raw=(0.8, 0.1))["stale-update"]
    assert (found.status, found.published_status) == ("refuted", "supported")
    assert "reversed" in verdicts(rises=(0.1, 0.6))["stale-update"].sentence


def test_errors_that_grow_and_more_so_without_bn_are_supported():
    found = verdicts()["simultaneous-error"]
    assert (found.status, found.published_status) == ("supported", "supported")
    assert found.effect == pytest.approx(1.0, abs=0.05)
    assert verdicts(powers=(0.0, 0.0))["simultaneous-error"].status == "refuted"
    mixed = verdicts(powers=(1.0, 1.0))["simultaneous-error"]
    assert mixed.status == "mixed"
    assert mixed.sentence.startswith("In part")


def test_noise_is_inconclusive_and_states_what_would_decide():
    found = verdicts(rises=(0.4, 0.32), powers=(0.3, 0.14), sd=0.5)
    assert {v.status for v in found.values()} == {"inconclusive"}
    assert any("would decide" in c["reason"] for c in found["stale-update"].cells)
    assert found["stale-update"].n == 16


def test_where_bn_does_not_help_there_is_nothing_to_explain():
    found = verdicts(gain=0.0)
    assert {v.status for v in found.values()} == {"inconclusive"}
    assert found["stale-update"].published_status == "inconclusive"
    assert all(any("Positive control" in n for n in v.notes) for v in found.values())


def test_a_network_that_diverges_without_bn_does_not_hide_that_bn_helps():
    rows, _ = simulate(interactions, made(), seeds=8)
    for row in rows:
        if (row["seed"], row["arm"], row["part"]) == (3, "none", "fair") and "accuracy" in row:
            row["accuracy"] = 0.1
    found = judged(interactions, rows)
    assert {v.status for v in found.values()} == {"supported"}


def test_another_delta_missing_runs_digits_and_tiny():
    rows, asked = simulate(interactions, made())
    with overruled({"stale-update": {"delta": 0.9}}):
        assert judged(interactions, rows)["stale-update"].status == "refuted"
    for part in ("tuning", "fair", "pilot"):
        found = judged(interactions, [r for r in rows if r["part"] == part])
        assert {v.status for v in found.values()} == {"inconclusive"}
    assert interactions.judge([]) == interactions.figures([]) == []
    assert {v.status for v in verdicts(data="digits").values()} == {"demo"}
    tiny = verdicts(budget="tiny", seeds=8)
    assert {v.status for v in tiny.values()} == {"inconclusive"}
    expected = sum(c.cost for c in interactions.expected("small", "mnist", None))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.5)


def test_real_rows_of_the_digits_are_judged_and_drawn():
    arms = [
        {"part": part, "group": group, "arm": norm, "rate": 0.1}
        for part, group in (("fair", "4 layers"), ("published", "4 layers"), ("fair", "1 layer"))
        for norm in ("bn", "none")
    ]
    rows = measured(interactions, arms, DIGITS, seeds=(0,))
    toy = {"part": "chain", "group": "toy", "arm": "none", "rate": 0.0}
    rows += measured(interactions, [toy], DIGITS, seeds=(0,))
    keys = {"raises_30", "ratio_30", "stale_30", "error_rate"}
    assert all(keys <= set(r) for r in rows if "loss" in r and r["part"] == "fair"
               and r["group"] == "4 layers")  # fmt: skip
    trials = [
        {**arm, "part": "tuning", "seed": seed, "budget": "tiny", "data": "digits", "step": 1,
         "accuracy": 0.5, "group": group}
        for arm in arms[:2] for group in interactions.GROUPS for seed in (800, 801)
    ]  # fmt: skip
    found = judged(interactions, [*rows, *trials])
    assert {v.status for v in found.values()} == {"demo"}
    drawn = {f["id"] for f in interactions.figures([*rows, *trials])}
    assert drawn == {f"interactions-{n}" for n in ("depth", "lengths", "chain", "tuning")}
