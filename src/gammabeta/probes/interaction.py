"""How much the joint step of all layers differs from the sum of their steps one at a time.

The optimizer's next step is d = (d₁, …, d_K) by layer, normalization layers too, with loss L, its
gradient g and Hessian H at θ, all in training mode on the step's batch:

    joint = L(θ + d) − L(θ),    separate = Σₖ (L(θ + dₖ) − L(θ)),
    interaction = joint − separate,    relative = interaction/|gᵀd|,
    first_order = gᵀd,    second_order = ½ dᵀHd,    pairs[k, l] = dₖᵀHd_l,
    second_order_interaction = ½ Σ pairs[k, l] over k ≠ l.

A gradient holds for each layer while the others stay, and then all move at once. The interaction
is what that costs, or gives: all terms of the expansion that join several layers. For a chain of
one-unit linear layers and L = y = x w₁⋯w_K, a step −ε g gives exactly

    interaction = x Πₖ (wₖ − ε gₖ) − x Πₖ wₖ + ε Σₖ gₖ²,
    pairs[k, l] = ε² gₖ g_l x Π wᵢ over i ≠ k, l,    pairs[k, k] = 0.

Quantities, all of which need an optimizer, or ``relative``:
    ``joint``, ``separate``, ``interaction``, ``first_order``, ``second_order``,
    ``second_order_interaction``: in units of the loss. Healthy is joint < 0; joint > 0 while
        separate < 0 is a step that fails only because all layers make it together.
    ``relative``: absent where gᵀd = 0. Healthy is well below 1 in size; −1 doubles what the
        gradient promised, 1 undoes it.
    ``pairs``: (K, K), symmetric; which layers disturb (> 0) or help (< 0) each other.
    ``<layer>/alone``: L(θ + dₖ) − L(θ). Together they name the rows of ``pairs``.
    ``<layer>/after_below``: what the layer's step adds when all layers before it have made theirs,
        L(θ + d₁ + … + dₖ) − L(θ + d₁ + … + dₖ₋₁); positive where alone is negative: its update was
        stale. They add up to joint.

In float32, differences of the loss below 1e-7 times the loss and the number of layers are
rounding; the terms of first and second order have no such limit.

Cost: 2K + 1 forward passes beside the step's own, one virtual step, and for what is of second order
one forward and backward pass with its graph kept and K backward passes through that, each about
two backward passes; on a ResNet-20, K = 43, the time of about 110 training steps, and of 50 with
``second_order=False``. Memory: that graph, two to three times a training step's. A record holds up
to 10,000 entries: with more than 100 layers, group them with ``layers``, which costs less, too.

Sources: Goodfellow, Bengio & Courville 2016, "Deep Learning", Sec. 8.7.1 (the chain, and its
second-order term); Santurkar et al. 2018, Sec. 2.2 (arXiv 1805.11604), for layers updated before
others.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gammabeta.probes._moves import Layer, dot, layers_of, targets
from gammabeta.probes.step import Step


def measure(
    step: Step,
    memory: MutableMapping[str, Any],
    *,
    layers: Sequence[str] | None = None,
    relative: float | None = None,
    second_order: bool = True,
) -> dict[str, Tensor]:
    """Measure how far the layers' steps are from adding up; see the module.

    Args:
        step: the training step.
        memory: not used.
        layers: names of modules, blocks perhaps, that count as one layer each; what is in none of
            them does not move.
        relative: length of each layer's step as a share of its weights' norm, in place of the
            optimizer's length; without an optimizer the direction is that of −gradient.
        second_order: False leaves out what takes second derivatives.

    Raises:
        ValueError: unknown or overlapping layers, or a ``relative`` that cannot be.
        RuntimeError: something in the model has no second derivative.
    """
    parts = layers_of(step, layers)
    moved = targets(step, parts, relative)
    if moved is None or not parts:
        return {}
    result = _losses(step, parts, moved)
    steps = {name: moved[name].double() - step.parameters[name].double() for name in moved}
    first = dot((step.gradients[name] for name in steps), steps.values())
    result["first_order"] = first
    if first != 0:
        result["relative"] = result["interaction"] / first.abs()
    if second_order:
        pairs = _pairs(step, parts, steps)
        result["pairs"] = pairs
        result["second_order"] = pairs.sum() / 2
        result["second_order_interaction"] = (pairs.sum() - pairs.trace()) / 2
    return {key: value.cpu() for key, value in result.items()}


def _losses(step: Step, parts: list[Layer], moved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Changes of the loss: of each layer alone, of each after those before it, and of all."""
    result: dict[str, Tensor] = {}
    below: dict[str, Tensor] = {}
    start = latest = step.run().loss.double()
    for part in parts:
        own = {name: moved[name] for name in part.parameters}
        alone = loss = step.run(own).loss.double()
        if below:
            loss = step.run(below | own).loss.double()
        result[f"{part.name}/alone"] = alone - start
        result[f"{part.name}/after_below"] = loss - latest
        below |= own
        latest = loss
    separate = torch.stack([result[f"{part.name}/alone"] for part in parts]).sum()
    result["joint"] = latest - start
    result["separate"] = separate
    result["interaction"] = result["joint"] - separate
    return result


def _pairs(step: Step, parts: list[Layer], steps: dict[str, Tensor]) -> Tensor:
    """dₖᵀHd_l for all pairs of layers, by products of the Hessian with each dₖ."""
    leaves = {name: step.parameters[name].clone().requires_grad_() for name in steps}
    # inside, for activation checkpoints, which run the forward again with the same parameters
    with torch.enable_grad():
        loss = step.run(leaves, graph=True).loss
        with step._held.running(leaves):
            try:
                return _products(loss, leaves, parts, steps)
            except RuntimeError as error:
                raise RuntimeError(
                    f"gammabeta.interaction: second derivatives of the loss must exist, got "
                    f"{str(error)!r:.200}. Measure with second_order=False."
                ) from error


def _products(
    loss: Tensor, leaves: dict[str, Tensor], parts: list[Layer], steps: dict[str, Tensor]
) -> Tensor:
    pairs = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    if not loss.requires_grad:
        return pairs
    found = torch.autograd.grad(
        loss, list(leaves.values()), create_graph=True, materialize_grads=True
    )
    if _cut(found):
        raise RuntimeError("a function whose backward can only be run once")
    gradients = dict(zip(leaves, found, strict=True))
    for k, part in enumerate(parts):
        # a gradient that depends on no parameter has no row
        names = [name for name in part.parameters if gradients[name].requires_grad]
        if not names:
            continue
        products = torch.autograd.grad(
            [gradients[name] for name in names],
            list(leaves.values()),
            [steps[name].to(gradients[name].dtype) for name in names],
            retain_graph=True,
            materialize_grads=True,
        )
        row = dict(zip(leaves, products, strict=True))
        for at, other in enumerate(parts):
            own = other.parameters
            pairs[k, at] = dot((row[name] for name in own), (steps[name] for name in own))
    return (pairs + pairs.T) / 2


def _cut(tensors: Sequence[Tensor]) -> bool:
    """Whether a function marked ``once_differentiable`` lies in the graph behind these.

    Its second derivative is an error that PyTorch raises only on ways that it follows: products
    with respect to chosen tensors leave it out, and would be wrong in silence.
    """
    waiting = [tensor.grad_fn for tensor in tensors]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        waiting += [behind for behind, _ in node.next_functions]
    return False
