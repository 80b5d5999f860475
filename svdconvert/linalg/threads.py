"""Where and with how many threads the arithmetic runs."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from svdconvert.errors import RecipeError


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
    """Use `count` threads in this process, or as many as torch chose; return the number in use."""
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def parallel_matrices(device: torch.device) -> int:
    """How many matrices may be in work on a device: two where there are threads for them.

    With half of the threads each they wait for each other less than all threads on one matrix do, and
    much less where another program wants a core.
    """
    return 2 if device.type == "cpu" and torch.get_num_threads() > 1 else 1


@contextmanager
def worker_pool(count: int) -> Iterator[ThreadPoolExecutor]:
    """`count` workers that compute, each with its share of this process's threads."""
    threads = torch.get_num_threads()
    try:
        share = max(1, threads // count)
        with ThreadPoolExecutor(count, "compute", torch.set_num_threads, (share,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # a part of the setting is the process's, not the thread's


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


@contextmanager
def bfloat16_products(enabled: bool) -> Iterator[None]:
    """Let float32 products of bfloat16 numbers run on the units that multiply bfloat16.

    Such products are exact in float32 and are summed in float32; other numbers would be rounded. torch has
    one setting for the whole process, so `enabled` must be False if other threads multiply meanwhile.
    """
    if not enabled:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
