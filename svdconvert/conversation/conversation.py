"""A conversation with a model: questions in, answers out piece by piece."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svdconvert.config.chat import CHAT, NO_TEMPLATE, ChatOptions
from svdconvert.config.execution import Run
from svdconvert.conversation.sampling import Sampler
from svdconvert.errors import ArtifactError, DataError
from svdconvert.evaluation.answering import context_length, decode, encode_prompts, ending_ids
from svdconvert.evaluation.decoder import Decoder
from svdconvert.evaluation.decoders import open_decoder
from svdconvert.evaluation.loading import open_answering
from svdconvert.hub.download import fetch
from svdconvert.manifest.schema import has_manifest, read_manifest, training_of
from svdconvert.training.data.chats import render_turns
from svdconvert.training.data.prompts import format_prompt
from svdconvert.training.data.rows import valid_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Conversation:
    """A loaded model, how it is asked, and what was said so far."""

    network: nn.Module
    tokenizer: "PreTrainedTokenizerBase"
    template: str
    """ "chat", "none", or a text with {prompt} in it."""
    options: ChatOptions
    turns: list[dict[str, Any]] = field(default_factory=list)
    """Questions and answers; only the tokenizer's chat template shows earlier ones to the model."""

    def __post_init__(self) -> None:
        self._sampler = Sampler(self.options)

    def reset(self) -> None:
        """Forget what was said; what is drawn begins anew too."""
        self.turns = []
        self._sampler = Sampler(self.options)

    def ask(self, prompt: str) -> Iterator[str]:
        """Pieces of the answer as they are made; leaving the iterator ends the answer there.

        Raises DataError if the prompt is empty or too long for the model.
        """
        if not prompt.strip():
            raise DataError("the prompt is empty; write a question or the beginning of a text")
        turns = [*self.turns, {"role": "user", "content": prompt}]
        ids = self._encode(turns)
        said: list[str] = []
        try:
            for piece in self._continue(ids):
                said.append(piece)
                yield piece
        finally:
            if self.template == CHAT:
                self.turns = [*turns, {"role": "assistant", "content": "".join(said)}]

    def _encode(self, turns: Sequence[dict[str, Any]]) -> list[int]:
        if self.template == CHAT:
            text = valid_text(render_turns(list(turns), self.tokenizer, add_generation_prompt=True))
            # The template has written the special tokens.
            encoded: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)
            return list(encoded["input_ids"])
        text = valid_text(format_prompt(str(turns[-1]["content"]), self.template))
        return encode_prompts(self.tokenizer, [text], 0)[0]

    def _continue(self, ids: list[int]) -> Iterator[str]:
        """The text of the tokens that follow, without changes to what was yielded before."""
        room = self._room(len(ids))
        endings = ending_ids(self.network, self.tokenizer)
        decoder = open_decoder(self.network, (), len(ids) + room)
        made: list[int] = []
        shown = ""
        logits_V = _start(decoder, ids)
        while len(made) < room and (token := self._sampler.choose(logits_V)) not in endings:
            made.append(token)
            text = decode(self.tokenizer, made)
            if not text.endswith(_INCOMPLETE):  # else more bytes of a character follow
                yield text[len(shown) :]
                shown = text
            if len(made) < room:
                logits_V = _step(decoder, token, logits_V.device)
        yield decode(self.tokenizer, made)[len(shown) :]

    def _room(self, length: int) -> int:
        context = context_length(self.network)
        room = self.options.max_new_tokens if context is None else context - length
        if room <= 0:
            raise DataError(
                f"the conversation has {length} tokens and the model takes {context}; ask something shorter, "
                "or begin anew with /reset"
            )
        return min(room, self.options.max_new_tokens)


@torch.no_grad()
def _start(decoder: Decoder, ids: list[int]) -> Tensor:
    return decoder.start([ids])[0]


@torch.no_grad()
def _step(decoder: Decoder, token: int, device: torch.device) -> Tensor:
    return decoder.step(torch.tensor([token], device=device))[0]


def open_conversation(
    model: str | Path, options: ChatOptions, run: Run, *, base: str | None = None, residual: str | None = None
) -> Conversation:
    """Load a model of any kind, an adapter with the weights that it belongs to.

    Raises SvdConvertError if it cannot be loaded, or is a classifier.
    """
    opened = open_answering(model, run, base=base, residual=residual)
    if opened.labels is not None:
        raise ArtifactError(f"{model} is a classifier, which writes no text; measure it with eval")
    tokenizer = opened.tokenizer(run)
    template = options.template or _trained_template(model) or _own_template(tokenizer)
    if template == CHAT and _own_template(tokenizer) != CHAT:
        raise ArtifactError(
            f"the tokenizer of {opened.weights.path} has no chat template; give as `template` a text that "
            'has {prompt} in it, or "none"'
        )
    return Conversation(opened.load(options.dtype, run), tokenizer, template, options)


def _trained_template(model: str | Path) -> str | None:
    """How the model was asked in its training, as far as its manifest says."""
    directory = fetch(str(model), "sidecars").path
    if not has_manifest(directory):
        return None
    training = training_of(directory, read_manifest(directory))
    return training.prompt if training else None


def _own_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    return CHAT if getattr(tokenizer, "chat_template", None) else NO_TEMPLATE
