"""Where normalization layers sit is seen in any code, and looking changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gammabeta as gb
from tests import networks


def seen(model, batch=None, **keywords):
    batch = networks.batch_for(model) if batch is None else batch
    found = gb.sites(model, batch, **keywords)
    return {s.name: (s.producer, s.activation, s.consumers, s.calls) for s in found}


class Wrapped(nn.Module):
    """Any function of layers as a model."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x)


def around(function, norm=None):
    """fc1, bn, what ``function`` makes of it, fc2."""
    layers = {"fc1": nn.Linear(4, 6), "bn": norm or gb.BatchNorm1d(6), "fc2": nn.Linear(6, 2)}
    return Wrapped(lambda m, x: m.fc2(function(m, m.bn(m.fc1(x)))), **layers)


X = torch.linspace(-1, 1, 64).view(16, 4)


@pytest.mark.parametrize("norm", ["nn", "gb"])
def test_the_sites_of_a_residual_network_are_those_of_its_drawing(norm):
    assert seen(networks.resnet_like(norm)) == {
        "bn1": ("conv1", "relu", ("layers.0.conv1",), 1),
        "layers.0.bn1": ("layers.0.conv1", "relu", ("layers.0.conv2",), 1),
        "layers.0.bn2": ("layers.0.conv2", None, ("layers.1.conv1", "layers.1.downsample.0"), 1),
        "layers.1.bn1": ("layers.1.conv1", "relu", ("layers.1.conv2",), 1),
        "layers.1.bn2": ("layers.1.conv2", None, ("layers.2.conv1", "layers.2.downsample.0"), 1),
        "layers.1.downsample.1": (
            *("layers.1.downsample.0", None),
            *(("layers.2.conv1", "layers.2.downsample.0"), 1),
        ),
        "layers.2.bn1": ("layers.2.conv1", "relu", ("layers.2.conv2",), 1),
        "layers.2.bn2": ("layers.2.conv2", None, ("fc",), 1),
        "layers.2.downsample.1": ("layers.2.downsample.0", None, ("fc",), 1),
    }


@pytest.mark.parametrize("norm", ["nn", "gb"])
def test_the_sites_of_a_dense_network_are_fed_by_the_last_convolution_of_a_concatenation(norm):
    found = seen(networks.densenet_like(norm))
    assert found["1.norm1"] == ("0", "relu", ("1.conv1",), 1)
    assert found["2.norm1"] == ("1.conv2", "relu", ("2.conv1",), 1)
    assert found["3"] == ("2.conv2", "relu", ("5",), 1)
    assert found["7.norm1"] == ("5", "relu", ("7.conv1",), 1)  # through average pooling
    assert found["8"] == ("7.conv2", "relu", ("12",), 1)


@pytest.mark.parametrize("norm", ["nn", "gb"])
def test_functional_code_shows_as_much_as_modules(norm):
    assert seen(networks.functional_net(norm)) == {
        "bn1": ("fc1", "sigmoid", ("fc2",), 1),
        "bn2": ("fc2", None, ("head",), 1),  # dropout comes before its tanh
    }


def test_relu6_is_told_from_other_bounds():
    found = seen(networks.mobilenet_like())
    assert {found["1"][1], found["3.conv.4"][1]} == {"relu6"}
    assert seen(around(lambda m, h: F.hardtanh(h)), X)["bn"][1] == "hardtanh"


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", lambda m, h: F.relu(h, inplace=True)),
        ("relu", lambda m, h: h.relu_()),
        ("relu", lambda m, h: torch.relu(h)),
        ("tanh", lambda m, h: h.to(torch.float64).float().tanh()),
        ("gelu", lambda m, h: F.gelu(h)),
        ("silu", lambda m, h: F.silu(h)),
        ("softplus", lambda m, h: F.softplus(h)),
        ("leaky_relu", lambda m, h: F.leaky_relu(h)),
        ("prelu", lambda m, h: F.prelu(h, torch.tensor([0.1]))),
        ("clamp", lambda m, h: h.clamp(min=0)),
        (None, lambda m, h: h * torch.sigmoid(h)),  # two functions take the output
        (None, lambda m, h: h),
        (None, lambda m, h: (h + 1).relu()),
    ],
)
def test_the_activation_is_the_function_that_alone_takes_the_output(name, function):
    found = seen(around(function), X)["bn"]
    assert found == ("fc1", name, ("fc2",), 1)


