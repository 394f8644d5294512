"""Other class ratios in testing than in training: what is measured, and what is concluded."""

import math

import pytest
import torch
from torch.nn import functional as F

from gammabeta.studies import _data, class_ratio
from gammabeta.studies._claims import claims
from gammabeta.studies._nets import m2
from gammabeta.studies._train import batches, pixels, stream
from tests.simulated import judged, measured, noise, simulate

DIGITS = _data.load("digits")


def arm(part="published", norm="bn", rate=0.01):
    return {"part": part, "norm": norm, "rate": rate}


# -- one cell ---------------------------------------------------------------------------------


def test_the_split_has_zeros_and_ones_only_and_no_image_on_two_sides():
    marked = DIGITS._replace(train_x=torch.arange(1797)[:, None, None].expand(-1, 8, 8))
    parts = {part: class_ratio.split(part, 0, marked) for part in ("tuning", "fair", "published")}
    for x, y, test_x, test_y in parts.values():
        assert set(y.tolist()) == set(test_y.tolist()) == {0, 1}
        assert not set(x[:, 0, 0].tolist()) & set(test_x[:, 0, 0].tolist())
        assert torch.equal(DIGITS.train_y[x[:, 0, 0]], y)
        assert torch.equal(DIGITS.train_y[test_x[:, 0, 0]], test_y)
    first, second = parts["tuning"][2][:, 0, 0], parts["fair"][2][:, 0, 0]
    assert not set(first.tolist()) & set(second.tolist())
    assert torch.equal(parts["tuning"][0], parts["fair"][0])


@pytest.mark.parametrize("part", ["published", "fair"])
def test_a_cell_is_its_protocol_step_by_step(part):
    x, y, test_x, test_y = class_ratio.split(part, 3, DIGITS)
    letter = part == "published"
    eps = 1e-3 if letter else 1e-5
    net = m2(64, "sigmoid", True, stream(3, "weights"), eps=eps, momentum=0.01)
    update = torch.optim.SGD(net.parameters(), lr=0.01)
    for _, index in zip(range(20), batches(len(x), 64, stream(3, "order")), strict=False):
        loss = F.cross_entropy(
            net(pixels(x[index], 16)), y[index], reduction="sum" if letter else "mean"
        )
        update.zero_grad()
        loss.backward()
        update.step()
    test = pixels(test_x, 16)
    rows = list(class_ratio.measure(arm(part), 3, "tiny", DIGITS))
    assert len(rows) == 8 * 4
    logits = {
        "running": net.eval()(test),
        "whole": net.with_batch_statistics(test),
        "precise": net.with_statistics_of(pixels(x, 16), test),
    }
    for row in rows:
        zeros, ones = (test_y == 0).sum().item(), (test_y == 1).sum().item()
        if row["ones"] != ones:
            continue
        assert row["odds"] == ones / zeros
        if row["mode"] in logits:
            right = (logits[row["mode"]].argmax(1) == test_y).double()
            each = [right[test_y == digit].mean().item() for digit in (0, 1)]
            assert row["balanced"] == pytest.approx(sum(each) / 2, abs=0.02)
            assert row["accuracy"] == pytest.approx(right.mean().item(), abs=0.02)


def test_with_running_statistics_the_class_ratio_cannot_change_an_answer():
    rows = measured(class_ratio, [arm("fair", norm) for norm in ("bn", "none", "ln")], DIGITS)
    zeros_right = {}
    for row in rows:
        if row["mode"] != "running":
            continue
        # of the zeros, all of which are in every test set, the same ones are right
        count = row["ones"] / row["odds"]
        shares = torch.tensor([[0.5, 0.5], [count, row["ones"]]], dtype=torch.float64)
        wanted = torch.tensor(
            [row["balanced"], row["accuracy"] * (count + row["ones"])], dtype=torch.float64
        )
        if abs(row["odds"] - 1) > 0.02:
            zeros, _ = torch.linalg.solve(shares, wanted).tolist()
            key = (row["norm"], row["seed"])
            assert zeros == pytest.approx(zeros_right.setdefault(key, zeros), abs=1e-9)
    assert len(zeros_right) == 6


# -- made-up rows -----------------------------------------------------------------------------


