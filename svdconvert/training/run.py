"""One training run as a job: load everything, train the network, write what comes out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdconvert.checkpoint.tensors import tensor_bytes
from svdconvert.config.execution import Run
from svdconvert.config.options import SplitOptions
from svdconvert.config.progress import report
from svdconvert.config.train import TrainOptions
from svdconvert.inputs.model import layout_of_weights
from svdconvert.linalg.factors import Factors
from svdconvert.manifest.fingerprint import checksum, digest
from svdconvert.manifest.schema import Manifest
from svdconvert.manifest.training import METRICS
from svdconvert.methods.base import METHODS
from svdconvert.output.measurements import last_held_out
from svdconvert.output.plan import PlannedFile
from svdconvert.output.staging import StagedOutput
from svdconvert.pipeline.adapter_targets import refuse_dropout
from svdconvert.training.data.dataset import TrainingData, open_training_data
from svdconvert.training.logs.drift import measure_drift
from svdconvert.training.logs.metrics import Log, MetricsLog
from svdconvert.training.logs.samples import Samples
from svdconvert.training.logs.trackers import Trackers
from svdconvert.training.model.compare import embedding_rows, require_embedded, require_image_tokens
from svdconvert.training.model.towers import adapts_tower, untrained_towers
from svdconvert.training.optim.accelerator import make_accelerator
from svdconvert.training.optim.checkpoints import FOLDER, Checkpoints
from svdconvert.training.optim.loop import EvalLog, StepLog, fit
from svdconvert.training.outputs import TrainedOutput, load_output
from svdconvert.training.resolve_defaults import (
    check_options_beyond_the_run,
    learning_rate_warning,
    resolve_defaults,
)
from svdconvert.training.start import AdapterStart, TrainingStart

if TYPE_CHECKING:
    from accelerate import Accelerator

_ENCODED = "what the tokenizer and its chat template make of the rows"
"""As the journal names it if it has changed."""
LONGEST = 300.0
"""Seconds of training that an interruption may cost, if --save-every is later."""
Watch = Callable[[Log, int], None]
"""Called with every measurement and the total number of steps."""


def ignore_log(log: Log, steps: int) -> None:
    """The default of `watch`: discard the measurement."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A run with everything that it needs, loaded."""

    start: TrainingStart
    options: TrainOptions
    """With all defaults resolved."""
    split: SplitOptions
    """How a plain model was decomposed."""
    data: TrainingData
    accelerator: "Accelerator"
    output: TrainedOutput
    watch: Watch = ignore_log
    command: str = "train"

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return self.options.total_steps(len(self.data.splits.train), self.accelerator.num_processes)

    @property
    def files(self) -> Sequence[PlannedFile]:
        """The weight files of the output."""
        return self.output.files

    @property
    def inputs(self) -> Sequence[Path]:
        """What the start was read from."""
        return self.start.inputs

    def identity(self) -> dict[str, Any]:
        """The start, the data, the machine, and the options that influence the result."""
        return {
            "options": self.options.shaping(),
            "split": asdict(self.split),
            "data": {"files": dict(self.data.splits.checksums)},
            "encoded": {"files": {_ENCODED: self.data.splits.checksum()}},
            "start": {"files": {str(self.start.model.path): _start_checksum(self.start)}},
            "processes": self.accelerator.num_processes,
            "precision": self.accelerator.mixed_precision,
        }

    def write(self, staged: StagedOutput, run: Run) -> None:
        """Train, and write the weights; all ranks train, the leading rank writes."""
        checkpoints = train_and_record(self, staged, run)
        if run.ranks.leads:
            self.output.write_weights(staged)
            if not self.options.keep_checkpoints:
                checkpoints.delete()
        staged.gather()

    def write_sidecars(self, directory: Path) -> None:
        """Write everything that belongs next to the weights."""
        self.output.write_sidecars(directory)

    def manifest(self, staged: StagedOutput, threads: int) -> Manifest:
        """The manifest of the trained adapter, or of the fine-tuned checkpoint."""
        return self.output.manifest(self.options, staged, threads)

    def remarks(self, manifest: Manifest) -> tuple[str, ...]:
        """Empty: `load_training_job` notifies before the training."""
        return ()


def _start_checksum(start: TrainingStart) -> str:
    """A checksum of the origins of the weights and of the initial factors."""
    origins = [start.base]
    factors: list[str] = []
    if isinstance(start, AdapterStart):
        origins.append(start.residual)
        tensors = [tensor for each in start.factors.values() for tensor in each.pieces().values()]
        factors = [checksum(tensor_bytes(tensor)) for tensor in tensors]
    return digest([[asdict(origin) for origin in origins if origin], *factors])


