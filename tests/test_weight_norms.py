"""The experiment on weights before BN: how they are trained, and what is concluded."""

import math

import pytest
import torch

from gammabeta.studies import _data, weight_norms
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._train import pixels, stream, train
from gammabeta.studies._weight_norms import factors, rules, runs
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")
IMAGES, LABELS = DIGITS.train_x[:1000], DIGITS.train_y[:1000]


def trained(steps=20, bn=True, rate=0.3, **how):
    net = runs.network(64, bn, 0)
    looks = list(
        runs.run(net, IMAGES, LABELS, pixel_max=16, rate=rate, steps=steps, seed=0,
                 stops=[steps], **how)
    )  # fmt: skip
    assert looks == [(steps, False)]
    return net


def test_fixed_norms_are_those_of_the_start_and_free_ones_grow():
    first = [runs.lengths(w) for w in runs.hidden(runs.network(64, True, 0))]
    fixed, free = trained(fixed=True), trained()
    for w, v, length in zip(runs.hidden(fixed), runs.hidden(free), first, strict=True):
        torch.testing.assert_close(runs.lengths(w), length)
        assert (runs.lengths(v) >= length * (1 - 1e-6)).all()
    assert runs.growth(fixed, first) == pytest.approx(0, abs=1e-5)
    ratios = torch.cat([runs.lengths(v) / n for v, n in zip(runs.hidden(free), first, strict=True)])
    assert runs.growth(free, first) == pytest.approx(float(ratios.square().log().mean()), rel=1e-4)
    assert runs.growth(free, first) > 0.001


def test_hidden_weights_have_their_own_rate_and_all_else_the_common_one():
    net, before = trained(steps=1, weights=7.0), runs.network(64, True, 0)
    start = runs.network(64, True, 0)
    for _ in train(before, IMAGES, LABELS, pixel_max=16, rate=0.3, steps=1,
                   order=stream(0, "order"), stops=[1]):  # fmt: skip
        pass
    inside = {id(w) for w in runs.hidden(net)}
    for p, was, q in zip(net.parameters(), start.parameters(), before.parameters(), strict=True):
        rate = 7.0 if id(p) in inside else 0.3
        torch.testing.assert_close(p, was - rate * q.grad, rtol=1e-4, atol=1e-5)


def test_with_bn_a_rate_times_a_squared_is_that_of_weights_a_times_as_long():
    # What both claims rest on; a is a power of two, eps is all that differs.
    short, long = runs.network(64, True, 0), runs.network(64, True, 0)
    with torch.no_grad():
        for w in runs.hidden(long):
            w.mul_(8)
    for net, rate in ((short, 0.1), (long, 6.4)):
        for _ in runs.run(net, IMAGES, LABELS, pixel_max=16, rate=0.1, steps=5, seed=0,
                          stops=[5], weights=rate):  # fmt: skip
            pass
    for w, v in zip(runs.hidden(short), runs.hidden(long), strict=True):
        torch.testing.assert_close(8 * w, v, rtol=1e-2, atol=1e-2)


def test_the_objective_is_the_loss_of_training_mode_and_leaves_no_trace():
    net = trained()
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    found = runs.objective(net, IMAGES, LABELS, 16)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=0)
    net.train()
    each = [
        torch.nn.functional.cross_entropy(net(pixels(IMAGES[k : k + 64], 16)), LABELS[k : k + 64])
        for k in range(0, 960, 64)
    ]
    assert found == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_best_losses_and_their_factor():
    rows = [
        {"part": "rates", "group": "bn", "weights": w, "seed": 0, "step": s, "loss": loss}
        for w, losses in ((0.1, (2.0, 0.5, 1.0)), (1.0, (2.0, 1.0, 0.25)))
        for s, loss in enumerate(losses)
    ]
    rows.append({"part": "rates", "group": "bn", "weights": 1.0, "seed": 0, "step": 3})
    assert factors.best(rows, "rates", "bn") == {0.1: {0: 0.5}, 1.0: {0: 0.25}}
    assert factors.best(rows, "rates", "bn", 1) == {0.1: {0: 0.5}, 1.0: {0: 1.0}}
    assert factors.best(rows, "rates", "none") == {}
    assert factors.factor(factors.best(rows, "rates", "bn"), rules.WEIGHTS) == {}


# -- made-up rows -------------------------------------------------------------------------------


def made(fixed=0.0, sd=0.05, grown=0.3, factor=1.2, spread=0.02):
    """Fixed minus free in points; growth of free norms; largest over smallest loss."""

    def rows(cell, seed):
        if "weights" in cell:
            share = abs(math.log10(cell["weights"])) / 2 * math.log(factor)
            loss = 0.01 * math.exp(share + noise(seed, cell["weights"], cell["part"], sd=spread))
            return [
                {"step": s, "loss": value, "accuracy": 0.95, "diverged": False}
                for s, value in ((0, 2.3), (500, 2 * loss), (960, loss), (980, loss), (1000, loss))
            ]
        level = 93 - abs(math.log10(cell["rate"] / 0.3))
        level += fixed * (cell["arm"] == "fixed")
        level += noise(seed, cell["arm"], cell["part"], sd=sd)
        found = [{"step": s, "accuracy": level / 100, "diverged": False} for s in (960, 980, 1000)]
        found[-1]["growth"] = 0.0 if cell["arm"] == "fixed" else grown + noise(seed, "g", sd=0.01)
        return found

    return rows


