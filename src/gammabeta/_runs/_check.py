"""What makes a run folder's files trustworthy: checks of fields, and reading that is bounded.

Nothing is taken as it comes. Links and pipes are not opened, sizes are limited, numbers are
finite, and what a stranger wrote reaches an error message only in quotes and cut short.
"""

import functools
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1

Scalar = str | int | float | bool | None
Row = dict[str, Scalar]

ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_COLUMN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
REMOVE = "Remove it and run the same command again."
MB = 1_000_000
MAX_JSON = 50 * MB  # also for one cell's rows
MAX_SMALL = 2 * MB  # a specification, a traceback, packed cells
PACKED = ".jsonl.gz"


class RunError(ValueError):
    """A run folder that cannot be used: one line with file, field, what was expected and came."""


# --- fields -----------------------------------------------------------------------------------


def show(value: object) -> str:
    """A value as errors show it: quoted, for a stranger may have written it, and not too long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def fail(path: Path, field: str, expected: str, came: str, do: str = "") -> RunError:
    """The error to raise; `came` and `do` go into the message as they are (see `show`)."""
    place = str(path) if str(path).isprintable() else repr(str(path))
    do = do or REMOVE
    return RunError(f"{place}: {field}: expected {expected}, got {came}. {do}")


def need(ok: bool, path: Path, field: str, expected: str, came: object, do: str = "") -> None:
    """Raise RunError unless `ok`."""
    if not ok:
        raise fail(path, field, expected, show(came), do)


def is_int(value: object) -> bool:
    """Whether it is an integer of 64 bits: others are no numbers outside of Python."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_number(value: object) -> bool:
    """Whether it is such an integer, or a float that is finite."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, str | bool) or is_number(value)


def scalars(value: object, path: Path, field: str) -> None:
    """Raise RunError unless it is a flat JSON object, of column names to finite scalars."""
    if not isinstance(value, dict):
        raise fail(path, field, "an object", show(value))
    for key, item in value.items():
        # words are made for what is wrong alone: there are a million of these
        if not (isinstance(key, str) and _is_column(key)):
            raise fail(path, field, "names of letters, digits and _", show(key))
        if not _is_scalar(item):
            expected = "text, true, false, null or a finite number"
            raise fail(path, f"{field}: {key}", expected, show(item))


@functools.lru_cache(maxsize=1000)
def _is_column(name: str) -> bool:
    return _COLUMN.fullmatch(name) is not None


def is_id(value: object) -> bool:
    """Whether it is the id of an experiment or of the like."""
    return isinstance(value, str) and ID.fullmatch(value) is not None


# --- files ------------------------------------------------------------------------------------


def read_bytes(path: Path, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes; links and pipes are refused."""
    if path.is_symlink():
        raise fail(path, "the file", "a regular file", "a symbolic link")
    # NONBLOCK: opening a pipe would otherwise wait for ever for a writer.
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        handle = os.open(path, flags)
    except OSError as error:
        came = "no such file" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        raise fail(path, "the file", "a readable file", came) from error
    with os.fdopen(handle, "rb") as file:
        info = os.fstat(handle)
        need(stat.S_ISREG(info.st_mode), path, "the file", "a regular file", "something else")
        data = file.read(limit + 1) if info.st_size <= limit else b""
    if info.st_size > limit or len(data) > limit:
        size = f"{max(info.st_size, len(data)) / MB:.0f} MB"
        raise fail(path, "the size", f"at most {limit / MB:.0f} MB", size)
    return data


def parse(text: bytes, path: Path, field: str) -> Any:
    """The value of a JSON text; RunError if it is none, or has a number that is not finite."""
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise fail(path, field, "JSON in UTF-8", show(str(error))) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


def read_json(path: Path, what: str, limit: int = MAX_JSON) -> dict[str, Any]:
    """Read a JSON object that carries `schema`; `what` names the file's content in errors."""
    value = parse(read_bytes(path, limit), path, what)
    if not isinstance(value, dict):
        raise fail(path, what, "an object", show(value))
    check_schema(value, path, what)
    return value


def check_schema(value: Mapping[str, Any], path: Path, what: str) -> None:
    """Raise RunError unless this version reads the format; a newer one is named."""
    schema: Any = value.get("schema")
    need(is_int(schema) and schema >= 1, path, f"{what}: schema", "a whole number", schema)
    if schema > SCHEMA:
        do = f"Read it with {_version_that_reads(value)}."
        raise fail(path, f"{what}: schema", f"at most {SCHEMA}", str(schema), do)


def _version_that_reads(value: Mapping[str, Any]) -> str:
    versions = value.get("versions")
    wrote = value.get("gammabeta") or (
        versions.get("gammabeta") if isinstance(versions, dict) else None
    )
    if isinstance(wrote, str) and re.fullmatch(r"[0-9][0-9A-Za-z.+]{0,30}", wrote):
        return f"gammabeta {wrote} or newer"
    return "a newer gammabeta"


def check_run(path: Path) -> None:
    """Raise RunError unless `path` is a run folder, or holds or is a file of packed cells."""
    expected = "a run folder (it holds cells/, failed/, claims.json or *.jsonl.gz)"
    do = "Give a folder that `gammabeta study run --out` has made."
    if path.name.endswith(PACKED) and path.is_file():
        return
    if not path.is_dir():
        came = "a file" if path.exists() else "nothing"
        raise fail(path, "the folder", expected, came, do)
    parts = any((path / part).exists() for part in ("cells", "failed", "claims.json"))
    if not parts and not any(path.glob(f"[!.]*{PACKED}")):
        raise fail(path, "the folder", expected, "a folder without them", do)
