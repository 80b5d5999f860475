"""Writing past the page cache, and without that where the system cannot do it."""

import errno
import os
import sys
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path

import pytest

from svdconvert.checkpoint import uncached
from svdconvert.checkpoint.uncached import PAGE, Uncached

PAGES = 40 * PAGE


def write(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        output = Uncached()
        assert output.write(descriptor, memoryview(b"there"), 3) == 5
        assert output.write(descriptor, memoryview(b"here"), 8) == 4
    finally:
        os.close(descriptor)
    return path.read_bytes()


@pytest.fixture
def written(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def on_pages() -> memoryview:
    pages = mmap(-1, PAGES + PAGE)
    pages[:] = os.urandom(PAGES + PAGE)
    return memoryview(pages)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every write: whether it went directly."""
    real, seen = os.pwrite, []

    def pwrite(descriptor: int, chunk: memoryview, offset: int) -> int:
        seen.append(bool(uncached.fcntl.fcntl(descriptor, uncached.fcntl.F_GETFL) & os.O_DIRECT))
        return real(descriptor, chunk, offset)

    monkeypatch.setattr(uncached.os, "pwrite", pwrite)
    monkeypatch.setattr(uncached, "_dropping", lambda *_: 0)
    return seen


def test_what_is_written_lies_at_its_place(tmp_path: Path) -> None:
    assert write(tmp_path / "file") == b"\0\0\0therehere"


linux = pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT is Linux's")


@linux
@pytest.mark.parametrize(
    ("begin", "length", "offset", "direct"),
    [
        pytest.param(0, PAGES, 3 * PAGE, True, id="whole pages"),
        pytest.param(0, PAGES, 512, False, id="beside a page of the file"),
        pytest.param(64, PAGES, 0, False, id="beside a page of memory"),
        pytest.param(0, PAGE, 0, False, id="little"),
    ],
)
def test_whole_pages_go_directly(  # noqa: PLR0913
    written: int, on_pages: memoryview, modes: list[bool], begin: int, length: int, offset: int, direct: bool
) -> None:
    chunk = on_pages[begin : begin + length]
    assert Uncached().write(written, chunk, offset) == length
    assert modes == [direct]
    assert os.pread(written, offset + length, 0) == bytes(offset) + chunk


@linux
def test_the_rest_behind_whole_pages_is_left_for_another_call(
    written: int, on_pages: memoryview, modes: list[bool]
) -> None:
    output, chunk = Uncached(), on_pages[: PAGES + 5]
    assert output.write(written, chunk, 0) == PAGES
    assert output.write(written, chunk[PAGES:], PAGES) == 5
    assert modes == [True, False]
    assert os.pread(written, PAGES + 5, 0) == bytes(chunk)


@linux
def test_a_file_system_without_direct_writing_is_asked_once(
    written: int, on_pages: memoryview, modes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = uncached.fcntl.fcntl, []

    def refuse(descriptor: int, command: int, flags: int = 0) -> int:
        if flags & os.O_DIRECT:
            asked.append(descriptor)
            raise OSError(errno.EINVAL, "no")
        return real(descriptor, command, flags)

    monkeypatch.setattr(uncached.fcntl, "fcntl", refuse)
    output = Uncached()
    assert [output.write(written, on_pages[:PAGES], 0) for _ in range(2)] == [PAGES, PAGES]
    assert (asked, modes) == ([written], [False, False])


@pytest.mark.parametrize(
    "answer",
    [
        *(OSError(number, "no") for number in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM)),
        NotImplementedError(),
    ],
    ids=repr,
)
def test_a_system_that_cannot_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Exception
) -> None:
    asked: list[Exception] = []

    def pwritev(*arguments: object) -> int:
        asked.append(answer)
        raise answer

    monkeypatch.setattr(uncached.os, "pwritev", pwritev, raising=False)
    monkeypatch.setattr(uncached.sys, "platform", "linux")
    assert write(tmp_path / "file") == b"\0\0\0therehere"
    assert asked == [answer]


def test_other_systems_are_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(uncached.os, "pwritev", raising=False)
    monkeypatch.setattr(uncached.sys, "platform", "darwin")
    assert write(tmp_path / "file") == b"\0\0\0therehere"


def test_what_are_no_pages_goes_through_pages_that_are_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[int] = []

    def pwritev(descriptor: int, chunks: list[bytes], offset: int, flag: int) -> int:
        flags.append(flag)
        return os.pwrite(descriptor, chunks[0], offset)

    monkeypatch.setattr(uncached.os, "pwritev", pwritev, raising=False)
    monkeypatch.setattr(uncached.sys, "platform", "linux")
    assert write(tmp_path / "file") == b"\0\0\0therehere"
    assert flags == [0x80, 0x80]


def test_an_error_of_the_disk_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwritev(*arguments: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(uncached.os, "pwritev", pwritev, raising=False)
    monkeypatch.setattr(uncached.sys, "platform", "linux")
    with pytest.raises(OSError, match="broken"):
        write(tmp_path / "file")


def test_a_full_disk_is_an_error() -> None:
    descriptor = os.open("/dev/full", os.O_RDWR)
    try:
        with pytest.raises(OSError, match="No space left"):
            Uncached().write(descriptor, memoryview(b"x" * 10), 0)
    finally:
        os.close(descriptor)
