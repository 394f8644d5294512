"""Sizes of gradients, their slope with depth, dead and saturated units, against slow twins."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gammabeta as gb
from gammabeta.probes import gradients
from tests import networks

NETWORKS = pytest.mark.parametrize(
    "build",
    [
        pytest.param(functools.partial(networks.NETWORKS[name], norm=norm), id=f"{name}-{norm}")
        for name in ("linear_chain", "mlp", "conv_residual")
        for norm in ("nn", "gb")
    ],
)


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    kinds = (nn.Linear, nn.Conv2d)
    named = ((name, m) for name, m in model.named_modules() if isinstance(m, kinds))
    return {name: module.weight for name, module in named}


def by_differences(model, batch, weight: nn.Parameter, h: float = 1e-6) -> np.ndarray:
    """∂L/∂W by central differences of the loss, entry by entry."""
    flat, found = weight.data.view(-1), np.empty(weight.numel())
    with torch.no_grad():
        for i in range(len(flat)):
            before, losses = flat[i].item(), []
            for move in (h, -h):
                flat[i] = before + move
                losses.append(F.cross_entropy(model(batch[0]), batch[1]).item())
            flat[i] = before
            found[i] = (losses[0] - losses[1]) / (2 * h)
    return found.reshape(weight.shape)


@NETWORKS
def test_sizes_are_those_of_the_gradient_of_a_backward_pass(build):
    model = build()
    batch = networks.batch_for(model)
    found = gb.measure(gb.Step(model, F.cross_entropy, batch), "gradients")
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    weights = weights_of(model)
    norms = {}
    for name, weight in weights.items():
        g, w = weight.grad.numpy(), weight.detach().numpy()
        norms[name] = math.sqrt((g**2).sum())
        assert found[f"{name}/mean_abs"].item() == pytest.approx(np.abs(g).mean(), rel=1e-8)
        assert found[f"{name}/norm"].item() == pytest.approx(norms[name], rel=1e-8)
        scaled = norms[name] * math.sqrt((w**2).sum())
        assert found[f"{name}/scaled"].item() == pytest.approx(scaled, rel=1e-8)
    assert {key.rpartition("/")[0] for key in found if key.endswith("/norm")} == weights.keys()
    assert found["zero_layers"].item() == 0
    order = [key.rpartition("/")[0] for key in found if key.endswith("/norm")]
    heights = [math.log10(norms[name]) for name in order]
    slope = -np.polyfit(range(len(heights)), heights, 1)[0]
    assert found["slope"].item() == pytest.approx(slope, rel=1e-8)


@NETWORKS
def test_sizes_are_those_of_differences_of_the_loss(build):
    model = build()
    batch = networks.batch_for(model)
    found = gb.measure(gb.Step(model, F.cross_entropy, batch), "gradients")
    name, weight = next(iter(weights_of(model).items()))
    g = by_differences(model, batch, weight)
    # central differences of step 1e-6: rounding 1e-16/1e-6, truncation 1e-12
    assert found[f"{name}/norm"].item() == pytest.approx(np.linalg.norm(g), rel=1e-6)
    assert found[f"{name}/mean_abs"].item() == pytest.approx(np.abs(g).mean(), rel=1e-6)


def chain(act: type[nn.Module], gain: float, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(10):
        linear = nn.Linear(40, 40, bias=not norm)
        nn.init.normal_(linear.weight, std=gain / math.sqrt(40))
        layers += [linear, nn.BatchNorm1d(40), act()] if norm else [linear, act()]
    return nn.Sequential(*layers, nn.Linear(40, 10))


def test_gradients_vanish_through_sigmoids_and_explode_through_large_weights():
    batch = torch.randn(64, 40), torch.randint(10, (64,))

    def slope(model) -> float:
        return gb.measure(gb.Step(model, F.cross_entropy, batch), "gradients")["slope"].item()

    # each sigmoid's slope is at most a quarter: less than log10(1/4) = −0.6 a layer
    assert slope(chain(nn.Sigmoid, 1.0)) < -0.5
    assert slope(chain(nn.Identity, 10.0)) == pytest.approx(0.0, abs=0.15)
    # weights of a linear chain see the others' gains alike; ReLU with gain √2 keeps its norm
    assert abs(slope(chain(nn.ReLU, math.sqrt(2)))) < 0.1
    assert slope(chain(nn.ReLU, math.sqrt(2), norm=True)) > 0.05


def test_the_slope_is_that_of_a_line_with_gaps():
    values = [10.0, 0.0, 1000.0, 100.0, 10_000.0]
    kept = [0, 2, 3, 4]
    expected = np.polyfit([-i for i in kept], [math.log10(values[i]) for i in kept], 1)[0]
    found = gradients.slope([torch.tensor(v) for v in values])
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert gradients.slope([torch.tensor(0.0), torch.tensor(1.0)]) is None
    assert gradients.slope([]) is None


def test_layers_without_gradient_are_counted():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    nn.init.zeros_(model[3].weight)
    batch = torch.randn(8, 4), torch.randint(3, (8,))
    found = gb.measure(gb.Step(model, F.cross_entropy, batch), "gradients")
    assert found["0/norm"].item() == 0
    assert found["zero_layers"].item() == 1
    assert "slope" not in found


# activation -> β at which a unit is dead, β at which it is only saturated: |x̂| is at most √7
PLANTED = {
    "ReLU": (-10.0, None),
    "Sigmoid": (None, 20.0),
    "Tanh": (None, -8.0),
    "Hardtanh": (9.0, None),
}


@pytest.mark.parametrize("act", PLANTED)
@pytest.mark.parametrize("kind", ["dense", "images"])
def test_planted_dead_and_saturated_units_are_found(act, kind):
    dead, saturated = PLANTED[act]
    if kind == "dense":
        model = nn.Sequential(
            nn.Linear(5, 8), gb.BatchNorm1d(8), getattr(nn, act)(), nn.Linear(8, 3)
        )
        x = torch.randn(8, 5).double()
    else:
        model = nn.Sequential(nn.Conv2d(2, 8, 3), gb.BatchNorm2d(8), getattr(nn, act)())
        model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)])
        x = torch.randn(2, 2, 4, 4).double()
    with torch.no_grad():
        model[1].bias[:3] = dead or 0.0
        model[1].bias[5:] = saturated or model[1].bias[5:]
    step = gb.Step(model.double(), F.cross_entropy, (x, torch.randint(3, (len(x),))))
    found = gb.measure(step, "gradients")
    expected = 3 / 8 if dead else 0.0, 3 / 8
    assert (found["1/dead"].item(), found["1/saturated"].item()) == expected
    assert (found["dead"].item(), found["saturated"].item()) == expected
    # a dead unit passes nothing to its weights
    if dead:
        assert (step.gradients["0.weight"][:3] == 0).all()


@pytest.mark.parametrize("act", ["relu", "sigmoid", "tanh", "softplus", ("leaky_relu", 0.01)])
def test_a_fused_activation_counts_as_the_same_one_behind_the_layer(act):
    """Also behind a residual, as far as the activation can be inverted."""
    name = act if isinstance(act, str) else act[0]
    norm, fused = gb.BatchNorm1d(6).double(), gb.BatchNormAct1d(6, act=act).double()
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([-9.0, -40.0, 0.0, 6.0, -40.0, 1.0]))
        fused.bias.copy_(norm.bias)
    split = nn.Sequential(norm, Function(getattr(F, name)), nn.Linear(6, 3).double())
    whole = nn.Sequential(fused, split[2])
    batch = torch.randn(8, 6).double(), torch.randint(3, (8,))
    apart, together = (
        gb.measure(gb.Step(model, F.cross_entropy, batch), "gradients") for model in (split, whole)
    )
    for key in ("0/dead", "0/saturated", "dead", "saturated"):
        assert apart[key] == together[key]
    assert apart["saturated"] > 0 or name == "leaky_relu"


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_an_activation_in_place_and_one_with_other_parameters():
    batch = torch.randn(8, 4).double(), torch.randint(3, (8,))

    def measured(act) -> dict[str, torch.Tensor]:
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), act, nn.Linear(6, 3)).double()
        nn.init.constant_(model[1].bias[:2], -9.0)
        return gb.measure(gb.Step(model, F.cross_entropy, batch), "gradients")

    assert measured(nn.ReLU(inplace=True))["1/dead"].item() == pytest.approx(1 / 3)
    # known only with its default slope, limits, …
    assert "1/dead" in measured(nn.Hardtanh())
    assert "dead" not in measured(nn.Hardtanh(-20.0, 20.0))


@pytest.mark.parametrize(("act", "edge"), [("Sigmoid", 5.99), ("Tanh", 2.99)])
def test_a_unit_is_saturated_from_a_hundredth_of_the_largest_slope_on(act, edge):
    model = nn.Sequential(nn.BatchNorm1d(2, eps=1e-12), getattr(nn, act)(), nn.Linear(2, 2))
    with torch.no_grad():
        # x̂ is ±1: the values closest to 0 are on either side of the edge
        model[0].bias[:] = torch.tensor([edge - 0.02, -(edge + 0.02)]) + torch.tensor([1.0, -1.0])
    batch = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double(), torch.tensor([0, 1])
    found = gb.measure(gb.Step(model.double(), F.cross_entropy, batch), "gradients")
    assert found["0/saturated"].item() == 0.5
    assert found["0/dead"].item() == 0


def test_behind_layer_normalization_the_last_axis_holds_the_units():
    model = nn.Sequential(nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 1), nn.Flatten()).double()
    nn.init.constant_(model[0].bias[:2], -9.0)
    batch = torch.randn(6, 4, 5).double(), torch.randint(4, (6,))
    found = gb.measure(gb.Step(model, F.cross_entropy, batch), "gradients")
    assert found["0/dead"].item() == 2 / 5


def test_one_live_sample_keeps_a_unit_alive():
    model = nn.Sequential(nn.Linear(1, 1), gb.BatchNorm1d(1), nn.ReLU(), nn.Linear(1, 2))
    batch = torch.tensor([[0.0]] * 9 + [[1.0]]), torch.randint(2, (10,))
    nn.init.ones_(model[0].weight)
    for bias, share in ((-2.9, 0.0), (-3.1, 1.0)):  # the one x̂ above 0 is √9
        nn.init.constant_(model[1].bias, bias)
        step = gb.Step(model, F.cross_entropy, batch)
        assert gb.measure(step, "gradients")["1/dead"].item() == share


CLOSED = {
    "relu": (lambda z: (z > 0).double(), 1.0),
    "sigmoid": (lambda z: torch.sigmoid(z) * torch.sigmoid(-z), 0.25),
    "tanh": (lambda z: 1 / torch.cosh(z) ** 2, 1.0),
    "softplus": (torch.sigmoid, 1.0),
    "leaky_relu": (lambda z: torch.where(z > 0, 1.0, 0.01).double(), 1.0),
    "softsign": (lambda z: 1 / (1 + z.abs()) ** 2, 1.0),
    "silu": (lambda z: torch.sigmoid(z) * (1 + z * torch.sigmoid(-z)), 1.0998),
    "hardsigmoid": (lambda z: (z.abs() < 3).double() / 6, 1 / 6),
}


@pytest.mark.parametrize("name", CLOSED)
def test_derivatives_of_activations_are_the_closed_forms(name):
    formula, most = CLOSED[name]
    z = torch.linspace(-8, 8, 400, dtype=torch.float64)
    torch.testing.assert_close(gradients.derivative(name, z), formula(z), rtol=1e-7, atol=1e-12)
    assert gradients.steepest(name) == pytest.approx(most, rel=1e-4)


@pytest.mark.parametrize("name", sorted(gradients._ACTIVATIONS))
def test_every_activation_named_here_has_a_derivative(name):
    assert torch.isfinite(gradients.derivative(name, torch.linspace(-5, 5, 21))).all()


def test_an_unknown_activation_has_none():
    assert gradients.derivative("softmax", torch.zeros(2)) is None


def test_the_mean_field_growth_needs_four_samples():
    with pytest.raises(ValueError, match=r"finite from 4 samples on, got 3"):
        gradients.mean_field_growth(3)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0])
def test_a_threshold_that_is_no_share_is_refused(threshold):
    model = nn.Linear(2, 2)
    step = gb.Step(model, F.cross_entropy, (torch.randn(3, 2), torch.tensor([0, 1, 0])))
    with pytest.raises(ValueError, match=r"between 0 and 1, got"):
        gradients.measure(step, {}, threshold=threshold)
