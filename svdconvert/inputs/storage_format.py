"""How a checkpoint stores its weights: quantised ones are decoded, and unknown methods refused by name."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.json_text import read_json
from svdconvert.checkpoint.tensors import REAL, TensorInfo, TensorSource
from svdconvert.errors import TargetError, brief
from svdconvert.quantization.view import DecodedSource, detect_formats

# ModelOpt writes its settings into a file of its own if its export is not for transformers.
_MODELOPT = "hf_quant_config.json"
_LONGEST = 60  # characters of a method's name
_FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Element types of codes. Other integers and bools are positions, masks and counters.
_CODES = (
    "I8", "U8", "I16", "I32", "U32", "F4", "F6_E3M2", "F6_E2M3",
    "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0",
)  # fmt: skip
_NO_CODES = ("bias", "_ids", "mask", "num_batches_tracked")
# Endings of the tensors that are stored with the codes of a matrix <path>.weight.
_COMPANIONS = ("weight_scale", "weight_scale_inv", "weight.absmax", "SCB", "qweight", "weight_packed")


def decoded(source: TensorSource, config: Mapping[str, Any], directory: Path) -> TensorSource:
    """`source` with its quantised weights as float tensors; `source` itself if it has none of a known format.

    They have the element type that config.json names, else bfloat16. Raises CheckpointError if a weight and
    its companions contradict each other.
    """
    coded = detect_formats(source, _settings(config, directory))
    return DecodedSource(source, coded, _float_of(config)) if coded else source


def formats(source: TensorSource) -> dict[str, int]:
    """How many weights are stored in each format, by its title; empty if no weight is quantised."""
    if not isinstance(source, DecodedSource):
        return {}
    return dict(Counter(plugin.title(coded) for plugin, coded in source.coded.values()))


def bits_per_weight(source: DecodedSource) -> float:
    """Stored bits per value of the quantised weights, companions included."""
    stored = sum(
        source.stored.infos[name].nbytes for _, coded in source.coded.values() for name in coded.stored
    )
    return 8.0 * stored / max(1, sum(coded.count for _, coded in source.coded.values()))


def refuse_unknown_format(model: object, config: Mapping[str, Any], source: TensorSource) -> None:
    """Raise TargetError if a tensor of a quantised checkpoint is in no format that is known."""
    method = quantization_method(config)
    if method is None and not isinstance(source, DecodedSource):
        return
    codes = [info for info in source.infos.values() if _is_code(info)]
    if codes:
        raise TargetError(
            f"{model} is quantised{_method_text(config, source.infos, codes[0].name)} in a way that is not "
            f"supported: no known format explains {codes[0].name}, stored as {codes[0].dtype}; "
            f"{_advice(len(codes))}"
        )


def refuse_codes(
    model: object, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], names: Iterable[str]
) -> None:
    """Raise TargetError if one of the matrices `names` is stored as quantised codes."""
    unreal = [infos[name] for name in names if infos[name].dtype not in REAL]
    if unreal:
        first = unreal[0]
        raise TargetError(
            f"{first.name} of {model} is stored as {first.dtype}{_method_text(config, infos, first.name)}, "
            f"which is not supported; {_advice(len(unreal))}"
        )


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """The quantisation that a config.json names, such as fp8 or bitsandbytes."""
    settings = _configured(config)
    if settings is None:
        return None
    method = settings.get("quant_method")
    if isinstance(method, str) and len(method) < _LONGEST:
        return method
    return brief(method) if method else "unnamed"


def _configured(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a config.json, or of the configuration of its language model."""
    for values in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            settings = values.get(key) if isinstance(values, Mapping) else None
            if isinstance(settings, Mapping):
                return settings
    return None


def _settings(config: Mapping[str, Any], directory: Path) -> Mapping[str, Any]:
    settings = _configured(config)
    path = directory / _MODELOPT
    if settings is None and directory.is_dir() and path.is_file():
        try:
            read = read_json(path)
        except (OSError, ValueError):
            return {}
        return {**read, "quant_method": "modelopt"} if isinstance(read, dict) else {}
    return settings or {}


def _float_of(config: Mapping[str, Any]) -> str:
    """The element type of decoded weights: that of config.json, else bfloat16."""
    for values in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            name = values.get(key) if isinstance(values, Mapping) else None
            if isinstance(name, str) and name in _FLOATS:
                return _FLOATS[name]
    return "BF16"


def _is_code(info: TensorInfo) -> bool:
    return info.dtype in _CODES and not info.name.endswith(_NO_CODES)


def _advice(count: int) -> str:
    return f"convert the checkpoint to bfloat16, float16 or float32 first ({count} such tensors)"


def _method_text(config: Mapping[str, Any], infos: Mapping[str, TensorInfo], name: str) -> str:
    method = quantization_method(config)
    if method is not None:
        return f" (quantisation {method})"
    path = name.removesuffix("weight")
    companion = next((path + end for end in _COMPANIONS if path + end in infos), None)
    return f" with {companion} as its scale" if companion else ""
