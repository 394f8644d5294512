"""The experiment on small fits: its formulas are right, its rules decide as written."""

import math

import pytest
import torch
from scipy.stats import spearmanr

from gammabeta import _runs
from gammabeta.report._stepped import stepped
from gammabeta.studies import _data, _judge, small_fits
from gammabeta.studies._claims import claims
from gammabeta.studies._draws import measured
from gammabeta.studies._judge import Judged
from gammabeta.studies._pairs import LADDER
from gammabeta.studies._small_fits import curves, deep, population
from gammabeta.studies._train import stream
from tests import draws

DIGITS = _data.load("digits")
PLAIN = tuple(c for c in small_fits.CLAIMS if c not in small_fits.KINDS)
ON_IMAGES = ("lln", "minibatch-stats", "bjorck-activations", "residual-identity")


def tuning(claim, best=0.3, **changes):
    """Trials of every depth and kind with the same best rate."""
    found = []
    for depth in small_fits.DEPTHS[claim]:
        for kind in small_fits.KINDS[claim]:
            for rate in small_fits.PLANS["small"].rates[claim]:
                for seed in small_fits.TUNING_SEEDS:
                    share = 0.9 - 0.1 * abs(math.log10(rate / best))
                    row = {"claim": claim, "part": "tuning", "depth": depth, "kind": kind}
                    row |= {"rate": rate, "seed": seed, "step": 100, "accuracy": share}
                    row |= {"diverged": False, "budget": "small", "data": "mnist"}
                    found.append({**row, **changes})
    return found


def columns(claim, rate=0.3):
    if claim not in small_fits.KINDS:
        return {"part": "fair"}
    depth = small_fits.DEPTHS[claim][0]
    kinds = "all last none" if claim == "bjorck-activations" else "bn none"
    rates = " ".join(f"{kind}={rate:g}" for kind in kinds.split())
    return {"part": "fair", "depth": depth, "rates": rates}


def made_up(claim, numbers, rate=0.3, **changes):
    rows = draws.rows(claim, numbers, **{**columns(claim, rate), **changes})
    return [*(tuning(claim) if claim in small_fits.KINDS else []), *rows]


def holding(claim):
    asked = small_fits.question(claim)
    return draws.holding(asked.targets, asked.control)


def verdict_of(rows):
    (verdict,) = small_fits.judge(rows)
    return verdict


# -- instruments ------------------------------------------------------------------------------


def test_the_difference_to_the_population_is_the_formula_for_gaussian_values():
    g = stream(0, "gaussian")
    x = torch.randn(20000, 50, generator=g, dtype=torch.float64)
    mean, var = x.mean(0), x.var(0, correction=0)
    for m in (4, 32):
        squares = []
        for _ in range(2000):
            batch = x[torch.randint(len(x), (m,), generator=g)]
            own = (batch - batch.mean(0)) / batch.std(0, correction=0)
            squares.append((own - (batch - mean) / var.sqrt()).square().mean(0))
        found = torch.stack(squares).mean().sqrt()
        kurtosis = torch.full((50,), 3.0, dtype=torch.float64)
        wanted = population.theory(kurtosis, m, len(x)).mean()
        assert found / wanted == pytest.approx(1.0, abs=0.01)
    # the whole population in one batch differs by nothing
    assert population.theory(kurtosis, 20000, 20000).max() == 0


def test_the_moving_average_has_the_variance_of_the_formula():
    g = stream(1, "average")
    z = torch.randn(5000, 200, generator=g)
    rows = list(population._moving_average(z, z.var(0, correction=0), g, False))
    ratios = [row["value"] for row in rows if "variance" in row["cell"]]
    assert len(ratios) == 3
    assert ratios == [pytest.approx(1.0, abs=0.05)] * 3
    left = {row["cell"]: row["value"] for row in rows if "share" in row["cell"]}
    assert left["decay 0.9: share of the start left after 20 steps"] == pytest.approx(
        0.9**20, rel=1e-4
    )


def test_a_stacked_network_is_each_network_alone_and_learns():
    g = stream(0, "networks")
    nets = curves.network(g, 3)
    x = torch.linspace(-2, 2, 9)
    together = curves.output(nets, x)
    for k in range(3):
        h = x[:, None]
        for at in range(0, 6, 2):
            h = h @ nets[at][k] + nets[at + 1][k]
            h = torch.tanh(h) if at < 4 else h
        torch.testing.assert_close(together[k], h[:, 0])
    before = (together - curves.sine(x)).square().mean()
    curves.fit(nets, lambda: x.expand(3, 9), curves.sine, 300)
    assert (curves.output(nets, x) - curves.sine(x)).square().mean() < before / 20


