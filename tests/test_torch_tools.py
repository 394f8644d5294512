"""PyTorch's own tools on our layers: the right function or an error, never another function."""

import copy
import operator
import warnings

import cases
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import fusion
from torch.optim import swa_utils

import gammabeta as gb

with warnings.catch_warnings():
    # It scripts layers of its own when it is imported.
    warnings.filterwarnings("ignore", ".torch.jit.script_method. is dep", DeprecationWarning)
    from torch.fx.experimental import optimization

SHAPES = {1: (6, 3, 9), 2: (6, 3, 5, 4), 3: (4, 3, 4, 3, 3)}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
PLAIN = {1: gb.BatchNorm1d, 2: gb.BatchNorm2d, 3: gb.BatchNorm3d}
LAZY = {1: gb.LazyBatchNorm1d, 2: gb.LazyBatchNorm2d, 3: gb.LazyBatchNorm3d}
FUSED = {1: gb.BatchNormAct1d, 2: gb.BatchNormAct2d, 3: gb.BatchNormAct3d}
THEIRS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
EVERY = [
    pytest.param(table[d], d, id=table[d].__name__)
    for table in (PLAIN, LAZY, FUSED)
    for d in SHAPES
]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def _x(dimensions, seed=0):
    return cases.call(SHAPES[dimensions], seed=seed).x


def _make(cls, **options):
    features = () if cls.__name__.startswith("Lazy") else (3,)
    return cls(*features, dtype=torch.float64, **options)


def _used(layer, dimensions):
    """With statistics, weight and bias of its own, in eval mode."""
    for seed in range(3):
        layer(_x(dimensions, seed))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(3))
    return layer.eval()


def _is_plain(cls):
    return not issubclass(cls, tuple(FUSED.values()))


@pytest.mark.parametrize("convs", [CONVS, TRANSPOSED], ids=["conv", "transposed"])
@pytest.mark.parametrize(("cls", "dimensions"), EVERY)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_fuse_conv_bn_eval_gives_the_same_function_or_stops(cls, dimensions, options, convs):
    conv = convs[dimensions](3, 3, 2, dtype=torch.float64).eval()
    norm = _used(_make(cls, **options), dimensions)
    model = nn.Sequential(conv, norm)
    x = _x(dimensions, 9)
    if not _is_plain(cls):
        with pytest.raises(AttributeError, match="eps"):
            fusion.fuse_conv_bn_eval(conv, norm, transpose=convs is TRANSPOSED)
        return
    fused = fusion.fuse_conv_bn_eval(conv, norm, transpose=convs is TRANSPOSED)
    torch.testing.assert_close(fused(x), model(x), **EXACT)


@pytest.mark.parametrize("cls", [PLAIN[1], LAZY[1], FUSED[1]])
def test_fuse_linear_bn_eval_gives_the_same_function_or_stops(cls):
    linear = nn.Linear(3, 3, dtype=torch.float64).eval()
    norm = _used(_make(cls), 1)
    x = cases.call((6, 3)).x
    if not _is_plain(cls):
        with pytest.raises(AttributeError, match="eps"):
            fusion.fuse_linear_bn_eval(linear, norm)
        return
    fused = fusion.fuse_linear_bn_eval(linear, norm)
    torch.testing.assert_close(fused(x), norm(linear(x)), **EXACT)


@pytest.mark.parametrize(("cls", "dimensions"), EVERY)
def test_the_fx_optimizer_keeps_the_function(cls, dimensions):
    model = nn.Sequential(
        CONVS[dimensions](3, 3, 1, dtype=torch.float64), _used(_make(cls), dimensions)
    ).eval()
    x = _x(dimensions, 9)
    expected = model(x)
    fused = optimization.fuse(model)
    torch.testing.assert_close(fused(x), expected, **EXACT)


@pytest.mark.parametrize(("cls", "dimensions"), EVERY)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}], ids=str)
def test_convert_sync_batchnorm_keeps_the_function_or_stops(cls, dimensions, options):
    model = nn.Sequential(nn.Identity(), _used(_make(cls, **options), dimensions)).eval()
    x = _x(dimensions, 9)
    expected = model(x)
    if not _is_plain(cls):
        with pytest.raises(AttributeError, match="eps"):
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        return
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[1]) is nn.SyncBatchNorm
    torch.testing.assert_close(converted(x), expected, **EXACT)


@pytest.mark.parametrize(("cls", "dimensions"), EVERY)
def test_update_bn_estimates_the_statistics_that_it_estimates_for_pytorchs_layer(cls, dimensions):
    batches = [_x(dimensions, seed) for seed in range(20, 24)]
    model = nn.Sequential(nn.Identity(), _used(_make(cls), dimensions))
    original = nn.Sequential(nn.Identity(), THEIRS[dimensions](3, dtype=torch.float64))
    for network in (model, original):
        swa_utils.update_bn(batches, network)
        assert network[1].momentum == 0.1
    for name, value in original[1].named_buffers():
        torch.testing.assert_close(model[1].get_buffer(name), value, **EXACT)


@pytest.mark.parametrize(("cls", "dimensions"), EVERY)
def test_averaging_a_model_keeps_its_kind_and_averages_it(cls, dimensions):
    model = _used(_make(cls), dimensions)
    averaged = swa_utils.AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    x = _x(dimensions, 9)
    torch.testing.assert_close(averaged.eval()(x), model(x), **EXACT)


