"""A model in training and in eval mode, with its running statistics replaced at will."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gammabeta._guard import copied
from gammabeta.layers._running import RunningMoments
from gammabeta.models._population import Call, Forward, apart, tensors, watch
from gammabeta.moments import Moments

Layer: TypeAlias = _BatchNorm | RunningMoments
# by layer: running mean and variance, float64
Statistics: TypeAlias = dict[str, tuple[Tensor, Tensor]]
# a cause, and the statistics without it for even and for odd batches
Step: TypeAlias = tuple[str, list[Statistics]]

OUTPUT = "(output)"
_LEAST = 1e-6  # an initial value that is left with less weight is forgotten


class Averages(dict[str, list[Tensor]]):
    """By layer: how many batches, and the sums of their means, unbiased and biased variances."""

    def add(self, call: Call, x: Tensor, mask: Tensor | None) -> None:
        seen = Moments.of(x, mask)
        new = [torch.ones_like(seen.n.mean()), seen.mean, seen.unbiased(), seen.var()]
        if all(bool(value.isfinite().all()) for value in new):
            held = self.get(call[0])
            self[call[0]] = new if held is None else [a + b for a, b in zip(held, new, strict=True)]

    def merge(self, other: Averages) -> Averages:
        both = Averages(self)
        for name, new in other.items():
            held = both.get(name)
            both[name] = new if held is None else [a + b for a, b in zip(held, new, strict=True)]
        return both


class Modes:
    """Runs a model in either mode; everything but ``__init__`` happens while the model is held."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        self.model, self.forward = model, forward
        self.layers: dict[str, Layer] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm | RunningMoments)
        }
        if not any(pair(layer) for layer in self.layers.values()):
            raise ValueError(
                "gap: expected a model with batch normalizations that have running statistics, got "
                f"{type(model).__name__} with {len(self.layers)} without. Other normalizations are "
                "the same in both modes."
            )

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Note the modes; no layer meets other ranks, none enters a batch into its statistics."""
        modules = list(self.model.modules())
        self.training = [(module, module.training) for module in modules]
        self.live = {
            name: layer
            for name, layer in self.layers.items()
            if layer.training and pair(layer) and not getattr(layer, "_frozen", False)
        }
        self.model.eval()
        self.eval = [(module, module.training) for module in modules]
        self.actual: Statistics = {}
        for name, layer in self.live.items():
            mean, var = pair(layer) or (torch.empty(0), torch.empty(0))
            # copies: the buffers are written to
            double = torch.float64
            self.actual[name] = (mean.to(double, copy=True), var.to(double, copy=True))
        with apart(self.model):
            yield

    @contextmanager
    def mode(self, training: bool, dropout: bool = False) -> Iterator[None]:
        normalizing = set(map(id, self.layers.values()))
        for module, flag in self.training if training else self.eval:
            module.training = flag and (dropout or not training or id(module) in normalizing)
        with ExitStack() as undo:
            for layer in self.layers.values():
                if layer.training:
                    _keep(layer, undo)
            yield

    def averages(self, batches: list[Any], dropout: bool = True) -> list[Averages]:
        """What running averages converge to at these weights, from even and from odd batches."""
        folds = [Averages(), Averages()]
        with self.mode(training=True, dropout=dropout):
            for number, batch in enumerate(batches):
                with watch(self.live, folds[number % 2].add):
                    self.forward(self.model, copied(batch))
        return folds

    def path(
        self, batches: list[Any], past: list[Averages] | None, trained: list[Any] | None
    ) -> list[Step]:
        """Each cause with the statistics without it, for even and for odd batches."""
        now = self.averages(batches)
        before = now if trained is None else self.averages(trained)
        if trained is not None:  # other data: chance in them is not chance in the batches
            before = [before[0].merge(before[1])] * 2
            past = past and [past[0].merge(past[1])] * 2
        first = self.statistics(before if past is None else past)
        steps = [("lag", [self.started(fold) for fold in first]), ("stale", first)]
        if past is not None:
            steps.append(("lag", self.statistics(before)))
        if trained is not None:
            steps.append(("domain", self.statistics(now)))
        steps.append(("bessel", self.statistics(now, biased=True)))
        plain = self.averages(batches, dropout=False)
        return [*steps, ("dropout", self.statistics(plain, biased=True))]

    def statistics(self, folds: list[Averages], biased: bool = False) -> list[Statistics]:
        """For even batches from odd ones, for odd from even."""
        found = []
        for fold in reversed(folds):
            row = {}
            for name, (count, mean, unbiased, plain) in fold.items():
                stored = getattr(self.live[name], "stored_variance", "unbiased")
                var = plain if biased or stored == "biased" else unbiased
                row[name] = (mean / count, var / count)
            found.append(row)
        return found

    def started(self, target: Statistics) -> Statistics:
        """The running statistics without the 0 and 1 that they began with.

        Only in layers where that brings them nearer to ``target``: a counter may be younger than
        the statistics, as in old checkpoints.
        """
        found = dict(self.actual)
        for name, (mean, var) in self.actual.items():
            layer, weight = self.live[name], 0.0
            if layer.momentum is not None and layer.num_batches_tracked is not None:
                count = int(layer.num_batches_tracked)
                weight = (1.0 - layer.momentum) ** count if count > 0 else 0.0
            if name not in target or not _LEAST < weight < 1:
                continue
            new = mean / (1 - weight), (var - weight) / (1 - weight)
            goal, scale = target[name], target[name][1] + epsilon(layer)

            def away(held: tuple[Tensor, Tensor], goal: Any = goal, scale: Any = scale) -> float:
                shift = (held[0] - goal[0]).square() / scale
                return float((shift + ((held[1] - goal[1]) / scale).square()).sum())

            if bool((new[1] >= 0).all()) and away(new) < away((mean, var)):
                found[name] = new
        return found

    def outputs(
        self,
        batch: Any,
        statistics: Statistics | None = None,
        *,
        training: bool = False,
        values: dict[str, int] | None = None,
    ) -> dict[Call, Tensor]:
        """What each layer and the model put out for a batch."""
        found: dict[Call, Tensor] = {}

        def enter(call: Call, x: Tensor, mask: Tensor | None) -> None:
            if values is not None:
                least = per_channel(self.layers[call[0]], x, mask)
                values[call[0]] = min(values.get(call[0], least), least)

        def leave(call: Call, y: Tensor) -> None:
            found[call] = y.detach().clone()  # an activation in place may follow

        for name, held in (self.actual if statistics is None else statistics).items():
            for buffer, value in zip(pair(self.live[name]) or (), held, strict=True):
                buffer.copy_(value)
        with self.mode(training), watch(self.layers, enter, leave):
            result = self.forward(self.model, copied(batch))
        for number, y in enumerate(tensors(result)):
            if y.is_floating_point():
                found[OUTPUT, number] = y.detach()
        return found


def pair(layer: Layer) -> tuple[Tensor, Tensor] | None:
    """The running mean and variance, one per channel each, or None."""
    mean, var = layer._buffers.get("running_mean"), layer._buffers.get("running_var")
    return (mean, var) if mean is not None and var is not None and mean.shape == var.shape else None


def _keep(layer: Layer, undo: ExitStack) -> None:
    """Let a layer in training mode normalize as ever and enter nothing."""
    if isinstance(layer, RunningMoments):
        undo.callback(setattr, layer, "_blocked", layer._blocked)
        layer._blocked += 1
    elif isinstance(layer, nn.SyncBatchNorm):
        # in training mode it would meet other ranks; without statistics it takes the batch's
        for key in ("running_mean", "running_var"):
            undo.callback(layer._buffers.__setitem__, key, layer._buffers[key])
            layer._buffers[key] = None
        layer.training = False
    else:  # PyTorch's layers leave buffers alone that they do not track
        undo.callback(setattr, layer, "track_running_stats", layer.track_running_stats)
        layer.track_running_stats = False


def epsilon(layer: Layer) -> float:
    """eps, also of layers that hide it from other tools."""
    return layer._epsilon() if isinstance(layer, RunningMoments) else layer.eps


def per_channel(layer: Layer, x: Tensor, mask: Tensor | None) -> int:
    """How many values normalize a channel, the least of all channels and ghosts."""
    size = getattr(layer, "virtual_batch_size", None)
    if isinstance(size, int) and size < x.shape[0]:
        last = x.shape[0] % size
        x, mask = x[-last:] if last else x[:size], None
    return int(Moments.of(x, mask).n.min()) if mask is not None else x.numel() // x.shape[1]
