"""Training data: rows as tokens, with the loss on the responses alone."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from xxhash import xxh3_64

from svdconvert.errors import DataError
from svdconvert.training.plan import TrainPlan
from svdconvert.training.prompts import Passage, Row, choose_fields, passage
from svdconvert.training.rows import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not in the loss."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row: two int32 tensors of T entries. A label is the token of its own position, or IGNORED."""

    input_ids: Tensor
    labels: Tensor

    @property
    def loss_tokens(self) -> int:
        """Tokens that are in the loss; the first of a row has nothing to be predicted from."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class Examples:
    """What a plan trains on."""

    train: list[Example]
    held_out: list[Example] = field(default_factory=list)
    dropped: int = 0
    """Rows without a token in the loss: the response is empty, or max_length cuts it off."""
    marks: dict[str, str] = field(default_factory=dict)
    """Checksum of all rows as read, by the name of the data."""


def load_examples(plan: TrainPlan, tokenizer: "PreTrainedTokenizerBase") -> Examples:
    """Read and encode all that the plan names. Raises DataError where something cannot be used."""
    if plan.data is None:
        raise DataError("there is nothing to train on: give data a file or a Hub data set")
    marks: dict[str, str] = {}
    rows = _encoded(plan.data, plan, tokenizer, marks)
    if plan.eval_data is not None:
        held_out = _encoded(plan.eval_data, plan, tokenizer, marks)
    else:
        cut = len(rows) - plan.eval_rows
        if cut <= 0:
            raise DataError(f"{plan.data}: eval_rows holds out {plan.eval_rows} of its {len(rows)} rows")
        rows, held_out = rows[:cut], rows[cut:]
    train = _kept(rows, plan.data, plan)
    tested = _kept(held_out, plan.eval_data or plan.data, plan) if held_out else []
    return Examples(train, tested, len(rows) + len(held_out) - len(train) - len(tested), marks)


def _encoded(
    data: str, plan: TrainPlan, tokenizer: "PreTrainedTokenizerBase", marks: dict[str, str]
) -> list[Example | None]:
    found, mark = read_rows(data, plan.split), xxh3_64()

    def marked() -> Iterator[Row]:
        for row in found:
            mark.update(json.dumps(row, default=str).encode())
            yield row

    try:
        rows = encode(marked(), tokenizer, plan)
    except DataError as error:
        raise DataError(f"{data}: {error}") from error
    marks[data] = mark.hexdigest()
    return rows


def _kept(rows: Sequence[Example | None], data: str, plan: TrainPlan) -> list[Example]:
    kept = [row for row in rows if row is not None]
    if not kept:
        raise DataError(
            f"{data}: not one of {len(rows)} rows has a response within max_length {plan.max_length}"
        )
    return kept


def encode(
    rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", plan: TrainPlan
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
    example = Example(input_ids, labels)
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
    """The token to pad with. Any will do, because attention goes by length."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """input_ids and labels, int64 (rows, longest row), padded on the right.

    There is no attention mask: what a causal model computes for a token does not depend on what follows it,
    so padding is never seen, whatever token it is made of.
    """
    ids = pad_sequence([example.input_ids for example in examples], batch_first=True, padding_value=pad_id)
    labels = pad_sequence([example.labels for example in examples], batch_first=True, padding_value=IGNORED)
    return {"input_ids": ids.long(), "labels": labels.long()}
