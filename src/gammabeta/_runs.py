"""Run folders: their names, their schema, writing them whole and reading them with suspicion.

    RUN/claims.json                             the registry as it was when the run was made
    RUN/cells/<experiment>/<name>/spec.json     a finished cell: what was run,
                                  rows.jsonl    what was measured, one JSON object per line,
                                  run.log       and what it said meanwhile
    RUN/failed/<experiment>/<name>/             a cell that raised: spec.json, error.txt
    RUN/verdicts.json, RUN/figures.json         derived from the rows; may be made again

A cell's name is a hash of its specification and its folder arrives by one rename, so presence
means done, nothing is ever seen half-written, two writers need no lock (also on a network file
system), and run folders from several machines are merged by copying. What is read here may come
from a stranger: links are not followed, sizes are bounded, every field is checked.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1
STATUSES = ("supported", "refuted", "mixed", "inconclusive", "exact", "fails", "demo")

Scalar = str | int | float | bool | None
Row = dict[str, Scalar]

_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_NAME = re.compile(r"[0-9a-f]{16}")
_COLUMN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_TEMP = re.compile(r"\.tmp-[0-9a-f]{16}-(?P<host>.+)-(?P<pid>[0-9]{1,10})-[0-9a-f]+")
_HOST = re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname()) or "unknown"
_HASHED = ("schema", "experiment", "arm", "seed", "budget", "data", "code")
_REMOVE = "Remove it and run the same command again."
_MB = 1_000_000
_MAX_JSON = 50 * _MB  # also for one cell's rows
_MAX_SMALL = 2 * _MB  # a specification, a traceback
_MAX_ROWS = 500_000  # 50 MB of "{}" would be gigabytes of dictionaries


class RunError(ValueError):
    """A run folder that cannot be used: one line with file, field, what was expected and came."""


class StoredCell(NamedTuple):
    """One finished cell as it lies on disk."""

    spec: dict[str, Any]
    rows: list[Row]
    path: Path

    def flat(self) -> list[Row]:
        """The rows with the cell's arm, seed, budget and data set as further columns."""
        spec = self.spec
        head = {**spec["arm"], **{k: spec[k] for k in ("seed", "budget")}}
        return [{**head, "data": spec["data"]["name"], **row} for row in self.rows]


# --- errors and checks ----------------------------------------------------------------------


def _show(value: object) -> str:
    text = repr(value)  # repr: what a stranger wrote must not reach the terminal as it is
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fail(path: Path, field: str, expected: str, came: str, do: str = "") -> RunError:
    place = str(path) if str(path).isprintable() else repr(str(path))
    do = do or _REMOVE
    return RunError(f"{place}: {field}: expected {expected}, got {came}. {do}")


def _need(ok: bool, path: Path, field: str, expected: str, came: object, do: str = "") -> None:
    if not ok:
        raise _fail(path, field, expected, _show(came), do)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, str | bool) or _is_number(value)


def _scalars(value: object, path: Path, field: str) -> None:
    """Check a flat JSON object: column names to scalars, no number that is not finite."""
    if not isinstance(value, dict):
        raise _fail(path, field, "an object", _show(value))
    for key, item in value.items():
        named = isinstance(key, str) and _COLUMN.fullmatch(key) is not None
        _need(named, path, field, "names of letters, digits and _", key)
        expected = "text, true, false, null or a finite number"
        _need(_is_scalar(item), path, f"{field}: {key}", expected, item)


def _id(value: object) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _version_that_reads(value: Mapping[str, Any]) -> str:
    versions = value.get("versions")
    wrote = value.get("gammabeta") or (
        versions.get("gammabeta") if isinstance(versions, dict) else None
    )
    if isinstance(wrote, str) and re.fullmatch(r"[0-9][0-9A-Za-z.+]{0,30}", wrote):
        return f"gammabeta {wrote} or newer"
    return "a newer gammabeta"


