"""Which activation follows a normalization, so that one layer can compute both.

Moving an activation changes the function of a model unless exactly one call takes the layer's
output. ``torch.fx`` shows that where it can trace the model in all the ways it can be called. Else
it is known only of a model that is a ``torch.nn.Sequential``, within which no code but PyTorch's
calls the modules.
"""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer
from torch.nn.utils import parametrize

from gammabeta.ops import _activations
from gammabeta.ops._activations import Act

_SIMPLE: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
}


class Neighbor(NamedTuple):
    """The one module that takes a layer's output, or the reason why there is none."""

    name: str | None
    reason: str = ""
    proved: bool = False  # by the structure of the model, not only by what traces show
    cure: str = ""  # what to write instead; {fused} and {layer} are filled in


class Traces(NamedTuple):
    """The graphs of a model's forward pass, one for each way it can run, or why there are none."""

    graphs: list[fx.Graph]
    reason: str


def duplicate(model: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """``copy.deepcopy(model)``, of lazy layers too, whose buffers PyTorch cannot copy."""
    shared = model.parameters() if share_parameters else ()
    memo: dict[int, Any] = {id(parameter): parameter for parameter in shared}
    for buffer in model.buffers():
        if isinstance(buffer, UninitializedBuffer):
            make: Any = UninitializedBuffer  # torch does not type its arguments
            memo[id(buffer)] = make(device=buffer.device, dtype=buffer.dtype)
    return copy.deepcopy(model, memo)


def act_of(module: nn.Module) -> Act:
    """The fused activation that computes what ``module`` computes, or None."""
    kind = type(module)
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        slope = float(module.negative_slope)
        if math.isfinite(slope):
            return "leaky_relu" if slope == 0.01 else ("leaky_relu", slope)
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        return "gelu" if module.approximate == "none" else ("gelu", module.approximate)
    # the fused softplus has PyTorch's default parameters and no others
    if isinstance(module, nn.Softplus) and kind is nn.Softplus:
        return "softplus" if (module.beta, module.threshold) == (1, 20) else None
    return None


def module_of(act: Act) -> nn.Module:
    """PyTorch's module for a fused activation; the inverse of :func:`act_of`."""
    match _activations.parse(act):
        case None:
            return nn.Identity()
        case ("leaky_relu", float(slope)):
            return nn.LeakyReLU(slope)
        case ("gelu", str(approximate)):
            return nn.GELU(approximate)
        case ("softplus", _):
            return nn.Softplus()
        case (name, _):
            kinds = {known: kind for kind, known in _SIMPLE.items()}
            return kinds[name]()


def become(module: nn.Module, other: nn.Module) -> None:
    """Let ``module`` compute what ``other`` does and stay the same object, wherever it is held.

    What the two kinds do not share is taken from ``other``, but for ``inplace``, which a module
    keeps while it is an Identity.
    """
    module.__class__ = type(other)
    common = nn.Identity().__dict__
    for key, value in other.__dict__.items():
        if key == "inplace":
            module.__dict__.setdefault(key, value)
        elif key not in common:
            module.__dict__[key] = value


def why_not_plain(model: nn.Module, name: str) -> str:
    """The reason why a module must keep its own call, or ''."""
    module = model.get_submodule(name)
    if has_hooks(module):
        return f"{name!r} has a hook"
    if "forward" in module.__dict__:
        return f"{name!r} has a forward of its own"
    if parametrize.is_parametrized(module):
        return f"{name!r} is parametrized"
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
    return f"{name!r} is shared with {names[1]!r}" if len(names) > 1 else ""


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its forward."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds)


# -- traces -----------------------------------------------------------------------------


_MOST_OPTIONAL = 3  # arguments: the traces double with each
_KEPT = "gammabeta_kept"


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[fx.Proxy]] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = super().proxy(node)
        if node.op == "call_module":
            self.seen.append(weakref.ref(made))
        return made

    def kept(self) -> list[fx.Node]:
        """The calls whose output something still holds, such as a list or an attribute."""
        if any(ref() is not None for ref in self.seen):
            gc.collect()  # what only a cycle holds is not kept
        return [held.node for ref in self.seen if (held := ref()) is not None]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # what a hook does cannot be seen, and it must not be called with a proxy
        whole = isinstance(m, _BatchNorm) or has_hooks(m) or "forward" in m.__dict__
        return whole or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> Traces:
    """Trace in training and in eval mode, with each optional argument given and not given.

    One failure leaves no graphs: a branch that was not seen may use the output in another way.
    """
    if "forward" in model.__dict__:
        return Traces([], "the model has a forward of its own")
    graphs: list[fx.Graph] = []
    given: Mapping[str, Any] = {}
    asked: list[str] = []
    try:
        parameters = inspect.signature(type(model).forward).parameters.values()
        optional = [p for p in parameters if p.default is not inspect.Parameter.empty]
        if len(optional) > _MOST_OPTIONAL:
            most = f"more than the {_MOST_OPTIONAL} that are traced in every combination"
            return Traces([], f"its forward has {len(optional)} optional arguments, {most}")
        for training in (True, False):
            for given in _ways(optional):
                asked = [p.name for p in optional if p.name not in given]
                graphs.append(_trace(model, training, given))
    except Exception as error:  # whatever the model's code raises about proxies
        first = (str(error).strip().splitlines() or [""])[0]
        how = f" with {' and '.join(asked)} given" if asked else ""
        return Traces([], f"the model cannot be traced{how} ({type(error).__name__}: {first})")
    return Traces(graphs, "")


