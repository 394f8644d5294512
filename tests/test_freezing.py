"""Statistics that hold still: frozen, in a copy, or written by others before the backward pass."""

import contextlib
import copy

import pytest
import torch
from running import COPIES, batch, held, network, same
from torch import nn
from torch.nn.utils import parametrize

import gammabeta as gb

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


# -- parameters of several layers, of parametrizations, of lazy layers ------------------------


class Doubled(nn.Module):
    """A parametrization that learns something itself."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, weight):
        return 2 * weight + self.shift


def tied():
    first, second = gb.BatchNorm1d(3), gb.BatchNorm1d(3)
    second.weight, second.bias = first.weight, first.bias
    first.bias.requires_grad_(False)
    return nn.Sequential(first, second)


@pytest.mark.parametrize("parts", [["all"], [0, "all"], [1, "all"], [0, 1]], ids=str)
def test_parameters_that_two_layers_share_are_restored_however_they_were_frozen(parts):
    model = tied()
    for part in parts:
        gb.freeze(model if part == "all" else model[part], affine=True)
    assert not any(p.requires_grad for p in model.parameters())
    report = gb.unfreeze(model)
    assert [entry.affine for entry in report] == [False, False]
    assert [p.requires_grad for p in model.parameters()] == [True, False]


def test_what_a_parametrization_makes_gamma_of_is_frozen_and_restored():
    layer = gb.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "weight", Doubled())
    layer.bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in layer.named_parameters()}
    assert sum(before.values()) == 2
    (entry,) = gb.freeze(layer, affine=True)
    assert entry.affine
    assert not any(p.requires_grad for p in layer.parameters())
    assert not layer.weight.requires_grad
    gb.unfreeze(layer)
    assert {name: p.requires_grad for name, p in layer.named_parameters()} == before


def test_freezing_again_freezes_what_has_come_since_and_remembers_both():
    layer = gb.BatchNorm1d(3)
    gb.freeze(layer, affine=True)
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert layer.weight.requires_grad
    gb.freeze(layer, affine=True)
    assert not layer.weight.requires_grad
    gb.unfreeze(layer)
    assert all(p.requires_grad for p in layer.parameters())


def test_a_parametrization_that_comes_or_goes_while_frozen_loses_no_state():
    layer = gb.BatchNorm1d(3)
    gb.freeze(layer, affine=True)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    gb.unfreeze(layer)
    assert all(p.requires_grad for p in layer.parameters())
    gb.freeze(layer, affine=True)
    parametrize.remove_parametrizations(layer, "weight")
    gb.unfreeze(layer)
    assert layer.weight.requires_grad


def test_a_lazy_layer_is_frozen_before_its_first_batch_and_the_report_says_at_what():
    model = nn.Sequential(gb.BatchNorm1d(3), gb.LazyBatchNorm1d(), nn.Linear(3, 3))
    model[1].bias.requires_grad = False
    plain, lazy = gb.freeze(model, affine=True)
    assert (plain.note, lazy.statistics, lazy.affine) == ("", True, True)
    assert "Run one batch" in lazy.note
    x = torch.randn(8, 3)
    model[:2](x)
    assert type(model[1]) is gb.BatchNorm1d
    torch.testing.assert_close(model[1](x), x, rtol=1e-4, atol=1e-4)  # mean 0, variance 1
    assert model[1].num_batches_tracked == 0
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2
    assert [entry.note for entry in gb.freeze(model)] == ["", ""]
    gb.unfreeze(model)
    assert [p.requires_grad for p in model[1].parameters()] == [True, False]


def test_a_lazy_layer_is_unfrozen_before_its_first_batch_too():
    layer = gb.LazyBatchNorm1d()
    layer.bias.requires_grad = False
    gb.freeze(layer, affine=True)
    gb.unfreeze(layer)
    layer(torch.randn(8, 3))
    assert [p.requires_grad for p in layer.parameters()] == [True, False]
    assert layer.num_batches_tracked == 1


def test_a_lazy_layer_without_running_statistics_has_one_note():
    (entry,) = gb.freeze(gb.LazyBatchNorm1d(track_running_stats=False))
    assert not entry.statistics
    assert "track_running_stats=False" in entry.note
    assert "Run one batch" not in entry.note


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
