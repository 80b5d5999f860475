"""svdconvert train: an initial adapter becomes a trained one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svdconvert.adapters.peft_format import CONFIG, WEIGHTS
from svdconvert.artifact.fingerprint import checksum, digest
from svdconvert.artifact.manifest import Manifest, read_manifest, run_identity
from svdconvert.artifact.options import SplitOptions
from svdconvert.artifact.start import Start, plan_adapter, write_adapter
from svdconvert.checkpoint.shards import PlannedFile
from svdconvert.checkpoint.source import tensor_bytes
from svdconvert.checkpoint.writer import StagedOutput, check_apart, check_free, recorded
from svdconvert.hub.begin import find_start
from svdconvert.linalg.compute import use_threads
from svdconvert.method import METHODS, init_folder
from svdconvert.run import Run
from svdconvert.training.checkpoints import Checkpoints
from svdconvert.training.data import Examples, load_examples, padding_id
from svdconvert.training.install import harvest, install
from svdconvert.training.loop import EvalLog, StepLog, fit
from svdconvert.training.machine import make_accelerator
from svdconvert.training.metrics import Metrics
from svdconvert.training.network import load_network, load_tokenizer, replace_weights
from svdconvert.training.objective import NextToken
from svdconvert.training.plan import TrainPlan

Log = StepLog | EvalLog
Watch = Callable[[Log, int], None]
"""Told of every step and held-out loss, with the number of steps in all."""
CHECKPOINTS = "checkpoints"
"""The folder of the states that a run can go on from."""


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
    check_free(target, overwrite=run.overwrite)
    threads = use_threads(run.threads or recorded(target, "threads"))
    split = split or SplitOptions()
    start = find_start(str(model), split, base, run)
    check_apart(target, start.weights, Path(model) if Path(model).exists() else None)
    plan = plan.with_rate(METHODS.get(start.method).learning_rate)
    tokenizer = load_tokenizer(start.weights, trust_remote_code=run.trust_remote_code)
    examples = load_examples(plan, tokenizer)
    if examples.dropped:
        run.say(f"{examples.dropped} rows are left out: nothing to learn within max_length {plan.max_length}")
    accelerator = make_accelerator(plan)
    processes, precision = accelerator.num_processes, accelerator.mixed_precision
    identity = run_identity("train", plan.shaping(), threads) | _found_again(start, split, examples)
    identity |= {"processes": processes, "precision": precision}
    initial, trained = _planned(start)
    with StagedOutput(
        target, [trained, initial], identity=identity, overwrite=run.overwrite, ranks=run.ranks
    ) as staged:
        checkpoints = _checkpoints(staged, plan, run)
        network = _network(start, plan, precision, run)
        logs = fit(network, examples, NextToken(padding_id(tokenizer)), plan, accelerator, checkpoints)
        steps = plan.total_steps(len(examples.train), processes)
        with run.ranks.together():
            _record(logs, staged.path, checkpoints, lambda log: watch(log, steps))
        if run.ranks.leads:
            files = {
                initial.path: write_adapter(staged, initial, start.factors),
                trained.path: write_adapter(staged, trained, harvest(network)),
            }
            _write_configs(start, staged.path)
            checkpoints.finish(keep=plan.keep_checkpoints)
            _manifest(start, plan, files, threads).write(staged.path)
    return read_manifest(target)


def _planned(start: Start) -> tuple[PlannedFile, PlannedFile]:
    """The files of the initial and of the trained adapter."""
    initial = plan_adapter(f"{init_folder(start.method)}/{WEIGHTS}", start.factors)
    return initial, plan_adapter(WEIGHTS, start.factors, torch.float32)


def _found_again(start: Start, split: SplitOptions, examples: Examples) -> dict[str, Any]:
    """What must be the same when an interrupted run goes on, beside its options."""
    pieces = [piece for factors in start.factors.values() for piece in factors.pieces().values()]
    origins = [asdict(origin) for origin in (start.base, start.residual) if origin]
    mark = digest([origins, *(checksum(tensor_bytes(piece)) for piece in pieces)])
    return {
        "split": asdict(split),
        "data": {"files": dict(examples.marks)},
        "start": {"files": {str(start.weights): mark}},
    }


def _write_configs(start: Start, directory: Path) -> None:
    (directory / CONFIG).write_text(replace(start.config, base=_hub_weights(start)).text())
    (directory / init_folder(start.method) / CONFIG).write_text(start.config.text())


def _checkpoints(staged: StagedOutput, plan: TrainPlan, run: Run) -> Checkpoints:
    found = Checkpoints(
        staged.path / CHECKPOINTS,
        every=plan.save_every,
        keep=plan.save_limit,
        leads=run.ranks.leads,
        # An unfinished output with something noted in it is kept.
        saved=lambda step: staged.finish("checkpoint", {"step": step}),
    )
    if found.step:
        run.say(f"going on from {staged.path}: {found.step} steps are done")
    return found


def _manifest(
    start: Start, plan: TrainPlan, files: Mapping[str, Mapping[str, str]], threads: int
) -> Manifest:
    return Manifest(
        kind="trained",
        layout=start.layout,
        method=start.method,
        base=start.base,
        residual=start.residual,
        rebased=start.rebased,
        options=plan.shaping(),
        matrices=start.matrices,
        files=files,
        threads=threads,
    )


def _network(start: Start, plan: TrainPlan, autocast: str, run: Run) -> nn.Module:
    # Under autocast the frozen weights stay as they are stored; without it all is float32.
    dtype = torch.float32 if autocast == "no" else None
    network = load_network(start.weights, dtype, trust_remote_code=run.trust_remote_code)
    replace_weights(network, start.replaced)
    install(network, start.pieces(), METHODS.get(start.method).trains, plan.dropout)
    return network


def _record(
    logs: Iterator[StepLog | EvalLog], directory: Path, checkpoints: Checkpoints, watch: Callable[[Log], None]
) -> None:
    """Write every log as a line of JSON, as it comes."""
    with Metrics(directory, checkpoints.step, leads=checkpoints.leads) as metrics:
        for log in logs:
            metrics.write(asdict(log))
            if checkpoints.due(log.step):
                metrics.sync()
            watch(log)


def _hub_weights(start: Start) -> str | None:
    """The repository of the weights that the adapter belongs to, where they have one."""
    origin = start.residual or start.base
    return origin.location if origin and origin.revision else None
