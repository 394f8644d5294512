"""The images that the experiments train on: MNIST, or scikit-learn's bundled digits.

MNIST is looked for in this order: the folder given by the caller, the one that the
environment variable ``GAMMABETA_DATA`` names, the cache, the public mirrors. The first two are
a promise of the user, so a fault there is an error and never a reason to look further. A file
counts only when its *uncompressed* contents have the known SHA-256: the mirrors compress the
same contents differently, and a user may have unpacked them.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import math
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gammabeta.studies import _download
from gammabeta.studies._download import need

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("auto", "mnist", "digits")
VARIABLE = "GAMMABETA_DATA"

HOW_TO_GET_MNIST = (
    f"To get MNIST: run `gammabeta data fetch`, or set {VARIABLE} to a folder that holds mnist/ "
    "with its four files."
)
DIGITS_NOTICE = (
    "These are scikit-learn's bundled digits (1,797 images of 8 x 8 pixels), not MNIST: "
    "a demonstration, which supports and refutes nothing."
)
_REPLACE = "Remove it and run `gammabeta data fetch`, or copy the original again."


class File(NamedTuple):
    """One IDX file of unsigned bytes: its name unpacked, its shape, the SHA-256 of its contents."""

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def size(self) -> int:
        """Bytes of the unpacked file: a magic number, one size for each axis, the values."""
        return 4 + 4 * len(self.shape) + math.prod(self.shape)


FILES = (
    File(
        "train-images-idx3-ubyte",
        (60000, 28, 28),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    File(
        "train-labels-idx1-ubyte",
        (60000,),
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    File(
        "t10k-images-idx3-ubyte",
        (10000, 28, 28),
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    File(
        "t10k-labels-idx1-ubyte",
        (10000,),
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
)


class Images(NamedTuple):
    """One data set in memory. The tensors are shared by all callers in a process: do not write.

    ``x`` is uint8 of shape (N, H, W), ``y`` int64 of shape (N,). The digits have no test part
    (N = 0 there): an experiment splits them anew for each seed.
    """

    name: str
    digest: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    notice: str = ""  # what a reader of the results must be told; "" where there is nothing

    @property
    def pixel_max(self) -> int:
        """The largest value that a pixel can have; ``x / pixel_max`` lies in [0, 1]."""
        return 16 if self.name == "digits" else 255


class Place(NamedTuple):
    """The folder with the four files (None: there is none yet) and why it is that one."""

    folder: Path | None
    why: str


class FileCheck(NamedTuple):
    """What `verify` found out about one file."""

    file: Path
    ok: bool
    detail: str


# -- the public functions ---------------------------------------------------------------------


def load(name: str = "auto", data_dir: str | Path | None = None) -> Images:
    """Return the data set: ``"mnist"``, ``"digits"``, or for ``"auto"`` the best to be had.

    MNIST is read once in a process. ``"auto"`` takes the bundled digits where there is no MNIST
    and none can be downloaded within 20 s; `Images.notice` then says so. `data_dir` is a
    folder that holds ``mnist/``; the digits need none and ignore it.

    Raises:
        ValueError: the name is unknown, or a file does not hold what it should.
        FileNotFoundError: the folder that was given, or a file in it, is not there.
        OSError: a file cannot be read; for ``"mnist"`` also: it cannot be downloaded
            (ConnectionError) or stored.
        ModuleNotFoundError: a package of the extra ``study`` is missing.
    """
    if name not in NAMES:
        raise ValueError(f"data must be one of {', '.join(NAMES)}, got {name!r}.")
    if name == "digits":
        return _digits()
    folder = place(data_dir).folder
    if folder is not None:
        return _mnist(folder.resolve())
    folder = _cache()
    failure = _fill_once(folder)
    if failure is None:
        return _mnist(folder.resolve())
    if name == "mnist":
        raise type(failure)(f"{failure} {HOW_TO_GET_MNIST}")
    # The notice is published with the results: no path of this machine in it.
    reason = str(failure) if isinstance(failure, ConnectionError) else "No MNIST could be stored."
    return _digits()._replace(notice=f"{reason} {DIGITS_NOTICE}")


def place(data_dir: str | Path | None = None) -> Place:
    """Return which folder `load` would read MNIST from without a download, and why.

    Raises:
        FileNotFoundError: `data_dir` or the variable names a folder without ``mnist/`` in it.
    """
    given, who = _given(data_dir)
    if given is None:
        cache = _cache()
        if all(_find(cache, file) for file in FILES):
            return Place(cache, "the cache holds all four files")
        return Place(None, f"no data folder was given, {VARIABLE} is not set, {cache} lacks files")
    if os.path.isdir(given / "mnist"):
        return Place(given / "mnist", f"{who} names its parent folder")
    if not os.path.isdir(given):
        raise FileNotFoundError(
            f"{who} must name a folder that holds mnist/, but there is no folder {given}. "
            "Correct it, or leave it out to use the cache."
        )
    if any(_find(given, file) for file in FILES):
        cure = "It holds the files themselves: give its parent, and let it be called mnist."
    else:
        cure = "Correct it, leave it out to use the cache, or run `gammabeta data fetch`."
    raise FileNotFoundError(f"{who} must name a folder that holds mnist/; {given} has none. {cure}")


def locate(data_dir: str | Path | None = None) -> Path | None:
    """Return the folder of `place`: the one with the four files, or None."""
    return place(data_dir).folder


def verify(data_dir: str | Path | None = None) -> list[FileCheck]:
    """Read and check each of the four files where `load` would look; faults do not raise.

    Raises:
        FileNotFoundError: as `place` does.
    """
    folder = place(data_dir).folder or _cache()
    found = []
    for file in FILES:
        path = _find(folder, file) or folder / f"{file.name}.gz"
        try:
            _read(folder, file)
        except (ValueError, OSError) as error:
            found.append(FileCheck(path, False, str(error)))
        else:
            shape = " x ".join(map(str, file.shape))
            detail = f"{shape}, SHA-256 of the uncompressed contents {file.sha256}"
            found.append(FileCheck(path, True, detail))
    return found


def fetch(data_dir: str | Path | None = None, timeout: float | None = None) -> Path:
    """Download what is missing of MNIST; return the folder, which then holds all four files.

    The folder is ``data_dir/mnist``, else that of the variable, else the cache; it is made
    where it does not exist. Good files are kept, bad ones are replaced in the cache only: in a
    folder of the user's they may be something else. `timeout` is in seconds, for everything
    together (20 if None); files that came before it ran out stay.

    Raises:
        ValueError: a file in a folder of the user's does not hold what it should.
        ConnectionError: no mirror sent the right contents in time.
        OSError: the folder cannot be written, or a file cannot be read.
    """
    given, _ = _given(data_dir)
    folder = _cache() if given is None else given / "mnist"
    try:
        _fill(folder, _download.TIMEOUT if timeout is None else timeout, replace=given is None)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error} Try again (files that came are kept), or copy the four files "
            f"({', '.join(file.name + '.gz' for file in FILES)}) into {folder}."
        ) from error
    return folder


# -- where the files are ----------------------------------------------------------------------


def _given(data_dir: str | Path | None) -> tuple[Path | None, str]:
    """Return the folder that the user named, if any, and how it was named."""
    if data_dir is not None:
        return Path(data_dir).expanduser(), "the data folder"
    value = os.environ.get(VARIABLE, "")
    return (Path(value).expanduser(), VARIABLE) if value else (None, "")


def _cache() -> Path:
    return Path(need("pooch").os_cache("gammabeta")) / "mnist"


def _find(folder: Path, file: File) -> Path | None:
    """Return the packed or the unpacked file, whichever is there (a broken link is there)."""
    for path in (folder / f"{file.name}.gz", folder / file.name):
        if os.path.lexists(path):
            return path
    return None


# -- reading ----------------------------------------------------------------------------------


@functools.cache
def _mnist(folder: Path) -> Images:
    import torch

    train_x, train_y, test_x, test_y = (_read(folder, file) for file in FILES)
    digest = hashlib.sha256("".join(file.sha256 for file in FILES).encode()).hexdigest()
    long = torch.int64
    return Images("mnist", digest[:16], train_x, train_y.to(long), test_x, test_y.to(long))


@functools.cache
def _digits() -> Images:
    import torch

    bunch = need("sklearn.datasets").load_digits()
    x = torch.from_numpy(bunch.images).to(torch.uint8)
    y = torch.from_numpy(bunch.target).to(torch.int64)
    digest = hashlib.sha256(x.numpy().tobytes() + y.to(torch.uint8).numpy().tobytes()).hexdigest()
    return Images("digits", digest[:16], x, y, x[:0], y[:0], DIGITS_NOTICE)


def _read(folder: Path, file: File) -> Tensor:
    """Return the checked values of one file of the folder, uint8 in the file's shape."""
    path = _find(folder, file)
    if path is None:
        raise FileNotFoundError(
            f"{folder}: expected a file {file.name}.gz (or {file.name}), found neither. "
            "Run `gammabeta data fetch`, or copy it there."
        )
    return _checked(path, file)