def test_rank_correlation_is_scipys():
    g = stream(0, "ranks")
    x = torch.randn(30, generator=g).round(decimals=1)  # with ties
    ys = torch.randn(2, 30, generator=g)
    wanted = [spearmanr(x.numpy(), y.numpy()).statistic for y in ys]
    assert curves.spearman(x, ys).tolist() == [pytest.approx(w) for w in wanted]


@pytest.mark.parametrize("kind", deep.TOWERS)
def test_towers_side_by_side_do_not_meet(kind):
    alone = list(deep.towers_trial(0, DIGITS, kind, 3, [0.1], "test", 6))
    beside = list(deep.towers_trial(0, DIGITS, kind, 3, [0.1, 1e20], "test", 6))
    of_it = [row for row in beside if row["rate"] == 0.1]
    assert [r["step"] for r in of_it] == [r["step"] for r in alone]
    assert [r["accuracy"] for r in of_it] == [pytest.approx(r["accuracy"], abs=0.02) for r in alone]
    assert not any(r["diverged"] for r in of_it)
    assert kind == "bn" or any(r["diverged"] for r in beside)


def test_a_tower_with_skipinit_starts_as_its_skip_and_shares_are_of_the_sum():
    x = deep.pooled(DIGITS.train_x[:32], 16)
    shares = []
    deep.Towers(16, 8, 4, "skipinit", 1, 0)(x, shares)
    assert shares == [0.0] * 4
    deep.Towers(16, 8, 4, "bn", 1, 0)(x, shares := [])
    tower = deep.Towers(16, 8, 4, "bn", 1, 0)
    h = torch.baddbmm(tower.stem_bias, x[None], tower.stem).detach()
    # a branch has variance 1 in each unit after BN
    assert shares[0] == pytest.approx(float(1 / (1 + h.var(1, correction=0).mean())), rel=0.02)


def test_bn_at_the_last_layer_stands_before_the_last_activation_alone():
    nets = {kind: deep.deep_net(64, 4, kind, 0) for kind in deep.KINDS}
    places = {
        kind: [n for n, layer in enumerate(net.layers) if isinstance(layer, torch.nn.BatchNorm1d)]
        for kind, net in nets.items()
    }
    assert (len(places["all"]), len(places["none"])) == (4, 0)
    assert places["last"] == [len(nets["last"].layers) - 3]
    for other in ("last", "all"):
        for a, b in zip(*([m.weight for m in nets[k].layers if isinstance(m, torch.nn.Linear)]
                          for k in ("none", other)), strict=True):  # fmt: skip
            assert torch.equal(a, b)


def rows_of(claim, seed, **arm):
    arm = {"claim": claim, "part": "fair", **columns(claim, 0.01), **arm}
    head = {**arm, "seed": seed, "budget": "tiny", "data": "digits"}
    return [{**row, **head} for row in small_fits.measure(arm, seed, "tiny", DIGITS)]


@pytest.mark.parametrize("claim", small_fits.CLAIMS)
def test_a_draw_covers_its_targets_is_finite_and_repeatable(claim):
    rows = rows_of(claim, 3)
    assert rows == rows_of(claim, 3)
    assert set(holding(claim)) <= {row["cell"] for row in rows if row["kind"] == "value"}
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    values = [row["value"] for row in rows if row["kind"] == "value"]
    assert values != [row["value"] for row in rows_of(claim, 4) if row["kind"] == "value"]


# -- rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", small_fits.CLAIMS)
def test_numbers_that_the_rule_wants_are_supported(claim):
    verdict = verdict_of(made_up(claim, holding(claim)))
    assert verdict.status == "supported", (verdict.sentence, verdict.notes)
    assert verdict.published_status == (None if claim in small_fits.KINDS else "supported")
    assert verdict.n == 8


@pytest.mark.parametrize("claim", small_fits.CLAIMS)
def test_one_cell_off_its_target_refutes_and_a_wide_one_is_open(claim):
    name, target = list(small_fits.question(claim).targets.items())[-1]
    cell = measured(name, target)
    verdict = verdict_of(made_up(claim, {**holding(claim), cell: draws.off(target)}))
    assert verdict.status == ("mixed" if claim == "residual-identity" else "refuted")
    wide = [
        {**r, "value": r["value"] if r["seed"] % 2 else draws.off(target)}
        if r.get("cell") == cell
        else r
        for r in made_up(claim, holding(claim))
    ]
    assert verdict_of(wide).status == "inconclusive"
    few = [r for r in made_up(claim, holding(claim)) if r["seed"] < 4 or r["seed"] >= 800]
    assert verdict_of(few).status == "inconclusive"


