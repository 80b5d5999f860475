"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors, both ways.

Conventions of PEFT 0.21: keys are `base_model.model.<module>.lora_A.weight`, one file only,
metadata exactly {"format": "pt"}, configuration sorted by key.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import Any

from svdconvert.adapters.extra_parameters import PREFIX, is_declared, parameter_of
from svdconvert.checkpoint.safetensors_files import SafetensorsSource
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource
from svdconvert.errors import ArtifactError
from svdconvert.linalg.factors import FACTOR_AXES, Factors
from svdconvert.output.sidecars import read_json_object

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PER_EXPERT = "LORA_PER_EXPERT"
"""The type of adapters with factors for single experts: transformers fuses experts at run time, and stock
PEFT, which knows only the fused tensors, refuses the type instead of leaving such factors out."""
WITH_PARAMETERS = "LORA_WITH_PARAMETERS"
"""The type of adapters that hold single parameters of modules with adapters in them, as an RWKV's time
parameters: stock PEFT, which would lose them, refuses the type."""
# What changes the meaning of the factors.
_MORE = ("alora_invocation_tokens", "layer_replication", "target_parameters", "use_bdlora", "use_qalora")
_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<piece>{'|'.join(FACTOR_AXES)})\.weight")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What adapter_config.json says, as far as the program needs it."""

    rank: int
    alpha: float
    targets: Sequence[str]
    base: str | None = None
    peft_type: str = "LORA"
    rslora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    dropout: float = 0.0
    initialised: str | bool = True
    task: str | None = "CAUSAL_LM"
    """PEFT's name of what the model does; None fits any."""
    modules_to_save: Sequence[str] = ()
    """Modules that are trained whole, as PEFT matches them."""
    bias: str = "none"
    """Which biases are trained: none, all or lora_only."""

    def scale(self, module: str) -> float:
        """alpha / rank of a module, or alpha / sqrt(rank) with rslora; patterns as PEFT matches them."""
        rank = _pattern(self.rank_pattern, module, self.rank)
        alpha = _pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (sqrt(rank) if self.rslora else rank)

    def text(self) -> str:
        """The file's content, as PEFT writes it: sorted, no newline at the end."""
        content = {
            "alpha_pattern": dict(self.alpha_pattern or {}),
            "base_model_name_or_path": self.base,
            "bias": self.bias,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": self.initialised,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_bias": False,
            "lora_dropout": self.dropout,
            "modules_to_save": sorted(self.modules_to_save) or None,
            "peft_type": self.peft_type,
            "r": self.rank,
            "rank_pattern": dict(self.rank_pattern or {}),
            "target_modules": sorted(self.targets),
            "task_type": self.task,
            "use_dora": False,
            "use_rslora": self.rslora,
        }
        return json.dumps(content, indent=2, sort_keys=True)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> float:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return float(default)


@dataclass(frozen=True)
class Adapter:
    """An adapter directory, open: configuration and, one module at a time, factors."""

    directory: Path
    config: AdapterConfig
    source: TensorSource
    modules: Mapping[str, Mapping[str, str]]
    """Module -> piece -> name in the file."""
    extras: Mapping[str, str] = field(default_factory=dict)
    """Parameter that is trained whole -> name in the file."""

    def factors(self, module: str) -> Factors:
        """The pieces of a module as stored."""
        names = self.modules[module]
        return Factors.of({piece: self.source.read(name) for piece, name in names.items()})

    def shape(self, module: str, piece: str) -> tuple[int, ...]:
        """The shape of a piece, from the header."""
        return self.source.infos[self.modules[module][piece]].shape


def key(module: str, piece: str) -> str:
    """The name of a module's piece in the adapter's file."""
    return f"{PREFIX}{module}.{piece}.weight"


def is_adapter(directory: Path) -> bool:
    """True where an adapter in PEFT's format stands."""
    return (directory / CONFIG).is_file()


