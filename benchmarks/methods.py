"""Train every method on the same rows: loss against steps, at the method's learning rate and at a common one.

    python benchmarks/methods.py --model DIR --data FILE --out DIR [--steps 32] [--seeds 0,1,2] [--only pissa]

Writes metrics.jsonl (one line per curve), loss.png (matplotlib) and README.md (a table) into OUT. Only one
model is in memory at a time. Steps, batch size, rank and schedule are the same for all methods, and for one
seed so are the rows and their order.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.train import TrainOptions
from svdconvert.inputs.model import open_model
from svdconvert.layouts.base import LAYOUTS
from svdconvert.layouts.detect import find_layout
from svdconvert.methods.base import METHODS
from svdconvert.training.data.dataset import TrainingData, open_training_data
from svdconvert.training.model.inject import inject_adapters, trainable_count
from svdconvert.training.model.load import load_network
from svdconvert.training.model.residuals import replace_weights
from svdconvert.training.optim.loop import StepLog, fit
from svdconvert.training.resolve_defaults import resolve_defaults
from svdconvert.training.start import open_training_start

COMMON = 2e-4
HELD_OUT = 40
FULL = 2e-5
"""The learning rate of full fine-tuning in the papers of PiSSA and SORSA."""
CASES: dict[str, tuple[str, str | None]] = {
    "lora": ("lora", None),
    "lora-fa random": ("lora-fa", "random"),
    "lora-fa svd": ("lora-fa", "svd"),
    "pissa": ("pissa", None),
    "milora": ("milora", None),
    "sorsa": ("sorsa", None),
    "olora": ("olora", None),
    "full": ("full", None),
}
"""Name -> (method, init)."""


TEXT = """# Methods compared

Made by `python benchmarks/methods.py --model DIR --data FILE --out DIR --steps {steps} --rank {rank}
--batch-size {batch_size} --max-length {max_length} --seeds {seeds}`.

![loss against steps](loss.png)

| method | rate | values trained | held-out loss before | after | mean loss of the last 8 steps |
|---|---|---|---|---|---|
{rows}

Every figure is the mean over the seeds {seeds}; ± is half the distance between the smallest and the largest.
The seed determines the order of the rows and the random numbers of a method, in the same way for all methods.
The {held_out} held-out rows are the same for all. Rows of more than {max_length} tokens are left out.
A curve is {steps} steps of {batch_size} rows with a constant learning rate after a short warm-up, in bfloat16
if the processor multiplies it. `full` trains the matrices that the other methods adapt, in float32 under the
same autocast.

What it shows: every method trains; the loss it starts from (always the model's own); and how far a few steps
take it at either rate. What it does not show: which method is best. A few steps with few seeds on one small
model say nothing about the end of a training, no answer was graded, and every method's published rate
belongs to larger models, larger batches and hundreds of steps.
"""


@dataclass(frozen=True)
class Case:
    """One curve."""

    name: str
    rate: float
    common: bool
    """True if the learning rate is the common one."""
    seed: int
    trained: int
    losses: list[float]
    held_out: tuple[float, float]
    seconds: float
    """Processor time of a step, the median."""


def main() -> None:
    """Train every method at both learning rates, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=144)
    parser.add_argument("--seeds", default="0,1,2", help="numbers by commas")
    parser.add_argument("--only", default=",".join(CASES), help="methods by commas")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cases = []
    with (arguments.out / "metrics.jsonl").open("w") as lines:
        for seed in map(int, arguments.seeds.split(",")):
            for name in arguments.only.split(","):
                # If the method's rate is the common one, the second curve would be the same.
                for rate in dict.fromkeys((_own_rate(name), COMMON)):
                    cases.append(_train(arguments, seed, name, rate))
                    lines.write(json.dumps(asdict(cases[-1])) + "\n")
                    lines.flush()
                    print(_row(cases[-1:]), flush=True)
    (arguments.out / "README.md").write_text(_text(arguments, cases))
    draw(cases, arguments.out / "loss.png")


def _own_rate(name: str) -> float:
    method = CASES[name][0]
    return FULL if method == "full" else METHODS.get(method).learning_rate


