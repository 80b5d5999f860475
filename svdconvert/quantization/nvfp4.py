"""NVFP4: E2M1 codes, two in a byte, with an E4M3 scale for every 16 values and one float32 for the matrix.

compressed-tensors divides by the scale of the matrix (`weight_global_scale`), ModelOpt multiplies by its own
(`weight_scale_2`), which is the inverse.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from svdconvert.checkpoint.tensors import TensorInfo, TensorSource
from svdconvert.quantization.base import Coded, Parts, StorageFormat, groups_of, require_shape
from svdconvert.quantization.floats import unpack_e2m1

_GROUP = 16
_UNUSED = ("input_global_scale", "input_scale", "pre_quant_scale")


class NvFp4(StorageFormat):
    """Packed E2M1 with scales at two levels."""

    summary = "NVFP4: compressed-tensors, ModelOpt"
    methods = frozenset({"compressed-tensors", "modelopt", "modelopt_fp4", "nvfp4"})

    def detect(self, source: TensorSource, settings: Mapping[str, Any]) -> Iterator[Coded]:
        """Every packed matrix with scales in E4M3 and one for the matrix."""
        for name, info in source.infos.items():
            for codes, factor in (("weight_packed", "weight_global_scale"), ("weight", "weight_scale_2")):
                path = name.removesuffix(codes)
                scale = source.infos.get(path + "weight_scale")
                whole = source.infos.get(path + factor)
                if path == name or info.dtype != "U8" or len(info.shape) != 2:
                    continue
                if scale is not None and whole is not None and scale.dtype == "F8_E4M3":
                    yield _coded(path, info, scale, whole, source.infos)

    def decode(self, coded: Coded, parts: Parts, rows: slice) -> Tensor:
        """E2M1 * scale of its 16 values, divided by or multiplied with the scale of the matrix."""
        whole = parts["whole"].float().reshape(())
        scale = parts["scale"][rows].float()
        scale = scale / whole if coded.settings["divides"] else scale * whole
        values = unpack_e2m1(parts["codes"][rows]).reshape(*scale.shape, _GROUP)
        return values.mul_(scale[..., None]).flatten(-2)


def _coded(
    path: str, info: TensorInfo, scale: TensorInfo, whole: TensorInfo, infos: Mapping[str, TensorInfo]
) -> Coded:
    rows, columns = info.shape
    require_shape(scale, (rows, groups_of(info, _GROUP)))
    require_shape(whole, (), (1,), (1, 1))
    parts = {"codes": info.name, "scale": scale.name, "whole": whole.name}
    unused = tuple(path + end for end in _UNUSED if path + end in infos)
    settings = {"divides": whole.name.endswith("weight_global_scale")}
    return Coded(f"{path}weight", (rows, 2 * columns), parts, 4, unused, settings)


FORMAT = NvFp4()
