"""How large the gradients are, how they change with depth, and which units let none through.

For the gradient G = ∂L/∂W of each weight layer l = 0, 1, … in the order of the forward pass:

    mean_abs = mean |G|,    norm = ‖G‖,    scaled = ‖G‖·‖W‖,
    slope = least-squares slope of log₁₀ norm against depth, counted from the output back.

A norm alone says nothing when networks differ in scale: twice the weight in front of a
normalization, half the gradient. ‖G‖·‖W‖, the change of the loss for a step of the size of the
weight, does not depend on it.

Quantities:
    ``<layer>/mean_abs``, ``<layer>/norm``: in units of the loss over those of W.
    ``<layer>/scaled``: in units of the loss.
    ``slope``, ``slope_scaled``: decades per weight layer of a walk from the output to the input, of
        norm and scaled. Negative: gradients vanish on their way back; positive: they explode.
        Healthy is a slope times depth within about ±2. A chain of batch normalization and ReLU
        starts at half the log₁₀ of :func:`mean_field_growth`, +0.08 to +0.13. Absent with fewer
        than two layers that have a gradient.
    ``zero_layers``: how many weight layers have a gradient of exactly 0 and are left out of the
        slopes; more than none means that part of the network does not learn.
    ``<site>/dead``: share of units behind the normalization whose activation has derivative 0 for
        all samples and positions of the batch: they pass no gradient on. Healthy is less than a
        tenth; where β = 0, none but constant channels can be dead behind a batch normalization.
    ``<site>/saturated``: share of units whose derivative is below ``threshold`` times the largest
        slope that the activation has anywhere, for all samples and positions; contains the dead.
        For sigmoid and 1 %, |z| > 5.99; for tanh, |z| > 2.99.
    ``dead``, ``saturated``: the same over all units of all sites.

A unit is a channel (a feature, behind layer normalization). Only sites that a known elementwise
activation with PyTorch's default parameters follows directly have these shares.

Cost: one forward and backward pass, shared with all else that the step is asked for; then a few
passes over gradients and activations. Memory: that of gradients and activations.

Sources: Glorot & Bengio 2010, "Understanding the difficulty of training deep feedforward neural
networks", Secs. 3 and 4.2 (saturation; gradients against depth); Ioffe & Szegedy 2015,
Sec. 3.3 (arXiv 1502.03167) for the scale; Yang et al. 2019, Sec. 4 (arXiv 1902.08129) for the slope
that batch normalization has at initialization.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gammabeta._sites import Site
from gammabeta.probes.step import Activation, Step
from gammabeta.probes.weights import matrices, norm

_ACTIVATIONS = frozenset(
    (
        *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "silu", "gelu", "mish", "softplus"),
        *("softsign", "sigmoid", "logsigmoid", "tanh", "hardtanh", "hardsigmoid", "hardswish"),
    )
)
# Inverse functions, for fused layers; for ReLUs only the sign matters.
_INVERSE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda a: a,
    "leaky_relu": lambda a: torch.where(a > 0, a, 100 * a),
    "sigmoid": torch.logit,
    "tanh": torch.atanh,
    "softplus": lambda a: a + torch.log(-torch.expm1(-a)),
}


def slope(values: Sequence[Tensor]) -> Tensor | None:
    """Least-squares slope of log₁₀ of positive values against 0, −1, −2, …: from last to first.

    Values of 0 are left out, with their place kept; None if fewer than two remain.

    >>> import torch
    >>> slope([torch.tensor(1.0), torch.tensor(0.0), torch.tensor(100.0)])
    tensor(-1., dtype=torch.float64)
    """
    sizes = torch.stack(list(values)).to(torch.float64) if values else torch.zeros(0)
    depth = -torch.arange(len(sizes), dtype=torch.float64, device=sizes.device)
    kept = sizes > 0
    if int(kept.sum()) < 2:
        return None
    depth, height = depth[kept], sizes[kept].log10()
    depth = depth - depth.mean()
    return (depth @ height) / (depth @ depth)


def mean_field_growth(batch: int) -> float:
    """Growth per layer of the squared gradient in deep ReLU networks at initialization.

    In an infinitely wide chain of Gaussian weights, batch normalization (γ = 1, β = 0, eps = 0)
    over B samples and ReLU, E‖∂L/∂y‖² for the outputs y of the layers grows on its way from the
    output to the input by a factor that tends, with depth and whatever the loss, to

        (B − 2 + 2p + 2κ) / ((B − 3)(1 − 2κ)),    c = −1/(B − 1),
        p = 1/4 + arcsin(c)/2π,    κ = (√(1 − c²) + c (π − arccos c))/2π,

    and to π/(π − 1) for large B. So does the squared norm of ∂L/∂W. The normalized values of a
    unit are uniform on a sphere, any two with correlation c: p is the probability that both are
    positive, κ the mean of the product of their ReLUs, 1/2 − κ the share of the variance of the
    next pre-activations that their normalization keeps.

    Args:
        batch: samples per batch, B.

    Raises:
        ValueError: fewer than 4 samples, with which the expectation is infinite.

    >>> [round(mean_field_growth(batch), 3) for batch in (8, 16, 64, 256)]
    [1.788, 1.59, 1.493, 1.473]

    Source: Yang et al. 2019, "A Mean Field Theory of Batch Normalization", Theorem 8
    (arXiv 1902.08129), evaluated in closed form.
    """
    if batch < 4:
        raise ValueError(
            f"mean_field_growth: the expectation is finite from 4 samples on, got {batch}. "
            "Use a larger batch."
        )
    c = -1 / (batch - 1)
    both = 0.25 + math.asin(c) / (2 * math.pi)
    product = (math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))) / (2 * math.pi)
    return (batch - 2 + 2 * both + 2 * product) / ((batch - 3) * (1 - 2 * product))


def derivative(activation: str, z: Tensor) -> Tensor | None:
    """The derivative of an activation, with PyTorch's default parameters, at each value of z.

    By automatic differentiation, so that it is the factor that a backward pass applies; None for
    an activation that is not known here.
    """
    if activation not in _ACTIVATIONS:
        return None
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (found,) = torch.autograd.grad(getattr(F, activation)(z).sum(), z)
    return found


@functools.cache
def steepest(activation: str) -> float:
    """The largest |derivative| of a known activation, over a grid from −10 to 10."""
    slopes = derivative(activation, torch.linspace(-10, 10, 20001, dtype=torch.float64))
    assert slopes is not None
    return float(slopes.abs().max())


def measure(
    step: Step, memory: MutableMapping[str, Any], *, threshold: float = 0.01
) -> dict[str, Tensor]:
    """Measure the gradients of every weight layer and the units that block them; see the module.

    Args:
        step: the training step.
        memory: not used.
        threshold: share of an activation's largest slope below which a unit counts as saturated.

    Raises:
        ValueError: the threshold is not between 0 and 1.
    """
    if not 0 < threshold < 1:
        raise ValueError(
            f"gradients: threshold must be a share of the largest slope, between 0 and 1, got "
            f"{threshold!r}. Usual is 0.01."
        )
    result: dict[str, Tensor] = {}
    norms, scaled = [], []
    for layer, name in matrices(step).items():
        gradient = step.gradients[name]
        norms.append(norm(gradient))
        scaled.append(norms[-1] * norm(step.parameters[name]))
        result[f"{layer}/mean_abs"] = gradient.abs().mean(dtype=torch.float64)
        result[f"{layer}/norm"] = norms[-1]
        result[f"{layer}/scaled"] = scaled[-1]
    for key, values in (("slope", norms), ("slope_scaled", scaled)):
        if (found := slope(values)) is not None:
            result[key] = found
    if norms:
        result["zero_layers"] = (torch.stack(norms) == 0).sum()
    result |= _blocked(step, threshold)
    return {key: value.cpu() for key, value in result.items()}


def _blocked(step: Step, threshold: float) -> dict[str, Tensor]:
    """Shares of dead and saturated units, by site and over all."""
    result: dict[str, Tensor] = {}
    every: list[Tensor] = []
    for site in step.sites:
        name, z = site.activation, _pre_activation(site, step.activations[site.name])
        slopes = None if name is None or z is None else derivative(name, z)
        if name is None or slopes is None:
            continue
        unit = slopes.dim() - 1 if isinstance(site.module, nn.LayerNorm) else 1
        highest = slopes.abs().amax([axis for axis in range(slopes.dim()) if axis != unit])
        units = torch.stack([highest == 0, highest < threshold * steepest(name)]).double()
        every.append(units)
        result |= {f"{site.name}/dead": units[0].mean(), f"{site.name}/saturated": units[1].mean()}
    if every:
        result["dead"], result["saturated"] = torch.cat(every, 1).mean(1)
    return result


def _pre_activation(site: Site, seen: Activation) -> Tensor | None:
    """What the known activation of a site is applied to; None if there is none."""
    name = site.activation
    if name not in _ACTIVATIONS:
        return None
    z = seen.output
    if getattr(site.module, "act", None) is not None:  # fused: what comes out is activated
        if name not in _INVERSE:
            return None
        z = _INVERSE[name](z)
    # an activation with other parameters than the defaults gives other values
    far = (getattr(F, name)(z) - seen.activated).abs().amax()
    return z if bool(far <= 0.01 * seen.activated.abs().amax()) else None