def test_what_only_looks_at_the_output_is_no_use_of_it():
    logged = []

    def looks(m, h):
        logged.append(h.detach().mean().item())
        return h.relu()

    assert seen(around(looks), X)["bn"][1] == "relu"
    assert len(logged) == 1


def test_a_fused_layer_names_its_own_activation():
    assert seen(around(lambda m, h: h, gb.BatchNormAct1d(6, act="silu")), X)["bn"][1] == "silu"
    leaky = gb.BatchNormAct1d(6, act=("leaky_relu", 0.2))
    assert seen(around(lambda m, h: h, leaky), X)["bn"][1] == "leaky_relu"
    assert seen(around(lambda m, h: h, gb.BatchNormAct1d(6, act=None)), X)["bn"][1] is None


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(6),
        nn.GroupNorm(2, 6),
        nn.BatchNorm1d(6),
        nn.SyncBatchNorm(6),
        gb.BatchRenorm1d(6),
        gb.GhostBatchNorm1d(6, virtual_batch_size=8),
        gb.IterNorm1d(6),
    ],
    ids=lambda n: type(n).__name__,
)
def test_all_kinds_of_normalization_are_found(norm):
    found = seen(around(lambda m, h: h.relu(), norm), X)
    assert found == {"bn": ("fc1", "relu", ("fc2",), 1)}


def test_a_producer_is_seen_through_pooling_views_and_dropout_but_not_through_an_activation():
    conv, bn = nn.Conv2d(1, 3, 3, bias=False), gb.BatchNorm2d(3)

    def model(between):
        return Wrapped(lambda m, x: m.bn(between(m.conv(x))), conv=conv, bn=bn)

    x = torch.randn(4, 1, 8, 8)
    for between in (
        lambda h: F.max_pool2d(h, 2),
        lambda h: F.adaptive_max_pool2d(h, 2),
        lambda h: F.dropout2d(h, 0.5),
        lambda h: h.flatten(2).view(4, 3, 6, 6)[:, :, 1:].contiguous(),
        lambda h: torch.cat([x[:, :0, :6, :6], 0.5 * h - 1], 1),
    ):
        assert seen(model(between), x)["bn"] == ("conv", None, (), 1)
    for between in (torch.relu, lambda h: h * h, lambda h: F.avg_pool2d(h.abs(), 2)):
        assert seen(model(between), x)["bn"][0] is None


def test_a_layer_on_the_input_has_no_producer_and_one_at_the_end_no_consumers():
    model = nn.Sequential(gb.BatchNorm1d(4), nn.Linear(4, 2), gb.BatchNorm1d(2))
    assert seen(model, X) == {"0": (None, None, ("1",), 1), "2": ("1", None, (), 1)}


def test_a_layer_used_at_several_places_is_one_site_with_its_calls():
    layers = {"fc1": nn.Linear(4, 4), "bn": gb.BatchNorm1d(4), "fc2": nn.Linear(4, 4)}
    model = Wrapped(lambda m, x: m.bn(m.fc2(m.bn(m.fc1(x)).relu())), **layers)
    assert seen(model, X) == {"bn": ("fc1", "relu", ("fc2",), 2)}


def test_gating_is_passed_on_the_way_to_consumers():
    def gated(m, h):
        return h * torch.sigmoid(m.gate(h.mean(0, keepdim=True)))

    model = around(gated)
    model.gate = nn.Linear(6, 6)
    assert seen(model, X)["bn"] == ("fc1", None, ("gate", "fc2"), 1)


def test_a_layer_that_does_not_run_is_no_site():
    model = around(lambda m, h: h.relu())
    model.spare = gb.BatchNorm1d(6)
    assert set(seen(model, X)) == {"bn"}


