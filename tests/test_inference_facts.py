"""What the texts on batch normalization insist on about inference, each as a law with its name."""

import pytest
import torch
from torch import nn

import gammabeta as gb

F64 = torch.float64
EPS = 1e-5


def data(*shape, mean=3.0, std=2.0):
    """Channels on axis 1 that differ in mean and scale."""
    c = shape[1]
    per_channel = (1, c) + (1,) * (len(shape) - 2)
    scales = torch.linspace(0.5, 1.5, c, dtype=F64).view(per_channel)
    return (torch.randn(*shape, dtype=F64) * std + mean) * scales


def learned(layer):
    """Give a layer some γ (of both signs) and β that training might have found."""
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-2, 3, layer.num_features))
        layer.bias.copy_(torch.linspace(-1, 1, layer.num_features))
    return layer


def close(found, wanted, tolerance=1e-12):
    wanted = torch.as_tensor(wanted, dtype=found.dtype)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# -- what normalizes at inference -----------------------------------------------------------


def test_at_inference_the_running_averages_normalize_and_gamma_and_beta_are_fixed():
    layer = learned(gb.BatchNorm1d(3)).double()
    for _ in range(10):
        layer(data(16, 3))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    x = data(5, 3, mean=-7.0)  # nothing like the training data
    y = layer.eval()(x)
    by_hand = (x - layer.running_mean) / torch.sqrt(layer.running_var + EPS)
    close(y, layer.weight * by_hand + layer.bias)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_running_averages_are_averages_of_the_batches_mean_and_unbiased_variance():
    layer = gb.BatchNorm1d(3, momentum=0.1).double()
    mean, var = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)
    for _ in range(5):
        x = data(8, 3)
        layer(x)
        mean = 0.9 * mean + 0.1 * x.mean(0)
        var = 0.9 * var + 0.1 * x.var(0, correction=1)
    close(layer.running_mean, mean)
    close(layer.running_var, var)


def test_at_inference_an_output_depends_on_its_own_sample_only_and_in_training_on_the_batch():
    layer = gb.BatchNorm1d(3).double()
    x, other = data(8, 3), data(8, 3, mean=9.0)
    other[0] = x[0]
    layer(x)
    assert not torch.allclose(layer(x)[0], layer(other)[0], rtol=1e-3)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(other)[0])
    assert torch.equal(layer(x)[:1], layer(x[:1]))  # a batch of one is no difficulty


def test_the_stored_variance_is_m_over_m_minus_one_times_the_one_that_normalized():
    for m in (2, 4, 8, 64):
        x = data(m, 3)
        layer = gb.BatchNorm1d(3, momentum=1.0).double()
        y = layer(x)
        biased = x.var(0, correction=0)
        close(y, (x - x.mean(0)) / torch.sqrt(biased + EPS), 1e-10)
        close(layer.running_var, biased * m / (m - 1))


def test_m_over_m_minus_one_makes_the_average_over_batches_the_population_variance():
    """The reason for the factor: E[biased variance of m values] = σ²·(m − 1)/m."""
    population = data(64, 1, std=5.0)
    population = (population - population.mean()) / population.std(correction=0) * 5
    m, draws = 4, 20_000
    batches = population[torch.randint(64, (draws, m)), 0]
    biased = batches.var(1, correction=0).mean()
    assert biased.item() == pytest.approx(25 * (m - 1) / m, rel=0.03)
    assert (biased * m / (m - 1)).item() == pytest.approx(25, rel=0.03)


@pytest.mark.parametrize("m", [2, 4, 8, 64])
def test_a_test_batchs_own_statistics_normalize_with_1_over_m(m):
    """track_running_stats=False: what the texts call statistics of the test batch."""
    x = data(m, 3)
    layer = gb.BatchNorm1d(3, track_running_stats=False, eps=1e-12).double().eval()
    y = layer(x)
    close(y.square().mean(0), torch.ones(3, dtype=F64), 1e-9)
    close(y, nn.BatchNorm1d(3, track_running_stats=False, eps=1e-12).double().eval()(x), 1e-9)


