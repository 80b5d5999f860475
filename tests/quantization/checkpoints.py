"""A tiny Llama in every storage format, with companions in another shard than the codes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from svdconvert.quantization import nf4
from svdconvert.quantization.base import FORMATS, Coded
from svdconvert.quantization.packing import pack
from tests.tiny import fill

LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def plain(directory: Path) -> Path:
    """A Llama whose matrices have 64, 32 and 96 rows and columns."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config)
        fill(model)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def _encoded(
    plugin: str, settings: dict[str, Any], parts: dict[str, Tensor], weight: Tensor
) -> dict[str, Tensor]:
    """What a format's own rule makes of a weight, by part."""
    bits = settings.pop("bits", 8)
    coded = Coded("a", tuple(weight.shape), {}, bits, settings=settings)
    return FORMATS.get(plugin).encode(coded, weight, parts)


def fp8_block(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    parts = {
        "codes": torch.zeros(rows, columns).to(torch.float8_e4m3fn),
        "scale": torch.ones(-(-rows // 40), -(-columns // 40)),
    }
    made = _encoded("fp8", {"block": (40, 40)}, parts, weight)
    return {"weight": made["codes"], "weight_scale_inv": made["scale"]}


def fp8_channel(weight: Tensor) -> dict[str, Tensor]:
    parts = {
        "codes": torch.zeros(weight.shape).to(torch.float8_e4m3fn),
        "scale": torch.ones(len(weight), 1).bfloat16(),
    }
    made = _encoded("fp8", {"block": (1, weight.shape[1])}, parts, weight)
    return {"weight": made["codes"], "weight_scale": made["scale"], "input_scale": torch.ones(1)}


def fp8_tensor(weight: Tensor) -> dict[str, Tensor]:
    parts = {"codes": torch.zeros(weight.shape).to(torch.float8_e4m3fn), "scale": torch.ones(1)}
    made = _encoded("fp8", {"block": tuple(weight.shape)}, parts, weight)
    return {"weight": made["codes"], "weight_scale": made["scale"]}


def int4(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    parts = {
        "codes": torch.zeros(rows, columns // 8, dtype=torch.int32),
        "scale": torch.ones(rows, columns // 32).bfloat16(),
        "shape": torch.tensor([rows, columns]),
    }
    made = _encoded("pack-quantized", {"group": 32, "bits": 4}, parts, weight)
    return {
        "weight_packed": made["codes"],
        "weight_scale": made["scale"],
        "weight_shape": made["shape"],
    }


def int8(weight: Tensor) -> dict[str, Tensor]:
    parts = {"codes": weight.to(torch.int8), "scale": torch.ones(len(weight), 1)}
    made = _encoded("int8", {"group": weight.shape[1], "bits": 8}, parts, weight)
    return {"weight": made["codes"], "weight_scale": made["scale"]}


def mxfp4(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    parts = {
        "codes": torch.zeros(rows, columns // 2, dtype=torch.uint8),
        "scale": torch.zeros(rows, columns // 32, dtype=torch.uint8),
    }
    made = _encoded("mxfp4", {"stacked": False}, parts, weight)
    return {"weight_packed": made["codes"], "weight_scale": made["scale"]}


def bnb(kind: str, double: bool) -> Callable[[Tensor], dict[str, Tensor]]:
    def store(weight: Tensor) -> dict[str, Tensor]:
        rule = nf4.Rule(kind, 64, double)  # type: ignore[arg-type]
        return nf4.encode(weight, rule).tensors("weight", torch.bfloat16)

    return store


def bnb8(weight: Tensor) -> dict[str, Tensor]:
    parts = {"codes": weight.to(torch.int8), "scale": torch.ones(len(weight))}
    made = _encoded("bitsandbytes-8bit", {}, parts, weight)
    return {
        "weight": made["codes"],
        "SCB": made["scale"],
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def nvfp4(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(rows)
    return {
        "weight_packed": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator),
        "weight_scale": (torch.rand(rows, columns // 16, generator=generator) * 40).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([300.0]),
    }


def gptq(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    return {
        "qweight": pack(codes, 4).T,
        "qzeros": torch.full((columns // 32, rows // 8), 0x77777777, dtype=torch.int32),
        "scales": (torch.rand(columns // 32, rows, generator=generator) * 0.02).half(),
        "g_idx": (torch.arange(columns) // 32)[torch.randperm(columns, generator=generator)].int(),
    }


def awq(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(rows)
    shape = (columns, rows // 8)
    return {
        "qweight": torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator),
        "qzeros": torch.full((columns // 32, rows // 8), 0x77777777, dtype=torch.int32),
        "scales": (torch.rand(columns // 32, rows, generator=generator) * 0.02).half(),
    }


def _groups(kind: str, **weights: Any) -> dict[str, Any]:
    """compressed-tensors' settings for the format `kind`."""
    group: dict[str, Any] = {"targets": ["Linear"]}
    group["weights"] = {"symmetric": True, "dynamic": False, **weights}
    if kind == "int-quantized":  # only with integers as activations; otherwise the library packs the codes
        group["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


KINDS: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "fp8-block": (fp8_block, {"quant_method": "fp8", "weight_block_size": [40, 40]}),
    "fp8-channel": (fp8_channel, _groups("float-quantized", num_bits=8, type="float", strategy="channel")),
    "fp8-tensor": (fp8_tensor, {"quant_method": "fp8"}),
    "int4": (int4, _groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)),
    "int8": (int8, _groups("int-quantized", num_bits=8, type="int", strategy="channel")),
    "mxfp4": (
        mxfp4,
        _groups("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    ),
    "nf4": (bnb("nf4", False), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "nf4-double": (bnb("nf4", True), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "fp4": (bnb("fp4", False), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bnb8": (bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "nvfp4": (
        nvfp4,
        _groups("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    ),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
}
"""Kind -> (weight -> stored tensors by the ends of their names, quantization_config)."""
WRITTEN = sorted(set(KINDS) - {"nvfp4", "gptq", "awq"})
"""Those that `merge --keep-format` writes."""


def quantise(model: Path, directory: Path, kind: str) -> Path:
    """Write the linear layers of a plain model in the format `kind`: the codes in a shard of their own."""
    store, settings = KINDS[kind]
    directory.mkdir(parents=True)
    shards: dict[str, dict[str, Tensor]] = {FIRST: {}, SECOND: {}}
    for name, tensor in load_file(model / "model.safetensors").items():
        if not LINEAR.fullmatch(name):
            shards[SECOND][name] = tensor
            continue
        path = name.removesuffix("weight")
        for place, (end, part) in enumerate(store(tensor.float()).items()):
            shards[SECOND if place else FIRST][path + end] = part.clone().contiguous()
    for file, tensors in shards.items():
        save_file(tensors, directory / file, {"format": "pt"})
    places = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return directory


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's files."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found
