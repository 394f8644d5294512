"""The train/eval gap: how far eval mode is from training mode, and what of it comes from where.

Let y_T be what a layer puts out in training mode (each batch normalized by its own statistics; no
dropout, whose noise is wanted, nor anything else that the mode of other modules switches) and y_E
what it puts out in eval mode, in the same network on the same batch, so that the layers before it
take part. With D = y_E − y_T,

    gap = rms(D) / s,        s = the standard deviation of y_T (rms over channels).

The causes are steps of a path from E to T. Each step changes the statistics that normalize in
eval mode, in all layers at once, and runs the network again:

    y_E   the running statistics as they are
    lag     the initial 0 and 1 taken out, which an average of n batches still holds with weight
            (1 − momentum)ⁿ (where that brings it nearer to the next step)
    stale   the average over training batches, now: the mean of batch means and of unbiased batch
            variances, taken in training mode with dropout. With ``earlier`` weights at those
            first; what then is between the earlier and the present weights is lag. The chance
            in a running average, of variance momentum/(2 − momentum) batches, stays in here
    domain  with ``reference``: first the average over reference batches, then over batches
    bessel  biased batch variances, without m/(m − 1)
    dropout taken without dropout, and whatever else the mode switches
    noise   y_T: each batch by its own statistics (and all that the others do not explain: where
            a layer is used at several sites, that they differ; whitening layers as a whole)

For a step from y to y' its part is ⟨y − y', D⟩/(‖D‖·√N·s), N values: the projection on the gap.
The parts sum to the gap exactly; one that works against the others is negative. The statistics
for even batches are taken from odd ones and the other way round: with statistics of other samples
⟨y_E − y', D⟩ estimates the squared systematic difference without bias, where one's own would count
chance as a cause. ``systematic`` = √(gap·(gap − noise)) is that difference, in units of s: what
would be left with batches of any size.

Cost: about 10 forward passes a batch without gradients, and twice the memory of all layers' outputs
for one batch; the batches are held in memory. Below 5 % nothing needs to be done. Noise is no
defect of the statistics: calibration does not change it. Larger batches do, unless batches fall
into groups whose statistics differ (each of one domain, or one class): ``groups`` tells where.

Source: the counterfactuals are this package's own. The causes: Ioffe 2017, arXiv:1702.03275
(small batches); Wu & Johnson 2021, arXiv:2105.07576, sections 3 and 5 (averages, domains); Li et
al. 2018, arXiv:1801.05134 (dropout); Izmailov et al. 2018, arXiv:1803.05407, section 3.2 (averaged
weights).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gammabeta._guard import Held, unwrap
from gammabeta.models._population import Forward, run, tensors, watch
from gammabeta.moments import Moments
from gammabeta.probes._modes import OUTPUT, Modes, Statistics, Step
from gammabeta.probes._spread import Apart, Spread

_NOTHING = 0.01  # a gap below this has no cause worth a name

# cause -> (heading, cure)
CAUSES = {
    "lag": ("lag", "gb.calibrate(model, batches)"),
    "stale": ("stale", "gb.calibrate(model, batches)"),
    "domain": ("domain", "gb.calibrate(model, batches)  # batches of the new domain"),
    "bessel": ("m/(m-1)", "gb.calibrate(model, batches)  # or stored_variance='biased'"),
    "dropout": ("dropout", "gb.calibrate(model, batches)  # or dropout behind the last layer"),
    "noise": ("noise", "larger batches in training, or gb.sync_statistics(model)"),
}
# the cure of noise that is more than chance
GROUPS = (
    "# mix the groups in each batch (shuffle=True), or give each batch normalizations of its own"
)


class LayerGap(NamedTuple):
    """How far eval mode is from training mode in one layer.

    Attributes:
        name: qualified name in the model; "(output)" is what the model returns.
        gap: rms(y_E − y_T), in standard deviations of y_T; infinite if a statistic is not finite.
        parts: what each cause adds to it, in the same unit; they sum to ``gap``.
        cause: the cause with the largest part; "" where the gap is below 1 %.
        cure: a line of code against that cause.
        values: how many values a channel has in a batch, the least of all batches.
    """

    name: str
    gap: float
    parts: dict[str, float]
    cause: str
    cure: str
    values: int

    @property
    def systematic(self) -> float:
        """What is left without noise: √(gap·(gap − noise)), 0 if the noise is more than all."""
        if not math.isfinite(self.gap):
            return self.gap
        return math.sqrt(max(0.0, self.gap * (self.gap - self.parts["noise"])))


class GapTable(list[LayerGap]):
    """One :class:`LayerGap` a layer, in order of the forward; ``str()`` is a table with cures.

    Attributes:
        output: the same of what the model returns; None if that holds no floating tensor.
        groups: layers where batches fall into groups whose statistics differ, and by how much.
    """

    def __init__(
        self,
        rows: Iterable[LayerGap],
        output: LayerGap | None,
        groups: Mapping[str, Apart] | None = None,
    ) -> None:
        super().__init__(rows)
        self.output = output
        self.groups = dict(groups or {})

    def __str__(self) -> str:
        rows = [*self, self.output] if self.output else [*self]
        shown = [key for key in CAUSES if any(key in row.parts for row in rows)]
        heads = [CAUSES[key][0] for key in shown]
        width = min(max(len(row.name) for row in rows), 79 - 8 * (len(shown) + 2))
        lines = [f"{'layer':<{width}}" + "".join(f"{h:>8}" for h in ["gap", *heads]) + "  cause"]
        for row in rows:
            name = row.name if len(row.name) <= width else "…" + row.name[1 - width :]
            cells = [_percent(value) for value in (row.gap, *(row.parts[key] for key in shown))]
            text = f"{name or '(model)':<{width}}" + "".join(f"{cell:>8}" for cell in cells)
            lines.append(f"{text}  {row.cause}".rstrip())
        lines.append("in % of the standard deviation of the training output; the parts sum to gap")
        if any(part < 0 for row in rows for part in row.parts.values()):
            lines.append("a negative part works against the others")
        cures = {row.cause: row.cure for row in rows}
        lines += [f"{key}: {cures[key]}" for key in CAUSES if key in cures]
        if self.groups:
            name, apart = max(self.groups.items(), key=lambda item: max(item[1]))
            lines.append(
                f"batches fall into groups: at {name or '(model)'} their means differ by "
                f"{apart.mean:.2g} standard deviations,"
            )
            lines.append(
                f"their variances by {_percent(apart.var)} %, beyond chance; a running average "
                "fits none of them"
            )
        return "\n".join(lines)

    __repr__ = __str__


def _percent(value: float) -> str:
    share = 100 * value
    if not abs(share) < 9999.5:
        return f"{share:.1e}".replace("e+0", "e").replace("e+", "e")
    text = f"{share:.1f}" if abs(share) < 999.5 else f"{share:.0f}"
    return "0.0" if text == "-0.0" else text


def gap(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    reference: Iterable[Any] | None = None,
    earlier: Mapping[str, Tensor] | None = None,
    forward: Forward | None = None,
) -> GapTable:
    """Compare training with eval mode in every batch normalization, and name the causes.

    gap = rms(y_E − y_T)/std(y_T) over samples, positions and channels of the layer's output; its
    parts are projections on y_E − y_T of what replacing the running statistics step by step
    changes: lag, stale buffers, a shifted domain, m/(m − 1), dropout, the noise of small batches.
    They sum to the gap. See :mod:`gammabeta.probes.train_eval` for each step. Nothing of the model
    changes.

    Training mode is the one the model is in, else the one that ``model.train()`` gives: layers that
    are frozen, or that ``train()`` leaves in eval mode, have no gap of their own.

    Args:
        model: any module; in ``DistributedDataParallel`` or ``torch.compile``, the one inside.
        batches: at least two batches, as large as in training, of data that the model is to be
            used on. Taken as by :func:`gammabeta.calibrate`; more of them make it more exact.
        reference: batches of the data that it was trained on; without, a shifted domain counts as
            stale.
        earlier: parameters by name some steps before (a ``state_dict``), best
            (1 − momentum)/momentum steps, which is the mean age of what a running average holds;
            without, what weights that move leave behind counts as stale too.
        forward: ``forward(model, batch)`` runs the model on a batch.

    Returns:
        One row a layer and one for the model's output; ``print`` shows a table with the cures.

    Raises:
        ValueError: no batch normalization has running statistics or was reached; fewer than two
            batches; one value per channel or none; a batch or output that is not finite; unknown
            names in ``earlier``; a tensor instead of a list.
        TypeError: the model is no module, scripted or sharded.

    >>> import torch, gammabeta as gb
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), gb.BatchNorm1d(16, momentum=1.0))
    >>> _ = model(torch.randn(64, 8))  # statistics of these weights
    >>> with torch.no_grad():
    ...     _ = model[0].weight.mul_(1.5)  # other weights: the statistics are stale
    >>> table = gb.gap(model, torch.randn(1024, 8).split(64))
    >>> table[0].cause, round(table[0].gap, 1), round(table[0].parts["stale"], 1)
    ('stale', 0.6, 0.5)
    >>> _ = gb.calibrate(model, torch.randn(1024, 8).split(64))
    >>> round(gb.gap(model, torch.randn(1024, 8).split(64))[0].parts["stale"], 1)
    0.0

    Source: see the module.
    """
    model = unwrap(model, "gap")
    if isinstance(batches, Tensor):
        raise ValueError(
            "gap: batches must be a list of batches, got one tensor of shape "
            f"{tuple(batches.shape)}. Give a list of batches: x.split(32)."
        )
    data = list(batches)
    if len(data) < 2:
        raise ValueError(
            f"gap: expected at least two batches, got {len(data)}: the statistics of one are held "
            "against the outputs on another. Split a batch: gb.gap(model, x.split(len(x) // 2))."
        )
    known = dict(model.named_parameters())
    moved = {name: value for name, value in (earlier or {}).items() if name in known}
    if earlier is not None and not moved:
        raise ValueError(
            "gap: earlier must hold parameters of the model by name, got "
            f"{', '.join(map(repr, list(earlier)[:3])) or 'none'}. Pass a copy of its state_dict()."
        )
    for number, batch in enumerate(data):
        if any(not x.numel() for x in tensors(batch)):
            raise ValueError(
                f"gap: batches must hold samples, got batches[{number}] with an empty tensor. "
                "Leave it out."
            )
    held, modes = Held(model), Modes(model, forward or run)
    trained = None if reference is None else list(reference)
    past = None
    with torch.no_grad():
        if earlier is not None:
            with held.running(moved), modes.ready():
                past = modes.averages(data if trained is None else trained)
        with held.running(), modes.ready():
            try:
                return _table(modes, data, modes.path(data, past, trained))
            except ValueError:
                _single(modes, data)
                raise


def finite(value: Any) -> bool:
    """Whether all floating tensors in a batch or an output are finite."""
    floating = (t for t in tensors(value) if t.is_floating_point())
    return all(bool(t.isfinite().all()) for t in floating)


def _single(modes: Modes, batches: list[Any]) -> None:
    """Name the batch and the layer, where training mode has one value to normalize."""
    for number, batch in enumerate(batches):
        values: dict[str, int] = {}
        modes.outputs(batch, values=values)
        for name, least in values.items():
            if least < 2 and name in modes.live:
                raise ValueError(
                    "gap: training mode must have more than 1 value per channel, got "
                    f"{least} in layer {name or '(model)'} for batches[{number}]. Leave that batch "
                    "out (drop_last=True in a loader), or give larger ones."
                )


def _usable(number: int, batch: Any, goal: Mapping[Any, Tensor]) -> None:
    """Nothing can be compared with NaN."""
    for key, y in goal.items():
        if not finite(y):
            what = f"batches[{number}]"
            if finite(batch):
                what = f"the output of layer {key[0] or '(model)'} for {what}"
            raise ValueError(
                f"gap: batches and outputs in training mode must be finite, got NaN or Inf in "
                f"{what}. Leave such batches out; if it is the weights, load others."
            )


class _Sums:
    """What is added up over the batches for one row."""

    def __init__(self, states: int) -> None:
        self.spread = 0.0  # Σ (y_T − its channel's mean in the batch)²
        self.square = 0.0  # Σ D²
        self.along = [0.0] * states  # Σ (y − y_T)·D of each state of the path

    def row(self, name: str, causes: list[str], values: int) -> LayerGap:
        total, spread = self.square, self.spread
        keys = dict.fromkeys(key for key in CAUSES if key in (*causes, "noise"))
        parts = dict.fromkeys(keys, 0.0)
        if not all(map(math.isfinite, (total, spread, *self.along))):
            parts["stale"] = math.inf
            return LayerGap(name, math.inf, parts, "stale", CAUSES["stale"][1], values)
        # an output without any spread has no unit; it can only differ where spread is lost
        unit = math.sqrt(spread * total) or 1.0
        last = total
        for cause, along in zip(causes, self.along, strict=True):
            parts[cause] += (last - along) / unit
            last = along
        parts["noise"] += last / unit
        size = total / unit
        cause = max(parts, key=lambda key: parts[key]) if size >= _NOTHING else ""
        return LayerGap(name, size, parts, cause, CAUSES[cause][1] if cause else "", values)


def _table(modes: Modes, batches: list[Any], path: list[Step]) -> GapTable:
    causes = [cause for cause, _ in path]
    sums: dict[str, _Sums] = {}
    values: dict[str, int] = {}
    spread = Spread()
    for number, batch in enumerate(batches):
        goal = modes.outputs(batch, training=True, values=values)
        _usable(number, batch, goal)
        with watch(modes.live, spread.of(batch)):
            reached = modes.outputs(batch)
        away = {key: y.double() - goal[key].double() for key, y in reached.items()}
        for key, d in away.items():
            own = sums.setdefault(key[0], _Sums(len(path)))
            y = goal[key]
            own.spread += float(Moments.of(y if y.dim() > 1 else y.reshape(-1, 1)).m2.sum())
            own.square += float(d.square().sum())
        last = modes.actual
        for place, (_, folds) in enumerate(path):
            statistics = {**modes.actual, **folds[number % 2]}
            if not _same(statistics, last):
                reached, last = modes.outputs(batch, statistics), statistics
            for key, d in away.items():
                delta = reached[key].double() - goal[key].double()
                sums[key[0]].along[place] += float((delta * d).sum())
    if not values:
        raise ValueError(
            "gap: expected batches that reach a batch normalization, got none whose forward "
            f"calls one of {', '.join(map(repr, modes.layers))}. Pass forward=, a function "
            "(model, batch) that runs the model."
        )
    rows = {name: own.row(name, causes, values.get(name, 0)) for name, own in sums.items()}
    groups = spread.groups()
    if groups:
        rows = {k: r._replace(cure=GROUPS) if r.cause == "noise" else r for k, r in rows.items()}
    return GapTable((rows[name] for name in values), rows.get(OUTPUT), groups)


def _same(one: Statistics, other: Statistics) -> bool:
    pairs = ((one[name], other[name]) for name in one)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)