@pytest.mark.parametrize("claim", ["dense-region", "bjorck-activations"])
def test_without_its_control_a_claim_is_open(claim):
    asked = small_fits.question(claim)
    ((name, target),) = asked.control.items()
    for number in (draws.off(target), 0.04 if claim == "bjorck-activations" else 0.5):
        verdict = verdict_of(made_up(claim, {**holding(claim), name: number}))
        assert verdict.status == "inconclusive"
        assert any("control" in note for note in verdict.notes)


def test_digits_are_a_demonstration_where_images_are_looked_at_and_tiny_decides_nothing():
    for claim in small_fits.CLAIMS:
        rows = [{**r, "data": "digits"} for r in made_up(claim, holding(claim))]
        verdict = verdict_of(rows)
        assert verdict.status == ("demo" if claim in ON_IMAGES else "supported")
        if claim in PLAIN:
            tiny = verdict_of(made_up(claim, holding(claim), budget="tiny"))
            assert (tiny.status, tiny.published_status) == ("inconclusive", "inconclusive")


@pytest.mark.parametrize("claim", small_fits.KINDS)
def test_rows_at_rates_that_are_not_the_best_do_not_count(claim):
    other = draws.rows(claim, holding(claim), **columns(claim, 1.0))
    assert verdict_of([*tuning(claim), *other]).n == 0


# -- as an experiment ---------------------------------------------------------------------------


def test_tuning_then_the_pilot_then_the_draws_that_it_asks_for():
    first = small_fits.cells("small", "mnist", None, [])
    assert {c.arm["claim"] for c in first if c.arm["part"] == "tuning"} == set(small_fits.KINDS)
    assert {c.arm["claim"] for c in first if c.arm["part"] == "pilot"} == set(PLAIN)
    assert not [c for c in first if c.arm["part"] == "fair"]
    assert {c.arm["claim"] for c in first if c.arm["part"] == "shown"} == {"dense-region"}
    rows = [row for claim in small_fits.KINDS for row in tuning(claim)]
    for claim in small_fits.CLAIMS:
        made = [r for r in made_up(claim, holding(claim), draws=4) if r.get("kind") == "value"]
        rows += [{**r, "seed": 900 + r["seed"], "part": "pilot"} for r in made]
    third = small_fits.cells("small", "mnist", None, rows)
    by = {c: [x.seed for x in third if (x.arm["claim"], x.arm["part"]) == (c, "fair")]
          for c in small_fits.CLAIMS}  # fmt: skip
    assert by == {claim: [0, 1, 2, 3, 4] for claim in small_fits.CLAIMS}
    assert len(small_fits.expected("small", "mnist", None)) == len(third)
    shown = [c for c in third if c.arm["part"] == "shown" and c.arm["claim"] != "dense-region"]
    assert len(shown) == 3 * small_fits.SHOWN_SEEDS
    towers = [c for c in third if c.arm["part"] == "tuning" and c.arm["kind"] == "skipinit"]
    assert {c.arm["rates"] for c in towers} == {" ".join(f"{r:g}" for r in LADDER if r <= 3)}
    noisy = [{**r, "value": r["value"] + 3.0 * (r["seed"] % 2)} if r.get("part") == "pilot" else r
             for r in rows]  # fmt: skip
    more = small_fits.cells("small", "mnist", None, noisy)
    assert len([c for c in more if c.arm["part"] == "fair"]) > 60


@pytest.mark.parametrize("claim", small_fits.KINDS)
def test_a_best_rate_at_the_edge_extends_the_grid_of_all_arms(claim):
    wanted = small_fits.cells("small", "mnist", None, tuning(claim, best=3.0))
    new = {c.arm["kind"] for c in wanted if c.arm.get("rates") == "10"}
    assert new == set(small_fits.KINDS[claim])
    trial = next(c for c in wanted if c.arm.get("rates") == "10")
    rows = list(small_fits.measure(trial.arm, 800, "tiny", DIGITS))
    assert {row["rate"] for row in rows} == {10.0}
    assert "rate" not in trial.arm


def test_the_registry_agrees_and_what_it_derives_can_be_stored(tmp_path):
    owned = {i for i, claim in claims().items() if claim.experiment == "small-fits"}
    assert owned == set(small_fits.CLAIMS) == set(small_fits._WORDS)
    rows = [row for claim in small_fits.CLAIMS for seed in (0, 1) for row in rows_of(claim, seed)]
    run = tmp_path / "run"
    (run / "cells").mkdir(parents=True)
    verdicts, drawn = small_fits.judge(rows), small_fits.figures(rows)
    assert {f["id"].removeprefix("small-fits-") for f in drawn} == set(small_fits._FIGURES)
    _judge.write_derived(run, Judged(verdicts, drawn, [], None, {"small-fits": "text"}))
    assert small_fits.judge([]) == small_fits.figures([]) == []


