"""Where the normalization layers of a model are."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gammabeta.layers._running import RunningMoments


def ours(model: nn.Module, function: str) -> dict[str, RunningMoments]:
    """The layers of this package by qualified name, each once, labeled with it for messages.

    Raises:
        ValueError: the model has a layer of ``torch.nn`` that ``function`` cannot serve.
    """
    found: dict[str, RunningMoments] = {}
    for name, module in model.named_modules():
        if isinstance(module, RunningMoments):
            found[name] = module
        elif isinstance(module, _BatchNorm):
            raise ValueError(
                f"gammabeta.{function}: every batch normalization must be a layer of gammabeta, "
                f"got {name or 'the model itself'} = {module!r}. Convert the model first: "
                "model = gammabeta.convert(model)."
            )
    for name, layer in found.items():
        layer._label = name
    return found


def came(given: object) -> str:
    """What was given where a model was expected, in words."""
    if isinstance(given, type):
        return f"the class {given.__name__}"
    return (
        f"a state_dict ({type(given).__name__})"
        if isinstance(given, dict)
        else type(given).__name__
    )


def any_kind(model: nn.Module) -> dict[str, _BatchNorm | RunningMoments]:
    """The batch normalizations by qualified name, ours (labeled) and PyTorch's, each once."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RunningMoments | _BatchNorm)
    }
    for name, layer in found.items():
        if isinstance(layer, RunningMoments):
            layer._label = name
    return found
