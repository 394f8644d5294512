"""The methods beside batch normalization: numbers, gradients, statistics, and the laws of each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import oracle_methods as oracle
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import gammabeta as gb

F64 = torch.float64


class Method(NamedTuple):
    """A layer by dimensions, its options here, and its oracle (x, γ, β, dy, layer) -> Result."""

    classes: dict[str, Any]
    options: dict[str, Any]
    oracle: Callable[..., oracle.Result]


def _renorm(x, weight, bias, dy, layer):
    state = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    limits = {"r_max": layer.r_max, "d_max": layer.d_max}
    return oracle.renorm(x, weight, bias, dy, *state, **limits, eps=layer._eps)


def _ghost(x, weight, bias, dy, layer):
    return oracle.ghost(x, weight, bias, dy, size=layer.virtual_batch_size, eps=layer._eps)


def _whiten(x, weight, bias, dy, layer):
    steps = getattr(layer, "iterations", None)
    return oracle.whiten(x, weight, bias, dy, group=layer.group_size, steps=steps, eps=layer._eps)


RENORM = {"1d": gb.BatchRenorm1d, "2d": gb.BatchRenorm2d, "3d": gb.BatchRenorm3d}
GHOST = {"1d": gb.GhostBatchNorm1d, "2d": gb.GhostBatchNorm2d, "3d": gb.GhostBatchNorm3d}
ZCA = {"1d": gb.DecorrelatedBatchNorm1d, "2d": gb.DecorrelatedBatchNorm2d}
NEWTON = {"1d": gb.IterNorm1d, "2d": gb.IterNorm2d}
METHODS = {
    "renorm": Method(RENORM, {"r_max": 1.3, "d_max": 0.4}, _renorm),
    "renorm within its limits": Method(RENORM, {"r_max": 100.0, "d_max": 100.0}, _renorm),
    "ghost": Method(GHOST, {"virtual_batch_size": 3}, _ghost),
    "ghost larger than the batch": Method(GHOST, {"virtual_batch_size": 64}, _ghost),
    "zca": Method(ZCA, {"group_size": 2}, _whiten),
    "zca, one group": Method(ZCA, {}, _whiten),
    "newton": Method(NEWTON, {"group_size": 3}, _whiten),
    "newton, 7 steps": Method(NEWTON, {"iterations": 7}, _whiten),
}
# 8 samples: two ghosts of 3 and one of 2; 6 channels: whole groups of 2, 3 and 6
SHAPES = {"1d": [(8, 6), (8, 6, 5)], "2d": [(8, 6, 3, 4)], "3d": [(8, 6, 2, 3, 2)]}
CASES = [
    pytest.param(name, kind, shape, id=f"{name}-{'x'.join(map(str, shape))}")
    for name, method in METHODS.items()
    for kind in method.classes
    for shape in SHAPES[kind]
]


def data(shape, seed=0, dtype=F64):
    """Channels that differ in mean and scale, and are correlated."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=F64)
    x = x + 0.7 * x.roll(1, 1)
    per_channel = torch.linspace(0.5, 2, shape[1], dtype=F64)
    per_channel = per_channel.view(1, -1, *[1] * (len(shape) - 2))
    return (x * per_channel + 0.4 * per_channel).to(dtype)


def build(name, kind, channels=6, **more):
    """A layer with γ and β of its own and statistics that are not those of a new layer."""
    method = METHODS[name]
    layer = method.classes[kind](channels, **{"dtype": F64, **method.options, **more})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))
    return layer


def arrays(*tensors):
    return [t.detach().double().numpy() for t in tensors]


def gradients(layer, x, dy, **forward):
    x = x.detach().clone().requires_grad_()
    y = layer(x, **forward)
    return y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))


def assert_near(got, expected, tolerance):
    expected = torch.as_tensor(expected)
    scale = expected.abs().max().clamp(min=1)
    assert ((got.double() - expected).abs().max() / scale).item() < tolerance


