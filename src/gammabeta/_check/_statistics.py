"""Rules about what running statistics hold: BN004, BN005, BN007."""

from __future__ import annotations

import math

from gammabeta._check._evidence import Evidence
from gammabeta._check._finding import Found, Untried, listed, percent, worst
from gammabeta._check._updates import overriding
from gammabeta.probes._modes import pair
from gammabeta.probes.train_eval import CAUSES, GROUPS, LayerGap

_GAP = 0.05
_SAID = {
    "lag": "the running average lags behind the weights",
    "stale": "the running statistics do not belong to these weights and data",
    "domain": "the data are of another domain",
    "bessel": "m/(m - 1), compounded",
    "dropout": "dropout before the layer in training",
}


def not_usable(evidence: Evidence) -> Found | None:
    """Running statistics are NaN or infinite, or no batch ever entered them.

    **Why.** One batch with a NaN stays in PyTorch's buffers for ever, and every output in eval mode
    is NaN. Statistics that are still 0 and 1 (weights loaded without buffers) make eval mode
    another network than the one that was trained. Where it was eval mode that was trained
    (`model.train()` forgotten) nothing has been normalized by a batch, and calibration makes
    another network of it.

    **Fires** where a running mean or variance is not finite or a variance negative, and where they
    are exactly 0 and 1 without a batch counted, if the model is in eval mode, other layers have
    counted batches, or weights were trained: the optimizer holds a state, or γ and β have moved and
    gradients are there. Also, before any training, in layers that are in eval mode within a model
    in training mode, with γ and β to be trained or put there one by one: they will stay 0 and 1.
    Values: channels that are not finite or, of untouched layers, how far the mean of the batch is
    from 0 in standard deviations (without batch, 0).

    **Cure.** `gb.calibrate(model, batches)`; where weights were trained, `model.train()` in the
    training loop, and another training; no `.eval()` for layers that are to be trained. The layers
    of this package keep batches out that are not finite; `gb.skipped` counts them.

    ```python
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16))
    model(x * float("nan"))
    print(gb.check(model, x, select="BN004"))
    gb.calibrate(model, [x])
    assert not gb.check(model, x, select="BN004")
    ```
    """
    bad: dict[str, float] = {}
    for name, layer in evidence.layers.items():
        held = [layer._buffers.get(key) for key in ("running_mean", "running_var")]
        wrong = [~t.isfinite() for t in held if t is not None]
        if held[1] is not None and held[1].dim() == 1:
            wrong.append(held[1] < 0)
        channels = max((int(w.reshape(len(w), -1).any(1).sum()) for w in wrong), default=0)
        if channels:
            bad[name] = float(channels)
    if bad:
        place, most = worst(bad)
        total = evidence.layers["" if place == "(model)" else place].num_features
        effect = f"{int(most)} of {total} channels of {place} are not finite: eval mode gives NaN"
        return Found(bad, effect, "gb.calibrate(model, batches)")
    untouched = _untouched(evidence)
    if not untouched:
        return None
    values = dict.fromkeys(untouched, 0.0)
    effect = "they are 0 and 1 as built"
    try:
        moments = evidence.variances
    except Untried:
        moments = {}
    for name in untouched:
        if name in moments:
            mean, var, _ = moments[name]
            values[name] = float((mean.abs() / (var + 1e-12).sqrt()).max())
    if any(values.values()):
        place, shift = worst(values)
        spread = math.sqrt(float(moments["" if place == "(model)" else place][1].mean()))
        effect += (
            f", where the batch has means up to {shift:.2g} standard deviations away and a "
            f"standard deviation of {spread:.2g} ({place})"
        )
    asleep = _asleep(evidence, untouched)
    if asleep:
        effect += (
            f". In eval mode, while the model is in training mode: {listed(asleep)}. No batch will "
            "enter, and nothing be normalized by one"
        )
        if any(not evidence.still(evidence.around(name)) for name in asleep):
            cure = "model.train()  # in the training loop, with no .eval() of these layers after it"
            own = overriding(evidence.model, asleep[0])
            if own is not None:
                cure = f"type({evidence.path(own)}).train = torch.nn.Module.train; {cure}"
            if _stepped(evidence):
                cure += ", and train again"
            return Found(values, effect, cure)
    elif evidence.forgotten:
        effect += ". The training step that was given leaves them so: it runs in eval mode"
        return Found(values, effect, "model.train()  # in the training loop, and train again")
    elif _stepped(evidence):
        effect += (
            ". The weights were trained: in eval mode, call model.train() in the training loop and "
            "train again; gb.calibrate is for weights that were loaded without their buffers"
        )
        return Found(values, effect, "model.train()  # in the training loop, and train again")
    return Found(values, effect, "gb.calibrate(model, batches)")


