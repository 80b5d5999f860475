"""adapter_config.json, PEFT's configuration of a LoRA: every value is bounded on reading."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite, prod, sqrt
from pathlib import Path
from time import monotonic
from typing import Any
from warnings import catch_warnings, simplefilter

import regex

from svdconvert.checkpoint.parts import whole_name
from svdconvert.errors import ArtifactError, brief
from svdconvert.methods.base import METHODS
from svdconvert.output.sidecars import read_json_object

CONFIG = "adapter_config.json"
PER_EXPERT = "LORA_PER_EXPERT"
"""The peft_type of adapters with factors for single experts that stock PEFT cannot turn into factors of the
parameters that transformers fuses experts into; PEFT refuses this type instead of loading them wrongly."""
WITH_PARAMETERS = "LORA_WITH_PARAMETERS"
"""The peft_type of adapters that train single parameters of modules that contain adapters, such as the time
parameters of RWKV: stock PEFT, which would lose them, refuses the type."""
ENTRY = "svdconvert"
"""Key of svdconvert's entry in `auto_mapping`, which PEFT keeps but ignores for models with a task type."""

# Settings that change the meaning of the factors.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
)
KASA = "kasa"
"""`AdapterConfig.initialised` of KaSA: on loading, PEFT takes the smallest triplets out of the base."""
_LARGEST_RANK = 1 << 20
_LARGEST_ALPHA = 1e9
_LONGEST_NAME = 1000  # characters of a pattern or of a base's name
_MOST_PATTERNS = 100_000
_TIMEOUT = 5.0  # seconds for matching all patterns with one module
_COUNT = re.compile(r"\{([0-9]{0,4})(?:,([0-9]{0,4}))?\}")
_MOST_REPETITIONS = 1000  # the product of all counts of a pattern: the compiler unrolls counts within counts


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The values of adapter_config.json that svdconvert uses."""

    rank: int
    alpha: float
    targets: Sequence[str]
    parameters: Sequence[str] = ()
    """PEFT's target_parameters: parameters that are adapted by their own names, such as those of experts."""
    base: str | None = None
    peft_type: str = "LORA"
    rslora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    dropout: float = 0.0
    initialised: str | bool = True
    task: str | None = "CAUSAL_LM"
    """PEFT's task_type, such as CAUSAL_LM; None if it is not known."""
    modules_to_save: Sequence[str] = ()
    """Modules that are trained in full, as PEFT matches them."""
    bias: str = "none"
    """Which biases are trained: none, all or lora_only."""
    fan_in_fan_out: bool = False
    """True if adapted layers have their weights as (in, out), as transformers' Conv1D."""
    ties_saved_modules: bool = False
    """True if embeddings in modules_to_save also replace the head that is tied to them (PEFT's
    ensure_weight_tying)."""
    dora: bool = False
    """True if the rows of the adapted matrix are scaled to stored magnitudes (DoRA)."""
    base_is_residual: bool | None = None
    """True if the adapter was started from a part of the base and belongs to a residual, False if it started
    at zero; None if svdconvert did not write the initial adapter."""

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors."""
        return int(_match(self.rank_pattern, self._key(module), self.rank))

    def scale(self, module: str) -> float:
        """alpha / rank of a module, or alpha / sqrt(rank) with rslora; patterns as PEFT matches them."""
        rank = self.rank_of(module)
        alpha = _match(self.alpha_pattern, self._key(module), self.alpha)
        return alpha / (sqrt(rank) if self.rslora else rank)

    def _key(self, module: str) -> str:
        """What PEFT compares patterns with: a module's path, or that of the parameter that is adapted."""
        path = whole_name(module)
        weight = f"{path}.weight"
        return weight if self.names_parameter(weight) else path

    def names_parameter(self, parameter: str) -> bool:
        """True if target_parameters names this parameter, as PEFT matches it."""
        return any(f".{parameter}".endswith(f".{name}") for name in self.parameters)

    def text(self) -> str:
        """The file's content, as PEFT writes it: sorted, no newline at the end."""
        has_entry = self.base_is_residual is not None
        content = {
            "alpha_pattern": dict(self.alpha_pattern or {}),
            **({"auto_mapping": {ENTRY: {"base_is_residual": self.base_is_residual}}} if has_entry else {}),
            "base_model_name_or_path": self.base,
            "bias": self.bias,
            **({"ensure_weight_tying": True} if self.ties_saved_modules else {}),
            "fan_in_fan_out": self.fan_in_fan_out,
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
            **({"target_parameters": sorted(self.parameters)} if self.parameters else {}),
            "task_type": self.task,
            "use_dora": False,
            "use_rslora": self.rslora,
        }
        return json.dumps(content, indent=2, sort_keys=True)


