"""Recognises and refuses quantised weights, which are stored as integer codes."""

from collections.abc import Iterable, Mapping
from typing import Any

from svdconvert.checkpoint.tensors import REAL, TensorInfo
from svdconvert.errors import TargetError

# Endings of the tensors that are stored with the codes of a matrix <path>.weight.
_COMPANIONS = ("weight_scale", "weight_scale_inv", "weight.absmax", "SCB", "qweight", "weight_packed")


def refuse_codes(
    model: object, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], names: Iterable[str]
) -> None:
    """Raise TargetError if one of the matrices `names` is stored as quantised codes."""
    for name in names:
        info = infos[name]
        if info.dtype not in REAL:
            method = _method_text(config, infos, name)
            raise TargetError(
                f"{name} of {model} is stored as {info.dtype}{method}, which is not supported; "
                "convert the checkpoint to bfloat16, float16 or float32 first"
            )


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """The quantisation that a config.json names, such as fp8 or bitsandbytes."""
    for values in (config, config.get("text_config")):
        settings = values.get("quantization_config") if isinstance(values, Mapping) else None
        if isinstance(settings, Mapping):
            return str(settings.get("quant_method") or "unnamed")
    return None


def _method_text(config: Mapping[str, Any], infos: Mapping[str, TensorInfo], name: str) -> str:
    method = quantization_method(config)
    if method is not None:
        return f" (quantisation {method})"
    path = name.removesuffix("weight")
    companion = next((path + end for end in _COMPANIONS if path + end in infos), None)
    return f" with {companion} as its scale" if companion else ""
