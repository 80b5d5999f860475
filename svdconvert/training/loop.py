"""The training loop: it yields what it measures, and whoever asks logs, stops and saves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from math import ceil, cos, isfinite, pi
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from svdconvert.errors import RecipeError, SvdConvertError
from svdconvert.training.data import IGNORED, Example, collate
from svdconvert.training.module import AdaptedLinear
from svdconvert.training.plan import TrainPlan

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


@dataclass(frozen=True, slots=True)
class EvalLog:
    """The held-out loss after `step` steps: the mean over its tokens."""

    step: int
    eval_loss: float


def make_accelerator(plan: TrainPlan) -> "Accelerator":
    """Accelerate for the plan's device and precision, whatever this process had trained before.

    Raises RecipeError where there is no such device.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    device = _device(plan.device)
    # Accelerate keeps one state for the process and refuses another device or precision. Forgetting it
    # does not touch torch's process group, which a new state finds again.
    if PartialState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=True)
    precision = "bf16" if _takes_bf16(plan.precision, device) else "no"
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    if accelerator.device.type != device.type:
        raise RecipeError(f"device {plan.device}: accelerate runs on {accelerator.device.type} here")
    return accelerator


def _device(name: str) -> torch.device:
    try:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = (found or torch.device("cpu")) if name == "auto" else torch.device(name)
        if device.type != "cpu" and device.index is not None:
            torch.accelerator.set_device_index(device.index)
        # Torch knows more names of devices than this machine has devices.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise RecipeError(f"device {name} cannot be used here, give cpu or auto: {reason}") from error
    return device


def _takes_bf16(precision: str, device: torch.device) -> bool:
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Where the CPU multiplies bf16 itself a step takes less than half of float32's time (135M parameters, 4 x
    # 192 tokens, AVX512-BF16: 1.4 against 3.5 s with two threads, 2.7 against 8.5 s with one).
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and bool(has_units)


def learning_rate(plan: TrainPlan, step: int, total: int) -> float:
    """The rate of step `step` of 1 to `total`: a linear rise over the warm-up, then the plan's schedule.

    Without a warm-up these are transformers' schedules. With one, theirs give the first step the rate 0 and
    so waste it; these are one step ahead.
    """
    assert plan.lr is not None, "the plan has no rate: TrainPlan.with_rate fills in the method's"
    # The last step of the warm-up has the full rate, so one such step is no warm-up at all.
    warm = max(1, ceil(plan.warmup * total))
    if step <= warm:
        return plan.lr * step / warm
    gone = (step - warm) / (total + 1 - warm)
    shares = {"constant": 1.0, "linear": 1.0 - gone, "cosine": (1.0 + cos(pi * gone)) / 2}
    return plan.lr * shares[plan.schedule]


Batch = dict[str, Tensor]


def fit(
    model: nn.Module,
    train: Sequence[Example],
    held_out: Sequence[Example],
    plan: TrainPlan,
    accelerator: "Accelerator | None",
    pad_id: int,
) -> Iterator[StepLog | EvalLog]:
    """Train what `model` has to train with AdamW, one log at a time.

    The model is a causal language model as transformers has them. A step's gradient is that of the mean over
    all its tokens in the loss, however they are spread over batches and processes. The held-out loss comes
    before the first step, every plan.eval_every steps and after the last. The model gets its own settings
    back when the iterator ends or is closed. Raises SvdConvertError where the loss is no longer finite.
    """
    from accelerate.utils import set_seed

    assert train, "there is nothing to train on"
    accelerator = accelerator or make_accelerator(plan)
    # For dropout, with different masks in every process; the rows' order has a generator of its own.
    set_seed(plan.seed, device_specific=True)
    total = plan.total_steps(len(train), accelerator.num_processes)
    tokens = 0
    with _as_trained(model):
        trainer = _Trainer.ready(model, plan, accelerator, pad_id)
        if held_out:
            yield EvalLog(0, trainer.held_out_loss(held_out))
        for step in range(1, total + 1):
            rate = learning_rate(plan, step, total)
            try:
                loss, count = trainer.step(trainer.rows_of(step, train), rate)
            except _NotFiniteError as error:
                advice = f"train with a lower rate than lr {plan.lr:g}"
                raise SvdConvertError(f"{error} at step {step} of {total}: {advice}") from None
            tokens += count
            yield StepLog(step, loss, rate, tokens)
            if held_out and (step == total or (plan.eval_every and step % plan.eval_every == 0)):
                yield EvalLog(step, trainer.held_out_loss(held_out))


class _NotFiniteError(Exception):
    """The loss or its gradient is infinite or not a number."""


