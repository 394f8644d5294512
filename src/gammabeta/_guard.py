"""Run a model and leave it as it was.

The tensors of the model are replaced by copies for the time of a run, not written back after it:
a pending backward pass of the user's would notice that its saved tensors were written to.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gammabeta.layers._running import RunningMoments

Undo = Callable[[], object]


def unwrap(model: nn.Module, caller: str) -> nn.Module:
    """The module inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``.

    Raises:
        TypeError: not a module, scripted, or sharded over processes.
        ValueError: it has lazy parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"gammabeta.{caller}: model must be a torch.nn.Module, got {type(model).__name__}. "
            "Wrap a function of parameters in a module that owns them."
        )
    while True:
        inner = model._modules.get("_orig_mod")
        kinds = {kind.__name__ for kind in type(model).__mro__}
        if inner is None and kinds & {"DistributedDataParallel", "DataParallel"}:
            inner = model._modules.get("module")
        if inner is None:
            break
        model = inner
    for name, module in model.named_modules():
        where = repr(name) if name else "the model itself"
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"gammabeta.{caller}: the model must be Python code, got {where}, which is "
                "scripted: what happens inside cannot be seen. Give the module before "
                "torch.jit.script or torch.jit.trace."
            )
        if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
            raise TypeError(
                f"gammabeta.{caller}: every process must hold the whole model, got {where}, which "
                "is sharded by FSDP. Give the unsharded model, or use DistributedDataParallel."
            )
        held = (*module._parameters.items(), *module._buffers.items())
        lazy = [key for key, value in held if value is not None and is_lazy(value)]
        if lazy:
            raise ValueError(
                f"gammabeta.{caller}: all parameters must have a shape, got {where}, whose "
                f"{lazy[0]!r} is lazy. Run one batch through the model first."
            )
        empty = [key for key, value in held if value is not None and value.is_meta]
        if empty:
            raise ValueError(
                f"gammabeta.{caller}: all tensors must hold values, got {where}, whose "
                f"{empty[0]!r} is on the device 'meta'. Move the model with "
                "model.to_empty(device='cpu') and load its state_dict first."
            )
    return model


def copied(value: Any) -> Any:
    """``value`` with copies of the tensors in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, tuple):
        parts = [copied(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if type(value) is list:
        return [copied(part) for part in value]
    if type(value) is dict:
        return {key: copied(part) for key, part in value.items()}
    return value


class Held:
    """A model's tensors and the random states at one time, to run it from there, often.

    ``others`` are modules that the run calls too, such as a loss with buffers.
    """

    def __init__(self, model: nn.Module, *others: Any) -> None:
        trees = [model, *(other for other in others if isinstance(other, nn.Module))]
        self.model = model
        self.modules = list({id(m): m for tree in trees for m in tree.modules()}.values())
        self.names = {name: id(value) for name, value in model.named_parameters()}
        self._values: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []  # an id means a tensor only as long as it lives
        with torch.inference_mode(False), torch.no_grad():
            for module in self.modules:
                for value in (*module._parameters.values(), *module._buffers.values()):
                    if value is not None and id(value) not in self._values:
                        self._alive.append(value)
                        self._values[id(value)] = value.detach().clone()
        self._trainable = {id(value) for value in model.parameters() if value.requires_grad}
        self._places: list[tuple[dict[str, Any], str, int]] = [
            (kind, key, id(value))
            for module in self.modules
            for kind in (module._parameters, module._buffers)
            for key, value in kind.items()
            if value is not None
        ]
        self._generators = [
            value
            for module in self.modules
            for value in module.__dict__.values()
            if type(value) is torch.Generator  # isinstance is slow for it
        ]
        self._random = _random_states(self._generators)

    def parameters(self) -> dict[str, Tensor]:
        """The trainable ones by name, detached."""
        return {n: self._values[key] for n, key in self.names.items() if key in self._trainable}

    def value(self, name: str) -> Tensor:
        """The parameter of that name, detached."""
        return self._values[self.names[name]]

    @contextmanager
    def running(
        self, parameters: Mapping[str, Tensor] | None = None, training: bool = True
    ) -> Iterator[None]:
        """Inside, the model has copies of its tensors, and the random states are those held.

        ``parameters`` replace the model's own, by name, and are part of the graph that is made.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            if "torch._dynamo" in sys.modules:  # only then can anything have been compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            undo = [*_attributes(self.modules), *_random_states(self._generators)]
            try:
                self._enter(parameters or {}, training)
                yield
            finally:
                _surely(undo)

    def _enter(self, parameters: Mapping[str, Tensor], training: bool) -> None:
        given = {self.names[name]: value for name, value in parameters.items()}
        new: dict[int, Tensor] = {}
        for key, value in self._values.items():
            # clones: code that writes to a weight in its forward writes to the clone
            new[key] = given[key].clone() if key in given else value.clone()
        for module in self.modules:
            _replace_loose(module, new)
            if isinstance(module, RunningMoments):
                module._warned = True  # what a layer says to the user, it says about training
        for place, name, old in self._places:
            place[name] = new[old]
        for restore in self._random:
            restore()
        if not training:
            self.model.eval()
        elif not self.model.training:
            self.model.train()


def _replace_loose(module: nn.Module, new: dict[int, Tensor]) -> None:
    """Replace tensors that a module holds beside its parameters and buffers."""

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in new:
            return new[id(value)]
        # a tensor with a history is a result, which is replaced and not written to
        return value.detach().clone() if value.grad_fn is None else value

    for key, value in module.__dict__.items():
        if isinstance(value, Tensor):
            module.__dict__[key] = other(value)
        elif type(value) is list:  # recurrent layers keep their weights in one
            value[:] = [other(part) for part in value]


def _attributes(modules: Iterable[nn.Module]) -> list[Undo]:
    """What restores the attributes of each module, and what its containers hold."""
    undo: list[Undo] = []
    for module in modules:
        held = dict(module.__dict__)
        for value in held.values():
            if isinstance(value, (dict, set, list, deque)):
                undo.append(partial(_refill, value, value.copy()))
        undo.append(partial(_refill, module.__dict__, held))
    return undo


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if content:
        (container.update if hasattr(container, "update") else container.extend)(content)


def _random_states(generators: Iterable[torch.Generator]) -> list[Undo]:
    """What restores the random states of Python, NumPy where it is used, and PyTorch."""
    undo: list[Undo] = [
        partial(random.setstate, random.getstate()),
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        undo.append(partial(numpy.set_state, numpy.get_state()))
    # is_initialized has no types
    started: Callable[[], bool] = torch.cuda.is_initialized
    if torch.cuda.is_available() and started():
        undo.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    undo += [partial(generator.set_state, generator.get_state()) for generator in generators]
    return undo


def _surely(undo: list[Undo]) -> None:
    """Call all of ``undo``; a Ctrl-C that comes meanwhile is raised when that is done."""
    try:
        for step in undo:
            step()
    except KeyboardInterrupt:
        for step in undo:
            step()
        raise