# -- the figure in which the density moves --------------------------------------------------------


def shown_rows(seed):
    arm = {"claim": "dense-region", "part": "shown"}
    head = {**arm, "seed": seed, "budget": "tiny", "data": "digits"}
    return [{**row, **head} for row in small_fits.measure(arm, seed, "tiny", DIGITS)]


def line(rows, panel, series, at):
    """x and y of one series at one place of the slider."""
    return {r["x"]: r["y"] for r in rows
            if (r["panel"], r["series"], r["at"]) == (panel, series, at)}  # fmt: skip


@pytest.mark.parametrize("center", [-1.0, 0.5, 2.0])
def test_a_moved_fit_is_the_network_trained_around_that_center_alone(center):
    g = stream(2, "dense-region moved")
    nets = curves.network(g, 1)

    def around():
        return (center + 0.3 * torch.randn(1, 64, generator=g, dtype=torch.float64)).float()

    curves.fit(nets, around, curves.sine, 50)
    found = line(shown_rows(2), curves._NETWORK, "fit", center)
    wanted = curves.output(nets, torch.tensor(list(found))).detach()[0]
    assert list(found.values()) == pytest.approx(wanted.tolist(), abs=1e-3)
    assert (min(found), max(found)) == (-2, 3)


def test_the_formulas_beside_the_moved_fits_come_once():
    rows = shown_rows(0)
    for panel, target in (
        (curves._NETWORK, lambda x: math.sin(3 * x)),
        (curves._LINEAR, lambda x: 2 * x),
    ):
        drawn = line(rows, panel, "target", None)
        assert drawn == {x: pytest.approx(target(x), abs=1e-4) for x in curves.GRID}
        for center in (-1.0, 1.0):
            density = line(rows, panel, "density of the inputs", center)
            assert max(density, key=density.get) == center
            assert 0.125 * sum(density.values()) == pytest.approx(1, abs=2e-3)
            inside = sum(y for x, y in density.items() if abs(x - center) < 0.3)
            assert 0.125 * inside == pytest.approx(0.683, abs=0.07)
    assert {row["series"] for row in shown_rows(1)} == {"fit"}


def test_the_moved_fits_are_asked_for_and_change_no_verdict():
    wanted = small_fits.cells("small", "mnist", None, [])
    asked = [c for c in wanted if c.arm == {"claim": "dense-region", "part": "shown"}]
    assert [c.seed for c in asked] == list(range(small_fits.MOVED_SEEDS))
    few = small_fits.cells("small", "mnist", 2, [])
    assert sum(c.arm == {"claim": "dense-region", "part": "shown"} for c in few) == 2
    rows = made_up("dense-region", holding("dense-region"))
    more = [{**row, "budget": "small"} for row in shown_rows(0)]
    assert verdict_of([*rows, *more]) == verdict_of(rows)
    assert small_fits.figures([*rows, *more]) == small_fits.figures(rows)


def test_the_moved_fits_become_one_figure_with_a_slider(tmp_path):
    for seed in (0, 1):
        arm = {"claim": "dense-region", "part": "shown"}
        spec = {"schema": _runs.SCHEMA, "experiment": "small-fits", "arm": arm, "seed": seed,
                "budget": "tiny", "data": {"name": "digits", "digest": "0" * 16},
                "code": "0" * 16, "versions": {}}  # fmt: skip
        rows = small_fits.measure(arm, seed, "tiny", DIGITS)
        _runs.write_cell(tmp_path, spec, rows, "")
    (figure,) = stepped(_runs.read_cells([tmp_path]))
    assert figure["id"] == "small-fits-moved"
    assert figure["slider"] == "center m of the density"
    assert figure["steps"] == list(curves.CENTERS)
    assert [panel["title"] for panel in figure["panels"]] == [curves._NETWORK, curves._LINEAR]
    fit, target, density = figure["panels"][0]["series"]
    assert (fit["n"], target["n"], density["n"]) == (2, None, None)
    both = [line(shown_rows(seed), curves._NETWORK, "fit", 0.5) for seed in (0, 1)]
    place = figure["steps"].index(0.5)
    for key, fold in (("lo", min), ("hi", max)):
        assert fit[key][place] == [fold(ys) for ys in zip(*(b.values() for b in both), strict=True)]
    assert len(target["y"]) == 1
    assert [max(y) for y in density["y"]] == [pytest.approx(1.3298, abs=1e-4)] * 13
