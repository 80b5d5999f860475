"""GPTQ: transposed integer codes in words of 32 bits, with groups of input features in any order.

w[o, i] = scales[g, o] * (q[i, o] - z[g, o]) with g = g_idx[i]. The first version of the format stores z - 1,
modulo 2^bits; `checkpoint_format` gptq_v2 stores z.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import REAL, TensorInfo, TensorSource
from svdconvert.errors import CheckpointError, brief
from svdconvert.quantization.base import Coded, Parts, StorageFormat, require_shape
from svdconvert.quantization.packing import unpack

_BITS = (2, 3, 4, 8)


class Gptq(StorageFormat):
    """Codes packed along the input features, zero points along the output features."""

    summary = "GPTQ: integers of 2, 3, 4 or 8 bits"
    methods = frozenset({"gptq", "auto-round", "autoround"})

    def detect(self, source: TensorSource, settings: Mapping[str, Any]) -> Iterator[Coded]:
        """Every qweight of 32-bit words with qzeros and scales, unless the codes are packed as AWQ's."""
        if "awq" in str(settings.get("packing_format")):
            return
        for name, info in source.infos.items():
            path = name.removesuffix("qweight")
            if path == name or info.dtype != "I32" or len(info.shape) != 2:
                continue
            parts = {"codes": name}
            for part, end in (("zeros", "qzeros"), ("scale", "scales"), ("g_idx", "g_idx")):
                if path + end in source.infos:
                    parts[part] = path + end
            if {"zeros", "scale"} <= parts.keys() and not _is_awq(info, source.infos[parts["scale"]]):
                yield _coded(path, parts, source.infos, settings)

    def decode(self, coded: Coded, parts: Parts, rows: slice) -> Tensor:
        """(q - z) * scale; the rows are output features, which are columns of the stored tensors."""
        outputs, inputs = coded.shape
        codes_OI = unpack(parts["codes"][:, rows].T, coded.bits, inputs).float()
        group_I = self._groups(coded, parts)
        zeros_GO = unpack(parts["zeros"], coded.bits, outputs).int() + coded.settings["added"]
        zeros_OG = (zeros_GO & (1 << coded.bits) - 1)[:, rows].T.float()
        scale_OG = parts["scale"][:, rows].T.float()
        codes_OI -= zeros_OG[:, group_I]
        return codes_OI * scale_OG[:, group_I]

    def _groups(self, coded: Coded, parts: Parts) -> Tensor:
        """The group of every input. Raises CheckpointError for one that the scales do not have."""
        count = coded.settings["groups"]
        if "g_idx" not in parts:
            return torch.arange(coded.shape[1]).div(coded.settings["group"], rounding_mode="floor")
        found = parts["g_idx"].long()
        found = torch.where(found < 0, found + count, found)
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < count:
            raise CheckpointError(
                f"{coded.parts['g_idx']} names a group outside the {count} that its scales have; fetch the "
                "checkpoint again"
            )
        return found

    def title(self, coded: Coded) -> str:
        """With the size of the groups."""
        return f"GPTQ INT{coded.bits} in groups of {coded.settings['group']}"


def _is_awq(codes: TensorInfo, scale: TensorInfo) -> bool:
    """True if the codes are packed along the output features."""
    return len(scale.shape) == 2 and codes.shape[1] * 8 == scale.shape[1]


def _coded(
    path: str, parts: Mapping[str, str], infos: Mapping[str, TensorInfo], settings: Mapping[str, Any]
) -> Coded:
    codes = infos[parts["codes"]]
    scale = infos[parts["scale"]]
    words, outputs = codes.shape
    bits, inputs = _bits_and_inputs(codes, infos.get(parts.get("g_idx", "")), settings)
    groups = scale.shape[0] if len(scale.shape) == 2 else 0
    if scale.dtype not in REAL or scale.shape != (groups, outputs) or not groups or -(-inputs // groups) < 1:
        raise CheckpointError(
            f"{scale.name} has the shape {list(scale.shape)} and the type {scale.dtype}, which does not fit "
            f"{codes.name} of the shape {list(codes.shape)}; fetch the checkpoint again"
        )
    require_shape(infos[parts["zeros"]], (groups, -(-outputs * bits // 32)))
    added = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    chosen = {"groups": groups, "group": -(-inputs // groups), "added": added}
    return Coded(f"{path}weight", (outputs, inputs), parts, bits, settings=chosen)


def _bits_and_inputs(
    codes: TensorInfo, order: TensorInfo | None, settings: Mapping[str, Any]
) -> tuple[int, int]:
    """(bits of a code, input features), from the order of the groups if it is stored, else as configured."""
    words = codes.shape[0]
    if order is not None and len(order.shape) == 1:
        inputs = order.shape[0]
        fitting = [bits for bits in _BITS if -(-inputs * bits // 32) == words]
        named = [bits for bits in fitting if bits == settings.get("bits")] or fitting
        if len(named) == 1:
            return named[0], inputs
    else:
        bits = settings.get("bits")
        if type(bits) is int and bits in _BITS and words * 32 % bits == 0:
            return bits, words * 32 // bits
    raise CheckpointError(
        f"{codes.name} has the shape {list(codes.shape)}, which {brief(settings.get('bits'))} bits do not "
        "explain; restore the quantization_config of config.json"
    )


FORMAT = Gptq()