@pytest.mark.parametrize("m", [2, 4, 8, 64])
def test_with_1_over_m_minus_one_a_test_batch_comes_out_smaller_by_the_root(m):
    x = data(m, 3)
    seen = gb.Moments.of(x)
    with_m, _ = gb.batch_norm(x, eps=0.0)
    unbiased = gb.Moments.given(seen.mean, seen.unbiased())
    with_m_minus_1, _ = gb.batch_norm(x, moments=unbiased, eps=0.0)
    close(with_m_minus_1, with_m * ((m - 1) / m) ** 0.5)
    close(with_m.square().mean(0), torch.ones(3, dtype=F64))
    # standard deviation 1 in either case, if counted in the way in which it was divided
    close(with_m_minus_1.var(0, correction=1), torch.ones(3, dtype=F64))


# -- what the output is ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 5), (8, 5, 7), (8, 5, 4, 4)])
@pytest.mark.parametrize("std", [2.0, 1e-3])  # where σ² is not far above ε the factor shows
def test_the_output_has_mean_beta_and_standard_deviation_gamma_sigma_by_root(shape, std):
    x = data(*shape, std=std)
    y, _ = gb.batch_norm(
        x, weight := torch.linspace(-2, 3, 5, dtype=F64), bias := torch.linspace(-1, 1, 5).double()
    )
    axes = [0, *range(2, x.dim())]
    variance = x.var(axes, correction=0)
    close(y.mean(axes), bias, 1e-9)
    wanted = weight.abs() * (variance / (variance + EPS)).sqrt()
    close(y.std(axes, correction=0), wanted, 1e-9)
    if std == 1e-3:
        assert (wanted < 0.5 * weight.abs()).all()


def test_at_inference_the_output_has_neither_mean_beta_nor_standard_deviation_gamma():
    layer = learned(gb.BatchNorm1d(3)).double()
    layer(data(64, 3))
    y = layer.eval()(data(64, 3, mean=9.0))
    assert (y.mean(0) - layer.bias).abs().min() > 0.1
    assert (y.std(0, correction=0) / layer.weight.abs() - 1).abs().min() > 0.05


def test_xhat_is_y_minus_beta_by_gamma():
    layer = learned(gb.BatchNorm1d(4)).double()
    x = data(16, 4)
    y = layer(x)
    xhat = (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + EPS)
    close((y - layer.bias) / layer.weight, xhat, 1e-10)


def test_it_standardizes_and_does_not_make_the_data_normal():
    """An exponential distribution keeps its skewness of 2."""
    x = torch.distributions.Exponential(torch.tensor(1.0, dtype=F64)).sample((20_000, 1))
    y = gb.BatchNorm1d(1).double()(x)
    skewness = y.pow(3).mean() / y.square().mean().pow(1.5)
    assert skewness.item() == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("m", [2, 3, 4, 8])
def test_no_output_of_training_exceeds_the_root_of_m_minus_one(m):
    x = torch.zeros(m, 1, dtype=F64)
    x[0] = 1e6
    xhat, _ = gb.batch_norm(x, eps=0.0)
    close(xhat.max(), (m - 1) ** 0.5)
    layer = gb.BatchNorm1d(1).double().eval()  # at inference there is no such bound
    assert layer(x).max() > 1e5


# -- a bias before the layer ----------------------------------------------------------------

PRODUCERS = [
    (lambda: nn.Linear(3, 4), lambda: gb.BatchNorm1d(4), (16, 3)),
    (lambda: nn.Conv2d(3, 4, 3), lambda: gb.BatchNorm2d(4), (8, 3, 6, 6)),
]


@pytest.mark.parametrize(("linear", "norm", "shape"), PRODUCERS, ids=["dense", "convolution"])
def test_a_bias_before_the_layer_is_annulled_in_training_output_and_gradient(linear, norm, shape):
    linear, norm = linear().double(), learned(norm()).double()
    x = data(*shape)
    y = norm(linear(x))
    with torch.no_grad():
        linear.bias.add_(100)
    shifted = norm(linear(x))
    close(shifted, y, 1e-9)
    shifted.pow(3).sum().backward()
    assert linear.weight.grad.abs().max() > 1
    assert linear.bias.grad.abs().max() < 1e-8


@pytest.mark.parametrize(("linear", "norm", "shape"), PRODUCERS, ids=["dense", "convolution"])
def test_a_bias_before_the_layer_counts_at_inference(linear, norm, shape):
    linear, norm = linear().double(), learned(norm()).double()
    x = data(*shape)
    norm(linear(x))
    norm.eval()
    y = norm(linear(x))
    with torch.no_grad():
        linear.bias.add_(100)
    shifted = norm(linear(x))
    assert (shifted - y).abs().min() > 1
    shifted.pow(3).sum().backward()
    assert linear.bias.grad.abs().max() > 1