def verdict(claim, *args, budget="small", data="mnist", seeds=None, **kwargs):
    rows, _ = simulate(weight_norms, made(*args, **kwargs), budget, data, seeds)
    return judged(weight_norms, rows)[claim]


@pytest.mark.parametrize(
    ("fixed", "sd", "status"),
    [(0.0, 0.05, "supported"), (-1.0, 0.05, "refuted"), (1.0, 0.05, "refuted"),
     (0.2, 1.0, "inconclusive")],
)  # fmt: skip
def test_fixed_norms_have_to_be_as_good(fixed, sd, status):
    found = verdict("norm-fixed", fixed, sd)
    assert (found.status, found.published_status) == (status, None)
    assert found.n == (16 if sd == 1.0 else 8)


@pytest.mark.parametrize(("grown", "status"), [(0.01, "refuted"), (0.05, "inconclusive")])
def test_norms_that_do_not_grow_leave_nothing_to_fix(grown, status):
    found = verdict("norm-fixed", grown=grown)
    assert found.status == "inconclusive"
    assert any(f", {status}." in note for note in found.notes if "Positive control" in note)


@pytest.mark.parametrize(
    ("factor", "spread", "status"),
    [(1.2, 0.02, "supported"), (5.0, 0.02, "refuted"), (1.4, 0.08, "inconclusive")],
)
def test_losses_have_to_lie_within_the_factor(factor, spread, status):
    found = verdict("auto-lr", factor=factor, spread=spread)
    assert (found.status, found.published_status) == (status, None)
    assert found.delta == pytest.approx(math.log(1.5))
    cells = {c["name"]: c for c in found.cells}
    assert cells["the same, rates 0.1 to 10"]["effect"] > found.effect
    assert cells["the same, rates 0.1 to 10, without BN"]["n"] == 3
    if status == "supported":
        assert found.effect == pytest.approx(-math.log(factor), abs=0.05)


def test_what_is_shown_decides_nothing_and_divergence_is_counted():
    def rows(cell, seed):
        given = made()(cell, seed)
        if cell["part"] == "shown" or cell["group"] == "none":
            given = [{**r, "accuracy": 0.1} for r in given]
        if cell["group"] == "none" and cell.get("weights") == 100.0:
            given = [{"step": 0, "loss": 2.3, "diverged": False}, {"step": 10, "diverged": True}]
        return given

    found = judged(weight_norms, simulate(weight_norms, rows)[0])
    plain = judged(weight_norms, simulate(weight_norms, made())[0])
    for claim in weight_norms.CLAIMS:
        for field in ("status", "effect", "ci", "n", "p"):
            assert getattr(found[claim], field) == getattr(plain[claim], field)
    assert "Runs whose loss was not finite, without BN: 3." in found["auto-lr"].notes


def test_digits_tiny_missing_rows_other_limits_and_the_estimate():
    assert verdict("auto-lr", data="digits").status == "demo"
    assert verdict("norm-fixed", budget="tiny", seeds=10).status == "inconclusive"
    rows, asked = simulate(weight_norms, made(0.2, factor=2.0))
    found = judged(weight_norms, rows)
    assert (found["norm-fixed"].status, found["auto-lr"].status) == ("supported", "refuted")
    with overruled({"norm-fixed": {"delta": 0.1}, "auto-lr": {"factor": 3.0}}):
        found = judged(weight_norms, rows)
    assert (found["norm-fixed"].status, found["auto-lr"].status) == ("refuted", "supported")
    for part in ("tuning", "fair", "pilot", "shown", "rates", "rates-pilot"):
        left = judged(weight_norms, [r for r in rows if r["part"] == part])
        assert left["norm-fixed"].status == "inconclusive"
        assert left["auto-lr"].status == ("refuted" if part == "rates" else "inconclusive")
    expected = sum(c.cost for c in weight_norms.expected("small", "mnist", None))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_the_registry_agrees_and_the_whole_experiment_runs_on_the_digits():
    owned = {i for i, claim in claims().items() if claim.experiment == "weight-norms"}
    assert owned == set(weight_norms.CLAIMS)
    rows, _ = simulate(
        weight_norms, lambda cell, seed: weight_norms.measure(cell, seed, "tiny", DIGITS),
        "tiny", "digits", 2,
    )  # fmt: skip
    assert {v.status for v in judged(weight_norms, rows).values()} == {"demo"}
    drawn = {f["id"] for f in weight_norms.figures(rows)}
    assert drawn == {f"weight-norms-{n}" for n in ("loss", "accuracy", "tuning")}
    assert weight_norms.judge([]) == weight_norms.figures([]) == []
