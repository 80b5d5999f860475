"""What the tensors of an adapter's file in PEFT's format are, by their names."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from svdconvert.adapters.adapter_config import CONFIG, AdapterConfig
from svdconvert.adapters.embedding_factors import embedding_piece
from svdconvert.adapters.extra_parameters import PREFIX, is_copy, is_declared, is_vocabulary, parameter_of
from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.errors import ArtifactError
from svdconvert.linalg.factors import FACTOR_AXES

_KEY = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<piece>{'|'.join(FACTOR_AXES)})(?:\.default)?\.weight"
)
_MAGNITUDE = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?"
)
_KASA_CORE = re.compile(r"\.lora_diag$")
"""KaSA's name of the diagonal between B and A."""
_WRAPPERS = re.compile(r"^(?:module\.)+|(?<![^.])_orig_mod\.")
"""What DistributedDataParallel and torch.compile add to names."""
_UNSUPPORTED = {
    "lora_magnitude_vector": "a magnitude of DoRA",
    "trainable_tokens_": "single trained rows of an embedding (trainable_token_indices)",
}


@dataclass(frozen=True)
class FileNames:
    """The names of a file's tensors by what they mean; see `peft_files.Adapter`."""

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    """Those of the modules that are embeddings."""
    magnitudes: dict[str, str] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, file: Path, config: AdapterConfig, source: TensorSource) -> "FileNames":
        """The names of an open file. Raises ArtifactError for a tensor of unknown meaning."""
        found = cls()
        others = [name for name in source.infos if not found._sort(name, config, (file, source))]
        if others:
            raise _unknown(file, others)
        return found

    def _sort(self, name: str, config: AdapterConfig, opened: tuple[Path, TensorSource]) -> bool:
        """Add the name of one tensor; False if its meaning is unknown."""
        plain = _KASA_CORE.sub(".lora_S.weight", _WRAPPERS.sub("", name))
        if match := _KEY.fullmatch(plain):
            _put(self.modules.setdefault(match["module"], {}), match["piece"], name, opened)
        elif piece := embedding_piece(plain):
            self.embeddings.add(piece[0])
            _put(self.modules.setdefault(piece[0], {}), piece[1], name, opened)
        elif config.dora and (match := _MAGNITUDE.fullmatch(plain)):
            _put(self.magnitudes, match["module"], name, opened)
        elif is_copy(plain):
            _put(self.copies, parameter_of(plain), name, opened)
        elif is_declared(plain, config.modules_to_save, config.bias) or is_vocabulary(plain):
            _put(self.extras, parameter_of(plain), name, opened)
        else:
            return False
        return True


def _put(names: dict[str, str], meaning: str, name: str, file: tuple[Path, TensorSource]) -> None:
    """Add a tensor. PEFT saves a resized head twice, as `x` and as `x.modules_to_save`, with one value."""
    path, source = file
    known = names.setdefault(meaning, name)
    if known != name and not torch.equal(source.read(known), source.read(name)):
        raise ArtifactError(f"{path}: {known} and {name} mean the same and differ; remove one")


def _unknown(weights: Path, names: list[str]) -> ArtifactError:
    """The error for tensors that no plain LoRA has."""
    for part, what in _UNSUPPORTED.items():
        if part in names[0]:
            return ArtifactError(
                f"{weights} holds {names[0]}, {what}, which is not supported ({len(names)} such tensors); "
                "merge it with PEFT"
            )
    return ArtifactError(
        f"{weights} holds {names[0]}, which is neither a low-rank factor nor named as "
        f"trained in full in {CONFIG}, and would be lost ({len(names)} such tensors); train without it, "
        "or merge with the program that wrote it"
    )