def test_a_bias_after_the_layer_is_not_annulled():
    """g(BN(Wu)) needs no bias; in g(W·BN(u) + b) it has its effect."""
    norm, linear = gb.BatchNorm1d(3).double(), nn.Linear(3, 4).double()
    x = data(16, 3)
    y = linear(norm(x))
    with torch.no_grad():
        linear.bias.add_(1)
    close(linear(norm(x)) - y, torch.ones(16, 4, dtype=F64))


# -- over which axes ------------------------------------------------------------------------


def test_dense_layers_are_normalized_per_feature_over_the_batch():
    x = data(16, 5)
    layer = gb.BatchNorm1d(5).double()
    y = layer(x)
    assert layer.weight.shape == layer.running_mean.shape == (5,)
    close(y.mean(0), torch.zeros(5, dtype=F64), 1e-9)
    for feature in range(5):  # each as if it were alone
        alone = gb.BatchNorm1d(1).double()(x[:, feature : feature + 1])
        close(y[:, feature : feature + 1], alone)


def test_convolutional_layers_are_normalized_per_channel_over_batch_and_positions():
    x = data(4, 3, 5, 6)
    layer = gb.BatchNorm2d(3).double()
    y = layer(x)
    assert layer.weight.shape == layer.running_mean.shape == (3,)
    as_rows = gb.BatchNorm1d(3).double()
    rows = as_rows(x.movedim(1, -1).reshape(-1, 3))  # m = n·h·w values each
    close(y.movedim(1, -1).reshape(-1, 3), rows)
    close(layer.running_var, as_rows.running_var)
    # not per activation: at one position, the batch alone has another mean than 0
    assert y.mean(0).abs().max() > 0.1


def test_gamma_root_of_variance_plus_eps_and_beta_mean_recover_the_activations():
    for layer, x in ((gb.BatchNorm1d(5), data(16, 5)), (gb.BatchNorm2d(5), data(4, 5, 6, 6))):
        layer.double()
        axes = [0, *range(2, x.dim())]
        with torch.no_grad():
            layer.weight.copy_((x.var(axes, correction=0) + EPS).sqrt())
            layer.bias.copy_(x.mean(axes))
        close(layer(x), x, 1e-10)


def test_at_inference_gamma_root_of_running_variance_and_beta_running_mean_are_the_identity():
    layer = gb.BatchNorm1d(5).double()
    layer(data(16, 5))
    with torch.no_grad():
        layer.weight.copy_((layer.running_var + EPS).sqrt())
        layer.bias.copy_(layer.running_mean)
    x = data(3, 5, mean=-20.0)
    close(layer.eval()(x), x, 1e-10)


# -- between training and inference ---------------------------------------------------------


def stack(cls, n=64, depth=20, **options):
    """The same batch of n through ``depth`` layers in training mode, then in eval mode."""
    model = nn.Sequential(*(cls(8, momentum=1.0, eps=1e-12, **options) for _ in range(depth)))
    model.double()
    x = data(n, 8)
    with torch.no_grad():
        training = model(x)
        inference = model.eval()(x)
    return (inference.std(0) / training.std(0)).mean().item()


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, gb.BatchNorm1d])
def test_twenty_stacked_layers_at_64_values_shrink_at_inference_by_63_64ths_to_the_tenth(cls):
    assert stack(cls) == pytest.approx((63 / 64) ** 10, rel=1e-9)
    assert stack(cls) == pytest.approx(0.8543, abs=1e-4)


@pytest.mark.parametrize(("n", "depth"), [(2, 4), (8, 20), (64, 1)])
def test_the_factor_between_training_and_inference_compounds_with_depth(n, depth):
    assert stack(gb.BatchNorm1d, n, depth) == pytest.approx(((n - 1) / n) ** (depth / 2), rel=1e-9)


def test_a_biased_stored_variance_cures_the_factor_of_the_stacked_layers():
    assert stack(gb.BatchNorm1d, stored_variance="biased") == pytest.approx(1, rel=1e-9)
    assert stack(gb.BatchNorm1d, 2, stored_variance="biased") == pytest.approx(1, rel=1e-9)
