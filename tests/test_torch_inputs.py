"""PyTorch's own test inputs for its own layers, run through ours: they lie in its wheel."""

import copy
import warnings

import cases
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gammabeta as gb

with warnings.catch_warnings():
    # PyTorch's testing modules script functions of their own when they are imported.
    warnings.filterwarnings("ignore", ".torch.jit.script. is dep", DeprecationWarning)
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

TWINS = {
    nn.BatchNorm1d: (gb.BatchNorm1d, gb.BatchNormAct1d),
    nn.BatchNorm2d: (gb.BatchNorm2d, gb.BatchNormAct2d),
    nn.BatchNorm3d: (gb.BatchNorm3d, gb.BatchNormAct3d),
    nn.LazyBatchNorm1d: (gb.LazyBatchNorm1d,),
    nn.LazyBatchNorm2d: (gb.LazyBatchNorm2d,),
    nn.LazyBatchNorm3d: (gb.LazyBatchNorm3d,),
}
INFOS = {info.module_cls: info for info in module_db if info.module_cls in TWINS}
PLAIN = [info for cls, info in INFOS.items() if not cls.__name__.startswith("Lazy")]
OPS = [info for info in op_db if info.name == "nn.functional.batch_norm" and info.dtypes]
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-11},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
}


def _module_inputs(info, dtype, training):
    torch.manual_seed(0)
    return info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )


def _runs():
    """Every (PyTorch's class, our class, dtype, mode, which input), named for the report."""
    for info in PLAIN:
        inputs = _module_inputs(info, torch.float32, True)
        for ours in TWINS[info.module_cls]:
            for dtype in (torch.float32, torch.float64):
                for training in (True, False):
                    for i, entry in enumerate(inputs):
                        mode = "train" if training else "eval"
                        name = f"{ours.__name__}-{dtype}-{mode}-{entry.desc or 'plain'}"
                        yield pytest.param(info, ours, dtype, training, i, id=name)


def test_pytorchs_tables_still_hold_what_these_tests_run():
    assert set(INFOS) >= {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}
    assert len(list(_runs())) >= 2 * 2 * 2 * 3 * 7
    assert all(info.module_error_inputs_func for info in PLAIN)
    assert len(OPS) >= 1


@pytest.mark.parametrize(("info", "ours", "dtype", "training", "index"), list(_runs()))
def test_module_inputs_give_pytorchs_outputs_gradients_and_buffers(
    info, ours, dtype, training, index
):
    entry = _module_inputs(info, dtype, training)[index]
    args, kwargs = entry.constructor_input.args, entry.constructor_input.kwargs
    (x,) = entry.forward_input.args
    theirs = info.module_cls(*args, dtype=dtype, **kwargs)
    extra = {"act": None} if "Act" in ours.__name__ else {}
    layer = ours(*args, dtype=dtype, **kwargs, **extra)
    layer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    generator = torch.Generator().manual_seed(1)
    # Several steps in training, so that the buffers differ from their start; then the mode asked.
    for step, mode in enumerate([True, True, True, training]):
        results = []
        scaled = (x.detach() * (1 + step)).requires_grad_()
        dy = torch.randn(x.shape, generator=generator, dtype=dtype)
        for module in (theirs, layer):
            module.train(mode)
            y = module(scaled)
            wanted = (scaled, *module.parameters())
            results.append((y.detach(), *torch.autograd.grad(y, wanted, dy)))
        assert len(results[0]) == len(results[1])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, **TOLERANCE[dtype])
        assert list(theirs.state_dict()) == list(layer.state_dict())
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(
                layer.state_dict()[name],
                value,
                msg=lambda m, n=name: f"{n}: {m}",
                **TOLERANCE[dtype],
            )


