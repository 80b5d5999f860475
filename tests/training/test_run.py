"""Options that act on a run as a whole: gradient checkpointing, prompts in the loss, warnings."""

from pathlib import Path

import pytest

from svdconvert import Run, train
from tests.program import content, succeeded
from tests.stock import same_bytes, tensors
from tests.training.small_runs import LORA, json_lines, text_options


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_no_bit(precision: str, base: Path, tmp_path: Path) -> None:
    for name, on in (("plain", False), ("again", True)):
        arguments = {"gradient_checkpointing": on, "precision": precision, "dropout": 0.2}
        train(base, tmp_path / name, text_options(base, **arguments), Run(threads=1), split=LORA)
    assert same_bytes(tensors(tmp_path / "plain"), tensors(tmp_path / "again"))
    metrics = [content(tmp_path / name)["metrics.jsonl"] for name in ("plain", "again")]
    assert metrics[0] == metrics[1]


def test_prompts_can_be_in_the_loss_too(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "all", text_options(base, prompt_loss=True), split=LORA)
    train(base, tmp_path / "answers", text_options(base), split=LORA)
    tokens = [json_lines(tmp_path / name / "metrics.jsonl")[-2]["tokens"] for name in ("all", "answers")]
    assert int(str(tokens[0])) > 2 * int(str(tokens[1]))


def test_warnings_appear_on_the_command_line(base: Path, tmp_path: Path) -> None:
    arguments = ("--data", base.parent / "sums.jsonl", "--steps", 1, "--rank", 4)
    long = ("--max-length", 48, "--method", "milora", "--lr", 2e-5)
    said = succeeded("train", base, "-o", tmp_path / "out", *arguments, *long).err
    assert "is the rate of pissa" in said
    short = ("--template", "none", "--max-length", 10)
    said = succeeded("train", base, "-o", tmp_path / "other", *arguments, *short).err
    assert "rows are longer than --max-length 10 and are cut" in said
    assert "is the rate of" not in said
