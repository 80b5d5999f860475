"""The formats of `to-lora`: the names, the shapes and the configuration that each program expects."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from svdconvert.adapters import mlx, rwkv_peft
from svdconvert.adapters.adapter_config import CONFIG, PER_EXPERT, WITH_PARAMETERS, AdapterConfig
from svdconvert.adapters.embedding_factors import embedding_key
from svdconvert.adapters.extra_parameters import contains_adapters, copy_key, extra_key
from svdconvert.adapters.peft_files import WEIGHTS, key
from svdconvert.checkpoint.rename_rules import RenameRule
from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import ArtifactError
from svdconvert.hub.reference import is_repository
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.gguf_names import FILE as GGUF_FILE
from svdconvert.inputs.gguf_names import GgufNames
from svdconvert.inputs.model import OpenModel
from svdconvert.layouts.base import LAYOUTS
from svdconvert.manifest.fingerprint import config_checksum
from svdconvert.manifest.place import Rows
from svdconvert.output.plan import PlannedFile, plan_file
from svdconvert.output.tokenizer_files import copy_tokenizer
from svdconvert.pipeline.lora_experts import LoraForm

_SIDES = ("lora_A", "lora_B")
_RWKV = re.compile(r"blocks\.\d+\.(att|ffn)\.\w+")


@dataclass(frozen=True)
class Keys:
    """The names of the tensors in the file."""

    pieces: Mapping[tuple[str, str], str]
    """(module in the LoRA, piece) -> name."""
    extras: Mapping[str, str]
    """Parameter -> name."""
    rows: Mapping[str, Rows] = field(default_factory=dict)
    """Module in the LoRA -> rows of B, if these are not all of them."""
    owners: Mapping[str, str] = field(default_factory=dict)
    """Module in the LoRA -> module of the adapter, if their names differ."""

    def owner(self, module: str) -> str:
        """The module of the adapter whose factors are written as `module`."""
        return self.owners.get(module, module)


class LoraFormat:
    """PEFT's format; others differ in some of its methods."""

    def keys(self, delta: AdapterDelta, form: LoraForm) -> Keys:
        """The names in the file. Raises ArtifactError for what the format cannot hold."""
        keys = _factor_keys(delta, form)
        extras = {parameter: extra_key(parameter, delta.modules) for parameter in delta.adapter.extras}
        if delta.initial_adapter is None:
            copies = [parameter for parameter in delta.adapter.copies if parameter not in extras]
            extras |= {parameter: copy_key(parameter) for parameter in copies}
        return replace(keys, extras=extras)

    def stored_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape in the file of a factor that has `shape` in PEFT's."""
        return shape

    def stored(self, module: str, piece: str, factor: Tensor) -> Tensor:
        """A factor of PEFT's as the file has it."""
        return factor

    def file(self, infos: Sequence[TensorInfo], rank: int) -> PlannedFile:
        """The file of these tensors."""
        return plan_file(WEIGHTS, infos, "adapter")

    def identity(self) -> dict[str, Any]:
        """What the file depends on besides the adapter: an interrupted run continues if it is the same."""
        return {}

    def write_sidecars(self, delta: AdapterDelta, form: LoraForm, rank: int, directory: Path) -> None:
        """The configuration, and the adapter's own tokenizer."""
        (directory / CONFIG).write_text(_peft_config(delta, form, rank).text(), encoding="utf-8")
        copy_tokenizer(delta.directory, directory)


class VllmFormat(LoraFormat):
    """What vLLM loads of PEFT's format: the factors of linear layers, and nothing else."""

    def keys(self, delta: AdapterDelta, form: LoraForm) -> Keys:
        """As in PEFT's format. Raises ArtifactError for embeddings and for parameters trained in full."""
        _refuse_extras(delta, "vLLM does not load")
        _refuse_embeddings(delta, "vLLM does not load")
        return _factor_keys(delta, form)


