"""From the Hub to the Hub: no shard stays on the disk, main changes once, and a killed run can continue."""

import os
import signal
from pathlib import Path

import pytest

from svdconvert.commands.decompose import decompose
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from tests import medium
from tests.loopback_hub.server import Hub
from tests.visitor import Visitor

SHARD = 2_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return medium.build(tmp_path_factory.mktemp("model") / "base", layers=6, hidden=256, wide=704)


@pytest.fixture(scope="module")
def local(model: Path) -> Path:
    """The same, written to the disk."""
    out = model.with_name("local")
    decompose(model, out, SplitOptions(rank=8, max_shard_size="2MB"), Run(threads=1))
    return out


def command(name: str) -> list[object]:
    return ["decompose", "org/base", "--rank", 8, "--max-shard-size", "2MB", "--stream", "--push", name]


def used(directory: Path) -> int:
    """Bytes of disk below a directory."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*") if not path.is_symlink())


def test_a_killed_run_continues_and_the_disk_never_holds_two_shards(
    hub: Hub, alice: Visitor, model: Path, local: Path
) -> None:
    hub.create("org/base", model)
    repository = hub.create("alice/out")
    directory = alice.home
    peaks: list[int] = []
    hub.fault("PUT", "/upload/", status=200, times=1000, then=lambda: peaks.append(used(directory)))
    process = alice.start(*command("alice/out"))
    kill = hub.fault(
        *("POST", "/commit/svdconvert-"),
        status=503,
        after=2,
        then=lambda: os.killpg(process.pid, signal.SIGKILL),
    )
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL and kill.times == 0
    assert repository.history() == ["initial commit"]
    work = next(ref for ref in repository.refs if ref != "main")
    assert len(repository.names(work)) == 2
    left = sorted(
        path.name for path in (directory / "out.partial").glob("model-*") if path.stat().st_blocks > 16
    )
    assert len(left) == 1

    uploads = len(hub.asked("PUT", "/upload/"))
    said = alice.succeeds(*command("alice/out"))
    assert "tensors are done" in said.err and "pushed out to alice/out" in said.out
    assert repository.history() == ["Upload out with svdconvert", "initial commit"]
    assert [*repository.refs] == ["main"]
    names = {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()}
    assert {*repository.names()} == names | {"README.md"}
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 5
    assert [name for name in shards if repository.read(name) != (local / name).read_bytes()] == []
    assert len(hub.asked("PUT", "/upload/")) - uploads <= len(shards) - 2

    adapter = (local / "pissa_init" / "adapter_model.safetensors").stat().st_size
    assert max(peaks) < 1.5 * SHARD + adapter + 500_000
    assert {path.name for path in directory.iterdir()} == {"hf"}
    assert [name for name in alice.cached() if name.endswith(".safetensors")] == []


def test_if_the_last_commit_fails_main_is_unchanged_and_only_the_commit_is_repeated(
    hub: Hub, alice: Visitor, model: Path, tmp_path: Path
) -> None:
    hub.create("org/base", model)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("theirs")
    repository = hub.create("alice/out")
    hub.fault("POST", "/commit/main", status=200, then=lambda: repository.fill(tmp_path / "theirs", "theirs"))
    alice.is_refused(*command("alice/out"), because=["someone else has changed alice/out meanwhile"])
    assert repository.history() == ["theirs", "initial commit"]
    hub.seen.clear()
    alice.succeeds(*command("alice/out"))
    assert repository.history() == ["Upload out with svdconvert", "theirs", "initial commit"]
    assert hub.asked("PUT", "/upload/") == []  # not even the adapter: it had arrived before the commit
    assert repository.read("notes.txt") == b"theirs"


def test_an_adapter_and_a_base_of_the_hub_are_merged_into_a_third_repository(
    hub: Hub, alice: Visitor, model: Path, local: Path
) -> None:
    hub.create("org/base", model)
    hub.create("alice/pissa", local)
    merge = ["merge", "alice/pissa", "--max-shard-size", "2MB", "--base", "org/base", "--stream"]
    alice.succeeds(*merge, "--push", "alice/merged")
    merged = hub.repositories["alice/merged"]
    whole = b"".join((model / name).read_bytes() for name in sorted(os.listdir(model)) if "safe" in name)
    assert sum(merged.file("main", name).size for name in merged.names() if "model-" in name) > 0.99 * len(
        whole
    )
    assert merged.history() == ["Upload merged with svdconvert", "initial commit"]
    assert [name for name in alice.cached() if name.startswith("model-")] == []
    assert alice.succeeds("verify", "alice/merged").out.startswith("alice/merged agrees with its manifest")
