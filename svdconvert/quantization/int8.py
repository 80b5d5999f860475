"""Integer codes of one byte each: compressed-tensors' int-quantized and naive-quantized."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.quantization.base import Coded, Parts, StorageFormat, require_shape, weight_settings
from svdconvert.quantization.integers import group_size, per_row, quantize

_UNUSED = ("input_scale", "input_zero_point", "azp_adj")


class Int8(StorageFormat):
    """One signed byte per code, a scale per row or group, and perhaps a zero point."""

    summary = "INT8: compressed-tensors' int-quantized"
    methods = frozenset({"compressed-tensors"})
    encodes = True

    def detect(self, source: TensorSource, settings: Mapping[str, Any]) -> Iterator[Coded]:
        """Every matrix of signed bytes with a weight_scale."""
        for name, info in source.infos.items():
            path = name.removesuffix("weight")
            scale = source.infos.get(path + "weight_scale")
            if path == name or info.dtype != "I8" or len(info.shape) != 2 or scale is None:
                continue
            parts = {"codes": name, "scale": scale.name}
            size = group_size(info.shape, scale)
            zero = source.infos.get(path + "weight_zero_point")
            if zero is not None:
                require_shape(zero, scale.shape)
                parts["zero"] = zero.name
            unused = tuple(path + end for end in _UNUSED if path + end in source.infos)
            narrow = [weights.get("num_bits") for weights in weight_settings(settings)]
            bits = 4 if narrow and all(bits == 4 for bits in narrow) else 8
            yield Coded(name, info.shape, parts, bits, unused, {"group": size})

    def decode(self, coded: Coded, parts: Parts, rows: slice) -> Tensor:
        """(q - z) * scale of its group."""
        codes_OI = parts["codes"][rows].float()
        if "zero" in parts:
            codes_OI -= self._expanded(coded, parts["zero"], rows)
        return codes_OI * self._expanded(coded, parts["scale"], rows)

    def _expanded(self, coded: Coded, stored: Tensor, rows: slice) -> Tensor:
        grid = per_row(stored.float(), coded.shape[0])[rows]
        return grid.repeat_interleave(coded.settings["group"], dim=1)

    def encode(self, coded: Coded, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        """As `integers.quantize`."""
        count = 1 if parts["scale"].numel() == 1 else coded.shape[0]
        scale = per_row(parts["scale"], count)
        zero = per_row(parts["zero"], count) if "zero" in parts else None
        codes, scale, zero = quantize(weight, coded.bits, coded.settings["group"], scale, zero)
        found = {"codes": codes, "scale": scale.reshape(parts["scale"].shape)}
        if zero is not None:
            found["zero"] = zero.to(parts["zero"].dtype).reshape(parts["zero"].shape)
        assert codes.dtype == torch.int8
        return found

    def title(self, coded: Coded) -> str:
        """With the size of the groups."""
        group = coded.settings["group"]
        return f"INT{coded.bits} in groups of {group}" if group < coded.shape[1] else f"INT{coded.bits}"


FORMAT = Int8()
