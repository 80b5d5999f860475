"""The training loop: it yields what it measures, and whoever asks logs, stops and saves."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from svdconvert.config.train import TrainOptions
from svdconvert.errors import SvdConvertError
from svdconvert.training.data.dataset import DataSplits
from svdconvert.training.model.attention import attention_for
from svdconvert.training.optim.accelerator import make_accelerator
from svdconvert.training.optim.checkpoints import Checkpoints
from svdconvert.training.optim.objective import Objective
from svdconvert.training.optim.schedule import learning_rate
from svdconvert.training.optim.step import NotFiniteError, Trainer, as_trained

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, slots=True)
class StepLog:
    """One optimizer step, counted from 1."""

    step: int
    loss: float
    """Mean over the step's tokens that are in the loss, before the step is taken."""
    lr: float
    """The rate the step was taken with."""
    tokens: int
    """Tokens that were in the loss so far, over all steps and processes."""
    penalty: float | None = None
    """The penalty before the step, without its weight; None where the plan has none."""


@dataclass(frozen=True, slots=True)
class EvalLog:
    """The held-out loss after `step` steps: the mean over its tokens."""

    step: int
    eval_loss: float
    scores: Mapping[str, float] = field(default_factory=dict)
    """Measures of the held-out rows by name, where they have labels."""


@dataclass(slots=True)
class TrainState:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    best_loss: float = inf
    """The least held-out loss so far."""
    worse: int = 0
    """Held-out losses since the least one."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The weights of the least one, where the plan wants them."""


def fit(  # noqa: PLR0913 (what is trained, on what, for what, how, where, and from where it goes on)
    model: nn.Module,
    examples: DataSplits,
    objective: Objective,
    plan: TrainOptions,
    accelerator: "Accelerator | None" = None,
    checkpoints: Checkpoints | None = None,
) -> Iterator[StepLog | EvalLog]:
    """Train what `model` has to train with AdamW, one log at a time.

    A step's gradient is that of the mean over all its tokens in the loss, however they are spread over
    batches and processes. The held-out loss comes before the first step, every plan.eval_every steps and
    after the last. Where there are checkpoints it goes on from the newest, to the same end. The model gets
    its own settings back when the iterator ends or is closed. Raises SvdConvertError where the loss is no
    longer finite.
    """
    from accelerate.utils import set_seed

    assert examples.train, "there is nothing to train on"
    accelerator = accelerator or make_accelerator(plan)
    # For dropout, with different masks in every process; the rows' order has a generator of its own.
    set_seed(plan.seed, device_specific=True)
    total = plan.total_steps(len(examples.train), accelerator.num_processes)
    with (
        as_trained(model, checkpointing=plan.gradient_checkpointing),
        attention_for(model, plan, accelerator),
    ):
        run = _Run(Trainer.ready(model, objective, plan, accelerator), examples, total)
        state = checkpoints.newest() if checkpoints else None
        if state is not None:
            run.restore(state)
        else:
            yield from run.measured(0)
        while run.course.step < total and not run.is_stale():
            yield run.step()
            yield from run.measured(run.course.step)
            if checkpoints and checkpoints.due(run.course.step):
                checkpoints.save(run.course.step, run.state())
        run.finish()


@dataclass(frozen=True, slots=True)
class _Run:
    """A trainer on its way through the steps of a plan."""

    trainer: Trainer
    examples: DataSplits
    total: int
    course: TrainState = field(default_factory=TrainState)

    def step(self) -> StepLog:
        step, plan = self.course.step + 1, self.trainer.plan
        rate = learning_rate(plan, step, self.total)
        try:
            done = self.trainer.step(self.trainer.rows_of(step, self.examples.train), rate)
        except NotFiniteError as error:
            advice = f"train with a lower rate than lr {plan.lr:g}"
            raise SvdConvertError(f"{error} at step {step} of {self.total}: {advice}") from None
        self.course.step, self.course.tokens = step, self.course.tokens + done.count
        return StepLog(step, done.loss, rate, self.course.tokens, done.penalty)

    def measured(self, step: int) -> Iterator[EvalLog]:
        """The held-out loss, where it is due behind `step`."""
        every = self.trainer.plan.eval_every
        if not self.examples.held_out or not (step in (0, self.total) or (every and step % every == 0)):
            return
        loss, scores = self.trainer.held_out(self.examples.held_out)
        if loss < self.course.best_loss:
            self.course.best_loss, self.course.worse = loss, 0
            if self.trainer.plan.keep_best:
                self.course.best = self.trainer.weights()
        else:
            self.course.worse += 1
        yield EvalLog(step, loss, scores)

    def is_stale(self) -> bool:
        """True where the held-out loss has not fallen for as long as the plan waits for it."""
        patience = self.trainer.plan.patience
        return patience is not None and self.course.worse >= patience

    def finish(self) -> None:
        """Go back to the best weights, where the plan wants them."""
        self.trainer.take(self.course.best)

    def state(self) -> dict[str, Any]:
        course = {name: getattr(self.course, name) for name in TrainState.__slots__}
        return {"course": course, "trainer": self.trainer.state()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state["course"].items():
            setattr(self.course, name, value)
        self.trainer.restore(state["trainer"])
