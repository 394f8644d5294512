"""One door to the arithmetic of batch normalization: pure functions, no state.

:func:`batch_norm` checks its operands once, chooses a backend and takes care of derivatives.
A backend is one module of this folder with ``why_not(x, ...) -> str | None`` (the reason why
it cannot run), ``LACKS`` (promises that it does not keep) and the seam ``moments``,
``normalize``, ``reduce_grads``, ``grad_input``, between which collectives can go; a fused
``forward`` where it has one. To add a backend, write that module and list it in ``_BACKENDS``.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gammabeta.moments import Moments, spread_mask, statistics
from gammabeta.ops import _activations, _collective, _cpu, _native, _reference, _torch
from gammabeta.ops._activations import Act, Parsed
from gammabeta.ops._collective import Meeting
from gammabeta.ops._seen import Held, Seen
from gammabeta.ops._seen import as_moments as as_moments

# in the order in which "auto" tries them
_BACKENDS: dict[str, ModuleType] = {"cpu": _cpu, "native": _native, "reference": _reference}
_LOW = (torch.float16, torch.bfloat16)
Answer: TypeAlias = tuple[Tensor, Moments]


class Backend(NamedTuple):
    """What :func:`backends` tells of one backend."""

    name: str
    chosen: bool
    why_not: str | None
    lacks: tuple[str, ...]


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    moments: Moments | None = None,
    eps: float = 1e-5,
    act: Act = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    group: Any = None,
    backend: str = "auto",
) -> tuple[Tensor, Moments]:
    """Normalize every channel of ``x``, then scale, shift, add and activate.

    y = act(γ·x̂ + β + residual), x̂ = (x − mean)/√(var + eps). The statistics are those of the
    batch, over all axes but axis 1: over n for dense input (N, C), over n and all positions
    for convolutional input (N, C, ...), with the biased variance. Their gradients are
    dβ = Σ dy, dγ = Σ dy·x̂ and dx = γ·rstd·(dy − mean(dy) − x̂·mean(dy·x̂)).

    There is no ``training`` flag and there are no running statistics: without ``moments`` the
    batch is normalized by its own statistics (training); with them by the given ones, through
    which no gradient flows (inference).

    Args:
        x: (N, C) or (N, C, ...), floating.
        weight: γ, (C,), or None for 1.
        bias: β, (C,), or None for 0.
        moments: the statistics to normalize with, ``Moments.given(mean, var)`` for instance.
        eps: added to the variance, in units of x², ≥ 0. With 0, a channel whose variance is 0
            gives y = β and dx = 0.
        act: None, "relu", "leaky_relu", "sigmoid", "tanh", "softplus", "silu", "gelu", with
            PyTorch's default parameters, or ("leaky_relu", slope), ("gelu", "tanh").
        residual: shape of x, added before the activation.
        mask: bool, True = valid, broadcastable to x without its channel axis. Elsewhere y = 0
            and dx = 0 exactly, whatever x holds there; invalid positions enter no statistic
            and no gradient.
        group: a ``torch.distributed`` process group: the batch is that of all its ranks, which
            must all make the call; uneven and empty ones are exact. One collective forward and one
            backward, of O(C) bytes. Gradients of γ and β are those of the rank's own samples.
        backend: "auto", or a name that :func:`backends` lists.

    Returns:
        y in the shape and memory format of x, and the (detached) moments that normalized it.

    Raises:
        TypeError: x is not floating, or mask is not bool.
        ValueError: a shape, eps, act or backend that cannot be; the message says what came.
        RuntimeError: with a group: ranks meet in different calls, or one does not come.

    >>> import torch, gammabeta as gb
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 10.0]])
    >>> y, seen = gb.batch_norm(x, torch.tensor([2.0, 1.0]), torch.tensor([0.0, 5.0]), eps=0.0)
    >>> y
    tensor([[-2.,  5.],
            [ 2.,  5.]])
    >>> seen.mean, seen.var()
    (tensor([ 2., 10.], dtype=torch.float64), tensor([1., 0.], dtype=torch.float64))

    Source: Ioffe & Szegedy 2015, Algorithm 1 and section 3.2, arXiv:1502.03167.
    Differs from ``torch.nn.functional.batch_norm``: see ``docs/architecture.md``.
    """
    y, seen = run(x, weight, bias, moments, eps, act, residual, mask, group, backend)
    return y, as_moments(seen)


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Moments | Held | None,
    eps: float,
    act: Act,
    residual: Tensor | None,
    mask: Tensor | None,
    group: Any,
    backend: str,
) -> tuple[Tensor, Seen]:
    """:func:`batch_norm` for layers: statistics go in and come out as they are at hand."""
    parsed = None if act is None else _activations.parse(act)
    plain = group is None and (backend == "auto" or backend == "cpu")
    if plain and _cpu.direct(x, weight, bias, moments, eps, mask, residual):
        return _cpu.by_address(x, weight, bias, moments, eps, parsed, residual, None, True)
    _check(x, weight, bias, moments, eps, residual)
    if group is not None and moments is not None:
        raise ValueError(
            "batch_norm: group and moments exclude each other: given statistics are normalized "
            "with on every rank alike, got both. Leave one out."
        )
    valid = None if mask is None else spread_mask(mask, x)
    # in half precision γ and β lose digits that the float32 arithmetic behind would keep
    weight = weight.float() if weight is not None and weight.dtype in _LOW else weight
    bias = bias.float() if bias is not None and bias.dtype in _LOW else bias
    chosen = _choose(backend, x, weight, bias, moments, eps, mask, residual, group)
    if group is not None:
        rest = (weight, bias, residual, valid, eps, parsed, chosen)
        # the compiler calls what it cannot see through as it is
        return _uncompiled(_synchronized)(x, _collective.meet(group), *rest)
    if chosen is _cpu:
        return _cpu.forward(x, weight, bias, moments, eps, parsed, residual, valid)
    if isinstance(moments, Held):
        moments = moments.moments()
    if chosen is _native:  # in one call, differentiated by PyTorch
        return _native.forward(x, weight, bias, moments, eps, parsed, residual)
    if torch.compiler.is_compiling() or _torch.transform_active():
        # plain operations: every transform and the compiler sees through them
        stats = statistics(x, valid) if moments is None else moments
        y = chosen.normalize(x, stats, weight, bias, eps, parsed, residual, valid)
        return y, Moments(*(part.detach() for part in stats))
    given = moments is not None
    stats = moments if moments is not None else chosen.moments(x, valid)
    y = _seam(x, weight, bias, residual, valid, stats, given, eps, parsed, chosen, None)
    return y, stats


# the seam of the running statistics: in one call, where the backend of a batch can do that
enter = _cpu.enter


def _synchronized(
    x: Tensor,
    meeting: Meeting,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
    eps: float,
    act: Parsed,
    backend: ModuleType,
) -> tuple[Tensor, Moments]:
    """The seam with a collective between its functions."""
    meeting.calls += 1
    with torch.no_grad():
        stats = _collective.merged(backend.moments(x, valid), x, meeting)
    y = _seam(x, weight, bias, residual, valid, stats, False, eps, act, backend, meeting)
    return y, stats


def backends(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    moments: Moments | None = None,
    eps: float = 1e-5,
    act: Act = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    group: Any = None,
    backend: str = "auto",
) -> dict[str, Backend]:
    """Say which backend :func:`batch_norm` takes for a call, why not the others, at what price.

    Args: those of the call, as far as they matter; ``x`` alone asks about the plain case.

    Returns:
        name -> ``Backend(name, chosen, why_not, lacks)``: ``why_not`` is the reason why it
        cannot run this call or None; ``lacks`` names the promises of ``docs/numerics.md``
        that do not hold with it.

    >>> import torch, gammabeta as gb
    >>> x = torch.randn(8, 3, dtype=torch.float64)
    >>> found = gb.backends(x, mask=torch.ones(8, dtype=torch.bool))
    >>> found["native"].why_not
    "PyTorch's op takes no mask"
    >>> found["reference"].chosen
    True
    """
    _activations.parse(act)
    _check(x, weight, bias, moments, eps, residual)
    call = (x, weight, bias, moments, eps, mask, residual, group)
    chosen = _choose(backend, *call)
    return {
        name: Backend(name, module is chosen, module.why_not(*call), module.LACKS)
        for name, module in _BACKENDS.items()
    }


def check_backend(backend: str) -> None:
    """Raise ValueError, with the nearest name, unless ``backend`` is "auto" or a backend's name."""
    if backend != "auto" and backend not in _BACKENDS:
        near = difflib.get_close_matches(str(backend), ["auto", *_BACKENDS], 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"backend: expected 'auto' or one of {', '.join(_BACKENDS)}, got {backend!r}.{hint}"
        )


