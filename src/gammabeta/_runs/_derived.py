"""The registry, the verdicts and the figures of a run folder: their fields, and reading them."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gammabeta._runs._check import (
    check_run,
    fail,
    is_id,
    is_int,
    is_number,
    need,
    read_json,
    scalars,
    show,
)

STATUSES = ("supported", "refuted", "mixed", "inconclusive", "exact", "fails", "demo")

_CLAIM_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")  # no folder is named after it


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(v is None or is_number(v) for v in value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "an id": is_id,
    "a claim's id": lambda v: isinstance(v, str) and _CLAIM_ID.fullmatch(v) is not None,
    "an id or null": lambda v: v is None or is_id(v),
    "text": lambda v: isinstance(v, str),
    "true or false": lambda v: isinstance(v, bool),
    "an integer of 0 or more": lambda v: is_int(v) and bool(v >= 0),
    "a finite number or null": lambda v: v is None or is_number(v),
    "a list of numbers": _numbers,
    "[lo, hi] or null": lambda v: v is None or (_numbers(v) and len(v) == 2),
    "a list": lambda v: isinstance(v, list),
    "a list of texts": lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v),
    "an object of numbers": lambda v: isinstance(v, dict) and all(map(is_number, v.values())),
    "text or beyond": lambda v: v in ("text", "beyond"),
    "statistical or exact": lambda v: v in ("statistical", "exact"),
    "curves": lambda v: v == "curves",
    " or ".join(STATUSES): lambda v: v in STATUSES,
    " or ".join(STATUSES) + " or null": lambda v: v is None or v in STATUSES,
}


def _texts(*fields: str) -> dict[str, str]:
    return dict.fromkeys(fields, "text")


_CLAIM = _texts("title", "question", "source", "topic", "reported", "rule", "caveats") | {
    "id": "a claim's id",
    "origin": "text or beyond",
    "kind": "statistical or exact",
    "experiment": "an id or null",
    "headline": "true or false",
    "thresholds": "an object of numbers",
}
_VERDICT = _texts("unit", "reported", "budget", "data", "sentence") | {
    "claim": "a claim's id",
    "experiment": "an id",
    "status": " or ".join(STATUSES),
    "published_status": " or ".join(STATUSES) + " or null",
    "effect": "a finite number or null",
    "delta": "a finite number or null",
    "half_width": "a finite number or null",
    "planned_half_width": "a finite number or null",
    "ci": "[lo, hi] or null",
    "n": "an integer of 0 or more",
    "cells": "a list",
    "notes": "a list of texts",
}
_FIGURE = _texts("title", "caption", "alt") | {
    "id": "an id",
    "experiment": "an id",
    "kind": "curves",
    "panels": "a list",
}
_SERIES = _texts("name", "style") | {
    "n": "an integer of 0 or more",
    "x": "a list of numbers",
    "y": "a list of numbers",
}


def _check(value: object, fields: Mapping[str, str], path: Path, field: str) -> None:
    if not isinstance(value, dict):
        raise fail(path, field, "an object", show(value))
    for key, kind in fields.items():
        need(_KINDS[kind](value.get(key)), path, f"{field}: {key}", kind, value.get(key))


def _list_of(value: Mapping[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    items = value.get(key)
    if not isinstance(items, list):
        raise fail(path, key, "a list", show(items))
    return items


def read_claims(run: Path) -> list[dict[str, Any]]:
    """The registry that lies in the run folder; empty where the folder has none."""
    path = Path(run) / "claims.json"
    check_run(Path(run))
    if not os.path.lexists(path):
        return []
    claims = _list_of(read_json(path, "the registry"), "claims", path)
    for number, claim in enumerate(claims):
        if isinstance(claim, dict):
            claim.setdefault("experiment", None)
            claim.setdefault("thresholds", {})
        _check(claim, _CLAIM, path, f"claims[{number}]")
    return claims


def check_verdicts(value: Mapping[str, Any], path: Path) -> None:
    """Raise RunError unless `value` has the fields of verdicts.json."""
    for number, verdict in enumerate(_list_of(value, "verdicts", path)):
        _check(verdict, _VERDICT, path, f"verdicts[{number}]")
        for place, cell in enumerate(verdict["cells"]):
            where = f"verdicts[{number}].cells[{place}]"
            scalars(cell, path, where)
            _check(cell, _texts("name", "status"), path, where)
    _check(value, {"gammabeta": "text", "surprises": "a list of texts"}, path, "the verdicts")
    notice = value.get("notice")
    need(notice is None or isinstance(notice, str), path, "notice", "text or null", notice)


def read_verdicts(run: Path) -> dict[str, Any] | None:
    """The whole of verdicts.json, checked; None where the run has not been judged."""
    path = Path(run) / "verdicts.json"
    check_run(Path(run))
    if not os.path.lexists(path):
        return None
    value = read_json(path, "the verdicts")
    value.setdefault("notice", None)
    check_verdicts(value, path)
    return value


def check_figures(value: Mapping[str, Any], path: Path) -> None:
    """Raise RunError unless `value` has the fields of figures.json."""
    for number, figure in enumerate(_list_of(value, "figures", path)):
        where = f"figures[{number}]"
        _check(figure, _FIGURE, path, where)
        for axis in ("x", "y"):
            _check(
                figure.get(axis), {"label": "text", "log": "true or false"}, path, f"{where}.{axis}"
            )
        for place, panel in enumerate(figure["panels"]):
            _check(panel, _texts("title"), path, f"{where}.panels[{place}]")
            for series in _list_of(panel, "series", path):
                _check(series, _SERIES, path, f"{where}.panels[{place}].series")
                lists = [series[k] for k in ("x", "y", "lo", "hi") if series.get(k) is not None]
                same = all(_numbers(v) and len(v) == len(lists[0]) for v in lists)
                need(same, path, f"{where}: series", "lists of one length", series["name"])


def read_figures(run: Path) -> list[dict[str, Any]] | None:
    """The figures of figures.json, checked; None where the run has not been judged."""
    path = Path(run) / "figures.json"
    check_run(Path(run))
    if not os.path.lexists(path):
        return None
    value = read_json(path, "the figures")
    check_figures(value, path)
    figures: list[dict[str, Any]] = value["figures"]
    return figures
