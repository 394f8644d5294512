"""What the probes of the step's effects share: the step of each layer, and scales of units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gammabeta.probes.step import Step

_CHANNELS_FIRST = nn.modules.conv._ConvNd
_OVER = ("median", "mean", "rms")


class Layer(NamedTuple):
    """One layer's trainable parameters by name, and the weight layers that come after it."""

    name: str
    parameters: tuple[str, ...]
    later: tuple[str, ...]


def layers_of(step: Step, chosen: Sequence[str] | None = None) -> list[Layer]:
    """The layers that have trainable parameters, in the order of the forward pass.

    Every parameter belongs to one layer: to its weight or normalization layer, of several that
    share it the first, else to the module that holds it, which comes before all it contains.

    Args:
        step: the training step.
        chosen: names of modules that count as one layer each, with all that they contain; what
            is in none of them is in no layer. None takes every layer for itself.

    Raises:
        ValueError: an unknown module, or a parameter in two of those chosen.
    """
    every = _every_layer(step)
    place = {layer: at for at, layer in enumerate(every)}
    home = None if chosen is None else _homes(step.model, chosen)
    merged: dict[str, list[str]] = {}
    last: dict[str, int] = {}
    for layer, names in every.items():
        for name in names:
            if home is None or name in home:
                group = layer if home is None else home[name]
                merged.setdefault(group, []).append(name)
                last[group] = place[layer]
    return [
        Layer(name, tuple(held), tuple(w for w in step.weights if place[w] > last[name]))
        for name, held in merged.items()
    ]


def _homes(model: nn.Module, chosen: Sequence[str]) -> dict[str, str]:
    """In which of the chosen modules each parameter is, by name."""
    modules = dict(model.named_modules())
    home: dict[str, str] = {}
    for layer in dict.fromkeys(chosen):
        if layer not in modules:
            raise ValueError(
                f"gammabeta: layers= must name modules of the model, got {layer!r}. Names are "
                "those of model.named_modules()."
            )
        inside = {id(p) for p in modules[layer].parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) in inside and home.setdefault(name, layer) != layer:
                raise ValueError(
                    f"gammabeta: layers= must not share parameters, got {name!r} in both "
                    f"{home[name]!r} and {layer!r}. Leave one of them out."
                )
    return home


def _every_layer(step: Step) -> dict[str, list[str]]:
    """The parameters of every layer, frozen weight layers being there without any."""
    owner: dict[str, str] = {}
    for layer, names in step.weights.items():
        for name in names:
            owner.setdefault(name, layer)
    named = {id(p): name for name, p in step.model.named_parameters()}
    for site in step.sites:
        for parameter in site.module.parameters():
            owner.setdefault(named[id(parameter)], site.name)
    holders = [name for name in step.parameters if name not in owner]
    owner |= {name: name.rpartition(".")[0] for name in holders}
    around = {outer for name in holders for outer in _outwards(owner[name])}
    # what watched modules took is listed in the order of the calls
    calls = step.run(watch={*step.weights, *owner.values(), *around}).inputs
    places = {layer: (place, 0) for place, layer in enumerate(calls, 1)}

    def place(layer: str) -> tuple[int, int]:
        return next((places[name] for name in _outwards(layer) if name in places), (0, 0))

    latest = (0, 0)
    for layer in step.weights:
        if layer not in places:  # used without a call: after the one before, inside of its module
            before = max(latest, place(layer))
            places[layer] = (before[0], before[1] + 1)
        latest = places[layer]
    found: dict[str, list[str]] = {layer: [] for layer in step.weights}
    for name in step.parameters:
        found.setdefault(owner[name], []).append(name)
    return {layer: found[layer] for layer in sorted(found, key=place)}


def _outwards(name: str) -> Iterable[str]:
    """A module's name and those of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def targets(
    step: Step, layers: Sequence[Layer], relative: float | None
) -> dict[str, Tensor] | None:
    """Where the optimizer's next step takes the parameters of these layers; None without one.

    Args:
        step: the training step.
        layers: which parameters move.
        relative: if given, the length of each layer's step as a share of the norm of its
            parameters, the optimizer only giving the direction (without one: −gradient).

    Raises:
        ValueError: ``relative`` is not positive.
    """
    if relative is not None and not 0 < relative < math.inf:
        raise ValueError(
            f"gammabeta: relative must be the length of a step as a share of the weights', "
            f"above 0, got {relative!r}. Usual is 0.01."
        )
    names = [name for layer in layers for name in layer.parameters]
    if step.optimizer is not None:
        after = step.updated()
    elif relative is not None:
        after = {name: step.parameters[name] - step.gradients[name] for name in names}
    else:
        return None
    if relative is None:
        return {name: after[name] for name in names}
    moved: dict[str, Tensor] = {}
    for layer in layers:
        steps = {name: after[name] - step.parameters[name] for name in layer.parameters}
        length = norm(steps.values())
        size = norm(step.parameters[name] for name in steps)
        factor = relative * float(size / length) if length > 0 else 0.0
        moved |= {name: step.parameters[name] + factor * steps[name] for name in steps}
    return moved


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together, summed in float64."""
    parts = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return torch.stack(parts).square().sum().sqrt()


def dot(one: Iterable[Tensor], other: Iterable[Tensor]) -> Tensor:
    """The inner product of two lists of tensors, summed in float64."""
    pairs = zip(one, other, strict=True)
    return torch.stack([(a.double() * b.double()).sum() for a, b in pairs]).sum()


def received(step: Step, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each weight layer received, (units, values), in the order of the forward pass.

    Args:
        step: the training step.
        inputs: by layer; those that are not floating (the indices of an embedding) are left out.
    """
    found = {}
    for layer in step.weights:
        x = inputs.get(layer)
        if x is None or not x.is_floating_point() or x.dim() == 0:
            continue
        module = step.model.get_submodule(layer)
        axis = x.dim() - 1
        if isinstance(module, _CHANNELS_FIRST):
            axis -= len(module.kernel_size)
        found[layer] = x.detach().movedim(axis, 0).flatten(1) if x.dim() > 1 else x[:, None]
    return found


def in_units(change: Tensor, scale: Tensor) -> Tensor:
    """change/scale, with 0/0 = 0: what had no width and did not change."""
    return torch.where(change == 0, 0.0, change / scale)


def check_rule(over: str) -> None:
    """Raise ValueError unless :func:`over_units` has that rule."""
    if over not in _OVER:
        raise ValueError(f"gammabeta: over must be one of {', '.join(_OVER)}, got {over!r}.")


def over_units(values: Tensor, counted: Tensor, over: str) -> Tensor:
    """Aggregate non-negative ``values`` of units, of those ``counted``; 0 if none is."""
    kept = values[counted]
    if kept.numel() == 0:
        return torch.zeros((), dtype=torch.float64)
    if over == "median":  # of an even number: the mean of the two in the middle
        ordered = kept.sort().values
        return (ordered[(len(kept) - 1) // 2] + ordered[len(kept) // 2]) / 2
    return kept.mean() if over == "mean" else kept.square().mean().sqrt()
