"""What a model does with layers besides computing: save, load, copy, cast, trace, compile."""

import copy
import io
import pickle
from collections import OrderedDict

import cases
import pytest
import torch
from torch import nn

import gammabeta as gb

PAIRS = [
    (gb.BatchNorm1d, nn.BatchNorm1d, (8, 5)),
    (gb.BatchNorm2d, nn.BatchNorm2d, (4, 5, 3, 4)),
    (gb.BatchNorm3d, nn.BatchNorm3d, (3, 5, 2, 3, 2)),
]
LAZY = [
    (gb.LazyBatchNorm1d, nn.LazyBatchNorm1d, gb.BatchNorm1d, (8, 5)),
    (gb.LazyBatchNorm2d, nn.LazyBatchNorm2d, gb.BatchNorm2d, (4, 5, 3, 4)),
    (gb.LazyBatchNorm3d, nn.LazyBatchNorm3d, gb.BatchNorm3d, (3, 5, 2, 3, 2)),
]
FUSED = [
    (gb.BatchNormAct1d, nn.BatchNorm1d, (8, 5)),
    (gb.BatchNormAct2d, nn.BatchNorm2d, (4, 5, 3, 4)),
    (gb.BatchNormAct3d, nn.BatchNorm3d, (3, 5, 2, 3, 2)),
]
OPTIONS = [
    {},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"momentum": None},
]
HALF = [torch.float16, torch.bfloat16]


def _x(shape, dtype=torch.float32, seed=0):
    return cases.call(shape, dtype=dtype, seed=seed).x