def open_adapter(directory: Path) -> Adapter:
    """Open an adapter in PEFT's format.

    Raises ArtifactError where it is missing, incomplete, or holds what cannot be converted
    (DoRA, trained biases, whole trained modules): nothing of an adapter is ever dropped.
    """
    if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
        absent = CONFIG if not (directory / CONFIG).is_file() else WEIGHTS
        raise ArtifactError(
            f"{directory / absent} is missing; an adapter is a directory with {CONFIG} and {WEIGHTS}"
        )
    config = _config(directory, read_json_object(directory / CONFIG))
    source = SafetensorsSource([directory / WEIGHTS])
    modules: dict[str, dict[str, str]] = {}
    extras: dict[str, str] = {}
    others: list[str] = []
    for name in source.infos:
        if match := _KEY.fullmatch(name):
            modules.setdefault(match["module"], {})[match["piece"]] = name
        elif is_declared(name, config.modules_to_save, config.bias):
            extras[parameter_of(name)] = name
        else:
            others.append(name)
    if others:
        raise ArtifactError(
            f"{directory / WEIGHTS} holds {others[0]}, which is neither a low-rank factor nor named as "
            f"trained whole in {CONFIG}, and would be lost ({len(others)} such tensors); train without it, "
            "or merge with the program that wrote it"
        )
    _complete(directory, modules)
    config = config if config.targets else replace(config, targets=sorted(modules))
    return Adapter(directory, config, source, modules, extras)


def _config(directory: Path, values: Mapping[str, Any]) -> AdapterConfig:
    path = directory / CONFIG
    if values.get("use_dora"):
        raise ArtifactError(
            f"{path} is a DoRA adapter, whose magnitudes no plain LoRA can carry; merge it with PEFT"
        )
    if more := [name for name in _MORE if values.get(name)]:
        raise ArtifactError(f"{path} sets {more[0]}, which no plain LoRA can carry; merge it with PEFT")
    if values.get("fan_in_fan_out"):
        raise ArtifactError(f"{path} is for transposed layers (fan_in_fan_out), which no layout here has")
    try:
        return AdapterConfig(
            rank=int(values["r"]),
            alpha=float(values["lora_alpha"]),
            targets=_targets(values),
            base=values.get("base_model_name_or_path"),
            peft_type=str(values["peft_type"]),
            rslora=bool(values.get("use_rslora")),
            rank_pattern=values.get("rank_pattern"),
            alpha_pattern=values.get("alpha_pattern"),
            dropout=float(values.get("lora_dropout") or 0.0),
            initialised=values.get("init_lora_weights", True),
            task=values.get("task_type"),
            modules_to_save=tuple(map(str, values.get("modules_to_save") or ())),
            bias=str(values.get("bias") or "none"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path} is not the configuration of a LoRA adapter: {error} is wrong or missing"
        ) from error


def _targets(values: Mapping[str, Any]) -> list[str]:
    """The list of targets, empty where it does not tell alone which modules are adapted."""
    chosen = values["target_modules"]
    narrowed = values.get("layers_to_transform") is not None or values.get("exclude_modules")
    return [] if isinstance(chosen, str) or narrowed else [str(target) for target in chosen]


def _complete(directory: Path, modules: Mapping[str, Mapping[str, str]]) -> None:
    if not modules:
        raise ArtifactError(f"{directory / WEIGHTS} holds no lora_A and lora_B; it is no LoRA adapter")
    for module, pieces in modules.items():
        if not {"lora_A", "lora_B"} <= set(pieces):
            absent = "lora_A" if "lora_A" not in pieces else "lora_B"
            raise ArtifactError(f"{directory / WEIGHTS} has no {absent} for {module}; restore the file")


def adapter_infos(module: str, pieces: Mapping[str, tuple[int, ...]], dtype: str) -> list[TensorInfo]:
    """The plan of a module's tensors in an adapter's file."""
    return [TensorInfo(key(module, piece), shape, dtype) for piece, shape in pieces.items()]


def target_modules(chosen: Iterable[str], linears: Collection[str]) -> list[str]:
    """The shortest `target_modules` that selects exactly the modules `chosen` among `linears`.

    A last component ("q_proj") where every module that ends in it is chosen, else whole paths.
    """
    wanted = set(chosen)
    last = {module: module.rsplit(".", 1)[-1] for module in {*wanted, *linears}}
    partial = {last[module] for module in linears if module not in wanted}
    return sorted({module if last[module] in partial else last[module] for module in wanted})
