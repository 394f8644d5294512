"""Singular values of the Jacobians of layers and of the whole network, in four definitions.

A layer reaches from the input of one weight layer to the input of the next, h_{l+1} = f_l(h_l):
weight, normalization and activation together, as the MNIST study took it, since the product of
these maps is what error passes through, and since a weight in front of a normalization has no size
of its own. The next is the first weight layer, in order of the forward, whose input depends on this
one's output; after the last comes the model's output. Only what passes through the layer counts:
shortcuts around it are held fixed (they are in the Jacobian of the whole network, from the model's
input to its output). A chain's whole Jacobian is the product of those of its layers.

With batch normalization in training mode every sample depends on every other. For a batch of m
samples, out × in values each, J[b, i; c, j] = ∂h_{l+1}[b, i]/∂h_l[c, j], four matrices have been
called the Jacobian of a layer:

    ``sum``:    Σ_b J[b, i; c, j]   for sample c, out × in: the gradient of the batch's sum, as
                automatic differentiation of a sum gives it; the MNIST study's.
    ``own``:    J[c, i; c, j]       for sample c, out × in: how its output moves with its own input,
                by way of the statistics too.
    ``eval``:   J[c, i; c, j]       the same in eval mode, with the running statistics.
    ``batch``:  J[b, i; c, j]       all of it, m·out × m·in: what error really passes through.

They are one only where samples do not meet. ``sum`` is no layer's Jacobian: normalized values sum
to a constant over the batch, so that with a linear activation it is 0, up to rounding. Error that
passes backward through the layer is multiplied by ``batch``ᵀ.

Quantities, for each definition d, of a layer as ``<layer>/<d>_…``, of the whole network as
``<d>_…``; ``sum``, ``own`` and ``eval`` over the singular values of the first ``samples`` samples:
    ``in_range``: share of singular values in [0.5, 2], of all, zeros included.
    ``zeros``: share of those up to ``zero`` = 1e-6 times the largest. In float32, rounding reaches
        1e-7. Dead units and what a normalization removes: of each of its channels the mean, and,
        up to eps/(σ² + eps), the scale.
    ``mean_abs_log``: mean |ln s| of those that are not zeros; 0 for an isometry. Absent if all are.
    ``spread``: standard deviation of ln s of the same: 0 for a multiple of an isometry.
    ``rms``: root of the mean s²: by how much a vector of random direction, on the side with
        fewer dimensions, grows.
    ``largest``: the largest one.
    ``<quantity>_error``: beside each, if it is an estimate: about how far it may be off.
    ``singular_values``: from the largest down; if more than ``points``, that many at evenly spaced
        ranks, the largest and the smallest among them.

``batch`` decides about vanishing and exploding: an rms per layer near 1 and a spread far below 1
keep error alive in all directions. At initialization, batch normalization with ReLU has an rms of
about 1.2 in every layer, by which error grows on its way back.

Computed row by row, all of it, if a matrix has at most ``limit``² entries, or no more rows or
columns than ``steps``; else estimated by Lanczos, see :mod:`._spectrum`, without the rows and
columns that are all zeros. A layer whose weight is used without calling its module, that is called
under ``no_grad`` or whose input is not a floating tensor has none; of one that is called more than
once, the first call counts. ``sum``, ``own`` and ``eval`` need samples along axis 0 on both sides
and are absent where their number changes.

Cost: two forward passes in each mode used; then backward passes from a layer's end to its
beginning: out for ``sum``, and for ``own`` and ``eval`` where samples do not meet; samples·out
where they do; m·out for ``batch``. By Lanczos, for each matrix, steps·starts of these and as many
of about twice the cost. Memory: a forward's graph; the matrix, or steps vectors of both its sides.

Sources: Chang et al. 2017, "Batch Normalization" (the MNIST study), Claim 3 and its code, for
``sum``; Ioffe & Szegedy 2015, Sec. 3.3 (arXiv 1502.03167) for the conjecture that batch
normalization brings singular values near 1; Saxe et al. 2014 (arXiv 1312.6120) and Pennington,
Schoenholz & Ganguli 2017 (arXiv 1711.04735), "dynamical isometry", for scale and spread; Yang et
al. 2019 (arXiv 1902.08129) for the Jacobian over the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gammabeta._sites import is_weight_layer
from gammabeta.ops import _torch
from gammabeta.probes._spectrum import Spectrum, estimated, exact, pooled
from gammabeta.probes.step import Step

DEFINITIONS = ("sum", "own", "eval", "batch")


def measure(
    step: Step,
    memory: MutableMapping[str, Any],
    *,
    definitions: Sequence[str] = DEFINITIONS,
    layers: Sequence[str] | None = None,
    samples: int = 4,
    limit: int = 1000,
    steps: int = 64,
    starts: int = 2,
    points: int | None = 256,
    zero: float = 1e-6,
) -> dict[str, Tensor]:
    """Measure singular values of layers and of the whole network; see the module.

    Args:
        step: the training step.
        memory: not used.
        definitions: which of "sum", "own", "eval", "batch".
        layers: names of weight layers, "" being the whole network; None is all and the whole.
        samples: how many of the batch "sum", "own" and "eval" look at.
        limit: a matrix of more than limit² entries is estimated.
        steps: Lanczos steps of an estimate.
        starts: random vectors of an estimate.
        points: the most singular values to return of each; None returns all.
        zero: up to this multiple of the largest, a singular value counts as 0.

    Raises:
        ValueError: an unknown definition or layer, or a number that is none of the kind.

    >>> import torch, gammabeta as gb
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.BatchNorm1d(2))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    >>> x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> found = gb.measure(gb.Step(model, torch.nn.MSELoss(), (x, x)), "jacobian")
    >>> {d: found[f"0/{d}_singular_values"][:2].numpy().round(3).tolist() for d in ("eval", "own")}
    {'eval': [3.0, 3.0], 'own': [0.5, 0.5]}
    >>> round(found["0/batch_in_range"].item(), 3), round(found["0/batch_zeros"].item(), 3)
    (0.5, 0.25)
    """
    _check_names(step.model, definitions, layers or ())
    how = _How(samples, limit, steps, starts, points, zero)
    how.check()
    result: dict[str, Tensor] = {}

    def add(name: str, ends: _Ends, definition: str) -> None:
        spectrum = _spectrum(ends, definition, how)
        if spectrum is not None:
            prefix = f"{name}/{definition}" if name else definition
            result[f"{prefix}_singular_values"] = spectrum.sorted(points)
            result.update({f"{prefix}_{q}": v for q, v in spectrum.summary().items()})

    for training in (True, False):
        chosen = [d for d in DEFINITIONS if d in definitions and (d != "eval") == training]
        for whole in (False, True):
            wanted = layers is None or any((name == "") == whole for name in layers)
            if not chosen or not wanted:
                continue
            with _ends(step, training, whole) as found:
                for name, ends in found.items():
                    if layers is None or name in layers:
                        for definition in chosen:
                            add(name, ends, definition)
    return result


class _How(NamedTuple):
    """The numbers that ``measure`` is given, checked."""

    samples: int
    limit: int
    steps: int
    starts: int
    points: int | None
    zero: float

    def check(self) -> None:
        least = {"samples": 1, "limit": 0, "steps": 2, "starts": 1, "points": 2}
        for name, value in self._asdict().items():
            if name in least and value is not None and value < least[name]:
                raise ValueError(f"jacobian: {name} must be at least {least[name]}, got {value!r}.")
        if not 0 <= self.zero < 1:
            raise ValueError(
                "jacobian: zero must be a share of the largest singular value, got "
                f"{self.zero!r}. Usual is 1e-6."
            )

    def exactly(self, rows: int, columns: int) -> bool:
        # with fewer rows or columns than steps, all of it costs no more than an estimate
        return rows * columns <= self.limit**2 or min(rows, columns) <= self.steps


class _Ends:
    """Two tensors of one graph, and products with the Jacobian of one by the other."""

    def __init__(self, start: Tensor, end: Tensor) -> None:
        self.start, self.end = start, end
        self._transposed: tuple[Tensor, Tensor] | None = None

    def vjp(self, cotangent: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(
            self.end,
            self.start,
            cotangent.to(self.end.dtype),
            retain_graph=True,
            materialize_grads=True,
        )
        return product

    def jvp(self, tangent: Tensor) -> Tensor:
        if self._transposed is None:
            v = torch.zeros_like(self.end, requires_grad=True)
            (back,) = torch.autograd.grad(
                self.end, self.start, v, create_graph=True, materialize_grads=True
            )
            self._transposed = v, back
        v, back = self._transposed
        if not back.requires_grad:
            return torch.zeros_like(self.end)
        (product,) = torch.autograd.grad(
            back, v, tangent.to(back.dtype), retain_graph=True, materialize_grads=True
        )
        return product


class _Block:
    """The part of a whole batch's Jacobian that a definition looks at, as products.

    ``sample`` None is all of it; with ``total`` the outputs are summed over the batch.
    """

    def __init__(self, ends: _Ends, sample: int | None = None, total: bool = False) -> None:
        self._ends, self._sample, self._total = ends, sample, total
        double = ends.end.dtype == torch.float64
        self._dtype = torch.float64 if double else torch.float32
        alone = sample is not None
        self.rows = (ends.end[0] if alone else ends.end).numel()
        self.columns = (ends.start[0] if alone else ends.start).numel()

    def back(self, u: Tensor) -> Tensor:
        """Jᵀu, of (rows,)."""
        end = self._ends.end
        if self._sample is None:
            cotangent = u.view(end.shape)
        elif self._total:
            cotangent = u.view(end.shape[1:]).expand(end.shape)
        else:
            cotangent = u.new_zeros(end.shape)
            cotangent[self._sample] = u.view(end.shape[1:])
        product = self._ends.vjp(cotangent)
        return self._flat(product if self._sample is None else product[self._sample])

    def forward(self, v: Tensor) -> Tensor:
        """Jv, of (columns,)."""
        start = self._ends.start
        if self._sample is None:
            return self._flat(self._ends.jvp(v.view(start.shape)))
        tangent = v.new_zeros(start.shape)
        tangent[self._sample] = v.view(start.shape[1:])
        product = self._ends.jvp(tangent)
        return self._flat(product.sum(0) if self._total else product[self._sample])

    def spectrum(self, how: _How, generator: torch.Generator) -> Spectrum:
        device = self._ends.end.device
        if how.exactly(self.rows, self.columns):
            # by rows, one backward pass each, unless there are many more rows than columns
            many = self.rows * self.columns > how.limit**2 and self.rows > how.steps
            product, count = (self.forward, self.columns) if many else (self.back, self.rows)
            units = torch.eye(count, dtype=self._dtype, device=device)
            return exact(torch.stack([product(unit) for unit in units]), how.zero)
        # Rows and columns of zeros, as dead units make them, need no estimate, and without them a
        # null space is found sooner: a random vector gives zeros there and nowhere else.
        rows = self.forward(self._random(self.columns, generator)).nonzero().flatten()
        columns = self.back(self._random(self.rows, generator)).nonzero().flatten()

        def forward(v: Tensor) -> Tensor:
            return self.forward(v.new_zeros(self.columns).index_copy(0, columns, v))[rows]

        def back(u: Tensor) -> Tensor:
            return self.back(u.new_zeros(self.rows).index_copy(0, rows, u))[columns]

        wide = len(rows) < len(columns)
        apply, transpose = (back, forward) if wide else (forward, back)
        like = torch.empty(min(len(rows), len(columns)), dtype=self._dtype, device=device)
        found = estimated(
            *(apply, transpose, like, generator), steps=how.steps, starts=how.starts, zero=how.zero
        )
        return found.of_size(min(self.rows, self.columns))

    def _random(self, size: int, generator: torch.Generator) -> Tensor:
        return torch.randn(size, generator=generator).to(self._ends.end.device, self._dtype)

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(-1).to(self._dtype)


def _spectrum(ends: _Ends, definition: str, how: _How) -> Spectrum | None:
    start, end = ends.start, ends.end
    if 0 in (start.numel(), end.numel()):
        return None
    # the same at each moment of a training, so that what changes is the network
    generator = torch.Generator().manual_seed(0)
    if definition == "batch":
        return _Block(ends).spectrum(how, generator)
    if 0 in (start.dim(), end.dim()) or len(start) != len(end):
        return None
    count = min(how.samples, len(start))
    total = definition == "sum"
    blocks = [_Block(ends, sample, total) for sample in range(count)]
    small = blocks[0].rows * blocks[0].columns <= how.limit**2
    if small and (total or _apart(ends, count)):
        return exact(_summed(ends, count), how.zero)
    return pooled([block.spectrum(how, generator) for block in blocks])


def _summed(ends: _Ends, samples: int) -> Tensor:
    """The gradients of the batch's sum, (samples, out, in): one pass serves all samples."""
    unit = ends.end.new_zeros(ends.end.shape)  # contiguous, whatever the layout of the end
    outputs = unit.view(len(unit), -1)
    rows = []
    for i in range(outputs.shape[1]):
        outputs[:, i] = 1
        rows.append(ends.vjp(unit)[:samples].reshape(samples, -1))
        outputs[:, i] = 0
    return torch.stack(rows, 1)


