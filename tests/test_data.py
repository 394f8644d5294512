"""The images of the studies: where they are looked for, and what is refused.

The parser and the checks are tried on small IDX files made here, with the table of files set to
them; downloads on servers of 127.0.0.1; the contents on MNIST itself, where it is at hand.
"""

import ctypes
import gzip
import hashlib
import http.server
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gammabeta.studies import _data, _download

real_mnist = pytest.mark.skipif(
    not os.environ.get("GAMMABETA_DATA"),
    reason="GAMMABETA_DATA is not set: it must name a folder that holds mnist/",
)
STEM = [file.name for file in _data.FILES]


def idx(*sizes, kind=8, values=None):
    """The bytes of an IDX file; its values count up unless they are given."""
    count = int(torch.tensor(sizes).prod())
    body = bytes(i * 7 % 251 for i in range(count)) if values is None else values
    return struct.pack(f">HBB{len(sizes)}I", 0, kind, len(sizes), *sizes) + body


SMALL = [idx(12, 5, 4), idx(12), idx(6, 5, 4), idx(6)]


def table(contents):
    """The table of files that describes these contents."""
    return tuple(
        _data.File(
            name,
            struct.unpack_from(f">{data[3]}I", data, 4),
            hashlib.sha256(data).hexdigest(),
        )
        for name, data in zip(STEM, contents, strict=True)
    )


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(_data, "FILES", table(SMALL))