def check_spec(spec: Mapping[str, Any], path: Path) -> None:
    """Raise RunError unless every field of a cell's specification is what it has to be."""
    checks: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("schema", lambda v: v == SCHEMA and _is_int(v), f"{SCHEMA}"),
        ("experiment", _id, "an experiment's id"),
        ("seed", lambda v: _is_int(v) and v >= 0, "an integer of 0 or more"),
        ("budget", _id, "a budget's name"),
        ("code", lambda v: isinstance(v, str) and bool(_NAME.fullmatch(v)), "16 hex digits"),
    )
    for field, check, expected in checks:
        _need(field in spec and check(spec[field]), path, field, expected, spec.get(field))
    _scalars(spec.get("arm"), path, "arm")
    for field in ("data", "versions"):
        value = spec.get(field)
        texts = isinstance(value, dict) and all(
            isinstance(k, str) and isinstance(v, str) for k, v in value.items()
        )
        _need(texts, path, field, "an object of texts", value)
    data = spec["data"]
    _need(_id(data.get("name")), path, "data.name", "a data set's name", data.get("name"))
    digest = data.get("digest", "")
    hexa = re.fullmatch(r"[0-9a-f]{8,64}", digest) is not None
    _need(hexa, path, "data.digest", "8 to 64 hex digits", digest)


# --- reading --------------------------------------------------------------------------------


