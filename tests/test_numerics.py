"""The promises of docs/numerics.md: the figures beside PyTorch's, and the bounds derived there.

The situations are those of benchmarks/numerics.py, which also measures the tables. Bounds of every
single value, for random calls: bounds.py, in test_ops.py and test_cpu_random.py.
"""

import importlib.util
import json
import math
import re
from pathlib import Path

import bounds
import cases
import numpy as np
import oracle
import pytest
import torch

import gammabeta as gb
from gammabeta.ops._cpu import _compile

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "numerics.md").read_text()
RESULTS = ROOT / "benchmarks" / "results" / "numerics.json"
U = 2.0**-24

spec = importlib.util.spec_from_file_location("numerics", ROOT / "benchmarks" / "numerics.py")
numerics = importlib.util.module_from_spec(spec)
spec.loader.exec_module(numerics)

pytestmark = pytest.mark.skipif(
    _compile.missing() is not None, reason=f"no CPU kernels: {_compile.missing()}"
)


# --- figures -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    torch.set_num_threads(1)
    return numerics.situations()


@pytest.mark.parametrize("situation", [*numerics.SITUATIONS, numerics.WORST])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_situation_keeps_the_four_figures(backend, situation, found):
    for result, limit in numerics.PROMISED.items():
        assert found[situation][backend][result] <= limit, result


def test_pytorchs_figures_grow_with_the_mean_and_break_at_the_ends_of_float32(found):
    assert found["mean 0, standard deviation 1"]["torch"]["y"] < 1e-5
    assert found["mean 1e3 std"]["torch"]["y"] > 1e-4
    assert found["mean 1e6 std"]["torch"]["y"] > 0.1
    assert found["scale 1e30"]["torch"]["y"] > 0.1
    assert found["sparse: 2 % not zero"]["torch"]["dx"] > 1e-4


def test_a_large_mean_costs_nothing_at_all(found):
    near, far = (found[f"mean {m}"]["cpu"] for m in ("0, standard deviation 1", "1e6 std"))
    for result in numerics.PROMISED:
        assert far[result] <= 1.5 * near[result] + U, result


def test_roundings_in_one_direction_cost_several_times_the_usual(found):
    """That the constructed input is what it claims to be: nothing else comes near it."""
    others = [row["cpu"]["y"] for name, row in found.items() if name != numerics.WORST]
    assert found[numerics.WORST]["cpu"]["y"] > 4 * max(others)


def test_in_the_eval_mode_the_float32_buffers_are_what_limits():
    found = numerics.inference()
    for backend in ("cpu", "reference"):
        assert found[backend]["0"] <= 2e-6
        assert found[backend]["10"] <= 2e-6
        assert found[backend]["1e6"] > 1e-3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("far", [0.0, 1e6])
def test_a_layer_in_eval_mode_gives_the_bits_of_its_buffers_given_as_moments(far, layout):
    for shape in ((60, 5), (7, 3, 33), (4, 5, 9, 9)):
        call = cases.call(shape, dtype=torch.float32)
        x = cases.LAYOUTS[layout]((call.x.double() + far).float())
        layer = (gb.BatchNorm2d if len(shape) == 4 else gb.BatchNorm1d)(shape[1], momentum=1.0)
        layer(x)
        moments = gb.Moments.given(layer.running_mean, layer.running_var)
        y, _ = gb.batch_norm(x, layer.weight, layer.bias, moments=moments)
        assert torch.equal(layer.eval()(x), y)


def test_a_constant_channel_gives_exactly_beta_where_pytorchs_is_off_by_more_than_one():
    found = numerics.constant()
    assert found["cpu"] == found["reference"] == 0
    assert found["torch"] > 1


def test_bfloat16_stays_within_the_rule():
    found = numerics.bfloat16()
    for backend in ("cpu", "reference"):
        assert all(share <= 1 for share in found[backend].values())


def test_far_outliers_and_gradients_near_the_mean_need_the_wider_units():
    found = numerics.exceptions()
    for result, rows in found.items():
        wider = numerics.WIDER[result]
        for backend in ("cpu", "reference"):
            assert rows[backend][wider] <= numerics.PROMISED[result]
        assert rows["cpu"][result] > numerics.PROMISED[result], "else the exception is not needed"


