"""Processor, memory, accelerators and disk."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from svdconvert.config.sizes import size_text
from svdconvert.diagnosis.facts import Fact
from svdconvert.hub.access import cache_directory

_LITTLE_DISK = 10_000_000_000  # bytes; a model of 3 billion weights in bfloat16 has 6 GB
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE")


def machine_facts() -> Iterator[Fact]:
    """What the machine has; what depends on torch is left out if torch cannot be imported."""
    yield Fact("machine", "processor", _processor())
    yield Fact("machine", "cores", _cores())
    try:
        import torch  # noqa: F401
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        yield Fact("machine", "torch", f"cannot be imported: {reason}; install torch again", "missing")
    else:
        yield from _torch_facts()
    yield Fact("machine", "memory", _memory())
    yield _disk("free disk here", Path.cwd())
    yield _disk("free disk of the Hub's cache", cache_directory())
    for name in _VARIABLES:
        if name in os.environ:
            yield Fact("machine", name, os.environ[name])


def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return f"{name} ({platform.machine()})"
    return platform.processor() or platform.machine()


def _cores() -> str:
    count = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    return str(count) if usable == count else f"{count}, of which this process may use {usable}"


def _torch_facts() -> Iterator[Fact]:
    import torch

    from svdconvert.training.compat import cpu_has_amx, cpu_multiplies_bfloat16

    yield Fact("machine", "threads of torch", str(torch.get_num_threads()))
    level = torch.backends.cpu.get_cpu_capability()
    yield Fact("machine", "instructions used", f"{level}{' with AMX' if cpu_has_amx() else ''}")
    libraries = [("MKL", torch.backends.mkl), ("oneDNN", torch.backends.mkldnn)]
    found = [name for name, library in libraries if library.is_available()]
    yield Fact("machine", "libraries of torch", ", ".join(found) or "none of MKL and oneDNN")
    if cpu_multiplies_bfloat16():
        yield Fact("machine", "bfloat16 on the processor", "fast")
    else:
        slow = "slow (no AVX512-BF16 or AMX); train computes in float32 there"
        yield Fact("machine", "bfloat16 on the processor", slow, "note")
    yield from _accelerators()


def _accelerators() -> Iterator[Fact]:
    import torch

    if not torch.cuda.is_available():
        yield Fact("machine", "GPU", "none that torch can use")
        return
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        fast = "bfloat16 is fast" if device.major >= 8 else "bfloat16 is slow"
        memory = size_text(device.total_memory)
        yield Fact("machine", f"GPU {number}", f"{device.name}, {memory}, {fast}, CUDA {torch.version.cuda}")


def _memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parts = [size_text(pages)]
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        parts.append(f"{size_text(int(available.split()[1]) * 1024)} available")
    with suppress(OSError, ValueError):  # the limit of a container
        parts.append(f"limited to {size_text(int(Path('/sys/fs/cgroup/memory.max').read_text()))}")
    return ", ".join(parts)


def _disk(name: str, place: Path) -> Fact:
    existing = next(path for path in (place, *place.absolute().parents) if path.exists())
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return Fact("machine", name, f"unknown ({error.strerror})", "note")
    state = "note" if free < _LITTLE_DISK else "ok"
    return Fact("machine", name, f"{size_text(free)}, at {place}", "note" if state == "note" else "ok")