def _choose(backend: str, x: Tensor, *call: Any) -> ModuleType:
    # torch.func cannot see into an op that writes its statistics in place
    transformed = _torch.transform_active()
    if backend == "auto":
        if transformed:
            return _reference
        # an exported model is to hold operators that every runtime knows
        skipped = _cpu if torch.compiler.is_exporting() else None
        return next(
            m for m in _BACKENDS.values() if m is not skipped and m.why_not(x, *call) is None
        )
    check_backend(backend)
    module = _BACKENDS[backend]
    reason = module.why_not(x, *call)
    if reason is not None:
        able = [name for name, m in _BACKENDS.items() if m.why_not(x, *call) is None]
        raise ValueError(
            f"backend {backend!r} cannot run this call: {reason}. "
            f"These can: {', '.join(able)}; or leave the choice to backend='auto'."
        )
    return _reference if transformed else module


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Moments | Held | None,
    eps: float,
    residual: Tensor | None,
) -> None:
    if isinstance(moments, Held):  # a layer's own buffers, which it has checked
        moments = None
    for name, value in (("input", x), ("weight", weight), ("bias", bias), ("residual", residual)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"batch_norm: {name} must be a tensor, got {type(value).__name__}. Convert it with "
                "torch.as_tensor."
            )
    if moments is not None and not isinstance(moments, Moments):
        raise TypeError(
            f"batch_norm: moments must be gammabeta.Moments, got {type(moments).__name__}. Wrap a "
            "mean and a variance as gammabeta.Moments.given(mean, var)."
        )
    if not x.is_floating_point():
        raise TypeError(f"batch_norm: expected a floating input, got {x.dtype}. Use x.float().")
    if x.dim() < 2:
        raise ValueError(
            f"batch_norm: expected (N, C) or (N, C, ...) with channels on axis 1, got "
            f"{tuple(x.shape)}. Add the missing axis with unsqueeze."
        )
    channels = x.shape[1]
    operands = [("weight", weight), ("bias", bias)]
    if moments is not None:
        operands += [("moments.mean", moments.mean), ("moments.m2", moments.m2)]
    for name, value in operands:
        if value is not None and (value.dim() != 1 or value.shape[0] != channels):
            raise ValueError(
                f"batch_norm: {name} should contain {channels} elements, one per channel of the "
                f"input {tuple(x.shape)}, got shape {tuple(value.shape)}."
            )
    if not (isinstance(eps, int | float) and 0 <= eps < math.inf):
        raise ValueError(f"batch_norm: eps must be finite and ≥ 0, got {eps!r}. Usual is 1e-5.")
    if residual is not None and (residual.shape != x.shape or not residual.is_floating_point()):
        raise ValueError(
            f"batch_norm: residual must be floating and have the shape of the input, "
            f"{tuple(x.shape)}, got {tuple(residual.shape)} in {residual.dtype}. Expand it first."
        )