def _stepped(evidence: Evidence) -> bool:
    """Whether the weights were trained in this process, as far as it can be seen."""
    state = {} if evidence.optimizer is None else evidence.optimizer.state
    if any(value is not None for held in state.values() for value in held.values()):
        return True
    # plain gradient descent has no state
    for layer in evidence.layers.values():
        for name, initial in (("weight", 1), ("bias", 0)):
            value = layer._parameters.get(name)
            if value is not None and value.grad is not None and bool((value != initial).any()):
                return True
    return False


def _untouched(evidence: Evidence) -> list[str]:
    fresh = [
        name
        for name, layer in evidence.layers.items()
        if name in evidence.initial and not evidence.counted(name) and layer.momentum != 0
    ]
    used = any(evidence.counted(name) for name in evidence.layers)
    if evidence.given.training and not used and not _stepped(evidence):
        fresh = _asleep(evidence, fresh)
    if evidence._batch is not None:  # what no forward pass reaches does no harm
        fresh = [name for name in fresh if name in evidence.seen.calls]
    return fresh


def _asleep(evidence: Evidence, names: list[str]) -> list[str]:
    """Those that are in eval mode while the model is in training mode, and are not a part of it
    that is used as it is.
    """
    return [
        name
        for name in names
        if evidence.model.training
        and not evidence.layers[name].training
        and not getattr(evidence.layers[name], "_frozen", False)
        and (
            evidence.model.get_submodule(name.rpartition(".")[0]).training
            or not evidence.still(evidence.around(name))
        )
    ]


def differs(evidence: Evidence) -> Found | None:
    """Eval mode differs from training mode by more than 5 %.

    **Why.** The network that is used is not the one that was trained: it is good in training and
    bad in validation, or the loss jumps when the mode is switched.

    **Fires** where the systematic difference in a layer's output, or in the model's, is above 5 %
    of its standard deviation, and 2.4 times what chance makes of it. Measured by `gb.gap`, which
    names the cause, between eight parts of the batch (fewer, where these had less than 16 values
    per channel) or, more exactly, between several `batches=`: of n of them, chance is the noise of
    one divided by √n. Give batches as training draws them: the first samples of data that are
    sorted are of other statistics. Not before the first batch of training, nor where BN004 says it
    all, nor where BN001 names a step that trains eval mode. Values: the systematic difference.

    With several `batches=` also where eval mode differs by more than 5 % in all, and batches fall
    into groups whose statistics differ, as when each is of one domain, or of one class: means or
    variances of whole batches then vary more than in draws from one population (variance between
    batches over variance within, beyond 5 standard deviations of chance), and by more than the
    noise of 16 values, which BN006 allows. Training normalizes each group by its own statistics,
    and one running average fits none. Values: that deviation of the means, or of the variances.

    **Cure.** That of the cause; mostly `gb.calibrate(model, batches)`. Against groups calibration
    does not help: mix them in each batch, or normalize each domain by its own statistics, with
    batch normalizations of its own.

    ```python
    model = nn.Sequential(nn.Linear(8, 16, bias=False), gb.BatchNorm1d(16))
    gb.calibrate(model, [x])
    with torch.no_grad():
        model[0].weight *= 1.5  # averaging, pruning, loading: other weights, the same statistics
    print(gb.check(model, x, select="BN005"))
    gb.calibrate(model, [x])
    assert not gb.check(model, x, select="BN005")
    batches = [x[:256], 3 * x[256:] + 2]  # two domains, each in batches of its own
    print(gb.check(model, batches=batches, select="BN005"))
    batches = torch.cat(batches)[torch.randperm(512)].split(256)
    gb.calibrate(model, batches)
    assert not gb.check(model, batches=batches, select="BN005")
    ```

    Source: Wu & Johnson 2021, arXiv:2105.07576, sections 3 and 5.
    """
    _ = evidence.batch
    if not any(pair(evidence.updating[n]) for n in evidence.seen.calls if n in evidence.updating):
        raise Untried("no layer that the batch reaches is updated in training")
    counts = [evidence.counted(name) for name in evidence.updating]
    if evidence.given.training and evidence.initial >= set(evidence.updating) and not any(counts):
        raise Untried("no batch of training has entered the running statistics yet")
    finite = all(
        t.isfinite().all() for layer in evidence.layers.values() for t in pair(layer) or ()
    )
    if not finite or _untouched(evidence):
        raise Untried("BN004 says already that statistics cannot be used")
    if evidence.forgotten:
        raise Untried("the step that was given trains eval mode, which BN001 tells of")
    rows: list[LayerGap] = [*evidence.gaps]
    if evidence.gaps.output is not None:
        rows.append(evidence.gaps.output)
    most = max(rows, key=lambda row: row.gap)
    if evidence.several and evidence.gaps.groups and most.gap > _GAP:
        place, apart = max(evidence.gaps.groups.items(), key=lambda item: max(item[1]))
        effect = (
            "batches fall into groups whose statistics differ: at "
            f"{place or 'the model'} means of batches by {apart.mean:.2g} standard deviations, "
            f"variances by {percent(apart.var)}, beyond chance. Training normalizes each group by "
            f"its own, eval mode all by one average: it differs by {percent(most.gap)} in "
            f"{most.name or 'the model'}"
        )
        return Found({k: max(v) for k, v in evidence.gaps.groups.items()}, effect, GROUPS)
    found = [row for row in rows if _matters(row, len(evidence.compared))]
    if not found:
        return None
    most = max(found, key=lambda row: row.systematic)
    parts = {key: part for key, part in most.parts.items() if key != "noise"}
    cause = max(parts, key=lambda key: parts[key])
    share = parts[cause] / sum(parts.values()) if math.isfinite(most.gap) else 1.0
    effect = (
        f"eval mode differs from training by {percent(most.systematic)} of the standard deviation "
        f"of {most.name or 'the model'}; cause: {_SAID[cause]} ({cause}, {min(share, 1):.0%} of it)"
    )
    if cause == "stale":
        effect += ". Give batches as training draws them: of others the statistics are others"
    layers = {row.name: row.systematic for row in found}
    return Found(layers, effect, CAUSES[cause][1])


