"""A token is sent to the Hub in its header, and appears nowhere else."""

import shutil
from pathlib import Path

import pytest

from svdconvert.cli.terminal import say
from svdconvert.errors import CheckpointError
from svdconvert.hub.auth import scrub
from svdconvert.hub.errors import hub_errors_as
from tests.conftest import Build
from tests.loopback_hub.server import Hub
from tests.visitor import Visitor

SECRET = "hf_SecretOfAlice0123456789"
EXPIRED = "hf_ExpiredOfAlice0123456789"


def holding(directory: Path, secret: str) -> list[str]:
    """The files below a directory that hold the secret."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(directory)) for path in files if secret.encode() in path.read_bytes())


def test_a_token_is_in_no_file_no_message_and_no_request_but_its_header(
    hub: Hub, alice: Visitor, checkpoint: Build, tmp_path: Path
) -> None:
    hub.users[SECRET] = "alice"
    hub.create("alice/base", checkpoint("llama"), private=True)
    alice.token = SECRET
    (alice.home / "hf").mkdir(parents=True)
    (alice.home / ".env").write_text(f"HF_TOKEN={SECRET}\n")
    (alice.home / "hf" / "token").write_text(SECRET)
    hub.fault("POST", "/commit/main", status=403)
    command = ["decompose", "alice/base", "--rank", 4, "--stream", "--push", "alice/out", "--debug"]
    failed = alice.types(*command)
    assert failed.status == 1 and "Traceback" in failed.err
    assert (alice.home / "out.partial").exists()
    assert holding(alice.home / "out.partial", SECRET) == []
    done = alice.succeeds(*command)
    assert SECRET not in failed.out + failed.err + done.out + done.err
    assert holding(alice.home, SECRET) == [".env", "hf/token"]
    assert "README.md" in hub.repositories["alice/out"].names()
    assert holding(hub.store.directory, SECRET) == []
    assert hub.leaks == []
    assert {seen.token for seen in hub.seen if seen.host == "localhost"} == {None}
    assert SECRET in {seen.token for seen in hub.seen}


def test_an_expired_token_is_reported_without_the_token_itself(
    hub: Hub, alice: Visitor, checkpoint: Build, tmp_path: Path
) -> None:
    alice.token = EXPIRED
    made = tmp_path / "out"
    said = alice.types("decompose", checkpoint("llama"), "-o", made, "--push", "alice/out", "--debug")
    assert said.status == 1 and "expired" in said.err and "Traceback" in said.err
    assert EXPIRED not in said.out + said.err
    assert hub.leaks == [] and not made.exists()


def test_the_environment_wins_over_a_dotenv_file_which_wins_over_the_login(hub: Hub, alice: Visitor) -> None:
    who = "from svdconvert.hub.auth import hub_api\nresult = hub_api().token"
    alice.home.mkdir()
    (alice.home / "hf").mkdir()
    (alice.home / "hf" / "token").write_text("hf_login")
    alice.token = None
    assert alice.runs(who) is None  # which makes huggingface_hub use the stored login
    (alice.home / ".env").write_text("OTHER=1\nHF_TOKEN='hf_dotenv'\n")
    assert alice.runs(who) == "hf_dotenv"
    (alice.home / ".env").write_text("hf=hf_of_sorsa\n")
    assert alice.runs(who) == "hf_of_sorsa"
    alice.token = "hf_environment"
    assert alice.runs(who) == "hf_environment"


def test_a_library_call_with_the_token_of_a_dotenv_file_leaves_the_environment_as_it_was(
    hub: Hub, alice: Visitor, checkpoint: Build
) -> None:
    hub.create("alice/base", checkpoint("llama"), private=True)
    alice.token = None
    alice.home.mkdir()
    (alice.home / ".env").write_text("hf=hf_alice\n")
    program = """
import os
import svdconvert
before = dict(os.environ)
from svdconvert.hub.download import fetch
from svdconvert.inputs.model import open_model
fetch("alice/base", "sidecars")
open_model("alice/base", stream=True).source.read("model.norm.weight")
result = [before == dict(os.environ), "HF_TOKEN" in os.environ]
"""
    assert alice.runs(program) == [True, False]
    asked = hub.asked("GET", "/api/models|/resolve/")
    assert {seen.token for seen in asked} == {"hf_alice"}
    assert [seen for seen in hub.asked("GET", "/resolve/.*/model.safetensors") if seen.status == 302] != []


@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_a_hub_that_repeats_the_token_does_not_bring_it_into_a_message(
    hub: Hub, alice: Visitor, checkpoint: Build, tmp_path: Path, status: int
) -> None:
    hub.users[SECRET] = "alice"
    alice.token = SECRET
    made = tmp_path / "out"
    alice.succeeds("decompose", checkpoint("llama"), "-o", made, "--rank", 2)
    hub.create("alice/base", made)
    program = """
