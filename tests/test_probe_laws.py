"""Known laws of batch normalization come out of the instruments."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

import gammabeta as gb
from gammabeta.probes.gradients import mean_field_growth


class ExactNorm(nn.Module):
    """Batch normalization with eps = 0, which the layers refuse and the op accepts."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features).double())
        self.bias = nn.Parameter(0.1 * torch.randn(features).double())

    def forward(self, x):
        return gb.batch_norm(x, self.weight, self.bias, eps=0.0)[0]


def dense(norm) -> tuple[nn.Module, torch.Tensor]:
    layers = (nn.Linear(5, 7), norm(7), nn.Tanh(), nn.Linear(7, 6, bias=False), norm(6))
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(6, 3)).double(), torch.randn(12, 5)


def images(norm) -> tuple[nn.Module, torch.Tensor]:
    layers = (nn.Conv2d(3, 6, 3, bias=False), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 2, groups=2))
    head = (norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return nn.Sequential(*layers, *head).double(), torch.randn(8, 3, 7, 7)


def step_of(model: nn.Module, x: torch.Tensor, **more) -> gb.Step:
    y = torch.randint(3, (len(x),))
    return gb.Step(model, nn.functional.cross_entropy, (x.double(), y), **more)


NETWORKS = pytest.mark.parametrize("build", [dense, images])


@NETWORKS
def test_the_gradient_of_each_unit_before_the_layer_is_orthogonal_to_its_weight(build):
    step = step_of(*build(ExactNorm))
    for name in ("0.weight", "3.weight"):
        weight, gradient = step.parameters[name].flatten(1), step.gradients[name].flatten(1)
        inner = (weight * gradient).sum(1)
        assert (gradient.norm(dim=1) > 1e-6).all()
        assert (inner.abs() <= 1e-13 * weight.norm(dim=1) * gradient.norm(dim=1)).all()


@NETWORKS
def test_eps_lets_the_gradient_along_the_weight_be_what_it_must_be(build):
    """⟨w, ∂L/∂w⟩ = γ ∂L/∂γ · eps/(σ² + eps), from d x̂/d ln‖w‖ = x̂ · eps/(σ² + eps)."""
    eps = 0.1
    kind = gb.BatchNorm1d if build is dense else gb.BatchNorm2d
    model, x = build(lambda features: kind(features, eps=eps))
    step = step_of(model, x)
    for layer, norm in (("0", "1"), ("3", "4")):
        name = f"{layer}.weight"
        weight, gradient = step.parameters[name].flatten(1), step.gradients[name].flatten(1)
        of_gamma = step.parameters[f"{norm}.weight"] * step.gradients[f"{norm}.weight"]
        var = gb.Moments.of(step.activations[norm].input).var()
        expected = of_gamma * eps / (var + eps)
        torch.testing.assert_close((weight * gradient).sum(1), expected, rtol=1e-10, atol=1e-15)
        assert expected.abs().max() > 1e-5


@NETWORKS
def test_a_plain_sgd_step_adds_lr_squared_times_gradient_squared_to_weight_squared(build):
    model, x = build(ExactNorm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    step = step_of(model, x, optimizer=optimizer)
    after = step.updated()
    for name in ("0.weight", "3.weight"):
        growth = after[name].square().sum() - step.parameters[name].square().sum()
        expected = 0.3**2 * step.gradients[name].square().sum()
        assert growth.item() == pytest.approx(expected.item(), rel=1e-9)
    # the last weight is normalized by nothing: its norm changes in first order
    last = list(step.weights)[-1] + ".weight"
    growth = after[last].square().sum() - step.parameters[last].square().sum()
    assert abs(growth) > 2 * 0.3**2 * step.gradients[last].square().sum()


@NETWORKS
def test_scaling_a_weight_scales_its_gradient_by_the_inverse(build):
    step = step_of(*build(ExactNorm))
    loss, gradients = step.gradient({"3.weight": 8 * step.parameters["3.weight"]})
    assert loss.item() == pytest.approx(step.loss.item(), rel=1e-13)
    for name, factor in (("0.weight", 1), ("3.weight", 1 / 8)):
        torch.testing.assert_close(gradients[name], factor * step.gradients[name])


@pytest.mark.parametrize("samples", [2, 3, 4, 8])
def test_no_normalized_value_exceeds_the_root_of_the_others_number(samples):
    """|x̂| ≤ √(m − 1), with equality where one value stands against all others, which are equal."""
    model = nn.Sequential(nn.Linear(4, 50), gb.BatchNorm1d(50, eps=1e-30), nn.Linear(50, 3))
    heavy = torch.randn(samples, 4).double() / torch.rand(samples, 4).double() ** 3
    alone = torch.ones(samples, 4).double()
    alone[0] = 5.0
    bound = math.sqrt(samples - 1)
    for x, reached in ((heavy, False), (alone, True)):
        xhat = step_of(model.double(), x).activations["1"].output.abs()
        assert xhat.max() <= bound * (1 + 1e-12)
        assert not reached or xhat[0].numpy() == pytest.approx(bound, rel=1e-12)


def deep(width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(linear.weight, std=math.sqrt(2 / width))
        layers += [linear, gb.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers)


def interval(values: torch.Tensor) -> tuple[float, float]:
    """The 95 % interval of the mean of independent values."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std() / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def test_the_mean_field_growth_tends_to_pi_over_pi_minus_one():
    assert mean_field_growth(10**7) == pytest.approx(math.pi / (math.pi - 1), rel=1e-6)


@pytest.mark.parametrize(("batch", "seeds"), [(8, 12), (16, 8), (64, 8), (256, 8)])
def test_gradients_of_deep_relu_networks_grow_by_the_mean_field_value(batch, seeds):
    """Width 1,000, 16 layers, a random Gaussian gradient from above; for ∂L/∂W and ∂L/∂y.

    The theory is asymptotic in depth: the five layers next to the input, where the samples are not
    yet equally far from one another, and the two next to the loss are left out.
    """
    width, depth = 1000, 16
    growths: dict[str, list[float]] = {"weights": [], "outputs": []}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, x, above = deep(width, depth), torch.randn(batch, width), torch.randn(batch, width)
        step = gb.Step(model, lambda out, g: (out * g).sum(), (x, above))
        found = gb.measure(step, "gradients")
        norms = {
            "weights": torch.stack([found[f"{3 * layer}/norm"] for layer in range(depth)]),
            "outputs": torch.stack([a.gradient.norm().double() for a in step.activations.values()]),
        }
        for kind, of_layers in norms.items():
            squared = of_layers[5:-2].square()
            growths[kind].append(float((squared[:-1] / squared[1:]).mean()))
    theory = mean_field_growth(batch)
    for kind, values in growths.items():
        low, high = interval(torch.tensor(values, dtype=torch.float64))
        assert 0.97 * theory <= low <= high <= 1.03 * theory, f"{kind}: [{low}, {high}], {theory}"
