"""``gb.batch_norm`` against the float64 oracle: values, gradients, accuracy, containment."""

import math

import bounds
import cases
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gammabeta as gb

NAN, INF = math.nan, math.inf


def _oracle_arguments(call):
    keys = ("x", "weight", "bias", "residual", "mask")
    return {key: cases.numpy(getattr(call, key)) for key in keys}


def _truth(call, *, eps=1e-5, act=None, given=None):
    arguments = _oracle_arguments(call)
    settings = {"eps": eps, "act": act, "given": None if given is None else tuple(given)}
    y = oracle.forward(**arguments, **settings)
    return y, oracle.backward(cases.numpy(call.dy), **arguments, **settings)._asdict()


def _assert_close(ours, truth, tolerance, what):
    scale = max(1.0, np.abs(truth).max(initial=0.0))
    ours = cases.numpy(ours)
    assert ours.shape == truth.shape, what
    np.testing.assert_allclose(ours, truth, rtol=0, atol=tolerance * scale, err_msg=what)


def _assert_agrees_with_oracle(call, *, tolerance=1e-11, backend="auto", **settings):
    if settings.get("given") is None:
        cases.require(backend, call.x, mask=call.mask)
    y, grads, moments = cases.run(call, backend=backend, **settings)
    if backend == "cpu":
        bounds.assert_kept(call, y, grads, moments, **settings)
    else:
        _assert_numbers(call, y, grads, moments, tolerance, settings)
    if call.mask is not None:
        invalid = ~call.mask
        for value in (y, grads["dx"], *(grads[k] for k in grads if k == "dresidual")):
            assert not value.movedim(1, -1)[invalid].any(), "exactly 0 where the mask is False"


def _assert_numbers(call, y, grads, moments, tolerance, settings):
    true_y, true_grads = _truth(call, **settings)
    _assert_close(y, true_y, tolerance, "y")
    for name, grad in grads.items():
        _assert_close(grad, true_grads[name], tolerance, name)
    if settings.get("given") is None:
        truth = oracle.statistics(cases.numpy(call.x), cases.numpy(call.mask))
        _assert_close(moments.mean, truth.mean, tolerance, "mean")
        _assert_close(moments.var(), truth.m2 / truth.n, tolerance, "var")
        assert set(moments.n.view(-1).tolist()) == {truth.n}


# --- the oracle itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
@pytest.mark.parametrize("act", cases.ACTS, ids=str)
def test_the_oracles_backward_is_the_gradient_of_its_forward(act, inference):
    call = cases.call((3, 2, 4), residual=True, mask=True)
    arguments = _oracle_arguments(call)
    settings = {"eps": 1e-3, "act": act, "given": None}
    if inference:
        settings["given"] = tuple(v.numpy() for v in cases.given(2))
    dy = cases.numpy(call.dy)
    grads = oracle.backward(dy, **arguments, **settings)._asdict()
    for name in ("x", "weight", "bias", "residual"):

        def loss(value, name=name):
            return float((oracle.forward(**{**arguments, name: value}, **settings) * dy).sum())

        numeric = oracle.numerical_gradient(loss, arguments[name])
        np.testing.assert_allclose(grads[f"d{name}"], numeric, rtol=1e-6, atol=1e-8, err_msg=name)


