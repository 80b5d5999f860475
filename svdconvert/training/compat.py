"""The only file of `training/` that uses private interfaces of other libraries.

Tested with accelerate 1.15, torch 2.13 and transformers 5.23 (see constraints.txt). After an upgrade run
tests/training: test_compat.py and optim/test_loop.py fail if one of these interfaces has changed.
"""

from typing import Any

import torch
from torch import nn


def reset_accelerate_state() -> None:
    """Forget the device and precision that accelerate remembers for this process.

    accelerate keeps one state per process and refuses a second one with another device or precision, so two
    runs in one process need this in between. torch's process group is not touched: the next state finds it.
    """
    from accelerate.state import AcceleratorState, PartialState

    if PartialState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=True)


def remove_accelerate_wrappers(model: nn.Module) -> None:
    """Undo what `Accelerator.prepare` does to a model for mixed precision.

    `accelerate.utils.extract_model_from_parallel` would also remove the decorators of transformers' forward.
    """
    for attribute in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(model).pop(attribute, None)


def attention_implementation(model: nn.Module) -> str | None:
    """The name of the attention that a model of transformers uses; None for other models."""
    config: Any = getattr(model, "config", None)
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def cpu_multiplies_bfloat16() -> bool:
    """True if the CPU has instructions for products of bfloat16 matrices (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def cpu_has_amx() -> bool:
    """True if the CPU has the matrix units of AMX."""
    return bool(torch.cpu._is_amx_tile_supported())
