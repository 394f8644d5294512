"""The activations that can be fused behind the normalization, and their derivatives.

Written with operations that autograd can differentiate any number of times: PyTorch's own
backward operators stop at the second derivative for some of these.
"""

from __future__ import annotations

import difflib
import math
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Act: TypeAlias = str | tuple[str, float | str] | None
Parsed: TypeAlias = tuple[str, float | str | None] | None

# name -> default parameter, None where it takes none; PyTorch's defaults
_DEFAULTS: dict[str, float | str | None] = {
    "relu": None,
    "leaky_relu": 0.01,
    "sigmoid": None,
    "tanh": None,
    "softplus": None,
    "silu": None,
    "gelu": "none",
}


def parse(act: Act) -> Parsed:
    """Turn a name or ``(name, parameter)`` into (name, parameter); None stays None."""
    if act is None:
        return None
    name, given = act if isinstance(act, tuple) and len(act) == 2 else (act, None)
    if not isinstance(name, str) or name not in _DEFAULTS:
        near = difflib.get_close_matches(str(name), _DEFAULTS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"act: expected None, one of {', '.join(_DEFAULTS)}, or (name, parameter), got "
            f"{act!r}.{hint} Any other activation is applied to the result."
        )
    if given is None:
        return name, _DEFAULTS[name]
    if name == "leaky_relu" and isinstance(given, int | float) and math.isfinite(given):
        return name, float(given)
    if name == "gelu" and given in ("none", "tanh"):
        return name, given
    raise ValueError(
        f"act: {act!r} has a parameter that {name} does not take. Parameters are "
        "('leaky_relu', slope) and ('gelu', 'none' or 'tanh')."
    )


def apply(act: Parsed, z: Tensor) -> Tensor:
    """act(z), elementwise, by PyTorch's own functions."""
    match act:
        case None:
            return z
        case ("leaky_relu", float(slope)):
            return F.leaky_relu(z, slope)
        case ("gelu", str(approximate)):
            return F.gelu(z, approximate=approximate)
        case ("relu", _):
            return torch.relu(z)
        case ("sigmoid", _):
            return torch.sigmoid(z)
        case ("tanh", _):
            return torch.tanh(z)
        case ("softplus", _):
            return F.softplus(z)
        case _:
            return F.silu(z)


def derivative(act: Parsed, z: Tensor) -> Tensor | None:
    """act'(z), elementwise; None stands for 1. At a kink the value is PyTorch's."""
    match act:
        case None:
            return None
        case ("relu", _):
            return (z > 0).to(z.dtype)
        case ("leaky_relu", float(slope)):
            return torch.where(z > 0, torch.ones_like(z), slope)
        case ("sigmoid", _):
            s = torch.sigmoid(z)
            return s * (1 - s)
        case ("tanh", _):
            t = torch.tanh(z)
            return 1 - t * t
        case ("softplus", _):
            # beyond PyTorch's threshold its softplus is the identity
            return torch.where(z > 20, 1.0, torch.sigmoid(z))
        case ("silu", _):
            s = torch.sigmoid(z)
            return s * (1 + z * (1 - s))
        case ("gelu", "tanh"):
            k = math.sqrt(2 / math.pi)
            t = torch.tanh(k * (z + 0.044715 * z**3))
            return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * k * (1 + 3 * 0.044715 * z * z)
        case _:
            density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
            return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
