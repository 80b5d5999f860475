"""One optimizer step, one measurement, and the state from which training goes on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, isfinite
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svdconvert.config.train import TrainOptions
from svdconvert.errors import RecipeError
from svdconvert.training.data.example import Example
from svdconvert.training.model.adapted_linear import AdaptedLinear
from svdconvert.training.optim.objective import Batch, Objective, Predictions
from svdconvert.training.optim.orthonormality import Penalty, penalty_weight

if TYPE_CHECKING:
    from accelerate import Accelerator

State = dict[str, Any]
"""Tensors, numbers and texts, in dictionaries and lists."""


class NotFiniteError(Exception):
    """The loss or its gradient is infinite or not a number."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step was taken with."""

    loss: float
    """Mean over its tokens."""
    count: int
    """Of its tokens."""
    penalty: float | None
    """Before it counts with its weight; None where there is none."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """A model made ready for this machine, with what one step of its training needs."""

    plain: nn.Module
    model: nn.Module
    """`plain` as accelerate wraps it."""
    optimizer: Any
    objective: Objective
    plan: TrainOptions
    accelerator: "Accelerator"
    penalty: Penalty | None = None

    @staticmethod
    def ready(
        plain: nn.Module, objective: Objective, plan: TrainOptions, accelerator: "Accelerator"
    ) -> "Trainer":
        """Place the model on its device, and start AdamW on all that it has to train."""
        weight = penalty_weight(plan)
        parameters = [parameter for parameter in plain.parameters() if parameter.requires_grad]
        adamw = torch.optim.AdamW(parameters, weight_decay=plan.weight_decay)
        model, optimizer = accelerator.prepare(plain, adamw)
        return Trainer(
            plain, model, optimizer, objective, plan, accelerator, Penalty(weight) if weight else None
        )

    def rows_of(self, step: int, rows: Sequence[Example]) -> list[Example]:
        """All processes' rows of one step, counted from 1: a function of the seed and the step alone.

        The longest come first, so that rows of like length share a batch and little of it is padding; how a
        step's rows are spread over its batches makes no difference to its gradient.
        """
        processes = self.accelerator.num_processes
        epoch, place = divmod(step - 1, self.plan.steps_per_epoch(len(rows), processes))
        size = self.plan.batch_size * self.plan.accumulate * processes
        order = _order(len(rows), self.plan.seed, epoch)
        chosen = [rows[index] for index in order[place * size : (place + 1) * size]]
        return sorted(chosen, key=lambda row: -len(row.input_ids))

    def batches(self, rows: Sequence[Example]) -> Iterator[Batch]:
        """This process's share of `rows`.

        Every process gets the same number of batches, for they wait for each other in each. Where nothing is
        left for one it repeats another's, with nothing in the loss.
        """
        size, ranks = self.plan.batch_size, self.accelerator.num_processes
        count = ceil(len(rows) / size)
        for index in range(self.accelerator.process_index, ceil(count / ranks) * ranks, ranks):
            start = index % count * size
            batch = self.objective.batch(rows[start : start + size])
            if index >= count:
                batch = self.objective.masked(batch)
            yield {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    def step(self, rows: Sequence[Example], rate: float) -> "StepResult":
        """One optimizer step. Raises NotFiniteError, with the step not taken."""
        count = sum(row.loss_tokens for row in rows)
        batches = list(self.batches(rows))
        loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for batch in batches:
            last = batch is batches[-1]
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                part = self.objective.loss_sum(self.model, self.plain, batch)
                # Processes average their gradients; their sum is what is wanted.
                self.accelerator.backward(part * (self.accelerator.num_processes / count))
            loss += part.detach()
        mean = self.summed(loss) / count
        if not isfinite(mean):
            raise NotFiniteError(f"the loss became {mean}")
        self._clip()
        penalty = self._penalise()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(mean, count, penalty)

    def _clip(self) -> None:
        if not self.plan.clip:
            return
        norm = float(self.accelerator.clip_grad_norm_(self.plain.parameters(), self.plan.clip))
        # With a loss scale a gradient may overflow: such a step is left out, and the scale falls.
        if not isfinite(norm) and self.accelerator.scaler is None:
            raise NotFiniteError(f"the gradient became {norm}")

    def _penalise(self) -> float | None:
        if self.penalty is None:
            return None
        if not self.plan.clip:  # which takes off a loss scale
            self.accelerator.unscale_gradients()
        return self.penalty.add_gradient(self.plain)

    @torch.no_grad()
    def held_out(self, rows: Sequence[Example]) -> tuple[float, dict[str, float]]:
        """(mean loss over the tokens of all rows, scores), without dropout."""
        from accelerate.utils import gather_object

        found: Predictions = []
        loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        with measuring(self.plain):
            for batch in self.batches(rows):
                loss += self.objective.loss_sum(self.model, self.plain, batch, found)
        mean = self.summed(loss) / sum(row.loss_tokens for row in rows)
        return mean, self.objective.scores(gather_object(found))

    def summed(self, value: Tensor) -> float:
        """The sum over all processes."""
        return float(self.accelerator.reduce(value, reduction="sum"))

    def weights(self) -> dict[str, Tensor]:
        """A copy on the CPU of all that is trained, by name."""
        trained = ((name, p) for name, p in self.plain.named_parameters() if p.requires_grad)
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained}

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Go back to what `weights` returned."""
        for name, tensor in weights.items():
            self.plain.get_parameter(name).copy_(tensor)

    def state(self) -> State:
        """All that the next step depends on but the rows: weights, moments, and dropout's generators."""
        from accelerate.utils import gather_object

        scaler = self.accelerator.scaler
        return {
            "weights": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
            "generators": gather_object([_generators(self.accelerator.device)]),
        }

    def restore(self, state: State) -> None:
        """Go on from what `state` returned, in as many processes."""
        self.take(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for device, generator in state["generators"][self.accelerator.process_index].items():
            _module(device).set_rng_state(generator)


def _generators(device: torch.device) -> dict[str, Tensor]:
    return {name: _module(name).get_rng_state() for name in {"cpu", device.type}}


def _module(device: str) -> Any:
    return torch if device == "cpu" else torch.get_device_module(device)


@lru_cache(maxsize=1)
def _order(rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(rows))
    # A seed of its own for every epoch, so that no step depends on those before it. Python hashes it as a
    # whole; torch's generators take 32 bits of theirs.
    Random(f"{seed} {epoch}").shuffle(order)
    return order


@contextmanager
def as_trained(model: nn.Module, *, checkpointing: bool = False) -> Iterator[None]:
    """Dropout in the adapters alone, no cache of keys and values; all as it was afterwards.

    Raises RecipeError for `checkpointing` of a model that cannot compute its activations again.
    """
    modes = [(module, module.training) for module in model.modules()]
    # A multimodal model's language model has a configuration of its own in it.
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    cache = getattr(config, "use_cache", None)
    # Not model.train(): that would switch on the model's own dropout, which is not the plan's.
    model.eval()
    if checkpointing:
        _enable_checkpointing(model)
    _switch(model, training=True)
    if cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if cache is not None:
            config.use_cache = cache
        if checkpointing:
            _checkpointing(model, "disable")()
        for module, training in modes:
            module.training = training
        # What accelerate leaves on a model for mixed precision. Its own unwrapping would also take off the
        # decorators that transformers has on forward.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(model).pop(name, None)


def _enable_checkpointing(model: nn.Module) -> None:
    try:
        _checkpointing(model, "enable")({"use_reentrant": False})
    except (ValueError, AttributeError) as error:
        raise RecipeError(
            f"{type(model).__name__} cannot compute its activations again: "
            "train without gradient_checkpointing"
        ) from error


def _checkpointing(model: nn.Module, what: str) -> Any:
    """The method of transformers, under its name of today or the one before."""
    new, old = f"activation_checkpointing_{what}", f"gradient_checkpointing_{what}"
    return getattr(model, new if hasattr(model, new) else old)


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Without dropout in the adapters, and with nothing computed twice."""
    _switch(model, training=False)
    try:
        yield
    finally:
        _switch(model, training=True)


def _switch(model: nn.Module, *, training: bool) -> None:
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.dropout.train(training)
        elif getattr(module, "gradient_checkpointing", False):
            # transformers asks a block itself, not its parts: their dropout stays off.
            module.training = training
