"""A tokenizer whose texts are the numbers of the tokens, and stock greedy decoding to compare with."""

from collections.abc import Sequence
from typing import Any

import torch

from svdconvert.evaluation.answering import Answer, Endings, Writer, plan_batches


class Numbers:
    """Tokens as text: [3, 14] is "3 14 "."""

    eos_token_id = None

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join(f"{number} " for number in ids)


def endings(**values: Any) -> Endings:
    """Ends of answers: eight tokens and nothing else, unless given."""
    usual: dict[str, Any] = {"max_new_tokens": 8, "stops": (), "ids": frozenset(), "context": None}
    return Endings(**(usual | values))


def batched(network: Any, prompts: Sequence[Sequence[int]], ends: Endings, size: int) -> list[Answer]:
    """The answers, made in batches of `size`."""
    writer = Writer(network, Numbers(), prompts, ends)  # type: ignore[arg-type]
    found: dict[int, Answer] = {}
    for batch in plan_batches([len(prompt) for prompt in prompts], size):
        found |= dict(zip(batch, writer.answers(batch), strict=True))
    return [found[row] for row in range(len(prompts))]


def stock(network: Any, prompt: Sequence[int], count: int, ids: Sequence[int] = ()) -> str:
    """The text that transformers' own greedy decoding makes of one prompt."""
    given = torch.tensor([list(prompt)])
    out = network.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=list(ids) or None,
        pad_token_id=0,
    )
    made = out[0, len(prompt) :].tolist()
    return Numbers().decode([token for token in made if token not in ids])


def random_prompts(lengths: Sequence[int], shared: int, vocabulary: int = 61) -> list[list[int]]:
    """Prompts of these lengths, the first `shared` tokens of which are the same."""
    draws = torch.Generator().manual_seed(sum(lengths))
    beginning = torch.randint(3, vocabulary, (shared,), generator=draws).tolist()
    rest = [torch.randint(3, vocabulary, (length - shared,), generator=draws).tolist() for length in lengths]
    return [beginning + own for own in rest]
