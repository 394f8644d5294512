"""What the rules look at: a model, measured without a trace, each measurement made once."""

from __future__ import annotations

import copy
import keyword
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gammabeta._check._finding import Untried
from gammabeta._guard import Held, copied, unwrap
from gammabeta._sites import is_weight_layer
from gammabeta.layers._running import RunningMoments
from gammabeta.models._population import Call, Forward, run, tensors, watch
from gammabeta.moments import Moments
from gammabeta.ops import _torch
from gammabeta.probes._modes import Layer, Modes, epsilon, pair, per_channel
from gammabeta.probes.train_eval import GapTable, finite, gap

NO_BATCH = "a batch is needed, batch="
_DRAWS = 4  # of dropout masks
_PARTS = 8  # of a batch, where the gap is measured with one


class Pass(NamedTuple):
    """What one forward pass in eval mode showed.

    Attributes:
        calls: how often each layer was called, in order of the forward.
        values: values per channel, the least of all calls.
        total: values per channel of all calls together, masked ones too.
        moments: of each call's input.
        dropout: the last dropout module before each layer's first call, "" if none.
        moved: by how many standard deviations running means moved, where anything changed.
    """

    calls: dict[str, int]
    values: dict[str, int]
    total: dict[str, float]
    moments: dict[Call, Moments]
    dropout: dict[str, str]
    moved: dict[str, float]


class Trained(NamedTuple):
    """What one forward and backward pass in training mode showed.

    Attributes:
        forward, backward: how many batches each layer counted in which pass.
        once, all: by how many standard deviations the running means moved by then.
        biases: (module with a bias, layer that it feeds directly): of the gradient that passes
            through the module's output, the part that its bias receives.
        mixed: of those layers, the ones that something else enters too.
    """

    forward: dict[str, int]
    backward: dict[str, int]
    once: dict[str, float]
    all: dict[str, float]
    biases: dict[tuple[str, str], float]
    mixed: set[str]


class Watched(NamedTuple):
    """What a function of the user's did: batches that each layer counted, standard deviations by
    which running means moved, values per channel in all forward passes, which layers were
    recomputed in a backward pass, which ran with gradients while the whole model was in eval mode,
    and the parameters that learned, by id.
    """

    counted: dict[str, int]
    moved: dict[str, float]
    values: dict[str, float]
    again: set[str]
    asleep: set[str]
    learned: set[int]


Snapshot = dict[str, tuple[Tensor, Tensor, int]]