import time, traceback
from svdconvert.errors import SvdConvertError
from svdconvert.hub import errors
time.sleep = lambda seconds: None
from svdconvert.hub.download import fetch
from svdconvert.publish.upload import Destination, upload
errors._PAUSES = ()
result = []
for action in (
    lambda: fetch("alice/base"),
    lambda: upload({made!r}, Destination(repository="alice/base")),
):
    try:
        action()
    except SvdConvertError as error:
        result.append([str(error), "".join(traceback.format_exception(error))])
""".replace("{made!r}", f"__import__('pathlib').Path({str(made)!r})")
    hub.fault("GET", "/resolve/.*/model.safetensors", status=status, echo=True, times=99)
    hub.fault("HEAD", "/resolve/", status=status, echo=True, times=99)
    hub.fault("POST", "/api/repos/create", status=status, echo=True, times=99)
    said = alice.runs(program)
    assert isinstance(said, list) and len(said) == 2
    assert SECRET not in str(said)
    if status in (401, 403):
        assert "***" in said[1][0] and "***" in said[1][1]


COMMANDS = """
from tests.program import svdconvert
result = []
for words in {commands!r}:
    ended = svdconvert(*words)
    result.append([ended.status, ended.out + ended.err])
"""


@pytest.mark.parametrize(
    "place", ["message", "range", pytest.param("commit", marks=pytest.mark.sweep), "body"]
)
def test_no_command_prints_or_writes_a_token_that_the_hub_repeats_anywhere(
    hub: Hub, alice: Visitor, checkpoint: Build, decomposed: Build, tmp_path: Path, place: str
) -> None:
    hub.users[SECRET] = "alice"
    alice.token = SECRET
    base = checkpoint("llama")
    made = tmp_path / "made"
    shutil.copytree(decomposed(base, rank=2), made)
    hub.create("alice/base", base)
    repeated = {
        "message": {"status": 403, "echo": True},
        "range": {"rewrite": {"Content-Range": f"bytes {SECRET}", "X-Repo-Commit": SECRET}},
        "commit": {"rewrite": {"X-Repo-Commit": f"..{SECRET}", "Location": f"/{SECRET}", "ETag": SECRET}},
        "body": {
            "body": lambda body: f'{{"id": "{SECRET}", "sha": "{SECRET}", "error": "{SECRET}"}}'.encode()
        },
    }
    for method in ("GET", "HEAD", "POST", "PUT"):
        hub.fault(method, "/resolve/|/file/" if place == "range" else "", **repeated[place], times=999)
    commands = [
        ["inspect", "alice/base"],
        ["decompose", "alice/base", "-o", "out", "--rank", "2", "--stream"],
        ["merge", "alice/base", "-o", "merged"],
        ["verify", "alice/base"],
        ["push", str(made), "alice/new"],
    ]
    said = alice.runs(COMMANDS.format(commands=commands))
    assert isinstance(said, list) and {status for status, _ in said} <= {0, 1}
    assert any(status == 1 for status, _ in said)
    assert SECRET not in str(said) and "Traceback" not in str(said)
    cache = [path for path in holding(alice.home, SECRET) if not path.startswith("hf/")]
    assert cache == [] and holding(made, SECRET) == []


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("denied for Bearer hf_abcdefghij1234", "denied for Bearer ***"),
        ("hf_abcdefghij", "***"),
        ("hf auth login, hf_xet, hf_hub", "hf auth login, hf_xet, hf_hub"),
        ("my own token: sesame-1234!", "my own token: ***"),
    ],
)
def test_known_tokens_and_all_that_looks_like_one_are_cut_out(
    text: str, clean: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "sesame-1234!")
    assert scrub(text) == clean
    say(text)
    assert capfd.readouterr().err == f"svdconvert: {clean}\n"
    with pytest.raises(CheckpointError) as told, hub_errors_as(CheckpointError, "org/x"):
        raise CheckpointError(text)
    assert str(told.value) == clean


def test_a_dotenv_file_that_cannot_be_read_is_a_sentence(hub: Hub, alice: Visitor) -> None:
    alice.token = None
    alice.home.mkdir()
    (alice.home / ".env").write_bytes(b"\xff\xfe\x00HF_TOKEN")
    alice.is_refused("inspect", "org/x", because=[".env in the working directory", "KEY=value"])


def test_without_a_hub_nothing_is_pushed_and_the_sentence_says_why(
    hub: Hub, alice: Visitor, checkpoint: Build, tmp_path: Path
) -> None:
    command = ["decompose", checkpoint("llama"), "-o", tmp_path / "out", "--rank", 4, "--push", "alice/out"]
    alice.environment = {"HF_HUB_OFFLINE": "1"}
    alice.is_refused(*command, because=["HF_HUB_OFFLINE forbids requests to the Hub; unset it"])
    alice.environment = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    alice.is_refused(*command, because=["http://127.0.0.1:9 is out of reach", "run the same command again"])
    assert not (tmp_path / "out").exists()
