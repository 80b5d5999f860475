"""PEFT's adapter directory, read and written: adapter_config.json and adapter_model.safetensors.

Conventions of PEFT 0.21: keys are `base_model.model.<module>.lora_A.weight`, there is only one file, its
metadata is exactly {"format": "pt"}, and the configuration is sorted by key.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from svdconvert.adapters.adapter_config import CONFIG, AdapterConfig, read_adapter_config
from svdconvert.adapters.embedding_factors import embedding_piece, piece_info
from svdconvert.adapters.expert_factors import Expert, Slices, find_experts, piece_shape
from svdconvert.adapters.extra_parameters import PREFIX, is_copy, is_declared, is_vocabulary, parameter_of
from svdconvert.checkpoint.safetensors_files import holds_model, open_file
from svdconvert.checkpoint.tensors import REAL, TensorInfo, TensorSource, tensor_bytes
from svdconvert.errors import ArtifactError
from svdconvert.linalg.factors import FACTOR_AXES, Factors
from svdconvert.manifest.fingerprint import checksum

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
"""The file of older versions of PEFT. Only tensors are unpickled, so no code in it can run."""
_KEY = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<piece>{'|'.join(FACTOR_AXES)})(?:\.default)?\.weight"
)
_WRAPPERS = re.compile(r"^(?:module\.)+|(?<![^.])_orig_mod\.")
"""What DistributedDataParallel and torch.compile add to names."""
_UNSUPPORTED = {
    "lora_magnitude_vector": "a magnitude of DoRA",
    "trainable_tokens_": "single trained rows of an embedding (trainable_token_indices)",
}


@dataclass(frozen=True)
class Adapter:
    """An open adapter: its configuration, and its factors, which are read one module at a time."""

    directory: Path
    config: AdapterConfig
    source: TensorSource
    modules: Mapping[str, Mapping[str, str]]
    """Module -> factor -> name in the file."""
    extras: Mapping[str, str] = field(default_factory=dict)
    """Parameter that is trained in full -> name in the file."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Parameter of the base -> name in the file of the copy that PEFT stored with the adapter."""
    expected: Mapping[str, str] = field(default_factory=dict)
    """Checksum that each tensor of the file must have, if a manifest knows them."""
    experts: Mapping[str, Expert] = field(default_factory=dict)
    """Module -> which expert it is, for the modules `PARAMETER[3]`, whose factors are in shared tensors."""
    embeddings: Collection[str] = ()
    """The modules that are embeddings, whose factors are stored transposed."""

    def factors(self, module: str) -> Factors:
        """A module's factors as stored. Raises ArtifactError if one has changed, or contains NaN or Inf."""
        names = self.modules[module]
        if (expert := self.experts.get(module)) is not None:
            slices = self._slices
            return Factors.of({factor: slices.piece(factor, name, expert) for factor, name in names.items()})
        pieces = {factor: self._checked(name) for factor, name in names.items()}
        if module in self.embeddings:
            pieces = {factor: piece.T.contiguous() for factor, piece in pieces.items()}
        return Factors.of(pieces)

    @cached_property
    def _slices(self) -> Slices:
        return Slices(self._checked)

    def parameter(self, name: str) -> Tensor:
        """A parameter trained in full, or the copy of one of the base.

        Raises ArtifactError if it has changed, or contains NaN or Inf.
        """
        return self._checked(self._parameter_key(name))

    def parameter_info(self, name: str) -> TensorInfo:
        """The header of a parameter."""
        return self.source.infos[self._parameter_key(name)]

    def _parameter_key(self, name: str) -> str:
        return self.extras[name] if name in self.extras else self.copies[name]

    def _checked(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        if self.expected and self.expected.get(name) != checksum(tensor_bytes(tensor)):
            raise ArtifactError(
                f"{self.directory}: {name} is not the tensor that the manifest lists; restore the file that "
                "belongs to the directory"
            )
        if not tensor.isfinite().all():
            raise ArtifactError(
                f"{self.directory}: {name} holds NaN or Inf; the training diverged or the file is damaged: "
                "use an earlier checkpoint"
            )
        return tensor

    def shape(self, module: str, piece: str) -> tuple[int, ...]:
        """The shape of a factor, from the header."""
        shape = piece_info(self.source, self.modules[module][piece], module, self.embeddings).shape
        expert = self.experts.get(module)
        return shape if expert is None else piece_shape(piece, shape, expert)


def key(module: str, piece: str) -> str:
    """The name of a module's factor in the adapter's file."""
    return f"{PREFIX}{module}.{piece}.weight"


def is_adapter(directory: Path) -> bool:
    """True for an adapter in PEFT's format, also without its weights.

    A model's directory with a stray adapter_config.json is none.
    """
    return (directory / CONFIG).is_file() and ((directory / WEIGHTS).exists() or not holds_model(directory))


def open_adapter(directory: Path) -> Adapter:
    """Open an adapter in PEFT's format: adapter_model.safetensors, else adapter_model.bin.

    Raises ArtifactError if it is missing or incomplete, or if it contains anything that cannot be converted
    (DoRA, tensors that its configuration does not declare): no part of an adapter is ever dropped.
    """
    weights = _weights_file(directory)
    if not (directory / CONFIG).is_file() or not weights.is_file():
        absent = CONFIG if not (directory / CONFIG).is_file() else WEIGHTS
        raise ArtifactError(
            f"{directory / absent} is missing; an adapter is a directory with {CONFIG} and {WEIGHTS}"
        )
    config = read_adapter_config(directory)
    source = open_file(weights)
    modules, extras, copies, embeddings = _sorted_names(weights, config, source)
    named, experts = find_experts(weights, config, source, modules)
    single = {module: names for module, names in named.items() if module not in experts}
    if single or not experts:
        check_factors(weights, source, single, embeddings)
    _check_ranks(weights, config, source, single, embeddings)
    if not config.targets and not config.parameters:
        config = replace(config, targets=sorted(named))
    return Adapter(
        directory, config, source, named, extras, copies=copies, experts=experts, embeddings=embeddings
    )


def _sorted_names(
    weights: Path, config: AdapterConfig, source: TensorSource
) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str], set[str]]:
    """(module -> factor -> name, parameter trained in full -> name, parameter of the base -> name,
    modules that are embeddings).

    Raises ArtifactError for a tensor that is none of these.
    """
    modules: dict[str, dict[str, str]] = {}
    extras: dict[str, str] = {}
    copies: dict[str, str] = {}
    others: list[str] = []
    embeddings: set[str] = set()
    opened = weights, source
    for name in source.infos:
        plain = _WRAPPERS.sub("", name)
        if match := _KEY.fullmatch(plain):
            _put(modules.setdefault(match["module"], {}), match["piece"], name, opened)
        elif piece := embedding_piece(plain):
            embeddings.add(piece[0])
            _put(modules.setdefault(piece[0], {}), piece[1], name, opened)
        elif is_copy(plain):
            _put(copies, parameter_of(plain), name, opened)
        elif is_declared(plain, config.modules_to_save, config.bias) or is_vocabulary(plain):
            _put(extras, parameter_of(plain), name, opened)
        else:
            others.append(name)
    if others:
        raise _unknown(weights, others)
    return modules, extras, copies, embeddings


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


