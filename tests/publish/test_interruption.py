"""Killed at any request, a push leaves main as it was or complete, and the same command completes it."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from svdconvert.commands.decompose import decompose
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from tests import medium
from tests.loopback_hub.connection import ANY
from tests.loopback_hub.repository import Repository
from tests.loopback_hub.server import Hub
from tests.process import KILLS
from tests.visitor import Visitor

pytestmark = [pytest.mark.processes, pytest.mark.slow]

NAME = "alice/out"
OPTIONS = ["--rank", 8, "--max-shard-size", "2MB"]
COMMANDS: dict[str, list[object]] = {
    "push": ["push", "local", NAME],
    "decompose --stream --push": ["decompose", "org/base", *OPTIONS, "--stream", "--push", NAME],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return medium.build(tmp_path_factory.mktemp("model") / "base", layers=4, hidden=256, wide=704)


def content(repository: Repository) -> dict[str, bytes]:
    return {name: repository.read(name) for name in repository.names()}


def killing(group: int) -> Callable[[], None]:
    return lambda: os.killpg(group, signal.SIGKILL)


@pytest.mark.parametrize(
    "command", ["decompose --stream --push", pytest.param("push", marks=pytest.mark.sweep)]
)
def test_a_push_that_is_killed_again_and_again_ends_with_the_same_files(
    command: str,
    hub: Hub,
    alice: Visitor,
    model: Path,
    record_property: Callable[[str, object], None],
) -> None:
    hub.create("org/base", model)
    alice.home.mkdir()
    decompose(model, alice.home / "local", SplitOptions(rank=8, max_shard_size="2MB"), Run(threads=1))
    repository = hub.create(NAME)
    alice.succeeds(*COMMANDS[command])
    undisturbed = content(repository)
    complete = repository.history()
    assert len(undisturbed) > 5
    requests = len(hub.seen)
    chance = random.Random(command)  # noqa: S311 (a fixed sequence)
    repository = hub.create(NAME)
    kills = 0
    while kills < KILLS:
        process = alice.start(*COMMANDS[command])
        kill = hub.fault(ANY, "", after=chance.randrange(requests), then=killing(process.pid))
        _, said = process.communicate(timeout=300)
        kills += process.returncode == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), said
        assert repository.history() in (complete, complete[1:])
        if repository.history() == complete:
            assert content(repository) == undisturbed
            repository = hub.create(NAME)
        hub.faults.remove(kill)
    alice.succeeds(*COMMANDS[command])
    assert content(repository) == undisturbed
    assert [*repository.refs] == ["main"]
    record_property("counts", {"Kills": {"command": command, "kills": kills, "bytes at the end": "the same"}})
