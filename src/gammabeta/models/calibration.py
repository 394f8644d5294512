"""Population statistics in place of running averages."""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from gammabeta.layers._running import RunningMoments
from gammabeta.models._find import any_kind, came
from gammabeta.models._population import (
    Call,
    Forward,
    Origins,
    Pool,
    apart,
    by_batch,
    eager,
    gather,
    run,
    watch,
)
from gammabeta.models._table import Table
from gammabeta.moments import Moments


class Calibrated(NamedTuple):
    """What :func:`calibrate` did to one layer.

    Attributes:
        name: qualified name in the model.
        level: in which pass over the batches its statistics were taken; 0 if they were not.
        n: how many values each channel has seen (the least of the channels, under masks).
        mean_shift: the largest change of a running mean, in population standard deviations.
        var_ratio: new variance by old variance, for the channel where it changed most.
        note: why a layer was skipped, or what else there is to know.
        before, after: (running_mean, running_var), float64; None for a skipped layer.
    """

    name: str
    level: int
    n: int
    mean_shift: float
    var_ratio: float
    note: str
    before: tuple[Tensor, Tensor] | None
    after: tuple[Tensor, Tensor] | None


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    order: str = "network",
    *,
    forward: Forward | None = None,
    group: Any = None,
) -> list[Calibrated]:
    """Replace, in place, the running statistics of ``model`` by those of all ``batches``.

    mean = Σ nᵢ·meanᵢ / n and, by the law of total variance, n·var = Σ nᵢ·(varᵢ + (meanᵢ − mean)²):
    the variance of all values in one, not the average of the batches' variances. It is stored
    with the factor n/(n − 1), or without in layers with ``stored_variance="biased"``.
    ``num_batches_tracked`` stays as it is. Everything runs in eval mode (no dropout) and without
    gradients; afterwards every module is in its own mode again. On any error, Ctrl-C included,
    buffers and modes are as they were.

    With ``order="network"`` a layer's statistics are taken when all layers before it already
    normalize with their finished ones. That takes one pass over ``batches`` for each level, the
    longest chain of layers that feed each other (50 normalizations in a row cost 50 passes), and
    does not depend on how the data are split into batches, up to the rounding of what lies
    between the layers: a float32 convolution rounds one sample differently in a batch of 1 and of
    64. Beside a mean of 300 and a deviation of 0.1 that moved variances by up to 3.5e-4, relatively
    (2e-7 with the mean taken from the data, 1e-12 in float64; see the guide to statistics).
    A layer that is called several times in a forward pass pools all its calls; while it is at
    work it normalizes with those it has finished.
    With ``order="batch"`` there is one pass, in which every layer normalizes each batch by the
    batch's own statistics, frozen layers and batch renormalization too, whose old statistics are
    those to be replaced. Then only the first layers are independent of the split: all others see
    what small or sorted batches make of their input.

    Works on any batch normalization, PyTorch's as well as ours. Masks given to our layers are
    honored. Frozen layers are calibrated too: freezing keeps training from changing statistics.

    In a distributed job every rank has to call this, each with its own data, as many batches as
    it has: the moments of all ranks of ``group`` are merged after each pass, so that all end with
    the same statistics. During a pass no layer meets other ranks, not even after
    ``sync_statistics`` (or in ``SyncBatchNorm``): with ``order="batch"`` each rank normalizes by
    its own batches. A model in ``DistributedDataParallel`` is run without its wrapper.

    Args:
        model: any module.
        batches: an iterable that can be run through several times and yields the same data each
            time (a list, a ``DataLoader``); for a single level or ``order="batch"`` an iterator
            will do. Data go to the model's device by ``forward``, or are there already.
        order: "network" or "batch".
        forward: ``forward(model, batch)`` runs the model on a batch. Without it, of a tuple or
            list the first element is taken, as ``torch.optim.swa_utils.update_bn`` does; a
            mapping is passed as keyword arguments, anything else as the one argument.
        group: the process group of the ranks to merge; None for all.

    Returns:
        One row a layer; ``print`` shows a table. See :class:`Calibrated`.

    Raises:
        ValueError: nothing to calibrate (whitening layers are not); no batches, or too few values;
            an iterator where several passes are needed; a tensor instead of batches; statistics
            that are not finite.
        TypeError: the model is no module.
        RuntimeError: another rank failed.

    >>> import torch, gammabeta as gb
    >>> layer = torch.nn.BatchNorm1d(1)
    >>> report = gb.calibrate(layer, [torch.tensor([[0.0], [1.0]]), torch.tensor([[10.0], [11.0]])])
    >>> layer.running_mean.item(), layer.running_var.item()
    (5.5, 33.66666793823242)
    >>> print(report)
    name     level  n  mean_shift  var_ratio  note
    (model)  1      4  0.9479      33.67

    Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3, arXiv:2105.07576,
    for ``order="batch"``. Differs from ``torch.optim.swa_utils.update_bn``, which averages the
    variances of the batches and runs dropout in training mode.
    """
    if order not in ("network", "batch"):
        raise ValueError(f"calibrate: order must be 'network' or 'batch', got {order!r}.")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"calibrate: model must be a torch.nn.Module, got {came(model)}. Pass the network "
            "itself."
        )
    if isinstance(batches, Tensor):
        raise ValueError(
            "calibrate: batches must be an iterable of batches, got one tensor of shape "
            f"{tuple(batches.shape)}: write [x], or x.split(64)."
        )
    if isinstance(model, DistributedDataParallel):
        model = model.module
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta:
            raise ValueError(
                f"calibrate: all tensors must hold values, got {name!r} on the device 'meta'. Move "
                "the model with model.to_empty(device='cpu') and load its state_dict first."
            )
    layers, skipped = _choose(model)
    work = _Work(model, layers, batches, forward or run, group)
    before = {name: _stored(layer) for name, layer in layers.items()}
    with _restored(model), eager(model), apart(model), torch.no_grad():
        for module in model.modules():
            module.training = False
        levels = work.by_level() if order == "network" else work.in_one_pass()
    rows = {}
    for name, layer in layers.items():
        if name in levels:
            rows[name] = _row(name, levels[name], work.pool.of(name), before[name], layer)
        else:
            skipped[name] = "no batch reached it: its statistics are as before"
    for name, reason in skipped.items():
        rows[name] = Calibrated(name, 0, 0, 0.0, 1.0, reason, None, None)
    return Table(rows[name] for name in any_kind(model))


