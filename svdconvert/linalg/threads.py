"""On which device and with how many threads the arithmetic runs."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

from svdconvert.errors import RecipeError

CPU = torch.device("cpu")


def pick_device(name: str, local: int = 0) -> torch.device:
    """The device called `name`; "auto" is the GPU of this host's rank `local`, else the CPU.

    Raises RecipeError if it is absent.
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
    """How many matrices are processed at the same time on a device: two on a GPU, or with several threads.

    Half of the threads for each of two matrices wait for each other less than all threads on one matrix,
    and much less if another program uses a core. A GPU copies one matrix while it computes another.
    """
    return 2 if device.type == "cuda" or torch.get_num_threads() > 1 else 1


@contextmanager
def worker_pool(count: int, device: torch.device = CPU) -> Iterator[ThreadPoolExecutor]:
    """A pool of `count` workers, each with an equal share of this process's threads and its own stream."""
    threads = torch.get_num_threads()
    streams = _streams(count, device) if device.type == "cuda" else ()
    left = iter(streams)

    def start() -> None:
        torch.set_num_threads(max(1, threads // count))
        if streams:
            torch.cuda.set_stream(next(left))

    try:
        with ThreadPoolExecutor(count, "compute", start) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # part of the setting belongs to the process, not to the thread


@cache
def _streams(count: int, device: torch.device) -> "tuple[torch.cuda.Stream, ...]":
    """The same streams for every pool, because cuBLAS keeps memory for each stream that it has met."""
    # Threads that use torch's linear algebra on CUDA for the first time at the same moment fail ("lazy
    # wrapper should be called at most once"), so it is used here before any of them starts.
    torch.linalg.inv_ex(torch.eye(2, device=device))
    return tuple(torch.cuda.Stream(device) for _ in range(count))  # type: ignore[no-untyped-call]


def multiplies_bfloat16(matrix: Tensor) -> bool:
    """True if a float32 matrix holds bfloat16 numbers and its device multiplies those faster.

    Only a sample of rows is examined; results that depend on the answer are checked by their error.
    """
    if not fast_bfloat16(matrix.device.type):
        return False
    step = max(1, matrix.shape[0] // 16)
    sample = matrix[::step]
    return bool((sample.bfloat16().float() == sample).all())


@cache
def fast_bfloat16(device: str) -> bool:
    """True if a kind of device multiplies bfloat16 numbers faster than float32."""
    # By the processor's features and not by a measurement: the answer decides bits, so it must be repeatable.
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def float32_products() -> AbstractContextManager[None]:
    """Multiply float32 numbers in float32, even if the program that called us has allowed TF32 for itself."""
    return _precision("highest")


def bfloat16_products(enabled: bool) -> AbstractContextManager[None]:
    """Run float32 products of bfloat16 numbers on the units that multiply bfloat16.

    Such products are exact in float32 and are summed in float32; other numbers would be rounded. The setting
    applies to the entire process, so `enabled` must be False if other threads multiply matrices meanwhile.
    """
    return _precision("medium") if enabled else nullcontext()


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