class MlxFormat(LoraFormat):
    """mlx-lm's format."""

    def keys(self, delta: AdapterDelta, form: LoraForm) -> Keys:
        """mlx-lm's names, which are the modules' paths."""
        _refuse_extras(delta, "mlx-lm refuses")
        _refuse_embeddings(delta, "mlx-lm refuses")
        _refuse_experts(delta, form, "mlx")
        mlx.config_text(delta.modules, 1)
        pieces = {
            (module, piece): mlx.file_key(module, piece) for module in delta.modules for piece in _SIDES
        }
        return Keys(pieces, {})

    def stored_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Transposed."""
        return shape[::-1]

    def stored(self, module: str, piece: str, factor: Tensor) -> Tensor:
        """Transposed."""
        return factor.T.contiguous()

    def file(self, infos: Sequence[TensorInfo], rank: int) -> PlannedFile:
        """adapters.safetensors."""
        return plan_file(mlx.WEIGHTS, infos, "adapter")

    def write_sidecars(self, delta: AdapterDelta, form: LoraForm, rank: int, directory: Path) -> None:
        """The configuration."""
        (directory / CONFIG).write_text(mlx.config_text(delta.modules, rank), encoding="utf-8")


@dataclass(frozen=True)
class GgufFormat(LoraFormat):
    """llama.cpp's adapter: one file with its metadata."""

    names: GgufNames

    def keys(self, delta: AdapterDelta, form: LoraForm) -> Keys:
        """llama.cpp's names."""
        _refuse_extras(delta, "llama.cpp does not load")
        _refuse_embeddings(delta, "llama.cpp does not load")
        _refuse_experts(delta, form, "gguf")
        pieces = {
            (module, piece): self.names.key(module, piece) for module in delta.modules for piece in _SIDES
        }
        return Keys(pieces, {})

    def stored(self, module: str, piece: str, factor: Tensor) -> Tensor:
        """With the rows in llama.cpp's order."""
        return self.names.stored(module, piece, factor)

    def file(self, infos: Sequence[TensorInfo], rank: int) -> PlannedFile:
        """The file with its metadata."""
        return PlannedFile(GGUF_FILE, tuple(infos), "adapter", metadata=tuple(self.names.metadata(rank)))

    def identity(self) -> dict[str, Any]:
        """The base's config.json."""
        return {"base": {"config": config_checksum(self.names.config)}}

    def write_sidecars(self, delta: AdapterDelta, form: LoraForm, rank: int, directory: Path) -> None:
        """None: the file holds everything."""


class RwkvPeftFormat(LoraFormat):
    """RWKV-PEFT's .pth, whose lora_alpha is the rank."""

    def keys(self, delta: AdapterDelta, form: LoraForm) -> Keys:
        """RWKV-PEFT's names."""
        _refuse_experts(delta, form, "rwkv-peft")
        return _rwkv_peft_keys(delta)

    def file(self, infos: Sequence[TensorInfo], rank: int) -> PlannedFile:
        """The .pth in the order of a state dict."""
        return PlannedFile(rwkv_peft.FILE, tuple(infos), "adapter")

    def write_sidecars(self, delta: AdapterDelta, form: LoraForm, rank: int, directory: Path) -> None:
        """None."""


def lora_format(name: str, delta: AdapterDelta, base: OpenModel | None) -> LoraFormat:
    """The format called `name`; gguf needs the base's config.json. Raises ArtifactError without it."""
    if name != "gguf":
        return {"peft": LoraFormat, "vllm": VllmFormat, "mlx": MlxFormat, "rwkv-peft": RwkvPeftFormat}[name]()
    if base is None:
        raise ArtifactError(
            f"the format gguf needs the config.json of the base of {delta.directory}, for its architecture "
            "and heads; give its location with --base"
        )
    return GgufFormat(GgufNames(base.layout(delta.layout_name)[1], base.config))


def _refuse_extras(delta: AdapterDelta, what: str) -> None:
    if delta.adapter.extras:
        name = next(iter(delta.adapter.extras))
        raise ArtifactError(
            f"{delta.directory} holds {name}, trained in full, which {what} "
            f"({len(delta.adapter.extras)} such parameters); merge the adapter, or write --format peft"
        )