def _choose(model: nn.Module) -> tuple[dict[str, _BatchNorm | RunningMoments], dict[str, str]]:
    layers, skipped, other = {}, {}, []
    for name, layer in any_kind(model).items():
        held = [layer._buffers.get(key) for key in ("running_mean", "running_var")]
        if any(t is not None and is_lazy(t) for t in held):
            raise ValueError(
                f"calibrate: every layer must know its number of features, got {name!r} = "
                f"{layer!r}. Run the model on one batch first."
            )
        if not layer.track_running_stats or (held[0] is None and held[1] is None):
            skipped[name] = (
                "it has no running statistics (track_running_stats=False) and normalizes by each "
                "batch's own: layers after it depend on the split"
            )
        elif held[0] is None or held[1] is None or held[0].shape != held[1].shape:
            other.append(name)
            skipped[name] = (
                "its statistics are not one mean and one variance per channel: layers after it "
                "see it normalize by those it has"
            )
        else:
            layers[name] = layer
    if not layers and other:
        raise ValueError(
            "calibrate: expected layers with one mean and one variance per channel, got only such "
            f"as it does not calibrate: {', '.join(map(repr, other))} (whitening layers keep a "
            "covariance). Refresh their running statistics with "
            "torch.optim.swa_utils.update_bn(batches, model)."
        )
    if not layers:
        raise ValueError(
            "calibrate: expected a model with batch normalizations that have running statistics, "
            f"got {type(model).__name__} with {len(skipped)} without. There is nothing to do."
        )
    return layers, skipped


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has its mode; on an error, every buffer its values too."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for module, name, buffer, copy in buffers:
                module._buffers[name] = buffer.copy_(copy)
        raise
    finally:
        for module, mode in modes:
            module.training = mode


