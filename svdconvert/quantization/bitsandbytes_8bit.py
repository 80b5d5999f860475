"""bitsandbytes' 8-bit weights, LLM.int8 (arXiv:2208.07339): w = code * largest magnitude of its row / 127."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.quantization.base import Coded, Parts, StorageFormat, require_shape

_TOP = 127.0


class BitsAndBytes8Bit(StorageFormat):
    """One signed byte per code, the largest magnitude of each row as SCB."""

    summary = "bitsandbytes 8-bit: LLM.int8"
    methods = frozenset({"bitsandbytes"})
    encodes = True

    def detect(self, source: TensorSource, settings: Mapping[str, Any]) -> Iterator[Coded]:
        """Every matrix of signed bytes with an SCB."""
        for name, info in source.infos.items():
            path = name.removesuffix("weight")
            scale = source.infos.get(path + "SCB")
            if path == name or info.dtype != "I8" or len(info.shape) != 2 or scale is None:
                continue
            require_shape(scale, (info.shape[0],), (info.shape[0], 1))
            unused = tuple(end for end in (path + "weight_format", f"{name}_format") if end in source.infos)
            parts = {"codes": name, "scale": scale.name}
            yield Coded(name, info.shape, parts, 8, tuple(dict.fromkeys(unused)))

    def decode(self, coded: Coded, parts: Parts, rows: slice) -> Tensor:
        """code * scale / 127, with the scale of its row."""
        scale_O1 = parts["scale"].reshape(-1, 1)[rows].float()
        return parts["codes"][rows].float() * scale_O1 / _TOP

    def encode(self, coded: Coded, weight: Tensor, parts: Parts) -> dict[str, Tensor]:
        """The largest magnitude of each row, then the nearest codes."""
        largest_O1 = weight.abs().amax(1, keepdim=True)
        factor_O1 = torch.where(largest_O1 > 0, _TOP / largest_O1, 0.0)
        codes = (weight * factor_O1).round().to(torch.int8)
        return {"codes": codes, "scale": largest_O1.reshape(parts["scale"].shape).to(parts["scale"].dtype)}


FORMAT = BitsAndBytes8Bit()
