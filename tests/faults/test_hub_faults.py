"""Faults of the file system in commands that read from a Hub or publish to it.

Only calls below one directory count: it holds the inputs, huggingface_hub's cache and the output.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.faults.injection import KINDS
from tests.faults.judgement import count_of, fault_points, wrong_end
from tests.faults.runner import Outcome, Runner
from tests.loopback_hub.repository import Repository
from tests.loopback_hub.server import Hub
from tests.process import sums
from tests.reading import readable
from tests.visitor import TOKEN

pytestmark = [pytest.mark.processes, pytest.mark.slow]

NAME = "alice/out"
OFTEN = ("full disk", "kill before")  # the kinds that make test injects; make sweep and make soak inject all
FEW = ["--rank", 2, "--targets", "attn.q", "--threads", 1]
COMMANDS: dict[str, list[object]] = {
    "push": ["push", "{local}", NAME],
    "decompose --stream": ["decompose", "org/base", *FEW, "--stream"],
    "decompose --stream --push": ["decompose", "org/base", *FEW, "--stream", "--push", NAME],
}


@dataclass(frozen=True)
class Stage:
    """A Hub, the inputs of all commands, and the warm process, which knows the Hub."""

    root: Path
    hub: Hub
    runner: Runner

    def prepare(self) -> Repository:
        """An empty repository to push to, an empty cache, and no output."""
        for name in ("out", "out.partial", "hf"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        return self.hub.create(NAME)

    def run(self, command: str, kind: str = "", at: int = 0) -> Outcome:
        return self.runner.run(self.root, self.words(command), kind, at)

    def words(self, command: str) -> list[object]:
        named = {f"{{{path.name}}}": path for path in (self.root / "inputs").iterdir()}
        words = [named.get(str(word), word) for word in COMMANDS[command]]
        return words if command == "push" else [*words, "-o", self.root / "out"]

    def results(self) -> dict[str, str]:
        """What was written here and published, without the cache of huggingface_hub."""
        out = self.root / "out"
        repository = self.hub.repositories[NAME]
        published = {f"{NAME}/{name}": repository.file("main", name).sha256 for name in repository.names()}
        return published | (
            {f"out/{name}": value for name, value in sums(out).items()} if out.exists() else {}
        )


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    root = tmp_path_factory.mktemp("hub-faults").resolve()
    inputs = root / "inputs"
    tiny.build("llama", root / "model", dtype=torch.float32)
    readable(root / "model", inputs / "base")
    shutil.rmtree(root / "model")
    with Hub(tmp_path_factory.mktemp("store")) as hub:
        hub.create("org/base", inputs / "base")
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(root / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            # What the program sets when it starts, before huggingface_hub is imported.
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_VERBOSITY": "error",
            "HF_TOKEN": TOKEN,
        }
        with Runner(environment) as runner:
            made = Stage(root, hub, runner)
            runner.warm(["decompose", inputs / "base", *FEW, "-o", inputs / "local"])
            for command in ("push", "decompose --stream --push"):
                made.prepare()
                runner.warm(made.words(command))
            yield made


@pytest.fixture(scope="module", params=COMMANDS)
def undisturbed(stage: Stage, request: pytest.FixtureRequest) -> tuple[str, Outcome, dict[str, str]]:
    """A command, how it ends without a fault, and what it writes and publishes."""
    stage.prepare()
    done = stage.run(request.param)
    assert done.status == 0, done
    return request.param, done, stage.results()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in OFTEN else [pytest.mark.sweep]) for kind in KINDS]
)
def test_a_fault_leaves_the_repository_as_it_was_or_complete(
    stage: Stage,
    undisturbed: tuple[str, Outcome, dict[str, str]],
    kind: str,
    record_property: Callable[[str, object], None],
) -> None:
    command, reference, wanted = undisturbed
    inputs = sums(stage.root / "inputs")
    number = len(reference.calls)
    points = fault_points(kind, number)
    wrong = []
    for at in points:
        faults = _faults(stage, command, kind, at, reference, wanted)
        wrong += [f"{kind} at {at} of {number} ({reference.calls[at - 1]}): {fault}" for fault in faults]
    assert sums(stage.root / "inputs") == inputs
    assert wrong == [], "\n".join(wrong)
    record_property("counts", count_of(command, points))


def _faults(
    stage: Stage, command: str, kind: str, at: int, reference: Outcome, wanted: dict[str, str]
) -> list[str]:
    """What is wrong after a fault at the call number `at`, and after the same command once more."""
    before = stage.prepare().history()
    ended = stage.run(command, kind, at)
    repository = stage.hub.repositories[NAME]
    found = wrong_end(ended, kind, reference)
    complete = stage.results() == wanted
    if not complete and (repository.history() != before or (stage.root / "out").exists()):
        found.append(f"neither untouched nor complete: {sorted(stage.results())}")
    if ended.status == 0 and not complete:
        found.append(f"exit status 0, but not complete: {ended}")
    if not complete:
        again = stage.run(command)
        if again.status != 0:
            found.append(f"the same command fails: {again}")
        elif stage.results() != wanted:
            found.append(f"other results in the end: {sorted(stage.results())}")
        elif (stage.root / "out.partial").exists():
            found.append("left over: out.partial")
    if found == [] and [*repository.refs] != ["main"]:
        found.append(f"left over: the branches {[*repository.refs]}")
    return found
