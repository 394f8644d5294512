"""Share the statistics of a batch between the processes that train on its parts."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from torch import nn

from gammabeta.models._find import ours
from gammabeta.ops._collective import Meeting

_nameless = itertools.count(1)


class Synchronized(NamedTuple):
    """What :func:`sync_statistics` or :func:`unsync_statistics` did to one layer."""

    name: str
    synchronized: bool


def sync_statistics(model: nn.Module, group: Any = None) -> list[Synchronized]:
    """Make the layers of ``model`` take their statistics over all ranks, in place.

    In training mode a batch is then the concatenation of all ranks' batches, which may be of
    different sizes or empty: outputs, running statistics and, summed over ranks, the gradients of
    a sum loss are those of one process. Works with gloo and NCCL, on the CPU, inside
    ``DistributedDataParallel``. All ranks must call the same layers in the same order. The group is
    shared by ``copy.deepcopy`` and dropped, with a warning, by ``pickle``.

    Args:
        model: its batch normalizations must be ours.
        group: a ``torch.distributed`` process group; None for the default one.

    Returns:
        One entry a layer.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
        ValueError: the model has batch normalizations of ``torch.nn``.

    >>> import gammabeta as gb
    >>> gb.sync_statistics(gb.BatchNorm1d(1))
    Traceback (most recent call last):
    RuntimeError: Synchronized statistics need a process group: ...
    """
    layers = ours(model, "sync_statistics")
    # Layers that are synchronized one by one have no name in a model: their order tells them apart.
    meetings = {
        name: Meeting(group, name or f"{type(layer).__name__} {next(_nameless)}")
        for name, layer in layers.items()
    }
    for name, layer in layers.items():
        layer._group = meetings[name]
    return [Synchronized(name, True) for name in layers]


def unsync_statistics(model: nn.Module) -> list[Synchronized]:
    """Undo :func:`sync_statistics` in place: every rank takes its own batch's statistics again.

    >>> import gammabeta as gb
    >>> gb.unsync_statistics(gb.BatchNorm1d(1))
    [Synchronized(name='', synchronized=False)]
    """
    layers = ours(model, "unsync_statistics")
    for layer in layers.values():
        layer._group = None
    return [Synchronized(name, False) for name in layers]
