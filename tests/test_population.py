"""The experiment on population statistics: averages, ghosts, repairs, and what is concluded."""

import copy
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import gammabeta as gb
from gammabeta.studies import _data, population
from gammabeta.studies._claims import claims
from gammabeta.studies._nets import m2
from gammabeta.studies._population import averages, ghosts
from gammabeta.studies._population.training import cosine, fit
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


# -- what is measured -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split():
    x, y, *_ = fair_split(DIGITS, 0, "test")
    return pixels(x, 16), y


def test_the_fit_is_plain_training_at_a_falling_rate(split):
    x, y = split
    net = m2(64, "relu", True, stream(0, "weights"))
    plain, rates = copy.deepcopy(net), cosine(0.5, 12)
    losses = list(fit(net, x, y, rates=rates, batch=32, order=stream(0, "order")))
    update = torch.optim.SGD(plain.parameters(), lr=1.0)
    for rate, at in zip(rates, batches(len(x), 32, stream(0, "order")), strict=False):
        update.param_groups[0]["lr"] = rate
        update.zero_grad()
        F.cross_entropy(plain(x[at]), y[at]).backward()
        update.step()
    assert len(losses) == 12
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("decay", averages.DECAYS)
def test_the_averages_are_those_that_pytorch_keeps(split, decay):
    x, y = split
    net = m2(64, "relu", True, stream(0, "weights"), momentum=1.0)
    usual = m2(64, "relu", True, stream(0, "weights"), momentum=1 - decay)
    kept = averages.Averages(net)
    rates = cosine(0.5, 9)
    both = (fit(n, x, y, rates=rates, batch=32, order=stream(0, "order")) for n in (net, usual))
    for _ in zip(*both, strict=True):
        kept.update()
    other = copy.deepcopy(net)
    kept.put(other, decay, started=True)
    for name, value in usual.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(other.state_dict()[name], value)
    kept.put(other, decay, started=False)
    held = dict(other.named_buffers())
    for name, value in usual.named_buffers():
        if "running" in name:
            start = 1.0 if name.endswith("var") else 0.0
            wanted = (value - start * decay**9) / (1 - decay**9)
            torch.testing.assert_close(held[name], wanted, rtol=1e-3, atol=1e-4)


def test_the_copy_that_is_frozen_has_the_statistics_of_80_percent(monkeypatch):
    frozen = []
    monkeypatch.setattr(ghosts, "freeze", lambda net: frozen.append(net) or gb.freeze(net))
    cell = {"part": "fair", "group": "ghosts", "arm": "m = 4", "rate": 0.3}
    rows = list(ghosts.measure(cell, 0, DIGITS, steps=20, images=256))
    assert [row["step"] for row in rows] == [19, 20]
    assert {"batch", "frozen", "gap", "systematic"} <= rows[-1].keys()
    (net,) = frozen
    x = pixels(fair_split(DIGITS, 0, "test")[0], 16)
    moved = copy.deepcopy(net)
    gb.unfreeze(moved)
    gb.calibrate(moved, [x])
    pairs = itertools.zip_longest(net.named_buffers(), moved.named_buffers())
    off = [(a - b).abs().max() for (name, a), (_, b) in pairs if "running_mean" in name]
    assert min(off) > 0  # the weights went on, the statistics did not
    assert all(layer._frozen for layer in net.modules() if isinstance(layer, gb.GhostBatchNorm1d))


# -- what is concluded ------------------------------------------------------------------------


def simulated(early=3.0, late=0.0, long=None, batch=2.0, frozen=2.0, large=0.0, sd=0.05):
    """Points: precise - average early and late (decay 0.999: long), gains of the two repairs."""

    def rows(cell, seed):
        if cell["part"].startswith("averages"):
            return [average(seed, step) for step in population._stops(400)]
        share = 95 - abs(math.log10(cell["rate"])) + noise(seed, cell["arm"], sd=sd)
        gains = {"batch": batch, "frozen": frozen}
        if cell["arm"] == "m = 64":
            gains = dict.fromkeys(gains, large)
        more = {c: (share + g + noise(seed, c, cell["arm"], sd=sd)) / 100
                for c, g in gains.items()}  # fmt: skip
        row = {"accuracy": share / 100, "diverged": False, "gap": 0.3, "systematic": 0.1, **more}
        return [{"step": s, **row} for s in (1, 2, 3)]

    def average(seed, step):
        lost = early if step <= 100 else late
        row = {"step": step, "diverged": False, "precise": 0.9}
        for column in ("started", "average_9", "average_99", "average_999"):
            own = long if long is not None and column.endswith("_999") else lost
            row[column] = 0.9 - (own + noise(seed, column, step, sd=sd)) / 100
        return row

    return rows


@pytest.mark.parametrize(
    ("given", "status", "published"),
    [
        ({}, "supported", "supported"),
        ({"early": -1.0}, "refuted", "refuted"),
        ({"late": 2.0}, "refuted", "refuted"),
        ({"long": 5.0}, "mixed", "supported"),
        ({"late": 0.25, "sd": 2.0}, "inconclusive", "inconclusive"),
    ],
)
def test_precise_statistics_have_to_be_better_early_and_equal_late(given, status, published):
    rows, asked = simulate(population, simulated(**given))
    verdict = judged(population, rows)["precise-bn"]
    assert (verdict.status, verdict.published_status) == (status, published)
    assert len([c for c in asked if c.arm["part"] == "averages"]) >= 8


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({}, "supported"),
        ({"large": -2.0}, "supported"),
        ({"large": 2.0}, "refuted"),
        ({"batch": -1.0}, "mixed"),
        ({"batch": 0.0, "frozen": 0.0}, "refuted"),
        ({"large": 0.3, "sd": 1.0}, "inconclusive"),
    ],
)
def test_the_repairs_have_to_gain_where_ghosts_are_small_alone(given, status):
    rows, _ = simulate(population, simulated(**given))
    verdict = judged(population, rows)["train-test-gap"]
    assert (verdict.status, verdict.published_status) == (status, None)


def test_the_registry_agrees_and_the_whole_experiment_runs_on_the_digits():
    owned = {i for i, claim in claims().items() if claim.experiment == "population"}
    assert owned == set(population.CLAIMS) == set(population.WORDS)
    rows, _ = simulate(
        population, lambda cell, seed: population.measure(cell, seed, "tiny", DIGITS),
        "tiny", "digits", 2,
    )  # fmt: skip
    assert {v.status for v in judged(population, rows).values()} == {"demo"}
    assert population.judge([]) == population.figures([]) == []