def _weights_file(directory: Path) -> Path:
    """The file with an adapter's tensors, which may be missing."""
    pickled = directory / PICKLED
    return pickled if pickled.is_file() and not (directory / WEIGHTS).exists() else directory / WEIGHTS


def check_factors(
    file: Path,
    source: TensorSource,
    modules: Mapping[str, Mapping[str, str]],
    embeddings: Collection[str] = (),
) -> None:
    """Raise ArtifactError for a factor that is missing, is empty, or has a wrong shape or element type."""
    if not modules:
        raise ArtifactError(f"{file} holds no lora_A and lora_B; it is not a LoRA adapter")
    for module, names in modules.items():
        if absent := {"lora_A", "lora_B"} - set(names):
            raise ArtifactError(f"{file} has no {min(absent)} for {module}; restore the file")
        infos = {factor: piece_info(source, name, module, embeddings) for factor, name in names.items()}
        for factor, info in infos.items():
            _check_factor(file, factor, info)
        rank = infos["lora_A"].shape[0]
        shapes = {"lora_A": None, "lora_B": None, "lora_S": (rank,), "lora_R": (rank, rank)}
        odd = [info for factor, info in infos.items() if shapes[factor] not in (None, info.shape)]
        if infos["lora_B"].shape[1] != rank:
            odd.append(infos["lora_B"])
        if odd:
            raise ArtifactError(
                f"{file}: {odd[0].name} has the shape {odd[0].shape}, which does not fit the rank {rank} of "
                "lora_A; restore the file"
            )


