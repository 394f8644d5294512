"""Sizes, growth, paths and effective learning rates of weights, against NumPy."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gammabeta as gb
from gammabeta.probes import weights
from tests import networks

NETWORKS = pytest.mark.parametrize(
    "build",
    [
        pytest.param(functools.partial(networks.NETWORKS[name], norm=norm), id=f"{name}-{norm}")
        for name in ("linear_chain", "mlp", "conv_residual")
        for norm in ("nn", "gb")
    ],
)


def step_of(build, **more) -> gb.Step:
    model = build()
    return gb.Step(model, F.cross_entropy, networks.batch_for(model), **more)


def sgd_steps(model, batch, optimizer, number: int) -> None:
    for _ in range(number):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()


def snapshot(model: nn.Module) -> dict[str, np.ndarray]:
    """The weights of linear and convolutional layers by layer name."""
    kinds = (nn.Linear, nn.Conv2d)
    named = ((name, m) for name, m in model.named_modules() if isinstance(m, kinds))
    return {name: module.weight.detach().double().numpy().copy() for name, module in named}


@NETWORKS
def test_sizes_are_those_of_numpy(build):
    step = step_of(build)
    found = gb.measure(step, "weights")
    expected = {}
    for name, w in snapshot(step.model).items():
        expected[f"{name}/mean_abs"] = np.abs(w).mean()
        expected[f"{name}/norm"] = np.sqrt((w * w).sum())
    assert found.keys() == expected.keys()  # no history, no optimizer: nothing that needs them
    for key, value in expected.items():
        assert found[key].item() == pytest.approx(value, rel=1e-12)


@NETWORKS
def test_growth_and_path_follow_the_weights_through_training(build):
    model = build()
    batch, memory = networks.batch_for(model), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moments = []
    for _ in range(4):
        found = gb.measure(gb.Step(model, F.cross_entropy, batch), "weights", memory)
        moments.append(snapshot(model))
        sgd_steps(model, batch, optimizer, 2)
    for name, start in moments[0].items():
        places = [moment[name] for moment in moments]
        path = sum(np.linalg.norm(b - a) for a, b in itertools.pairwise(places))
        growth = np.linalg.norm(places[-1]) / np.linalg.norm(start)
        assert found[f"{name}/growth"].item() == pytest.approx(growth, rel=1e-12)
        assert found[f"{name}/path"].item() == pytest.approx(path, rel=1e-12)
        assert path > 0


def test_the_effective_learning_rate_takes_the_rate_of_the_parameters_own_group():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))
    model.extend([gb.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)]).double()
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[3:].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=torch.tensor(0.01))
    batch = torch.randn(8, 4).double(), torch.randint(3, (8,))
    found = gb.measure(gb.Step(model, F.cross_entropy, batch, optimizer=optimizer), "weights")
    rates = {key: value.item() for key, value in found.items() if "effective" in key}
    # the last layer feeds no normalization: its length means something
    assert rates == pytest.approx(
        {
            "0/effective_lr": 0.5 / (snapshot(model)["0"] ** 2).sum(),
            "3/effective_lr": 0.01 / (snapshot(model)["3"] ** 2).sum(),
        },
        rel=1e-6,
    )
    without = torch.optim.SGD(model[3].parameters(), lr=0.01)
    found = gb.measure(gb.Step(model, F.cross_entropy, batch, optimizer=without), "weights")
    assert [key for key in found if "effective" in key] == ["3/effective_lr"]


class PreActivation(nn.Module):
    """x + conv2(relu(bn2(conv1(relu(bn1(x)))))), normalized behind the sum."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.norm1, self.norm2, self.last = nn.BatchNorm1d(6), nn.BatchNorm1d(6), last
        self.inner, self.outer, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        trunk = self.stem(x)
        branch = self.inner(F.relu(self.norm1(trunk)))
        trunk = trunk + self.outer(F.relu(self.norm2(branch)))
        return self.head(F.relu(self.last(trunk)))


