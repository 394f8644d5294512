"""What one layer's step does to the statistics of later layers, against steps really made."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gammabeta as gb
from gammabeta.probes import _moves, influence
from tests import networks

CASES = pytest.mark.parametrize(
    "build",
    [
        networks.linear_chain,
        networks.mlp,
        functools.partial(networks.conv_residual, norm="nn"),
        functools.partial(networks.conv_residual, norm="none", act="tanh"),
    ],
)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.02)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def trained(model: nn.Module, make) -> torch.optim.Optimizer:
    """The optimizer after two real steps, so that it has a state."""
    optimizer = make(model)
    for seed in (5, 6):
        x, y = networks.batch_for(model, seed=seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


def groups_of(model: nn.Module) -> dict[str, list[str]]:
    """Parameters by layer; these networks register their layers in the order of the forward."""
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return groups


def after_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The parameters after a real step of copies."""
    both = copy.deepcopy([model, optimizer])
    x, y = networks.batch_for(model)
    both[1].zero_grad()
    F.cross_entropy(both[0](x), y).backward()
    both[1].step()
    return {name: p.detach() for name, p in both[0].named_parameters()}


def with_parameters(model: nn.Module, values: dict[str, torch.Tensor]) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in values.items():
            twin.get_parameter(name).copy_(value)
    return twin


def received(model: nn.Module, x: torch.Tensor) -> dict[str, np.ndarray]:
    """What each linear and convolutional layer takes, (units, values)."""
    found: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):

            def keep(_, args, name=name):
                value = args[0].detach().numpy()
                found[name] = np.moveaxis(value, 1, 0).reshape(value.shape[1], -1).copy()

            module.register_forward_pre_hook(keep)
    model(x)
    return found


def slow_matrices(model: nn.Module, moved: dict[str, torch.Tensor], over) -> np.ndarray:
    """(2, K, L) by updating a copy of the model, layer by layer."""
    x, _ = networks.batch_for(model)
    before = received(copy.deepcopy(model), x)
    groups = groups_of(model)
    found = np.zeros((2, len(groups), len(before)))
    for k, names in enumerate(groups.values()):
        after = received(with_parameters(model, {n: moved[n] for n in names}), x)
        for at, layer in enumerate(before):
            shifts, widenings = [], []
            for old, new in zip(before[layer], after[layer], strict=True):
                if np.ptp(old) == np.ptp(new) == 0 and old[0] == new[0]:
                    continue
                shifts.append(abs(new.mean() - old.mean()) / old.std())
                widenings.append(abs(math.log(new.std() / old.std())))
            found[:, k, at] = over(shifts), over(widenings)
    return found


@CASES
@pytest.mark.parametrize("make", [adam, momentum])
def test_the_matrices_are_those_of_steps_really_made(build, make):
    model = build()
    optimizer = trained(model, make)
    step = networks.step_for(model, optimizer=optimizer)
    slow = slow_matrices(model, after_a_step(model, optimizer), np.median)
    found = gb.measure(step, "influence")
    assert found["mean"].numpy() == pytest.approx(slow[0], rel=1e-8, abs=1e-12)
    assert found["spread"].numpy() == pytest.approx(slow[1], rel=1e-8, abs=1e-12)
    assert (slow[0] > 1e-5).sum() >= len(slow[0]) - 1


@pytest.mark.parametrize(
    ("over", "rule"),
    [("mean", np.mean), ("rms", lambda values: np.sqrt(np.mean(np.square(values))))],
)
def test_units_are_aggregated_by_the_rule_that_is_named(over, rule):
    model = networks.mlp(act="tanh")
    optimizer = trained(model, adam)
    slow = slow_matrices(model, after_a_step(model, optimizer), rule)
    step = networks.step_for(model, optimizer=optimizer)
    found = gb.measure(step, functools.partial(influence.measure, over=over))
    assert found["mean"].numpy() == pytest.approx(slow[0], rel=1e-8, abs=1e-12)
    assert found["spread"].numpy() == pytest.approx(slow[1], rel=1e-8, abs=1e-12)


def chain(weights: list[float]) -> nn.Sequential:
    """Goodfellow's chain: one unit a layer, no activation."""
    layers = [nn.Linear(1, 1, bias=False).double() for _ in weights]
    for layer, weight in zip(layers, weights, strict=True):
        nn.init.constant_(layer.weight, weight)
    return nn.Sequential(*layers)


