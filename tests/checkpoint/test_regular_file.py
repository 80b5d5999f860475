"""A named pipe, a device or a directory in the place of weights is refused, and nothing waits for it."""

import os
from pathlib import Path

import pytest

from svdconvert.checkpoint.regular_file import open_regular
from svdconvert.checkpoint.safetensors_files import open_checkpoint, open_file
from svdconvert.errors import CheckpointError


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.pth", "x.st"])
def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=name):
        open_file(tmp_path / name)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / "weights")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match="weights is no regular file"):
        open_regular(tmp_path / "weights")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    descriptor = open_regular(tmp_path / "link")
    assert os.read(descriptor, 10) == b"abc"
    os.close(descriptor)
