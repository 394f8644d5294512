"""The walk along the gradient, against loops of plain autograd, closed forms and laws of scale."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gammabeta as gb
from gammabeta.probes import smoothness
from tests import networks

NETWORKS = pytest.mark.parametrize(
    "build",
    [
        pytest.param(functools.partial(networks.NETWORKS[name], norm=norm), id=f"{name}-{norm}")
        for name in ("linear_chain", "mlp", "conv_residual")
        for norm in ("none", "nn", "gb")
    ],
)
DISTANCES = (0.5, 1.0, 4.0)
RELATIVE = (0.01, 0.1)


def close(a: object, b: object, tolerance: float = 1e-8) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def flat_gradient(model, batch) -> tuple[float, np.ndarray]:
    model.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss.item(), np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])


def at(model, flat: np.ndarray) -> None:
    start = 0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(flat[start : start + p.numel()]).view_as(p))
            start += p.numel()


def flat_parameters(model) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


def walk(model, batch, direction: np.ndarray, distances) -> tuple[list[float], list[np.ndarray]]:
    """Losses and differences of the flat gradient, by writing to the model itself."""
    theta, (_, g) = flat_parameters(model), flat_gradient(model, batch)
    losses, differences = [], []
    for distance in distances:
        at(model, theta + distance * direction)
        loss, gradient = flat_gradient(model, batch)
        losses.append(loss)
        differences.append(gradient - g)
    at(model, theta)
    return losses, differences


@NETWORKS
def test_the_published_walk_is_that_of_a_plain_loop(build):
    model = build()
    batch = networks.batch_for(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    step = gb.Step(model, F.cross_entropy, batch, optimizer=optimizer)
    found = gb.measure(step, functools.partial(smoothness.measure, distances=DISTANCES))
    _, g = flat_gradient(model, batch)
    losses, differences = walk(model, batch, -0.3 * g, DISTANCES)
    changes = [np.linalg.norm(d) for d in differences]
    close(found["losses"], losses)
    close(found["gradient_changes"], changes)
    close(found["loss_lowest"], min(losses))
    close(found["loss_highest"], max(losses))
    close(found["loss_range"], max(losses) - min(losses))
    close(found["gradient_change"], max(changes))
    close(found["gradient_norm"], np.linalg.norm(g))
    moved = [s * 0.3 * np.linalg.norm(g) for s in DISTANCES]
    close(found["beta"], max(c / d for c, d in zip(changes, moved, strict=True)))


@NETWORKS
def test_the_scale_free_walk_is_that_of_a_plain_loop(build):
    model = build()
    batch = networks.batch_for(model)
    step = gb.Step(model, F.cross_entropy, batch)
    found = gb.measure(step, functools.partial(smoothness.measure, relative=RELATIVE))
    flat_gradient(model, batch)
    direction, scale, parts = [], [], {}
    for name, p in model.named_parameters():
        w, g = p.detach().numpy().ravel(), p.grad.numpy().ravel().copy()
        moves = p.dim() >= 2
        size = np.linalg.norm(w) if moves else 0.0
        direction.append(-size * g / np.linalg.norm(g))
        scale.append(np.full(len(w), size))
        if moves:
            start = sum(map(len, scale[:-1]))
            parts[name.removesuffix(".weight")] = slice(start, start + len(w))
    losses, differences = walk(model, batch, np.concatenate(direction), RELATIVE)
    scaled = [np.concatenate(scale) * d for d in differences]
    changes = [np.linalg.norm(d) for d in scaled]
    close(found["relative_losses"], losses)
    close(found["relative_loss_range"], max(losses) - min(losses))
    close(found["relative_gradient_changes"], changes)
    length = math.sqrt(len(parts))
    ratios = [c / (e * length) for c, e in zip(changes, RELATIVE, strict=True)]
    close(found["relative_beta"], max(ratios))
    for layer, part in parts.items():
        own = [np.linalg.norm(d[part]) for d in scaled]
        close(found[f"{layer}/relative_gradient_change"], max(own))
        ratios = [c / e for c, e in zip(own, RELATIVE, strict=True)]
        close(found[f"{layer}/relative_beta"], max(ratios))
    assert {key.rpartition("/")[0] for key in found} == {"", *parts}


def test_beta_of_a_quadratic_lies_on_its_curvature():
    curvature = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    w = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    model.weight.data.copy_(w[None])

    def forward(model: nn.Module, _: None) -> Tensor:
        return 0.5 * (curvature * model.weight.square()).sum()

    step = gb.Step(model, None, None, forward=forward)
    found = gb.measure(step, functools.partial(smoothness.measure, lr=0.1))
    g = curvature * w
    beta = (curvature * g).norm() / g.norm()
    close(found["beta"], beta, 1e-12)
    # its gradient is linear: the change grows with the distance, the largest is the last
    close(found["gradient_changes"], 0.1 * (curvature * g).norm() * torch.tensor([0.5, 1, 2, 4]))
    assert float(found["gradient_change"]) == float(found["gradient_changes"][-1])


def test_beta_of_small_distances_is_a_finite_difference_of_the_curvature_along_the_gradient():
    model = networks.mlp(act="tanh")
    batch = networks.batch_for(model)
    step = gb.Step(model, F.cross_entropy, batch)
    found = gb.measure(step, functools.partial(smoothness.measure, distances=(1e-5,), lr=1.0))
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(
        F.cross_entropy(model(batch[0]), batch[1]), parameters, create_graph=True
    )
    along = [g.detach() for g in gradients]
    products = torch.autograd.grad(gradients, parameters, along)
    products, along = (torch.cat([p.flatten() for p in parts]) for parts in (products, along))
    close(found["beta"], products.norm() / along.norm(), 1e-4)


def only_scale_free(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in found.items() if "relative" in key}


def barely(model: nn.Module, eps: float) -> nn.Module:
    """With an eps that hardly matters."""
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = eps
    return model


@pytest.mark.parametrize("norm", ["nn", "gb"])
@pytest.mark.parametrize("name", ["mlp", "conv_residual"])
def test_the_scale_free_walk_does_not_see_the_scale_of_a_weight_before_a_normalization(name, norm):
    model = barely(networks.NETWORKS[name](norm=norm), 1e-14)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    before = gb.measure(networks.step_for(model, optimizer=optimizer), "smoothness")
    factors = iter((3.0, 0.2, 7.0, 0.5))
    with torch.no_grad():
        for site in networks.step_for(model).sites:
            model.get_submodule(site.producer).weight *= next(factors)
    after = gb.measure(networks.step_for(model, optimizer=optimizer), "smoothness")
    assert len(only_scale_free(before)) > 8
    for key, value in only_scale_free(before).items():
        close(after[key], value)
    # which the published one does
    assert abs(math.log(after["beta"] / before["beta"])) > 0.05


def test_the_scale_free_walk_does_not_see_scales_that_cancel_between_layers():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)]
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 3
    before = gb.measure(gb.Step(model, F.cross_entropy, (x, y)), "smoothness")
    with torch.no_grad():
        model[0].weight *= 5
        model[2].weight /= 5
    after = gb.measure(gb.Step(model, F.cross_entropy, (x, y)), "smoothness")
    for key, value in before.items():
        close(after[key], value, 1e-11)


def test_the_learning_rates_are_those_of_the_groups_and_the_rest_stays():
    model = networks.mlp(norm="nn")
    batch = networks.batch_for(model)
    groups = [
        {"params": model[0].parameters(), "lr": 0.5},
        {"params": model[3].parameters(), "lr": torch.tensor(0.25)},
    ]
    optimizer = torch.optim.SGD(groups)
    step = gb.Step(model, F.cross_entropy, batch, optimizer=optimizer)
    found = gb.measure(step, functools.partial(smoothness.measure, distances=(2.0,)))
    loss, _ = flat_gradient(model, batch)
    weights = [model[0].weight, model[3].weight]
    held = [(w.detach().clone(), w.grad.clone()) for w in weights]
    with torch.no_grad():
        for weight, rate in zip(weights, (0.5, 0.25), strict=True):
            weight -= 2 * rate * weight.grad
    moved, _ = flat_gradient(model, batch)
    assert moved != loss
    close(found["losses"], [moved])
    changes = [w.grad - g for w, (_, g) in zip(weights, held, strict=True)]
    squares = sum(float(c.square().sum()) for c in changes)
    close(found["gradient_change"], math.sqrt(squares))


def test_what_cannot_be_had_is_absent():
    model = networks.mlp()
    found = gb.measure(networks.step_for(model), "smoothness")
    assert "beta" not in found
    assert "relative_beta" in found
    nothing = functools.partial(smoothness.measure, distances=(), relative=())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert gb.measure(networks.step_for(model, optimizer=optimizer), nothing) == {}
    flat = gb.Step(model, lambda y, _: 0 * y.sum(), networks.batch_for(model), optimizer=optimizer)
    found = gb.measure(flat, "smoothness")
    assert found["loss_range"] == found["gradient_change"] == 0
    assert "beta" not in found
    assert not only_scale_free(found)


def test_a_weight_of_zeros_has_no_scale_and_stays():
    model = networks.mlp(norm="none")
    with torch.no_grad():
        model[6].weight.zero_()
        model[3].weight.requires_grad_(False)
    found = gb.measure(networks.step_for(model), "smoothness")
    assert not any(key.startswith("6/") for key in found)
    # no other weight has a gradient through zeros
    assert not only_scale_free(found)


def test_a_diverged_network_is_not_a_number():
    model = networks.mlp()
    with torch.no_grad():
        model[6].weight.fill_(math.nan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = gb.measure(networks.step_for(model, optimizer=optimizer), "smoothness")
    for key in ("beta", "loss_range", "relative_beta"):
        assert found[key].isnan()


@pytest.mark.parametrize(
    "keywords", [{"distances": (0.0,)}, {"relative": (-1.0,)}, {"lr": math.inf}, {"lr": 0.0}]
)
def test_wrong_parameters_are_named(keywords):
    step = networks.step_for(networks.mlp())
    with pytest.raises(ValueError, match=f"smoothness: {next(iter(keywords))} must be positive"):
        gb.measure(step, functools.partial(smoothness.measure, **keywords))


def test_an_optimizer_of_other_parameters_is_an_error():
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="optimizer must hold parameters of"):
        networks.step_for(networks.mlp(), optimizer=other)
