"""A finished directory becomes one commit of a repository, also after errors of the network or the Hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests import tiny
from tests.conftest import Build
from tests.loopback_hub.server import Hub
from tests.program import svdconvert
from tests.reading import readable, write_sums
from tests.visitor import Visitor

SHARD = "model-00001-of-00002.safetensors"

PUSH = """
from svdconvert import PushOptions, SvdConvertError, push
result = []
for directory, name, options, places in {pushes!r}:
    try:
        done = push(directory, name, PushOptions(**options), **places)
        result.append([done.url, done.commit, done.changed, done.unsent])
    except SvdConvertError as error:
        result.append(str(error))
"""


def pushed(who: Visitor, directory: Path, name: str, *others: Any, **options: Any) -> Any:
    """[url, commit, whether anything changed, files not sent] of a push, or the sentence of its refusal."""
    places = others[0] if others else {}
    return who.runs(PUSH.format(pushes=[(str(directory), name, options, places)]))[0]


@pytest.fixture
def made(checkpoint: Build, decomposed: Build, tmp_path: Path) -> Path:
    """A DECOMPOSED directory in shards, with files that are not part of it."""
    small = decomposed(checkpoint("llama", shard=tiny.SHARDED), max_shard_size="30KB")
    directory = tmp_path / "made"
    shutil.copytree(small, directory)
    (directory / ".env").write_text("HF_TOKEN=hf_alice")
    (directory / "checkpoints").mkdir()
    (directory / "checkpoints" / "adapter_config.json").write_text("{}")
    (directory / "optimizer.pt").write_bytes(b"large")
    return directory


def test_all_files_of_a_directory_and_no_others_are_pushed_in_one_commit(
    hub: Hub, alice: Visitor, made: Path, tmp_path: Path
) -> None:
    url, commit, changed, left = pushed(alice, made, "alice/x", private=True, message="The first one")
    repository = hub.repositories["alice/x"]
    assert (repository.private, changed) == (True, True)
    assert repository.history() == ["The first one", "initial commit"]
    assert url.endswith(commit) and commit == repository.head().oid
    sent = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    strays = {".env", "checkpoints/adapter_config.json", "optimizer.pt"}
    assert {*left} == strays
    assert {*repository.names()} == sent - strays | {"README.md"}
    for name in (name for name in repository.names() if name.endswith((".safetensors", "config.json"))):
        if name != "pissa_init/adapter_config.json":
            assert repository.read(name) == (made / name).read_bytes()


def test_published_files_name_the_repository_and_no_local_path(
    hub: Hub, alice: Visitor, made: Path, tmp_path: Path
) -> None:
    assert (
        json.loads((made / "pissa_init" / "adapter_config.json").read_text())["base_model_name_or_path"]
        is None
    )
    pushed(alice, made, "alice/x")
    repository = hub.repositories["alice/x"]
    config = json.loads(repository.read("pissa_init/adapter_config.json"))
    assert config["base_model_name_or_path"] == "alice/x"
    manifest = json.loads(repository.read("svdconvert.json"))
    assert manifest["base"]["location"] == Path(manifest_of(made)["base"]["location"]).name
    for name in repository.names():
        content = repository.read(name)
        assert b"/tmp" not in content and str(tmp_path).encode() not in content, name
        assert b"hf_alice" not in content, name
    changed = "pissa_init/adapter_config.json"
    sidecars = manifest_of(made)["sidecars"] | {changed: xxhash.xxh3_64_hexdigest(repository.read(changed))}
    assert manifest == manifest_of(made) | {"base": manifest["base"], "sidecars": sidecars}


def manifest_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "svdconvert.json").read_text())


def test_a_local_base_is_replaced_by_its_repository_and_commit_if_it_is_the_same_model(
    hub: Hub, alice: Visitor, made: Path, checkpoint: Build
) -> None:
    hub.create("org/tiny", checkpoint("llama", shard=tiny.SHARDED))
    hub.create("org/other", checkpoint("llama", tied=True))
    assert "org/other" not in str(pushed(alice, made, "alice/x", {"base": "org/tiny"}))
    base = json.loads(hub.repositories["alice/x"].read("svdconvert.json"))["base"]
    assert (base["location"], base["revision"]) == ("org/tiny", hub.repositories["org/tiny"].head().oid)
    assert base["fingerprint"] == manifest_of(made)["base"]["fingerprint"]
    said = pushed(alice, made, "alice/y", {"base": "org/other"})
    assert "is not the model that the adapter was made for" in said
    assert "alice/y" not in hub.repositories


def test_what_the_hub_has_is_not_sent_again(hub: Hub, alice: Visitor, made: Path) -> None:
    first = pushed(alice, made, "alice/x")
    hub.seen.clear()
    again = pushed(alice, made, "alice/x")
    assert again[1:3] == [first[1], False]
    assert hub.asked("PUT", "") == [] and hub.asked("POST", "/commit/") == []
    assert sum(seen.received for seen in hub.seen) < 50_000


def test_a_new_version_replaces_the_files_of_the_old_one_and_no_others(
    hub: Hub, alice: Visitor, made: Path, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    pushed(alice, made, "alice/x")
    repository = hub.repositories["alice/x"]
    (tmp_path / "own").mkdir()
    card = repository.read("README.md").decode().replace("# x\n", "# x\nMy own words.\n")
    (tmp_path / "own" / "README.md").write_text(card)
    (tmp_path / "own" / "results.csv").write_text("mine")
    repository.fill(tmp_path / "own", "by hand")
    one = decomposed(checkpoint("llama", shard=tiny.SHARDED), rank=3)
    pushed(alice, one, "alice/x")
    assert repository.history()[:2] == ["Upload x with svdconvert", "by hand"]
    names = repository.names()
    assert [name for name in names if name.endswith(".safetensors")] == [
        "model.safetensors",
        "pissa_init/adapter_model.safetensors",
    ]
    assert repository.read("README.md").decode() == card
    assert repository.read("results.csv") == b"mine"


def test_branches_and_pull_requests_do_not_change_main(hub: Hub, alice: Visitor, made: Path) -> None:
    assert pushed(alice, made, "alice/x", revision="v2")[2]
    repository = hub.repositories["alice/x"]
    assert repository.names() == []
    assert SHARD in repository.names("v2")
    assert 'revision="v2"' in repository.read("README.md", "v2").decode()
    url = pushed(alice, made, "alice/x", pull_request=True)[0]
    assert url == f"{hub.url}/alice/x/discussions/1"
    assert repository.names() == []
    assert SHARD in repository.names("refs/pr/1")


def test_a_repository_with_other_weights_is_refused(
    hub: Hub, alice: Visitor, made: Path, checkpoint: Build
) -> None:
    hub.create("alice/taken", checkpoint("llama"))
    before = hub.repositories["alice/taken"].names()
    said = pushed(alice, made, "alice/taken")
    assert "alice/taken holds model.safetensors, which svdconvert did not write" in said
    assert "another name" in said and "--pull-request" in said
    assert hub.repositories["alice/taken"].names() == before
    hub.create("bob/open", checkpoint("llama"))
    assert "/bob/open/discussions/1" in pushed(alice, made, "bob/open", pull_request=True)[0]


def test_an_interrupted_push_continues_where_it_stopped(hub: Hub, alice: Visitor, made: Path) -> None:
    hub.fault("PUT", "/upload/", cut=1000)  # retried without a message
    hub.fault("PUT", "/upload/", status=403, after=1)
    said = pushed(alice, made, "alice/x")
    assert "may not" in said
    assert hub.repositories["alice/x"].history() == ["initial commit"]
    arrived = {seen.path for seen in hub.asked("PUT", "/upload/") if seen.status == 200}
    assert len(arrived) == 2
    hub.seen.clear()
    assert pushed(alice, made, "alice/x")[2]
    assert len(hub.asked("PUT", "/upload/")) == 1
    assert arrived.isdisjoint(seen.path for seen in hub.asked("PUT", "/upload/"))


def test_large_files_are_uploaded_in_parts(hub: Hub, alice: Visitor, made: Path) -> None:
    hub.part_size = 10_000
    pushed(alice, made, "alice/x")
    assert len(hub.asked("PUT", "/part/")) > 3
    assert hub.repositories["alice/x"].read(SHARD) == (made / SHARD).read_bytes()


def test_a_busy_hub_is_retried_and_a_lost_response_makes_no_second_commit(
    hub: Hub, alice: Visitor, made: Path
) -> None:
    hub.fault("POST", "/api/repos/create", status=503)
    hub.fault("POST", "/commit/", status=429, headers={"Retry-After": "1"})
    hub.fault("POST", "/commit/", cut=0)
    assert pushed(alice, made, "alice/x")[1] == hub.repositories["alice/x"].head().oid
    assert [fault.times for fault in hub.faults] == [0, 0, 0]
    assert hub.repositories["alice/x"].history() == ["Upload x with svdconvert", "initial commit"]


def test_of_two_pushes_at_once_the_second_is_refused_and_can_be_repeated(
    hub: Hub, alice: Visitor, made: Path, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("theirs")
    repository = hub.create("alice/x")
    hub.fault("POST", "/preupload/", status=200, then=lambda: repository.fill(tmp_path / "theirs", "theirs"))
    assert "someone else has changed alice/x meanwhile" in pushed(alice, made, "alice/x")
    assert repository.names() == ["notes.txt"]
    assert pushed(alice, made, "alice/x")[2]
    assert repository.history() == ["Upload x with svdconvert", "theirs", "initial commit"]
    assert repository.read("notes.txt") == b"theirs"


@pytest.mark.parametrize(
    ("token", "name", "words"),
    [
        (None, "alice/x", ["log in", "HF_TOKEN"]),
        ("hf_expired", "alice/x", ["the token was refused", "expired"]),
        ("hf_reader", "alice/x", ["may", "log in"]),
        ("hf_alice", "bob/x", ["may not do that to bob/x", "log in"]),
        ("hf_alice", "no name", ["no name is not a valid name of a repository", "org/name"]),
    ],
)
def test_a_push_without_permission_is_refused_and_says_why(
    hub: Hub, alice: Visitor, made: Path, token: str | None, name: str, words: list[str]
) -> None:
    alice.token = token
    said = pushed(alice, made, name)
    assert [word for word in words if word not in said] == [], said
    assert hub.repositories == {}


def test_a_command_checks_before_its_work_whether_it_may_push(
    hub: Hub, alice: Visitor, checkpoint: Build, tmp_path: Path
) -> None:
    command = ["decompose", checkpoint("llama"), "-o", tmp_path / "out", "--rank", 4, "--push"]
    hub.create("alice/taken", checkpoint("llama"))
    alice.is_refused(*command, "alice/taken", because=["alice/taken holds", "svdconvert did not write"])
    alice.token = "hf_reader"
    alice.is_refused(*command, "alice/new", because=["the token may only read"])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_push_that_fails_after_the_work_loses_nothing_and_is_repeated_alone(
    hub: Hub, alice: Visitor, checkpoint: Build, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    hub.fault("POST", "/commit/", status=403)
    ended = alice.types("decompose", checkpoint("llama"), "-o", out, "--rank", 4, "--push", "alice/new")
    assert ended.status == 1
    assert "decomposed into" in ended.out and "may not" in ended.err
    assert (out / "svdconvert.json").exists()
    said = alice.succeeds("push", out, "alice/new", "--private").out
    assert f"pushed {out} to alice/new" in said.replace("\n", "")
    assert "model.safetensors" in hub.repositories["alice/new"].names()


def test_training_checkpoints_are_not_pushed(
    hub: Hub, alice: Visitor, checkpoint: Build, tmp_path: Path
) -> None:
    base = readable(checkpoint("llama"), tmp_path / "base")
    out = tmp_path / "out"
    data = ["--data", write_sums(tmp_path / "sums.jsonl"), "--steps", 2, "--max-length", 48]
    kept = ["--save-every", 1, "--keep-checkpoints", "--push", "alice/trained"]
    alice.succeeds("train", base, "-o", out, "--method", "lora", "--rank", 4, *data, *kept)
    assert any((out / "checkpoints").iterdir())
    sent = hub.repositories["alice/trained"].names()
    assert "adapter_model.safetensors" in sent
    assert not [name for name in sent if name.startswith("checkpoints")]


def test_push_options_without_a_repository_are_refused(tmp_path: Path) -> None:
    ended = svdconvert("decompose", "org/name", "-o", tmp_path / "out", "--pull-request")
    assert ended.status == 2
    assert "--pull-request is an option of --push" in ended.err


@pytest.mark.parametrize(
    "name", [".env", "../outside.txt", "/etc/hostname", "id_rsa", "link.json", "notes.txt"]
)
def test_a_manifest_or_a_link_cannot_make_push_send_a_private_file(
    hub: Hub, alice: Visitor, made: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "outside.txt").write_text("secret")
    if name in ("link.json", "notes.txt"):
        (made / name).symlink_to(tmp_path / "outside.txt")
    if name != "notes.txt":
        manifest = manifest_of(made)
        manifest["files"][name] = {}
        (made / "svdconvert.json").write_text(json.dumps(manifest))
    said = pushed(alice, made, "alice/x")
    assert isinstance(said, str) and name in said
    assert not any(hub.repositories[found].names() for found in hub.repositories)


def test_a_directory_that_svdconvert_did_not_write_is_not_pushed(
    hub: Hub, alice: Visitor, checkpoint: Build, tmp_path: Path
) -> None:
    assert "was not written by svdconvert" in pushed(alice, checkpoint("llama"), "alice/x")
    assert "does not exist" in pushed(alice, tmp_path / "none", "alice/x")
    assert hub.seen == [] or "alice/x" not in hub.repositories


def test_a_push_says_that_the_card_names_no_base(
    hub: Hub, alice: Visitor, checkpoint: Build, decomposed: Build
) -> None:
    base = checkpoint("llama")
    hub.create("org/tiny", base)
    start = decomposed(base, method="lora")
    assert "the card names no model" in alice.succeeds("push", start, "alice/x").out
    assert "the card names no model" not in alice.succeeds("push", start, "alice/y", "--base", "org/tiny").out
    whole = decomposed(base)  # its own weights are the residual that the adapter is loaded on
    said = alice.succeeds("push", whole, "alice/z")
    assert "the card names no model" not in said.out
    sentence = said.err.replace("\n", " ")
    assert "is a local directory, so the card cannot name it" in sentence and "--base ORG/NAME" in sentence
    assert "local directory" not in alice.succeeds("push", whole, "alice/z", "--base", "org/tiny").err
    card = hub.repositories["alice/z"].read("README.md").decode()
    assert "The residual base of [org/tiny]" in card
