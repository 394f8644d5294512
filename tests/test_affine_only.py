"""The experiment that trains gamma and beta alone: what may change, and what is concluded."""

import math

import pytest
import torch
from torch import nn

from gammabeta.studies import _data, affine_only
from gammabeta.studies._claims import claims
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")
START = {group: affine_only.network(64, group, 0) for group in affine_only.GROUPS}
UNITS = {"100-100": 200, "[100]*5": 500, affine_only.CONVOLUTIONAL: 24}


def test_the_dense_networks_are_those_of_the_protocol():
    for group, depth in affine_only.DEPTHS.items():
        net = MLP((64, *[100] * depth, 10), "relu", True, stream(0, "weights"))
        for own, other in zip(START[group].parameters(), net.parameters(), strict=True):
            assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("group", "arm"), [(g, a) for g, arms in affine_only.GROUPS.items() for a in arms]
)
def test_an_arm_changes_its_own_numbers_alone(monkeypatch, group, arm):
    seen = []
    monkeypatch.setattr(affine_only, "accuracy", lambda net, *_: seen.append(net) or 0.5)
    cell = {"part": "fair", "group": group, "arm": arm, "rate": 0.3}
    rows = list(affine_only.measure(cell, 0, "tiny", DIGITS))
    assert len(rows) == 1 or rows[-1]["step"] == 10
    changed = {}
    for (name, before), after in zip(
        START[group].named_parameters(), seen[-1].parameters(), strict=True
    ):
        changed[name] = (before != after).sum().item()
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    norms = [n for n, m in START[group].named_modules() if isinstance(m, kinds)]
    own = {name for name in changed if name.rsplit(".", 1)[0] in norms}
    if arm == affine_only.AFFINE:
        assert {name for name, count in changed.items() if count} == own
    elif arm == affine_only.OUTPUT:
        assert sum(bool(count) for count in changed.values()) == 2
    elif arm == affine_only.RANDOM:
        assert sum(changed.values()) <= 2 * UNITS[group]
        assert {n for n, c in changed.items() if c} <= set(changed) - own
    else:
        assert all(changed.values())


@pytest.mark.parametrize("group", affine_only.GROUPS)
def test_as_many_random_weights_as_gammas_and_betas_two_for_each_unit(group):
    affine = affine_only.trained(START[group], affine_only.AFFINE, 0)
    random = affine_only.trained(START[group], affine_only.RANDOM, 0)
    count = sum(parameter.numel() for parameter, _ in affine)
    assert sum(int(mask.sum()) for _, mask in random) == count == 2 * UNITS[group]
    assert all((mask.flatten(1).sum(1) == 2).all() for _, mask in random)
    other = affine_only.trained(START[group], affine_only.RANDOM, 1)
    assert not torch.equal(random[0][1], other[0][1])


def simulated(gain=(30.0, 30.0, 30.0), sd=0.2):
    def rows(cell, seed):
        share = 60.0
        if cell["arm"] == affine_only.AFFINE:
            share += gain[list(affine_only.GROUPS).index(cell["group"])]
        share += noise(seed, cell["group"], cell["arm"], sd=sd)
        share -= abs(math.log10(cell["rate"] / 3))
        row = {"accuracy": share / 100, "diverged": False, "small": 0.1}
        return [{"step": s, **row} for s in (1, 2, 3)]

    return rows


@pytest.mark.parametrize(
    ("gain", "sd", "status"),
    [
        ((30.0, 30.0, 0.0), 0.2, "supported"),
        ((30.0, 0.0, 0.0), 0.2, "refuted"),
        ((-5.0, -5.0, 0.0), 0.2, "refuted"),
        ((1.5, 30.0, 0.0), 3.0, "inconclusive"),
    ],
)
def test_gamma_and_beta_have_to_gain_in_both_networks(gain, sd, status):
    rows, asked = simulate(affine_only, simulated(gain, sd))
    verdict = judged(affine_only, rows)["bn-only"]
    assert (verdict.status, verdict.published_status) == (status, None)
    dense = [c for c in asked if c.arm["group"] in affine_only.DEPTHS]
    spare = {c.seed for c in dense if c.arm["arm"] == affine_only.ALL}
    assert spare == {800, 801, 0, 1, 2, 3, 4}


@pytest.mark.parametrize("other", [30.0, 0.0, -20.0])
def test_the_convolutional_network_is_shown_and_decides_nothing(other):
    rows, asked = simulate(affine_only, simulated((30.0, 30.0, other)))
    verdict = judged(affine_only, rows)["bn-only"]
    dense = [r for r in rows if r["group"] in affine_only.DEPTHS]
    alone = judged(affine_only, dense)["bn-only"]
    for field in ("status", "effect", "ci", "n", "p", "sentence", "half_width"):
        assert getattr(verdict, field) == getattr(alone, field)
    cells = {c["name"]: c for c in verdict.cells}
    gain = cells["gamma and beta − random weights, convolutional"]
    assert (gain["part"], gain["n"]) == ("shown", 16)
    assert gain["effect"] == pytest.approx(other, abs=0.3)
    assert cells["accuracy, output, convolutional"]["n"] == 5
    (said,) = [n for n in verdict.notes if n.startswith("Shown, convolutional network: ")]
    assert "n = 16" in said
    parts = {c.arm["part"] for c in asked if c.arm["group"] == affine_only.CONVOLUTIONAL}
    assert parts == {"tuning", "shown"}


def test_a_best_rate_at_the_edge_extends_the_grid_of_all_arms():
    def high(cell, seed):
        share = 0.5 - 0.01 * abs(math.log10(cell["rate"] / 30))
        return [{"step": s, "accuracy": share, "diverged": False, "small": 0.0} for s in (1, 2, 3)]

    _, asked = simulate(affine_only, high, seeds=1)
    for group, arms in affine_only.GROUPS.items():
        tried = {(c.arm["arm"], c.arm["rate"]) for c in asked if c.arm["group"] == group}
        assert tried == {(arm, rate) for arm in arms for rate in (1.0, 3.0, 10.0, 30.0, 100.0)}


def test_the_registry_agrees_and_the_whole_experiment_runs_on_the_digits():
    owned = {i for i, claim in claims().items() if claim.experiment == "affine-only"}
    assert owned == set(affine_only.CLAIMS)
    rows, _ = simulate(
        affine_only, lambda cell, seed: affine_only.measure(cell, seed, "tiny", DIGITS),
        "tiny", "digits", 2,
    )  # fmt: skip
    assert {v.status for v in judged(affine_only, rows).values()} == {"demo"}
    assert affine_only.judge([]) == affine_only.figures([]) == []