def _matters(row: LayerGap, batches: int) -> bool:
    """Chance in the squared difference is about noise²/batches, and few tell the noise badly."""
    noise = row.parts["noise"] * row.gap if math.isfinite(row.gap) else 0.0
    chance = noise / batches * (1 + 4 / (batches - 1))
    return row.systematic > _GAP and row.systematic**2 > 6 * chance


def momentum(evidence: Evidence) -> Found | None:
    """The running average moves never, too fast, or too slowly.

    **Why.** `momentum` is the weight of the *new* batch. At 0 the statistics stay as they are;
    above 0.5 they are those of the last batch or two, with the noise of these; at 0.001 the
    half-life is 693 steps, and a short epoch later the average still holds the initial 0 and 1.
    TensorFlow and others call 1 - momentum by that name: 0.99 there is 0.01 here.

    **Fires** at momentum 0, above 0.5 and, with `epoch=`, the number of steps in one, where the
    half-life ln 2 / -ln(1 - momentum) is longer than an epoch. Not in frozen layers. Values:
    momentum.

    **Cure.** 0.1, or what gives four half-lives an epoch.

    ```python
    model = nn.Sequential(nn.Linear(8, 16, bias=False), gb.BatchNorm1d(16, momentum=0.99))
    print(gb.check(model, x, select="BN007"))
    model[1].momentum = 0.01
    assert not gb.check(model, x, epoch=200, select="BN007")
    ```

    Reported as pytorch/examples#289.
    """
    groups: dict[str, dict[str, float]] = {"never": {}, "fast": {}, "slow": {}}
    for name, layer in evidence.updating.items():
        weight = layer.momentum
        if weight is None:
            continue
        if weight == 0:
            groups["never"][name] = weight
        elif weight > 0.5:
            groups["fast"][name] = weight
        elif evidence.epoch is not None and _half_life(weight) > evidence.epoch:
            groups["slow"][name] = weight
    said, cures = [], []
    for kind, values in groups.items():
        if not values:
            continue
        name, weight = next(iter(values.items()))
        better = 0.1
        if kind == "never":
            said.append("momentum 0: no batch enters the running statistics")
        elif kind == "fast":
            noise = math.sqrt(weight / (2 - weight))
            better = round(1 - weight, 6) if 0.9 <= weight < 1 else 0.1
            said.append(
                f"momentum {weight:g}: the average has {percent(noise)} of the noise of a single "
                f"batch (23 % at 0.1)"
            )
        else:
            assert evidence.epoch is not None
            better = round(min(0.5, 1 - 0.5 ** (4 / evidence.epoch)), 3)
            said.append(
                f"momentum {weight:g}: a half-life of {_half_life(weight):.0f} steps, in an epoch "
                f"of {evidence.epoch}"
            )
        cure = f"{evidence.path(name)}.momentum = {better:g}"
        if len(values) > 1:
            each = f"{evidence.root}.get_submodule(name)"
            cure = f"for name in {list(values)!r}: {each}.momentum = {better:g}"
        cures.append(cure)
    if not said:
        return None
    both = {name: weight for values in groups.values() for name, weight in values.items()}
    return Found(both, "; ".join(said), cures[0])


def _half_life(weight: float) -> float:
    return math.log(2) / -math.log1p(-weight) if weight < 1 else 0.0
