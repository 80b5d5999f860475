"""One contender: some training steps, and how long they took. Started by benchmarks/train.py.

python step.py svdconvert|peft|trainer|dense OPTIONS-AS-JSON
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from svdconvert.cli.process import keep_freed_blocks, return_freed_matrices, use_huge_pages
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.train import TrainOptions
from svdconvert.layouts.base import LAYOUTS
from svdconvert.methods.base import METHODS
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.data.task import Task, open_training_data
from svdconvert.training.model.inject import install
from svdconvert.training.model.load import load_network, replace_weights
from svdconvert.training.optim.loop import StepLog, fit
from svdconvert.training.optim.step import Trainer
from svdconvert.training.start import open_training_start

WARM = 2
"""Steps that are not counted."""


def main() -> None:
    """Print {"step": median processor seconds, "loss": of the last step}."""
    who, options = sys.argv[1], SimpleNamespace(**json.loads(sys.argv[2]))
    plan = TrainOptions(
        data=options.data,
        split="train[:200]",
        steps=options.steps + WARM,
        batch_size=options.batch_size,
        max_length=options.max_length,
        precision=options.precision,
        lr=1e-4,
        schedule="constant",
        warmup=0.0,
    )
    task = open_training_data(Path(options.model), LAYOUTS.get("llama"), plan)
    contender: Callable[..., list[tuple[float, float]]] = globals()[who]
    marks = contender(options, plan, task)
    times = [b - a for (a, _), (b, _) in zip(marks[WARM - 1 :], marks[WARM:], strict=False)]
    print(json.dumps({"step": statistics.median(times), "loss": marks[-1][1]}))


def svdconvert(options: Any, plan: TrainOptions, task: Task) -> list[tuple[float, float]]:
    """(processor time so far, loss) behind every step; the memory is asked for as the program does it."""
    return_freed_matrices()
    keep_freed_blocks()
    use_huge_pages()
    logs = fit(_from_manifest(options), task.examples, task.objective, plan)
    return [(time.process_time(), log.loss) for log in logs if isinstance(log, StepLog)]


def peft(options: Any, plan: TrainOptions, task: Task) -> list[tuple[float, float]]:
    """PEFT's model in the loop that its documentation shows, with the same precision and clipping."""
    model = _peft(options)
    return _loop(model, plan, batches(plan, task), lambda: None)


def dense(options: Any, plan: TrainOptions, task: Task) -> list[tuple[float, float]]:
    """SORSA as its authors compute it: the dense product in every forward pass, the penalty by autograd."""
    model = _from_manifest(options)
    for path, module in list(model.named_modules()):
        if hasattr(module, "factors") and path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _Dense(module))
    penalised = [layer for layer in model.modules() if isinstance(layer, _Dense)]

    def penalty() -> None:
        norms = [norm for layer in penalised for norm in layer.norms()]
        (0.2 * torch.stack(norms).mean()).backward()

    return _loop(model, plan, batches(plan, task), penalty)


def trainer(options: Any, plan: TrainOptions, task: Task) -> list[tuple[float, float]]:
    """PEFT's model under transformers' Trainer."""
    from transformers import Trainer as Theirs
    from transformers import TrainerCallback, TrainingArguments

    marks: list[tuple[float, float]] = []
    given = list(batches(plan, task))

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if "loss" in logs:
                marks.append((time.process_time(), float(logs["loss"])))

    class Loop(Theirs):
        def get_train_dataloader(self) -> Any:
            return given

    arguments = TrainingArguments(
        "/nowhere",
        max_steps=plan.steps,
        learning_rate=plan.lr,
        bf16=options.precision == "bf16",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        lr_scheduler_type="constant",
        disable_tqdm=True,
    )
    Loop(_peft(options), arguments, callbacks=[Watch()]).train()
    return marks


def batches(plan: TrainOptions, task: Task) -> Iterator[dict[str, Tensor]]:
    """The rows that our own loop takes, padded and masked as the stock collators do."""
    alone: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    absent: Any = None
    ours = Trainer(absent, absent, absent, task.objective, plan, alone)
    for step in range(1, plan.total_steps(len(task.examples.train)) + 1):
        yield _collated(ours.rows_of(step, task.examples.train))


def _collated(rows: list[Example]) -> dict[str, Tensor]:
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([row.input_ids.long() for row in rows], batch_first=True)
    labels = pad_sequence([row.labels.long() for row in rows], batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _loop(
    model: nn.Module, plan: TrainOptions, given: Iterator[dict[str, Tensor]], before_step: Callable[[], None]
) -> list[tuple[float, float]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.lr or 0.0, weight_decay=0.0)
    marks = []
    for batch in given:
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, plan.clip)
        before_step()
        optimizer.step()
        optimizer.zero_grad()
        marks.append((time.process_time(), loss.item()))
    return marks


def _dtype(options: Any) -> Any:
    return "auto" if options.precision == "bf16" else torch.float32


def _from_manifest(options: Any) -> nn.Module:
    split = SplitOptions(method=options.method, rank=options.rank)
    start = open_training_start(options.model, split, None, Run())
    dtype = None if options.precision == "bf16" else torch.float32
    network = load_network(start.weights, LAYOUTS.get(start.layout), dtype)
    replace_weights(network, start.replaced)
    install(network, start.pieces(), METHODS.get(options.method).trains)
    return network


def _peft(options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=_dtype(options))
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        target_modules="all-linear",
        init_lora_weights="pissa_niter_4" if options.method == "pissa" else True,
    )
    return get_peft_model(model, config)


class _Dense(nn.Module):
    """y = x W^T + s x ((B S) A)^T, the product built first."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base, self.scale = layer.base, layer.scale
        for name in ("lora_A", "lora_B", "lora_S"):
            self.register_parameter(name, nn.Parameter(layer.get(name).detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * linear(x, (self.lora_B * self.lora_S) @ self.lora_A)

    def norms(self) -> Iterator[Tensor]:
        """How far A and B are from orthonormal."""
        eye = torch.eye(len(self.lora_A))
        yield torch.linalg.matrix_norm(self.lora_A @ self.lora_A.T - eye)
        yield torch.linalg.matrix_norm(self.lora_B.T @ self.lora_B - eye)


if __name__ == "__main__":
    main()
