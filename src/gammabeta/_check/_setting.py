"""Rules about what is around a layer: BN006, BN008, BN009."""

from __future__ import annotations

import math
from contextlib import suppress

import torch

from gammabeta._check._evidence import Evidence
from gammabeta._check._finding import Found, Untried, percent, worst
from gammabeta.models._population import tensors

_VALUES = 16
_CHANGE = 0.05


def few_values(evidence: Evidence) -> Found | None:
    """A channel is normalized by fewer than 16 values.

    **Why.** The mean of m values has a relative error of 1/√m, their variance one of √(2/m) or so.
    Below 16 that noise is a quarter of the signal, it grows from layer to layer, and eval mode,
    which has none of it, is another network. With one value training is an error.

    **Fires** where batch size times positions (in synchronized layers, of all ranks; under a mask,
    the valid ones; in ghost batches, of one ghost) is below 16. Values: values per channel.

    **Cure.** Larger batches, statistics over all ranks (`gb.sync_statistics`), `gb.freeze` when
    fine-tuning, or a normalization that does not look at the batch.

    ```python
    model = nn.Sequential(nn.Linear(8, 16, bias=False), gb.BatchNorm1d(16))
    print(gb.check(model, x[:4], select="BN006"))
    assert not gb.check(model, x, select="BN006")
    ```

    Source: Wu & He 2018, arXiv:1803.08494, figure 1.
    """
    _ = evidence.batch
    values = {
        name: float(count)
        for name, count in evidence.seen.values.items()
        if count < _VALUES and name in evidence.live
    }
    if not values:
        return None
    place = min(values, key=lambda name: values[name])
    least = int(values[place])
    effect = f"{place or 'the model'} has {least} value{'s' * (least != 1)} per channel"
    if least < 2:
        effect += ": training mode is an error"
    else:
        effect += f": each batch's mean is off by {percent(1 / math.sqrt(least))} of the spread"
        noise = {}
        if evidence.several:
            with suppress(Untried):
                noise = {row.name: row.parts["noise"] for row in evidence.gaps}
        if place in noise:
            effect += f", and noise moves the layer's output by {percent(noise[place])}"
    factor = math.ceil(_VALUES / max(least, 1))
    size = next((len(t) for t in tensors(evidence.batch) if t.dim()), 0)
    cure = f"batch_size = {factor * size}" if size else f"# batches {factor} times as large"
    converted = "" if evidence.ours(values) else "after model = gb.convert(model) "
    cure += f"  # or {converted}gb.freeze(model) or, over all ranks, gb.sync_statistics(model)"
    return Found(values, effect, cure)


def dropout_before(evidence: Evidence) -> Found | None:
    """Dropout before a normalization shifts its variance between the modes.

    **Why.** Dropout keeps the mean and raises the variance of what it drops: for values x it adds
    p/(1 - p)·mean(x²). The running variance is taken with it, eval mode runs without.

    **Fires** where the standard deviation of what a layer gets (channel by channel, mean of the
    logarithms) is more than 5 % larger or smaller in training with dropout than without, the rest
    being the same. Stochastic depth and added noise count too. Values: that ratio.

    **Cure.** Dropout behind the last normalization; or `gb.calibrate(model, batches)` after
    training, which takes the statistics without dropout.

    ```python
    model = nn.Sequential(nn.ReLU(), nn.Dropout(0.5), gb.BatchNorm1d(8), nn.Linear(8, 2))
    print(gb.check(model, x, select="BN008"))
    model[1].p = 0.0
    assert not gb.check(model, x, select="BN008")
    ```

    Source: Li et al. 2018, arXiv:1801.05134.
    """
    _ = evidence.batch
    values = {}
    for name, (_, var, plain) in evidence.variances.items():
        spread = (var > 0) & (plain > 0)
        if name in evidence.updating and bool(spread.any()):
            ratio = math.exp(0.5 * float((var[spread] / plain[spread]).log().mean()))
            if abs(math.log(ratio)) > math.log1p(_CHANGE):
                values[name] = ratio
    if not values:
        return None
    order = [name for name in evidence.seen.calls if name in values]
    place = max(order, key=lambda name: abs(math.log(values[name])))
    dropout = evidence.seen.dropout.get(order[0], "")
    effect = (
        f"in training the standard deviation at {place or 'the model'} is {values[place]:.2f} "
        "times that without dropout, which eval mode meets"
    )
    cure = "gb.calibrate(model, batches)  # after training; or dropout behind the last layer"
    if dropout:
        cure = f"{evidence.path(dropout)}.p = 0.0  # or after training gb.calibrate(model, batches)"
    return Found({name: values[name] for name in order}, effect, cure)


def bias_before(evidence: Evidence) -> Found | None:
    """The bias of a layer goes straight into a normalization, which takes it off again.

    **Why.** A constant in a channel is part of its mean: the bias does not change the output in
    training, gets no gradient but rounding, and β is there for it. With weight decay it shrinks,
    and the running mean runs after it.

    **Fires** where the output of a convolution or linear layer with a bias is what a layer
    normalizes, and of the gradient through that output the bias receives no more than rounding.
    Not in front of frozen layers. Values: the part of the gradient that the bias receives.

    **Cure.** `bias=False` in the constructor. In a trained model take it out of the running mean
    too, as the line printed does, which leaves all outputs as they are.

    ```python
    model = nn.Sequential(nn.Linear(8, 16), gb.BatchNorm1d(16))
    print(gb.check(model, x, select="BN009"))
    model[1].running_mean -= model[0].bias.data
    model[0].bias = None
    assert not gb.check(model, x, select="BN009")
    ```

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.2.
    """
    _ = evidence.batch
    values: dict[str, float] = {}
    fed: dict[str, list[str]] = {}
    number = 0
    evidence.needs_finite()
    for (producer, name), share in evidence.trained.biases.items():
        bias = evidence.model.get_submodule(producer)._parameters["bias"]
        assert bias is not None
        if share > math.sqrt(torch.finfo(bias.dtype).eps):
            continue
        if producer not in fed:
            number += bias.numel()
        values[producer] = share
        fed.setdefault(producer, []).append(name)
    if not values:
        return None
    cure = _without_bias(evidence, *next(iter(fed.items())))
    if len(fed) > 1:
        cure += f"{',' if '#' in cure else '  #'} and so for {len(fed) - 1} more"
    effect = (
        f"{number} parameters do nothing: of the gradient through {worst(values)[0]} its bias "
        f"receives {max(values.values()):.1g}, which is rounding"
    )
    return Found(values, effect, cure)


def _without_bias(evidence: Evidence, producer: str, names: list[str]) -> str:
    """The line that takes a bias out of all layers that it feeds."""
    place = evidence.path(producer)
    line = f"{place}.bias = None"
    updating = [name for name in names if name in evidence.updating]
    if any(name in evidence.trained.mixed for name in updating):
        return f"{line}; gb.calibrate(model, batches)  # running means hold other inputs too"
    taken = [f"{evidence.path(name)}.running_mean -= {place}.bias.data" for name in updating]
    return "; ".join([*taken, line])
