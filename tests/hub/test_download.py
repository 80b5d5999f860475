"""A model of the Hub is downloaded into the cache: at one commit, what is needed, and undamaged."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.conftest import Build
from tests.loopback_hub.server import Hub
from tests.visitor import Visitor

FETCH = (
    "from svdconvert.hub.download import fetch\n"
    "found = fetch({!r})\nresult = [str(found.path), found.revision]"
)


@pytest.fixture
def published(hub: Hub, checkpoint: Build, tmp_path: Path) -> Hub:
    """org/tiny: shards, and many files that are not needed."""
    directory = tmp_path / "published"
    shutil.copytree(checkpoint("llama", shard=tiny.SHARDED), directory)
    for name in (
        "model.gguf",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "onnx/model.onnx",
        "a/b.json",
    ):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"unneeded")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (directory / "pissa_init").mkdir()
    (directory / "pissa_init" / "adapter_model.safetensors").write_bytes(b"an adapter")
    hub.create("org/tiny", directory)
    return hub


def test_only_what_is_needed_is_fetched(published: Hub, alice: Visitor) -> None:
    path, revision = alice.runs(FETCH.format("org/tiny"))
    assert revision == published.repositories["org/tiny"].head().oid
    assert Path(path).name == revision
    names = {str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file()}
    shards = {name for name in names if name.startswith("model-")}
    assert len(shards) > 3
    assert names - shards == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "pissa_init/adapter_model.safetensors",
    }


def test_what_is_in_the_cache_is_neither_fetched_again_nor_missed_without_a_hub(
    published: Hub, alice: Visitor
) -> None:
    first = alice.runs(FETCH.format("org/tiny"))
    downloads = len(published.asked("GET", "/file/"))
    assert alice.runs(FETCH.format("org/tiny")) == first
    assert len(published.asked("GET", "/file/")) == downloads
    alice.environment = {"HF_HUB_OFFLINE": "1"}
    asked = len(published.seen)
    assert alice.runs(FETCH.format("org/tiny")) == first
    assert len(published.seen) == asked


def test_a_revision_is_resolved_once_and_recorded(published: Hub, alice: Visitor, tmp_path: Path) -> None:
    repository = published.repositories["org/tiny"]
    before = repository.head().oid
    repository.refs["v1"] = before
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "config.json").write_text("{}")
    repository.fill(tmp_path / "more")
    assert alice.runs(FETCH.format("org/tiny@v1"))[1] == before
    assert alice.runs(FETCH.format(f"org/tiny@{before[:10]}"))[1] == before
    assert alice.runs(FETCH.format("org/tiny"))[1] == repository.head().oid != before


def test_one_file_of_a_repository_is_fetched_alone(hub: Hub, alice: Visitor, tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    for name in ("small.pth", "large.pth"):
        (tmp_path / "world" / name).write_bytes(name.encode())
    hub.create("org/world", tmp_path / "world")
    said = alice.runs(REFUSED.format(cases=[("org/world", None), ("org/world/none.pth", None)]))
    assert said[0] == "org/world holds 2 checkpoints; name one of them, as org/world/large.pth"
    assert said[1] == "org/world has no none.pth; check the name of the file"
    path, revision = alice.runs(FETCH.format("org/world/small.pth@main"))
    assert revision == hub.repositories["org/world"].head().oid
    assert Path(path).read_bytes() == b"small.pth"
    assert alice.cached() == ["small.pth"]


def test_a_push_during_the_download_does_not_mix_two_commits(
    published: Hub, alice: Visitor, tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "config.json").write_text('{"changed": true}')
    repository = published.repositories["org/tiny"]
    published.fault("GET", "/tree/", status=200, then=lambda: repository.fill(tmp_path / "more"))
    published.fault(
        "HEAD", "/resolve/.*index.json", status=200, then=lambda: repository.fill(tmp_path / "more")
    )
    path, revision = alice.runs(FETCH.format("org/tiny"))
    sidecar = (Path(path) / "config.json").read_bytes()
    assert sidecar == repository.read("config.json", revision)


def test_a_damaged_download_is_noticed_and_fetched_again(published: Hub, alice: Visitor) -> None:
    fault = published.fault("GET", "/file/", flip=True)
    path, _ = alice.runs(FETCH.format("org/tiny"))
    assert fault.times == 0
    repository = published.repositories["org/tiny"]
    for file in Path(path).glob("model-*.safetensors"):
        assert file.read_bytes() == repository.read(file.name)


def test_a_download_that_is_damaged_again_and_again_is_refused_and_not_kept(
    published: Hub, alice: Visitor
) -> None:
    name = "model-00001-of-00005.safetensors"
    shard = published.repositories["org/tiny"].file("main", name).sha256
    published.fault("GET", f"/file/{shard}", flip=True, times=2)
    said = str(alice.runs(REFUSED.format(cases=[("org/tiny", None)])))
    assert f"{name} of org/tiny was damaged in two downloads" in said and shard in said and "again" in said
    assert name not in alice.cached()
    path, _ = alice.runs(FETCH.format("org/tiny"))
    assert (Path(path) / name).read_bytes() == published.repositories["org/tiny"].read(name)


def test_a_dropped_connection_a_busy_and_a_broken_hub_are_waited_for(published: Hub, alice: Visitor) -> None:
    published.fault("GET", "/file/", cut=100)
    published.fault("GET", "/file/", status=503, after=1)
    published.fault("GET", "/file/", status=429, headers={"Retry-After": "0"}, after=2)
    path, _ = alice.runs(FETCH.format("org/tiny"))
    assert [fault.times for fault in published.faults] == [0, 0, 0]
    assert len(list(Path(path).glob("model-*.safetensors"))) == 5


REFUSED = """
import os
from svdconvert.errors import CheckpointError
from svdconvert.hub.download import fetch
result = []
for model, token in {cases!r}:
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        fetch(model)
        result.append("nothing was wrong")
    except CheckpointError as error:
        result.append(str(error))
