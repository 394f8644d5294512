"""The experiment on GroupNorm and the batch size: what is trained, and what is concluded."""

import math

import pytest
import torch
from torch import nn

from gammabeta.layers._running import RunningMoments
from gammabeta.studies import _data, group_norm
from gammabeta.studies._claims import claims
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


@pytest.mark.parametrize(
    ("group", "groups"), [("GroupNorm", [10, 10]), (group_norm.CONVOLUTIONAL, [4, 4])]
)
def test_all_batch_sizes_see_the_same_number_of_images_and_groupnorm_each_image_alone(
    monkeypatch, group, groups
):
    seen = []
    monkeypatch.setattr(group_norm, "accuracy", lambda net, *_: seen.append(net) or 0.5)
    steps = {}
    for name, batch in group_norm.BATCHES.items():
        cell = {"part": "fair", "group": group, "arm": name, "rate": 0.1}
        *_, last = group_norm.measure(cell, 0, "tiny", DIGITS)
        steps[batch] = last["step"]
    assert {batch * count for batch, count in steps.items()} == {128}
    net = seen[-1].train()
    assert [m.num_groups for m in net.layers if isinstance(m, nn.GroupNorm)] == groups
    assert not any(isinstance(m, RunningMoments) for m in net.layers)
    x = torch.rand(6, 64)
    torch.testing.assert_close(net(x)[:2], net(x[:2]))


def simulated(slope=0.0, sd=0.05, convolutional=0.0):
    def rows(cell, seed):
        if cell["group"] == group_norm.CONVOLUTIONAL:
            slope_here = convolutional
        else:
            slope_here = slope
        share = 90 + slope_here * math.log2(group_norm.BATCHES[cell["arm"]])
        share += noise(seed, cell["group"], cell["arm"], sd=sd)
        share -= abs(math.log10(cell["rate"] / 0.1))
        return [{"step": s, "accuracy": share / 100, "diverged": False} for s in (1, 2, 3)]

    return rows


@pytest.mark.parametrize(
    ("slope", "sd", "status"),
    [(0.0, 0.05, "supported"), (0.3, 0.05, "refuted"), (-0.3, 0.05, "refuted"),
     (0.05, 1.0, "inconclusive")],
)  # fmt: skip
def test_the_slope_has_to_be_flat(slope, sd, status):
    rows, asked = simulate(group_norm, simulated(slope, sd))
    verdict = judged(group_norm, rows)["gn-small"]
    assert (verdict.status, verdict.published_status) == (status, None)
    assert verdict.n >= 8
    assert {c.seed for c in asked if c.arm["part"] == "tuning"} == {800, 801}


@pytest.mark.parametrize("other", [0.0, 2.0, -2.0])
def test_the_convolutional_network_is_shown_and_decides_nothing(other):
    rows, asked = simulate(group_norm, simulated(0.0, convolutional=other))
    verdict = judged(group_norm, rows)["gn-small"]
    dense = [r for r in rows if r["group"] == group_norm.GN]
    alone = judged(group_norm, dense)["gn-small"]
    for field in ("status", "effect", "ci", "n", "p", "sentence", "half_width"):
        assert getattr(verdict, field) == getattr(alone, field)
    cells = {c["name"]: c for c in verdict.cells}
    slope = cells["slope per doubling of the batch, convolutional"]
    assert (slope["part"], slope["n"]) == ("shown", 16)
    assert slope["effect"] == pytest.approx(other, abs=0.05)
    less = cells["B = 2 − B = 64 (points), convolutional"]
    assert less["effect"] == pytest.approx(-5 * other, abs=0.2)
    (said,) = [n for n in verdict.notes if n.startswith("Shown, convolutional network: ")]
    assert "n = 16" in said
    parts = {c.arm["part"] for c in asked if c.arm["group"] == group_norm.CONVOLUTIONAL}
    assert parts == {"tuning", "shown"}


def test_the_registry_agrees_and_the_whole_experiment_runs_on_the_digits():
    owned = {i for i, claim in claims().items() if claim.experiment == "group-norm"}
    assert owned == set(group_norm.CLAIMS)
    rows, _ = simulate(
        group_norm, lambda cell, seed: group_norm.measure(cell, seed, "tiny", DIGITS),
        "tiny", "digits", 2,
    )  # fmt: skip
    assert {v.status for v in judged(group_norm, rows).values()} == {"demo"}
    assert group_norm.judge([]) == group_norm.figures([]) == []
