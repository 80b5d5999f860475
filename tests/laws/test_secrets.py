"""Whatever goes wrong in any command, the token is in the header of requests to the Hub and nowhere else."""

import json
import shutil
from typing import Any

import pytest

from tests.conftest import Build
from tests.hub.test_auth import SECRET, holding
from tests.loopback_hub.server import Hub
from tests.reading import readable, write_sums
from tests.visitor import Visitor

pytestmark = [pytest.mark.processes, pytest.mark.slow]

COMMANDS: list[list[object]] = [
    ["inspect", "MODEL"],
    ["inspect", "MODEL", "--json"],
    ["decompose", "MODEL", "-o", "OUT", "--rank", 2],
    ["decompose", "MODEL", "-o", "OUT", "--rank", 2, "--plan"],
    ["decompose", "MODEL", "-o", "OUT", "--rank", 2, "--stream"],
    ["decompose", "made", "-o", "OUT", "--rank", 2, "--push", "alice/new"],
    ["decompose", "MODEL", "--rank", 2, "--stream", "--push", "alice/new"],
    ["train", "MODEL", "-o", "OUT", "--data", "sums.jsonl", "--steps", 1],
    ["train", "base", "-o", "OUT", "--data", "alice/data", "--steps", 1],
    ["merge", "MODEL", "-o", "OUT"],
    ["merge", "made", "-o", "OUT", "--base", "MODEL"],
    ["to-lora", "MODEL", "-o", "OUT"],
    ["combine", "MODEL", "made", "-o", "OUT"],
    ["combine", "made", "made", "-o", "OUT", "--base", "MODEL"],
    ["convert", "MODEL", "-o", "OUT", "--layout", "hf"],
    ["extract", "MODEL", "base", "-o", "OUT", "--rank", 2],
    ["extract", "base", "MODEL", "-o", "OUT", "--stream"],
    ["extract", "base", "MODEL", "-o", "OUT", "--plan", "--sketch"],
    ["diff", "MODEL", "base"],
    ["diff", "made", "MODEL"],
    ["verify", "--merged", "MODEL", "--base", "base", "--adapter", "made"],
    ["inspect", "MODEL", "--for", "vllm"],
    ["verify", "MODEL"],
    ["push", "MODEL", "alice/new"],
    ["push", "made", "alice/new"],
]

HTML = f"<html>log in {SECRET}</html>".encode()
ANSWERS: dict[str, dict[str, Any]] = {
    "401": {"status": 401, "echo": True},
    "403": {"status": 403, "echo": True},
    "404": {"status": 404, "echo": True},
    "500": {"status": 500, "echo": True},
    "HTML": {"rewrite": {"Content-Type": "text/html", "X-Repo-Commit": SECRET}, "body": lambda body: HTML},
    "refused": {},
}
BROKEN: dict[str, tuple[str, bytes]] = {
    "config": ("config.json", b'{"model_type": "'),
    "weights": ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}"),
    "manifest": ("svdconvert.json", b'{"format": 2, "kind": []}'),
}

PROGRAM = """
import traceback
from typer.testing import CliRunner
from svdconvert.cli.app import app
from svdconvert.hub import errors, remote_source
errors._PAUSES = ()
remote_source._LONGEST_WAIT = 0.001
result = []
for words in {commands!r}:
    for more in ([], ["--debug"]):
        ended = CliRunner().invoke(app, [*words, *more])
        said = ended.stdout + ended.stderr
        if ended.exception is not None and not isinstance(ended.exception, SystemExit):
            said += "".join(traceback.format_exception(ended.exception))
        result.append([words, ended.exit_code, said])
"""


@pytest.fixture
def prepared(hub: Hub, alice: Visitor, checkpoint: Build, decomposed: Build) -> Visitor:
    """Alice with three sources of the token, a model `base`, what decompose `made` of it, and alice/base."""
    hub.users[SECRET] = "alice"
    (alice.home / "hf").mkdir(parents=True)
    readable(checkpoint("llama"), alice.home / "base")
    shutil.copytree(decomposed(checkpoint("llama"), rank=2), alice.home / "made")
    write_sums(alice.home / "sums.jsonl")
    hub.create("alice/base", alice.home / "base", private=True)
    return alice


