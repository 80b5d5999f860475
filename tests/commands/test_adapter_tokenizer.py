"""A merge and a LoRA have the tokenizer and chat template with which the adapter was trained."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from svdconvert import (
    LoraOptions,
    MergeOptions,
    Run,
    SplitOptions,
    combine,
    decompose,
    inspect,
    merge,
    to_lora,
)
from tests.conftest import Build
from tests.reading import readable, write_tokenizer
from tests.stock import plain, start_of, trained_from

MESSAGES = [{"role": "user", "content": "3"}]


def grown_tokenizer(directory: Path) -> tuple[list[int], str]:
    """Write a tokenizer with one more token and a template; return a text's ids and a formatted chat."""
    write_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.chat_template = "adapter: {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(directory)
    return encoded(directory)


def encoded(directory: Path) -> tuple[list[int], str]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return tokenizer.encode("what <tool> 3"), tokenizer.apply_chat_template(MESSAGES, tokenize=False)


def test_the_adapters_tokenizer_is_in_the_merge_and_in_the_lora(checkpoint: Build, tmp_path: Path) -> None:
    base = readable(checkpoint("llama", dtype=torch.float32), tmp_path / "base")
    decompose(base, tmp_path / "split", SplitOptions(rank=4), Run())
    trained = trained_from(tmp_path / "split", tmp_path / "trained")
    wanted = grown_tokenizer(trained)
    said: list[str] = []
    sources = {"base": str(base), "residual": str(tmp_path / "split")}
    merge(trained, tmp_path / "merged", MergeOptions(), Run(notify=said.append), **sources)
    assert encoded(tmp_path / "merged") == wanted
    assert any("tokenizer.json" in line and str(trained) in line for line in said)
    to_lora(trained, tmp_path / "lora", LoraOptions(), Run(), residual=sources["residual"])
    assert encoded(tmp_path / "lora") == wanted


def test_the_models_tokenizer_stays_if_the_adapter_has_none(checkpoint: Build, tmp_path: Path) -> None:
    base = readable(checkpoint("llama", dtype=torch.float32), tmp_path / "base")
    decompose(base, tmp_path / "split", SplitOptions(rank=4), Run())
    trained = trained_from(tmp_path / "split", tmp_path / "trained")
    said: list[str] = []
    sources = {"base": str(base), "residual": str(tmp_path / "split")}
    merge(trained, tmp_path / "merged", MergeOptions(), Run(notify=said.append), **sources)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert not any("tokenizer" in line for line in said)


def test_a_stray_adapter_config_does_not_travel_and_makes_no_adapter(
    checkpoint: Build, tmp_path: Path
) -> None:
    base = readable(checkpoint("llama", dtype=torch.float32), tmp_path / "base")
    decompose(base, tmp_path / "split", SplitOptions(rank=4), Run())
    stray = base / "adapter_config.json"
    stray.write_bytes((start_of(tmp_path / "split") / stray.name).read_bytes())
    assert inspect(base).kind == "checkpoint"
    decompose(base, tmp_path / "out", SplitOptions(rank=4), Run())
    merge(tmp_path / "out", tmp_path / "merged", MergeOptions(), Run())
    for directory in (tmp_path / "out", tmp_path / "merged"):
        assert not (directory / stray.name).exists()
        plain(directory)


@pytest.mark.parametrize("command", ["merge", "combine"])
def test_of_several_adapters_the_first_tokenizer_is_kept_and_another_one_is_named(
    command: str, checkpoint: Build, tmp_path: Path
) -> None:
    base = readable(checkpoint("llama", dtype=torch.float32), tmp_path / "base")
    adapters = [tmp_path / name for name in "abc"]
    for seed, adapter in enumerate(adapters):
        decompose(base, adapter, SplitOptions(rank=2, method="lora", seed=seed), Run())
    wanted = grown_tokenizer(adapters[1])
    write_tokenizer(adapters[2])
    said: list[str] = []

    def made(*given: Path) -> Path:
        out = tmp_path / f"out-{len([*tmp_path.iterdir()])}"
        if command == "merge":
            merge(given, out, MergeOptions(), Run(notify=said.append), base=str(base))
        else:
            combine(given, out, run=Run(notify=said.append))
        return out

    assert encoded(made(adapters[0], adapters[1])) == wanted
    assert not any("tokenizer of" in line for line in said)
    assert encoded(made(adapters[1], adapters[2])) == wanted
    assert [
        line for line in said if f"the tokenizer of {adapters[1]} is kept, and that of {adapters[2]}" in line
    ]