# --- the oracle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ghost", "zca", "newton", "newton, 7 steps"])
def test_the_oracles_gradients_are_those_of_its_outputs(name):
    layer = build(name, "1d")
    x, dy, weight, bias = arrays(data((8, 6)), data((8, 6), 1), layer.weight, layer.bias)
    own = METHODS[name].oracle
    result = own(x, weight, bias, dy, layer)
    for value, place in ((result.dx, 0), (result.dweight, 1), (result.dbias, 2)):

        def loss(changed, place=place):
            operands = [x, weight, bias]
            operands[place] = changed
            return float((own(*operands, dy, layer).y * dy).sum())

        expected = oracle.numerical_gradient(loss, [x, weight, bias][place])
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind", "shape"), CASES)
def test_outputs_and_gradients_are_the_oracles(name, kind, shape):
    layer = build(name, kind)
    with torch.no_grad():
        layer(data(shape, 3))  # renormalization: towards statistics of another batch
    x, dy = data(shape), data(shape, 1)
    result = METHODS[name].oracle(*arrays(x, layer.weight, layer.bias, dy), layer)
    for got, expected in zip(gradients(layer, x, dy), result, strict=True):
        assert_near(got, expected, 1e-11)


@pytest.mark.parametrize(("name", "kind", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_loses_no_more_than_its_roundings(name, kind, shape, dtype):
    layer = build(name, kind, dtype=dtype)
    x, dy = data(shape, dtype=dtype), data(shape, 1, dtype)
    result = METHODS[name].oracle(*arrays(x, layer.weight, layer.bias, dy), layer)
    y, dx, *rest = gradients(layer, x, dy)
    assert y.dtype == dx.dtype == dtype
    assert {g.dtype for g in rest} == {dtype}
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for got, expected in zip((y, dx, *rest), result, strict=True):
        assert_near(got, expected, tolerance)


@pytest.mark.parametrize(("name", "kind", "shape"), CASES)
def test_evaluation_normalizes_by_the_running_statistics_alone(name, kind, shape):
    layer = build(name, kind)
    for seed in range(3):
        layer(data(shape, seed))
    x = data(shape, 7)
    rows = oracle.columns(x.numpy())
    mean = layer.running_mean.numpy()[:, None]
    if layer.running_var is not None:
        scaled = (rows - mean) / np.sqrt(layer.running_var.numpy()[:, None] + layer._eps)
    else:
        scaled, size = np.empty_like(rows), layer.group_size
        for g, cov in enumerate(layer.running_cov.numpy()):
            part = slice(g * size, (g + 1) * size)
            cov = cov + layer._eps * np.eye(size)
            values, vectors = np.linalg.eigh(cov)
            root = (vectors / np.sqrt(values)) @ vectors.T
            if hasattr(layer, "iterations"):
                root, _ = oracle.newton_root(cov, layer.iterations)
            scaled[part] = root @ (rows - mean)[part]
    weight, bias = (p.detach().numpy()[:, None] for p in layer.parameters())
    expected = oracle.back(weight * scaled + bias, x.shape)
    before = copy.deepcopy(layer.state_dict())
    assert_near(layer.eval()(x), expected, 1e-11)
    assert_near(layer(x[:1]), expected[:1], 1e-11)  # one sample: no restriction
    gb.freeze(layer.train())
    assert_near(layer(x), expected, 1e-11)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("name", ["renorm", "ghost", "zca", "newton"])
def test_masked_values_take_no_part(name):
    x, dy = data((8, 6, 5)), data((8, 6, 5), 1)
    # two valid positions in every sample: the same positions, cut out, are the whole batch
    mask = torch.zeros(8, 5, dtype=torch.bool)
    mask[:, [1, 4]] = True
    cut = build(name, "1d")
    expected, dx, *rest = gradients(cut, x[:, :, [1, 4]], dy[:, :, [1, 4]])
    masked = build(name, "1d")
    x[:, :, 0] = torch.nan
    x[:, :, 2] = torch.inf
    y, dx_masked, *rest_masked = gradients(masked, x, dy, mask=mask)
    assert_near(y[:, :, [1, 4]], expected, 1e-12)
    assert_near(dx_masked[:, :, [1, 4]], dx, 1e-12)
    for part in (y, dx_masked):
        assert part[:, :, [0, 2, 3]].count_nonzero() == 0
    for a, b in zip(rest_masked, rest, strict=True):
        assert_near(a, b, 1e-11)
    for key, value in cut.state_dict().items():
        assert_near(masked.state_dict()[key], value, 1e-12)
    with gb.no_update(masked):
        nothing = gradients(masked, x, dy, mask=torch.zeros(8, 5, dtype=torch.bool))
    assert all(part.count_nonzero() == 0 for part in nothing)


@pytest.mark.parametrize("name", ["ghost", "zca", "zca, one group", "newton"])
def test_derivatives_are_right_twice(name):
    layer = build(name, "1d", 4 if name != "newton" else 6)
    x = data((8, layer.num_features)).requires_grad_()
    weight, bias = (p.detach().clone().requires_grad_() for p in layer.parameters())

    def call(x, weight, bias):
        return gb.functional_call(layer, {"weight": weight, "bias": bias}, x)[0]

    assert gradcheck(call, (x, weight, bias))
    assert gradgradcheck(call, (x, weight, bias))


# --- renormalization -----------------------------------------------------------------------------

PLAIN = {"1d": gb.BatchNorm1d, "2d": gb.BatchNorm2d, "3d": gb.BatchNorm3d}
ALL_SHAPES = [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]


@pytest.mark.parametrize(("kind", "shape"), ALL_SHAPES)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_renorm_at_1_and_0_is_batch_normalization_to_the_bit(kind, shape, dtype):
    ours = build("renorm", kind, r_max=1, d_max=0, momentum=0.3, dtype=dtype)
    plain = PLAIN[kind](6, momentum=0.3, dtype=dtype)
    plain.load_state_dict(ours.state_dict(), strict=True)
    for seed in range(3):
        x, dy = data(shape, seed, dtype), data(shape, 9, dtype)
        for a, b in zip(gradients(ours, x, dy), gradients(plain, x, dy), strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(v, plain.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize(("kind", "shape"), ALL_SHAPES)
def test_renorm_without_limits_is_inference_before_the_update(kind, shape):
    layer = build("renorm", kind, r_max=float("inf"), d_max=float("inf"))
    for seed in range(3):
        x, dy = data(shape, seed), data(shape, 9)
        expected = copy.deepcopy(layer).eval()(x)
        y, dx, *_ = gradients(layer, x, dy)
        assert_near(y, expected.detach(), 1e-12)
        # but not its gradient: the batch's mean and deviation depend on x
        assert (dx.sum((0, *range(2, x.dim()))).abs() < 1e-10).all()
    assert layer.num_batches_tracked == 3


def test_renorm_follows_a_schedule_of_the_batches_it_has_entered():
    seen = []

    def r_max(step: Tensor) -> Tensor:
        seen.append(step.item())
        return 1 + step.clamp(max=2) / 2

    layer = build("renorm", "1d", r_max=r_max, d_max=lambda step: 0.1 * float(step))
    assert "r_max=r_max" in repr(layer)
    for step, (r, d) in enumerate([(1, 0), (1.5, 0.1), (2, 0.2), (2, 0.3)]):
        fixed = build("renorm", "1d", r_max=r, d_max=d)
        fixed.load_state_dict(layer.state_dict())
        x = data((8, 6), step) * 3
        assert_near(layer(x).detach(), fixed(x).detach(), 1e-14)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "wrong", [{"r_max": 0.5}, {"r_max": float("nan")}, {"d_max": -1}, {"r_max": lambda step: 0.5}]
)
def test_renorm_refuses_limits_out_of_range(wrong):
    with pytest.raises(ValueError, match=r"must be at least [01], got"):
        gb.BatchRenorm1d(3, **wrong)(torch.randn(4, 3))


@pytest.mark.parametrize("name", ["r_max", "d_max"])
@pytest.mark.parametrize("wrong", ["3", None, True, [1.0, 2.0], torch.tensor(3.0)])
def test_renorm_refuses_limits_that_are_no_numbers(name, wrong):
    with pytest.raises(TypeError, match=rf"^BatchRenorm1d: {name} must be a number.* got .*Usual"):
        gb.BatchRenorm1d(3, **{name: wrong})


@pytest.mark.parametrize("name", ["r_max", "d_max"])
@pytest.mark.parametrize("wrong", ["3", None])
def test_renorm_refuses_functions_that_give_no_numbers(name, wrong):
    layer = gb.BatchRenorm1d(3, **{name: lambda step: wrong})
    with pytest.raises(TypeError, match=rf"{name} must be a number.* got"):
        layer(torch.randn(4, 3))


def test_renorm_needs_running_statistics():
    with pytest.raises(ValueError, match="track_running_stats=False"):
        gb.BatchRenorm1d(3, track_running_stats=False)


# --- ghosts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shape"), ALL_SHAPES)
@pytest.mark.parametrize("size", [2, 3, 5, 8, 100])
def test_ghosts_commit_the_statistics_of_the_whole_batch_once(kind, shape, size):
    layer, whole = build("ghost", kind, virtual_batch_size=size), PLAIN[kind](6, dtype=F64)
    for seed in range(3):
        layer(data(shape, seed))
        whole(data(shape, seed))
    for buffer, expected in zip(layer.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-12, atol=1e-12)


def test_ghosts_do_not_see_each_other():
    layer = build("ghost", "2d")
    x = data((8, 6, 3, 4))
    y, changed = layer(x), layer(torch.cat([x[:3], x[3:].exp()]))
    assert_near(changed[:3].detach(), y[:3].detach(), 1e-14)
    assert (changed - y)[3:].abs().max() > 0.1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_ghosts_one_by_one_give_what_small_ones_give_at_once(layout, monkeypatch):
    x, dy = (data((8, 6, 3, 4), s).contiguous(memory_format=layout) for s in (0, 1))
    results = []
    for small in (0, 10**9):
        monkeypatch.setattr("gammabeta.layers.ghost._SMALL", small)
        layer = build("ghost", "2d")
        results.append([*gradients(layer, x, dy), *layer.buffers()])
        assert results[-1][0].is_contiguous(memory_format=layout)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_ghost_of_one_value_is_an_error_or_takes_the_running_statistics():
    x = data((7, 6))
    with pytest.raises(ValueError, match=r"in every ghost .* size \(1, 6\).*=3 or leaves"):
        build("ghost", "1d")(x)
    layer = build("ghost", "1d", on_single="running")
    layer(data((9, 6), 4))
    before = copy.deepcopy(layer)
    y = layer(x)
    assert_near(y[6:].detach(), before.eval()(x[6:]).detach(), 1e-14)
    assert_near(y[:6].detach(), before.train()(x[:6]).detach(), 1e-14)
    twice = oracle.running([data((9, 6), 4).numpy(), x.numpy()], 0.1, 6)
    assert_near(layer.running_var, twice.var, 1e-13)
    assert build("ghost", "2d", virtual_batch_size=1)(data((7, 6, 2, 2))).isfinite().all()
    layer.eval()(x)


@pytest.mark.parametrize("wrong", [0, -4, 2.5, None])
def test_a_ghost_has_a_whole_number_of_samples(wrong):
    with pytest.raises(ValueError, match="whole number of samples"):
        gb.GhostBatchNorm1d(3, virtual_batch_size=wrong)


# --- whitening -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shape"), [("1d", (64, 6)), ("2d", (8, 6, 5, 5))])
def test_whitened_groups_have_the_identity_for_covariance(kind, shape):
    exact = ZCA[kind](6, eps=1e-12, group_size=3, affine=False, dtype=F64)(data(shape))
    cov = np.cov(oracle.columns(exact.numpy()), bias=True)
    np.testing.assert_allclose(cov[:3, :3], np.eye(3), atol=1e-8)
    np.testing.assert_allclose(cov[3:, 3:], np.eye(3), atol=1e-8)
    assert np.abs(cov[:3, 3:]).max() > 0.05
    errors = []
    for steps in (1, 3, 5, 12):
        layer = NEWTON[kind](6, eps=1e-12, group_size=3, iterations=steps, affine=False, dtype=F64)
        errors.append((layer(data(shape)) - exact).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-12, 1e-9])
def test_gradients_of_zca_are_exact_for_equal_and_nearly_equal_eigenvalues(gap):
    white = data((32, 4))
    white = gb.DecorrelatedBatchNorm1d(4, eps=1e-14, affine=False, dtype=F64)(white)
    x = white * (1 + gap * torch.arange(4, dtype=F64))
    dy = data((32, 4), 1)
    layer = build("zca, one group", "1d", 4)
    expected = METHODS["zca, one group"].oracle(*arrays(x, layer.weight, layer.bias, dy), layer)
    for got, want in zip(gradients(layer, x, dy), expected, strict=True):
        assert_near(got, want, 1e-13)
    # through the derivatives of eigenvectors digits are lost as the gap closes
    x = x.clone().requires_grad_()
    centered = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centered.T @ centered / 32 + 1e-5 * torch.eye(4, dtype=F64))
    naive = centered @ (vectors * values.rsqrt()) @ vectors.T * layer.weight + layer.bias
    (dx,) = torch.autograd.grad(naive, x, dy)
    error = (dx - torch.as_tensor(expected.dx)).abs().max()
    assert error > 1e-8


def test_a_batch_smaller_than_its_group_has_eps_in_the_directions_it_leaves_out():
    x, dy = data((3, 6)), data((3, 6), 1)
    for name in ("zca, one group", "newton, 7 steps"):
        layer = build(name, "1d", eps=1e-3)
        result = METHODS[name].oracle(*arrays(x, layer.weight, layer.bias, dy), layer)
        for got, expected in zip(gradients(layer, x, dy), result, strict=True):
            assert got.isfinite().all()
            assert_near(got, expected, 1e-9)


def test_rounding_leaves_no_eigenvalue_below_eps():
    line = 1e3 * torch.randn(64, 1) * torch.linspace(1, 2, 6)  # Σ has rank 1
    for make in (gb.DecorrelatedBatchNorm1d, gb.IterNorm1d):
        layer = make(6).train()
        x = line.clone().requires_grad_()
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, torch.randn(64, 6))
        assert y.isfinite().all()
        assert dx.isfinite().all()
        assert y.abs().max() < 20