"""

KINDS = """
from svdconvert.errors import SvdConvertError
from svdconvert.hub.download import fetch
result = []
for model in {models!r}:
    try:
        fetch(model)
        result.append("")
    except SvdConvertError as error:
        result.append(type(error).__name__)
"""


def test_absence_is_distinguished_from_refusal_damage_and_a_hub_out_of_reach(
    published: Hub, alice: Visitor, tmp_path: Path
) -> None:
    published.create("bob/private", private=True)
    published.create("bob/gated", tmp_path / "published", gated=True)
    absent = ["org/none", "org/tiny@v9", "org/tiny/none.pth", "bob/private", "org/a--b", "/nowhere/model"]
    assert alice.runs(KINDS.format(models=absent)) == ["ModelNotFoundError"] * len(absent)
    assert alice.runs(KINDS.format(models=["bob/gated"])) == ["CheckpointError"]
    published.fault("GET", "/api/models/org/none", status=400)
    shard = published.repositories["org/tiny"].file("main", "model-00001-of-00005.safetensors").sha256
    published.fault("GET", f"/file/{shard}", flip=True, times=2)
    assert alice.runs(KINDS.format(models=["org/none", "org/tiny"])) == ["CheckpointError"] * 2
    alice.environment = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert alice.runs(KINDS.format(models=["org/none"])) == ["CheckpointError"]
    alice.environment = {"HF_HUB_OFFLINE": "1"}
    assert alice.runs(KINDS.format(models=["org/none"])) == ["CheckpointError"]
    alice.environment, alice.token = {}, "hf_expired"
    assert alice.runs(KINDS.format(models=["org/tiny"])) == ["CheckpointError"]


def test_what_cannot_be_downloaded_is_a_sentence_with_the_next_step(
    published: Hub, alice: Visitor, tmp_path: Path
) -> None:
    published.repositories["org/tiny"].refs["other"] = published.repositories["org/tiny"].head().oid
    published.create("bob/private", private=True)
    published.create("bob/gated", tmp_path / "published", gated=True)
    cases = {
        ("org/none", "hf_alice"): ["org/none", "private", "check the name", "hf auth login", "HF_TOKEN"],
        ("bob/private", "hf_alice"): ["bob/private", "private", "with access to it"],
        ("bob/private", None): ["bob/private", "private", "hf auth login"],
        ("bob/gated", "hf_alice"): ["bob/gated is gated", f"request access at {published.url}/bob/gated"],
        ("bob/gated", None): ["bob/gated is gated", "hf auth login"],
        ("org/tiny@v9", "hf_alice"): ["org/tiny has no revision v9", "it has main, other"],
        ("org/tiny", "hf_expired"): ["the token was refused", "expired", f"{published.url}/settings/tokens"],
        ("org/tiny/extra", "hf_alice"): ["org/tiny/extra does not exist", "org/name[@revision]"],
        ("org/a--b", "hf_alice"): ["org/a--b is not a valid name of a repository"],
    }
    said = alice.runs(REFUSED.format(cases=[*cases]))
    for (case, words), sentence in zip(cases.items(), said, strict=True):
        assert [word for word in words if word not in sentence] == [], (case, sentence)
        assert "\n" not in sentence
        assert "hf_" not in sentence.replace("hf auth", "")


def test_a_hub_that_is_out_of_reach_is_a_sentence(alice: Visitor) -> None:
    here = "org/tiny is neither a local directory nor in the local cache, and "
    alice.environment = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert alice.runs(REFUSED.format(cases=[("org/tiny", None)])) == [
        f"{here}http://127.0.0.1:9 is out of reach (ConnectError); correct the path, or connect and run "
        "the same command again"
    ]
    alice.environment = {"HF_HUB_OFFLINE": "1"}
    assert alice.runs(REFUSED.format(cases=[("org/tiny", None)])) == [
        f"{here}HF_HUB_OFFLINE forbids requests to the Hub; unset it"
    ]


def test_a_private_model_is_fetched_with_a_token_from_any_source(
    published: Hub, alice: Visitor, tmp_path: Path
) -> None:
    published.create("alice/private", tmp_path / "published", private=True)
    wanted = published.repositories["alice/private"].head().oid
    assert alice.runs(FETCH.format("alice/private"))[1] == wanted
    alice.token = None
    for key in ("HF_TOKEN", "hf"):
        (alice.home / ".env").write_text(f'# mine\n{key}="hf_alice"\n')
        assert alice.runs(FETCH.format("alice/private"))[1] == wanted
    (alice.home / ".env").unlink()
    alice.runs("from huggingface_hub import login\nlogin('hf_alice')\nresult = 0")
    assert alice.runs(FETCH.format("alice/private"))[1] == wanted
    assert {seen.token for seen in published.asked("GET", "/api/models/alice/private")} == {"hf_alice"}
    assert {seen.token for seen in published.seen if seen.host == "localhost"} == {None}


@pytest.mark.parametrize("stream", [False, True])
def test_a_single_file_next_to_an_index_is_what_is_read(
    published: Hub, alice: Visitor, tmp_path: Path, stream: bool
) -> None:
    late = {"model.norm.weight": torch.full((32,), 3.0)}
    save_file(late, tmp_path / "published" / "model.safetensors", metadata={"format": "pt"})
    published.create("org/both", tmp_path / "published")
    read = (
        "from svdconvert.inputs.model import open_model\n"
        f"source = open_model('org/both', stream={stream}).source\n"
    )
    assert alice.runs(read + "result = [[*source.infos], float(source.read('model.norm.weight')[0])]") == [
        ["model.norm.weight"],
        3.0,
    ]
    assert not any(name.startswith("model-") for name in alice.cached())


def test_a_sentence_encoders_own_layers_are_fetched(published: Hub, alice: Visitor, tmp_path: Path) -> None:
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors"):
        (tmp_path / "published" / name).parent.mkdir()
        (tmp_path / "published" / name).write_text("{}")
    published.create("org/encoder", tmp_path / "published")
    path, _ = alice.runs(FETCH.format("org/encoder"))
    assert (Path(path) / "1_Pooling" / "config.json").is_file()
    assert (Path(path) / "2_Dense" / "model.safetensors").is_file()