@pytest.fixture(autouse=True)
def _elsewhere(request, monkeypatch, tmp_path):
    """No test reads or fills the cache of whoever runs it, or asks a proxy for 127.0.0.1."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    if not any(mark.kwargs.get("reason") for mark in request.node.iter_markers("skipif")):
        monkeypatch.delenv("GAMMABETA_DATA", raising=False)
        monkeypatch.setattr(_download, "MIRRORS", ())  # a test that downloads sets its own


def lay(parent, contents=None, packed=True):
    """Make parent/mnist with the four files; return parent."""
    folder = parent / "mnist"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in zip(STEM, contents or SMALL, strict=True):
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(data) if packed else data)
    return parent


def cache(tmp_path):
    return tmp_path / "xdg" / "gammabeta" / "mnist"


# -- the real files ---------------------------------------------------------------------------


@real_mnist
def test_mnist_is_what_the_literature_describes():
    images = _data.load("mnist")
    assert (images.name, images.notice, images.pixel_max) == ("mnist", "", 255)
    assert images.train_x.shape == (60000, 28, 28)
    assert images.test_x.shape == (10000, 28, 28)
    assert images.train_x.dtype == images.test_x.dtype == torch.uint8
    assert images.train_y.dtype == images.test_y.dtype == torch.int64
    assert images.train_y[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert images.test_y[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert images.train_y.bincount().tolist() == counts
    # The mean and deviation that are usually quoted for the training images.
    pixels = images.train_x.double() / images.pixel_max
    assert pixels.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert pixels.std().item() == pytest.approx(0.3081, abs=5e-5)
    assert _data.load("auto") is images


@real_mnist
def test_mnist_loads_in_a_second():
    _data.parse_idx(bytearray(idx(1)), 1, "warm-up")  # imports are not the question
    start = time.process_time()
    _data._mnist.__wrapped__(_data.locate())
    assert time.process_time() - start < 1.0


@real_mnist
def test_real_files_pass_the_check_and_an_altered_one_does_not(tmp_path):
    assert [check.ok for check in _data.verify()] == [True] * 4
    parent = tmp_path / "copy"
    shutil.copytree(_data.locate(), parent / "mnist")
    file = _data.FILES[2]
    (packed,) = (parent / "mnist").glob(f"{file.name}*")
    data = bytearray(_data._contents(packed, file.size))
    data[4321] ^= 1
    packed.unlink()
    (parent / "mnist" / file.name).write_bytes(data)
    assert [check.ok for check in _data.verify(parent)] == [True, True, False, True]
    with pytest.raises(ValueError, match=r"expected contents .* SHA-256 0fa7898d.* was altered"):
        _data.load("mnist", parent)


# -- the digits -------------------------------------------------------------------------------


def test_digits_are_the_bundled_ones_unscaled():
    images = _data.load("digits")
    assert (images.name, images.pixel_max) == ("digits", 16)
    assert images.train_x.shape == (1797, 8, 8)
    assert images.train_x.dtype == torch.uint8
    assert (images.train_x.min(), images.train_x.max()) == (0, 16)
    assert images.train_y.dtype == torch.int64
    assert images.train_y.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images.test_x.shape == (0, 8, 8)
    assert images.test_y.shape == (0,)
    assert images.notice == _data.DIGITS_NOTICE
    assert len(images.digest) == 16
    assert _data.load("digits") is images


# -- which folder -----------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_files_are_read_packed_and_unpacked(small, tmp_path, packed):
    images = _data.load("mnist", lay(tmp_path / "d", packed=packed))
    assert images.train_x.flatten().tolist() == list(SMALL[0][16:])
    assert images.test_y.tolist() == list(SMALL[3][8:])
    assert images.test_x.shape == (6, 5, 4)


def test_order_is_argument_variable_cache(small, tmp_path, monkeypatch):
    argument, variable = lay(tmp_path / "a"), lay(tmp_path / "v")
    assert _data.locate() is None
    lay(cache(tmp_path).parent)
    assert _data.locate() == cache(tmp_path)
    monkeypatch.setenv("GAMMABETA_DATA", str(variable))  # read when called, not at import
    assert _data.locate() == variable / "mnist"
    assert "GAMMABETA_DATA" in _data.place().why
    assert _data.locate(argument) == argument / "mnist"
    assert _data.load("auto", argument).name == "mnist"


def test_a_folder_is_read_once_in_a_process(small, tmp_path):
    parent = lay(tmp_path / "d")
    images = _data.load("auto", parent)
    shutil.rmtree(parent / "mnist")
    (parent / "mnist").mkdir()
    assert _data.load("mnist", parent) is images


@pytest.mark.parametrize("name", ["auto", "mnist"])
@pytest.mark.parametrize("by", ["argument", "variable"])
@pytest.mark.parametrize("fault", ["absent", "empty", "inner", "file"])
def test_a_wrong_folder_is_an_error_never_a_fallback(small, tmp_path, monkeypatch, name, by, fault):
    lay(cache(tmp_path).parent)  # would do, but the user named another
    folder = tmp_path / "named"
    if fault == "empty":
        folder.mkdir()
    elif fault == "inner":
        folder = lay(folder) / "mnist"
    elif fault == "file":
        folder.write_text("")
    if by == "variable":
        monkeypatch.setenv("GAMMABETA_DATA", str(folder))
    with pytest.raises(FileNotFoundError) as caught:
        _data.load(name, folder if by == "argument" else None)
    message = str(caught.value)
    assert str(folder) in message
    assert ("GAMMABETA_DATA" in message) == (by == "variable")
    assert ("give its parent" in message) == (fault == "inner")


def test_a_missing_file_is_named(small, tmp_path):
    parent = lay(tmp_path / "d")
    (parent / "mnist" / f"{STEM[1]}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{STEM[1]}\.gz .*found neither"):
        _data.load("auto", parent)
    assert [check.ok for check in _data.verify(parent)] == [True, False, True, True]


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="one of auto, mnist, digits, got 'cifar'"):
        _data.load("cifar")


# -- faulty files -----------------------------------------------------------------------------

GZ, IDX = gzip.compress(SMALL[0]), SMALL[0]
FAULTS = {
    "truncated gzip": (".gz", GZ[:-20], "expected an IDX file, Compressed file ended"),
    "gzip without its checksum": (".gz", GZ[:-8], "expected an IDX file, Compressed file ended"),
    "flipped bit in gzip": (".gz", GZ[:-6] + bytes([GZ[-6] ^ 1]) + GZ[-5:], "CRC check failed"),
    "garbage after gzip": (".gz", GZ + b"garbage", "Not a gzipped file"),
    "truncated": ("", IDX[:-1], r"expected 256 bytes .* 12 x 5 x 4 values.* got 255"),
    "too long": ("", IDX + b"\0", "expected 256 bytes unpacked, got more"),
    "too long, packed": (".gz", gzip.compress(IDX + b"\0"), "expected 256 bytes unpacked, got mo"),
    "altered": ("", IDX[:99] + b"\xff" + IDX[100:], "expected contents .* was altered"),
    "altered, packed": (".gz", gzip.compress(IDX[:99] + b"\xff" + IDX[100:]), "was altered"),
    "labels by the images' name": (".gz", gzip.compress(SMALL[1]), "is it misnamed"),
    "other images": (".gz", gzip.compress(SMALL[2]), r"expected \(12, 5, 4\), got \(6, 5, 4\)"),
    "signed bytes": ("", idx(12, 5, 4, kind=9), "expected the IDX magic .* got 0x00000903"),
    "a web page": (".gz", b"<!DOCTYPE html>" * 99, "expected the IDX magic number .* 0x3c21444f"),
    "empty": (".gz", b"", "got an empty file"),
    "empty gzip": (".gz", gzip.compress(b""), "got an empty file"),
    "header only": ("", IDX[:9], "expected an IDX header of 16 bytes, got 9"),
    "huge sizes": ("", idx(12)[:3] + b"\x03" + b"\xff" * 12 + IDX[16:], "expected 7922816245"),
    "small sizes": ("", idx(6, 5, 4)[:16] + IDX[16:], "expected 136 bytes .* got 256"),
    "a size of 0": (
        "",
        struct.pack(">4I", 0x803, 0, 2**32 - 1, 2**32 - 1),
        "expected sizes above 0, got 0 x",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files_are_refused_by_name(small, tmp_path, fault):
    ending, data, message = FAULTS[fault]
    parent = lay(tmp_path / "d", packed=bool(ending))
    path = parent / "mnist" / (STEM[0] + ending)
    path.write_bytes(data)
    for name in ("auto", "mnist"):
        with pytest.raises(ValueError, match=message) as caught:
            _data.load(name, parent)
        assert str(path) in str(caught.value)
        assert "gammabeta data fetch" in str(caught.value)
    first, *others = _data.verify(parent)
    assert (first.file, first.ok, first.detail) == (path, False, str(caught.value))
    assert all(check.ok for check in others)


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_what_is_no_file_is_refused_and_never_waited_for(small, tmp_path, kind):
    parent = lay(tmp_path / "d")
    path = parent / "mnist" / f"{STEM[3]}.gz"
    path.unlink()
    path.mkdir() if kind == "directory" else os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{path}: .* found (a directory|no regular file)"):
        _data.load("mnist", parent)


@pytest.mark.parametrize("target", ["itself", "nothing"])
def test_a_broken_link_is_an_os_error(small, tmp_path, target):
    parent = lay(tmp_path / "d")
    path = parent / "mnist" / f"{STEM[0]}.gz"
    path.unlink()
    path.symlink_to(path if target == "itself" else tmp_path / "nothing")
    with pytest.raises(OSError, match=f"{path}: cannot be read"):
        _data.load("auto", parent)


def test_a_file_without_the_right_to_read_it_is_an_os_error(small):
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as parent:  # pytest's own folders are closed to others
        os.chmod(parent, 0o755)
        path = lay(Path(parent)) / "mnist" / f"{STEM[0]}.gz"
        path.chmod(0)
        if user == 0:
            os.seteuid(65534)  # root reads every file
        try:
            with pytest.raises(PermissionError, match=f"{path}: cannot be read"):
                _data.load("auto", parent)
        finally:
            os.seteuid(user)


def test_several_gzip_members_are_one_file(small, tmp_path):
    parent = lay(tmp_path / "d")
    (parent / "mnist" / f"{STEM[0]}.gz").write_bytes(
        gzip.compress(IDX[:100]) + gzip.compress(IDX[100:])
    )
    assert all(check.ok for check in _data.verify(parent))


def test_a_gzip_bomb_is_left_after_the_expected_length(small, tmp_path):
    parent = lay(tmp_path / "d")
    bomb = gzip.compress(IDX + bytes(1 << 26), compresslevel=1)
    (parent / "mnist" / f"{STEM[0]}.gz").write_bytes(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="expected 256 bytes unpacked, got more"):
            _data.load("mnist", parent)
        assert tracemalloc.get_traced_memory()[1] < 1 << 21
    finally:
        tracemalloc.stop()


sizes = st.lists(st.integers(0, 6) | st.integers(0, 2**32 - 1), min_size=3, max_size=3)
headers = sizes.map(lambda s: struct.pack(">4I", 0x803, *s))


@settings(deadline=None)
@given(st.binary(max_size=64) | st.tuples(headers, st.binary(max_size=64)).map(b"".join))
def test_any_bytes_are_parsed_in_place_or_refused(data):
    data = bytearray(data)
    try:
        values = _data.parse_idx(data, 3, "some file")
    except ValueError as error:
        assert "some file: expected" in str(error)  # noqa: PT017 (both outcomes are right)
        return
    # What is accepted is the rest of the file, where it lies: nothing was allocated for it.
    assert values.flatten().tolist() == list(data[16:])
    assert values.data_ptr() == ctypes.addressof(ctypes.c_char.from_buffer(data)) + 16


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_every_good_file_is_parsed(shape, data):
    count = int(torch.tensor(shape).prod())
    values = data.draw(st.binary(min_size=count, max_size=count))
    parsed = _data.parse_idx(bytearray(idx(*shape, values=values)), len(shape), "f")
    assert parsed.shape == tuple(shape)
    assert parsed.flatten().tolist() == list(values)


@settings(deadline=None, max_examples=300)
@given(
    st.binary(max_size=80)
    | st.binary(max_size=80).map(lambda b: b"\x1f\x8b\x08" + b)
    | st.tuples(st.integers(0, len(GZ) - 1), st.integers(1, 255)).map(
        lambda t: GZ[: t[0]] + bytes([GZ[t[0]] ^ t[1]]) + GZ[t[0] + 1 :]
    )
    | st.integers(0, len(GZ) - 1).map(lambda n: GZ[:n])
)
def test_any_file_is_right_or_a_value_error(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.gz"
        path.write_bytes(content)
        try:
            values = _data._checked(path, table(SMALL)[0])
        except ValueError as error:
            assert f"{path}: expected" in str(error)  # noqa: PT017 (both outcomes are right)
        else:  # a bit of the gzip header that means nothing, such as its time stamp
            assert values.flatten().tolist() == list(IDX[16:])


# -- downloads --------------------------------------------------------------------------------


@pytest.fixture
def serve():
    """A function that starts a mirror on 127.0.0.1: `answer(handler, name)` writes the reply."""
    servers, over = [], threading.Event()

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path.strip("/"))
                try:
                    answer(self, asked[-1])
                except OSError:
                    self.close_connection = True  # the client has left: what is wanted here

            def log_message(self, *_):
                pass

            def reply(self, body, length=None, status=200):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

        asked = []
        Handler.over = over
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/", asked

    yield start
    over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


PACKED = {f"{name}.gz": gzip.compress(data) for name, data in zip(STEM, SMALL, strict=True)}


def good(handler, name):
    handler.reply(PACKED[name])


def hang(handler, name):
    handler.over.wait(30)


def drip(handler, name):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while not handler.over.wait(0.02):
        handler.wfile.write(b"x")


def stream(handler, name):
    handler.send_response(200)
    handler.end_headers()
    while not handler.over.wait(0.05):
        handler.wfile.write(bytes(1 << 15))


def refused():
    """The address of a port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


