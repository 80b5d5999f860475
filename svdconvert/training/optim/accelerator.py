"""The device, the precision and the processes of a training run, through accelerate."""

from typing import TYPE_CHECKING

import torch

from svdconvert.config.train import TrainOptions
from svdconvert.errors import RecipeError
from svdconvert.training.compat import cpu_multiplies_bfloat16, reset_accelerate_state

if TYPE_CHECKING:
    from accelerate import Accelerator


# Kinds of distribution in which no process has all parameters, or in which accelerate takes the step.
_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")


def make_accelerator(options: TrainOptions, *, some_unused: bool = False) -> "Accelerator":
    """An Accelerator for the device and precision of the options, also if this process has trained before.

    With `some_unused`, a batch may leave trained parameters without a gradient, as one without images does.
    Raises RecipeError if the device or precision is not available, or if accelerate is configured to shard.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    device = _find_device(options.device)
    reset_accelerate_state()
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=_mixed_precision(options.precision, device),
        log_with=list(options.trackers) or None,
        project_dir=options.track_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=some_unused)],
    )
    if accelerator.device.type != device.type:
        raise RecipeError(
            f"device {options.device} cannot be used: accelerate chose {accelerator.device.type}; "
            "give that, or auto"
        )
    if accelerator.distributed_type.value in _SHARDING:
        raise RecipeError(
            f"accelerate is set to {accelerator.distributed_type.value}, but train needs the entire model in "
            "every process: use DDP, or train the initial adapter with PEFT and bring it back with to-lora "
            "ADAPTER --residual DECOMPOSED"
        )
    return accelerator


def _find_device(name: str) -> torch.device:
    try:
        if name != "auto":
            device = torch.device(name)
        elif torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator() or torch.device("cpu")
        else:
            device = torch.device("cpu")
        if device.type != "cpu" and device.index is not None:
            torch.accelerator.set_device_index(device.index)
        # torch.device accepts names of devices that this machine does not have; an allocation does not.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise RecipeError(f"device {name} cannot be used here, give cpu or auto: {reason}") from error
    return device


def _mixed_precision(precision: str, device: torch.device) -> str:
    """accelerate's name for a precision of the options."""
    if precision == "fp16" and device.type == "cpu":
        raise RecipeError("precision fp16 needs a GPU, for its loss scaling; give bf16 or fp32 on a CPU")
    if precision == "auto":
        return "bf16" if _is_fast_in_bfloat16(device) else "no"
    return "no" if precision == "fp32" else precision


def _is_fast_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # On a CPU with bfloat16 instructions a step takes less than half the time of float32 (135M parameters,
    # 4 x 192 tokens, AVX512-BF16: 1.4 instead of 3.5 s with two threads, 2.7 instead of 8.5 s with one).
    return device.type == "cpu" and cpu_multiplies_bfloat16()
