"""The CPU kernels as operators: tracers, modes, subclasses and the compiler see one operation.

An address replayed by a tracer would be wrong in silence; each way there is a test.
"""

import copy
import shutil
import subprocess
import sys

import cases
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gammabeta as gb
from gammabeta.ops._cpu import _compile

pytestmark = [
    pytest.mark.skipif(
        _compile.missing() is not None, reason=f"no CPU kernels: {_compile.missing()}"
    ),
    # PyTorch compiles decompositions of its own at the first use of forward mode
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]

OP = torch.ops.gammabeta.batch_norm.default
BACKWARD = torch.ops.gammabeta.batch_norm_backward.default
ACTS = (None, "relu", ("leaky_relu", 0.2), "gelu")
SHAPES = ((6, 5), (4, 5, 3), (3, 4, 5, 5))
NAN = float("nan")


def _call(shape=(3, 4, 5, 5), seed=0, **options):
    return cases.call(shape, dtype=torch.float32, seed=seed, **options)


def _function(act="relu", mask=None, moments=None):
    def function(x, weight, bias, residual=None):
        return gb.batch_norm(
            x, weight, bias,
            residual=residual, mask=mask, moments=moments, act=act, backend="cpu",
        )[0]  # fmt: skip

    return function


def _step(function):
    """Forward and backward."""

    def step(x, weight, bias, residual, dy):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
        y = function(*leaves)
        return (y, *torch.autograd.grad(y, leaves, dy))

    return step


def _operands(call):
    return call.x, call.weight, call.bias, call.residual, call.dy


