"""Random calls of the CPU kernels: the numbers that they promise, and the same bits every time.

The suite runs some hundred cases that are the same in every run. All of them, new in every run:

    GAMMABETA_CASES=2500 python -m pytest tests/test_cpu_random.py -k any_call
"""

import itertools
import math
import os

import bounds
import cases
import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gammabeta as gb
from gammabeta.ops import _cpu
from gammabeta.ops._cpu import _compile

pytestmark = pytest.mark.skipif(
    _compile.missing() is not None, reason=f"no CPU kernels: {_compile.missing()}"
)
NAN, INF = math.nan, math.inf
WANTED = int(os.environ.get("GAMMABETA_CASES", "0"))
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 66, 100, 129)
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 15, 16, 17, 31, 33, 49, 63, 64, 65, 130, 511, 513, 1100)
LARGEST = 20_000  # elements


# --- random calls --------------------------------------------------------------------------------


@st.composite
def shapes(draw):
    channels = draw(st.sampled_from(CHANNELS))
    rest, room = [], LARGEST // channels
    for _ in range(draw(st.integers(1, 4))):
        rest.append(draw(st.sampled_from([k for k in LENGTHS if k <= room])))
        room //= rest[-1]
    if math.prod(rest) == 1:
        rest[0] = draw(st.integers(2, 40))
    rest = draw(st.permutations(rest))
    return (rest[0], channels, *rest[1:])


@st.composite
def placements(draw, shape):
    """A function that copies values into memory of some layout, with NaN all around them."""
    kind = draw(st.sampled_from(["contiguous", "channels_last", "any"]))
    axes, steps, offset = list(range(len(shape))), (1,) * len(shape), draw(st.integers(0, 17))
    if kind == "channels_last":
        axes = [0, *axes[2:], 1]
    elif kind == "any":
        axes = draw(st.permutations(axes))
        steps = draw(st.tuples(*[st.integers(1, 2)] * len(shape)))

    def place(values):
        wide = [size * step for size, step in zip(shape, steps, strict=True)]
        memory = torch.full((offset + math.prod(wide) + 16,), NAN, dtype=values.dtype)
        view = memory[offset : offset + math.prod(wide)].view([wide[axis] for axis in axes])
        view = view.permute([axes.index(axis) for axis in range(len(shape))])
        view = view[tuple(slice(None, None, step) for step in steps)]
        return view.copy_(values)

    return place


