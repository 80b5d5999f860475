"""An architecture of transformers without weights, and its names at run time for the tensors in files.

transformers renames, merges and cuts tensors when it loads a checkpoint. Its tables for that
(`transformers.conversion_mapping`, `transformers.core_model_loading`) are not documented, so everything that
svdconvert knows of them is in this file. It needs transformers 5.17 or newer (`make test-oldest`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import CheckpointError, SvdConvertError, UnknownNameError, brief

_LAYER_COUNT = re.compile(r"(?:num_.*|n_|.*_)?(?:layers?|blocks|depth)(?:_per_stack)?")
_SMALLEST_COUNT = 512
"""Up to this many layers are built whatever the checkpoint holds."""
LEFT_OVER = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Patterns of tensors that older versions of transformers stored, and that every network ignores."""
_MAPPED_LIKE = ("mixtral", "qwen2_moe")
"""Types whose experts, if stored one by one, PEFT fuses when it loads an adapter."""


@dataclass(frozen=True)
class Target:
    """What transformers makes of one tensor of the files."""

    parameter: str
    """The parameter or buffer at run time: the first one, if the tensor is cut into several."""
    steps: tuple["Step", ...] = ()
    """Operations on the tensor, in their order; none if it is only renamed."""
    sources: tuple[str, ...] = ()
    """Patterns of the names that take part in the operations, in the order in which they are put together."""
    source: str = ""
    """The pattern that the tensor matches."""
    others: tuple[str, ...] = ()
    """The further parameters that the tensor is cut into."""


@dataclass(frozen=True)
class Step:
    """One operation: the name of its class in transformers, and its axes."""

    name: str
    axes: tuple[int, ...]
    only_if_needed: bool = False
    """True if it is left out when the tensor has the parameter's shape without it."""


class Architecture:
    """A network on the meta device, and the tables with which transformers loads files into it."""

    def __init__(self, network: Any) -> None:
        """`network` is a PreTrainedModel on the meta device."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.network = network
        self._state = dict.fromkeys(network.state_dict(), True)
        self._buffers = {name for name, _ in network.named_buffers()}
        ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._ignored = [re.compile(pattern) for pattern in sorted({*ignored, *LEFT_OVER})]
        tables = list(get_model_conversion_mapping(self.network))
        self._renamings = [table for table in tables if isinstance(table, WeightRenaming)]
        self._converters = [table for table in tables if isinstance(table, WeightConverter)]

    @property
    def config(self) -> Any:
        """The configuration of the network."""
        return self.network.config

    def output_heads(self) -> set[int]:
        """The ids of modules that turn hidden states into logits."""
        head = self.network.get_output_embeddings()
        return set() if head is None else {id(head)}

    def is_ignored(self, name: str) -> bool:
        """True for a tensor of the files that transformers leaves out on purpose."""
        return (
            any(pattern.search(name) for pattern in self._ignored) or self._rename(name)[0] in self._buffers
        )

    def targets(self, names: Iterable[str]) -> dict[str, Target]:
        """What transformers makes of the tensors `names`; those that it knows nothing of are left out."""
        from transformers.core_model_loading import dot_natural_key

        converters = {pattern: table for table in self._converters for pattern in table.source_patterns}
        found: dict[str, Target] = {}
        for name in sorted(names, key=dot_natural_key):
            renamed, pattern = self._rename(name)
            if renamed in self._state:
                found[name] = Target(renamed) if pattern is None else _target(renamed, pattern, converters)
            elif name in self._state:
                found[name] = Target(name)
        return found

    def _rename(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        renamed: tuple[str, str | None] = rename_source_key(
            name, self._renamings, self._converters, self.network.base_model_prefix, self._state
        )
        return renamed

    def peft_finds(self, module: str) -> bool:
        """True if PEFT loads the factors of a module under the name that they are stored with.

        PEFT applies the tables to the names of factors too. A pattern that also matches names at run time
        then turns a right name into a wrong one, and PEFT drops the factors with a warning.
        """
        from transformers import conversion_mapping
        from transformers.core_model_loading import rename_source_key

        mapping_of: Any = conversion_mapping.get_checkpoint_conversion_mapping
        if mapping_of(str(getattr(self.config, "model_type", ""))) is None:
            return True
        key = f"{module}.lora_A.weight"
        return bool(rename_source_key(key, self._renamings, [])[0] == key)

    def shared_weights(self) -> set[str]:
        """The parameters of which several modules have the same, by any of their names."""
        tied: Mapping[str, str] = getattr(self.network, "all_tied_weights_keys", None) or {}
        return {*tied, *tied.values()}

    def peft_fuses_experts(self) -> bool:
        """True if PEFT turns factors of single experts into those of a fused parameter when it loads them."""
        from transformers import conversion_mapping

        kinds: Mapping[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
        kind = str(getattr(self.config, "model_type", ""))
        return kind in _MAPPED_LIKE or kinds.get(kind) in _MAPPED_LIKE


def _target(renamed: str, pattern: str, converters: Mapping[str, Any]) -> Target:
    """The target of a tensor that `pattern` of a converter matches."""
    table = converters[pattern]
    targets = list(table.target_patterns)
    first = targets[0]
    others = tuple(renamed.replace(first, other) for other in targets[1:])
    steps = tuple(
        Step(type(operation).__name__, _axes(operation), bool(getattr(operation, "check_dims", False)))
        for operation in table.operations
    )
    return Target(renamed, steps, tuple(table.source_patterns), pattern, others)


def _axes(operation: Any) -> tuple[int, ...]:
    names = ("dim", "dim0", "dim1")
    return tuple(int(getattr(operation, name)) for name in names if hasattr(operation, name))


def build_architecture(
    path: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], *, trust_remote_code: bool
) -> Architecture:
    """The architecture that config.json names, on the meta device: no memory is used for its weights.

    `path` is the directory of the checkpoint with the tensors `infos`. Code of the directory runs only with
    `trust_remote_code`. Raises UnknownNameError if transformers does not know the model type, and
    CheckpointError if config.json describes no network.
    """
    _refuse_more_layers(path, config, infos)
    if "auto_map" in config and not trust_remote_code and not _is_known(config.get("model_type")):
        raise UnknownNameError(
            f"{path} has the model type {brief(config.get('model_type'))}, whose code is in its own "
            "repository; give --trust-remote-code to run that code, or --layout names to go by tensor names"
        )
    if not _is_known(config.get("model_type")) and "auto_map" not in config:
        raise UnknownNameError(
            f"{path} has the model type {brief(config.get('model_type'))}, which neither svdconvert nor "
            "transformers knows; update transformers, or give --layout names to go by tensor names"
        )
    with network_errors(path), _quiet():
        return Architecture(_network(path, config, trust_remote_code=trust_remote_code))


@contextmanager
def network_errors(path: Path) -> Iterator[None]:
    """Raise CheckpointError for any error of a network's code: a configuration can make it raise anything."""
    try:
        yield
    except SvdConvertError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"transformers cannot build the network that {path / 'config.json'} describes ({reason}); "
            "restore the file, or give --layout names to go by tensor names"
        ) from error


