"""One training step, seen without side effects: what every probe measures.

Cost: a Step costs nothing until something is asked of it. What :attr:`Step.loss` and the other
cached attributes give comes from one forward and one backward pass, together. Memory: a copy of
the parameters and buffers, and, once that pass was made, the gradients and four tensors of the
size of its output for each normalization layer.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gammabeta._guard import Held, copied, unwrap
from gammabeta._sites import Flow, Site, Trace, is_normalization, is_weight_layer
from gammabeta.ops import _torch


class Activation(NamedTuple):
    """What one normalization layer took and gave in a training step, detached, (N, C, ...)."""

    input: Tensor
    output: Tensor
    activated: Tensor  # after the activation that follows; ``output`` if none does
    gradient: Tensor  # of the loss with respect to ``output``


class Run(NamedTuple):
    """One forward pass: the loss (), the model's output, and what watched modules took and gave."""

    loss: Tensor
    output: Any
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Point(NamedTuple):
    """Loss and gradients at ``distance`` along a direction."""

    distance: float
    loss: Tensor
    gradients: dict[str, Tensor]


class _Measured(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]
    unused: frozenset[str]
    activations: dict[str, Activation]
    flow: Flow


class _Map(NamedTuple):
    """The graph between two modules' outputs, kept for one product after the other."""

    key: tuple[str | None, str, bool]
    leaf: Tensor
    output: Tensor
    mount: Callable[[], None]  # hooks that a checkpoint needs when it recomputes
    transposed: tuple[Tensor, Tensor] | None = None  # v, and vᵀJ as a function of it