def _refuse_embeddings(delta: AdapterDelta, what: str) -> None:
    if delta.adapter.embeddings:
        raise ArtifactError(
            f"{delta.directory} adapts the embeddings {min(delta.adapter.embeddings)}, which {what}; merge "
            "the adapter, or write --format peft"
        )


def _refuse_experts(delta: AdapterDelta, form: LoraForm, name: str) -> None:
    if form.stacks or delta.adapter.experts or form.peft_type == PER_EXPERT:
        raise ArtifactError(
            f"{delta.directory} adapts experts of a mixture, which the format {name} does not express; merge "
            "the adapter, or write --format peft"
        )


def _factor_keys(delta: AdapterDelta, form: LoraForm) -> Keys:
    """PEFT's names of the factors that are in no stack."""
    written = {name: rows for parts in form.pieces.values() for name, rows in parts}
    embeddings = delta.adapter.embeddings
    pieces = {
        (name, piece): embedding_key(name, piece) if name in embeddings else key(name, piece)
        for name in written
        for piece in _SIDES
    }
    owners = {name: module for module, parts in form.pieces.items() for name, _ in parts}
    return Keys(pieces, {}, {name: rows for name, rows in written.items() if rows}, owners)


def _peft_config(delta: AdapterDelta, form: LoraForm, rank: int) -> AdapterConfig:
    """Scale 1 (alpha is the rank), no rslora, no patterns but for fused experts of another rank.

    The base has the name that was asked for, or else its name on the Hub.
    """
    own = delta.adapter.config
    mixed = contains_adapters(delta.adapter.extras, delta.modules)
    patterns = form.rank_pattern(rank)
    return AdapterConfig(
        rank=rank,
        alpha=rank,
        targets=form.targets,
        parameters=form.parameters,
        peft_type=WITH_PARAMETERS if mixed else form.peft_type,
        rank_pattern=patterns,
        alpha_pattern={name: float(rank) for name, rank in patterns.items()},
        base=form.base_name or base_repository(delta),
        task=own.task,
        modules_to_save=own.modules_to_save,
        bias=own.bias,
        ties_saved_modules=own.ties_saved_modules,
        fan_in_fan_out=own.fan_in_fan_out,
    )


def base_repository(delta: AdapterDelta) -> str | None:
    """org/name of the untouched base, as the manifest or an adapter that started at zero names it."""
    if delta.manifest is not None:
        base = delta.manifest.base
        return base.location if base and base.revision else None
    named = delta.adapter.config.base
    started_at_zero = delta.initial_adapter is None and delta.recovered is None and delta.residual is None
    return named if started_at_zero and is_repository(named) else None


def _rwkv_peft_keys(delta: AdapterDelta) -> Keys:
    """The names in RWKV-PEFT's format. Raises ArtifactError if a module or parameter has none there."""
    known = delta.manifest
    layout = LAYOUTS.get(known.layout) if known and known.layout in LAYOUTS.names() else None
    paths = {matrix.module: name for name, matrix in known.matrices.items()} if known else {}
    names = {
        module: layout.network_path(paths[module]) if layout and module in paths else module
        for module in delta.modules
    }
    if odd := [name for name in names.values() if not _RWKV.fullmatch(name)]:
        raise ArtifactError(
            f"{delta.directory} adapts {odd[0]}, but the format rwkv-peft is for RWKV-6 only; "
            "use --format peft"
        )
    extras = {}
    for parameter in delta.adapter.extras:
        rule = layout.rename_rule(parameter) if layout and paths else RenameRule((parameter,), parameter)
        if rule.to_layout is not None:
            raise ArtifactError(
                f"{delta.directory} trained {parameter}, which is no single tensor in the format rwkv-peft; "
                "merge it, or train the model in the layout blinkdl"
            )
        extras[parameter] = rule.canonical[0]
    pieces = {
        (module, piece): rwkv_peft.file_key(names[module], piece) for module in names for piece in _SIDES
    }
    return Keys(pieces, extras)
