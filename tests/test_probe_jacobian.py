"""Singular values of layers and networks, against full Jacobians, differences, closed forms."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian as full_jacobian
from torch.nn import functional as F

import gammabeta as gb
from gammabeta.probes import _spectrum, jacobian
from tests import networks

DEFINITIONS = ("sum", "own", "eval", "batch")
QUANTITIES = ("in_range", "zeros", "largest", "rms", "mean_abs_log", "spread")
NORMS = ("none", "nn", "gb")


def close(a: object, b: object, tolerance: float = 1e-8) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def trained(model: nn.Module) -> nn.Module:
    """With running statistics that are those of no batch."""
    for seed in (5, 6, 7):
        model(2 * networks.batch_for(model, seed=seed)[0] + 1)
    return model


def summary(values: Tensor) -> dict[str, float]:
    s = np.sort(values.numpy())[::-1]
    kept = s[s > 1e-6 * s[0]]
    return {
        "in_range": np.mean((s >= 0.5) & (s <= 2)),
        "zeros": 1 - len(kept) / len(s),
        "largest": s[0],
        "rms": math.sqrt(np.mean(s**2)),
        "mean_abs_log": np.mean(np.abs(np.log(kept))),
        "spread": np.std(np.log(kept)),
    }


def matrices(function, h: Tensor, definition: str) -> Tensor:
    """The matrices of a definition, from the whole Jacobian of ``function`` at the batch h."""
    whole = full_jacobian(function, h)
    m, inner = len(h), h[0].numel()
    whole = whole.reshape(m, -1, m, inner)
    if definition == "batch":
        return whole.reshape(-1, m * inner)[None]
    if definition == "sum":
        return whole.sum(0).permute(1, 0, 2)
    return torch.stack([whole[c, :, c] for c in range(m)])


def layers_of(name: str, model: nn.Module, x: Tensor) -> dict:
    """By layer: its input and its function, written out by hand; "" is the whole network."""
    found = {"": (x, model)}
    if name == "conv_residual":
        block = model.layers[0]

        def stem(h: Tensor) -> Tensor:
            return F.relu(model.bn1(model.conv1(h)))

        def first(h: Tensor) -> Tensor:
            return F.relu(block.bn1(block.conv1(h)))

        kept = stem(x)

        def second(h: Tensor) -> Tensor:
            return F.relu(block.bn2(block.conv2(h)) + kept).mean((2, 3))

        inside = first(kept)
        found |= {"conv1": (x, stem), "layers.0.conv1": (kept, first)}
        return found | {"layers.0.conv2": (inside, second), "fc": (second(inside), model.fc)}
    starts = [i for i, part in enumerate(model) if isinstance(part, nn.Linear)]
    h = x
    for i, start in enumerate(starts):
        layer = model[start : starts[i + 1] if i + 1 < len(starts) else None]
        found[str(start)], h = (h, layer), layer(h)
    return found


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["linear_chain", "mlp", "conv_residual"])
def test_singular_values_are_those_of_the_full_jacobian(name, norm, definition):
    model = trained(networks.NETWORKS[name](norm=norm))
    probe = functools.partial(
        jacobian.measure, definitions=[definition], samples=8, points=None, limit=2000
    )
    found = gb.measure(networks.step_for(model), probe)
    model.train(definition != "eval")
    with torch.no_grad():
        layers = layers_of(name, model, networks.batch_for(model)[0])
    seen = {key.rpartition("/")[0] for key in found}
    assert seen == set(layers)
    for layer, (h, function) in layers.items():
        expected = torch.linalg.svdvals(matrices(function, h, definition)).flatten()
        prefix = f"{layer}/{definition}" if layer else definition
        values = found[f"{prefix}_singular_values"]
        assert values.dtype == torch.float64
        close(values, expected.sort(descending=True).values)
        assert f"{prefix}_rms_error" not in found
        if definition == "sum" and norm != "none" and name == "linear_chain":
            continue  # zeros but for rounding, which has no logarithms to compare
        for quantity, value in summary(expected).items():
            close(found[f"{prefix}_{quantity}"], value)


@pytest.mark.parametrize("norm", ["nn", "gb"])
def test_the_whole_batch_s_jacobian_is_that_of_differences(norm):
    model = networks.mlp(act="tanh", norm=norm)
    x, _ = networks.batch_for(model)
    h, columns = 1e-5, []
    with torch.no_grad():
        for i in range(x.numel()):
            move = torch.zeros(x.numel(), dtype=x.dtype)
            move[i] = h
            move = move.view_as(x)
            columns.append((model(x + move) - model(x - move)).flatten() / (2 * h))
    expected = torch.linalg.svdvals(torch.stack(columns, 1))
    found = gb.measure(networks.step_for(model), "jacobian")
    close(found["batch_singular_values"], expected, 1e-7)


def test_without_normalization_a_linear_chain_has_the_singular_values_of_its_weights():
    model = networks.linear_chain(norm="none")
    found = gb.measure(networks.step_for(model, 5), "jacobian")
    product = torch.eye(4).double()
    for name, layer in model.named_children():
        s = np.linalg.svd(layer.weight.detach().numpy())[1]
        for definition in DEFINITIONS:
            times = 5 if definition == "batch" else 4
            values = found[f"{name}/{definition}_singular_values"]
            close(values, np.repeat(s, times))
        product = layer.weight.detach() @ product
    close(found["sum_singular_values"], np.repeat(np.linalg.svd(product.numpy())[1], 4))


@pytest.mark.parametrize("act", ["sigmoid", "tanh", "relu"])
@pytest.mark.parametrize("norm", ["nn", "gb"])
def test_sum_own_and_eval_have_the_closed_forms_of_a_normalized_layer(norm, act):
    model = trained(networks.mlp(depth=2, act=act, norm=norm))
    x, _ = networks.batch_for(model)
    found = gb.measure(
        networks.step_for(model), functools.partial(jacobian.measure, samples=8, points=None)
    )
    w, layer = model[0].weight.detach().numpy(), model[1]
    gamma, beta = (p.detach().numpy() for p in layer.parameters())
    z = x.numpy() @ w.T
    sigma = np.sqrt(z.var(0) + layer.eps)
    xhat = (z - z.mean(0)) / sigma
    slope = {
        "sigmoid": lambda u: np.exp(-u) / (1 + np.exp(-u)) ** 2,
        "tanh": lambda u: 1 - np.tanh(u) ** 2,
        "relu": lambda u: (u > 0) * 1.0,
    }[act]
    f = slope(gamma * xhat + beta)
    running = np.sqrt(layer.running_var.numpy() + layer.eps)
    centered = gamma * (z - layer.running_mean.numpy()) / running + beta
    factors = {
        "sum": gamma / sigma * (f - f.mean(0) - xhat * (f * xhat).mean(0)),
        "own": gamma / sigma * f * (1 - 1 / 8 - xhat**2 / 8),
        "eval": gamma / running * slope(centered),
    }
    for definition, factor in factors.items():
        s = np.linalg.svd(factor[:, :, None] * w)[1]
        close(found[f"0/{definition}_singular_values"], np.sort(s.ravel())[::-1])


def test_the_gradient_of_the_batch_sum_is_zero_behind_a_linear_activation():
    model = networks.linear_chain(norm="gb")
    found = gb.measure(networks.step_for(model), "jacobian")
    assert found["0/sum_largest"] < 1e-14 < 0.1 < found["0/batch_largest"]
    # and what normalization takes from the batch: of each channel its mean, up to eps its scale
    assert (found["0/batch_singular_values"][-4:] < 1e-14).all()


def test_a_rescaled_weight_before_a_normalization_has_the_same_singular_values():
    model = networks.mlp(norm="nn")
    before = gb.measure(networks.step_for(model), "jacobian")
    with torch.no_grad():
        model[0].weight *= 3
        model[1].eps *= 9
    after = gb.measure(networks.step_for(model), "jacobian")
    for definition in ("sum", "own", "batch"):
        close(
            after[f"0/{definition}_singular_values"],
            before[f"0/{definition}_singular_values"],
            1e-12,
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["linear_chain", "mlp", "conv_residual"])
def test_estimates_are_within_their_stated_error(name, norm):
    model = networks.NETWORKS[name](norm=norm)
    step = networks.step_for(model, 16)
    with torch.no_grad():
        x = networks.batch_for(model, 16)[0]
    probe = functools.partial(jacobian.measure, samples=2)
    exact = gb.measure(step, probe)
    found = gb.measure(step, functools.partial(probe, limit=0, steps=24))
    estimated = [key for key in exact if f"{key}_error" in found]
    # smaller ones are never estimated
    assert {f"{layer}/batch_rms" for layer in layers_of(name, model, x) if layer} <= set(estimated)
    for key in estimated:
        error = abs(found[key] - exact[key])
        assert error <= found[f"{key}_error"] + 1e-9, key
    # it is an estimate worth having: on the average far nearer than it says, and it says little
    shares = [key for key in estimated if key.endswith("batch_in_range")]
    assert np.mean([found[f"{key}_error"].item() for key in shares]) < 0.5


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def spectra(n: int = 300) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    orthogonal = torch.linalg.qr(draw(n, n))[0]
    half = (torch.rand(n, 1, generator=generator) < 0.5).double()
    return {
        "gaussian": draw(n, n) / n**0.5,
        "tall": draw(2 * n, n) / n**0.5,
        "half of the units dead": draw(n, n) / n**0.5 * half,
        "log-normal": orthogonal * draw(n).exp(),
        "product of three": draw(n, n) @ draw(n, n) @ draw(n, n) / n**1.5,
        "orthogonal": orthogonal,
        "two values": orthogonal * torch.where(torch.arange(n) < n // 3, 0.25, 1.0).double(),
        "rank 10": draw(n, 10) @ draw(10, n) / n**0.5,
        "zero": torch.zeros(n, n, dtype=torch.float64),
    }


@pytest.mark.parametrize("steps", [32, 64])
@pytest.mark.parametrize("name", spectra())
def test_each_quantity_of_a_spectrum_is_within_its_stated_error(name, steps):
    a = spectra()[name]
    exact = _spectrum.exact(a, 1e-6).summary()
    found = _spectrum.estimated(
        lambda v: a @ v, lambda u: a.T @ u, a[0].clone(), seeded(), steps=steps, starts=2, zero=1e-6
    ).summary()
    assert set(found) == {f"{key}{end}" for key in exact for end in ("", "_error")}
    for key, value in exact.items():
        assert abs(found[key] - value) <= found[f"{key}_error"] + 1e-9, key
    if steps == 64:
        assert found["in_range_error"] < 0.25
        assert found["largest_error"] <= 1e-3 * exact["largest"]


def test_an_unsettled_null_space_shows_as_a_large_error():
    a = spectra()["half of the units dead"]
    products = (lambda v: a @ v, lambda u: a.T @ u)
    few = _spectrum.estimated(
        *products, a[0].clone(), seeded(), steps=12, starts=2, zero=1e-6
    ).summary()
    assert few["zeros"] == 0
    assert few["zeros_error"] > 0.4


@pytest.mark.parametrize("norm", NORMS)
def test_dead_units_need_no_steps_to_be_found(norm):
    model = networks.mlp(width=20, norm=norm)
    step = networks.step_for(model, 16)
    probe = functools.partial(jacobian.measure, definitions=["batch"], layers=["3"])
    exact = gb.measure(step, probe)
    found = gb.measure(step, functools.partial(probe, limit=0, steps=16))
    assert 0.4 < exact["3/batch_zeros"] < 0.7
    for quantity in ("zeros", "in_range", "mean_abs_log", "spread"):
        key = f"3/batch_{quantity}"
        assert abs(found[key] - exact[key]) <= found[f"{key}_error"]
    assert found["3/batch_zeros_error"] < 0.3
    assert found["3/batch_singular_values"][-1] == 0


def test_bidiagonalization_reproduces_the_matrix():
    a = spectra(40)["tall"]
    start = torch.ones(40, dtype=torch.float64)
    diagonal, above, done = _spectrum.bidiagonal(lambda v: a @ v, lambda u: a.T @ u, start, 99)
    assert done
    assert len(diagonal) == 40
    b = torch.diag(diagonal) + torch.diag(above, 1)
    close(torch.linalg.svdvals(b), torch.linalg.svdvals(a))
    # the Gauss rule holds the moments that the start sees
    few = _spectrum.bidiagonal(lambda v: a @ v, lambda u: a.T @ u, start, 3)
    rule = _spectrum._gauss(*few[:2])
    seen = start / start.norm()
    for power in range(6):
        moment = seen @ torch.linalg.matrix_power(a.T @ a, power) @ seen
        close((rule.weights * rule.values ** (2 * power)).sum(), moment)


def test_estimated_values_are_the_sorted_ones_nearly():
    a = spectra()["gaussian"]
    values = _spectrum.estimated(
        lambda v: a @ v, lambda u: a.T @ u, a[0].clone(), seeded(), steps=64, starts=4, zero=1e-6
    ).sorted(50)
    expected = _spectrum.exact(a, 1e-6).sorted(50)
    assert len(values) == len(expected) == 50
    assert (values.diff() <= 0).all()
    assert values[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert (values - expected).abs().max() < 0.1


def test_thinned_values_keep_the_ends_and_even_ranks():
    step = networks.step_for(networks.mlp())
    full = gb.measure(step, functools.partial(jacobian.measure, points=None))
    few = gb.measure(step, functools.partial(jacobian.measure, points=5))
    whole = full["0/batch_singular_values"]
    assert len(whole) == 32
    assert few["0/batch_singular_values"].tolist() == whole[[0, 8, 16, 23, 31]].tolist()


def test_layers_and_definitions_can_be_chosen():
    step = networks.step_for(networks.mlp())
    every = gb.measure(step, "jacobian")
    for layers, definitions in ((["3"], ["own"]), ([""], ["batch"]), (["0", ""], ["eval", "sum"])):
        probe = functools.partial(jacobian.measure, layers=layers, definitions=definitions)
        found = gb.measure(step, probe)
        assert {key.rpartition("/")[0] for key in found} == set(layers)
        assert {key.rpartition("/")[2].split("_")[0] for key in found} == set(definitions)
        assert all(torch.equal(every[key], value) for key, value in found.items())


def test_samples_are_the_first_of_the_batch():
    model = networks.mlp(norm="nn")
    x, _ = networks.batch_for(model)
    probe = functools.partial(jacobian.measure, samples=3, definitions=["own"], points=None)
    found = gb.measure(networks.step_for(model), probe)
    expected = torch.linalg.svdvals(matrices(model, x, "own")[:3]).flatten()
    close(found["own_singular_values"], expected.sort(descending=True).values)


def test_samples_that_meet_in_one_direction_only_are_told_apart():
    class Next(nn.Module):
        """Each sample sees the one before it."""

        def forward(self, x: Tensor) -> Tensor:
            return x.sin() + torch.cat([x[:1] * 0, x[:-1]]).square()

    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), Next())
    x = networks.batch_for(networks.mlp(), 3)[0]
    step = gb.Step(model, nn.MSELoss(), (x, x))
    found = gb.measure(step, "jacobian")
    for definition in ("sum", "own", "eval"):
        expected = torch.linalg.svdvals(matrices(model, x, definition)).flatten()
        close(found[f"{definition}_singular_values"], expected.sort(descending=True).values)


def test_the_layout_of_a_tensor_changes_nothing():
    model = networks.conv_residual()
    x, y = networks.batch_for(model)
    before = gb.measure(gb.Step(model, nn.CrossEntropyLoss(), (x, y)), "jacobian")
    last = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    after = gb.measure(gb.Step(last[0], nn.CrossEntropyLoss(), (last[1], y)), "jacobian")
    assert set(before) == set(after)
    for key in before:
        if key.endswith("singular_values"):
            close(after[key], before[key])


class _Odd(nn.Module):
    """Tokens, a layer twice, a functional weight, a head without gradient, outputs of all batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.twice = nn.Linear(4, 4)
        self.functional = nn.Linear(4, 4)
        self.pooled = nn.Linear(4, 3)
        self.frozen = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.twice(input=self.twice(self.embedding(tokens)))
        h = F.linear(h, self.functional.weight).relu_().mean(0, keepdim=True)
        h = self.pooled(h)
        with torch.no_grad():
            constant = self.frozen(h)
        return h + constant


