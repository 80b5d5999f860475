"""Low-rank factors of embeddings, which PEFT names and shapes differently from those of linear layers.

For an embedding of V rows of width H, `lora_embedding_A` is (R, V) and `lora_embedding_B` (H, R); the
change of its weight (V, H) is scale * (B A)^T (peft/tuners/lora/layer.py, class Embedding, of PEFT 0.21). So
A^T takes the place of a linear layer's B, and B^T that of its A.
"""

import re
from collections.abc import Collection
from dataclasses import replace

from svdconvert.adapters.extra_parameters import PREFIX
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource

_KEY = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.default)?(?:\.weight)?"
)
_PIECES = {"A": "lora_B", "B": "lora_A"}
_NAMES = {"lora_B": "lora_embedding_A", "lora_A": "lora_embedding_B"}


def embedding_piece(key: str) -> tuple[str, str] | None:
    """(module, factor of a linear layer that it stands for, transposed); None for another tensor."""
    match = _KEY.fullmatch(key)
    return None if match is None else (match["module"], _PIECES[match["side"]])


def embedding_key(module: str, piece: str) -> str:
    """The name of a factor in the adapter's file, the inverse of `embedding_piece`."""
    return f"{PREFIX}{module}.{_NAMES[piece]}"


def piece_info(source: TensorSource, name: str, module: str, embeddings: Collection[str]) -> TensorInfo:
    """The header of a module's factor, transposed if the module is one of the embeddings."""
    info = source.infos[name]
    return replace(info, shape=info.shape[::-1]) if module in embeddings else info
