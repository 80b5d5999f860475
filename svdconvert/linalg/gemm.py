"""Products of two matrices in float32, by the faster of the two libraries that are part of torch.

torch multiplies float32 with MKL, which does not use the AVX-512 units of processors that are not Intel's:
there oneDNN is faster, 2.1 times on an AMD Zen 5. On Intel's, MKL is, up to 2 times for the smallest products
(Ice Lake). oneDNN is reached through the operator that torch's compiler uses for linear layers.

M, K, N: the sides of a product.
"""

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def matmul_f32(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """left @ right, (M, N), without gradients. Other dtypes and devices are left to torch.

    The result is stored column by column if `left` is.
    """
    if not (_for_onednn(left_MK) and _for_onednn(right_KN)):
        return left_MK @ right_KN
    if left_MK.stride(0) == 1 and left_MK.stride(1) > 1:
        return _linear(right_KN.T, left_MK).T
    return _linear(left_MK, right_KN.T)


def add_matmul_f32(sum_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """Add left @ right to `sum_MN`; MKL does it while it multiplies."""
    if _for_onednn(left_MK) and _for_onednn(right_KN):
        sum_MN += matmul_f32(left_MK, right_KN)
    else:
        sum_MN.addmm_(left_MK, right_KN)


def _linear(input_MK: Tensor, weight_NK: Tensor) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input_MK, _dense(weight_NK), None, "none", [], "")
    return output


def _dense(weight_NK: Tensor) -> Tensor:
    """The weight as dense memory: oneDNN is a thousand times slower on a part of a larger matrix.

    A copy has the order of the original, because a transposed copy takes much longer than the product.
    """
    if weight_NK.is_contiguous() or weight_NK.T.is_contiguous():
        return weight_NK
    return weight_NK.contiguous() if weight_NK.stride(1) == 1 else weight_NK.T.contiguous().T


def _for_onednn(matrix: Tensor) -> bool:
    return (
        matrix.dtype == torch.float32
        and matrix.device.type == "cpu"
        and matrix.numel() > 0
        and _prefers_onednn()
    )


@cache
def _prefers_onednn() -> bool:
    return _has_onednn() and not _is_intel()


def _has_onednn() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    built = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_intel() -> bool:
    """True if Intel made the processor; on Linux, Python itself only knows the architecture."""
    try:
        described = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        described = platform.processor()
    return "GenuineIntel" in described
