"""Fingerprints a model, and checks that a model is the one that a directory belongs to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.parts import undivided, with_known_parts
from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.errors import ArtifactError
from svdconvert.manifest.fingerprint import Fingerprint, config_checksum, headers_checksum, tensor_checksum
from svdconvert.manifest.schema import Origin


def fingerprint(config: Mapping[str, Any], source: TensorSource, tensors: Mapping[str, str]) -> Fingerprint:
    """The fingerprint of a model; `tensors` are the checksums of its tensors."""
    headers = headers_checksum(undivided(source).infos.values())
    return Fingerprint(config_checksum(config), headers, tensors)


def same_model(origin: Origin, directory: Path, config: Mapping[str, Any], source: TensorSource) -> None:
    """Raise ArtifactError if `directory` is not the model of `origin`, by a quick comparison.

    Compares the configuration, the headers and the smallest matrix with a known checksum. The other tensors
    are compared when they are read.
    """
    known = origin.fingerprint
    whole = source
    source = with_known_parts(source, known.tensors)
    if known.headers != headers_checksum(whole.infos.values()):
        raise ArtifactError(
            _other_model(directory, origin, "its tensor names, shapes or element types differ")
        )
    if known.config != config_checksum(config):
        raise ArtifactError(_other_model(directory, origin, "its config.json differs"))
    if absent := [name for name in known.tensors if name not in source.infos]:
        raise ArtifactError(_other_model(directory, origin, f"it has no {absent[0]}"))
    matrices = [name for name in known.tensors if len(source.infos[name].shape) == 2]
    if matrices:
        name = min(matrices, key=lambda name: source.infos[name].nbytes)
        if tensor_checksum(source, name) != known.tensors[name]:
            raise ArtifactError(_other_model(directory, origin, f"the values of {name} differ"))


def _other_model(directory: Path, origin: Origin, difference: str) -> str:
    model = f"{origin.location}@{origin.revision}" if origin.revision else origin.location
    return (
        f"{directory} is not the model that the adapter was made for ({model}): {difference}; "
        "give the right one"
    )
