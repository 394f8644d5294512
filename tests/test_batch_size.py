"""Batch sizes and Batch Renormalization: what a cell measures, and what is concluded."""

import math

import pytest
import torch
from torch.nn import functional as F

from gammabeta.studies import _data, batch_size
from gammabeta.studies._claims import claims
from gammabeta.studies._nets import m2
from gammabeta.studies._train import batches, fair_split, pixels, published_split, stream
from tests.simulated import judged, measured, noise, simulate

DIGITS = _data.load("digits")


def arm(**changes):
    default = {"part": "published", "activation": "sigmoid", "optimizer": "sgd", "batch": 4}
    return {**default, "norm": "bn", "ghost": 4, "rate": 0.01, **changes}


# -- one cell ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["bn", "none", "brn", "brn_right"])
def test_a_published_cell_is_its_protocol_step_by_step(norm):
    x, y, test_x, test_y = published_split(DIGITS, 3)
    momentum = 0.01 if norm.startswith("brn") else 0.001
    layer = batch_size.norm_of(norm, 4, 4, 20, 1e-3, momentum)
    net = m2(64, "sigmoid", layer, stream(3, "weights"), eps=1e-3, momentum=momentum)
    update = torch.optim.SGD(net.parameters(), lr=0.01)
    for _, index in zip(range(20), batches(1000, 4, stream(3, "order")), strict=False):
        loss = F.cross_entropy(net(pixels(x[index], 16)), y[index], reduction="sum")
        update.zero_grad()
        loss.backward()
        update.step()
    logits = net.with_batch_statistics(pixels(test_x, 16))
    rows = list(batch_size.measure(arm(norm=norm), 3, "tiny", DIGITS))
    share = (logits.argmax(1) == test_y).double().mean().item()
    assert rows[-1]["accuracy"] == pytest.approx(share, abs=0.0021)
    precise = net.with_statistics_of(pixels(x, 16), pixels(test_x, 16))
    share = (precise.argmax(1) == test_y).double().mean().item()
    assert rows[-1]["accuracy_precise"] == pytest.approx(share, abs=0.0021)


