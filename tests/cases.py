"""One table of cases for the tests and the benchmarks: shapes, layouts, dtypes, backends.

Nothing here asserts; a test picks from the tables with ``pytest.mark.parametrize``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import gammabeta as gb

# shape -> why it is in the table
SHAPES: dict[tuple[int, ...], str] = {
    (4, 3): "dense, the smallest that shows every axis",
    (60, 100): "dense, the batch and width of the classical MNIST experiments",
    (257, 3): "dense, one row more than a power of two; fewer channels than a vector has lanes",
    (2, 5): "two values for each channel: x̂ is ±1, every cancellation is at its worst",
    (4, 5, 3): "sequence, odd everywhere",
    (2, 65, 4): "one channel more than 64",
    (2, 3, 6, 6): "image, the shape of PyTorch's own test inputs",
    (1, 4, 5, 5): "a batch of one image: statistics over space alone",
    (3, 1, 7, 7): "one channel; rows shorter than a vector",
    (2, 7, 1, 1): "image after global pooling: channels-last and contiguous are the same memory",
    (5, 2, 1, 130): "one long row, longer than two blocks of 64 lanes",
    (2, 3, 4, 4, 4): "volume",
}
# what the benchmarks time; odd ones at the end
TIMED: tuple[tuple[int, ...], ...] = (
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 128, 28, 28),
    (32, 512, 14, 14),
    (32, 2048, 7, 7),
    (8, 3, 224, 224),
    (2, 64, 512, 512),
    (16, 32, 16, 24, 24),
    (64, 64, 128),
    (60, 100),
    (64, 100),
    (256, 256),
    (256, 1024),
    (4096, 512),
    (31, 17, 13, 11),
    (7, 5),
)
# A few shapes for tests that cross them with many other things.
FEW: tuple[tuple[int, ...], ...] = ((5, 3), (4, 5, 3), (3, 4, 5, 5), (2, 3, 4, 2, 3))

ACTS: tuple[Any, ...] = (
    None,
    "relu",
    "leaky_relu",
    ("leaky_relu", 0.2),
    "sigmoid",
    "tanh",
    "softplus",
    "silu",
    "gelu",
    ("gelu", "tanh"),
)

BACKENDS = ("auto", "reference", "native", "cpu")
DOUBLE = ("auto", "reference", "native")  # those that compute in float64

MOMENTA = (0.1, 0.01, 1.0, 0.0, None)


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous().clone()


def _channels_last(x: Tensor) -> Tensor:
    """Channels innermost in memory, for any number of axes (dense x is so by nature)."""
    return x.movedim(1, -1).contiguous().clone().movedim(-1, 1)


def _sliced(x: Tensor) -> Tensor:
    """Every second element along the last axis of a tensor twice as wide."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    view = wide[..., ::2]
    view.copy_(x)
    return view


def _offset(x: Tensor) -> Tensor:
    """Contiguous, but one element after the start of its storage: not aligned to a vector."""
    storage = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    view = storage[1:].view(x.shape)
    view.copy_(x)
    return view


def _transposed(x: Tensor) -> Tensor:
    """Batch and channels change places in memory."""
    return x.transpose(0, 1).contiguous().clone().transpose(0, 1)


def _inner_slice(x: Tensor) -> Tensor:
    """Some channels of a tensor that has more: rows contiguous, samples far apart."""
    n, c, *rest = x.shape
    more = torch.full((n, c + 2, *rest), float("nan"), dtype=x.dtype)
    view = more[:, 1 : c + 1]
    view.copy_(x)
    return view


# name -> a copy of the values in that memory layout; what lies between them is NaN, so that a
# kernel that reads past its own elements is found out
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "offset": _offset,
    "transposed": _transposed,
    "inner_slice": _inner_slice,
}


class Call(NamedTuple):
    """Everything that one call of ``gb.batch_norm`` takes, and the gradient that comes back."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    dy: Tensor


def call(
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
    affine: bool = True,
    residual: bool = False,
    mask: bool = False,
    seed: int = 0,
) -> Call:
    """Random arguments; channels differ in mean and scale, weights have both signs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    c = shape[1]
    per_channel = (1, c) + (1,) * (len(shape) - 2)
    x = normal(*shape) * (0.5 + normal(c).abs()).view(per_channel) + normal(c).view(per_channel)
    parameter_dtype = dtype if dtype == torch.float64 else torch.float32
    valid = None
    if mask:
        valid = torch.rand(shape[:1] + shape[2:], generator=generator) < 0.7
        # At least two valid values in every channel, at least one invalid.
        valid.view(-1)[:2] = True
        valid.view(-1)[-1] = valid.numel() <= 2
    arrange = LAYOUTS[layout]
    return Call(
        x=arrange(x.to(dtype)),
        weight=normal(c).to(parameter_dtype) if affine else None,
        bias=normal(c).to(parameter_dtype) if affine else None,
        residual=arrange(normal(*shape).to(dtype)) if residual else None,
        mask=valid,
        dy=arrange(normal(*shape).to(dtype)),
    )


