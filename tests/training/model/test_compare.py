"""A network with weights that are not the checkpoint's, or without a row for a token, is not trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdconvert import Run, SplitOptions, SvdConvertError, train
from svdconvert.errors import DataError
from svdconvert.training.data.example import Example
from svdconvert.training.model.compare import require_embedded
from tests.conftest import Build
from tests.reading import readable
from tests.training.small_runs import LORA, text_options

Tensors = dict[str, torch.Tensor]
FULL = SplitOptions(method="full")
HEAD = "lm_head.weight"


@pytest.fixture
def untied(base: Path, checkpoint: Build, tmp_path: Path) -> Path:
    """A Llama with a separate head."""
    made = readable(checkpoint("llama", dtype=torch.float32), tmp_path / "untied")
    assert HEAD in load_file(made / "model.safetensors")
    return made


def edit(directory: Path, change: Callable[[Tensors], Any]) -> None:
    """Change the tensors of a checkpoint of one file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def refusal(model: Path, base: Path, split: SplitOptions, **options: Any) -> str:
    """The sentence with which training is refused; nothing is left behind."""
    out = model.parent / "refused"
    with pytest.raises(SvdConvertError) as raised:
        train(model, out, text_options(base, **options), split=split)
    assert not out.exists() and not out.with_name("refused.partial").exists()
    return str(raised.value)


@pytest.mark.parametrize("split", [LORA, FULL], ids=lambda split: split.method)
@pytest.mark.parametrize("name", [HEAD, "model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_a_weight_that_the_checkpoint_does_not_have_is_refused_by_name(
    name: str, split: SplitOptions, untied: Path, base: Path
) -> None:
    edit(untied, lambda tensors: tensors.pop(name))
    said = refusal(untied, base, split)
    assert f"does not have {name}, so LlamaForCausalLM would be trained with random values" in said
    assert ("tie_word_embeddings" in said) == (name == HEAD)


def test_a_head_that_is_the_embedding_is_not_missing(untied: Path, base: Path, tmp_path: Path) -> None:
    edit(untied, lambda tensors: tensors.pop(HEAD))
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    said: list[str] = []
    train(untied, tmp_path / "out", text_options(base), Run(notify=said.append), split=LORA)
    assert not said


@pytest.mark.parametrize("split", [LORA, FULL], ids=lambda split: split.method)
def test_tensors_that_the_network_does_not_have_are_named_once(
    split: SplitOptions, untied: Path, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(untied, lambda tensors: tensors.update({"score.weight": torch.ones(1, 4)}))
    said: list[str] = []
    train(untied, tmp_path / "out", text_options(base, lr=1e-3), Run(notify=said.append), split=split)
    (sentence,) = [sentence for sentence in said if "score.weight" in sentence]
    assert "tensors that LlamaForCausalLM does not have and that are not trained: score.weight" in sentence
    assert "score.weight" not in "".join(capfd.readouterr())


def test_a_tensor_of_another_shape_than_config_json_says_is_refused_by_name(untied: Path, base: Path) -> None:
    edit(untied, lambda tensors: tensors.update({HEAD: tensors[HEAD][:-3].clone()}))
    said = refusal(untied, base, FULL)
    assert HEAD in said and "but its config.json describes" in said


def test_a_classifier_without_a_weight_of_its_body_is_refused(
    checkpoint: Build, base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    encoder = readable(checkpoint("bert"), tmp_path / "encoder")
    rows = [{"sentence": "1 + 1", "label": number % 2} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = next(
        name
        for name in load_file(encoder / "model.safetensors")
        if name.endswith("layer.0.output.LayerNorm.weight")
    )
    edit(encoder, lambda tensors: tensors.pop(name))
    options = {"task": "classify", "data": str(tmp_path / "rows.jsonl"), "eval_rows": 0, "eval_every": None}
    assert "layer.0.output.LayerNorm.weight" in refusal(encoder, base, LORA, **options)


@pytest.mark.parametrize("split", [LORA, FULL], ids=lambda split: split.method)
def test_a_token_beyond_the_embedding_is_refused_with_its_number(
    split: SplitOptions, untied: Path, base: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(untied)
    rows = load_file(untied / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    tokenizer.add_tokens([f"<filler{n}>" for n in range(rows - len(tokenizer))])
    tokenizer.add_tokens(["<new>"])
    number = tokenizer.convert_tokens_to_ids("<new>")
    assert number == rows
    tokenizer.save_pretrained(untied)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1", "completion": "<new>"}\n' * 5)
    said = refusal(untied, base, split, data=str(data), eval_rows=1)
    assert f"the rows have the token '<new>' with id {number}" in said
    assert f"the embedding of {untied} has {rows} rows" in said


def test_a_padding_token_beyond_the_embedding_changes_nothing(
    untied: Path, base: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    options = text_options(base, batch_size=3)
    expected = train(untied, tmp_path / "a", options, Run(threads=1), split=LORA)
    padded = shutil.copytree(untied, tmp_path / "padded")
    tokenizer: Any = AutoTokenizer.from_pretrained(untied)
    rows = load_file(untied / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    tokenizer.add_tokens([f"<filler{n}>" for n in range(rows - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<pad of its own>"})
    assert tokenizer.pad_token_id >= rows
    tokenizer.save_pretrained(padded)
    found = train(padded, tmp_path / "b", options, Run(threads=1), split=LORA)
    assert found.files == expected.files


def test_the_last_row_of_the_embedding_can_be_used(tokenizer: Any) -> None:
    class Network(torch.nn.Module):
        def get_input_embeddings(self) -> torch.nn.Module:
            return torch.nn.Embedding(20, 2)

    def of(*ids: int) -> Example:
        return Example(torch.tensor(ids, dtype=torch.int32), torch.tensor(ids, dtype=torch.int32))

    require_embedded(Path("m"), Network(), tokenizer, [of(1, 19), of(0)])
    with pytest.raises(DataError, match="with id 20, but the embedding of m has 20 rows"):
        require_embedded(Path("m"), Network(), tokenizer, [of(1, 19), of(20)])
