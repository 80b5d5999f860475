"""A tokenizer of single characters and a model of two layers, both made on the spot."""

import string
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer, PreTrainedTokenizerFast

from svdconvert.training.compat import reset_accelerate_state
from tests.conftest import Build
from tests.reading import readable, write_sums

CHARACTERS = sorted(string.ascii_letters + string.digits + " \n:#,.?<>|'/=+-[]{}")
VOCABULARY = {token: number for number, token in enumerate(["<s>", "</s>", "<end>", *CHARACTERS, ":x"])}
# Every turn ends in a mark that is not the end-of-sequence token, as Gemma's do.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def base(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer; next to its directory lies sums.jsonl. Not to be written to."""
    home = tmp_path_factory.mktemp("home")
    write_sums(home / "sums.jsonl")
    return readable(checkpoint("llama", dtype=torch.float32), home / "base")


@pytest.fixture(autouse=True)
def _reset_accelerate() -> Iterator[None]:
    yield
    reset_accelerate_state()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, but `:x` is one; adds <s> in front, ends in </s>, and has no padding token."""
    backend = Tokenizer(BPE(vocab=VOCABULARY, merges=[(":", "x")]))
    backend.add_special_tokens(["<s>", "</s>", "<end>"])
    backend.decoder = decoders.Fuse()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", VOCABULARY["<s>"])])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT_TEMPLATE
    return made


class PythonTokenizer(PreTrainedTokenizer):
    """The same without offsets, as tokenizers written in Python are."""

    def __init__(self) -> None:
        super().__init__(bos_token="<s>", eos_token="</s>")

    @property
    def vocab_size(self) -> int:
        return len(VOCABULARY)

    def get_vocab(self) -> dict[str, int]:
        return dict(VOCABULARY)

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        tokens: list[str] = []
        for character in text:
            if tokens and tokens[-1] + character == ":x":
                tokens[-1] = ":x"
            else:
                tokens.append(character)
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return VOCABULARY[token]

    def _convert_id_to_token(self, index: int) -> str:
        return next(token for token, number in VOCABULARY.items() if number == index)

    def build_inputs_with_special_tokens(self, ids: list[int], pair: list[int] | None = None) -> list[int]:
        return [VOCABULARY["<s>"], *ids]


@pytest.fixture
def python_tokenizer() -> PythonTokenizer:
    return PythonTokenizer()


@pytest.fixture
def make_model() -> Callable[..., LlamaForCausalLM]:
    """Makes the same random Llama every time; keywords go to its config."""

    def make(**config: object) -> LlamaForCausalLM:
        torch.manual_seed(0)
        shape = {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        return LlamaForCausalLM(LlamaConfig(**{**shape, **config}))

    return make
