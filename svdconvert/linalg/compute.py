"""Where and with how many threads the arithmetic runs."""

import ctypes
import sys
from functools import cache

import torch
from torch import Tensor

from svdconvert.errors import RecipeError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def pick_device(name: str, local: int = 0) -> torch.device:
    """The device called `name`; "auto" is the GPU of this host's rank `local`, else the CPU.

    Raises RecipeError where it is absent.
    """
    if name == "auto":
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", local % gpus) if gpus else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {name!r} is not available here; give cpu, cuda or cuda:N") from error
    return device


def use_threads(count: int | None) -> int:
    """Use `count` threads in this process, or as many as torch chose; return the number in use.

    Freed memory is kept for the next tensor from here on.
    """
    _keep_memory()
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


@cache
def _keep_memory() -> None:
    # glibc gives a large block back to the system when it is freed, and takes the next one page by page:
    # a fifth of the processor's time in a decomposition. Other C libraries have no mallopt, or keep it.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def multiplies_bfloat16(matrix: Tensor) -> bool:
    """True where a float32 matrix holds bfloat16 numbers and its device multiplies those faster.

    The numbers are looked at in a sample of rows: what rests on the answer is checked by its result.
    """
    step = max(1, matrix.shape[0] // 16)
    sample = matrix[::step]
    return _fast_bfloat16(matrix.device.type) and bool((sample.bfloat16().float() == sample).all())


@cache
def _fast_bfloat16(device: str) -> bool:
    # What the processor says of itself and no stopwatch: the answer decides bits, so it must repeat.
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)