def _check_factor(file: Path, factor: str, info: TensorInfo) -> None:
    if info.dtype not in REAL:
        raise ArtifactError(
            f"{file}: {info.name} is stored as {info.dtype}, and factors must be float32, bfloat16, float16 "
            "or float64; convert the adapter first"
        )
    if 0 in info.shape:
        raise ArtifactError(
            f"{file}: {info.name} is empty (shape {info.shape}), as DeepSpeed ZeRO-3 saves parameters that "
            "it did not gather; save the adapter again with gathered weights"
        )
    if len(info.shape) != (1 if factor == "lora_S" else 2):
        raise ArtifactError(
            f"{file}: {info.name} has the shape {info.shape} and is not a factor; restore the file"
        )


def _check_ranks(
    file: Path,
    config: AdapterConfig,
    source: TensorSource,
    modules: Mapping[str, Mapping[str, str]],
    embeddings: Collection[str],
) -> None:
    """Raise ArtifactError if a factor's rank differs from the configuration's: its scale would be wrong."""
    for module, names in modules.items():
        stored = piece_info(source, names["lora_A"], module, embeddings).shape[0]
        if stored != (rank := config.rank_of(module)):
            raise ArtifactError(
                f"{file}: the factors of {module} have rank {stored}, but rank {rank} in {CONFIG}; restore "
                "the configuration that belongs to the file"
            )


def adapter_infos(module: str, pieces: Mapping[str, tuple[int, ...]], dtype: str) -> list[TensorInfo]:
    """The headers of a module's tensors in an adapter's file."""
    return [TensorInfo(key(module, piece), shape, dtype) for piece, shape in pieces.items()]


def target_parameters(chosen: Iterable[str], others: Collection[str]) -> list[str]:
    """The shortest `target_parameters` that selects exactly the parameters `chosen`, and none of `others`.

    A parameter's entry is its last two components ("experts.gate_up_proj") if no other parameter ends in
    them, else its full path.
    """
    last = {name: ".".join(name.rsplit(".", 2)[-2:]) for name in {*chosen, *others}}
    partly_chosen = {last[name] for name in others}
    return sorted({name if last[name] in partly_chosen else last[name] for name in chosen})


def target_modules(chosen: Iterable[str], linears: Collection[str]) -> list[str]:
    """The shortest `target_modules` that selects exactly the modules `chosen` among `linears`.

    A module's entry is its last component ("q_proj", or "mlp.0" if that is a number) if all modules that end
    in it are chosen, else its full path.
    """
    targets = set(chosen)
    last = {module: _ending(module) for module in {*targets, *linears}}
    partly_chosen = {last[module] for module in linears if module not in targets}
    # PEFT matches modules that contain others too: feed_forward.dense, next to feed_forward.dense.dense.
    partly_chosen |= {_ending(holder) for module in last for holder in _holders(module)}
    return sorted({module if last[module] in partly_chosen else last[module] for module in targets})


def _holders(module: str) -> Iterator[str]:
    """The paths of the modules that contain a module."""
    while "." in module:
        module = module.rpartition(".")[0]
        yield module


def _ending(module: str) -> str:
    """A path from its last component on that is no number: blocks have numbers too."""
    parts = module.split(".")
    first = next((number for number in range(len(parts) - 1, 0, -1) if not parts[number].isdigit()), 0)
    return ".".join(parts[first:])
