"""The experiment on regularization: dropout where it should be, what is asked for and concluded."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gammabeta.studies import _data, regularization
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._nets import MLP
from gammabeta.studies._regularization import ghosts
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")
DROPOUT_CLAIMS = ("no-dropout", "bn-plus-dropout", "reg-small")


# -- one cell ---------------------------------------------------------------------------------


def test_dropout_stands_behind_the_last_activation_or_behind_both():
    def kinds(arm):
        return [type(layer).__name__ for layer in regularization.dropout_net(64, arm, 0).layers]

    plain = ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert kinds("bn, no dropout") == plain
    assert kinds("bn, 0.2 last") == [*plain[:6], "Dropout", "Linear"]
    assert kinds("none, 0.5 both") == ["Linear", "ReLU", "Dropout"] * 2 + ["Linear"]
    shares = [m.p for m in regularization.dropout_net(64, "bn, 0.5 both", 0).layers.children()
              if isinstance(m, regularization.Dropout)]  # fmt: skip
    assert shares == [0.5, 0.5]


def test_dropout_keeps_the_mean_drops_a_share_and_does_nothing_in_eval_mode():
    layer = regularization.Dropout(0.2, stream(0, "dropout"))
    x = torch.ones(1000, 100)
    y = layer(x)
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert (y == 0).double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert torch.equal(layer.eval()(x), x)


def test_arms_of_a_seed_start_alike():
    nets = [regularization.dropout_net(64, arm, 5) for arm in regularization.DROPOUT]
    first = [next(m for m in net.modules() if isinstance(m, nn.Linear)) for net in nets]
    assert all(torch.equal(first[0].weight, m.weight) for m in first)
    assert regularization.dropout_net(64, "bn, no dropout", 5, 0.5).layers[0].out_features == 100


@pytest.mark.parametrize("norm", ["bn", "none"])
def test_a_run_without_dropout_is_plain_training(norm, monkeypatch):
    small = regularization.PLANS["small"]._replace(size=500, steps=25)
    monkeypatch.setitem(regularization.PLANS, "small", small)
    x, y, test_x, test_y = fair_split(DIGITS, 3, "test", 500)
    seen, held = pixels(x, 16), pixels(test_x, 16)
    net = MLP((64, 200, 200, 10), "relu", norm == "bn", stream(3, "weights"))
    update = torch.optim.SGD(net.parameters(), lr=0.5)
    for index in itertools.islice(batches(500, 128, stream(3, "order")), 25):
        update.zero_grad()
        F.cross_entropy(net(pixels(x[index], 16)), y[index]).backward()
        update.step()
    net.eval()
    cell = {"part": "fair", "group": "dropout", "arm": f"{norm}, no dropout", "rate": 0.5}
    *_, last = regularization.measure(cell, 3, "small", DIGITS)
    assert last["step"] == 25
    assert last["accuracy"] == (net(held).argmax(1) == test_y).double().mean().item()
    assert last["train_accuracy"] == (net(seen).argmax(1) == y).double().mean().item()


@pytest.mark.parametrize("norm", regularization.NOISE)
def test_the_noise_arms_differ_in_their_statistics_alone(norm):
    plan = regularization.PLANS["tiny"]
    x, y, _, _ = fair_split(DIGITS, 2, "test", plan.noise_size)
    x = pixels(x, 16)
    net = MLP((64, 100, 100, 10), "relu", norm != "none", stream(2, "weights"))
    order = batches(plan.noise_size, plan.noise_batch, stream(2, "order"))
    update = torch.optim.SGD(net.parameters(), lr=0.3)
    for index in itertools.islice(order, plan.noise_steps):
        update.zero_grad()
        h = x if norm == "full" else x[index]
        for layer in net.layers:
            if isinstance(layer, nn.BatchNorm1d):
                # written out: the gradient passes through mean and variance
                h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
                h = h * layer.weight + layer.bias
            else:
                h = layer(h)
        F.cross_entropy(h[index] if norm == "full" else h, y[index]).backward()
        update.step()
    wanted = F.cross_entropy(net.with_batch_statistics(x), y).item()
    cell = {"part": "fair", "group": "noise", "arm": norm, "rate": 0.3}
    *_, last = regularization.measure(cell, 2, "tiny", DIGITS)
    assert last["train_loss"] == pytest.approx(wanted, rel=1e-3)
    assert 0 <= last["accuracy"] <= 1


def test_the_noise_alone_has_the_moments_of_that_of_ghosts():
    layer = ghosts.NoisyBatchNorm1d(3, 16, stream(0, "noise"))
    x = torch.randn(16 * 2000, 3, generator=stream(1, "x"))
    shift, scale = layer.noise(x)
    assert torch.equal(shift[:16], shift[:1].expand(16, 3))  # one for each ghost
    assert not torch.equal(shift[16], shift[0])
    a, s = x.view(-1, 16, 3).mean(1), x.view(-1, 16, 3).std(1, unbiased=False)
    torch.testing.assert_close(shift[::16].std(0), a.std(0), rtol=0.1, atol=0)
    torch.testing.assert_close(scale[::16].log().mean(0), -s.log().mean(0), rtol=0.2, atol=0.01)
    torch.testing.assert_close(scale[::16].log().std(0), s.log().std(0), rtol=0.1, atol=0)


def test_without_ghosts_the_noise_arm_is_bn_and_eval_mode_is_bn():
    x = torch.randn(64, 5, generator=stream(1, "x")) * 3 + 1
    noisy, plain = ghosts.NoisyBatchNorm1d(5, 64, stream(0, "noise")), nn.BatchNorm1d(5)
    # one ghost, the whole batch: mean 0, standard deviation 1, nothing to draw from
    torch.testing.assert_close(noisy(x), plain(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(noisy.eval()(x), plain.eval()(x))
    assert len(list(noisy.parameters())) == 2


def test_a_loss_that_is_none_counts_as_the_worst():
    cell = {"part": "tuning", "group": "noise", "arm": "none", "rate": 1e6}
    *_, last = regularization.measure(cell, 0, "tiny", DIGITS)
    assert last["train_loss"] == regularization.WORST
    assert "accuracy" not in last


# -- made-up rows -----------------------------------------------------------------------------

BEST = {"bn": "0.2 last", "none": "0.5 both"}


def dropout(with_bn, without=2.0, *, bn_gap=1.0, half_gap=4.0, sd=0.1):
    """The best dropout adds with_bn points with BN and ``without`` without; effects on the gap."""

    def rows(cell, seed):
        if cell["group"] != "dropout":
            return noisy(0.5, 0.5)(cell, seed)
        norm, dose = cell["arm"].split(", ")
        gain = {"bn": with_bn, "none": without}[norm] if dose == BEST[norm] else 0.0
        gain -= 0.0 if dose in ("no dropout", BEST[norm]) else 5.0
        lost = abs(cell["rate"] - 1.0) + (0.0 if norm == "bn" else 1.0)
        held = 90 + gain - lost + noise(seed, cell["arm"], sd=sd)
        gap = 8 - (bn_gap if norm == "bn" else 0) - (half_gap if dose == "0.5 both" else 0)
        gap += noise(seed, cell["arm"], "gap", sd=sd)
        return [
            {"step": s, "accuracy": held / 100, "train_accuracy": (held + gap) / 100}
            | {"diverged": False}
            for s in (1, 2, 3)
        ]

    return rows


def noisy(bn, full, sd=0.01):
    """BN saves a share bn of the area of the training loss; without noise a share full."""

    def rows(cell, seed):
        if cell["group"] == "ghost":
            return ghost(0.3)(cell, seed)
        if cell["group"] == "dropout":
            return dropout(0.0)(cell, seed)
        saved = {"none": 0.0, "bn": bn, "full": full}[cell["arm"]]
        area = 0.5 * (1 - saved + noise(seed, cell["arm"], sd=sd)) + abs(cell["rate"] - 1.0)
        more = {"diverged": False, "accuracy": 0.9 + saved / 100}
        return [{"step": s, "train_loss": area, **more} for s in (10, 20, 30)]

    return rows


def ghost(slope, same=0.0, sd=0.02):
    """The gap grows by so many points per doubling of m; that of the noise arm is off by some."""

    def rows(cell, seed):
        if cell["group"] != "ghost":
            return noisy(0.5, 0.5)(cell, seed)
        m, noise_alone = ghosts.ARMS[cell["arm"]]
        gap = 5 + slope * math.log2(m) + (same if noise_alone else 0)
        gap += noise(seed, cell["arm"], sd=sd)
        held = 95 - gap - abs(cell["rate"] - 0.3)
        both = {"accuracy": held / 100, "train_accuracy": (held + gap) / 100}
        return [{"step": s, **both, "diverged": False} for s in (1, 2, 3)]

    return rows


@pytest.mark.parametrize(
    ("slope", "same", "sd", "status"),
    [
        (0.3, 0.0, 0.02, "supported"),
        (0.0, 0.0, 0.02, "refuted"),
        (-0.3, 1.0, 0.02, "refuted"),
        (0.3, 1.0, 0.02, "inconclusive"),
        (0.1, 0.0, 1.0, "inconclusive"),
    ],
)
def test_a_gap_that_grows_with_the_ghost_size_shows_that_noise_regularizes(slope, same, sd, status):
    found = verdicts(ghost(slope, same, sd))["noise-reg"]
    assert (found.status, found.published_status) == (status, None)
    if sd < 0.1:
        assert found.effect == pytest.approx(slope, abs=0.05)
    assert {cell["part"] for cell in found.cells} == {"fair", "control"}
    assert any(note.startswith("Gap (points): m = 4 ") for note in found.notes)


@pytest.mark.parametrize(
    ("bn", "full", "status"),
    [(0.5, 0.5, "refuted"), (0.5, 0.2, "supported"), (0.5, 0.0, "supported")],
)
def test_noise_is_the_reason_where_bn_keeps_little_without_it(bn, full, status):
    found = verdicts(noisy(bn, full))["reg-by-noise"]
    assert (found.status, found.published_status) == (status, None)
    assert found.effect == pytest.approx(0.8 * bn - full, abs=0.03)
    assert "Positive control" in " ".join(found.notes)
    assert {cell["part"] for cell in found.cells} == {"fair", "shown"}


def test_noise_explains_nothing_where_bn_saves_nothing():
    found = verdicts(noisy(0.0, -0.4))["reg-by-noise"]
    assert found.status == "inconclusive"
    assert "nothing to explain here" in found.sentence
    assert verdicts(noisy(0.5, 0.4, sd=0.15))["reg-by-noise"].status == "inconclusive"


def test_another_share_gives_another_verdict():
    rows, _ = simulate(regularization, noisy(0.5, 0.3))
    assert judged(regularization, rows)["reg-by-noise"].status == "supported"
    with overruled({"reg-by-noise": {"share": 0.5}}):
        assert judged(regularization, rows)["reg-by-noise"].status == "refuted"


def verdicts(answer, **options):
    rows, _ = simulate(regularization, answer, **options)
    return judged(regularization, rows)


def statuses(answer, **options):
    found = verdicts(answer, **options)
    return tuple(found[claim].status for claim in DROPOUT_CLAIMS[:2])


def test_a_dropout_that_adds_nothing_is_not_needed():
    assert statuses(dropout(0.0)) == ("supported", "refuted")


def test_a_dropout_that_adds_much_is_needed():
    assert statuses(dropout(1.0)) == ("refuted", "supported")


def test_a_dropout_that_harms_is_not_needed():
    found = verdicts(dropout(-1.0))
    assert found["no-dropout"].status == "supported"
    assert found["no-dropout"].p < 0.05
    assert found["bn-plus-dropout"].status == "refuted"


def test_where_dropout_helps_nobody_its_absence_explains_nothing():
    found = verdicts(dropout(0.0, without=0.0))["no-dropout"]
    assert found.status == "inconclusive"
    assert "nothing to explain here" in found.sentence
    # a dropout that BN needs refutes whatever it does without
    assert statuses(dropout(1.0, without=0.0)) == ("refuted", "supported")


def test_both_are_never_supported_and_noise_decides_nothing():
    for gain in (0.0, 0.2, 0.3, 0.4, 0.6):
        for sd in (0.05, 0.2, 0.6):
            assert statuses(dropout(gain, sd=sd)) != ("supported", "supported")
    assert statuses(dropout(0.2, sd=1.5, without=9.0)) == ("inconclusive", "inconclusive")


@pytest.mark.parametrize(
    ("bn_gap", "half_gap", "status"),
    [(1.0, 4.0, "supported"), (3.0, 4.0, "refuted"), (0.0, 0.1, "inconclusive")],
)
def test_the_effect_of_bn_is_small_beside_that_of_dropout(bn_gap, half_gap, status):
    found = verdicts(dropout(0.0, bn_gap=bn_gap, half_gap=half_gap))["reg-small"]
    assert found.status == status
    assert found.effect == pytest.approx(half_gap - 2 * bn_gap, abs=0.3)


def test_the_dropout_is_chosen_on_validation_and_the_card_says_which():
    found = verdicts(dropout(0.0))["no-dropout"]
    notes = " ".join(found.notes)
    assert "Best dropout: 0.2 last with BN, 0.5 both without." in notes
    assert "Positive control" in notes
    assert found.reported == claims()["no-dropout"].reported
    assert found.n >= 8
    assert found.planned_half_width <= 0.15
    assert [cell["part"] for cell in found.cells] == ["fair", "control"]


def test_every_arm_has_the_same_number_of_trials():
    _, asked = simulate(regularization, dropout(0.0))
    tried = {}
    for cell in asked:
        if cell.arm["part"] == "tuning":
            tried.setdefault((cell.arm["group"], cell.arm["arm"]), []).append(cell.arm["rate"])
    assert len(tried) == sum(len(arms) for arms in regularization.GROUPS.values())
    for group in regularization.GROUPS:
        assert len({tuple(sorted(r)) for (g, _), r in tried.items() if g == group}) == 1


def test_another_delta_gives_another_verdict():
    rows, _ = simulate(regularization, dropout(1.0))
    with overruled({"bn-plus-dropout": {"delta": 2.0}}):
        assert judged(regularization, rows)["bn-plus-dropout"].status == "refuted"


def test_missing_runs_leave_the_verdicts_open():
    rows, _ = simulate(regularization, dropout(0.0))
    for part in ("tuning", "fair", "pilot"):
        found = judged(regularization, [r for r in rows if r["part"] == part])
        assert {v.status for v in found.values()} == {"inconclusive"}
    assert regularization.judge([]) == []


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in regularization.expected("small", "mnist", None))
    _, asked = simulate(regularization, dropout(0.0, sd=0.12))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    assert {v.status for v in verdicts(dropout(0.0), data="digits").values()} == {"demo"}
    tiny = verdicts(dropout(0.0), budget="tiny", seeds=8)
    assert {v.status for v in tiny.values()} == {"inconclusive"}


def test_the_whole_experiment_runs_on_the_digits():
    rows, _ = simulate(
        regularization,
        lambda cell, seed: regularization.measure(cell, seed, "tiny", DIGITS),
        "tiny",
        "digits",
        1,
    )
    assert {v.status for v in judged(regularization, rows).values()} == {"demo"}
