"""The experiment on GroupNorm and the batch size: what is trained, and what is concluded."""

import math

import pytest
import torch
from torch import nn

from gammabeta.studies import _data, group_norm
from gammabeta.studies._claims import claims
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")


def test_all_batch_sizes_see_the_same_number_of_images_and_groupnorm_each_image_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(group_norm, "accuracy", lambda net, *_: seen.append(net) or 0.5)
    steps = {}
    for name, batch in group_norm.BATCHES.items():
        cell = {"part": "fair", "group": "GroupNorm", "arm": name, "rate": 0.1}
        *_, last = group_norm.measure(cell, 0, "tiny", DIGITS)
        steps[batch] = last["step"]
    assert {batch * count for batch, count in steps.items()} == {128}
    net = seen[-1].train()
    assert [m.num_groups for m in net.layers if isinstance(m, nn.GroupNorm)] == [10, 10]
    x = torch.rand(6, 64)
    torch.testing.assert_close(net(x)[:2], net(x[:2]))


def simulated(slope=0.0, sd=0.05):
    def rows(cell, seed):
        share = 90 + slope * math.log2(group_norm.BATCHES[cell["arm"]])
        share += noise(seed, cell["arm"], sd=sd)
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


def test_the_registry_agrees_and_the_whole_experiment_runs_on_the_digits():
    owned = {i for i, claim in claims().items() if claim.experiment == "group-norm"}
    assert owned == set(group_norm.CLAIMS)
    rows, _ = simulate(
        group_norm, lambda cell, seed: group_norm.measure(cell, seed, "tiny", DIGITS),
        "tiny", "digits", 2,
    )  # fmt: skip
    assert {v.status for v in judged(group_norm, rows).values()} == {"demo"}
    assert group_norm.judge([]) == group_norm.figures([]) == []
