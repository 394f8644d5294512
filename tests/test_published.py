"""The MNIST study to the letter: what a cell measures, what is asked for, what is concluded."""

import math

import pytest
import torch
from torch.nn import functional as F

from gammabeta.studies import _data, published
from gammabeta.studies._claims import claims
from gammabeta.studies._nets import m2
from gammabeta.studies._published_figures import published as published_figures
from gammabeta.studies._train import batches, fair_split, pixels, published_split, stream
from tests.simulated import judged, measured, noise, simulate

DIGITS = _data.load("digits")


def arm(**changes):
    default = {"part": "published", "activation": "sigmoid", "optimizer": "sgd", "batch": 64}
    return {**default, "norm": "bn", "rate": 0.01, **changes}


# -- one cell ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("norm", ["bn", "none"])
@pytest.mark.parametrize("part", ["published", "fair"])
def test_a_cell_is_its_protocol_step_by_step(part, norm, optimizer):
    letter = part == "published"
    split = published_split(DIGITS, 3) if letter else fair_split(DIGITS, 3, "test")
    x, y, test_x, test_y = split
    eps, momentum = (1e-3, 0.001) if letter else (1e-5, 0.1)
    net = m2(64, "sigmoid", norm == "bn", stream(3, "weights"), eps=eps, momentum=momentum)
    weights = [p for p in net.parameters() if p.ndim == 2]
    start = weights[1].abs().mean().item()
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    update, seen = made(net.parameters(), lr=0.01), []
    order = batches(1000, 64, stream(3, "order"))
    for _, index in zip(range(30), order, strict=False):
        loss = F.cross_entropy(net(pixels(x[index], 16)), y[index], reduction="sum")
        update.zero_grad()
        (loss if letter else loss / 64).backward()
        seen.append(weights[0].grad.abs().mean().item())
        update.step()
    net.train(letter)
    share = (net(pixels(test_x, 16)).argmax(1) == test_y).double().mean().item()
    rows = list(
        published.measure(arm(part=part, norm=norm, optimizer=optimizer), 3, "tiny", DIGITS)
    )
    assert rows[0]["step"] == 0
    assert rows[0]["weight"] == pytest.approx(start)
    last = rows[-1]
    assert last["step"] == 30
    assert last["accuracy"] == pytest.approx(share, abs=0.0021)  # one image of 500
    assert last["weight"] == pytest.approx(weights[1].abs().mean().item(), rel=1e-4)
    assert last["norm_1"] == pytest.approx(weights[0].norm().item(), rel=1e-4)
    assert last["gradient_mean"] == pytest.approx(sum(seen) / 30, rel=1e-3)
    since = rows[-2]["step"]
    assert last["gradient"] == pytest.approx(sum(seen[since:]) / (30 - since), rel=1e-3)
    assert last["loss"] == pytest.approx(loss.item() / 64, rel=1e-3)


def test_a_diverged_run_is_recorded_and_not_an_error():
    rows = measured(published, [arm(norm="none", activation="relu", rate=1e30)], DIGITS, [0])
    assert rows[-1]["diverged"] is True
    assert rows[-1]["weight"] is None
    assert judged(published, rows)["weight-growth"].n == 0


def test_the_steps_of_the_published_figures_are_evaluated():
    for budget, last in (("small", 10000), ("full", 40000)):
        steps, stops = published._steps(published.PLANS[budget], "published", "sgd")
        assert steps == stops[-1] == last
        points = {p.step for f in published_figures() for s in f.series for p in s.points}
        assert {s for s in points if 0 < s <= last} <= set(stops)


# -- made-up rows -----------------------------------------------------------------------------


def answering(growth=(1.02, 1.2), gradients=(0.4, 0.1), letter=(0.1, 0.02), fits=0.0001, sd=0.002):
    """Rows of a cell: growth, gradients and (as published) gradients of both arms."""

    def answer(cell, seed):
        at = 0 if cell["norm"] == "bn" else 1
        jitter = math.exp(noise(seed, *cell.values(), sd=sd))
        if cell["part"] == "tuning":
            peak = 0.9 - abs(math.log(cell["rate"] / 0.3)) / 100
            return [{"step": 1000, "accuracy": peak, "diverged": False}]
        rows = [{"step": 0, "weight": 0.1022, "weight_1": 0.03}]
        size = (letter if cell["part"] == "published" else gradients)[at] * jitter
        off = 1.0 if cell["rate"] == fits else 1.5
        for step in (1, 1000, 4000, 5200, 10000):
            grown = growth[at] ** (math.log(step + 1) / math.log(4001)) * jitter
            row = {"step": step, "weight": 0.1022 * grown, "gradient_mean": size}
            if cell["part"] == "published" and fits is not None:
                row |= close_to_the_figures(cell, step, off)
            elif cell["part"] != "published":
                row["accuracy"] = 0.9
            rows.append(row)
        return rows

    return answer


