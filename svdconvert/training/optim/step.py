"""One optimizer step, one evaluation, and the state from which training is resumed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, isfinite
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svdconvert.config.progress import report
from svdconvert.config.train import TrainOptions
from svdconvert.training.data.example import Example
from svdconvert.training.model.modes import evaluation_mode
from svdconvert.training.optim.objective import Batch, Objective, Predictions
from svdconvert.training.optim.orthonormality import Penalty, penalty_weight

if TYPE_CHECKING:
    from accelerate import Accelerator

State = dict[str, Any]
"""Tensors, numbers and strings, in dictionaries and lists."""


class NotFiniteError(Exception):
    """The loss or its gradient is infinite or not a number."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The measurements of a step, from before its update."""

    loss: float
    """Mean over the step's tokens in the loss."""
    tokens: int
    """Number of those tokens."""
    penalty: float | None
    """Without its weight; None if there is no penalty."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """A model prepared for this machine, with everything that a step needs."""

    plain: nn.Module
    model: nn.Module
    """`plain` as accelerate wraps it."""
    optimizer: Any
    objective: Objective
    options: TrainOptions
    accelerator: "Accelerator"
    penalty: Penalty | None = None

    @staticmethod
    def prepare(
        plain: nn.Module, objective: Objective, options: TrainOptions, accelerator: "Accelerator"
    ) -> "Trainer":
        """Move the model to its device, and create AdamW for its trainable parameters."""
        weight = penalty_weight(options)
        penalty = Penalty(weight) if weight else None
        parameters = [parameter for parameter in plain.parameters() if parameter.requires_grad]
        adamw = make_adamw(parameters, options.weight_decay, accelerator.device)
        model, optimizer = accelerator.prepare(plain, adamw)
        with evaluation_mode(plain):
            objective = objective.fitted_to(plain)
        return Trainer(plain, model, optimizer, objective, options, accelerator, penalty)

    def examples_of(self, step: int, examples: Sequence[Example]) -> list[Example]:
        """The examples of one step, counted from 1, over all processes; it depends on seed and step only.

        Sorted by decreasing length, so that a batch has examples of similar length and little padding. The
        division of a step's examples into batches does not change its gradient.
        """
        processes = self.accelerator.num_processes
        epoch, index = divmod(step - 1, self.options.steps_per_epoch(len(examples), processes))
        size = self.options.batch_size * self.options.accumulate * processes
        order = _epoch_order(len(examples), self.options.seed, epoch)
        chosen = [examples[number] for number in order[index * size : (index + 1) * size]]
        return sorted(chosen, key=lambda example: -len(example.input_ids))

    def batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """This process's share of `examples`, in batches on its device.

        Every process gets the same number of batches, because the processes synchronise in each of them. A
        process for which no batch is left repeats one of another process, with nothing in the loss.
        """
        processes = self.accelerator.num_processes
        parts = _parts(examples, self.options.batch_size)
        count = len(parts)
        for index in range(self.accelerator.process_index, ceil(count / processes) * processes, processes):
            batch = self.objective.batch(parts[index % count])
            if index >= count:
                batch = self.objective.masked(batch)
            yield {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    def step(self, examples: Sequence[Example], rate: float) -> StepResult:
        """One optimizer step. Raises NotFiniteError, and then does not update the model."""
        tokens = sum(example.loss_tokens for example in examples)
        batches = list(self.batches(examples))
        loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for batch in batches:
            is_last = batch is batches[-1]
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                batch_loss = self.objective.loss_sum(self.model, self.plain, batch)
                # DDP averages gradients over the processes; their sum is needed.
                self.accelerator.backward(batch_loss * (self.accelerator.num_processes / tokens))
            loss += batch_loss.detach()
        mean = self.sum_over_processes(loss) / tokens
        if not isfinite(mean):
            raise NotFiniteError(f"the loss became {mean}")
        self._clip_gradient()
        penalty = self._add_penalty()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(mean, tokens, penalty)

    def _clip_gradient(self) -> None:
        if not self.options.clip:
            return
        norm = float(self.accelerator.clip_grad_norm_(self.plain.parameters(), self.options.clip))
        # With loss scaling a gradient may overflow: the scaler then skips the step and lowers the scale.
        if not isfinite(norm) and self.accelerator.scaler is None:
            raise NotFiniteError(f"the gradient became {norm}")

    def _add_penalty(self) -> float | None:
        if self.penalty is None:
            return None
        if not self.options.clip:  # clipping has unscaled the gradients already
            self.accelerator.unscale_gradients()
        return self.penalty.add_gradient(self.plain)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> tuple[float, dict[str, float]]:
        """(mean loss over the tokens of all examples, scores), without dropout."""
        from accelerate.utils import gather_object

        predictions: Predictions = []
        rows = self.options.batch_size * self.accelerator.num_processes
        loss = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        with evaluation_mode(self.plain):
            for number, batch in enumerate(self.batches(examples)):
                report("held-out", min(number * rows, len(examples)), len(examples), "rows")
                loss += self.objective.loss_sum(self.model, self.plain, batch, predictions)
        report("held-out", len(examples), len(examples), "rows")
        mean = self.sum_over_processes(loss) / sum(example.loss_tokens for example in examples)
        return mean, self.objective.scores(gather_object(predictions))

    def sum_over_processes(self, value: Tensor) -> float:
        """The sum of a scalar over all processes."""
        return float(self.accelerator.reduce(value, reduction="sum"))

    def copy_weights(self) -> dict[str, Tensor]:
        """Name -> copy on the CPU, of all trained parameters."""
        trained = ((name, p) for name, p in self.plain.named_parameters() if p.requires_grad)
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The inverse of `copy_weights`."""
        for name, tensor in weights.items():
            self.plain.get_parameter(name).copy_(tensor)

    def state(self) -> State:
        """Everything that the next step depends on except the data: weights, moments, random generators."""
        from accelerate.utils import gather_object

        scaler = self.accelerator.scaler
        return {
            "weights": self.copy_weights(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
            "generators": gather_object([_generator_states(self.accelerator.device)]),
        }

    def restore(self, state: State) -> None:
        """Continue from the result of `state`, in the same number of processes."""
        self.load_weights(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for device_type, generator in state["generators"][self.accelerator.process_index].items():
            _device_module(device_type).set_rng_state(generator)


def make_adamw(
    parameters: list[nn.Parameter], weight_decay: float, device: torch.device
) -> torch.optim.AdamW:
    """AdamW for parameters that are trained on `device`: with torch's fused kernel if that is CUDA."""
    return torch.optim.AdamW(parameters, weight_decay=weight_decay, fused=device.type == "cuda" or None)


def _generator_states(device: torch.device) -> dict[str, Tensor]:
    """Device type -> state of its default generator, which draws the dropout masks."""
    return {name: _device_module(name).get_rng_state() for name in {"cpu", device.type}}


def _device_module(device_type: str) -> Any:
    return torch if device_type == "cpu" else torch.get_device_module(device_type)


def _parts(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    """Parts of at most `size` examples, all of which have images or none."""
    kinds = [
        [example for example in examples if (example.images is None) == plain] for plain in (True, False)
    ]
    return [kind[start : start + size] for kind in kinds for start in range(0, len(kind), size)]


@lru_cache(maxsize=1)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A random permutation of range(count)."""
    order = list(range(count))
    # A separate seed for every epoch, so that no step depends on earlier ones. A string, because Python
    # hashes all of it, whereas torch's generators use 32 bits of a seed.
    Random(f"{seed} {epoch}").shuffle(order)
    return order
