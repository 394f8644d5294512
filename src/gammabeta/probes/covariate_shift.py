"""How far the distribution of what a layer receives moves, and how far its gradient does.

Two things are called internal covariate shift, and they need not agree.

**By distribution** (Ioffe & Szegedy). Of each unit of the input of each weight layer, in training
mode, let F be the distribution over the batch at one measurement and F′ at a later one, μ, σ mean
and standard deviation, at the earlier one where nothing else is said:

    W₁ = ∫₀¹ |F⁻¹(u) − F′⁻¹(u)| du,    shift = W₁/σ,    path = Σ of shift over the measurements,
    shape = W₁ between (x − μ)/σ and (x′ − μ′)/σ′.

What the weights receive, not what a normalization gives: behind an activation, pooling or a
residual sum the two differ. Batch normalization right before the weights pins mean and spread to
β and γ by construction; ``shape`` is what it leaves free.

**By gradient** (Santurkar et al., Definition 2.1). Gₖ is the gradient of layer k, Gₖ′ the same on
the same batch, with its statistics taken anew, after all layers before k made the optimizer's next
step, and only they:

    gradient_shift = ‖Gₖ − Gₖ′‖,    gradient_relative = ‖Gₖ − Gₖ′‖/‖Gₖ‖,    cos(Gₖ, Gₖ′).

Quantities by distribution:
    ``<layer>/quantiles``: (units, 3) at 15, 50 and 85 % of each unit that is looked at.
    ``<layer>/shift``, ``<layer>/shape``: from the previous measurement to this, and
    ``<layer>/drift``: from the first to this, W₁/σ; aggregated over units. Healthy is that they
        become small beside 1 as training goes on.
    ``<layer>/path``: sum of the units' shifts up to now, and ``<layer>/path_median``,
        ``<layer>/path_iqr``: sums of |change of the median|/σ and of the interquartile range; lower
        bounds for the way through all steps. path much above drift: to and fro, or sampling.

All but the quantiles are absent at the first measurement. Units that were constant and are, at the
same value, are left out; one that was constant and is no longer counts as infinite. If no unit is
left the value is 0.

**The same batch.** Two batches of one distribution differ, too: by W₁/σ of 1.8/√n for n
independent Gaussian values. On the training batches shift and path hold that sampling; the first
layer, whose input no training moves, shows how much it is there. Shift alone is measured on a fixed
batch:

    from gammabeta.probes import covariate_shift
    probe = functools.partial(covariate_shift.measure, batch=(x, y))
    recorder = gammabeta.Recorder(model, optimizer=optimizer, probes=("weights", probe))

Its dropout masks still change from time to time.

Quantities by gradient, which need an optimizer, or ``relative``; of every weight layer with
trainable parameters that others come before, G holding all of its parameters:
    ``<layer>/gradient_shift``: in units of the gradient. Scales as 1/‖W‖ for weights in front of
        a normalization: no comparison between networks.
    ``<layer>/gradient_relative``, ``<layer>/gradient_cos``: free of scale; absent where a norm
        is 0. Healthy are 0 and 1: the layer steps where its gradient still points. Both depend on
        the length of the step: compare networks at equal ``relative``.

A layer whose weight is used without calling the layer has no input to look at; of one that is
called several times the first call counts.

Cost: by distribution one forward pass and a sort of at most ``units``·``values`` numbers a layer;
memory two times these. By gradient a forward and backward pass for each weight layer but the first,
one forward pass and one virtual step; on a ResNet-20 the time of about 1 and 25 training steps.

Sources: Ioffe & Szegedy 2015, Secs. 1, 4.1 and Fig. 1 (arXiv 1502.03167); Santurkar et al. 2018,
"How Does Batch Normalization Help Optimization?", Sec. 2.2, Definition 2.1 (arXiv 1805.11604).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gammabeta.probes._moves import (
    check_rule,
    dot,
    in_units,
    layers_of,
    norm,
    over_units,
    received,
    targets,
)
from gammabeta.probes.step import Step

_SHOWN = (0.15, 0.5, 0.85)
_WAYS = ("distribution", "gradient")


def quantiles(ordered: Tensor, levels: Sequence[float]) -> Tensor:
    """Quantiles of each row of ``ordered``, linear between its values.

    Args:
        ordered: (units, n), each row in ascending order.
        levels: between 0 and 1.

    Returns:
        (units, levels)

    >>> import torch
    >>> quantiles(torch.tensor([[0.0, 1.0, 4.0]]), [0.5, 0.75])
    tensor([[1.0000, 2.5000]])
    """
    place = torch.tensor(levels, dtype=torch.float64) * (ordered.shape[1] - 1)
    low = place.floor().long()
    high = place.ceil().long()
    return torch.lerp(ordered[:, low], ordered[:, high], (place - low).to(ordered.dtype))


def wasserstein(one: Tensor, other: Tensor) -> Tensor:
    """Wasserstein-1 distance between the empirical distributions of each row: W₁ = ∫|F⁻¹ − G⁻¹|.

    Args:
        one: (units, n), each row in ascending order.
        other: (units, m), the same; m may differ from n.

    Returns:
        (units,), in the units of the values.

    >>> import torch
    >>> wasserstein(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([1.5000])

    Source: Vallender 1974, "Calculation of the Wasserstein distance between probability
    distributions on the line", Theory of Probability and its Applications 18(4).
    """
    n, m = one.shape[1], other.shape[1]
    if n == m:
        return (one - other).abs().mean(1)
    # both quantile functions are constant between the levels i/n and j/m, here times n·m
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).sort().values
    widths = ends.diff(prepend=ends.new_zeros(1)).to(one)
    here, there = (ends - 1) // m, (ends - 1) // n
    distance: Tensor = ((one[:, here] - other[:, there]).abs() * widths).sum(1) / (n * m)
    return distance


def measure(
    step: Step,
    memory: MutableMapping[str, Any],
    *,
    by: Sequence[str] = _WAYS,
    batch: Any = None,
    units: int | None = 64,
    values: int | None = 1024,
    over: str = "median",
    relative: float | None = None,
) -> dict[str, Tensor]:
    """Measure the shift of what each weight layer receives, and of its gradient; see the module.

    Args:
        step: the training step.
        memory: keeps the first and the latest values of each unit and its path; {} for one look.
        by: "distribution", "gradient" or both.
        batch: look at the distribution on this batch, in the form of the step's own, always the
            same. None takes the step's own.
        units, values: look at no more units a layer and values a unit than that, always the same
            ones, drawn at random; None takes all.
        over: "median", "mean" or "rms" over units.
        relative: length of each layer's step as a share of its weights' norm, in place of the
            optimizer's length; without an optimizer the direction is that of −gradient.

    Raises:
        ValueError: a keyword that cannot be, or a memory of a layer with other units.
    """
    check_rule(over)
    unknown = [way for way in by if way not in _WAYS]
    if unknown or isinstance(by, str) or not by:
        raise ValueError(
            f"covariate_shift: by must be a tuple of {' and '.join(map(repr, _WAYS))}, got {by!r}."
        )
    for name, limit in (("units", units), ("values", values)):
        if limit is not None and limit < 1:
            raise ValueError(f"covariate_shift: {name} must be 1 or more, or None, got {limit!r}.")
    result: dict[str, Tensor] = {}
    if "distribution" in by:
        result |= _by_distribution(step, memory, batch, units, values, over)
    if "gradient" in by:
        result |= _by_gradient(step, relative)
    return {key: value.cpu() for key, value in result.items()}


# -- by distribution ------------------------------------------------------------------------


def _by_distribution(
    step: Step,
    memory: MutableMapping[str, Any],
    batch: Any,
    units: int | None,
    values: int | None,
    over: str,
) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    now = {
        layer: _ordered(x, units, values)
        for layer, x in received(step, _inputs(step, batch)).items()
    }
    first, latest, path = (dict(memory.get(key, {})) for key in ("first", "latest", "path"))
    for layer, new in now.items():
        result[f"{layer}/quantiles"] = quantiles(new, _SHOWN)
        if layer not in first:
            first[layer], path[layer] = new, new.new_zeros(3, len(new))
            continue
        old, start = latest[layer], first[layer]
        if len(old) != len(new):
            raise ValueError(
                f"covariate_shift: a layer must have as many units as before, got {len(new)} at "
                f"{layer!r} after {len(old)}. Begin with a new memory for another model."
            )
        shift, drift = _shift(old, new), _shift(start, new)
        moved = [_change(old, new, (0.5,)), _change(old, new, (0.25, 0.75))]
        path[layer] = path[layer] + torch.stack([shift, *moved])
        alive = (old[:, 0] != old[:, -1]) | (new[:, 0] != new[:, -1]) | (old[:, 0] != new[:, 0])
        result[f"{layer}/shift"] = over_units(shift, alive, over)
        result[f"{layer}/shape"] = over_units(wasserstein(*map(_standard, (old, new))), alive, over)
        result[f"{layer}/drift"] = over_units(drift, alive | (drift != 0), over)
        for key, sums in zip(("path", "path_median", "path_iqr"), path[layer], strict=True):
            result[f"{layer}/{key}"] = over_units(sums, alive | (path[layer][0] != 0), over)
    memory.update(first=first, latest={**latest, **now}, path=path)
    return result


def _inputs(step: Step, batch: Any) -> dict[str, Tensor]:
    """What each weight layer receives: of the step's batch, or of another."""
    seen = step
    if batch is not None:
        seen = Step(step.model, step._loss_fn, batch, forward=step._forward)
    return seen.run(watch=step.weights).inputs


def _ordered(x: Tensor, units: int | None, values: int | None) -> Tensor:
    """The chosen values of the chosen units of x (units, values), each row in ascending order."""
    for axis, limit in enumerate((units, values)):
        total = x.shape[axis]
        if limit is not None and total > limit:
            # at random: a regular choice of pixels may be one column of the image
            draw = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:limit]
            x = x.index_select(axis, draw.sort().values.to(x.device))
    return x.to("cpu", torch.float64).sort(1).values


