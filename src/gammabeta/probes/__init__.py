"""Instruments: one file each, a function of one training step.

To add one, write a file here whose docstring states formula, source and cost, with a function
``measure(step, memory) -> dict[str, Tensor]``, and list it in the table below. ``step`` is a
:class:`~.step.Step`; ``memory`` is the probe's own dict, which a recorder keeps from call to call
and which is empty when called by hand. Keys are ``"<layer>/<quantity>"`` or, for the whole
network, ``"<quantity>"``. What cannot be had, for want of history or of an optimizer, is absent.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from gammabeta.probes.step import Step

Probe = Callable[["Step", MutableMapping[str, Any]], dict[str, Tensor]]

# name -> module of this folder
PROBES = {
    "covariate_shift": "covariate_shift",
    "gradients": "gradients",
    "influence": "influence",
    "interaction": "interaction",
    "jacobian": "jacobian",
    "smoothness": "smoothness",
    "statistics_noise": "statistics_noise",
    "weights": "weights",
}


def probe(name: str) -> Probe:
    """The function ``measure`` of the probe of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PROBES:
        raise ValueError(
            f"gammabeta: a probe is a function or one of {', '.join(PROBES)}, got {name!r}."
        )
    function: Probe = import_module(f"gammabeta.probes.{PROBES[name]}").measure
    return function


def measure(
    step: Step, which: str | Probe, memory: MutableMapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Measure one training step with one probe.

    Args:
        step: what to measure.
        which: the name of a probe, or a function ``f(step, memory) -> dict[str, Tensor]``;
            parameters of a probe are set with ``functools.partial``.
        memory: the probe's own dict, to be given again at the next step for quantities that need
            history. None is an empty one.

    Returns:
        The quantities by name, ``"<layer>/<quantity>"`` or ``"<quantity>"``, detached, on the CPU.

    Raises:
        ValueError: there is no probe of that name.
        TypeError: a probe returned something else.

    >>> import torch, gammabeta as gb
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    >>> step = gb.Step(model, torch.nn.MSELoss(), (torch.ones(2, 1), torch.zeros(2, 1)))
    >>> half = lambda step, memory: {"half": step.loss / 2}
    >>> bool(gb.measure(step, half)["half"] * 2 == step.loss)
    True
    """
    function = probe(which) if isinstance(which, str) else which
    found = function(step, {} if memory is None else memory)
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise TypeError(
            f"gammabeta.measure: a probe must return a dict of tensors by name, got {found!r:.200} "
            f"from {getattr(function, '__name__', function)!r}. Return {{}} where there is nothing."
        )
    return {key: value.detach().cpu() for key, value in found.items()}
