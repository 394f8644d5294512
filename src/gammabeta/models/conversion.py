"""PyTorch's batch normalizations into ours and back, in a new model."""

from __future__ import annotations

import difflib
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from gammabeta.layers import batch_norm
from gammabeta.layers._running import RunningMoments
from gammabeta.models import _fusion
from gammabeta.models._find import any_kind, came
from gammabeta.models._table import Table
from gammabeta.ops import _BACKENDS

_OURS: dict[type, type[nn.Module]] = {
    nn.BatchNorm1d: batch_norm.BatchNorm1d,
    nn.BatchNorm2d: batch_norm.BatchNorm2d,
    nn.BatchNorm3d: batch_norm.BatchNorm3d,
    nn.LazyBatchNorm1d: batch_norm.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: batch_norm.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: batch_norm.LazyBatchNorm3d,
}
_TORCHS: dict[type, type[nn.Module]] = {ours: torchs for torchs, ours in _OURS.items()}
_FUSED: dict[type, type[nn.Module]] = {
    batch_norm.BatchNorm1d: batch_norm.BatchNormAct1d,
    batch_norm.BatchNorm2d: batch_norm.BatchNormAct2d,
    batch_norm.BatchNorm3d: batch_norm.BatchNormAct3d,
}
_PLAIN: dict[type, type[nn.Module]] = {fused: plain for plain, fused in _FUSED.items()}
_REPORT = "_gammabeta_report"
_LOW = (torch.float16, torch.bfloat16)
_MARK = "_held_as"  # an empty buffer: it alone follows moves of a layer without γ to other dtypes
_ASKS = "the forward code asks for the kinds of its modules and would run another way"


class Change(NamedTuple):
    """What :func:`convert` or :func:`revert` did to one layer."""

    name: str
    action: str  # converted, fused, reverted, kept, skipped
    before: str
    after: str
    note: str


def convert(
    model: nn.Module, *, fuse: bool = False, backend: str | None = None, dry_run: bool = False
) -> nn.Module:
    """Return a copy of ``model`` with this package's layers in place of PyTorch's.

    ``nn.BatchNorm1d/2d/3d`` and ``nn.LazyBatchNorm1d/2d/3d`` become the layers of the same name,
    which compute the same. Parameters, buffers, ``state_dict`` keys, hooks, parametrizations,
    sharing, device, dtype and train flags are kept; only buffers in half precision become
    float32. The given model is not touched, also on an error. The copy has parameters of its own
    and, as with ``copy.deepcopy``, no gradients: make its optimizer from it. User's subclasses
    and ``nn.SyncBatchNorm`` are left as they are; :func:`report_of` says so.

    Args:
        model: any module.
        fuse: put a following activation module (ReLU, LeakyReLU, Sigmoid, Tanh, Softplus, SiLU,
            GELU) into ``BatchNormAct``; an ``nn.Identity`` stays in its place. Done where
            ``torch.fx`` traces show that the activation alone takes the layer's output, that
            neither is shared or has a hook, and that the forward code then runs through the same
            calls. There is one trace for each mode and each combination of optional arguments;
            if one fails, as with ``if flag:``, nothing is fused, and the report says why. A model
            that is itself an ``nn.Sequential`` needs no trace. An activation that is a function
            in the forward code stays there, and so does one that is called in several places
            (a module of its own for each is fused) or behind a residual sum, as in a ResNet's
            blocks. There write ``bn = gb.BatchNormAct2d(channels, act="relu")`` in ``__init__``
            and ``bn(y, residual)`` for ``relu(bn(y) + residual)`` in ``forward``: it takes the
            same ``state_dict``. A trace shows neither methods other than forward,
            nor what forward does once attributes of the model have changed, nor code outside
            that calls the layer or indexes a container: see to it that these do not use the
            output of a fused layer, which is that of its activation.
        backend: of all layers of this package in the copy; None leaves it ("auto").
        dry_run: return a copy without changes, with the report of what would be done.

    Raises:
        TypeError: the model is no module.
        ValueError: no such backend; a model wrapped in ``DistributedDataParallel``.

    >>> import torch, gammabeta as gb
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU())
    >>> print(gb.convert(net)[1])
    BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    >>> print(gb.report_of(gb.convert(net, fuse=True)))
    name  action  before             after                   note
    1     fused   torch.BatchNorm1d  gammabeta.BatchNormAct1d  relu of '2'
    """
    _check(model, "convert")
    if backend is not None and backend not in ("auto", *_BACKENDS):
        near = difflib.get_close_matches(str(backend), ["auto", *_BACKENDS], 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"gammabeta.convert: backend must be 'auto' or one of {', '.join(_BACKENDS)}, got "
            f"{backend!r}.{hint}"
        )
    result = _fusion.duplicate(model)
    rows: dict[str, Change] = {}
    for name, layer in _every(result).items():
        before, note = _kind(layer), why_not_ours(layer)
        if note:
            rows[name] = Change(name, "skipped", before, before, note)
        elif _type(layer) in _OURS:
            note = _adopt(layer)
            rows[name] = Change(name, "converted", before, _kind(layer), note)
        else:
            rows[name] = Change(name, "kept", before, before, "")
    if fuse:
        _fuse_all(result, rows)
    for name, layer in any_kind(result).items():
        if isinstance(layer, RunningMoments):
            layer._label = name
            if backend is not None:
                layer.backend = backend
    if dry_run:
        result = _fusion.duplicate(model)
    _attach(result, rows)
    return result