def test_in_a_chain_of_one_unit_layers_a_step_scales_all_that_comes_after():
    weights, x, lr = [1.5, 0.8, -1.2, 0.6], torch.tensor([[0.5], [2.0], [1.0]]).double(), 0.05
    model = chain(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    step = gb.Step(model, None, x, optimizer=optimizer, forward=lambda net, b: net(b).mean())
    found = gb.measure(step, "influence")
    values = x.numpy()
    mean, spread = np.zeros((4, 4)), np.zeros((4, 4))
    for k, weight in enumerate(weights):
        factor = 1 - lr * values.mean() * math.prod(weights) / weight**2
        mean[k, k + 1 :] = abs(factor - 1) * values.mean() / values.std()
        spread[k, k + 1 :] = abs(math.log(factor))
    assert found["mean"].numpy() == pytest.approx(mean, rel=1e-12, abs=1e-15)
    assert found["spread"].numpy() == pytest.approx(spread, rel=1e-12, abs=1e-15)
    for k in range(4):
        later = mean[k, k + 1 :]
        sent = later.mean() if len(later) else 0.0
        assert found[f"{k}/sent_mean"].item() == pytest.approx(sent, rel=1e-12)
        assert found[f"{k}/received_mean"].item() == pytest.approx(mean[:, k].sum(), rel=1e-12)


def test_behind_a_normalization_only_its_own_gamma_and_beta_move_the_statistics():
    model = networks.linear_chain(depth=4, norm="gb")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eps = 1e-14
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    moved = after_a_step(model, optimizer)
    found = gb.measure(networks.step_for(model, optimizer=optimizer), "influence")
    rows, columns = list(groups_of(model)), ["0", "2", "4", "6"]
    assert rows == ["0", "1", "2", "3", "4", "5", "6"]
    for at, column in enumerate(columns):
        before = str(int(column) - 1)
        for k, row in enumerate(rows):
            entry = found["mean"][k, at].item(), found["spread"][k, at].item()
            if row != before:
                assert entry == pytest.approx((0, 0), abs=1e-9), (row, column)
                continue
            layer = model.get_submodule(row)
            gamma, beta = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            new_gamma, new_beta = (moved[f"{row}.{n}"].numpy() for n in ("weight", "bias"))
            shift = np.median(np.abs(new_beta - beta) / np.abs(gamma))
            widening = np.median(np.abs(np.log(np.abs(new_gamma / gamma))))
            assert entry == pytest.approx((shift, widening), rel=1e-8)
            assert widening > 1e-4


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_step_never_moves_what_comes_before_it(name):
    model = networks.NETWORKS[name]()
    step = networks.step_for(model, optimizer=momentum(model))
    found = gb.measure(step, "influence")
    rows = [key.rpartition("/")[0] for key in found if key.endswith("/sent_mean")]
    columns = [key.rpartition("/")[0] for key in found if key.endswith("/received_mean")]
    assert found["mean"].shape == found["spread"].shape == (len(rows), len(columns))
    for at, column in enumerate(columns):
        end = rows.index(column)
        assert (found["mean"][end:, at] == 0).all()
        assert (found["spread"][end:, at] == 0).all()
        assert at == 0 or found["mean"][:end, at].sum() > 0


def test_without_an_optimizer_only_the_relative_step_is_measured():
    model = networks.mlp()
    assert gb.measure(networks.step_for(model), "influence") == {}
    step = networks.step_for(model)
    moved = _moves.targets(step, _moves.layers_of(step), 0.05)
    for names in groups_of(model).values():
        one, other = ([model.get_parameter(n).detach() for n in names], [moved[n] for n in names])
        size = math.sqrt(sum((p**2).sum().item() for p in one))
        pairs = zip(one, other, strict=True)
        length = math.sqrt(sum(((p - q) ** 2).sum().item() for p, q in pairs))
        assert length == pytest.approx(0.05 * size, rel=1e-10)
    found = gb.measure(step, functools.partial(influence.measure, relative=0.05))
    slow = slow_matrices(model, moved, np.median)
    assert found["mean"].numpy() == pytest.approx(slow[0], rel=1e-8, abs=1e-12)
    sgd = networks.step_for(model, optimizer=torch.optim.SGD(model.parameters(), lr=7.0))
    same = gb.measure(sgd, functools.partial(influence.measure, relative=0.05))
    assert same["mean"].numpy() == pytest.approx(slow[0], rel=1e-8, abs=1e-12)


def test_a_relative_step_of_weights_before_a_normalization_does_not_depend_on_their_scale():
    matrices = []
    for scale in (1.0, 16.0):
        model = networks.mlp(act="tanh")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eps = 1e-14
        with torch.no_grad():
            model[0].weight *= scale
            model[3].weight *= scale
        step = networks.step_for(model)
        found = gb.measure(step, functools.partial(influence.measure, relative=0.01))
        matrices.append(found["mean"].numpy())
    assert matrices[0] == pytest.approx(matrices[1], rel=1e-8, abs=1e-12)


def test_modules_that_are_chosen_move_as_one_layer_each():
    model = networks.resnet_like()
    optimizer = momentum(model)
    step = networks.step_for(model, optimizer=optimizer)
    chosen = ("layers.1", "layers.0")
    found = gb.measure(step, functools.partial(influence.measure, layers=chosen))
    rows = [key.rpartition("/")[0] for key in found if key.endswith("/sent_mean")]
    assert rows == ["layers.0", "layers.1"]
    names = [n for n, _ in model.named_parameters() if n.startswith("layers.0.")]
    moved = after_a_step(model, optimizer)
    x, _ = networks.batch_for(model)
    before = received(copy.deepcopy(model), x)
    after = received(with_parameters(model, {n: moved[n] for n in names}), x)
    columns = [key.rpartition("/")[0] for key in found if key.endswith("/received_mean")]
    entry = found["mean"][0, columns.index("fc")].item()
    shifts = np.abs(after["fc"].mean(1) - before["fc"].mean(1)) / before["fc"].std(1)
    assert entry == pytest.approx(np.median(shifts), rel=1e-8)
    later = [columns.index(c) for c in columns if c.startswith(("layers.1", "layers.2", "fc"))]
    assert found["layers.0/sent_mean"].item() == pytest.approx(
        found["mean"][0, later].mean().item(), rel=1e-12
    )
    for wrong, words in (("layers.9", "modules of the model"), ("layers", "share parameters")):
        bad = functools.partial(influence.measure, layers=("layers.0", wrong))
        with pytest.raises(ValueError, match=words):
            gb.measure(step, bad)


def test_a_frozen_layer_receives_but_does_not_move():
    model = networks.mlp()
    model[3].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = gb.measure(networks.step_for(model, optimizer=optimizer), "influence")
    assert "3/sent_mean" not in found
    assert found["3/received_mean"] > 0


def test_dead_units_are_left_out_and_a_unit_that_wakes_up_counts_as_infinite():
    old = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 2.0], [1.0, 3.0]]).double()
    new = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 4.0], [1.0, 1.0]]).double()
    sides = [(t.mean(1), t.std(1, correction=0)) for t in (old, new)]
    shift, widening, counted = influence._changes(*sides)
    assert counted.tolist() == [False, True, True, True]
    assert shift.tolist() == [0.0, math.inf, 1.0, 1.0]
    assert widening.tolist() == pytest.approx([0.0, math.inf, math.log(2), math.inf])
    assert _moves.over_units(shift, counted, "median") == 1.0
    assert _moves.over_units(shift, torch.zeros(4, dtype=torch.bool), "median") == 0.0