def _used(layer, shape, steps=3, dtype=torch.float32):
    """A layer with parameters and statistics of its own."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        for seed in range(steps):
            layer(_x(shape, dtype, seed))
    return layer


def _assert_same(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, value), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert value.dtype == other.dtype, name
        assert torch.equal(value, other), name


# --- state_dict ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS + FUSED)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_state_dict_loads_strictly_both_ways(ours, theirs, shape, options, assign):
    for source, target in ((theirs, ours), (ours, theirs)):
        a, b = _used(source(5, **options), shape), target(5, **options)
        b.load_state_dict(a.state_dict(), strict=True, assign=assign)
        _assert_same(a, b)


@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS + FUSED)
def test_a_whole_models_checkpoint_on_disk_loads_both_ways(ours, theirs, shape):
    def model(cls):
        return nn.Sequential(OrderedDict(first=nn.Identity(), norm=_used(cls(5), shape)))

    for source, target in ((theirs, ours), (ours, theirs)):
        saved = model(source)
        file = io.BytesIO()
        torch.save(saved.state_dict(), file)
        file.seek(0)
        loaded = model(target)
        loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
        _assert_same(saved, loaded)


@pytest.mark.parametrize("metadata", ["version 1", "none"])
@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS + FUSED)
def test_a_checkpoint_older_than_num_batches_tracked_loads_strictly(ours, theirs, shape, metadata):
    old = _used(theirs(5), shape).state_dict()
    del old["num_batches_tracked"]
    if metadata == "none":
        del old._metadata
    else:
        old._metadata[""]["version"] = 1
    layer = ours(5)
    layer.load_state_dict(old, strict=True)
    assert layer.num_batches_tracked.item() == 0
    assert torch.equal(layer.running_mean, old["running_mean"])
    layer(_x(shape))
    assert layer.num_batches_tracked.item() == 1


def test_a_new_checkpoint_without_num_batches_tracked_is_an_error():
    state = nn.BatchNorm1d(5).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        gb.BatchNorm1d(5).load_state_dict(state, strict=True)


# --- copies and what a person sees ---------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
def test_the_repr_is_pytorchs_followed_by_what_is_not_default(ours, theirs, shape, options):
    assert repr(ours(5, **options)) == repr(theirs(5, **options))
    more = repr(ours(5, backend="reference", on_single="running", **options))
    assert more.startswith(repr(theirs(5, **options))[:-1])
    assert more.endswith("backend='reference', on_single='running')")


@pytest.mark.parametrize(("fused", "theirs", "shape"), FUSED)
def test_the_repr_of_a_fused_layer_shows_eps_and_activation(fused, theirs, shape):
    shown = repr(fused(5, eps=1e-3, act=("leaky_relu", 0.2)))
    inside = repr(theirs(5, eps=1e-3)).partition("(")[2][:-1]
    assert shown == f"{fused.__name__}({inside}, act=('leaky_relu', 0.2))"


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize(("cls", "shape"), [(p[0], p[-1]) for p in PAIRS + FUSED])
def test_a_copy_or_pickle_goes_on_like_the_original(cls, shape, way):
    layer = _used(cls(5, eps=0.3, momentum=None, stored_variance="biased"), shape)
    twin = way(layer)
    assert type(twin) is cls
    assert repr(twin) == repr(layer)
    x = _x(shape, seed=7)
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x), twin.train(mode)(x))
    _assert_same(layer, twin)
    twin.train()(_x(shape, seed=8))
    assert not torch.equal(layer.running_mean, twin.running_mean)


@pytest.mark.parametrize(("cls", "shape"), [(p[0], p[-1]) for p in PAIRS + FUSED])
def test_resetting_restores_a_new_layer(cls, shape):
    layer = _used(cls(5), shape)
    layer.reset_parameters()
    _assert_same(layer, cls(5))


# --- dtypes of the buffers -----------------------------------------------------------------------


def _dtypes(layer):
    return [layer.running_mean.dtype, layer.running_var.dtype, layer.num_batches_tracked.dtype]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("cls", "shape"), [(p[0], p[-1]) for p in PAIRS + FUSED])
def test_buffers_stay_float32_in_a_half_layer_however_it_became_one(cls, shape, dtype):
    wide = [torch.float32, torch.float32, torch.int64]

    def check(layer, *, parameters=dtype):
        assert _dtypes(layer) == wide
        assert layer.weight.dtype == layer.bias.dtype == parameters

    check(cls(5, dtype=dtype))
    # a value that half precision cannot hold survives the cast
    layer = cls(5)
    layer.running_mean.fill_(1 / 3)
    layer.running_var.fill_(1e5 + 1 / 3)
    kept = copy.deepcopy(layer.state_dict())
    casts = [lambda m: m.to(dtype), lambda m: m.to("cpu", dtype)]
    casts.append(lambda m: m.half() if dtype == torch.float16 else m.bfloat16())
    for cast in casts:
        half = cast(copy.deepcopy(layer))
        check(half)
        assert torch.equal(half.running_mean, kept["running_mean"])
        assert torch.equal(half.running_var, kept["running_var"])
        check(half.float(), parameters=torch.float32)
    check(nn.Sequential(copy.deepcopy(layer)).to(dtype)[0])
    # from a file of a half layer of PyTorch's, whose buffers are half
    state = nn.BatchNorm1d(5, dtype=dtype).state_dict()
    for assign in (False, True):
        loaded = cls(5, dtype=dtype)
        loaded.load_state_dict(state, assign=assign)
        check(loaded)
    with torch.device("meta"):
        empty = cls(5, dtype=dtype)
    check(empty.to_empty(device="cpu"))
    check(cls(5, device="meta").to_empty(device="cpu").to(dtype))
    loaded = cls(5, device="meta", dtype=dtype)
    loaded.load_state_dict(state, assign=True)
    check(loaded)
    # and it works: half in, half out, statistics in float32
    half = cls(5, dtype=dtype)
    assert half(_x(shape, dtype)).dtype == dtype
    assert half.eval()(_x(shape, dtype)).dtype == dtype
    check(half)


@pytest.mark.parametrize(("cls", "shape"), [(p[0], p[-1]) for p in PAIRS + FUSED])
def test_buffers_are_float64_in_a_float64_layer(cls, shape):
    wide = [torch.float64, torch.float64, torch.int64]
    for layer in (cls(5, dtype=torch.float64), cls(5).double(), cls(5).to(torch.float64)):
        assert _dtypes(layer) == wide
        assert layer(_x(shape, torch.float64)).dtype == torch.float64
        assert _dtypes(layer) == wide
    assert _dtypes(cls(5, dtype=torch.float64).half()) == [torch.float32] * 2 + [torch.int64]
    with torch.device("meta"):
        empty = cls(5, dtype=torch.float64)
    assert _dtypes(empty.to_empty(device="cpu")) == wide


def test_a_half_layer_computes_what_the_float32_layer_computes():
    for dtype in HALF:
        half = _used(gb.BatchNorm2d(5), (4, 5, 3, 4)).to(dtype)
        full = copy.deepcopy(half).float()
        x = _x((4, 5, 3, 4), dtype)
        for mode in (True, False):
            ours, exact = half.train(mode)(x), full.train(mode)(x.float())
            torch.testing.assert_close(ours, exact.to(dtype), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(half.running_var, full.running_var)


@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
def test_a_layer_built_on_the_meta_device_is_usable_after_to_empty(ours, theirs, shape):
    with torch.device("meta"):
        layer = ours(5)
        y = layer(torch.empty(shape))
    assert y.is_meta
    assert y.shape == shape
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    original = theirs(5)
    _assert_same(layer, original)
    torch.testing.assert_close(layer(_x(shape)), original(_x(shape)))


# --- lazy layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("lazy", "theirs", "becomes", "shape"), LAZY)
def test_a_lazy_layer_becomes_the_plain_one(lazy, theirs, becomes, shape, options):
    ours, original = lazy(backend="reference", **options), theirs(**options)
    torch.testing.assert_close(ours(_x(shape)), original(_x(shape)))
    assert type(ours) is becomes
    assert ours.num_features == 5
    assert ours.backend == "reference"
    assert list(ours.state_dict()) == list(original.state_dict())
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, original.state_dict()[name])


@pytest.mark.parametrize(("lazy", "theirs", "becomes", "shape"), LAZY)
def test_a_lazy_layer_loads_a_state_dict_before_its_first_input(lazy, theirs, becomes, shape):
    saved = _used(becomes(5), shape)
    layer = lazy()
    layer.load_state_dict(saved.state_dict(), strict=True)
    x = _x(shape, seed=5)
    assert torch.equal(layer.eval()(x), saved.eval()(x))
    assert type(layer) is becomes


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("lazy", "theirs", "becomes", "shape"), LAZY)
def test_a_half_lazy_layer_has_float32_buffers(lazy, theirs, becomes, shape, dtype):
    for layer in (lazy(dtype=dtype), lazy().to(dtype)):
        layer(_x(shape, dtype))
        assert _dtypes(layer) == [torch.float32, torch.float32, torch.int64]
        assert layer.weight.dtype == dtype
    layer = lazy(dtype=dtype)
    layer.load_state_dict(becomes(5, dtype=dtype).state_dict())
    layer(_x(shape, dtype))
    assert _dtypes(layer) == [torch.float32, torch.float32, torch.int64]


@pytest.mark.parametrize(("lazy", "theirs", "becomes", "shape"), LAZY)
def test_a_lazy_layer_is_pickled_before_its_first_input(lazy, theirs, becomes, shape):
    twin = pickle.loads(pickle.dumps(lazy(momentum=0.4)))
    twin(_x(shape))
    assert type(twin) is becomes
    assert twin.momentum == 0.4


# --- memory formats and autocast -----------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("cls", [gb.BatchNorm2d, gb.BatchNormAct2d, gb.BatchNorm3d])
def test_channels_last_is_kept_through_layer_and_gradient(cls, mode):
    spatial = 3 if cls is gb.BatchNorm3d else 2
    form = torch.channels_last_3d if spatial == 3 else torch.channels_last
    x = _x((4, 5, 3, 4, 2)[: 2 + spatial]).contiguous(memory_format=form).requires_grad_()
    y = cls(5).train(mode).to(memory_format=form)(x)
    assert y.is_contiguous(memory_format=form)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.is_contiguous(memory_format=form)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_autocast_gives_pytorchs_dtypes_and_numbers(mode):
    torch.manual_seed(3)
    theirs = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1))
    ours = copy.deepcopy(theirs)
    ours[1] = gb.BatchNorm2d(5)
    results = []
    for model in (ours, theirs):
        x = _x((4, 2, 8, 8)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.train(mode)[:2](x)
            y = model[2](hidden)
        y.float().square().sum().backward()
        assert [b.dtype for b in model[1].buffers()] == [torch.float32] * 2 + [torch.int64]
        results.append((hidden, y, x.grad, model[1].weight.grad, model[1].running_var))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


# --- graphs --------------------------------------------------------------------------------------


class _Network(nn.Module):
    def __init__(self, norms):
        super().__init__()
        self.lift = nn.Linear(5, 5)
        self.norms = nn.ModuleList(norms)

    def forward(self, x):
        for norm in self.norms:
            x = norm(self.lift(x))
        return x


def _norms():
    return [gb.BatchNorm1d(5), gb.BatchNormAct1d(5, act="silu"), gb.BatchNorm1d(5, momentum=None)]


def test_fx_records_one_call_for_each_layer():
    model = _Network(_norms())
    traced = torch.fx.symbolic_trace(model)
    called = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    assert [name for name in called if name != "lift"] == ["norms.0", "norms.1", "norms.2"]
    twin = copy.deepcopy(model)
    x = _x((8, 5))
    for mode in (True, False):
        assert torch.equal(traced.train(mode)(x), twin.train(mode)(x))
    _assert_same(model, twin)


def test_fx_records_mask_and_residual():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = gb.BatchNorm1d(5)
            self.second = gb.BatchNormAct1d(5)

        def forward(self, x, mask):
            return self.second(self.first(x, mask), residual=x, mask=mask)

    model = Masked()
    traced = torch.fx.symbolic_trace(model)
    call = cases.call((8, 5, 3), dtype=torch.float32, mask=True)
    assert torch.equal(traced(call.x, call.mask), model(call.x, call.mask))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
def test_a_compiled_layer_has_the_numbers_gradients_and_buffers_of_the_eager_one(mode, mask):
    torch.compiler.reset()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = gb.BatchNorm2d(5, momentum=None)
            self.fused = gb.BatchNormAct2d(5, act="gelu", stored_variance="biased")

        def forward(self, x, mask):
            return self.fused(self.plain(x, mask), residual=x, mask=mask)

    eager = Block().train(mode)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        call = cases.call((4, 5, 3, 4), dtype=torch.float32, mask=mask, seed=seed)
        results = []
        for model in (eager, compiled):
            x = call.x.clone().requires_grad_()
            y = model(x, call.mask)
            y.backward(call.dy)
            results.append((y.detach(), x.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(eager.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(eager.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_functional_call_leaves_the_layer_alone_in_evaluation():
    layer = _used(gb.BatchNorm1d(5), (8, 5)).eval()
    parameters = {name: torch.randn(3, 5) for name in ("weight", "bias")}
    x = _x((8, 5))

    def one(parameters):
        return torch.func.functional_call(layer, parameters, (x,))

    stacked = torch.func.vmap(one)(parameters)
    for i in range(3):
        expected = one({name: value[i] for name, value in parameters.items()})
        torch.testing.assert_close(stacked[i], expected)
