"""The experiment on batches that are not independent: their making, and what is concluded."""

import copy
import itertools
import math

import pytest
import torch

from gammabeta.studies import _data, composition
from gammabeta.studies._claims import claims
from gammabeta.studies._train import fair_split, pixels, stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


@pytest.mark.parametrize("kinds", [0, 1, 2])
def test_a_batch_has_so_many_digits_and_no_image_twice(kinds):
    labels = fair_split(DIGITS, 0, "test")[1]
    draw, seen = composition.composed(labels, kinds, stream(0, "a")), set()
    for at in itertools.islice(draw, 50):
        assert len(set(at.tolist())) == composition.BATCH
        digits, counts = labels[at].unique(return_counts=True)
        seen |= set(digits.tolist())
        if kinds:
            assert counts.tolist() == [composition.BATCH // kinds] * kinds
        else:
            assert len(digits) > 4
    assert seen == set(range(10))


def test_all_arms_start_alike_and_average_over_100_batches():
    nets = [composition.network(64, norm, 3, 800) for norm in ("bn", "brn", "gn")]
    for one in nets[1:]:
        for a, b in zip(nets[0].parameters(), one.parameters(), strict=True):
            assert torch.equal(a, b)
    assert [m.momentum for m in nets[0].layers if hasattr(m, "momentum")] == [0.01, 0.01]
    assert [m.momentum for m in nets[1].layers if hasattr(m, "momentum")] == [0.01, 0.01]


def test_batches_alike_are_training_mode_and_the_network_stays_as_it_is():
    x, y, *_ = fair_split(DIGITS, 0, "test")
    x, net = pixels(x, 16), composition.network(64, "bn", 0, 800)
    before = copy.deepcopy(net.state_dict())
    found = composition._by_others(net, x, x[:320], y[:320], 2, stream(0, "t"))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    draw = composition.composed(y[:320], 2, stream(0, "t"))
    right = 0
    for at in itertools.islice(draw, 10):
        right += int((copy.deepcopy(net).train()(x[at]).argmax(1) == y[at]).sum())
    assert found["like"] == pytest.approx(right / 320)


def test_with_one_digit_the_rate_is_chosen_in_training_mode_on_batches_alike(monkeypatch):
    monkeypatch.setattr(composition, "accuracy", lambda *_: 0.125)
    found = {}
    for arm, group in composition.GROUP_OF.items():
        cell = {"part": "tuning", "group": group, "arm": arm, "rate": 0.1}
        *_, last = composition.measure(cell, 800, "tiny", DIGITS)
        assert set(last) == {"step", "accuracy", "diverged"}
        found[arm] = last["accuracy"]
    assert found.pop(composition.ONE) != 0.125
    assert set(found.values()) == {0.125}


def simulated(gain=5.0, leak=(40.0, 40.0), running=None, sd=0.1):
    """Points: what Batch Renormalization gains; lost from training to eval mode, 2 digits and 1."""
    lost = dict(zip((composition.BN, composition.ONE), leak, strict=True))

    def rows(cell, seed):
        share = 60 + (gain if cell["arm"] == composition.BRN else 0.0)
        share += noise(seed, cell["arm"], sd=sd) - abs(math.log10(cell["rate"] / 0.1))
        row = {"accuracy": share, "precise": share}
        row["like"] = share + lost.get(cell["arm"], 0.0) + noise(seed, cell["arm"], "like", sd=sd)
        row["mixed"] = share
        if running is not None:
            row["accuracy"] = row["like"] - running
        tuning = cell["part"] == "tuning"
        found = {k: v / 100 for k, v in row.items() if not tuning or k == "accuracy"}
        return [{"step": s, "diverged": False, **found} for s in (1, 2, 3)]

    return rows


@pytest.mark.parametrize(
    ("gain", "sd", "status"),
    [(5.0, 0.1, "supported"), (0.2, 0.1, "refuted"), (-3.0, 0.1, "refuted"),
     (1.2, 2.0, "inconclusive")],
)  # fmt: skip
def test_batch_renormalization_has_to_gain_a_point(gain, sd, status):
    rows, _ = simulate(composition, simulated(gain, sd=sd))
    verdict = judged(composition, rows)["brn-noniid"]
    assert (verdict.status, verdict.published_status) == (status, None)


@pytest.mark.parametrize(
    ("given", "status", "published"),
    [
        ({}, "supported", "supported"),
        ({"leak": (40.0, 2.0)}, "mixed", "mixed"),
        ({"leak": (2.0, 2.0)}, "refuted", "refuted"),
        ({"leak": (2.0, 2.0), "running": 40.0}, "refuted", "supported"),
        ({"leak": (11.0, 11.0), "sd": 5.0}, "inconclusive", "inconclusive"),
    ],
)
def test_a_leak_is_what_precise_statistics_leave(given, status, published):
    rows, asked = simulate(composition, simulated(**given))
    verdict = judged(composition, rows)["leakage"]
    assert (verdict.status, verdict.published_status) == (status, published)
    shown = [c for c in asked if c.arm["arm"] in (composition.GN, composition.ALL)]
    assert {c.seed for c in shown} == {800, 801, 0, 1, 2, 3, 4}


def test_the_registry_agrees_and_the_whole_experiment_runs_on_the_digits():
    owned = {i for i, claim in claims().items() if claim.experiment == "composition"}
    assert owned == set(composition.CLAIMS) == set(composition.WORDS)
    rows, _ = simulate(
        composition, lambda cell, seed: composition.measure(cell, seed, "tiny", DIGITS),
        "tiny", "digits", 2,
    )  # fmt: skip
    assert {v.status for v in judged(composition, rows).values()} == {"demo"}
    assert composition.judge([]) == composition.figures([]) == []