@st.composite
def values(draw, shape, generator):
    """float64: channels with means up to 1e6 standard deviations, of all scales; outliers, ties."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    per_channel = (1, -1) + (1,) * (len(shape) - 2)
    far = draw(st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e6]))
    scale = 10.0 ** draw(st.sampled_from([-6, -3, -1, 0, 0, 0, 2, 5]))
    kind = draw(st.sampled_from(["normal", "normal", "ties", "outliers", "two", "sorted"]))
    if kind == "ties":
        x = x.mul(2).round()
    elif kind == "outliers":
        x = torch.where(torch.rand(shape, generator=generator) < 0.01, x * 50, x)
    elif kind == "two":
        x = x.sign()
    elif kind == "sorted":
        x = x.sort(0).values
    mean = torch.randn(shape[1], generator=generator, dtype=torch.float64) * far
    return (x + mean.view(per_channel)) * scale


@st.composite
def calls(draw):
    shape = draw(shapes())
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def some(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def placed(value):
        return draw(placements(shape))(value.to(dtype))

    c = shape[1]
    mask = None
    if draw(st.integers(0, 2)) == 0:
        full = shape[:1] + shape[2:]
        spread = draw(st.tuples(*[st.booleans()] * len(full)))
        size = [1 if wide else k for wide, k in zip(spread, full, strict=True)]
        mask = torch.rand(size, generator=generator) < draw(st.sampled_from([0.1, 0.6, 0.95]))
    call = cases.Call(
        x=placed(draw(values(shape, generator))),
        weight=some(c).float() if draw(st.booleans()) else None,
        bias=(some(c) * draw(st.sampled_from([0.1, 1, 100]))).float()
        if draw(st.booleans())
        else None,
        residual=placed(some(*shape)) if draw(st.booleans()) else None,
        mask=mask,
        dy=placed(some(*shape) * draw(st.sampled_from([1e-4, 1.0, 1e3]))),
    )
    stats = None
    if draw(st.integers(0, 3)) == 0:
        _, seen = gb.batch_norm(call.x, backend="reference")
        stats = (seen.mean + some(c) * seen.var().sqrt(), seen.var() * (0.3 + some(c).square()))
        stats = tuple(t.float() for t in stats)
    slope = st.tuples(st.just("leaky_relu"), st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    fused = st.one_of(st.sampled_from([None, "relu", "relu", "leaky_relu"]), slope)
    act = draw(st.one_of(fused, fused, st.sampled_from(cases.ACTS)))
    return call, {"eps": draw(st.sampled_from([1e-5, 1e-3, 1e-12])), "act": act, "given": stats}


def _bits(results):
    y, grads, moments = results
    return [y, *grads.values(), *moments]


def _equal(a, b):
    return all(
        torch.equal(p.nan_to_num(7), q.nan_to_num(7)) and torch.equal(p.isnan(), q.isnan())
        for p, q in zip(_bits(a), _bits(b), strict=True)
    )


@settings(
    deadline=None,
    max_examples=WANTED or 120,
    derandomize=not WANTED,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(case=calls())
def test_any_call_keeps_every_bound_and_gives_the_same_bits_again(case):
    call, options = case
    found = cases.run(call, backend="cpu", **options)
    assert found[0].shape == call.x.shape
    assert found[0].dtype == call.x.dtype
    bounds.assert_kept(call, *found, **options)
    if call.mask is not None:
        gone = ~torch.broadcast_to(call.mask, call.x.shape[:1] + call.x.shape[2:])
        for t in (found[0], found[1]["dx"], found[1].get("dresidual")):
            assert t is None or not t.movedim(1, -1)[gone].any()
    torch.set_num_threads(2)
    assert _equal(found, cases.run(call, backend="cpu", **options))


# --- values at the ends of float32 ---------------------------------------------------------------

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
ODD = ((60, 5), (5, 33), (4, 5, 3), (3, 4, 5, 5), (2, 3, 9, 17))


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("scale", [1e30, 1e19, 1e-15, 1e-19, 1e-30, 1e-38, 1e-41], ids=str)
def test_values_up_to_1e30_and_denormals_give_finite_and_right_results(scale, mask, layout, dtype):
    for shape in ODD:
        call = cases.call(shape, mask=mask, layout=layout)
        call = call._replace(x=(call.x * scale).to(dtype), dy=call.dy.to(dtype))
        call = call._replace(weight=call.weight.float(), bias=call.bias.float())
        for eps in (1e-5, 1e-30):
            found = cases.run(call, eps=eps, act="relu", backend="cpu")
            bounds.assert_kept(call, *found, eps=eps, act="relu")


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("value", [3.0000002, 1.0000002, 100.1, 3.3e38, 1e-40, -7e-39], ids=str)
def test_a_constant_channel_among_others_gives_exactly_beta(value, layout, dtype):
    for shape in ODD:
        for mask in (False, True):
            call = cases.call(shape, dtype=dtype, mask=mask)
            x = call.x.clone()
            x[:, 1] = value
            call = call._replace(x=cases.LAYOUTS[layout](x))
            y, grads, moments = cases.run(call, eps=1e-30, backend="cpu")
            valid = (
                torch.ones(shape[:1] + shape[2:], dtype=bool) if call.mask is None else call.mask
            )
            assert (y[:, 1][valid] == call.bias[1].to(dtype)).all()
            assert moments.m2[1] == 0
            assert moments.mean[1] == x[0, 1].flatten()[0]
            assert grads["dweight"][1] == 0


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3e38], ids=str)
@pytest.mark.parametrize("where", ["x", "dy", "residual"])
def test_what_is_not_finite_stays_in_its_channel(where, bad, layout, dtype):
    for shape in ODD:
        call = cases.call(shape, dtype=dtype, layout=layout, residual=True)
        for act in (None, "relu"):
            clean = cases.run(call, backend="cpu", act=act)
            spoiled = getattr(call, where).clone()
            spoiled[0, 2] = bad
            found = cases.run(call._replace(**{where: spoiled}), backend="cpu", act=act)
            others = [c for c in range(shape[1]) if c != 2]
            for ours, theirs in zip(_bits(found), _bits(clean), strict=True):
                if ours.dim() > 1:
                    assert torch.equal(ours[:, others], theirs[:, others])
                elif ours.dim() == 1:
                    assert torch.equal(ours[others], theirs[others])
            if where == "x" and not math.isfinite(bad):
                assert found[0][:, 2].isnan().any()


# --- the same bits -------------------------------------------------------------------------------

# above the size from which several threads work
MANY = ((64, 1031), (3001, 17), (11003, 3), (8, 3, 40, 40), (31, 17, 13, 11), (4, 70, 11, 13))


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("act", [None, "relu"])
def test_any_number_of_threads_and_any_run_give_the_same_bits(act, mask, layout, dtype):
    for shape in MANY:
        call = cases.call(shape, dtype=dtype, layout=layout, mask=mask, residual=act is not None)
        for stats in (None, cases.given(shape[1], torch.float32)):
            found = []
            for threads in (1, 2, 2, 3):
                torch.set_num_threads(threads)
                found.append(cases.run(call, backend="cpu", act=act, given=stats))
            assert all(_equal(found[0], other) for other in found[1:]), shape
            torch.set_num_threads(1)


@DTYPES
@pytest.mark.parametrize("layout", ["sliced", "offset", "transposed", "inner_slice"])
def test_a_copy_in_other_memory_gives_the_same_bits(layout, dtype):
    for shape in (*ODD, *MANY[3:]):
        call = cases.call(shape, dtype=dtype, residual=True)
        moved = {k: cases.LAYOUTS[layout](getattr(call, k)) for k in ("x", "residual", "dy")}
        for act in (None, "relu", "gelu"):
            plain = cases.run(call, backend="cpu", act=act)
            assert _equal(plain, cases.run(call._replace(**moved), backend="cpu", act=act))


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
def test_the_batchs_own_statistics_given_and_an_output_computed_again_give_the_same_bits(
    mask, layout, dtype
):
    for shape in (*ODD, *MANY):
        call = cases.call(shape, dtype=dtype, layout=layout, mask=mask, residual=True)
        rest = {"residual": call.residual, "mask": call.mask, "backend": "cpu", "act": "relu"}
        y, seen = gb.batch_norm(call.x, call.weight, call.bias, **rest)
        again, _ = gb.batch_norm(call.x, call.weight, call.bias, moments=seen, **rest)
        assert torch.equal(y, again)
        valid = None if mask is False else call.mask.unsqueeze(1)
        alone = _cpu.moments(call.x, valid)
        assert all(torch.equal(a, b) for a, b in zip(alone, seen, strict=True))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
@LAYOUTS
def test_a_gradient_has_the_same_bits_whichever_others_are_wanted(wanted, layout):
    for shape in ODD:
        for act, mask in itertools.product((None, "relu", "gelu"), (False, True)):
            call = cases.call(shape, dtype=torch.float32, layout=layout, residual=True, mask=mask)
            _, grads, _ = cases.run(call, act=act, backend="cpu")
            leaf = getattr(call, wanted).detach().requires_grad_()
            alone = call._replace(**{wanted: leaf})
            y, _ = gb.batch_norm(
                alone.x, alone.weight, alone.bias,
                residual=alone.residual, mask=call.mask, act=act, backend="cpu",
            )  # fmt: skip
            (grad,) = torch.autograd.grad(y, leaf, call.dy)
            assert torch.equal(grad, grads[f"d{wanted}"])


# --- running statistics --------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("stored", ["unbiased", "biased"])
@pytest.mark.parametrize("momentum", cases.MOMENTA, ids=str)
def test_running_statistics_in_float32_agree_with_the_oracle(momentum, stored, layout):
    for shape in ((8, 5), (7, 33, 3), (4, 5, 3, 4)):
        batches = [
            cases.call(shape, dtype=torch.float32, layout=layout, seed=seed).x for seed in range(10)
        ]
        layer = {2: gb.BatchNorm1d, 3: gb.BatchNorm1d, 4: gb.BatchNorm2d}[len(shape)](
            shape[1], momentum=momentum, stored_variance=stored, backend="cpu"
        )
        for batch in batches:
            layer(batch)
        truth = oracle.running([cases.numpy(b) for b in batches], momentum, stored=stored)
        for ours, theirs in ((layer.running_mean, truth.mean), (layer.running_var, truth.var)):
            # ten updates, each rounded three times
            bound = 30 * 2.0**-24 * max(1.0, abs(theirs).max())
            np.testing.assert_allclose(cases.numpy(ours), theirs, rtol=0, atol=bound)
        assert layer.num_batches_tracked == 10
