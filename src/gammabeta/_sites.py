"""Where normalization layers sit in a model: what feeds them, what follows, who receives it.

Seen from outside while the model runs: hooks around layers, and every call of a torch function in
between, so that functional code shows as much as modules do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from gammabeta._guard import Held, copied, unwrap
from gammabeta.ops import _torch

# fmt: off
# Names of functions, without a trailing underscore.
_ACTIVATIONS = {
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu",
    "mish", "glu", "sigmoid", "hardsigmoid", "logsigmoid", "tanh", "hardtanh", "hardswish",
    "hardshrink", "softshrink", "tanhshrink", "softplus", "softsign", "softmax", "log_softmax",
    "softmin", "threshold", "clamp", "clamp_min", "clip",
}
# What a constant added to a channel passes through as a constant.
_PASSING = {
    "__get__", "__getitem__", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten",
    "permute", "transpose", "t", "swapaxes", "movedim", "contiguous", "to", "type", "type_as",
    "float", "double", "half", "bfloat16", "clone", "detach", "alias", "squeeze", "unsqueeze",
    "expand", "expand_as", "repeat", "chunk", "split", "unbind", "narrow", "select", "roll",
    "flip", "pad", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout",
    "alpha_dropout", "feature_alpha_dropout", "channel_shuffle", "pixel_shuffle",
    "pixel_unshuffle", "interpolate", "upsample", "requires_grad", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "boolean_dispatch", "fn", "mean", "mul", "__mul__", "__rmul__",
    "__imul__", "div", "__truediv__", "__itruediv__",
}
# What leaves the values as they are.
_SAME = {
    "contiguous", "to", "type", "float", "double", "half", "bfloat16", "clone", "alias",
    "view_as",
}
_MERGING = {
    "add", "__add__", "__radd__", "__iadd__", "sub", "__sub__", "__rsub__", "__isub__", "cat",
    "concat", "concatenate", "stack",
}


# fmt: on


class Site(NamedTuple):
    """Where one normalization layer sits.

    Attributes:
        name: its qualified name in ``model.named_modules()``.
        module: the layer.
        producer: qualified name of the weight layer (a module with a ``weight`` of two or more
            dimensions) whose output feeds it, through views, pooling, dropout, concatenation and
            residual additions, of several the one with the fewest of these; None if an activation
            or nothing of the kind comes before it.
        activation: the function that alone takes its output: "relu", "sigmoid", ...; that of a
            fused layer; None if there is none.
        consumers: qualified names of the weight layers that receive the activated output next,
            in order; of the ways there those with the fewest additions and concatenations.
        calls: how often the forward pass called it; what is said above is of the first call.
    """

    name: str
    module: nn.Module
    producer: str | None
    activation: str | None
    consumers: tuple[str, ...]
    calls: int


def is_normalization(module: nn.Module) -> bool:
    """Whether it is a layer of this package or one of PyTorch's that normalizes."""
    # the base of batch and instance normalization, and of all layers of this package
    return isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm)


def is_weight_layer(module: nn.Module) -> bool:
    """Whether it multiplies by a matrix or kernel of its own, called ``weight``, and does no more.

    One that has layers inside is the code around them.
    """
    inside = (m for m in module.modules() if m is not module)
    return _has_weight(module) and not any(is_normalization(m) or _has_weight(m) for m in inside)


def _has_weight(module: nn.Module) -> bool:
    if parametrize.is_parametrized(module, "weight"):
        # never the attribute: reading it in training mode moves the state of spectral_norm
        parts = cast(nn.ModuleDict, module.parametrizations)["weight"]._parameters.values()
        dims = [part.dim() for part in parts if isinstance(part, Tensor)]
        return max(dims, default=0) > 1 and not is_normalization(module)
    # the older hooks for spectral and weight normalization put a tensor in the parameter's place
    weight = module._parameters.get("weight", module.__dict__.get("weight"))
    return isinstance(weight, Tensor) and weight.dim() > 1 and not is_normalization(module)


class _Node:
    """One value in the flow through the model: what made it, out of what."""

    __slots__ = ("inputs", "kind", "name", "order", "result", "users")

    def __init__(self, kind: str, name: str, inputs: list[_Node], order: int) -> None:
        self.kind, self.name, self.inputs, self.order = kind, name, inputs, order
        self.users: list[_Node] = []
        self.result: Tensor | None = None
        for node in inputs:
            node.users.append(self)


class Flow(NamedTuple):
    """What a :class:`Trace` has seen."""

    sites: tuple[Site, ...]  # in order of their first call
    weights: tuple[str, ...]  # the weight layers in order of their first use
    activated: dict[str, Tensor]  # by site, what the activation gave that follows it