def _options(arguments: argparse.Namespace, seed: int, rate: float) -> TrainOptions:
    return TrainOptions(
        data=arguments.data,
        split="train[:600]",
        eval_rows=HELD_OUT,
        max_length=arguments.max_length,
        too_long="drop",
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        lr=rate,
        schedule="constant",
        warmup=0.1,
        seed=seed,
    )


def _train(arguments: argparse.Namespace, seed: int, name: str, rate: float) -> Case:
    method, init = CASES[name]
    options = _options(arguments, seed, rate)
    layout = find_layout(None, open_model(arguments.model).config.get("model_type"), arguments.model)[1]
    data = open_training_data(Path(arguments.model), layout, options)
    if method == "full":
        network = _full(arguments, layout)
    else:
        network = _adapted(arguments, seed, method, init)
        options = resolve_defaults(options, METHODS.get(method).variant(init), 0.0, print)
    curve = _curve(network, data, options)
    return Case(name, rate, rate != _own_rate(name), seed, trainable_count(network), *curve)


def _curve(
    network: nn.Module, data: TrainingData, options: TrainOptions
) -> tuple[list[float], tuple[float, float], float]:
    """(losses, held-out loss before and after, median processor time of a step)."""
    losses, held_out, times, mark = [], [], [], time.process_time()
    for log in fit(network, data.splits, data.objective, options):
        if isinstance(log, StepLog):
            losses.append(log.loss)
            times.append(time.process_time() - mark)
        else:
            held_out.append(log.eval_loss)
        mark = time.process_time()
    return losses, (held_out[0], held_out[-1]), statistics.median(times)


def _adapted(arguments: argparse.Namespace, seed: int, method: str, init: str | None) -> nn.Module:
    split = SplitOptions(method=method, init=init, rank=arguments.rank, seed=seed)
    start = open_training_start(arguments.model, split, None, Run())
    network = load_network(start.weights, LAYOUTS.get(start.layout), None)
    replace_weights(network, start.residuals, start.matrices, start.network_paths())
    inject_adapters(network, start.scaled_factors(), METHODS.get(method).variant(init).trains)
    return network


def _full(arguments: argparse.Namespace, layout: Any) -> nn.Module:
    """A network in which the matrices that the other methods adapt are trained, in float32."""
    network = load_network(Path(arguments.model), layout, torch.float32)
    network.requires_grad_(False)
    for slot in layout.slots(open_model(arguments.model).source.infos).values():
        network.get_submodule(slot.module).requires_grad_(True)
    return network


def _text(arguments: argparse.Namespace, cases: list[Case]) -> str:
    return TEXT.format(**vars(arguments), held_out=HELD_OUT, rows="\n".join(map(_row, _by_curve(cases))))


def _by_curve(cases: list[Case]) -> list[list[Case]]:
    """The cases that differ only in their seed, as one list each."""
    order = list(CASES)
    ordered = sorted(cases, key=lambda case: (order.index(case.name), case.common, case.seed))
    return [list(seeds) for _, seeds in groupby(ordered, lambda case: (case.name, case.rate))]


def _row(seeds: list[Case]) -> str:
    case = seeds[0]
    cells = (
        case.name,
        f"{case.rate:g}" + (" (common)" if case.common else ""),
        f"{case.trained:,}",
        _spread([case.held_out[0] for case in seeds]),
        _spread([case.held_out[1] for case in seeds]),
        _spread([statistics.mean(case.losses[-8:]) for case in seeds]),
    )
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def draw(cases: list[Case], path: Path) -> None:
    """Draw every method at its own and at the common learning rate, as means over the seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    titles = ("each at its own rate", f"all at {COMMON:g}")
    for panel, common, title in zip(panels, (False, True), titles, strict=True):
        for seeds in _by_curve(cases):
            case = seeds[0]
            if not (case.rate == COMMON if common else not case.common):
                continue
            means = [statistics.mean(losses) for losses in zip(*(each.losses for each in seeds), strict=True)]
            smooth = [statistics.mean(means[max(0, step - 3) : step + 1]) for step in range(len(means))]
            # The same colour in both panels.
            colour = f"C{list(CASES).index(case.name)}"
            panel.plot(range(1, len(smooth) + 1), smooth, colour, label=f"{case.name}, {case.rate:g}")
        panel.set(title=title, xlabel="step", ylabel="" if common else "loss, mean of the last 4 steps")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
