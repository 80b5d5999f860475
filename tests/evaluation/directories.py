"""Tiny models that answer GSM8K's prompt, and directories of every kind that are made of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from svdconvert import EvaluationOptions, Run, evaluate
from svdconvert.manifest.evaluations import EvaluationResult
from tests import tiny
from tests.reading import WORDS, tokenizer_of

WORD_OF_TOKEN = [*WORDS, *(f"w{number}" for number in range(tiny.VOCABULARY - len(WORDS)))]
"""Every token of a model is a word, so that no token is lost in the text of an answer."""
CPU = Run(device="cpu", threads=1)
NUMBERS = ("one", "1 + 2", "7", "3 + 4 + 5", "what is 9 ?", "8 = 8")


def lively(directory: Path) -> Path:
    """A random Llama with such large weights that its answers vary, and a tokenizer."""
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**tiny.TEXT, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.6)
    network.save_pretrained(directory)
    tokenizer_of(WORD_OF_TOKEN).save_pretrained(directory)
    return directory


def write_questions(path: Path, count: int = 6) -> Path:
    """Rows with GSM8K's fields."""
    rows = [
        {"question": NUMBERS[number % len(NUMBERS)], "answer": f"sum\n#### {number}"}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers_in(folder: Path, task: str = "gsm8k") -> list[dict[str, Any]]:
    """The lines of a file of answers."""
    return [json.loads(line) for line in (folder / "evaluations" / f"{task}.jsonl").read_text().splitlines()]


def asked(
    model: Path, data: Path, output: Path, tasks: Sequence[str] = ("gsm8k",), run: Run = CPU, **given: Any
) -> EvaluationResult:
    """The result of a model in float32, in `output`."""
    where = {name: given.pop(name) for name in ("base", "residual") if name in given}
    options = {"data": str(data), "dtype": "float32", "batch_size": 4, "max_new_tokens": 12, **given}
    (result,) = evaluate(model, tasks, EvaluationOptions(**options), run, output=output, **where)
    return result


def answers(model: Path, data: Path, output: Path, **given: Any) -> list[str]:
    """What a model answers in float32, row by row."""
    asked(model, data, output, **given)
    return [line["answer"] for line in answers_in(output)]
