"""The Jacobian figure of the MNIST study: what is measured, and which reading is concluded."""

import math

import pytest
import torch

from gammabeta.studies import _data, singular_values
from gammabeta.studies._claims import claims
from gammabeta.studies._nets import m2
from gammabeta.studies._train import stream
from tests.simulated import judged, measured, noise, simulate

DIGITS = _data.load("digits")
X = torch.rand(7, 36, generator=stream(0, "x"))


def first_layer(net):
    """The layers up to the first activation."""
    layers = list(net.layers)
    index = next(k for k, layer in enumerate(layers) if isinstance(layer, torch.nn.ReLU))
    return torch.nn.Sequential(*layers[: index + 1]).double().train()


@pytest.mark.parametrize("norm", [True, False])
def test_singular_values_are_those_of_the_jacobians_by_automatic_differentiation(norm):
    net = m2(36, "relu", norm, stream(3, "weights"), eps=1e-3)
    if norm:
        with torch.no_grad():
            net.layers[1].weight.uniform_(0.5, 2, generator=stream(1, "gamma"))
            net.layers[1].bias.uniform_(-1, 1, generator=stream(1, "beta"))
    factors = singular_values.slopes(net, X)
    weight = net.layers[0].weight.detach().double()
    layer = first_layer(net)
    full = torch.autograd.functional.jacobian(layer, X.double())  # (7, units, 7, pixels)
    summed = full.sum(0).transpose(0, 1)  # (7, units, pixels): of the sum over the batch
    own = torch.stack([full[k, :, k] for k in range(7)])
    for found, jacobians in zip(factors, (summed, own), strict=True):
        values = singular_values.singular_values(weight, found)
        expected = torch.linalg.svdvals(jacobians)
        torch.testing.assert_close(values[:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-5)


def test_rows_are_of_both_kinds_and_repeatable():
    arms = [{"norm": norm, "rate": 0.01, "pilot": False} for norm in ("bn", "none")]
    rows = measured(singular_values, arms, DIGITS)
    assert rows == measured(singular_values, arms, DIGITS)
    numbers = [r for r in rows if r["kind"] != "curve"]
    assert {(r["kind"], r["step"]) for r in numbers} == {
        (kind, step) for kind in ("sum", "own") for step in (0, 10)
    }
    for row in numbers:
        assert row["largest"] >= row["sv_10"] >= row["sv_30"] >= row["sv_70"] >= row["sv_90"] >= 0


# -- made-up rows -----------------------------------------------------------------------------


def answering(index=0.1, step=1.0, sd=0.01, other=None):
    """Singular values so far from the published numbers by each reading."""

    def answer(cell, seed):
        far, rows = index, []
        if other is not None and cell["rate"] == singular_values.RATES[1]:
            far = other
        wanted = dict(
            zip(singular_values.PANELS, singular_values.PUBLISHED[cell["norm"]], strict=True)
        )
        for s in singular_values.STEPS:
            near, away = (math.exp(noise(seed, *cell.values(), reading, sd=sd)) for reading in "is")
            for kind in ("sum", "own"):
                row = {"step": s, "kind": kind}
                row |= {f"sv_{k}": v + far * near for k, v in wanted.items()}
                by_step = wanted.get(s // 10, 0.0) + step * away
                rows.append({**row, **dict.fromkeys(("mean", "median", "largest"), by_step)})
        return rows

    return answer


def verdict(**options):
    return judged(singular_values, simulate(singular_values, answering(**options))[0])["f-jac"]


def test_the_nearer_reading_is_concluded():
    found = verdict()
    assert (found.status, found.published_status) == ("supported", "supported")
    assert found.effect == pytest.approx(math.log(10), abs=0.05)
    assert verdict(index=0.8).status == "refuted"
    assert verdict(index=1.0, step=0.1).status == "refuted"
    assert verdict(index=0.5, sd=0.7).status == "inconclusive"
    found = verdict(other=2.0)
    assert (found.status, found.published_status) == ("mixed", "mixed")


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    rows, _ = simulate(singular_values, answering())
    digits = judged(singular_values, [{**r, "data": "digits"} for r in rows])["f-jac"]
    assert (digits.status, digits.published_status) == ("demo", "demo")
    tiny = judged(singular_values, [{**r, "budget": "tiny"} for r in rows])["f-jac"]
    assert (tiny.status, tiny.published_status) == ("inconclusive", "inconclusive")
    assert singular_values.judge([]) == singular_values.figures([]) == []


def test_the_pilot_alone_decides_how_many_seeds_and_a_whole_run_is_foreseen():
    for sd, most in ((0.001, 5), (0.7, 16)):
        rows, asked = simulate(singular_values, answering(sd=sd))
        count = len({c.seed for c in asked if not c.arm["pilot"]})
        assert {c.seed for c in asked if not c.arm["pilot"]} == set(range(count))
        assert count <= most
        assert (count == 5) == (sd == 0.001)
        assert {c.seed for c in asked if c.arm["pilot"]} == set(singular_values.PILOT_SEEDS)
        main = [r for r in rows if not r["pilot"]]
        effect = judged(singular_values, rows)["f-jac"].effect
        assert judged(singular_values, main)["f-jac"].effect == effect
        if count == 5:
            foreseen = singular_values.expected("small", "mnist", None)
            assert len(foreseen) == len(asked)


def test_the_registry_agrees():
    owned = {i for i, claim in claims().items() if claim.experiment == "singular-values"}
    assert owned == set(singular_values.CLAIMS)
