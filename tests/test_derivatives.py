"""Derivatives of ``gb.batch_norm``: of every order, in both directions, under every transform."""

import cases
import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import gammabeta as gb

# PyTorch compiles decompositions of its own at the first use of forward mode.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)

# Without a kink, and written out, so that autograd can differentiate them for ever.
SMOOTH = {
    None: lambda u: u,
    "sigmoid": lambda u: 1 / (1 + torch.exp(-u)),
    "tanh": lambda u: 2 / (1 + torch.exp(-2 * u)) - 1,
    "softplus": lambda u: torch.log1p(torch.exp(u)),
    "silu": lambda u: u / (1 + torch.exp(-u)),
    "gelu": lambda u: 0.5 * u * (1 + torch.erf(u / 2**0.5)),
    ("gelu", "tanh"): lambda u: (
        0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
    ),
}
KINKED = {
    "relu": torch.relu,
    ("leaky_relu", 0.2): lambda u: F.leaky_relu(u, 0.2),
}
PLAIN = SMOOTH | KINKED


def plain(x, weight=None, bias=None, *, eps=1e-5, act=None, moments=None):
    """The formula in ordinary differentiable operations."""
    wide = (1, -1) + (1,) * (x.dim() - 2)
    axes = [0, *range(2, x.dim())]
    if moments is None:
        mean = x.mean(axes, keepdim=True)
        var = (x - mean).square().mean(axes, keepdim=True)
    else:
        mean, var = moments.mean.view(wide), moments.var().view(wide)
    y = (x - mean) / torch.sqrt(var + eps)
    y = y if weight is None else y * weight.view(wide)
    y = y if bias is None else y + bias.view(wide)
    return PLAIN[act](y)


def _call(shape=(4, 2, 2), **options):
    """Arguments whose values before the activation keep clear of its kink at 0."""
    for seed in range(100):
        call = cases.call(shape, seed=seed, **options)
        u = plain(call.x, call.weight, call.bias)
        if (u.abs() > 0.02).all() and (call.residual is None):
            return call
        if call.residual is not None and ((u + call.residual).abs() > 0.02).all():
            return call
    raise AssertionError("no seed keeps clear of the kink")


def _given(channels):
    mean = torch.linspace(-0.5, 0.5, channels, dtype=torch.float64)
    return gb.Moments.given(mean, mean + 1)


def _assert_near(ours, theirs, what="", share=1e-9):
    """float32 as near to the plain formula in float64 as its digits allow, relative to the largest
    value of a tensor, since all are sums; ``share`` for float64.
    """
    share = share if ours.dtype == torch.float64 else 2e-5
    atol = share * max(theirs.abs().max().item(), 1e-3)
    torch.testing.assert_close(
        ours.double(), theirs.double(), rtol=share, atol=atol, msg=lambda m: f"{what}: {m}"
    )


def _double(value):
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


VARIANTS = {
    "affine": {},
    "plain": {"affine": False},
    "residual": {"residual": True},
    "masked": {"mask": True},
    "inference": {"given": True},
}


# gradcheck takes float64 only; the test after next compares the kernels with what passes this one
@pytest.mark.parametrize("backend", cases.DOUBLE)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("act", PLAIN, ids=str)
def test_first_and_second_derivatives_are_those_of_the_function(act, variant, backend):
    options = dict(VARIANTS[variant])
    moments = _given(2) if options.pop("given", False) else None
    call = _call(**options)
    cases.require(backend, call.x, mask=call.mask)

    def function(x, weight, bias, residual):
        return gb.batch_norm(
            x, weight, bias, residual=residual, mask=call.mask,
            moments=moments, eps=1e-3, act=act, backend=backend,
        )[0]  # fmt: skip

    operands = tuple(
        None if t is None else t.clone().requires_grad_()
        for t in (call.x, call.weight, call.bias, call.residual)
    )
    assert gradcheck(function, operands, check_batched_grad=True)
    assert gradgradcheck(function, operands, check_batched_grad=True)