# --- agreement -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_every_shape_and_layout_agrees_with_the_oracle(shape, layout, backend):
    call = cases.call(shape, layout=layout, dtype=cases.dtype(backend))
    _assert_agrees_with_oracle(call, backend=backend)


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("act", cases.ACTS, ids=str)
def test_every_activation_residual_and_mask_agrees_with_the_oracle(act, residual, mask, backend):
    for shape in cases.FEW:
        call = cases.call(shape, residual=residual, mask=mask, dtype=cases.dtype(backend))
        _assert_agrees_with_oracle(call, act=act, backend=backend)


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("act", cases.ACTS, ids=str)
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
def test_given_moments_are_inference(act, mask, backend):
    for shape in cases.FEW:
        call = cases.call(shape, residual=True, mask=mask, dtype=cases.dtype(backend))
        cases.require(backend, call.x, mask=call.mask)
        given = cases.given(shape[1], call.x.dtype)
        _assert_agrees_with_oracle(call, act=act, backend=backend, given=given)


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("which", ["neither", "weight", "bias"])
def test_an_absent_weight_is_one_and_an_absent_bias_is_zero(which, backend):
    for shape in cases.FEW:
        call = cases.call(shape, dtype=cases.dtype(backend))
        call = call._replace(**{k: None for k in ("weight", "bias") if k != which})
        given = cases.given(shape[1], call.x.dtype)
        _assert_agrees_with_oracle(call, act="silu", backend=backend)
        _assert_agrees_with_oracle(call, act="silu", backend=backend, given=given)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_shape_stride_and_dtype_agrees_with_the_oracle(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=5), "shape"))
    if math.prod(shape) <= shape[1]:
        shape = (shape[0] + 1, *shape[1:])
    order = data.draw(st.permutations(range(len(shape))), "axes from outermost to innermost")
    steps = data.draw(st.tuples(*[st.integers(1, 2)] * len(shape)), "steps")
    offset = data.draw(st.integers(0, 3), "offset")
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]), "dtype")
    call = cases.call(
        shape,
        dtype=dtype,
        affine=data.draw(st.booleans(), "affine"),
        residual=data.draw(st.booleans(), "residual"),
        mask=data.draw(st.booleans(), "mask"),
        seed=data.draw(st.integers(0, 99), "seed"),
    )
    wide = [size * step for size, step in zip(shape, steps, strict=True)]
    memory = torch.full((offset + math.prod(wide),), NAN, dtype=dtype)
    view = memory[offset:].view([wide[axis] for axis in order])
    view = view.permute([order.index(axis) for axis in range(len(shape))])
    view = view[tuple(slice(None, None, step) for step in steps)]
    view.copy_(call.x)
    act = data.draw(st.sampled_from(cases.ACTS), "act")
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    # eps = 0.1 bounds rstd, so that one tolerance fits batches of two nearly equal values
    for backend in ("auto", "reference"):
        moved = call._replace(x=view)
        _assert_agrees_with_oracle(moved, act=act, backend=backend, eps=0.1, tolerance=tolerance)


# --- precision -----------------------------------------------------------------------------------


def _naive(call, act, given):
    """The formula in the input's own precision, differentiated by autograd."""
    leaves = {key: value.to(call.x.dtype) for key, value in cases.leaves(call).items()}
    leaves = {key: value.detach().requires_grad_() for key, value in leaves.items()}
    x, c = leaves["x"], call.x.shape[1]
    per_channel = (1, c) + (1,) * (x.dim() - 2)
    axes = [0, *range(2, x.dim())]
    if given is None:
        mean = x.mean(axes, keepdim=True)
        var = (x - mean).square().mean(axes, keepdim=True)
    else:
        mean, var = (v.to(x.dtype).view(per_channel) for v in given)
    y = (x - mean) / torch.sqrt(var + 1e-5) * leaves["weight"].view(per_channel)
    y = y + leaves["bias"].view(per_channel) + leaves["residual"]
    y = {None: lambda u: u, "relu": torch.relu, "gelu": torch.nn.functional.gelu}[act](y)
    grads = torch.autograd.grad(y, list(leaves.values()), call.dy)
    return y.detach(), {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
@pytest.mark.parametrize("act", [None, "relu", "gelu"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_at_most_twice_as_wrong_as_the_naive_formula(
    dtype, act, inference, backend
):
    for shape in ((60, 10), (4, 5, 30), (3, 4, 9, 9)):
        call = cases.call(shape, dtype=dtype, residual=True, seed=3)
        # weights that the low precision can hold: otherwise the naive formula solves another task
        call = call._replace(weight=call.weight.to(dtype).float(), bias=call.bias.to(dtype).float())
        cases.require(backend, call.x)
        given = cases.given(shape[1], dtype) if inference else None
        y, grads, _ = cases.run(call, backend=backend, act=act, given=given)
        naive_y, naive_grads = _naive(call, act, given)
        true_y, true_grads = _truth(call, act=act, given=given)
        assert y.dtype == dtype
        for name, ours, naive, truth in [
            ("y", y, naive_y, true_y),
            *((k, grads[k], naive_grads[k], true_grads[k]) for k in grads),
        ]:
            error = np.abs(cases.numpy(ours) - truth).max()
            naive_error = np.abs(cases.numpy(naive) - truth).max()
            atol = torch.finfo(dtype).eps * np.abs(truth).max()
            assert error <= 2 * naive_error + atol, (name, shape, error, naive_error)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 5), (7, 3, 33), (8, 4, 14, 14)], ids=str)
