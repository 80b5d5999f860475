"""Which model a directory belongs to, and whether the one at hand is it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.errors import ArtifactError
from svdconvert.manifest.fingerprint import Fingerprint, config_checksum, headers_checksum, tensor_checksum
from svdconvert.manifest.schema import Origin


def fingerprint(config: Mapping[str, Any], source: TensorSource, tensors: Mapping[str, str]) -> Fingerprint:
    """Of a model with the checksums `tensors`."""
    return Fingerprint(config_checksum(config), headers_checksum(source.infos.values()), tensors)


def same_model(origin: Origin, directory: Path, config: Mapping[str, Any], source: TensorSource) -> None:
    """Raise ArtifactError where `directory` is not the model of `origin`, as far as a glance can tell.

    Compares configuration, headers and the smallest known tensor; the others are compared when they
    are read.
    """
    known = origin.fingerprint
    if known.headers != headers_checksum(source.infos.values()):
        raise ArtifactError(_other(directory, origin, "it has other tensor names, shapes or element types"))
    if known.config != config_checksum(config):
        raise ArtifactError(_other(directory, origin, "it has another config.json"))
    matrices = [name for name in known.tensors if len(source.infos[name].shape) == 2]
    if matrices:
        name = min(matrices, key=lambda name: source.infos[name].nbytes)
        if tensor_checksum(source, name) != known.tensors[name]:
            raise ArtifactError(_other(directory, origin, f"it has other values in {name}"))


def _other(directory: Path, origin: Origin, difference: str) -> str:
    at = f"{origin.location}@{origin.revision}" if origin.revision else origin.location
    return (
        f"{directory} is not the model that the adapter was made for ({at}): {difference}; give the right one"
    )
