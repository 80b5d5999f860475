"""What a model in training answers to a few held-out prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from svdconvert.config.train import TrainOptions
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.optim.step import measuring

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHARE = 4  # of a text without a prompt, the first quarter is taken for one


@dataclass(frozen=True)
class Samples:
    """Prompts, and who answers them."""

    model: nn.Module
    tokenizer: "PreTrainedTokenizerBase"
    prompts: Sequence[list[int]]
    tokens: int

    @staticmethod
    def of(
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        held_out: Sequence[Example],
        plan: TrainOptions,
    ) -> "Samples":
        """Of the first rows that are held out, as many as the plan wants."""
        prompts = [_prompt(row) for row in held_out[: plan.samples]]
        return Samples(model, tokenizer, prompts, plan.sample_tokens)

    def answers(self) -> Iterator[dict[str, str]]:
        """{prompt, response}, each the likeliest token after the other: nothing is left to chance."""
        from transformers import GenerationConfig

        eos = self.tokenizer.eos_token_id
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=self.tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos, use_cache=True
        )
        model: Any = self.model
        for prompt in self.prompts:
            ids = torch.tensor([prompt], device=model.device)
            with measuring(model):
                made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0]
            yield {
                "prompt": self._text(prompt),
                "response": self._text(made[len(prompt) :].tolist(), skip_special_tokens=True),
            }

    def _text(self, ids: list[int], **options: Any) -> str:
        return str(self.tokenizer.decode(ids, **options))


def _prompt(row: Example) -> list[int]:
    learnt = (row.labels != IGNORED).nonzero().flatten()
    # The first token has nothing before it, and so is never an answer.
    end = int(learnt[0]) or max(1, len(row.input_ids) // _SHARE)
    return [int(token) for token in row.input_ids[:end]]