class Trace(TorchFunctionMode):
    """Records the flow between the layers of ``model`` while it runs inside ``with``.

    The model must be held (:class:`._guard.Held`): the hooks are not taken off again. Other hooks
    that replace outputs must come first, so that what they put in place is followed.

    Args:
        model: the module that runs.
        keep: whether to keep the results of activations that follow normalization layers.
    """

    def __init__(self, model: nn.Module, keep: bool = False) -> None:
        super().__init__()
        self._keep = keep
        self._nodes: dict[int, tuple[weakref.ref[Tensor], _Node]] = {}  # by id, while it lives
        self._inside = 0
        self._paused = False
        self._frames: list[list[_Node]] = []
        self._every: list[_Node] = []
        self._modules: dict[str, nn.Module] = {}
        self._first: dict[str, _Node] = {}
        self._calls: dict[str, int] = {}
        self._weights: dict[str, None] = {}  # in order of the first use
        self._owner: dict[int, str] = {}
        self._live: set[_Node] = set()
        self._results: dict[int, _Node] = {}
        for name, module in model.named_modules():
            kind = "norm" if is_normalization(module) else "weight"
            if kind == "norm" or is_weight_layer(module):
                self._modules[name] = module
                self._watch(name, kind, module)
            elif not module._modules and not type(module).__module__.startswith("torch.nn."):
                # its code may call what no mode sees; PyTorch's does not
                self._watch(name, "other", module)
            if _has_weight(module):
                self._owner[id(module._parameters.get("weight"))] = name

    def _watch(self, name: str, kind: str, module: nn.Module) -> None:
        layer = kind != "other"

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            if _torch.in_backward():
                return
            self._frames.append(self._known(_tensors(args, kwargs)))
            if layer:
                if not self._inside:
                    # a layer may compute otherwise under a mode than in training
                    self._pause()
                self._inside += 1

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # after an exception, also one that came before the hook above
            if _torch.in_backward() or not self._frames:
                return
            inputs = self._frames.pop()
            if layer:
                self._inside -= 1
                if not self._inside:
                    self._resume()
            if self._inside:
                return
            results = _tensors(output)
            if layer:
                self._layer(kind, name, inputs, results)
            elif inputs and len(self._known(results)) < len(results):
                self._made_by("opaque", type(module).__name__, inputs, results)

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True, always_call=True)

    def _pause(self) -> None:
        leave: Callable[..., object] = super().__exit__  # torch leaves both without types
        leave(None, None, None)
        self._paused = True

    def _resume(self) -> None:
        enter: Callable[[], object] = super().__enter__
        enter()
        self._paused = False

    def __exit__(self, *exception: Any) -> None:
        # PyTorch calls no hook after a Ctrl-C inside a layer
        if not self._paused:
            self._pause()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        written = self._results.get(id(first))
        if written is not None and written.result is first and isinstance(first, Tensor):
            name = str(getattr(func, "__name__", ""))
            if name.startswith("__i") or name.endswith("_") or kwargs.get("inplace"):
                written.result = first.clone()
        result = func(*args, **kwargs)
        if _torch.in_backward():
            return result
        results = _tensors(result)
        if not results:
            return result
        given = _tensors(args, kwargs)
        inputs = self._known(given)
        owners = {self._owner[id(t)]: None for t in given if id(t) in self._owner}
        name = str(getattr(func, "__name__", func))
        if not name.endswith("__"):
            name = name.strip("_")
        if owners and len(owners) < len(given):
            for owner in owners:
                self._layer("weight", owner, inputs, results)
        elif inputs:
            self._made_by(
                _kind_of(name, len(inputs)), _precise(name, args, kwargs), inputs, results
            )
        return result

    def _known(self, tensors: list[Tensor]) -> list[_Node]:
        """What made each of ``tensors``, of those that a layer had a part in."""
        found = []
        for tensor in tensors:
            made = self._nodes.get(id(tensor))
            if made is not None and made[0]() is tensor:
                found.append(made[1])
        return found

    def _layer(self, kind: str, name: str, inputs: list[_Node], results: list[Tensor]) -> None:
        node = self._made_by(kind, name, inputs, results)
        if kind == "weight":
            self._weights.setdefault(name)
        else:
            self._first.setdefault(name, node)
            self._calls[name] = self._calls.get(name, 0) + 1

    def _made_by(self, kind: str, name: str, inputs: list[_Node], results: list[Tensor]) -> _Node:
        node = _Node(kind, name, inputs, len(self._every))
        self._every.append(node)
        for result in results:
            self._nodes[id(result)] = weakref.ref(result), node
        if kind == "act" and self._keep and any(n.kind in ("norm", "pass") for n in inputs):
            node.result = results[0]
            self._results[id(results[0])] = node
        return node

    def end(self, result: Any) -> Flow:
        """What was seen in a run for ``result``; side branches are no uses of what they look at."""
        ahead = self._known(_tensors(result))
        while ahead:
            node = ahead.pop()
            if node not in self._live:
                self._live.add(node)
                ahead += node.inputs
        found, activated = [], {}
        for name, node in self._first.items():
            activation, value = self._activation(name)
            module, calls = self._modules[name], self._calls[name]
            found.append(Site(name, module, _producer(node), activation, _consumers(node), calls))
            if value is not None:
                activated[name] = value
        for node in self._every:  # cycles would keep the tensors until they are collected
            node.users.clear()
        return Flow(tuple(found), tuple(self._weights), activated)

    def _activation(self, name: str) -> tuple[str | None, Tensor | None]:
        fused = getattr(self._modules[name], "act", None)
        if fused is not None:
            return (fused if isinstance(fused, str) else str(fused[0])), None
        node = self._first[name]
        while True:
            users = [n for n in node.users if n in self._live] if node in self._live else node.users
            if len(users) != 1:
                return None, None
            (node,) = users
            if node.kind == "act":
                return node.name, node.result
            if node.kind != "pass" or node.name not in _SAME:
                return None, None


