"""The studies' networks with other layers than plain batch normalization."""

import pytest
import torch

from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.layers.ghost import GhostBatchNorm1d
from gammabeta.layers.renorm import BatchRenorm1d
from gammabeta.studies._nets import LateRenorm1d, m2
from gammabeta.studies._train import stream

X = torch.rand(12, 36, generator=stream(0, "x"))


def _none(seen):
    return 1.0, 0.0


def _wide(seen):
    return 3.0, 5.0


def net(norm, seed=0):
    return m2(36, "sigmoid", norm, stream(seed, "weights"))


def renorm(width):
    return BatchRenorm1d(width, r_max=1, d_max=0)


def ghost(width):
    return GhostBatchNorm1d(width, virtual_batch_size=12)


@pytest.mark.parametrize("layer", [renorm, ghost, lambda width: LateRenorm1d(width, _none)])
def test_every_layer_stands_where_bn_stands_and_without_its_method_is_bn(layer):
    plain, other = net(True), net(layer)
    eps = {m.eps for m in other.modules() if isinstance(m, BatchNorm1d)}
    for m in plain.modules():
        if isinstance(m, BatchNorm1d) and eps:
            m.eps = eps.pop()
            eps.add(m.eps)
    torch.testing.assert_close(other(X), plain(X))
    torch.testing.assert_close(other.with_batch_statistics(X), plain.with_batch_statistics(X))


def test_batches_of_a_size_are_normalized_apart():
    model = net(True)
    parts = torch.cat([model.with_batch_statistics(part) for part in X.split(4)])
    torch.testing.assert_close(model.with_batch_statistics(X, 4), parts)
    assert not torch.allclose(parts, model.with_batch_statistics(X), atol=1e-3)
    with pytest.raises(ValueError, match="multiple"):
        model.with_batch_statistics(X, 5)


def test_the_studys_batch_renormalization_applies_r_and_d_last():
    layer = LateRenorm1d(3, _wide, momentum=0.1)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(0.5)
    layer.running_mean.fill_(0.2)
    layer.running_var.fill_(0.5)
    x = torch.randn(8, 3, generator=stream(1, "x"))
    mean, var = x.mean(0), x.var(0, unbiased=False)
    xhat = (x - mean) / (var + 1e-3).sqrt()
    r, d = (var / 0.5).sqrt().clamp(1 / 3, 3), ((mean - 0.2) / 0.5**0.5).clamp(-5, 5)
    torch.testing.assert_close(layer(x), (2 * xhat + 0.5) * r + d)
    torch.testing.assert_close(layer.running_mean, 0.9 * 0.2 + 0.1 * mean)
    torch.testing.assert_close(layer.running_var, 0.9 * 0.5 + 0.1 * var)
    assert layer.seen == 1


def test_the_limits_of_the_studys_batch_renormalization_hold():
    layer = LateRenorm1d(3, lambda seen: (1.5, 0.25))
    layer.running_mean.fill_(100.0)
    layer.running_var.fill_(1e-4)
    x = torch.randn(8, 3, generator=stream(1, "x"))
    xhat = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-3).sqrt()
    torch.testing.assert_close(layer(x), xhat * 1.5 - 0.25)


def test_statistics_of_a_reference_normalize_other_images():
    model, seen = net(True), torch.rand(20, 36, generator=stream(2, "x"))
    torch.testing.assert_close(model.with_statistics_of(X, X), model.with_batch_statistics(X))
    for layer in model.modules():
        if isinstance(layer, BatchNorm1d):
            layer.momentum, layer.stored_variance = 1.0, "biased"
    model(seen)
    torch.testing.assert_close(model.with_statistics_of(seen, X), model.eval()(X))
