"""What a caller of ``gb.batch_norm`` may rely on beside its numbers: purity, formats, errors."""

import math

import cases
import numpy as np
import oracle
import pytest
import torch

import gammabeta as gb

# the same gradient, from a dy that was rounded once on the way
CLOSE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-6, "atol": 1e-6},
}


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_the_moments_returned_are_detached_and_those_of_the_batch(backend):
    call = cases.call((4, 5, 3), dtype=cases.dtype(backend))
    cases.require(backend, call.x)
    _, moments = gb.batch_norm(call.x.requires_grad_(), backend=backend)
    assert not any(field.requires_grad for field in moments)
    truth = oracle.statistics(cases.numpy(call.x))
    rtol = 1e-12 if backend in cases.DOUBLE else 2e-6
    np.testing.assert_allclose(moments.unbiased().numpy(), truth.unbiased, rtol=rtol)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_given_moments_are_handed_back_and_get_no_gradient(backend):
    call = cases.call((4, 3), dtype=cases.dtype(backend))
    cases.require(backend, call.x)
    mean = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    var = torch.ones(3, dtype=torch.float64, requires_grad=True)
    stated = gb.Moments.given(mean, var)
    y, moments = gb.batch_norm(call.x, moments=stated, backend=backend)
    assert all(a is b for a, b in zip(moments, stated, strict=True))
    assert not y.requires_grad


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
def test_no_operand_is_written(mask, backend):
    call = cases.call((4, 5, 3), residual=True, mask=mask, dtype=cases.dtype(backend))
    cases.require(backend, call.x, mask=call.mask)
    before = [None if t is None else t.clone() for t in call]
    for stats in (None, cases.given(5)):
        cases.run(call, backend=backend, act="relu", given=stats)
    for old, new in zip(before, call, strict=True):
        assert old is new is None or torch.equal(old, new)


@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_an_input_changed_after_the_forward_is_an_error_in_the_backward(backend):
    call = cases.call((4, 3, 5), dtype=cases.dtype(backend))
    cases.require(backend, call.x)
    x = call.x.clone()
    y, _ = gb.batch_norm(x, call.weight.requires_grad_(), call.bias, backend=backend)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("act", cases.ACTS, ids=str)
def test_a_result_changed_in_place_gives_the_right_gradient_or_an_error(act, backend):
    call = cases.call((4, 3, 5), dtype=cases.dtype(backend))
    cases.require(backend, call.x)
    _, grads, _ = cases.run(call, act=act, backend=backend)
    leaves = cases.leaves(call)
    y, _ = gb.batch_norm(leaves["x"], leaves["weight"], leaves["bias"], act=act, backend=backend)
    y.mul_(3.0)
    try:
        found = torch.autograd.grad(y, list(leaves.values()), call.dy / 3)
    except RuntimeError as caught:
        error, found = str(caught), None
    if found is None:
        assert "modified by an inplace operation" in error
        return
    for ours, name in zip(found, leaves, strict=True):
        torch.testing.assert_close(ours, grads[f"d{name}"], **CLOSE[call.x.dtype])


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
def test_one_operand_alone_can_require_a_gradient(wanted, backend):
    call = cases.call((4, 3, 5), residual=True, dtype=cases.dtype(backend))
    cases.require(backend, call.x)
    _, grads, _ = cases.run(call, act="gelu", backend=backend)
    leaf = getattr(call, wanted).clone().requires_grad_()
    call = call._replace(**{wanted: leaf})
    y, _ = gb.batch_norm(
        call.x, call.weight, call.bias, residual=call.residual, act="gelu", backend=backend
    )
    (grad,) = torch.autograd.grad(y, leaf, call.dy)
    torch.testing.assert_close(grad, grads[f"d{wanted}"], **CLOSE[call.x.dtype])


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("given", [None, cases.given(3)], ids=["training", "inference"])
def test_the_memory_format_of_the_input_is_kept(given, backend):
    for shape, form in (
        ((2, 3, 4, 5), torch.channels_last),
        ((2, 3, 4, 5, 2), torch.channels_last_3d),
    ):
        x = cases.call(shape, dtype=torch.float32).x.contiguous(memory_format=form)
        cases.require(backend, x)
        moments = None if given is None else gb.Moments.given(*given)
        for operand in (x, x.contiguous()):
            y, _ = gb.batch_norm(operand, moments=moments, act="relu", backend=backend)
            assert y.stride() == operand.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters_take_part_in_float32_and_get_half_gradients(dtype):
    call = cases.call((6, 3, 5), dtype=dtype)
    half = {k: getattr(call, k).to(dtype).requires_grad_() for k in ("weight", "bias")}
    wide = {k: v.detach().float().requires_grad_() for k, v in half.items()}
    y, _ = gb.batch_norm(call.x, half["weight"], half["bias"])
    wide_y, _ = gb.batch_norm(call.x, wide["weight"], wide["bias"])
    assert y.dtype == dtype
    assert torch.equal(y, wide_y)
    grads = torch.autograd.grad(y, list(half.values()), call.dy)
    wide_grads = torch.autograd.grad(wide_y, list(wide.values()), call.dy)
    for grad, wide_grad in zip(grads, wide_grads, strict=True):
        assert grad.dtype == dtype
        assert torch.equal(grad, wide_grad.to(dtype))