BAD = {
    "absent": (lambda h, name: h.reply(b"", status=404), "HTTP status 404"),
    "broken off": (lambda h, name: h.reply(PACKED[name][:-9], len(PACKED[name])), "broke off"),
    "cut short": (lambda h, name: h.reply(PACKED[name][:-9]), "wrong contents: expected an IDX"),
    "a web page": (lambda h, name: h.reply(b"<!DOCTYPE html>"), "wrong contents: .* 0x3c21444f"),
    "altered": (lambda h, name: h.reply(gzip.compress(IDX[:-1] + b"\0")), "was altered"),
    "endless": (stream, "more than"),
    "silent": (hang, "nothing came for 1 s"),
    "dripping": (drip, "nothing came for 1 s"),
}
PATIENCE = {"silent": 3, "dripping": 3}  # seconds; a mirror may be silent for a third of them


def test_fetch_fills_the_cache_and_load_then_needs_no_network(small, tmp_path, serve, monkeypatch):
    mirror, asked = serve(good)
    monkeypatch.setattr(_download, "MIRRORS", (mirror,))
    assert _data.fetch() == cache(tmp_path) == _data.locate()
    assert asked == list(PACKED)
    assert sorted(p.name for p in cache(tmp_path).iterdir()) == sorted(PACKED)
    assert _data.fetch() == cache(tmp_path)  # nothing left to do
    assert asked == list(PACKED)
    monkeypatch.setattr(_download, "MIRRORS", ())
    assert _data.load("mnist").train_y.tolist() == list(SMALL[1][8:])