def run_all(alice: Visitor, model: str, out: str = "out") -> list[tuple[list[str], int, str]]:
    """(command, exit status, all that it says) of every command on a model."""
    named = {"MODEL": model, "OUT": out}
    commands = [[str(named.get(str(word), word)) for word in words] for words in COMMANDS]
    ended = alice.runs(PROGRAM.format(commands=commands))
    assert isinstance(ended, list) and len(ended) == 2 * len(COMMANDS)
    return [(words, status, said) for words, status, said in ended]


def keep_secret(hub: Hub, alice: Visitor, ended: list[tuple[list[str], int, str]]) -> None:
    """Assert that the token was neither said, nor written, nor sent in anything but its header."""
    assert [words for words, _, said in ended if SECRET in said] == []
    allowed = {".env", "hf/token"}
    assert [path for path in holding(alice.home, SECRET) if path not in allowed] == []
    assert holding(hub.store.directory, SECRET) == []
    assert hub.leaks == []
    assert {seen.token for seen in hub.seen if seen.host == "localhost"} <= {None}


def all_answers() -> list[Any]:
    """Every answer with every source of the token; those that repeat both are left to sweep."""
    sources = ["environment", ".env", "login"]
    return [
        pytest.param(answer, source, marks=[] if place == number % len(sources) else [pytest.mark.sweep])
        for number, answer in enumerate(ANSWERS)
        for place, source in enumerate(sources)
    ]


@pytest.mark.parametrize(("answer", "source"), all_answers())
def test_an_answer_of_the_hub_brings_the_token_nowhere(
    hub: Hub, prepared: Visitor, answer: str, source: str
) -> None:
    prepared.token = SECRET if source == "environment" else None
    if source == ".env":
        (prepared.home / ".env").write_text(f"HF_TOKEN={SECRET}\n")
    elif source == "login":
        (prepared.home / "hf" / "token").write_text(SECRET)
    if answer == "refused":
        prepared.environment = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
        hub.fault(method, "", **ANSWERS[answer], times=10**6)
    ended = run_all(prepared, "alice/base")
    assert all(status == 1 for _, status, _ in ended)
    keep_secret(hub, prepared, ended)
    assert answer == "refused" or SECRET in {seen.token for seen in hub.seen}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_file_brings_the_token_nowhere(hub: Hub, prepared: Visitor, broken: str) -> None:
    prepared.token = SECRET
    file, content = BROKEN[broken]
    shutil.copytree(prepared.home / "made", prepared.home / "broken")
    (prepared.home / "broken" / file).write_bytes(content)
    ended = run_all(prepared, "broken")
    assert any(status == 1 for _, status, _ in ended)
    keep_secret(hub, prepared, ended)


def test_a_refused_option_brings_the_token_nowhere(hub: Hub, prepared: Visitor) -> None:
    prepared.token = SECRET
    (prepared.home / "out").mkdir()
    (prepared.home / "out" / "mine.txt").write_text("precious")
    ended = run_all(prepared, "made")
    assert any(status == 1 for _, status, _ in ended)
    keep_secret(hub, prepared, ended)


def test_a_token_that_the_user_put_into_a_file_or_a_name_is_not_shown(hub: Hub, prepared: Visitor) -> None:
    prepared.token = None
    config = json.loads((prepared.home / "made" / "svdconvert.json").read_text())
    config["base"]["location"] = f"/absent/{SECRET}"
    (prepared.home / "made" / "svdconvert.json").write_text(json.dumps(config))
    ended = run_all(prepared, f"made/{SECRET}") + run_all(prepared, "made")
    assert [words for words, status, said in ended if status and SECRET in said] == []