class Mixed(nn.Module):
    """Parameters outside of layers, a shared weight, attention, an embedding, called out of order.

    The order of registration is not that of the forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(4))
        self.second = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)
        self.third.weight = self.first.weight
        self.norm = nn.LayerNorm(4)
        self.unused = nn.Linear(2, 2)
        self.table = nn.Embedding(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.table(x) + self.scale
        x = torch.tanh(self.first(x))
        x = torch.tanh(F.linear(x, self.second.weight, self.second.bias))
        x = self.norm(torch.tanh(self.third(x)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x).mean(1)


def test_layers_are_in_the_order_of_the_forward_and_each_parameter_in_one():
    model = Mixed().double()
    x = torch.arange(24).reshape(6, 4) % 5
    step = gb.Step(
        model,
        F.cross_entropy,
        (x, torch.arange(6) % 3),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    layers = {layer.name: layer.parameters for layer in _moves.layers_of(step)}
    order = ["", "table", "first", "second", "third", "norm", "attention", "attention.out_proj"]
    assert [name for name in layers if name != "unused"] == [*order, "head"]
    held = [name for names in layers.values() for name in names]
    assert sorted(held) == sorted(step.parameters)
    assert layers[""] == ("scale",)
    assert layers["first"] == ("first.weight", "first.bias")
    assert layers["third"] == ("third.bias",)
    found = gb.measure(step, "influence")
    rows = [key.rpartition("/")[0] for key in found if key.endswith("/sent_mean")]
    assert found["mean"][rows.index("unused")].sum() == 0
    columns = [key.rpartition("/")[0] for key in found if key.endswith("/received_mean")]
    assert columns == ["first", "third", "head"]  # one takes indices, two are not called
    assert found["mean"][rows.index("table"), 0] > 0


class Checkpointed(nn.Module):
    def __init__(self, wrap: bool) -> None:
        super().__init__()
        self.body, self.wrap = networks.mlp(norm="nn"), wrap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.wrap else self.body(x)


@pytest.mark.parametrize("name", ["influence", "interaction", "covariate_shift"])
def test_a_checkpointed_model_gives_the_same_and_keeps_its_statistics(name):
    results = []
    for wrap in (False, True):
        model = Checkpointed(wrap)
        before = copy.deepcopy(model.state_dict())
        batch = networks.batch_for(model.body)
        step = gb.Step(model, F.cross_entropy, batch, optimizer=momentum(model))
        results.append(gb.measure(step, name))
        after = model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
    plain, wrapped = results
    assert plain.keys() == wrapped.keys()
    for key, value in plain.items():
        assert wrapped[key].numpy() == pytest.approx(value.numpy(), rel=1e-10, abs=1e-14), key


def test_keywords_that_cannot_be_are_refused():
    model = networks.mlp()
    step = networks.step_for(model, optimizer=momentum(model))
    for keywords, words in (
        ({"relative": 0.0}, "above 0"),
        ({"relative": math.inf}, "above 0"),
        ({"over": "max"}, "median, mean, rms"),
        ({"layers": ("nowhere",)}, "modules of the model"),
    ):
        with pytest.raises(ValueError, match=words):
            gb.measure(step, functools.partial(influence.measure, **keywords))
