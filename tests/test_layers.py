"""The layers' numbers: PyTorch's own, the oracle's running statistics, masks, fused activations."""

import copy
import inspect

import cases
import numpy as np
import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gammabeta as gb

# ours, PyTorch's, the fused one, an input shape
LAYERS = [
    pytest.param(gb.BatchNorm1d, nn.BatchNorm1d, gb.BatchNormAct1d, (8, 5), id="1d dense"),
    pytest.param(gb.BatchNorm1d, nn.BatchNorm1d, gb.BatchNormAct1d, (8, 5, 3), id="1d sequence"),
    pytest.param(gb.BatchNorm2d, nn.BatchNorm2d, gb.BatchNormAct2d, (4, 5, 3, 4), id="2d"),
    pytest.param(gb.BatchNorm3d, nn.BatchNorm3d, gb.BatchNormAct3d, (3, 5, 2, 3, 2), id="3d"),
]
OPTIONS = {
    "default": {},
    "momentum 0.01": {"momentum": 0.01},
    "momentum 1": {"momentum": 1.0},
    "momentum 0": {"momentum": 0.0},
    "cumulative": {"momentum": None},
    "eps": {"eps": 0.5},
    "no affine": {"affine": False},
    "no bias": {"bias": False},
    "no tracking": {"track_running_stats": False},
    "bare": {"affine": False, "track_running_stats": False},
}
FUNCTIONS = {
    None: lambda u: u,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    ("leaky_relu", 0.2): lambda u: F.leaky_relu(u, 0.2),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
    ("gelu", "tanh"): lambda u: F.gelu(u, approximate="tanh"),
}


def _batches(shape, count, dtype=torch.float64, **options):
    return [cases.call(shape, dtype=dtype, seed=seed, **options) for seed in range(count)]


def _randomize(layer):
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) + 0.5)
    return layer


