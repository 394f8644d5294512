"""When forward passes enter the running statistics: once, merged, never, or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gammabeta.layers._running import RunningMoments
from gammabeta.models._find import ours


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Merge the statistics of all forward passes inside, and commit them once on leaving.

    As if their batches had been one: the merged mean and variance are exact, the momentum is
    applied once, ``num_batches_tracked`` grows by one. For gradient accumulation. After an
    exception nothing is committed, nor if it is committing that raises it.

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
        _commit_all([layer for layer in layers.values() if layer._pending])
    finally:
        for layer in layers.values():
            layer._pending = None


def _commit_all(layers: list[RunningMoments]) -> None:
    """Commit what each layer has merged; after an exception the buffers are as before."""
    written = [
        value
        for layer in layers
        for value in (*layer._buffers.values(), layer._skipped)
        if value is not None
    ]
    before = [value.clone() for value in written]
    try:
        for layer in layers:
            for merged in layer._pending or []:
                layer._commit(merged)
    except BaseException:
        with torch.no_grad():
            for value, old in zip(written, before, strict=True):
                value.copy_(old)
        raise


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
        params_and_buffers: by qualified name, for a tensor with several names any of them; what
            is not given is taken from the model.
        args: the positional arguments, a tuple, or one argument.
        kwargs: the keyword arguments.

    Returns:
        (output, new buffers by name). A buffer with several names has the ones it was given by,
        else the first.

    Raises:
        ValueError: the model has batch normalizations of ``torch.nn``, or one tensor of the model
            was given different values by different names.

    >>> import torch, gammabeta as gb
    >>> layer = gb.BatchNorm1d(1, momentum=1.0)
    >>> _, buffers = gb.functional_call(layer, {}, torch.tensor([[1.0], [3.0]]))
    >>> buffers["running_mean"], layer.running_mean
    (tensor([2.]), tensor([0.]))
    """
    layers = ours(model, "functional_call")
    given = dict(params_and_buffers)
    tensors, buffers = _tied(model)
    returned = []
    for names in tensors:
        taken = [name for name in names if name in params_and_buffers]
        values = [given.pop(name) for name in taken]
        if any(value is not values[0] for value in values):
            raise ValueError(
                "gammabeta.functional_call: a tensor of the model must be given one value, got "
                f"different ones for {', '.join(map(repr, taken))}, which are names of the same "
                "tensor. Give it by one of them."
            )
        held = buffers.get(next(iter(names)))
        if held is not None:
            value = values[0] if values else held
            # other modules may write in place: into a copy then
            foreign = any(not isinstance(owner, RunningMoments) for owner, _ in names.values())
            values = [value.clone() if foreign else value]
            returned += [(name, names[name][1]) for name in taken or list(names)[:1]]
        if values:
            given.update((place, values[0]) for _, place in names.values())
    before = {layer: layer._rebind for layer in layers.values()}
    for layer in before:
        layer._rebind = True
    try:
        output = torch.func.functional_call(
            model, given, args, dict(kwargs) if kwargs is not None else None, tie_weights=False
        )
    finally:
        for layer, rebind in before.items():
            layer._rebind = rebind
    return output, {name: given[place] for name, place in returned}


def _tied(
    model: nn.Module,
) -> tuple[list[dict[str, tuple[nn.Module, str]]], dict[str, Tensor]]:
    """All names of each tensor of ``model``, and its buffers by all their names.

    With each name comes the module that owns the tensor, and the first name of this place. Only
    places may be set: where a module has several names, PyTorch sets a tensor by each of them,
    restores in the same order, and so leaves the given tensor in the model.
    """
    buffers = dict(model.named_buffers(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    first: dict[tuple[int, str], str] = {}
    tied: dict[int, dict[str, tuple[nn.Module, str]]] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *buffers.items()):
        path, _, key = name.rpartition(".")
        place = first.setdefault((id(modules[path]), key), name)
        tied.setdefault(id(tensor), {})[name] = (modules[path], place)
    return list(tied.values()), buffers
