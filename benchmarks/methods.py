"""Every method on the same rows: the loss against the steps, at its own rate and at one rate for all.

    python benchmarks/methods.py --model DIR --data FILE --out DIR [--steps 16] [--only pissa,lora]

Writes metrics.jsonl (a line a curve), loss.png (matplotlib) and README.md (a table) into OUT. The model is in
memory once at a time; rows, their order, steps, batch, rank and schedule are the same for all.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svdconvert.artifact.options import SplitOptions
from svdconvert.hub.begin import find_start
from svdconvert.hub.locate import open_home
from svdconvert.layout import LAYOUTS, find_layout
from svdconvert.method import METHODS
from svdconvert.run import Run
from svdconvert.training.install import install, trainable_count
from svdconvert.training.loop import StepLog, fit
from svdconvert.training.network import load_network, replace_weights
from svdconvert.training.plan import TrainPlan
from svdconvert.training.settle import settled
from svdconvert.training.task import Task, open_task

COMMON = 2e-4
FULL = 2e-5
"""The rate of full fine-tuning, as PiSSA and SORSA train it."""
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


TEXT = """# The methods side by side

Made by `python benchmarks/methods.py --model DIR --data FILE --out DIR --steps {steps} --rank {rank}
--batch-size {batch_size} --max-length {max_length} --seed {seed}`.

![loss against steps](loss.png)

| method | rate | values trained | held-out loss before | after | mean loss of the last 4 steps |
|---|---|---|---|---|---|
{rows}

Rows of more than {max_length} tokens are left out; the others are the same, in the same order, for every
method: {steps} steps of {batch_size} rows, one seed, a constant rate after a short warm-up, bf16 where the
processor multiplies it. `full` trains the matrices that the others adapt, in float32 under the same autocast.

What it shows: that every method trains, from which loss it starts (all from the model's own), and how far a
few steps take it at either rate. What it does not show: which method is best. A few steps of one seed on one
small model say nothing about the end of a training, no answer was graded, and every method's published rate
belongs to larger models, larger batches and hundreds of steps.
"""


@dataclass(frozen=True)
class Case:
    """One curve."""

    name: str
    rate: float
    common: bool
    """True where the rate is that of all."""
    trained: int
    losses: list[float]
    held_out: tuple[float, float]
    seconds: float
    """Of a step, the median."""


def main() -> None:
    """Train every method twice, and write what was seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(CASES), help="methods by commas")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cases = []
    with (arguments.out / "metrics.jsonl").open("w") as lines:
        for name in arguments.only.split(","):
            for rate, common in ((_own_rate(name), False), (COMMON, True)):
                if common and rate == _own_rate(name):
                    continue  # the same curve again
                cases.append(_train(arguments, name, rate, common))
                lines.write(json.dumps(asdict(cases[-1])) + "\n")
                lines.flush()
                print(_row(cases[-1]), flush=True)
    (arguments.out / "README.md").write_text(_text(arguments, cases))
    draw(cases, arguments.out / "loss.png")


def _own_rate(name: str) -> float:
    method = CASES[name][0]
    return FULL if method == "full" else METHODS.get(method).learning_rate


def _plan(arguments: argparse.Namespace, rate: float) -> TrainPlan:
    return TrainPlan(
        data=arguments.data,
        split="train[:600]",
        eval_rows=40,
        max_length=arguments.max_length,
        too_long="drop",
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        lr=rate,
        schedule="constant",
        warmup=0.1,
        seed=arguments.seed,
    )


def _train(arguments: argparse.Namespace, name: str, rate: float, common: bool) -> Case:
    method, init = CASES[name]
    plan = _plan(arguments, rate)
    layout = find_layout(None, open_home(arguments.model).config.get("model_type"), arguments.model)[1]
    task = open_task(Path(arguments.model), layout, plan)
    if method == "full":
        network = _full(arguments, layout)
    else:
        network = _adapted(arguments, method, init)
        plan = settled(plan, METHODS.get(method).started(init), 0.0, print)
    return _measured(
        Case(name, rate, common, trainable_count(network), [], (0.0, 0.0), 0.0), network, task, plan
    )


def _measured(case: Case, network: nn.Module, task: Task, plan: TrainPlan) -> Case:
    losses, held_out, marks = [], [], [time.perf_counter()]
    for log in fit(network, task.examples, task.objective, plan):
        if isinstance(log, StepLog):
            losses.append(log.loss)
            marks.append(time.perf_counter())
        else:
            held_out.append(log.eval_loss)
            marks[-1] = time.perf_counter()
    times = sorted(b - a for a, b in zip(marks, marks[1:], strict=False))
    return Case(
        case.name,
        case.rate,
        case.common,
        case.trained,
        losses,
        (held_out[0], held_out[-1]),
        times[len(times) // 2],
    )


def _adapted(arguments: argparse.Namespace, method: str, init: str | None) -> nn.Module:
    split = SplitOptions(method=method, init=init, rank=arguments.rank, seed=arguments.seed)
    start = find_start(arguments.model, split, None, Run())
    network = load_network(start.weights, LAYOUTS.get(start.layout), None)
    replace_weights(network, start.replaced)
    install(network, start.pieces(), METHODS.get(method).started(init).trains)
    return network


def _full(arguments: argparse.Namespace, layout: Any) -> nn.Module:
    """The matrices that the others adapt, trained themselves, in float32."""
    network = load_network(Path(arguments.model), layout, torch.float32)
    network.requires_grad_(False)
    for slot in layout.slots(open_home(arguments.model).source.infos).values():
        network.get_submodule(slot.module).requires_grad_(True)
    return network


def _text(arguments: argparse.Namespace, cases: list[Case]) -> str:
    return TEXT.format(**vars(arguments), rows="\n".join(map(_row, cases)))


def _row(case: Case) -> str:
    last = case.losses[-4:]
    cells = (
        case.name,
        f"{case.rate:g}" + (" (common)" if case.common else ""),
        f"{case.trained:,}",
        *(f"{loss:.4f}" for loss in (*case.held_out, sum(last) / len(last))),
    )
    return f"| {' | '.join(cells)} |"


def draw(cases: list[Case], path: Path) -> None:
    """Two panels: every method at its own rate, and at that of all."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    titles = ("each at its own rate", f"all at {COMMON:g}")
    for panel, common, title in zip(panels, (False, True), titles, strict=True):
        for case in _shown(cases, common):
            smooth = [
                sum(case.losses[max(0, n - 3) : n + 1]) / min(4, n + 1) for n in range(len(case.losses))
            ]
            panel.plot(range(1, len(smooth) + 1), smooth, label=f"{case.name}, {case.rate:g}", linewidth=1.4)
        panel.set(title=title, xlabel="step", ylabel="" if common else "loss, mean of the last 4 steps")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def _shown(cases: list[Case], common: bool) -> Iterator[Case]:
    return (case for case in cases if case.common == common or (common and case.rate == COMMON))


if __name__ == "__main__":
    main()
