"""Directories of every kind answer as the model that they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from svdconvert import (
    LoraOptions,
    MergeOptions,
    Run,
    SplitOptions,
    TrainOptions,
    decompose,
    merge,
    to_lora,
    train,
)
from svdconvert.errors import SvdConvertError
from svdconvert.training.compat import reset_accelerate_state
from tests import rwkv6
from tests.evaluation.directories import (
    CPU,
    WORD_OF_TOKEN,
    answers,
    answers_in,
    asked,
    lively,
    write_questions,
)
from tests.reading import tokenizer_of, write_sums

Ask = Callable[..., list[str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: a tiny Llama in float32; data.jsonl: questions; sums.jsonl: rows to train on."""
    home = tmp_path_factory.mktemp("home")
    lively(home / "base")
    write_questions(home / "data.jsonl")
    write_sums(home / "sums.jsonl")
    return home


@pytest.fixture
def ask(home: Path, tmp_path: Path) -> Ask:
    """The answers of a directory; every call writes to a place of its own."""
    count = iter(range(99))
    return lambda model, **given: answers(
        model, home / "data.jsonl", tmp_path / f"results-{next(count)}", **given
    )


@pytest.fixture(autouse=True)
def _reset_accelerate() -> Any:
    yield
    reset_accelerate_state()


def trained(model: Path, out: Path, home: Path, split: SplitOptions | None = None, **options: Any) -> Path:
    """Train until the answers change."""
    plan = {"data": str(home / "sums.jsonl"), "steps": 6, "lr": 2e-2, "batch_size": 4, "precision": "fp32"}
    train(
        model, out, TrainOptions(**{**plan, "device": "cpu", "max_length": 64, **options}), CPU, split=split
    )
    return out


def test_a_decomposed_directory_answers_as_its_base(home: Path, ask: Ask, tmp_path: Path) -> None:
    decompose(home / "base", tmp_path / "pissa", SplitOptions(rank=4), CPU)
    decompose(home / "base", tmp_path / "lora", SplitOptions(rank=4, method="lora"), CPU)
    before = ask(home / "base")
    assert len(set(" ".join(before).split())) > 8, "the answers are too much alike to compare"
    assert ask(tmp_path / "pissa") == before
    assert ask(tmp_path / "lora") == before


@pytest.mark.parametrize("method", ["pissa", "sorsa", "lora", "lora-xs"])
def test_trained_merged_and_lora_answer_alike(method: str, home: Path, ask: Ask, tmp_path: Path) -> None:
    decompose(home / "base", tmp_path / "start", SplitOptions(rank=4, method=method), CPU)
    adapter = trained(tmp_path / "start", tmp_path / "trained", home, lr=1e-1)
    merge(adapter, tmp_path / "merged", MergeOptions(side="base"), CPU)
    to_lora(adapter, tmp_path / "plain", LoraOptions(), CPU)
    after = ask(tmp_path / "merged")
    assert after != ask(home / "base"), "training changed nothing, so nothing is compared"
    assert ask(adapter) == after
    assert ask(adapter, base=str(home / "base")) == after
    assert ask(tmp_path / "plain") == after


def test_an_adapter_that_was_trained_without_decompose_answers_as_merged(
    home: Path, ask: Ask, tmp_path: Path
) -> None:
    """Its residual is stored nowhere; norms are trained too."""
    split = SplitOptions(rank=4)
    adapter = trained(home / "base", tmp_path / "trained", home, split, lr=1e-1, train_also=("norms",))
    merge(adapter, tmp_path / "merged", MergeOptions(), CPU)
    after = ask(tmp_path / "merged")
    assert after != ask(home / "base")
    assert ask(adapter) == after


def test_a_fine_tuned_model_answers_as_stock_transformers(home: Path, ask: Ask, tmp_path: Path) -> None:
    tuned = trained(home / "base", tmp_path / "tuned", home, SplitOptions(method="full"), lr=1e-2)
    tokenizer = tokenizer_of(WORD_OF_TOKEN)
    network = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    found = ask(tuned, max_new_tokens=6)
    for line, answer in zip(answers_in(tmp_path / "results-0"), found, strict=True):
        ids = tokenizer(line["prompt"], return_tensors="pt")["input_ids"]
        made = network.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2)
        text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer == text