def answering(whole=2.0, running=0.0, brn=0.5, sd=0.05):
    """Balanced accuracies with these slopes, in points per decade."""

    def answer(cell, seed):
        if cell["part"] == "tuning":
            peak = 0.9 - abs(math.log(cell["rate"] / 0.3)) / 100
            return [{"step": 500, "accuracy": peak, "diverged": False}]
        rows = []
        modes = class_ratio.MODES if cell["norm"] in ("bn", "brn") else ("running",)
        for mode in modes:
            own = mode in ("whole", "64")
            slope = (whole if cell["norm"] == "bn" else brn) if own else running
            slope += noise(seed, *cell.values(), own, sd=sd)
            for ratios, counts in class_ratio.COUNTS.items():
                for ones in counts:
                    share = 0.95 + slope * math.log10(ones / 980) / 100
                    row = {"step": 500, "ratios": ratios, "ones": ones, "odds": ones / 980}
                    row |= {"mode": mode, "balanced": share, "accuracy": share, "diverged": False}
                    rows.append(row)
        return rows

    return answer


def verdicts(**options):
    return judged(class_ratio, simulate(class_ratio, answering(**options))[0])


def test_a_slope_is_that_of_the_balanced_accuracy_per_decade():
    found = verdicts()["mismatch"]
    assert found.effect == pytest.approx(2.0, abs=0.1)


def test_a_mismatch_that_hurts_with_the_test_sets_own_statistics_alone_is_mixed():
    found = verdicts()["mismatch"]
    assert (found.status, found.published_status) == ("mixed", "supported")
    assert found.sentence.startswith("In part: ")
    found = verdicts(running=2.0)["mismatch"]
    assert (found.status, found.published_status) == ("supported", "supported")
    found = verdicts(whole=0.0)["mismatch"]
    assert (found.status, found.published_status) == ("refuted", "refuted")
    found = verdicts(whole=0.4, sd=1.5)["mismatch"]
    assert (found.status, found.published_status) == ("inconclusive", "inconclusive")


def test_renormalization_is_judged_where_there_is_something_to_mend():
    found = verdicts()["brn-mismatch"]
    assert (found.status, found.published_status) == ("supported", "supported")
    assert found.effect == pytest.approx(1.5, abs=0.1)
    found = verdicts(brn=2.0)["brn-mismatch"]
    assert (found.status, found.published_status) == ("refuted", "refuted")
    found = verdicts(whole=0.0, brn=-2.0)["brn-mismatch"]
    assert (found.status, found.published_status) == ("inconclusive", "inconclusive")


def test_the_effect_is_one_of_the_test_sets_own_statistics_if_running_ones_show_none():
    found = verdicts()["f-mismatch"]
    assert (found.status, found.published_status) == ("supported", "supported")
    for other in ({"running": 2.0}, {"whole": 0.0}):
        assert verdicts(**other)["f-mismatch"].status == "refuted"
    assert verdicts(sd=2.0)["f-mismatch"].status == "inconclusive"


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    rows, _ = simulate(class_ratio, answering())
    for verdict in judged(class_ratio, [{**r, "data": "digits"} for r in rows]).values():
        assert (verdict.status, verdict.published_status) == ("demo", "demo")
    for verdict in judged(class_ratio, [{**r, "budget": "tiny"} for r in rows]).values():
        assert (verdict.status, verdict.published_status) == ("inconclusive", "inconclusive")


def test_rows_of_a_single_part_never_crash():
    rows, _ = simulate(class_ratio, answering())
    for part in ("tuning", "fair", "published", "pilot"):
        judged(class_ratio, [r for r in rows if r["part"] == part])
    assert class_ratio.judge([]) == class_ratio.figures([]) == []


# -- what is asked for ------------------------------------------------------------------------


def test_the_pilot_alone_decides_how_many_seeds_and_all_arms_have_the_same_trials():
    for sd, count in ((0.001, 8), (1.0, 16)):
        _, asked = simulate(class_ratio, answering(sd=sd))
        assert {c.seed for c in asked if c.arm["part"] == "fair"} == set(range(count))
        assert {c.seed for c in asked if c.arm["part"] == "published"} == set(range(8))
        assert {c.seed for c in asked if c.arm["part"] == "pilot"} == set(class_ratio.PILOT_SEEDS)
        tuning = [c for c in asked if c.arm["part"] == "tuning"]
        assert len(tuning) == 2 * 6 * len(class_ratio.ARMS)


def test_a_whole_run_is_foreseen():
    _, asked = simulate(class_ratio, answering(sd=0.001))
    foreseen = class_ratio.expected("small", "mnist", None)
    assert len(foreseen) == len(asked)
    assert sum(c.cost for c in foreseen) == pytest.approx(sum(c.cost for c in asked))


def test_the_registry_agrees():
    owned = {i for i, claim in claims().items() if claim.experiment == "class-ratio"}
    assert owned == set(class_ratio.CLAIMS)
