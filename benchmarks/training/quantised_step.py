"""Train a LoRA on random tokens and print what a step took. Started by benchmarks/quantised.py step.

python quantised_step.py MODEL RANK STEPS TOKENS, with MODEL plain or what `decompose` wrote
"""

import sys

import torch
from marks import WARM, Mark, report

from svdconvert.cli.process import configure_libraries, configure_malloc_for_training
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.train import TrainOptions
from svdconvert.inputs.model import open_model
from svdconvert.layouts.base import LAYOUTS
from svdconvert.manifest.schema import has_manifest
from svdconvert.methods.base import METHODS
from svdconvert.training.data.dataset import DataSplits
from svdconvert.training.data.example import Example
from svdconvert.training.model.inject import inject_adapters
from svdconvert.training.model.load import load_network
from svdconvert.training.optim.loop import StepLog, fit
from svdconvert.training.optim.objective import NextToken
from svdconvert.training.start import AdapterStart, open_training_start


def main() -> None:
    """Train, and print what `report` says of the steps."""
    configure_libraries()
    configure_malloc_for_training()
    model = sys.argv[1]
    rank, steps, length = (int(word) for word in sys.argv[2:5])
    split = SplitOptions() if has_manifest(open_model(model).path) else SplitOptions(method="lora", rank=rank)
    start = open_training_start(model, split, None, Run())
    assert isinstance(start, AdapterStart)
    network = load_network(start.weights, LAYOUTS.get(start.layout), None)
    inject_adapters(network, start.scaled_factors(), METHODS.get(start.method).trains)
    options = TrainOptions(
        steps=steps + WARM, batch_size=1, precision="bf16", lr=1e-4, schedule="constant", warmup=0.0
    )
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 2000, (length,), generator=generator, dtype=torch.int32) for _ in range(8)]
    splits = DataSplits([Example(row, row) for row in rows], [])
    report(
        [Mark(log.loss) for log in fit(network, splits, NextToken(0), options) if isinstance(log, StepLog)]
    )


if __name__ == "__main__":
    main()