def close_to_the_figures(cell, step, factor):
    found = {}
    for figure in published_figures():
        for series in figure.series:
            own = (cell["activation"], cell["optimizer"], 64, cell["norm"])
            points = {p.step: p.value for p in series.points}
            if tuple(series.arm) == own and step in points:
                far = points[step] * factor if figure.kind == "magnitude" else (
                    points[step] - (factor - 0.999) / 10
                )  # fmt: skip
                found[figure.quantity] = far
    if "gradient" not in found and step == 1:
        start = {"sigmoid": {"bn": 0.14, "none": 0.017}, "relu": {"bn": 0.47, "none": 0.16}}
        found["gradient"] = start[cell["activation"]][cell["norm"]] * factor
    return found


def verdicts(**options):
    return judged(published, simulate(published, answering(**options))[0])


def test_growth_without_and_not_with_bn_supports_and_equal_growth_refutes():
    found = verdicts()["weight-growth"]
    assert (found.status, found.published_status) == ("supported", "supported")
    assert found.effect == pytest.approx(math.log(1.2 / 1.02), rel=0.2)
    found = verdicts(growth=(1.1, 1.1))["weight-growth"]
    assert (found.status, found.published_status) == ("refuted", "refuted")
    found = verdicts(growth=(1.02, 1.075), sd=0.05)["weight-growth"]
    assert found.status == "inconclusive"
    assert found.n == 16


def test_gradients_are_judged_by_the_ratio_and_as_published_by_both_numbers():
    found = verdicts()["grad-magnitude"]
    assert (found.status, found.published_status) == ("supported", "supported")
    assert found.effect == pytest.approx(math.log(4), rel=0.1)
    found = verdicts(gradients=(0.1, 0.1), letter=(0.1, 0.04))["grad-magnitude"]
    assert (found.status, found.published_status) == ("refuted", "refuted")
    found = verdicts(gradients=(0.11, 0.1), letter=(0.12, 0.02), sd=0.8)["grad-magnitude"]
    assert (found.status, found.published_status) == ("inconclusive", "inconclusive")


def test_the_learning_rate_is_decided_by_every_figure():
    found = verdicts()["f-lr"]
    assert (found.status, found.published_status) == ("supported", "supported")
    assert [cell["name"] for cell in found.cells] == ["Fig. 1", "Fig. 2", "Fig. 4", "Fig. 5"]
    assert verdicts(fits=0.01)["f-lr"].status == "refuted"
    assert verdicts(fits=None)["f-lr"].status == "inconclusive"


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    rows, _ = simulate(published, answering())
    for verdict in judged(published, [{**r, "data": "digits"} for r in rows]).values():
        assert (verdict.status, verdict.published_status) == ("demo", "demo")
    for verdict in judged(published, [{**r, "budget": "tiny"} for r in rows]).values():
        assert (verdict.status, verdict.published_status) == ("inconclusive", "inconclusive")


def test_rows_of_a_single_part_never_crash():
    rows, _ = simulate(published, answering())
    for part in ("tuning", "fair", "pilot", "published"):
        found = judged(published, [r for r in rows if r["part"] == part])
        assert all(v.status == "inconclusive" for k, v in found.items() if k != "f-lr")
    assert published.judge([]) == published.figures([]) == []


# -- what is asked for ------------------------------------------------------------------------


def test_the_pilot_alone_decides_how_many_fair_seeds():
    for sd, count in ((0.0001, 5), (0.3, 16)):
        _, asked = simulate(published, answering(sd=sd))
        fair = {c.seed for c in asked if c.arm["part"] == "fair"}
        assert fair == set(range(count))
        letter = [c for c in asked if c.arm["part"] == "published"]
        assert {c.seed for c in letter} == set(range(5))
        assert {c.seed for c in letter if c.arm["optimizer"] == "adam"} == set(range(3))
        assert {c.seed for c in asked if c.arm["part"] == "pilot"} == set(published.PILOT_SEEDS)


def test_full_is_the_protocol_of_the_source_and_a_whole_run_is_foreseen():
    _, asked = simulate(published, answering(sd=0.0001), budget="full")
    letter = [c for c in asked if c.arm["part"] == "published"]
    assert {c.seed for c in letter} == {0, 1, 2}
    assert len(letter) == 3 * 2 * 2 * 2 * 2
    assert published.PLANS["full"].steps == {"sgd": 40000, "adam": 40000}
    foreseen = published.expected("full", "mnist", None)
    assert len(foreseen) == len(asked)
    assert sum(c.cost for c in foreseen) == pytest.approx(sum(c.cost for c in asked))


def test_the_registry_agrees():
    owned = {i for i, claim in claims().items() if claim.experiment == "published"}
    assert owned == set(published.CLAIMS)