def revert(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with PyTorch's layers in place of this package's.

    The inverse of :func:`convert`: types, ``state_dict`` and hooks are again those of PyTorch's
    model, buffers in half precision included. A ``BatchNormAct`` becomes a batch normalization,
    and the ``nn.Identity`` that alone takes its output becomes the activation. What PyTorch
    cannot express is left as it is, with the reason in :func:`report_of`: biased variances,
    ``on_single="running"``, frozen or synchronized statistics, the other methods of this
    package. The given model is not touched; the copy has no gradients, as with
    ``copy.deepcopy``.

    Raises:
        TypeError: the model is no module.
        ValueError: a model wrapped in ``DistributedDataParallel``.

    >>> import torch, gammabeta as gb
    >>> net = torch.nn.Sequential(gb.BatchNorm1d(3), gb.BatchNorm1d(3, on_single="running"))
    >>> [type(layer).__module__.split(".")[0] for layer in gb.revert(net)]
    ['torch', 'gammabeta']
    >>> print(gb.report_of(gb.revert(net))[1].note)
    on_single='running' has no counterpart in torch.nn
    """
    _check(model, "revert")
    result = _fusion.duplicate(model)
    rows: dict[str, Change] = {}
    for name, layer in _every(result).items():
        before, note = _kind(layer), _why_not_torchs(layer)
        if not isinstance(layer, RunningMoments):
            action = "kept"
        elif note:
            action = "skipped"
        else:
            action = "fused" if _type(layer) in _PLAIN else "reverted"
        rows[name] = Change(name, action, before, before, note)
    _unfuse_all(result, rows)
    for name, row in rows.items():
        layer = result.get_submodule(name)
        if row.action == "reverted" and isinstance(layer, RunningMoments):
            row = _noted(row, _release(layer))
        rows[name] = row._replace(after=_kind(layer))
    _attach(result, rows)
    return result


def report_of(model: nn.Module) -> list[Change]:
    """What :func:`convert` or :func:`revert`, whichever made ``model``, did to each layer.

    Returns:
        One ``Change(name, action, before, after, note)`` a layer; ``print`` shows a table. The
        action is "converted", "fused", "reverted", "kept" (nothing to do) or "skipped"; the note
        says why. Copies and pickles of the model have it too, a ``state_dict`` does not.

    Raises:
        ValueError: the model was made by neither.

    >>> import torch, gammabeta as gb
    >>> gb.report_of(gb.convert(torch.nn.SyncBatchNorm(3)))[0].action
    'skipped'
    """
    report = model.__dict__.get(_REPORT)
    if report is None and isinstance(model, fx.GraphModule):
        report = model.meta.get(_REPORT)
    if not isinstance(report, Table):
        raise ValueError(
            "gammabeta.report_of: expected a model that gammabeta.convert or gammabeta.revert "
            f"returned, got a {type(model).__name__} without a report. Ask the model that they "
            "returned, not the one that they were given."
        )
    return report


def _attach(model: nn.Module, rows: dict[str, Change]) -> None:
    model.__dict__[_REPORT] = Table(rows.values())
    if isinstance(model, fx.GraphModule):
        # its copies have of its attributes only `meta`, its pickles all others
        model.meta[_REPORT] = model.__dict__[_REPORT]


# -- one layer --------------------------------------------------------------------------


def _check(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        cure = "Pass the network itself."
        if isinstance(model, type):
            cure = f"Make one first: gb.{function}({model.__name__}(...))."
        elif isinstance(model, dict):
            cure = "Load it into the network first: model.load_state_dict(...)."
        raise TypeError(
            f"gammabeta.{function}: model must be a torch.nn.Module, got {came(model)}. {cure}"
        )
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"gammabeta.{function}: a model must be converted before it is wrapped, got "
                f"DistributedDataParallel at {name or 'the top'}. Convert its .module and wrap "
                "the result."
            )


def _every(model: nn.Module) -> dict[str, nn.Module]:
    """The batch normalizations by name, those within a compiled script too."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RunningMoments | _BatchNorm)
        or "BatchNorm" in getattr(module, "original_name", "")
    }