class Step:
    """One training step of a model, which leaves no trace.

    All in training mode, with the statistics of the batch. After any method, also after an
    exception, parameters, their ``.grad``, buffers, the optimizer, random states, train/eval flags
    and hooks are bit for bit what they were. What is measured is the state at the first question;
    each run starts from it, with the same random numbers: dropout drops the same.

    Args:
        model: any module of Python code. Inside a ``DistributedDataParallel`` or compiled one, that
            is measured, uncompiled; gradients are then those of this process's batch alone.
        loss_fn: ``loss = loss_fn(model(x), y)``, a scalar; may be None with ``forward``.
        batch: ``(x, y)``, or with ``forward`` anything.
        optimizer: the optimizer of the training, for what :meth:`updated` gives.
        forward: ``loss = forward(model, batch)`` instead, for models whose output is not a tensor
            or that take more than one input.

    Raises:
        TypeError: the model is no module, is scripted or sharded; no loss function and no forward;
            the optimizer is none.
        ValueError: it has lazy parameters; a batch that is no pair, without ``forward``; an
            optimizer that holds none of the model's parameters.

    >>> import torch, gammabeta as gb
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 3.0)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    >>> batch = torch.ones(2, 1), torch.zeros(2, 1)
    >>> step = gb.Step(model, torch.nn.MSELoss(), batch, optimizer=optimizer)
    >>> step.loss, step.gradients["weight"], step.updated()["weight"]
    (tensor(9.), tensor([[6.]]), tensor([[1.5000]]))
    >>> [point.loss.item() for point in step.along(step.gradients, [0.0, -0.5])]
    [9.0, 0.0]
    >>> step.vjp(torch.ones(2, 1)).flatten(), model.weight.grad is None
    (tensor([3., 3.]), True)
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        batch: Any,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        forward: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self.model = unwrap(model, "Step")
        check_optimizer(optimizer, self.model, "Step")
        self.optimizer = optimizer
        if forward is None:
            if not callable(loss_fn):
                raise TypeError(
                    f"gammabeta.Step: loss_fn must be a function of output and target, got "
                    f"{loss_fn!r:.100}. Or give forward=, a function of model and batch."
                )
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
                raise ValueError(
                    f"gammabeta.Step: batch must be a pair (x, y), got {type(batch).__name__}"
                    f"{size}. For others give forward=lambda model, batch: the loss."
                )
        self._loss_fn, self._forward, self._batch = loss_fn, forward, batch
        self._map: _Map | None = None

    # -- measured at once ---------------------------------------------------------------

    @property
    def loss(self) -> Tensor:
        """The loss, ()."""
        return self._measured.loss

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The trainable parameters by name."""
        return self._held.parameters()

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The gradient of the loss by name of the parameter; zeros for one that is not used."""
        return self._measured.gradients

    @property
    def sites(self) -> tuple[Site, ...]:
        """The normalization layers in order of the forward, see :func:`gammabeta.sites`."""
        return self._measured.flow.sites

    @property
    def activations(self) -> dict[str, Activation]:
        """What each site took and gave, at its first call, by name."""
        return self._measured.activations

    @cached_property
    def weights(self) -> dict[str, tuple[str, ...]]:
        """The weight layers in order of the forward, each with the names of its parameters.

        Of the trainable ones: a frozen layer has none.
        """
        order = self._measured.flow.weights
        inside = {name: tuple(o + "." for o in order if o.startswith(f"{name}.")) for name in order}
        return {
            name: tuple(n for n in self._owned(name) if not n.startswith(inside[name]))
            for name in order
        }

    def run(
        self,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        watch: Iterable[str] = (),
        training: bool = True,
        graph: bool = False,
    ) -> Run:
        """Run one forward pass, with other parameters if they are given.

        Args:
            parameters: by name, in place of the model's own.
            watch: names of modules whose first input and output are wanted, at their first call.
            training: in training mode, modules that are in eval mode in a training model staying
                so; False is eval mode.
            graph: whether what is returned is differentiable in ``parameters`` that require a
                gradient, and in what watched modules gave. Not of models with activation
                checkpoints, which run again in the backward pass.
        """
        watched = dict.fromkeys(watch)
        with torch.set_grad_enabled(graph), self._held.running(self._checked(parameters), training):
            seen = _Seen(self._modules(watched))
            loss, output = self._call()
        return Run(loss, output, *seen.found())

    def gradient(
        self, parameters: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its gradients at these parameters, detached."""
        leaves = self._leaves(parameters)
        with torch.enable_grad(), self._held.running(leaves):
            loss, _ = self._call()
            grads = self._differentiated(loss, list(leaves.values()))
        named = zip(leaves.items(), grads, strict=True)
        return loss.detach(), {
            name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in named
        }

    def along(self, direction: Mapping[str, Tensor], distances: Sequence[float]) -> list[Point]:
        """Loss and gradients at parameters + distance·direction, for each distance.

        Parameters that ``direction`` does not name stay.
        """
        self._checked(direction)
        points = []
        for distance in distances:
            moved = {name: self.parameters[name] + distance * d for name, d in direction.items()}
            points.append(Point(float(distance), *self.gradient(moved)))
        return points

    def updated(self, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return all trainable parameters after one virtual step of the optimizer.

        It is the optimizer's own step, with a copy of its state. What the training loop does to
        gradients, such as clipping, is not in it.

        Args:
            layers: names of modules; only parameters in these are updated. None updates all.

        Raises:
            RuntimeError: the Step has no optimizer.
            ValueError: an unknown layer, or an optimizer of other parameters.
        """
        if self.optimizer is None:
            raise RuntimeError(
                "gammabeta.Step: a virtual step needs the optimizer of the training, got none. "
                "Build it as Step(model, loss_fn, batch, optimizer=optimizer)."
            )
        chosen = set(self.parameters)
        if layers is not None:
            self._modules(layers)
            chosen = {name for layer in layers for name in self._owned(layer)}
        return _virtual_step(self, self.optimizer, chosen - self._measured.unused)

    # -- products with Jacobians --------------------------------------------------------

    def output(self, of: str = "", *, training: bool = True) -> Tensor:
        """The output of module ``of``, detached; "" is the model."""
        return self._mapped(None, of, training).output.detach()

    def vjp(
        self, cotangent: Tensor, *, wrt: str | None = None, of: str = "", training: bool = True
    ) -> Tensor:
        """Multiply ``cotangent`` with the Jacobian of one module's output by another's.

        (cotangent)ᵀ ∂(output of ``of``)/∂(output of ``wrt``), over the whole batch and through its
        statistics. The graph is kept for the next product between the same modules, which then
        costs one backward pass.

        Args:
            cotangent: the shape of ``output(of)``.
            wrt: name of a module, or None for the model's first input.
            of: name of a module; "" is the model.
            training: False takes the Jacobian of eval mode.

        Raises:
            ValueError: an unknown module, one that was not called once, or a wrong shape.
            TypeError: its output, or the model's input, is no floating tensor.
        """
        between = self._mapped(wrt, of, training)
        _match("cotangent", cotangent, between.output)
        if not between.output.requires_grad:
            return torch.zeros_like(between.leaf)
        with self._held.running(training=training):
            between.mount()
            (product,) = torch.autograd.grad(
                between.output, between.leaf, cotangent, retain_graph=True, materialize_grads=True
            )
        return product.detach()

    def jvp(
        self, tangent: Tensor, *, wrt: str | None = None, of: str = "", training: bool = True
    ) -> Tensor:
        """The derivative of one module's output as another's moves along ``tangent``.

        ∂(output of ``of``)/∂(output of ``wrt``) tangent; arguments and errors as :meth:`vjp`'s,
        ``tangent`` having the shape of ``output(wrt)``.
        """
        between = self._mapped(wrt, of, training)
        _match("tangent", tangent, between.leaf)
        if not between.output.requires_grad:
            return torch.zeros_like(between.output)
        with torch.enable_grad(), self._held.running(training=training):
            between.mount()
            # vᵀJ is linear in v, so that its derivative along the tangent is J·tangent. Forward
            # mode was as fast at best, from the second product on, and not all layers have it.
            if between.transposed is None:
                v = torch.zeros_like(between.output, requires_grad=True)
                (back,) = torch.autograd.grad(
                    between.output, between.leaf, v, create_graph=True, materialize_grads=True
                )
                self._map = between._replace(transposed=(v, back))
            else:
                v, back = between.transposed
            if not back.requires_grad:
                return torch.zeros_like(between.output)
            (product,) = torch.autograd.grad(
                back, v, tangent, retain_graph=True, materialize_grads=True
            )
        return product.detach()

    # -- how ----------------------------------------------------------------------------

    @cached_property
    def _held(self) -> Held:
        return Held(self.model, self._loss_fn, self._forward)

    @cached_property
    def _measured(self) -> _Measured:
        leaves = self._leaves(None)
        with torch.enable_grad(), self._held.running(leaves):
            norms = {n: m for n, m in self.model.named_modules() if is_normalization(m)}
            seen = _Seen(norms, differentiable=True)  # its hooks come first: see Trace
            trace = Trace(self.model, keep=True)
            with trace:
                loss, _ = self._call()
            flow = trace.end(loss)
            inputs, outputs = seen.found()
            wanted = [*leaves.values(), *outputs.values()]
            grads = self._differentiated(loss, wanted)
        gradients, unused = {}, set()
        for (name, leaf), grad in zip(leaves.items(), grads, strict=False):
            gradients[name] = torch.zeros_like(leaf) if grad is None else grad
            if grad is None:
                unused.add(name)
        activations = {}
        for (name, output), grad in zip(outputs.items(), grads[len(leaves) :], strict=True):
            after = flow.activated.get(name)
            if after is None or after.shape != output.shape:
                after = output
            gradient = torch.zeros_like(output) if grad is None else grad
            found = (inputs[name], output, after, gradient)
            activations[name] = Activation(*(t.detach() for t in found))
        return _Measured(loss.detach(), gradients, frozenset(unused), activations, flow)

    def _call(self) -> tuple[Tensor, Any]:
        """Loss and output of the model as it is now: inside ``self._held.running``."""
        batch = copied(self._batch)
        output: Any = None
        if self._forward is not None:
            loss = self._forward(self.model, batch)
        elif self._loss_fn is not None:
            x, y = batch
            output = self.model(x)
            if not isinstance(output, Tensor):
                raise TypeError(
                    "gammabeta.Step: the model must return a tensor, got "
                    f"{type(output).__name__}. Give forward=lambda model, batch: the loss."
                )
            loss = self._loss_fn(output, y)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r:.100}"
            raise ValueError(
                f"gammabeta.Step: the loss must be one number, a tensor (), got {what}. "
                "Take its mean."
            )
        return loss.reshape(()), output

    def _differentiated(self, loss: Tensor, wanted: list[Tensor]) -> list[Tensor | None]:
        if not wanted:
            return []
        if not loss.requires_grad:
            raise RuntimeError(
                "gammabeta.Step: the loss must depend on a trainable parameter, got one without a "
                "gradient. Look for .detach(), .item() or no_grad between model and loss."
            )
        return list(torch.autograd.grad(loss, wanted, allow_unused=True))

    def _leaves(self, parameters: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        all_of_them = {**self.parameters, **self._checked(parameters)}
        return {n: p.detach().requires_grad_() for n, p in all_of_them.items()}

    def _checked(self, parameters: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        given = dict(parameters or {})
        for name, value in given.items():
            if name not in self._held.names:
                raise ValueError(
                    f"gammabeta.Step: the model must have each parameter given, got {name!r}. "
                    "Names are those of model.named_parameters()."
                )
            shape = self._held.value(name).shape
            if value.shape != shape:
                raise ValueError(
                    f"gammabeta.Step: {name!r} has shape {tuple(shape)}, got "
                    f"{tuple(value.shape)}. Give a tensor of its shape."
                )
        return given

    def _modules(self, names: Iterable[str]) -> dict[str, nn.Module]:
        modules = dict(self.model.named_modules())
        for name in names:
            if name not in modules:
                raise ValueError(
                    f"gammabeta.Step: the model must have each module named, got {name!r}. "
                    "Names are those of model.named_modules()."
                )
        return {name: modules[name] for name in names}

    def _owned(self, layer: str) -> tuple[str, ...]:
        """The names of the trainable parameters in a module."""
        own = {id(p) for p in self.model.get_submodule(layer).parameters()}
        named = self.model.named_parameters()
        return tuple(n for n, p in named if id(p) in own and n in self.parameters)

    def _mapped(self, wrt: str | None, of: str, training: bool) -> _Map:
        """The graph from the output of ``wrt`` to that of ``of``, new or the one last asked for."""
        key = (wrt, of, training)
        if self._map is not None and self._map.key == key:
            return self._map
        self._map = None  # two graphs at a time would take twice the memory
        start = self._modules([wrt or ""])[wrt or ""]
        end = self._modules([of])[of]
        leaves: list[Tensor] = []
        outputs: list[Any] = []

        def leaf_of(value: Any, what: str) -> Tensor:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"gammabeta.Step: {what} must be a floating tensor to be differentiated by, "
                    f"got {kind}. Name a module behind it: wrt=."
                )
            leaves.append(value.detach().clone().requires_grad_())
            return leaves[-1].clone()  # code that follows may write to it in place

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if _torch.in_backward():
                return None
            if args:
                return (leaf_of(args[0], "the model's input"), *args[1:]), kwargs
            name = next(iter(kwargs), "")
            return args, {**kwargs, name: leaf_of(kwargs.get(name), "the model's input")}

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            # a checkpoint recomputes what was computed: from the leaf
            again = _torch.in_backward()
            return leaves[0].clone() if again else leaf_of(output, f"the output of {wrt!r}")

        def last(_: nn.Module, args: Any, output: Any) -> Any:
            if _torch.in_backward():
                return None
            outputs.append(output)
            return output.clone() if isinstance(output, Tensor) else None

        def mount() -> None:
            if wrt is None:
                start.register_forward_pre_hook(before, with_kwargs=True)
            else:
                start.register_forward_hook(after)

        with torch.enable_grad(), self._held.running(training=training):
            mount()
            end.register_forward_hook(last)
            self._call()
        for name, calls in ((wrt or "", leaves), (of, outputs)):
            if len(calls) != 1:
                raise ValueError(
                    "gammabeta.Step: a Jacobian is that of a module called once in the forward, "
                    f"got {name or 'the model itself'!r}, called {len(calls)} times."
                )
        if not isinstance(outputs[0], Tensor):
            raise TypeError(
                f"gammabeta.Step: the output of {of or 'the model'!r} must be a tensor, got "
                f"{type(outputs[0]).__name__}. Name a module whose output is one: of=."
            )
        self._map = _Map(key, leaves[0], outputs[0], mount)
        return self._map


class _Seen:
    """What modules take and give at their first call, from the time this is made.

    Args:
        modules: by the name they are reported by.
        differentiable: whether each output is to be a tensor that a gradient can be taken by.
    """

    def __init__(self, modules: Mapping[str, nn.Module], differentiable: bool = False) -> None:
        self._differentiable = differentiable
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        for name, module in modules.items():
            self._watch(name, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        # a layer that learns saves its input, which therefore nobody writes to
        kept = is_normalization(module) or is_weight_layer(module)

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            if first is not None and not _torch.in_backward():
                self._inputs.setdefault(name, first if kept else first.clone())

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            again = _torch.in_backward()  # a checkpoint recomputes what was computed
            if not isinstance(output, Tensor) or (name in self._outputs and not again):
                return None
            if self._differentiable and not output.requires_grad and output.is_floating_point():
                output = output.detach().requires_grad_()
            if not again:
                self._outputs[name] = output
            return output.clone()  # an activation that follows may write to it in place

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    def found(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and outputs by name, without the modules that were not called."""
        return self._inputs, self._outputs


def _match(what: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(
            f"gammabeta.Step: the {what} must have the shape of the output, {tuple(like.shape)}, "
            f"got {tuple(value.shape)}."
        )


def check_optimizer(optimizer: object, model: nn.Module, asking: str) -> None:
    """Raise unless ``optimizer`` is None or an optimizer of some parameter of the model."""
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"gammabeta.{asking}: optimizer must be a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}. Give the one whose step() trains the model, or None."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            f"gammabeta.{asking}: the optimizer must hold parameters of the model, got one that "
            "holds none of them. Build it from the parameters of this very model: gb.convert, for "
            "one, returns a copy, whose parameters an optimizer made before does not hold."
        )


def _virtual_step(
    step: Step, optimizer: torch.optim.Optimizer, chosen: set[str]
) -> dict[str, Tensor]:
    """The parameters after a step of a copy of ``optimizer`` with the gradients of ``chosen``."""
    values = step.parameters
    twins = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    real = {name: p for name, p in step.model.named_parameters() if name in values}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in real.values()):
        raise ValueError(
            "gammabeta.Step: the optimizer must hold parameters of the model, got one that holds "
            "none of the trainable ones. Give the optimizer that trains this model."
        )

    def give(gradients: Mapping[str, Tensor]) -> None:
        for name in chosen:
            twins[name].grad = gradients[name].clone()

    def closure() -> float:
        loss, gradients = step.gradient({n: twin.detach() for n, twin in twins.items()})
        give(gradients)
        return loss.item()

    with torch.enable_grad(), step._held.running():
        memo: dict[int, Any] = {id(real[name]): twins[name] for name in real}
        twin = copy.deepcopy(optimizer, memo)  # without the hooks, which are not to fire
        for key, value in vars(optimizer).items():
            # and without what else subclasses have; a scheduler's `step` is bound to the original
            if key not in vars(twin) and not callable(value):
                setattr(twin, key, copy.deepcopy(value, memo))
        give(step.gradients)
        asks = inspect.signature(type(twin).step).parameters.get("closure")
        if asks is not None and asks.default is inspect.Parameter.empty:
            twin.step(closure)
        else:
            twin.step()
    return {name: value.detach() for name, value in twins.items()}
