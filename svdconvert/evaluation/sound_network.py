"""A network whose weights, tokens and scores are checked while it answers: NaN would give answers too."""

from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.errors import ArtifactError

_CODES = 1  # byte of an element, as of quantised weights, which have no NaN to look for


def require_sound(network: nn.Module, model: object) -> None:
    """Raise ArtifactError if a weight is NaN or infinite; each later call does so for scores that are.

    It also does so for a token without an embedding. Weights are checked because some attention kernels turn
    NaN into finite numbers. `model` is what the network was loaded from.
    """
    for name, tensor in network.named_parameters():
        is_real = tensor.is_floating_point() and tensor.element_size() > _CODES
        if is_real and tensor.numel() and not all(map(isfinite, torch.stack(tensor.detach().aminmax()))):
            raise ArtifactError(
                f"{model}: {name} holds NaN or Inf as {str(tensor.dtype).removeprefix('torch.')}; check its "
                "files, or give `dtype` float32"
            )
    find_embedding: Any = getattr(network, "get_input_embeddings", None)
    embedding = find_embedding() if find_embedding is not None else None
    if isinstance(embedding, nn.Embedding):
        embedding.register_forward_pre_hook(_refuse_unknown_tokens)
    network.register_forward_hook(_refuse_no_numbers)


def _refuse_unknown_tokens(embedding: nn.Module, arguments: tuple[Any, ...]) -> None:
    ids = arguments[0]
    assert isinstance(embedding, nn.Embedding)
    rows = embedding.num_embeddings
    if isinstance(ids, Tensor) and ids.numel() and int(ids.max()) >= rows:
        raise ArtifactError(
            f"the tokenizer makes the token {int(ids.max())}, and the model has {rows} embeddings; give the "
            "model its own tokenizer"
        )


def _refuse_no_numbers(network: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
    scores = getattr(output, "logits", None)
    if isinstance(scores, Tensor) and scores.numel() and not bool(scores.amax(dim=-1).isfinite().all()):
        raise ArtifactError(
            "the model gives NaN or Inf instead of scores; check its files with verify, or give `dtype` "
            "float32"
        )
