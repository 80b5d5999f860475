"""svdconvert train: an initial adapter becomes a trained one."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svdconvert.adapters.adapter_config import CONFIG, WITH_PARAMETERS
from svdconvert.adapters.extra_parameters import beside_adapters, declaration
from svdconvert.adapters.peft_files import WEIGHTS
from svdconvert.checkpoint.tensors import tensor_bytes
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.train import TrainOptions
from svdconvert.errors import RecipeError
from svdconvert.inputs.model import open_model
from svdconvert.layouts.base import LAYOUTS
from svdconvert.linalg.threads import use_threads
from svdconvert.manifest.fingerprint import checksum, digest
from svdconvert.manifest.results import TrainResult
from svdconvert.manifest.schema import Manifest, read_manifest, roles_of, run_identity
from svdconvert.methods.base import METHODS, init_folder
from svdconvert.output.plan import PlannedFile
from svdconvert.output.staging import StagedOutput, check_apart, check_free, recorded
from svdconvert.training.data.packing import require_packing
from svdconvert.training.data.task import TrainingData, open_training_data
from svdconvert.training.learning_rates import learning_rate_warning
from svdconvert.training.logs.drift import with_drift
from svdconvert.training.logs.metrics import Log, record
from svdconvert.training.logs.samples import Samples
from svdconvert.training.logs.trackers import Trackers, require_trackers
from svdconvert.training.model.extra_parameters import choose, extract_parameters, unfreeze
from svdconvert.training.model.full import FineTunedModel
from svdconvert.training.model.inject import extract_factors, install
from svdconvert.training.model.load import head_config, load_classifier, load_network, replace_weights
from svdconvert.training.optim.accelerator import make_accelerator
from svdconvert.training.optim.checkpoints import Checkpoints
from svdconvert.training.optim.loop import fit
from svdconvert.training.resolve_defaults import resolve_defaults
from svdconvert.training.start import TrainingStart, open_training_start, plan_adapter, write_adapter

Watch = Callable[[Log, int], None]
"""Told of every step and held-out loss, with the number of steps in all."""
_HEAD = re.compile(r"^(classifier|score)\..*")
CHECKPOINTS = "checkpoints"
"""The folder of the states that a run can go on from."""


def ignore_log(log: Log, steps: int) -> None:
    """The watcher that looks away."""


def train(  # noqa: PLR0913 (what starts it, what trains it, who watches)
    model: str | Path,
    out: str | Path,
    plan: TrainOptions,
    run: Run | None = None,
    *,
    split: SplitOptions | None = None,
    base: str | None = None,
    watch: Watch = ignore_log,
) -> Manifest:
    """Train the adapter of a DECOMPOSED directory, or one that `split` starts on a plain `model`.

    Writes the trained adapter, the untouched initial one and metrics.jsonl to `out`. `base` says
    where the base is, for methods that leave it as it is. Raises SvdConvertError with one sentence.
    """
    run, target = run or Run(), Path(out)
    check_free(target, overwrite=run.overwrite)
    require_trackers(plan)
    threads = use_threads(run.threads or recorded(target, "threads"))
    split = split or SplitOptions()
    start = _with_whole(open_training_start(str(model), split, base, run), plan)
    check_apart(target, start.weights, Path(model) if Path(model).exists() else None)
    plan = resolve_defaults(plan, METHODS.get(start.method), start.config.dropout, run.notify)
    layout = LAYOUTS.get(start.layout)
    task = open_training_data(start.weights, layout, plan, trust_remote_code=run.trust_remote_code)
    _remark(start, plan, task, run)
    accelerator = make_accelerator(plan)
    processes, precision = accelerator.num_processes, accelerator.mixed_precision
    identity = run_identity("train", plan.shaping(), threads) | _found_again(start, split, task)
    identity |= {"processes": processes, "precision": precision}
    pupil = _pupil(start, plan, task, precision, run)
    with StagedOutput(target, pupil.files, identity, run) as staged:
        checkpoints = _checkpoints(staged, plan, run)
        samples = Samples.of(pupil.network, task.tokenizer, task.examples.held_out, plan)
        trackers = Trackers(accelerator, plan, target.name)
        steps = plan.total_steps(len(task.examples.train), processes)
        logs = fit(pupil.network, task.examples, task.objective, plan, accelerator, checkpoints)
        drifting = (
            with_drift(logs, pupil.network, start.factors, plan, steps) if start.base_is_residual else logs
        )
        with run.ranks.together():
            for log in record(drifting, staged.path, checkpoints, samples, trackers):
                watch(log, steps)
        if run.ranks.leads:
            checkpoints.finish(keep=plan.keep_checkpoints)
            pupil.manifest(plan, pupil.write(staged), threads).write(staged.path)
    return read_manifest(target)


def _remark(start: TrainingStart, plan: TrainOptions, task: TrainingData, run: Run) -> None:
    """Say what may surprise: another method's rate, rows that are not trained on as they are."""
    for remark in (learning_rate_warning(start.method, plan.lr or 0.0), *task.examples.remarks):
        if remark:
            run.notify(remark)


def _with_whole(start: TrainingStart, plan: TrainOptions) -> TrainingStart:
    """The start with what is trained whole beside its factors."""
    if not plan.train_also:
        return start
    infos = open_model(str(start.weights)).source.infos
    return replace(start, whole=choose(infos, LAYOUTS.get(start.layout), start.matrices, plan.train_also))