@pytest.mark.parametrize("shape", numerics.SHAPES, ids=str)
def test_the_measured_errors_are_errors_against_the_oracle(shape):
    generator = torch.Generator().manual_seed(1)
    x = (numerics.normal(shape, generator) + 1e5).float()
    dy = numerics.normal(shape, generator).float()
    weight, bias = (numerics.normal(shape[1:2], generator).float() for _ in range(2))
    true = numerics.truth(numerics.Case(x, weight, bias, dy))
    operands = [cases.numpy(t) for t in (x, weight, bias)]
    theirs = oracle.backward(cases.numpy(dy), *operands)
    exact = (oracle.forward(*operands), theirs.dx, theirs.dweight, theirs.dbias)
    for ours, judge in zip(true, exact, strict=False):
        scale = np.abs(judge).max()
        np.testing.assert_allclose(ours.numpy(), judge, rtol=0, atol=1e-9 * scale)


# --- bounds of the algorithm ---------------------------------------------------------------------

# rows of 496 and 511 put ten values into one lane, the most there can be
LONG = ((8, 3, 496), (4, 2, 511), (2, 3, 512), (3, 2, 513), (64, 5, 49), (2, 2, 5000))
FLAT = ((2, 7), (60, 100), (1000, 17), (777, 3), (4096, 16))


def _values(name, shape, seed):
    return numerics.SITUATIONS[name](shape, torch.Generator().manual_seed(seed)).float()


def _all_inputs(shapes):
    for seed, shape in enumerate(shapes):
        for name in numerics.SITUATIONS:
            yield _values(name, shape, seed)


def _assert_statistics(x, layout, mean_bound, m2_bound):
    _, seen = gb.batch_norm(layout(x), backend="cpu")
    truth = oracle.statistics(cases.numpy(x))
    std = np.sqrt(truth.m2 / truth.n)
    slack = 2.0**-50 * np.abs(truth.mean)  # the mean itself is a float64
    assert (np.abs(seen.mean.numpy() - truth.mean) <= mean_bound * U * std + slack).all()
    assert (np.abs(seen.m2.numpy() - truth.m2) <= m2_bound * U * truth.m2).all()


def test_statistics_of_planes_obey_their_bound():
    lined_up = [numerics.lined_up(sign)[1] for sign in (1, -1)]
    for x in [*_all_inputs(LONG), *lined_up]:
        _assert_statistics(x, cases.LAYOUTS["contiguous"], 11.2, 50.4)


def test_statistics_of_pixels_obey_their_bound():
    lined_up = [numerics.lined_up(sign)[0] for sign in (1, -1)]
    for x in [*_all_inputs((*FLAT, *LONG)), *lined_up]:
        _assert_statistics(x, cases.LAYOUTS["channels_last"], 8.3, 36.6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(40, 16), (9, 16, 4, 11), (2, 16, 30, 30)], ids=str)
