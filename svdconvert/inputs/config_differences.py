"""Settings in which the config.json of checkpoints differ that are made into one, or compared."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from svdconvert.inputs.model import OpenModel

_SHOWN = 6
# How a checkpoint was stored, named, trained and generated with, which is no part of the network.
_OTHERS = frozenset((
    "_name_or_path", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version",
    "use_cache", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "vocab_size", "quantization_config", "compression_config", "initializer_range", "initializer_factor",
    "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "classifier_dropout", "output_router_logits", "router_aux_loss_coef",
    "max_position_embeddings", "problem_type", "finetuning_task", "id2label", "label2id",
    "num_hidden_layers", "layer_types",
))  # fmt: skip


def remarks_on_configs(first: OpenModel, others: Iterable[OpenModel]) -> Iterator[str]:
    """A warning for each of the others whose settings differ from those of the first, which are kept."""
    for other in others:
        if found := differing_settings(first, other):
            yield (
                f"config.json of {other.path} has other values than that of {first.path}, which is kept: "
                f"{found}; its weights may not work with these"
            )


def differing_settings(first: OpenModel, other: OpenModel) -> str:
    """The names of the settings that both have with other values, as text; empty if there are none."""
    found = [*_differences(first.config, other.config, "")]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{', '.join(found[:_SHOWN])}{more}"


def _differences(one: Mapping[str, Any], two: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """The names of the settings that both have, with other values."""
    for name in sorted(one.keys() & two.keys() - _OTHERS):
        left = one[name]
        right = two[name]
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            yield from _differences(left, right, f"{prefix}{name}.")
        elif left is not None and right is not None and left != right:
            yield f"{prefix}{name}"
