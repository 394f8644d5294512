"""The experiment on weight decay: its runs share what they should, its rules decide as written."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from gammabeta.studies import _data, weight_decay
from gammabeta.studies._claims import overruled
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import batches, pixels, stream
from gammabeta.studies._weight_decay import runs
from tests.simulated import judged, measured, noise, simulate

DIGITS = _data.load("digits")
RATE, DECAY = 0.3, 0.05


def finished(names, steps):
    """The networks of these runs, one after the other."""
    norms, nets, watched = {}, {}, {}
    for name in names:
        watched[name] = runs.Watched()
        *_, (nets[name], _, _) = runs.run(
            name,
            DIGITS.train_x[:1000],
            DIGITS.train_y[:1000],
            pixel_max=16,
            rate=RATE,
            decay=DECAY,
            steps=steps,
            seed=0,
            width=1.0,
            norms=norms,
            watched=watched[name],
        )
    return nets, watched


def hidden(net):
    return [p.detach() for p in net.parameters() if p.dim() == 2][:-1]


@pytest.mark.parametrize("scope", ["hidden", "all"])
def test_decay_is_that_of_pytorchs_sgd(scope):
    net = MLP((64, 100, 100, 10), "relu", True, stream(0, "weights"))
    inside = {id(p) for p in hidden_parameters(net)}
    groups = [{"params": [p], "weight_decay": DECAY if scope == "all" or id(p) in inside else 0.0}
              for p in net.parameters()]  # fmt: skip
    update = torch.optim.SGD(groups, lr=RATE)
    order = batches(1000, 64, stream(0, "order"))
    for index in itertools.islice(order, 20):
        update.zero_grad()
        F.cross_entropy(net(pixels(DIGITS.train_x[index], 16)), DIGITS.train_y[index]).backward()
        update.step()
    nets, _ = finished([f"{scope} decay"], 20)
    for a, b in zip(nets[f"{scope} decay"].parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def hidden_parameters(net):
    return [p for p in net.parameters() if p.dim() == 2][:-1]


def test_runs_share_norms_or_effective_rates_and_then_directions():
    nets, watched = finished(runs.RUNS, 60)
    decay, norms, rates, free = (
        hidden(nets[name]) for name in ("hidden decay", "hidden norms", "hidden rates", "free")
    )
    for a, b in zip(decay, norms, strict=True):
        torch.testing.assert_close(runs.lengths(a), runs.lengths(b))
    for a, b, c, d in zip(decay, norms, rates, free, strict=True):
        assert (runs.lengths(d) > 1.1 * runs.lengths(a)).all()
        apart = runs.angle(a, d).mean()
        assert runs.angle(a, b).mean() < 0.2 * apart
        assert runs.angle(a, c).mean() < 0.2 * apart
    for a, b in zip(hidden(nets["all decay"]), hidden(nets["all norms"]), strict=True):
        torch.testing.assert_close(runs.lengths(a), runs.lengths(b))
    assert watched["hidden decay"].ends()["norm"] < watched["free"].ends()["norm"]


def test_small_angles_are_exact():
    a = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 1e-9], [0.0, 2.0]], dtype=torch.float64)
    assert runs.angle(a, b).tolist() == [pytest.approx(1e-9), pytest.approx(math.pi / 2)]


# -- made-up rows -------------------------------------------------------------------------------


def made(hidden=0.0, everything=0.0, shrunk=0.5, sd=0.05):
    """Decay minus norms in points, by level; norms with decay as a share of those without."""

    def rows(cell, seed):
        if cell["part"] == "tuning":
            share = 0.9 - abs(cell["rate"] - 0.3)
            return [{"run": "free", "step": s, "accuracy": share, "diverged": False}
                    for s in (1, 2, 3)]  # fmt: skip
        found = []
        for name in runs.RUNS:
            level = {"hidden decay": hidden, "all decay": everything}.get(name, 0.0)
            level += 93 + noise(seed, name, cell["part"], sd=sd)
            for step in (1, 2, 3):
                row = {"run": name, "step": step, "accuracy": level / 100, "diverged": False}
                if step == 3:
                    row |= {"norm": 1.0 if name == "free" else shrunk, "angle": 0.5}
                    row |= {"correlation": 0.9}
                found.append(row)
        return found

    return rows


def verdict(*args, budget="small", data="mnist", seeds=None, **kwargs):
    rows, _ = simulate(weight_decay, made(*args, **kwargs), budget, data, seeds)
    return judged(weight_decay, rows)["wd-efflr"]


def test_equal_accuracy_at_both_levels_is_supported():
    found = verdict()
    assert (found.status, found.published_status) == ("supported", None)
    assert found.n == 8
    assert abs(found.effect) < 0.1
    assert found.planned_half_width <= 0.15


def test_a_difference_refutes_and_at_one_level_is_mixed():
    assert verdict(1.0, -1.0).status == "refuted"
    found = verdict(0.0, 1.0)
    assert found.status == "mixed"
    assert "all parameters" in found.sentence
    assert verdict(0.3, 0.3, sd=1.0).status == "inconclusive"


def test_a_decay_that_changes_no_norm_explains_nothing():
    found = verdict(shrunk=0.97)
    assert found.status == "inconclusive"
    assert any("refuted" in note for note in found.notes)


def test_digits_tiny_missing_rows_another_delta_and_the_estimate():
    assert verdict(data="digits").status == "demo"
    assert verdict(budget="tiny", seeds=10).status == "inconclusive"
    rows, asked = simulate(weight_decay, made(0.2, 0.2))
    assert judged(weight_decay, rows)["wd-efflr"].status != "refuted"
    with overruled({"wd-efflr": {"delta": 0.1}}):
        assert judged(weight_decay, rows)["wd-efflr"].status == "refuted"
    for part in ("tuning", "fair", "pilot", "shown"):
        left = [r for r in rows if r["part"] == part]
        assert judged(weight_decay, left)["wd-efflr"].status == "inconclusive"
    assert weight_decay.judge([]) == weight_decay.figures([]) == []
    expected = sum(c.cost for c in weight_decay.expected("small", "mnist", None))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_real_rows_of_the_digits_are_judged_and_drawn():
    head = {"group": "bn", "arm": "bn", "rate": 0.3}
    rows = measured(weight_decay, [{"part": "fair", **head, "decay": 0.01}], DIGITS)
    rows += measured(
        weight_decay, [{"part": "tuning", **head, "decay": 0.0}], DIGITS, seeds=(800, 801)
    )
    assert judged(weight_decay, rows)["wd-efflr"].status == "demo"
    drawn = {f["id"] for f in weight_decay.figures(rows)}
    assert drawn == {f"weight-decay-{n}" for n in ("norm", "angle", "tuning")}