def _apart(ends: _Ends, samples: int) -> bool:
    """Whether nobody else's output depends on the input of any of the first samples."""
    # with random factors no dependence cancels
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(ends.end.shape, generator=generator).to(ends.end)
    for sample in range(samples):
        cotangent = others.clone()
        cotangent[sample] = 0
        if bool(ends.vjp(cotangent)[sample].any()):
            return False
    return True


@contextmanager
def _ends(step: Step, training: bool, whole: bool) -> Iterator[dict[str, _Ends]]:
    """Both ends of each layer, by its name, or of the whole network, under the name "".

    Between the layers the graph is cut: each weight layer is given a copy of its input, and an
    input that depends on such a copy does so through that layer and none after it.
    """
    starts: dict[str, Tensor] = {}
    inputs: list[Tensor] = []

    def before(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            place = next((i for i, x in enumerate(args) if isinstance(x, Tensor)), None)
            key = next((k for k, x in kwargs.items() if isinstance(x, Tensor)), None)
            if _torch.in_backward() or (place is None and key is None):
                return None
            x = kwargs[key] if place is None else args[place]
            if not x.is_floating_point():
                return None
            # copies, for code that follows may write to it in place
            inputs.append(x.clone())
            leaf = x.detach().clone().requires_grad_()
            starts.setdefault(name, leaf)
            if place is None:
                return args, {**kwargs, key: leaf.clone()}
            return (*args[:place], leaf.clone(), *args[place + 1 :]), kwargs

        module.register_forward_pre_hook(hook, with_kwargs=True)

    def last(_: nn.Module, args: Any, output: Any) -> Any:
        if not _torch.in_backward() and isinstance(output, Tensor):
            inputs.append(output.clone())

    with torch.enable_grad(), step._held.running(training=training):
        if whole:
            before("", step.model)
        else:
            for name, module in _weight_layers(step.model).items():
                before(name, module)
        step.model.register_forward_hook(last)
        step._call()
        yield _first_dependent(starts, inputs)


def _weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if is_weight_layer(m)}


def _first_dependent(starts: dict[str, Tensor], ends: list[Tensor]) -> dict[str, _Ends]:
    """To each of ``starts`` the first of ``ends`` in whose graph it is."""
    names = {id(leaf): name for name, leaf in starts.items()}
    found: dict[str, _Ends] = {}
    for end in ends:
        ahead = [end.grad_fn]
        seen = set()
        while ahead:
            node = ahead.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            name = names.get(id(getattr(node, "variable", None)))
            if name is not None and name not in found:
                found[name] = _Ends(starts[name], end)
            ahead += [before for before, _ in node.next_functions]
    return {name: found[name] for name in starts if name in found}


def _check_names(model: nn.Module, definitions: Sequence[str], layers: Sequence[str]) -> None:
    known = {"definitions": DEFINITIONS, "layers": ("", *_weight_layers(model))}
    for kind, given in (("definitions", definitions), ("layers", layers)):
        if isinstance(given, str) or any(name not in known[kind] for name in given):
            raise ValueError(
                f"jacobian: {kind} must be a list of some of {list(known[kind])!r:.300}, got "
                f"{given!r}."
            )