def _type(layer: nn.Module) -> type:
    kind: type = parametrize.type_before_parametrizations(layer)
    return kind


def _kind(layer: nn.Module) -> str:
    kind = _type(layer)
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def why_not_ours(layer: nn.Module) -> str:
    if isinstance(layer, RunningMoments):
        return ""
    if isinstance(layer, torch.jit.ScriptModule):
        return "compiled by torch.jit: convert the model before"
    if isinstance(layer, nn.SyncBatchNorm):
        return "use gammabeta.sync_statistics on a converted plain layer"
    if _type(layer) not in _OURS:
        return f"{_kind(layer)} is a subclass, whose behavior is not known"
    return "it has a forward of its own" if "forward" in layer.__dict__ else ""


def _why_not_torchs(layer: nn.Module) -> str:
    if not isinstance(layer, RunningMoments):
        return ""
    if _type(layer) not in (*_TORCHS, *_PLAIN):
        return f"torch.nn has no {_type(layer).__name__}"
    if "forward" in layer.__dict__:
        return "it has a forward of its own"
    for option in ("stored_variance", "on_single"):
        if getattr(layer, option) != getattr(RunningMoments, option):
            return f"{option}={getattr(layer, option)!r} has no counterpart in torch.nn"
    if layer._frozen:
        return "its statistics are frozen: gammabeta.unfreeze first"
    if layer._group is not None:
        return "its statistics are synchronized: gammabeta.unsync_statistics first"
    dtype = _low_dtype(layer)
    for name in ("running_mean", "running_var"):
        held = layer._buffers.get(name)
        if dtype is not None and held is not None and not (is_lazy(held) or held.is_meta):
            lost = held.isfinite() & ~held.to(dtype).isfinite()
            if lost.any():
                return f"its {name} of up to {held[lost].abs().max():.3g} does not fit {dtype}"
    return ""


