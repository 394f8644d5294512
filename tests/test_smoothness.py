"""The experiment on smoothness: what a look measures, what is asked for and what is concluded."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from gammabeta.studies import _data, smoothness
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._nets import MLP
from gammabeta.studies._smoothness import rules
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, measured, noise, simulate

DIGITS = _data.load("digits")


# -- one cell ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", smoothness.NORMS)
def test_a_look_is_the_walk_written_out_and_leaves_no_trace(norm):
    x, y, test_x, test_y = fair_split(DIGITS, 1, "test")
    net = MLP((64, *[100] * 5, 10), "relu", norm == "bn", stream(1, "weights"))
    update = torch.optim.SGD(net.parameters(), lr=0.1)
    order = batches(len(x), 128, stream(1, "order"))
    for _ in range(10):
        index = next(order)
        update.zero_grad()
        F.cross_entropy(net(pixels(x[index], 16)), y[index]).backward()
        update.step()
    share = (net.eval()(pixels(test_x, 16)).argmax(1) == test_y).double().mean().item()
    net.train()
    seen = batches(len(x), 128, stream(1, "looks"))
    next(seen)
    index = next(seen)  # the second look
    parameters = list(net.parameters())
    start = [p.detach().clone() for p in parameters]

    def at(moves):
        with torch.no_grad():
            for p, s, m in zip(parameters, start, moves, strict=True):
                p.copy_(s + m)
        loss = F.cross_entropy(net(pixels(x[index], 16)), y[index])
        return loss.item(), torch.autograd.grad(loss, parameters)

    loss, g = at([torch.zeros_like(p) for p in start])
    losses, changes, betas = [], [], []
    for s in smoothness.DISTANCES:
        moves = [-s * 0.1 * q for q in g]
        there, h = at(moves)
        change = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(h, g, strict=True)))
        length = math.sqrt(sum(m.square().sum().item() for m in moves))
        losses.append(there), changes.append(change), betas.append(change / length)
    cell = {"part": "fair", "group": "deep", "arm": norm, "rate": 0.1}
    *_, last = smoothness.measure(cell, 1, "tiny", DIGITS)
    assert (last["step"], last["accuracy"]) == (10, share)
    assert last["loss"] == pytest.approx(loss, rel=1e-4)
    assert last["raw_range"] == pytest.approx(max(losses) - min(losses), rel=1e-3)
    assert last["raw_change"] == pytest.approx(max(changes), rel=1e-3)
    assert last["raw_beta"] == pytest.approx(max(betas), rel=1e-3)
    # scale-free: all matrices by a tenth of their norms is the farthest
    moves = [-0.1 * s.norm() * q / q.norm() if s.ndim == 2 else 0 * s
             for s, q in zip(start, g, strict=True)]  # fmt: skip
    _, h = at(moves)
    parts = [s.norm() * (a - b).norm() for s, a, b in zip(start, h, g, strict=True) if s.ndim == 2]
    assert last["change"] >= 0.999 * math.sqrt(sum(p.item() ** 2 for p in parts))


def test_the_published_part_has_no_scale_free_walk_and_tuning_no_look():
    rows = measured(
        smoothness,
        [{"part": p, "group": "deep", "arm": "bn", "rate": 0.1} for p in ("published", "tuning")],
        DIGITS,
        seeds=(0,),
    )
    published = [r for r in rows if r["part"] == "published" and "loss" in r]
    assert len(published) == 2
    assert not any("beta" in row for row in published)
    assert not any("loss" in row for row in rows if row["part"] == "tuning")


@pytest.mark.parametrize("kind", smoothness.LP)
def test_other_norms_keep_the_size_of_a_gaussian_and_their_scale_does_not_matter(kind):
    layer = smoothness.LpNorm1d(4, kind)
    x = torch.randn(512, 4, generator=stream(0, "x")) * 3 + 2
    y = layer(x)
    assert y.mean(0).abs().max() < 1e-5
    sizes = {
        "l1": y.abs().mean(0) * math.sqrt(math.pi / 2),
        "linf": y.abs().amax(0) / math.sqrt(2 * math.log(512)),
    }
    torch.testing.assert_close(sizes[kind], torch.ones(4), rtol=1e-4, atol=0)
    assert y.std(0).sub(1).abs().max() < 0.25
    torch.testing.assert_close(layer(7 * x - 1), y, rtol=1e-3, atol=1e-4)
    for _ in range(200):
        layer(x)
    torch.testing.assert_close(layer.eval()(x), y, rtol=1e-3, atol=1e-4)


def test_other_norms_have_a_training_loss_and_no_look():
    cell = {"part": "fair", "group": "deep", "arm": "l1", "rate": 0.1}
    rows = list(smoothness.measure(cell, 0, "tiny", DIGITS))
    assert all("train_loss" in row for row in rows if row["step"] in (5, 10))
    assert not any("loss" in row for row in rows)


def test_a_network_that_has_diverged_has_no_looks():
    cell = {"part": "fair", "group": "deep", "arm": "none", "rate": 1e6}
    rows = list(smoothness.measure(cell, 0, "tiny", DIGITS))
    assert rows[-1]["diverged"] is True
    assert "loss" not in rows[-1]


# -- made-up rows -----------------------------------------------------------------------------


def ratios(scale_free, raw=1.0, helps=1.0, sd=0.05, own=None, faster=0.0, lp=0.0, saves=0.5,
           beta=-0.2, accuracy=-0.2):  # fmt: skip
    """Without BN each quantity is exp(scale_free) times larger; ``own`` gives others to some."""

    def rows(cell, seed):
        bn = cell["arm"] != "none"
        power = math.log2(int(cell["arm"].split()[1])) if cell["part"] == "ghost" else 7
        level = 92 + (helps if bn else 0) - abs(cell["rate"] - 0.1)
        level += noise(seed, cell["arm"], sd=0.05) + accuracy * (power - 7)
        found = []
        for step in (20, 40, 60, 80):
            row = {"step": step, "diverged": False, "accuracy": level / 100}
            if cell["part"] != "tuning":
                area = {"none": 1.0, "bn": 1 - saves}.get(cell["arm"], 1 - saves + lp * saves)
                row["train_loss"] = area + noise(seed, cell["arm"], "area", sd=0.01)
            if cell["part"] != "tuning" and cell["arm"] not in smoothness.LP:
                row["loss"] = math.exp(-step / 20 - (faster if bn else 0))
                for name in rules.QUANTITIES:
                    more = (own or {}).get(name, scale_free)
                    jitter = noise(seed, cell["arm"], name, sd=sd)
                    row[f"raw_{name}"] = math.exp(0 if bn else raw + jitter)
                    # what falls with the loss, as all of them do
                    row[name] = row["loss"] * math.exp(0 if bn else more - faster + jitter)
                    if name == "beta":
                        row[name] *= math.exp(beta * (power - 7))
            found.append(row)
        return found

    return rows


def verdict(*args, budget="small", data="mnist", seeds=None, **kwargs):
    rows, _ = simulate(smoothness, ratios(*args, **kwargs), budget, data, seeds)
    return judged(smoothness, rows)["smoother"]


def test_smaller_changes_with_bn_are_supported():
    found = verdict(1.0)
    assert (found.status, found.published_status) == ("supported", "supported")
    assert found.effect == pytest.approx(1.0, abs=0.1)
    assert found.p < 0.05
    assert found.reported == claims()["smoother"].reported
    assert [c["part"] for c in found.cells].count("fair") == 3
    assert [c["part"] for c in found.cells].count("shown") == 6


def test_equal_or_larger_changes_are_refuted():
    assert verdict(0.0).status == "refuted"
    assert verdict(-1.0).status == "refuted"
    one = verdict(1.0, own={"beta": -0.5})
    assert one.status == "refuted"
    assert "(c) effective beta" in one.sentence


def test_fair_and_published_are_judged_apart():
    assert verdict(0.0, raw=1.0).published_status == "supported"
    found = verdict(1.0, raw=-1.0)
    assert (found.status, found.published_status) == ("supported", "refuted")


@pytest.mark.parametrize(
    ("lp", "saves", "status"),
    [
        (0.0, 0.5, "supported"),
        (0.5, 0.5, "refuted"),
        (-0.5, 0.5, "refuted"),
        (0.19, 0.5, "inconclusive"),
        (0.0, 0.02, "inconclusive"),
    ],
)
def test_other_norms_do_as_well_where_they_save_as_much(lp, saves, status):
    rows, _ = simulate(smoothness, ratios(1.0, lp=lp, saves=saves))
    found = judged(smoothness, rows)["lp-norm"]
    assert (found.status, found.published_status) == (status, None)
    if saves == 0.5:
        assert found.effect == pytest.approx(lp, abs=0.05)
        assert found.n >= 8


@pytest.mark.parametrize(
    ("beta", "accuracy", "status"),
    [
        (-0.2, -0.2, "supported"),
        (0.2, -0.2, "refuted"),
        (-0.2, 0.2, "refuted"),
        (-0.2, 0.0, "inconclusive"),
    ],
)
def test_smaller_ghosts_are_less_smooth_and_better_or_not(beta, accuracy, status):
    rows, _ = simulate(smoothness, ratios(1.0, beta=beta, accuracy=accuracy))
    found = judged(smoothness, rows)["ghost-less-smooth"]
    assert (found.status, found.published_status) == (status, None)
    assert len(found.cells) == 2
    assert any(note.startswith("Mean ln beta by m: 4: ") for note in found.notes)


def test_the_exact_permutation_test_is_scipys():
    values = [3.0, 1.0, 2.0, 0.5, 0.7, 0.1]
    rho, p = rules.spearman(values)
    wanted = stats.spearmanr(range(6), values)
    assert rho == pytest.approx(wanted.statistic)
    every = [stats.spearmanr(range(6), v).statistic for v in itertools.permutations(values)]
    assert p == pytest.approx(sum(r <= rho + 1e-9 for r in every) / 720)
    assert rules.spearman([1.0] * 6) == (0.0, 1.0)
    assert rules.spearman([1, 2, 3, 4, 5, 6])[1] == 1.0


def test_where_bn_does_not_help_there_is_nothing_to_explain():
    for effect in (1.0, -1.0):
        found = verdict(effect, helps=0.0)
        assert found.status == "inconclusive"
        assert any("Positive control" in note for note in found.notes)


def test_noise_is_inconclusive():
    found = verdict(0.3, sd=3.0)
    assert found.status == "inconclusive"
    assert found.n == 16


def test_what_is_owed_to_a_smaller_loss_alone_vanishes_at_equal_loss():
    found = verdict(1.0, faster=1.0)
    assert found.status == "supported"
    equal = [c["effect"] for c in found.cells if c["name"].endswith("at equal loss")]
    assert equal == pytest.approx([0.0] * 3, abs=0.1)
    rows, _ = simulate(smoothness, ratios(1.0, faster=9.0))
    far = rules.at_equal_loss(rules.looks(rows), "fair", dict.fromkeys(smoothness.NORMS, 0.1))
    assert not any(far.values())  # no loss that both pass through


def test_another_delta_gives_another_verdict():
    rows, _ = simulate(smoothness, ratios(1.0))
    with overruled({"smoother": {"delta": 2.0}}):
        assert judged(smoothness, rows)["smoother"].status == "refuted"


def test_missing_runs_leave_the_verdict_open():
    rows, _ = simulate(smoothness, ratios(1.0))
    for part in ("tuning", "fair", "pilot", "published"):
        found = judged(smoothness, [r for r in rows if r["part"] == part])
        assert {v.status for v in found.values()} == {"inconclusive"}
    assert smoothness.judge([]) == []


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in smoothness.expected("small", "mnist", None))
    _, asked = simulate(smoothness, ratios(1.0, sd=0.1))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.35)


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    assert verdict(1.0, data="digits").status == "demo"
    assert verdict(1.0, budget="tiny", seeds=8).status == "inconclusive"


def test_the_whole_experiment_runs_on_the_digits():
    rows, asked = simulate(
        smoothness,
        lambda cell, seed: smoothness.measure(cell, seed, "tiny", DIGITS),
        "tiny",
        "digits",
        2,
    )
    assert {c.arm["part"] for c in asked} == {"tuning", "fair", "published", "ghost"}
    assert {v.status for v in judged(smoothness, rows).values()} == {"demo"}
