"""Rules about when statistics are updated: BN001, BN002, BN003, BN010."""

from __future__ import annotations

import math

from torch import nn

from gammabeta._check._evidence import NO_BATCH, Evidence
from gammabeta._check._finding import Found, Untried, listed, worst
from gammabeta.models.conversion import why_not_ours


def not_counted_once(evidence: Evidence) -> Found | None:
    """The running statistics take in a batch more than once for one training step, or not at all.

    **Why.** A recomputed forward pass (activation checkpointing), several parts of one batch
    (gradient accumulation) or an extra forward pass (a second loss, a probe) each update the
    running statistics. With k updates a step the average forgets k times as fast as `momentum`
    says, and what an extra pass brings in, eval mode normalizes with. With no update, as where
    `model.train()` was forgotten after a validation, what is trained is eval mode: the weights go
    on and the statistics stay, and nothing is normalized by its batch any more.

    **Fires** where one step counts more batches in a layer than one forward pass does. Without
    `step=` a step is a forward and a backward pass of this check, which shows recomputation. With
    `step=`, a function `step(model, batch)` that is your whole training step (with `optimizer=`,
    so that its state is put back), it is what your code does; and it fires where the step counts
    none in layers whose parameters it trains, because the whole model is in eval mode. Not for
    layers under `gb.freeze`, nor in eval mode beside others in training mode, which may be meant.
    Values: batches counted a step.

    **Cure.** Layers of this package do not count what is recomputed. Put `gb.accumulate` around all
    forward passes of one step, or `gb.no_update` around those that are not to count. Against a step
    in eval mode, `model.train()` before it, after each validation, and more training; or, where it
    is meant, `gb.freeze`.

    ```python
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


    model = Checkpointed(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16))
    print(gb.check(model, x, select="BN001"))
    model = gb.convert(model)
    assert not gb.check(model, x, select="BN001")


    def step(model, x):
        model(x).square().mean().backward()


    model.eval()  # to validate, and no model.train() after it
    print(gb.check(model, x, step=step, select="BN001"))
    model.train()
    assert not gb.check(model, x, step=step, select="BN001")
    ```

    Reported as pytorch/pytorch#96136.
    """
    if evidence._batch is not None:
        _ = evidence.seen  # a batch that cannot be used is named before a step that uses it
    if evidence.forgotten:
        number, of = len(evidence.forgotten), len(evidence.layers)
        effect = (
            f"in the training step, with the model as it was given, {number} of {of} normalization "
            "layers were in eval mode: no batch was counted, and the batch was normalized by "
            "running statistics, which no longer follow the weights. If that is meant, gb.freeze "
            "says so"
        )
        cure = "model.train()  # before the step, after each validation; then train on"
        return Found(dict.fromkeys(evidence.forgotten, 0.0), effect, cure)
    if evidence.step is None:
        _ = evidence.batch
        trained = evidence.trained
        counts = {
            name: trained.forward[name] + again
            for name, again in trained.backward.items()
            if again and name in evidence.updating
        }
        moved, cause = trained.all, "recomputed in the backward pass"
        cure = "model = gb.convert(model)"
    else:
        watched = evidence.stepped
        single = evidence.seen if evidence._batch is not None else None
        counts = {
            name: n
            for name, n in watched.counted.items()
            if n > (single.calls.get(name, 1) if single else 1)
        }
        moved = watched.moved
        cause, cure = "recomputed in the backward pass", "model = gb.convert(model)"
        if not watched.again & set(counts):
            whole = single is None or any(watched.values[n] > single.total[n] for n in counts)
            cause, cure = "parts of one batch", "with gb.accumulate(model): step(model, batch)"
            if whole:
                cause = "several forward passes"
                cure = "with gb.no_update(model): ...  # around forward passes that do not train"
            if not evidence.ours(counts):
                cure = f"model = gb.convert(model)  # and then {cure}"
    if not counts:
        return None
    effect = f"one step updates them {max(counts.values())} times ({cause})"
    if evidence._batch is not None:
        try:
            once = evidence.trained.once
        except Untried:
            once = {}
        both = {n: (moved[n], once[n]) for n in counts if once.get(n) and moved.get(n)}
        if both:
            place = max(both, key=lambda n: abs(math.log(both[n][0] / both[n][1])))
            effect += (
                f"; the running mean of {place or 'the model'} moves by {both[place][0]:.2g} "
                f"standard deviations, where one pass moves it by {both[place][1]:.2g}"
            )
    return Found({name: float(n) for name, n in counts.items()}, effect, cure)


