"""The joint step against the layers' own, by steps really made and by full Hessians."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import gammabeta as gb
from gammabeta.probes import interaction
from tests import networks

CASES = pytest.mark.parametrize(
    "build",
    [
        functools.partial(networks.linear_chain, depth=4, width=3),
        networks.mlp,
        functools.partial(networks.mlp, norm="nn", act="tanh"),
        functools.partial(networks.conv_residual, norm="nn", act="tanh"),
        functools.partial(networks.conv_residual, act="relu"),
    ],
)


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with a state, from two real steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for seed in (5, 6):
        x, y = networks.batch_for(model, seed=seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


def after_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The parameters after a real step of copies."""
    both = copy.deepcopy([model, optimizer])
    x, y = networks.batch_for(model)
    both[1].zero_grad()
    F.cross_entropy(both[0](x), y).backward()
    both[1].step()
    return {name: p.detach() for name, p in both[0].named_parameters()}


def groups_of(model: nn.Module) -> dict[str, list[str]]:
    """Parameters by layer; these networks register their layers in the order of the forward."""
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return groups


def loss_of(model: nn.Module, values: dict[str, torch.Tensor]) -> float:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in values.items():
            twin.get_parameter(name).copy_(value)
    x, y = networks.batch_for(model)
    return F.cross_entropy(twin(x), y).item()


@CASES
def test_changes_of_the_loss_are_those_of_steps_really_made(build):
    model = build()
    optimizer = trained(model)
    found = gb.measure(networks.step_for(model, optimizer=optimizer), "interaction")
    moved, groups = after_a_step(model, optimizer), groups_of(model)
    start, below, latest, separate = loss_of(model, {}), {}, loss_of(model, {}), 0.0
    for layer, names in groups.items():
        own = {name: moved[name] for name in names}
        alone = loss_of(model, own) - start
        separate += alone
        below |= own
        loss = loss_of(model, below)
        # the loss is near 1: differences are exact to 1e-15 or so
        assert found[f"{layer}/alone"].item() == pytest.approx(alone, rel=1e-8, abs=1e-14)
        after = found[f"{layer}/after_below"].item()
        assert after == pytest.approx(loss - latest, rel=1e-8, abs=1e-14)
        latest = loss
    joint = loss_of(model, moved) - start
    expected = {"joint": joint, "separate": separate, "interaction": joint - separate}
    for key, value in expected.items():
        assert found[key].item() == pytest.approx(value, rel=1e-8, abs=1e-14), key
    total = sum(found[f"{layer}/after_below"].item() for layer in groups)
    assert total == pytest.approx(joint, rel=1e-10)
    rows = [key.rpartition("/")[0] for key in found if key.endswith("/alone")]
    assert rows == list(groups)
    assert abs(joint - separate) > 1e-5


@CASES
def test_terms_of_first_and_second_order_are_those_of_the_full_hessian(build):
    model = build()
    optimizer = trained(model)
    found = gb.measure(networks.step_for(model, optimizer=optimizer), "interaction")
    moved, groups = after_a_step(model, optimizer), groups_of(model)
    names = [name for held in groups.values() for name in held]
    values = tuple(model.get_parameter(name).detach().clone() for name in names)
    x, y = networks.batch_for(model)
    twin = copy.deepcopy(model)

    def loss(*parts: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(twin, dict(zip(names, parts, strict=True)), x), y)

    blocks = torch.autograd.functional.hessian(loss, values)
    gradient = torch.autograd.functional.jacobian(loss, values)
    steps = [(moved[n] - v).numpy().ravel() for n, v in zip(names, values, strict=True)]
    sizes = [len(d) for d in steps]
    full = np.block(
        [
            [blocks[i][j].numpy().reshape(sizes[i], sizes[j]) for j in range(len(names))]
            for i in range(len(names))
        ]
    )
    split = np.zeros((len(groups), sum(sizes)))  # the step of each layer, zeros elsewhere
    ends = np.cumsum([0, *sizes])
    for k, held in enumerate(groups.values()):
        for name in held:
            at = names.index(name)
            split[k, ends[at] : ends[at + 1]] = steps[at]
    pairs = split @ full @ split.T
    scale = np.abs(pairs).max()
    assert found["pairs"].numpy() == pytest.approx(pairs, rel=1e-8, abs=1e-10 * scale)
    whole = split.sum(0)
    assert found["second_order"].item() == pytest.approx(whole @ full @ whole / 2, rel=1e-8)
    between = (pairs.sum() - np.trace(pairs)) / 2
    assert found["second_order_interaction"].item() == pytest.approx(between, rel=1e-8)
    first = sum((g.numpy().ravel() * d).sum() for g, d in zip(gradient, steps, strict=True))
    assert found["first_order"].item() == pytest.approx(first, rel=1e-8)
    relative = found["interaction"].item() / abs(first)
    assert found["relative"].item() == pytest.approx(relative, rel=1e-8)


def chain(weights: list[float]) -> nn.Sequential:
    """Linear layers of one unit: y = x w₁⋯w_K."""
    layers = [nn.Linear(1, 1, bias=False).double() for _ in weights]
    for layer, weight in zip(layers, weights, strict=True):
        nn.init.constant_(layer.weight, weight)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("weights", [[0.7], [1.5, -0.8], [1.5, 0.8, -1.2, 0.6, 1.1]])
