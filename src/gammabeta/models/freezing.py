"""Freeze batch normalization so that it stays frozen, and thaw it without loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from gammabeta.layers._running import RunningMoments
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
    batch enters these. With ``affine`` γ and β need no gradient any more, nor does what a
    parametrization makes them of. A ``state_dict`` does not carry it: freeze again after loading
    into a new model.

    Returns:
        One entry a layer: its name, what is frozen now, and a note where something could not be
        or, in a lazy layer before its first batch, is frozen at mean 0 and variance 1.

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
    layers = ours(model, "freeze")
    if affine:
        # all states before any change: layers may share parameters
        states = _states(layers.values())
        for layer in layers.values():
            named = dict(layer.named_parameters())
            new = {key: states[id(value)] for key, value in named.items()}
            layer._thawed = {**new, **(layer._thawed or {})}
            for value in named.values():
                # not by requires_grad_(), which parameters of a lazy layer do not have yet
                value.requires_grad = False
    report = []
    for name, layer in layers.items():
        note, held = "", layer._held()
        if statistics and held is None:
            note = "it has no running statistics to normalize with (track_running_stats=False)"
        elif statistics and held is not None:
            layer._frozen = True
            if is_lazy(held[0]):
                note = (
                    "it is lazy and has seen no batch: frozen at mean 0 and variance 1, unless a "
                    "state_dict is loaded. Run one batch first to freeze statistics of data"
                )
        report.append(Frozen(name, layer._frozen, layer._thawed is not None, note))
    return report


def _states(layers: Iterable[RunningMoments]) -> dict[int, bool]:
    """Whether each parameter of ``layers`` needed a gradient before it was frozen, by its id.

    A layer that was frozen later than another that shares the parameter has seen it frozen.
    """
    states: dict[int, bool] = {}
    for layer in layers:
        for key, value in layer.named_parameters():
            thawed = layer._thawed or {}
            # a parametrization may have been registered or removed since
            former = [was for old, was in thawed.items() if _affine_name(old) == _affine_name(key)]
            before = thawed[key] if key in thawed else any(former or [value.requires_grad])
            states[id(value)] = before or states.get(id(value), False)
    return states


def _affine_name(key: str) -> str:
    """What γ or β is called, where ``key`` may be the original of its parametrization."""
    parts = key.split(".")
    original = len(parts) == 3 and parts[0] == "parametrizations" and parts[2][:8] == "original"
    return parts[1] if original else key


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
    layers = ours(model, "unfreeze")
    states = _states(layers.values())
    report = []
    for name, layer in layers.items():
        if statistics:
            layer._frozen = False
        if affine and layer._thawed is not None:
            for value in layer.parameters():
                value.requires_grad = states[id(value)]
            layer._thawed = None
        report.append(Frozen(name, layer._frozen, layer._thawed is not None, ""))
    return report
