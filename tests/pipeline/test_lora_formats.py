"""to-lora --format: the readers of each program find the same change in its file."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdconvert import (
    LoraOptions,
    Run,
    SplitOptions,
    TrainOptions,
    decompose,
    inspect,
    merge,
    to_lora,
    train,
    verify,
)
from svdconvert.checkpoint.gguf_file import GgufFile
from svdconvert.errors import ArtifactError, CheckpointError
from svdconvert.inputs.gguf_names import GgufNames
from svdconvert.layouts.llama import LAYOUT as LLAMA
from tests import stock
from tests.conftest import Build
from tests.reading import readable, write_sums

gguf = pytest.importorskip("gguf")
RUN = Run(device="cpu", threads=1)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def home(request: pytest.FixtureRequest, checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a trained PiSSA adapter, and its LoRA in PEFT's format."""
    home = tmp_path_factory.mktemp(request.param)
    base = readable(checkpoint(request.param, dtype=torch.float32, tied=False), home / "base")
    data = write_sums(home / "rows.jsonl")
    decompose(base, home / "pissa", SplitOptions(rank=4), RUN)
    options = TrainOptions(data=str(data), steps=2, batch_size=2, max_length=48, lr=0.1)
    train(home / "pissa", home / "trained", options, RUN)
    to_lora(home / "trained", home / "peft", LoraOptions(), RUN)
    return home


def changes(directory: Path) -> dict[str, Tensor]:
    """Module -> B A of a LoRA of scale 1 in PEFT's format, in float64."""
    factors = stock.tensors(directory)
    modules = {name.rsplit(".", 2)[0] for name in factors}
    return {
        module.removeprefix("base_model.model."): factors[f"{module}.lora_B.weight"].double()
        @ factors[f"{module}.lora_A.weight"].double()
        for module in modules
    }


def test_mlx_has_transposed_factors_one_rank_and_scale_one(home: Path, tmp_path: Path) -> None:
    to_lora(home / "trained", tmp_path / "mlx", LoraOptions(format="mlx"), RUN)
    factors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == -1
    assert config["lora_parameters"]["scale"] == 1.0
    assert "self_attn.q_proj" in config["lora_parameters"]["keys"]
    for module, change in changes(home / "peft").items():
        left, right = factors[f"{module}.lora_a"], factors[f"{module}.lora_b"]
        assert left.shape[1] == right.shape[0] == config["lora_parameters"]["rank"]
        assert torch.allclose((left.double() @ right.double()).T, change, atol=1e-7)


def test_mlx_is_read_back_and_merged(home: Path, tmp_path: Path) -> None:
    to_lora(home / "trained", tmp_path / "mlx", LoraOptions(format="mlx"), RUN)
    (tmp_path / "mlx" / "svdconvert.json").unlink()
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    config["lora_parameters"]["scale"] = 0.5
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    to_lora(tmp_path / "mlx", tmp_path / "back", LoraOptions(), RUN, init="none")
    for module, change in changes(home / "peft").items():
        assert torch.allclose(changes(tmp_path / "back")[module], 0.5 * change, atol=1e-7)
    merge(tmp_path / "mlx", tmp_path / "merged", run=RUN, base=str(home / "base"), init="none")
    before, after = stock.tensors(home / "base"), stock.tensors(tmp_path / "merged")
    for module, change in changes(home / "peft").items():
        moved = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        assert torch.allclose(moved, 0.5 * change, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type 'dora'"),
        ({"lora_parameters": {"rank": 3, "scale": 1.0}}, "has rank 3, but the factors"),
        ({"lora_parameters": {"rank": 8, "scale": "x"}}, "the scale 'x'"),
        ({"lora_parameters": {"rank": 8, "scale": float("nan")}}, "the scale nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_mlx_adapters_cannot_be_is_refused(
    change: dict[str, object], message: str, home: Path, tmp_path: Path
) -> None:
    to_lora(home / "trained", tmp_path / "mlx", LoraOptions(format="mlx"), RUN)
    (tmp_path / "mlx" / "svdconvert.json").unlink()
    path = tmp_path / "mlx" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=message):
        to_lora(tmp_path / "mlx", tmp_path / "back", LoraOptions(), RUN, init="none")


def test_gguf_is_read_by_the_gguf_library(home: Path, tmp_path: Path) -> None:
    to_lora(home / "trained", tmp_path / "gguf", LoraOptions(format="gguf"), RUN, base=str(home / "base"))
    reader = gguf.GGUFReader(tmp_path / "gguf" / "adapter.gguf")
    family = json.loads((home / "base" / "config.json").read_text())["model_type"]
    known = {name: field.contents() for name, field in reader.fields.items()}
    assert known["general.architecture"] == family
    assert (known["general.type"], known["adapter.type"]) == ("adapter", "lora")
    tensors = {tensor.name: torch.tensor(tensor.data.copy()).double() for tensor in reader.tensors}
    rank = tensors["blk.0.attn_q.weight.lora_a"].shape[0]
    assert known["adapter.lora.alpha"] == rank
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    heads = {"q_proj": 4, "k_proj": 2} if family == "llama" else {}
    assert len(tensors) == 2 * 2 * len(names)
    for module, change in changes(home / "peft").items():
        layer, part = module.split(".")[2], module.rsplit(".", 1)[1]
        key = f"blk.{layer}.{names[part]}.weight"
        found = tensors[f"{key}.lora_b"] @ tensors[f"{key}.lora_a"]
        if part in heads:
            rows, columns = change.shape
            head = rows // heads[part]
            change = change.view(heads[part], 2, head // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        assert torch.allclose(found, change, atol=1e-7)


def test_a_gguf_directory_is_verified_and_inspected(home: Path, tmp_path: Path) -> None:
    options = LoraOptions(format="gguf", dtype="float16")
    to_lora(home / "trained", tmp_path / "gguf", options, RUN, base=str(home / "base"))
    assert verify(tmp_path / "gguf").passed
    assert inspect(tmp_path / "gguf").kind == "lora"
    with pytest.raises(ArtifactError, match=r"is for llama\.cpp"):
        merge(tmp_path / "gguf", tmp_path / "merged", run=RUN, base=str(home / "base"))
    file = tmp_path / "gguf" / "adapter.gguf"
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    assert not verify(tmp_path / "gguf").passed


def test_vllm_gets_what_peft_gets(home: Path, tmp_path: Path) -> None:
    to_lora(home / "trained", tmp_path / "vllm", LoraOptions(format="vllm"), RUN)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "vllm" / name).read_bytes() == (home / "peft" / name).read_bytes()


