"""Encoders with a decoder (T5, BART): decomposed, merged and converted; stock PEFT trains them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM, BartConfig, PretrainedConfig, T5Config

from svdconvert import Run, SplitOptions, TrainOptions, decompose, merge, read_manifest, to_lora, train
from svdconvert.errors import ArtifactError
from tests.program import succeeded
from tests.reading import write_sums, write_tokenizer
from tests.stock import same_bytes, tensors
from tests.tiny import fill

RUN = Run(device="cpu", threads=1)


def _t5(**values: Any) -> PretrainedConfig:
    return T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=44, num_layers=2, num_heads=4, decoder_start_token_id=0,
        **values,
    )  # fmt: skip


def _bart() -> PretrainedConfig:
    return BartConfig(
        vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=44, decoder_ffn_dim=40, max_position_embeddings=64,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "t5": _t5,
    "t5 with gates and a head": lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": _bart,
}
every_model = pytest.mark.parametrize("kind", CONFIGS)
Base = Callable[[str], Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("base") / "model"
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                model = AutoModelForSeq2SeqLM.from_config(CONFIGS[kind]())
                fill(model)
            model.save_pretrained(made[kind])
            write_tokenizer(made[kind])
        return made[kind]

    return make


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 14, 3, 22, 1]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, decoder_input_ids=ids[:, :4] + 1).logits
    return found


def stock(path: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(path)


@every_model
def test_the_residual_and_its_adapter_are_the_base(kind: str, base: Base, tmp_path: Path) -> None:
    source = base(kind)
    decompose(source, tmp_path / "start", SplitOptions(rank=4), RUN)
    roles = {matrix.role for matrix in read_manifest(tmp_path / "start").matrices.values()}
    assert {"encoder.attn.q", "decoder.attn.q", "decoder.cross.q"} <= roles
    expected = logits(stock(source))
    residual = stock(tmp_path / "start")
    assert not torch.allclose(logits(residual), expected, atol=1e-2)
    adapted = PeftModel.from_pretrained(residual, tmp_path / "start" / "pissa_init")
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    assert adapted.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    merge(tmp_path / "start", tmp_path / "merged", run=RUN)
    assert same_bytes(tensors(tmp_path / "merged"), tensors(source))


@every_model
def test_every_matrix_that_peft_adapts_is_decomposed(kind: str, base: Base, tmp_path: Path) -> None:
    source = base(kind)
    decompose(source, tmp_path / "start", SplitOptions(rank=4), RUN)
    ours = {matrix.module for matrix in read_manifest(tmp_path / "start").matrices.values()}
    config = LoraConfig(target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(stock(source), config)
    theirs = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        for name, _ in model.named_parameters()
        if ".lora_A." in name
    }
    assert ours == theirs


@every_model
def test_what_peft_trained_from_the_start_is_merged_and_converted(
    kind: str, base: Base, tmp_path: Path
) -> None:
    source = base(kind)
    decompose(source, tmp_path / "start", SplitOptions(rank=4), RUN)
    model = PeftModel.from_pretrained(
        stock(tmp_path / "start"), tmp_path / "start" / "pissa_init", is_trainable=True
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path / "trained")
    merge(tmp_path / "trained", tmp_path / "merged", run=RUN, residual=str(tmp_path / "start"))
    torch.testing.assert_close(logits(stock(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4)
    to_lora(tmp_path / "trained", tmp_path / "lora", run=RUN, residual=str(tmp_path / "start"))
    lora = PeftModel.from_pretrained(stock(source), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), expected, rtol=1e-4, atol=1e-4)


@every_model
def test_training_is_refused_with_a_way_out(kind: str, base: Base, tmp_path: Path) -> None:
    rows = write_sums(tmp_path / "rows.jsonl")
    with pytest.raises(
        ArtifactError, match="is an encoder with a decoder .*; train the adapter .* with PEFT"
    ):
        train(
            base(kind),
            tmp_path / "out",
            TrainOptions(data=str(rows), steps=1),
            RUN,
            split=SplitOptions(rank=4),
        )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_the_class_that_loads_it_is_named(base: Base, tmp_path: Path) -> None:
    decompose(base("t5"), tmp_path / "start", SplitOptions(rank=4), RUN)
    said = succeeded("merge", tmp_path / "start", "-o", tmp_path / "merged")
    assert "AutoModelForSeq2SeqLM.from_pretrained(" in said.out
