"""Whichever call of the program fails, or is its last one, nothing wrong stays and the same command goes on.

Five calls or more of each command get each kind of fault; with SVDCONVERT_FAULTS=N every N-th call does,
and with SVDCONVERT_FAULTS=all every one.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests import rwkv6, tiny
from tests.commands.test_extract import tuned_from
from tests.faults.injection import KINDS
from tests.faults.judgement import count_of, fault_points, wrong_end
from tests.faults.runner import Outcome, Runner
from tests.process import sums
from tests.reading import readable, write_sums

pytestmark = [pytest.mark.processes, pytest.mark.slow]

FEW = ["--targets", "attn.q,mlp.down", "--threads", 1]
STEPS = ["--steps", 3, "--save-every", 1, "--max-length", 48, "--batch-size", 2, "--eval-rows", 2]
TRAIN = ["--data", "{sums.jsonl}", *STEPS, "--threads", 1, "--precision", "fp32"]

COMMANDS: dict[str, list[object]] = {
    "decompose": ["decompose", "{base}", "--rank", 2, *FEW],
    "decompose --overwrite": ["decompose", "{base}", "--rank", 2, "--overwrite", *FEW],
    "decompose to shards": ["decompose", "{base}", "--rank", 2, "--max-shard-size", "20KB", *FEW],
    "merge": ["merge", "{split}", "--threads", 1],
    "to-lora": ["to-lora", "{trained}"],
    "to-lora --format gguf": ["to-lora", "{trained}", "--format", "gguf"],
    "to-lora --format mlx": ["to-lora", "{trained}", "--format", "mlx"],
    "merge of several": ["merge", "{trained}", "{split}", "--weights", "1,0.5", "--threads", 1],
    "extract": ["extract", "{base}", "{tuned}", "--rank", 2, "--threads", 1],
    "combine": ["combine", "{trained}", "{lora}"],
    "combine of checkpoints": ["combine", "{base}", "{tuned}", "--max-shard-size", "40KB", "--threads", 1],
    "convert to hf": ["convert", "{rwkv.pth}", "--layout", "hf"],
    "convert to blinkdl": ["convert", "{hf}", "--layout", "blinkdl"],
    "train": ["train", "{split}", *TRAIN],
    "train --method full": ["train", "{base}", "--method", "full", *TRAIN],
}


@dataclass(frozen=True)
class Stage:
    """A directory with the inputs of all commands, and the warm process."""

    root: Path
    runner: Runner

    def words(self, command: str, out: Path) -> list[object]:
        """The command line, with the inputs by their paths."""
        named = {f"{{{path.name}}}": path for path in (self.root / "inputs").iterdir()}
        return [*(named.get(str(word), word) for word in COMMANDS[command]), "-o", out]

    def run(self, command: str, out: Path, kind: str = "", at: int = 0) -> Outcome:
        return self.runner.run(self.root, self.words(command, out), kind, at)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    root = tmp_path_factory.mktemp("faults").resolve()
    inputs = root / "inputs"
    tiny.build("llama", root / "model", dtype=torch.float32)
    readable(root / "model", inputs / "base")
    shutil.rmtree(root / "model")
    tuned_from(inputs / "base", inputs / "tuned")
    write_sums(inputs / "sums.jsonl")
    rwkv6.save(rwkv6.random_model(layers=1, width=32, head=16), inputs / "rwkv.pth")
    with Runner() as runner:
        made = Stage(root, runner)
        for name, command in {
            "split": "decompose",
            "merged": "merge",
            "trained": "train",
            "hf": "convert to hf",
            "lora": "to-lora",
        }.items():
            runner.warm(made.words(command, inputs / name))
        yield made


@pytest.fixture(scope="module", params=COMMANDS)
def undisturbed(stage: Stage, request: pytest.FixtureRequest) -> tuple[str, Outcome, dict[str, str]]:
    """A command, how it ends without a fault, and the checksums of what it writes."""
    out = stage.root / request.param / "out"
    _prepare(stage, request.param, out)
    done = stage.run(request.param, out)
    assert done.status == 0, done
    return request.param, done, sums(out)


def _prepare(stage: Stage, command: str, out: Path) -> None:
    """Files of the user's next to `out`, and something to overwrite."""
    out.parent.mkdir()
    (out.parent / "out.partial.txt").write_text("precious")
    if "--overwrite" in COMMANDS[command]:
        shutil.copytree(stage.root / "inputs" / "merged", out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_any_call_leaves_nothing_wrong(
    stage: Stage,
    undisturbed: tuple[str, Outcome, dict[str, str]],
    kind: str,
    tmp_path: Path,
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
    out = stage.root / "case" / "out"
    shutil.rmtree(out.parent, ignore_errors=True)
    _prepare(stage, command, out)
    before = sums(out) if out.exists() else {}
    ended = stage.run(command, out, kind, at)
    found = wrong_end(ended, kind, reference)
    found += _wrong_files(out, before, wanted)
    complete = out.exists() and sums(out) == wanted
    if ended.status == 0 and not complete:
        found.append(f"exit status 0, but the output is not complete: {ended}")
    if not complete:
        again = stage.run(command, out)
        if again.status != 0:
            found.append(f"the same command fails: {again}")
        elif sums(out) != wanted:
            found.append(f"other files in the end: {_difference(sums(out), wanted)}")
        elif rest := {path.name for path in out.parent.iterdir()} - {"out", "out.partial.txt"}:
            found.append(f"left over: {rest}")
    return found


def _wrong_files(out: Path, before: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """What is wrong with the files after a fault."""
    found = []
    if (out.parent / "out.partial.txt").read_text() != "precious":
        found.append("a file of the user's was changed")
    if out.exists() and sums(out) not in (before, wanted):
        found.append(f"the output is neither old nor complete: {_difference(sums(out), wanted)}")
    names = {path.name for path in out.parent.iterdir()} - {"out", "out.partial", "out.partial.txt"}
    if unknown := {name for name in names if not (before and name.startswith(".out.replaced-"))}:
        found.append(f"left over: {unknown}")
    return found


def _difference(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    return sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
