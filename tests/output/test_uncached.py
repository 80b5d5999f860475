"""Writing past the page cache, and through it if the system has no other way."""

import errno
import os
from pathlib import Path

import pytest

from svdconvert.output import uncached
from svdconvert.output.uncached import UncachedWriter


def write(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        output = UncachedWriter()
        assert output.write(descriptor, memoryview(b"there"), 3) == 5
        assert output.write(descriptor, memoryview(b"here"), 8) == 4
    finally:
        os.close(descriptor)
    return path.read_bytes()


def test_bytes_are_written_at_their_offset(tmp_path: Path) -> None:
    assert write(tmp_path / "file") == b"\0\0\0therehere"


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


def test_the_kernel_is_asked_to_drop_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
            UncachedWriter().write(descriptor, memoryview(b"x" * 10), 0)
    finally:
        os.close(descriptor)