def frozen_but_updating(evidence: Evidence) -> Found | None:
    """A layer's parameters are not trained, but its running statistics go on changing.

    **Why.** `requires_grad_(False)` freezes weights, not buffers, and `layer.eval()` is undone by
    the next `model.train()`. The backbone that was to stay as it is drifts towards the new data,
    and is normalized by small batches of it meanwhile.

    **Fires** where a layer normalizes by the batch in training mode and γ and β (in a layer without
    them: all parameters of the module around it) need no gradient or are not among the optimizer's.
    Not for a model without any trainable parameter that is in eval mode. Values: by how many
    standard deviations one training batch moves a running mean; without a batch, `momentum`.

    **Cure.** `gb.freeze` survives `model.train()`. What the statistics have already become, load
    again, or `gb.calibrate`.

    ```python
    backbone = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU()).requires_grad_(False)
    model = nn.Sequential(backbone, nn.Linear(16, 2))
    print(gb.check(model, x, select="BN002"))
    model = gb.convert(model)
    gb.freeze(model[0])
    assert not gb.check(model, x, select="BN002")
    ```

    Reported as pytorch/pytorch#86590.
    """
    if evidence.still(evidence.model) and not evidence.given.training:
        return None
    found = [name for name in evidence.updating if evidence.still(evidence.around(name))]
    if not found:
        return None
    try:
        evidence.needs_finite()
        moved = evidence.trained.once
        values = {name: moved[name] for name in found if name in moved}
        place, shift = worst(values)
        effect = (
            f"one training batch moves running means by up to {shift:.2g} standard deviations "
            f"({place}), though nothing there is trained"
        )
    except Untried:
        values = {name: evidence.layers[name].momentum or 0.0 for name in found}
        effect = f"each training batch enters the running statistics of {listed(found)}"
    whole = _around(evidence, set(found))
    if any(why_not_ours(evidence.layers[name]) for name in found):
        # gb.convert leaves them as they are, and gb.freeze knows them not
        each = f"{evidence.root}.get_submodule(name)"
        cure = f"for name in {whole!r}: {each}.eval()  # after each model.train()"
        return Found(values, effect, cure)
    cure = f"gb.freeze({evidence.path(whole[0])})"
    if len(whole) > 1:
        cure = f"[gb.freeze({evidence.root}.get_submodule(name)) for name in {whole!r}]"
    if not evidence.ours(found):
        cure = f"model = gb.convert(model); {cure}"
        if evidence.optimizer is not None:
            cure += "  # then make the optimizer anew"
    return Found(values, effect, cure)


def _around(evidence: Evidence, places: set[str]) -> list[str]:
    """The fewest modules that hold these layers and no other."""
    whole = []
    left = set(places)
    for name, _ in evidence.model.named_modules():
        start = f"{name}." if name else ""
        inside = {key for key in evidence.layers if key == name or key.startswith(start)}
        if inside and inside <= places and inside & left:
            whole.append(name)
            left -= inside
    return whole


