"""The experiment on learning rates: its rates, what is asked for and what is concluded."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gammabeta.studies import _data, learning_rate
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._learning_rate import ladder, rules, speed
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


@pytest.mark.parametrize("norm", learning_rate.NORMS)
def test_a_run_is_plain_training_of_ten_layers(norm):
    x, y, test_x, test_y = fair_split(DIGITS, 6, "test")
    net = MLP((64, *[100] * 10, 10), "relu", norm == "bn", stream(6, "weights"))
    update = torch.optim.SGD(net.parameters(), lr=0.1)
    for index in itertools.islice(batches(len(x), 64, stream(6, "order")), 10):
        update.zero_grad()
        F.cross_entropy(net(pixels(x[index], 16)), y[index]).backward()
        update.step()
    net.eval()
    share = (net(pixels(test_x, 16)).argmax(1) == test_y).double().mean().item()
    cell = {"part": "fair", "group": "deep", "arm": norm, "rate": 0.1}
    *_, last = learning_rate.measure(cell, 6, "tiny", DIGITS)
    assert (last["step"], last["accuracy"]) == (10, share)


def test_bn_stands_in_the_layers_asked_for_and_all_start_alike():
    def kinds(net):
        return [type(layer).__name__ for layer in net.layers]

    plain, normed = ["Linear", "ReLU"], ["Linear", "BatchNorm1d", "ReLU"]
    wanted = {
        "bn": [*normed, *normed, "Linear"],
        "none": [*plain, *plain, "Linear"],
        "first": [*normed, *plain, "Linear"],
        "second": [*plain, *normed, "Linear"],
    }
    nets = {a: speed.partly((64, 100, 100, 10), b, 1) for a, b in speed.ARMS.items()}
    assert {arm: kinds(net) for arm, net in nets.items()} == wanted
    weights = [[m.weight for m in net.layers if isinstance(m, nn.Linear)] for net in nets.values()]
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))
    assert [m.bias is None for m in nets["first"].layers if isinstance(m, nn.Linear)] == [
        *(True, False, False)
    ]


def test_a_target_is_reached_between_two_looks_or_at_the_end():
    assert speed.reached(0.9, [2, 4, 8], [0.95, 0.97, 0.99]) == (2.0, True)
    assert speed.reached(0.9, [2, 4, 8], [0.5, 0.8, 1.0]) == (6.0, True)
    assert speed.reached(0.9, [2, 4, 8], [0.5, 0.6, 0.7]) == (8.0, False)


def test_the_published_network_sees_binary_pixels_and_small_gaussian_weights():
    seen = []

    def spy(net, x, *rest, **options):
        seen.append((net, x))
        return iter(())

    original, speed.train = speed.train, spy
    try:
        list(speed.published("none", 0.1, 0, DIGITS, 10))
    finally:
        speed.train = original
    ((net, x),) = seen
    assert set(x.unique().tolist()) == {0, DIGITS.pixel_max}
    weights = torch.cat([m.weight.flatten() for m in net.layers if isinstance(m, nn.Linear)])
    assert weights.std().item() == pytest.approx(0.1, rel=0.02)
    assert all(not m.bias.any() for m in net.layers if isinstance(m, nn.Linear))


def test_the_ladder_ends_after_two_failures_and_goes_down_where_nothing_works(monkeypatch):
    def rungs(shares):
        """What a climb tries, if the accuracies are these by power."""
        rates = []

        def fake(net, x, y, *, rate, **rest):
            rates.append(round(math.log2(rate)))
            yield 1, 1.0

        monkeypatch.setattr(ladder, "train", fake)
        monkeypatch.setattr(ladder, "accuracy", lambda *a: shares(rates[-1]))
        rows = list(ladder.climb(1, True, 0, DIGITS, 1, 1.0))
        assert [row["power"] for row in rows] == rates
        return rates, ladder.largest(rows)

    # one failure in the middle does not end the search
    assert rungs(lambda k: 0.9 if k <= 0 or k == 2 else 0.5) == (list(range(-4, 5)), (2, True))
    assert rungs(lambda k: 0.9 if k <= -7 else 0.5) == ([-4, -3, -5, -6, -7], (-7, True))
    assert rungs(lambda k: 0.9) == (list(range(-4, 11)), (10, False))
    tried, end = rungs(lambda k: 0.1)
    assert (min(tried), end) == (-12, (-13, False))


def test_a_loss_that_is_not_finite_fails():
    (row, *_) = ladder.climb(10, False, 0, DIGITS, 1, 1.0, last=-4)
    assert row["works"] is False  # one step is not enough
    monster = list(ladder.climb(2, False, 0, DIGITS, 5, 1.0))
    assert monster[-1]["works"] is False


# -- made-up rows -----------------------------------------------------------------------------

BEST = {"bn": 0.3, "none": 0.1}


def gains(small, large, sd=0.1, best=BEST):
    """BN gains so many points at the best rate without it, and so many at the best rates."""

    def rows(cell, seed):
        if not cell["part"].startswith(("tuning", "fair")) and cell["part"] != "pilot":
            return others(3.0, 4.0)(cell, seed)
        bn, rate = cell["arm"] == "bn", cell["rate"]
        if cell["part"] == "tuning":
            level = 90 - 10 * abs(rate - best[cell["arm"]])
        elif not bn:
            level = 90
        else:
            level = 90 + (small if rate == best["none"] else large if rate == best["bn"] else 5)
        level += noise(seed, cell["group"], cell["arm"], rate, sd=sd)
        return [{"step": s, "accuracy": level / 100, "diverged": False} for s in (1, 2, 3)]

    return rows


def others(speedup, powers, old=3.0, sd=0.05, until=1000.0):
    """BN is so many times faster, and works at 2^powers times the rate."""

    def rows(cell, seed):
        bn, part = cell["arm"] == "bn", cell["part"].removesuffix("-pilot")
        if part not in ("speed", "published", "ladder"):
            return gains(0.0, 1.0)(cell, seed)
        jitter = noise(seed, cell["group"], cell["arm"], part, sd=sd)
        if part == "ladder":
            top = round((powers if bn else 0) + 10 * jitter)
            return [{"power": k, "works": k <= top, "validation": 0.9} for k in range(-4, top + 3)]
        factor = {"speed": speedup, "published": old}[part]
        late = 100 / (factor if bn else 1.0) * math.exp(jitter)
        # the accuracy is 0.90 at the step ``late``, and 0.95 at 1.5 times it
        steps = [s for s in (1, 2, 5, 10, 20, 50, 100, 200, 400, 1000) if s <= until]
        both = [(s, 0.8 + 0.1 * s / late) for s in steps]
        return [
            {"step": s, "validation": min(v, 0.999), "finite": True, "cpu_time": s * 0.001}
            for s, v in both
        ]

    return rows


def other(claim, *args, budget="small", data="mnist", seeds=None, **kwargs):
    rows, _ = simulate(learning_rate, others(*args, **kwargs), budget, data, seeds)
    return judged(learning_rate, rows)[claim]


def test_fewer_steps_are_supported_and_as_many_refuted():
    found = other("bn-speed", 2.0, 4.0)
    assert (found.status, found.published_status) == ("supported", "supported")
    assert found.effect == pytest.approx(math.log(2), abs=0.1)
    assert any("ratio of steps: 2.0" in note or "1.9" in note for note in found.notes)
    assert {c["part"] for c in found.cells} == {"fair", "published, Ioffe & Szegedy's network",
                                               "time", "shown"}  # fmt: skip
    found = other("bn-speed", 1.0, 4.0, old=1.0)
    assert (found.status, found.published_status) == ("refuted", "refuted")
    assert other("bn-speed", 1.25, 4.0, sd=0.1).status == "inconclusive"


def test_runs_that_do_not_arrive_are_counted():
    found = other("bn-speed", 3.0, 4.0, until=50)
    assert any("Targets not reached" in n and "10 without" in n for n in found.notes)
    assert found.effect < math.log(2)


@pytest.mark.parametrize(
    ("powers", "sd", "status"),
    [(4.0, 0.05, "supported"), (0.0, 0.05, "refuted"), (2.0, 0.2, "inconclusive")],
)
def test_much_larger_rates_are_four_times_as_large(powers, sd, status):
    found = other("higher-lr", 3.0, powers, sd=sd)
    assert (found.status, found.published_status) == (status, None)
    assert len(found.cells) == 2
    assert any(note.startswith("Median log2 ratio") for note in found.notes)


def verdict(*args, budget="small", data="mnist", seeds=None, **kwargs):
    rows, _ = simulate(learning_rate, gains(*args, **kwargs), budget, data, seeds)
    return judged(learning_rate, rows)["bjorck-lr"]


def test_a_gain_at_the_best_rates_alone_is_supported():
    found = verdict(0.0, 1.0)
    assert (found.status, found.published_status) == ("supported", None)
    assert found.effect == pytest.approx(0.0, abs=0.2)
    assert found.planned_half_width <= 0.15
    assert found.n >= 8
    assert found.reported == claims()["bjorck-lr"].reported
    assert [c["part"] for c in found.cells].count("shown") == 4
    assert "Learning rates chosen (deep): bn at 0.3; none at 0.1." in found.notes


def test_a_gain_at_the_small_rate_refutes():
    found = verdict(0.8, 1.5)
    assert found.status == "refuted"
    assert rules.SMALL in found.sentence


def test_a_loss_at_the_small_rate_refutes_as_well():
    assert verdict(-0.8, 1.5).status == "refuted"


def test_without_a_gain_at_the_best_rates_there_is_nothing_to_explain():
    for small in (0.0, 0.8, -0.8):
        found = verdict(small, 0.0)
        assert found.status == "inconclusive"
        assert any("positive control" in note for note in found.notes)


def test_the_same_best_rate_refutes_where_bn_helps_and_the_card_says_so():
    found = verdict(1.0, 1.0, best={"bn": 0.1, "none": 0.1})
    assert found.status == "refuted"
    assert any("not larger" in note for note in found.notes)


def test_noise_is_inconclusive():
    found = verdict(0.0, 9.0, sd=1.5)
    assert found.status == "inconclusive"
    assert found.n == 16


def test_both_arms_train_at_the_small_rate_and_no_run_is_asked_for_twice():
    _, asked = simulate(learning_rate, gains(0.0, 1.0))
    fair = [c for c in asked if c.arm["part"] == "fair" and c.seed == 0]
    runs = {(c.arm["group"], c.arm["arm"], round(c.arm["rate"], 5)) for c in fair}
    assert len(runs) == len(fair) == 8
    for group, tenth in (("deep", {0.01}), ("shallow", set())):
        assert {r for g, n, r in runs if (g, n) == (group, "none")} == {0.1} | tenth
        assert {r for g, n, r in runs if (g, n) == (group, "bn")} == {0.1, 0.3} | tenth


def test_another_delta_gives_another_verdict():
    rows, _ = simulate(learning_rate, gains(0.8, 3.0))
    assert judged(learning_rate, rows)["bjorck-lr"].status == "refuted"
    with overruled({"bjorck-lr": {"delta": 1.5}}):
        assert judged(learning_rate, rows)["bjorck-lr"].status == "supported"


def test_missing_runs_leave_the_verdict_open():
    rows, _ = simulate(learning_rate, gains(0.0, 1.0))
    for part in ("tuning", "fair", "pilot"):
        found = judged(learning_rate, [r for r in rows if r["part"] == part])
        assert {v.status for v in found.values()} == {"inconclusive"}
    assert learning_rate.judge([]) == []


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in learning_rate.expected("small", "mnist", None))
    _, asked = simulate(learning_rate, gains(0.0, 1.0, sd=0.12))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    assert verdict(0.0, 1.0, data="digits").status == "demo"
    assert verdict(0.0, 1.0, budget="tiny", seeds=8).status == "inconclusive"


def test_the_whole_experiment_runs_on_the_digits():
    rows, asked = simulate(
        learning_rate,
        lambda cell, seed: learning_rate.measure(cell, seed, "tiny", DIGITS),
        "tiny",
        "digits",
        1,
    )
    assert {c.arm["part"] for c in asked} == {"tuning", "fair", "speed", "published", "ladder"}
    assert {v.status for v in judged(learning_rate, rows).values()} == {"demo"}
