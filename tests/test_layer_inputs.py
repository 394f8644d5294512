"""The experiment on layer inputs: drift and whitening, what it asks for and what it concludes."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch.nn import functional as F

from gammabeta import _runs
from gammabeta.report._stepped import stepped
from gammabeta.studies import _data, layer_inputs
from gammabeta.studies._claims import claims
from gammabeta.studies._layer_inputs import drift, features
from gammabeta.studies._nets import m2
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, measured, noise, simulate

DIGITS = _data.load("digits")
SPEED, WHITENING = "log steps, none − BN", "whitening − BN"


def arm(claim, **changes):
    return {"claim": claim, "part": "fair", "norm": "bn", "rate": 1.0, **changes}


# -- drift ------------------------------------------------------------------------------------


def test_drift_is_the_wasserstein_distance_over_the_standard_deviation():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(300, 4)), draw.normal(1, 2, size=(300, 4))
    wanted = np.mean(
        [
            wasserstein_distance(a[:, k], b[:, k]) / math.sqrt((a[:, k].var() + b[:, k].var()) / 2)
            for k in range(4)
        ]
    )
    found = drift.drift(torch.tensor(a), torch.tensor(b))
    assert found == pytest.approx(wanted)
    assert drift.drift(torch.tensor(a), torch.tensor(a[::-1].copy())) == 0


def test_drift_knows_no_units_and_shape_no_moments():
    x = torch.randn(500, 3, dtype=torch.float64, generator=stream(0, "x"))
    assert drift.drift(x, x + 0.5 * x.std(0, correction=0)) == pytest.approx(0.5)
    assert drift.drift(7 * x, 7 * x + 1) == pytest.approx(drift.drift(x, x + 1 / 7))
    moved = drift.standardized(3 * x + 2)
    assert drift.drift(drift.standardized(x), moved) == pytest.approx(0, abs=1e-9)


def test_constant_units_do_not_divide_by_zero_and_a_diverged_run_has_moved_all_the_way():
    constant = torch.ones(10, 2, dtype=torch.float64)
    assert drift.drift(constant, constant) == 0
    assert drift.turned(constant, constant) == 0
    assert drift.drift(constant, constant * math.nan) == 1e6


def test_correlations_that_stay_have_not_turned():
    x = torch.randn(500, 3, dtype=torch.float64, generator=stream(0, "x"))
    assert drift.turned(x, 5 * x + 1) == pytest.approx(0, abs=1e-12)
    assert drift.turned(x, -x) == pytest.approx(0, abs=1e-12)
    assert drift.turned(x, x * torch.tensor([1.0, 1.0, -1.0])) > 0.01


def test_the_network_is_that_of_the_protocol():
    for norm in (True, False):
        net = drift.m3(784, norm, stream(0, "weights"))
        weights = [p for p in net.parameters() if p.ndim == 2]
        assert [w.shape[0] for w in weights] == [100, 100, 100, 10]
        assert weights[0].std().item() == pytest.approx(0.1, rel=0.02)
        linear = [m for m in net.layers if isinstance(m, torch.nn.Linear)]
        assert [m.bias is None for m in linear] == [norm, norm, norm, False]
        assert all((m.bias == 0).all() for m in linear if m.bias is not None)
        one, other = drift.m3(64, True, stream(1, "w")), drift.m3(64, False, stream(1, "w"))
    pairs = zip(one.parameters(), (p for p in other.parameters() if p.ndim == 2), strict=False)
    assert torch.equal(*next(pairs))


@pytest.mark.parametrize("norm", ["bn", "none"])
def test_a_cell_of_drift_is_its_protocol_step_by_step(norm):
    x, y, test_x, test_y = fair_split(DIGITS, 3, "test")
    x, probe = (drift.binary(images, 16) for images in (x, test_x))
    assert set(x.unique().tolist()) == {0, 1}
    net = drift.m3(64, norm == "bn", stream(3, "weights"))
    update = torch.optim.SGD(net.parameters(), lr=1.0)
    seen = []
    for step, index in enumerate(
        itertools.islice(batches(1000, 60, stream(3, "order")), 20), start=1
    ):
        update.zero_grad()
        F.cross_entropy(net(pixels(x[index], 1)), y[index]).backward()
        update.step()
        if step % 2 == 0:
            net.eval()
            with torch.no_grad():
                seen.append(net.layers[:-1](pixels(probe, 1)).numpy().astype(float))
                share = (net(pixels(probe, 1)).argmax(1) == test_y).double().mean().item()
            net.train()
    rows = measured(layer_inputs, [arm("ics-def", norm=norm)], DIGITS, [3])
    found = [row["drift"] for row in rows if "drift" in row]
    assert len(found) == 9
    for value, (a, b) in zip(found, itertools.pairwise(seen), strict=True):
        wanted = [
            wasserstein_distance(a[:, k], b[:, k]) / math.sqrt((a[:, k].var() + b[:, k].var()) / 2)
            for k in range(100)
        ]
        assert value == pytest.approx(np.mean(wanted), rel=1e-3)
    assert rows[-1]["accuracy"] == pytest.approx(share, abs=0.0021)


def test_the_density_of_sigmoid_inputs_is_a_histogram_of_all_units_by_their_own_statistics():
    def received(net):
        x = pixels(drift.binary(fair_split(DIGITS, 1, "test")[2], 16), 1)
        for layer in net.layers[:-2]:
            if isinstance(layer, torch.nn.BatchNorm1d):
                x = F.batch_norm(x, None, None, layer.weight, layer.bias, True)
            else:
                x = layer(x)
        return x.detach().numpy().ravel()

    x, y, *_ = fair_split(DIGITS, 1, "test")
    x = drift.binary(x, 16)
    for norm, panel in (("bn", "with batch normalization"), ("none", "without")):
        net = drift.m3(64, norm == "bn", stream(1, "weights"))
        seen = {0: received(net)}
        update = torch.optim.SGD(net.parameters(), lr=1.0)
        for index in itertools.islice(batches(1000, 60, stream(1, "order")), 20):
            update.zero_grad()
            F.cross_entropy(net(pixels(x[index], 1)), y[index]).backward()
            update.step()
        seen[20] = received(net)
        rows = measured(layer_inputs, [arm("ics-def", norm=norm)], DIGITS, [1])
        drawn = [row for row in rows if row.get("series") == "density"]
        assert {row["panel"] for row in drawn} == {panel}
        assert {row["at"] for row in drawn} == set(range(0, 21, 2))
        for step, z in seen.items():
            found = [row["y"] for row in drawn if row["at"] == step]
            counts, edges = np.histogram(z, bins=96, range=(-12, 12))
            assert found == pytest.approx(counts / len(z) / 0.25, abs=1e-3)
            middles = (edges[:-1] + edges[1:]) / 2
            assert [row["x"] for row in drawn if row["at"] == step] == pytest.approx(middles)


def test_looking_at_the_density_leaves_the_run_as_it_is():
    for norm in ("bn", "none"):
        seen = measured(layer_inputs, [arm("ics-def", norm=norm)], DIGITS, [0])
        not_seen = measured(layer_inputs, [arm("ics-def", norm=norm, part="pilot")], DIGITS, [0])
        assert {row["kind"] for row in not_seen} == {"run"}
        runs = [{**row, "part": ""} for row in seen if row["kind"] == "run"]
        assert runs == [{**row, "part": ""} for row in not_seen]
        (drawn,) = {row["series"] for row in seen if row["kind"] == "curve" and row["at"] is None}
        assert drawn == "sigmoid"
    assert all(
        row["kind"] == "run" for row in measured(layer_inputs, [arm("ics-def")], DIGITS, [3])
    )


def test_a_diverged_network_has_a_density_of_nothing():
    net = drift.m3(64, False, stream(0, "weights"))
    with torch.no_grad():
        net.layers[0].weight.fill_(math.nan)
    rows = list(drift.density(net, torch.ones(3, 64), False, 5))
    assert [row["y"] for row in rows] == [0.0] * 96


def test_the_densities_become_one_figure_beside_each_other(tmp_path):
    for norm in ("bn", "none"):
        for seed in (0, 1):
            cell = arm("ics-def", norm=norm)
            spec = {"schema": _runs.SCHEMA, "experiment": "layer-inputs", "arm": cell,
                    "seed": seed, "budget": "tiny", "code": "0" * 16, "versions": {},
                    "data": {"name": "digits", "digest": "0" * 16}}  # fmt: skip
            rows = layer_inputs.measure(cell, seed, "tiny", DIGITS)
            _runs.write_cell(tmp_path, spec, rows, "")
    (figure,) = stepped(_runs.read_cells([tmp_path]))
    assert (figure["slider"], figure["steps"]) == ("step", list(range(0, 21, 2)))
    assert [panel["title"] for panel in figure["panels"]] == ["with batch normalization", "without"]
    for panel in figure["panels"]:
        sigmoid, density, before = panel["series"]
        assert sigmoid["y"][0] == pytest.approx(
            [1 / (1 + math.exp(-x)) for x in sigmoid["x"]], abs=1e-5
        )
        assert density["n"] == before["n"] == 2
        assert before["y"] == [density["y"][0]]
        assert before["name"] == "density before training"
    assert (
        "With batch normalization: mean ± standard deviation 0 ± 1 before training" in figure["alt"]
    )


# -- features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", features.ARMS)
def test_a_cell_of_features_is_its_protocol_step_by_step(norm):
    x, y, test_x, test_y = fair_split(DIGITS, 3, "test")
    net = m2(64, "relu", features.ARMS[norm], stream(3, "weights"))
    update = torch.optim.SGD(net.parameters(), lr=1.0)
    for index in itertools.islice(batches(1000, 256, stream(3, "order")), 8):
        update.zero_grad()
        F.cross_entropy(net(pixels(x[index], 16)), y[index]).backward()
        update.step()
    share = (net.eval()(pixels(test_x, 16)).argmax(1) == test_y).double().mean().item()
    rows = measured(layer_inputs, [arm("feature-independent", norm=norm)], DIGITS, [3])
    assert rows[-1]["step"] == 8
    assert rows[-1]["accuracy"] == pytest.approx(share, abs=0.0061)
    assert 0 <= rows[-1]["correlation"] <= 1
    assert all("validation" in row for row in rows)


def test_whitening_leaves_less_correlation_than_batch_normalization():
    arms = [arm("feature-independent", norm=n) for n in ("bn", "zca-20", "zca-100")]
    one, groups, whole = (measured(layer_inputs, [a], DIGITS, [0])[-1]["correlation"] for a in arms)
    assert whole < groups < one


def test_batch_normalization_keeps_the_correlations_and_whitening_does_not():
    (row,) = measured(layer_inputs, [arm("feature-independent", part="identity")], DIGITS, [0])
    assert row["error"] < 100 * 2.0**-52 * row["condition"]
    assert row["condition"] < 100
    z = torch.randn(50, 4, dtype=torch.float64, generator=stream(0, "z"))
    mixed = z @ torch.randn(4, 4, dtype=torch.float64, generator=stream(1, "z"))
    assert (features._correlations(z) - features._correlations(mixed)).abs().max() > 0.1


def test_the_step_of_arrival_is_interpolated_and_censored():
    steps, shares = [10, 20, 40], [0.5, 0.7, 0.9]
    assert features.steps_to(0.8, steps, shares) == (pytest.approx(30), True)
    assert features.steps_to(0.4, steps, shares) == (10, True)
    assert features.steps_to(0.95, steps, shares) == (40, False)


# -- made-up rows -----------------------------------------------------------------------------


def answer(drift=0.4, speed=2.0, whitening=0.0, sd=0.05, kept=1e-16, reached=True):
    """BN arrives speed times as soon; whitening is ahead by so many points."""

    def rows(cell, seed):
        norm, jitter = cell["norm"], noise(seed, cell["norm"], sd=sd)
        if cell["part"] == "identity":
            return [{"kind": "identity", "error": kept, "condition": 10.0}]
        lost = abs(math.log(cell["rate"]))
        share = 94 - lost + jitter + (whitening if norm == "zca-20" else 0)
        share -= 0.2 * (norm in ("zca-100", "iternorm-20"))
        found = [
            {"kind": "run", "step": s, "accuracy": share / 100, "diverged": False}
            for s in (2001, 2002, 2003)
        ]
        if cell["part"] == "tuning":
            return found
        if cell["claim"] == "ics-def":
            size = drift * (0.5 if norm == "bn" else 1) * math.exp(jitter)
            columns = ("drift", *(f"drift_of_{x}" for x in ("sigmoid_inputs", "shape",
                                                             "correlations")))  # fmt: skip
            head = {"kind": "run", "diverged": False}
            return found + [
                {**head, "step": s, **dict.fromkeys(columns, size)} for s in range(1, 10)
            ]
        at = 200 * math.exp(jitter) / (1 if norm == "none" else speed)
        # 93 % at this step, 90 % at half of it; the last look is at step 2000.
        looks = [(1, 0.5), (round(at / 2), 0.9), (round(at), 0.93), (2000, 0.94)]
        if not reached:
            looks = [(s, share if share < 0.93 else 0.92) for s, share in looks]
        return found + [
            {"kind": "run", "step": s, "validation": v, "diverged": False} for s, v in looks
        ]

    return rows


def verdicts(**kwargs):
    options = {key: kwargs.pop(key) for key in ("data", "budget", "seeds") if key in kwargs}
    rows, _ = simulate(layer_inputs, answer(**kwargs), **options)
    return judged(layer_inputs, rows)


def test_all_arms_are_tuned_alike_and_the_best_whitening_goes_on():
    wanted = layer_inputs.cells("small", "mnist", None, [])
    assert len(wanted) == 1 + 4 * 2 * (2 + 5)
    _, asked = simulate(layer_inputs, answer(whitening=1.0))
    main = [c for c in asked if c.arm["part"] in ("fair", "pilot")]
    of = [c for c in main if c.arm["claim"] == "feature-independent"]
    assert {c.arm["norm"] for c in of} == {"none", "bn", "zca-20"}
    assert {c.arm["rate"] for c in main} == {1.0}
    assert {c.seed for c in asked if c.arm["part"] == "pilot"} == {900, 901, 902, 903}


def test_drift_is_supported_and_its_secondary_contrasts_are_told():
    found = verdicts(drift=0.4)["ics-def"]
    assert (found.status, found.published_status) == ("supported", None)
    assert found.effect == pytest.approx(0.4, abs=0.04)
    assert found.sentence.startswith("Yes: on MNIST, MLP 100-100-100")
    assert "log ratio with over without −0.6" in " ".join(found.notes)


def test_little_drift_is_refuted_and_noise_is_inconclusive():
    found = verdicts(drift=0.05)["ics-def"]
    assert found.status == "refuted"
    assert "too small to matter" in found.sentence
    assert verdicts(drift=0.045, sd=0.8)["ics-def"].status == "inconclusive"


def test_speed_without_a_further_gain_of_whitening_is_enough():
    found = verdicts()["feature-independent"]
    assert found.status == "supported"
    assert found.effect == pytest.approx(math.log(2), abs=0.06)
    assert {cell["name"] for cell in found.cells} == {SPEED, WHITENING}
    assert any("Correlations before and after BN" in note for note in found.notes)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"whitening": 1.0}, "mixed"),
        ({"speed": 1.0}, "mixed"),
        ({"speed": 1.0, "whitening": 1.0}, "refuted"),
        ({"kept": 1e-3}, "refuted"),
        ({"kept": 1e-12}, "inconclusive"),
        ({"sd": 3.0}, "inconclusive"),
    ],
)
def test_each_level_can_fail(changes, status):
    found = verdicts(**changes)["feature-independent"]
    assert found.status == status
    opening = {"mixed": "In part: ", "refuted": "No: ", "inconclusive": "Undecided: "}[status]
    assert found.sentence.startswith(opening)


def test_whitening_that_gains_is_what_fails():
    cells = verdicts(whitening=1.0)["feature-independent"].cells
    by = {cell["name"]: cell["status"] for cell in cells}
    assert by == {SPEED: "supported", WHITENING: "refuted"}
    harmful = verdicts(whitening=-1.0)["feature-independent"]
    assert harmful.status == "supported"


def test_where_too_few_arrive_a_sign_test_decides():
    found = verdicts(reached=False, sd=0.2)["feature-independent"]
    cell = next(c for c in found.cells if c["name"] == SPEED)
    assert "sign test" in cell["reason"]
    assert cell["status"] == "supported"
    few = verdicts(reached=False, seeds=5)["feature-independent"]
    assert few.status == "inconclusive"  # five of five have p = 0.06


def test_missing_runs_leave_the_verdicts_open():
    rows, _ = simulate(layer_inputs, answer())
    for part in ("tuning", "fair", "pilot", "identity"):
        for verdict in judged(layer_inputs, [r for r in rows if r["part"] == part]).values():
            assert verdict.status == "inconclusive"
    lost = [r for r in rows if r["part"] != "identity"]
    assert judged(layer_inputs, lost)["feature-independent"].status == "inconclusive"
    assert layer_inputs.judge([]) == []


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in layer_inputs.expected("small", "mnist", None))
    _, asked = simulate(layer_inputs, answer(sd=0.2))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    assert {v.status for v in verdicts(data="digits").values()} == {"demo"}
    assert {v.status for v in verdicts(budget="tiny", seeds=8).values()} == {"inconclusive"}


def test_the_whole_experiment_runs_on_the_digits():
    rows, asked = simulate(
        layer_inputs,
        lambda cell, seed: layer_inputs.measure(cell, seed, "tiny", DIGITS),
        "tiny",
        "digits",
        1,
    )
    assert len(asked) == 1 + 2 * (2 + 5) + 2 + 3
    found = judged(layer_inputs, rows)
    assert set(found) == set(layer_inputs.CLAIMS)
    assert {claims()[claim].experiment for claim in found} == {"layer-inputs"}
