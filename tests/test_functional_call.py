"""A call of a model as a function: what it would have written comes back, nothing is written."""

import copy

import pytest
import torch
from running import batch, held, network, same
from torch import nn

import gammabeta as gb


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


# -- one buffer with several names ------------------------------------------------------------


def shared():
    layer = gb.BatchNorm1d(3, momentum=0.5).double()
    return nn.Sequential(layer, nn.Linear(3, 3).double(), layer, layer)


@pytest.mark.parametrize("names", [["2"], ["3"], ["0", "2"], ["2", "3"]], ids=str)
def test_functional_call_takes_a_buffer_by_any_of_its_names_and_returns_it_by_these(names):
    model, x = shared(), batch(8, 3)
    mean = batch(3)
    kept, before = mean.clone(), held(model)
    twin = copy.deepcopy(model)
    twin[0].running_mean.copy_(mean)
    y, buffers = gb.functional_call(model, {f"{name}.running_mean": mean for name in names}, x)
    torch.testing.assert_close(y, twin(x), rtol=1e-12, atol=1e-12)
    wanted = {f"{name}.running_mean": twin[0].running_mean for name in names}
    wanted["0.running_var"] = twin[0].running_var
    wanted["0.num_batches_tracked"] = twin[0].num_batches_tracked
    same({name: buffers[name] for name in wanted}, wanted, rtol=1e-12)
    assert buffers.keys() == wanted.keys()
    assert torch.equal(mean, kept)
    same(held(model), before)
    _, again = gb.functional_call(model, buffers, x)  # what came back is taken again
    twin(x)
    torch.testing.assert_close(again["0.running_var"], twin[0].running_var, rtol=1e-12, atol=0)
    assert again.keys() == wanted.keys()


def test_functional_call_takes_one_value_by_all_names_of_a_shared_layer():
    model, x = shared(), batch(8, 3)
    twin = copy.deepcopy(model)
    given = dict(model.named_buffers(remove_duplicate=False))
    _, buffers = gb.functional_call(model, given, x)
    twin(x)
    assert buffers.keys() == {f"{i}.{key}" for i in (0, 2, 3) for key in model[0]._buffers}
    for i in (0, 2, 3):
        for key, value in twin[0]._buffers.items():
            torch.testing.assert_close(buffers[f"{i}.{key}"], value, rtol=1e-12, atol=0)


def test_functional_call_leaves_a_given_buffer_of_another_module_alone_by_any_name():
    counter = Counter()
    model = nn.Sequential(counter, gb.BatchNorm1d(3), counter)
    calls = torch.tensor(5.0)
    _, buffers = gb.functional_call(model, {"2.calls": calls}, torch.randn(8, 3))
    assert (buffers["2.calls"], calls, counter.calls) == (7, 5, 0)
    assert "0.calls" not in buffers


def test_functional_call_refuses_two_values_for_one_buffer():
    model = shared()
    given = {"0.running_mean": torch.zeros(3), "2.running_mean": torch.ones(3)}
    with pytest.raises(ValueError, match=r"one value.*'0\.running_mean', '2\.running_mean'"):
        gb.functional_call(model, given, batch(8, 3))
    same(held(model), held(shared()))


def test_functional_call_leaves_no_given_parameter_in_a_shared_module():
    """As ``torch.func.functional_call`` of PyTorch 2.13 does."""
    linear = nn.Linear(3, 3)
    model = nn.Sequential(linear, gb.BatchNorm1d(3), linear)
    weight, given = linear.weight, torch.eye(3)
    x = torch.randn(8, 3)
    y, _ = gb.functional_call(model, {"0.weight": given}, x)
    again, _ = gb.functional_call(model, {"2.weight": given}, x)
    assert linear.weight is weight
    assert torch.equal(y, again)
    assert not torch.equal(y, model(x))
