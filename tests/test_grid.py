"""The grid of activations, optimizers and batch sizes: what it asks for and what it concludes."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gammabeta.studies import _data, grid
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._grid import contrasts
from gammabeta.studies._nets import m2
from gammabeta.studies._pairs import Run
from gammabeta.studies._train import batches, fair_split, pixels, published_split, stream
from gammabeta.studies._verdict import lies_above
from tests.simulated import judged, measured, noise, simulate

DIGITS = _data.load("digits")
PEAKS = {"sgd": 0.3, "adam": 0.003}
# Gains by level: of the main effects the activation's is by far the largest.
SIGMOID_MOST = {"relu": 1, "leaky_relu": 1, "sigmoid": 6, "softplus": 3, "tanh": 1}


def arm(**changes):
    default = {"part": "fair", "activation": "tanh", "optimizer": "adam", "batch": 16}
    return {**default, "norm": "bn", "rate": 0.01, **changes}


# -- one cell ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("part", ["published", "fair"])
def test_a_cell_is_its_protocol_step_by_step(part, optimizer):
    letter = part == "published"
    split = published_split(DIGITS, 3) if letter else fair_split(DIGITS, 3, "test")
    x, y, test_x, test_y = split
    batch, steps = (64, 6) if letter else (16, 12)
    eps, momentum = (1e-3, 0.001) if letter else (1e-5, 0.1)
    net = m2(64, "tanh", True, stream(3, "weights"), eps=eps, momentum=momentum)
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    update = made(net.parameters(), lr=0.01)
    for index in itertools.islice(batches(1000, batch, stream(3, "order")), steps):
        loss = F.cross_entropy(
            net(pixels(x[index], 16)), y[index], reduction="sum" if letter else "mean"
        )
        update.zero_grad()
        loss.backward()
        update.step()
    net.train(letter)
    share = (net(pixels(test_x, 16)).argmax(1) == test_y).double().mean().item()
    cell = arm(part=part, optimizer=optimizer, batch=batch)
    last = list(grid.measure(cell, 3, "tiny", DIGITS))[-1]
    assert last["step"] == steps
    assert last["accuracy"] == pytest.approx(share, abs=0.0021)  # one image of 500
    assert last["loss"] == pytest.approx(loss.item() / (64 if letter else 1), rel=1e-3)


def test_steps_and_images_change_by_a_factor_of_eight_in_opposite_directions():
    steps = {b: grid._steps(grid.PLANS["small"], "fair", b) for b in (4, 16, 64, 256)}
    assert steps == {4: 1000, 16: 500, 64: 250, 256: 125}
    assert steps[4] / steps[256] == (256 * steps[256]) / (4 * steps[4]) == 8


def test_a_diverged_run_is_recorded_and_not_an_error():
    worst = arm(activation="relu", optimizer="sgd", norm="none", rate=1e30)
    row = measured(grid, [worst], DIGITS, [0])[-1]
    assert row["diverged"] is True
    assert "loss" not in row


# -- shares of the variance -------------------------------------------------------------------


def test_a_table_of_one_main_effect_is_its_share():
    table = np.zeros((5, 2, 4)) + np.array([1, 5, 2, 8, 3.0])[:, None, None]
    assert contrasts.shares(table) == pytest.approx([1, 0, 0])
    assert contrasts.shares(np.full((5, 2, 4), 3.0)) == [0, 0, 0]


def test_shares_are_those_of_the_regression_on_indicators():
    table = np.random.default_rng(0).normal(size=(5, 2, 4))
    table += np.array([0.0, 3.0])[None, :, None]
    y = table.ravel()
    levels = [np.broadcast_to(i, table.shape).ravel() for i in np.indices(table.shape)]

    def left(factors):
        columns = [np.ones(40)] + [np.eye(n)[levels[k]] for k, n in enumerate(table.shape)
                                   if k in factors]  # fmt: skip
        x = np.column_stack(columns)
        return ((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2).sum()

    error = left({0, 1, 2}) / (39 - 4 - 1 - 3)
    total = left(set())
    wanted = [
        (left({0, 1, 2} - {k}) - left({0, 1, 2}) - df * error) / (total + error)
        for k, df in enumerate((4, 1, 3))
    ]
    assert contrasts.shares(table) == pytest.approx(wanted)


def test_of_noise_alone_no_factor_has_a_share_on_average():
    draw = np.random.default_rng(1)
    found = np.array([contrasts.shares(draw.normal(size=(5, 2, 4))) for _ in range(2000)])
    assert np.abs(found.mean(0)).max() < 0.01


def test_equal_main_effects_are_called_unequal_as_rarely_as_the_rule_says():
    draw, least = np.random.default_rng(2), 8
    for size in (0.0, 0.3, 2.0):
        wrong = 0
        for _ in range(1000):
            levels = {("relu", "sgd"): 2 * size, ("sigmoid", "adam"): 0.0}
            arms = {
                pair: {
                    s: Run([1], [levels.get(pair, size) + draw.normal(0, 0.5)], [], False)
                    for s in range(least)
                }
                for pair in itertools.product(contrasts.CROSSED, contrasts.OPTIMIZERS)
            }
            wrong += lies_above(contrasts.optimizer_less(arms), 0.0).status == "supported"
        assert wrong <= 64, size


# -- made-up rows -----------------------------------------------------------------------------


def answer(gain, level=lambda cell: 0.0, sd=0.05, published=None):
    """Accuracies in percent that peak at a rate inside each grid; gain(cell) with BN."""

    def rows(cell, seed):
        key = [str(v) for k, v in cell.items() if k not in ("rate", "part")]
        lost = abs(math.log(cell["rate"] / PEAKS[cell["optimizer"]]))
        by = gain
        if cell["part"] == "published":
            lost, by = 0.0, published or gain
        share = 90 + level(cell) - lost + (by(cell) if cell["norm"] == "bn" else 0.0)
        share += noise(seed, *key, sd=sd)
        return [{"step": step, "accuracy": share / 100, "diverged": False} for step in (1, 2, 3)]

    return rows


def by_activation(cell):
    return SIGMOID_MOST[cell["activation"]]


def level_of_activation(cell):
    return -3 if cell["activation"] == "sigmoid" else 0


def verdicts(gain, level=lambda cell: 0.0, *, sd=0.05, published=None, **options):
    rows, _ = simulate(grid, answer(gain, level, sd, published), **options)
    return judged(grid, rows)


def test_tuning_comes_first_in_every_place_with_the_same_trials_for_both_arms():
    wanted = grid.cells("small", "mnist", None, [])
    assert len(wanted) == 40 * 2 * 4 * 2
    assert {(c.wave, c.arm["part"]) for c in wanted} == {(0, "tuning")}
    assert {c.seed for c in wanted} == {800, 801}


def test_each_place_has_the_seeds_that_its_claims_ask_for():
    def sd(cell):
        return 3.0 if (cell["activation"], cell["batch"]) == ("tanh", 4) else 0.02

    def rows(cell, seed):
        return answer(by_activation, sd=sd(cell))(cell, seed)

    _, asked = simulate(grid, rows)
    main = [c for c in asked if c.arm["part"] == "fair"]
    counts = {}
    for cell in main:
        place = (cell.arm["activation"], cell.arm["optimizer"], cell.arm["batch"])
        counts[place] = max(counts.get(place, 0), cell.seed + 1)
    assert {p for p, n in counts.items() if n == 16} >= {("tanh", o, 4) for o in grid.OPTIMIZERS}
    assert counts["relu", "sgd", 64] >= 8  # equivalence
    assert {c.seed for c in asked if c.arm["part"] == "pilot"} == {900, 901, 902, 903}
    published = [c for c in asked if c.arm["part"] == "published"]
    assert len(published) == 5 * 2 * 5
    assert {c.arm["rate"] for c in main} == {0.3, 0.003}


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in grid.expected("small", "mnist", None))
    _, asked = simulate(grid, answer(by_activation, sd=0.3))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_gains_everywhere_that_depend_on_the_activation():
    found = verdicts(by_activation, level_of_activation)
    assert found["bn-improves-any"].status == "supported"
    assert any("positive mean gain: 40 of 40" in note for note in found["bn-improves-any"].notes)
    assert found["which-factor"].status == "supported"
    assert found["which-factor"].effect > 0.5
    # With BN: ReLU 91, sigmoid 93 with either optimizer.
    assert found["opt-less"].status == "supported"
    assert found["opt-less"].effect == pytest.approx(2, abs=0.2)
    # ReLU with SGD and BN is one point ahead of ReLU with Adam and without.
    assert found["sgd-bn-vs-adam"].status == "refuted"
    assert found["sgd-bn-vs-adam"].effect == pytest.approx(1, abs=0.1)
    assert found["opt-less"].published_status == "supported"
    assert found["which-factor"].published_status is None
    assert "Yes: on MNIST, MLP 100-100" in found["bn-improves-any"].sentence


def test_one_place_without_a_gain_refutes_the_universal_claim_and_is_named():
    def gain(cell):
        return 0.0 if (cell["optimizer"], cell["batch"], cell["activation"]) == (
            "adam", 256, "tanh",
        ) else 1.0  # fmt: skip

    verdict = verdicts(gain, sd=0.02)["bn-improves-any"]
    assert verdict.status == "refuted"
    assert "tanh, Adam, batch 256 (" in verdict.sentence
    assert "ReLU" not in verdict.sentence
    assert any("Supported alone: 39." in note for note in verdict.notes)


def test_an_optimizer_that_matters_more_refutes_both_claims_on_it():
    def gain(cell):
        return SIGMOID_MOST[cell["activation"]] + (5 if cell["optimizer"] == "sgd" else 0)

    def level(cell):
        return -2 if cell["optimizer"] == "adam" else 0

    found = verdicts(gain, level)
    assert found["which-factor"].status == "mixed"  # the batch size matters less
    assert found["which-factor"].effect < 0
    assert found["opt-less"].status == "refuted"
    assert found["sgd-bn-vs-adam"].status == "refuted"


def test_a_batch_size_that_matters_more_is_the_other_level():
    def gain(cell):
        return SIGMOID_MOST[cell["activation"]] + 1.2 * math.log2(cell["batch"])

    verdict = verdicts(gain)["which-factor"]
    assert verdict.status == "mixed"
    assert verdict.sentence.startswith("In part: ")
    assert "activation − batch size (" in verdict.sentence


def test_factors_that_matter_alike_refute_the_claim_on_factors():
    assert verdicts(lambda cell: 1.0)["which-factor"].status == "refuted"


def test_equal_arms_are_equivalent_and_noise_is_inconclusive():
    found = verdicts(lambda cell: 0.0)
    assert found["sgd-bn-vs-adam"].status == "supported"
    assert found["sgd-bn-vs-adam"].n >= 8
    noisy = verdicts(lambda cell: 0.4, sd=3.0)
    for claim in ("bn-improves-any", "opt-less", "sgd-bn-vs-adam"):
        assert noisy[claim].status == "inconclusive", claim
        assert noisy[claim].sentence.startswith("Undecided: ")


def test_the_published_verdict_is_mixed_if_the_two_rates_disagree():
    def published(cell):
        if cell["rate"] == 0.01:
            return {"relu": 1.0, "sigmoid": 5.0}[cell["activation"]]
        return {"sgd": 1.0, "adam": 5.0}[cell["optimizer"]]

    verdict = verdicts(by_activation, published=published)["opt-less"]
    assert (verdict.status, verdict.published_status) == ("supported", "mixed")


def test_another_delta_gives_another_verdict():
    rows, _ = simulate(grid, answer(by_activation))
    assert judged(grid, rows)["sgd-bn-vs-adam"].status == "refuted"
    with overruled({"sgd-bn-vs-adam": {"delta": 1.5}}):
        assert judged(grid, rows)["sgd-bn-vs-adam"].status == "supported"


def test_missing_runs_leave_the_verdicts_open():
    rows, _ = simulate(grid, answer(by_activation))
    lost = [r for r in rows if not (r["part"] == "tuning" and r["activation"] == "relu")]
    for claim, verdict in judged(grid, lost).items():
        assert verdict.status == "inconclusive", claim
        assert any("tuning runs" in note for note in verdict.notes)
    for part in ("tuning", "fair", "pilot", "published"):
        found = judged(grid, [r for r in rows if r["part"] == part])
        assert all(v.status == "inconclusive" for v in found.values())
    assert grid.judge([]) == []


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    for verdict in verdicts(by_activation, data="digits").values():
        assert verdict.status == "demo"
        assert {cell["status"] for cell in verdict.cells} == {"demo"}
    for verdict in verdicts(by_activation, budget="tiny", seeds=8).values():
        assert verdict.status == "inconclusive"


def test_the_whole_experiment_runs_on_the_digits():
    rows, asked = simulate(
        grid, lambda cell, seed: grid.measure(cell, seed, "tiny", DIGITS), "tiny", "digits", 1
    )
    assert len(asked) == 8 * 2 * 2 + 8 * 2 + 10
    found = judged(grid, rows)
    assert set(found) == set(grid.CLAIMS)
    assert {c.experiment for c in asked} == {"grid"} == {claims()[c].experiment for c in found}
