"""gb.calibrate: population statistics that depend on the data and on nothing else."""

import copy
import math

import pytest
import ranks
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

import gammabeta as gb
from gammabeta.layers import ghost, renorm, whiten
from gammabeta.models._population import eager, watch

SPLITS = {
    "one batch": [64],
    "uneven": [2, 2, 4, 8, 16, 32],
    "singles": [1] * 64,
    "with empty batches": [0, 40, 0, 24],
}


def data(n=64, mean=300.0, std=0.1, channels=2):
    """Images whose mean grows from the first to the last: sorted batches are all different."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(n, channels, 8, 8, generator=generator)
    ramp = torch.linspace(-1, 1, n).view(n, 1, 1, 1)
    return mean + std * (noise + ramp)


def net(dtype=torch.float32, kind=nn.BatchNorm2d):
    """Three convolutions, each with its normalization; statistics that are far off.

    Without padding: a border of zeros beside a mean of 300 would be all there is to see.
    """
    torch.manual_seed(2)
    layers: list[nn.Module] = []
    for c in (2, 4, 4):
        layers += [nn.Conv2d(c, 4, 3), kind(4), nn.ReLU(), nn.Dropout(0.5)]
    model = nn.Sequential(*layers).to(dtype)
    for layer in model:
        if hasattr(layer, "running_var"):
            layer.running_mean.fill_(-7.0)
            layer.running_var.fill_(123.0)
    return model


def statistics(model):
    return {n: b.clone() for n, b in model.named_buffers() if n.endswith(("mean", "var"))}


def variances(model):
    return torch.cat([v.double() for n, v in statistics(model).items() if n.endswith("var")])


def state(model):
    return {n: v.clone() for n, v in model.state_dict().items()}, [
        m.training for m in model.modules()
    ]


def assert_same_state(a, b):
    assert a[1] == b[1]
    for name in a[0]:
        torch.testing.assert_close(a[0][name], b[0][name], rtol=0, atol=0, equal_nan=True)


def by_hand(model, x):
    """The definition: each layer's own input, over all data at once, in float64."""
    model = copy.deepcopy(model).double().eval()
    h, found = x.double(), []
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                found.append(h)
                layer.running_mean.copy_(h.mean((0, 2, 3)))
                layer.running_var.copy_(h.var((0, 2, 3)))
            h = layer(h)
    return torch.cat([h.var((0, 2, 3)) for h in found])


