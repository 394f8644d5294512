"""The experiment on costs: what is timed is the step that is meant, its rules decide as written."""

import math

import pytest
import torch
from torch.nn import functional as F

from gammabeta.studies import _data, cost
from gammabeta.studies._cost import steps
from gammabeta.studies._train import pixels
from tests import draws

DIGITS = _data.load("digits")


def test_all_kinds_are_the_same_network_but_for_bn():
    nets = steps.networks((100, 100), "relu", 0, DIGITS)
    x = torch.rand(9, 64)
    torch.testing.assert_close(nets["this package"](x), nets["PyTorch"](x))
    kinds = {type(m).__module__.split(".")[0] for m in nets["PyTorch"].layers}
    assert kinds == {"torch"}
    assert not any("BatchNorm" in type(m).__name__ for m in nets["without"].layers)


def test_a_step_is_sgd_and_with_statistics_of_all_images_bn_uses_those():
    net = steps.networks((100, 100), "relu", 0, DIGITS)["this package"]
    everything = pixels(DIGITS.train_x, DIGITS.pixel_max)
    x, y = everything[:16], DIGITS.train_y[:16]
    kept = steps.population(net, everything)
    wanted = net.with_statistics_of(everything, x)
    torch.testing.assert_close(steps.logits(net, x, kept), wanted)
    before = [p.clone() for p in net.parameters()]
    slopes = torch.autograd.grad(F.cross_entropy(wanted, y), list(net.parameters()))
    net.with_statistics_of(everything, x)
    steps.step(net, x, y, kept)
    # The statistics are constants here: the last layer's gradient does not go through them.
    torch.testing.assert_close(net.layers[-1].weight, before[-2] - steps.RATE * slopes[-2])
    assert not torch.equal(next(net.parameters()), before[0])


def test_kinds_take_turns_and_the_first_round_does_not_count(monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr(steps.time, "process_time", lambda: clock[0])

    def taking(name, *seconds):
        left = iter(seconds)

        def run():
            said.append(name)
            clock[0] += next(left)

        return run

    kinds = {"a": taking("a", 9.0, 1.0, 2.0, 8.0), "b": taking("b", 9.0, 3.0, 3.0, 3.0)}
    assert steps.taking_turns(kinds, 3) == {"a": 2.0, "b": 3.0}
    assert said == ["a", "b"] * 4


@pytest.mark.parametrize("claim", cost.CLAIMS)
def test_a_draw_covers_its_targets_and_is_positive(claim):
    rows = list(cost.measure({"claim": claim}, 0, "tiny", DIGITS))
    found = {row["cell"]: row["value"] for row in rows if row["kind"] == "value"}
    asked = cost.question(claim)
    assert set(asked.targets) | set(asked.published or {}) <= set(found)
    assert all(0 < v < math.inf for v in found.values())
    head = {"claim": claim, "seed": 0, "budget": "tiny", "data": "digits"}
    assert cost.figures([{**row, **head} for row in rows])
    (verdict,) = cost.judge([{**row, **head} for row in rows])
    assert verdict.status == ("demo" if claim == "full-stats-cost" else "inconclusive")


def status(claim, numbers, **changes):
    (verdict,) = cost.judge(draws.rows(claim, numbers, **changes))
    return verdict.status, verdict.published_status


def ratios(ours, theirs, published=1.5):
    found = {f"this package, batch {m}": ours for m in (16, 64, 256)}
    found |= {f"PyTorch, batch {m}": theirs for m in (16, 64, 256)}
    return {**found, "the replications' network": published}


def test_a_step_that_takes_longer_is_supported_by_layer():
    assert status("bn-cost", ratios(1.5, 1.5)) == ("supported", "supported")
    assert status("bn-cost", ratios(1.05, 1.0)) == ("refuted", "supported")
    assert status("bn-cost", ratios(1.02, 1.5, 1.0)) == ("mixed", "refuted")
    assert status("bn-cost", ratios(1.5, 1.5), draws=4)[0] == "inconclusive"
    one = {**ratios(1.5, 1.5), "PyTorch, batch 256": 1.05}
    assert status("bn-cost", one)[0] == "mixed"
    assert status("bn-cost", ratios(1.12, 1.12), noise=0.1)[0] == "inconclusive"


def test_a_hundred_times_as_long_is_supported():
    name = "statistics of all images"
    assert status("full-stats-cost", {name: 250.0}) == ("supported", "supported")
    assert status("full-stats-cost", {name: 40.0}) == ("refuted", "refuted")
    assert status("full-stats-cost", {name: 101.0}, noise=0.3)[0] == "inconclusive"
    assert status("full-stats-cost", {name: 250.0}, data="digits") == ("demo", "demo")


def test_the_pilot_gives_the_number_of_draws():
    first = cost.cells("small", "mnist", None, [])
    assert {c.seed for c in first} == {900, 901, 902, 903}
    pilot = [
        {**row, "seed": 900 + row["seed"]}
        for claim, numbers in (("bn-cost", ratios(1.5, 1.5)),
                               ("full-stats-cost", {"statistics of all images": 250.0}))
        for row in draws.rows(claim, numbers, draws=4)
    ]  # fmt: skip
    asked = cost.cells("small", "mnist", None, pilot)
    assert len(asked) == len(cost.expected("small", "mnist", None)) == 18
    assert len(cost.cells("tiny", "digits", None, [])) == 4