def load_training_job(
    start: TrainingStart, options: TrainOptions, split: SplitOptions, run: Run, watch: Watch = ignore_log
) -> TrainingJob:
    """Resolve the options, read the data and load the model. Raises SvdConvertError if anything does not fit.

    Calls `run.notify` with a sentence for everything that may surprise the user.
    """
    dropout = start.config.dropout if isinstance(start, AdapterStart) else 0.0
    options = resolve_defaults(options, METHODS.get(start.method), dropout, run.notify)
    if isinstance(start, AdapterStart):
        refuse_dropout(options.dropout, start.config.parameters)
    layout = layout_of_weights(start.layout, start.weights)
    data = open_training_data(start.weights, layout, options, trust_remote_code=run.trust_remote_code)
    matrices = start.matrices.values() if isinstance(start, AdapterStart) else ()
    idle = untrained_towers(matrices, data.splits) if adapts_tower(matrices) else None
    for warning in (learning_rate_warning(start.method, options.lr or 0.0), *data.splits.warnings, idle):
        if warning:
            run.notify(warning)
    accelerator = make_accelerator(options, some_unused=adapts_tower(matrices))
    output = load_output(start, options, data, accelerator.mixed_precision, run)
    data = data.padded_below(embedding_rows(output.network))
    require_embedded(start.weights, output.network, data.tokenizer, data.splits.all)
    require_image_tokens(start.weights, output.network, data.tokenizer, data.splits.all)
    job = TrainingJob(
        start=start,
        options=options,
        split=split,
        data=data,
        accelerator=accelerator,
        output=output,
        watch=watch,
    )
    check_options_beyond_the_run(options, job.steps, run.notify)
    return job


def train_and_record(job: TrainingJob, staged: StagedOutput, run: Run) -> Checkpoints:
    """Train the job's network; write metrics, samples and checkpoints into the staging directory.

    Resumes from the newest checkpoint that an interrupted run left there.
    """
    options = job.options
    network = job.output.network
    checkpoints = Checkpoints(
        staged.path / FOLDER,
        every=options.save_every,
        limit=options.save_limit,
        leads=run.ranks.leads,
        # Processes could differ about the time, and checkpoints that are kept must not depend on it.
        seconds=None if job.accelerator.num_processes > 1 or options.keep_checkpoints else LONGEST,
    )
    if checkpoints.step:
        staged.keep()
        run.notify(f"going on from {staged.path}: {checkpoints.step} steps are done")
    samples = Samples.of(network, job.data, options)
    trackers = Trackers(job.accelerator, options, staged.out.name)
    metrics = MetricsLog(staged.path, checkpoints.step, samples, trackers, leads=run.ranks.leads)
    initial: Mapping[str, Factors] = {}
    if isinstance(job.start, AdapterStart) and job.start.base_is_residual:
        # Drift is measured only for adapters that start as a part of the base.
        initial = job.start.factors

    def before_save() -> None:
        # A resumed run repeats only the steps after its checkpoint, so the measurements of all steps before
        # it must be on the disk first. From now on there is something to resume from, so an error must not
        # remove the staging directory.
        metrics.sync()
        staged.keep()

    before = last_held_out(staged.path / METRICS) if checkpoints.step else None
    follower = _Follower(job.steps, checkpoints.step, {} if before is None else {"held_out": before})
    follower.report()

    def record(log: Log) -> None:
        follower.note(log)
        metrics.write(log)
        follower.report()
        job.watch(log, job.steps)

    checkpoints = replace(checkpoints, before_save=before_save)
    with run.ranks.together(), metrics:
        # `fit` saves a checkpoint only when it is asked for the next measurement, so after this loop's body.
        for log in fit(network, job.data.splits, job.data.objective, options, job.accelerator, checkpoints):
            record(log)
            if initial and isinstance(log, StepLog) and _drift_is_due(job, log.step):
                record(measure_drift(network, initial, log.step))
    return checkpoints


@dataclass
class _Follower:
    """Reports the newest measurements as the progress of the phase "train"."""

    steps: int
    step: int
    facts: dict[str, float]

    def note(self, log: Log) -> None:
        """Remember a measurement."""
        self.step = log.step
        if isinstance(log, EvalLog):
            self.facts["held_out"] = log.eval_loss
        elif isinstance(log, StepLog):
            self.facts |= {"loss": log.loss, "lr": log.lr, "tokens_per_second": log.speed}

    def report(self) -> None:
        """Say how far the training is, also after something else was done."""
        report("train", self.step, self.steps, "steps", **self.facts)


def _drift_is_due(job: TrainingJob, step: int) -> bool:
    every = job.options.eval_every
    return step == job.steps or (every is not None and step % every == 0)
