"""Finds the tensors of a model that an adapter changes, also if the adapter has names of another program."""

from collections.abc import Mapping, Sequence
from typing import Any

from svdconvert.errors import ArtifactError
from svdconvert.inputs.adapter_delta import AdapterDelta
from svdconvert.inputs.model import OpenModel
from svdconvert.inputs.tensor_names import Share, Shares, TensorNames
from svdconvert.manifest.place import Rows

_HEADS = ("lm_head", "embed_out")


def adapted_tensors(delta: AdapterDelta, model: OpenModel) -> dict[str, Sequence[Share]]:
    """Module -> tensors of `model`, for every module that the adapter has factors for.

    It need not be a matrix of the layout: heads, embeddings, routers and vision towers are adapted too. A
    head that is tied to the embeddings, and so not stored, is left out. Raises ArtifactError if the model has
    no such matrix.
    """
    _, layout = model.layout(delta.layout_name)
    names = TensorNames(layout, layout.divided(model.source).infos)
    found: dict[str, Sequence[Share]] = {}
    absent: list[str] = []
    for module in delta.modules:
        shares = names.shares(module)
        if not shares and is_head(module):
            continue  # tied to the embeddings: it becomes a tensor of its own
        if not shares:
            absent.append(module)
        else:
            found[module] = shares
    if absent:
        raise ArtifactError(
            f"{delta.directory} adapts {absent[0]}, which {model.path} does not have ({len(absent)} such "
            "modules); give the model that it was made for"
        )
    _refuse_same_rows(delta, found)
    return found


def is_head(module: str) -> bool:
    """True for the module that makes logits of the last hidden state."""
    return module.rpartition(".")[2] in _HEADS


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """True if a config.json says that the head is tied to the embeddings."""
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    return config.get("tie_word_embeddings", nested) is True


def _refuse_same_rows(delta: AdapterDelta, found: Shares) -> None:
    """Raise ArtifactError if two modules change the same rows of a tensor."""
    changed: dict[str, dict[Rows | None, str]] = {}
    for module, shares in found.items():
        for share in shares:
            others = changed.setdefault(share.tensor, {})
            if others and (share.of_tensor is None or None in others or share.of_tensor in others):
                other = others.get(share.of_tensor) or next(iter(others.values()))
                raise ArtifactError(
                    f"{delta.directory} has two adapters of {share.tensor}: {other} and {module}; remove one"
                )
            others[share.of_tensor] = module