def test_load_downloads_by_itself(small, serve, monkeypatch):
    mirror, asked = serve(good)
    monkeypatch.setattr(_download, "MIRRORS", (mirror,))
    images = _data.load("auto")
    assert (images.name, images.notice) == ("mnist", "")
    assert len(asked) == 4


def test_fetch_into_a_folder_of_the_users_keeps_what_is_there(small, tmp_path, serve, monkeypatch):
    mirror, asked = serve(good)
    monkeypatch.setattr(_download, "MIRRORS", (mirror,))
    parent = lay(tmp_path / "new", packed=False)
    path = parent / "mnist" / STEM[2]
    path.unlink()
    assert _data.fetch(parent) == parent / "mnist"
    assert asked == [f"{STEM[2]}.gz"]
    assert _data.fetch(tmp_path / "not" / "yet") == tmp_path / "not" / "yet" / "mnist"
    path = parent / "mnist" / STEM[0]
    path.write_bytes(b"something dear to the user")
    monkeypatch.setenv("GAMMABETA_DATA", str(parent))
    with pytest.raises(ValueError, match="expected the IDX magic"):
        _data.fetch()
    assert path.read_bytes() == b"something dear to the user"


def test_fetch_mends_the_cache(small, tmp_path, serve, monkeypatch):
    lay(cache(tmp_path).parent)
    (cache(tmp_path) / f"{STEM[0]}.gz").write_bytes(GZ[:-1])
    left = cache(tmp_path) / ".tmp-by-a-killed-process"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    with pytest.raises(ValueError, match=STEM[0]):
        _data.load("auto")
    mirror, asked = serve(good)
    monkeypatch.setattr(_download, "MIRRORS", (mirror,))
    _data.fetch()
    assert asked == [f"{STEM[0]}.gz"]
    assert not left.exists()
    assert _data.load("auto").name == "mnist"


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_mirror_gives_way_to_the_next(small, tmp_path, serve, monkeypatch, fault):
    bad, asked_bad = serve(BAD[fault][0])
    mirror, asked = serve(good)
    monkeypatch.setattr(_download, "MIRRORS", (bad, mirror))
    folder = _data.fetch(timeout=PATIENCE.get(fault))
    assert [len(asked_bad), len(asked)] == [1, 4]  # it is not asked again
    assert sorted(p.name for p in folder.iterdir()) == sorted(PACKED)
    assert all(check.ok for check in _data.verify())


