"""Packed cells: what is kept of one experiment's finished cells, in one compressed file.

    <experiment>.jsonl.gz    line 1   schema, experiment, gammabeta, cells, thinned, sha256
                             line 2.. one cell each: {"spec": ..., "rows": [...], "float32": [...]}

`float32` names the columns, if any, whose numbers are all of single precision: they stand there
with the 6 to 9 digits that single precision has, not with the 17 of the same number in double.

A folder of such files, or one file, is read wherever a run folder is. The same cells give the
same bytes (with one zlib): cells in order, keys sorted, no time and no name in the gzip header.
"""

import gzip
import hashlib
import json
import math
import struct
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gammabeta._runs._atomic import write_whole
from gammabeta._runs._cells import (
    MAX_ROWS,
    StoredCell,
    cell_name,
    check_row,
    check_spec,
    folder_cells,
    order,
)
from gammabeta._runs._check import (
    MAX_JSON,
    MAX_SMALL,
    MB,
    PACKED,
    SCHEMA,
    Row,
    RunError,
    check_run,
    check_schema,
    fail,
    need,
    parse,
    read_bytes,
    show,
)

MAX_PACKED = 300_000
_SINGLE = "float32"
_DERIVED = ("cpu_seconds",)  # differs from machine to machine, and decides nothing
_DO = "Take the file from where it was made, or accept the run again."


def packed_files(path: Path) -> list[Path]:
    """The files of packed cells that a path stands for: itself, or those in a folder."""
    if path.name.endswith(PACKED) and not path.is_dir():
        return [path]
    return sorted(entry for entry in path.glob(f"*{PACKED}") if not entry.name.startswith("."))


def read_cells(paths: Sequence[Path], experiment: str | None = None) -> list[StoredCell]:
    """The finished cells of several run folders, each name once (the first path's), in order.

    A path is a run folder, a file of packed cells, or a folder that holds such files.
    """
    found: dict[tuple[str, str], StoredCell] = {}
    for path in map(Path, paths):
        check_run(path)
        for cell in folder_cells(path, experiment, found.keys()):
            found[cell.spec["experiment"], cell.path.name] = cell
        for file in packed_files(path):
            if experiment in (None, file.name.removesuffix(PACKED)):
                for cell in read_packed(file):
                    found.setdefault((cell.spec["experiment"], cell.path.name), cell)
    return sorted(found.values(), key=lambda cell: order(cell.spec))


# --- writing ----------------------------------------------------------------------------------


def thin(rows: Sequence[Row], most: int) -> list[Row]:
    """The rows of at most `most` steps: the first step, the last three, the others log-spaced.

    A step is the whole number in the column `step`; rows without one are all kept, and of a step
    that is kept all rows are.

    >>> [row["step"] for row in thin([{"step": s} for s in range(1, 101)], 8)]
    [1, 4, 9, 23, 60, 98, 99, 100]
    """
    if most < 5:
        raise ValueError(f"most must be 5 or more, got {most}: the ends alone are four steps.")
    steps = sorted({step for row in rows if (step := _step(row)) is not None})
    if len(steps) <= most:
        return list(rows)
    inner, count = steps[1:-3], most - 4
    low, ratio = max(inner[0], 1), max(inner[-1], 1) / max(inner[0], 1)
    at = (low * ratio ** ((k + 0.5) / count) for k in range(count))
    near = {inner[min(bisect_left(inner, target), len(inner) - 1)] for target in at}
    kept = {steps[0], *near, *steps[-3:]}
    return [row for row in rows if (step := _step(row)) is None or step in kept]


