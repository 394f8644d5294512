"""How smooth the loss is along the gradient: its range, the gradient's change, effective β.

From the parameters θ with gradient g = ∇L(θ), the probe walks along −g and looks at the loss and at
the gradient g_s = ∇L(θ_s) at several distances s, of the same batch:

    θ_s = θ − s·lr·g,    range = max_s L(θ_s) − min_s L(θ_s),
    change = max_s ‖g_s − g‖,    β = max_s ‖g_s − g‖/‖θ_s − θ‖.

These depend on the scale of the weights, which the loss does not where a normalization follows:
a·W has a gradient a times smaller and the same function. Scale-free, each weight W of two or more
axes moves by the same share ε of its own norm, all else stays, and gradients are taken with respect
to W/‖W‖, as lengths of moves are:

    W_ε = W − ε ‖W‖ G/‖G‖,    change = max_ε √Σ ‖W‖²‖G_ε − G‖²,
    β = max_ε √Σ ‖W‖²‖G_ε − G‖² / (ε √(number of weights that move)).

Quantities, for the walk as published (learning rate, all parameters of the optimizer):
    ``loss_lowest``, ``loss_highest``, ``loss_range``: over the distances, in units of the loss.
    ``gradient_change``: the largest, ‖∇L‖'s unit. Small beside ``gradient_norm``, the gradient can
        be trusted as far as the walk goes.
    ``gradient_norm``: ‖g‖ over the same parameters.
    ``beta``: effective β-smoothness; plain gradient descent is stable up to lr = 2/β.
    ``losses``, ``gradient_changes``: at each distance.
and scale-free, all in units of the loss:
    ``relative_loss_lowest``, …, ``relative_gradient_changes``: the same of the other walk;
    ``<layer>/relative_gradient_change``, ``<layer>/relative_beta``: the part of one weight, of the
        same walk, where all weights move.

The published walk needs a learning rate, of the optimizer or given; without one its quantities are
absent. A β is absent where nothing moves, for want of a gradient. Networks with and without
normalization are to be compared by the scale-free walk.

Cost: one forward and backward pass for each distance of both walks, besides that at θ. Memory: the
gradients of one point more.

Sources: Santurkar et al. 2018, "How Does Batch Normalization Help Optimization?", Sec. 3 and
Appendix A (arXiv 1805.11604): distances of 1/2 to 4 learning rates for VGG, 1/100 to 30 for the
deep linear network; van Laarhoven 2017, Sec. 3 (arXiv 1706.05350), for the scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gammabeta.probes.step import Step
from gammabeta.probes.weights import matrices, norm


def measure(
    step: Step,
    memory: MutableMapping[str, Any],
    *,
    distances: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    relative: Sequence[float] = (0.003, 0.01, 0.03, 0.1),
    lr: float | None = None,
) -> dict[str, Tensor]:
    """Measure the loss and its gradient along the gradient; see the module.

    Args:
        step: the training step.
        memory: not used.
        distances: in learning rates, of the walk as published; () leaves it out.
        relative: in norms of each weight, of the scale-free walk; () leaves it out.
        lr: the learning rate of all parameters; None takes that of the optimizer's groups.

    Raises:
        ValueError: a distance or learning rate that is not a positive number, or an optimizer of
            other parameters.

    >>> import torch, gammabeta as gb
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 3.0)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    >>> batch = torch.ones(2, 1), torch.zeros(2, 1)  # the loss is w²
    >>> step = gb.Step(model, torch.nn.MSELoss(), batch, optimizer=optimizer)
    >>> found = gb.measure(step, "smoothness")
    >>> found["losses"].tolist(), found["beta"].item(), found["gradient_change"].item()
    ([6.890625, 5.0625, 2.25, 0.0], 2.0, 6.0)
    >>> round(found["relative_beta"].item(), 3)  # β·‖w‖²
    18.0
    """
    for name, values in (
        ("distances", distances),
        ("relative", relative),
        ("lr", () if lr is None else (lr,)),
    ):
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise ValueError(
                f"smoothness: {name} must be positive numbers, got {values!r}. The walk goes down "
                "the gradient."
            )
    result: dict[str, Tensor] = {}
    rates = _rates(step, lr)
    if rates and distances:
        descent = {name: -rate * step.gradients[name] for name, rate in rates.items()}
        one = {name: torch.ones_like(norm(move)) for name, move in descent.items()}
        result |= _walk(step, descent, one, distances, "")
    if relative:
        result |= _relative(step, relative)
    return {key: value.cpu() for key, value in result.items()}


def _rates(step: Step, lr: float | None) -> dict[str, float]:
    """The learning rate of each trainable parameter that is trained with one."""
    if lr is not None:
        return dict.fromkeys(step.parameters, lr)
    if step.optimizer is None:
        return {}
    groups = step.optimizer.param_groups
    rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
    named = step.model.named_parameters()
    found = {n: rates[id(p)] for n, p in named if id(p) in rates and n in step.parameters}
    if not found:
        raise ValueError(
            "smoothness: the optimizer must hold parameters of the model, got one that holds none "
            "of the trainable ones. Give the optimizer that trains this model, or lr=."
        )
    return found


def _relative(step: Step, distances: Sequence[float]) -> dict[str, Tensor]:
    """The scale-free walk: each weight by the same share of its norm."""
    names = matrices(step)
    sizes = {name: norm(step.parameters[name]) for name in names.values()}
    slopes = {name: norm(step.gradients[name]) for name in names.values()}
    moving = {n: sizes[n] / slopes[n] for n in sizes if sizes[n] != 0 and slopes[n] != 0}
    if not moving:
        return {}
    descent = {name: -(share * step.gradients[name]) for name, share in moving.items()}
    layers = {name: layer for layer, name in names.items() if name in moving}
    return _walk(step, descent, sizes, distances, "relative_", layers)


def _walk(
    step: Step,
    direction: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    distances: Sequence[float],
    prefix: str,
    layers: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """What a walk along ``direction`` meets.

    Args:
        direction: of each parameter that moves, its move at distance 1.
        scales: by parameter, the unit in which its moves are measured, and the inverse of that of
            its gradients.
        prefix: of the names of the quantities.
        layers: parameter to name of those whose own part is wanted; they move by 1 at distance 1.
    """
    losses: list[Tensor] = []
    changes: list[dict[str, Tensor]] = []
    for distance in distances:
        # one after the other: each point holds the gradients of all parameters
        (point,) = step.along(direction, [distance])
        losses.append(point.loss.to(torch.float64))
        changes.append(
            {n: scales[n] * norm(point.gradients[n] - step.gradients[n]) for n in direction}
        )
    rows = torch.tensor(distances, dtype=torch.float64, device=losses[0].device)
    loss, change = torch.stack(losses), torch.stack([_root(c.values()) for c in changes])
    length = _root(norm(move) / scales[name] for name, move in direction.items())
    result = {
        "loss_lowest": loss.min(),
        "loss_highest": loss.max(),
        "loss_range": loss.max() - loss.min(),
        "losses": loss,
        "gradient_norm": _root(scales[n] * norm(step.gradients[n]) for n in direction),
        "gradient_change": change.max(),
        "gradient_changes": change,
    }
    if length != 0:
        result["beta"] = (change / (rows * length)).max()
    result = {prefix + name: value for name, value in result.items()}
    for name, layer in (layers or {}).items():
        own = torch.stack([c[name] for c in changes])
        result[f"{layer}/{prefix}gradient_change"] = own.max()
        result[f"{layer}/{prefix}beta"] = (own / rows).max()
    return result


def _root(norms: Iterable[Tensor]) -> Tensor:
    """The norm of what has parts of these norms."""
    return torch.stack(list(norms)).square().sum().sqrt()