def dtype(backend: str) -> torch.dtype:
    """The most precise dtype that a backend takes."""
    return torch.float64 if backend in DOUBLE else torch.float32


def require(backend: str, x: Tensor, **call: Any) -> None:
    """Skip, with the backend's own words, where it says that it cannot run this call.

    ``auto`` is never skipped: it has to find a way.
    """
    if backend == "auto":
        return
    reason = gb.backends(x, **call)[backend].why_not
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def numpy(value: Tensor | None) -> Any:
    """A detached float64 (or bool) array of the same values; None stays None."""
    if value is None:
        return None
    value = value.detach()
    return value.numpy() if value.dtype == torch.bool else value.double().numpy()


def given(channels: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A mean and a variance to normalize with that are not those of any batch."""
    generator = torch.Generator().manual_seed(7)
    mean = torch.randn(channels, generator=generator, dtype=torch.float64)
    var = 0.3 + torch.rand(channels, generator=generator, dtype=torch.float64)
    # representable in the precision of the call: a backend may hold them in it
    return mean.to(dtype).double(), var.to(dtype).double()


def leaves(arguments: Call) -> dict[str, Tensor]:
    """The operands that have a gradient, as leaves of a new graph, by name."""
    return {
        name: getattr(arguments, name).detach().requires_grad_()
        for name in ("x", "weight", "bias", "residual")
        if getattr(arguments, name) is not None
    }


def run(
    arguments: Call, *, given: tuple[Tensor, Tensor] | None = None, **options: Any
) -> tuple[Tensor, dict[str, Tensor], gb.Moments]:
    """Call ``gb.batch_norm`` forward and backward: y, the gradients (dx, ...), the moments."""
    operands = leaves(arguments)
    y, moments = gb.batch_norm(
        operands["x"],
        operands.get("weight"),
        operands.get("bias"),
        residual=operands.get("residual"),
        mask=arguments.mask,
        moments=None if given is None else gb.Moments.given(*given),
        **options,
    )
    grads = torch.autograd.grad(y, list(operands.values()), arguments.dy.to(y.dtype))
    return y.detach(), {f"d{k}": g for k, g in zip(operands, grads, strict=True)}, moments


class Layer(NamedTuple):
    """A layer of 6 channels for (N, 6) in float64, and the laws that it obeys in training."""

    make: Callable[[], nn.Module]
    obeys: frozenset[str]


_STATISTICS = {"scale", "channel scale", "shift", "channel shift", "weight scale", "unit weights"}
_WHOLE = {"scale", "shift", "channel shift", "weight scale"}
_OWN = {"scale", "shift", "weight scale", "sample independence", "same in eval"}
_TINY: dict[str, Any] = {"eps": 1e-12, "dtype": torch.float64}
_FREE = {"r_max": float("inf"), "d_max": float("inf")}


def _layer(make: Callable[..., nn.Module], *args: Any, obeys: set[str], **options: Any) -> Layer:
    return Layer(lambda: make(*args, **options, **_TINY), frozenset(obeys))


# name -> the layer and its laws, which test_methods_laws.py tests where they hold and where not
LAYERS = {
    "BatchNorm": _layer(gb.BatchNorm1d, 6, obeys=_STATISTICS),
    "BatchRenorm": _layer(gb.BatchRenorm1d, 6, r_max=1.5, d_max=0.5, obeys=set()),
    "BatchRenorm at 1 and 0": _layer(gb.BatchRenorm1d, 6, r_max=1, d_max=0, obeys=_STATISTICS),
    "BatchRenorm without limits": _layer(
        gb.BatchRenorm1d, 6, **_FREE, obeys={"sample independence", "same in eval"}
    ),
    "GhostBatchNorm": _layer(gb.GhostBatchNorm1d, 6, virtual_batch_size=5, obeys=_STATISTICS),
    "DecorrelatedBatchNorm": _layer(gb.DecorrelatedBatchNorm1d, 6, group_size=3, obeys=_WHOLE),
    "IterNorm": _layer(gb.IterNorm1d, 6, group_size=3, obeys=_WHOLE),
    "LayerNorm": _layer(nn.LayerNorm, 6, obeys=_OWN),
    "GroupNorm": _layer(nn.GroupNorm, 2, 6, obeys=_OWN),
}