def _checked(path: Path, file: File) -> Tensor:
    try:
        # One byte more than allowed tells "too long" from "right", however much would follow.
        data = _contents(path, file.size + 1)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: expected an IDX file, {error}. {_REPLACE}") from error
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(f"{path}: cannot be read ({reason}). Check the file's rights.") from error
    if len(data) > file.size:
        _header(data, len(file.shape), f"{path}")  # another kind of file is the better message
        raise ValueError(f"{path}: expected {file.size} bytes unpacked, got more. {_REPLACE}")
    values = parse_idx(data, len(file.shape), str(path))
    if values.shape != file.shape:
        raise ValueError(f"{path}: expected {file.shape}, got {tuple(values.shape)}. {_REPLACE}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise ValueError(
            f"{path}: expected contents (uncompressed) with SHA-256 {file.sha256}, got {digest}: "
            f"the file was altered. {_REPLACE}"
        )
    return values


def _contents(path: Path, most: int) -> bytearray:
    """Return at most `most` bytes of the file, unpacked if it is packed, whatever its name."""
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind):  # before opening: a named pipe would block for ever
        raise ValueError("found a directory" if stat.S_ISDIR(kind) else "found no regular file")
    data = bytearray()
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = gzip.GzipFile(fileobj=raw) if packed else raw
        while len(data) < most:
            # Blocks: a short file that claims a size must not cost the memory of a long one.
            block = stream.read(min(1 << 20, most - len(data)))
            if not block:
                break
            data += block
    return data


