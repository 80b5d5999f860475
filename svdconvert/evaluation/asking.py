"""How a model is asked the questions of a task, and everything that shapes its answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from svdconvert.config.evaluation import EvaluationOptions
from svdconvert.config.execution import Run
from svdconvert.evaluation.answering import (
    Answer,
    Endings,
    Writer,
    context_length,
    encode_prompts,
    ending_ids,
)
from svdconvert.evaluation.base import Limits, Task
from svdconvert.evaluation.classifying import Classifier
from svdconvert.evaluation.loading import Opened
from svdconvert.evaluation.questions import Questions
from svdconvert.manifest.fingerprint import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CACHE_BYTES = 4 << 30
_MOST_ROWS = 64
_ROWS_OF_A_CLASSIFIER = 32


@dataclass
class Answering:
    """A model that is loaded when its first answer is needed."""

    opened: Opened
    options: EvaluationOptions
    run: Run

    @cached_property
    def network(self) -> nn.Module:
        """The network on its device."""
        return self.opened.load(self.options.dtype, self.run)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the model."""
        return self.opened.tokenizer(self.run)

    @property
    def dtype(self) -> torch.dtype:
        """The element type of most of its values."""
        sizes: dict[torch.dtype, int] = {}
        for parameter in self.network.parameters():
            if parameter.is_floating_point():
                sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        return max(sizes, key=lambda dtype: sizes[dtype])


@dataclass(frozen=True)
class Asked:
    """The questions of one task, as this model is asked them."""

    lengths: Sequence[int]
    """Number of tokens of every prompt."""
    answer: Callable[[Sequence[int]], Sequence[Answer]]
    """Numbers of the rows of a batch -> their answers."""
    batch_size: int
    prompts: str
    """Checksum of the prompts as tokens."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else shapes the answers."""


def ask(model: Answering, questions: Questions) -> Asked:
    """The questions of a task, prepared for this model."""
    return (
        _ask_writer(model, questions)
        if questions.task.kind == "generate"
        else _ask_classifier(model, questions)
    )


def _ask_writer(model: Answering, questions: Questions) -> Asked:
    """Prompts for a model that writes text."""
    network = model.network
    limits = _generation_limits(questions.task, model.options.max_new_tokens)
    ids = ending_ids(network, model.tokenizer)
    endings = Endings(
        max_new_tokens=limits.max_new_tokens,
        stops=limits.stops,
        ids=ids,
        context=context_length(network),
        smaller_limits=_smaller_limits(questions.task, limits.max_new_tokens),
    )
    texts = [row.prompt for row in questions.rows]
    prompts = encode_prompts(model.tokenizer, texts, bos=min(ids, default=0))
    _notify_unfit(model.run, questions.task.name, sum(endings.room(prompt) == 0 for prompt in prompts))
    options = {
        "max_new_tokens": endings.max_new_tokens,
        "stops": list(endings.stops),
        "ending_tokens": sorted(ids),
        "context": endings.context,
    }
    longest = max((len(prompt) + endings.room(prompt) for prompt in prompts), default=1)
    size = model.options.batch_size or _rows_within(network, model.dtype, longest)
    writer = Writer(network, model.tokenizer, prompts, endings)
    return Asked([len(prompt) for prompt in prompts], writer.answers, size, digest(prompts), options)


def _notify_unfit(run: Run, task: str, count: int) -> None:
    if count:
        run.notify(f"{task}: {count} prompts are longer than the model's context and stay without an answer")


def _generation_limits(task: Task, most: int | None) -> Limits:
    """The limits under which answers suffice for every protocol: the larger, and the stops of all."""
    found = [task.limits[protocol] for protocol in task.protocols]
    stops = [stop for stop in found[0].stops if all(stop in limits.stops for limits in found)]
    return Limits(max_new_tokens=most or max(limits.max_new_tokens for limits in found), stops=tuple(stops))


def _smaller_limits(task: Task, most: int) -> tuple[int, ...]:
    limits = {task.limits[protocol].max_new_tokens for protocol in task.protocols}
    return tuple(sorted(limit for limit in limits if limit < most))


def _rows_within(network: nn.Module, dtype: torch.dtype, longest: int) -> int:
    """How many rows of `longest` tokens fit into the memory for the cache: a power of 2, at most 64."""
    from svdconvert.models.rwkv6 import Rwkv6

    if isinstance(network, Rwkv6):
        return _MOST_ROWS
    from svdconvert.evaluation.growing_cache import cache_bytes_per_token

    rows = _CACHE_BYTES // max(1, cache_bytes_per_token(network, dtype) * longest)
    return 1 << (min(_MOST_ROWS, max(1, rows)).bit_length() - 1)


def _ask_classifier(model: Answering, questions: Questions) -> Asked:
    """Texts for a classifier."""
    classifier = Classifier(model.network, model.tokenizer, model.opened.labels or ())
    encodings = classifier.encode(questions.rows)
    options = {
        "labels": list(classifier.labels),
        "max_length": classifier.most_tokens(),
    }
    return Asked(
        [len(one["input_ids"]) for one in encodings],
        lambda rows: classifier.answers([encodings[row] for row in rows]),
        model.options.batch_size or _ROWS_OF_A_CLASSIFIER,
        digest([list(one["input_ids"]) for one in encodings]),
        options,
    )