def _swap(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Make ``layer`` one of ``kind``, in place: whatever refers to it stays right."""
    if parametrize.is_parametrized(layer):
        # torch has made a class for this one layer, whose properties compute the parameters
        own = type(layer)
        inner = {k: v for k, v in vars(own).items() if k not in ("__dict__", "__weakref__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), inner)
    layer.__class__ = kind


def _adopt(layer: nn.Module) -> str:
    """Turn one of PyTorch's layers into ours; what there is to say about it."""
    before, weight = layer._buffers.get("running_mean"), getattr(layer, "weight", None)
    _swap(layer, _OURS[_type(layer)])
    if isinstance(layer, RunningMoments):
        layer._prepare()
    after = layer._buffers.get("running_mean")
    if before is None or after is None:
        return ""
    if weight is None and before.dtype in _LOW:
        empty = torch.empty(0, dtype=before.dtype, device=before.device)
        layer.register_buffer(_MARK, empty, persistent=False)
    elif weight is not None and weight.dtype != before.dtype:
        layer.__dict__["_held_dtypes"] = weight.dtype, before.dtype
    return "" if before.dtype == after.dtype else f"buffers {before.dtype} -> {after.dtype}"


def _release(layer: RunningMoments) -> str:
    """Turn one of our layers into PyTorch's; what there is to say about it."""
    notes = []
    dtype = _low_dtype(layer)
    if layer.backend != RunningMoments.backend:
        notes.append(f"backend={layer.backend!r} dropped")
    if layer._thawed is not None:
        notes.append("frozen parameters stay without gradient")
    _swap(layer, _TORCHS[_type(layer)])
    layer._buffers.pop(_MARK, None)
    layer._non_persistent_buffers_set.discard(_MARK)
    for name in ("_held_dtypes", *RunningMoments.__annotations__):
        layer.__dict__.pop(name, None)
    for name in ("running_mean", "running_var"):
        held = layer._buffers.get(name)
        if dtype is not None and held is not None and held.dtype != dtype:
            layer._buffers[name] = held.to(dtype)
            if name == "running_mean":
                notes.append(f"buffers {held.dtype} -> {dtype}")
    return "; ".join(notes)


def _low_dtype(layer: nn.Module) -> torch.dtype | None:
    """The dtype below float32 that PyTorch's layer would hold its buffers in, or None."""
    weight = getattr(layer, "weight", None)
    like = layer._buffers.get(_MARK) if weight is None else weight
    if like is None:
        return None
    # a dtype of their own they keep until the parameters are moved to another one
    then, held = layer.__dict__.get("_held_dtypes", (None, None))
    dtype = held if like.dtype == then else like.dtype
    return dtype if dtype in _LOW else None


# -- activations ------------------------------------------------------------------------


def _fuse_all(model: nn.Module, rows: dict[str, Change]) -> None:
    traces = _fusion.trace(model)
    able = [name for name, row in rows.items() if row.action != "skipped"]
    able = [name for name in able if _type(model.get_submodule(name)) not in _PLAIN]
    moved: dict[str, tuple[Change, str]] = {}
    for name, (follower, reason, proved, cure) in _fusion.neighbors(model, able, traces).items():
        layer = model.get_submodule(name)
        if follower is not None:
            reason = _why_not_fused(model, name, follower)
        elif cure and _type(layer) in _FUSED:
            own = f"self.{name.rpartition('.')[2]}"
            reason += "; " + cure.format(fused=_FUSED[_type(layer)].__name__, layer=own)
        if follower is None or reason:
            rows[name] = _noted(rows[name], f"not fused: {reason}")
            continue
        _merge(layer, model.get_submodule(follower))
        moved[name] = rows[name], follower
        row = rows[name]._replace(action="fused", after=_kind(layer))
        limit = "" if proved else ", as far as a trace of forward shows"
        rows[name] = _noted(row, f"{layer.__dict__['act']} of {follower!r}{limit}")
    if moved and traces.graphs and not _fusion.same(traces, _fusion.trace(model)):
        for name, (row, follower) in moved.items():
            _split(model.get_submodule(name), model.get_submodule(follower))
            rows[name] = _noted(row, f"not fused: {_ASKS}")


def _unfuse_all(model: nn.Module, rows: dict[str, Change]) -> None:
    fused = [name for name, row in rows.items() if row.action == "fused"]
    if not fused:
        return
    traces = _fusion.trace(model)
    moved: dict[str, str] = {}
    for name, (follower, reason, *_) in _fusion.neighbors(model, fused, traces).items():
        layer = model.get_submodule(name)
        act = layer.__dict__["act"]
        if follower is not None:
            reason = _fusion.why_not_plain(model, name) or _fusion.why_not_plain(model, follower)
            if type(model.get_submodule(follower)) is not nn.Identity:
                reason = f"{follower!r}, which follows it, is no nn.Identity"
        if follower is None or reason:
            note = f"no place for its activation {act!r}: {reason}"
            rows[name] = rows[name]._replace(action="skipped", note=note)
            continue
        _split(layer, model.get_submodule(follower))
        moved[name] = follower
        rows[name] = rows[name]._replace(action="reverted", note=f"{act} to {follower!r}")
    if moved and traces.graphs and not _fusion.same(traces, _fusion.trace(model)):
        for name, follower in moved.items():
            _merge(model.get_submodule(name), model.get_submodule(follower))
            rows[name] = rows[name]._replace(action="skipped", note=_ASKS)


def _why_not_fused(model: nn.Module, name: str, follower: str) -> str:
    kind, activation = _type(model.get_submodule(name)), model.get_submodule(follower)
    if kind not in _FUSED:
        lazy = "its number of features is not known yet"
        return lazy if kind in _TORCHS else f"{kind.__name__} has no fused form"
    if _fusion.act_of(activation) is None:
        return f"{follower!r} is {activation!r}, which no fused layer computes"
    return _fusion.why_not_plain(model, name) or _fusion.why_not_plain(model, follower)


def _merge(layer: nn.Module, activation: nn.Module) -> None:
    """Put the activation into the layer before it, and leave an Identity in its place."""
    layer.__dict__["act"] = _fusion.act_of(activation)
    layer.__dict__["_eps"] = layer.__dict__.pop("eps")
    layer.__class__ = _FUSED[type(layer)]
    _fusion.become(activation, nn.Identity())


def _split(layer: nn.Module, identity: nn.Module) -> None:
    """Take the activation out of the layer, and put it in the place of the Identity."""
    layer.__class__ = _PLAIN[type(layer)]
    layer.__dict__["eps"] = layer.__dict__.pop("_eps")
    _fusion.become(identity, _fusion.module_of(layer.__dict__.pop("act")))


def _noted(row: Change, note: str) -> Change:
    return row._replace(note="; ".join(filter(None, (row.note, note))))
