"""Integer codes of 1 to 8 bits in words of 32 bits: compressed-tensors' pack-quantized."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import TensorInfo, TensorSource
from svdconvert.errors import CheckpointError
from svdconvert.quantization.base import Coded, Parts, StorageFormat, require_shape, weight_settings
from svdconvert.quantization.integers import group_size, per_row, quantize
from svdconvert.quantization.packing import pack, unpack

_UNUSED = ("input_scale", "input_zero_point", "input_global_scale")


class PackQuantized(StorageFormat):
    """Codes packed along the rows, zero points packed along the columns, both stored plus 2^(bits - 1)."""

    summary = "INT4: compressed-tensors' packed integers of 1 to 8 bits"
    methods = frozenset({"compressed-tensors"})
    encodes = True

    def detect(self, source: TensorSource, settings: Mapping[str, Any]) -> Iterator[Coded]:
        """Every weight_packed of 32-bit words with a weight_scale and a weight_shape."""
        for name, info in source.infos.items():
            path = name.removesuffix("weight_packed")
            if path == name or info.dtype != "I32" or len(info.shape) != 2:
                continue
            parts = {"codes": name}
            for part in ("scale", "shape", "zero_point", "g_idx"):
                if (stored := f"{path}weight_{part}") in source.infos:
                    parts[part] = stored
            if "scale" in parts and "shape" in parts:
                yield _coded(path, parts, source, settings)

    def decode(self, coded: Coded, parts: Parts, rows: slice) -> Tensor:
        """(q - z) * scale of the group of its column."""
        columns = coded.shape[1]
        half = 1 << (coded.bits - 1)
        codes_OI = unpack(parts["codes"][rows], coded.bits, columns).float() - half
        group_I = _groups(coded, parts)
        if "zero_point" in parts:
            codes_OI -= _zeros(coded, parts)[rows].float()[:, group_I]
        return codes_OI * per_row(parts["scale"].float(), coded.shape[0])[rows][:, group_I]

    def encode(self, coded: Coded, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        """As `integers.quantize`; the groups of an activation order stay as they are."""
        count = 1 if parts["scale"].numel() == 1 else coded.shape[0]
        scale = per_row(parts["scale"], count)
        zero = _zeros(coded, parts) if "zero_point" in parts else None
        order = torch.argsort(_equal_groups(coded, parts), stable=True)
        codes, scale, zero = quantize(weight[:, order], coded.bits, coded.settings["group"], scale, zero)
        codes = codes[:, torch.argsort(order)]
        half = 1 << (coded.bits - 1)
        found = {name: part for name, part in parts.items() if name in ("shape", "g_idx")}
        found["codes"] = pack(codes.int() + half, coded.bits)
        found["scale"] = scale.reshape(parts["scale"].shape)
        if zero is not None:
            found["zero_point"] = pack((zero.int() + half).T.contiguous(), coded.bits).T.contiguous()
        return found

    def title(self, coded: Coded) -> str:
        """With the size of the groups."""
        group = coded.settings["group"]
        return f"INT{coded.bits} in groups of {group}" if group < coded.shape[1] else f"INT{coded.bits}"


def _coded(path: str, parts: Mapping[str, str], source: TensorSource, settings: Mapping[str, Any]) -> Coded:
    infos = source.infos
    codes = infos[parts["codes"]]
    shape = _shape(source, infos[parts["shape"]], codes)
    bits = _bits(codes, shape[1], settings)
    group = group_size(shape, infos[parts["scale"]])
    if "zero_point" in parts:
        groups = shape[1] // group
        require_shape(infos[parts["zero_point"]], (-(-shape[0] * bits // 32), groups))
    if "g_idx" in parts:
        require_shape(infos[parts["g_idx"]], (shape[1],))
    unused = tuple(path + end for end in _UNUSED if path + end in infos)
    return Coded(f"{path}weight", shape, parts, bits, unused, {"group": group})


def _shape(source: TensorSource, info: TensorInfo, codes: TensorInfo) -> tuple[int, int]:
    """The shape in weight_shape. Raises CheckpointError if the packed codes cannot have it."""
    require_shape(info, (2,))
    rows, columns = (int(size) for size in source.read(info.name).tolist())
    if rows != codes.shape[0] or not 0 <= columns <= 32 * codes.shape[1]:
        raise CheckpointError(
            f"{info.name} says {[rows, columns]}, which {codes.name} of the shape {list(codes.shape)} "
            "cannot hold; fetch the checkpoint again"
        )
    return rows, columns


def _bits(codes: TensorInfo, columns: int, settings: Mapping[str, Any]) -> int:
    """The bits of a code: those of the configuration, or the only ones that fit the size of the rows."""
    fitting = [bits for bits in range(1, 9) if -(-columns * bits // 32) == codes.shape[1]]
    named = [weights.get("num_bits") for weights in weight_settings(settings)]
    chosen = [bits for bits in fitting if bits in named] or fitting
    if len(chosen) != 1:
        raise CheckpointError(
            f"{codes.name} has {codes.shape[1]} words for {columns} codes, which does not tell how many bits "
            "a code has; restore the quantization_config of config.json"
        )
    return chosen[0]


def _groups(coded: Coded, parts: Parts) -> Tensor:
    """The group of every column. Raises CheckpointError for an order that does not fit the groups."""
    group = coded.settings["group"]
    if "g_idx" not in parts or bool((parts["g_idx"] < 0).any()):
        return torch.arange(coded.shape[1]).div(group, rounding_mode="floor")
    found = parts["g_idx"].long()
    count = coded.shape[1] // group
    if found.numel() and int(found.max()) >= count:
        raise CheckpointError(f"{coded.parts['g_idx']} names a group above {count - 1}; fetch the file again")
    return found


def _equal_groups(coded: Coded, parts: Parts) -> Tensor:
    """`_groups`, of which each must have the same number of columns. Raises CheckpointError otherwise."""
    found = _groups(coded, parts)
    if (found.bincount() != coded.settings["group"]).any():
        raise CheckpointError(f"{coded.parts['g_idx']} has groups of different sizes; fetch the file again")
    return found


def _zeros(coded: Coded, parts: Parts) -> Tensor:
    """The zero points as signed integers (rows, groups)."""
    packed = parts["zero_point"].T.contiguous()
    return unpack(packed, coded.bits, coded.shape[0]).T.to(torch.int16) - (1 << (coded.bits - 1))


FORMAT = PackQuantized()