def _match(patterns: Mapping[str, Any] | None, module: str, default: float) -> float:
    """The value of the first pattern that matches a module's path, as PEFT's `get_pattern_key` finds it.

    Raises ArtifactError for a pattern that takes too long to match.
    """
    end = monotonic() + _TIMEOUT
    for key, value in (patterns or {}).items():
        try:
            if _compiled(key).match(module, timeout=max(0.01, end - monotonic())):
                return float(value)
        except TimeoutError as error:
            raise ArtifactError(
                f"the pattern {key!r} of an adapter's configuration takes too long to match {module}; "
                "write it without nested repetitions"
            ) from error
    return float(default)


@cache
def _compiled(key: str) -> "regex.Pattern[str]":
    """The pattern of an entry.

    Raises ValueError, OverflowError, RecursionError, or an error of re or regex, if it is none.
    """
    counts = [max(map(int, filter(None, pair)), default=1) for pair in _COUNT.findall(key)]
    if len(counts) < key.count("{") or prod(max(1, count) for count in counts) > _MOST_REPETITIONS:
        raise ValueError("too many repetitions")
    with catch_warnings():
        simplefilter("ignore")  # about brackets that may get another meaning in the future
        re.compile(key)  # PEFT matches with re, which knows less than regex
    return regex.compile(rf"(.*\.)?({key})$")


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Read and check a directory's adapter_config.json.

    Raises ArtifactError for a value that PEFT would refuse, or that no plain LoRA can express.
    """
    path = directory / CONFIG
    values = read_json_object(path)
    _refuse_unsupported(path, values)
    read = _Reader(path, values)
    return AdapterConfig(
        rank=read.integer("r", values.get("r")),
        alpha=read.number("lora_alpha", values.get("lora_alpha")),
        targets=read.targets(),
        parameters=read.names("target_parameters"),
        base=read.text("base_model_name_or_path"),
        peft_type=str(values.get("peft_type")),
        rslora=bool(values.get("use_rslora")),
        rank_pattern=read.pattern("rank_pattern", read.integer),
        alpha_pattern=read.pattern("alpha_pattern", read.number),
        dropout=read.number("lora_dropout", values.get("lora_dropout") or 0.0),
        initialised=read.initialised(),
        task=read.text("task_type"),
        modules_to_save=read.names("modules_to_save"),
        bias=read.bias(),
        fan_in_fan_out=bool(values.get("fan_in_fan_out")),
        ties_saved_modules=values.get("ensure_weight_tying") is True,
        dora=bool(values.get("use_dora")),
        base_is_residual=read.base_is_residual(),
    )


def read_other_config(directory: Path, rank_key: str, alpha_key: str | None) -> AdapterConfig:
    """The configuration of an adapter of another type than LoRA, which calls rank and alpha otherwise.

    Raises ArtifactError for a value that PEFT would refuse.
    """
    path = directory / CONFIG
    values = read_json_object(path)
    if values.get("fan_in_fan_out"):
        raise _transposed(path)
    read = _Reader(path, values)
    has_patterns = alpha_key == "alpha"  # LoHa and LoKr; AdaLoRA lists which ranks are left
    return AdapterConfig(
        rank=read.integer(rank_key, values.get(rank_key)),
        alpha=read.number(alpha_key, values.get(alpha_key)) if alpha_key else 1.0,
        targets=read.targets(),
        base=read.text("base_model_name_or_path"),
        peft_type=str(values.get("peft_type")),
        rank_pattern=read.pattern("rank_pattern", read.integer) if has_patterns else None,
        alpha_pattern=read.pattern("alpha_pattern", read.number) if has_patterns else None,
        task=read.text("task_type"),
        modules_to_save=read.names("modules_to_save"),
        bias=read.bias(),
        initialised=str(values.get("init_weights", True)),
    )


def _transposed(path: Path) -> ArtifactError:
    return ArtifactError(
        f"{path} is for transposed layers (fan_in_fan_out), which svdconvert does not support; "
        "merge it with PEFT"
    )


def _refuse_unsupported(path: Path, values: Mapping[str, Any]) -> None:
    if values.get("use_dora") and values.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise ArtifactError(
            f"{path} is a DoRA adapter that started from a part of its base; merge it with PEFT"
        )
    if found := [name for name in _UNSUPPORTED if values.get(name)]:
        raise ArtifactError(f"{path} sets {found[0]}, which no plain LoRA can express; merge it with PEFT")
    known = [PER_EXPERT, WITH_PARAMETERS, *(method.peft_type for method in METHODS.load_all()[0].values())]
    if values.get("peft_type") not in known:
        raise ArtifactError(
            f"{path} is of the peft_type {brief(values.get('peft_type'))}, but svdconvert reads LORA; merge "
            "it with the program that wrote it"
        )


class _Reader:
    """Reads values of a configuration, each within bounds."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self._path = path
        self._values = values

    def integer(self, name: str, value: object) -> int:
        """A rank: an integer of at least 1."""
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise self._wrong(name, value, "an integer")
        if not 1 <= value <= _LARGEST_RANK:
            raise self._wrong(name, value, f"a number from 1 to {_LARGEST_RANK}")
        return int(value)

    def number(self, name: str, value: object) -> float:
        """A finite number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value, "a number")
        if abs(value) > _LARGEST_ALPHA or not isfinite(value):
            raise self._wrong(name, value, f"a number of at most {_LARGEST_ALPHA:g}")
        return float(value)

    def text(self, name: str) -> str | None:
        """A string or null."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        if value is not None and len(value) > _LONGEST_NAME:
            raise self._wrong(name, value, f"a string of at most {_LONGEST_NAME} characters")
        return value

    def bias(self) -> str:
        """Which biases are trained; PEFT knows none, all, and names such as lora_only."""
        value = self.text("bias") or "none"
        if value not in ("none", "all") and not value.endswith("_only"):
            raise self._wrong("bias", value, "none, all or lora_only")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """A list of strings, or null."""
        value = self._values.get(name)
        if value is not None and (
            not isinstance(value, list) or not all(isinstance(one, str) for one in value)
        ):
            raise self._wrong(name, value, "a list of names")
        return tuple(value or ())

    def targets(self) -> list[str]:
        """The adapted modules; empty if other settings change which modules target_modules selects."""
        value = self._values.get("target_modules")
        narrowed = self._values.get("layers_to_transform") is not None or self._values.get("exclude_modules")
        return (
            [] if value is None or isinstance(value, str) or narrowed else list(self.names("target_modules"))
        )

    def initialised(self) -> str | bool:
        """How PEFT initialised the factors."""
        if isinstance(self._values.get("kasa_config"), dict):
            return KASA
        value = self._values.get("init_lora_weights", True)
        return value if isinstance(value, str | bool) else True

    def pattern(self, name: str, read: Any) -> dict[str, Any]:
        """A mapping from patterns of module paths to numbers that `read` accepts."""
        value = self._values.get(name) or {}
        if not isinstance(value, dict) or len(value) > _MOST_PATTERNS:
            raise self._wrong(name, value, "a mapping from names to numbers")
        for key in value:
            if len(key) > _LONGEST_NAME:
                raise self._wrong(name, key, f"patterns of at most {_LONGEST_NAME} characters")
            try:
                _compiled(key)
            except (regex.error, re.error, ValueError, OverflowError, RecursionError) as error:
                raise self._wrong(name, key, "names or regular expressions") from error
        return {key: read(name, number) for key, number in value.items()}

    def base_is_residual(self) -> bool | None:
        """svdconvert's entry; None if there is none."""
        mapping = self._values.get("auto_mapping")
        entry = mapping.get(ENTRY) if isinstance(mapping, dict) else None
        found = entry.get("base_is_residual") if isinstance(entry, dict) else None
        return found if isinstance(found, bool) else None

    def _wrong(self, name: str, value: object, expected: str) -> ArtifactError:
        return ArtifactError(
            f"{self._path} has {name} {brief(value)}, which must be {expected}; restore the file, or fetch "
            "it again"
        )
