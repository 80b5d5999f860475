"""Adapters of other types than LoRA, opened as the LoRAs that they equal."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from torch.nn.functional import pad

from svdconvert.adapters.adapter_config import AdapterConfig, read_other_config
from svdconvert.adapters.equivalents import TYPES, AdapterType, Shape, check_pieces
from svdconvert.adapters.extra_parameters import PREFIX, is_declared, parameter_of
from svdconvert.checkpoint.tensors import REAL, TensorInfo, TensorSource, in_chunks, tensor_bytes
from svdconvert.errors import ArtifactError, brief

FindShape = Callable[[str], Shape]
"""Module -> (O, I) in the base. Raises ArtifactError if the base is not known or has no such matrix."""


@dataclass(frozen=True)
class OtherAdapter:
    """The parts of an adapter, as `peft_files.Adapter` has them."""

    source: TensorSource
    modules: Mapping[str, Mapping[str, str]]
    """Module -> factor of the LoRA -> its name in `source`."""
    extras: Mapping[str, str]


@dataclass(frozen=True)
class _Module:
    """How the factors of one module are made."""

    names: Mapping[str, str]
    """Piece -> name in the file."""
    shape: Shape
    scale: float


class LoraSource:
    """A TensorSource with the factors of the LoRA that a file of another type equals.

    All modules have one rank, with zeros in the factors of those with a smaller one.
    """

    def __init__(
        self, source: TensorSource, kind: AdapterType, modules: Mapping[str, _Module], rank: int
    ) -> None:
        self._source = source
        self._kind = kind
        self._modules = modules
        self._rank = rank
        self._owners: dict[str, tuple[str, int]] = {}
        self.infos: dict[str, TensorInfo] = dict(source.infos)
        """Those of the file, and the factors."""
        for module, made in modules.items():
            for side, (factor, shape) in enumerate(
                (("lora_B", (made.shape[0], rank)), ("lora_A", (rank, made.shape[1])))
            ):
                name = f"{PREFIX}{module}.{factor}.weight"
                self._owners[name] = (module, side)
                self.infos[name] = TensorInfo(name, shape, "F32")

    def read(self, name: str) -> Tensor:
        """A factor in float32, or a tensor of the file."""
        if name not in self._owners:
            return self._source.read(name)
        module, side = self._owners[name]
        made = self._modules[module]
        pieces = {piece: self._source.read(own).float() for piece, own in made.names.items()}
        factors = self._kind.factors(pieces, made.shape, made.scale)
        missing = self._rank - factors[0].shape[1]
        padded = pad(factors[0], (0, missing)), pad(factors[1], (0, 0, 0, missing))
        return padded[side].contiguous()

    def chunks(
        self, name: str, size: int, buffer: memoryview | None = None, section: slice | None = None
    ) -> Iterator[memoryview]:
        """The tensor's bytes in chunks of at most `size`."""
        if name not in self._owners:
            return self._source.chunks(name, size, buffer, section)
        return in_chunks(tensor_bytes(self.read(name))[section or slice(None)], size, buffer)

    def file_versions(self) -> Mapping[str, list[int]]:
        """Those of the file."""
        return self._source.file_versions()


def read_other_type(
    directory: Path, weights: Path, source: TensorSource, name: str, find_shape: FindShape
) -> tuple[AdapterConfig, OtherAdapter]:
    """(configuration, parts) of an adapter of the type `name`, as a LoRA of scale 1.

    Raises ArtifactError if a tensor is missing or of no use, or if shapes do not fit together.
    """
    kind = TYPES[name]
    config = read_other_config(directory, kind.rank_key, kind.alpha_key)
    if name == "MISS" and config.initialised == "bat":
        raise ArtifactError(
            f"{directory} is a MiSS adapter of the kind bat, which multiplies the base; merge it with PEFT"
        )
    found, extras = _sorted_names(weights, source, kind, config.modules_to_save, config.bias)
    modules = {}
    rank = 1
    for module, names in found.items():
        shapes = {piece: source.infos[own].shape for piece, own in names.items()}
        if name == "ADALORA" and _is_pruned(shapes):
            continue
        shape = _shape(kind, shapes) or find_shape(module)
        check_pieces(weights, module, kind, shapes, shape)
        own_rank = kind.rank(shapes, shape)
        modules[module] = _Module(names, shape, kind.scale(config, module, own_rank))
        rank = max(rank, own_rank)
    if not modules:
        raise ArtifactError(f"{weights} changes nothing: all ranks were taken away; train it again")
    made = LoraSource(source, kind, modules, rank)
    factors = {
        module: {factor: f"{PREFIX}{module}.{factor}.weight" for factor in ("lora_A", "lora_B")}
        for module in modules
    }
    plain = replace(
        config,
        rank=rank,
        alpha=float(rank),
        peft_type="LORA",
        rank_pattern=None,
        alpha_pattern=None,
        initialised=True,
        targets=config.targets or sorted(modules),
        base_is_residual=False,
    )
    return plain, OtherAdapter(made, factors, extras)


def _is_pruned(shapes: Mapping[str, Shape]) -> bool:
    """True for a module of which AdaLoRA has taken all ranks away: it changes nothing."""
    right = shapes.get("lora_A", ())
    left = shapes.get("lora_B", ())
    return len(right) == len(left) == 2 and right[0] == left[1] == 0 and right[1] * left[0] > 0


def _shape(kind: AdapterType, shapes: Mapping[str, Shape]) -> Shape | None:
    try:
        return kind.shape(shapes)
    except (KeyError, ValueError, IndexError):
        return (1, 1)  # `check_pieces` says what is wrong


def _sorted_names(
    weights: Path, source: TensorSource, kind: AdapterType, saved: Sequence[str], bias: str
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """(module -> piece -> name, parameter trained in full -> name) of a file."""
    pattern = re.compile(
        rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<piece>{'|'.join(kind.pieces)})(?:\.weight)?"
    )
    common = {piece: f"base_model.{piece}" for piece in kind.shared}
    modules: dict[str, dict[str, str]] = {}
    extras: dict[str, str] = {}
    for name, info in source.infos.items():
        if match := pattern.fullmatch(name):
            if info.dtype not in REAL:
                raise ArtifactError(f"{weights}: {name} holds no float values; save the adapter again")
            modules.setdefault(match["module"], {})[match["piece"]] = name
        elif is_declared(name, saved, bias):
            extras[parameter_of(name)] = name
        elif name not in common.values():
            raise ArtifactError(
                f"{weights} holds {brief(name)}, which its type does not have; restore the file"
            )
    if absent := [name for name in common.values() if name not in source.infos]:
        raise ArtifactError(
            f"{weights} has no {absent[0]}: it was saved without its projections; save it with "
            "save_projection=True"
        )
    if not modules:
        raise ArtifactError(f"{weights} holds no {kind.pieces[0]}; it is not an adapter of its type")
    return {module: {**names, **common} for module, names in modules.items()}, extras