def test_a_four_bit_residual_answers_as_merged_from_it(home: Path, ask: Ask, tmp_path: Path) -> None:
    decompose(home / "base", tmp_path / "start", SplitOptions(rank=4, residual_format="nf4"), CPU)
    adapter = trained(tmp_path / "start", tmp_path / "trained", home, lr=1e-1)
    merge(adapter, tmp_path / "merged", MergeOptions(side="residual", dtype="float32"), CPU)
    after = ask(tmp_path / "merged")
    assert after != ask(tmp_path / "start")
    assert ask(adapter) == after


def test_an_adapter_of_peft_answers_as_in_peft(home: Path, ask: Ask, tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
    torch.manual_seed(3)
    peft = get_peft_model(network, LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "down_proj"]))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(tmp_path / "peft")
    merge(tmp_path / "peft", tmp_path / "merged", MergeOptions(), CPU, base=str(home / "base"))
    after = ask(tmp_path / "peft", base=str(home / "base"))
    assert after == ask(tmp_path / "merged") != ask(home / "base")


def test_rwkv6_answers_in_our_own_network(ask: Ask, home: Path, tmp_path: Path) -> None:
    """A file of bytes: the base, its decomposition, the adapter and the merged model."""
    base = rwkv6.save(rwkv6.random_model(vocabulary=256), tmp_path / "base.pth", None)
    decompose(base, tmp_path / "start", SplitOptions(rank=4), CPU)
    before = ask(base)
    assert ask(tmp_path / "start") == before
    adapter = trained(tmp_path / "start", tmp_path / "trained", home, lr=5e-2, max_length=256)
    merge(adapter, tmp_path / "merged", MergeOptions(side="base"), CPU)
    assert ask(adapter) == ask(tmp_path / "merged") != before


def test_what_is_not_used_is_refused(home: Path, tmp_path: Path) -> None:
    decompose(home / "base", tmp_path / "start", SplitOptions(rank=4), CPU)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"sentence1": "1", "sentence2": "2", "label": 0}\n')
    for given, words in (({"base": str(home / "base")}, "`base`"), ({"residual": "x"}, "`residual`")):
        with pytest.raises(SvdConvertError, match=f"{words}.* changes nothing"):
            asked(home / "base", home / "data.jsonl", tmp_path / "out", **given)
    with pytest.raises(SvdConvertError, match="`base` .* changes nothing"):
        asked(tmp_path / "start", home / "data.jsonl", tmp_path / "out", base=str(home / "base"))
    with pytest.raises(SvdConvertError, match="needs a classifier"):
        asked(home / "base", pairs, tmp_path / "out", tasks=("mrpc",))
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_has_changed_is_refused(home: Path, tmp_path: Path) -> None:
    decompose(home / "base", tmp_path / "start", SplitOptions(rank=4), CPU)
    file = next((tmp_path / "start").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(SvdConvertError, match=r"is not the tensor that .* lists"):
        asked(tmp_path / "start", home / "data.jsonl", tmp_path / "out")


def test_the_result_says_which_model_answered(home: Path, tmp_path: Path) -> None:
    decompose(home / "base", tmp_path / "start", SplitOptions(rank=4, method="milora"), CPU)
    result = asked(tmp_path / "start", home / "data.jsonl", tmp_path / "out")
    assert (result.model.kind, result.model.method, result.model.rank) == ("decomposed", "milora", 4)
    assert result.model.name == "start"
    plain = asked(home / "base", home / "data.jsonl", tmp_path / "plain", run=Run(device="cpu"))
    assert plain.model.kind == "plain"
    assert plain.model.fingerprint != result.model.fingerprint
    assert json.loads((tmp_path / "plain" / "evaluations" / "gsm8k.json").read_text())["task"] == "gsm8k"
