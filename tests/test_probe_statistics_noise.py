"""The noise of batch statistics, against all batches that can be drawn, and closed forms."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.nn import functional as F

import gammabeta as gb
from gammabeta.probes import statistics_noise as noise
from gammabeta.probes.statistics_noise import Samples
from tests import networks

NETWORKS = pytest.mark.parametrize(
    "build",
    [
        pytest.param(functools.partial(networks.NETWORKS[name], norm=norm), id=f"{name}-{norm}")
        for name in ("linear_chain", "mlp", "conv_residual")
        for norm in ("nn", "gb")
    ],
)


def all_batches(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance of each of the N^size ordered batches, (N^size, C) each."""
    parts = [x[list(which)] for which in itertools.product(range(len(x)), repeat=size)]
    whole = np.stack([part.swapaxes(0, 1).reshape(x.shape[1], -1) for part in parts])
    return whole.mean(2), whole.var(2)


def skewed(*shape: int) -> torch.Tensor:
    """Far from Gaussian and from zero mean, with values of one sample that go together."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).exp() + 2
    return x + torch.randn(shape[0], *(1,) * (len(shape) - 1), generator=generator)


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3), (4, 2, 2, 2)])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_variances_of_mean_and_variance_are_those_over_all_batches(shape, size):
    x = skewed(*shape)
    means, variances = all_batches(x.numpy(), size)
    of_mean, of_var = noise.variances(Samples.of(x), size)
    np.testing.assert_allclose(of_mean, means.var(0), rtol=1e-12)
    np.testing.assert_allclose(of_var, variances.var(0), rtol=1e-10)


@pytest.mark.parametrize("shape", [(6, 3), (5, 2, 3)])
def test_drawn_noise_has_the_moments_of_the_noise_over_all_batches(shape):
    x, size, eps, draws = skewed(*shape), 4, 0.1, 200_000
    samples = Samples.of(x)
    means, variances = all_batches(x.numpy(), size)
    mean, var = (a.numpy() for a in (x.transpose(0, 1).flatten(1).mean(1), samples.var))
    expected_a = (mean - means) / np.sqrt(variances + eps)
    expected_s = np.sqrt(var + eps) / np.sqrt(variances + eps)
    for found, expected in zip(
        noise.drawn(samples, size, eps, draws), (expected_a, expected_s), strict=True
    ):
        # six standard errors of a mean and of a variance over independent draws
        error = expected.std(0) / math.sqrt(draws)
        assert (np.abs(found.numpy().mean(0) - expected.mean(0)) < 6 * error).all()
        spread = ((expected - expected.mean(0)) ** 2).std(0) / math.sqrt(draws)
        assert (np.abs(found.numpy().var(0) - expected.var(0)) < 6 * spread).all()


def test_a_value_becomes_s_times_itself_plus_a():
    """xhat in the drawn batch is s·x̂ + a: one line for all values, whatever the batch."""
    x, eps = skewed(6, 2, 3), 1e-3
    samples = Samples.of(x)
    additive, scale = noise.drawn(samples, 4, eps, draws=50, seed=9)
    which = torch.randint(6, (50, 4), generator=torch.Generator().manual_seed(9))
    population = (x - x.mean((0, 2), True)) / (samples.var[:, None] + eps).sqrt()
    for batch, a, s in zip(which, additive, scale, strict=True):
        part = x[batch]
        rstd = (part.var((0, 2), correction=0)[:, None] + eps).rsqrt()
        expected = (x - part.mean((0, 2), True)) * rstd
        torch.testing.assert_close(population * s[:, None] + a[:, None], expected)


@pytest.mark.parametrize("kurtosis_of", ["gaussian", "uniform", "coin"])
@pytest.mark.parametrize("values", [2, 7, 64])
def test_independent_values_give_the_closed_form_with_their_kurtosis(kurtosis_of, values):
    x = {
        "gaussian": stats.norm.ppf((np.arange(4000) + 0.5) / 4000),
        "uniform": np.linspace(-1, 1, 4001),
        "coin": np.array([-1.0, 1.0]),
    }[kurtosis_of]
    samples = Samples.of(torch.from_numpy(x)[:, None])
    kurtosis = float((x**4).mean() / (x**2).mean() ** 2)
    assert samples.kurtosis.item() == pytest.approx(kurtosis, rel=1e-12)
    of_mean, of_var = noise.variances(samples, values)
    relative = (of_mean / samples.var).item(), (of_var / samples.var**2).item()
    assert relative == pytest.approx(noise.independent(values, kurtosis), rel=1e-12)


@pytest.mark.parametrize("values", [6, 16, 200])
def test_the_gaussian_noise_is_what_integration_over_chi_gives(values):
    """(m − 1) σ_B²·m/(m − 1) = σ² χ²: integrate 1/√, 1/ and the independent mean over χ²."""
    density = stats.chi2(values - 1).pdf

    def expected(function):
        most = values + 40 * math.sqrt(2 * values)
        return integrate.quad(lambda t: function(values / t) * density(t), 0, most)[0]

    inverse = expected(lambda v: v)
    additive, multiplicative = noise.gaussian(values)
    assert additive == pytest.approx(inverse / values, rel=1e-8)
    assert multiplicative == pytest.approx(inverse - expected(np.sqrt) ** 2, rel=1e-6)


def test_drawn_noise_of_a_gaussian_population_is_the_gaussian_one():
    x = torch.from_numpy(stats.norm.ppf((np.arange(2000) + 0.5) / 2000))[:, None]
    draws = 10_000
    found = [part.var().item() for part in noise.drawn(Samples.of(x), 16, draws=draws)]
    # six standard errors; 1.3 covers the tails of chi with 15 degrees of freedom
    assert found == pytest.approx(noise.gaussian(16), rel=6 * 1.3 * math.sqrt(2 / draws))


def test_fewer_than_four_gaussian_values_have_no_finite_noise():
    with pytest.raises(ValueError, match=r"finite from 4 values.*got 3"):
        noise.gaussian(3)


def inputs_of_norms(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each batch normalization receives, caught by hooks."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(
                lambda _, given, __, name=name: seen.update({name: given[0]})
            )
    with torch.no_grad():
        model(x)
    return seen


@NETWORKS
def test_a_networks_noise_is_that_of_all_pairs_of_samples(build):
    """Batches of two drawn from eight samples: all 64, with every sample's positions."""
    model = build()
    x, y = (t[:8] for t in networks.batch_for(model))
    measure = functools.partial(noise.measure, sizes=(2, 8), draws=40_000)
    found = gb.measure(gb.Step(model, F.cross_entropy, (x, y)), measure)
    for name, given in inputs_of_norms(model, x).items():
        values = given.numpy()
        eps = model.get_submodule(name).eps
        flat = values.swapaxes(0, 1).reshape(values.shape[1], -1)
        var, live = flat.var(1), flat.var(1) > 0
        means, variances = all_batches(values, 2)
        a = (flat.mean(1) - means) / np.sqrt(variances + eps)
        s = np.sqrt(var + eps) / np.sqrt(variances + eps)
        expected = {
            "mean": (means.var(0) / var, 1e-8),
            "variance": (variances.var(0) / var**2, 1e-8),
            # pairs of one sample twice are rare and extreme: heavy tails
            "additive": (a.var(0), 0.1),
            "multiplicative": (s.var(0), 0.1),
        }
        assert found[f"{name}/sizes"].tolist() == [2, 8]
        for key, (value, within) in expected.items():
            got = found[f"{name}/{key}"][0].item()
            assert got == pytest.approx(value[live].mean(), rel=within), (name, key)
        fourth = ((flat - flat.mean(1, keepdims=True)) ** 4).mean(1)
        assert found[f"{name}/kurtosis"].item() == pytest.approx((fourth / var**2)[live].mean())


