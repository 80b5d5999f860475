"""Shards leave a staging directory as they are finished, and are never lost on the way."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from svdconvert.commands.decompose import decompose
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.errors import HubError, OutputError
from svdconvert.output.staging import partial
from tests import tiny
from tests.conftest import Build
from tests.program import content

OPTIONS = SplitOptions(rank=4, max_shard_size="10KB")


class Carrier:
    """A Shipment into a local directory, which may break down."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.identities: list[Mapping[str, Any]] = []
        self.sent: list[str] = []
        self.fails_at: int | None = None
        self.most_at_once = 0

    def begin(self, identity: Mapping[str, Any]) -> None:
        self.identities.append(identity)
        self.place.mkdir(exist_ok=True)

    def send(self, path: Path, file: str) -> Mapping[str, Any]:
        here = [other for other in path.parent.glob("model-*") if other.stat().st_blocks > 16]
        self.most_at_once = max(self.most_at_once, len(here))
        if self.fails_at == len(self.sent):
            raise HubError("the carrier broke down")
        self.sent.append(file)
        shutil.copyfile(path, self.place / file)
        return {"size": path.stat().st_size}

    def holds(self, file: str, record: Mapping[str, Any]) -> bool:
        there = self.place / file
        return there.exists() and there.stat().st_size == record["size"]

    def finish(self, directory: Path) -> None:
        shutil.copytree(directory, self.place, dirs_exist_ok=True)
        for path in [self.place / "sent.jsonl", *self.place.glob("journal*")]:
            path.unlink()


@pytest.fixture
def model(checkpoint: Build) -> Path:
    return checkpoint("llama", shard=tiny.SHARDED)


@pytest.fixture
def whole(model: Path, decomposed: Build) -> dict[str, bytes]:
    """What must arrive."""
    return content(decomposed(model, rank=4, max_shard_size="10KB"))


def run(model: Path, out: Path, carrier: Carrier) -> None:
    decompose(model, out, OPTIONS, Run(device="cpu", threads=1, shard_sink=carrier))


def test_all_that_was_written_arrives_and_nothing_stays(
    model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    carrier = Carrier(tmp_path / "there")
    run(model, tmp_path / "out", carrier)
    shards = [name for name in whole if name.startswith("model-")]
    assert carrier.sent == shards and len(shards) > 3
    assert content(tmp_path / "there").keys() == whole.keys()
    assert {name: content(tmp_path / "there")[name] for name in shards} == {n: whole[n] for n in shards}
    assert not (tmp_path / "out").exists() and not partial(tmp_path / "out").exists()


def test_a_run_that_broke_sends_the_rest_and_nothing_twice(
    model: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    carrier = Carrier(tmp_path / "there")
    carrier.fails_at = 2
    with pytest.raises(HubError, match="broke down"):
        run(model, tmp_path / "out", carrier)
    assert len(carrier.sent) == 2
    assert [path.name for path in partial(tmp_path / "out").glob("model-0000[12]*")] == []
    carrier.fails_at = None
    run(model, tmp_path / "out", carrier)
    assert carrier.sent == [name for name in whole if name.startswith("model-")]
    assert carrier.identities[0] == carrier.identities[1]
    assert content(tmp_path / "there").keys() == whole.keys()


def test_what_was_lost_on_the_way_is_made_again(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    carrier = Carrier(tmp_path / "there")
    carrier.fails_at = 2
    with pytest.raises(HubError):
        run(model, tmp_path / "out", carrier)
    (tmp_path / "there" / carrier.sent[0]).unlink()
    carrier.fails_at = None
    run(model, tmp_path / "out", carrier)
    assert carrier.sent[2:] == [name for name in whole if name.startswith("model-")]
    assert content(tmp_path / "there").keys() == whole.keys()


def test_room_is_wanted_for_one_shard_only(
    model: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(len(data) for name, data in whole.items() if name.startswith("model-"))
    adapter = len(whole["pissa_init/adapter_model.safetensors"])

    class Disk(NamedTuple):
        total: int = 1 << 40
        free: int = largest + adapter + 16_000_000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk())
    with pytest.raises(OutputError, match="make room"):
        decompose(model, tmp_path / "all", OPTIONS, Run(device="cpu", threads=1))
    run(model, tmp_path / "out", Carrier(tmp_path / "there"))
