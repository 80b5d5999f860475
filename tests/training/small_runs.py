"""Train adapters of a tiny model for a few steps, on random tokens or on texts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from svdconvert.config.options import SplitOptions
from svdconvert.config.train import TrainOptions
from svdconvert.linalg.factors import Factors
from svdconvert.training.data.dataset import DataSplits
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.model.inject import extract_factors, inject_adapters
from svdconvert.training.optim.loop import EvalLog, StepLog, fit
from svdconvert.training.optim.objective import NextToken

MakeModel = Callable[..., LlamaForCausalLM]
OPTIONS = TrainOptions(lr=1e-2, steps=4, batch_size=4, precision="fp32", device="cpu", warmup=0.0)
TEXT_OPTIONS: dict[str, Any] = {
    "steps": 4,
    "batch_size": 2,
    "max_length": 48,
    "lr": 1e-2,
    "eval_rows": 3,
    "eval_every": 2,
}
LORA = SplitOptions(method="lora", rank=4)
BOTH = frozenset({"lora_A", "lora_B"})


def examples(count: int, seed: int = 0) -> list[Example]:
    """Rows of 5 to 12 tokens, of which the first 2 to 4 are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(5, 13, (), generator=generator))
        ids = torch.randint(3, 20, (length,), generator=generator, dtype=torch.int32)
        labels = ids.clone()
        labels[: int(torch.randint(2, 5, (), generator=generator))] = IGNORED
        made.append(Example(ids, labels))
    return made


def adapted(model: LlamaForCausalLM, dropout: float = 0.0) -> LlamaForCausalLM:
    generator = torch.Generator().manual_seed(1)
    pieces = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            left = torch.randn(module.out_features, 4, generator=generator) * 0.1
            right = torch.randn(4, module.in_features, generator=generator) * 0.1
            pieces[path] = (Factors(left, right), 1.0)
    inject_adapters(model, pieces, BOTH, dropout)
    return model


def run(model: LlamaForCausalLM, options: TrainOptions = OPTIONS, **given: Any) -> list[StepLog | EvalLog]:
    """Train `model` and return its measurements; keywords: train, held_out, pad_id and checkpoints."""
    splits = DataSplits(given.get("train", examples(12)), given.get("held_out", []))
    objective = NextToken(given.get("pad_id", 2))
    return list(fit(model, splits, objective, options, None, given.get("checkpoints")))


def losses(logs: list[StepLog | EvalLog]) -> list[float]:
    return [log.loss for log in logs if isinstance(log, StepLog)]


def held_out_losses(logs: list[StepLog | EvalLog]) -> dict[int, float]:
    return {log.step: log.eval_loss for log in logs if isinstance(log, EvalLog)}


def weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{name}": t for path, f in extract_factors(model).items() for name, t in f.pieces().items()
    }


def text_options(base: Path, **changes: Any) -> TrainOptions:
    """Options for a few steps on the data next to the fixture `base`."""
    return TrainOptions(**{"data": str(base.parent / "sums.jsonl"), **TEXT_OPTIONS, **changes})


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