def _header(data: bytearray, axes: int, source: str) -> tuple[int, ...]:
    """Check the magic number and return the sizes that follow it."""
    magic = bytes((0, 0, 8, axes))  # 8: unsigned bytes
    length = 4 + 4 * axes
    if data[:4] != magic:
        came = f"0x{data[:4].hex()}" if data else "an empty file"
        hint = ""
        if len(data) >= 4 and data[:3] == magic[:3]:
            hint = f" (an IDX file of {data[3]} axes: images have 3, labels 1; is it misnamed?)"
        raise ValueError(
            f"{source}: expected the IDX magic number 0x{magic.hex()}, got {came}{hint}. {_REPLACE}"
        )
    if len(data) < length:
        raise ValueError(
            f"{source}: expected an IDX header of {length} bytes, got {len(data)}. {_REPLACE}"
        )
    return tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, length, 4))


def parse_idx(data: bytearray, axes: int, source: str) -> Tensor:
    """Return the values of an IDX file of unsigned bytes as a uint8 tensor that shares `data`.

    The file is ``00 00 08 axes``, then one big-endian 32-bit size for each axis, then the
    values, last axis fastest. The sizes are checked against the length of `data` before
    anything is made of them. `source` names the file in errors.

    Raises:
        ValueError: the magic number, the header or the length is not as expected.
    """
    import torch

    sizes = _header(data, axes, source)
    start, count = 4 + 4 * axes, math.prod(sizes)
    shape = " x ".join(map(str, sizes))
    if count == 0:
        raise ValueError(f"{source}: expected sizes above 0, got {shape}. {_REPLACE}")
    if start + count != len(data):
        raise ValueError(
            f"{source}: expected {start + count} bytes unpacked (a header of {start}, "
            f"{shape} values), got {len(data)}. {_REPLACE}"
        )
    return torch.frombuffer(data, dtype=torch.uint8, offset=start).view(sizes)


# -- filling a folder -------------------------------------------------------------------------


@functools.cache
def _fill_once(folder: Path) -> OSError | None:
    """Try to fill the cache, once in a process: 20 s are asked of nobody twice."""
    try:
        _fill(folder, _download.TIMEOUT, replace=True)
    except OSError as error:
        return error
    return None


def _fill(folder: Path, timeout: float, replace: bool) -> None:
    _download.download(folder, _wanted(folder, replace), timeout)


def _wanted(folder: Path, replace: bool) -> Iterator[_download.Wanted]:
    """The files that the folder lacks, and with `replace` those that are bad there."""
    for file in FILES:
        if _find(folder, file) is not None:
            try:
                _read(folder, file)
                continue
            except ValueError:
                if not replace:
                    raise
        most = file.size + (1 << 16)  # what does not shrink grows a little when it is packed
        check = functools.partial(_check_arrived, file=file)
        yield _download.Wanted(f"{file.name}.gz", most, check)


def _check_arrived(path: Path, file: File) -> None:
    """Raise ConnectionError if a mirror sent other contents: its fault, and not the user's."""
    try:
        _checked(path, file)
    except ValueError as error:
        reason = str(error).replace(str(path), "wrong contents").replace(_REPLACE, "")
        raise ConnectionError(reason.rstrip(" .")) from error