class _Work:
    """One calibration: its passes over the batches."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, _BatchNorm | RunningMoments],
        batches: Iterable[Any],
        forward: Forward,
        group: Any,
    ) -> None:
        self.model, self.layers, self.group = model, layers, group
        self.batches, self.forward = batches, forward
        self.pool = Pool()

    def by_level(self) -> dict[str, int]:
        """One pass a level, statistics written after each; the (last) level of each layer.

        The first pass finds the levels; it already takes the statistics of what depends on no
        other layer.
        """
        tracker, found = Origins(), Pool()
        origins: dict[Call, frozenset[Call]] = {}
        once = isinstance(self.batches, Iterator)

        def enter(call: Call, x: Tensor, mask: Tensor | None) -> None:
            here = tracker.of(x) if mask is None else tracker.of(x) | tracker.of(mask)
            origins[call] = origins.get(call, frozenset()) | here
            if here and once:
                raise ValueError(
                    "calibrate: batches must be iterable several times, once for each level of "
                    f"layers that feed each other, as {min(here)[0]!r} feeds {call[0]!r}; got an "
                    f"iterator, {type(self.batches).__name__}, which is used up after one. Pass "
                    "a list or a DataLoader, or use order='batch'."
                )
            if not origins[call]:
                found.add(call, x, mask)

        told = self._pass(enter, found, origins, tracker)
        for _, others in told:
            for call, here in others.items():
                origins[call] = origins.get(call, frozenset()) | here
        levels = _levels(origins)
        self._write(told, levels, 1)
        for level in range(2, max(levels.values()) + 1):
            found = Pool()
            told = self._pass(_collector(found, levels, level), found)
            self._write(told, levels, level)
        # the last level of a layer that is called at several
        return {name: level for (name, _), level in sorted(levels.items(), key=lambda i: i[1])}

    def in_one_pass(self) -> dict[str, int]:
        """All statistics at once, every layer normalizing by its batch's own."""
        found = Pool()
        with by_batch(self.layers.values()):
            told = self._pass(found.add, found)
        levels = {call: 1 for pool, _ in told for call in pool}
        self._write(told, levels, 1)
        return {name: 1 for name, _ in levels}

    def _pass(
        self,
        enter: Callable[[Call, Tensor, Tensor | None], None],
        found: Pool,
        origins: dict[Call, frozenset[Call]] | None = None,
        tracker: Origins | None = None,
    ) -> list[tuple[Pool, dict[Call, frozenset[Call]]]]:
        """Run all batches; what this and all other ranks found."""
        error, count = None, 0
        try:
            with watch(self.layers, enter, None if tracker is None else tracker.mark) as restart:
                for batch in self.batches:
                    restart()
                    if tracker is not None:
                        tracker.forget()
                    with nullcontext() if tracker is None else tracker:
                        self.forward(self.model, batch)
                    count += 1
        except Exception as raised:
            # told to the other ranks first, which would wait for this one for ever
            error = raised
        told = gather((repr(error or ""), count, found.on_cpu(), origins or {}), self.group)
        if error is not None:
            raise error
        for rank, (message, *_) in enumerate(told):
            if message != repr(""):
                raise RuntimeError(f"calibrate: rank {rank} of the group failed with {message}.")
        if not sum(number for _, number, _, _ in told):
            raise ValueError(
                "calibrate: expected at least one batch in every pass, got none from "
                f"{type(self.batches).__name__}. Pass something that can be iterated several times."
            )
        return [(pool, others) for _, _, pool, others in told]

    def _write(
        self,
        told: list[tuple[Pool, dict[Call, frozenset[Call]]]],
        levels: dict[Call, int],
        level: int,
    ) -> None:
        """Merge what all ranks found at one level, and store it."""
        if not levels:
            raise ValueError(
                "calibrate: expected batches that reach a batch normalization, got none whose "
                f"forward calls one of {', '.join(map(repr, self.layers))}. Pass forward=, a "
                "function (model, batch) that runs the model."
            )
        for pool, _ in told:
            for call in sorted(pool):
                if levels[call] == level:
                    self.pool.enter(call, pool[call])
        for call in sorted(call for call, own in levels.items() if own == level):
            if call not in self.pool:
                raise ValueError(
                    f"calibrate: every pass must run the model alike, got no call of {call[0]!r} "
                    f"in pass {level}. Pass batches that are the same each time."
                )
            _store(call[0], self.layers[call[0]], self.pool.of(call[0]))


