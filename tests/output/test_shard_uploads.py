"""Shards are uploaded as they are finished, and none is lost on the way."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from svdconvert.commands.decompose import decompose
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.errors import HubError, OutputError
from svdconvert.output.ownership import staging_directory
from svdconvert.output.plan import FileRole, PlannedFile
from svdconvert.output.shard_uploads import ShardUploads
from tests import tiny
from tests.conftest import Build
from tests.program import content

OPTIONS = SplitOptions(rank=4, max_shard_size="10KB")


class DirectorySink:
    """A ShardSink that copies into a local directory, and fails on request."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.identities: list[Mapping[str, Any]] = []
        self.sent: list[str] = []
        self.fails_at: int | None = None
        self.most_at_once = 0

    def begin(self, identity: Mapping[str, Any]) -> None:
        self.identities.append(identity)
        self.target.mkdir(exist_ok=True)

    def send(self, path: Path, file: str) -> Mapping[str, Any]:
        here = [other for other in path.parent.glob("model-*") if other.stat().st_blocks > 16]
        self.most_at_once = max(self.most_at_once, len(here))
        if self.fails_at == len(self.sent):
            raise HubError("the sink broke down")
        self.sent.append(file)
        shutil.copyfile(path, self.target / file)
        return {"size": path.stat().st_size}

    def holds(self, file: str, record: Mapping[str, Any]) -> bool:
        copy = self.target / file
        return copy.exists() and copy.stat().st_size == record["size"]

    def finish(self, directory: Path) -> None:
        shutil.copytree(directory, self.target, dirs_exist_ok=True)
        for path in [self.target / "sent.jsonl", *self.target.glob("journal*")]:
            path.unlink()


@pytest.fixture
def model(checkpoint: Build) -> Path:
    return checkpoint("llama", shard=tiny.SHARDED)


@pytest.fixture
def whole(model: Path, decomposed: Build) -> dict[str, bytes]:
    """The content that must arrive."""
    return content(decomposed(model, rank=4, max_shard_size="10KB"))


def run(model: Path, out: Path, sink: DirectorySink) -> None:
    decompose(model, out, OPTIONS, Run(device="cpu", threads=1, shard_sink=sink))


def test_everything_that_was_written_arrives_and_nothing_stays(
    model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    sink = DirectorySink(tmp_path / "there")
    run(model, tmp_path / "out", sink)
    shards = [name for name in whole if name.startswith("model-")]
    assert sink.sent == shards and len(shards) > 3
    assert content(tmp_path / "there").keys() == whole.keys()
    assert {name: content(tmp_path / "there")[name] for name in shards} == {n: whole[n] for n in shards}
    assert not (tmp_path / "out").exists() and not staging_directory(tmp_path / "out").exists()


def test_a_run_that_broke_sends_the_rest_and_nothing_twice(
    model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    sink = DirectorySink(tmp_path / "there")
    sink.fails_at = 2
    with pytest.raises(HubError, match="broke down"):
        run(model, tmp_path / "out", sink)
    assert len(sink.sent) == 2
    assert [path.name for path in staging_directory(tmp_path / "out").glob("model-0000[12]*")] == []
    sink.fails_at = None
    run(model, tmp_path / "out", sink)
    assert sink.sent == [name for name in whole if name.startswith("model-")]
    assert sink.identities[0] == sink.identities[1]
    assert content(tmp_path / "there").keys() == whole.keys()


def test_a_shard_that_the_sink_has_lost_is_written_again(
    model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    sink = DirectorySink(tmp_path / "there")
    sink.fails_at = 2
    with pytest.raises(HubError):
        run(model, tmp_path / "out", sink)
    (tmp_path / "there" / sink.sent[0]).unlink()
    sink.fails_at = None
    run(model, tmp_path / "out", sink)
    assert sink.sent[2:] == [name for name in whole if name.startswith("model-")]
    assert content(tmp_path / "there").keys() == whole.keys()


def test_disk_space_is_needed_for_one_shard_only(
    model: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(len(data) for name, data in whole.items() if name.startswith("model-"))
    adapter = len(whole["pissa_init/adapter_model.safetensors"])

    class Disk(NamedTuple):
        total: int = 1 << 40
        free: int = largest + adapter + 16_000_000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk())
    with pytest.raises(OutputError, match="free space"):
        decompose(model, tmp_path / "all", OPTIONS, Run(device="cpu", threads=1))
    run(model, tmp_path / "out", DirectorySink(tmp_path / "there"))


@pytest.mark.parametrize(
    ("path", "role", "early"),
    [
        ("model.safetensors", "model", True),
        ("model-00001-of-00002.safetensors", "model", True),
        ("model.pth", "model", False),
        ("adapter_model.safetensors", "adapter", False),
        ("pissa_init/adapter_model.safetensors", "initial_adapter", False),
    ],
)
def test_only_shards_of_the_model_are_uploaded_before_the_end(
    path: str, role: FileRole, early: bool, tmp_path: Path
) -> None:
    planned = PlannedFile(path, (), role)
    uploads = ShardUploads(tmp_path, [planned], {}, DirectorySink(tmp_path / "there"))
    assert uploads.is_uploaded_early(path) == early
