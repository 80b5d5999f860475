"""Files are fetched before they are asked for, and that never stands in the way."""

import os
import threading
from pathlib import Path

import pytest

from svdconvert.checkpoint import ahead
from svdconvert.checkpoint.ahead import fetched_meanwhile


def wait() -> None:
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join(10)
            assert not thread.is_alive()


def test_the_weights_are_read_in_order_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "model-2.safetensors": (3 << 20) + 7,
        "model-1.safetensors": 5,
        "consolidated.safetensors": 9,
        "config.json": 11,
    }
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    read: list[int] = []
    preadv = os.preadv

    def count(*arguments: object) -> int:
        read.append(preadv(*arguments))  # type: ignore[arg-type]
        return read[-1]

    monkeypatch.setattr(ahead.os, "preadv", count)
    with fetched_meanwhile(tmp_path):
        wait()
    assert read == [5, 0, sizes["model-2.safetensors"], 0]
    read.clear()
    with fetched_meanwhile(tmp_path / "model-1.safetensors"):
        wait()
    assert read == [5, 0]


def test_it_stops_when_the_others_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(b"endless")
    going = threading.Event()

    def endless(*_: object) -> int:
        going.set()
        return 1

    monkeypatch.setattr(ahead.os, "preadv", endless)
    with fetched_meanwhile(tmp_path):
        assert going.wait(10)
    wait()


def test_what_is_not_there_is_left_to_others(tmp_path: Path) -> None:
    (tmp_path / "model-dangling.safetensors").symlink_to(tmp_path / "gone")
    for place in (tmp_path, tmp_path / "gone", Path("org/name")):
        with fetched_meanwhile(place):
            wait()
