"""Compare `svdconvert eval` with lm-evaluation-harness' HFLM: the same prompts, stop strings and limit.

    python benchmarks/evaluation.py --model DIR --data FILE [--limit 64] [--max-new-tokens 256] [--repeat 3]

FILE holds rows of GSM8K. Every contender runs in a separate process, in turn, with the model in float32. The
seconds are those from the prompts to the answers, without loading, elapsed and of the processor, which a busy
machine disturbs less; of several rounds the median. HFLM answers in batches of 1, which is its default, 4, 16
and 64; ours with its own default. Answers that differ from ours are counted: batches change sums of float32 in
their last bits, which a near tie turns into another word. Needs `pip install "svdconvert[eval]"`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from measure import Measured, in_turn, run
from rich.console import Console
from rich.table import Table

HARNESS = "lm-evaluation-harness"
MARKS = {"of its best": 1.5, "of its default": 3.0}
console = Console(width=110)


def main() -> None:
    """Print the table, and whether the marks are reached."""
    arguments = read_arguments()
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    names = ["svdconvert", *(f"{HARNESS} {size}" for size in arguments.batches.split(","))]
    runs = {name: partial(start, arguments, name) for name in names}
    found = {
        name: [said(one) for one in measured] for name, measured in in_turn(runs, arguments.repeat).items()
    }
    seconds = medians(found, "seconds")
    processor = medians(found, "processor")
    own = found["svdconvert"][0]["answers"]
    table = Table(
        "who",
        "batch",
        "seconds",
        "of the processor",
        "rows a minute",
        "tokens a second",
        "peak memory",
        "other answers",
    )
    for name, them in found.items():
        one = them[0]
        differing = sum(a != b for a, b in zip(own, one["answers"], strict=True))
        table.add_row(
            name.split()[0],
            str(one["batch"]),
            f"{seconds[name]:.1f}",
            f"{processor[name]:.1f}",
            f"{60 * len(own) / seconds[name]:.1f}",
            f"{one['tokens'] / seconds[name]:.0f}",
            f"{max(each['memory'] for each in them) / 1e6:.0f} MB",
            "-" if name == "svdconvert" else f"{differing} of {len(own)}",
        )
    console.print(table)
    others = {name: value for name, value in seconds.items() if name != "svdconvert"}
    best = min(others, key=lambda name: others[name])
    default = f"{HARNESS} 1" if f"{HARNESS} 1" in others else best
    for name, mark in ((best, MARKS["of its best"]), (default, MARKS["of its default"])):
        times = others[name] / seconds["svdconvert"]
        by_processor = processor[name] / processor["svdconvert"]
        console.print(
            f"{times:.2f} times the speed of {name} ({by_processor:.2f} by processor time); the mark is {mark}"
        )


def medians(found: dict[str, list[dict[str, Any]]], what: str) -> dict[str, float]:
    """Name -> the median over the rounds."""
    return {name: statistics.median(one[what] for one in them) for name, them in found.items()}


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a directory with a causal model and its tokenizer")
    parser.add_argument("--data", required=True, help="rows of GSM8K, such as recipes/demo/gsm8k-train.jsonl")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--stop", action="append", default=[], help="a stop string; may be repeated")
    parser.add_argument("--batches", default="1,4,16,64", help="batch sizes of the harness")
    parser.add_argument("--own-batch", type=int, help="our batch size, if not the default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def start(arguments: argparse.Namespace, name: str) -> Measured:
    """Run one contender in a process of its own."""
    passed = ("model", "data", "limit", "max_new_tokens", "threads", "own_batch")
    given = {word: getattr(arguments, word) for word in passed}
    words = [[f"--{word.replace('_', '-')}", value] for word, value in given.items() if value is not None]
    words += [["--stop", stop] for stop in arguments.stop]
    command = [sys.executable, __file__, "--child", name, *(word for pair in words for word in pair)]
    return run(command, arguments.threads)


def said(measured: Measured) -> dict[str, Any]:
    """What a process printed in its last line, and the peak of its memory."""
    found: dict[str, Any] = json.loads(measured.output.splitlines()[-1])
    return found | {"memory": measured.memory}


class Clocks:
    """The time since its creation."""

    def __init__(self) -> None:
        self._elapsed = time.perf_counter()
        self._processor = time.process_time()

    def spent(self) -> dict[str, float]:
        """{"seconds": elapsed, "processor": of all threads of this process}."""
        return {
            "seconds": time.perf_counter() - self._elapsed,
            "processor": time.process_time() - self._processor,
        }


def child(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer the questions; {"seconds", "processor", "batch", "tokens", "answers"}."""
    import torch

    torch.set_num_threads(arguments.threads)
    who, _, size = arguments.child.partition(" ")
    return own(arguments) if who == "svdconvert" else harness(arguments, int(size))


def own(arguments: argparse.Namespace) -> dict[str, Any]:
    """The answers of svdconvert."""
    from svdconvert import EvaluationOptions, Run
    from svdconvert.evaluation.asking import Answering
    from svdconvert.evaluation.base import Limits, tasks_named
    from svdconvert.evaluation.loading import open_answering
    from svdconvert.evaluation.questions import read_questions
    from svdconvert.evaluation.run import CodeRunner, evaluate_task
    from svdconvert.evaluation.store import TaskFiles

    options = EvaluationOptions(dtype="float32", batch_size=arguments.own_batch)
    settings = Run(device="cpu", threads=arguments.threads)
    limits = Limits(max_new_tokens=arguments.max_new_tokens, stops=tuple(arguments.stop))
    task = replace(tasks_named(["gsm8k"])[0], limits={"strict": limits, "paper": limits})
    questions = read_questions(task, arguments.data, arguments.limit)
    model = Answering(open_answering(arguments.model, settings), options, settings)
    assert model.network is not None and model.tokenizer is not None, "both are loaded now"
    with tempfile.TemporaryDirectory() as scratch:
        files = TaskFiles(Path(scratch), task.name)
        clocks = Clocks()
        result = evaluate_task(model, questions, files, CodeRunner())
        spent = clocks.spent()
        answers = [one.answer for one in files.read_answers()]
    batch = result.options["batch_size"]
    return {**spent, "batch": batch, "tokens": result.tokens, "answers": answers}


def harness(arguments: argparse.Namespace, size: int) -> dict[str, Any]:
    """The answers of lm-evaluation-harness."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from svdconvert.evaluation.base import tasks_named
    from svdconvert.evaluation.questions import read_questions

    network = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=size)
    rows = read_questions(tasks_named(["gsm8k"])[0], arguments.data, arguments.limit).rows
    settings = {"until": arguments.stop, "max_gen_toks": arguments.max_new_tokens, "do_sample": False}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(row.prompt, dict(settings)), idx=number)
        for number, row in enumerate(rows)
    ]
    clocks = Clocks()
    answers = model.generate_until(requests, disable_tqdm=True)
    spent = clocks.spent()
    tokens = sum(len(tokenizer(answer)["input_ids"]) for answer in answers)
    return {**spent, "batch": size, "tokens": tokens, "answers": answers}


if __name__ == "__main__":
    main()