def test_parametrized_and_hooked_weights_belong_to_their_layer():
    model = around(lambda m, h: h.relu())
    torch.nn.utils.parametrizations.weight_norm(model.fc1)
    torch.nn.utils.parametrizations.spectral_norm(model.fc2)
    before = copy.deepcopy(model.state_dict())
    assert seen(model, X) == {"bn": ("fc1", "relu", ("fc2",), 1)}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_layer_around_layers_is_the_code_around_them():
    class Adapted(nn.Linear):
        """A linear layer that adds two small ones to what it computes."""

        def __init__(self):
            super().__init__(4, 6)
            self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 6)

        def forward(self, x):
            return super().forward(x) + self.up(self.down(x))

    model = around(lambda m, h: h.relu())
    model.fc1 = Adapted()
    assert seen(model, X)["bn"] == ("fc1.up", "relu", ("fc2",), 1)
    assert gb.Step(model, F.mse_loss, (X, torch.zeros(16, 2))).weights == {
        "fc1": ("fc1.weight", "fc1.bias"),
        "fc1.down": ("fc1.down.weight", "fc1.down.bias"),
        "fc1.up": ("fc1.up.weight", "fc1.up.bias"),
        "fc2": ("fc2.weight", "fc2.bias"),
    }


def test_an_exception_that_the_model_catches_does_not_end_the_search():
    class Refused(Exception):
        pass

    def refuses(module, args):
        raise Refused

    def tries(m, h):
        try:
            return m.second(h)
        except Refused:
            return h.relu()

    model = around(tries)
    model.second = gb.BatchNorm1d(6)
    model.second.register_forward_pre_hook(refuses)
    assert seen(model, X) == {"bn": ("fc1", "relu", ("fc2",), 1)}
    model.second = Wrapped(lambda m, h: refuses(m, h))
    assert seen(model, X) == {"bn": ("fc1", "relu", ("fc2",), 1)}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["fc1", "bn", "bn hook", "between"])
def test_an_exception_anywhere_ends_the_tracing(place, error):
    def fails(*args):
        raise error

    model = around(fails if place == "between" else lambda m, h: h.relu())
    if place == "bn hook":
        model.bn.register_forward_hook(fails)
    elif place != "between":
        model.get_submodule(place).forward = fails
    with pytest.raises(error):
        gb.sites(model, X)
    assert torch.overrides._get_current_function_mode() is None


def test_a_layer_computes_as_in_training_without_a_mode_around_it():
    modes = []

    class Asks(nn.BatchNorm1d):
        def forward(self, x):
            modes.append(torch.overrides._get_current_function_mode())
            return super().forward(x)

    assert seen(around(lambda m, h: h.relu(), Asks(6)), X)["bn"] == ("fc1", "relu", ("fc2",), 1)
    assert modes == [None]


def test_a_custom_function_in_a_module_is_passed():
    class Swish(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * torch.sigmoid(x)

    model = around(lambda m, h: m.swish(h))
    model.swish = Wrapped(lambda m, x: Swish.apply(x))
    assert seen(model, X)["bn"] == ("fc1", None, ("fc2",), 1)


def test_the_way_is_seen_inside_checkpoints():
    def inner(m, x):
        return checkpoint(lambda h: m.bn(m.fc1(h)).relu(), x, use_reentrant=False)

    layers = {"fc1": nn.Linear(4, 6), "bn": gb.BatchNorm1d(6), "fc2": nn.Linear(6, 2)}
    model = Wrapped(lambda m, x: m.fc2(inner(m, x)), **layers)
    assert seen(model, X)["bn"] == ("fc1", "relu", ("fc2",), 1)
    step = gb.Step(model, F.mse_loss, (X, torch.zeros(16, 2)))
    assert [site.calls for site in step.sites] == [1]  # not again in the backward pass


def test_a_batch_is_a_pair_an_input_or_whatever_forward_takes():
    model = around(lambda m, h: h.relu())
    expected = seen(model, (X, None))
    assert seen(model, X) == expected
    assert seen(model, {"x": X}, forward=lambda m, b: m(b["x"])) == expected


def test_a_model_without_normalization_has_no_sites():
    assert seen(networks.mlp(norm="none")) == {}


def test_the_model_is_untouched_and_in_training_mode_meanwhile():
    model = networks.resnet_like().eval()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes = []
    model.bn1.register_forward_hook(lambda m, a, o: modes.append(m.training))
    hooks[[*model.modules()].index(model.bn1)] += 1
    seen(model)
    assert modes == [True]
    assert flags == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