def test_a_mean_of_1e5_costs_no_accuracy(shape, layout, backend):
    generator = torch.Generator().manual_seed(0)
    x = 1e5 + torch.randn(shape, generator=generator, dtype=torch.float64)
    x = cases.LAYOUTS[layout](x.float())
    cases.require(backend, x)
    y, _ = gb.batch_norm(x, backend=backend)
    error = np.abs(cases.numpy(y) - oracle.forward(cases.numpy(x))).max()
    assert error <= 2e-6


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", torch.float64),
        ("reference", torch.float32),
        ("reference", torch.bfloat16),
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("value", [100.1, 1e6, -3.3e-5, 0.0, 1e30])
def test_a_constant_channel_gives_exactly_beta(value, layout, backend, dtype):
    for shape in cases.SHAPES:
        call = cases.call(shape, dtype=dtype)
        x = cases.LAYOUTS[layout](torch.full(shape, value, dtype=dtype))
        cases.require(backend, x)
        y, moments = gb.batch_norm(x, call.weight, call.bias, backend=backend)
        beta = call.bias.to(dtype).view((1, -1) + (1,) * (len(shape) - 2)).expand(shape)
        assert torch.equal(y, beta), shape
        assert moments.m2.tolist() == [0.0] * shape[1]
        assert moments.mean.tolist() == [x.flatten()[0].item()] * shape[1]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
def test_eps_zero_and_a_constant_channel_give_beta_and_no_gradient(mask, backend):
    call = cases.call((4, 3, 5), mask=mask)
    x = call.x.clone()
    x[:, 1] = 100.1
    call = call._replace(x=x)
    y, grads, _ = cases.run(call, eps=0.0, backend=backend)
    valid = torch.ones(4, 5, dtype=torch.bool) if call.mask is None else call.mask
    assert (y[:, 1][valid] == call.bias[1]).all()
    assert not grads["dx"][:, 1].any()
    assert grads["dweight"][1] == 0
    _assert_agrees_with_oracle(call, eps=0.0, backend=backend)


# --- containment ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("shape", cases.FEW, ids=str)
def test_a_nan_stays_in_its_channel(shape, bad, backend):
    call = cases.call(shape, dtype=cases.dtype(backend))
    cases.require(backend, call.x)
    clean = cases.run(call, backend=backend, act="relu")
    x = call.x.clone()
    x[1, 2] = bad
    y, grads, moments = cases.run(call._replace(x=x), backend=backend, act="relu")
    others = [c for c in range(shape[1]) if c != 2]
    assert y[:, 2].isnan().any()
    assert torch.equal(y[:, others], clean[0][:, others])
    assert torch.equal(grads["dx"][:, others], clean[1]["dx"][:, others])
    for name in ("dweight", "dbias"):
        assert torch.equal(grads[name][others], clean[1][name][others])
    for ours, theirs in ((moments.mean, clean[2].mean), (moments.m2, clean[2].m2)):
        assert not ours[2].isfinite()
        assert torch.equal(ours[others], theirs[others])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 3e38], ids=str)
@pytest.mark.parametrize("act", cases.ACTS, ids=str)
def test_what_lies_behind_the_mask_never_leaks(act, garbage, inference, backend):
    for shape in cases.FEW:
        call = cases.call(shape, residual=True, mask=True, dtype=torch.float32)
        cases.require(backend, call.x, mask=call.mask)
        given = cases.given(shape[1]) if inference else None
        clean_y, clean_grads, _ = cases.run(call, act=act, backend=backend, given=given)

        def spoiled(value, invalid=~call.mask):
            value = value.clone()
            value.movedim(1, -1)[invalid] = garbage
            return value

        dirty = call._replace(
            x=spoiled(call.x), residual=spoiled(call.residual), dy=spoiled(call.dy)
        )
        y, grads, _ = cases.run(dirty, act=act, backend=backend, given=given)
        assert torch.equal(y, clean_y)
        for name in grads:
            assert torch.equal(grads[name], clean_grads[name]), name
        assert not y.movedim(1, -1)[~call.mask].any()
        assert not grads["dx"].movedim(1, -1)[~call.mask].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("act", ["sigmoid", "relu"])
def test_a_batch_without_a_valid_value_is_all_zeros(act, backend):
    call = cases.call((4, 3, 5), residual=True, dtype=cases.dtype(backend))
    call = call._replace(mask=torch.zeros(4, 5, dtype=torch.bool), x=call.x * NAN)
    cases.require(backend, call.x, mask=call.mask)
    y, grads, moments = cases.run(call, act=act, backend=backend)
    assert not y.any()
    assert not any(grad.any() for grad in grads.values())
    assert moments.n.tolist() == [0.0] * 3


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (2, 3, 0), (0, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(shape, inference):
    call = cases.call((2, 3, 1, 1), residual=True)
    call = call._replace(x=torch.empty(shape), residual=torch.empty(shape), dy=torch.empty(shape))
    y, grads, moments = cases.run(call, act="silu", given=cases.given(3) if inference else None)
    assert y.shape == grads["dx"].shape == shape
    assert grads["dweight"].tolist() == grads["dbias"].tolist() == [0.0] * 3
    if not inference:
        assert moments.n.item() == 0
        assert moments.mean.tolist() == moments.m2.tolist() == [0.0] * 3
