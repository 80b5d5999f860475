"""Every option of push changes what is published or is refused, for every kind of directory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from svdconvert import LoraOptions, Run, SplitOptions, TrainOptions, decompose, merge, to_lora, train
from tests.conftest import Build
from tests.faults.runner import Outcome, Runner
from tests.laws.test_options import options_of
from tests.loopback_hub.server import Hub
from tests.program import succeeded
from tests.reading import readable, write_sums
from tests.visitor import TOKEN

pytestmark = [pytest.mark.processes, pytest.mark.slow]

NAME = "alice/out"
KINDS = ("decomposed", "initial", "trained", "merged", "lora", "finetuned")
VALUES: dict[str, list[object]] = {
    "--base": ["org/base"],
    "--residual": ["org/residual"],
    "--private": [],
    "--revision": ["branch"],
    "--message": ["text"],
    "--pull-request": [],
}
RUN = Run(device="cpu", threads=1)


class Pusher:
    """Pushes directories of every kind to a Hub, and remembers the outcome without the option."""

    def __init__(self, home: Path, hub: Hub, runner: Runner) -> None:
        self._home = home
        self._hub = hub
        self._runner = runner
        self._known: dict[str, tuple[Outcome, Any]] = {}

    def push(self, kind: str, *words: object) -> tuple[Outcome, Any]:
        """How the push ends, and what the Hub holds afterwards."""
        key = repr((kind, words))
        if key not in self._known:
            self._hub.repositories.pop(NAME, None)
            ended = self._runner.run(Path("/"), ["push", self._home / kind, NAME, *words])
            self._known[key] = (ended, self._published())
        return self._known[key]

    def _published(self) -> Any:
        found = self._hub.repositories.get(NAME)
        if found is None:
            return None
        files = {ref: {name: found.file(ref, name).sha256 for name in found.names(ref)} for ref in found.refs}
        return found.private, files, {ref: found.history(ref) for ref in found.refs}


@pytest.fixture(scope="module")
def pusher(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pusher]:
    home = tmp_path_factory.mktemp("pushed")
    base = readable(checkpoint("llama"), home / "base")
    options = TrainOptions(data=str(write_sums(home / "rows.jsonl")), steps=1, max_length=48)
    decompose(base, home / "decomposed", SplitOptions(rank=4), RUN)
    decompose(base, home / "initial", SplitOptions(rank=4, method="lora"), RUN)
    train(home / "decomposed", home / "trained", options, RUN)
    train(base, home / "finetuned", options, RUN, split=SplitOptions(method="full"))
    merge(home / "trained", home / "merged", run=RUN)
    to_lora(home / "trained", home / "lora", LoraOptions(), RUN)
    with Hub(tmp_path_factory.mktemp("store")) as hub:
        hub.create("org/base", base)
        hub.create("org/residual", home / "decomposed")
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": TOKEN,
        }
        with Runner(environment) as runner:
            yield Pusher(home, hub, runner)


def test_every_option_of_push_has_a_value() -> None:
    assert {*options_of("push")} - {"--debug", "--json", "--plan"} == VALUES.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", VALUES)
def test_an_option_of_push_changes_what_is_published_or_is_refused(
    option: str, kind: str, pusher: Pusher
) -> None:
    plain, before = pusher.push(kind)
    assert plain.status == 0, plain
    ended, after = pusher.push(kind, option, *VALUES[option])
    if ended.status == 0:
        assert after != before
    else:
        assert ended.status == 1 and option in ended.err, ended
        assert after is None


def test_json_changes_what_list_prints() -> None:
    for what in ("methods", "layouts"):
        assert succeeded("list", what).out != succeeded("list", what, "--json").out