def outside_training(evidence: Evidence) -> Found | None:
    """Running statistics change in a forward pass that is not training.

    **Why.** A validation pass in training mode, or a layer that `model.eval()` does not reach,
    lets test data into the statistics and normalizes them by their own batch: results then depend
    on what else is in the batch.

    **Fires** where a forward pass in eval mode changes a layer's running statistics and, with
    `evaluate=`, a function `evaluate(model, batch)` that is your validation, where that does.
    Values: by how many standard deviations a running mean moved.

    **Cure.** `model.eval()` before every pass that is not training, or `gb.no_update` around it
    where batch statistics are wanted. Where a class has a `train()` of its own that keeps layers in
    training mode, the line printed takes it away.

    ```python
    def validate(model, x):
        with torch.no_grad():  # but not model.eval()
            return model(x)


    model = nn.Sequential(nn.Linear(8, 16, bias=False), gb.BatchNorm1d(16))
    print(gb.check(model, x, evaluate=validate, select="BN003"))
    ```
    """
    if evidence._batch is not None:
        _ = evidence.seen
    if evidence.evaluate is not None:
        moved = evidence.while_running(evidence.evaluate).moved
        if moved:
            place, shift = worst(moved)
            cure = "model.eval()  # before evaluating, and model.train() after"
            effect = (
                f"evaluate= moves running means by up to {shift:.2g} standard deviations ({place})"
            )
            return Found(moved, effect, cure)
    elif evidence._batch is None:
        raise Untried(NO_BATCH)
    moved = evidence.seen.moved if evidence._batch is not None else {}
    if not moved:
        return None
    place, shift = worst(moved)
    effect = (
        f"a pass in eval mode moves running means by up to {shift:.2g} standard deviations "
        f"({place}): model.eval() does not reach the layer"
    )
    names = list(moved)
    own = overriding(evidence.model, names[0])
    each = f"{evidence.root}.get_submodule(name)"
    cure = f"for name in {names!r}: {each}.eval()  # after each model.eval()"
    if own is not None:
        cure = f"type({evidence.path(own)}).train = torch.nn.Module.train"
    return Found(moved, effect, cure)


def overriding(model: nn.Module, name: str) -> str | None:
    """The innermost module around a layer, or the layer, whose class has a train() of its own."""
    while True:
        if type(model.get_submodule(name)).train is not nn.Module.train:
            return name
        if not name:
            return None
        name = name.rpartition(".")[0]


def several_sites(evidence: Evidence) -> Found | None:
    """One layer normalizes at several places of the network.

    **Why.** The places have different statistics. In training each is normalized by its own; in
    eval mode all by one running average, which is a mixture that is right for none, and each
    forward pass counts several batches.

    **Fires** where a forward pass calls a layer more than once or, without a batch, where a layer
    has several names in the model. Values: by how many standard deviations the means of two places
    differ; without a batch, the number of names.

    **Cure.** A layer for each place; weights around them may be shared.

    ```python
    norm = gb.BatchNorm1d(8)
    model = nn.Sequential(norm, nn.Linear(8, 8, bias=False), nn.ReLU(), norm)
    print(gb.check(model, x, select="BN010"))
    model[3] = copy.deepcopy(model[0])
    assert not gb.check(model, x, select="BN010")
    ```
    """
    named: dict[int, list[str]] = {}
    for name, module in evidence.model.named_modules(remove_duplicate=False):
        named.setdefault(id(module), []).append(name)
    names = {name: named[id(layer)] for name, layer in evidence.layers.items()}
    if evidence._batch is None:
        values = {name: float(len(all_of)) for name, all_of in names.items() if len(all_of) > 1}
        if not values:
            return None
        effect = f"one running average for {int(max(values.values()))} places"
    else:
        values = {}
        ratio = 1.0
        for name, calls in evidence.seen.calls.items():
            if calls < 2 or name not in evidence.updating:
                continue
            evidence.needs_finite()
            each = [evidence.seen.moments[name, call] for call in range(calls)]
            whole = each[0]
            for moments in each[1:]:
                whole = whole.merge(moments)
            scale = (whole.var() + 1e-12).sqrt()
            values[name] = max(float(((m.mean - whole.mean).abs() / scale).max()) for m in each)
            spread = [float(m.var().mean().sqrt()) for m in each]
            ratio = max(ratio, max(spread) / max(min(spread), 1e-12))
        if not values:
            return None
        place, shift = worst(values)
        effect = (
            f"the places differ from their mixture by up to {shift:.2g} standard deviations in "
            f"the mean ({place}), from each other {ratio:.2g} times in "
            f"spread; eval mode has one average"
        )
    first = next(iter(values))
    other = names[first][1] if len(names[first]) > 1 else f"{first}_2"
    target, value = evidence.path(other), f"copy.deepcopy({evidence.path(first)})"
    cure = f"{target} = {value}"
    if target.endswith(")"):
        around, _, own = other.rpartition(".")
        cure = f"setattr({evidence.path(around)}, {own!r}, {value})"
    if len(names[first]) < 2:
        cure += "  # and call it at the second place"
    return Found({k: v if math.isfinite(v) else math.inf for k, v in values.items()}, effect, cure)