# --- the law -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, gb.BatchNorm2d])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("split", list(SPLITS))
def test_the_variances_do_not_depend_on_how_the_data_are_split(split, order, kind):
    x = data()
    wanted = net(kind=kind)
    gb.calibrate(wanted, [x])
    shuffled = x[torch.randperm(64)] if order == "shuffled" else x
    model = net(kind=kind)
    gb.calibrate(model, shuffled.split(SPLITS[split]))
    relative = variances(model) / variances(wanted) - 1
    assert relative.abs().max() < 1e-4
    means = [model.state_dict()[f"{i}.running_mean"] for i in (1, 5, 9)]
    means_wanted = [wanted.state_dict()[f"{i}.running_mean"] for i in (1, 5, 9)]
    for a, b in zip(means, means_wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


class Exact(nn.Conv2d):
    """A convolution in float64, rounded once: equal samples have equal outputs in any batch."""

    def forward(self, x):
        y = F.conv2d(x.double(), self.weight.double(), self.bias.double())
        return y.to(x.dtype)


def wide(seed, kind, conv=nn.Conv2d):
    """A net on which the rounding of float32 convolutions shows at some seeds."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, o in ((3, 8), (8, 8), (8, 8)):
        layers += [conv(i, o, 3), kind(o), nn.ReLU()]
    return nn.Sequential(*layers)


def worst_split(make, x):
    wanted = make()
    gb.calibrate(wanted, [x])
    worst = 0.0
    for split in SPLITS.values():
        model = make()
        gb.calibrate(model, x.split(split))
        worst = max(worst, float((variances(model) / variances(wanted) - 1).abs().max()))
    return worst


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, gb.BatchNorm2d])
@pytest.mark.parametrize("seed", range(3))
def test_in_float64_the_split_leaves_no_trace(seed, kind):
    """The data are those of float32: what is left there is the rounding inside the model."""
    x = data(channels=3).double()
    assert worst_split(lambda: wide(seed, kind).double(), x) < 1e-9


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, gb.BatchNorm2d])
def test_in_float32_what_the_split_leaves_comes_from_the_convolutions(kind):
    """float32 layers between convolutions that do not round by the size of the batch."""
    assert worst_split(lambda: wide(0, kind, Exact), data(channels=3)) < 1e-6
    # and those that do round much less once the mean is taken from the data
    x = data(channels=3) - 300
    assert worst_split(lambda: wide(0, kind), x) < 1e-5


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, gb.BatchNorm2d])
def test_they_are_the_variances_of_all_data_taken_at_once(kind):
    x, model = data(), net(torch.float64, kind)
    wanted = by_hand(net(torch.float64), x)
    gb.calibrate(model, x.double().split([2, 2, 4, 8, 16, 32]))
    torch.testing.assert_close(variances(model), wanted, rtol=1e-9, atol=0)


def test_in_one_pass_small_sorted_batches_change_the_variances_of_later_layers():
    """What the default is for: with order='batch' only the first layer is independent."""
    x = data()
    whole, parts = net(), net()
    gb.calibrate(whole, [x], order="batch")
    gb.calibrate(parts, x.split(4), order="batch")
    first, last = ((parts[i].running_var / whole[i].running_var - 1).abs().max() for i in (1, 9))
    assert first < 1e-4
    assert last > 0.02


def test_swa_utils_averages_variances_where_the_population_has_its_own():
    """Batches of 4 of sorted data: 1.1 where 25 is right."""
    x = torch.linspace(-math.sqrt(75), math.sqrt(75), 128).view(128, 1) + torch.randn(128, 1) * 0.8
    x = (x - x.mean()) * (5 / x.std())
    theirs, ours = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    update_bn(x.split(4), theirs)
    report = gb.calibrate(ours, x.split(4))
    assert ours.running_var.item() == pytest.approx(25, rel=1e-5)
    assert 0.3 < theirs.running_var.item() < 2
    assert report[0].n == 128
    assert report[0].var_ratio == pytest.approx(25, rel=1e-4)


def test_one_pass_equals_the_moments_of_what_training_mode_lets_through():
    x = data(mean=0.0, std=1.0)
    model = net()
    expected = copy.deepcopy(model)
    for dropout in (3, 7, 11):
        expected[dropout] = nn.Identity()
    found = None
    for part in x.split(16):
        seen = gb.Moments.of(expected[:9].train()(part).detach())
        found = seen if found is None else found.merge(seen)
    gb.calibrate(model, iter(x.split(16)), order="batch")
    torch.testing.assert_close(model[9].running_mean.double(), found.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[9].running_var.double(), found.unbiased(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "kind",
    [
        gb.BatchNorm1d,
        gb.BatchNormAct1d,
        lambda c: ghost.GhostBatchNorm1d(c, virtual_batch_size=256),
        renorm.BatchRenorm1d,
    ],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_in_one_pass_frozen_layers_normalize_by_the_batch_too(kind, frozen):
    """Their old statistics, which are replaced, must not shape what later layers see."""
    x = torch.randn(256, 3, generator=torch.Generator().manual_seed(1)) * 10 + 20
    linear = nn.Linear(3, 3, bias=False)
    nn.init.eye_(linear.weight)
    model = nn.Sequential(kind(3), linear, gb.BatchNorm1d(3, affine=False))
    if frozen:
        gb.freeze(model[0])
    before = repr(model)  # shows what is frozen, and the limits of a renormalization
    gb.calibrate(model, [x], order="batch")
    assert repr(model) == before
    torch.testing.assert_close(model.eval()(x).std(0), torch.ones(3), rtol=5e-3, atol=0)
    kept = model[0].running_var.clone()
    model.train()(x * 2)
    assert torch.equal(model[0].running_var, kept) == frozen


# --- which layers, in which order ----------------------------------------------------------------


class Residual(nn.Module):
    """first -> (left, right) -> sum -> last, with a branch that carries no gradient."""

    def __init__(self, detach):
        super().__init__()
        self.last, self.right = nn.BatchNorm1d(3), nn.BatchNorm1d(3)  # not in calling order
        self.left, self.first = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.detach = detach

    def forward(self, x):
        h = self.first(x)
        with torch.set_grad_enabled(not self.detach):
            left = self.left(h.relu())
        if self.detach:
            left = left.detach().round(decimals=6)
        return self.last(left + self.right(h.tanh()) * 2)


@pytest.mark.parametrize("detach", [False, True])
def test_levels_follow_the_data_with_and_without_gradients(detach):
    model = Residual(detach).double()
    report = gb.calibrate(model, list(torch.randn(4, 16, 3, dtype=torch.float64) * 3 + 1))
    assert {row.name: row.level for row in report} == {
        "last": 3,
        "right": 2,
        "left": 2,
        "first": 1,
    }


def test_branching_nets_do_not_depend_on_the_split():
    x = torch.randn(64, 3, dtype=torch.float64).sort(0).values * 3 + 1
    whole, parts = Residual(True).double(), Residual(True).double()
    gb.calibrate(whole, [x])
    gb.calibrate(parts, x.split(4))
    for name, value in statistics(whole).items():
        torch.testing.assert_close(statistics(parts)[name], value, rtol=1e-9, atol=1e-9)


def test_a_number_that_python_reads_counts_as_data():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.b(x * float(self.a(x).abs().max()))

    report = gb.calibrate(Scaled(), [torch.randn(8, 2)])
    assert [row.level for row in report] == [1, 2]


def test_a_layer_that_is_called_twice_pools_both_calls():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, a, b):
            return self.head(self.norm(a) - self.norm(b))

    a, b = torch.randn(40, 2) * 2 + 3, torch.randn(40, 2) - 5
    model = Siamese()
    batches = [{"a": x, "b": y} for x, y in zip(a.split(8), b.split(8), strict=True)]
    report = gb.calibrate(model, batches)
    both = torch.cat([a, b])
    torch.testing.assert_close(model.norm.running_var, both.var(0))
    torch.testing.assert_close(model.norm.running_mean, both.mean(0))
    assert [(row.level, row.n) for row in report] == [(1, 80), (2, 40)]


def test_a_layer_that_feeds_itself_does_not_depend_on_the_split():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(3), nn.Linear(3, 3)

        def forward(self, x):
            for _ in range(3):
                x = self.fc(self.norm(x)).relu()
            return x

    x = torch.randn(48, 3, dtype=torch.float64) * 4 + 2
    torch.manual_seed(5)
    whole = Recurrent().double()
    parts, alone = copy.deepcopy(whole), copy.deepcopy(whole)
    assert gb.calibrate(whole, [x])[0].level == 3
    gb.calibrate(parts, x.split(5))
    torch.testing.assert_close(parts.norm.running_var, whole.norm.running_var, rtol=1e-9, atol=0)
    gb.calibrate(alone.norm, [x])
    assert not torch.allclose(alone.norm.running_var, whole.norm.running_var)


# --- what a batch may be -------------------------------------------------------------------------


def test_tensors_tuples_lists_and_mappings_are_batches_and_forward_takes_the_rest():
    x = torch.randn(12, 3)

    class Model(nn.BatchNorm1d):
        def forward(self, input):
            return super().forward(input)

    class Strange:
        def __init__(self, x):
            self.x = x

    wanted = nn.BatchNorm1d(3)
    gb.calibrate(wanted, [x])
    for wrap in (
        lambda t: t,
        lambda t: (t, "label"),
        lambda t: [t, None, 3],
        lambda t: {"input": t},
        lambda t: ({"input": t}, 0),
    ):
        model = Model(3)
        gb.calibrate(model, [wrap(part) for part in x.split(4)])
        torch.testing.assert_close(model.running_var, wanted.running_var)
    model = nn.BatchNorm1d(3)
    gb.calibrate(model, [Strange(x)], forward=lambda m, batch: m(batch.x))
    torch.testing.assert_close(model.running_var, wanted.running_var)


def test_masks_are_honored_whether_given_by_name_or_by_place():
    x, mask = torch.randn(10, 3, 7) + 4, torch.rand(10, 7) < 0.5
    valid = x.transpose(1, 2)[mask]
    x = torch.where(mask[:, None], x, float("nan"))
    for layer, call in (
        (gb.BatchNorm1d(3), lambda m, b: m(b[0], mask=b[1])),
        (gb.BatchNorm1d(3), lambda m, b: m(b[0], b[1])),
        (gb.BatchNormAct1d(3), lambda m, b: m(b[0], None, b[1])),
    ):
        (row,) = gb.calibrate(
            layer, list(zip(x.split(3), mask.split(3), strict=True)), forward=call
        )
        assert row.n == len(valid)
        torch.testing.assert_close(layer.running_mean, valid.mean(0))
        torch.testing.assert_close(layer.running_var, valid.var(0))


def test_an_iterator_will_do_for_one_level_and_not_for_more():
    layer = nn.BatchNorm1d(2)
    gb.calibrate(layer, (x for x in torch.randn(3, 8, 2)))
    assert layer.running_var[0] != 1
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    before = state(model)
    with pytest.raises(ValueError, match=r"iterable several times.*'0' feeds '1'.*generator"):
        gb.calibrate(model, (x for x in torch.randn(3, 8, 2)))
    assert_same_state(state(model), before)


# --- what a layer may be -------------------------------------------------------------------------


def test_the_stored_variance_is_the_layers():
    x = torch.randn(5, 3, dtype=torch.float64)
    for layer, correction in (
        (nn.BatchNorm1d(3), 1),
        (gb.BatchNorm1d(3), 1),
        (gb.BatchNorm1d(3, stored_variance="biased"), 0),
        (nn.SyncBatchNorm(3), 1),
    ):
        gb.calibrate(layer.double(), [x])
        torch.testing.assert_close(layer.running_var, x.var(0, correction=correction))


def test_layers_without_statistics_are_named_and_frozen_ones_are_calibrated():
    model = nn.Sequential(
        nn.BatchNorm1d(2, track_running_stats=False), gb.BatchNorm1d(2), gb.BatchNormAct1d(2)
    )
    gb.freeze(model[1])
    report = gb.calibrate(model, list(torch.randn(4, 8, 2) * 3))
    assert [row.name for row in report] == ["0", "1", "2"]
    assert "track_running_stats=False" in report[0].note
    assert "depend on the split" in report[0].note
    assert "frozen" in report[1].note
    assert model[1]._frozen
    assert model[1].running_var[0] != 1
    assert report[2].note == ""
    assert report[2].before[1].tolist() == [1.0, 1.0]
    assert torch.equal(report[2].after[1], model[2].running_var.double())
    lines = str(report).splitlines()
    assert lines[0].split() == ["name", "level", "n", "mean_shift", "var_ratio", "note"]
    assert len(lines) == 4


def test_other_methods_are_calibrated_where_they_hold_a_mean_and_a_variance():
    x = torch.randn(32, 4) * 3
    model = nn.Sequential(ghost.GhostBatchNorm1d(4, virtual_batch_size=8), whiten.IterNorm1d(4))
    cov = model[1].running_cov.clone()
    report = gb.calibrate(model, x.split(8))
    torch.testing.assert_close(model[0].running_var, x.var(0))
    assert "not one mean and one variance" in report[1].note
    assert torch.equal(model[1].running_cov, cov)


def test_a_layer_that_no_batch_reaches_keeps_its_statistics():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(2), "unused": nn.BatchNorm1d(2)})
    report = gb.calibrate(model, [torch.randn(8, 2)], forward=lambda m, x: m["used"](x))
    assert "no batch reached it" in report[1].note
    assert model["unused"].running_var.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("order", ["network", "batch"])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, gb.BatchNorm2d])
def test_only_means_and_variances_change_and_every_mode_comes_back(order, kind):
    model = net(kind=kind).train()
    model[3].eval()
    model[5].eval()
    model[1].num_batches_tracked.fill_(17)
    before, hooks = state(model), [len(m._forward_pre_hooks) for m in model]
    rng = torch.get_rng_state()
    gb.calibrate(model, data(16).split(4), order=order)
    after = state(model)
    assert after[1] == before[1]
    for name in before[0]:
        changed = not torch.equal(before[0][name], after[0][name])
        assert changed == name.endswith(("running_mean", "running_var")), name
    assert [len(m._forward_pre_hooks) for m in model] == hooks
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)  # no dropout mask was drawn
    assert all(getattr(m, "track_running_stats", True) for m in model)
    assert not any(getattr(m, "_blocked", 0) for m in model)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x)


def test_compiled_models_are_calibrated():
    x = data(16, mean=1.0)
    plain, compiled = Outer(), Outer()
    compiled.compile(backend="aot_eager")
    with torch.no_grad():
        compiled.eval()(x)
    gb.calibrate(plain, [x])
    gb.calibrate(compiled, [x])
    assert torch.equal(variances(plain), variances(compiled))


def test_hooks_do_not_fire_in_compiled_code_unless_it_is_run_eagerly():
    x, model, calls = data(4, mean=1.0), Outer().eval(), []
    model.compile(backend="aot_eager")
    layers = {"norm": model.net[1]}
    with torch.no_grad():
        model(x)
        with watch(layers, lambda call, x, mask: calls.append(call)) as restart:
            model(x)
            assert calls == []
            with eager(model):
                for _ in range(2):
                    restart()
                    model(x)
    assert calls == [("norm", 0), ("norm", 0)]


# --- errors --------------------------------------------------------------------------------------


class Breaks:
    """Batches that end in an error, in the pass of that number."""

    def __init__(self, error, in_pass):
        self.error, self.left = error, in_pass

    def __iter__(self):
        self.left -= 1
        yield from data(16).split(4)
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("order", ["network", "batch"])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, gb.BatchNorm2d])
@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=repr)
def test_on_an_error_midway_the_model_is_as_it_was(error, kind, order):
    model = net(kind=kind).train()
    model[5].eval()
    before = state(model)
    for in_pass in (1, 2, 3) if order == "network" else (1,):
        with pytest.raises(type(error)):
            gb.calibrate(model, Breaks(error, in_pass), order=order)
        assert_same_state(state(model), before)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model)
        assert all(getattr(m, "track_running_stats", True) for m in model)
        assert not any(getattr(m, "_blocked", 0) for m in model)


def test_on_an_error_midway_a_frozen_layer_is_frozen_again():
    model = net(kind=gb.BatchNorm2d)
    gb.freeze(model[5])
    for order in ("network", "batch"):
        with pytest.raises(OSError, match="disk"):
            gb.calibrate(model, Breaks(OSError("disk"), 1), order=order)
        assert [m._frozen for m in model if hasattr(m, "_frozen")] == [False, True, False]


def shrinking():
    class Shrinking:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(data(16).split(4) if self.passes == 1 else [])

    return Shrinking()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch"),
        (shrinking(), "at least one batch in every pass"),
        ([data(1)[:0]], "at least 2 values per channel, got 0"),
        ([data(4), data(4) * float("nan")], r"finite.*'1'"),
    ],
)
def test_batches_that_say_nothing_are_errors_and_leave_the_model(batches, message):
    model = net().train()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        gb.calibrate(model, batches)
    assert_same_state(state(model), before)


def test_what_cannot_be_calibrated_is_said():
    x = [torch.randn(4, 3)]
    with pytest.raises(ValueError, match="order must be"):
        gb.calibrate(nn.BatchNorm1d(3), x, order="layer")
    with pytest.raises(ValueError, match="There is nothing to do"):
        gb.calibrate(nn.Linear(3, 3), x)
    with pytest.raises(ValueError, match="Run the model on one batch first"):
        gb.calibrate(nn.LazyBatchNorm1d(), x)
    with pytest.raises(ValueError, match="forward="):
        gb.calibrate(nn.BatchNorm1d(3), x, forward=lambda model, batch: F.relu(batch))
    with pytest.raises(ValueError, match=r"after gammabeta\.convert"):
        gb.calibrate(nn.BatchNorm1d(1).half(), [torch.tensor([[-3e4], [3e4]]).half()])


def test_a_model_of_whitening_layers_only_is_told_what_refreshes_them():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)) * 3
    model = nn.Sequential(whiten.IterNorm1d(4), whiten.DecorrelatedBatchNorm1d(4))
    with pytest.raises(ValueError, match=r"'0', '1'.*covariance.*update_bn\(batches, model\)") as e:
        gb.calibrate(model, [x])
    assert "without" not in str(e.value)
    update_bn([x], model)  # the advice works
    seen = model[0].running_cov.flatten(0, 1)
    torch.testing.assert_close(seen, torch.cov(x.T), rtol=1e-4, atol=1e-4)


def test_messages_of_a_layer_name_it_after_calibration():
    model = nn.Sequential(gb.BatchNorm1d(4), whiten.IterNorm1d(4))
    gb.calibrate(model, [torch.randn(16, 4)])
    for name in ("0", "1"):
        with pytest.raises(ValueError, match=rf"'{name}': expected"):
            model.get_submodule(name)(torch.randn(2, 4, 2, 2, 2))


def test_layers_that_feed_each_other_in_turn_are_said():
    model = nn.ModuleDict({"a": nn.BatchNorm1d(2), "b": nn.BatchNorm1d(2)})

    def run(m, batch):
        first, second = batch["order"]
        return m[second](m[first](batch["x"]))

    batches = [{"order": o, "x": torch.randn(8, 2)} for o in ("ab", "ba")]
    with pytest.raises(ValueError, match="one direction"):
        gb.calibrate(model, batches, forward=run)
    gb.calibrate(model, batches, order="batch", forward=run)


# --- several processes ---------------------------------------------------------------------------


def _rank(rank, folder):
    ranks.meet(rank, 2, folder)
    x = data(24)
    mine = [x[:4], x[4:5], x[5:18]] if rank == 0 else [x[18:]]
    results = {}
    for name, order, batches in (
        ("network", "network", mine),
        ("batch", "batch", mine),
        ("one has none", "network", [x] if rank == 0 else []),
    ):
        model = net()
        report = gb.calibrate(model, batches, order=order)
        results[name] = (statistics(model), report[0].n)
    model = net()
    before = state(model)
    try:
        gb.calibrate(model, Breaks(OSError("disk"), 2) if rank == 0 else mine)
    except (OSError, RuntimeError) as error:
        results["error"] = f"{type(error).__name__}: {error}"
    assert_same_state(state(model), before)
    wrapped = nn.parallel.DistributedDataParallel(net())
    gb.calibrate(wrapped, mine)
    results["wrapped"] = (statistics(wrapped.module), 0)
    for kind in (gb.BatchNorm2d, nn.SyncBatchNorm):
        for order in ("network", "batch"):
            # a layer without statistics meets the other ranks in eval mode too
            own = kind(2, track_running_stats=False)
            model = nn.Sequential(own, *net(kind=kind))
            if kind is gb.BatchNorm2d:
                gb.sync_statistics(model)
            meetings = [getattr(m, "_group", None) for m in model]
            gb.calibrate(model, mine, order=order)
            assert all(
                a is getattr(m, "_group", None) for a, m in zip(meetings, model, strict=True)
            )
            with pytest.raises(OSError if rank == 0 else RuntimeError, match="disk"):
                gb.calibrate(model, Breaks(OSError("disk"), 1) if rank == 0 else mine, order=order)
            assert all(
                a is getattr(m, "_group", None) for a, m in zip(meetings, model, strict=True)
            )
            assert (meetings[0] is not None) == (kind is gb.BatchNorm2d)
            results[f"{kind.__name__} {order}"] = (statistics(model), 0)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_uneven_data_end_with_the_statistics_of_all(tmp_path):
    ranks.end(ranks.start(_rank, 2, str(tmp_path)))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    x = data(24)
    alone = net()
    gb.calibrate(alone, [x])
    for name in ("network", "one has none", "wrapped", "batch"):
        for key, value in first[name][0].items():
            assert torch.equal(value, second[name][0][key]), "the ranks disagree"
            if name != "batch":
                torch.testing.assert_close(value, statistics(alone)[key], rtol=1e-4, atol=1e-4)
    assert first["network"][1] == second["network"][1] == 24 * 36
    in_one = net()
    gb.calibrate(in_one, [x[:4], x[4:5], x[5:18], x[18:]], order="batch")
    for key, value in statistics(in_one).items():
        torch.testing.assert_close(first["batch"][0][key], value, rtol=1e-5, atol=1e-5)
    for order in ("network", "batch"):
        alone = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), *net())
        gb.calibrate(alone, [x[:4], x[4:5], x[5:18], x[18:]], order=order)
        for kind in ("BatchNorm2d", "SyncBatchNorm"):
            for key, value in statistics(alone).items():
                both = [part[f"{kind} {order}"][0][key] for part in (first, second)]
                assert torch.equal(*both), "the ranks disagree"
                torch.testing.assert_close(both[0], value, rtol=1e-4, atol=1e-4)
    assert first["error"] == "OSError: disk"
    assert "rank 0 of the group failed with OSError('disk')" in second["error"]


def test_one_tensor_or_no_module_is_answered_by_what_to_do():
    with pytest.raises(ValueError, match=r"iterable of batches, got one tensor .*: write \[x\]"):
        gb.calibrate(nn.BatchNorm1d(3), torch.randn(8, 3))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got the class BatchNorm1d"):
        gb.calibrate(nn.BatchNorm1d, [torch.randn(8, 3)])