@pytest.mark.parametrize(("cls", "dimensions"), EVERY)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fx_symbolic_trace_keeps_the_function(cls, dimensions, training):
    model = nn.Sequential(CONVS[dimensions](3, 3, 1, dtype=torch.float64), _make(cls))
    _used(model[1], dimensions)
    model.train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1"]
    x = _x(dimensions, 9)
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    for (name, a), b in zip(model.named_buffers(), traced.buffers(), strict=True):
        assert torch.equal(a, b), name


def _standard(program):
    """Whether an exported program calls operators of PyTorch only."""
    return all(
        node.target is operator.getitem or node.target.namespace in ("aten", "prims")
        for node in program.graph.nodes
        if node.op == "call_function"
    )


@pytest.mark.parametrize("act", cases.ACTS, ids=str)
def test_export_of_a_fused_layer_knows_its_activation(act):
    layer = _used(gb.BatchNormAct2d(3, act=act, dtype=torch.float64), 2)
    program = torch.export.export(layer, (_x(2), _x(2, 1)))
    assert _standard(program)
    x, residual = _x(2, 9), _x(2, 10)
    torch.testing.assert_close(program.module()(x, residual), layer(x, residual), **EXACT)


# PyTorch's exporter copies its own deprecated tree specifications.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.parametrize(("cls", "dimensions"), EVERY)
def test_export_in_eval_mode_keeps_the_function_in_standard_operators(cls, dimensions):
    layer = _used(_make(cls), dimensions)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (_x(dimensions),), dynamic_shapes=({0: batch},))
    assert _standard(program)
    assert _standard(program.run_decompositions())
    for x in (_x(dimensions, 9), _x(dimensions, 9)[:2]):
        torch.testing.assert_close(program.module()(x), layer(x), **EXACT)
    assert torch.equal(program.state_dict["running_var"], layer.running_var)


def test_export_of_a_masked_layer_keeps_the_function():
    layer = _used(gb.BatchNorm1d(3, dtype=torch.float64), 1)
    call = cases.call(SHAPES[1], mask=True)
    program = torch.export.export(layer, (call.x, call.mask))
    assert _standard(program)
    torch.testing.assert_close(program.module()(call.x, call.mask), layer(call.x, call.mask))


@pytest.mark.parametrize(("cls", "dimensions"), EVERY)
def test_export_in_training_mode_keeps_the_function_and_the_updates(cls, dimensions):
    layer = _used(_make(cls), dimensions).train()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (_x(dimensions),), dynamic_shapes=({0: batch},))
    module, twin = program.module(), copy.deepcopy(layer)
    for x in (_x(dimensions, 9), _x(dimensions, 10)[:2]):
        torch.testing.assert_close(module(x), twin(x), **EXACT)
    for name, value in twin.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), value, **EXACT)


@pytest.mark.parametrize(("cls", "dimensions"), EVERY)
def test_make_fx_keeps_the_function(cls, dimensions):
    layer = _used(_make(cls), dimensions)
    x = _x(dimensions, 9)
    graph = make_fx(layer)(_x(dimensions))
    torch.testing.assert_close(graph(x), layer(x), **EXACT)


# The tracer fixes the checks of shape and, as of PyTorch's own layer, those of the mode.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is dep:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace_method. is dep:DeprecationWarning")
@pytest.mark.parametrize(("cls", "dimensions"), EVERY)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_jit_trace_keeps_the_function_and_the_updates(cls, dimensions, training):
    layer = _used(_make(cls), dimensions).train(training)
    traced = torch.jit.trace(layer, (_x(dimensions),), check_trace=False)
    twin = copy.deepcopy(layer)
    for x in (_x(dimensions, 9), _x(dimensions, 10)[:2]):
        torch.testing.assert_close(traced(x), twin(x), **EXACT)
    for (name, value), other in zip(twin.named_buffers(), traced.buffers(), strict=True):
        torch.testing.assert_close(other, value, msg=name, **EXACT)


@pytest.mark.parametrize(("cls", "dimensions"), EVERY)
def test_functorchs_replacement_of_running_statistics_keeps_the_training_function(cls, dimensions):
    layer = _used(_make(cls), dimensions).train()
    model = torch.func.replace_all_batch_norm_modules_(nn.Sequential(copy.deepcopy(layer)))
    x = _x(dimensions, 9)
    torch.testing.assert_close(model(x), layer(x), **EXACT)
    batches = torch.stack([_x(dimensions, seed) for seed in (3, 4)])
    stacked = torch.func.vmap(model)(batches)
    for y, batch in zip(stacked, batches, strict=True):
        torch.testing.assert_close(y, model(batch), **EXACT)


def test_symbolic_trace_runs_the_hooks_of_a_layer_once():
    x = torch.randn(4, 3, 2, 2)
    for hook in ("register_forward_hook", "register_forward_pre_hook"):
        layer = gb.BatchNorm2d(3).eval()
        model = torch.nn.Sequential(layer, torch.nn.ReLU())

        def twice(module, inputs, output=None):
            return output * 2 if output is not None else (inputs[0] * 2,)

        getattr(layer, hook)(twice)
        traced = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(traced(x), model(x))
