"""The training loop, as an iterator of its measurements: the caller logs them and may stop at any time."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from svdconvert.config.train import TrainOptions
from svdconvert.errors import SvdConvertError
from svdconvert.training.data.dataset import DataSplits
from svdconvert.training.model.attention import chosen_attention
from svdconvert.training.model.modes import training_mode
from svdconvert.training.optim.accelerator import make_accelerator
from svdconvert.training.optim.checkpoints import Checkpoints
from svdconvert.training.optim.objective import Objective
from svdconvert.training.optim.schedule import learning_rate
from svdconvert.training.optim.step import NotFiniteError, Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, slots=True)
class StepLog:
    """One optimizer step, counted from 1."""

    step: int
    loss: float
    """Mean over the step's tokens in the loss, before the update."""
    lr: float
    """The learning rate of the update."""
    tokens: int
    """Tokens in the loss so far, over all steps and processes."""
    penalty: float | None = None
    """The penalty before the update, without its weight; None if the options have none."""
    speed: float = field(default=0.0, compare=False)
    """Tokens in the loss per second, over the last steps of this process's run alone; it is not recorded."""


@dataclass(frozen=True, slots=True)
class EvalLog:
    """The held-out loss after `step` steps, a mean over tokens."""

    step: int
    eval_loss: float
    scores: Mapping[str, float] = field(default_factory=dict)
    """Name of a score -> its value on the held-out rows, if they have labels."""


_RECENT = 10  # steps over which the speed is a mean


@dataclass(slots=True)
class TrainState:
    """The progress of a run."""

    step: int = 0
    tokens: int = 0
    best_loss: float = inf
    """The lowest held-out loss so far."""
    evaluations_since_best: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    """The weights with the lowest held-out loss, if the options ask for them."""


def fit(
    model: nn.Module,
    splits: DataSplits,
    objective: Objective,
    options: TrainOptions,
    accelerator: "Accelerator | None" = None,
    checkpoints: Checkpoints | None = None,
) -> Iterator[StepLog | EvalLog]:
    """Train the trainable parameters of `model` with AdamW, and yield each measurement.

    The gradient of a step is that of the mean over all its tokens in the loss, however they are divided
    into batches and processes. The held-out loss is measured before the first step, every `eval_every`
    steps and after the last step. With checkpoints, training resumes from the newest one and ends in the
    same result. The model's settings are restored when the iterator ends or is closed. Raises
    SvdConvertError if the loss is not finite.
    """
    from accelerate.utils import set_seed

    assert splits.train, "there is nothing to train on"
    accelerator = accelerator or make_accelerator(options)
    # For dropout, with different masks in every process. The order of the rows has a separate generator.
    set_seed(options.seed, device_specific=True)
    total = options.total_steps(len(splits.train), accelerator.num_processes)
    with (
        training_mode(model, gradient_checkpointing=options.gradient_checkpointing),
        chosen_attention(model, options, accelerator),
    ):
        run = _TrainingRun(Trainer.prepare(model, objective, options, accelerator), splits, total)
        state = checkpoints.load_newest() if checkpoints else None
        if state is not None:
            run.restore(state)
        else:
            yield from run.evaluate_if_due(0)
        saved = perf_counter()
        while run.progress.step < total and not run.is_out_of_patience():
            yield run.take_step()
            yield from run.evaluate_if_due(run.progress.step)
            # A step's measurements are yielded before its checkpoint is saved, so the caller has logged them.
            if checkpoints and checkpoints.is_due(run.progress.step, perf_counter() - saved):
                checkpoints.save(run.progress.step, run.state())
                saved = perf_counter()
        run.restore_best_weights()


@dataclass(frozen=True, slots=True)
class _TrainingRun:
    """A trainer and its progress through the steps."""

    trainer: Trainer
    splits: DataSplits
    total: int
    progress: TrainState = field(default_factory=TrainState)
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """(tokens, seconds) of the last steps."""

    def take_step(self) -> StepLog:
        step = self.progress.step + 1
        options = self.trainer.options
        rate = learning_rate(options, step, self.total)
        started = perf_counter()
        try:
            result = self.trainer.step(self.trainer.examples_of(step, self.splits.train), rate)
        except NotFiniteError as error:
            advice = f"train with a learning rate lower than {options.lr:g}"
            raise SvdConvertError(f"{error} at step {step} of {self.total}: {advice}") from None
        self.progress.step = step
        self.progress.tokens += result.tokens
        self.recent.append((result.tokens, perf_counter() - started))
        tokens, seconds = (sum(column) for column in zip(*self.recent, strict=True))
        speed = tokens / max(seconds, 1e-9)
        return StepLog(step, result.loss, rate, self.progress.tokens, result.penalty, speed)

    def evaluate_if_due(self, step: int) -> Iterator[EvalLog]:
        """The held-out loss, if it is to be measured after `step`."""
        options = self.trainer.options
        is_due = step in (0, self.total) or (options.eval_every and step % options.eval_every == 0)
        if not self.splits.held_out or not is_due:
            return
        loss, scores = self.trainer.evaluate(self.splits.held_out)
        if loss < self.progress.best_loss:
            self.progress.best_loss = loss
            self.progress.evaluations_since_best = 0
            if options.keep_best:
                self.progress.best_weights = self.trainer.copy_weights()
        else:
            self.progress.evaluations_since_best += 1
        yield EvalLog(step, loss, scores)

    def is_out_of_patience(self) -> bool:
        """True if the held-out loss has not improved in the last `patience` evaluations."""
        patience = self.trainer.options.patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def restore_best_weights(self) -> None:
        """Load the weights with the lowest held-out loss, if the options ask for them."""
        self.trainer.load_weights(self.progress.best_weights)

    def state(self) -> dict[str, Any]:
        progress = {name: getattr(self.progress, name) for name in TrainState.__slots__}
        return {"progress": progress, "trainer": self.trainer.state()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state["progress"].items():
            setattr(self.progress, name, value)
        self.trainer.restore(state["trainer"])
