"""What the page says about a recorded training: plain values, no HTML.

A quantity becomes one figure. Its kind follows from what was recorded: numbers per layer over
steps ("layers"), vectors such as singular values ("spectrum"), matrices ("matrix"), and all
numbers of the whole network together ("whole").
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gammabeta._runs import Record, Series, read_record
from gammabeta.report._marks import number

_NUMBERS = 120_000  # of one record in the page, about a megabyte
_POINTS = 100  # of one vector
_LOG = 20  # ratio of largest to smallest from which an axis is logarithmic
_OWN = ("loss", "seconds", "overhead")
# quantity as the page names it -> one sentence
_MEANINGS = {
    "gradients: scaled": "norm of the gradient times norm of the weight, which does not depend on "
    "the scale of the weight.",
    "gradients: slope": "decades by which the gradient's norm changes per layer from the output "
    "back; below 0 it vanishes, above 0 it explodes.",
    "gradients: slope scaled": "the slope of gradient norm times weight norm, which does not "
    "depend on the scale of the weights.",
    "gradients: zero layers": "weight layers whose gradient is exactly 0; they do not learn.",
    "gradients: dead": "share of units whose activation has derivative 0 for the whole batch; they "
    "pass no gradient on.",
    "gradients: saturated": "share of units whose activation is nearly flat for the whole batch, "
    "the dead ones included.",
    "weights: growth": "norm of the weight over that at the first record.",
    "weights: path": "how far the weight has moved, summed from record to record.",
    "weights: effective lr": "learning rate over the squared norm of the weight: how fast a weight "
    "in front of a normalization turns.",
    "covariate shift: path": "how far the distributions have moved, summed from record to record.",
}


@dataclass(frozen=True)
class Recording:
    """One record on the page."""

    name: str
    anchor: str
    model: str
    facts: list[tuple[str, str]]
    notes: list[str]
    errors: list[str]
    figures: list[dict[str, Any]]
    empty: bool


def recording(path: Path, label: str, place: int) -> Recording:
    """Read one record; RunError where the file is none."""
    record = read_record(path)
    about = record.about
    kept = _kept(record)
    every = "by a function" if about["every"] is None else f"every {number(about['every'])}"
    most = about["max_overhead"]
    cost = record.series["overhead"].values[-1] if "overhead" in record.series else None
    limit = "" if most is None else f", limit {number(100 * most)} %"
    facts = [
        ("Model", f"{about['model']}, {number(about['parameters'])} parameters"),
        ("Probes", ", ".join(about["probes"])),
        ("Schedule", every + " steps" * (about["every"] is not None)),
        ("Records", _extent(record.steps) + _skipped(record)),
        ("Cost", "–" if cost is None else f"{number(100 * cost)} % of the training's time{limit}"),
        ("Versions", f"gammabeta {about['gammabeta']}, torch {about['torch']}"),
    ]
    notes = list(about["notes"])
    if record.resumed:
        notes.append(f"Continued by a later process from step {_listed(record.resumed)}.")
    if record.dropped:
        notes.append("The last line of the file is unfinished and is left out.")
    if len(kept) < len(record.steps):
        notes.append(
            f"Drawn are {len(kept)} of {len(record.steps)} records, to keep this page small; "
            "the file holds all of them."
        )
    anchor = f"record-{place}"
    figures = _figures(record, kept)
    for index, figure in enumerate(figures):
        figure |= {"experiment": label, "anchor": f"{anchor}-{index}", "id": figure["title"]}
    return Recording(
        label, anchor, about["model"], facts, notes, _failures(record), figures, not record.steps
    )


def _extent(steps: list[int]) -> str:
    if not steps:
        return "none"
    return f"{number(len(steps))}, steps {number(steps[0])} to {number(steps[-1])}"


def _skipped(record: Record) -> str:
    """How many records were due up to the last one and are not there, where the record tells."""
    every, most = record.about["every"], record.about["max_overhead"]
    if every is None or most is None or not record.steps:
        return ""
    due = record.steps[-1] // every + 1
    skipped = due - len(record.steps)
    if skipped <= 0:
        return ""
    return (
        f": {number(len(record.steps))} of {number(due)} records taken, {number(skipped)} skipped "
        f"to stay under {number(100 * most)} % (max_overhead= raises it)"
    )


def _meant(names: Iterable[str]) -> str:
    """A sentence for each quantity whose name does not say it."""
    told = [
        f" {name.rpartition(': ')[2]}: {_MEANINGS[name]}" for name in names if name in _MEANINGS
    ]
    return "".join(told)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(number, values))


def _failures(record: Record) -> list[str]:
    """One line for each probe and message: how often, and where first."""
    found: dict[tuple[str, str], list[int]] = {}
    for step, probe, text in record.errors:
        found.setdefault((probe, text), []).append(step)
    return [
        f"{probe} failed at {number(len(steps))} of {number(len(record.steps))} records, first at "
        f"step {number(steps[0])}: {text}"
        for (probe, text), steps in found.items()
    ]


def _kept(record: Record) -> set[int]:
    """The steps that are drawn: all, or as many, evenly spread, as the page has room for."""
    total = sum(_drawn_size(value) for s in record.series.values() for value in s.values)
    stride = math.ceil(total / _NUMBERS) if total else 1
    return {*record.steps[::stride], *record.steps[-1:]}


def _drawn_size(value: Any) -> int:
    if not isinstance(value, list):
        return 1
    if value and isinstance(value[0], list):
        return sum(map(len, value))
    return min(len(value), _POINTS)


# --- figures ----------------------------------------------------------------------------------


def _figures(record: Record, kept: set[int]) -> list[dict[str, Any]]:
    """First what belongs to the whole network, then each quantity with one entry per layer."""
    whole: dict[str, Series] = {}
    found: dict[tuple[str, str, str], dict[str, Series]] = {}
    for name, full in record.series.items():
        pairs = [pair for pair in zip(full.steps, full.values, strict=True) if pair[0] in kept]
        series = Series([step for step, _ in pairs], [value for _, value in pairs])
        if not pairs:
            continue
        layer, quantity = _split(name)
        kind = _kind(series.values)
        if kind == "layers" and layer is None:
            whole[quantity] = series
        else:
            group = (quantity, kind, "" if layer is not None else "whole")
            found.setdefault(group, {})[layer or "whole network"] = series
    figures = [_whole(whole)] if whole else []
    # together what one probe measured, also where a part of it came later
    order = {probe.replace("_", " "): at for at, probe in enumerate(record.about["probes"])}
    found = dict(sorted(found.items(), key=lambda item: order.get(item[0][0].split(":")[0], 99)))
    figures += [_by_layer(quantity, kind, s) for (quantity, kind, _), s in found.items()]
    return figures


def _split(name: str) -> tuple[str | None, str]:
    """Layer and quantity of a series; the probe stands before the quantity."""
    if name in _OWN:
        return None, name
    probe, _, rest = name.partition("/")
    layer, slash, quantity = rest.rpartition("/")
    said = quantity.replace("_", " ")
    return (layer if slash else None), f"{probe.replace('_', ' ')}: {said}"


def _kind(values: Sequence[Any]) -> str:
    value = values[0]
    if not isinstance(value, list):
        return "layers"
    return "matrix" if value and isinstance(value[0], list) else "spectrum"


def _whole(series: dict[str, Series]) -> dict[str, Any]:
    panels = [
        {"title": name, "x": s.steps, "y": s.values, "log": _is_log(s.values)}
        for name, s in series.items()
    ]
    return {
        "kind": "whole",
        "title": "The whole network",
        "caption": "seconds: what a record took. overhead: what all of them took so far, per "
        "second of the rest of the loop." + _meant(series) + _beyond(series),
        "alt": f"{len(panels)} panels over the steps: {', '.join(series)}.",
        "panels": panels,
    }


def _by_layer(quantity: str, kind: str, series: dict[str, Series]) -> dict[str, Any]:
    steps = sorted({step for s in series.values() for step in s.steps})
    values = []
    for s in series.values():
        held = dict(zip(s.steps, s.values, strict=True))
        values.append([_drawn(held.get(step), kind, quantity) for step in steps])
    titles = {
        "layers": ["Over the steps", "Over the depth"],
        "spectrum": ["Sorted" if _is_sorted(quantity) else "Entry by entry"],
        "matrix": ["Rows by columns"],
    }[kind]
    said = {
        "layers": "Over the steps: each line is a layer. Over the depth: all layers, in order of "
        "the forward pass, at the step of the slider; faint, at the first step.",
        "spectrum": "Each line is a layer at the step of the slider; faint, at the first step.",
        "matrix": "At the step of the slider.",
    }[kind]
    layers = list(series)
    return {
        "kind": kind,
        "title": quantity,
        "caption": said + _meant([quantity]) + _beyond(series),
        "alt": f"{quantity} of {len(layers)} layers ({layers[0]} to {layers[-1]}) at "
        f"{len(steps)} steps ({steps[0]} to {steps[-1]}).",
        "panels": [{"title": title} for title in titles],
        "steps": steps,
        "layers": layers,
        "values": values,
        "log": _is_log(values),
    }


def _is_sorted(quantity: str) -> bool:
    return "singular" in quantity or "spectrum" in quantity


def _drawn(value: Any, kind: str, quantity: str) -> Any:
    """A value as it is drawn: spectra from the largest down, at most so many points of a vector."""
    if kind != "spectrum" or value is None:
        return value if (_kind([value]) == kind or value is None) else None
    if not isinstance(value, list):
        return None
    if _is_sorted(quantity):
        value = sorted(value, key=lambda v: math.inf if math.isnan(v) else -v)
    last = len(value) - 1
    if last < _POINTS:
        return value
    return [value[round(at * last / (_POINTS - 1))] for at in range(_POINTS)]


def _numbers(values: Any) -> Iterable[float]:
    for value in values:
        if isinstance(value, list):
            yield from _numbers(value)
        elif value is not None:
            yield value


def _is_log(values: Any) -> bool:
    found = [value for value in _numbers(values) if math.isfinite(value)]
    positive = [value for value in found if value > 0]
    few = len(positive) < 0.9 * len(found) or any(value < 0 for value in found)
    return bool(positive) and not few and max(positive) > _LOG * min(positive)


def _beyond(series: dict[str, Series]) -> str:
    count = sum(not math.isfinite(v) for s in series.values() for v in _numbers(s.values))
    return f" {number(count)} values are not finite and leave a gap." if count else ""
