"""Cells: their specifications and names, the finished ones and those that raised."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gammabeta._runs._atomic import arrive, dump
from gammabeta._runs._check import (
    ID,
    MAX_JSON,
    MAX_SMALL,
    MB,
    REMOVE,
    SCHEMA,
    Row,
    RunError,
    Scalar,
    check_run,
    fail,
    is_id,
    is_int,
    is_number,
    need,
    parse,
    read_bytes,
    read_json,
    scalars,
    show,
)

_NAME = re.compile(r"[0-9a-f]{16}")
_HASHED = ("schema", "experiment", "arm", "seed", "budget", "data", "code")
MAX_ROWS = 500_000  # 50 MB of "{}" would be gigabytes of dictionaries


class StoredCell(NamedTuple):
    """One finished cell as it lies on disk; the last part of its path is its name."""

    spec: dict[str, Any]
    rows: list[Row]
    path: Path

    def flat(self) -> list[Row]:
        """The rows with the cell's arm, seed, budget and data set as further columns."""
        spec = self.spec
        head = {**spec["arm"], **{k: spec[k] for k in ("seed", "budget")}}
        return [{**head, "data": spec["data"]["name"], **row} for row in self.rows]


def check_spec(spec: Mapping[str, Any], path: Path) -> None:
    """Raise RunError unless every field of a cell's specification is what it has to be."""
    checks: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("schema", lambda v: v == SCHEMA and is_int(v), f"{SCHEMA}"),
        ("experiment", is_id, "an experiment's id"),
        ("seed", lambda v: is_int(v) and v >= 0, "an integer of 0 or more"),
        ("budget", is_id, "a budget's name"),
        ("code", lambda v: isinstance(v, str) and bool(_NAME.fullmatch(v)), "16 hex digits"),
    )
    for field, check, expected in checks:
        need(field in spec and check(spec[field]), path, field, expected, spec.get(field))
    scalars(spec.get("arm"), path, "arm")
    for field in ("data", "versions"):
        value = spec.get(field)
        texts = isinstance(value, dict) and all(
            isinstance(k, str) and isinstance(v, str) for k, v in value.items()
        )
        need(texts, path, field, "an object of texts", value)
    data = spec["data"]
    need(is_id(data.get("name")), path, "data.name", "a data set's name", data.get("name"))
    digest = data.get("digest", "")
    hexa = re.fullmatch(r"[0-9a-f]{8,64}", digest) is not None
    need(hexa, path, "data.digest", "8 to 64 hex digits", digest)
    cpu = spec.get("cpu_seconds", 0)
    need(is_number(cpu) and cpu >= 0, path, "cpu_seconds", "a number of 0 or more", cpu)


