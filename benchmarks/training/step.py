"""Run some training steps of one contender and print how long they took. Started by benchmarks/train.py.

python step.py svdconvert|peft|trainer|dense|save OPTIONS-AS-JSON

`save` writes the batches of all steps to the file that the options name, for peers.py.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from marks import WARM, Mark, report
from peers import LR, peft_network, train_with
from torch import Tensor, nn
from torch.nn.functional import linear

from svdconvert.cli.process import configure_libraries, configure_malloc_for_training
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.train import TrainOptions
from svdconvert.layouts.base import LAYOUTS
from svdconvert.methods.base import METHODS
from svdconvert.training.data.dataset import TrainingData, open_training_data
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.model.adapted_linear import AdaptedLinear
from svdconvert.training.model.inject import inject_adapters
from svdconvert.training.model.load import load_network
from svdconvert.training.model.residuals import replace_weights
from svdconvert.training.optim.loop import StepLog, fit
from svdconvert.training.optim.step import Trainer
from svdconvert.training.start import open_training_start


def main() -> None:
    """Run the contender, and print what `report` says of its steps."""
    who, options = sys.argv[1], SimpleNamespace(**json.loads(sys.argv[2]))
    train_options = TrainOptions(
        data=options.data,
        split="train[:200]",
        steps=options.steps + WARM,
        batch_size=options.batch_size,
        max_length=options.max_length,
        precision=options.precision,
        lr=LR,
        schedule="constant",
        warmup=0.0,
    )
    data = open_training_data(Path(options.model), LAYOUTS.get("llama"), train_options)
    if who == "save":
        torch.save(list(batches(train_options, data)), options.batches)
        return
    contender: Callable[..., list[Mark]] = globals()[who]
    report(contender(options, train_options, data))


def svdconvert(options: Any, train_options: TrainOptions, data: TrainingData) -> list[Mark]:
    """Our own loop, with the memory settings of the program."""
    configure_libraries()
    configure_malloc_for_training()
    logs = fit(adapted_network(options), data.splits, data.objective, train_options)
    return [Mark(log.loss) for log in logs if isinstance(log, StepLog)]


def peft(options: Any, train_options: TrainOptions, data: TrainingData) -> list[Mark]:
    """PEFT's model in the training loop of its documentation, with the same precision and clipping."""
    model = peft_network(options)
    return _loop(model, train_options, batches(train_options, data), lambda: None)


def dense(options: Any, train_options: TrainOptions, data: TrainingData) -> list[Mark]:
    """SORSA as its authors implement it: a dense product in every forward pass, the penalty by autograd."""
    model = adapted_network(options)
    for path, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _Dense(module))
    penalised = [layer for layer in model.modules() if isinstance(layer, _Dense)]

    def penalty() -> None:
        norms = [norm for layer in penalised for norm in layer.norms()]
        (0.2 * torch.stack(norms).mean()).backward()

    return _loop(model, train_options, batches(train_options, data), penalty)


def trainer(options: Any, train_options: TrainOptions, data: TrainingData) -> list[Mark]:
    """PEFT's model under transformers' Trainer."""
    from transformers import Trainer as Theirs
    from transformers import TrainingArguments

    return train_with(Theirs, TrainingArguments, options, list(batches(train_options, data)))


def batches(train_options: TrainOptions, data: TrainingData) -> Iterator[dict[str, Tensor]]:
    """The rows of our own loop, padded and masked as the collators of transformers do."""
    alone: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    absent: Any = None
    ours = Trainer(absent, absent, absent, data.objective, train_options, alone)
    for step in range(1, train_options.total_steps(len(data.splits.train)) + 1):
        yield _collated(ours.examples_of(step, data.splits.train))


def _collated(rows: list[Example]) -> dict[str, Tensor]:
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([row.input_ids.long() for row in rows], batch_first=True)
    labels = pad_sequence([row.labels.long() for row in rows], batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _loop(
    model: nn.Module,
    train_options: TrainOptions,
    given: Iterator[dict[str, Tensor]],
    before_step: Callable[[], None],
) -> list[Mark]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train_options.lr or 0.0, weight_decay=0.0)
    marks = []
    for batch in given:
        with torch.autocast("cpu", torch.bfloat16, enabled=train_options.precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, train_options.clip)
        before_step()
        optimizer.step()
        optimizer.zero_grad()
        marks.append(Mark(loss.item()))
    return marks


def adapted_network(options: Any) -> nn.Module:
    split = SplitOptions(method=options.method, rank=options.rank)
    start = open_training_start(options.model, split, None, Run())
    dtype = None if options.precision == "bf16" else torch.float32
    network = load_network(start.weights, LAYOUTS.get(start.layout), dtype)
    replace_weights(network, start.residuals, start.matrices, start.network_paths())
    inject_adapters(network, start.scaled_factors(), METHODS.get(options.method).trains)
    return network


class _Dense(nn.Module):
    """y = x W^T + s x ((B S) A)^T, with the product of the factors computed first."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base, self.scale = layer.base, layer.scale
        for name in ("lora_A", "lora_B", "lora_S"):
            self.register_parameter(name, nn.Parameter(layer.factor(name).detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * linear(x, (self.lora_B * self.lora_S) @ self.lora_A)

    def norms(self) -> Iterator[Tensor]:
        """How far A and B are from orthonormal."""
        eye = torch.eye(len(self.lora_A))
        yield torch.linalg.matrix_norm(self.lora_A @ self.lora_A.T - eye)
        yield torch.linalg.matrix_norm(self.lora_B.T @ self.lora_B - eye)


if __name__ == "__main__":
    main()