@dataclass(frozen=True, slots=True)
class _Trainer:
    """A model made ready for this machine, with what one step of its training needs."""

    plain: nn.Module
    model: nn.Module
    """`plain` as accelerate wraps it."""
    optimizer: torch.optim.Optimizer
    selects: bool
    """The model computes the logits of chosen positions alone."""
    plan: TrainPlan
    accelerator: "Accelerator"
    pad_id: int

    @staticmethod
    def ready(plain: nn.Module, plan: TrainPlan, accelerator: "Accelerator", pad_id: int) -> "_Trainer":
        parameters = [parameter for parameter in plain.parameters() if parameter.requires_grad]
        adamw = torch.optim.AdamW(parameters, weight_decay=plan.weight_decay)
        selects = _selects_positions(plain)
        model, optimizer = accelerator.prepare(plain, adamw)
        return _Trainer(plain, model, optimizer, selects, plan, accelerator, pad_id)

    def rows_of(self, step: int, rows: Sequence[Example]) -> list[Example]:
        """All processes' rows of one step, counted from 1: a function of the seed and the step alone."""
        processes = self.accelerator.num_processes
        epoch, place = divmod(step - 1, self.plan.steps_per_epoch(len(rows), processes))
        size = self.plan.batch_size * self.plan.accumulate * processes
        order = _order(len(rows), self.plan.seed, epoch)
        return [rows[index] for index in order[place * size : (place + 1) * size]]

    def batches(self, rows: Sequence[Example]) -> Iterator[Batch]:
        """This process's share of `rows`.

        Every process gets the same number of batches, for they wait for each other in each. Where nothing is
        left for one it repeats another's, with nothing in the loss.
        """
        size, ranks = self.plan.batch_size, self.accelerator.num_processes
        count = ceil(len(rows) / size)
        for index in range(self.accelerator.process_index, ceil(count / ranks) * ranks, ranks):
            start = index % count * size
            batch = collate(rows[start : start + size], self.pad_id)
            if index >= count:
                batch["labels"].fill_(IGNORED)
            yield {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    def step(self, rows: Sequence[Example], rate: float) -> tuple[float, int]:
        """One optimizer step: (mean loss, tokens in it). Raises _NotFiniteError, with the step not taken."""
        count = sum(row.loss_tokens for row in rows)
        batches = list(self.batches(rows))
        loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for batch in batches:
            last = batch is batches[-1]
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                part = self.loss_sum(batch)
                # Processes average their gradients; their sum is what is wanted.
                self.accelerator.backward(part * (self.accelerator.num_processes / count))
            loss += part.detach()
        mean = self.summed(loss) / count
        if not isfinite(mean):
            raise _NotFiniteError(f"the loss became {mean}")
        if self.plan.clip:
            norm = float(self.accelerator.clip_grad_norm_(self.plain.parameters(), self.plan.clip))
            if not isfinite(norm):
                raise _NotFiniteError(f"the gradient became {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean, count

    @torch.no_grad()
    def held_out_loss(self, rows: Sequence[Example]) -> float:
        """Mean over the tokens of all rows, without dropout."""
        _switch_dropout(self.plain, on=False)
        loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for batch in self.batches(rows):
            loss += self.loss_sum(batch)
        _switch_dropout(self.plain, on=True)
        return self.summed(loss) / sum(row.loss_tokens for row in rows)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Cross entropy in float32, summed over the batch's tokens in the loss."""
        # Position t predicts token t + 1, so the last predicts nothing.
        targets = batch["labels"][:, 1:]
        chosen = targets.ne(IGNORED).any(dim=0).nonzero().squeeze(1)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if self.selects:
            # Logits are by far the largest activation of a small model; those of prompts are not needed.
            logits = self.model(**inputs, logits_to_keep=chosen).logits
        else:
            logits = self.model(**inputs).logits[:, chosen]
        targets = targets[:, chosen]
        wanted = targets.ne(IGNORED)
        return cross_entropy(logits[wanted].float(), targets[wanted], reduction="sum")

    def summed(self, value: Tensor) -> float:
        """The sum over all processes."""
        return float(self.accelerator.reduce(value, reduction="sum"))


@lru_cache(maxsize=1)
def _order(rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(rows))
    # A seed of its own for every epoch, so that no step depends on those before it. Python hashes it as a
    # whole; torch's generators take 32 bits of theirs.
    Random(f"{seed} {epoch}").shuffle(order)
    return order


def _selects_positions(model: nn.Module) -> bool:
    """True where forward takes positions as logits_to_keep; some remote code takes only a number."""
    parameter = signature(model.forward).parameters.get("logits_to_keep")
    return parameter is not None and "Tensor" in str(parameter.annotation)


@contextmanager
def _as_trained(model: nn.Module) -> Iterator[None]:
    """Dropout in the adapters alone, no cache of keys and values; all as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    # A multimodal model's language model has a configuration of its own in it.
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    cache = getattr(config, "use_cache", None)
    # Not model.train(): that would switch on the model's own dropout, which is not the plan's.
    model.eval()
    _switch_dropout(model, on=True)
    if cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if cache is not None:
            config.use_cache = cache
        for module, training in modes:
            module.training = training
        # What accelerate leaves on a model for mixed precision. Its own unwrapping would also take off the
        # decorators that transformers has on forward.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(model).pop(name, None)


def _switch_dropout(model: nn.Module, *, on: bool) -> None:
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.dropout.train(on)
