"""The experiment on initialization: its instruments are right, its rules decide as written."""

import math

import pytest
import torch

from gammabeta import _runs
from gammabeta.studies import _data, _judge, initialization
from gammabeta.studies._claims import claims
from gammabeta.studies._draws import measured
from gammabeta.studies._initialization import MEASURES, _common, depth
from gammabeta.studies._initialization import statistics as one_layer
from gammabeta.studies._judge import Judged
from gammabeta.studies._nets import MLP
from gammabeta.studies._targets import Target, decide
from gammabeta.studies._train import stream
from tests import draws

DIGITS = _data.load("digits")


def rows_of(claim, seeds, budget="tiny", data="digits"):
    return [
        {**row, "claim": claim, "seed": seed, "budget": budget, "data": data}
        for seed in seeds
        for row in initialization.measure({"claim": claim}, seed, budget, DIGITS)
    ]


def made_up(claim, numbers, **changes):
    return draws.rows(claim, numbers, **changes)


def holding(claim):
    """A number for each deciding cell that its target wants."""
    found = draws.holding(initialization.targets(claim))
    if claim == "vanishing-depth":
        lines = initialization.LINES
        return {**dict.fromkeys(found, 0.0), **{f"{a}, without": -0.5 for a in lines}}
    return found


def verdict_of(rows):
    (verdict,) = initialization.judge(rows)
    return verdict


# -- instruments ------------------------------------------------------------------------------


def test_gradients_of_every_layer_are_those_of_plain_automatic_differentiation():
    g = stream(1, "gradients")
    x, y = depth.images_of(g, DIGITS, 16)
    net = MLP((64, 7, 7, 10), "tanh", True, g).double()
    found = depth.layer_gradients(net, x, y)
    assert [d.shape for d in found] == [(16, 7), (16, 7)]
    z = (x @ net.layers[0].weight.T).detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(net.layers[1:](z), y)
    torch.testing.assert_close(found[0], torch.autograd.grad(loss, z)[0])


def test_the_theory_of_the_noise_has_the_known_numbers():
    # times 1/(2m): 1.10 at 64, 1.48 at 16, 11.6 at 4 (the registry's caveat)
    factors = [one_layer.inverse_chi_variance(m) * 2 * m for m in (64, 16, 4)]
    assert factors == [pytest.approx(v, rel=5e-3) for v in (1.10, 1.48, 11.6)]
    assert "1.10 times that at 64, 1.48 times at 16" in claims()["noise-structure"].caveats


def test_the_theory_of_explosion_is_the_registrys():
    reported = claims()["mf-explosion"].reported
    for activation in ("ReLU", "linear"):
        for batch in (8, 16, 64, 256):
            value = initialization.theory(activation, batch)
            assert f"{value:.3f}" in reported or f"{value:.4f}" in reported


def test_gradients_after_training_are_shown_beside():
    arm = {"claim": "vanishing-depth", "part": "trained"}
    rows = list(initialization.measure(arm, 0, "tiny", DIGITS))
    assert rows == list(initialization.measure(arm, 0, "tiny", DIGITS))
    slopes = {row["cell"]: row["value"] for row in rows if row["kind"] == "value"}
    assert len(slopes) == 6
    assert all(name.startswith("after 10 steps: ") for name in slopes)
    start = {r["cell"]: r["value"] for r in rows_of("vanishing-depth", [0]) if r["kind"] == "value"}
    for name, slope in slopes.items():
        assert slope != start[name.removeprefix("after 10 steps: ")]
    assert not set(slopes) & set(draws.holding(initialization.targets("vanishing-depth")))


def test_a_slope_is_missing_where_a_gradient_is_no_number():
    x, y = depth.images_of(stream(0, "x"), DIGITS, 8)
    net = MLP((64, 7, 7, 10), "relu", False, stream(0, "w")).double()
    assert len(list(depth._slope_of(net, x, y, "a", "vanishing"))) == 3
    with torch.no_grad():
        net.layers[2].weight.zero_()
    assert list(depth._slope_of(net, x, y, "a", "vanishing")) == []


def test_small_tools_are_right():
    assert depth.stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(1.5)
    assert depth.factor([9.0] * 5 + [8.0, 4.0, 2.0, 1.0]) == pytest.approx(2.0)
    assert _common.slope([0, 1, 2], [5.0, 3.0, 1.0]) == pytest.approx(-2.0)
    q = _common.orthogonal(stream(0, "q"), 9)
    torch.testing.assert_close(q @ q.T, torch.eye(9, dtype=torch.float64))
    x = one_layer.pca(_common.normal(stream(0, "pca"), 50, 2))
    torch.testing.assert_close(x.T @ x / 50, torch.eye(2, dtype=torch.float64))