class _Seam(torch.autograd.Function):
    """The closed-form backward, from the seam that every backend has.

    The first derivative runs through the backend. Where the backward itself is to be
    differentiated (``create_graph=True``), the same formulas run through the reference with
    statistics that depend on x: the saved ones are constants, and silence would be wrong.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        valid: Tensor | None,
        stats: Moments,
        given: bool,
        eps: float,
        act: Parsed,
        backend: ModuleType,
        meeting: Meeting | None,
    ) -> Tensor:
        y: Tensor = backend.normalize(x, stats, weight, bias, eps, act, residual, valid)
        # without an activation the derivative does not depend on the residual's value
        kept = residual if act is not None else None
        ctx.save_for_backward(x, weight, bias, kept, valid, *stats)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.given, ctx.eps, ctx.act, ctx.backend = given, eps, act, backend
        # the layer's next call raises the number; the backward belongs to this one
        ctx.meeting = copy.copy(meeting)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, weight, bias, residual, valid, *parts = ctx.saved_tensors
        stats, backend, meeting = Moments(*parts), ctx.backend, ctx.meeting
        if torch.is_grad_enabled():
            backend = _reference
            if not ctx.given:
                stats = statistics(x, valid)
                if meeting is not None:
                    stats = _collective.merged(stats, x, meeting)
        if ctx.residual_dtype is not None and residual is None:
            residual = dy.new_zeros((), dtype=ctx.residual_dtype).expand_as(x)
        rest = (weight, bias, ctx.eps, ctx.act, residual, valid)
        sums = backend.reduce_grads(dy, x, stats, *rest)
        n = None if ctx.given else stats.n
        total = sums if meeting is None else _collective.summed(sums, x, meeting)
        dx, dresidual = backend.grad_input(dy, x, stats, total, n, *rest)
        dweight = None if weight is None else sums[1].to(weight.dtype)
        dbias = None if bias is None else sums[0].to(bias.dtype)
        return dx, dweight, dbias, dresidual, *(None,) * 7


# torch leaves both without types
_seam: Callable[..., Tensor] = _Seam.apply
_uncompiled: Callable[[Callable[..., Answer]], Callable[..., Answer]] = torch.compiler.disable
