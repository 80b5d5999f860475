"""Weights that are read from the Hub by range requests are those that a download would have."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.conftest import Build
from tests.loopback_hub.server import Hub
from tests.process import sums
from tests.visitor import Visitor

READ = """
import hashlib
from svdconvert.manifest.fingerprint import CHUNK, tensor_checksum
from svdconvert.inputs.model import open_model
home = open_model({!r}, stream=True)
result = {{name: [tensor_checksum(home.source, name), hashlib.sha256(
    home.source.read(name).reshape(-1).view(__import__("torch").uint8).numpy()).hexdigest()]
    for name in home.source.infos}}
"""


@pytest.fixture
def large(hub: Hub, tmp_path: Path) -> Path:
    """org/large: matrices that are read by themselves, and small tensors between them."""
    directory = tmp_path / "large"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tensors = {"a.matrix": torch.randn(700, 600), "b.norm": torch.randn(40), "c.norm": torch.randn(41)}
    tensors |= {
        "d.matrix": torch.randn(1200, 500).bfloat16(),
        "e.norm": torch.randn(3),
        "f.none": torch.randn(0),
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    hub.create("org/large", directory)
    return directory


def test_every_tensor_is_read_as_it_is_on_disk(hub: Hub, alice: Visitor, large: Path) -> None:
    from hashlib import sha256

    from svdconvert.checkpoint.safetensors_files import open_checkpoint
    from svdconvert.checkpoint.tensors import tensor_bytes
    from svdconvert.manifest.fingerprint import tensor_checksum

    source = open_checkpoint(large)
    wanted = {
        name: [tensor_checksum(source, name), sha256(tensor_bytes(source.read(name))).hexdigest()]
        for name in source.infos
    }
    assert alice.runs(READ.format("org/large")) == wanted
    assert "model.safetensors" not in alice.cached()
    assert len(hub.asked("GET", "/resolve/.*/model.safetensors")) == 6  # a header, two matrices twice, a run


def test_a_streamed_model_is_decomposed_into_the_same_bytes_and_leaves_no_shard(
    hub: Hub, alice: Visitor, checkpoint: Build, tmp_path: Path
) -> None:
    hub.create("org/tiny", checkpoint("llama", shard=tiny.SHARDED))
    split = ["decompose", "org/tiny", "--rank", 4, "--max-shard-size", "16KB", "-o"]
    merge = ["merge", tmp_path / "streamed", "--from", "base", "-o"]
    alice.succeeds_with(
        [*split, tmp_path / "streamed", "--stream"], [*merge, tmp_path / "merged", "--stream"]
    )
    assert [name for name in alice.cached() if name.endswith(".safetensors")] == []
    alice.succeeds_with([*split, tmp_path / "fetched"], [*merge, tmp_path / "again"])
    assert [name for name in alice.cached() if name.endswith(".safetensors")] != []
    assert sums(tmp_path / "streamed") == sums(tmp_path / "fetched")
    assert sums(tmp_path / "merged") == sums(tmp_path / "again")
    manifest = json.loads((tmp_path / "streamed" / "svdconvert.json").read_text())
    head = hub.repositories["org/tiny"].head().oid
    assert (manifest["base"]["location"], manifest["base"]["revision"]) == ("org/tiny", head)


def test_a_broken_connection_is_continued_where_it_broke(hub: Hub, alice: Visitor, large: Path) -> None:
    whole = alice.runs(READ.format("org/large"))
    hub.seen.clear()
    hub.fault("GET", "/file/", cut=300_000, after=1, times=3)
    hub.fault("GET", "/file/", status=503, after=1)
    hub.fault("GET", "/resolve/.*/model.safetensors", status=429, headers={"Retry-After": "0"}, after=3)
    assert alice.runs(READ.format("org/large")) == whole
    assert [fault.times for fault in hub.faults] == [0, 0, 0]
    size = (large / "model.safetensors").stat().st_size
    sent = sum(seen.sent for seen in hub.asked("GET", "/file/"))
    assert (
        sent < 3.5 * size
    )  # the header's request, then every tensor twice: what had arrived is not asked for again


def test_a_connection_that_breaks_again_and_again_is_a_sentence(
    hub: Hub, alice: Visitor, large: Path
) -> None:
    hub.fault("GET", "/file/", cut=0, times=1000)
    program = (
        "import svdconvert.hub.remote_source as remote\nremote._LONGEST_WAIT = 0.01\n"
        "from svdconvert.errors import CheckpointError\nfrom svdconvert.inputs.model import open_model\n"
        "try:\n    open_model('org/large', stream=True)\n"
        "except CheckpointError as error:\n    result = str(error)"
    )
    said = str(alice.runs(program))
    assert "org/large/model.safetensors cannot be read" in said
    assert "again and again" in said and "run the same command again" in said


def test_inspecting_fetches_no_weights_and_what_is_cached_needs_no_hub(
    hub: Hub, alice: Visitor, checkpoint: Build, tmp_path: Path
) -> None:
    hub.create("org/tiny", checkpoint("llama", shard=tiny.SHARDED))
    hub.create("org/pickled", checkpoint("llama", pickled=True))
    looks = [
        [verb, model, *plan]
        for model in ("org/tiny", "org/pickled")
        for verb, plan in (("inspect", []), ("decompose", ["--rank", 4, "--plan"]))
    ]
    alice.succeeds_with(*looks[:2])
    assert [name for name in alice.cached() if name.endswith(".safetensors")] == []
    # Of a .bin nothing but all of it tells the shapes.
    alice.succeeds_with(*looks[2:], [*looks[1][:-1], "-o", tmp_path / "fetched"])
    alice.environment = {"HF_HUB_OFFLINE": "1"}
    alice.succeeds_with(*looks, [*looks[1][:-1], "--stream", "-o", tmp_path / "out"])


def test_what_is_not_in_safetensors_cannot_be_streamed(
    hub: Hub, alice: Visitor, checkpoint: Build, tmp_path: Path
) -> None:
    hub.create("org/pickled", checkpoint("llama", pickled=True))
    alice.is_refused(
        *("decompose", "org/pickled", "-o", tmp_path / "out", "--rank", 4, "--stream"),
        because=["org/pickled has no safetensors", "leave out --stream"],
    )
    assert not (tmp_path / "out.partial").exists()