def _is_known(model_type: object) -> bool:
    from transformers import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def _refuse_more_layers(path: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> None:
    """Refuse a number of layers that the tensors cannot fill: building it could take forever."""
    most = max(_SMALLEST_COUNT, len(infos))
    for name, value in _integers(config):
        if abs(value) > most and _LAYER_COUNT.fullmatch(name):
            raise CheckpointError(
                f"{path / 'config.json'} has {name} {brief(value)}, and the checkpoint has only {len(infos)} "
                "tensors; restore the file"
            )


def _integers(values: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, int]]:
    for name, value in values.items():
        if isinstance(value, int):
            yield name, value
        elif isinstance(value, Mapping) and depth < 8:
            yield from _integers(value, depth + 1)


def _network(path: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> nn.Module:
    import transformers

    opened = transformers.AutoConfig.from_pretrained(
        path, trust_remote_code=trust_remote_code, local_files_only=True
    )
    named = [name for name in config.get("architectures") or [] if isinstance(name, str)]
    found = getattr(transformers, named[0], None) if named and named[0].isidentifier() else None
    with torch.device("meta"):
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            network: nn.Module = found(opened)
            return network
        for auto_class in _auto_classes(opened):
            try:
                network = auto_class.from_config(opened, trust_remote_code=trust_remote_code)
                return network
            except ValueError:  # the class has no network for such a configuration
                continue
    raise CheckpointError(f"transformers has no network for {brief(config.get('model_type'))}")


def _auto_classes(config: Any) -> list[Any]:
    import transformers

    names = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel")
    ordered = names if not getattr(config, "is_encoder_decoder", False) else names[::-1][1:] + names[-1:]
    return [getattr(transformers, name) for name in ordered]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what transformers logs about a configuration."""
    from transformers.utils import logging

    transformers_logging: Any = logging
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
