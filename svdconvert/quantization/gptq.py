"""GPTQ: transposed integer codes in words of 32 bits, with groups of input features in any order.

w[o, i] = scales[g, o] * (q[i, o] - z[g, o]) with g = g_idx[i]. The first version of the format stores z - 1,
modulo 2^bits; the second one (`checkpoint_format` gptq_v2, and AutoRound's own `packing_format`) stores z.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import REAL, TensorInfo, TensorSource
from svdconvert.errors import CheckpointError, brief
from svdconvert.quantization.base import Coded, Parts, StorageFormat, require_shape
from svdconvert.quantization.packing import unpack

_BITS = (2, 3, 4, 5, 6, 7, 8)
_FIRST_VERSION = ("gptq", "auto_round:auto_gptq", "auto_round:gptq")
_SECOND_VERSION = (
    "gptq_v2",
    "auto_round",
    "auto_round:gptqmodel",
    "auto_round:exllamav2",
    "auto_round:tritonv2",
)


class Gptq(StorageFormat):
    """Codes packed along the input features, zero points along the output features."""

    summary = "GPTQ: integers of 2 to 8 bits, of both versions"
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
    outputs = codes.shape[1]
    groups = scale.shape[0] if len(scale.shape) == 2 else 0
    if scale.dtype not in REAL or scale.shape != (groups, outputs) or not groups or not codes.shape[0]:
        raise CheckpointError(
            f"{scale.name} has the shape {list(scale.shape)} and the type {scale.dtype}, which does not fit "
            f"{codes.name} of the shape {list(codes.shape)}; fetch the checkpoint again"
        )
    zeros = infos[parts["zeros"]]
    order = infos.get(parts.get("g_idx", ""))
    bits, inputs = _bits_and_inputs(codes, zeros, order, groups, settings)
    require_shape(zeros, (groups, -(-outputs * bits // 32)))
    added = _added(codes, settings)
    chosen = {"groups": groups, "group": -(-inputs // groups), "added": added}
    return Coded(f"{path}weight", (outputs, inputs), parts, bits, settings=chosen)


def _added(codes: TensorInfo, settings: Mapping[str, Any]) -> int:
    """What must be added to the stored zero points. Raises CheckpointError for an unknown version."""
    for key in ("packing_format", "checkpoint_format", "backend"):
        name = settings.get(key)
        if name in _FIRST_VERSION or name in _SECOND_VERSION:
            return 0 if name in _SECOND_VERSION else 1
        if key != "backend" and name is not None:
            raise CheckpointError(
                f"{codes.name} is packed as {brief(name)}, a {key} that is not known; give a checkpoint in "
                f"one of these: {', '.join((*_FIRST_VERSION, *_SECOND_VERSION))}"
            )
    return 1


def _bits_and_inputs(
    codes: TensorInfo,
    zeros: TensorInfo,
    order: TensorInfo | None,
    groups: int,
    settings: Mapping[str, Any],
) -> tuple[int, int]:
    """(bits of a code, input features) that fit all shapes; the configuration decides between several.

    A checkpoint may have other bits in some layers than its configuration names.
    """
    words, outputs = codes.shape
    length = order.shape[0] if order is not None and len(order.shape) == 1 else None
    fitting = []
    for bits in _BITS:
        inputs = words * 32 // bits if length is None else length
        if zeros.shape == (groups, -(-outputs * bits // 32)) and -(-inputs * bits // 32) == words:
            fitting.append((bits, inputs))
    size = settings.get("group_size")
    grouped = [each for each in fitting if size == -1 or -(-each[1] // groups) == size] or fitting
    named = [each for each in grouped if each[0] == settings.get("bits")] or grouped
    if len(named) != 1:
        raise CheckpointError(
            f"{codes.name} has the shape {list(codes.shape)}, which {brief(settings.get('bits'))} bits do "
            "not explain; restore the quantization_config of config.json"
        )
    return named[0]


FORMAT = Gptq()