@pytest.mark.parametrize("fault", BAD)
def test_a_failed_download_leaves_nothing(small, tmp_path, serve, monkeypatch, fault):
    bad, _ = serve(BAD[fault][0])
    monkeypatch.setattr(_download, "MIRRORS", (bad,))
    with pytest.raises(ConnectionError, match=BAD[fault][1]) as caught:
        _data.fetch(timeout=PATIENCE.get(fault))
    assert "Try again" in str(caught.value)
    assert str(cache(tmp_path)) in str(caught.value)
    assert list(cache(tmp_path).iterdir()) == []


def test_files_that_came_are_kept(small, tmp_path, serve, monkeypatch):
    first = f"{STEM[0]}.gz"
    half, _ = serve(lambda h, name: good(h, name) if name == first else h.reply(b"", status=500))
    monkeypatch.setattr(_download, "MIRRORS", (half,))
    with pytest.raises(ConnectionError, match="HTTP status 500"):
        _data.fetch()
    assert [path.name for path in cache(tmp_path).iterdir()] == [first]
    assert _data.locate() is None
    mirror, asked = serve(good)
    monkeypatch.setattr(_download, "MIRRORS", (mirror,))
    _data.fetch()
    assert asked == list(PACKED)[1:]


def test_the_time_limit_is_one_for_all_mirrors_and_files(tmp_path, serve, monkeypatch):
    # The first file takes half of the time, the second would never end; neither ever stalls.
    first = idx(30 << 14, values=random.Random(0).randbytes(30 << 14))
    hashed = hashlib.sha256(first).hexdigest()
    files = (_data.File("first", (30 << 14,), hashed), _data.File("second", (1 << 26,), hashed))

    def slow(handler, name):
        if name == "second.gz":
            stream(handler, name)
        handler.send_response(200)
        handler.end_headers()
        packed = gzip.compress(first)
        for i in range(0, len(packed), 1 << 14):
            handler.over.wait(0.05)
            handler.wfile.write(packed[i : i + (1 << 14)])

    monkeypatch.setattr(_data, "FILES", files)
    monkeypatch.setattr(_download, "MIRRORS", (serve(slow)[0], serve(slow)[0]))
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"gave up after 3 s in all.*no time left"):
        _data.fetch(timeout=3)
    assert 2.9 < time.monotonic() - start < 4.2
    assert [path.name for path in cache(tmp_path).iterdir()] == ["first.gz"]


