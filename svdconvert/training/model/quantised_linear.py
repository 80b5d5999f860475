"""A frozen linear layer whose weight stays quantised in memory.  O: out features, I: in features.

The weight is decoded when it is used, in the forward pass and again in the backward pass, so that one decoded
matrix at a time is in memory. It is right for every shape and every storage format.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from svdconvert.linalg.blocks import rows_at_once
from svdconvert.quantization.base import Coded, StorageFormat

_PART = "part_"


@dataclass(frozen=True)
class QuantisedWeight:
    """A quantised weight as it is stored, and what decodes it."""

    plugin: StorageFormat
    coded: Coded
    parts: Mapping[str, Tensor]
    dtype: torch.dtype
    """Of the decoded values, as every other command reads them."""


class QuantisedLinear(nn.Linear):
    """A linear layer without a weight of its own: it decodes the parts of a quantised one."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        """The weight follows with `fill`."""
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", bias)
        self._quantised: QuantisedWeight | None = None

    def fill(self, quantised: QuantisedWeight) -> "QuantisedLinear":
        """Hold these parts, as buffers that follow the module to its device; returns the layer."""
        for name, part in quantised.parts.items():
            self.register_buffer(_PART + name, part, persistent=False)
        self._quantised = quantised
        return self

    @property
    def parts(self) -> dict[str, Tensor]:
        """The stored tensors, on the module's device."""
        return {
            name.removeprefix(_PART): buffer
            for name, buffer in self.named_buffers()
            if name.startswith(_PART)
        }

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weight (O, I), in new memory."""
        assert self._quantised is not None, "fill() comes first"
        return self.decoded(self._quantised.dtype)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) in `dtype`, after one rounding to the dtype that it is read in."""
        quantised = self._quantised
        assert quantised is not None, "fill() comes first"
        parts = self.parts
        device = next(iter(parts.values())).device
        if (kernel := _kernel(quantised, device)) is not None:
            return kernel(parts).to(quantised.dtype).to(dtype)
        rows = self.out_features
        weight_OI = torch.empty(rows, self.in_features, dtype=dtype, device=device)
        step = rows_at_once(rows, self.in_features) if device.type == "cpu" else rows
        for start in range(0, rows, step):
            part = slice(start, min(rows, start + step))
            weight_OI[part] = quantised.plugin.decode(quantised.coded, parts, part).to(quantised.dtype)
        return weight_OI

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in autocast's dtype under autocast, else in that of x."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        out: Tensor = _Product.apply(x, self, dtype)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Product(torch.autograd.Function):
    """x W^T for a frozen W that is decoded again in the backward pass instead of being saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer = layer
        ctx.dtype = x.dtype
        return linear(x.to(dtype), layer.decoded(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return (grad @ ctx.layer.decoded(grad.dtype)).to(ctx.dtype), None, None


def device_of(layer: nn.Module) -> torch.device:
    """The device of a layer's parameters or buffers."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        return tensor.device
    return torch.device("cpu")


def _kernel(
    quantised: QuantisedWeight, device: torch.device
) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
    """bitsandbytes' kernel for its 4-bit codes on a GPU if it is installed; its values are the same."""
    kind = quantised.coded.settings.get("kind")
    if device.type != "cuda" or kind not in ("nf4", "fp4") or not _has_bitsandbytes():
        return None
    return lambda parts: _by_bitsandbytes(quantised.coded, parts)


@cache
def _has_bitsandbytes() -> bool:
    try:
        import bitsandbytes.functional  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


def _by_bitsandbytes(coded: Coded, parts: Mapping[str, Tensor]) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    settings = coded.settings
    nested: Any = None
    offset = None
    if "nested_absmax" in parts:
        offset = torch.tensor(settings["offset"], device=parts["absmax"].device)
        nested = QuantState(
            absmax=parts["nested_absmax"],
            code=parts["nested_quant_map"],
            blocksize=settings["nested_blocksize"],
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=parts["absmax"],
        shape=torch.Size(coded.shape),
        code=parts["quant_map"],
        blocksize=settings["blocksize"],
        quant_type=settings["kind"],
        dtype=torch.float32,
        offset=offset,
        state2=nested,
    )
    weight_OI: Tensor = dequantize_4bit(parts["codes"].view(torch.uint8), state)
    return weight_OI
