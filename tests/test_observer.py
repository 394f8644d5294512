"""An observer leaves no trace: whatever is measured, and however it ends, training is the same."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import gammabeta as gb
from gammabeta.probes import PROBES
from tests import networks
from tests.networks import batch_for
from tests.traces import same, state_of


def in_place(model):
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    return model


def parametrized():
    """A network whose first weight moves its own buffers whenever it is read in training mode."""
    model = networks.mlp(norm="gb")
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    spectral_norm(first)
    return model


SPECTRAL = "spectral normalization"
# Two run differently at each call unless the random numbers are replayed, one moves its buffers.
BUILDERS = {
    "mlp of ours": lambda: networks.mlp(norm="gb", act="sigmoid"),
    "convolutions of PyTorch's": lambda: networks.conv_residual(norm="nn"),
    "in place": lambda: in_place(networks.conv_residual(norm="gb")),
    "dropout": lambda: networks.functional_net(norm="nn"),
    "renormalized": lambda: networks.renormalized(),
    SPECTRAL: parametrized,
}


def trained(build, steps=2):
    """A network with an optimizer that has state, in the middle of its training."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for seed in range(steps):
        train_once(model, optimizer, batch_for(model, 8, seed))
    return model, optimizer


def train_once(model, optimizer, batch):
    optimizer.zero_grad()
    nn.CrossEntropyLoss()(model(batch[0]), batch[1]).backward()
    optimizer.step()


def step_of(model, optimizer):
    return gb.Step(model, nn.CrossEntropyLoss(), batch_for(model, 8), optimizer=optimizer)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("network", BUILDERS)
@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_leaves_the_training_state_as_it_was(probe, network, training):
    model, optimizer = trained(BUILDERS[network])
    model.train(training)
    before, memory = state_of(model, optimizer), {}
    for _ in range(2):  # also where it remembers
        found = gb.measure(step_of(model, optimizer), probe, memory)
        assert same(state_of(model, optimizer), before)
    assert found, "it measured nothing"
    assert all(not v.requires_grad and v.device.type == "cpu" for v in found.values())


class Stop(BaseException):
    """Like Ctrl-C: no `except Exception` takes it."""


class Counting:
    """A hook that counts the calls of its module, and stops the one that it is told to."""

    def __init__(self):
        self.calls, self.last = 0, None

    def __call__(self, module, args, output):
        self.calls += 1
        if self.calls == self.last:
            raise Stop


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_that_raises_midway_leaves_the_training_state_as_it_was(probe):
    model, optimizer = trained(BUILDERS["dropout"])
    hook = Counting()
    model.bn2.register_forward_hook(hook)
    memory = {}
    gb.measure(step_of(model, optimizer), probe, memory)
    hook.calls = 0
    gb.measure(step_of(model, optimizer), probe, copy.deepcopy(memory))
    total = hook.calls
    assert total, "it ran nothing that could raise"
    before = state_of(model, optimizer)
    for last in sorted({1, 2, (total + 1) // 2, total} & set(range(1, total + 1))):
        hook.calls, hook.last = 0, last
        with pytest.raises(Stop):
            gb.measure(step_of(model, optimizer), probe, copy.deepcopy(memory))
        assert same(state_of(model, optimizer), before), f"stopped at call {last} of {total}"


@pytest.mark.parametrize("network", BUILDERS)
@pytest.mark.parametrize("probe", PROBES)
def test_training_with_a_probe_at_each_step_is_training_without(probe, network):
    histories = []
    for watched in (False, True):
        torch.manual_seed(11)
        model, optimizer = trained(BUILDERS[network])
        memory = {}
        for seed in range(10, 13):
            batch = batch_for(model, 8, seed)
            step = gb.Step(model, nn.CrossEntropyLoss(), batch, optimizer=optimizer)
            if watched:
                gb.measure(step, probe, memory)
            train_once(model, optimizer, batch)
        histories.append((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    assert same(*histories)


def test_all_probes_of_one_step_share_it_without_a_trace():
    model, optimizer = trained(BUILDERS["mlp of ours"])
    before = state_of(model, optimizer)
    step = step_of(model, optimizer)
    together = {name: gb.measure(step, name) for name in PROBES}
    assert same(state_of(model, optimizer), before)
    for name in reversed(PROBES):
        alone = gb.measure(step_of(model, optimizer), name)
        assert same(alone, together[name]), name
