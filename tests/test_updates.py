"""When a forward pass enters the running statistics: once, merged with others, or never."""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gammabeta as gb

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
LAYERS = {
    "1d": (gb.BatchNorm1d, nn.BatchNorm1d, (16, 3)),
    "2d": (gb.BatchNorm2d, nn.BatchNorm2d, (16, 3, 4, 4)),
    "fused 2d": (gb.BatchNormAct2d, nn.BatchNorm2d, (16, 3, 4, 4)),
    "3d": (gb.BatchNorm3d, nn.BatchNorm3d, (16, 3, 2, 2, 2)),
}
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


def batch(*shape, mean=2.0, std=3.0, dtype=torch.float64):
    return (torch.randn(*shape, dtype=torch.float64) * std + mean).to(dtype)


def held(layer):
    """The layer's buffers as they are now."""
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def same(found, wanted, rtol=0.0):
    """Assert that two sets of buffers are equal, to the bit unless ``rtol`` says otherwise."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=0, msg=name)


def network(layer=gb.BatchNorm1d):
    return nn.Sequential(nn.Linear(3, 5), layer(5), nn.ReLU(), nn.Linear(5, 4), layer(4)).double()


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
    compiled(torch.full((8, 3), torch.inf))  # no warning: nobody on the host knows
    same(held(layer), held(plain))
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


# -- functional_call ------------------------------------------------------------------------


class Counter(nn.Module):
    """A module of somebody else, with buffers that it writes in place and anew."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        self.last = x.detach().mean()
        return x


