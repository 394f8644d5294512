"""Shifts of inputs and of gradients, against SciPy and updates really made."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import nn
from torch.nn import functional as F

import gammabeta as gb
from gammabeta.probes import covariate_shift
from tests import networks

CASES = pytest.mark.parametrize(
    "build",
    [
        networks.linear_chain,
        networks.mlp,
        functools.partial(networks.mlp, norm="none", act="sigmoid"),
        functools.partial(networks.conv_residual, norm="nn"),
        functools.partial(networks.conv_residual, act="tanh"),
    ],
)
distribution = functools.partial(covariate_shift.measure, by=("distribution",))


def received(model: nn.Module, x: torch.Tensor) -> dict[str, np.ndarray]:
    """What each linear and convolutional layer of a copy takes, (units, values)."""
    model = copy.deepcopy(model)
    found: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):

            def keep(_, args, name=name):
                value = args[0].detach().numpy()
                found[name] = np.moveaxis(value, 1, 0).reshape(value.shape[1], -1).copy()

            module.register_forward_pre_hook(keep)
    model(x)
    return found


def train(model: nn.Module, seed: int, lr: float = 0.3) -> None:
    x, y = networks.batch_for(model, seed=seed)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients, strict=True):
            p -= lr * g


def in_units(change: float, scale: float) -> float:
    return 0.0 if change == 0 else change / scale if scale > 0 else math.inf


def deviation(values: np.ndarray) -> float:
    return 0.0 if np.ptp(values) == 0 else values.std()


def standard(values: np.ndarray) -> np.ndarray:
    scale = deviation(values)
    return (values - values.mean()) / scale if scale > 0 else 0 * values


def moved(histories: list[np.ndarray]) -> bool:
    constant = all(np.ptp(values) == 0 for values in histories)
    return not constant or any(values[0] != histories[0][0] for values in histories)


def iqr(values: np.ndarray) -> float:
    return np.quantile(values, 0.75) - np.quantile(values, 0.25)


@CASES
def test_the_distribution_moves_as_far_as_scipy_says(build):
    model, memory, history = build(), {}, []
    for time in range(4):
        # batches of other sizes too: the distance is one of distributions
        batch = networks.batch_for(model, n=9 if time == 2 else 8, seed=11)
        step = gb.Step(model, F.cross_entropy, batch)
        found = covariate_shift.measure(step, memory)
        history.append(received(model, batch[0]))
        train(model, seed=20 + time)
    assert not [key for key in found if "gradient" in key]
    for layer in history[0]:
        units = list(zip(*(now[layer] for now in history), strict=True))
        columns: dict[str, list[float]] = {
            key: [] for key in ("shift", "shape", "drift", "path", "path_median", "path_iqr")
        }
        for unit in units:
            first, old, new = unit[0], unit[2], unit[3]
            if moved([old, new]):
                distance = stats.wasserstein_distance(old, new)
                columns["shift"].append(in_units(distance, deviation(old)))
                shape = stats.wasserstein_distance(standard(old), standard(new))
                columns["shape"].append(shape)
            if moved([old, new]) or stats.wasserstein_distance(first, new) > 0:
                distance = stats.wasserstein_distance(first, new)
                columns["drift"].append(in_units(distance, deviation(first)))
            sums = np.zeros(3)
            for a, b in itertools.pairwise(unit):
                scale = deviation(a)
                sums[0] += in_units(stats.wasserstein_distance(a, b), scale)
                sums[1] += in_units(abs(np.median(a) - np.median(b)), scale)
                sums[2] += in_units(abs(iqr(a) - iqr(b)), scale)
            if moved(list(unit)):
                for key, total in zip(("path", "path_median", "path_iqr"), sums, strict=True):
                    columns[key].append(total)
        for key, values in columns.items():
            expected = float(np.median(values)) if values else 0.0
            actual = found[f"{layer}/{key}"].item()
            assert actual == pytest.approx(expected, rel=1e-8, abs=1e-12), (layer, key)
        quantiles = np.quantile(history[3][layer], [0.15, 0.5, 0.85], axis=1).T
        assert found[f"{layer}/quantiles"].numpy() == pytest.approx(quantiles, rel=1e-8, abs=1e-12)
    assert all(found[f"{layer}/path"] > 0.01 for layer in list(history[0])[1:])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_distance_of_samples_of_any_sizes_with_ties_is_scipys(data):
    n, m = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    numbers = st.integers(-3, 3).map(float) | st.floats(-1e3, 1e3)
    one, other = ([data.draw(numbers) for _ in range(size)] for size in (n, m))
    tensors = (torch.tensor([sorted(v)], dtype=torch.float64) for v in (one, other))
    found = covariate_shift.wasserstein(*tensors).item()
    expected = stats.wasserstein_distance(one, other)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def step_of(model: nn.Module, lr: float, **keywords) -> gb.Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return networks.step_for(model, optimizer=optimizer, **keywords)


@CASES
def test_the_gradient_moves_as_far_as_with_layers_below_really_updated(build):
    model = build()
    lr = 0.4
    found = gb.measure(step_of(model, lr), "covariate_shift")
    x, y = networks.batch_for(model)

    def gradients(net: nn.Module) -> dict[str, np.ndarray]:
        net = copy.deepcopy(net)
        F.cross_entropy(net(x), y).backward()
        return {name: p.grad.numpy() for name, p in net.named_parameters()}

    before = gradients(model)
    below = copy.deepcopy(model)  # its layers are updated one after the other
    weights = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    for at, (layer, names) in enumerate(groups.items()):
        if at > 0 and layer in weights:
            after = gradients(below)
            old, new = (np.concatenate([g[n].ravel() for n in names]) for g in (before, after))
            change = np.linalg.norm(old - new)
            size = np.linalg.norm(old)
            cosine = old @ new / (size * np.linalg.norm(new))
            assert found[f"{layer}/gradient_shift"].item() == pytest.approx(change, rel=1e-8)
            relative = found[f"{layer}/gradient_relative"].item()
            assert relative == pytest.approx(change / size, rel=1e-8)
            assert found[f"{layer}/gradient_cos"].item() == pytest.approx(cosine, rel=1e-8)
            assert change / size > 1e-5
        with torch.no_grad():
            for name in names:
                below.get_parameter(name).sub_(lr * torch.from_numpy(before[name]))
    measured = {key.rpartition("/")[0] for key in found if "gradient" in key}
    assert measured == set(weights) - {weights[0]}


def test_in_the_chain_of_one_unit_layers_the_gradient_has_its_closed_form():
    weights, x, rate = [1.5, 0.8, -1.2, 0.6], 1.3, 0.2
    layers = [nn.Linear(1, 1, bias=False).double() for _ in weights]
    for layer, weight in zip(layers, weights, strict=True):
        nn.init.constant_(layer.weight, weight)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    batch = torch.full((1, 1), x, dtype=torch.float64)
    step = gb.Step(model, None, batch, optimizer=optimizer, forward=lambda net, b: net(b).sum())
    found = gb.measure(step, "covariate_shift")
    product = x * math.prod(weights)
    moved = [w - rate * product / w for w in weights]
    for k, weight in enumerate(weights[1:], 1):
        old = product / weight
        new = x * math.prod(moved[:k]) * math.prod(weights[k + 1 :])
        assert found[f"{k}/gradient_shift"].item() == pytest.approx(abs(old - new), rel=1e-10)
        expected = abs(old - new) / abs(old)
        assert found[f"{k}/gradient_relative"].item() == pytest.approx(expected, rel=1e-10)
        assert found[f"{k}/gradient_cos"].item() == pytest.approx(math.copysign(1, old * new))
    assert "0/gradient_shift" not in found


def test_a_gradient_in_front_of_a_normalization_scales_inversely_with_its_weight():
    shifts = []
    for scale in (1.0, 8.0):
        model = networks.mlp(act="tanh")
        with torch.no_grad():
            for index in (0, 3):
                model[index].weight *= scale
                model[index + 1].eps = 1e-14
        probe = functools.partial(covariate_shift.measure, by=("gradient",), relative=0.05)
        shifts.append(gb.measure(networks.step_for(model), probe))
    for key in ("3/gradient_relative", "3/gradient_cos", "6/gradient_shift"):
        assert shifts[1][key].item() == pytest.approx(shifts[0][key].item(), rel=1e-8)
    ratio = shifts[0]["3/gradient_shift"].item() / shifts[1]["3/gradient_shift"].item()
    assert ratio == pytest.approx(8, rel=1e-8)


def test_gamma_and_beta_right_before_the_weights_shift_the_distribution_but_not_its_shape():
    model, memory = networks.linear_chain(norm="gb"), {}
    gb.measure(networks.step_for(model), distribution, memory)
    layer = model[3]
    gamma = layer.weight.detach().abs().numpy()
    with torch.no_grad():
        layer.bias += 0.5
    found = gb.measure(networks.step_for(model), distribution, memory)
    # x moves by 0.5, and its standard deviation is |γ|, up to eps
    assert found["4/shift"].item() == pytest.approx(np.median(0.5 / gamma), rel=1e-3)
    assert found["4/shape"].item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        layer.weight *= 3
    found = gb.measure(networks.step_for(model), distribution, memory)
    assert found["4/shift"].item() > 0.5
    assert found["4/shape"].item() == pytest.approx(0, abs=1e-12)
    assert found["2/path"] == 0
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(4, 4, dtype=torch.float64))
    found = gb.measure(networks.step_for(model), distribution, memory)
    assert found["4/shape"].item() > 0.02


def test_a_fixed_batch_shows_shift_alone():
    model = networks.mlp()
    fixed = functools.partial(distribution, batch=networks.batch_for(model, seed=99))
    own, same = {}, {}
    for seed in range(5):
        step = gb.Step(model, F.cross_entropy, networks.batch_for(model, seed=seed))
        sampled = gb.measure(step, distribution, own)
        still = gb.measure(step, fixed, same)
    for layer in ("0", "3", "6"):
        assert sampled[f"{layer}/path"] > 0.1
        assert still[f"{layer}/path"] == still[f"{layer}/drift"] == 0


def test_sampling_shows_in_the_first_layer_with_its_known_size():
    # √n W₁ of two Gaussian samples tends to ∫ |B(Φ(x))| √2 dx, B a Brownian bridge
    n, model = 4096, nn.Sequential(nn.Linear(256, 1)).double()
    memory: dict = {}
    for seed in (1, 2):
        x = torch.randn(n, 256, generator=torch.Generator().manual_seed(seed)).double()
        step = gb.Step(model, F.mse_loss, (x, torch.zeros(n, 1).double()))
        probe = functools.partial(distribution, values=None, units=None, over="mean")
        found = gb.measure(step, probe, memory)
    area, _ = integrate.quad(lambda x: math.sqrt(stats.norm.cdf(x) * stats.norm.sf(x)), -9, 9)
    expected = 2 / math.sqrt(math.pi * n) * area
    assert expected * math.sqrt(n) == pytest.approx(1.822, abs=1e-3)
    assert found["0/shift"].item() == pytest.approx(expected, rel=0.05)
    assert found["0/drift"].item() == found["0/shift"].item() == found["0/path"].item()


def test_units_and_values_looked_at_are_the_same_each_time_and_no_more_than_asked_for():
    model = networks.resnet_like()
    few = functools.partial(distribution, units=2, values=50)
    memory: dict = {}
    first = gb.measure(networks.step_for(model), few, memory)
    again = gb.measure(networks.step_for(model), few, memory)
    x, _ = networks.batch_for(model)
    everything = received(model, x)
    for layer, kept in memory["latest"].items():
        assert kept.shape == (2, min(50, everything[layer].shape[1])), layer
        assert torch.equal(first[f"{layer}/quantiles"], again[f"{layer}/quantiles"])
        assert again[f"{layer}/shift"] == 0
    for layer, kept in memory["latest"].items():
        for unit in kept.numpy():
            assert any(np.isin(unit, whole).all() for whole in everything[layer])
    all_of_them: dict = {}
    gb.measure(
        networks.step_for(model), functools.partial(few, units=None, values=None), all_of_them
    )
    for layer, kept in all_of_them["latest"].items():
        assert np.array_equal(kept.numpy(), np.sort(everything[layer], 1))


def test_features_of_linear_layers_are_on_the_last_axis():
    model = nn.Sequential(nn.Linear(3, 2), nn.Conv1d(5, 4, 1)).double()
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    step = gb.Step(model, None, x, forward=lambda net, b: net(b).mean())
    found = gb.measure(step, distribution)
    assert found["0/quantiles"].shape == (3, 3)
    assert found["1/quantiles"].shape == (5, 3)
    expected = np.quantile(x.reshape(-1, 3).numpy(), [0.15, 0.5, 0.85], axis=0).T
    assert found["0/quantiles"].numpy() == pytest.approx(expected, rel=1e-12)


def test_a_unit_that_wakes_up_counts_as_infinite_and_one_that_stays_dead_does_not_count():
    model, memory = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1)).double(), {}
    x = torch.linspace(0, 1, 5).double()[:, None]
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.copy_(torch.tensor([-2.0, -2.0, 0.0]))
    step = functools.partial(gb.Step, model, F.mse_loss, (x, x))
    gb.measure(step(), distribution, memory)
    with torch.no_grad():
        model[0].bias[2] = 1.0
    found = gb.measure(step(), distribution, memory)
    assert found["2/shift"].item() == pytest.approx(1 / math.sqrt(0.125), rel=1e-12)
    with torch.no_grad():
        model[0].bias[1] = 1.0
    found = gb.measure(step(), functools.partial(distribution, over="mean"), memory)
    assert found["2/shift"].item() == math.inf
    assert "2/gradient_shift" not in found


def test_a_unit_that_died_is_left_out_of_the_shift_but_not_of_drift_and_path():
    model, memory = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double(), {}
    x = torch.linspace(0, 1, 5).double()[:, None]
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    for bias in (0.0, -9.0, -9.0):
        with torch.no_grad():
            model[0].bias.fill_(bias)
        found = gb.measure(gb.Step(model, F.mse_loss, (x, x)), distribution, memory)
    # from 2x, of mean 1 and deviation 2·√0.125, to zeros
    assert found["2/shift"].item() == found["2/shape"].item() == 0
    for key in ("drift", "path"):
        assert found[f"2/{key}"].item() == pytest.approx(1 / math.sqrt(0.5), rel=1e-12)


def test_nothing_is_remembered_of_a_measurement_that_failed():
    model, memory = networks.mlp(), {}
    gb.measure(networks.step_for(model), distribution, memory)
    before = copy.deepcopy(memory)
    train(model, seed=3)
    with pytest.raises(ValueError, match="median, mean, rms"):
        gb.measure(networks.step_for(model), functools.partial(distribution, over="max"), memory)
    assert all(
        torch.equal(memory[key][layer], value)
        for key, held in before.items()
        for layer, value in held.items()
    )
    other = networks.step_for(networks.mlp(width=7))
    with pytest.raises(ValueError, match="new memory"):
        gb.measure(other, distribution, memory)


def test_keywords_that_cannot_be_are_refused():
    model = networks.mlp()
    for keywords, words in (
        ({"by": "gradient"}, "must be a tuple"),
        ({"by": ("moments",)}, "must be a tuple"),
        ({"by": ()}, "must be a tuple"),
        ({"units": 0}, "1 or more"),
        ({"values": -1}, "1 or more"),
        ({"relative": -0.1}, "above 0"),
        ({"over": "max"}, "median, mean, rms"),
    ):
        probe = functools.partial(covariate_shift.measure, **keywords)
        with pytest.raises(ValueError, match=words):
            gb.measure(networks.step_for(model), probe)
