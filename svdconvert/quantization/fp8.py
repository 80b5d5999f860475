"""FP8 weights with scales for blocks, rows or the entire matrix.

w = code * scale. DeepSeek-V3, Qwen3-FP8 and others name the scale `weight_scale_inv`, although it is
multiplied; compressed-tensors, fbgemm, ModelOpt and AutoFP8 name it `weight_scale`. With a scale for every 32
values of a row, stored as an exponent, it is MXFP8.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import REAL, TensorInfo, TensorSource
from svdconvert.errors import CheckpointError
from svdconvert.quantization.base import (
    Coded,
    Parts,
    StorageFormat,
    per_row_of_blocks,
    require_shape,
    weight_settings,
)
from svdconvert.quantization.floats import exponents, powers_of_two, scale_of_largest

_CODES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SCALES = ("weight_scale_inv", "weight_scale", "scale")
# Of activations, and of the keys and values that attention caches.
_UNUSED = (
    "input_scale", "input_scale_inv", "activation_scale", "weight_zero_point",
    "output_scale", "k_scale", "v_scale",
)  # fmt: skip
_EXPONENTS = ("U8", "F8_E8M0")
_TOP_EXPONENT = 8  # of 448, the largest E4M3


class Fp8(StorageFormat):
    """E4M3 or E5M2 codes and the scales of their blocks."""

    summary = "FP8: with scales per block, row or matrix; MXFP8"
    methods = frozenset({"fp8", "mxfp8", "compressed-tensors", "fbgemm_fp8", "modelopt"})
    encodes = True

    def detect(self, source: TensorSource, settings: Mapping[str, Any]) -> Iterator[Coded]:
        """Every matrix of FP8 codes that has a scale under one of the known names."""
        for name, info in source.infos.items():
            path = name.removesuffix("weight")
            scale = next((path + end for end in _SCALES if path + end in source.infos), None)
            if path == name or info.dtype not in _CODES or len(info.shape) != 2 or scale is None:
                continue
            block = _block(info, source.infos[scale], settings)
            unused = tuple(path + end for end in _UNUSED if path + end in source.infos)
            yield Coded(name, info.shape, {"codes": name, "scale": scale}, 8, unused, {"block": block})

    def decode(self, coded: Coded, parts: Parts, rows: slice) -> Tensor:
        """code * scale of its block; the last block of a row or column may be cut off."""
        height, width = coded.settings["block"]
        scale_GI = _as_grid(coded, _as_float(parts["scale"]))
        scale_OI = per_row_of_blocks(scale_GI, rows, height).repeat_interleave(width, dim=1)
        return parts["codes"][rows].float() * scale_OI[:, : coded.shape[1]]

    def encode(self, coded: Coded, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        """scale = largest magnitude of the block / the largest code, rounded to the scale's element type."""
        height, width = coded.settings["block"]
        codes = parts["codes"].dtype
        top = torch.finfo(codes).max
        largest_GJ = _largest(weight, height, width)
        if parts["scale"].dtype in (torch.uint8, torch.float8_e8m0fnu):
            scale_GJ = scale_of_largest(largest_GJ, _TOP_EXPONENT)
            stored = exponents(scale_GJ).view(parts["scale"].dtype)
        else:
            stored = torch.where(largest_GJ > 0, largest_GJ / top, 1.0).to(parts["scale"].dtype)
            scale_GJ = _nonzero(stored.float())
            stored = scale_GJ.to(parts["scale"].dtype)
        scale_OI = scale_GJ.repeat_interleave(height, dim=0)[: coded.shape[0]]
        scaled = weight / scale_OI.repeat_interleave(width, dim=1)[:, : coded.shape[1]]
        return {
            "codes": scaled.clamp_(-top, top).to(codes),
            "scale": stored.reshape(parts["scale"].shape),
        }

    def title(self, coded: Coded) -> str:
        """With the size of the blocks."""
        height, width = coded.settings["block"]
        if width < coded.shape[1]:
            return f"FP8 in blocks of {height} x {width}"
        return "FP8 per tensor" if height >= coded.shape[0] > 1 else "FP8 per channel"


def _block(codes: TensorInfo, scale: TensorInfo, settings: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) of a block. Raises CheckpointError if the scales do not fit the codes."""
    rows, columns = codes.shape
    if scale.dtype not in (*REAL, *_EXPONENTS):
        raise CheckpointError(f"{scale.name} is stored as {scale.dtype}, which is no scale of FP8 codes")
    if scale.shape in ((), (1,), (1, 1)):
        return max(rows, 1), max(columns, 1)
    if scale.shape in ((rows,), (rows, 1)):
        return 1, max(columns, 1)
    if scale.dtype in _EXPONENTS and scale.shape == (rows, -(-columns // 32)):
        return 1, 32
    height, width = _configured_block(settings)
    require_shape(scale, (-(-rows // height), -(-columns // width)))
    return height, width


def _configured_block(settings: Mapping[str, Any]) -> tuple[int, int]:
    """The block of the configuration, 128 x 128 if it names none."""
    named = [settings.get("weight_block_size")]
    named += [weights.get("block_structure") for weights in weight_settings(settings)]
    for block in named:
        if isinstance(block, list) and len(block) == 2 and all(type(size) is int for size in block):
            if min(block) < 1:
                break
            return block[0], block[1]
    return 128, 128


def _as_float(scale: Tensor) -> Tensor:
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return powers_of_two(scale)
    return scale.float()


def _as_grid(coded: Coded, scale: Tensor) -> Tensor:
    """The scales as (blocks of rows, blocks of columns)."""
    height, width = coded.settings["block"]
    rows, columns = coded.shape
    return scale.reshape(-(-rows // height), -(-columns // width))


def _largest(weight_OI: Tensor, height: int, width: int) -> Tensor:
    """The largest magnitude of every block."""
    rows, columns = weight_OI.shape
    padded = torch.nn.functional.pad(weight_OI, (0, -columns % width, 0, -rows % height))
    return padded.view(-(-rows // height), height, -(-columns // width), width).abs().amax((1, 3))


def _nonzero(scale: Tensor) -> Tensor:
    """The scales, with 1 for those that the rounding to a narrow type made zero."""
    return torch.where(scale > 0, scale, 1.0)


FORMAT = Fp8()
