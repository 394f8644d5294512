"""The experiment on attacks: images that are attacked, arms at equal accuracy, conclusions."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gammabeta.studies import _data, attacks
from gammabeta.studies._attacks import contrasts, robust
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import accuracy, stream, train
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


# -- attacks ----------------------------------------------------------------------------------


def some(count=40):
    return torch.rand(count, 64, generator=stream(0, "x")), torch.arange(count) % 10


@pytest.fixture
def net():
    found = robust.network(64, "bn", 0)
    with torch.no_grad():
        found.train()(some(200)[0])
    return found.eval()


@pytest.mark.parametrize(("name", "attack"), robust.ATTACKS.items())
def test_attacks_raise_the_loss_within_their_bound_and_the_pixels(net, name, attack):
    x, labels = some()
    before = copy.deepcopy(net.state_dict())
    at = robust.attacked(net, x, labels, attack)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not net.training
    order = math.inf if attack.norm == "linf" else 2
    moved = (at - x).norm(order, dim=1)
    assert moved.max() <= attack.size * (1 + 1e-5)
    assert moved.min() > attack.size / 2
    assert (at.min() >= 0) & (at.max() <= 1)
    lost = [F.cross_entropy(net(images), labels, reduction="none") for images in (x, at)]
    assert (lost[1] > lost[0]).double().mean() > 0.95
    if attack.steps > 1:  # more steps in the same bound find a larger loss
        once = robust.attacked(net, x, labels, attack._replace(steps=1))
        assert lost[1].mean() > F.cross_entropy(net(once), labels)


def linear(scale):
    """Two classes by the sign of w x, as a network without hidden layers."""
    found = MLP((4, 2), "relu", False, stream(0, "weights"))
    w = torch.tensor([3.0, -1.0, 2.0, -4.0])
    with torch.no_grad():
        found.layers[0].weight.copy_(scale * torch.stack([w, -w]))
        found.layers[0].bias.zero_()
    return found, w


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("steps", [1, 5])
def test_of_a_linear_network_the_attack_is_known(scale, steps):
    found, w = linear(scale)  # at scale 30 float32 probabilities would round to 0 and 1
    x = torch.full((3, 4), 0.5)
    at = robust.attacked(
        found, x, torch.zeros(3, dtype=torch.long), robust.Attack("linf", 0.1, steps)
    )
    torch.testing.assert_close(at, x - 0.1 * w.sign())
    at = robust.attacked(
        found, x, torch.zeros(3, dtype=torch.long), robust.Attack("l2", 0.1, steps)
    )
    torch.testing.assert_close(at, x - 0.1 * w / w.norm())


def test_noise_has_its_spread_and_is_cut_to_the_pixels():
    x = torch.full((100, 64), 0.5)
    found = robust.noisy(x, 0.1, stream(0, "noise"))
    assert (found - x).std().item() == pytest.approx(0.1, rel=0.05)
    assert robust.noisy(x, 5.0, stream(0, "noise")).aminmax() == (0, 1)


def test_arms_start_alike_and_are_what_their_names_say():
    def kinds(arm):
        return [type(m).__name__ for m in robust.network(64, arm, 0).layers]

    assert kinds("none") == ["Linear", "ReLU"] * 2 + ["Linear"]
    assert kinds("bn") == kinds("bn, eps 1") == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert kinds("bn, first layer") == [*kinds("bn")[:3], *kinds("none")[2:]]
    nets = {arm: robust.network(64, arm, 0) for arm in ("none", "bn", *attacks.SHOWN)}
    eps = {a: {m.eps for m in n.layers if isinstance(m, nn.BatchNorm1d)} for a, n in nets.items()}
    assert eps == {"none": set(), "bn": {1e-5}, "bn, first layer": {1e-5}, "bn, eps 1": {1.0}}
    for each in nets.values():
        weights = [m.weight for m in each.layers if isinstance(m, nn.Linear)]
        same = [m.weight for m in nets["none"].layers if isinstance(m, nn.Linear)]
        assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


# -- equal clean accuracy ---------------------------------------------------------------------


def test_an_arm_is_taken_back_to_where_it_first_has_the_accuracy():
    x, y = DIGITS.train_x[:400].flatten(1) / 16, DIGITS.train_y[:400]
    net = robust.network(64, "bn", 1)
    looks = [(0, robust.kept(net))]
    training = train(
        net,
        DIGITS.train_x[:400],
        y,
        pixel_max=16,
        rate=0.1,
        steps=60,
        order=stream(1, "order"),
        stops=range(10, 61, 10),
    )
    for step, _ in training:
        looks.append((step, robust.kept(net)))
    shares = []
    for _, state in looks:
        net.load_state_dict(state)
        shares.append(accuracy(net, x, y))
    target = (shares[1] + shares[2]) / 2
    assert shares[0] < shares[1] < target < shares[2]
    step = robust.take_back(net, looks, x, y, target)
    assert 10 < step < 20
    assert accuracy(net, x, y) == pytest.approx(target, abs=0.006)
    names = [n for n, v in looks[0][1].items() if v.is_floating_point()]
    assert any(n.endswith("running_var") for n in names)
    now, first, second = net.state_dict(), looks[1][1], looks[2][1]
    on = {n: (now[n] - first[n]).norm() / (second[n] - first[n]).norm() for n in names}
    assert max(on.values()) - min(on.values()) < 1e-3  # one straight line for all of them
    # exactly at a look, the look; out of reach, where training ends
    assert robust.take_back(net, looks, x, y, shares[1]) == 10
    assert robust.take_back(net, looks, x, y, 2.0) == 60
    assert all(torch.equal(v, looks[-1][1][n]) for n, v in net.state_dict().items())


def test_both_networks_of_a_pair_are_attacked_at_equal_accuracy(monkeypatch):
    plan = attacks.PLANS["small"]._replace(steps=150, images=400)
    monkeypatch.setitem(attacks.PLANS, "small", plan)
    arm = {"part": "fair", "group": "dense", "arm": "bn", "rate": 0.1, "against": 0.1}
    rows = list(attacks.measure(arm, 0, "small", DIGITS))
    by = {(r["net"], r["stage"]): r for r in rows if "net" in r}
    assert len(by) == 4
    ends = {net: by[net, "end"]["clean"] for net in ("bn", "none")}
    equal = {net: by[net, "equal"]["clean"] for net in ("bn", "none")}
    worse, better = sorted(ends, key=ends.get)
    assert ends[better] > ends[worse]
    assert equal[worse] == ends[worse] == pytest.approx(equal[better], abs=0.003)
    assert by[better, "equal"]["step"] < by[worse, "equal"]["step"] == 150
    for row in by.values():
        assert all(row[name] < row["clean"] for name in attacks.NAMES)
        assert row["pgd_linf"] <= row["fgsm_linf"]
    drawn = {(r["series"], r["curve"], r["x"]): r["y"] for r in rows if "curve" in r}
    assert len(drawn) == 2 * 8
    for name, net in (("without", "none"), ("with batch normalization", "bn")):
        assert drawn[name, "pgd", 0.05] == 100 * by[net, "equal"]["pgd_linf"]
        assert drawn[name, "noise", 0.5] == 100 * by[net, "equal"]["noise"]


# -- made-up rows -----------------------------------------------------------------------------


def simulated(lost=5.0, by_noise=None, sd=0.3, apart=(), diverged=()):
    """BN loses so many points more to attacks, and to noise; some pairs are not equal."""

    def rows(cell, seed):
        if cell["part"] == "tuning":
            share = 0.95 - abs(math.log10(cell["rate"] / 0.3)) / 100
            yield from ({"step": s, "accuracy": share, "diverged": False} for s in (1, 2, 3))
            return
        for net in ("bn", "none"):
            for stage in ("end", "equal"):
                row = {"net": net, "stage": stage, "step": 600, "diverged": seed in diverged}
                row["clean"] = 0.95 - (0.003 if seed in apart and net == "bn" else 0.0)
                for name in attacks.NAMES:
                    more = by_noise if name == "noise" and by_noise is not None else lost
                    off = noise(seed, net, name, sd=sd) + (more if net == "bn" else 0)
                    row[name] = (60 - off) / 100
                if stage == "equal":
                    row["clean_all"] = 0.94
                yield row

    return rows


def verdict(budget="small", data="mnist", seeds=None, **given):
    rows, _ = simulate(attacks, simulated(**given), budget, data, seeds)
    return judged(attacks, rows)["adversarial"]


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({}, "supported"),
        ({"lost": 0.0}, "refuted"),
        ({"lost": -5.0}, "refuted"),
        ({"lost": 0.5, "sd": 0.1}, "refuted"),
        ({"by_noise": 0.0}, "mixed"),
        ({"lost": 0.0, "by_noise": 5.0}, "mixed"),
        ({"lost": 1.2, "sd": 2.0}, "inconclusive"),
    ],
)
def test_bn_has_to_lose_more_to_attacks_and_to_noise(given, status):
    found = verdict(**given)
    assert (found.status, found.published_status) == (status, None)
    assert found.effect == pytest.approx(given.get("lost", 5.0), abs=1.6)
    assert found.n >= 5
    if status != "inconclusive":
        assert found.planned_half_width <= 0.5


def test_one_attack_that_does_not_fool_more_refutes_its_level():
    for by_noise, status in ((5.0, "mixed"), (0.0, "refuted")):
        rows, _ = simulate(attacks, simulated(by_noise=by_noise))
        for row in rows:
            if row.get("net") == "none":
                row["fgsm_l2"] -= 0.05
        assert judged(attacks, rows)["adversarial"].status == status


def test_pairs_that_are_not_equal_or_diverged_are_left_out_and_counted():
    found = verdict(apart=(1,), diverged=(2,), sd=0.6)
    assert found.status == "supported"
    whole = verdict(sd=0.6)
    assert found.n == whole.n - 2
    assert "Pairs that are not at equal clean accuracy, and are left out: 2." in found.notes
    assert not any("left out" in note for note in whole.notes)
    rows, _ = simulate(attacks, simulated(apart=(1,), sd=0.6))
    with overruled({"adversarial": {"clean": 0.3}}):
        assert judged(attacks, rows)["adversarial"].n == whole.n


def test_pairs_at_other_rates_do_not_count():
    rows, _ = simulate(attacks, simulated())
    best = {"part": "fair", "arm": "bn", "rate": 0.3, "against": 0.3}
    assert len(contrasts.pairs(rows, best, 0.2)[0]) >= 5
    assert contrasts.pairs(rows, {**best, "against": 1.0}, 0.2) == ({}, 0)


def test_the_pilot_plans_and_variants_are_shown():
    rows, asked = simulate(attacks, simulated(sd=0.6))
    by = {}
    for cell in asked:
        by.setdefault(cell.arm["part"], set()).add(cell.seed)
    assert by["tuning"] == {800, 801}
    assert by["pilot"] == {900, 901, 902, 903}
    assert by["shown"] == set(range(5))
    assert 5 < len(by["fair"]) <= 16
    found = judged(attacks, rows)["adversarial"]
    shown = {c["name"] for c in found.cells if c["part"] == "shown"}
    assert {"PGD-5, Linf 0.05, none − bn, eps 1", "clean accuracy, all test images"} <= shown
    assert any(note.startswith("Accuracy in % of bn: as they are 95.0") for note in found.notes)
    again = judged(attacks, [r for r in rows if r["part"] not in ("pilot", "shown")])
    assert again["adversarial"].effect == found.effect


def test_missing_runs_leave_the_verdict_open():
    rows, _ = simulate(attacks, simulated())
    for part in ("tuning", "fair", "pilot"):
        found = judged(attacks, [r for r in rows if r["part"] == part])["adversarial"]
        assert found.status == "inconclusive"
    assert attacks.judge([]) == attacks.figures([]) == []
    assert verdict(data="digits").status == "demo"
    assert verdict(budget="tiny", seeds=8).status == "inconclusive"


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in attacks.expected("small", "mnist", None))
    _, asked = simulate(attacks, simulated(sd=0.6))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.35)


def test_the_registry_agrees_and_the_whole_experiment_runs_on_the_digits():
    owned = {i for i, claim in claims().items() if claim.experiment == "attacks"}
    assert owned == set(attacks.CLAIMS)
    rows, asked = simulate(
        attacks, lambda cell, seed: attacks.measure(cell, seed, "tiny", DIGITS),
        "tiny", "digits", 1,
    )  # fmt: skip
    assert len(asked) == 4 + 1 + 2
    assert judged(attacks, rows)["adversarial"].status == "demo"
