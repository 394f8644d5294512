"""The methods as modules: states, copies, casts, control of updates, compiler, other tools."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import ranks
import torch
import torch.distributed as dist
from test_methods import F64, METHODS, build, data
from torch import nn
from torch.utils.checkpoint import checkpoint

import gammabeta as gb

NAMES = ["renorm", "ghost", "zca", "newton"]
KINDS = [(name, kind) for name in NAMES for kind in METHODS[name].classes]
SHAPE = {"1d": (8, 6), "2d": (8, 6, 3, 4), "3d": (8, 6, 2, 3, 2)}


def used(name, kind="1d", **options):
    layer = build(name, kind, **options)
    for seed in range(3):
        layer(data(SHAPE[kind], seed, layer.weight.dtype))
    return layer


def assert_same(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for (key, value), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert value.dtype == other.dtype, key
        assert torch.equal(value, other), key


def step_of(layer, call, x):
    x = x.clone().requires_grad_()
    call(x).sin().sum().backward()
    return x.grad


# --- states and copies ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_goes_through_a_file_and_back(name, kind, assign):
    layer, fresh = used(name, kind), build(name, kind)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=assign)
    assert_same(layer, fresh)
    for mode in (True, False):
        x = data(SHAPE[kind], 8)
        assert torch.equal(layer.train(mode)(x), fresh.train(mode)(x))
    assert_same(layer, fresh)


@pytest.mark.parametrize("name", ["renorm", "ghost"])
def test_a_state_dict_is_exchanged_with_pytorchs_layers(name):
    theirs = nn.BatchNorm1d(6, dtype=F64)
    theirs(data((8, 6)))
    layer = build(name, "1d")
    layer.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(layer.eval()(data((8, 6), 1)), theirs.eval()(data((8, 6), 1)))


@pytest.mark.parametrize("name", ["zca", "newton"])
def test_a_whitening_layer_has_a_covariance_in_place_of_the_variance(name):
    state = build(name, "1d").state_dict()
    assert set(state) == {"weight", "bias", "running_mean", "running_cov", "num_batches_tracked"}
    with pytest.raises(RuntimeError, match="running_cov"):
        build(name, "1d").load_state_dict(nn.BatchNorm1d(6).state_dict())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_copy_or_pickle_goes_on_like_the_original(name, kind, way):
    layer = used(name, kind, eps=0.3, momentum=None, stored_variance="biased")
    twin = way(layer)
    assert type(twin) is type(layer)
    assert repr(twin) == repr(layer)
    for mode in (True, False):
        x = data(SHAPE[kind], 8)
        assert torch.equal(layer.train(mode)(x), twin.train(mode)(x))
    assert_same(layer, twin)
    twin.train()(data(SHAPE[kind], 9))
    assert not torch.equal(layer.running_mean, twin.running_mean)


def ramp(start, step):
    return 1 + (step - start).clamp(min=0)


def test_a_renorm_layer_with_a_schedule_is_pickled():
    layer = gb.BatchRenorm1d(6, r_max=functools.partial(ramp, 2))
    twin = pickle.loads(pickle.dumps(layer))
    for seed in range(4):
        x = data((8, 6), seed, torch.float32)
        assert torch.equal(layer(x), twin(x))


@pytest.mark.parametrize("name", NAMES)
def test_the_repr_tells_what_was_asked_for(name):
    shown = repr(build(name, "1d", eps=0.25, on_single="running"))
    assert "eps=0.25" in shown
    assert "on_single='running'" in shown
    for option, value in METHODS[name].options.items():
        assert f"{option}={value}" in shown


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_resetting_restores_a_new_layer(name, kind):
    layer, method = used(name, kind), METHODS[name]
    layer.reset_parameters()
    assert_same(layer, method.classes[kind](6, dtype=F64, **method.options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_buffers_stay_float32_in_a_half_layer(name, kind, dtype):
    def check(layer):
        assert layer.weight.dtype == dtype
        floating = [b for b in layer.buffers() if b.is_floating_point()]
        assert [b.dtype for b in floating] == [torch.float32] * 2

    check(used(name, kind, dtype=dtype))
    full = used(name, kind, dtype=torch.float32)
    half = copy.deepcopy(full).to(dtype)
    check(half)
    for a, b in zip(half.buffers(), full.buffers(), strict=True):
        assert torch.equal(a, b)  # no round trip through half precision
    low = {k: v.to(dtype) if v.is_floating_point() else v for k, v in full.state_dict().items()}
    half.load_state_dict(low, assign=True)
    check(half)
    assert {b.dtype for b in copy.deepcopy(full).double().buffers()} == {F64, torch.int64}


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_layer_built_on_the_meta_device_is_usable_after_to_empty(name, kind):
    method = METHODS[name]
    with torch.device("meta"):
        layer = method.classes[kind](6, **method.options)
        assert layer(torch.empty(SHAPE[kind])).is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    new = method.classes[kind](6, **method.options)
    x = data(SHAPE[kind], dtype=torch.float32)
    assert torch.equal(layer(x), new(x))
    assert_same(layer, new)


@pytest.mark.parametrize("name", ["ghost", "zca", "newton"])
def test_without_running_statistics_the_batch_normalizes_in_evaluation_too(name):
    layer = build(name, "1d", track_running_stats=False)
    assert list(layer.buffers()) == []
    x = data((8, 6))
    assert torch.equal(layer(x), build(name, "1d")(x))
    assert torch.equal(layer.eval()(x), build(name, "1d")(x))


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}])
@pytest.mark.parametrize("name", NAMES)
def test_weight_and_bias_may_be_absent(name, options):
    bare, x = build(name, "1d", **options), data((8, 6))
    whole = build(name, "1d")
    with torch.no_grad():
        whole.bias.zero_()
        whole.weight.copy_(torch.ones(6) if bare.weight is None else bare.weight)
    for mode in (True, False):
        torch.testing.assert_close(bare.train(mode)(x), whole.train(mode)(x))


# --- control of updates --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_batches_enter_as_one(name):
    parts = [data((n, 6), n) for n in (8, 3, 6)]
    whole = build(name, "1d", momentum=0.3)
    whole(torch.cat(parts))
    layer = build(name, "1d", momentum=0.3)
    with gb.accumulate(layer):
        for part in parts:
            layer(part)
        assert layer.num_batches_tracked == 0
    assert layer.num_batches_tracked == 1
    for a, b in zip(layer.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_no_update_leaves_no_trace(name):
    layer = used(name)
    before = copy.deepcopy(layer)
    with gb.no_update(layer):
        layer(data((8, 6), 9))
    assert_same(layer, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_is_not_finite_is_kept_out_and_told_once(name):
    layer = used(name)
    before = copy.deepcopy(layer)
    bad = data((8, 6), 9)
    bad[0, 1] = torch.nan
    with pytest.warns(gb.StatisticsWarning, match=type(layer).__name__):
        y = layer(bad)
    layer(bad)
    assert_same(layer, before)
    assert gb.skipped(layer) == {"": 2}
    # channels of other groups, and of the same where they are by themselves, are as they were
    alone = {"zca": 2, "newton": 3}.get(name, 1)
    lost = torch.arange(6) // alone == 1 // alone
    assert y[:, ~lost].isfinite().all()
    assert y[:3, lost].isnan().all()
    layer(data((8, 6), 4))
    assert layer.num_batches_tracked == before.num_batches_tracked + 1


@pytest.mark.parametrize("name", NAMES)
def test_a_functional_call_writes_nothing_and_stacks_under_vmap(name):
    layer = used(name, momentum=0.4)
    before = copy.deepcopy(layer)
    xs = torch.stack([data((8, 6), seed) for seed in (5, 6, 7)])
    outputs, buffers = torch.func.vmap(lambda x: gb.functional_call(layer, {}, x))(xs)
    assert_same(layer, before)
    for i, x in enumerate(xs):
        twin = copy.deepcopy(layer)
        torch.testing.assert_close(outputs[i], twin(x), rtol=1e-10, atol=1e-10)
        for key, value in twin.named_buffers():
            torch.testing.assert_close(buffers[key][i], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_each_sample_set_by_torch_func(name):
    layer = used(name)
    xs = torch.stack([data((8, 6), seed) for seed in (5, 6)])

    def loss(x):
        return gb.functional_call(layer, {}, x)[0].sin().sum()

    together = torch.func.vmap(torch.func.grad(loss))(xs)
    for x, gradient in zip(xs, together, strict=True):
        expected = step_of(layer, copy.deepcopy(layer), x)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_counts_once_and_recomputes_what_there_was(name, reentrant):
    layer = build(name, "1d", momentum=0.5)
    twin = copy.deepcopy(layer)

    def checkpointed(x):
        return checkpoint(twin, x, use_reentrant=reentrant)

    for seed in range(3):
        x = data((8, 6), seed) + seed
        assert torch.equal(step_of(twin, checkpointed, x), step_of(layer, layer, x))
    assert_same(layer, twin)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["no_update", "functional_call"])
def test_renorm_recomputes_a_forward_that_was_not_counted(way, reentrant):
    gradients = []
    for checkpointed in (False, True):
        layer = used("renorm", momentum=0.5)  # counted before, in other states

        def call(x, layer=layer, checkpointed=checkpointed):
            return checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)

        x = (2 * data((8, 6), 9)).requires_grad_()
        if way == "no_update":
            with gb.no_update(layer):
                y = call(x)
        else:
            holder = nn.Module()
            holder.layer, holder.forward = layer, call
            y, _ = gb.functional_call(holder, {}, x)
        y.pow(3).sum().backward()
        gradients.append(x.grad)
        assert layer.num_batches_tracked == 3
    assert torch.equal(*gradients)


@pytest.mark.parametrize("order", ["sum", "first", "last"])
def test_renorm_recomputes_several_forwards_each_in_its_own_state(order):
    gradients = []
    for checkpointed in (False, True):
        layer = build("renorm", "1d", momentum=0.5)
        leaves, losses = [], []
        for seed in range(4):
            x = (data((8, 6), seed) * (1 + seed)).requires_grad_()
            y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
            leaves.append(x)
            losses.append(y.sin().sum())
        if order == "sum":
            sum(losses).backward()
        else:
            for loss in losses if order == "first" else reversed(losses):
                loss.backward()
        gradients.append(torch.stack([x.grad for x in leaves]))
    assert torch.equal(*gradients)


def test_renorm_finds_the_state_of_a_batch_with_nan_and_of_a_schedule():
    gradients = []
    for checkpointed in (False, True):
        layer = used("renorm", momentum=0.5, r_max=functools.partial(ramp, 2))
        bad = data((8, 6), 9)
        bad[0, 1] = torch.nan
        x = bad.requires_grad_()
        with pytest.warns(gb.StatisticsWarning):
            y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        layer(data((8, 6), 4))
        y.pow(3).sum().backward()
        gradients.append(x.grad)
    assert gradients[0][:, 2:].isfinite().all()
    torch.testing.assert_close(*gradients, rtol=0, atol=0, equal_nan=True)


def test_what_renorm_remembers_is_bounded_and_no_part_of_a_copy():
    layer = used("renorm")
    size = len(pickle.dumps(layer))
    assert size == len(pickle.dumps(copy.deepcopy(layer)))
    for seed in range(40):
        layer(data((8, 6), seed))
    assert len(layer._past) < 20
    assert len(pickle.dumps(layer)) == size


def test_a_probe_between_forward_and_backward_does_not_disturb_the_recomputation():
    layer = build("renorm", "1d", momentum=0.5)
    twin = copy.deepcopy(layer)
    x, y = data((8, 6)).requires_grad_(), data((8, 6)).requires_grad_()
    out = checkpoint(twin, y, use_reentrant=False).sin().sum()
    with gb.no_update(twin):
        twin(data((8, 6), 4))
    layer(x).sin().sum().backward()
    out.backward()
    assert torch.equal(x.grad, y.grad)


def test_renorm_recomputes_every_part_of_an_accumulated_batch_alike():
    layer = build("renorm", "1d", momentum=0.5)
    twin = copy.deepcopy(layer)
    grads = []
    for model, call in ((layer, layer), (twin, lambda x: checkpoint(twin, x, use_reentrant=False))):
        leaf = torch.ones(6, dtype=F64, requires_grad=True)
        with gb.accumulate(model):
            total = sum(call(data((8, 6), seed) * leaf).sin().sum() for seed in range(3))
        total.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    assert_same(layer, twin)


# --- compiler and other tools --------------------------------------------------------------------


# PyTorch's compiler makes an object of every autograd function that it traces
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_layer_gives_what_the_eager_one_gives(name, mask, mode):
    torch.compiler.reset()
    layer = used(name, "2d").train(mode)
    if name == "renorm":  # a schedule that needs no value on the host
        layer.r_max = functools.partial(ramp, 2)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    valid = torch.rand(8, 3, 4) < 0.7 if mask else None
    for seed in range(3):
        x = data(SHAPE["2d"], seed)
        expected = step_of(layer, lambda x: layer(x, valid), x)
        torch.testing.assert_close(step_of(twin, lambda x: compiled(x, valid), x), expected)
    for (key, a), b in zip(layer.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_fx_records_one_call_of_the_layer(name):
    traced = torch.fx.symbolic_trace(nn.Sequential(used(name)))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0"]


@pytest.mark.parametrize("name", NAMES)
def test_tools_for_batch_normalization_find_the_layer_or_say_that_they_cannot(name):
    layer = used(name)
    assert not isinstance(layer, nn.BatchNorm1d)
    with pytest.raises(AttributeError, match="hides `eps`"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
    batches = [data((8, 6), seed) for seed in range(4)]
    torch.optim.swa_utils.update_bn(batches, nn.Sequential(layer))
    expected = build(name, "1d", momentum=None)
    for batch in batches:
        expected(batch)
    for a, b in zip(layer.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    frozen = gb.freeze(nn.Sequential(layer))
    assert [(row.name, row.statistics) for row in frozen] == [("0", True)]


@pytest.mark.parametrize("name", ["ghost", "zca", "newton"])
def test_statistics_shared_between_processes_are_refused(name):
    layer = build(name, "1d")
    layer._group = object()
    with pytest.raises(ValueError, match="unsync_statistics"):
        layer(data((8, 6)))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_is_counted_and_enters_nothing(name):
    layer = used(name)
    before = copy.deepcopy(layer)
    x = torch.empty(0, 6, dtype=F64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 6)
    assert layer.num_batches_tracked == before.num_batches_tracked + 1
    before.num_batches_tracked += 1
    assert_same(layer, before)


# PyTorch's own import of its rules for forward mode
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_forward_mode_through_zca_is_refused_by_pytorch_in_words():
    layer = build("zca", "1d")
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(data((8, 6)), data((8, 6), 1))
        with gb.no_update(layer), pytest.raises(NotImplementedError, match="jvp"):
            layer(x)


def _rank(rank, folder):
    ranks.meet(rank, 2, folder)
    layer = gb.BatchRenorm1d(6, r_max=1.3, d_max=0.4, dtype=F64)
    gb.sync_statistics(layer)
    whole = torch.load(f"{folder}/x.pt")
    x = whole[:3] if rank == 0 else whole[3:]
    x.requires_grad_()
    for _ in range(2):
        y = layer(x)
    y.sin().sum().backward()
    torch.save((y.detach(), x.grad, layer.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
def test_renorm_over_two_processes_is_renorm_over_the_whole_batch(tmp_path):
    torch.save(data((8, 6)), tmp_path / "x.pt")
    ranks.end(ranks.start(_rank, 2, str(tmp_path)))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = gb.BatchRenorm1d(6, r_max=1.3, d_max=0.4, dtype=F64)
    x = data((8, 6)).requires_grad_()
    alone(x)
    y = alone(x)
    y.sin().sum().backward()
    torch.testing.assert_close(torch.cat([part[0] for part in found]), y, rtol=1e-12, atol=1e-12)
    dx = torch.cat([part[1] for part in found])
    torch.testing.assert_close(dx, x.grad, rtol=1e-12, atol=1e-12)
    for key, value in alone.state_dict().items():
        for part in found:
            torch.testing.assert_close(part[2][key], value, rtol=1e-12, atol=1e-12)
