"""What an adapter replaces, resizes or adds: parameters trained in full, vocabularies and heads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from svdconvert.adapters.extra_parameters import EMBEDDINGS, HEADS
from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapted_tensors import is_head
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.model import OpenModel
from svdconvert.inputs.tensor_names import TensorNames
from svdconvert.layouts.base import Layout
from svdconvert.models.heads import class_with_head

_TIED = "tie_word_embeddings"
_SIZE = "vocab_size"


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that the model does not store."""

    shape: tuple[int, ...]
    dtype: str
    parameter: str | None = None
    """The parameter of the adapter that it is."""
    copied: str = ""
    """The tensor of the model that it is a copy of, if it is no parameter of the adapter."""
    module: str | None = None
    """The module whose factors are merged into it."""

    def info(self, name: str) -> TensorInfo:
        """Its header under a name."""
        return TensorInfo(name, self.shape, self.dtype)


@dataclass(frozen=True)
class Extras:
    """All that an adapter changes in addition to the matrices of the model."""

    replaced: dict[str, str] = field(default_factory=dict)
    """Tensor -> parameter, for tensors that are replaced by parameters trained in full."""
    added: dict[str, NewTensor] = field(default_factory=dict)
    """Tensor -> how it is made, for tensors that the model does not store."""
    rows: dict[str, int] = field(default_factory=dict)
    """Tensor -> its number of rows, if the adapter was trained with another vocabulary."""
    bases: dict[str, str] = field(default_factory=dict)
    """Tensor of another number of rows -> the adapter's copy that its factors belong to."""
    heads: list[str] = field(default_factory=list)
    """Modules whose matrices are among the added tensors."""
    config: dict[str, Any] = field(default_factory=dict)
    """Entries of config.json."""

    def shape(self, info: TensorInfo) -> tuple[int, ...]:
        """The shape that a tensor of the model is written with."""
        rows = self.rows.get(info.name)
        return info.shape if rows is None else (rows, *info.shape[1:])


def plan_extras(
    delta: AdapterDelta, model: OpenModel, infos: Mapping[str, TensorInfo], layout: Layout
) -> Extras:
    """Plan from headers. Raises ArtifactError if a parameter of the adapter does not fit the model."""
    names = TensorNames(layout, infos)
    extras = Extras()
    absent: list[str] = []
    for parameter in delta.adapter.extras:
        tensor = names.tensor(parameter)
        if tensor is None:
            absent.append(parameter)
            continue
        _plan_shape(delta, extras, parameter, infos[tensor])
        extras.replaced[tensor] = parameter
    for module in delta.modules:
        tensor = names.tensor(f"{module}.weight")
        if tensor is not None and _is_vocabulary(tensor):
            _plan_adapted(delta, extras, module, infos[tensor])
    heads = [parameter for parameter in absent if is_head(parameter.rpartition(".")[0])]
    _add_parts(delta, model, extras, layout, [parameter for parameter in absent if parameter not in heads])
    _untie(delta, model, extras, names, heads)
    _resize(delta, model, extras, infos)
    return extras


def _plan_shape(delta: AdapterDelta, extras: Extras, parameter: str, info: TensorInfo) -> None:
    """Note the number of rows of a parameter that replaces a tensor."""
    shape = delta.adapter.parameter_info(parameter).shape
    if shape == info.shape:
        return
    if not _is_vocabulary(info.name) or shape[1:] != info.shape[1:]:
        raise ArtifactError(
            f"{delta.directory} trained {parameter} with the shape {shape}, and the model has it with "
            f"{info.shape}; give the model that it was made for"
        )
    extras.rows[info.name] = shape[0]


def _plan_adapted(delta: AdapterDelta, extras: Extras, module: str, info: TensorInfo) -> None:
    """Note the number of rows of embeddings or a head with factors, and the copy that these belong to."""
    rows = delta.adapter.shape(module, "lora_B")[0]
    if rows == info.shape[0]:
        return
    copy = f"{module}.weight"
    if copy not in delta.adapter.copies or delta.adapter.parameter_info(copy).shape[0] != rows:
        columns = delta.adapter.shape(module, "lora_A")[1]
        refuse_other_vocabulary(delta, module, (rows, columns), info.shape)
    extras.rows[info.name] = rows
    extras.bases[info.name] = copy


def _add_parts(
    delta: AdapterDelta, model: OpenModel, extras: Extras, layout: Layout, absent: list[str]
) -> None:
    """Add the parameters of a head that the model does not have, such as one for classification."""
    own = delta.manifest.head if delta.manifest else None
    if own:
        extras.config.update(own)
    if not absent:
        return
    if not own:
        extras.config.update(_head_config(delta, model, absent))
    prefixed = any(name.startswith(layout.prefix) for name in model.source.infos)
    for parameter in absent:
        name = parameter if prefixed else parameter.removeprefix(layout.prefix)
        info = delta.adapter.parameter_info(parameter)
        extras.added[name] = NewTensor(info.shape, info.dtype, parameter)


def _head_config(delta: AdapterDelta, model: OpenModel, absent: list[str]) -> dict[str, Any]:
    """The entries of config.json for a head that another program trained.

    Raises ArtifactError if the adapter's configuration does not say what the head is for.
    """
    task = delta.adapter.config.task
    architecture = class_with_head(model.config.get("model_type"), task)
    weights = [name for name in absent if name.endswith(".weight")]
    if architecture is None or not weights:
        raise ArtifactError(
            f"{delta.directory} trained {absent[0]} in full, which the model does not have: a new part is "
            f"merged only if it is a head of a known task, and the task_type of the adapter is {task}; merge "
            "it with PEFT into the class of transformers that has this part"
        )
    count = delta.adapter.parameter_info(weights[-1]).shape[0]
    labels = {str(number): f"LABEL_{number}" for number in range(count)}
    return {
        "architectures": [architecture],
        "id2label": labels,
        "label2id": {label: int(number) for number, label in labels.items()},
    }


