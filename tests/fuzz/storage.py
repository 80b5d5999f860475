"""Targets for files of other programs: GGUF, quantised weights, adapters of MLX and RWKV-PEFT, mergekit."""

import io
import json
import struct
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import gguf
import torch
import yaml
from safetensors.torch import load, save

from svdconvert.adapters.peft_files import open_adapter
from svdconvert.adapters.rwkv_peft import open_adapter_file
from svdconvert.checkpoint.gguf_file import GgufFile
from svdconvert.checkpoint.safetensors_files import SafetensorsSource
from svdconvert.config.mergekit_file import read_merge_file
from svdconvert.inputs.storage_format import decoded, formats, quantization_method, refuse_unknown_format
from tests.fuzz.checkpoints import _change_pickled, _change_safetensors
from tests.fuzz.mutate import change_bytes, change_json, change_text
from tests.fuzz.settings import _YAML
from tests.fuzz.target import Target
from tests.quantization.checkpoints import KINDS

_MODULE = "model.layers.0.self_attn.q_proj"
_WEIGHT = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)


def _read_gguf(raw: bytes, directory: Path) -> None:
    """As the library gguf reads it: the names, the types, and the values."""
    file = directory / "model.gguf"
    file.write_bytes(raw)
    source = GgufFile(file)
    known = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert {tensor.name for tensor in source.tensors.values()} == known.keys()
    for name, tensor in source.tensors.items():
        read = b"".join(bytes(chunk) for chunk in source.chunks(name, 7))
        whole = known[tensor.name].data.tobytes()
        assert known[tensor.name].tensor_type.name == tensor.type
        assert read == whole[len(read) * (tensor.expert or 0) :][: len(read)]
    shown = decoded(source, {}, file)
    for name in shown.infos:
        assert shown.read(name).shape == shown.infos[name].shape


def _read_quantised(raw: bytes, directory: Path) -> None:
    """Kind, settings and tensors; what is shown as a float tensor can be read, and is all that is there."""
    settings, _, content = raw.partition(b"\n")
    config = {"dtype": "bfloat16", "quantization_config": json.loads(settings)}
    file = directory / "model.safetensors"
    file.write_bytes(content)
    source = SafetensorsSource([file])
    shown = decoded(source, config, directory)
    quantization_method(config)
    formats(shown)
    refuse_unknown_format(directory, config, shown)
    for name, info in shown.infos.items():
        assert shown.read(name).shape == info.shape
        assert b"".join(bytes(chunk) for chunk in shown.chunks(name, 1000)) == b"".join(
            bytes(chunk) for chunk in shown.chunks(name, 1 << 20)
        )


def _change_quantised(chance: Random, raw: bytes) -> bytes:
    """Changed settings, or changed tensors."""
    settings, _, content = raw.partition(b"\n")
    if chance.random() < 0.5:
        changed = change_json(chance, settings)
        try:
            return json.dumps(json.loads(changed)).encode() + b"\n" + content
        except (ValueError, RecursionError):
            return raw
    return settings + b"\n" + _change_safetensors(chance, content)


def _read_mlx(raw: bytes, directory: Path) -> None:
    """A configuration and factors; the change is the formula of mlx-lm."""
    config, _, content = raw.partition(b"\n")
    (directory / "adapter_config.json").write_bytes(config)
    (directory / "adapters.safetensors").write_bytes(content)
    adapter = open_adapter(directory)
    stored, scale = load(content), json.loads(config)["lora_parameters"]["scale"]
    for module in adapter.modules:
        factors = adapter.factors(module)
        wanted = scale * (stored[f"{module}.lora_a"].double() @ stored[f"{module}.lora_b"].double()).T
        found = adapter.config.scale(module) * factors.left_OR.double() @ factors.right_RI.double()
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-30)


def _change_mlx(chance: Random, raw: bytes) -> bytes:
    config, _, content = raw.partition(b"\n")
    if chance.random() < 0.5:
        return change_json(chance, config).replace(b"\n", b" ") + b"\n" + content
    return config + b"\n" + _change_safetensors(chance, content)


def _read_rwkv_peft(raw: bytes, directory: Path) -> None:
    """As torch.load(weights_only=True) reads a mapped file, for alpha 4 and for the start of PiSSA."""
    (directory / "rwkv.pth").write_bytes(raw)
    initial = open_adapter_file(directory / "rwkv.pth", None)
    adapter = open_adapter_file(directory / "rwkv.pth", 4.0)
    known = torch.load(directory / "rwkv.pth", map_location="cpu", mmap=True, weights_only=True)
    for module in adapter.modules:
        rank = initial.factors(module).right_RI.shape[0]
        assert initial.config.scale(module) == 1.0 and adapter.config.scale(module) == 4.0 / rank
        names = [f"{module}.lora_A", f"{module}.init_lora_A"]
        assert any(torch.equal(adapter.factors(module).right_RI, known[one]) for one in names if one in known)