class Evidence:
    """A model and what a check was given beside it."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        optimizer: torch.optim.Optimizer | None,
        batches: list[Any] | None,
        forward: Forward | None,
        step: Callable[[nn.Module, Any], Any] | None,
        evaluate: Callable[[nn.Module, Any], Any] | None,
        epoch: int | None,
    ) -> None:
        self.given, self.model = model, unwrap(model, "check")
        self.root = _inside(self.given, self.model)
        self._batches = batches
        self._batch = self._batches[0] if batch is None and self._batches else batch
        self.optimizer, self.forward = optimizer, forward or run
        self.step, self.evaluate, self.epoch = step, evaluate, epoch
        self.layers: dict[str, Layer] = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, _BatchNorm | RunningMoments)
        }

    @cached_property
    def held(self) -> Held:
        return Held(self.model)

    @property
    def batch(self) -> Any:
        if self._batch is None:
            raise Untried(NO_BATCH)
        return self._batch

    @cached_property
    def live(self) -> dict[str, Layer]:
        """The layers that normalize by the batch in training mode."""
        with self.held.running():
            return {
                name: layer
                for name, layer in self.layers.items()
                if layer.training and not getattr(layer, "_frozen", False)
            }

    @cached_property
    def updating(self) -> dict[str, Layer]:
        """Those of them that enter it into running statistics."""
        return {
            name: layer
            for name, layer in self.live.items()
            if layer.track_running_stats and layer._buffers.get("running_mean") is not None
        }

    def path(self, name: str) -> str:
        """The Python expression for a module of the model that was given."""
        text, module = self.root, self.model
        for part in name.split(".") if name else ():
            inside = module._modules.get(part)
            if part.isdigit() and isinstance(module, nn.Sequential | nn.ModuleList):
                text += f"[{part}]"
            elif (
                part.isidentifier()
                and not keyword.iskeyword(part)
                and part not in dir(type(module))
            ):
                text += f".{part}"
            else:
                return f"{self.root}.get_submodule({name!r})"
            module = inside if inside is not None else nn.Module()
        return text

    def counted(self, name: str) -> int:
        tracked = self.layers[name].num_batches_tracked
        return 0 if tracked is None else int(tracked)

    @cached_property
    def initial(self) -> set[str]:
        """Layers whose running statistics are those that they were built with."""
        found = set()
        for name, layer in self.layers.items():
            held = pair(layer)
            if held is not None and not held[0].any() and bool((held[1] == 1).all()):
                found.add(name)
        return found

    def still(self, module: nn.Module) -> bool:
        """Whether the module has parameters, and none that is trained."""
        held = None
        if self.optimizer is not None:
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        parameters = list(module.parameters())
        return bool(parameters) and not any(
            p.requires_grad and (held is None or id(p) in held) for p in parameters
        )

    def around(self, name: str) -> nn.Module:
        """The layer or, where it has no parameters, the innermost module around it that has."""
        found = self.model.get_submodule(name)
        while not any(True for _ in found.parameters()) and name:
            name = name.rpartition(".")[0]
            found = self.model.get_submodule(name)
        return found

    def ours(self, names: Iterable[str]) -> bool:
        return all(isinstance(self.layers[name], RunningMoments) for name in names)

    # -- measurements -------------------------------------------------------------------

    @cached_property
    def seen(self) -> Pass:
        found = Pass({}, {}, {}, {}, {}, {})
        last = [""]

        def enter(call: Call, x: Tensor, mask: Tensor | None) -> None:
            name, number = call
            found.calls[name] = number + 1
            least = per_channel(self.layers[name], x, mask) * _ranks(self.layers[name])
            found.values[name] = min(found.values.get(name, least), least)
            found.total[name] = found.total.get(name, 0.0) + x.numel() / x.shape[1]
            found.moments[call] = Moments.of(x, mask)
            found.dropout.setdefault(name, last[-1])

        def measure() -> None:
            for name, module in self.model.named_modules():
                if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                    module.register_forward_pre_hook(lambda *_, name=name: last.append(name))
            before = self._snapshot()
            with watch(self.layers, enter):
                self.forward(self.model, copied(self.batch))
            found.moved.update(self._moved(before))

        batch, held = self.batch, self.held
        try:
            with torch.no_grad(), held.running(training=False):
                measure()
        except Exception as error:
            where, cause = self._refused(batch, error)
            said = str(cause).strip().partition("\n")[0].removesuffix(".")
            raise RuntimeError(
                f"check: the model could not be run on the batch that was given{where}: "
                f"{type(cause).__name__}: {said}. Give a batch as in training, and forward= where "
                "the model is called otherwise."
            ) from cause
        return found

    def _refused(self, batch: Any, error: Exception) -> tuple[str, Exception]:
        """The innermost module in which a batch ends, in words, and what it raised."""
        entered: list[tuple[str, Any]] = []

        def leave(*_: Any) -> None:
            entered.pop()

        try:
            with torch.no_grad(), self.held.running(training=False):
                for name, module in self.model.named_modules():
                    module.register_forward_pre_hook(
                        lambda _, args, name=name: entered.append((name, args[:1]))
                    )
                    module.register_forward_hook(leave)
                self.forward(self.model, copied(batch))
        except Exception as again:
            if not entered:
                return "", again
            name, given = entered[-1]
            kind = type(self.model.get_submodule(name)).__name__
            where = f", in layer {name} ({kind})" if name else ""
            for x in tensors(given):
                dtype = str(x.dtype).removeprefix("torch.")
                where += f", {'which got ' * bool(name)}{dtype} values of shape {tuple(x.shape)}"
            return where, again
        return "", error

    @cached_property
    def broken(self) -> str:
        """What is not finite in training mode, in words; "" where all is."""
        self.needs_pairs()
        first: list[str] = []
        reached: list[str] = []

        def enter(call: Call, x: Tensor, mask: Tensor | None) -> None:
            # what a mask hides may be anything
            if not bool(Moments.of(x, mask).m2.isfinite().all()):
                reached.append(call[0])

        def leaving(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, y: Any) -> None:
                if not first and not finite(y):
                    first.append(name)

            return hook

        with torch.no_grad(), self.held.running():
            for name, module in self.model.named_modules():
                if not module._modules:
                    module.register_forward_hook(leaving(name))
            with watch(self.layers, enter):
                result = self.forward(self.model, copied(self.batch))
        if not reached and finite(result):
            return ""
        if not finite(self.batch):
            return "the batch"
        if first:
            return f"the output of layer {first[0] or '(model)'}"
        return f"what layer {reached[0] or '(model)'} gets" if reached else "the model's output"

    def needs_finite(self) -> None:
        """Nothing can be told from NaN."""
        with _reported("a pass in training mode"):
            broken = self.broken
        if broken:
            raise Untried(f"{broken} is not finite")

    @cached_property
    def trained(self) -> Trained:
        self.needs_pairs()
        with _reported("a pass in training mode"):
            return self._trained()

    def _trained(self) -> Trained:
        leaves = {n: p.clone().requires_grad_() for n, p in self.held.parameters().items()}
        with torch.enable_grad(), self.held.running(leaves):
            biases = _Biases(self.model, self.live)
            start = self._snapshot()
            result = self.forward(self.model, copied(self.batch))
            middle, once = self._snapshot(), self._moved(start)
            loss = _scalar(result)
            if loss is not None:
                # not autograd.grad(): reentrant checkpoints refuse it
                torch.autograd.backward(loss)
            end, whole = self._snapshot(), self._moved(start)
            found = biases.shares(leaves)
        names = list(start)
        return Trained(
            {name: middle[name][2] - start[name][2] for name in names},
            {name: end[name][2] - middle[name][2] for name in names},
            {name: once.get(name, 0.0) for name in names},
            {name: whole.get(name, 0.0) for name in names},
            found,
            biases.mixed,
        )

    def needs_pairs(self) -> None:
        """Training mode raises where a channel has one value; BN006 tells of it."""
        for name, values in self.seen.values.items():
            single = getattr(self.layers[name], "on_single", "error") == "error"
            if values < 2 and name in self.live and single:
                raise Untried(
                    f"{name or 'the model'} gets {values} value per channel, and training mode "
                    "needs two: give a larger batch"
                )

    def needs_statistics(self) -> None:
        if not any(pair(layer) for layer in self.layers.values()):
            raise Untried("no layer has running statistics: both modes normalize by the batch")

    @cached_property
    def variances(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """(mean with dropout, variance with, variance without) of what enters each live layer."""
        self.needs_statistics()
        self.needs_finite()
        with _reported("a pass in training mode"):
            modes = Modes(self.model, self.forward)
            with torch.no_grad(), self.held.running(), modes.ready():
                with_it = modes.averages([self.batch] * _DRAWS)
                without = modes.averages([self.batch], dropout=False)[0]
        found = {}
        for name, (count, mean, _, var) in with_it[0].merge(with_it[1]).items():
            if name in without:
                calls, _, _, plain = without[name]
                found[name] = mean / count, var / count, plain / calls
        return found

    @property
    def several(self) -> bool:
        """Whether there are batches of their own to measure the gap with."""
        return self._batches is not None and len(self._batches) > 1

    def has(self, argument: str) -> bool:
        """Whether this argument of the check was given."""
        return self.several if argument == "batches" else getattr(self, argument) is not None

    @cached_property
    def compared(self) -> list[Any]:
        """What the gap is measured between: batches, or parts of the one."""
        if self._batches is not None and self.several:
            return self._batches
        least = min((n for name, n in self.seen.values.items() if name in self.live), default=0)
        size = next((len(t) for t in tensors(self.batch) if t.dim()), 0)
        number = max(2, min(_PARTS, size // 2, least // 16))
        if least // number < 2:
            raise Untried("each half of the batch needs two values per channel, or batches=")
        if size < 2 * number:
            raise Untried("the batch must be one that can be halved, or batches= given")
        return [_part(self.batch, size, slice(start, None, number)) for start in range(number)]

    @cached_property
    def gaps(self) -> GapTable:
        self.needs_statistics()
        self.needs_finite()
        compared = self.compared
        with _reported("gb.gap"):
            return gap(self.model, compared, forward=self.forward)

    @cached_property
    def stepped(self) -> Watched:
        """What one training step of the user's does."""
        assert self.step is not None
        return self.while_running(self.step)

    @cached_property
    def forgotten(self) -> list[str]:
        """Layers that a training step trains, all in eval mode with the whole of the model."""
        if self.step is None:
            return []
        ran = self.stepped
        return [
            name
            for name, layer in self.layers.items()
            if name in ran.asleep
            and not ran.counted.get(name)
            and pair(layer) is not None
            and not getattr(layer, "_frozen", False)
            and not self.still(self.around(name))
            and any(id(p) in ran.learned for p in self.around(name).parameters())
        ]

    def while_running(self, function: Callable[[nn.Module, Any], Any]) -> Watched:
        """What the user's ``function(model, batch)`` does in each layer."""
        values: dict[str, float] = {}
        again: set[str] = set()
        asleep: set[str] = set()
        weighted = [m for m in self.model.modules() if list(m.parameters(recurse=False))]

        def enter(call: Call, x: Tensor, mask: Tensor | None) -> None:
            if _torch.in_backward():
                again.add(call[0])
                return
            values[call[0]] = values.get(call[0], 0.0) + x.numel() / x.shape[1]
            # a part in training mode says that the others are in eval mode on purpose
            if torch.is_grad_enabled() and not any(m.training for m in weighted):
                asleep.add(call[0])

        parameters = list(self.model.parameters())
        initial = [p.detach() for p in parameters]  # what is lent is a copy
        with self._lent():
            before = self._snapshot()
            with watch(self.layers, enter):
                function(self.given, copied(self._batch))
            moved, after = self._moved(before), self._snapshot()
            pairs = zip(parameters, initial, strict=True)
            learned = {id(p) for p, value in pairs if not torch.equal(p.detach(), value)}
            # without an optimizer's step its gradients are what there is to see
            learned = learned or {id(p) for p in parameters if p.grad is not None}
        counted = {name: after[name][2] - held[2] for name, held in before.items()}
        return Watched(counted, moved, values, again, asleep, learned)

    @contextmanager
    def _lent(self) -> Iterator[None]:
        """The model with its own parameters, which an optimizer may change; all put back after."""
        modes = [(module, module.training) for module in self.given.modules()]
        own = {module: dict(module._parameters) for module in self.held.modules}
        lists = [
            (value, list(value))  # recurrent layers keep their weights in one
            for module in self.held.modules
            for value in module.__dict__.values()
            if type(value) is list and any(isinstance(part, nn.Parameter) for part in value)
        ]
        parameters = {id(p): p for p in self.model.parameters()}
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        for group in groups:
            parameters.update({id(p): p for p in group["params"]})
        values: list[tuple[Any, Tensor, Tensor | None]]
        values = [(p, p.data, p.grad) for p in parameters.values()]
        settings = [(group, dict(group)) for group in groups]
        states = {} if self.optimizer is None else dict(self.optimizer.state)
        with self.held.running():
            try:
                for module, held in own.items():
                    module._parameters.update(held)
                for value, parts in lists:
                    value[:] = parts
                for module, mode in modes:
                    module.training = mode
                for p, data, _ in values:
                    p.data, p.grad = data.clone(), None
                for group, setting in settings:
                    group.update({k: copied(v) for k, v in setting.items() if k != "params"})
                if self.optimizer is not None:
                    for p, state in states.items():
                        self.optimizer.state[p] = copy.deepcopy(state)
                yield
            finally:
                for p, data, grad in values:
                    p.data, p.grad = data, grad
                for group, setting in settings:
                    group.clear()
                    group.update(setting)
                if self.optimizer is not None:
                    self.optimizer.state.clear()
                    self.optimizer.state.update(states)
                for module, mode in modes:
                    module.training = mode

    def _snapshot(self) -> Snapshot:
        found = {}
        for name, layer in self.layers.items():
            held = pair(layer)
            if held is not None:
                mean, var = (t.to(torch.float64, copy=True) for t in held)
                found[name] = (mean, var, self.counted(name))
        return found

    def _moved(self, before: Snapshot) -> dict[str, float]:
        moved = {}
        for name, (mean, var, count) in self._snapshot().items():
            old = before[name]
            same = torch.equal(mean, old[0]) and torch.equal(var, old[1])
            if count != old[2] or not same:
                shift = (mean - old[0]).abs() / (old[1] + epsilon(self.layers[name])).sqrt()
                largest = float(shift.max())
                moved[name] = largest if math.isfinite(largest) else math.inf
        return moved


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """A measurement that fails costs its rules, not the report."""
    try:
        yield
    except Untried:
        raise
    except Exception as error:
        said = str(error).strip().partition("\n")[0].removesuffix(".")
        raise Untried(f"{what} raised {type(error).__name__}: {said}") from error