def test_a_covariance_that_overflows_is_not_passed_off_as_another():
    x = 1e25 * data((8, 6), dtype=torch.float32)
    for make in (gb.DecorrelatedBatchNorm1d, gb.IterNorm1d):
        layer = make(6)
        with pytest.warns(gb.StatisticsWarning):
            assert layer(x).isnan().all()
        assert torch.equal(layer.running_cov[0], torch.eye(6))


def test_whitening_keeps_its_digits_far_from_zero():
    x = (data((512, 6)) * 0.1).float() + 300
    for make in (gb.DecorrelatedBatchNorm1d, gb.IterNorm1d):
        layer = make(6, eps=1e-7)
        exact = copy.deepcopy(layer).double()(x.double())
        assert_near(layer(x).detach(), exact.detach(), 1e-3)  # Σ has a condition of some hundreds
        cov = np.cov(x.double().numpy().T)
        np.testing.assert_allclose(
            layer.running_cov[0].double(), 0.9 * np.eye(6) + 0.1 * cov, rtol=1e-6, atol=1e-7
        )


def test_whitening_is_not_rounded_by_autocast():
    for make in (gb.DecorrelatedBatchNorm1d, gb.IterNorm1d):
        x = data((16, 6), dtype=torch.float32)
        layer = make(6)
        expected = copy.deepcopy(layer)(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("make", [gb.DecorrelatedBatchNorm1d, gb.IterNorm1d])
def test_whitening_refuses_what_it_cannot_do(make):
    with pytest.raises(ValueError, match=r"group_size=4 for 6 features.*1, 2, 3, 6"):
        make(6, group_size=4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make(6, group_size=0)
    with pytest.raises(ValueError, match="eps must be > 0"):
        make(6, eps=0.0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        make(6)(torch.randn(1, 6))
    assert make(3, group_size=64).group_size == 3


def test_iterations_are_a_whole_number():
    with pytest.raises(ValueError, match="iterations must be a whole number"):
        gb.IterNorm1d(3, iterations=-1)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["renorm", "ghost", "zca", "newton"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_an_input_of_whole_numbers_is_refused_by_name(name, mode, dtype):
    layer = build(name, "1d").train(mode)
    before = copy.deepcopy(layer.state_dict())
    wanted = f"^{type(layer).__name__}: expected a floating input, got {dtype}. Use x.float()"
    with pytest.raises(TypeError, match=wanted):
        layer(torch.randint(0, 2, (8, 6)).to(dtype))
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


# --- running statistics --------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("stored", ["unbiased", "biased"])
@pytest.mark.parametrize("name", ["renorm", "ghost", "zca", "newton"])
def test_running_statistics_after_some_batches_are_the_oracles(name, stored, momentum, steps):
    layer = build(name, "1d", momentum=momentum, stored_variance=stored)
    batches = [data((8, 6, 2), seed) for seed in range(steps)]
    for batch in batches:
        layer(batch)
    group = getattr(layer, "group_size", 6)
    plain = [b.numpy() for b in batches]
    expected = oracle.running(plain, momentum, group, unbiased=stored == "unbiased")
    assert_near(layer.running_mean, expected.mean, 1e-13)
    if layer.running_var is None:
        assert_near(layer.running_cov, expected.cov, 1e-13)
    else:
        assert_near(layer.running_var, expected.var, 1e-13)
    assert layer.num_batches_tracked == steps