def _untie(
    delta: AdapterDelta, model: OpenModel, extras: Extras, names: TensorNames, heads: list[str]
) -> None:
    """Add the head of a model whose head is its embeddings, if the adapter changes only one of the two."""
    adapted = [module for module in delta.modules if is_head(module) and not names.shares(module)]
    embedding = _tied_embedding(delta, model, names)
    if embedding is None:
        if heads or adapted:
            raise _no_embedding(delta, model, (heads or adapted)[0])
        return
    changed = embedding in extras.replaced or any(
        names.tensor(f"{module}.weight") == embedding for module in delta.modules
    )
    stays_tied = delta.adapter.config.ties_saved_modules and embedding in extras.replaced
    if not (heads or adapted or (changed and not stays_tied)):
        return
    info = names.infos[embedding]
    if heads:
        parameter = heads[0]
        if _equals_embedding(delta, extras, embedding, parameter):
            return
        shape = delta.adapter.parameter_info(parameter).shape
        extras.added[f"{parameter.rpartition('.')[0]}.weight"] = NewTensor(shape, info.dtype, parameter)
        return
    if adapted:
        extras.heads.append(adapted[0])
        copy = f"{adapted[0]}.weight"
        base = copy if copy in delta.adapter.copies else None
        shape = delta.adapter.parameter_info(copy).shape if base else info.shape
        extras.added[copy] = NewTensor(shape, info.dtype, base, embedding, adapted[0])
        if shape != info.shape and not changed:
            # The resized embeddings are the resized head.
            extras.replaced[embedding] = copy
            extras.rows[embedding] = shape[0]
        return
    base = extras.bases.get(embedding)
    shape = delta.adapter.parameter_info(base).shape if base else info.shape
    extras.added["lm_head.weight"] = NewTensor(shape, info.dtype, base, embedding)


def _equals_embedding(delta: AdapterDelta, extras: Extras, embedding: str, head: str) -> bool:
    """True if the adapter has the same values for both, as PEFT stores those of a resized vocabulary."""
    own = extras.replaced.get(embedding)
    if own is None or delta.adapter.parameter_info(own).shape != delta.adapter.parameter_info(head).shape:
        return False
    return bool((delta.parameter(own) == delta.parameter(head)).all())


def _tied_embedding(delta: AdapterDelta, model: OpenModel, names: TensorNames) -> str | None:
    """The embeddings that are also the head; None if the head is another matrix, or there are several."""
    if model.config.get("is_encoder_decoder") is True or names.layout.task_of(names.infos) != "CAUSAL_LM":
        return None
    if any(name.endswith(HEADS) for name in names.infos) or model.config.get(_TIED) is False:
        return None
    found = [name for name in names.infos if name.endswith(EMBEDDINGS)]
    return found[0] if len(found) == 1 else None


def _no_embedding(delta: AdapterDelta, model: OpenModel, what: str) -> ArtifactError:
    return ArtifactError(
        f"{delta.directory} changes {what}, which {model.path} does not store: its head is tied to "
        "embeddings that are not known to be its only ones; merge it with PEFT into a model whose "
        "embeddings are untied"
    )


def _resize(delta: AdapterDelta, model: OpenModel, extras: Extras, infos: Mapping[str, TensorInfo]) -> None:
    """Note the size of another vocabulary. Raises ArtifactError if embeddings and head differ in it."""
    sizes = {name: extras.shape(info)[0] for name, info in infos.items() if _is_vocabulary(name)}
    sizes |= {name: new.shape[0] for name, new in extras.added.items() if name.endswith(HEADS)}
    before = {info.shape[0] for name, info in infos.items() if _is_vocabulary(name)}
    if before == {*sizes.values()} or not (extras.rows or extras.added):
        return
    if len({*sizes.values()}) > 1:
        least = min(sizes, key=lambda name: sizes[name])
        most = max(sizes, key=lambda name: sizes[name])
        raise ArtifactError(
            f"{delta.directory} was trained with another vocabulary: {most} would have {sizes[most]} rows "
            f"and {least} {sizes[least]}; resize the model (resize_token_embeddings of transformers), "
            "save it, and give it with --base"
        )
    extras.config[_SIZE] = next(iter(sizes.values()))


def with_entries(config: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with entries; the size of the vocabulary is that of its language model."""
    changed = dict(config) | {name: value for name, value in entries.items() if name != _SIZE}
    if _SIZE not in entries:
        return changed
    text = changed.get("text_config")
    if isinstance(text, Mapping):
        changed["text_config"] = dict(text) | {_SIZE: entries[_SIZE]}
    if _SIZE in changed or not isinstance(text, Mapping):
        changed[_SIZE] = entries[_SIZE]
    return changed


def _is_vocabulary(name: str) -> bool:
    return name.endswith((*EMBEDDINGS, *HEADS))


def refuse_other_vocabulary(
    delta: AdapterDelta, module: str, adapted: tuple[int, ...], stored: tuple[int, ...]
) -> None:
    """Raise ArtifactError if embeddings or a head differ in their rows only."""
    if _is_vocabulary(f"{module}.weight") and adapted[1:] == stored[1:]:
        raise ArtifactError(
            f"{delta.directory} has {module} with {adapted[0]} rows, and the model with {stored[0]}: it was "
            "trained with another vocabulary; resize the model (resize_token_embeddings of transformers), "
            "save it, and give it with --base"
        )
