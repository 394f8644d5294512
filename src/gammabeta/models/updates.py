"""When forward passes enter the running statistics: once, merged, never, or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gammabeta.models._find import ours


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Merge the statistics of all forward passes inside, and commit them once on leaving.

    As if their batches had been one: the merged mean and variance are exact, the momentum is
    applied once, ``num_batches_tracked`` grows by one. For gradient accumulation. After an
    exception nothing is committed.

    Raises:
        RuntimeError: one of the layers is inside another ``accumulate`` already.
        ValueError: the model has batch normalizations of ``torch.nn``.

    >>> import torch, gammabeta as gb
    >>> layer = gb.BatchNorm1d(1, momentum=1.0)
    >>> with gb.accumulate(layer):
    ...     for part in torch.tensor([[[0.0], [2.0]], [[10.0], [12.0]]]):
    ...         _ = layer(part)
    >>> layer.running_mean.item(), round(layer.running_var.item(), 4)
    (6.0, 34.6667)
    """
    layers = ours(model, "accumulate")
    for name, layer in layers.items():
        if layer._pending is not None:
            raise RuntimeError(
                f"gammabeta.accumulate: must not be nested, got layer {name!r}, whose statistics "
                "are being accumulated already. Use one `with` around all forward passes."
            )
    for layer in layers.values():
        layer._pending = []
    try:
        yield
        for layer in layers.values():
            for merged in layer._pending or []:
                layer._commit(merged)
    finally:
        for layer in layers.values():
            layer._pending = None


@contextmanager
def no_update(model: nn.Module) -> Iterator[None]:
    """Let forward passes inside leave the running statistics as they are; may be nested.

    For dummy, probing and target-network passes. In training mode batches are normalized by
    their own statistics as ever. Inside :func:`accumulate` it wins.

    Raises:
        ValueError: the model has batch normalizations of ``torch.nn``.

    >>> import torch, gammabeta as gb
    >>> layer = gb.BatchNorm1d(1)
    >>> with gb.no_update(layer):
    ...     _ = layer(torch.randn(4, 1))
    >>> layer.running_mean.item(), layer.num_batches_tracked.item()
    (0.0, 0)
    """
    layers = ours(model, "no_update")
    for layer in layers.values():
        layer._blocked += 1
    try:
        yield
    finally:
        for layer in layers.values():
            layer._blocked -= 1


def skipped(model: nn.Module) -> dict[str, int]:
    """How many batches each layer has kept out of its statistics because they were not finite.

    Reads one number per layer from its device. A ``state_dict`` does not carry the counts.

    >>> import torch, gammabeta as gb
    >>> gb.skipped(gb.BatchNorm1d(1))
    {'': 0}
    """
    return {
        name: 0 if layer._skipped is None else int(layer._skipped)
        for name, layer in ours(model, "skipped").items()
    }


def functional_call(
    model: nn.Module,
    params_and_buffers: Mapping[str, Tensor],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """Call ``model`` with these parameters and buffers, and return its new buffers too.

    Like ``torch.func.functional_call``, but nothing is written: neither the model nor the given
    tensors change. Under ``torch.func.vmap`` the new buffers come out stacked, one set for each
    copy, where PyTorch's layers in training mode end with an error.

    Args:
        model: any module; its batch normalizations must be ours.
        params_and_buffers: by qualified name; what is not given is taken from the model.
        args: the positional arguments, a tuple, or one argument.
        kwargs: the keyword arguments.

    Returns:
        (output, new buffers by name).

    Raises:
        ValueError: the model has batch normalizations of ``torch.nn``.

    >>> import torch, gammabeta as gb
    >>> layer = gb.BatchNorm1d(1, momentum=1.0)
    >>> _, buffers = gb.functional_call(layer, {}, torch.tensor([[1.0], [3.0]]))
    >>> buffers["running_mean"], layer.running_mean
    (tensor([2.]), tensor([0.]))
    """
    layers = ours(model, "functional_call")
    own = set(map(id, layers.values()))
    written = {
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if id(module) not in own
        for key in module._buffers
    }
    given = dict(params_and_buffers)
    for name, buffer in model.named_buffers():
        # other modules may write in place: into a copy then
        if name in written:
            given[name] = given.get(name, buffer).clone()
        else:
            given.setdefault(name, buffer)
    before = {layer: layer._rebind for layer in layers.values()}
    for layer in before:
        layer._rebind = True
    try:
        output = torch.func.functional_call(
            model, given, args, dict(kwargs) if kwargs is not None else None
        )
    finally:
        for layer, rebind in before.items():
            layer._rebind = rebind
    return output, {name: given[name] for name, _ in model.named_buffers()}