def test_only_weights_whose_length_the_network_does_not_see_have_an_effective_learning_rate():
    """Doubled, they leave the loss as it is; weights behind which a residual sum follows do not."""
    torch.manual_seed(1)
    model = PreActivation(nn.BatchNorm1d(6)).double()
    batch = torch.randn(16, 4).double(), torch.randint(3, (16,))
    step = gb.Step(model, F.cross_entropy, batch)
    found = weights.scale_invariant(step)
    unchanged = set()
    for layer in ("stem", "inner", "outer", "head"):
        name = f"{layer}.weight"
        loss, _ = step.gradient({name: 2 * step.parameters[name]})
        if torch.isclose(loss, step.loss, rtol=1e-3):
            unchanged.add(layer)
    assert found == unchanged == {"inner"}


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_weight_is_scale_invariant_if_and_only_if_its_length_does_not_change_the_loss(name):
    """Also of outputs that are concatenated, pooled or convolved by channel and then normalized."""
    step = networks.step_for(networks.NETWORKS[name](norm="gb"), 16)
    unchanged = set()
    for layer, weight in weights.matrices(step).items():
        loss, _ = step.gradient({weight: 2 * step.parameters[weight]})
        if torch.isclose(loss, step.loss, rtol=1e-3):
            unchanged.add(layer)
    assert weights.scale_invariant(step) == unchanged
    assert len(unchanged) == len(weights.matrices(step)) - 1  # all but the classifier


def test_a_weight_whose_output_also_goes_past_the_normalization_is_not_scale_invariant():
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x):
            hidden = self.stem(x)
            return self.head(F.relu(self.norm(hidden)) + hidden)

    batch = torch.randn(16, 4).double(), torch.randint(3, (16,))
    assert weights.scale_invariant(gb.Step(Beside().double(), F.cross_entropy, batch)) == set()


def test_what_is_scale_invariant_is_found_out_once_and_by_one_forward_pass():
    model = networks.resnet_like()
    passes = []
    first, forward = model.conv1, model.conv1.forward
    first.forward = lambda x: passes.append(x) or forward(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory: dict = {}
    for expected in (2, 3):  # the step's own pass and one more; then the step's own
        found = gb.measure(networks.step_for(model, 8, optimizer=optimizer), "weights", memory)
        assert len(passes) == expected
        assert sum("effective_lr" in key for key in found) == 9


@pytest.mark.parametrize("bias", [False, True])
def test_before_layer_normalization_a_bias_spoils_scale_invariance(bias):
    model = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    batch = torch.randn(16, 4).double(), torch.randint(3, (16,))
    found = weights.scale_invariant(gb.Step(model, F.cross_entropy, batch))
    assert found == (set() if bias else {"0"})


def test_a_frozen_weight_is_left_out_and_starts_when_it_is_thawed():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    batch, memory = (torch.randn(8, 4), torch.randint(3, (8,))), {}
    model[0].requires_grad_(False)
    found = gb.measure(gb.Step(model, F.cross_entropy, batch), "weights", memory)
    assert set(found) == {"2/mean_abs", "2/norm"}
    model[0].requires_grad_(True)
    found = gb.measure(gb.Step(model, F.cross_entropy, batch), "weights", memory)
    assert "0/growth" not in found
    assert found["2/growth"].item() == 1.0


def test_tied_weights_are_measured_as_those_of_each_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    batch, memory = (torch.randn(8, 4), torch.randint(3, (8,))), {}
    first = gb.measure(gb.Step(model, F.cross_entropy, batch), "weights", memory)
    assert set(first) == {"0/mean_abs", "0/norm", "2/mean_abs", "2/norm"}
    with torch.no_grad():
        model[0].weight *= 3
    second = gb.measure(gb.Step(model, F.cross_entropy, batch), "weights", memory)
    for layer in "02":
        assert second[f"{layer}/growth"].item() == pytest.approx(3)
        assert second[f"{layer}/path"].item() == pytest.approx(2 * first["0/norm"].item())


def test_a_batch_with_a_nan_does_not_settle_what_is_scale_invariant():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    optimizer, memory = torch.optim.SGD(model.parameters(), lr=0.1), {}
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    for batch, keys in ((x * math.nan, []), (x, ["0/effective_lr"])):
        step = gb.Step(model, F.cross_entropy, (batch, y), optimizer=optimizer)
        found = gb.measure(step, "weights", memory)
        assert [key for key in found if "effective" in key] == keys