def test_a_channel_whose_near_is_far_off_is_summed_in_float64(shape, layout):
    x = numerics.normal(shape, torch.Generator().manual_seed(0))
    count, positions = x.numel() // 16, math.prod(shape[2:])
    # every value that is looked at to find one near the mean
    if layout == "channels_last" or len(shape) == 2:
        rows = x.movedim(1, -1).reshape(count, 16)
        rows[[i * count // 16 for i in range(16)]] += 300
        x = rows.view(shape[0], *shape[2:], 16).movedim(-1, 1)
    else:
        middle = positions // 2 - 8
        x.flatten(2)[:, :, middle : middle + 16] += 300
    x = cases.LAYOUTS[layout](x.float())
    _, seen = gb.batch_norm(x, backend="cpu")
    truth = oracle.statistics(cases.numpy(x))
    np.testing.assert_allclose(seen.mean.numpy(), truth.mean, rtol=1e-14)
    np.testing.assert_allclose(seen.m2.numpy(), truth.m2, rtol=1e-13)


@pytest.mark.parametrize("act", [None, ("leaky_relu", 0.3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_sum_of_the_gradient_obeys_its_bound(layout, act):
    bound = {"contiguous": 12, "channels_last": 8}[layout] + (2 if act else 0)
    for seed, shape in enumerate(LONG):
        for kind in ("mean 1e3 std", "log-normal, σ = 3", "sorted"):
            call = cases.call(shape, dtype=torch.float32, layout=layout, seed=seed)
            dy = cases.LAYOUTS[layout](_values(kind, shape, seed))
            _, grads, _ = cases.run(call._replace(dy=dy), act=act, backend="cpu")
            operands = [cases.numpy(t) for t in call[:3]]
            truth = oracle.backward(cases.numpy(dy), *operands, act=act)
            size = np.abs(truth.dresidual).sum((0, 2))
            error = np.abs(cases.numpy(grads["dbias"]) - truth.dbias)
            assert (error <= bound * U * size).all()


def test_the_sum_of_a_gradient_whose_roundings_line_up_obeys_its_bound_and_comes_near_it():
    for sign in (1, -1):
        for dy, bound in zip(numerics.lined_up(sign), (8, 12), strict=True):
            x = numerics.normal(tuple(dy.shape), torch.Generator().manual_seed(0)).float()
            one, zero = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
            case = numerics.Case(x, one, zero, dy)
            found = numerics.figures(numerics.run("cpu", case), numerics.truth(case), case)
            assert 5 * U <= found["dβ"] <= bound * U


# --- cancellation --------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
@pytest.mark.parametrize("count", [2, 3])
def test_two_or_three_values_for_each_channel_keep_the_figures(count, eps):
    """x̂ is ±1 and dx is 0 or nearly so: what is left are roundings of terms that cancel."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, 2000)
    for far in (0.0, 1.0, 1e3, 1e6):
        size = 10 ** (12 * torch.rand(2000, generator=generator, dtype=torch.float64) - 6)
        x = (numerics.normal(shape, generator) + far) * size
        weight, bias = (numerics.normal(shape[1:], generator).float() for _ in range(2))
        dy = numerics.normal(shape, generator).float()
        case = numerics.Case(x.float(), weight, bias, dy, eps)
        figures = numerics.figures(numerics.run("cpu", case), numerics.truth(case), case)
        for result in ("y", "dx", "dγ near", "dβ"):
            assert figures[result] <= numerics.PROMISED[result[:2]], (result, far)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("far", [0.0, 1e6])
def test_a_bias_or_residual_that_cancels_is_measured_against_its_terms(far, layout):
    for shape in ((60, 5), (7, 3, 33), (4, 5, 9, 9)):
        call = cases.call(shape, dtype=torch.float32, residual=True)
        x = (call.x.double() + far).float()
        y, _ = gb.batch_norm(x, call.weight, call.bias)
        arranged = {"x": x, "residual": -y, "dy": call.dy}
        arranged = {k: cases.LAYOUTS[layout](v) for k, v in arranged.items()}
        call = call._replace(**arranged)
        z, grads, moments = cases.run(call, backend="cpu")
        assert z.abs().max() <= 1e-6 * (1 + y.abs().max())
        bounds.assert_kept(call, z, grads, moments)


# --- the document --------------------------------------------------------------------------------


def test_the_tables_of_the_document_are_those_that_were_measured():
    """After ``python -m benchmarks numerics``, put what it prints into the document."""
    for table in numerics.show(json.loads(RESULTS.read_text())).split("\n\n"):
        assert table in DOCUMENT


def test_every_test_that_the_document_names_exists():
    sources = {p.name: p.read_text() for p in (ROOT / "tests").glob("test_*.py")}
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", DOCUMENT)
    assert len(named) > 10
    for file, name in named:
        assert f"def {name}(" in sources[file], f"{file} has no {name}"


@pytest.mark.parametrize("shape", [(64, 8), (8, 5, 7, 7)])
def test_denormal_results_in_bfloat16_err_by_less_than_the_smallest_normal_number(shape):
    """An instruction of some processors that rounds to bfloat16 gives 0 for them."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight, bias = torch.full((shape[1],), 1e-38), torch.zeros(shape[1])
    y, _ = gb.batch_norm(x, weight, bias, backend="cpu")
    wide, _ = gb.batch_norm(x.float(), weight, bias, backend="reference")
    off = (y.float() - wide).abs()
    smallest = torch.finfo(torch.bfloat16).smallest_normal
    assert (off <= torch.where(wide.abs() < smallest, smallest, wide.abs() * 2.0**-8)).all()
    assert (wide.abs() < smallest).any()
    assert (y != 0).any()
