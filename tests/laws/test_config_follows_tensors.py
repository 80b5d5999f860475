"""After every command a bare `from_pretrained` gives exactly the values that the files hold.

The oracle is stock transformers: what it loads without options is saved again under the names of the
files, and compared with the files, tensor by tensor. Older versions of transformers tie two different
matrices if the flag says so; this one does not, so the flag is compared too.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from svdconvert import (
    CombineOptions,
    ConvertOptions,
    ExtractOptions,
    MergeOptions,
    Run,
    SplitOptions,
    TrainOptions,
    combine,
    convert,
    decompose,
    extract,
    merge,
    to_lora,
    train,
)
from svdconvert.errors import ArtifactError
from tests.conftest import Build
from tests.quantization.checkpoints import KINDS, plain, quantise
from tests.reading import readable, write_sums
from tests.rwkv6 import random_model, save
from tests.stock import adapted, start_of, tensors, trained_from
from tests.tiny import SHARDED

Change = Callable[[dict[str, Tensor]], None]


def assert_loads_what_it_holds(directory: Path, scratch: Path) -> None:
    """Every value in the files is that of the model which transformers makes of the directory."""
    config = AutoConfig.from_pretrained(directory)
    kind = AutoModelForImageTextToText if config.model_type == "gemma3" else AutoModelForCausalLM
    kind.from_pretrained(directory).save_pretrained(scratch / "saved")
    held, loaded = tensors(directory), tensors(scratch / "saved")
    assert held
    for name, tensor in held.items():
        if name not in loaded:  # tied: it must be the matrix that it is tied to
            assert config.tie_word_embeddings and name.endswith("lm_head.weight"), name
            assert any(torch.equal(tensor, other) for other in held.values() if other is not tensor), name
        else:
            assert torch.equal(loaded[name].double(), tensor.double()), f"{name} is loaded with other values"
    assert loaded.keys() <= held.keys()
    head, embeddings = held.get("lm_head.weight"), held.get("model.embed_tokens.weight")
    if head is not None and embeddings is not None and not torch.equal(head, embeddings):
        assert config.tie_word_embeddings is False


def two_matrices(stored: dict[str, Tensor]) -> None:
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] * 2


def one_matrix_twice(stored: dict[str, Tensor]) -> None:
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()


def wide_norms(stored: dict[str, Tensor]) -> None:
    stored.update({name: tensor.float() + 1e-4 for name, tensor in stored.items() if tensor.dim() == 1})


def two_halves(stored: dict[str, Tensor]) -> None:
    stored.update(
        {name: (tensor.float() + 1e-4).half() for name, tensor in stored.items() if tensor.dim() == 1}
    )


SOURCES: dict[str, tuple[str, Mapping[str, object], Change | None]] = {
    "tied": ("llama", {"tied": True}, None),
    "tied shards": ("qwen2", {"tied": True, "shard": SHARDED}, None),
    "untied": ("llama", {"tied": False, "shard": SHARDED}, None),
    "tied by default": ("gemma2", {}, None),
    "a wrong flag": ("llama", {"tied": True}, two_matrices),
    "one matrix twice": ("llama", {"tied": True}, one_matrix_twice),
    "wide norms": ("llama", {}, wide_norms),
    "two kinds of halves": ("llama", {}, two_halves),
    "float16": ("llama", {"dtype": torch.float16}, None),
    "parts": ("gemma3", {}, None),
    "parts in float32": ("gemma3", {"dtype": torch.float32}, None),
}
every_source = pytest.mark.parametrize("source", SOURCES)


@pytest.fixture(scope="module")
def made(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a source, with its change in the first file."""
    found: dict[str, Path] = {}

    def make(source: str) -> Path:
        family, options, change = SOURCES[source]
        if source not in found:
            found[source] = tmp_path_factory.mktemp("source") / "base"
            shutil.copytree(checkpoint(family, **options), found[source])
            if change is not None:
                stored = load_file(found[source] / "model.safetensors")
                change(stored)
                save_file(stored, found[source] / "model.safetensors", metadata={"format": "pt"})
        return found[source]

    return make


@every_source
@pytest.mark.parametrize("options", [{}, {"method": "milora"}, {"residual_dtype": "float32"}], ids=str)
def test_what_decompose_writes(
    source: str, options: dict[str, str], made: Callable[[str], Path], tmp_path: Path
) -> None:
    decompose(made(source), tmp_path / "out", SplitOptions(rank=4, max_shard_size="8KB", **options), Run())
    assert_loads_what_it_holds(tmp_path / "out", tmp_path)