def test_both_arms_start_from_the_same_weights_and_linear_orthogonal_chains_are_isometric():
    (linear,) = [r for r in rows_of("ortho-isometry", [0])
                 if r["cell"] == "linear: sd of ln s, orthogonal"]  # fmt: skip
    assert linear["value"] < 1e-12
    first = [r for r in rows_of("rank-collapse", [0]) if r["kind"] == "curve" and r["x"] == 1]
    by = {r["series"]: r["y"] for r in first}
    # normalizing hardly changes the rank of a first layer: another draw would
    assert by["linear, with BN"] == pytest.approx(by["linear, without"], rel=0.1)


@pytest.mark.parametrize("claim", MEASURES)
def test_measurements_are_repeatable_finite_and_cover_their_targets(claim):
    rows = rows_of(claim, [3])
    again = rows_of(claim, [3])
    # times differ, and nothing else
    columns = [{k: v for k, v in row.items() if k not in ("value", "y")} for row in rows]
    assert columns == [{k: v for k, v in r.items() if k not in ("value", "y")} for r in again]
    assert claim == "whiten-cost" or rows == again
    cells = {row["cell"] for row in rows if row["kind"] == "value"}
    assert set(draws.holding(initialization.targets(claim))) <= cells
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
    assert rows != rows_of(claim, [4])


# -- rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", MEASURES)
def test_numbers_that_the_rule_wants_are_supported(claim):
    verdict = verdict_of(made_up(claim, holding(claim)))
    assert verdict.status == "supported", verdict.sentence
    assert verdict.n == 8
    on_images = claim in initialization.ON_IMAGES
    assert verdict.published_status == (None if on_images else "supported")


@pytest.mark.parametrize("claim", MEASURES)
def test_one_cell_off_its_target_refutes(claim):
    numbers = holding(claim)
    name, target = list(initialization.targets(claim).items())[-1]
    verdict = verdict_of(made_up(claim, {**numbers, measured(name, target): draws.off(target)}))
    two_levels = claim in ("vanishing-depth", "whiten-nondiff")
    assert verdict.status == ("mixed" if two_levels else "refuted")
    assert verdict.effect < target.low or verdict.effect > target.high


@pytest.mark.parametrize("claim", MEASURES)
def test_wide_intervals_and_few_draws_are_inconclusive(claim):
    numbers = holding(claim)
    assert verdict_of(made_up(claim, numbers, draws=4)).status == "inconclusive"
    name, target = next(iter(initialization.targets(claim).items()))
    cell = measured(name, target)
    rows = made_up(claim, numbers)
    for row in rows:
        if row["cell"] == cell:
            row["value"] = numbers[cell] if row["seed"] % 2 else draws.off(target)
    assert verdict_of(rows).status in ("inconclusive", "mixed")
    assert next(c for c in verdict_of(rows).cells if c["name"] == cell)["status"] == "inconclusive"


def test_a_p_value_is_that_of_what_supported_rejects():
    verdict = verdict_of(made_up("whiten-cost", {"ZCA of all features": 2.5}, noise=0.1))
    assert 0 < verdict.p < 0.05
    near = verdict_of(made_up("whiten-cost", {"ZCA of all features": 2.01}, noise=0.1))
    assert near.p > 0.05
    assert near.status == "inconclusive"
    assert verdict_of(made_up("rank-collapse", holding("rank-collapse"))).p is None


def test_a_target_decides_by_the_interval():
    wide, close = [0.0, 2.0, 1.0, 1.0], [1.0, 1.001, 0.999, 1.0]
    inside = Target("", 0.9, 1.1, 0.1)
    assert decide(inside, close, 1)[0] == "supported"
    assert decide(inside, wide, 1)[0] == "inconclusive"
    assert decide(inside, [v + 1 for v in close], 8)[0] == "refuted"
    assert decide(inside, [1.0], 1)[0] == "inconclusive"
    more = Target("", 0, math.inf, 0.5, 0.5)
    assert decide(more, close, 1) == ("supported", "above 0, and at least 0.5 on average")
    assert decide(more, [v / 10 for v in close], 1) == ("refuted", "too small to matter")
    assert decide(more, [-v for v in close], 1) == ("refuted", "reversed")
    every = Target("", 0.5, math.inf, math.inf, every=True)
    assert decide(every, close, 1) == ("supported", "4 of 4 draws")
    assert decide(every, wide, 1) == ("inconclusive", "3 of 4 draws")
    assert decide(every, [-v for v in close], 1)[0] == "refuted"


