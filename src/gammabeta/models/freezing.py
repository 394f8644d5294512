"""Freeze batch normalization so that it stays frozen, and thaw it without loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from gammabeta.models._find import ours


class Frozen(NamedTuple):
    """What :func:`freeze` or :func:`unfreeze` did to one layer."""

    name: str
    statistics: bool
    affine: bool
    note: str


def freeze(model: nn.Module, statistics: bool = True, affine: bool = False) -> list[Frozen]:
    """Freeze the batch normalizations of ``model`` in place; ``model.train()`` does not undo it.

    With ``statistics`` they normalize by their running statistics in training mode too, and no
    batch enters these. With ``affine`` γ and β need no gradient any more. A ``state_dict`` does
    not carry it: freeze again after loading into a new model.

    Returns:
        One entry a layer: its name, what is frozen now, and a note where something could not be.

    Raises:
        ValueError: the model has batch normalizations of ``torch.nn``.

    >>> import torch, gammabeta as gb
    >>> layer = gb.BatchNorm1d(1)
    >>> gb.freeze(layer)
    [Frozen(name='', statistics=True, affine=False, note='')]
    >>> _ = layer.train()(torch.randn(4, 1) + 100)
    >>> layer.running_mean.item()
    0.0
    """
    report = []
    for name, layer in ours(model, "freeze").items():
        note = ""
        if statistics and layer._held() is None:
            note = "it has no running statistics to normalize with (track_running_stats=False)"
        elif statistics:
            layer._frozen = True
        if affine and layer._thawed is None:
            parameters = layer.named_parameters(recurse=False)
            layer._thawed = {key: value.requires_grad for key, value in parameters}
            for value in layer.parameters(recurse=False):
                value.requires_grad_(False)
        report.append(Frozen(name, layer._frozen, layer._thawed is not None, note))
    return report


def unfreeze(model: nn.Module, statistics: bool = True, affine: bool = True) -> list[Frozen]:
    """Undo :func:`freeze` in place: each γ and β needs a gradient again if it did before.

    Returns:
        One entry a layer: its name and what is still frozen.

    Raises:
        ValueError: the model has batch normalizations of ``torch.nn``.

    >>> import gammabeta as gb
    >>> layer = gb.BatchNorm1d(1)
    >>> _ = gb.freeze(layer, affine=True)
    >>> gb.unfreeze(layer), layer.weight.requires_grad
    ([Frozen(name='', statistics=False, affine=False, note='')], True)
    """
    report = []
    for name, layer in ours(model, "unfreeze").items():
        if statistics:
            layer._frozen = False
        if affine and layer._thawed is not None:
            for key, value in layer.named_parameters(recurse=False):
                value.requires_grad_(layer._thawed.get(key, True))
            layer._thawed = None
        report.append(Frozen(name, layer._frozen, layer._thawed is not None, ""))
    return report
