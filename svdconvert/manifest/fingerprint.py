"""Fingerprints of checkpoints: checksums of the configuration, the headers and every tensor.

They tell whether a model is the one that an adapter was made for.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from svdconvert.checkpoint.tensors import TensorInfo, TensorSource

CHUNK = 4 << 20
"""Bytes of a tensor that are read, hashed and written at a time."""

# Entries of config.json that programs rewrite without changing the model.
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identifies the content of a checkpoint."""

    config: str
    headers: str
    tensors: Mapping[str, str]
    """Checksum of every tensor that was read, by name."""


class Checksum:
    """xxh3 of the bytes of one tensor, computed chunk by chunk."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def update(self, chunk: memoryview) -> None:
        """Add the next bytes."""
        self._state.update(chunk)

    def text(self) -> str:
        """The checksum as sixteen hexadecimal digits."""
        return str(self._state.hexdigest())


def checksum(data: memoryview) -> str:
    """xxh3 of the bytes of a tensor, as sixteen hexadecimal digits."""
    return str(xxhash.xxh3_64_hexdigest(data))


def tensor_checksum(source: TensorSource, name: str) -> str:
    """Checksum of one tensor of a source, read in chunks."""
    total = Checksum()
    for chunk in source.chunks(name, CHUNK):
        total.update(chunk)
    return total.text()


def config_checksum(config: Mapping[str, Any]) -> str:
    """Checksum of a configuration, without the entries that programs rewrite."""
    return digest(_stable(config))


def headers_checksum(infos: Iterable[TensorInfo]) -> str:
    """Checksum of all names, shapes and element types. How the tensors are sharded does not matter."""
    return digest(sorted((info.name, list(info.shape), info.dtype) for info in infos))


def _stable(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _stable(inner) for key, inner in value.items() if key not in _VOLATILE}


def digest(value: Any) -> str:
    """Checksum of a value that JSON can represent."""
    return str(xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode()))


def file_checksum(path: Path) -> str:
    """xxh3 of a file's bytes."""
    total = xxhash.xxh3_64()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            total.update(chunk)
    return str(total.hexdigest())
