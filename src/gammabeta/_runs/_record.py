"""The record of a training: one JSON object a line, written as it goes, read with suspicion.

    {"kind": "gammabeta record", "schema": 1, "model": ..., "probes": [...], ...}
    {"step": 50, "seconds": 0.004, "overhead": 0.03, "loss": 2.3, "values": {PROBE: {NAME: VALUE}}}
    {"resumed": 400}

NAME is "LAYER/QUANTITY" or "QUANTITY"; VALUE a number, a list of numbers or a list of such lists.
JSON has no infinity and no NaN, and a training that diverges has both: they are the texts "inf",
"-inf" and "nan". After "resumed" N what stood there from step N on no longer counts. A line is
written whole or, after a kill, is the last one and has no end: then it is left out.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gammabeta._runs._check import (
    MB,
    PACKED,
    REMOVE,
    SCHEMA,
    RunError,
    check_schema,
    fail,
    is_int,
    is_number,
    need,
    parse,
    read_bytes,
    show,
)

KIND = "gammabeta record"
MAX_RECORD = 200 * MB
MAX_VALUES = 10_000  # numbers in one value
_MAX_LINE = 20 * MB
_MAX_TEXT = 2000
_DIGITS = 9  # as many as float32 needs to come back as it was
_BEYOND = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_START = json.dumps({"kind": KIND})[:-1].encode()
_MEND = "Name another file, or mend this one."

Value = float | list[float] | list[list[float]]


class Series(NamedTuple):
    """One quantity over the steps at which it was recorded."""

    steps: list[int]
    values: list[Any]


class Record(NamedTuple):
    """What a record holds; see `read_record`."""

    about: dict[str, Any]
    steps: list[int]
    series: dict[str, Series]
    errors: list[tuple[int, str, str]]
    resumed: list[int]
    dropped: int


def read_record(path: str | os.PathLike[str]) -> Record:
    """Read what a `gammabeta.Recorder` wrote, also while it is still writing.

    Args:
        path: the JSONL file. It may come from a stranger: its size and every field are checked.

    Returns:
        A named tuple of plain Python values: `about`, the facts of its first line (model, probes,
        schedule, what the numbers mean); `steps`, the recorded steps; `series`, a dict from a name
        to its `steps` and `values` (floats; lists where the quantity is a vector, lists of lists
        where it is a matrix): "PROBE/LAYER/QUANTITY", "PROBE/QUANTITY" for what belongs to the
        whole network, and "loss", "seconds", "overhead"; `errors`, (step, probe, message) of what
        failed; `resumed`, the steps from which a later process went on; `dropped`, the bytes of a
        last line that a kill left unfinished.

    Raises:
        RunError: a ValueError that names file, line and field of what is not as it has to be.

    Example:
        >>> import tempfile, torch, gammabeta as gb
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))
        >>> def bias(step, memory):
        ...     return {"0/bias": step.parameters["0.bias"]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rec = gb.Recorder(model, probes=(bias,), path=f"{folder}/record.jsonl")
        ...     for value in (1.0, 2.0):
        ...         _ = torch.nn.init.constant_(model[0].bias, value)
        ...         _ = rec.step(torch.nn.functional.mse_loss, (torch.eye(2), torch.ones(2, 1)))
        ...     record = gb.read_record(f"{folder}/record.jsonl")
        >>> record.about["model"], record.series["bias/0/bias"]
        ('Sequential', Series(steps=[0], values=[[1.0]]))
    """
    path = Path(path)
    with _to_mend():
        return _parsed(_bytes(path), path)


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise fail(path, "the file", "a file", "a folder")
    return read_bytes(path, MAX_RECORD)


@contextmanager
def _to_mend() -> Iterator[None]:
    """Nothing repeats a training by itself: what is wrong with its record is said otherwise."""
    try:
        yield
    except RunError as error:
        raise RunError(str(error).replace(REMOVE, _MEND)) from None


def is_record(path: Path) -> bool:
    """Whether a path that a person names is to be read as a record, to its name or contents."""
    if path.is_dir() or path.name.endswith(PACKED):
        return False
    if path.suffix == ".jsonl" or not path.is_file():
        return path.suffix == ".jsonl"
    with path.open("rb") as file:
        return file.read(len(_START)) == _START


def header(**about: Any) -> dict[str, Any]:
    """The first line of a record of these facts."""
    return {"kind": KIND, "schema": SCHEMA, **about}


def _parsed(contents: bytes, path: Path) -> Record:
    lines = contents.split(b"\n")
    dropped = len(lines.pop())
    need(bool(lines), path, "line 1", f'the line of "kind": "{KIND}"', contents[:40])
    about = _about(_object(lines[0], path, "line 1"), path)
    rows: list[dict[str, Any]] = []
    resumed: list[int] = []
    for number, line in enumerate(lines[1:], 2):
        where = f"line {number}"
        row = _object(line, path, where)
        if "resumed" in row:
            start = row["resumed"]
            need(_is_count(start), path, f"{where}: resumed", "a step", start)
            resumed.append(start)
            while rows and rows[-1]["step"] >= start:
                rows.pop()
            continue
        _check_row(row, path, where)
        if rows and row["step"] <= rows[-1]["step"]:
            expected = f"a step after {rows[-1]['step']}"
            raise fail(path, f"{where}: step", expected, str(row["step"]))
        rows.append(row)
    return Record(about, *_columns(rows), resumed, dropped)


def _columns(
    rows: list[dict[str, Any]],
) -> tuple[list[int], dict[str, Series], list[tuple[int, str, str]]]:
    series: dict[str, Series] = {}
    errors: list[tuple[int, str, str]] = []
    for row in rows:
        for name, value in _flat(row):
            steps, values = series.setdefault(name, Series([], []))
            steps.append(row["step"])
            values.append(_decoded(value))
        errors += [(row["step"], probe, text) for probe, text in row.get("errors", {}).items()]
    return [row["step"] for row in rows], series, errors


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in ("loss", "seconds", "overhead"):
        if name in row:
            yield name, row[name]
    for probe, values in row["values"].items():
        for name, value in values.items():
            yield f"{probe}/{name}", value


def of_rows(about: Mapping[str, Any], rows: list[dict[str, Any]]) -> Record:
    """The record of rows that were kept in memory."""
    return Record(dict(about), *_columns(rows), [], 0)


# --- values -----------------------------------------------------------------------------------


def encoded(value: Any) -> Any:
    """A number or nested list as the file holds it.

    >>> encoded([1 / 3, float("inf"), 2])
    [0.333333333, 'inf', 2]
    """
    if isinstance(value, list):
        return [encoded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else str(value)
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return _BEYOND[value] if isinstance(value, str) else value


def _is_value(value: object) -> bool:
    return is_number(value) or (isinstance(value, str) and value in _BEYOND)


def _is_vector(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MAX_VALUES and all(map(_is_value, value))


def _is_matrix(value: object) -> bool:
    if not (isinstance(value, list) and value and all(isinstance(row, list) for row in value)):
        return False
    return len(value) * len(value[0]) <= MAX_VALUES and all(
        len(row) == len(value[0]) and all(map(_is_value, row)) for row in value
    )


# --- fields -----------------------------------------------------------------------------------


def _object(line: bytes, path: Path, where: str) -> dict[str, Any]:
    if len(line) > _MAX_LINE:
        came = f"{len(line) / MB:.0f} MB"
        raise fail(path, where, f"at most {_MAX_LINE / MB:.0f} MB", came)
    value = parse(line, path, where)
    if not isinstance(value, dict):
        raise fail(path, where, "an object", show(value))
    return value


def _about(value: dict[str, Any], path: Path) -> dict[str, Any]:
    where = "line 1"
    need(value.get("kind") == KIND, path, f"{where}: kind", repr(KIND), value.get("kind"))
    check_schema(value, path, where)
    for field in ("gammabeta", "torch", "model"):
        need(is_text(value.get(field)), path, f"{where}: {field}", "text", value.get(field))
    for field in ("probes", "notes"):
        texts = value.get(field)
        fine = isinstance(texts, list) and all(map(is_text, texts))
        need(fine, path, f"{where}: {field}", "a list of texts", texts)
    every, most = value.get("every"), value.get("max_overhead")
    fine = every is None or (_is_count(every) and every > 0)
    need(fine, path, f"{where}: every", "1, 2, ... or null", every)
    fine = most is None or (is_number(most) and most > 0)
    need(fine, path, f"{where}: max_overhead", "a number above 0 or null", most)
    parameters = value.get("parameters")
    need(_is_count(parameters), path, f"{where}: parameters", "a count", parameters)
    return value


def _check_row(row: dict[str, Any], path: Path, where: str) -> None:
    need(_is_count(row.get("step")), path, f"{where}: step", "0, 1, ...", row.get("step"))
    for field in {"seconds", *row} & {"seconds", "overhead"}:
        value: Any = row.get(field)
        fine = is_number(value) and value >= 0
        need(fine, path, f"{where}: {field}", "a number of 0 or more", value)
    if "loss" in row:
        need(_is_value(row["loss"]), path, f"{where}: loss", "a number", row["loss"])
    for field, values in _objects(row, path, where):
        for name, value in values.items():
            place = f"{where}: {field}: {show(name)}"
            need(is_text(name), path, place, "a name of printable characters", name)
            fine = _is_value(value) or _is_vector(value) or _is_matrix(value)
            expected = f"a number, or lists of at most {MAX_VALUES}"
            need(fine, path, place, expected, value)
    errors = row.get("errors", {})
    fine = isinstance(errors, dict) and all(map(is_text, [*errors, *errors.values()]))
    need(fine, path, f"{where}: errors", "an object of texts", errors)


def _objects(
    row: Mapping[str, Any], path: Path, where: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    values = row.get("values")
    if not isinstance(values, dict):
        raise fail(path, f"{where}: values", "an object", show(values))
    for probe, found in values.items():
        place = f"{where}: values: {show(probe)}"
        named = is_text(probe) and "/" not in probe
        need(named, path, place, "a probe's name, without a slash", probe)
        if not isinstance(found, dict):
            raise fail(path, place, "an object", show(found))
        yield f"values: {show(probe)}", found


def is_text(value: object) -> bool:
    """Whether it is a text that a record may hold: printable, on one line, not too long."""
    return isinstance(value, str) and len(value) <= _MAX_TEXT and value.isprintable()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and is_int(value) and value >= 0


# --- writing ----------------------------------------------------------------------------------


class RecordFile:
    """A record that grows by one line at a time; opened for each, so there is nothing to close.

    An existing record of the same model and probes is continued after its last whole line.

    Attributes:
        last: the last recorded step of what was there, None in a new file.
        dropped: bytes of an unfinished last line that was cut off.

    Raises:
        RunError: the file is no record, a damaged one, or one of another model or other probes.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.last: int | None = None
        self.dropped = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        with _to_mend():
            contents = _bytes(path) if os.path.lexists(path) else b""
            self._size = contents.rfind(b"\n") + 1
            # Killed while its first line was written; anything else is not ours to clear.
            if self._size or not _START.startswith(contents[: len(_START)]):
                old = _parsed(contents, path)
                _same(old.about, about, path)
                self.last = old.steps[-1] if old.steps else None
        self.dropped = len(contents) - self._size
        if self.dropped:
            os.truncate(path, self._size)
        if not self._size:
            path.touch()
            self.append(about)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line, whole or not at all.

        Raises:
            OSError: the disk is full, the file has gone, or somebody else has written to it.
        """
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        if self._size + len(line) > MAX_RECORD:
            raise OSError(f"{self.path} has reached {MAX_RECORD / MB:.0f} MB, the largest record")
        with open(self.path, "r+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END) != self._size:
                raise OSError(f"somebody else has written to {self.path}")
            rest = memoryview(line)
            size = self._size
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                self._size += len(line)
            except BaseException:  # Ctrl-C too
                self._size = size
                file.truncate(size)
                raise


def _same(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    for field in ("model", "parameters", "probes"):
        if old[field] != new[field]:
            do = "Name another path for this training."
            raise fail(path, f"line 1: {field}", show(new[field]), show(old[field]), do)
