"""When a forward pass enters the running statistics: once, merged with others, or never."""

import contextlib
import copy
import warnings

import pytest
import torch
from running import LAYERS, batch, held, network, same
from torch import nn
from torch.utils.checkpoint import checkpoint

import gammabeta as gb

# -- activation checkpointing ---------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_checkpointed_forward_counts_once_where_pytorchs_counts_twice(kind, reentrant):
    ours, theirs, shape = LAYERS[kind]
    layer, twin, plain = ours(3).double(), theirs(3).double(), ours(3).double()
    for _ in range(3):
        x = batch(*shape).requires_grad_()
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        gradient, x.grad = x.grad, None
        plain(x).square().sum().backward()
        torch.testing.assert_close(gradient, x.grad, rtol=1e-12, atol=1e-12)
        checkpoint(twin, x, use_reentrant=reentrant).square().sum().backward()
    same(held(layer), held(plain))
    assert layer.num_batches_tracked == 3
    assert twin.num_batches_tracked == 6
    assert not torch.allclose(twin.running_mean, plain.running_mean, rtol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpointed_forward_counts_once_inside_accumulate_too(reentrant):
    layer, plain = gb.BatchNorm1d(3).double(), gb.BatchNorm1d(3).double()
    x = batch(16, 3).requires_grad_()
    with gb.accumulate(layer):
        for part in x.split(8):
            checkpoint(layer, part, use_reentrant=reentrant).sum().backward()
    plain(x)
    same(held(layer), held(plain), rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_compiled_step_with_checkpointing_counts_once(reentrant, momentum):
    layer, plain = (gb.BatchNorm1d(3, momentum=momentum).double() for _ in range(2))

    def step(x):
        return checkpoint(layer, x, use_reentrant=reentrant).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for count in (1, 2):
        x = batch(8, 3).requires_grad_()
        compiled(x).backward()
        plain(x)
        assert layer.num_batches_tracked == count
    same(held(layer), held(plain), rtol=1e-12)


def test_an_eager_checkpoint_around_a_compiled_layer_counts_twice_as_with_pytorchs_layer():
    """The limit that docs/statistics.md names: compile the checkpointed step, not its inside."""
    for layer in (gb.BatchNorm1d(3), nn.BatchNorm1d(3)):
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = batch(8, 3, dtype=torch.float32).requires_grad_()
        checkpoint(compiled, x, use_reentrant=False).sum().backward()
        assert layer.num_batches_tracked == 2


# -- accumulate -----------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, 0.0, None])
@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [2, 7, 3, 4], [16], [13, 3]], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_accumulated_parts_are_one_batch(kind, sizes, momentum):
    ours, theirs, shape = LAYERS[kind]
    layer, whole = (cls(3, momentum=momentum).double() for cls in (ours, theirs))
    for _ in range(3):
        x = batch(*shape)
        with gb.accumulate(layer):
            for part in x.split(sizes):
                layer(part)
        whole(x)
        same(held(layer), held(whole), rtol=1e-12)


def test_accumulated_images_may_come_one_at_a_time():
    layer, whole = gb.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    x = batch(5, 3, 4, 4)
    with gb.accumulate(layer):
        for image in x.split(1):
            layer(image)
    whole(x)
    same(held(layer), held(whole), rtol=1e-12)


def test_accumulated_parts_far_from_zero_lose_no_digits():
    layer, x = gb.BatchNorm1d(2, momentum=1.0, backend="reference"), batch(64, 2, mean=1e5, std=1)
    x = x.float()
    with gb.accumulate(layer):
        for part in x.sort(0).values.split(4):
            layer(part)
    exact = x.double().var(0)
    torch.testing.assert_close(layer.running_var.double(), exact, rtol=1e-6, atol=0)


def test_accumulated_masked_parts_are_one_masked_batch():
    layer, whole = gb.BatchNorm1d(3).double(), gb.BatchNorm1d(3).double()
    x, mask = batch(12, 3, 5), torch.rand(12, 5) > 0.4
    mask[4:8] = False  # a part without any valid value
    with gb.accumulate(layer):
        for part, valid in zip(x.split(4), mask.split(4), strict=True):
            layer(part, mask=valid)
    whole(x, mask=mask)
    same(held(layer), held(whole), rtol=1e-12)


def test_accumulated_batches_are_each_normalized_by_their_own_statistics():
    layer, x = gb.BatchNorm1d(3).double(), batch(8, 3)
    with gb.accumulate(layer):
        for part in x.split(4):
            mean = layer(part).mean(0)
            torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
            assert layer.num_batches_tracked == 0  # until leaving


def test_accumulating_nothing_commits_nothing():
    layer = gb.BatchNorm1d(3)
    before = held(layer)
    with gb.accumulate(layer):
        layer.eval()(batch(4, 3, dtype=torch.float32))
    same(held(layer), before)


def test_every_layer_of_a_model_accumulates():
    model, twin = network(), network()
    twin.load_state_dict(model.state_dict())
    x = batch(8, 3)
    with gb.accumulate(model):
        model(x)
    twin(x)
    same(held(model), held(twin), rtol=1e-12)


def test_an_exception_inside_accumulate_commits_nothing():
    model = network()
    before = held(model)
    with pytest.raises(ZeroDivisionError), gb.accumulate(model):  # noqa: PT012
        model(batch(8, 3))
        _ = 1 / 0
    same(held(model), before)
    model(batch(8, 3))  # and the ordinary way of updating is back
    assert all(model[i].num_batches_tracked == 1 for i in (1, 4))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_exception_on_leaving_accumulate_commits_nothing_of_any_layer(momentum):
    model = nn.ModuleList(gb.BatchNorm1d(2, momentum=momentum) for _ in range(3))
    good, bad = torch.randn(4, 2), torch.full((4, 2), torch.nan)
    for layer in model:
        layer(good)
    before = held(model)
    block = contextlib.ExitStack()
    block.enter_context(gb.accumulate(model))
    for layer, x in zip(model, (good, bad, good), strict=True):
        layer(x)
    # the filters of this test run make an error of the warning
    with pytest.raises(gb.StatisticsWarning, match="'1'"):
        block.close()
    same(held(model), before)
    assert gb.skipped(model) == {"0": 0, "1": 0, "2": 0}
    with gb.accumulate(model):
        for layer in model:
            layer(good)
    assert [layer.num_batches_tracked.item() for layer in model] == [2, 2, 2]


def test_nesting_accumulate_is_an_error_that_names_the_layer_and_spares_the_outer_one():
    model, twin = network(), network()
    twin.load_state_dict(model.state_dict())
    x = batch(8, 3)
    with gb.accumulate(model):
        model(x[:4])
        with pytest.raises(RuntimeError, match=r"nested.*'1'"), gb.accumulate(model):
            raise AssertionError("the inner block must not run")
        # a part of the model only: the other layers stay as they are
        alone = nn.ModuleDict({"fresh": gb.BatchNorm1d(2), "held": model[4]})
        with pytest.raises(RuntimeError, match=r"'held'"), gb.accumulate(alone):
            raise AssertionError("the inner block must not run")
        alone["fresh"](batch(4, 2, dtype=torch.float32))
        assert alone["fresh"].num_batches_tracked == 1
        model(x[4:])
    with gb.accumulate(twin):
        twin(x[:4])
        twin(x[4:])
    same(held(model), held(twin))
    assert model[1].num_batches_tracked == 1


def test_a_compiled_model_accumulates():
    layer, whole = gb.BatchNorm1d(3).double(), gb.BatchNorm1d(3).double()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = batch(12, 3)
    with gb.accumulate(layer):
        for part in x.split(4):
            compiled(part)
    whole(x)
    same(held(layer), held(whole), rtol=1e-12)


# -- no_update ------------------------------------------------------------------------------


def test_no_update_leaves_no_trace_and_nests():
    model, twin = network(), network()
    twin.load_state_dict(model.state_dict())
    before, x = held(model), batch(8, 3)
    with gb.no_update(model):
        with gb.no_update(model):
            first = model(x)
        model(x)  # the outer one is still in force
        same(held(model), before)
    # batches are normalized by their own statistics as ever
    torch.testing.assert_close(first, twin(x), rtol=0, atol=0)
    model(x)
    same(held(model), held(twin))


def test_no_update_leaves_no_trace_of_a_batch_that_is_not_finite():
    layer = gb.BatchNorm1d(3)
    with gb.no_update(layer):
        layer(torch.full((4, 3), torch.nan))  # a warning would be an error here
    assert gb.skipped(layer) == {"": 0}


def test_no_update_ends_with_an_exception():
    layer = gb.BatchNorm1d(3).double()
    with pytest.raises(ZeroDivisionError), gb.no_update(layer):
        _ = 1 / 0
    layer(batch(4, 3))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("outer", [gb.accumulate, gb.no_update])
def test_no_update_wins_over_accumulate_whichever_is_outside(outer):
    layer, plain = gb.BatchNorm1d(3).double(), gb.BatchNorm1d(3).double()
    inner = gb.no_update if outer is gb.accumulate else gb.accumulate
    x = batch(8, 3)
    with outer(layer):
        with inner(layer):
            layer(x)
        if outer is gb.accumulate:
            layer(x + 1)
    if outer is gb.accumulate:
        plain(x + 1)
    same(held(layer), held(plain), rtol=1e-12)


def test_no_update_reaches_a_compiled_model():
    layer = gb.BatchNorm1d(3)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = batch(8, 3, dtype=torch.float32)
    compiled(x)
    after = held(layer)
    with gb.no_update(layer):
        compiled(x)
    same(held(layer), after)


# -- statistics that are not finite ---------------------------------------------------------

BAD = {
    "NaN": (torch.tensor([[torch.nan, 1.0, 2.0], [1.0, 2.0, 4.0]]), "auto"),
    "infinity": (torch.tensor([[torch.inf, 1.0, 2.0], [1.0, 2.0, 4.0]]), "auto"),
    # the variance 2e60 is finite in float64, not in the buffer's float32
    "overflow": (torch.tensor([[1e30, 1.0, 2.0], [-1e30, 2.0, 4.0]]), "reference"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_is_not_finite_is_as_if_it_had_never_come(bad, momentum):
    x, backend = BAD[bad]
    layer = gb.BatchNorm1d(3, momentum=momentum, backend=backend)
    plain, theirs = copy.deepcopy(layer), nn.BatchNorm1d(3, momentum=momentum)
    good = [batch(4, 3, dtype=torch.float32) for _ in range(4)]
    for step in good[:2]:
        layer(step), plain(step), theirs(step)
    with pytest.warns(gb.StatisticsWarning, match="NaN or infinite"):
        layer(x)
    theirs(x)
    same(held(layer), held(plain))  # all three channels: the whole update was left out
    for step in good[2:]:
        layer(step), plain(step), theirs(step)
    same(held(layer), held(plain))  # and it has recovered
    assert gb.skipped(layer) == {"": 1}
    if bad != "overflow":
        assert not theirs.running_mean.isfinite().all()


def test_a_variance_beyond_float16_enters_the_float32_buffers_of_a_half_layer():
    x = torch.tensor([[1000.0], [-1000.0]]).half()
    layer, theirs = gb.BatchNorm1d(1, momentum=1.0).half(), nn.BatchNorm1d(1, momentum=1.0).half()
    layer(x), theirs(x)
    assert layer.running_var.item() == 2e6
    assert theirs.running_var.isinf().all()


def test_a_skipped_batch_warns_once_for_each_layer_and_counts_every_time():
    model = nn.Sequential(gb.BatchNorm1d(2), nn.Identity(), gb.BatchNorm1d(2))
    assert gb.skipped(model) == {"0": 0, "2": 0}  # a model function: it names the layers
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(torch.full((4, 2), torch.nan))
    assert [w.category for w in caught] == [gb.StatisticsWarning] * 2
    assert ["BatchNorm1d '0'" in str(caught[0].message), "'2'" in str(caught[1].message)] == [
        True
    ] * 2
    assert gb.skipped(model) == {"0": 3, "2": 3}


def test_a_layer_without_a_name_is_called_by_its_repr():
    layer = gb.BatchNorm1d(2, momentum=0.3)
    with pytest.warns(gb.StatisticsWarning) as caught:
        layer(torch.full((4, 2), torch.nan))
    assert repr(layer) in str(caught[0].message)


def test_the_last_model_function_names_the_layer():
    inner = nn.Sequential(gb.BatchNorm1d(2))
    gb.skipped(nn.ModuleDict({"head": inner}))
    gb.skipped(nn.ModuleDict({"body": inner}))
    with pytest.warns(gb.StatisticsWarning, match=r"'body\.0'"):
        inner(torch.full((4, 2), torch.nan))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_compiled_layer_skips_without_reading_a_value_on_the_host(momentum):
    layer, plain = (gb.BatchNorm1d(3, momentum=momentum) for _ in range(2))
    nodes = []

    def look(graph, example):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=look, fullgraph=True)
    good = batch(8, 3, dtype=torch.float32)
    compiled(good), plain(good)
    before = held(layer)
    compiled(torch.full((8, 3), torch.inf))  # no warning: nobody on the host knows
    same(held(layer), before)
    same(held(layer), held(plain), rtol=1e-6)
    compiled(good + 1), plain(good + 1)
    same(held(layer), held(plain), rtol=1e-6)
    assert gb.skipped(layer) == {"": 1}
    assert nodes
    assert not {"item", "_local_scalar_dense", "aten._local_scalar_dense.default"} & set(nodes)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("accumulated", [False, True])
def test_an_eager_layer_on_a_device_reads_no_value_on_the_host(momentum, accumulated):
    """On the meta device there is no value to read: trying to would be an error."""
    layer = gb.BatchNorm1d(3, momentum=momentum, device="meta")
    x = torch.empty(4, 3, device="meta", requires_grad=True)
    if accumulated:
        with gb.accumulate(layer):
            layer(x), layer(x)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


def test_one_bad_part_leaves_out_the_whole_accumulated_batch():
    layer = gb.BatchNorm1d(2)
    before = held(layer)
    block = contextlib.ExitStack()
    block.enter_context(gb.accumulate(layer))
    for x in (torch.randn(4, 2), torch.full((4, 2), torch.nan), torch.randn(4, 2)):
        layer(x)
    with pytest.warns(gb.StatisticsWarning):
        block.close()
    same(held(layer), before)
    assert gb.skipped(layer) == {"": 1}


# -- options of the layer -------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
def test_stored_variance_is_m_over_m_minus_one_times_the_biased_one(momentum):
    unbiased, biased = (
        gb.BatchNorm1d(3, momentum=momentum, stored_variance=kind).double()
        for kind in ("unbiased", "biased")
    )
    theirs = nn.BatchNorm1d(3, momentum=momentum).double()
    for layer in (unbiased, biased, theirs):
        layer.running_var.zero_()
    for _ in range(3):
        x = batch(5, 3)
        torch.testing.assert_close(unbiased(x), biased(x), rtol=0, atol=0)
        theirs(x)
    torch.testing.assert_close(unbiased.running_var, theirs.running_var, rtol=1e-12, atol=0)
    torch.testing.assert_close(unbiased.running_var, biased.running_var * 5 / 4, rtol=1e-12, atol=0)
    with gb.accumulate(biased):
        for part in batch(6, 3).split(2):
            biased(part)
    assert biased.num_batches_tracked == 4


def test_one_value_per_channel_is_an_error_that_names_the_layer():
    model = nn.Sequential(nn.Identity(), gb.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"Expected more than 1 value") as without:
        model(torch.zeros(1, 3))
    assert repr(model[1]) in str(without.value)
    gb.skipped(model)
    with pytest.raises(ValueError, match=r"BatchNorm1d '1'.*\(1, 3\).*on_single=\"running\""):
        model(torch.zeros(1, 3))
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("accumulated", [False, True])
def test_on_single_running_normalizes_by_the_running_statistics_and_leaves_them(accumulated):
    layer = gb.BatchNorm1d(3, on_single="running").double()
    layer(batch(8, 3))
    before, x = held(layer), batch(1, 3)
    if accumulated:
        with gb.accumulate(layer):
            y = layer(x)
    else:
        y = layer(x)
    same(held(layer), before)
    torch.testing.assert_close(y, layer.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("cls", [gb.BatchNorm1d, gb.BatchNormAct1d])
def test_training_with_a_mask_is_training_on_the_valid_positions(cls):
    layer, plain = cls(3).double(), cls(3).double()
    x, mask = batch(6, 3, 5), torch.rand(6, 5) > 0.4
    # the valid positions as the rows of a dense batch; what is elsewhere must not matter
    rows = x.movedim(1, 2)[mask].requires_grad_()
    x = torch.where(mask.unsqueeze(1), x, torch.nan).requires_grad_()
    y, dense = layer(x, mask=mask), plain(rows)
    torch.testing.assert_close(y.movedim(1, 2)[mask], dense, rtol=1e-10, atol=1e-10)
    assert y.movedim(1, 2)[~mask].eq(0).all()
    y.pow(3).sum().backward(), dense.pow(3).sum().backward()
    torch.testing.assert_close(x.grad.movedim(1, 2)[mask], rows.grad, rtol=1e-9, atol=1e-9)
    assert x.grad.movedim(1, 2)[~mask].eq(0).all()
    for name in ("weight", "bias"):
        found, wanted = (getattr(one, name).grad for one in (layer, plain))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    same(held(layer), held(plain), rtol=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_with_one_valid_value_or_none_trains_without_nan_and_enters_nothing(count):
    layer = gb.BatchNorm1d(3)
    layer(torch.randn(8, 3))
    before, x = held(layer), torch.randn(4, 3, requires_grad=True)
    mask = torch.arange(4) < count
    with pytest.warns(gb.StatisticsWarning):
        y = layer(x, mask=mask)
    y.sum().backward()
    assert y.eq(0).all()  # β where there is one value, 0 where there is none
    assert x.grad.eq(0).all()
    assert layer.weight.grad.eq(0).all()
    assert layer.bias.grad.eq(count).all()
    same(held(layer), before)
    assert gb.skipped(layer) == {"": 1}
