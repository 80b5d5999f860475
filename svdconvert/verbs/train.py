"""svdconvert train: an initial adapter becomes a trained one."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from svdconvert.adapters.peft_format import CONFIG, PER_EXPERT, WEIGHTS
from svdconvert.artifact.manifest import Manifest, is_ours, read_manifest
from svdconvert.artifact.options import SplitOptions
from svdconvert.artifact.split import plan_split
from svdconvert.artifact.start import (
    Start,
    plan_adapter,
    start_from_decomposed,
    start_from_plain,
    write_adapter,
)
from svdconvert.checkpoint.writer import StagedOutput, check_apart, check_free
from svdconvert.errors import ArtifactError
from svdconvert.hub.fetch import fetch
from svdconvert.hub.locate import locate, open_home
from svdconvert.layout import find_layout
from svdconvert.linalg.compute import use_threads
from svdconvert.method import METHODS, init_folder
from svdconvert.run import Run
from svdconvert.training.data import load_examples, padding_id
from svdconvert.training.install import harvest, install
from svdconvert.training.loop import EvalLog, StepLog, fit, make_accelerator
from svdconvert.training.network import load_network, load_tokenizer, replace_weights
from svdconvert.training.plan import TrainPlan

Watch = Callable[[StepLog | EvalLog, int], None]
"""Told of every step and held-out loss, with the number of steps in all."""
METRICS = "metrics.jsonl"


def unwatched(log: StepLog | EvalLog, steps: int) -> None:
    """The watcher that looks away."""


def train(  # noqa: PLR0913 (what starts it, what trains it, who watches)
    model: str | Path,
    out: str | Path,
    plan: TrainPlan,
    run: Run | None = None,
    *,
    split: SplitOptions | None = None,
    base: str | None = None,
    watch: Watch = unwatched,
) -> Manifest:
    """Train the adapter of a DECOMPOSED directory, or one that `split` starts on a plain `model`.

    Writes the trained adapter, the untouched initial one and metrics.jsonl to `out`. `base` says
    where the base is, for methods that leave it as it is. Raises SvdConvertError with one sentence.
    """
    run, target = run or Run(), Path(out)
    run.ranks.alone("train")
    check_free(target, overwrite=run.overwrite)
    threads = use_threads(run.threads)
    start = _start(str(model), split or SplitOptions(), base, run)
    check_apart(target, start.weights, Path(model) if Path(model).exists() else None)
    plan = plan.with_rate(METHODS.get(start.method).learning_rate)
    tokenizer = load_tokenizer(start.weights, trust_remote_code=run.trust_remote_code)
    examples = load_examples(plan, tokenizer)
    if examples.dropped:
        run.say(f"{examples.dropped} rows are left out: nothing to learn within max_length {plan.max_length}")
    folder = init_folder(start.method)
    initial = plan_adapter(f"{folder}/{WEIGHTS}", start.factors)
    trained = plan_adapter(WEIGHTS, start.factors, torch.float32)
    with StagedOutput(
        target, [trained, initial], identity={"verb": "train"}, overwrite=run.overwrite
    ) as staged:
        accelerator = make_accelerator(plan)
        network = _network(start, plan, accelerator.mixed_precision, run)
        logs = fit(network, examples.train, examples.held_out, plan, accelerator, padding_id(tokenizer))
        steps = plan.total_steps(len(examples.train), accelerator.num_processes)
        _log(logs, staged.path / METRICS, steps, watch)
        files = {
            initial.path: write_adapter(staged, initial, start.factors),
            trained.path: write_adapter(staged, trained, harvest(network)),
        }
        (staged.path / CONFIG).write_text(replace(start.config, base=_hub_weights(start)).text())
        (staged.path / folder / CONFIG).write_text(start.config.text())
        return _manifest(start, plan, files, threads).write(staged.path)


def _manifest(
    start: Start, plan: TrainPlan, files: Mapping[str, Mapping[str, str]], threads: int
) -> Manifest:
    return Manifest(
        kind="trained",
        layout=start.layout,
        method=start.method,
        base=start.base,
        residual=start.residual,
        options=asdict(plan),
        matrices=start.matrices,
        files=files,
        threads=threads,
    )


def _start(model: str, split: SplitOptions, base: str | None, run: Run) -> Start:
    start = _found_start(model, split, base, run)
    if start.config.peft_type == PER_EXPERT:
        raise ArtifactError(
            f"{model} adapts experts one by one, which transformers fuses at run time, beyond the trainer; "
            "decompose with --targets attn, or train it elsewhere"
        )
    return start


def _found_start(model: str, split: SplitOptions, base: str | None, run: Run) -> Start:
    snapshot = fetch(model)
    if not is_ours(snapshot.path) or read_manifest(snapshot.path).kind == "merged":
        home = open_home(model)
        name, layout = find_layout(split.layout, home.config.get("model_type"), str(home.path))
        return start_from_plain(
            plan_split(home.source, name, layout, split), home.source, home.path, home.origin(), run.track
        )
    manifest = read_manifest(snapshot.path)
    if manifest.kind != "decomposed":
        raise ArtifactError(
            f"{snapshot.path} is a {manifest.kind} directory; train wants what decompose wrote, or a model"
        )
    if METHODS.get(manifest.method).residual:
        home = open_home(model)
        return start_from_decomposed(home.path, manifest, home.path, home.origin(manifest.checksums))
    found = locate(manifest.base, base)
    if found is None:
        place = manifest.base.location if manifest.base else "unknown"
        raise ArtifactError(
            f"the base of {snapshot.path} is not at hand ({place}); say where it is with --base"
        )
    return start_from_decomposed(snapshot.path, manifest, found.path, None)


def _network(start: Start, plan: TrainPlan, autocast: str, run: Run) -> nn.Module:
    # Under autocast the frozen weights stay as they are stored; without it all is float32.
    dtype = torch.float32 if autocast == "no" else None
    network = load_network(start.weights, dtype, trust_remote_code=run.trust_remote_code)
    replace_weights(network, start.replaced)
    install(network, start.pieces(), METHODS.get(start.method).trains, plan.dropout)
    return network


def _log(logs: Iterator[StepLog | EvalLog], metrics: Path, steps: int, watch: Watch) -> None:
    """Write every log as a line of JSON, as it comes."""
    with metrics.open("w", encoding="utf-8") as lines:
        for log in logs:
            lines.write(json.dumps(asdict(log)) + "\n")
            lines.flush()
            watch(log, steps)


def _hub_weights(start: Start) -> str | None:
    """The repository of the weights that the adapter belongs to, where they have one."""
    origin = start.residual or start.base
    return origin.location if origin and origin.revision else None
