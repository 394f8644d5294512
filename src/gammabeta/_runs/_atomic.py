"""Writing files and folders whole or not at all, and clearing away what the dead left.

What is not finished has a name that begins with `.tmp-` and tells machine and process; readers
pass such names over. A rename then makes it visible at once, also on a network file system.
"""

import errno
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HOST = re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname()) or "unknown"
_TEMP = re.compile(r"\.tmp-[0-9a-f]{16}-(?P<host>.+)-(?P<pid>[0-9]{1,10})-[0-9a-f]+")


def _temp_name(name: str) -> str:
    return f".tmp-{name}-{HOST}-{os.getpid()}-{secrets.token_hex(4)}"


def _write(path: Path, contents: bytes) -> None:
    with open(path, "xb") as file:
        file.write(contents)
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


def arrive(final: Path, files: Mapping[str, str], replace: bool) -> None:
    """Write a folder under a temporary name and rename it: all of it is there, or none."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temp = final.parent / _temp_name(final.name)
    old = final.parent / _temp_name(final.name)
    try:
        temp.mkdir()
        for name, text in files.items():
            _write(temp / name, text.encode())
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


def dump(value: Any) -> str:
    """JSON for people and for comparing: indented, in order; NaN and infinity are refused."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all; NaN and infinity are refused."""
    write_whole(path, dump(value).encode())


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file under a temporary name and rename it: all of it is there, or what was."""
    temp = path.parent / _temp_name("0" * 16)
    try:
        _write(temp, contents)
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
            if match and match["host"] == HOST and not _alive(int(match["pid"])):
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
