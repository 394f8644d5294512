"""The experiment on devices: shards in one process, ranks in several, and what is concluded."""

import math

import pytest
import torch

import gammabeta as gb
from gammabeta.studies import _data, devices
from gammabeta.studies._claims import claims
from gammabeta.studies._devices import exact
from gammabeta.studies._devices.shards import ShardNorm1d, parallel, pooled
from gammabeta.studies._train import stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


# -- shards -----------------------------------------------------------------------------------


def test_every_shard_has_its_own_statistics_and_the_first_ones_are_kept():
    x = torch.randn(32, 5, generator=stream(0, "x")) * 3 + 1
    layer, plain = ShardNorm1d(5, virtual_batch_size=8), [gb.BatchNorm1d(5) for _ in range(4)]
    wanted = torch.cat([norm(part) for norm, part in zip(plain, x.split(8), strict=True)])
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.running_mean, plain[0].running_mean)
    torch.testing.assert_close(layer.running_var, plain[0].running_var)
    assert not torch.allclose(layer.running_mean, plain[1].running_mean)


def test_one_shard_is_batch_normalization_and_all_networks_start_alike():
    one, many = (parallel(64, 3, 32, k) for k in (1, 8))
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.equal(a, b)
    layer, plain = ShardNorm1d(5, virtual_batch_size=32), gb.BatchNorm1d(5)
    x = torch.randn(32, 5, generator=stream(1, "x"))
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_the_variance_from_shards_of_any_size_is_that_of_the_whole():
    x = torch.randn(31, 4, generator=stream(2, "x"), dtype=torch.float64) + 5
    torch.testing.assert_close(pooled(list(x.split(8))), x.var(0, unbiased=False))


def test_an_error_of_any_rank_is_seen():
    good = {"output": torch.ones(4, 2), "gradient of a": torch.ones(3), "last a": torch.ones(3)}
    halves = [{**good, "output": torch.ones(2, 2)} for _ in range(2)]
    assert exact._apart(halves, good) == (0.0, 0.0)
    other = {**halves[1], "gradient of a": torch.tensor([1.0, 1.0, 1.5])}
    assert exact._apart([halves[0], other], good)[0] == pytest.approx(0.5)
    late = {**halves[1], "last a": torch.full((3,), 2.0)}
    assert exact._apart([halves[0], late], good) == (0.0, 1.0)


# -- what is concluded ------------------------------------------------------------------------


def simulated(loss=1.0, error=3.0, sd=0.05, middle=0.5):
    """Points lost on 8 devices (half of it on 4), and the identities' error over K eps."""

    def rows(cell, seed):
        if cell["part"] == "exact":
            found = {f"{mode}_{k}": error + 0.01 * seed for k in (1, 2, 4, 8)
                     for mode in ("synchronized", "local")}  # fmt: skip
            last = {f"{name}_last": 1e-13 for name in found}
            return [{"step": 0, "formula": 1.0, **found, **last}]
        lost = {"1 device": 0.0, "2 devices": 0.0, "4 devices": middle, "8 devices": 1.0}
        share = 95 - loss * lost[cell["arm"]] + noise(seed, cell["arm"], sd=sd)
        share -= abs(math.log10(cell["rate"] / 0.3))
        row = {"accuracy": share / 100, "diverged": False}
        return [{"step": s, **row, "precise": share / 100} for s in (1, 2, 3)]

    return rows


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({}, "supported"),
        ({"loss": 0.05}, "refuted"),
        ({"loss": -1.0}, "refuted"),
        ({"error": 300.0}, "refuted"),
        ({"loss": 0.3, "sd": 1.0}, "inconclusive"),
    ],
)
def test_shards_matter_where_they_cost_accuracy_and_synchronized_ones_are_exact(given, status):
    rows, asked = simulate(devices, simulated(**given))
    verdict = judged(devices, rows)["multi-gpu"]
    assert (verdict.status, verdict.published_status) == (status, status)
    tuned = {(c.arm["arm"], c.arm["rate"]) for c in asked if c.arm["part"] == "tuning"}
    assert len(tuned) == 12
    assert len([c for c in asked if c.arm["part"] == "exact"]) == 5


def test_the_slope_is_in_points_per_doubling():
    by = {arm: {0: 0.9 - 0.01 * k} for k, arm in enumerate(devices.DEVICES)}
    assert devices._slope(by)[0] == pytest.approx(1.0)


def test_the_whole_experiment_runs_on_the_digits_in_real_processes():
    owned = {i for i, claim in claims().items() if claim.experiment == "devices"}
    assert owned == set(devices.CLAIMS)
    rows, _ = simulate(
        devices, lambda cell, seed: devices.measure(cell, seed, "tiny", DIGITS),
        "tiny", "digits", 1,
    )  # fmt: skip
    (found,) = [row for row in rows if row["part"] == "exact"]
    for name in ("synchronized_2", "local_2", "formula"):
        assert 0 <= found[name] < 100
    assert found["synchronized_2_last"] < 1e-10
    assert judged(devices, rows)["multi-gpu"].status == "demo"
    assert devices.judge([]) == devices.figures([]) == []