def test_a_ghost_cell_normalizes_parts_of_its_batch():
    x, y, _, _ = fair_split(DIGITS, 3, "test")
    net = m2(64, "sigmoid", True, stream(3, "weights"))
    update = torch.optim.SGD(net.parameters(), lr=0.1)
    for _, index in zip(range(10), batches(1000, 256, stream(3, "order")), strict=False):
        logits = net.with_batch_statistics(pixels(x[index], 16), 4)
        update.zero_grad()
        loss = F.cross_entropy(logits, y[index])
        loss.backward()
        update.step()
    cell = arm(part="ghost", batch=256, ghost=4, rate=0.1)
    rows = list(batch_size.measure(cell, 3, "tiny", DIGITS))
    assert rows[-1]["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_held_and_images_see_the_same_number_of_images_and_differ_in_the_rate_alone():
    plan = batch_size.PLANS["small"]
    for batch in batch_size.BATCHES:
        for part in ("held", "images"):
            steps, _ = batch_size._steps(plan, part, batch)
            assert steps * batch == pytest.approx(8000, rel=0.01)
    same = [
        list(batch_size.measure(arm(part=part, batch=64, ghost=64, rate=rate), 0, "tiny", DIGITS))
        for part, rate in (("held", 0.64), ("images", 0.01))
    ]
    assert [r["accuracy"] for r in same[0]] == [r["accuracy"] for r in same[1]]


# -- made-up rows -----------------------------------------------------------------------------


def answering(
    harm=None, brn=0.02, none=0.021, letter_harm=0.02, letter_brn=0.01, moves=0.03, sd=0.0005
):
    """Accuracies by arm; harm by ghost size, shares."""
    harm = {2: 0.03, 4: 0.02, 16: 0.0, 64: -0.005, 256: -0.01} if harm is None else harm

    def share(cell, seed):
        part, norm, rate = cell["part"].split("-")[0], cell["norm"], cell["rate"]
        if part in ("ghost", "renorm"):
            lost = abs(math.log(rate / 0.3)) / 100
            if part == "ghost":
                return 0.9 - lost - (harm[cell["ghost"]] if norm == "bn" else 0.0)
            return 0.9 - lost + {"bn": 0.0, "none": none, "brn_right": brn}[norm]
        if part == "published" and norm.startswith("brn"):
            return 0.9 - letter_harm + letter_brn
        size = (8 - math.log2(cell["batch"])) / 6  # 1 at 4, 0 at 256
        if part == "published":
            return 0.9 - (letter_harm * size if norm == "bn" else 0.0)
        return 0.9 - ((letter_harm - moves) * size if norm == "bn" else 0.0)

    def answer(cell, seed):
        value = share(cell, seed) + noise(seed, *cell.values(), sd=sd)
        row = {"accuracy": value, "accuracy_precise": value, "diverged": False}
        return [{"step": step, **row} for step in (96, 98, 100)]

    return answer


def verdicts(**options):
    return judged(batch_size, simulate(batch_size, answering(**options))[0])


def test_harm_that_fades_with_the_size_of_the_ghosts_supports():
    found = verdicts()["batch-small"]
    assert (found.status, found.published_status) == ("supported", "supported")
    assert found.effect == pytest.approx(2.0, abs=0.1)
    assert found.p is not None
    assert found.p < 0.01


def test_no_harm_at_four_or_no_trend_refutes():
    small = dict.fromkeys(batch_size.GHOSTS, -0.01)
    found = verdicts(harm=small, letter_harm=-0.01)["batch-small"]
    assert (found.status, found.published_status) == ("refuted", "refuted")
    falling = {m: 0.02 + math.log2(m) / 100 for m in batch_size.GHOSTS}
    found = verdicts(harm=falling)["batch-small"]
    assert (found.status, found.published_status) == ("refuted", "supported")
    assert "rise of BN − none per doubling" in found.sentence
    found = verdicts(sd=0.05)["batch-small"]
    assert found.status == "inconclusive"


def test_renormalization_is_judged_over_bn_and_whether_it_solves_is_told():
    found = verdicts()["brn-small"]
    assert (found.status, found.published_status) == ("supported", "supported")
    assert any(note.endswith(": solved.") for note in found.notes)
    found = verdicts(none=0.06)["brn-small"]
    assert found.status == "supported"
    assert any("not solved" in note for note in found.notes)
    found = verdicts(brn=0.0, letter_brn=0.0)["brn-small"]
    assert (found.status, found.published_status) == ("refuted", "refuted")
    assert verdicts(brn=0.003, sd=0.02)["brn-small"].status == "inconclusive"


def test_the_batch_size_is_confounded_if_its_effect_moves_in_any_direction():
    for moves in (0.03, -0.03):
        found = verdicts(moves=moves)["f-batch"]
        assert (found.status, found.published_status) == ("supported", "supported")
        assert found.effect == pytest.approx(100 * moves, abs=0.2)
    found = verdicts(moves=0.0, sd=0.0002)["f-batch"]
    assert (found.status, found.published_status) == ("refuted", "refuted")
    assert verdicts(moves=0.005, sd=0.02)["f-batch"].status == "inconclusive"


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    rows, _ = simulate(batch_size, answering())
    for verdict in judged(batch_size, [{**r, "data": "digits"} for r in rows]).values():
        assert (verdict.status, verdict.published_status) == ("demo", "demo")
    for verdict in judged(batch_size, [{**r, "budget": "tiny"} for r in rows]).values():
        assert (verdict.status, verdict.published_status) == ("inconclusive", "inconclusive")


def test_rows_of_a_single_part_never_crash():
    rows, _ = simulate(batch_size, answering())
    for part in {r["part"] for r in rows}:
        judged(batch_size, [r for r in rows if r["part"] == part])
    assert batch_size.judge([]) == batch_size.figures([]) == []


# -- what is asked for ------------------------------------------------------------------------


def test_every_arm_of_a_tuned_part_has_the_same_trials():
    wanted = batch_size.cells("small", "mnist", None, [])
    assert {c.wave for c in wanted} == {0}
    assert len(wanted) == 2 * 6 * (len(batch_size.GHOST_ARMS) + len(batch_size.RENORM_ARMS))
    assert len({(str(c.arm), c.seed) for c in wanted}) == len(wanted)


def test_the_pilot_alone_decides_how_many_seeds():
    for sd, count in ((0.0001, 5), (0.05, 16)):
        _, asked = simulate(batch_size, answering(sd=sd))
        for part in ("ghost", "renorm"):
            assert {c.seed for c in asked if c.arm["part"] == part} == set(range(count))
        held = {c.seed for c in asked if c.arm["part"] == "held" and c.arm["batch"] == 4}
        assert held == set(range(count))
        pilots = {c.seed for c in asked if c.arm["part"].endswith("-pilot")}
        assert pilots == set(batch_size.PILOT_SEEDS)


def test_full_is_the_protocol_of_the_source_and_a_whole_run_is_foreseen():
    _, asked = simulate(batch_size, answering(sd=0.0001), budget="full")
    letter = [c for c in asked if c.arm["part"] == "published"]
    assert {c.seed for c in letter} == {0, 1, 2}
    assert len(letter) == 3 * ((2 * 4 + 2) + (2 * 3 + 1))
    assert batch_size.PLANS["full"].published_steps == 40000
    foreseen = batch_size.expected("full", "mnist", None)
    assert len(foreseen) == len(asked)
    assert sum(c.cost for c in foreseen) == pytest.approx(sum(c.cost for c in asked))


def test_the_registry_agrees():
    owned = {i for i, claim in claims().items() if claim.experiment == "batch-size"}
    assert owned == set(batch_size.CLAIMS)


def test_the_same_seed_gives_the_same_rows():
    cells = [arm(), arm(norm="brn"), arm(part="ghost", batch=256, ghost=16, rate=0.1)]
    assert measured(batch_size, cells, DIGITS) == measured(batch_size, cells, DIGITS)