def _spread(ordered: Tensor) -> Tensor:
    """Standard deviation of each row, exactly 0 if its values are all the same."""
    std = ordered.std(1, correction=0)
    return torch.where(ordered[:, 0] == ordered[:, -1], 0.0, std)


def _shift(old: Tensor, new: Tensor) -> Tensor:
    return in_units(wasserstein(old, new), _spread(old))


def _change(old: Tensor, new: Tensor, levels: Sequence[float]) -> Tensor:
    """|Change of a quantile, or of the difference of two|, in standard deviations."""
    before, after = quantiles(old, levels), quantiles(new, levels)
    change = (after[:, -1] - before[:, -1]).abs()
    if len(levels) == 2:
        change = (after.diff(dim=1) - before.diff(dim=1)).abs().squeeze(1)
    return in_units(change, _spread(old))


def _standard(ordered: Tensor) -> Tensor:
    """(x − μ)/σ of each row; 0 in a constant one."""
    centered = ordered - ordered.mean(1, keepdim=True)
    spread = _spread(ordered)[:, None]
    return torch.where(spread == 0, 0.0, centered / spread)


# -- by gradient ----------------------------------------------------------------------------


def _by_gradient(step: Step, relative: float | None) -> dict[str, Tensor]:
    layers = layers_of(step)
    moved = targets(step, layers, relative)
    result: dict[str, Tensor] = {}
    below: dict[str, Tensor] = {}
    if moved is None:
        return result
    for layer in layers:
        names = layer.parameters
        if layer.name in step.weights and below:
            before = [step.gradients[name] for name in names]
            _, gradients = step.gradient(below)
            after = [gradients[name] for name in names]
            change = norm(a - b for a, b in zip(after, before, strict=True))
            sizes = norm(before), norm(after)
            result[f"{layer.name}/gradient_shift"] = change
            if sizes[0] > 0:
                result[f"{layer.name}/gradient_relative"] = change / sizes[0]
                if sizes[1] > 0:
                    cosine = dot(before, after) / (sizes[0] * sizes[1])
                    result[f"{layer.name}/gradient_cos"] = cosine.clamp(-1, 1)
        below |= {name: moved[name] for name in names}
    return result