def _tensors(*values: Any) -> list[Tensor]:
    """The tensors in ``values``, and in their tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)) and value:
            found += _tensors(*value)
        elif isinstance(value, dict) and value:
            found += _tensors(*value.values())
    return found


def _kind_of(name: str, inputs: int) -> str:
    if name in _ACTIVATIONS:
        return "act"
    if name in _MERGING:
        return "merge" if inputs > 1 else "pass"
    return "pass" if name in _PASSING and inputs == 1 else "opaque"


def _precise(name: str, args: Any, kwargs: Any) -> str:
    """The usual name of what goes by a more general one."""
    limits = [*args[1:3], kwargs.get("min_val"), kwargs.get("max_val")]
    if name == "hardtanh" and [v for v in limits if v is not None] == [0, 6]:
        return "relu6"
    return name


def _producer(node: _Node) -> str | None:
    """The weight layer behind with the fewest merges between; of several the last that ran."""
    found = _nearest(node, lambda n: n.inputs, lambda n: n.kind in ("pass", "merge"))
    return found[-1].name if found else None


def _consumers(node: _Node) -> tuple[str, ...]:
    """The weight layers ahead, on the ways with the fewest merges."""
    found = _nearest(node, lambda n: n.users, lambda n: n.kind != "norm")
    return tuple(dict.fromkeys(n.name for n in found))


def _nearest(
    node: _Node, towards: Callable[[_Node], list[_Node]], passes: Callable[[_Node], bool]
) -> list[_Node]:
    """The first weight layers that are met, by order; a merge counts as a step, others do not."""
    level, seen = [node], {node}
    while level:
        found: list[_Node] = []
        merges: list[_Node] = []
        while level:
            for other in towards(level.pop()):
                if other in seen:
                    continue
                seen.add(other)
                if other.kind == "weight":
                    found.append(other)
                elif passes(other):
                    (merges if other.kind == "merge" else level).append(other)
        if found:
            return sorted(found, key=lambda n: n.order)
        level = merges
    return []


def run(model: nn.Module, batch: Any, forward: Callable[..., Any] | None) -> Any:
    """Call the model as a Step without a loss does."""
    if forward is not None:
        return forward(model, batch)
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    return model(batch[0] if pair else batch)


def sites(
    model: nn.Module, batch: Any, *, forward: Callable[[Any, Any], Any] | None = None
) -> tuple[Site, ...]:
    """Find where normalization layers sit in ``model``, by one forward pass in training mode.

    It leaves no trace in the model. Modules, ``torch.nn.functional`` and operators are followed
    alike; a call of ``layer.forward`` in place of ``layer``, and what a compiled or custom function
    does inside, is not seen.

    Args:
        model: any module; inside a ``DistributedDataParallel`` or compiled one, that is looked at.
        batch: x, or a pair (x, y) of which ``model(x)`` is called.
        forward: called as ``forward(model, batch)`` instead; what it returns is not looked at.

    Returns:
        One :class:`Site` for each normalization layer that was called, in order of the forward:
        ours, and PyTorch's batch, instance, group and layer normalization.

    Raises:
        TypeError: the model is no module, is scripted or sharded.
        ValueError: it has lazy parameters.

    >>> import torch, gammabeta as gb
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(2, 3), gb.BatchNorm1d(3), torch.nn.ReLU(), torch.nn.Linear(3, 1)
    ... )
    >>> for site in gb.sites(model, torch.randn(4, 2)):
    ...     print(site.name, site.producer, site.activation, site.consumers, site.calls)
    1 0 relu ('3',) 1
    """
    held = Held(unwrap(model, "sites"))
    with torch.no_grad(), held.running():
        trace = Trace(held.model)
        with trace:
            result = run(held.model, copied(batch), forward)
        return trace.end(result).sites
