"""MXFP4: E2M1 codes, two in a byte, with a power of two for every 32 values.

OCP Microscaling Formats (MX) Specification 1.0. gpt-oss stores all experts of a layer in one tensor of
(expert, out, in) values as `_blocks` and `_scales`; plain checkpoints of it hold (expert, in, out). Files of
compressed-tensors and DeepSeek-V4 hold one matrix each.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from svdconvert.checkpoint.tensors import TensorInfo, TensorSource
from svdconvert.quantization.base import Coded, Parts, StorageFormat, groups_of, require_shape
from svdconvert.quantization.floats import exponents, pack_e2m1, powers_of_two, scale_of_largest, unpack_e2m1

_GROUP = 32
_TOP_EXPONENT = 2  # of 6, the largest E2M1
_SCALES = ("U8", "F8_E8M0")


class MxFp4(StorageFormat):
    """Matrices of packed E2M1, or gpt-oss's stacks of experts."""

    summary = "MXFP4: gpt-oss, compressed-tensors, DeepSeek-V4"
    methods = frozenset({"mxfp4", "compressed-tensors", "fp8"})
    encodes = True

    def detect(self, source: TensorSource, settings: Mapping[str, Any]) -> Iterator[Coded]:
        """Stacks of experts with _blocks and _scales, and packed matrices with exponents as their scales."""
        infos = source.infos
        for name, info in infos.items():
            if name.endswith("_blocks") and info.dtype == "U8" and len(info.shape) == 4:
                scale = infos.get(name.removesuffix("blocks") + "scales")
                if scale is not None and scale.dtype == "U8" and info.shape[3] == _GROUP // 2:
                    yield _stack(info, scale)
            for codes, scales, dtypes in (
                ("weight_packed", "weight_scale", ("U8",)),
                ("weight", "scale", ("I8",)),
            ):
                path = name.removesuffix(codes)
                scale = infos.get(path + scales)
                if path == name or info.dtype not in dtypes or len(info.shape) != 2 or scale is None:
                    continue
                if scale.dtype in _SCALES and path + "weight_global_scale" not in infos:
                    yield _matrix(path, info, scale, infos)

    def decode(self, coded: Coded, parts: Parts, rows: slice) -> Tensor:
        """E2M1 * 2^(exponent - 127); the experts of a stack are transposed to (in, out)."""
        scale = powers_of_two(parts["scale"][rows])
        values = unpack_e2m1(parts["codes"][rows]).reshape(*scale.shape, _GROUP).mul_(scale[..., None])
        return values.flatten(-2).transpose(1, 2) if coded.settings["stacked"] else values.flatten(-2)

    def encode(self, coded: Coded, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        """The power of two of the largest magnitude, then the nearest E2M1."""
        values = weight.transpose(1, 2) if coded.settings["stacked"] else weight
        grouped = values.reshape(*values.shape[:-1], -1, _GROUP)
        scale = scale_of_largest(grouped.abs().amax(-1), _TOP_EXPONENT)
        codes = pack_e2m1(grouped / scale[..., None])
        if not coded.settings["stacked"]:
            codes = codes.flatten(-2)
        stored = exponents(scale)
        return {
            "codes": codes.contiguous().view(parts["codes"].dtype),
            "scale": stored.contiguous().view(parts["scale"].dtype),
        }


def _stack(info: TensorInfo, scale: TensorInfo) -> Coded:
    experts, rows, groups, _ = info.shape
    require_shape(scale, (experts, rows, groups))
    parts = {"codes": info.name, "scale": scale.name}
    shape = (experts, groups * _GROUP, rows)
    name = info.name.removesuffix("_blocks")
    return Coded(name, shape, parts, 4, by_rows=True, settings={"stacked": True})


def _matrix(path: str, info: TensorInfo, scale: TensorInfo, infos: Mapping[str, TensorInfo]) -> Coded:
    rows, columns = info.shape
    require_shape(scale, (rows, groups_of(info, _GROUP)))
    unused = tuple(path + end for end in ("input_global_scale", "input_scale") if path + end in infos)
    parts = {"codes": info.name, "scale": scale.name}
    return Coded(f"{path}weight", (rows, 2 * columns), parts, 4, unused, settings={"stacked": False})


FORMAT = MxFp4()