def _read_bytes(path: Path, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes; links and pipes are refused."""
    if path.is_symlink():
        raise _fail(path, "the file", "a regular file", "a symbolic link")
    # NONBLOCK: opening a pipe would otherwise wait for ever for a writer.
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        handle = os.open(path, flags)
    except OSError as error:
        came = "no such file" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        raise _fail(path, "the file", "a readable file", came) from error
    with os.fdopen(handle, "rb") as file:
        info = os.fstat(handle)
        _need(stat.S_ISREG(info.st_mode), path, "the file", "a regular file", "something else")
        data = file.read(limit + 1) if info.st_size <= limit else b""
    if info.st_size > limit or len(data) > limit:
        size = f"{max(info.st_size, len(data)) / _MB:.0f} MB"
        raise _fail(path, "the size", f"at most {limit / _MB:.0f} MB", size)
    return data


def _parse(text: bytes, path: Path, field: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _fail(path, field, "JSON in UTF-8", _show(str(error))) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


def read_json(path: Path, what: str, limit: int = _MAX_JSON) -> dict[str, Any]:
    """Read a JSON object that carries `schema`; `what` names the file's content in errors."""
    value = _parse(_read_bytes(path, limit), path, what)
    if not isinstance(value, dict):
        raise _fail(path, what, "an object", _show(value))
    schema: Any = value.get("schema")
    _need(_is_int(schema) and schema >= 1, path, f"{what}: schema", "a whole number", schema)
    if schema > SCHEMA:
        do = f"Read it with {_version_that_reads(value)}."
        raise _fail(path, f"{what}: schema", f"at most {SCHEMA}", str(schema), do)
    return value


def check_run(path: Path) -> None:
    """Raise RunError unless `path` is a folder that holds cells, failures or a registry."""
    expected = "a run folder (it holds cells/, failed/ or claims.json)"
    do = "Give a folder that `gammabeta study run --out` has made."
    if not path.is_dir():
        came = "a file" if path.exists() else "nothing"
        raise _fail(path, "the folder", expected, came, do)
    if not any((path / part).exists() for part in ("cells", "failed", "claims.json")):
        raise _fail(path, "the folder", expected, "a folder without them", do)


def _folders(path: Path, pattern: re.Pattern[str], what: str) -> Iterator[Path]:
    """The folders in `path` in order of name; hidden names (unfinished cells) are passed over."""
    try:
        if path.is_symlink():
            raise _fail(path, what, "a folder", "a symbolic link")
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _fail(path, what, "a readable folder", f"{error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() or not entry.is_dir(follow_symlinks=False):
            raise _fail(path / entry.name, what, "a folder", "a file or a symbolic link")
        _need(pattern.fullmatch(entry.name) is not None, path, what, "its name", entry.name)
        yield path / entry.name


def _cell_folders(run: Path, kind: str, experiment: str | None) -> Iterator[Path]:
    check_run(run)
    for folder in _folders(run / kind, _ID, "an experiment's folder"):
        if experiment in (None, folder.name):
            yield from _folders(folder, _NAME, "a cell's folder")


def _read_spec(folder: Path) -> dict[str, Any]:
    path = folder / "spec.json"
    spec = read_json(path, "the specification", _MAX_SMALL)
    check_spec(spec, path)
    _need(cell_name(spec) == folder.name, path, "the hash", folder.name, cell_name(spec))
    same = spec["experiment"] == folder.parent.name
    _need(same, path, "experiment", folder.parent.name, spec["experiment"])
    return spec


def _read_rows(path: Path, arm: Mapping[str, Scalar]) -> list[Row]:
    lines = _read_bytes(path, _MAX_JSON).split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    _need(len(lines) <= _MAX_ROWS, path, "the rows", f"at most {_MAX_ROWS}", len(lines))
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        row = _parse(line, path, f"line {number}")
        _check_row(row, arm, path, f"line {number}")
        rows.append(row)
    return rows


def _check_row(row: object, arm: Mapping[str, Scalar], path: Path, field: str) -> None:
    _scalars(row, path, field)
    taken = {*arm, "seed", "budget", "data"}
    if isinstance(row, dict) and (both := taken & row.keys()):
        expected = "columns other than the arm's, seed, budget and data"
        raise _fail(path, field, expected, _show(sorted(both)))


def read_cells(paths: Sequence[Path], experiment: str | None = None) -> list[StoredCell]:
    """The finished cells of several run folders, each name once (the first folder's), in order."""
    found: dict[tuple[str, str], StoredCell] = {}
    for run in paths:
        for folder in _cell_folders(Path(run), "cells", experiment):
            key = (folder.parent.name, folder.name)
            if key not in found:
                spec = _read_spec(folder)
                rows = _read_rows(folder / "rows.jsonl", spec["arm"])
                found[key] = StoredCell(spec, rows, folder)
    return sorted(found.values(), key=lambda cell: _order(cell.spec))


def _order(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    arm = json.dumps(spec["arm"], sort_keys=True)
    return (spec["experiment"], arm, spec["seed"], cell_name(spec))


def has_cell(run: Path, spec: Mapping[str, Any]) -> bool:
    """Whether the cell of this specification is finished in this run folder."""
    return Path(run, "cells", spec["experiment"], cell_name(spec)).is_dir()


def read_failed(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The cells that raised, as {"spec", "error", "path"}; not those that some folder finished."""
    found: dict[str, dict[str, Any]] = {}
    for run in paths:
        for folder in _cell_folders(Path(run), "failed", None):
            spec = _read_spec(folder)
            if folder.name not in found and not any(has_cell(p, spec) for p in paths):
                text = _read_bytes(folder / "error.txt", _MAX_SMALL).decode("utf-8", "replace")
                found[folder.name] = {"spec": spec, "error": text, "path": folder}
    return sorted(found.values(), key=lambda failed: _order(failed["spec"]))


# --- the derived files ----------------------------------------------------------------------


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(v is None or _is_number(v) for v in value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "an id": _id,
    "an id or null": lambda v: v is None or _id(v),
    "text": lambda v: isinstance(v, str),
    "true or false": lambda v: isinstance(v, bool),
    "an integer of 0 or more": lambda v: _is_int(v) and bool(v >= 0),
    "a finite number or null": lambda v: v is None or _is_number(v),
    "a list of numbers": _numbers,
    "[lo, hi] or null": lambda v: v is None or (_numbers(v) and len(v) == 2),
    "a list": lambda v: isinstance(v, list),
    "a list of texts": lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v),
    "an object of numbers": lambda v: isinstance(v, dict) and all(map(_is_number, v.values())),
    "text or beyond": lambda v: v in ("text", "beyond"),
    "statistical or exact": lambda v: v in ("statistical", "exact"),
    "curves": lambda v: v == "curves",
    " or ".join(STATUSES): lambda v: v in STATUSES,
    " or ".join(STATUSES) + " or null": lambda v: v is None or v in STATUSES,
}


def _texts(*fields: str) -> dict[str, str]:
    return dict.fromkeys(fields, "text")


_CLAIM = _texts("title", "question", "source", "topic", "reported", "rule", "caveats") | {
    "id": "an id",
    "origin": "text or beyond",
    "kind": "statistical or exact",
    "experiment": "an id or null",
    "headline": "true or false",
    "thresholds": "an object of numbers",
}
_VERDICT = _texts("unit", "reported", "budget", "data", "sentence") | {
    "claim": "an id",
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
        raise _fail(path, field, "an object", _show(value))
    for key, kind in fields.items():
        _need(_KINDS[kind](value.get(key)), path, f"{field}: {key}", kind, value.get(key))


def _list_of(value: Mapping[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    items = value.get(key)
    if not isinstance(items, list):
        raise _fail(path, key, "a list", _show(items))
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
            _scalars(cell, path, where)
            _check(cell, _texts("name", "status"), path, where)
    _check(value, {"gammabeta": "text", "surprises": "a list of texts"}, path, "the verdicts")
    notice = value.get("notice")
    _need(notice is None or isinstance(notice, str), path, "notice", "text or null", notice)


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
                _need(same, path, f"{where}: series", "lists of one length", series["name"])


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


# --- writing --------------------------------------------------------------------------------


def cell_name(spec: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 of the specification; package versions do not enter."""
    text = json.dumps({key: spec[key] for key in _HASHED}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make a rename survive a power cut, where the system lets a folder be synchronized."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _temp_name(name: str) -> str:
    return f".tmp-{name}-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}"


def _arrive(final: Path, files: Mapping[str, str], replace: bool) -> None:
    """Write a folder under a temporary name and rename it: all of it is there, or none."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temp = final.parent / _temp_name(final.name)
    old = final.parent / _temp_name(final.name)
    try:
        temp.mkdir()
        for name, text in files.items():
            _write(temp / name, text)
        _sync_folder(temp)
        while not _renamed(temp, final):
            if not replace:
                return  # somebody else finished first, and wins
            try:
                final.rename(old)
            except FileNotFoundError:
                continue  # another writer has just moved it away
            shutil.rmtree(old)
        _sync_folder(final.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _renamed(temp: Path, final: Path) -> bool:
    """Rename a folder; False where the name is taken. Asking first would be a race."""
    try:
        temp.rename(final)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True


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
    files = {"spec.json": _dump(spec), "rows.jsonl": text, "run.log": log}
    _arrive(final, files, replace)
    forget_failure(run, spec)
    return final


def rows_text(spec: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """The contents of rows.jsonl; RunError where specification or rows break the format."""
    place = Path(f"a cell of {spec.get('experiment')}")
    lines: list[str] = []
    try:
        check_spec(spec, place)
        for number, row in enumerate(rows, 1):
            _check_row(row, spec["arm"], place, f"row {number}")
            lines.append(json.dumps(row, sort_keys=True, allow_nan=False) + "\n")
        size = sum(map(len, lines))
        few = size <= _MAX_JSON and len(lines) <= _MAX_ROWS
        expected = f"at most {_MAX_JSON / _MB:.0f} MB and {_MAX_ROWS} rows"
        _need(few, place, "the size", expected, f"{size / _MB:.0f} MB, {len(lines)} rows")
    except RunError as error:
        raise RunError(str(error).replace(_REMOVE, "Mend the experiment.")) from None
    return "".join(lines)


def forget_failure(run: Path, spec: Mapping[str, Any]) -> None:
    """Remove what is stored of a failure of this cell."""
    folder = Path(run, "failed", spec["experiment"], cell_name(spec))
    shutil.rmtree(folder, ignore_errors=True)


def write_failed(run: Path, spec: Mapping[str, Any], error_text: str) -> Path:
    """Store what a cell raised; a failure noted earlier for the same cell is replaced."""
    rows_text(spec, [])
    final = Path(run, "failed", spec["experiment"], cell_name(spec))
    text = error_text[-_MAX_SMALL // 4 :]  # the end of a traceback tells most; 4 bytes a character
    _arrive(final, {"spec.json": _dump(spec), "error.txt": text}, replace=True)
    return final


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file under a temporary name and rename it; NaN and infinity are refused."""
    text = _dump(value)
    temp = path.parent / _temp_name("0" * 16)
    try:
        _write(temp, text)
        temp.replace(path)
        _sync_folder(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def remove_dead(run: Path) -> int:
    """Remove what processes of this machine that are gone left unfinished; how many there were.

    Folders of other machines and of living processes stay: they may be at work.
    """
    count = 0
    for pattern in (".tmp-*", "cells/*/.tmp-*", "failed/*/.tmp-*"):
        for path in sorted(Path(run).glob(pattern)):
            match = _TEMP.fullmatch(path.name)
            if match and match["host"] == _HOST and not _alive(int(match["pid"])):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
                count += 1
    return count


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # signal 0 would end the process there; rather keep what is dead
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's process
    try:
        # Dead, but nobody has asked after it: in a container often for ever.
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return True  # no /proc, or gone just now: then the next run removes it
    return state[:1] not in (["Z"], ["X"])