def test_layers_that_cannot_be_measured_are_absent():
    torch.manual_seed(0)
    model = _Odd().double()
    x = torch.tensor([[0, 1], [2, 3], [4, 0]])
    step = gb.Step(model, lambda y, _: y.sum(), (x, None))
    found = gb.measure(step, "jacobian")
    keys = {key.rpartition("_singular")[0] for key in found if key.endswith("singular_values")}
    # three samples go in, one comes out of the mean: of "functional" and of the second "twice"
    assert keys == {f"{name}/{d}" for name in ("twice", "pooled") for d in DEFINITIONS}
    s = torch.linalg.svdvals(model.twice.weight.detach())
    close(found["twice/own_singular_values"], s.repeat_interleave(3 * 2))


def test_a_shortcut_around_a_layer_is_held_fixed():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(3, 3).double() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.c(h + self.b(h).tanh())

    torch.manual_seed(0)
    net = Net()
    x = torch.randn(4, 3, dtype=torch.float64)
    found = gb.measure(gb.Step(net, nn.MSELoss(), (x, x)), "jacobian")
    with torch.no_grad():
        slope = 1 - torch.tanh(net.b(net.a(x))) ** 2
        own = torch.linalg.svdvals(slope[:, :, None] * net.b.weight)
        close(
            found["a/own_singular_values"], torch.linalg.svdvals(net.a.weight).repeat_interleave(4)
        )
    close(found["b/own_singular_values"], own.flatten().sort(descending=True).values)
    whole = torch.linalg.svdvals(full_jacobian(net, x).reshape(12, 12))
    close(found["batch_singular_values"], whole)