def cell_name(spec: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 of the specification; package versions do not enter."""
    text = json.dumps({key: spec[key] for key in _HASHED}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def has_cell(run: Path, spec: Mapping[str, Any]) -> bool:
    """Whether the cell of this specification is finished in this run folder."""
    return Path(run, "cells", spec["experiment"], cell_name(spec)).is_dir()


def has_failed(run: Path, spec: Mapping[str, Any]) -> bool:
    """Whether this run folder holds a failure of the cell of this specification."""
    return Path(run, "failed", spec["experiment"], cell_name(spec)).is_dir()


# --- reading ----------------------------------------------------------------------------------


def _folders(path: Path, pattern: re.Pattern[str], what: str) -> Iterator[Path]:
    """The folders in `path` in order of name; hidden names (unfinished cells) are passed over."""
    try:
        if path.is_symlink():
            raise fail(path, what, "a folder", "a symbolic link")
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise fail(path, what, "a readable folder", f"{error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() or not entry.is_dir(follow_symlinks=False):
            raise fail(path / entry.name, what, "a folder", "a file or a symbolic link")
        need(pattern.fullmatch(entry.name) is not None, path, what, "its name", entry.name)
        yield path / entry.name


def _cell_folders(run: Path, kind: str, experiment: str | None) -> Iterator[Path]:
    check_run(run)
    if not run.is_dir():
        return  # a file of packed cells
    for folder in _folders(run / kind, ID, "an experiment's folder"):
        if experiment in (None, folder.name):
            yield from _folders(folder, _NAME, "a cell's folder")


def _read_spec(folder: Path) -> dict[str, Any]:
    path = folder / "spec.json"
    spec = read_json(path, "the specification", MAX_SMALL)
    check_spec(spec, path)
    need(cell_name(spec) == folder.name, path, "the hash", folder.name, cell_name(spec))
    same = spec["experiment"] == folder.parent.name
    need(same, path, "experiment", folder.parent.name, spec["experiment"])
    return spec


def _read_rows(path: Path, spec: dict[str, Any]) -> list[Row]:
    arm, contents = spec["arm"], read_bytes(path, MAX_JSON)
    lines = contents.split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    need(len(lines) <= MAX_ROWS, path, "the rows", f"at most {MAX_ROWS}", len(lines))
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        row = parse(line, path, f"line {number}")
        check_row(row, arm, path, f"line {number}")
        rows.append(row)
    # a file that lost lines or was edited reads as well as the one that was stored
    need(bool(rows), path, "the rows", "at least one", "none")
    stored, found = spec.pop("rows_sha256", "none"), hashlib.sha256(contents).hexdigest()
    need(found == stored, path, "the SHA-256 of the rows", f"{stored} as in spec.json", found)
    return rows


def check_row(row: object, arm: Mapping[str, Scalar], path: Path, field: str) -> None:
    scalars(row, path, field)
    taken = {*arm, "seed", "budget", "data"}
    if isinstance(row, dict) and (both := taken & row.keys()):
        expected = "columns other than the arm's, seed, budget and data"
        raise fail(path, field, expected, show(sorted(both)))


def folder_cells(
    run: Path, experiment: str | None, known: Collection[tuple[str, str]] = ()
) -> Iterator[StoredCell]:
    """The finished cells below a run folder's cells/, those aside whose id and name are known."""
    for folder in _cell_folders(run, "cells", experiment):
        if (folder.parent.name, folder.name) not in known:
            spec = _read_spec(folder)
            rows = _read_rows(folder / "rows.jsonl", spec)
            yield StoredCell(spec, rows, folder)


def order(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    arm = json.dumps(spec["arm"], sort_keys=True)
    return (spec["experiment"], arm, spec["seed"], cell_name(spec))


def read_failed(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The cells that raised, as {"spec", "error", "path"}; not those that some folder finished."""
    found: dict[str, dict[str, Any]] = {}
    for run in paths:
        for folder in _cell_folders(Path(run), "failed", None):
            spec = _read_spec(folder)
            if folder.name not in found and not any(has_cell(p, spec) for p in paths):
                text = read_bytes(folder / "error.txt", MAX_SMALL).decode("utf-8", "replace")
                found[folder.name] = {"spec": spec, "error": text, "path": folder}
    return sorted(found.values(), key=lambda failed: order(failed["spec"]))


# --- writing ----------------------------------------------------------------------------------


def write_cell(
    run: Path, spec: Mapping[str, Any], rows: Iterable[Row], log: str, replace: bool = False
) -> Path:
    """Store a finished cell and return its folder.

    If the cell exists already it is kept and this one dropped, unless `replace`. A failure noted
    earlier for the same cell is removed.

    Raises:
        RunError: a field of the specification or a row is not what the format allows, such as a
            number that is not finite.
        OSError: the disk is full, or the folder cannot be written.
    """
    text = rows_text(spec, rows)
    final = Path(run, "cells", spec["experiment"], cell_name(spec))
    kept = {**spec, "rows_sha256": hashlib.sha256(text.encode()).hexdigest()}
    files = {"spec.json": dump(kept), "rows.jsonl": text, "run.log": log}
    arrive(final, files, replace)
    forget_failure(run, spec)
    return final


def rows_text(spec: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """The contents of rows.jsonl; RunError where specification or rows break the format."""
    place = Path(f"a cell of {spec.get('experiment')}")
    lines: list[str] = []
    try:
        check_spec(spec, place)
        for number, row in enumerate(rows, 1):
            check_row(row, spec["arm"], place, f"row {number}")
            lines.append(json.dumps(row, sort_keys=True, allow_nan=False) + "\n")
        size = sum(map(len, lines))
        few = size <= MAX_JSON and len(lines) <= MAX_ROWS
        expected = f"at most {MAX_JSON / MB:.0f} MB and {MAX_ROWS} rows"
        need(few, place, "the size", expected, f"{size / MB:.0f} MB, {len(lines)} rows")
    except RunError as error:
        raise RunError(str(error).replace(REMOVE, "Mend the experiment.")) from None
    return "".join(lines)


def forget_failure(run: Path, spec: Mapping[str, Any]) -> None:
    """Remove what is stored of a failure of this cell."""
    folder = Path(run, "failed", spec["experiment"], cell_name(spec))
    shutil.rmtree(folder, ignore_errors=True)


def write_failed(run: Path, spec: Mapping[str, Any], error_text: str) -> Path:
    """Store what a cell raised; a failure noted earlier for the same cell is replaced."""
    rows_text(spec, [])
    final = Path(run, "failed", spec["experiment"], cell_name(spec))
    text = error_text[-MAX_SMALL // 4 :]  # the end of a traceback tells most; 4 bytes a character
    arrive(final, {"spec.json": dump(spec), "error.txt": text}, replace=True)
    return final
