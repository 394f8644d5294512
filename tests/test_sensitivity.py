"""The experiment on settings: they are drawn as written, its rules decide as written."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gammabeta.studies import _data, sensitivity
from gammabeta.studies._claims import overruled
from gammabeta.studies._sensitivity import bootstrap
from gammabeta.studies._sensitivity.bootstrap import paired
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, measured, simulate

DIGITS = _data.load("digits")


# -- settings -----------------------------------------------------------------------------------


def test_settings_fill_their_ranges_and_coordinates_are_not_tied():
    drawn = [sensitivity.setting_of("hyper", seed, 64, 0.0) for seed in range(64)]
    for name, low, high in (("scale", 0.1, 10), ("rate", 1e-3, 3)):
        share = [math.log(getattr(d, name) / low) / math.log(high / low) for d in drawn]
        assert sorted(int(64 * s) for s in share) == list(range(64))  # one in each part
    logs = np.log([[d.scale, d.rate] for d in drawn])
    assert abs(np.corrcoef(logs.T)[0, 1]) < 0.35
    assert [d.momentum for d in drawn] == [0.0, 0.9] * 32
    init = [sensitivity.setting_of("init", seed, 64, 0.3) for seed in range(64)]
    assert min(d.scale for d in init) < 1.2e-3
    assert 8 < max(d.scale for d in init) < 10
    assert {(d.rate, d.momentum) for d in init} == {(0.3, 0.0)}
    assert sensitivity.setting_of("hyper", 64, 64, 0.0) != drawn[0]


def test_both_arms_start_with_the_same_weights_of_the_drawn_scale():
    drawn = sensitivity.Drawn(0.05, 0.1, 0.0)
    for part, std in (("init", 0.05), ("hyper", 0.05 * 0.88 * math.sqrt(2 / 64))):
        both = [sensitivity.started((64, 100, 100, 10), "relu", bn, part, 3, drawn)
                for bn in (True, False)]  # fmt: skip
        one, other = ([p for p in net.parameters() if p.dim() == 2] for net in both)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert one[0].std().item() == pytest.approx(std, rel=0.05)


def test_a_run_is_sgd_with_momentum(monkeypatch):
    plan = sensitivity.PLANS["tiny"]._replace(steps=9, settings=8)
    monkeypatch.setitem(sensitivity.PLANS, "tiny", plan)
    seed = next(s for s in range(1, 8, 2)
                if sensitivity.setting_of("hyper", s, 8, 0.0).rate > 0.02)  # fmt: skip
    drawn = sensitivity.setting_of("hyper", seed, 8, 0.0)
    assert drawn.momentum == 0.9
    x, y, test_x, test_y = fair_split(DIGITS, seed, "test")
    net = sensitivity.started((64, 100, 100, 10), "relu", True, "hyper", seed, drawn)
    update = torch.optim.SGD(net.parameters(), lr=drawn.rate, momentum=0.9)
    for index in itertools.islice(batches(len(x), 64, stream(seed, "order")), 9):
        update.zero_grad()
        F.cross_entropy(net(pixels(x[index], 16)), y[index]).backward()
        update.step()
    share = (net.eval()(pixels(test_x, 16)).argmax(1) == test_y).double().mean().item()
    arm = {"part": "hyper", "group": "relu", "arm": "bn", "rate": 0.0}
    *_, last = sensitivity.measure(arm, seed, "tiny", DIGITS)
    assert last["accuracy"] == pytest.approx(share, abs=0.005)
    assert (last["learning_rate"], last["scale"]) == (drawn.rate, drawn.scale)


def test_the_bootstrap_covers_and_is_repeatable():
    random, hits = np.random.default_rng(0), 0
    for _ in range(25):
        x = random.choice([-1.0, 0.0, 1.0], size=64, p=[0.1, 0.5, 0.4])
        i = paired(list(x), 0.2).interval
        hits += i.lo <= 0.3 <= i.hi
    assert hits >= 21
    x = [1.0, 0.0] * 16
    assert paired(x, 0.2) == paired(x, 0.2)
    assert paired(x, 0.2).interval.half_width == pytest.approx(1.96 * 0.5 / 32**0.5, rel=0.1)


def test_the_rule_errs_as_rarely_as_it_says(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 1000)
    random, statuses = np.random.default_rng(1), {}
    for mean in (0.0, 0.2):
        p = [0.25 - mean / 2, 0.5, 0.25 + mean / 2]
        drawn = [list(random.choice([-1.0, 0.0, 1.0], size=64, p=p)) for _ in range(300)]
        statuses[mean] = [paired(x, 0.2).status for x in drawn]
    assert statuses[0.0].count("supported") <= 0.064 * 300
    assert statuses[0.2].count("refuted") <= 0.064 * 300
    assert statuses[0.0].count("refuted") > statuses[0.2].count("refuted")


# -- made-up rows -------------------------------------------------------------------------------


def made(bn=0.8, none=0.4, **by_part):
    """Each arm works at this share of the settings; the better one wherever the other does."""

    def rows(cell, seed):
        if cell["part"] == "tuning":
            level = 0.9 - abs(cell["rate"] - 0.3) / 100
        else:
            share = by_part.get(cell["part"], {"bn": bn, "none": none})[cell["arm"]]
            level = 0.95 if sensitivity.place(seed, 64, "made up") < share else 0.3
        both = {"scale": 1.0 + seed, "learning_rate": 0.1 + seed, "momentum": 0.9 * (seed % 2)}
        return [{"step": s, "accuracy": level, "diverged": False, **both} for s in (1, 2, 3)]

    return rows


def verdicts(*args, budget="small", data="mnist", seeds=None, **kwargs):
    rows, _ = simulate(sensitivity, made(*args, **kwargs), budget, data, seeds)
    return judged(sensitivity, rows)


def statuses(*args, **kwargs):
    return {v.status for v in verdicts(*args, **kwargs).values()}


def test_a_larger_share_is_supported_and_the_same_is_refuted():
    found = verdicts()
    assert {v.status for v in found.values()} == {"supported"}
    for verdict in found.values():
        assert verdict.effect == pytest.approx(0.4, abs=0.02)
        assert verdict.published_status is None
        assert verdict.n == 64
    assert "80 % with batch normalization, 39 % without" in " ".join(found["init-robust"].notes)
    assert statuses(0.6, 0.6) == {"refuted"}
    assert "reversed" in verdicts(0.3, 0.7)["hyper-robust"].sentence


def test_each_claim_has_its_own_part_of_the_rows():
    found = verdicts(init={"bn": 0.5, "none": 0.5})
    assert {c: v.status for c, v in found.items()} == {
        "init-robust": "refuted",
        "hyper-robust": "supported",
    }


def test_near_delta_few_settings_or_an_arm_that_never_works_are_inconclusive():
    assert statuses(0.6, 0.45) == {"inconclusive"}
    assert "would decide" in verdicts(0.6, 0.45)["init-robust"].cells[0]["reason"]
    assert statuses(seeds=19) == {"inconclusive"}
    assert statuses(seeds=20) == {"supported"}
    assert statuses(0.9, 0.01) == {"inconclusive"}


def test_digits_tiny_missing_rows_and_another_delta():
    assert statuses(data="digits") == {"demo"}
    assert statuses(budget="tiny", seeds=30) == {"inconclusive"}
    rows, asked = simulate(sensitivity, made())
    without = [r for r in rows if r["part"] != "tuning"]
    assert judged(sensitivity, without)["init-robust"].status == "inconclusive"
    assert sensitivity.judge([]) == sensitivity.figures([]) == []
    with overruled({"init-robust": {"delta": 0.9}}):
        assert judged(sensitivity, rows)["init-robust"].status == "refuted"
    expected = sum(c.cost for c in sensitivity.expected("small", "mnist", None))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_initializations_at_a_rate_that_is_not_the_best_do_not_count():
    rows, _ = simulate(sensitivity, made())
    moved = [{**r, "rate": 1.0} if r["part"] == "init" else r for r in rows]
    assert judged(sensitivity, moved)["init-robust"].n == 0


def test_real_rows_of_the_digits_are_judged_and_drawn():
    arms = [
        {"part": part, "group": group, "arm": norm, "rate": rate}
        for part, group, rate in (("init", "relu", 0.3), ("hyper", "relu", 0.0))
        for norm in ("bn", "none")
    ]
    rows = measured(sensitivity, arms, DIGITS)
    rows += [
        {"part": "tuning", "group": group, "arm": norm, "rate": 0.3, "seed": seed, "step": 1,
         "accuracy": 0.5, "budget": "tiny", "data": "digits"}
        for group in sensitivity.GROUPS for norm in ("bn", "none") for seed in (800, 801)
    ]  # fmt: skip
    assert {v.status for v in judged(sensitivity, rows).values()} == {"demo"}
    drawn = {f["id"] for f in sensitivity.figures(rows)}
    assert drawn == {f"sensitivity-{n}" for n in ("init", "scale", "rate", "tuning")}
