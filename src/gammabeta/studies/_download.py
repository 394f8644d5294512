"""MNIST's public mirrors, and getting files from them: each whole and checked, or not at all.

A download must end: after a fixed time over all files and mirrors, whatever a name server or a
web server does, and after a shorter one where nothing comes, so that a second mirror has its
chance. It may be killed at any moment, with others at work in the same folder: a file gets its
name only when its contents are known to be right, and what was left half done is swept away an
hour later. What the right contents are is the caller's to say; `_data` keeps the table.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
TIMEOUT = 20.0  # seconds for one whole download: all files, all mirrors


class Wanted(NamedTuple):
    """One file to download."""

    name: str  # on the mirrors and in the folder
    most: int  # bytes; what sends more is cut off
    check: Callable[[Path], None]  # raises ConnectionError where the contents are wrong


def need(module: str) -> Any:
    """Import a module of the extra ``study``, or say in one line how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0].replace("sklearn", "scikit-learn")
        raise ModuleNotFoundError(
            f"The studies need the package {package}, which is not installed. "
            'Run: pip install "gammabeta[study]"',
            name=error.name,
        ) from error


def download(folder: Path, files: Iterable[Wanted], timeout: float) -> None:
    """Download these files into the folder, which is made if need be.

    `files` is asked for the next one only when the one before has arrived. Those that came
    before an error stay.

    Raises:
        ConnectionError: for one of the files no mirror sent the right contents in time.
        OSError: the folder cannot be written.
    """
    deadline = time.monotonic() + timeout
    mirrors = list(MIRRORS)
    _sweep(folder)
    for file in files:
        reasons = []
        for mirror in tuple(mirrors):
            try:
                _pull(mirror, folder, file, timeout, deadline)
            except ConnectionError as error:
                reasons.append(f"{urlsplit(mirror).netloc}: {error}")
                mirrors.append(mirrors.pop(0))  # the next file begins with one that answered
            else:
                break
        else:
            raise ConnectionError(f"MNIST could not be downloaded ({'; '.join(reasons)}).")


def _sweep(folder: Path) -> None:
    """Remove what downloads that were killed have left; an hour old, none is under way."""
    for part in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError):  # another process may be faster
            if part.stat().st_mtime < time.time() - 3600:
                part.unlink()


def _pull(mirror: str, folder: Path, file: Wanted, timeout: float, deadline: float) -> None:
    """Download one file into the folder: complete and checked, or not at all.

    The transfer runs in a thread of its own, because neither a name that does not resolve nor
    a server that sends one byte a second can be interrupted from within.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise ConnectionError("no time left")
    stall = min(6.0, timeout / 3)  # leaves a second mirror its chance
    part = folder / f".tmp-{file.name}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        transfer = _Transfer(f"{mirror}{file.name}", part, file.most, stall)
        try:
            transfer.wait(timeout, deadline)
            file.check(part)
            os.replace(part, folder / file.name)
        finally:
            transfer.close()
            part.unlink(missing_ok=True)
    except ConnectionError:
        raise
    except OSError as error:
        raise OSError(
            f"{folder}: cannot be written ({error.strerror or error}). "
            "Make room there or check its rights, or give another data folder."
        ) from error


class _Transfer:
    """One download into one new file, in a thread; also the file object that pooch writes to."""

    def __init__(self, url: str, part: Path, most: int, stall: float) -> None:
        downloader = need("pooch").HTTPDownloader(
            chunk_size=1 << 14,
            timeout=stall,
            headers={"Accept-Encoding": "identity"},  # the file as it lies there
            hooks={"response": self._keep},
        )
        self._url, self._most, self._stall = url, most, stall
        self._count = 0
        self._disk: OSError | None = None
        self._error: Exception | None = None
        self._response: Any = None
        self._file = open(part, "xb")  # noqa: SIM115 (closed in `close`)
        self._thread = threading.Thread(target=self._run, args=(downloader,), daemon=True)
        self._thread.start()

    def _run(self, downloader: Any) -> None:
        try:
            downloader(self._url, output_file=self, pooch=None)
        except Exception as error:  # handed to `wait`, in the caller's thread
            self._error = error
        finally:
            if self._response is not None:  # pooch leaves it open after a failure
                self._response.close()

    def _keep(self, response: Any, *_: object, **__: object) -> None:
        self._response = response

    def write(self, block: bytes) -> None:
        """Take one block; what goes wrong here is the disk's fault, not the network's."""
        self._count += len(block)
        if self._count > self._most:
            raise ValueError(f"more than {self._most} bytes")
        try:
            self._file.write(block)
            self._file.flush()
        except OSError as error:
            self._disk = error
            raise

    def flush(self) -> None:
        """Do nothing: `write` has flushed."""

    def wait(self, timeout: float, deadline: float) -> None:
        """Return when all is on the disk; raise if it failed, stalls or lasts too long."""
        count, since = 0, time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.02)
            now = time.monotonic()
            if self._count > count:
                count, since = self._count, now
            if now >= deadline:
                raise ConnectionError(f"gave up after {timeout:g} s in all")
            if now - since >= self._stall:
                raise ConnectionError(f"nothing came for {self._stall:g} s")
        if self._disk is not None:
            raise self._disk
        if self._error is not None:
            raise ConnectionError(self._reason(self._error)) from self._error
        os.fsync(self._file.fileno())
        self._file.close()

    def _reason(self, error: Exception) -> str:
        """Return a few words: the messages of requests are paragraphs."""
        faults = need("requests").exceptions
        if isinstance(error, faults.Timeout):
            return f"nothing came for {self._stall:g} s"
        if isinstance(error, faults.HTTPError):
            return f"HTTP status {error.response.status_code}"
        if isinstance(error, faults.ConnectionError):
            return "no connection"
        if isinstance(error, faults.RequestException):
            return f"the transfer broke off ({type(error).__name__})"
        return str(error) or type(error).__name__

    def close(self) -> None:
        """Close the file and end the transfer, if it still runs."""
        with contextlib.suppress(OSError):  # a full disk complains a second time
            self._file.close()
        if self._thread.is_alive() and self._response is not None:
            # Wakes a read that waits. Older urllib3 lacks it: then the next block fails.
            with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):
                self._response.raw.shutdown()
        self._thread.join(0.1)