@pytest.mark.parametrize("norm", NORMS)
def test_a_layer_with_few_inputs_is_exact_by_columns(norm):
    torch.manual_seed(0)
    layers = [nn.Linear(2, 40), networks.norm_of(norm, 1, 40), nn.Tanh(), nn.Linear(40, 2)]
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(6, 2).double(), torch.arange(6) % 2
    step = gb.Step(model, nn.CrossEntropyLoss(), (x, y))
    rows = gb.measure(step, functools.partial(jacobian.measure, steps=2))
    columns = gb.measure(step, functools.partial(jacobian.measure, steps=12, limit=0))
    assert "0/own_rms_error" not in columns
    for key in ("0/sum", "0/own", "0/batch", "0/eval"):
        close(columns[f"{key}_singular_values"], rows[f"{key}_singular_values"])


def test_writing_to_an_input_afterwards_changes_nothing_before():
    class Net(nn.Module):
        def __init__(self, write: bool) -> None:
            super().__init__()
            self.write = write
            torch.manual_seed(0)
            self.a, self.b, self.c = (nn.Linear(3, 3).double() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            g = self.b(h)
            return self.c((h.mul_(3) if self.write else h * 3) + g)

    x = torch.randn(4, 3, dtype=torch.float64)
    found = [
        gb.measure(gb.Step(Net(write).requires_grad_(False), nn.MSELoss(), (x, x)), "jacobian")
        for write in (False, True)
    ]
    assert set(found[0]) == set(found[1])
    for key, value in found[0].items():
        close(found[1][key], value)


def test_a_dead_layer_has_zeros_only_and_a_diverged_one_is_not_a_number():
    model = networks.mlp(norm="none")
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    found = gb.measure(networks.step_for(model), "jacobian")
    assert found["0/batch_zeros"] == 1
    assert found["0/batch_rms"] == found["0/batch_in_range"] == 0
    assert "0/batch_mean_abs_log" not in found
    assert "0/batch_spread" not in found
    estimate = functools.partial(jacobian.measure, limit=0)
    assert gb.measure(networks.step_for(model), estimate)["0/batch_zeros"] == 1
    with torch.no_grad():
        model[3].weight.fill_(math.nan)
    for probe in ("jacobian", estimate):
        found = gb.measure(networks.step_for(model), probe)
        for quantity in QUANTITIES:
            assert found[f"3/batch_{quantity}"].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_gives_the_same_up_to_its_rounding(dtype):
    model = networks.mlp(act="tanh", norm="gb")
    double = gb.measure(networks.step_for(model), "jacobian")
    x, y = networks.batch_for(model)
    step = gb.Step(model.to(dtype), nn.CrossEntropyLoss(), (x.to(dtype), y))
    tolerance = 100 * torch.finfo(dtype).eps
    for probe in ("jacobian", functools.partial(jacobian.measure, limit=0, steps=20)):
        found = gb.measure(step, probe)
        assert ("batch_rms_error" in found) == (probe != "jacobian")
        for key in ("batch_largest", "0/own_largest"):
            assert found[key].dtype == torch.float64
            assert found[key].item() == pytest.approx(double[key].item(), rel=tolerance)


@pytest.mark.parametrize(
    "keywords",
    [
        {"definitions": ["whole"]},
        {"definitions": "batch"},
        {"layers": ["nowhere"]},
        {"samples": 0},
        {"limit": -1},
        {"steps": 1},
        {"starts": 0},
        {"points": 1},
        {"zero": 1.0},
    ],
)
def test_wrong_parameters_are_named(keywords):
    step = networks.step_for(networks.mlp())
    with pytest.raises(ValueError, match=f"jacobian: {next(iter(keywords))} must"):
        gb.measure(step, functools.partial(jacobian.measure, **keywords))