def _equal(a, b):
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class _Record(TorchDispatchMode):
    """Every operator that a dispatch mode sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


# --- the operators -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "layout"),
    [("relu:", "channels_last"), ("gelu:none", "sliced"), ("leaky_relu:0.2", "contiguous")],
)
@pytest.mark.parametrize("variant", ["plain", "residual", "masked", "given", "alone"])
def test_opcheck_finds_nothing_in_the_forward(variant, layout, act):
    call = _call(residual=variant in ("residual", "masked", "alone"), mask=variant == "masked",
                 layout=layout)  # fmt: skip
    mean, var = cases.given(4) if variant == "given" else (None, None)
    mask = None if call.mask is None else call.mask.unsqueeze(1)
    operands = [call.x, call.weight, call.bias, call.residual]
    wanted = [3] if variant == "alone" else range(4)
    for i in wanted:
        operands[i] = None if operands[i] is None else operands[i].detach().requires_grad_()
    torch.library.opcheck(OP, (*operands, mask, mean, var, 1e-5, act))


# what it checks for autograd is for operators that have a derivative
CHECKED = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("act", ["", "relu:", "gelu:none"])
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("needed", [(1, 1, 1, 1), (0, 0, 0, 1), (1, 0, 0, 0), (0, 1, 1, 0)])
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
def test_opcheck_finds_nothing_in_the_backward(mask, needed, layout, act):
    for residual in (False, True):
        call = _call(residual=residual, mask=mask, layout=layout)
        valid = None if call.mask is None else call.mask.unsqueeze(1)
        operands = (call.x, call.weight, call.bias, call.residual, valid)
        _, kept, signs = OP(*operands, None, None, 1e-5, act)
        smooth = act.startswith("gelu")
        operands = (*operands[:3], call.residual if smooth else None, valid)
        flags = (False, residual, [bool(n) for n in needed])
        arguments = (call.dy, *operands, kept, signs, 1e-5, act, *flags)
        torch.library.opcheck(BACKWARD, arguments, test_utils=CHECKED)


@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_under_a_dispatch_mode_one_operator_gives_the_bits_of_the_direct_call(act, layout, mask):
    for shape in SHAPES:
        call = _call(shape, residual=True, mask=mask, layout=layout)
        for given in (None, cases.given(shape[1], torch.float32)):
            direct = cases.run(call, act=act, given=given, backend="cpu")
            with _Record() as mode:
                seen = cases.run(call, act=act, given=given, backend="cpu")
            assert mode.seen.count(OP) == mode.seen.count(BACKWARD) == 1
            _equal([seen[0], *seen[1].values()], [direct[0], *direct[1].values()])
            if given is None:
                _equal(seen[2], direct[2])


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
def test_two_derivatives_under_a_mode_are_those_without(mask, act):
    call = _call(residual=True, mask=mask)
    probe = torch.randn_like(call.x)

    def two():
        leaves = [t.detach().requires_grad_() for t in _operands(call)[:4]]
        y = _function(act, call.mask)(*leaves)
        first = torch.autograd.grad(y, leaves, call.dy, create_graph=True)
        scalar = (first[0] * probe).sum() + first[1].square().sum()
        return *first, *torch.autograd.grad(scalar, leaves, materialize_grads=True)

    plain = two()
    with _Record() as mode:
        seen = two()
    assert mode.seen.count(OP) == 1
    for a, b in zip(seen, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


# --- tracers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracing", ["real", "symbolic"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_make_fx_replays_to_the_same_numbers_with_other_inputs(act, layout, tracing):
    step = _step(_function(act))
    first, other = (_call(residual=True, layout=layout, seed=seed) for seed in (1, 2))
    graph = make_fx(step, tracing_mode=tracing)(*_operands(first))
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(OP) == 1
    assert targets.count(BACKWARD) == 1
    _equal(graph(*_operands(other)), step(*_operands(other)))


def test_make_fx_of_a_layer_in_training_replays_the_update_of_its_statistics():
    layer = gb.BatchNormAct2d(4).requires_grad_(False)
    twin = copy.deepcopy(layer)

    def run(x, state):
        return torch.func.functional_call(layer, state, (x,)), state

    first = {k: v.clone() for k, v in layer.state_dict().items()}
    graph = make_fx(run)(_call().x, first)
    state = layer.state_dict()
    for seed in (3, 4):
        x = _call(seed=seed).x
        _equal([graph(x, state)[0]], [twin(x)])
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("layout", [*cases.LAYOUTS])
@pytest.mark.parametrize("act", [None, "relu", "gelu"], ids=str)
def test_fake_tensors_have_the_shapes_and_strides_of_the_real_results(act, layout, static):
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for shape in SHAPES:
        call = _call(shape, residual=True, layout=layout)
        real = _step(_function(act))(*_operands(call))
        with FakeTensorMode(shape_env=None if static else ShapeEnv()) as mode:
            fake = _step(_function(act))(*map(mode.from_tensor, _operands(call)))
        for a, b in zip(fake[:4], real[:4], strict=True):
            assert tuple(a.shape) == b.shape
            assert tuple(a.stride()) == b.stride()
            assert a.dtype == b.dtype
        assert tuple(fake[4].shape) == shape  # the residual's may be dy as it came


# The tracer fixes the checks of shape.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is dep:DeprecationWarning")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_jit_trace_replays_to_the_same_numbers_with_other_inputs(act, layout):
    function = _function(act)
    first, other = (_call(residual=True, layout=layout, seed=seed) for seed in (1, 2))
    traced = torch.jit.trace(function, _operands(first)[:4], check_trace=False)
    _equal([traced(*_operands(other)[:4])], [function(*_operands(other)[:4])])


# --- who looks on --------------------------------------------------------------------------------


def test_the_flop_counter_and_the_profiler_see_one_operation():
    call = _call(residual=True)
    step = _step(_function())
    expected = step(*_operands(call))
    with FlopCounterMode(display=False) as counter:
        _equal(step(*_operands(call)), expected)
    assert counter.get_total_flops() == 0
    # a convolution in front is still counted, and ours does not hide what is around it
    model = nn.Sequential(nn.Conv2d(4, 8, 3), gb.BatchNormAct2d(8), nn.Conv2d(8, 8, 1))
    with FlopCounterMode(display=False) as counter:
        model(call.x)
    assert counter.get_total_flops() == 2 * 3 * 3 * 3 * 8 * (4 * 9 + 8)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        _equal(step(*_operands(call)), expected)
    names = [event.key for event in profiled.key_averages() if "gammabeta::" in event.key]
    assert sorted(n for n in names if "ackward" not in n) == ["gammabeta::batch_norm"]
    assert "gammabeta::batch_norm_backward" in names


def test_a_function_mode_and_anomaly_detection_change_no_number():
    class Quiet(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    call = _call(residual=True)
    step = _step(_function())
    expected = step(*_operands(call))
    with Quiet():
        _equal(step(*_operands(call)), expected)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        _equal(step(*_operands(call)), expected)


def test_a_default_device_changes_no_number():
    call = _call(residual=True)
    step = _step(_function())
    expected = step(*_operands(call))
    with torch.device("meta"):
        _equal(step(*_operands(call)), expected)


# --- tensors of other kinds ----------------------------------------------------------------------


class Logged(torch.Tensor):
    """A subclass whose operations give the subclass."""


@pytest.mark.parametrize("which", range(4))
def test_a_subclass_in_any_operand_is_refused_and_the_result_is_right(which):
    call = _call(residual=True)
    names = ("x", "weight", "bias", "residual")
    operands = list(_operands(call)[:4])
    expected = _function()(*operands)
    operands[which] = operands[which].as_subclass(Logged)
    keys = dict(zip(names, operands, strict=True))
    x = keys.pop("x")
    why = gb.backends(x, **keys)["cpu"].why_not
    assert "plain tensors" in why
    assert "Logged" in why
    y, _ = gb.batch_norm(x, **keys, act="relu")
    assert isinstance(y, Logged)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)


def test_sparse_nested_and_meta_tensors_and_other_devices_are_not_for_the_kernels():
    x = torch.randn(4, 5)
    images = torch.randn(2, 3, 4, 4)
    for other in (x.to_sparse(), x.to("meta"), images.to_mkldnn()):
        assert "dense tensors" in gb.backends(other)["cpu"].why_not
    assert "weight on cpu, got meta" in gb.backends(x, torch.ones(5, device="meta"))["cpu"].why_not
    y, _ = gb.batch_norm(x.to("meta"))
    assert y.device.type == "meta"
    assert y.shape == x.shape
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert "FakeTensor" in gb.backends(fake)["cpu"].why_not


@pytest.mark.parametrize("which", ["x", "residual", "dy", "all"])
def test_views_with_a_pending_sign_are_read_with_it(which):
    call = _call(residual=True)
    expected = cases.run(call, backend="cpu", act="relu")
    names = ("x", "residual", "dy") if which == "all" else (which,)
    views = {name: torch._neg_view(-getattr(call, name)) for name in names}
    assert all(view.is_neg() for view in views.values())
    found = cases.run(call._replace(**views), backend="cpu", act="relu")
    _equal([found[0], *found[1].values()], [expected[0], *expected[1].values()])


def test_complex_parts_are_read_as_they_are():
    z = torch.randn(4, 5, 3, dtype=torch.complex64).conj()
    for part in (z.real, z.imag):
        _equal([_function(None)(part, None, None)], [_function(None)(part.clone(), None, None)])


# --- transforms ----------------------------------------------------------------------------------


def test_functorch_and_forward_mode_compute_by_the_reference():
    call = _call(residual=True)
    function = _function("gelu")
    operands = _operands(call)[:4]
    expected = function(*operands)
    for transformed in (
        torch.func.vmap(function, in_dims=(0, None, None, 0))(
            *(t[None] if t.dim() > 1 else t for t in operands)
        )[0],
        torch.func.functionalize(function)(*operands),
        torch.func.jvp(function, operands, operands)[0],
        torch.func.vjp(function, *operands)[0],
    ):
        torch.testing.assert_close(transformed, expected, rtol=1e-5, atol=1e-5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(call.x, call.dy)
        primal, tangent = forward_ad.unpack_dual(function(dual, *operands[1:]))
    _, wanted = torch.func.jvp(lambda x: function(x, *operands[1:]), (call.x,), (call.dy,))
    torch.testing.assert_close(primal, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tangent, wanted)
    # and outside of them again at once
    _equal([function(*operands)], [expected])


def test_functional_call_differentiates_with_other_parameters_and_statistics():
    layer = gb.BatchNormAct2d(4)
    call = _call()
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    other = {k: v.detach().clone() for k, v in state.items()}
    other |= {"weight": call.weight.clone().requires_grad_(), "bias": call.bias}
    y = torch.func.functional_call(layer, other, (call.x,))
    (grad,) = torch.autograd.grad(y, other["weight"], call.dy)
    _, grads, seen = cases.run(call, act="relu", backend="cpu")
    _equal([grad], [grads["dweight"]])
    assert layer.num_batches_tracked == 0
    assert other["num_batches_tracked"] == 1
    torch.testing.assert_close(other["running_mean"], 0.1 * seen.mean.float())


# --- without a gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_bits_are_the_same(guard):
    call = _call(residual=True)
    for act in ACTS:
        expected = _function(act)(*(t.requires_grad_() for t in _operands(call)[:4]))
        with guard():
            y = _function(act)(*_operands(call)[:4])
        assert not y.requires_grad
        assert y.is_inference() is (guard is torch.inference_mode)
        _equal([y.clone()], [expected.detach()])


def test_a_layer_made_and_trained_in_inference_mode_updates_its_statistics():
    with torch.inference_mode():
        layer = gb.BatchNorm2d(4)
        x = _call().x
        layer(x)
        assert layer.num_batches_tracked == 1
        torch.testing.assert_close(layer.running_mean, 0.1 * x.mean((0, 2, 3)))


# --- the compiler --------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _aot(forward, backward):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def keep(place):
        return lambda graph, inputs: place.append(graph) or make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=keep(forward), bw_compiler=keep(backward))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("act", [None, "relu", "gelu"], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_it_is_one_operator_each_way_and_the_same_bits(layout, act):
    call = _call(residual=True, layout=layout)
    step = _step(_function(act))
    forward, backward = [], []
    compiled = torch.compile(_function(act), fullgraph=True, backend=_aot(forward, backward))
    _equal(_step(compiled)(*_operands(call)), step(*_operands(call)))
    assert [n.target for g in forward for n in g.graph.nodes].count(OP) == 1
    assert [n.target for g in backward for n in g.graph.nodes].count(BACKWARD) == 1


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("cls", [gb.BatchNorm2d, gb.BatchNormAct2d])
def test_a_compiled_layer_trains_as_the_plain_one(cls, dynamic):
    plain = nn.Sequential(nn.Conv2d(4, 5, 3), cls(5), nn.Conv2d(5, 2, 1))
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (4, 6):
        x = _call((n, 4, 6, 7), seed=n).x
        for model in (plain, compiled):
            model(x).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=lambda m, n=name: f"{n}: {m}")
    for (name, a), b in zip(plain.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=lambda m, n=name: f"{n}: {m}")
    plain.eval(), compiled.eval()
    torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="Inductor finds no C++ compiler",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_compiles_it_to_the_same_numbers():
    call = _call((4, 16, 8, 8), residual=True)
    step = _step(_function())
    compiled = torch.compile(_function(), fullgraph=True)
    for a, b in zip(_step(compiled)(*_operands(call)), step(*_operands(call)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("there", ["contiguous", "channels_last"])
@pytest.mark.parametrize("back", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["", "relu:", "gelu:none"])
def test_the_backward_operator_takes_x_in_another_layout_than_the_forward(act, there, back):
    """The compiler may lay out anew what it keeps; signs stay as the forward wrote them."""
    call = _call((4, 6, 5, 3), residual=True, layout=there)
    operands = (call.x, call.weight, call.bias, call.residual, None)
    _, kept, signs = OP(*operands, None, None, 1e-5, act)
    own = call.residual if act.startswith("gelu") else None

    def run(x):
        rest = (call.weight, call.bias, own, None, kept, signs, 1e-5, act, False, True)
        return BACKWARD(call.dy, x, *rest, [True] * 4)

    x = cases.LAYOUTS[back](call.x)
    found, wanted = run(x), run(call.x)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    assert found[0].stride() == x.stride()
    with torch._subclasses.FakeTensorMode() as mode:
        told = mode.from_tensor
        fake = BACKWARD(
            *(told(call.dy), told(x), told(call.weight), told(call.bias)),
            *(None if own is None else told(own), None, told(kept), told(signs)),
            *(1e-5, act, False, True, [True] * 4),
        )
    assert [t.stride() for t in fake] == [t.stride() for t in found]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="Inductor finds no C++ compiler",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_lays_out_convolutions_anew_and_the_gradients_stay():
    plain = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        gb.BatchNormAct2d(16),
        nn.Conv2d(16, 16, 3, padding=1, stride=2, bias=False),
        gb.BatchNormAct2d(16),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        gb.BatchNorm2d(16),
    )
    twin = copy.deepcopy(plain)
    x = _call((8, 3, 16, 16)).x
    compiled = torch.compile(twin, fullgraph=True)
    for model in (plain, compiled):
        model(x).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            b.grad, a.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- export --------------------------------------------------------------------------------------


# PyTorch's exporter copies its own deprecated tree specifications.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.parametrize("cls", [gb.BatchNorm2d, gb.BatchNormAct2d])
def test_an_exported_eval_model_in_float32_holds_standard_operators_only(cls):
    model = nn.Sequential(nn.Conv2d(4, 5, 3), cls(5)).eval()
    x = _call((2, 4, 6, 7)).x
    program = torch.export.export(model, (x,))
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets
    assert {t.namespace for t in targets if hasattr(t, "namespace")} <= {"aten", "prims"}
    torch.testing.assert_close(program.module()(x), model(x))


# @pytest.mark.parametrize("dynamic", [None, True]) and torch.compile(..., dynamic=dynamic).


def test_a_default_device_and_a_default_dtype_change_no_number():
    call = _call(residual=True)
    step = _step(_function())
    expected = step(*_operands(call))
    with torch.device("meta"):
        _equal(step(*_operands(call)), expected)
    torch.set_default_dtype(torch.float64)
    try:
        _equal(step(*_operands(call)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_with_dynamic_shapes_one_graph_serves_all_batches(layout):
    forward, backward = [], []
    backend = _aot(forward, backward)
    compiled = torch.compile(_function(), fullgraph=True, dynamic=True, backend=backend)
    for n in (3, 5, 8):
        call = _call((n, 16, 6, 2 * n + 1), residual=True, layout=layout, seed=n)
        _equal(_step(compiled)(*_operands(call)), _step(_function())(*_operands(call)))
    assert len(forward) == len(backward) == 1


SPREAD = {
    "strided": lambda t: torch.stack([t, t * NAN], 1)[:, 0],
    "expanded": lambda t: t[:1].expand(len(t)),
    "negated": lambda t: torch._neg_view(-t),
}


@pytest.mark.parametrize("how", SPREAD)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad])
def test_parameters_are_read_wherever_they_lie(guard, shape, how):
    call = _call(shape)
    moved = {k: SPREAD[how](getattr(call, k)) for k in ("weight", "bias")}
    plain = {k: v.clone().contiguous() for k, v in moved.items()}
    for x in (call.x, call.x.clone().requires_grad_()):
        with guard():
            y, _ = gb.batch_norm(x, **moved, act="relu", backend="cpu")
            expected, _ = gb.batch_norm(x, **plain, act="relu", backend="cpu")
        _equal([y.detach()], [expected.detach()])
        if y.requires_grad:
            _equal(torch.autograd.grad(y, x, call.dy), torch.autograd.grad(expected, x, call.dy))


@pytest.mark.parametrize("how", ["strided", "expanded", "bfloat16"])
def test_running_statistics_are_read_wherever_they_lie(how):
    layer = gb.BatchNorm2d(4).eval()
    x = _call().x
    for name in ("running_mean", "running_var"):
        value = torch.rand(4) + 0.5
        value = value.bfloat16() if how == "bfloat16" else SPREAD[how](value)
        layer._buffers[name] = value
    expected = torch.nn.functional.batch_norm(
        x, layer.running_mean.float().clone(), layer.running_var.float().clone()
    )
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("act", [None, "relu", "gelu"], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_was_saved_may_come_back_in_other_memory(layout, act, residual):
    # torch.autograd.graph.save_on_cpu(pin_memory=True) gives everything back contiguous
    other = "channels_last" if layout == "contiguous" else "contiguous"
    for shape in ((3, 4, 5, 5), (4, 5, 3), (2, 3, 3, 4, 5)):
        call = _call(shape, layout=layout, residual=residual)
        expected = cases.run(call, act=act, backend="cpu")

        def unpack(t, shape=shape):
            return cases.LAYOUTS[other](t) if t.shape == shape else t

        with torch.autograd.graph.saved_tensors_hooks(torch.clone, unpack):
            found = cases.run(call, act=act, backend="cpu")
        _equal([found[0], *found[1].values()], [expected[0], *expected[1].values()])


def test_a_tensor_of_zeros_without_memory_is_read_as_zeros():
    # its address is 0: in a process of its own, which a read from there would end
    program = """
import torch, gammabeta as gb
zeros = torch._efficientzerotensor((6, 5, 4))
x = torch.randn(6, 5, 4, requires_grad=True)
for options in ({}, {"residual": zeros}, {"act": "relu"}, {"act": "gelu"}):
    y, _ = gb.batch_norm(x, backend="cpu", **options)
    assert not torch.autograd.grad(y, x, zeros)[0].any()
assert not gb.batch_norm(zeros, backend="cpu")[0].any()
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
