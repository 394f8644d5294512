"""How large the weights are, how far they have moved, and how fast they turn.

For the weight W of a layer, measured at moments t = 0, 1, …:

    mean_abs = mean |W|,    norm = ‖W‖ (Frobenius),    growth = ‖W_t‖/‖W_0‖,
    path = Σ ‖W_t − W_{t−1}‖,    effective_lr = lr/‖W‖².

A weight that feeds a normalization is scale-invariant: a·W gives the same network for every
a > 0, its gradient is orthogonal to it, and under plain SGD ‖W‖² can only grow, by lr²‖∂L/∂W‖²
a step. What such a weight has is a direction, and SGD turns it at the effective learning rate
lr/‖W‖²: a growing norm is a decaying learning rate, weight decay is what holds it up. Under Adam,
whose steps do not depend on the size of the gradient, a step turns it by about lr/‖W‖ instead.

Quantities, each per weight layer:
    ``<layer>/mean_abs``, ``<layer>/norm``: in the units of W.
    ``<layer>/growth``: since the first measurement; absent at the first.
    ``<layer>/path``: length of the path through the measured moments in units of W, a lower bound
        for that of all steps; absent at the first. Much more than |growth − 1|·‖W_0‖ if the weight
        mostly turns or jitters.
    ``<layer>/effective_lr``: only with an optimizer, with the learning rate of the parameter's own
        group, and only of weights that are scale-invariant. Healthy is a value that neither falls
        by orders of magnitude while the loss is still high nor stays so large that one step turns
        the weight by more than a few hundredths of a radian.

Scale-invariant is tested, not guessed: what feeds a normalization (``Site.producer``) may reach it
through a residual sum, or be used elsewhere besides, and is then not scale-invariant
(:func:`scale_invariant`). The test is made once, at the first measurement with an optimizer.

Cost: the pass that the step makes for the order of its layers, shared with all else that it is
asked for, and a few passes over the weights; with an optimizer once one forward pass more, or, if
any weight fails, one more for each. Memory: one copy of the weights.

Sources: van Laarhoven 2017, "L2 Regularization versus Batch and Weight Normalization", Sec. 3
(arXiv 1706.05350); Hoffer et al. 2018, "Norm matters", Sec. 2 (arXiv 1803.01814); Arora, Li & Lyu
2019, "Theoretical Analysis of Auto Rate-Tuning by Batch Normalization", Lemma 2.4
(arXiv 1812.03981).
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from gammabeta.probes.step import Step

_PER_CHANNEL = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
# Behind a residual sum, scaling one summand changes the input by as much as the other is of the
# sum; rounding, and eps in the layers, change it by far less than this share.
_TOLERANCE = 0.02


def matrices(step: Step) -> dict[str, str]:
    """The trainable weight of each weight layer: layer name to parameter name, in forward order.

    A weight that is computed from parameters, by a parametrization, is none.
    """
    # Not by the attribute: that of a parametrized weight is computed anew, and spectral
    # normalization then moves its buffers.
    return {
        layer: name
        for layer, names in step.weights.items()
        for name in names
        if step.model.get_parameter(name)
        is step.model.get_submodule(layer)._parameters.get("weight")
    }


def norm(tensor: Tensor) -> Tensor:
    """Frobenius norm, summed in float64."""
    found: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return found


def scale_invariant(step: Step) -> set[str]:
    """The weight layers that feed a normalization and whose weight may be scaled by any a > 0.

    Returns:
        Names of those whose scaling changes nothing: all normalizations receive multiples of their
        inputs (multiples by channel, up to a constant, where they normalize by channel), which
        they undo, and the loss stays. Up to 2 %, for the sake of eps.
    """
    names = matrices(step)
    fed = list(dict.fromkeys(site.producer for site in step.sites if site.producer in names))
    # No two alike: summands of a residual sum that grow together would leave no trace in it.
    golden = (math.sqrt(5) - 1) / 2
    factors = {names[layer]: 2 * 16 ** (k * golden % 1) for k, layer in enumerate(fed)}
    if _changes_nothing(step, factors):
        return set(fed)
    return {layer for layer in fed if _changes_nothing(step, {names[layer]: 2.0})}


def _changes_nothing(step: Step, factors: dict[str, float]) -> bool:
    """Whether all layers normalize to what they did, and the loss stays, with scaled parameters."""
    scaled = {name: factor * step.parameters[name] for name, factor in factors.items()}
    run = step.run(scaled, watch=[site.name for site in step.sites])
    kept = abs(float(run.loss - step.loss)) <= _TOLERANCE * abs(float(step.loss))
    return kept and all(
        _is_multiple(run.inputs[site.name], step.activations[site.name].input, site.module)
        for site in step.sites
    )


def _is_multiple(after: Tensor, before: Tensor, module: nn.Module) -> bool:
    after, before = after.to(torch.float64), before.to(torch.float64)
    if isinstance(module, _PER_CHANNEL):
        after, before = (t.transpose(0, 1).flatten(1) for t in (after, before))
        after, before = (t - t.mean(1, keepdim=True) for t in (after, before))
    else:
        after, before = after.reshape(1, -1), before.reshape(1, -1)
    tiny = torch.finfo(torch.float64).tiny
    factor = (after * before).sum(1) / (before * before).sum(1).clamp(min=tiny)
    return bool(norm(after - factor[:, None] * before) <= _TOLERANCE * norm(after))


def measure(step: Step, memory: MutableMapping[str, Any]) -> dict[str, Tensor]:
    """Measure the weights of every weight layer; see the module.

    Args:
        step: the training step.
        memory: keeps the first norms, the latest weights and the path; {} for a single look.
    """
    result: dict[str, Tensor] = {}
    start: dict[str, Tensor] = memory.setdefault("start", {})
    latest: dict[str, Tensor] = memory.setdefault("latest", {})
    path: dict[str, Tensor] = memory.setdefault("path", {})
    rates = _rates(step)
    if rates and "invariant" not in memory and torch.isfinite(step.loss):
        memory["invariant"] = sorted(scale_invariant(step))
    for layer, name in matrices(step).items():
        weight = step.parameters[name]
        size = norm(weight)
        result[f"{layer}/mean_abs"] = weight.abs().mean(dtype=torch.float64)
        result[f"{layer}/norm"] = size
        if layer in start:
            path[layer] = path[layer] + norm(weight - latest[layer])
            result[f"{layer}/growth"] = size / start[layer]
            result[f"{layer}/path"] = path[layer]
        else:
            start[layer], path[layer] = size, torch.zeros_like(size)
        latest[layer] = weight.clone()
        if name in rates and layer in memory.get("invariant", ()):
            result[f"{layer}/effective_lr"] = rates[name] / size**2
    return {key: value.cpu() for key, value in result.items()}


def _rates(step: Step) -> dict[str, float]:
    """The learning rate of each parameter that the optimizer has, by name."""
    if step.optimizer is None:
        return {}
    rates = {id(p): group["lr"] for group in step.optimizer.param_groups for p in group["params"]}
    named = step.model.named_parameters()
    return {name: float(rates[id(p)]) for name, p in named if id(p) in rates}