# --- errors --------------------------------------------------------------------------------------

X = torch.zeros(4, 3, 5)


@pytest.mark.parametrize(
    ("operands", "settings", "error", "says"),
    [
        ((torch.zeros(4),), {}, ValueError, r"\(N, C\)"),
        ((torch.zeros(4, 3, dtype=torch.int64),), {}, TypeError, "floating"),
        ((X, torch.ones(4)), {}, ValueError, "weight should contain 3 elements"),
        ((X, None, torch.ones(3, 1)), {}, ValueError, "bias should contain 3 elements"),
        ((X,), {"moments": gb.Moments.of(torch.zeros(4, 2))}, ValueError, "3 elements"),
        ((X,), {"eps": -1e-5}, ValueError, "eps"),
        ((X,), {"eps": math.nan}, ValueError, "eps"),
        ((X,), {"act": "rleu"}, ValueError, "'relu'"),
        ((X,), {"act": ("relu", 0.2)}, ValueError, "relu"),
        ((X,), {"act": ("leaky_relu", "tanh")}, ValueError, "leaky_relu"),
        ((X,), {"act": ("gelu", 0.5)}, ValueError, "gelu"),
        ((X,), {"residual": torch.zeros(4, 3)}, ValueError, r"\(4, 3, 5\)"),
        ((X,), {"mask": torch.ones(4, 5)}, TypeError, "bool"),
        ((X,), {"mask": torch.ones(4, 1, 5, dtype=torch.bool)}, ValueError, "channel axis"),
        ((X,), {"mask": torch.ones(3, 5, dtype=torch.bool)}, ValueError, r"\(4, 5\)"),
        ((X,), {"group": 0, "moments": gb.Moments.of(X)}, ValueError, "exclude each other"),
        ((X,), {"backend": "natve"}, ValueError, "'native'"),
    ],
)
def test_a_wrong_argument_is_refused_with_what_came_and_what_to_do(operands, settings, error, says):
    with pytest.raises(error, match=says):
        gb.batch_norm(*operands, **settings)


def test_a_backend_that_cannot_run_says_why_and_names_those_that_can():
    mask = torch.ones(4, 5, dtype=torch.bool)
    found = gb.backends(X.double(), mask=mask)
    assert "float64" in found["cpu"].why_not
    assert found["native"].why_not
    assert found["reference"].why_not is None
    assert [b.name for b in found.values() if b.chosen] == ["reference"]
    with pytest.raises(ValueError, match=r"mask.*reference"):
        gb.batch_norm(X, mask=mask, backend="native")


def test_backends_names_the_promises_that_the_chosen_one_does_not_keep():
    found = gb.backends(X.double())
    assert [b.name for b in found.values() if b.chosen] == ["native"]
    assert any("constant channel" in promise for promise in found["native"].lacks)
    assert found["reference"].lacks == ()