def _collector(
    found: Pool, levels: dict[Call, int], level: int
) -> Callable[[Call, Tensor, Tensor | None], None]:
    def collect(call: Call, x: Tensor, mask: Tensor | None) -> None:
        if call not in levels:
            raise ValueError(
                f"calibrate: every pass must run the model alike, got call {call[1] + 1} of "
                f"{call[0]!r} only after the first pass. Pass batches that are the same each "
                "time, or use order='batch'."
            )
        if levels[call] == level:
            found.add(call, x, mask)

    return collect


def _levels(origins: Mapping[Call, frozenset[Call]]) -> dict[Call, int]:
    """1 for calls that depend on no other, else one more than the highest of those."""
    levels: dict[Call, int] = {}
    try:
        for call in graphlib.TopologicalSorter(origins).static_order():
            levels[call] = 1 + max((levels[other] for other in origins[call]), default=0)
    except graphlib.CycleError as error:
        names = " -> ".join(name for name, _ in error.args[1])
        raise ValueError(
            f"calibrate: the layers must feed each other in one direction, got {names} over all "
            "batches. Use order='batch'."
        ) from None
    return levels


def _store(name: str, layer: _BatchNorm | RunningMoments, seen: Moments) -> None:
    biased = isinstance(layer, RunningMoments) and layer.stored_variance == "biased"
    least = int(seen.n.min())
    if least < (1 if biased else 2):
        raise ValueError(
            f"calibrate: {name!r} needs at least {1 if biased else 2} values per channel, got "
            f"{least} in all batches together. Pass more data."
        )
    for key, value in (
        ("running_mean", seen.mean),
        ("running_var", seen.var() if biased else seen.unbiased()),
    ):
        held = layer._buffers[key]
        if held is None:
            continue
        new = value.to(held.dtype)
        if not new.isfinite().all():
            raise ValueError(
                f"calibrate: statistics must be finite, got {key} = {float(value.abs().max())} "
                f"for {name!r}, held in {held.dtype}. Look for NaN in the batches; a layer in half "
                "precision holds float32 after gammabeta.convert."
            )
        held.copy_(new)


def _stored(layer: _BatchNorm | RunningMoments) -> tuple[Tensor, Tensor]:
    mean, var = (
        torch.empty(0) if held is None else held.detach().to("cpu", torch.float64, copy=True)
        for held in (layer.running_mean, layer.running_var)
    )
    return mean, var


def _row(
    name: str,
    level: int,
    seen: Moments,
    before: tuple[Tensor, Tensor],
    layer: _BatchNorm | RunningMoments,
) -> Calibrated:
    after = _stored(layer)
    hidden = layer.__dict__.get("_eps")  # of layers that do not offer it to other tools
    eps = layer.eps if hidden is None else hidden
    shift = (after[0] - before[0]).abs() / (after[1] + eps).sqrt()
    ratio = (after[1] + eps) / (before[1] + eps)
    most = ratio[ratio.log().abs().argmax()]
    frozen = isinstance(layer, RunningMoments) and layer._frozen
    note = "frozen, its statistics were replaced all the same" if frozen else ""
    least = int(seen.n.min())
    return Calibrated(name, level, least, float(shift.max()), float(most), note, before, after)
