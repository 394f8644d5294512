"""How far the step of one layer moves what the layers after it receive.

Layer k alone makes the optimizer's next step; everything else stays, and so does the batch. Of
each unit i of the input of weight layer l, in training mode, let μᵢ, σᵢ be mean and standard
deviation over the batch before, μᵢ′, σᵢ′ after:

    mean[k, l] = median over i of |μᵢ′ − μᵢ|/σᵢ,    spread[k, l] = median over i of |ln σᵢ′/σᵢ|.

A layer's gradient says what its step does while the others stay. What its step does to the
statistics that later layers were trained on is in none of their gradients: the argument for
normalization that Goodfellow et al. make. Where a normalization is the last thing before layer l,
only its own γ and β can move these numbers; behind an activation, what earlier layers do comes
through as far as it changes the shape of the distribution.

Rows k are all layers with trainable parameters, normalization layers too, columns l the weight
layers, both in the order of the forward pass. A unit is a channel of a convolution's input, a
feature of any other's. One that is constant before and after and does not move is left out; one
that was constant and moves counts as infinite. An entry where no unit is left is 0.

Quantities, all of which need an optimizer, or ``relative``:
    ``mean``: (K, L), in standard deviations. Exactly 0 for layers that come before k, and k itself.
    ``spread``: (K, L), natural logarithm: 0.01 is 1 %.
    ``<layer k>/sent_mean``, ``<layer k>/sent_spread``: mean over the weight layers after k, 0
        where there is none. Together they name the rows.
    ``<layer l>/received_mean``, ``<layer l>/received_spread``: sum over the rows, what the steps
        of all layers do to l, one at a time. Together they name the columns.

Healthy is a small fraction of a standard deviation; at a tenth and more, layer l's gradient was
taken for another distribution than the one its step meets. Numbers grow in proportion to the
learning rate: compare networks at equal ``relative``.

A weight layer whose weight is used without calling the layer has a row, but no column; of one
called several times the first call counts. In float32, entries below 1e-6 are rounding.

Cost: 2 + K forward passes beside the step's own, and one virtual step; on a ResNet-20, K = 43, the
time of about 35 training steps. Memory: the inputs of all weight layers, of one pass at a time. A
record holds up to 10,000 entries: with more than 100 layers, group them with ``layers``.

Sources: Goodfellow, Bengio & Courville 2016, "Deep Learning", Sec. 8.7.1; Ioffe & Szegedy 2015,
Sec. 1 (arXiv 1502.03167).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gammabeta.moments import Moments
from gammabeta.probes._moves import check_rule, in_units, layers_of, over_units, received, targets
from gammabeta.probes.step import Step


def measure(
    step: Step,
    memory: MutableMapping[str, Any],
    *,
    layers: Sequence[str] | None = None,
    relative: float | None = None,
    over: str = "median",
) -> dict[str, Tensor]:
    """Measure how each layer's own step moves what later layers receive; see the module.

    Args:
        step: the training step.
        memory: not used.
        layers: names of modules, blocks perhaps, whose parameters move together as one row.
        relative: length of each layer's step as a share of its weights' norm, in place of the
            optimizer's length; without an optimizer the direction is that of −gradient.
        over: "median", "mean" or "rms" over units.

    Raises:
        ValueError: unknown or overlapping layers, a ``relative`` or ``over`` that cannot be.
    """
    check_rule(over)
    rows = layers_of(step, layers)
    moved = targets(step, rows, relative)
    if moved is None or not rows:
        return {}
    before = _moments(step, {})
    mean, spread = (torch.zeros(len(rows), len(before), dtype=torch.float64) for _ in range(2))
    for k, row in enumerate(rows):
        after = _moments(step, {name: moved[name] for name in row.parameters})
        for at, layer in enumerate(before):
            if layer not in after:  # a forward that depends on data left it out
                continue
            shift, widening, counted = _changes(before[layer], after[layer])
            mean[k, at] = over_units(shift, counted, over)
            spread[k, at] = over_units(widening, counted, over)
    result = {"mean": mean, "spread": spread}
    for k, row in enumerate(rows):
        later = [at for at, layer in enumerate(before) if layer in row.later]
        for key, matrix in (("mean", mean), ("spread", spread)):
            result[f"{row.name}/sent_{key}"] = matrix[k, later].sum() / max(len(later), 1)
    for at, layer in enumerate(before):
        result[f"{layer}/received_mean"] = mean[:, at].sum()
        result[f"{layer}/received_spread"] = spread[:, at].sum()
    return result


def _moments(step: Step, parameters: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of the units that each weight layer receives."""
    inputs = step.run(parameters, watch=step.weights).inputs
    found = {}
    for layer, units in received(step, inputs).items():
        moments = Moments.of(units.T)
        found[layer] = moments.mean.cpu(), moments.var().sqrt().cpu()
    return found


def _changes(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each unit: shift of the mean, change of the spread, and whether it counts."""
    (mean, std), (new_mean, new_std) = before, after
    shift = in_units((new_mean - mean).abs(), std)
    widening = torch.where(new_std == std, 0.0, (new_std / std).log().abs())
    still = (std == 0) & (new_std == 0) & (new_mean == mean)
    return shift, widening, ~still