def _assert_same_state(ours, theirs, **tolerance):
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def _train_and_evaluate(ours, theirs, shape, dtype, tolerance, forward=lambda layer, x: layer(x)):
    """Five steps of gradient descent and an evaluation, compared all the way."""
    optimizers = [
        torch.optim.SGD(layer.parameters(), lr=0.1) if list(layer.parameters()) else None
        for layer in (ours, theirs)
    ]
    for call in _batches(shape, 5, dtype):
        results = []
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            x = call.x.clone().requires_grad_()
            y = forward(layer, x)
            y.backward(call.dy)
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            results.append((y.detach(), x.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, **tolerance)
        _assert_same_state(ours, theirs, **tolerance)
    ours.eval()
    theirs.eval()
    x = cases.call(shape, dtype=dtype, seed=99).x
    torch.testing.assert_close(forward(ours, x), forward(theirs, x), **tolerance)
    _assert_same_state(ours, theirs, **tolerance)


# --- the same layer ------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs", "fused", "shape"), LAYERS)
def test_the_constructor_takes_what_pytorchs_takes_in_the_same_order(ours, theirs, fused, shape):
    wanted = list(inspect.signature(theirs).parameters.values())
    for cls in (ours, fused):
        had = inspect.signature(cls).parameters
        positional = [p.name for p in had.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == [p.name for p in wanted if p.kind is p.POSITIONAL_OR_KEYWORD]
        for parameter in wanted:
            assert had[parameter.name].default == parameter.default
            assert had[parameter.name].kind == parameter.kind
        extras = {"backend", "stored_variance", "on_single"} | ({"act"} if cls is fused else set())
        assert set(had) - {p.name for p in wanted} == extras


@pytest.mark.parametrize(("ours", "theirs", "fused", "shape"), LAYERS)
def test_only_the_plain_layer_says_that_it_is_pytorchs(ours, theirs, fused, shape):
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__
    layer = fused(5)
    assert not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    # folding and converting tools read eps: without it they stop and cannot drop the activation
    assert not hasattr(layer, "eps")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("ours", "theirs", "fused", "shape"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_five_training_steps_and_an_evaluation_give_pytorchs_numbers(
    ours, theirs, fused, shape, options, dtype
):
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {}
    original = _randomize(theirs(5, dtype=dtype, **options))
    layer = ours(5, dtype=dtype, **options)
    layer.load_state_dict(original.state_dict())
    _train_and_evaluate(layer, original, shape, dtype, tolerance)


@pytest.mark.parametrize("act", FUNCTIONS, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(("ours", "theirs", "fused", "shape"), LAYERS)
def test_a_fused_layer_is_the_plain_one_then_residual_then_activation(
    ours, theirs, fused, shape, residual, act
):
    original = _randomize(theirs(5, dtype=torch.float64))
    layer = fused(5, dtype=torch.float64, act=act)
    layer.load_state_dict(original.state_dict())

    def forward(module, x):
        extra = x.square() if residual else None
        if module is layer:
            return module(x, extra)
        return FUNCTIONS[act](module(x) if extra is None else module(x) + extra)

    _train_and_evaluate(
        layer, original, shape, torch.float64, {"rtol": 1e-9, "atol": 1e-9}, forward
    )


def test_the_fused_layers_activation_is_relu_unless_told():
    layer = gb.BatchNormAct1d(5)
    x = cases.call((8, 5), dtype=torch.float32).x
    assert torch.equal(layer(x), torch.relu(gb.BatchNorm1d(5)(x)))
    with pytest.raises(ValueError, match="'sigmoid'"):
        gb.BatchNormAct1d(5, act="sigmod")


# --- running statistics --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("stored", ["unbiased", "biased"])
@pytest.mark.parametrize("momentum", cases.MOMENTA, ids=str)
def test_running_statistics_agree_with_the_oracle(momentum, stored, mask, backend):
    for cls, shape in ((gb.BatchNorm1d, (8, 5, 3)), (gb.BatchNormAct2d, (4, 5, 3, 4))):
        calls = _batches(shape, 10, mask=mask)
        cases.require(backend, calls[0].x, mask=calls[0].mask)
        layer = cls(
            5, momentum=momentum, stored_variance=stored, backend=backend, dtype=torch.float64
        )
        for step, call in enumerate(calls, start=1):
            layer(call.x, mask=call.mask)
            if step not in (1, 2, 10):
                continue
            truth = oracle.running(
                [cases.numpy(c.x) for c in calls[:step]],
                momentum,
                stored=stored,
                masks=[cases.numpy(c.mask) for c in calls[:step]],
            )
            np.testing.assert_allclose(layer.running_mean.numpy(), truth.mean, rtol=0, atol=1e-12)
            np.testing.assert_allclose(layer.running_var.numpy(), truth.var, rtol=1e-12)
            assert layer.num_batches_tracked.item() == truth.batches


def test_running_statistics_are_updated_in_place_and_only_in_training():
    layer = gb.BatchNorm1d(5, dtype=torch.float64)
    buffers = dict(layer.named_buffers())
    versions = {name: buffer.clone() for name, buffer in buffers.items()}
    calls = _batches((8, 5), 3)
    layer.eval()(calls[0].x)
    assert all(torch.equal(buffers[name], versions[name]) for name in buffers)
    with torch.no_grad():
        layer.train()(calls[1].x)
    layer(calls[2].x)
    assert layer.num_batches_tracked.item() == 2
    # whoever holds a buffer (a reducer, a captured graph) goes on seeing its values
    assert all(buffer is buffers[name] for name, buffer in layer.named_buffers())
    assert not any(torch.equal(buffers[name], versions[name]) for name in buffers)


def test_switching_tracking_off_later_freezes_the_statistics_as_in_pytorch():
    call, other = _batches((8, 5), 2)
    results = []
    for cls in (gb.BatchNorm1d, nn.BatchNorm1d):
        layer = cls(5, dtype=torch.float64)
        layer(call.x)
        layer.track_running_stats = False
        y = layer(other.x)
        results.append((y.detach(), layer.eval()(other.x).detach(), *layer.buffers()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [gb.BatchNorm1d, gb.BatchNormAct1d])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_batch_that_is_not_finite_does_not_enter_the_running_statistics(bad, cls):
    calls = _batches((8, 5), 2)
    layer = cls(5, dtype=torch.float64, momentum=None)
    layer(calls[0].x)
    before = copy.deepcopy(layer.state_dict())
    poisoned = calls[1].x.clone()
    poisoned[3, 2] = bad
    with pytest.warns(gb.StatisticsWarning, match="NaN or infinite"):
        layer(poisoned)
    layer(poisoned)  # warns once only: a second warning would be an error here
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    layer(calls[1].x)
    truth = oracle.running([cases.numpy(c.x) for c in calls], None)
    np.testing.assert_allclose(layer.running_mean.numpy(), truth.mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(layer.running_var.numpy(), truth.var, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_running_mean_of_a_half_layer_reaches_the_mean(dtype):
    layer = gb.BatchNorm1d(3, momentum=0.01).to(dtype)
    x = (1 + 0.1 * torch.randn(64, 3)).to(dtype)
    for _ in range(1000):
        layer(x)
    # in bfloat16 the running mean would stop near 0.5, where a step of 1 % rounds to nothing
    torch.testing.assert_close(layer.running_mean, x.float().mean(0), rtol=1e-3, atol=1e-3)


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [gb.BatchNorm1d, gb.BatchNormAct1d])
def test_a_masked_batch_counts_as_the_batch_of_its_valid_values(cls):
    call = cases.call((6, 5, 7), mask=True)
    masked, packed = (cls(5, dtype=torch.float64) for _ in range(2))
    x = call.x.clone()
    x.movedim(1, -1)[~call.mask] = float("nan")
    for mode in (True, False):
        y = masked.train(mode)(x, mask=call.mask).movedim(1, -1)
        rows = packed.train(mode)(call.x.movedim(1, -1)[call.mask])
        torch.testing.assert_close(y[call.mask], rows, rtol=1e-12, atol=1e-12)
        assert not y[~call.mask].any()
    _assert_same_state(masked, packed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stored", ["unbiased", "biased"])
@pytest.mark.parametrize("valid", [0, 1])
def test_a_masked_batch_of_fewer_than_two_values_leaves_the_running_statistics(valid, stored):
    layer = gb.BatchNorm1d(5, stored_variance=stored)
    before = copy.deepcopy(layer.state_dict())
    mask = torch.arange(4) < valid
    with pytest.warns(gb.StatisticsWarning, match="fewer than two valid values"):
        y = layer(cases.call((4, 5), dtype=torch.float32).x, mask=mask)
    assert y.isfinite().all()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


# --- a batch of one ------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs", "fused", "shape"), LAYERS)
def test_one_value_per_channel_is_pytorchs_error_in_training(ours, theirs, fused, shape):
    x = torch.randn((1, 5) + (1,) * (len(shape) - 2))
    phrase = "Expected more than 1 value per channel when training, got input size"
    for cls in (theirs, ours, fused):
        layer = cls(5)
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match=phrase):
            layer(x)
        if cls is not theirs:
            for name, value in layer.state_dict().items():
                assert torch.equal(value, before[name]), name
        assert layer.eval()(x).shape == x.shape
        # without running statistics, evaluation too needs more than one value
        with pytest.raises(ValueError, match=phrase):
            cls(5, track_running_stats=False).eval()(x)


@pytest.mark.parametrize(("ours", "theirs", "fused", "shape"), LAYERS)
def test_on_single_running_normalizes_by_the_running_statistics(ours, theirs, fused, shape):
    for cls in (ours, fused):
        layer = cls(5, on_single="running", dtype=torch.float64)
        layer(cases.call(shape).x)
        before = copy.deepcopy(layer.state_dict())
        x = cases.call((1, 5) + (1,) * (len(shape) - 2)).x
        in_training = layer(x)
        assert torch.equal(in_training, layer.eval()(x))
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name]), name
        with pytest.raises(ValueError, match="Expected more than 1 value"):
            cls(5, on_single="running", track_running_stats=False)(x)


# --- errors --------------------------------------------------------------------------------------


def _error(layer, x):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        layer(x)
    return caught.value


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("ours", "theirs", "fused", "shape"), LAYERS)
@pytest.mark.parametrize("wrong", ["dimensions", "more dimensions", "channels"])
def test_a_wrong_input_raises_pytorchs_error_with_its_words(
    ours, theirs, fused, shape, wrong, mode
):
    x = {
        "dimensions": torch.zeros(8),
        "more dimensions": torch.zeros(*shape, *(2,) * (6 - len(shape))),
        "channels": torch.zeros(shape[0], 7, *shape[2:]),
    }[wrong]
    truth = _error(theirs(5).train(mode), x)
    for cls in (ours, fused):
        found = _error(cls(5).train(mode), x)
        assert type(found) is type(truth)
        assert str(truth).rstrip(".") in str(found)
        assert str(tuple(x.shape)) in str(found)


@pytest.mark.parametrize("eps", [0.0, -1.0])
@pytest.mark.parametrize(("ours", "theirs", "fused", "shape"), LAYERS)
def test_training_needs_a_positive_eps(ours, theirs, fused, shape, eps):
    x = cases.call(shape, dtype=torch.float32).x
    truth = _error(theirs(5, eps=eps), x)
    for cls in (ours, fused):
        layer = cls(5, eps=eps)
        before = copy.deepcopy(layer.state_dict())
        found = _error(layer, x)
        assert type(found) is type(truth)
        assert str(truth) in str(found)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "options",
    [{"stored_variance": "unbaised"}, {"on_single": "runing"}, {"backend": "natve"}],
    ids=str,
)
def test_a_misspelled_option_is_refused_by_the_constructor(options):
    (given,) = options.values()
    for cls in (gb.BatchNorm2d, gb.BatchNormAct2d, gb.LazyBatchNorm2d):
        with pytest.raises(ValueError, match=given):
            cls(**options) if cls is gb.LazyBatchNorm2d else cls(3, **options)
