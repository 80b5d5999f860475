"""Every option of eval, chat, run and report changes what is written or printed, or is refused."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.laws.test_options import options_of
from tests.program import Ended, content, svdconvert

pytestmark = pytest.mark.slow

KINDS = ("merged", "trained", "lora")
Words = list[Any]

# Words that give an option another value. A path is below the directory of all kinds, or a new one: OUT.
VALUES: dict[str, dict[str, Words]] = {
    "chat": {
        "--prompt": ["what is 2 + 2 ?"],
        "--max-new-tokens": [1],
        "--temperature": [0.01],
        "--top-p": [0.01],
        "--seed": [3],
        "--template": ["is is {prompt}"],
        "--base": [Path("other")],
        "--residual": [Path("other")],
    },
    "eval": {
        "--data": [Path("asked.jsonl")],
        "--limit": [1],
        "--tasks": ["math"],
        "--compare": [],
        "--max-new-tokens": [3],
        "--batch-size": [1],
        "--dtype": ["float32"],
        "--sandbox": ["none"],
        "--run-code": [],
        "--regrade": [],
        "--base": [Path("other")],
        "--residual": [Path("other")],
        "--threads": [2],
    },
    "run": {
        "--model": [Path("other")],
        "--set": ["decompose.rank=3"],
    },
    "report": {},
}
# Options that must not change the result here, each with the test that shows what it does instead.
ELSEWHERE: dict[str, dict[str, str]] = {
    "chat": {
        "--dtype": "tests/conversation/test_chat_command.py",
        "--threads": "tests/linalg/test_truncated.py",
    },
    "eval": {
        "--out": "tests/evaluation/test_resuming.py",
        "--overwrite": "tests/evaluation/test_resuming.py",
    },
    "run": {
        "--out": "tests/workflow/test_run.py",
        "--overwrite": "tests/workflow/test_run.py",
        "--run-code": "tests/workflow/test_run.py",
        "--threads": "tests/linalg/test_truncated.py",
    },
    "report": {
        "--out": "tests/reports/test_report.py",
        "--overwrite": "tests/reports/test_report.py",
        "--threads": "tests/linalg/test_truncated.py",
    },
}
GENERAL = ("--json", "--debug", "--device", "--trust-remote-code")
"""Options of every command."""
CASES = [
    (command, option, kind)
    for command, values in VALUES.items()
    for option in values
    for kind in (KINDS if command != "run" else KINDS[:1])
]


@pytest.mark.parametrize("command", VALUES)
def test_every_option_has_a_row(command: str) -> None:
    known = VALUES[command].keys() | ELSEWHERE[command].keys() | {*GENERAL}
    assert {*options_of(command)} - known == set(), "give it a value here"
    assert known - {*options_of(command)} <= {*GENERAL}


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command, each in ELSEWHERE.items() for option in each]
)
def test_an_option_that_changes_nothing_here_has_a_test(command: str, option: str) -> None:
    text = (Path(__file__).parents[2] / ELSEWHERE[command][option]).read_text()
    assert option in text or option.strip("-").replace("-", "_") in text


@dataclass(frozen=True)
class Outcome:
    ended: Ended
    result: Any


class Runner:
    """Runs a command on a kind of directory, and remembers the outcome without the option."""

    def __init__(self, here: Path, scratch: Path) -> None:
        self._here, self._scratch = here, scratch
        self._known: dict[str, Outcome] = {}

    def outcome(self, command: str, kind: str, words: Words) -> Outcome:
        key = repr((command, kind, words))
        if key not in self._known:
            out = self._scratch / "out"
            given = [self._place(word) if isinstance(word, Path) else word for word in words]
            ended = svdconvert(command, *self._usual(command, kind, given, out), *given)
            self._known[key] = Outcome(ended, _result(ended, out))
            shutil.rmtree(out, ignore_errors=True)
        return self._known[key]

    def _place(self, name: Path) -> Path:
        own = self._scratch / name
        return own if own.exists() else self._here / name

    def _usual(self, command: str, kind: str, given: Words, out: Path) -> Words:
        if command == "run":
            recipe = self._scratch / f"{kind}.yaml"
            recipe.write_text(f"model: {self._here / 'plain'}\ndecompose: {{rank: 2}}\n")
            return [recipe, "-o", out]
        usual: dict[str, Words] = {"--tasks": ["gsm8k"], "--data": [self._here / "questions.jsonl"]}
        usual |= {"--max-new-tokens": [2], "-o": [out]}
        if command == "chat":  # the most likely tokens of these models are special ones, which are not shown
            usual = {"--prompt": ["what is 1 + 2 ?"], "--max-new-tokens": [8], "--temperature": [50]}
            usual |= {"--seed": [1], "--json": []}
        words = [word for name, value in usual.items() if name not in given for word in (name, *value)]
        return [self._here / kind, *words]


def _result(ended: Ended, out: Path) -> Any:
    """What was printed, and the files without the time that they took."""
    files = content(out) if out.exists() else {}
    for name in [name for name in files if name.endswith(".json")]:
        values = json.loads(files[name])
        if isinstance(values, dict):
            values.pop("seconds", None)
        files[name] = json.dumps(values).encode()
    return files or ended.out


@pytest.fixture(scope="module")
def runner(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    scratch = tmp_path_factory.mktemp("scratch")
    (scratch / "asked.jsonl").write_text('{"question": "what is 3 + 4 ?", "answer": "#### 7"}\n')
    return Runner(here, scratch)


@pytest.mark.parametrize(("command", "option", "kind"), CASES)
def test_an_option_changes_the_result_or_is_refused(
    command: str, option: str, kind: str, runner: Runner
) -> None:
    before = runner.outcome(command, kind, [])
    assert before.ended.status == 0, before.ended
    after = runner.outcome(command, kind, [option, *VALUES[command][option]])
    if after.ended.status == 0:
        assert after.result != before.result
    else:
        assert after.ended.status in (1, 2) and "svdconvert" in after.ended.err