class Nested(nn.Module):
    """Nested modules, one layer used twice and known by two names, keyword arguments."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"in": nn.Linear(3, 3), "norm": gb.BatchNorm1d(3)})
        self.alias = self.body["norm"]
        self.counter = Counter()

    def forward(self, x, *, scale=1.0, fail=False):
        y = self.alias(self.counter(self.body["norm"](self.body["in"](x)) + 1))
        if fail:
            raise ZeroDivisionError("in the middle of a forward pass")
        return y * scale


def test_functional_call_writes_nothing_and_returns_what_the_model_would_have_written():
    model = Nested().double()
    twin, x = copy.deepcopy(model), batch(8, 3)
    before, versions = held(model), [t._version for t in (*model.buffers(), *model.parameters())]
    tensors = [id(t) for t in (*model.buffers(), *model.parameters())]
    y, buffers = gb.functional_call(model, {}, x, {"scale": 2.0})
    torch.testing.assert_close(y, twin(x, scale=2.0), rtol=1e-12, atol=1e-12)
    same(buffers, held(twin), rtol=1e-12)
    assert buffers["body.norm.num_batches_tracked"] == 2
    assert buffers["counter.calls"] == 1
    same(held(model), before)
    assert [id(t) for t in (*model.buffers(), *model.parameters())] == tensors
    assert [t._version for t in (*model.buffers(), *model.parameters())] == versions


def test_functional_call_takes_given_tensors_and_leaves_them_as_they_are():
    model = Nested().double()
    twin, x = copy.deepcopy(model), batch(8, 3)
    given = {
        name: t.detach() + 1 for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    kept = {name: t.clone() for name, t in given.items()}
    twin.load_state_dict(given, strict=False)
    y, buffers = gb.functional_call(model, given, (x,))
    torch.testing.assert_close(y, twin(x), rtol=1e-12, atol=1e-12)
    same(buffers, held(twin), rtol=1e-12)
    same(given, kept)
    assert all(t._version == 0 for t in given.values())


def test_functional_call_goes_on_from_its_own_buffers():
    layer, plain = gb.BatchNorm1d(3).double(), gb.BatchNorm1d(3).double()
    buffers = {}
    for _ in range(4):
        x = batch(8, 3)
        _, buffers = gb.functional_call(layer, buffers, x)
        plain(x)
    same(buffers, held(plain), rtol=1e-12)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("way", ["eval", "frozen", "no_update"])
def test_functional_call_returns_the_buffers_as_they_were_where_no_update_is_due(way):
    layer = gb.BatchNorm1d(3).double()
    layer(batch(8, 3))
    before, x = held(layer), batch(8, 3)
    if way == "no_update":
        with gb.no_update(layer):
            _, buffers = gb.functional_call(layer, {}, x)
    else:
        _ = layer.eval() if way == "eval" else gb.freeze(layer)
        _, buffers = gb.functional_call(layer, {}, x)
    same(buffers, before)


def test_an_exception_inside_functional_call_leaves_the_model_as_it_was():
    model = Nested().double()
    before = held(model)
    with pytest.raises(ZeroDivisionError):
        gb.functional_call(model, {}, batch(8, 3), {"fail": True})
    same(held(model), before)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    model(batch(8, 3))  # writes into its own buffers again
    assert model.alias.num_batches_tracked == 2


def test_functional_call_under_vmap_stacks_the_buffers_of_every_copy():
    model, x = network(), batch(5, 8, 3)
    before = held(model)
    run = torch.func.vmap(lambda part: gb.functional_call(model, {}, part))
    y, buffers = run(x)
    for i, part in enumerate(x):
        twin = copy.deepcopy(model)
        torch.testing.assert_close(y[i], twin(part), rtol=1e-10, atol=1e-10)
        same({name: b[i] for name, b in buffers.items()}, held(twin), rtol=1e-12)
    same(held(model), before)


def test_functional_call_under_vmap_trains_an_ensemble_of_parameters_and_buffers():
    models = [network() for _ in range(3)]
    for model in models:
        model(batch(8, 3))
    parameters, buffers = torch.func.stack_module_state(models)
    x = batch(8, 3)
    run = torch.func.vmap(
        lambda p, b, part: gb.functional_call(models[0], {**p, **b}, part), in_dims=(0, 0, None)
    )
    y, new = run(parameters, buffers, x)
    for i, model in enumerate(models):
        torch.testing.assert_close(y[i], model(x), rtol=1e-10, atol=1e-10)
        same({name: b[i] for name, b in new.items()}, held(model), rtol=1e-12)


def test_functional_call_under_vmap_skips_the_bad_copy_only():
    layer, x = gb.BatchNorm1d(3), batch(3, 8, 3, dtype=torch.float32)
    x[1, 0, 0] = torch.nan
    _, buffers = torch.func.vmap(lambda part: gb.functional_call(layer, {}, part))(x)
    assert buffers["num_batches_tracked"].tolist() == [1, 0, 1]
    assert buffers["running_mean"][1].tolist() == [0, 0, 0]
    assert buffers["running_mean"][[0, 2]].abs().min() > 0
    assert gb.skipped(layer) == {"": 0}  # nothing is written, the count included


def test_functional_call_has_gradients_under_torch_func():
    model, x = network(), batch(8, 3)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        y, buffers = gb.functional_call(model, parameters, x)
        return y.square().sum() + y.pow(3).sum(), buffers

    gradients, buffers = torch.func.grad(loss, has_aux=True)(parameters)
    y = model(x)
    wanted = torch.autograd.grad(y.square().sum() + y.pow(3).sum(), list(parameters.values()))
    for found, value in zip(gradients.values(), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-8, atol=1e-8)
    same(buffers, held(model), rtol=1e-12)


def test_plain_vmap_in_training_is_an_error_that_names_functional_call():
    model, x = network(), batch(5, 8, 3)
    gb.skipped(model)
    before = held(model)
    with pytest.raises(RuntimeError, match=r"'1'.*gammabeta\.functional_call"):
        torch.func.vmap(model)(x)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(network(nn.BatchNorm1d))(x)
    same(held(model), before)
    with gb.no_update(model):
        together = torch.func.vmap(model)(x)
        torch.testing.assert_close(together[2], model(x[2]), rtol=1e-10, atol=1e-10)
    same(held(model), before)


def test_plain_vmap_over_stacked_buffers_updates_them_in_place_as_with_pytorchs_layers():
    found = []
    for cls in (nn.BatchNorm1d, gb.BatchNorm1d):
        torch.manual_seed(3)
        models = [network(cls) for _ in range(2)]
        parameters, buffers = torch.func.stack_module_state(models)

        def call(p, b, x, model=models[0]):
            return torch.func.functional_call(model, (p, b), (x,))

        torch.func.vmap(call, in_dims=(0, 0, None))(parameters, buffers, batch(8, 3))
        found.append(buffers)
    same(found[1], found[0], rtol=1e-12)


def test_functional_call_inside_accumulate_writes_nothing_either():
    layer = gb.BatchNorm1d(3).double()
    before = held(layer)
    with gb.accumulate(layer):
        _, buffers = gb.functional_call(layer, {}, batch(8, 3))
    same(held(layer), before)
    assert buffers["num_batches_tracked"] == 1


# -- freeze ---------------------------------------------------------------------------------


def test_frozen_statistics_normalize_and_stay_in_training_mode_until_unfrozen():
    model, twin = network(), network(nn.BatchNorm1d)
    for _ in range(3):
        model(batch(8, 3))
    twin.load_state_dict(model.state_dict())
    report = gb.freeze(model)
    assert [(entry.name, entry.statistics, entry.affine) for entry in report] == [
        ("1", True, False),
        ("4", True, False),
    ]
    before, x = held(model), batch(8, 3).requires_grad_()
    model.eval()
    model.train()  # undoes a freeze by .eval(), not this one
    y = model(x)
    torch.testing.assert_close(y, twin.eval()(x), rtol=1e-12, atol=1e-12)
    y.sum().backward()
    assert model[1].weight.grad.abs().max() > 0  # γ and β go on learning
    same(held(model), before)
    gb.unfreeze(model)
    model(x), twin.train()(x)
    same(held(model), held(twin), rtol=1e-12)


def test_a_frozen_affine_learns_nothing_while_the_statistics_go_on():
    model = network()
    gb.freeze(model, statistics=False, affine=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    kept = [model[1].weight.clone(), model[1].bias.clone()]
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(batch(8, 3)).pow(3).sum().backward()
        optimizer.step()
    assert torch.equal(model[1].weight, kept[0])
    assert torch.equal(model[1].bias, kept[1])
    assert model[1].num_batches_tracked == 3


def test_unfreezing_restores_every_requires_grad_exactly():
    model = nn.Sequential(gb.BatchNorm1d(2), gb.BatchNorm1d(2, bias=False), gb.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    gb.freeze(model, affine=True)
    gb.freeze(model, affine=True)  # the second time has nothing to remember
    assert not any(p.requires_grad for p in model.parameters())
    report = gb.unfreeze(model, statistics=False)
    assert [p.requires_grad for p in model.parameters()] == before
    assert [(entry.statistics, entry.affine) for entry in report] == [(True, False)] * 3
    gb.unfreeze(model)
    assert model(torch.randn(4, 2)).requires_grad


def test_unfreezing_what_was_never_frozen_changes_nothing():
    model = network()
    model[1].bias.requires_grad_(False)
    gb.unfreeze(model)
    assert [p.requires_grad for p in model[1].parameters()] == [True, False]


def test_a_state_dict_does_not_carry_a_freeze():
    frozen, fresh = network(), network()
    gb.freeze(frozen, affine=True)
    assert list(frozen.state_dict()) == list(network(nn.BatchNorm1d).state_dict())
    fresh.load_state_dict(frozen.state_dict())
    fresh(batch(8, 3))
    assert fresh[1].num_batches_tracked == 1
    frozen.load_state_dict(fresh.state_dict())  # and loading does not thaw
    frozen(batch(8, 3))
    assert frozen[1].num_batches_tracked == 1


def test_a_layer_without_running_statistics_cannot_freeze_them_and_the_report_says_so():
    model = nn.Sequential(gb.BatchNorm1d(2, track_running_stats=False), gb.BatchNorm1d(2))
    first, second = gb.freeze(model, affine=True)
    assert (first.statistics, first.affine, second.statistics) == (False, True, True)
    assert "track_running_stats=False" in first.note
    assert second.note == ""


@pytest.mark.parametrize(
    "function", [gb.freeze, gb.unfreeze, gb.skipped, gb.accumulate, gb.no_update]
)
def test_a_model_with_layers_of_pytorch_is_refused_and_left_as_it_was(function):
    model = nn.Sequential(gb.BatchNorm1d(2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=rf"{function.__name__}.*1 = BatchNorm1d.*convert"):
        contextlib.ExitStack().enter_context(function(model))
    model(torch.randn(4, 2))
    assert model[0].num_batches_tracked == 1
    assert all(p.requires_grad for p in model.parameters())


def test_a_frozen_layer_normalizes_a_single_value_in_training_mode():
    layer = gb.BatchNorm1d(2)
    gb.freeze(layer)
    assert layer(torch.zeros(1, 2)).shape == (1, 2)


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


# -- copies in every state ------------------------------------------------------------------


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_frozen_model_is_frozen_and_can_be_thawed(way):
    model = network()
    model[1].bias.requires_grad_(False)
    model(batch(8, 3))
    gb.freeze(model, affine=True)
    twin = COPIES[way](model)
    before = held(twin)
    twin(batch(8, 3))
    same(held(twin), before)
    gb.unfreeze(twin)
    assert [p.requires_grad for p in twin[1].parameters()] == [True, False]
    twin(batch(8, 3))
    assert (twin[1].num_batches_tracked, model[1].num_batches_tracked) == (2, 1)
    assert not model[1].weight.requires_grad


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_a_skip_count_and_a_name_of_its_own(way):
    model = network()
    gb.skipped(model)
    with pytest.warns(gb.StatisticsWarning):
        model[1](torch.full((4, 5), torch.nan, dtype=torch.float64))
    twin = COPIES[way](model)
    assert gb.skipped(twin) == {"1": 1, "4": 0}
    twin[1](torch.full((4, 5), torch.nan, dtype=torch.float64))  # has warned already
    assert gb.skipped(twin) == {"1": 2, "4": 0}
    assert gb.skipped(model) == {"1": 1, "4": 0}
    with pytest.raises(ValueError, match="'4'"):
        twin[4](torch.zeros(1, 4).double())


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("block", [gb.accumulate, gb.no_update])
def test_a_copy_made_inside_a_block_updates_as_ever_once_the_block_is_left(block, way):
    layer = gb.BatchNorm1d(3).double()
    with block(layer):
        layer(batch(8, 3))
        twin = COPIES[way](layer)
    twin(batch(8, 3))
    assert twin.num_batches_tracked == 1


# -- buffers that somebody writes between forward and backward ------------------------------


def broadcast(layer):
    """What DistributedDataParallel does to the buffers before each forward pass."""
    with torch.no_grad():
        for buffer in layer.buffers():
            buffer.copy_(buffer + 1)


@pytest.mark.parametrize("cls", [gb.BatchNorm1d, gb.BatchNormAct1d])
@pytest.mark.parametrize("backend", ["auto", "reference", "native"])
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("train", torch.float32),
        ("train", torch.float64),
        ("eval", torch.float32),
        ("frozen", torch.float32),
        ("eval", torch.float64),
        ("frozen", torch.float64),
    ],
)
def test_buffers_may_be_written_between_forward_and_backward(mode, dtype, backend, cls):
    layer = cls(3, backend=backend, dtype=dtype)
    layer(batch(8, 3, dtype=dtype))
    if mode == "frozen":
        gb.freeze(layer)
    layer.train(mode != "eval")
    x = batch(8, 3, dtype=dtype).requires_grad_()
    (wanted,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    loss = layer(x).pow(3).sum()
    broadcast(layer)
    (found,) = torch.autograd.grad(loss, x)
    # train mode: the running statistics of the two passes differ, the gradient does not
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_pytorchs_layer_fails_where_buffers_are_written_between_forward_and_backward(mode):
    layer = nn.BatchNorm1d(3)
    layer.train(mode == "train")
    loss = layer(torch.randn(8, 3, requires_grad=True)).pow(3).sum()
    broadcast(layer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