def _ways(optional: list[inspect.Parameter]) -> Iterator[dict[str, Any]]:
    """What optional arguments to fix at a value, in turn; the others stand for any value."""
    # A flag is also fixed at its opposite: `flag is True` is false for a proxy.
    fixed = [
        [p.default, not p.default] if type(p.default) is bool else [p.default] for p in optional
    ]
    anything = object()
    for values in itertools.product(*([*some, anything] for some in fixed)):
        named = zip(optional, values, strict=True)
        yield {p.name: value for p, value in named if value is not anything}


def _trace(model: nn.Module, training: bool, given: Mapping[str, Any]) -> fx.Graph:
    # Tracing runs the forward code: on a copy, lest it leave proxies in the model or count in a
    # buffer. Parameters are replaced by proxies, so that they can be shared.
    shell = duplicate(model, share_parameters=True)
    for module in shell.modules():
        module.training = training
    tracer = _Tracer()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        graph = tracer.trace(shell, dict(given) or None)
    for node in tracer.kept():
        node.meta[_KEPT] = True
    return graph


def same(before: Traces, after: Traces) -> bool:
    """Whether the model runs through the same calls, as the kinds of its modules change.

    Forward code may ask for the kind of a module; then it would run through others.
    """
    return [_calls(g) for g in before.graphs] == [_calls(g) for g in after.graphs]


def _calls(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(n.name, n.op, n.target, str(n.args), str(n.kwargs)) for n in graph.nodes]


# -- neighbors --------------------------------------------------------------------------


def neighbors(model: nn.Module, names: Iterable[str], traces: Traces) -> dict[str, Neighbor]:
    """For each layer of these names the module that alone takes its output."""
    chain = _in_sequentials(model)
    if not traces.graphs:
        unseen = Neighbor(
            None, f"{traces.reason}, and is no nn.Sequential in which a module follows"
        )
        return {name: chain.get(name, unseen) for name in names}
    found = {name: _in_graphs(name, traces.graphs) for name in names}
    return {
        name: chain[name] if name in chain and chain[name].name == seen.name else seen
        for name, seen in found.items()
    }


def _in_graphs(name: str, graphs: list[fx.Graph]) -> Neighbor:
    found: set[str] = set()
    without: set[str] = set()
    for graph in graphs:
        calls = [n for n in graph.nodes if n.op == "call_module" and n.target == name]
        if not calls:
            # a branch that is taken only in the other mode or with other arguments
            without.update(str(n.target) for n in graph.nodes if n.op == "call_module")
            continue
        if len(calls) > 1:
            return Neighbor(None, f"it is called {len(calls)} times in a forward pass")
        (call,) = calls
        if len(call.args) != 1 or call.kwargs:
            return Neighbor(None, "it is called with more than its input")
        if _KEPT in call.meta:
            return Neighbor(None, "its output is kept beyond the forward pass")
        if len(call.users) != 1:
            return Neighbor(None, f"its output is used {len(call.users)} times")
        (user,) = call.users
        if user.op == "output":
            return Neighbor(None, "its output is an output of the model")
        if user.op != "call_module":
            what = getattr(user.target, "__name__", user.target)
            reason = f"its output goes to {what}(), which is no module"
            always = all(_users(name, other) == {user.target} for other in graphs)
            return Neighbor(None, reason, cure=_cure(str(what)) if always else "")
        if sum(n.op == "call_module" and n.target == user.target for n in graph.nodes) > 1:
            reason = f"{user.target!r}, which follows it, is called several times"
            return Neighbor(None, reason, cure="give each layer an activation module of its own")
        if user.args != (call,) or user.kwargs:
            return Neighbor(None, f"{user.target!r}, which follows it, takes more than its output")
        found.add(str(user.target))
    if found & without:
        return Neighbor(None, f"{min(found & without)!r}, which follows it, is called without it")
    if len(found) == 1:
        return Neighbor(found.pop())
    return Neighbor(None, "what follows it varies" if found else "no call of it was seen")


def _users(name: str, graph: fx.Graph) -> set[object]:
    """What the output of a module goes to."""
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target == name]
    return {user.target for call in calls for user in call.users}


def _cure(function: str) -> str:
    """What fuses a layer whose output goes to a function, "" where nothing does."""
    plain = function.strip("_")
    if plain in ("add", "iadd"):
        call = "{layer}(y, residual)"
        return f"with gb.{{fused}} in its place, {call} in forward adds and activates"
    if plain in ("relu", "sigmoid", "tanh", "softplus", "silu", "gelu"):
        return f"gb.{{fused}}(..., act={plain!r}) in its place does it without {function}()"
    return ""


def _in_sequentials(model: nn.Module) -> dict[str, Neighbor]:
    """Who follows whom in a model that is an ``nn.Sequential``, through nested ones too."""
    if not _is_chain(model):
        return {}
    names = {module: name for name, module in model.named_modules()}
    return {
        names[first]: Neighbor(names[second], proved=True)
        for first, second in itertools.pairwise(_chain(model))
    }


def _is_chain(module: nn.Module) -> bool:
    plain = type(module) is nn.Sequential and "forward" not in module.__dict__
    return plain and not has_hooks(module)


def _chain(module: nn.Module) -> Iterator[nn.Module]:
    # not children(), which leaves out a module's second place
    for child in module._modules.values():
        if child is not None and _is_chain(child):
            yield from _chain(child)
        elif child is not None:
            yield child