def test_a_refutation_accounts_for_the_number_of_cells():
    values = [0.2, 0.9, 0.3, 0.8, 0.5]
    off = Target("", 0.97, math.inf, 0.1)
    assert decide(off, values, 1)[0] == "refuted"
    assert decide(off, values, 20)[0] == "inconclusive"


def test_a_line_without_vanishing_gradients_has_nothing_to_solve():
    numbers = {**holding("vanishing-depth"), "tanh, without": 0.0, "tanh, with BN": -0.5}
    verdict = verdict_of(made_up("vanishing-depth", numbers))
    assert verdict.status == "supported"
    assert any(note.startswith("Nothing to solve with tanh") for note in verdict.notes)
    gone = {**numbers, "sigmoid, with BN": -0.5}
    assert verdict_of(made_up("vanishing-depth", gone)).status == "mixed"
    nowhere = {**numbers, **{f"{name}, without": 0.0 for name in initialization.LINES}}
    verdict = verdict_of(made_up("vanishing-depth", nowhere))
    assert verdict.status == "inconclusive"  # explosion alone does not answer it
    assert len(verdict.notes) == 4


def test_images_of_the_digits_are_a_demonstration_and_tiny_decides_nothing():
    for claim in MEASURES:
        on_digits = verdict_of(made_up(claim, holding(claim), data="digits"))
        wanted = "demo" if claim in initialization.ON_IMAGES else "supported"
        assert on_digits.status == wanted
        assert {c["status"] for c in on_digits.cells} <= {wanted, "supported", "inconclusive"}
        tiny = verdict_of(made_up(claim, holding(claim), budget="tiny"))
        assert tiny.status == "inconclusive"


# -- as an experiment ---------------------------------------------------------------------------


def test_the_pilot_gives_the_number_of_draws_and_is_used_for_nothing_else():
    first = initialization.cells("small", "mnist", None, [])
    drawn = [cell for cell in first if "part" not in cell.arm]
    assert {cell.seed for cell in drawn} == set(initialization.PILOT_SEEDS)
    numbers = holding("noise-structure")
    rows = made_up("noise-structure", numbers)
    pilot = [{**row, "seed": 900 + row["seed"]} for row in rows if row["seed"] < 4]
    wanted = initialization.cells("small", "mnist", None, pilot)
    main = [c for c in wanted if c.seed < 900 and "part" not in c.arm]
    assert {c.arm["claim"] for c in main} == {"noise-structure"}
    assert len(main) == 5
    noisy = [{**r, "value": r["value"] + 0.05 * r["seed"] % 0.2} for r in pilot]
    more = initialization.cells("small", "mnist", None, noisy)
    assert 5 < sum(c.seed < 900 and "part" not in c.arm for c in more) <= 16
    off = [{**row, "value": 9.0} for row in pilot]
    assert verdict_of(rows + off).effect == verdict_of(rows).effect


def test_a_whole_run_is_foreseen():
    foreseen = initialization.expected("small", "mnist", None)
    trained = initialization.TRAINED_SEEDS
    assert len(foreseen) == len(MEASURES) * 9 + 3 + trained  # equivalence asks for 8
    assert len(initialization.cells("small", "mnist", 2, [])) == 2 * len(MEASURES) + 2
    assert len(initialization.expected("tiny", "mnist", None)) == 2 * len(MEASURES) + 2


def test_the_registry_agrees():
    owned = {i for i, claim in claims().items() if claim.experiment == "initialization"}
    assert owned == set(MEASURES) == set(initialization.WORDS)


def test_what_it_derives_can_be_stored(tmp_path):
    rows = [row for claim in MEASURES for row in rows_of(claim, [0, 1])]
    arm = {"claim": "vanishing-depth", "part": "trained"}
    head = {**arm, "seed": 0, "budget": "tiny", "data": "digits"}
    rows += [{**r, **head} for r in initialization.measure(arm, 0, "tiny", DIGITS)]
    run = tmp_path / "run"
    (run / "cells").mkdir(parents=True)
    verdicts, drawn = initialization.judge(rows), initialization.figures(rows)
    assert {figure["id"].removeprefix("initialization-") for figure in drawn} == set(
        initialization._FIGURES
    )
    _judge.write_derived(run, Judged(verdicts, drawn, [], None, {"initialization": "text"}))
    assert len(_runs.read_verdicts(run)["verdicts"]) == len(MEASURES)
    assert initialization.judge([]) == initialization.figures([]) == []
