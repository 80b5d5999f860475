"""PEFT's adapter directory, read and written: adapter_config.json and adapter_model.safetensors.

Conventions of PEFT 0.21: keys are `base_model.model.<module>.lora_A.weight`, there is only one file, its
metadata is exactly {"format": "pt"}, and the configuration is sorted by key.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from svdconvert.adapters import mlx
from svdconvert.adapters.adapter_config import CONFIG, AdapterConfig, read_adapter_config
from svdconvert.adapters.embedding_factors import piece_info
from svdconvert.adapters.equivalents import TYPES
from svdconvert.adapters.expert_factors import Expert, Slices, find_experts, piece_shape
from svdconvert.adapters.extra_parameters import PREFIX
from svdconvert.adapters.file_names import FileNames
from svdconvert.adapters.other_types import FindShape, read_other_type
from svdconvert.checkpoint.safetensors_files import holds_model, open_file
from svdconvert.checkpoint.tensors import REAL, TensorInfo, TensorSource
from svdconvert.errors import ArtifactError
from svdconvert.linalg.factors import Factors
from svdconvert.manifest.compared import open_compared, require_unchanged_sidecar
from svdconvert.output.sidecars import read_json_object

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
"""The file of older versions of PEFT. Only tensors are unpickled, so no code in it can run."""
PieceNames = Mapping[str, Mapping[str, str]]
"""Module -> factor -> name in the file."""


@dataclass(frozen=True)
class Adapter:
    """An open adapter: its configuration, and its factors, which are read one module at a time."""

    directory: Path
    config: AdapterConfig
    source: TensorSource
    modules: PieceNames
    extras: Mapping[str, str] = field(default_factory=dict)
    """Parameter that is trained in full -> name in the file."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Parameter of the base -> name in the file of the copy that PEFT stored with the adapter."""
    magnitudes: Mapping[str, str] = field(default_factory=dict)
    """Module -> name in the file of its magnitudes, for DoRA."""
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

    def magnitude(self, module: str) -> Tensor:
        """The magnitudes of a module's rows (DoRA). Raises ArtifactError as `factors`."""
        return self._checked(self.magnitudes[module])

    def _checked(self, name: str) -> Tensor:
        tensor = self.source.read(name)
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


def open_adapter(directory: Path, find_shape: FindShape | None = None, *, compare: bool = True) -> Adapter:
    """Open an adapter in PEFT's format: adapter_model.safetensors, else adapter_model.bin.

    An adapter of another type than LoRA is opened as the LoRA that it equals; `find_shape` gives the shapes
    of the base's matrices for types whose files do not tell them. With `compare`, what a manifest lists must
    have its checksums: the configuration now, a tensor when it is read. Raises ArtifactError if something has
    changed, is missing or incomplete, or cannot be converted (tensors that its configuration does not
    declare): no part of an adapter is ever dropped.
    """
    if compare and (directory / CONFIG).is_file():
        require_unchanged_sidecar(directory / CONFIG)
    if mlx.is_adapter(directory):
        return _open_mlx(directory)
    weights = _weights_file(directory)
    if not (directory / CONFIG).is_file() or not weights.is_file():
        absent = CONFIG if not (directory / CONFIG).is_file() else WEIGHTS
        raise ArtifactError(
            f"{directory / absent} is missing; an adapter is a directory with {CONFIG} and {WEIGHTS}"
        )
    kind = str(read_json_object(directory / CONFIG).get("peft_type"))
    source = open_compared(weights) if compare else open_file(weights)
    if kind in TYPES:
        config, made = read_other_type(directory, weights, source, kind, find_shape or _no_shape(directory))
        return Adapter(directory, config, made.source, made.modules, made.extras)
    config = read_adapter_config(directory)
    names = FileNames.of(weights, config, source)
    named, experts = find_experts(weights, config, source, names.modules)
    single = {module: pieces for module, pieces in named.items() if module not in experts}
    if single or not experts:
        check_factors(weights, source, single, names.embeddings)
    _check_ranks(weights, config, source, single, names.embeddings)
    if config.dora:
        _check_magnitudes(weights, source, named, names, experts)
    if not config.targets and not config.parameters:
        config = replace(config, targets=sorted(named))
    return Adapter(
        directory,
        config,
        source,
        named,
        names.extras,
        copies=names.copies,
        magnitudes=names.magnitudes,
        experts=experts,
        embeddings=names.embeddings,
    )


def _no_shape(directory: Path) -> FindShape:
    """For types whose files do not tell the shapes of the matrices, if the base is not known."""

    def refuse(module: str) -> tuple[int, ...]:
        raise ArtifactError(
            f"{directory} does not store the shape of {module}, and its base is not known; give "
            "it with --base"
        )

    return refuse


def _check_magnitudes(
    file: Path, source: TensorSource, modules: PieceNames, found: FileNames, experts: Collection[str]
) -> None:
    """Raise ArtifactError if a module of a DoRA adapter has no magnitude for each of its rows."""
    for module, names in modules.items():
        if module in experts or module in found.embeddings:
            raise ArtifactError(
                f"{file} is a DoRA adapter of {module}, and svdconvert reads the magnitudes of linear layers "
                "only; merge it with PEFT"
            )
        rows = source.infos[names["lora_B"]].shape[0]
        if module not in found.magnitudes or source.infos[found.magnitudes[module]].shape != (rows,):
            raise ArtifactError(
                f"{file} has no lora_magnitude_vector of {rows} rows for {module}; restore the file"
            )


def _open_mlx(directory: Path) -> Adapter:
    """An adapter of mlx-lm, as PEFT would have it. Raises ArtifactError if it is not a LoRA."""
    source, modules = mlx.open_factors(directory)
    check_factors(directory / mlx.WEIGHTS, source, modules)
    ranks = {source.infos[names["lora_A"]].shape[0] for names in modules.values()}
    if len(ranks) > 1:
        raise ArtifactError(
            f"{directory / mlx.WEIGHTS} has factors of several ranks, which mlx-lm refuses; restore the file"
        )
    config = mlx.read_config(directory, ranks.pop(), target_modules(modules, []))
    return Adapter(directory, config, source, modules)


def _weights_file(directory: Path) -> Path:
    """The file with an adapter's tensors, which may be missing."""
    pickled = directory / PICKLED
    return pickled if pickled.is_file() and not (directory / WEIGHTS).exists() else directory / WEIGHTS


def check_factors(
    file: Path,
    source: TensorSource,
    modules: PieceNames,
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
    modules: PieceNames,
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
