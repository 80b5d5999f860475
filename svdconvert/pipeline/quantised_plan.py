"""Which matrices of a decomposition are stored in 4 bits, and what config.json says of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from svdconvert.checkpoint.tensors import TensorInfo, torch_dtype
from svdconvert.config.options import SplitOptions
from svdconvert.errors import RecipeError, TargetError
from svdconvert.inputs.model import OpenModel
from svdconvert.layouts.base import Layout, Slot
from svdconvert.quantization.nf4 import Rule

# Linear layers that a program adds to a checkpoint without them, or ties to the embeddings.
_HEADS = ("lm_head", "embed_out", "score", "classifier")
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # their linear layers are Conv1D
_EXPERTS = ".experts."


def rule_of(options: SplitOptions) -> Rule | None:
    """How residuals are quantised; None if they are plain."""
    return Rule(double=options.double_quant) if options.residual_format == "nf4" else None


def quantised_names(model: OpenModel, layout: Layout, slots: Mapping[str, Slot]) -> frozenset[str]:
    """The matrices that are stored in 4 bits: weights of linear layers, but no experts or other parts.

    Raises TargetError if transformers could load none of them in 4 bits.
    """
    model_type = model.config.get("model_type")
    if layout.family is not None or not model.config or model_type in _TRANSPOSED:
        raise TargetError(
            f"transformers loads no 4-bit weights of a {model_type or 'checkpoint without config.json'}; "
            "leave out --residual-format"
        )
    names = frozenset(name for name, slot in slots.items() if slot.expert is None and slot.place is None)
    if not names:
        raise TargetError(
            "all targets are matrices of experts, which transformers fuses and cannot load in 4 bits; add "
            "other --targets, such as attn, or leave out --residual-format"
        )
    return names


def sampled_per_role(roles: Mapping[str, str], names: Iterable[str], choice: str | None) -> frozenset[str]:
    """The matrices whose nuclear norms are measured: all, or `choice` of each role, evenly spread.

    `roles` has the role of every matrix. Raises RecipeError for another choice.
    """
    if choice is None:
        return frozenset()
    if choice != "all" and not (choice.isascii() and choice.isdecimal() and int(choice) > 0):
        raise RecipeError(
            f"--nuclear-ratio {choice} is neither all nor a number of matrices; give one of these"
        )
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(roles[name], []).append(name)
    found: set[str] = set()
    position = {name: number for number, name in enumerate(roles)}
    for each in members.values():
        each.sort(key=position.__getitem__)
        count = len(each) if choice == "all" else min(len(each), int(choice))
        found |= {each[(2 * number + 1) * len(each) // (2 * count)] for number in range(count)}
    return frozenset(found)


def decoded_dtype(info: TensorInfo) -> torch.dtype:
    """What a program decodes a 4-bit matrix to: its dtype in the source, float32 for float64."""
    return torch.float32 if info.dtype == "F64" else torch_dtype(info.dtype)


def quantization_config(
    layout: Layout, infos: Mapping[str, TensorInfo], quantised: Iterable[str], rule: Rule, compute: str
) -> dict[str, Any]:
    """The entry of config.json with which transformers loads the 4-bit matrices. `compute`: a torch dtype."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": rule.kind,
        "bnb_4bit_use_double_quant": rule.double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": _skipped_modules(layout, infos, set(quantised)),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def _skipped_modules(layout: Layout, infos: Mapping[str, TensorInfo], quantised: set[str]) -> Sequence[str]:
    """The modules of the weights that are not in 4 bits: heads, embeddings, routers, experts and others."""
    modules = [
        layout.module(name)
        for name, info in infos.items()
        if len(info.shape) >= 2 and name not in quantised and not name.endswith(".bias")
    ]
    cut = [
        module.partition(_EXPERTS)[0] + _EXPERTS.rstrip(".") if _EXPERTS in module else module
        for module in modules
    ]
    return list(dict.fromkeys([*_HEADS, *cut]))