def test_the_default_limit_is_twenty_seconds():
    assert _download.TIMEOUT == 20


def test_without_network_auto_says_that_it_took_the_digits(small, serve, monkeypatch):
    silent, asked = serve(hang)
    monkeypatch.setattr(_download, "MIRRORS", (refused(), silent))
    monkeypatch.setattr(_download, "TIMEOUT", 3)
    images = _data.load("auto")
    assert images.name == "digits"
    assert "could not be downloaded" in images.notice
    assert "no connection" in images.notice
    assert "nothing came for 1 s" in images.notice
    assert images.notice.endswith(_data.DIGITS_NOTICE)
    assert _data.load("auto").notice == images.notice
    with pytest.raises(ConnectionError, match=r"gammabeta data fetch.*GAMMABETA_DATA"):
        _data.load("mnist")
    assert len(asked) == 1  # nobody waits for the same silence twice


def child(code, tmp_path, **options):
    """Start a Python process with this test's cache and the code after the import."""
    code = f"from gammabeta.studies import _data, _download\n{code}"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, serve):
    mirror, asked = serve(lambda h, name: h.reply(bytes(1 << 18)))
    code = f"""
import resource
_download.MIRRORS = ({mirror!r}, {mirror!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    _data.fetch()
except OSError as error:
    print(error)
print(_data.load("auto").notice)
"""
    out, error = child(code, tmp_path).communicate(timeout=60)
    assert error == ""
    assert f"{cache(tmp_path)}: cannot be written (File too large). Make room" in out
    assert f"\nNo MNIST could be stored. {_data.DIGITS_NOTICE}\n" in out
    assert len(asked) == 2  # another mirror does not make room
    assert list(cache(tmp_path).iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(small, tmp_path, serve, monkeypatch):
    monkeypatch.setattr(_download, "MIRRORS", (serve(good)[0],))
    (tmp_path / "xdg").write_text("a file where the cache should be")
    with pytest.raises(OSError, match=f"{cache(tmp_path)}: cannot be written"):
        _data.fetch()
    assert _data.load("auto").name == "digits"
    with pytest.raises(OSError, match="cannot be written"):
        _data.load("mnist")


def test_an_interrupted_download_leaves_nothing(tmp_path, serve):
    mirror, asked = serve(drip)
    process = child(f"_download.MIRRORS = ({mirror!r},)\n_data.fetch()", tmp_path)
    while not asked or not list(cache(tmp_path).iterdir()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in error
    assert list(cache(tmp_path).iterdir()) == []


# -- packages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "package", "call"),
    [
        ("pooch", "pooch", _data.locate),
        ("sklearn", "scikit-learn", lambda: _data.load("digits")),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, module, package, call):
    _data._digits.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    if module == "sklearn":
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=rf'{package}.*pip install "gammabeta\[study\]"$'):
        call()


def test_a_named_folder_needs_no_package(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert _data.load("auto", lay(tmp_path / "d")).name == "mnist"


def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path):
    code = "import sys; print({'pooch', 'sklearn', 'requests', 'scipy'} & set(sys.modules))"
    out, error = child(code, tmp_path).communicate(timeout=60)
    assert (out, error) == ("set()\n", "")
