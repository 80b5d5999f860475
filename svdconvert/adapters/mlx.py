"""mlx-lm's adapter directory, read and written: adapter_config.json and adapters.safetensors.

A layer computes y + scale * (x @ lora_a) @ lora_b, so lora_a is (I, R) and lora_b is (R, O): the transposed
factors of PEFT. There is one rank and one scale for all modules, and nothing else may be in the file.
Source: mlx-lm 0.32, mlx_lm/tuner/utils.py (load_adapters) and tuner/lora.py.
"""

import json
import re
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from svdconvert.adapters.adapter_config import CONFIG, AdapterConfig
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource, in_chunks, read_whole, tensor_bytes
from svdconvert.errors import ArtifactError, brief
from svdconvert.manifest.compared import open_compared
from svdconvert.output.sidecars import read_json_object

WEIGHTS = "adapters.safetensors"
PIECES = {"lora_A": "lora_a", "lora_B": "lora_b"}
"""PEFT's name of a factor -> mlx-lm's."""
_KEY = re.compile(r"(?P<module>.+)\.(?P<piece>lora_a|lora_b)")
_LAYER = re.compile(r"(?:.*\.)?layers\.[0-9]{1,6}\.(?P<key>.+)")
_LARGEST_SCALE = 1e9
_ALL_LAYERS = -1


def file_key(module: str, piece: str) -> str:
    """The name of a module's factor in the file; `piece` is PEFT's."""
    return f"{module}.{PIECES[piece]}"


def is_adapter(directory: Path) -> bool:
    """True for a directory that mlx-lm's training wrote."""
    return (directory / CONFIG).is_file() and (directory / WEIGHTS).is_file()


def config_text(modules: list[str], rank: int) -> str:
    """adapter_config.json of a LoRA of scale 1 for these modules.

    Raises ArtifactError for a module outside the repeated layers, which mlx-lm does not adapt.
    """
    keys = set()
    for module in modules:
        found = _LAYER.fullmatch(module)
        if found is None:
            raise ArtifactError(
                f"{module} is in no repeated layer, and mlx-lm adapts only those; write --format peft"
            )
        keys.add(found["key"])
    content = {
        "fine_tune_type": "lora",
        "num_layers": _ALL_LAYERS,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    return json.dumps(content, indent=4, sort_keys=True) + "\n"


def read_config(directory: Path, rank: int, modules: list[str]) -> AdapterConfig:
    """The configuration of an adapter whose factors have this rank.

    Raises ArtifactError for another kind than LoRA, or for values that do not fit the file.
    """
    path = directory / CONFIG
    values = read_json_object(path)
    kind = values.get("fine_tune_type", "lora")
    if kind != "lora":
        raise ArtifactError(
            f"{path} has fine_tune_type {brief(kind)}, and svdconvert reads lora; fuse it with mlx_lm.fuse"
        )
    parameters = values.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scale = _scale(path, parameters)
    stated = parameters.get("rank")
    if stated != rank:
        raise ArtifactError(
            f"{path} has rank {brief(stated)}, but the factors of {WEIGHTS} have {rank}; restore the "
            "configuration that belongs to the file"
        )
    return AdapterConfig(rank=rank, alpha=scale * rank, targets=modules, base=_base(values))


def _scale(path: Path, parameters: Mapping[str, Any]) -> float:
    scale = parameters.get("scale")
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number or not isfinite(float(scale or 0)) or not 0 < abs(float(scale or 0)) <= _LARGEST_SCALE:
        raise ArtifactError(
            f"{path} has the scale {brief(scale)}, which must be a number other than 0; restore the file"
        )
    return float(scale or 0)


def _base(values: Mapping[str, Any]) -> str | None:
    """The model that training named."""
    named = values.get("model")
    return named if isinstance(named, str) and named else None


def open_factors(directory: Path) -> tuple["MlxSource", dict[str, dict[str, str]]]:
    """(the file's tensors with the factors as PEFT has them, module -> factor -> name).

    Raises ArtifactError for a tensor that is no factor.
    """
    path = directory / WEIGHTS
    source = MlxSource(open_compared(path))
    modules: dict[str, dict[str, str]] = {}
    pieces = {theirs: ours for ours, theirs in PIECES.items()}
    for name, info in source.infos.items():
        match = _KEY.fullmatch(name)
        if match is None or len(info.shape) != 2:
            raise ArtifactError(
                f"{path} holds {name} of the shape {info.shape}, which is no factor of a linear layer; "
                "fuse it with mlx_lm.fuse"
            )
        modules.setdefault(match["module"], {})[pieces[match["piece"]]] = name
    return source, modules


class MlxSource:
    """A TensorSource whose matrices are the transposed ones of another."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, info.shape[::-1], info.dtype) for name, info in source.infos.items()
        }

    def read(self, name: str) -> Tensor:
        """The transposed matrix, in newly allocated memory."""
        return read_whole(self._source, name).T.contiguous()

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """Its bytes in chunks of at most `size`; see TensorSource."""
        return in_chunks(tensor_bytes(self.read(name))[section or slice(None)], size, buffer)

    def file_versions(self) -> Mapping[str, list[int]]:
        """Those of the file."""
        return self._source.file_versions()