def one_layer(x: torch.Tensor, norm: nn.Module, **more) -> dict[str, torch.Tensor]:
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(x[0].numel(), 2)).to(x.dtype)
    step = gb.Step(model, F.cross_entropy, (x, torch.randint(2, (len(x),))))
    return gb.measure(step, functools.partial(noise.measure, **more))


def test_independent_gaussian_values_have_their_textbook_noise():
    """64 samples of 400 channels: means over channels are within 6 % (variance: 1 − 1/N low)."""
    found = one_layer(torch.randn(64, 400).double(), gb.BatchNorm1d(400), draws=1000)
    assert found["0/sizes"].tolist() == [4, 8, 16, 32, 64]
    for place, size in enumerate((16, 32, 64), 2):
        of_mean, of_var = noise.independent(size)
        additive, multiplicative = noise.gaussian(size)
        assert found["0/mean"][place].item() == pytest.approx(of_mean, rel=0.06)
        assert found["0/variance"][place].item() == pytest.approx(of_var, rel=0.06)
        assert found["0/additive"][place].item() == pytest.approx(additive, rel=0.06)
        assert found["0/multiplicative"][place].item() == pytest.approx(multiplicative, rel=0.06)
    assert found["0/snr"].shape == (400,)
    assert found["0/snr"].median().item() == pytest.approx(2 * 64 / 3, rel=0.1)
    assert found["0/independent"].item() == pytest.approx(1.0)