@pytest.mark.parametrize("source", [name for name, (family, *_) in SOURCES.items() if family != "gemma3"])
def test_what_stock_peft_loads_is_the_files_and_the_adapter(
    source: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    decompose(made(source), out, SplitOptions(rank=4), Run())
    loaded = adapted(out, start_of(out)).base_model.model.state_dict()
    plain_names = {name.replace(".base_layer", ""): tensor for name, tensor in loaded.items()}
    for name, tensor in tensors(out).items():
        assert torch.equal(plain_names[name].double(), tensor.double()), name


@every_source
@pytest.mark.parametrize(
    "options",
    [{}, {"side": "residual"}, {"dtype": "float32"}, {"rounding": "stochastic"}],
    ids=str,
)
def test_what_merge_writes(
    source: str, options: dict[str, str], made: Callable[[str], Path], tmp_path: Path
) -> None:
    decompose(made(source), tmp_path / "split", SplitOptions(rank=4), Run())
    trained = trained_from(tmp_path / "split", tmp_path / "trained")
    if source == "parts in float32" and "rounding" in options:  # it is refused for what is not rounded
        options = {**options, "dtype": "bfloat16"}
    chosen = MergeOptions(max_shard_size="8KB", **options)
    merge(trained, tmp_path / "out", chosen, Run(), base=str(made(source)), residual=str(tmp_path / "split"))
    assert_loads_what_it_holds(tmp_path / "out", tmp_path)


@every_source
def test_what_a_copied_base_and_a_merged_lora_are(
    source: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    base = made(source)
    decompose(base, tmp_path / "copy", SplitOptions(rank=4, method="lora", copy_base=True), Run())
    assert_loads_what_it_holds(tmp_path / "copy", tmp_path / "first")
    decompose(base, tmp_path / "split", SplitOptions(rank=4), Run())
    trained = trained_from(tmp_path / "split", tmp_path / "trained")
    to_lora(trained, tmp_path / "lora", residual=str(tmp_path / "split"))
    merge(tmp_path / "lora", tmp_path / "merged", base=str(base))
    assert_loads_what_it_holds(tmp_path / "merged", tmp_path / "second")
    decompose(tmp_path / "merged", tmp_path / "again", SplitOptions(rank=4), Run())
    assert_loads_what_it_holds(tmp_path / "again", tmp_path / "third")


@every_source
@pytest.mark.parametrize(
    ("method", "dtype"), [("linear", "auto"), ("linear", "float32"), ("slerp", "bfloat16")], ids=str
)
def test_what_a_combination_of_checkpoints_writes(
    source: str, method: str, dtype: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """With another checkpoint of the same tensors, all of whose values are twice as large."""
    base = made(source)
    shutil.copytree(base, tmp_path / "other")
    for shard in (tmp_path / "other").glob("*.safetensors"):
        doubled = {name: tensor * 2 for name, tensor in load_file(shard).items()}
        save_file(doubled, shard, metadata={"format": "pt"})
    options = CombineOptions(method=method, dtype=dtype, set={"t": 0.25} if method == "slerp" else None)
    named = str(base) if method == "slerp" else None
    combine([base, tmp_path / "other"], tmp_path / "out", options, Run(), base=named)
    assert_loads_what_it_holds(tmp_path / "out", tmp_path)


@every_source
def test_what_a_merge_of_several_adapters_and_of_an_extracted_one_writes(
    source: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    base = made(source)
    decompose(base, tmp_path / "split", SplitOptions(rank=4), Run())
    trained = trained_from(tmp_path / "split", tmp_path / "trained")
    to_lora(trained, tmp_path / "lora", residual=str(tmp_path / "split"))
    options = MergeOptions(weights=(0.5, 0.25))
    merge([tmp_path / "lora", tmp_path / "lora"], tmp_path / "merged", options, Run(), base=str(base))
    assert_loads_what_it_holds(tmp_path / "merged", tmp_path / "first")
    extract(base, tmp_path / "merged", tmp_path / "extracted", ExtractOptions(rank=4), Run())
    merge(tmp_path / "extracted", tmp_path / "again", MergeOptions(), Run(), base=str(base))
    assert_loads_what_it_holds(tmp_path / "again", tmp_path / "second")


TEXT_ONLY = [name for name, (family, *_) in SOURCES.items() if family != "gemma3"]


@pytest.mark.parametrize("source", TEXT_ONLY)
def test_what_full_training_writes(source: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    rows = write_sums(tmp_path / "sums.jsonl")
    base = readable(made(source), tmp_path / "base")
    options = TrainOptions(data=str(rows), steps=1, batch_size=2, max_length=32, lr=1e-3)
    train(base, tmp_path / "out", options, Run(), split=SplitOptions(method="full"))
    assert_loads_what_it_holds(tmp_path / "out", tmp_path)


@pytest.mark.parametrize("source", TEXT_ONLY)
@pytest.mark.parametrize("layers", [((0, 2), (1, 2)), ((1, 2),), ((0, 1), (0, 2), (0, 2))], ids=str)
def test_what_a_combination_of_slices_writes(
    source: str, layers: tuple[tuple[int, int], ...], made: Callable[[str], Path], tmp_path: Path
) -> None:
    """Models with more or fewer layers than their sources."""
    base = made(source)
    slices = [{"sources": [{"model": str(base), "layer_range": [*one]}]} for one in layers]
    (tmp_path / "file.yaml").write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    combine([], tmp_path / "out", CombineOptions(), Run(), config=str(tmp_path / "file.yaml"))
    assert_loads_what_it_holds(tmp_path / "out", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.num_hidden_layers == sum(end - begin for begin, end in layers)


@pytest.mark.parametrize("source", TEXT_ONLY)
@pytest.mark.parametrize("keep", ["changed", "none"])
def test_what_a_merge_of_kept_changes_writes(
    source: str, keep: Literal["changed", "none"], made: Callable[[str], Path], tmp_path: Path
) -> None:
    """With norms, embeddings and a head that were trained too, and are tensors of the LoRA."""
    rows = write_sums(tmp_path / "sums.jsonl")
    base = readable(made(source), tmp_path / "base")
    options = TrainOptions(data=str(rows), steps=1, batch_size=2, max_length=32, lr=0.1)
    train(base, tmp_path / "tuned", options, Run(), split=SplitOptions(method="full"))
    extract(base, tmp_path / "tuned", tmp_path / "lora", ExtractOptions(rank=4, keep=keep), Run())
    merge(tmp_path / "lora", tmp_path / "out", MergeOptions(), Run(), base=str(base))
    assert_loads_what_it_holds(tmp_path / "out", tmp_path / "first")
    both = [tmp_path / "lora"] * 2
    halves = MergeOptions(weights=(0.5, 0.5))
    if keep == "changed" and "lm_head.weight" not in tensors(base):  # the change unties the head
        with pytest.raises(ArtifactError, match=r"lm_head.weight in full, which the base does not store"):
            merge(both, tmp_path / "two", halves, Run(), base=str(base))
        return
    merge(both, tmp_path / "two", halves, Run(), base=str(base))
    assert_loads_what_it_holds(tmp_path / "two", tmp_path / "second")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_quantised_base_becomes(kind: str, tmp_path: Path) -> None:
    base = quantise(plain(tmp_path / "plain"), tmp_path / "base", kind)
    for method in ("pissa", "lora"):
        options = SplitOptions(rank=4, method=method, copy_base=method == "lora")
        decompose(base, tmp_path / method, options, Run())
        assert_loads_what_it_holds(tmp_path / method, tmp_path / f"{method} loaded")
    merge(tmp_path / "pissa", tmp_path / "out", MergeOptions(side="residual"), Run())
    assert_loads_what_it_holds(tmp_path / "out", tmp_path / "first")
    combine([tmp_path / "out", base], tmp_path / "both", CombineOptions(method="linear"), Run())
    assert_loads_what_it_holds(tmp_path / "both", tmp_path / "second")


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_what_convert_writes(dtype: Literal["auto", "float16", "float32"], tmp_path: Path) -> None:
    """Back to Hugging Face's layout and to the author's: every value is the source's, in the element type."""
    save(random_model(vocabulary=256), tmp_path / "author.pth")
    source = torch.load(tmp_path / "author.pth", weights_only=True)
    convert(tmp_path / "author.pth", tmp_path / "hf", ConvertOptions(layout="hf", dtype=dtype), Run())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    held = tensors(tmp_path / "hf")
    assert {str(tensor.dtype) for tensor in held.values()} == {f"torch.{config['dtype']}"}
    convert(tmp_path / "hf", tmp_path / "back", ConvertOptions(layout="blinkdl"), Run())
    back = torch.load(tmp_path / "back" / "model.pth", weights_only=True)
    assert back.keys() == source.keys()
    kind = getattr(torch, config["dtype"])
    assert all(torch.equal(back[name], tensor.to(kind)) for name, tensor in source.items())
