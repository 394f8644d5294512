"""The mergeable statistics: what they hold, and that merging equals one pass."""

import itertools
import math

import cases
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gammabeta as gb


def _pieces(x, cuts):
    edges = [0, *sorted(cuts), len(x)]
    return [x[a:b] for a, b in itertools.pairwise(edges)]


def _assert_equal_to_one_pass(moments, x, tolerance=1e-12):
    truth = oracle.statistics(x.numpy())
    scale = np.abs(x.double().numpy()).max(initial=0.0)
    assert moments.n.tolist() == pytest.approx(truth.n, abs=0)
    np.testing.assert_allclose(moments.mean.numpy(), truth.mean, rtol=tolerance, atol=1e-12 * scale)
    np.testing.assert_allclose(moments.m2.numpy(), truth.m2, rtol=tolerance, atol=1e-300)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_moments_of_a_batch_agree_with_the_oracle(shape, layout, dtype):
    x = cases.call(shape, layout=layout, dtype=dtype).x
    moments = gb.Moments.of(x)
    truth = oracle.statistics(cases.numpy(x))
    # The sums are float64 whatever x is, so only the rounding of the input itself is allowed.
    np.testing.assert_allclose(moments.mean.numpy(), truth.mean, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(moments.m2.numpy(), truth.m2, rtol=1e-12)
    assert moments.n.item() == truth.n


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_masked_values_do_not_enter_the_moments(shape):
    call = cases.call(shape, mask=True)
    x = call.x.clone()
    x.movedim(1, -1)[~call.mask] = math.nan
    moments = gb.Moments.of(x, call.mask)
    truth = oracle.statistics(cases.numpy(x), cases.numpy(call.mask))
    assert moments.n.shape == (shape[1],)
    assert moments.n.tolist() == [truth.n] * shape[1]
    np.testing.assert_allclose(moments.mean.numpy(), truth.mean, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(moments.m2.numpy(), truth.m2, rtol=1e-12, atol=1e-15)


def test_a_mask_broadcasts_over_positions():
    x = cases.call((3, 2, 4, 5)).x
    samples = torch.tensor([True, False, True])[:, None, None]
    columns = torch.tensor([True, True, False, True, False])
    for narrow in (samples, columns, samples & columns):
        wide = narrow.expand(3, 4, 5)
        for ours, theirs in zip(gb.Moments.of(x, narrow), gb.Moments.of(x, wide), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
def test_moments_are_detached_float64_vectors(mask):
    call = cases.call((4, 5, 3), dtype=torch.float32, mask=mask)
    moments = gb.Moments.of(call.x.requires_grad_(), call.mask)
    assert [field.dtype for field in moments] == [torch.float64] * 3
    assert not any(field.requires_grad for field in moments)
    assert moments.n.shape == ((5,) if mask else ())
    assert moments.mean.shape == moments.m2.shape == (5,)


def test_var_and_unbiased_are_m2_over_n_and_over_n_minus_one():
    # 1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14
    moments = gb.Moments.of(torch.tensor([[1.0], [2.0], [3.0], [6.0]]))
    assert [moments.n.item(), moments.mean.item(), moments.m2.item()] == [4, 3, 14]
    assert moments.var().item() == 14 / 4
    assert moments.unbiased().item() == 14 / 3


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_values_have_no_unbiased_variance(n):
    moments = gb.Moments.of(torch.full((n, 3), 7.0))
    assert moments.unbiased().isnan().all()
    assert moments.m2.tolist() == [0.0] * 3


def test_given_moments_return_what_was_given():
    mean, var = torch.tensor([1.0, -2.0]), torch.tensor([0.25, 9.0])
    moments = gb.Moments.given(mean, var)
    assert moments.mean.tolist() == [1.0, -2.0]
    assert moments.var().tolist() == [0.25, 9.0]
    assert [field.dtype for field in moments] == [torch.float64] * 3


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    rows=st.integers(0, 40),
    channels=st.integers(1, 3),
    offset=st.sampled_from([0.0, 1.0, -30.0, 300.0]),
    seed=st.integers(0, 2**16),
)
def test_merging_any_split_in_any_order_equals_one_pass(data, rows, channels, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator, dtype=torch.float64) + offset
    # Cuts may coincide: empty parts and single rows are drawn all the time.
    cuts = data.draw(st.lists(st.integers(0, rows), max_size=6))
    parts = data.draw(st.permutations([gb.Moments.of(piece) for piece in _pieces(x, cuts)]))
    # Any tree of merges, not only from left to right.
    while len(parts) > 1:
        i = data.draw(st.integers(0, len(parts) - 2))
        parts[i : i + 2] = [parts[i].merge(parts[i + 1])]
    _assert_equal_to_one_pass(parts[0], x)


def test_an_empty_part_is_the_identity_of_merge():
    some = gb.Moments.of(cases.call((5, 3)).x)
    empty = gb.Moments.of(torch.empty(0, 3))
    for merged in (some.merge(empty), empty.merge(some)):
        for ours, theirs in zip(merged, some, strict=True):
            assert torch.equal(ours, theirs)
    nothing = empty.merge(empty)
    assert [nothing.n.item(), nothing.mean.tolist(), nothing.m2.tolist()] == [0, [0] * 3, [0] * 3]


def test_a_wholly_masked_part_is_the_identity_of_merge():
    call = cases.call((5, 3))
    some, none = gb.Moments.of(call.x), gb.Moments.of(call.x, torch.zeros(5, dtype=torch.bool))
    merged = some.merge(none)
    assert merged.n.tolist() == [5.0] * 3
    assert torch.equal(merged.mean, some.mean)
    assert torch.equal(merged.m2, some.m2)


def test_single_values_merge_into_the_moments_of_them_all():
    x = cases.call((17, 4)).x
    merged = gb.Moments.of(x[:1])
    for row in x[1:]:
        merged = merged.merge(gb.Moments.of(row[None]))
    _assert_equal_to_one_pass(merged, x)


def test_masked_and_whole_parts_merge():
    call = cases.call((6, 3, 5), mask=True)
    other = cases.call((4, 3, 5), seed=1).x
    merged = gb.Moments.of(call.x, call.mask).merge(gb.Moments.of(other))
    valid = call.x.movedim(1, -1)[call.mask]
    rows = torch.cat([valid, other.movedim(1, -1).reshape(-1, 3)])
    truth = oracle.statistics(rows.numpy())
    assert merged.n.tolist() == [truth.n] * 3
    np.testing.assert_allclose(merged.mean.numpy(), truth.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.m2.numpy(), truth.m2, rtol=1e-12)