@pytest.mark.parametrize("cls", [c for c in TWINS if c.__name__.startswith("Lazy")])
def test_the_inputs_of_the_plain_layers_make_the_lazy_ones_too(cls):
    plain = getattr(nn, cls.__name__.removeprefix("Lazy"))
    for entry in _module_inputs(INFOS[plain], torch.float64, True):
        if "zero_batch" in entry.desc:
            continue
        (x,) = entry.forward_input.args
        args, kwargs = entry.constructor_input.args[1:], entry.constructor_input.kwargs
        theirs = cls(*args, dtype=torch.float64, **kwargs)
        ours = TWINS[cls][0](*args, dtype=torch.float64, **kwargs)
        torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE[torch.float64])
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("info", "ours"),
    [
        pytest.param(info, ours, id=ours.__name__)
        for info in PLAIN
        for ours in TWINS[info.module_cls]
    ],
)
def test_module_error_inputs_raise_pytorchs_errors(info, ours):
    entries = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    assert entries
    for entry in entries:
        build, forward = (
            entry.module_error_input.constructor_input,
            entry.module_error_input.forward_input,
        )
        if entry.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(entry.error_type, match=entry.error_regex):
                ours(*build.args, **build.kwargs)
            continue
        layer = ours(*build.args, **build.kwargs)
        with pytest.raises(entry.error_type, match=entry.error_regex):
            layer(*forward.args, **forward.kwargs)


# --- the function --------------------------------------------------------------------------------


def _samples(dtype):
    for info in OPS:
        torch.manual_seed(0)
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
            mean, var, weight, bias = sample.args
            yield sample.input, mean, var, weight, bias, dict(sample.kwargs)


def _runs_on_the_kernels(x, weight, bias, eps):
    """Skip where there are none; False, with the reason asserted, for an empty input."""
    reason = gb.backends(x, weight, bias, eps=eps)["cpu"].why_not
    if x.numel() == 0:
        assert "at least one value" in reason
        return False
    cases.require("cpu", x, weight=weight, bias=bias, eps=eps)
    return True


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in cases.BACKENDS for d in TOLERANCE if d == torch.float32 or b in cases.DOUBLE],
    ids=str,
)
def test_sample_inputs_of_the_function_give_pytorchs_outputs_and_gradients(dtype, backend):
    ran = {True: 0, False: 0}
    for x, mean, var, weight, bias, kwargs in _samples(dtype):
        training, eps = kwargs.get("training", False), kwargs.get("eps", 1e-5)
        if x.dim() < 2:
            # PyTorch passes an empty tensor without a channel axis through; ours has none to name
            with pytest.raises(ValueError, match=r"\(N, C\)"):
                gb.batch_norm(x, weight, bias, backend=backend)
            continue
        if backend == "cpu" and not _runs_on_the_kernels(x, weight, bias, eps):
            continue
        running = [None if t is None else t.clone() for t in (mean, var)]
        theirs = F.batch_norm(x, *running, weight, bias, **kwargs)
        ours, seen = gb.batch_norm(
            x,
            weight,
            bias,
            moments=None if training else gb.Moments.given(mean, var),
            eps=eps,
            backend=backend,
        )
        torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])
        operands = [t for t in (x, weight, bias) if t is not None]
        dy = torch.randn_like(theirs)
        for a, b in zip(
            torch.autograd.grad(ours, operands, dy),
            torch.autograd.grad(theirs, operands, dy),
            strict=True,
        ):
            torch.testing.assert_close(a, b, **TOLERANCE[dtype])
        if training and mean is not None:
            # the running statistics that PyTorch wrote are those of the moments we return
            momentum = kwargs.get("momentum", 0.1)
            stepped = mean.lerp(seen.mean.to(dtype), momentum)
            torch.testing.assert_close(stepped, running[0], **TOLERANCE[dtype])
            stepped = var.lerp(seen.unbiased().to(dtype), momentum)
            torch.testing.assert_close(stepped, running[1], **TOLERANCE[dtype])
        ran[training] += 1
    assert ran[True] >= 4
    assert ran[False] >= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_error_and_reference_inputs_of_the_function_if_pytorch_has_any(dtype):
    for info in OPS:
        if info.error_inputs_func is not None:
            for error in info.error_inputs("cpu"):
                x, rest = error.sample_input.input, error.sample_input.args
                with pytest.raises(error.error_type):
                    gb.batch_norm(x, *rest[2:])
        for sample in info.reference_inputs("cpu", dtype, requires_grad=False):
            x, (mean, var, weight, bias) = sample.input, sample.args
            if x.dim() < 2:
                continue
            training = sample.kwargs.get("training", False)
            ours, _ = gb.batch_norm(
                x,
                weight,
                bias,
                moments=None if training else gb.Moments.given(mean, var),
                eps=sample.kwargs.get("eps", 1e-5),
            )
            theirs = F.batch_norm(x, mean, var, weight, bias, **sample.kwargs)
            torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])