@pytest.mark.parametrize("rate", [1e-3, 0.1, 1.0])
def test_the_chain_of_one_unit_layers_has_its_closed_form(weights, rate):
    x = 1.3
    model = chain(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    batch = torch.full((1, 1), x, dtype=torch.float64)
    step = gb.Step(model, None, batch, optimizer=optimizer, forward=lambda net, b: net(b).sum())
    found = gb.measure(step, "interaction")
    count = len(weights)

    def without(*left_out: int) -> float:
        return x * math.prod(w for i, w in enumerate(weights) if i not in left_out)

    g = [without(k) for k in range(count)]
    joint = x * math.prod(w - rate * s for w, s in zip(weights, g, strict=True)) - without()
    first = -rate * sum(s * s for s in g)
    # Goodfellow et al.: the terms of order two and more, each for one subset of the layers
    terms = [
        math.prod(-rate * g[k] for k in subset) * without(*subset)
        for order in range(2, count + 1)
        for subset in itertools.combinations(range(count), order)
    ]
    second = [
        rate**2 * g[k] * g[at] * without(k, at) for k, at in itertools.combinations(range(count), 2)
    ]
    exact = {"rel": 1e-8, "abs": 1e-14}
    assert found["joint"].item() == pytest.approx(joint, **exact)
    assert found["separate"].item() == pytest.approx(first, **exact)
    assert found["first_order"].item() == pytest.approx(first, **exact)
    assert found["interaction"].item() == pytest.approx(sum(terms), **exact)
    assert found["interaction"].item() == pytest.approx(joint - first, **exact)
    assert found["second_order"].item() == pytest.approx(sum(second), **exact)
    assert found["second_order_interaction"].item() == pytest.approx(sum(second), **exact)
    for k, at in itertools.product(range(count), repeat=2):
        pair = 0.0 if k == at else rate**2 * g[k] * g[at] * without(k, at)
        assert found["pairs"][k, at].item() == pytest.approx(pair, **exact)


def test_the_second_order_interaction_is_the_limit_of_short_steps():
    model = networks.mlp(act="tanh")
    errors = []
    for rate in (1e-2, 1e-3):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        found = gb.measure(networks.step_for(model, optimizer=optimizer), "interaction")
        both = found["interaction"].item(), found["second_order_interaction"].item()
        errors.append(abs(both[0] / both[1] - 1))
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 5


def test_layers_that_do_not_meet_do_not_interact():
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(2, 1).double(), nn.Linear(2, 1).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x).square().mean() + self.other(x).square().mean()

    model, x = Apart(), torch.randn(5, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = gb.Step(model, None, x, optimizer=optimizer, forward=lambda net, b: net(b))
    found = gb.measure(step, "interaction")
    assert found["interaction"].item() == pytest.approx(0, abs=1e-14)
    assert found["pairs"][0, 1].item() == found["pairs"][1, 0].item() == 0
    assert found["second_order"].item() > 0
    assert found["joint"].item() < -0.01


def test_one_layer_of_all_parameters_has_no_interaction():
    model = networks.mlp()
    step = networks.step_for(model, optimizer=trained(model))
    whole = gb.measure(step, functools.partial(interaction.measure, layers=("",)))
    parts = gb.measure(step, "interaction")
    assert whole["interaction"] == 0
    for key in ("joint", "second_order", "first_order"):
        assert whole[key].item() == pytest.approx(parts[key].item(), rel=1e-10)
    assert whole["/alone"].item() == whole["joint"].item()


def test_what_cannot_be_had_is_absent():
    model = networks.mlp()
    assert gb.measure(networks.step_for(model), "interaction") == {}
    plain = functools.partial(interaction.measure, relative=0.01, second_order=False)
    found = gb.measure(networks.step_for(model), plain)
    assert found["joint"] < 0
    assert not {"pairs", "second_order", "second_order_interaction"} & found.keys()
    constant = gb.Step(
        model,
        None,
        networks.batch_for(model),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        forward=lambda net, batch: net(batch[0]).sum() * 0,
    )
    found = gb.measure(constant, "interaction")
    assert "relative" not in found
    assert found["joint"] == found["interaction"] == found["second_order"] == 0


class _Once(torch.autograd.Function):
    """The square, with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return 2 * ctx.saved_tensors[0] * dy


def test_a_model_without_second_derivatives_is_told_what_to_do():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 2, dtype=torch.float64)
    step = gb.Step(
        model,
        None,
        x,
        optimizer=optimizer,
        forward=lambda net, b: _Once.apply(net(b)).square().mean(),
    )
    with pytest.raises(RuntimeError, match="second_order=False"):
        gb.measure(step, "interaction")
    found = gb.measure(step, functools.partial(interaction.measure, second_order=False))
    assert found["joint"] != 0


def test_dropout_drops_the_same_in_every_run():
    model = networks.functional_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    found = gb.measure(networks.step_for(model, optimizer=optimizer), "interaction")
    assert found["joint"].item() == pytest.approx(found["first_order"].item(), rel=1e-3)