def test_positions_of_a_constant_image_count_as_one_value():
    """Between images that are constant, and differ, a batch has as many values as images."""
    images = torch.randn(32, 50, 1, 1).double().expand(32, 50, 6, 6)
    found = one_layer(images, gb.BatchNorm2d(50), draws=2)
    assert found["0/independent"].item() == pytest.approx(1.0)
    assert found["0/mean"][0].item() == pytest.approx(1 / 4)
    noisy = one_layer(torch.randn(32, 50, 6, 6).double(), gb.BatchNorm2d(50), draws=2)
    assert noisy["0/independent"].item() == pytest.approx(36, rel=0.15)


def test_a_constant_channel_has_no_signal_and_enters_no_mean():
    x = torch.randn(13, 3).double()
    rest = one_layer(x[:, 1:], gb.BatchNorm1d(2))
    x[:, 0] = 100.1
    assert x[:, 0].mean() != 100.1  # a plain mean leaves a deviation
    found = one_layer(x, gb.BatchNorm1d(3))
    assert found["0/snr"][0] == 0
    assert all(torch.isfinite(value).all() for value in found.values())
    for key in ("mean", "variance", "additive", "multiplicative", "kurtosis"):
        torch.testing.assert_close(found[f"0/{key}"], rest[f"0/{key}"])
    assert set(one_layer(torch.ones(8, 2), gb.BatchNorm1d(2))) == {"0/sizes", "0/snr"}


def test_a_channel_with_a_nan_is_seen():
    x = torch.randn(8, 3)
    x[2, 1] = math.nan
    found = one_layer(x, nn.BatchNorm1d(3))
    assert found["0/snr"].isnan().tolist() == [False, True, False]
    assert found["0/mean"].isnan().all()


def test_layers_that_take_no_statistics_of_a_batch_have_no_noise():
    x = torch.randn(8, 4, 3, 3)
    frozen = gb.BatchNorm2d(4)
    gb.freeze(frozen)
    kept = nn.BatchNorm2d(4).eval()
    for layer in (nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), frozen, kept):
        assert one_layer(x, layer) == {}
    untracked = nn.BatchNorm2d(4, track_running_stats=False).eval()
    for layer in (untracked, gb.GhostBatchNorm2d(4, virtual_batch_size=4)):
        assert "0/mean" in one_layer(x, layer)


def test_a_batch_of_one_sample_says_nothing_about_others():
    assert one_layer(torch.randn(1, 4, 3, 3), nn.BatchNorm2d(4)) == {}


@pytest.mark.parametrize("more", [{"sizes": (1, 8)}, {"sizes": ()}, {"draws": 1}])
def test_sizes_and_draws_that_have_no_variance_are_refused(more):
    with pytest.raises(ValueError, match=r"of at least 2, got sizes=.*A batch of one sample"):
        one_layer(torch.randn(8, 4), nn.BatchNorm1d(4), **more)
