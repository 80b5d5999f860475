"""Texts as tokens, with the loss on the responses alone."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from svdconvert.config.train import TrainOptions
from svdconvert.errors import DataError
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.data.prompts import Passage, Row, choose_fields, passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(
    rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", plan: TrainOptions
) -> list[Example | None]:
    """One entry a row, in order; None for a row without a token in the loss.

    The first row decides which fields are trained on. Raises DataError, which names the row, where one does
    not have them.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token: set eos_token in tokenizer_config.json")
    encoded: list[Example | None] = []
    fields: tuple[str, ...] = ()
    for number, row in enumerate(rows, start=1):
        try:
            fields = fields or choose_fields(row, plan)
            text = passage(row, fields, plan, tokenizer)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error
        encoded.append(_example(text, tokenizer, plan.max_length))
    return encoded


def _example(text: Passage, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Example | None:
    if all(start == end for start, end in text.spans):
        return None
    ids, learnt = _tokens(text, tokenizer)
    eos = tokenizer.eos_token_id
    # A chat template ends a turn with a mark of its own, which may not be the end-of-sequence token.
    last = ids[-1] if ids else None
    if last == eos:
        learnt[-1] = True
    elif not (text.chat and last in tokenizer.added_tokens_decoder):
        ids.append(eos)
        learnt.append(True)
    input_ids = torch.tensor(ids[:max_length], dtype=torch.int32)
    labels = input_ids.masked_fill(~torch.tensor(learnt[:max_length]), IGNORED)
    example = Example(input_ids, labels, len(ids))
    return example if example.loss_tokens else None


def _tokens(text: Passage, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    """Tokens of prompt and response as one text, and which of them are in the loss.

    A token that straddles the border counts as prompt, because it begins there: it is not what a model can
    answer to the prompt.
    """
    # A template that writes the BOS token itself is not to get a second one from the tokenizer.
    special = not text.chat and not (tokenizer.bos_token and text.text.startswith(str(tokenizer.bos_token)))
    if not tokenizer.is_fast:
        return _tokens_without_offsets(text, tokenizer, special)
    # verbose=False: the warning about texts longer than the model is not for us, who cut them.
    encoding = tokenizer(text.text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    begins = [begin for begin, _ in encoding["offset_mapping"]]
    return list(encoding["input_ids"]), [any(a <= begin < b for a, b in text.spans) for begin in begins]


def _tokens_without_offsets(
    text: Passage, tokenizer: "PreTrainedTokenizerBase", special: bool
) -> tuple[list[int], list[bool]]:
    """`_tokens` for tokenizers in Python: where the tokens of all and of a part of the text differ."""

    def tokens(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=special, verbose=False)["input_ids"])

    def before(border: int) -> int:
        head = tokens(text.text[:border])
        if special and head and head[-1] == tokenizer.eos_token_id:
            head.pop()
        same = next((n for n, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), len(head))
        return same if same == len(head) else same + 1

    ids = tokens(text.text)
    learnt = [False] * len(ids)
    for begin, end in text.spans:
        for index in range(before(begin), len(ids) if end == len(text.text) else before(end)):
            learnt[index] = True
    return ids, learnt


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token to pad with. Any will do, because padding is never seen."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """input_ids and labels, int64 (rows, longest row), padded on the right.

    There is no attention mask: what a causal model computes for a token does not depend on what follows it,
    so padding is never seen, whatever token it is made of. Where rows are packed there are position_ids: by
    positions that begin anew transformers keeps the parts of a row apart.
    """
    ids = pad_sequence([example.input_ids for example in examples], batch_first=True, padding_value=pad_id)
    labels = pad_sequence([example.labels for example in examples], batch_first=True, padding_value=IGNORED)
    batch = {"input_ids": ids.long(), "labels": labels.long()}
    if any(len(example.starts) > 1 for example in examples):
        batch["position_ids"] = torch.stack([_positions(example, ids.shape[1]) for example in examples])
    return batch


def _positions(example: Example, length: int) -> Tensor:
    """0, 1, 2, ... from every start anew, and over the padding."""
    starts = [*example.starts, len(example.input_ids), length]
    parts = [torch.arange(end - start) for start, end in zip(starts, starts[1:], strict=False)]
    return torch.cat(parts)
