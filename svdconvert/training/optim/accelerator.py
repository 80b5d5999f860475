"""The machine that is trained on: device, precision and processes, as accelerate finds them."""

from typing import TYPE_CHECKING

import torch

from svdconvert.config.train import TrainOptions
from svdconvert.errors import RecipeError

if TYPE_CHECKING:
    from accelerate import Accelerator


# Ways to distribute in which no process has all parameters, or the step is not ours to take.
_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")


def make_accelerator(plan: TrainOptions) -> "Accelerator":
    """Accelerate for the plan's device and precision, whatever this process had trained before.

    Raises RecipeError where there is no such device or precision, or where accelerate is set to shard.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    device = _device(plan.device)
    # Accelerate keeps one state for the process and refuses another device or precision. Forgetting it
    # does not touch torch's process group, which a new state finds again.
    if PartialState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=True)
    precision = _precision(plan.precision, device)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        log_with=list(plan.trackers) or None,
        project_dir=plan.track_dir,
    )
    if accelerator.device.type != device.type:
        raise RecipeError(f"device {plan.device}: accelerate runs on {accelerator.device.type} here")
    if accelerator.distributed_type.value in _SHARDING:
        raise RecipeError(
            f"accelerate is set to {accelerator.distributed_type.value}, and train needs the whole model in "
            "every process: use DDP, or train the initial adapter with PEFT and bring it back with to-lora "
            "ADAPTER --residual DECOMPOSED"
        )
    return accelerator


def _device(name: str) -> torch.device:
    try:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = (found or torch.device("cpu")) if name == "auto" else torch.device(name)
        if device.type != "cpu" and device.index is not None:
            torch.accelerator.set_device_index(device.index)
        # Torch knows more names of devices than this machine has devices.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise RecipeError(f"device {name} cannot be used here, give cpu or auto: {reason}") from error
    return device


def _precision(wanted: str, device: torch.device) -> str:
    """accelerate's name of the precision."""
    if wanted == "fp16" and device.type == "cpu":
        raise RecipeError("precision fp16 needs a GPU, for its loss scaling; give bf16 or fp32 on a CPU")
    if wanted == "auto":
        return "bf16" if _is_fast_at_bf16(device) else "no"
    return "no" if wanted == "fp32" else wanted


def _is_fast_at_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Where the CPU multiplies bf16 itself a step takes less than half of float32's time (135M parameters, 4 x
    # 192 tokens, AVX512-BF16: 1.4 against 3.5 s with two threads, 2.7 against 8.5 s with one).
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and bool(has_units)
