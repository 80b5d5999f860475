"""Every option of every command changes the result or is refused, on every kind of directory.

The options are those of the command tree, so an option that is added without a row here fails.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from svdconvert.cli.app import app
from tests.laws.kinds import KINDS, PLAIN
from tests.program import Ended, content, svdconvert

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SAMPLE = ("plain", "decomposed", "trained", "lora")
"""The kinds that `make quick` tries."""

Words = list[Any]

# Words that give an option a value other than its default. A path is below the directory of all kinds.
VALUES: dict[str, Words] = {
    "--init": [Path("lora")],
    "--rank": [3],
    "--alpha": [8],
    "--rank-pattern": ["attn.q=2"],
    "--alpha-pattern": ["attn.q=2"],
    "--rslora": [],
    "--dropout": [0.1],
    "--targets": ["attn"],
    "--svd": ["exact64"],
    "--tol": [0.5],
    "--dtype": ["float16"],
    "--residual-dtype": ["float16"],
    "--max-shard-size": ["8KB"],
    "--copy-base": [],
    "--residual-format": ["nf4"],
    "--quant-start": ["loftq"],
    "--quant-iterations": [1],
    "--double-quant": [],
    "--experts": ["each"],
    "--layout": ["bert"],
    "--base": [Path("other")],
    "--residual": [Path("other")],
    "--from": ["residual"],
    "--keep-format": [],
    "--rounding": ["stochastic"],
    "--format": ["rwkv-peft"],
    "--rank-budget": [10],
    "--energy": [0.3],
    "--keep": ["none"],
    "--for": ["sglang"],
    "--state": [Path("plain")],
    "--stream": [],
    "--method": ["milora"],
    "--data-weights": ["1,2"],
    "--eval-data": [Path("more.jsonl")],
    "--eval-rows": [3],
    "--split": ["train[:3]"],
    "--task": ["classify"],
    "--text-fields": ["question"],
    "--label-field": ["answer"],
    "--eval-split": ["test"],
    "--prompt-field": ["answer"],
    "--response-field": ["question"],
    "--template": ["{prompt}:"],
    "--max-length": [6],
    "--too-long": ["refuse"],
    "--packing": [],
    "--prompt-loss": [],
    "--ending": [" +"],
    "--lr": [0.3],
    "--steps": [2],
    "--epochs": [2],
    "--batch-size": [3],
    "--accumulate": [2],
    "--warmup": [0.9],
    "--schedule": ["linear"],
    "--weight-decay": [0.5],
    "--clip": [1e-6],
    "--train-also": ["norms"],
    "--penalty": [0.5],
    "--penalty-rule": ["reference"],
    "--corrected-gradient": [],
    "--precision": ["bf16"],
    "--eval-every": [1],
    "--patience": [1],
    "--keep-best": [],
    "--samples": [1],
    "--sample-tokens": [3],
    "--keep-checkpoints": [],
    "--private": [],
    "--revision": ["branch"],
    "--message": ["text"],
    "--pull-request": [],
    "--seed": [3],
    "--weights": ["0.5"],
    "--base-name": ["org/base"],
    "--density": [0.5],
    "--set": ["lambda=0.5"],
}

OTHER_VALUES: dict[tuple[str, str], Words] = {
    ("decompose", "--init"): ["random"],
    ("combine", "--method"): ["mean"],
    ("combine", "--weights"): ["2,0.5"],
    ("convert", "--layout"): ["fla"],
}

# Options that must not change the files, each with the test that shows what it does instead.
ELSEWHERE = {
    "--out": "tests/output/test_staging.py",
    "--recipe": "tests/test_recipes.py",
    "--plan": "tests/cli/test_app.py",
    "--picture": "tests/commands/test_diff.py",
    "--sketch": "tests/commands/test_extract.py",
    "--adapter": "tests/commands/test_verify_merge.py",
    "--merged": "tests/commands/test_verify_merge.py",
    "--overwrite": "tests/output/test_ownership.py",
    "--threads": "tests/linalg/test_truncated.py",
    "--device": "tests/test_refusals.py",
    "--trust-remote-code": "tests/publish/test_card.py",
    "--push": "tests/publish/test_upload.py",
    "--debug": "tests/cli/test_errors.py",
    "--json": "tests/laws/test_json.py",
    "--nuclear-ratio": "tests/commands/test_quantised_residual.py",
    "--log-every": "tests/cli/test_display.py",
    "--prompt": "tests/conversation/test_chat_command.py",
    "--temperature": "tests/conversation/test_sampling.py",
    "--top-p": "tests/conversation/test_chat_command.py",
    "--attention": "tests/training/model/test_attention.py",
    "--gradient-checkpointing": "tests/training/model/test_modes.py",
    "--save-every": "tests/commands/test_train_mixture.py",
    "--save-limit": "tests/commands/test_train_interruption.py",
    "--track": "tests/training/logs/test_trackers.py",
    "--track-dir": "tests/training/logs/test_trackers.py",
    "--data": "tests/training/data/test_mixing.py",
    "--image-dir": "tests/commands/test_train_images.py",
    "--config": "tests/pipeline/test_combine_checkpoints.py",
    "--compare": "tests/evaluation/test_kinds.py",
    "--limit": "tests/evaluation/test_resuming.py",
    "--max-new-tokens": "tests/evaluation/test_answering.py",
    "--model": "tests/workflow/test_run.py",
    "--regrade": "tests/evaluation/test_resuming.py",
    "--run-code": "tests/workflow/test_run.py",
    "--sandbox": "tests/evaluation/test_options.py",
    "--tasks": "tests/evaluation/test_kinds.py",
}

# Other options without which an option may have no effect, because of the values that are compared.
NEEDS: dict[tuple[str, str], Words] = {
    ("decompose", "--seed"): ["--method", "lora"],
    ("decompose", "--init"): ["--method", "lora-fa"],
    ("decompose", "--rank"): ["--rank", 4],
    ("decompose", "--quant-start"): ["--residual-format", "nf4"],
    ("decompose", "--quant-iterations"): ["--residual-format", "nf4"],
    ("decompose", "--double-quant"): ["--residual-format", "nf4"],
    ("decompose", "--rslora"): ["--alpha", 8],
    ("combine", "--density"): ["--method", "ties"],
    ("combine", "--set"): ["--method", "iso-c"],
    ("combine", "--seed"): ["--method", "dare-linear", "--density", 0.5],
    ("train", "--rslora"): ["--alpha", 8],
    ("train", "--too-long"): ["--max-length", 8],
    ("train", "--precision"): ["--precision", "fp32"],
    ("train", "--keep-checkpoints"): ["--save-every", 1],
}
# An adapter that was not trained changes nothing, so there is nothing to round; matrices as small as these
# are split by the exact SVD in any case.
WITHOUT_EFFECT = {
    ("merge", "--rounding", "decomposed"),
    ("merge", "--rounding", "initial"),
    ("merge", "--weights", "decomposed"),
    ("merge", "--weights", "initial"),
    *(("decompose", "--tol", kind) for kind in PLAIN),
}


@dataclass(frozen=True)
class Case:
    command: str
    option: str

    def __str__(self) -> str:
        return f"{self.command} {self.option}"


def options_of(command: str) -> list[str]:
    return [
        parameter.opts[-1] for parameter in COMMANDS[command].params if parameter.param_type_name == "option"
    ]


NO_LAW = ("push", "list", "eval", "chat", "run", "report", "doctor")
"""Commands that write no directory of weights; each has tests of its own options."""

CASES = [
    Case(command, option)
    for command in COMMANDS
    for option in options_of(command)
    if command not in NO_LAW and option not in ELSEWHERE
]


def test_every_option_of_the_command_tree_has_a_row() -> None:
    every = {option for command in COMMANDS for option in options_of(command)}
    assert every - VALUES.keys() - ELSEWHERE.keys() == set(), "give it a value here"
    assert (VALUES.keys() | ELSEWHERE.keys()) - every == set(), "no command has it"
    assert VALUES.keys() & ELSEWHERE.keys() == set()


@pytest.mark.parametrize("option", ELSEWHERE)
def test_an_option_that_changes_no_file_has_a_test(option: str) -> None:
    words = option.removeprefix("--"), option.removeprefix("--").replace("-", "_")
    text = (ROOT / ELSEWHERE[option]).read_text()
    assert any(word in text for word in words), f"{ELSEWHERE[option]} does not mention {option}"


@dataclass(frozen=True)
class Outcome:
    ended: Ended
    files: dict[str, bytes]

    @property
    def refused(self) -> bool:
        return self.ended.status != 0


class Runner:
    """Runs a command on a kind of directory, and remembers the outcome without the option."""

    def __init__(self, here: Path, scratch: Path) -> None:
        self._here = here
        self._scratch = scratch
        self._known: dict[str, Outcome] = {}
        self._count = 0

    def outcome(self, command: str, kind: str, words: Words) -> Outcome:
        key = repr((command, kind, words))
        if key not in self._known:
            self._count += 1
            out = self._scratch / str(self._count)
            places = [self._here / word if isinstance(word, Path) else word for word in words]
            ended = svdconvert(
                command, *self._inputs(command, kind), *self._needed(command, kind, words, out), *places
            )
            shown = ended.out.replace(str(out), "OUT")
            self._known[key] = Outcome(Ended(ended.status, shown, ended.err), _files(out))
            shutil.rmtree(out, ignore_errors=True)
        return self._known[key]

    def _inputs(self, command: str, kind: str) -> Iterator[Path]:
        """A directory of the kind and, for a command that takes several, another one to go with it."""
        yield self._here / kind
        if command in ("extract", "diff"):
            yield self._here / ("finetuned" if kind != "finetuned" else "plain")
        if command == "combine":
            yield self._here / (("finetuned" if kind == "plain" else "plain") if kind in PLAIN else "trained")

    def _needed(self, command: str, kind: str, words: Words, out: Path) -> Iterator[object]:
        if "--out" in options_of(command):
            yield from ("-o", out)
        if (command == "decompose" or (command == "train" and kind in PLAIN)) and "--rank" not in words:
            yield from ("--rank", 4)
        if command == "convert" and "--layout" not in words:
            yield from ("--layout", "web-rwkv")
        if command == "train":
            yield from ("--data", self._here / "rows.jsonl", "--batch-size", 2)
        if kind == "foreign" and command in ("merge", "to-lora", "combine"):
            yield from ("--base", self._here / "plain")


def _files(out: Path) -> dict[str, bytes]:
    """Everything that a directory holds, except the manifest, which records the options."""
    found = content(out) if out.exists() else {}
    return {name: data for name, data in found.items() if name != "svdconvert.json"}


@pytest.fixture(scope="module")
def runner(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(here, tmp_path_factory.mktemp("scratch"))


# Options that have no effect with others: (command, kind, the others, the option).
IDLE: list[tuple[str, str, Words, Words]] = [
    *(("decompose", "plain", ["--method", method], ["--seed", 3]) for method in ("olora", "middle")),
    ("decompose", "plain", ["--svd", "exact"], ["--seed", 3]),
    ("decompose", "plain", ["--method", "lora"], ["--max-shard-size", "8KB"]),
    ("convert", "rwkv", ["--layout", "blinkdl"], ["--max-shard-size", "8KB"]),
    ("train", "decomposed", [], ["--split", "test"]),
    ("train", "decomposed", ["--eval-data", Path("more.jsonl")], ["--eval-split", "validation[:2]"]),
    ("train", "decomposed", ["--steps", 2], ["--keep-checkpoints"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "kind", "others", "option"), IDLE, ids=str)
def test_an_option_without_effect_is_refused_in_a_sentence_that_names_it(
    command: str, kind: str, others: Words, option: Words, runner: Runner
) -> None:
    assert not runner.outcome(command, kind, others).refused
    after = runner.outcome(command, kind, [*others, *option])
    assert after.ended.status == 1
    assert option[0] in after.ended.err
    assert "changes nothing" in after.ended.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("others", "option"),
    [([], ["--eval-every", 2]), (["--eval-every", 1], ["--patience", 2])],
    ids=["eval-every", "patience"],
)
def test_an_interval_longer_than_the_run_is_named(others: Words, option: Words, runner: Runner) -> None:
    words = ["--steps", 2, "--eval-rows", 2, *others, *option]
    ended = runner.outcome("train", "decomposed", words).ended
    assert ended.status == 0
    assert f"{option[0]} {option[1]} changes nothing in a run of 2 steps" in " ".join(ended.err.split())


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in SAMPLE else pytest.mark.slow) for kind in KINDS]
)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case.command == "train" else ()) for case in CASES],
    ids=str,
)
def test_an_option_changes_the_result_or_is_refused(case: Case, kind: str, runner: Runner) -> None:
    common = NEEDS.get((case.command, case.option), [])
    before = runner.outcome(case.command, kind, common)
    value = OTHER_VALUES.get((case.command, case.option), VALUES[case.option])
    fixed = common if case.option not in common else []
    after = runner.outcome(case.command, kind, [*fixed, case.option, *value])
    if before.refused:
        assert after.refused
    elif not after.refused and (case.command, case.option, kind) not in WITHOUT_EFFECT:
        assert after.files != before.files or (not before.files and after.ended.out != before.ended.out)