def _found_again(start: TrainingStart, split: SplitOptions, task: TrainingData) -> dict[str, Any]:
    """What must be the same when an interrupted run goes on, beside its options."""
    pieces = [piece for factors in start.factors.values() for piece in factors.pieces().values()]
    origins = [asdict(origin) for origin in (start.base, start.residual) if origin]
    mark = digest([origins, *(checksum(tensor_bytes(piece)) for piece in pieces)])
    return {
        "split": asdict(split),
        "data": {"files": dict(task.examples.marks)},
        "start": {"files": {str(start.weights): mark}},
    }


def _checkpoints(staged: StagedOutput, plan: TrainOptions, run: Run) -> Checkpoints:
    found = Checkpoints(
        staged.path / CHECKPOINTS,
        every=plan.save_every,
        keep=plan.save_limit,
        leads=run.ranks.leads,
        saved=lambda step: staged.keep(),
    )
    if found.step:
        staged.keep()
        run.notify(f"going on from {staged.path}: {found.step} steps are done")
    return found


@dataclass(frozen=True)
class TrainableAdapter:
    """The model in training, and what it ends in."""

    start: TrainingStart
    network: nn.Module
    head: Mapping[str, Any]
    """What config.json says of a head that is trained on top; empty where there is none."""

    @property
    def files(self) -> list[PlannedFile]:
        """The trained and the initial adapter, as they will be laid out."""
        start = self.start
        initial = f"{init_folder(start.method)}/{WEIGHTS}"
        return [
            plan_adapter(WEIGHTS, start.factors, torch.float32, start.whole),
            plan_adapter(initial, start.factors),
        ]

    def write(self, staged: StagedOutput) -> dict[str, dict[str, str]]:
        """Write both with their configurations; checksums by file."""
        start, (trained, initial) = self.start, self.files
        modules, bias = declaration(start.whole, start.factors)
        kind = WITH_PARAMETERS if beside_adapters(start.whole, start.factors) else start.config.peft_type
        config = replace(
            start.config, base=_hub_weights(start), modules_to_save=modules, bias=bias, peft_type=kind
        )
        if self.head:
            # PEFT saves a classifier as one module, whatever is declared of its parts.
            modules = sorted({_HEAD.sub(r"\1", module) for module in modules})
            config = replace(config, task="SEQ_CLS", modules_to_save=modules)
        (staged.path / CONFIG).write_text(config.text())
        (staged.path / init_folder(start.method) / CONFIG).write_text(start.config.text())
        whole = extract_parameters(self.network, start.whole, LAYOUTS.get(start.layout))
        return {
            initial.path: write_adapter(staged, initial, start.factors),
            trained.path: write_adapter(staged, trained, extract_factors(self.network), whole),
        }

    def manifest(self, plan: TrainOptions, files: Mapping[str, Mapping[str, str]], threads: int) -> Manifest:
        """What says that the directory is complete."""
        return Manifest(
            kind="trained",
            layout=self.start.layout,
            method=self.start.method,
            base=self.start.base,
            residual=self.start.residual,
            base_is_residual=self.start.base_is_residual,
            options=plan.shaping(),
            result=TrainResult(head=self.head or None),
            matrices=self.start.matrices,
            files=files,
            roles=roles_of(self.files),
            threads=threads,
        )


def _pupil(
    start: TrainingStart, plan: TrainOptions, task: TrainingData, autocast: str, run: Run
) -> "TrainableAdapter | FineTunedModel":
    if METHODS.get(start.method).split is None:
        if task.labels is not None or plan.train_also:
            raise RecipeError(
                f"{start.method} trains every weight of a causal language model, and nothing beside"
            )
        return FineTunedModel.load(start, trust_remote_code=run.trust_remote_code)
    # Under autocast the frozen weights stay as they are stored; without it all is float32.
    dtype, trust = torch.float32 if autocast == "no" else None, run.trust_remote_code
    head: Mapping[str, Any] = {}
    if task.labels is None:
        network = load_network(start.weights, LAYOUTS.get(start.layout), dtype, trust_remote_code=trust)
    else:
        network, whole = load_classifier(
            start.weights, dtype, task.labels, plan.seed, trust_remote_code=trust
        )
        start, head = replace(start, whole={**start.whole, **whole}), head_config(network)
    paths = _paths(start)
    replace_weights(network, {paths[module]: weight for module, weight in start.replaced.items()})
    if plan.packing:
        require_packing(network)
    trains, corrected = METHODS.get(start.method).trains, plan.corrected_gradient
    install(network, start.pieces(), trains, plan.dropout, corrected=corrected, paths=paths)
    unfreeze(network, start.whole, LAYOUTS.get(start.layout))
    return TrainableAdapter(start, network, head)


def _paths(start: TrainingStart) -> dict[str, str]:
    """Module, as the adapter names it -> where the network has it."""
    layout = LAYOUTS.get(start.layout)
    return {matrix.module: layout.network_path(name) for name, matrix in start.matrices.items()}


def _hub_weights(start: TrainingStart) -> str | None:
    """The repository of the weights that the adapter belongs to, where they have one."""
    origin = start.residual or start.base
    return origin.location if origin and origin.revision else None
