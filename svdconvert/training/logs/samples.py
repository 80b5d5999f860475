"""The answers of the model in training to a few held-out prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svdconvert.config.progress import report
from svdconvert.config.train import TrainOptions
from svdconvert.training.data.dataset import TrainingData
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
    prompts: Sequence[Mapping[str, Tensor]]
    """What the network is given: input_ids and, for images, what the processor makes of them."""
    max_tokens: int
    """Largest number of tokens of an answer."""

    @staticmethod
    def of(model: nn.Module, data: TrainingData, options: TrainOptions) -> "Samples":
        """The prompts of the first held-out examples, as many as the options ask for."""
        prompts = [_prompt(example, data) for example in data.splits.held_out[: options.samples]]
        return Samples(model, data.tokenizer, prompts, options.sample_tokens)

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
        for number, prompt in enumerate(self.prompts):
            report("sample", number, len(self.prompts), "prompts")
            inputs = {name: tensor.to(model.device) for name, tensor in prompt.items()}
            with evaluation_mode(model):
                generated = model.generate(**inputs, generation_config=config)[0]
            ids = prompt["input_ids"][0].tolist()
            response = generated[len(ids) :].tolist()
            yield {
                "prompt": str(self.tokenizer.decode(ids)),
                "response": str(self.tokenizer.decode(response, skip_special_tokens=True)),
            }


def _prompt(example: Example, data: TrainingData) -> dict[str, Tensor]:
    """The inputs of an example up to its first answer; up to its last one if it has images, all of which
    the network must get at once."""
    in_loss = (example.labels != IGNORED).nonzero().flatten()
    if example.images is None:
        # The first token is never predicted, so a text whose loss begins there has no prompt.
        end = int(in_loss[0]) or max(1, len(example.input_ids) // _PROMPT_FRACTION)
        ids = example.input_ids[None, :end].long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = data.objective.batch([example])
    jumps = (in_loss.diff() > 1).nonzero().flatten()
    end = int(in_loss[jumps[-1] + 1]) if len(jumps) else int(in_loss[0])
    shape = batch.pop("labels").shape
    return {name: tensor[:, :end] if tensor.shape[:2] == shape else tensor for name, tensor in batch.items()}