def _step(row: Row) -> int | None:
    step = row.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def pack(cells: Iterable[StoredCell], gammabeta: str, thinned: int = 0) -> bytes:
    """The contents of a file of packed cells of one experiment.

    Args:
        cells: at least one, all of one experiment.
        gammabeta: the version that writes.
        thinned: to how many steps a cell's rows were thinned (see `thin`); 0: all rows are there.
    """
    ordered = sorted(cells, key=lambda cell: order(cell.spec))
    (experiment,) = {cell.spec["experiment"] for cell in ordered}
    lines = []
    for cell in ordered:
        spec = {key: value for key, value in cell.spec.items() if key not in _DERIVED}
        check_spec(spec, cell.path)
        rows, short = _shortened(cell.rows)
        lines.append(_line({"spec": spec, "rows": rows} | ({_SINGLE: short} if short else {})))
    body = "".join(lines).encode()
    head = {
        "schema": SCHEMA,
        "experiment": experiment,
        "gammabeta": gammabeta,
        "cells": len(ordered),
        "thinned": thinned,
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    return gzip.compress(_line(head).encode() + body, 9, mtime=0)


def _shortened(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Rows with columns of single precision in few digits, and the names of these columns.

    >>> _shortened([{"loss": 0.10000000149011612}, {"loss": 0.5}])
    ([{'loss': 0.1}, {'loss': 0.5}], ['loss'])
    """
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    short: dict[str, list[float]] = {}
    for name, values in columns.items():
        if all(isinstance(value, float) and _single(value) == value for value in values):
            found = [_few_digits(value) for value in values]
            if found != values:
                short[name] = found
    if not short:
        return list(rows), []
    rest = {name: iter(values) for name, values in short.items()}
    return [{k: next(rest[k]) if k in rest else v for k, v in row.items()} for row in rows], [
        *short
    ]


def _single(value: float) -> float:
    """The nearest number of single precision; infinite where there is none."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.inf


def _few_digits(value: float) -> float:
    """The number of fewest digits, 6 to 9, whose nearest of single precision this is."""
    candidates = (float(f"{value:.{digits}g}") for digits in range(6, 10))
    return next(found for found in candidates if _single(found) == value)


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"


def write_packed(folder: Path, experiment: str, contents: bytes) -> Path:
    """Store packed cells; what was checked by reading them again, replacing an older file whole.

    Raises:
        RunError: the contents are larger than 300 KB, or are not what a reader accepts.
    """
    path = Path(folder) / f"{experiment}{PACKED}"
    if len(contents) > MAX_PACKED:
        raise fail(path, "the size", f"at most {MAX_PACKED:,} bytes", f"{len(contents):,}", _DO)
    _cells(_unpacked(contents, path), path)
    # Another zlib packs the same text into other bytes: no reason to change a file.
    if not path.exists() or gzip.decompress(contents) != _unpacked(
        read_bytes(path, MAX_SMALL), path
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, contents)
    return path


# --- reading ----------------------------------------------------------------------------------


def read_packed(path: Path) -> list[StoredCell]:
    """The cells of one file; a cell's path is the file's, with the cell's name below it.

    Raises:
        RunError: the file is not what it has to be, with its name and the line.
    """
    return _cells(_unpacked(read_bytes(path, MAX_SMALL), path), path)


def _unpacked(contents: bytes, path: Path) -> bytes:
    """At most 50 MB, however small the file: it may come from a stranger."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        text = unpacker.decompress(contents, MAX_JSON + 1)
    except zlib.error as error:
        raise fail(path, "the file", "gzip", show(str(error)), _DO) from error
    need(len(text) <= MAX_JSON, path, "the size", f"at most {MAX_JSON / MB:.0f} MB", "more", _DO)
    whole = unpacker.eof and not unpacker.unused_data
    need(whole, path, "the file", "one whole gzip stream", "a cut or a longer one", _DO)
    return text


def _cells(text: bytes, path: Path) -> list[StoredCell]:
    first, _, body = text.partition(b"\n")
    head = parse(first, path, "line 1")
    if not isinstance(head, dict):
        raise fail(path, "line 1", "an object", show(head), _DO)
    check_schema(head, path, "line 1")
    stem = path.name.removesuffix(PACKED)
    need(head.get("experiment") == stem, path, "line 1: experiment", stem, head.get("experiment"))
    stored, found = head.get("sha256"), hashlib.sha256(body).hexdigest()
    lines = body.split(b"\n")
    ended = lines.pop() == b""
    need(ended, path, f"line {len(lines) + 2}", "a line end", "none", _DO)
    need(head.get("cells") == len(lines), path, "line 1: cells", f"{len(lines)} as there are lines",
         head.get("cells"), _DO)  # fmt: skip
    cells: dict[str, StoredCell] = {}
    count = 0
    for number, line in enumerate(lines, 2):
        cell = _cell(line, path, f"line {number}", stem)
        count += len(cell.rows)
        need(count <= MAX_ROWS, path, f"line {number}", f"at most {MAX_ROWS} rows", count, _DO)
        need(cell.path.name not in cells, path, f"line {number}", "every cell once", "a second")
        cells[cell.path.name] = cell
    # Last: a line that is wrong is named first.
    need(found == stored, path, "the SHA-256 of the cells", f"{show(stored)} as in line 1", found,
         _DO)  # fmt: skip
    return list(cells.values())


def _cell(line: bytes, path: Path, field: str, experiment: str) -> StoredCell:
    value = parse(line, path, field)
    keys = isinstance(value, dict) and value.keys() - {_SINGLE} == {"spec", "rows"}
    need(keys, path, field, "an object of spec and rows", value, _DO)
    spec, rows, single = value["spec"], value["rows"], value.get(_SINGLE, [])
    if not isinstance(spec, dict):
        raise fail(path, f"{field}: spec", "an object", show(spec), _DO)
    try:
        check_spec(spec, path)
    except RunError as error:
        raise RunError(str(error).replace(f"{path}: ", f"{path}: {field}: spec: ", 1)) from None
    need(spec["experiment"] == experiment, path, f"{field}: spec: experiment", experiment,
         spec["experiment"])  # fmt: skip
    need(isinstance(rows, list) and bool(rows), path, f"{field}: rows", "a list of rows", rows)
    names = isinstance(single, list) and all(isinstance(name, str) for name in single)
    need(names, path, f"{field}: {_SINGLE}", "a list of columns", single)
    for place, row in enumerate(rows, 1):
        where = f"{field}: row {place}"
        check_row(row, spec["arm"], path, where)
        for name in row.keys() & set(single):
            value = row[name]
            fits = isinstance(value, float) and math.isfinite(_single(value))
            need(fits, path, f"{where}: {name}", "a number of single precision", value)
            row[name] = _single(value)
    return StoredCell(spec, rows, path / cell_name(spec))