def _read_mergekit(raw: bytes, directory: Path) -> None:
    """As yaml reads it: the method, and the models in their order."""
    path = directory / "merge.yaml"
    path.write_bytes(raw)
    file = read_merge_file(path)
    known = yaml.safe_load(raw.decode())
    assert file.method == known["merge_method"].replace("_", "-")
    parts = known.get("slices") or [{"sources": known["models"]}]
    assert [[one.model for one in part.sources] for part in file.slices] == [
        [one["model"] for one in part["sources"]] for part in parts
    ]


def _gguf() -> bytes:
    """A matrix, a quantised one, the experts of a stack, and every type of metadata."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    entries = [
        text("general.architecture") + struct.pack("<I", 8) + text("qwen3moe"),
        text("general.alignment") + struct.pack("<II", 4, 32),
        text("qwen3moe.block_count") + struct.pack("<II", 4, 1),
        text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("é"),
        text("scores") + struct.pack("<IIQ", 9, 6, 3) + bytes(12),
        text("nested") + struct.pack("<IIQIQ", 9, 9, 1, 5, 2) + bytes(8),
        text("half") + struct.pack("<If", 6, 0.5),
    ]
    shapes = {
        "token_embd.weight": ((4, 3), 0, 48),
        "blk.0.attn_q.weight": ((32, 2), 8, 68),
        "blk.0.ffn_up_exps.weight": ((32, 2, 3), 8, 204),
        "output_norm.weight": ((4,), 1, 8),
    }
    described = []
    offset = 0
    for name, (shape, kind, nbytes) in shapes.items():
        described.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
        offset += -(-nbytes // 32) * 32
    header = b"GGUF" + struct.pack("<IQQ", 3, len(described), len(entries)) + b"".join([*entries, *described])
    return header + bytes(-len(header) % 32) + Random(0).randbytes(offset)


@cache
def _quantised() -> list[bytes]:
    """A matrix in every format, with the settings by which it is found."""
    found = []
    for store, settings in KINDS.values():
        parts = {f"{_MODULE}.{end}": part.contiguous() for end, part in store(_WEIGHT).items()}
        found.append(json.dumps(settings).encode() + b"\n" + save(parts, {"format": "pt"}))
    return found


def _saved(tensors: dict[str, torch.Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save(tensors, stream)
    return stream.getvalue()


_MLX = {
    "fine_tune_type": "lora",
    "model": "org/x",
    "num_layers": -1,
    "lora_parameters": {"rank": 2, "scale": 2.5, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
}
_MLX_FACTORS = {f"{_MODULE}.lora_a": torch.ones(4, 2), f"{_MODULE}.lora_b": torch.ones(2, 3)}
_RWKV: dict[str, Any] = {
    "blocks.0.att.key.lora_A": torch.ones(2, 4),
    "blocks.0.att.key.lora_B": torch.ones(3, 2),
    "blocks.0.att.time_decay": torch.ones(4),
}
_MERGES = [
    b"merge_method: ties\nbase_model: org/a\nmodels:\n- model: org/b\n  parameters: {weight: 1}\n"
    b"- model: org/c\n  parameters:\n    weight:\n    - {filter: mlp, value: [0, 0.5, 1]}\n    - value: 0.2\n"
    b"parameters: {normalize: true, int8_mask: true}\ndtype: bfloat16\n",
    b"merge_method: passthrough\nslices:\n- sources: [{model: org/a, layer_range: [0, 2]}]\n"
    b"- sources: [{model: org/b, layer_range: [1, 3]}]\ntokenizer_source: base\n",
]
_WORDS = ["layer_range: [0, 99999999999]", "- *a", "slices:\n", "filter: ", "value: ", "[[0.5]]", ".nan"]

TARGETS = {
    "gguf": Target(_read_gguf, change_bytes, share=15, seeds=[_gguf()]),
    "quantised": Target(_read_quantised, _change_quantised, share=20, seeds=_quantised()),
    "mlx": Target(
        _read_mlx,
        _change_mlx,
        share=10,
        seeds=[json.dumps(_MLX).encode() + b"\n" + save(_MLX_FACTORS, {"format": "pt"})],
    ),
    "rwkv-peft": Target(
        _read_rwkv_peft,
        _change_pickled,
        share=10,
        seeds=[
            _saved(_RWKV),
            _saved({name.replace("lora", "init_lora"): tensor for name, tensor in _RWKV.items()}),
        ],
    ),
    "mergekit": Target(_read_mergekit, change_text([*_YAML, *_WORDS]), share=10, seeds=_MERGES),
}