def _inside(given: nn.Module, model: nn.Module) -> str:
    """The expression for the model inside of wrappers."""
    text, module = "model", given
    while module is not model:
        key = "_orig_mod" if "_orig_mod" in module._modules else "module"
        text, module = f"{text}.{key}", module.get_submodule(key)
    return text


class _Biases:
    """Which biases feed a normalization directly, and what gradient they receive."""

    def __init__(self, model: nn.Module, layers: dict[str, Layer]) -> None:
        self._made: dict[int, tuple[str, Tensor, int]] = {}
        self._pairs: dict[tuple[str, str], int] = {}
        self._calls: dict[str, int] = {}
        self._through: dict[str, float] = {}
        for name, module in model.named_modules():
            bias = module._parameters.get("bias")
            if name in layers:
                module.register_forward_pre_hook(self._entering(name))
            elif is_weight_layer(module) and bias is not None:
                module.register_forward_hook(self._leaving(name))

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, y: Any) -> None:
            if isinstance(y, Tensor):
                made: Any = y
                # the version tells whether anything wrote to it before the layer
                self._made[y.untyped_storage()._cdata] = (name, y, y._version)
                if y.requires_grad:
                    made.register_hook(self._passing(name))

        return hook

    def _passing(self, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            size = float(gradient.detach().abs().sum(dtype=torch.float64))
            self._through[name] = self._through.get(name, 0.0) + size

        return hook

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._calls[name] = self._calls.get(name, 0) + 1
            x = args[0] if args else None
            if not isinstance(x, Tensor):
                return
            found = self._made.get(x.untyped_storage()._cdata)
            if found is not None and found[1].numel() == x.numel() and found[2] == x._version:
                fed = found[0], name
                self._pairs[fed] = self._pairs.get(fed, 0) + 1

        return hook

    @property
    def mixed(self) -> set[str]:
        """Layers that something else enters too than the one module with a bias."""
        return {name for (_, name), n in self._pairs.items() if n != self._calls[name]}

    def shares(self, leaves: dict[str, Tensor]) -> dict[tuple[str, str], float]:
        found = {}
        for producer, layer in self._pairs:
            leaf = leaves.get(f"{producer}.bias")
            through = self._through.get(producer, 0.0)
            if leaf is None or leaf.grad is None or not through:
                found[producer, layer] = 0.0
            else:
                found[producer, layer] = float(leaf.grad.abs().sum(dtype=torch.float64)) / through
        return found


def _ranks(layer: Layer) -> int:
    group = getattr(layer, "_group", None)
    if group is None and not isinstance(layer, nn.SyncBatchNorm):
        return 1
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _scalar(result: Any) -> Tensor | None:
    """A loss that depends on every value of the output, with fixed random weights."""
    parts = [y for y in tensors(result) if y.is_floating_point() and y.requires_grad]
    if len(parts) == 1 and parts[0].numel() == 1:
        return parts[0].reshape(())
    terms = [(y * torch.randn_like(y)).sum() for y in parts]
    return torch.stack([term.float() for term in terms]).sum() if terms else None


def _part(value: Any, size: int, chosen: slice) -> Any:
    """Some samples of a batch of ``size``; what is not one entry a sample stays."""
    if isinstance(value, Tensor):
        return value[chosen] if value.dim() and len(value) == size else value
    if isinstance(value, dict):
        return {key: _part(item, size, chosen) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_part(item, size, chosen) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
