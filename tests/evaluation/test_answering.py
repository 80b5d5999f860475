"""Answers in batches are those of transformers' own greedy decoding, row by row."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    FalconH1Config,
    FalconH1ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.evaluation import decoders
from svdconvert.evaluation.answering import Answer, _close_ranks, context_length, cut_at_stop, plan_batches
from svdconvert.evaluation.decoder import shared_beginning
from svdconvert.evaluation.decoders import CachedDecoder, RecurrentDecoder, UnsharedDecoder, open_decoder
from svdconvert.models.rwkv6 import load
from tests import rwkv6, tiny, vision
from tests.conftest import Build
from tests.evaluation.numbers import Numbers, batched, endings, random_prompts, stock

LENGTHS = (9, 5, 14, 7, 7, 12, 6)


@pytest.fixture(autouse=True)
def _short_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch's prompts are read in several portions, of a row or two."""
    monkeypatch.setattr(decoders, "_READ_TOKENS", 20)


def network_of(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("shared", [0, 4])
def test_batches_answer_as_row_by_row(checkpoint: Build, shared: int, size: int) -> None:
    network = network_of(checkpoint("llama"))
    prompts = random_prompts(LENGTHS, shared)
    answers = batched(network, prompts, endings(), size)
    assert [answer.text for answer in answers] == [stock(network, prompt, 8) for prompt in prompts]
    assert {answer.end for answer in answers} == {"limit"}


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen3_moe", "qwen2"])
def test_every_family_answers_as_row_by_row(checkpoint: Build, family: str) -> None:
    network = network_of(checkpoint(family))
    prompts = random_prompts(LENGTHS, 3)
    answers = batched(network, prompts, endings(), 4)
    assert [answer.text for answer in answers] == [stock(network, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_a_model_that_takes_images_answers_a_text_as_row_by_row(family: str, tmp_path: Path) -> None:
    network = AutoModelForImageTextToText.from_pretrained(
        vision.build(family, tmp_path), dtype=torch.float32
    ).eval()
    lively(network)
    prompts = random_prompts(LENGTHS, 3, 20)
    answers = batched(network, prompts, endings(), 4)
    assert [answer.text for answer in answers] == [stock(network, prompt, 8) for prompt in prompts]


def lively(network: Any) -> None:
    """Make the weights so large that different prompts have different answers."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.6)


def small(kind: type, config: Any) -> Any:
    """A random network with decaying spectra."""
    torch.manual_seed(1)
    network = kind(config)
    tiny.fill(network)
    return network.float().eval()


@pytest.mark.parametrize("new_tokens", [4, 20])
def test_a_sliding_window_sees_no_padding(new_tokens: int) -> None:
    """With 20 new tokens the window is full, so the beginning cannot be shared in front of padding."""
    network = small(MistralForCausalLM, MistralConfig(**tiny.TEXT, sliding_window=20))
    prompts = random_prompts(LENGTHS, 4)
    answers = batched(network, prompts, endings(max_new_tokens=new_tokens), 7)
    assert [answer.text for answer in answers] == [stock(network, prompt, new_tokens) for prompt in prompts]


def test_learned_positions_are_those_of_a_row_without_padding() -> None:
    config = GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    network = small(GPT2LMHeadModel, config)
    prompts = random_prompts(LENGTHS, 4)
    answers = batched(network, prompts, endings(context=context_length(network)), 7)
    assert [answer.text for answer in answers] == [stock(network, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize(
    "network",
    [
        lambda: small(
            MambaForCausalLM, MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)
        ),
        lambda: small(
            FalconH1ForCausalLM,
            FalconH1Config(**tiny.TEXT, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
        ),
    ],
    ids=["mamba", "falcon-h1"],
)
def test_networks_with_a_state_answer_as_row_by_row(network: Any) -> None:
    made = network()
    assert isinstance(open_decoder(made, (), 20), UnsharedDecoder)
    prompts = random_prompts(LENGTHS[:4], 2)
    answers = batched(made, prompts, endings(), 4)
    assert [answer.text for answer in answers] == [stock(made, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("shared", [0, 4])
def test_rwkv6_answers_as_row_by_row(shared: int, state: bool, tmp_path: Path) -> None:
    file = rwkv6.save(rwkv6.random_model(state=state), tmp_path / "model.pth", None)
    network = load(open_checkpoint(file), torch.float32)
    prompts = random_prompts(LENGTHS, shared)
    assert isinstance(open_decoder(network, (), 20), RecurrentDecoder)
    answers = batched(network, prompts, endings(), 4)
    alone = [list(network.answer(prompt, 8, stop=-1)) for prompt in prompts]
    assert [answer.text for answer in answers] == [Numbers().decode(ids) for ids in alone]


def test_an_answer_ends_with_its_stop_its_end_token_or_its_limit(checkpoint: Build) -> None:
    network = network_of(checkpoint("llama"))
    prompts = random_prompts(LENGTHS, 4)
    free = [stock(network, prompt, 8).split() for prompt in prompts]
    stop = f"{free[0][0]} "
    ending = int(next(ids[0] for ids in free if ids[0] != free[0][0]))
    answers = batched(network, prompts, endings(ids=frozenset({ending}), stops=(stop,)), 3)
    assert answers == [expected(ids, ending, stop) for ids in free]
    assert {answer.end for answer in answers} >= {"end", "stop"}


def expected(free: Sequence[str], ending: int, stop: str) -> Answer:
    """What is left of eight tokens that were generated without an end."""
    before: list[str] = []
    for count, token in enumerate(free, start=1):
        if int(token) == ending:
            return Answer("".join(f"{one} " for one in before), count, "end")
        before.append(token)
        text = "".join(f"{one} " for one in before)
        if stop in text:
            return Answer(cut_at_stop(text, (stop,)), count, "stop")
    return Answer(text, len(free), "limit")


def test_an_answer_tells_how_long_it_would_be_with_a_smaller_limit(checkpoint: Build) -> None:
    network = network_of(checkpoint("llama"))
    prompt = random_prompts([5], 0)
    (answer,) = batched(network, prompt, endings(smaller_limits=(3, 9)), 1)
    assert answer.text[: answer.lengths[3]] == stock(network, prompt[0], 3)
    assert answer.lengths.keys() == {3}


def test_a_prompt_that_does_not_fit_stays_without_an_answer(checkpoint: Build) -> None:
    network = network_of(checkpoint("llama"))
    prompts = random_prompts((5, 12, 9), 3)
    answers = batched(network, prompts, endings(context=12), 3)
    assert [answer.tokens for answer in answers] == [7, 0, 3]
    assert answers[0].text == stock(network, prompts[0], 7)
    assert answers[1] == Answer("", 0, "limit")


def test_batches_are_fixed_and_hold_rows_of_like_lengths() -> None:
    assert plan_batches([3, 9, 5, 9, 1], 2) == [[1, 3], [2, 0], [4]]
    assert plan_batches([], 4) == []


def test_a_row_that_goes_on_changes_its_place_only_to_fill_a_gap() -> None:
    assert _close_ranks([True, False, True, True, False, True]) == [0, 5, 2, 3]
    assert _close_ranks([False, False]) == []


def test_prompts_are_read_in_portions_of_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_READ_TOKENS", 6)
    lengths = [9, 3, 3, 2, 2, 2, 1]
    portions = decoders._portions([[0] * length for length in lengths])
    assert [[len(prompt) for prompt in portion] for portion in portions] == [[9], [3, 3], [2, 2, 2], [1]]


def test_the_shared_beginning_leaves_a_token_of_every_row() -> None:
    assert shared_beginning([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 4]]) == [1, 2]
    assert shared_beginning([[1, 2], [1, 2, 3]]) == [1]
    assert shared_beginning([[7]]) == []
    assert shared_beginning([[1], [2]]) == []


def test_the_beginning_is_computed_once(checkpoint: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(checkpoint("llama"))
    decoder = CachedDecoder(network, (5, 6, 7))
    widths: list[int] = []
    real = type(network).forward

    def counted(self: Any, **inputs: Any) -> Any:
        widths.append(inputs["input_ids"].shape[1])
        return real(self, **inputs)

    monkeypatch.setattr(type(network), "forward", counted)
    decoder._options = {}
    decoder.start([[5, 6, 7, 8], [5, 6, 7, 9, 10]])
    decoder.start([[5, 6, 7, 8]])
    assert widths == [2, 1]
