"""The answers of the model in training to a few held-out prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from svdconvert.config.train import TrainOptions
from svdconvert.training.data.example import IGNORED, Example
from svdconvert.training.model.modes import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROMPT_FRACTION = 4  # for a text without a prompt, the first quarter of the tokens serves as the prompt


@dataclass(frozen=True)
class Samples:
    """Prompts, and the model that answers them."""

    model: nn.Module
    tokenizer: "PreTrainedTokenizerBase"
    prompts: Sequence[list[int]]
    """Token ids."""
    max_tokens: int
    """Largest number of tokens of an answer."""

    @staticmethod
    def of(
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        held_out: Sequence[Example],
        options: TrainOptions,
    ) -> "Samples":
        """The prompts of the first held-out examples, as many as the options ask for."""
        prompts = [_prompt_ids(example) for example in held_out[: options.samples]]
        return Samples(model, tokenizer, prompts, options.sample_tokens)

    def answers(self) -> Iterator[dict[str, str]]:
        """{"prompt": ..., "response": ...} for every prompt, by greedy decoding."""
        from transformers import GenerationConfig

        eos = self.tokenizer.eos_token_id
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=self.max_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
            use_cache=True,
        )
        model: Any = self.model
        for prompt in self.prompts:
            ids = torch.tensor([prompt], device=model.device)
            mask = torch.ones_like(ids)
            with evaluation_mode(model):
                generated = model.generate(ids, attention_mask=mask, generation_config=config)[0]
            response = generated[len(prompt) :].tolist()
            yield {
                "prompt": str(self.tokenizer.decode(prompt)),
                "response": str(self.tokenizer.decode(response, skip_special_tokens=True)),
            }


def _prompt_ids(example: Example) -> list[int]:
    in_loss = (example.labels != IGNORED).nonzero().flatten()
    # The first token is never predicted, so a text whose loss begins there has no prompt.
    end = int(in_loss[0]) or max(1, len(example.input_ids) // _PROMPT_FRACTION)
    return [int(token) for token in example.input_ids[:end]]