@pytest.mark.parametrize("name", ["vllm", "mlx", "gguf"])
def test_parameters_trained_in_full_are_refused_where_they_would_be_lost(
    name: str, home: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more"
    shutil.copytree(home / "peft", more)
    (more / "svdconvert.json").unlink()
    config = json.loads((more / "adapter_config.json").read_text()) | {"modules_to_save": ["model.norm"]}
    (more / "adapter_config.json").write_text(json.dumps(config))
    factors = load_file(more / "adapter_model.safetensors")
    factors["base_model.model.model.norm.weight"] = torch.ones(32)
    save_file(factors, more / "adapter_model.safetensors", {"format": "pt"})
    base = {"base": str(home / "base")} if name == "gguf" else {}
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight, trained in full"):
        to_lora(more, tmp_path / "out", LoraOptions(format=name), RUN, init="none", **base)


def test_gguf_without_the_base_is_refused(home: Path, tmp_path: Path) -> None:
    lone = tmp_path / "lone"
    shutil.copytree(home / "peft", lone)
    (lone / "svdconvert.json").unlink()
    with pytest.raises(ArtifactError, match=r"needs the config\.json of the base"):
        to_lora(lone, tmp_path / "out", LoraOptions(format="gguf"), RUN, init="none")


def test_rows_are_permuted_as_llama_cpp_does() -> None:
    """The loop of llama.cpp's convert_hf_to_gguf.py, written out for two heads of four rows."""
    names = GgufNames(LLAMA, {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2})
    rows = torch.arange(8.0)[:, None]
    found = names.stored("model.layers.0.self_attn.q_proj", "lora_B", rows)
    assert found[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(names.stored("model.layers.0.self_attn.v_proj", "lora_B", rows), rows)


@pytest.mark.parametrize("model_type", ["bert", "phi3", None])
def test_an_architecture_that_is_not_known_is_refused(model_type: str | None) -> None:
    with pytest.raises(ArtifactError, match="the base's model_type is"):
        GgufNames(LLAMA, {"model_type": model_type}).metadata(4)


@pytest.mark.parametrize("cut", [0, 3, 10, 30, 200, -1])
def test_a_cut_gguf_is_refused(cut: int, home: Path, tmp_path: Path) -> None:
    to_lora(home / "trained", tmp_path / "gguf", LoraOptions(format="gguf"), RUN, base=str(home / "base"))
    data = (tmp_path / "gguf" / "adapter.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:cut] if cut >= 0 else data[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        GgufFile(tmp_path / "cut.gguf")


def test_huge_numbers_in_a_gguf_are_refused(tmp_path: Path) -> None:
    for tensors, entries in ((2**60, 0), (0, 2**60), (2**63, 2**63)):
        (tmp_path / "huge.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, entries))
        with pytest.raises(CheckpointError, match="huge.gguf is damaged"):
            GgufFile(tmp_path / "huge.gguf")


MLX = """
import json, sys
import mlx.core as mx
from pathlib import Path
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

base, adapter, merged, tokens = sys.argv[1:]
found = []
for model, adapted in ((base, adapter), (merged, None)):
    loaded = load_model(Path(model))[0]
    loaded = load_adapters(loaded, adapted) if adapted else loaded
    loaded.eval()
    found.append(loaded(mx.array(json.loads(tokens))).astype(mx.float32).tolist())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_mlx_lm_gives_the_logits_of_the_merged_model(home: Path, tmp_path: Path) -> None:
    """With the interpreter $SVDCONVERT_MLX, or this one if it has mlx-lm."""
    python = os.environ.get("SVDCONVERT_MLX", sys.executable)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if subprocess.run(
        [python, "-c", "import mlx_lm"], capture_output=True, env=clean, check=False
    ).returncode:
        pytest.skip(
            "mlx-lm is not installed: pip install 'mlx[cpu]' mlx-lm, or name its python in SVDCONVERT_MLX"
        )
    to_lora(home / "trained", tmp_path / "mlx", LoraOptions(format="mlx"), RUN)
    merge(home / "peft", tmp_path / "merged", run=RUN)
    words = [home / "base", tmp_path / "mlx", tmp_path / "merged", json.dumps(stock.TOKENS.tolist())]
    ended = subprocess.run(
        [python, "-c", MLX, *map(str, words)], capture_output=True, text=True, env=clean, check=False
    )
    assert ended.returncode == 0, ended.stderr
    adapted, merged = (torch.tensor(logits) for logits in json.loads(ended.stdout))
    assert torch.allclose(adapted, merged, atol=1e-4)