@pytest.mark.parametrize("backend", cases.DOUBLE)
@pytest.mark.parametrize("act", [None, "relu", "silu"], ids=str)
@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
def test_forward_mode_is_the_derivative_too(act, inference, backend):
    call = _call()
    moments = _given(2) if inference else None
    operands = tuple(t.requires_grad_() for t in (call.x, call.weight, call.bias))

    def function(x, weight, bias):
        return gb.batch_norm(x, weight, bias, moments=moments, act=act, backend=backend)[0]

    assert gradcheck(function, operands, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, operands, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize(
    ("backend", "layout"), [("cpu", "contiguous"), ("cpu", "channels_last"), ("auto", "sliced")]
)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("act", PLAIN, ids=str)
def test_two_derivatives_of_float32_are_those_of_the_reference_in_float64(
    act, variant, backend, layout
):
    options = dict(VARIANTS[variant])
    moments = _given(2) if options.pop("given", False) else None
    call = _call((4, 2, 2, 3), dtype=torch.float32, layout=layout, **options)
    cases.require(backend, call.x, mask=call.mask)
    probes = torch.randn_like(call.x, dtype=torch.float64)

    def two(call, backend):
        operands = cases.leaves(call)
        y, _ = gb.batch_norm(
            operands["x"], operands.get("weight"), operands.get("bias"),
            residual=operands.get("residual"), mask=call.mask,
            moments=moments, eps=1e-3, act=act, backend=backend,
        )  # fmt: skip
        dy = call.dy.clone().requires_grad_()
        leaves = list(operands.values())
        first = grad(y, leaves, dy, create_graph=True)
        scalar = sum((g.double().pow(2) * (probes if g.dim() > 1 else 1)).sum() for g in first)
        second = grad(scalar, (*leaves, dy), materialize_grads=True)
        names = ["y", *(f"d{k}" for k in operands), *(f"d²{k}" for k in (*operands, "dy"))]
        return zip(names, (y, *first, *second), strict=True)

    theirs = two(cases.Call(*map(_double, call)), "reference")
    for (name, a), (_, b) in zip(two(call, backend), theirs, strict=True):
        _assert_near(a, b, name)


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("act", SMOOTH, ids=str)
def test_derivatives_up_to_the_third_are_those_of_the_plain_formula(act, backend):
    # PyTorch's own op is silently wrong from the third on: its second holds the statistics fixed.
    call = _call((3, 2, 2), dtype=cases.dtype(backend))
    cases.require(backend, call.x)
    probes = [torch.randn_like(call.x) for _ in range(3)]

    def towers(function, call):
        x = call.x.clone().requires_grad_()
        weight = call.weight.clone().requires_grad_()
        scalar = (function(x, weight, call.bias).pow(2) * probes[0]).sum()
        found = []
        for probe in (*probes[1:], None):
            dx, dweight = grad(scalar, (x, weight), create_graph=True)
            found += [dx, dweight]
            if probe is not None:
                scalar = (dx * probe).sum() + dweight.pow(3).sum()
        return found

    ours = towers(lambda *a: gb.batch_norm(*a, eps=1e-2, act=act, backend=backend)[0], call)
    theirs = towers(lambda *a: plain(*a, eps=1e-2, act=act), cases.Call(*map(_double, call)))
    for a, b in zip(ours, theirs, strict=True):
        _assert_near(a, b)


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("act", PLAIN, ids=str)
def test_a_gradient_penalty_has_the_gradient_of_the_plain_formula(act, backend):
    call = _call((5, 3, 4), dtype=cases.dtype(backend))
    cases.require(backend, call.x)

    def penalty(function, call):
        x, weight = call.x.clone().requires_grad_(), call.weight.clone().requires_grad_()
        (dx,) = grad((function(x, weight, call.bias) * call.dy).sum(), x, create_graph=True)
        return grad(dx.square().sum(), (x, weight))

    ours = penalty(lambda *a: gb.batch_norm(*a, act=act, backend=backend)[0], call)
    theirs = penalty(lambda *a: plain(*a, act=act), cases.Call(*map(_double, call)))
    for a, b in zip(ours, theirs, strict=True):
        _assert_near(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("act", PLAIN, ids=str)
def test_what_lies_behind_the_mask_leaks_into_no_derivative(act, garbage, dtype):
    call = cases.call((4, 3, 5), mask=True, residual=True, dtype=dtype)

    def derivatives(x, residual):
        x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()

        def function(x, residual):
            return gb.batch_norm(x, call.weight, residual=residual, mask=call.mask, act=act)[0]

        first = grad((function(x, residual) * call.dy).sum(), (x, residual), create_graph=True)
        yield from first
        penalty = sum(g.square().sum() for g in first)
        yield from grad(penalty, (x, residual), materialize_grads=True)
        yield from torch.func.grad(lambda *a: function(*a).square().sum(), (0, 1))(x, residual)
        tangents = (torch.ones_like(x), torch.ones_like(residual))
        yield torch.func.jvp(function, (x, residual), tangents)[1]

    spoiled = [t.clone() for t in (call.x, call.residual)]
    for t in spoiled:
        t.movedim(1, -1)[~call.mask] = garbage
    clean = derivatives(call.x, call.residual)
    for ours, theirs in zip(derivatives(*spoiled), clean, strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.movedim(1, -1)[~call.mask].any()


def test_eps_zero_and_a_constant_channel_have_zero_derivatives_of_every_kind():
    call = cases.call((4, 3, 5))
    x = call.x.clone()
    x[:, 1] = 100.1
    x.requires_grad_()

    def loss(x):
        return (gb.batch_norm(x, call.weight, eps=0.0, act="silu")[0] * call.dy).sum()

    (first,) = grad(loss(x), x, create_graph=True)
    (second,) = grad(first.square().sum(), x)
    for value in (first, second, torch.func.grad(loss)(x), torch.func.hessian(loss)(x)[:, 1]):
        assert value.isfinite().all()
    assert not first[:, 1].any()
    assert not second[:, 1].any()
    assert not torch.func.grad(loss)(x)[:, 1].any()
    assert not torch.func.hessian(loss)(x)[:, 1].any()


# --- torch.func ----------------------------------------------------------------------------------


def _loss(norm, dy):
    return lambda x, weight, bias: (norm(x, weight, bias) * dy).sum()


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("act", [None, "relu", "gelu"], ids=str)
@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
def test_every_transform_of_torch_func_agrees_with_the_plain_formula(inference, act, backend):
    call = _call((4, 3, 2), dtype=cases.dtype(backend))
    cases.require(backend, call.x)
    more = [cases.call((4, 3, 2), seed=seed, dtype=call.x.dtype).x for seed in range(5, 8)]
    moments = _given(3) if inference else None
    tangents = tuple(torch.randn_like(t) for t in (call.x, call.weight, call.bias))
    func = torch.func

    def results(norm, change):
        dy, batches = change(call.dy), change(torch.stack(more))
        operands = tuple(change(t) for t in (call.x, call.weight, call.bias))
        loss = _loss(norm, dy)
        shared = (0, None, None)
        yield "grad", func.grad(loss, argnums=(0, 1, 2))(*operands)
        yield "vmap", func.vmap(norm, in_dims=shared)(batches, *operands[1:])
        yield (
            "vmap, inner axis",
            func.vmap(norm, in_dims=(1, None, None))(batches.transpose(0, 1), *operands[1:]),
        )
        yield (
            "vmap of grad",
            func.vmap(func.grad(loss, argnums=(0, 1)), in_dims=shared)(batches, *operands[1:]),
        )
        yield "jvp", func.jvp(norm, operands, tuple(map(change, tangents)))
        yield "vjp", func.vjp(norm, *operands)[1](dy)
        yield "jacrev", func.jacrev(norm)(*operands)
        yield "jacfwd", func.jacfwd(norm)(*operands)
        yield "hessian", func.hessian(loss, argnums=(0, 1))(*operands)

    def ours(x, weight, bias):
        return gb.batch_norm(x, weight, bias, moments=moments, act=act, backend=backend)[0]

    def theirs(x, weight, bias):
        return plain(x, weight, bias, moments=moments, act=act)

    found, truth = results(ours, lambda t: t), results(theirs, _double)
    for (name, a), (_, b) in zip(found, truth, strict=True):
        for one, other in zip(tree_leaves(a), tree_leaves(b), strict=True):
            _assert_near(one, other, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_vmap_takes_a_mask_and_moments_for_each_batch(dtype):
    calls = [
        cases.call((4, 3, 2), mask=True, residual=True, seed=seed, dtype=dtype) for seed in range(3)
    ]
    xs, masks, residuals = (
        torch.stack([getattr(c, k) for c in calls]) for k in ("x", "mask", "residual")
    )

    def function(x, mask, residual):
        return gb.batch_norm(x, mask=mask, residual=residual, act="silu")

    y, moments = torch.func.vmap(function)(xs, masks, residuals)
    for i in range(3):
        one, seen = function(xs[i], masks[i], residuals[i])
        _assert_near(y[i], one, "y", share=1e-12)
        for a, b in zip(moments, seen, strict=True):
            _assert_near(a[i].to(dtype), b, "moments", share=1e-12)


def test_per_sample_gradients_of_an_inference_pass():
    call = cases.call((5, 3, 4))
    moments = _given(3)

    def loss(weight, x):
        return gb.batch_norm(x[None], weight, moments=moments, act="tanh")[0].sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(call.weight, call.x)
    for i in range(5):
        torch.testing.assert_close(got[i], torch.func.grad(loss)(call.weight, call.x[i]))
