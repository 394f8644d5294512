"""Random calls of the CPU kernels: the numbers that they promise, and the same bits every time.

The suite runs some hundred cases that are the same in every run. All of them, new in every run:

    GAMMABETA_CASES=2500 python -m pytest tests/test_cpu_random.py -k any_call
"""

import math
import os

import bounds
import cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gammabeta as gb
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
    max_examples=WANTED or 250,
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
