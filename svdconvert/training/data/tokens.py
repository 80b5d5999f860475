"""Texts as tokens, and which of them are in the loss."""

from typing import TYPE_CHECKING

from svdconvert.training.data.prompts import TrainingText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(
    text: TrainingText, tokenizer: "PreTrainedTokenizerBase", add_special: bool
) -> tuple[list[int], list[bool]]:
    """The tokens of prompt and response, tokenized as one text, and which of them are in the loss.

    A token that straddles the boundary counts as prompt, because it begins there: at inference the prompt is
    tokenized without the response, so the model cannot generate that token. With `add_special` the tokenizer
    adds its special tokens, such as BOS.
    """
    if not tokenizer.is_fast:
        return _tokenize_without_offsets(text, tokenizer, add_special)
    # verbose=False suppresses the warning about texts longer than the model's context, which we truncate.
    encoding = tokenizer(
        text.text, add_special_tokens=add_special, return_offsets_mapping=True, verbose=False
    )
    begins = [begin for begin, _ in encoding["offset_mapping"]]
    in_loss = [any(start <= begin < end for start, end in text.spans) for begin in begins]
    return list(encoding["input_ids"]), in_loss


def _tokenize_without_offsets(
    text: TrainingText, tokenizer: "PreTrainedTokenizerBase", add_special: bool
) -> tuple[list[int], list[bool]]:
    """`tokenize` for tokenizers written in Python, which return no offsets.

    The boundary is found by tokenizing the text before it and comparing with the tokens of the entire text.
    """

    def tokenize(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=add_special, verbose=False)["input_ids"])

    def first_token_after(boundary: int) -> int:
        head = tokenize(text.text[:boundary])
        if add_special and head and head[-1] == tokenizer.eos_token_id:
            head.pop()
        same = next((n for n, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), len(head))
        return same if same == len(head) else same + 1

    ids = tokenize(text.text)
    in_loss = [False] * len(ids)
    for start, end in text.spans:
        last = len(ids) if end == len(text.text) else first_token_after(end)
        for index in range(first_token_after(start), last):
            in_loss[index] = True
    return ids, in_loss


def with_end(
    ids: list[int], in_loss: list[bool], tokenizer: "PreTrainedTokenizerBase", *, is_chat: bool
) -> None:
    """Make the end-of-sequence token the last one, and put it in the loss.

    A chat template that ends turns with a special token other than the end-of-sequence token is complete.
    """
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int), "a tokenizer without an end-of-sequence token is refused before"
    last = ids[-1] if ids else None
    if last == eos:
        in_loss[-1] = True
    elif not (is_chat and last in tokenizer.added_tokens_decoder):
        ids.append(eos)
        in_loss.append(True)
