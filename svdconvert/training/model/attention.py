"""Which attention implementation of transformers a training run uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from svdconvert.config.train import TrainOptions
from svdconvert.errors import RecipeError
from svdconvert.training.compat import attention_implementation
from svdconvert.training.model.blockwise_attention import NAME, register_blockwise_attention

if TYPE_CHECKING:
    from accelerate import Accelerator

_SHORT = 512  # tokens; from 1024 on torch's fused attention is as fast


@contextmanager
def chosen_attention(model: nn.Module, options: TrainOptions, accelerator: "Accelerator") -> Iterator[None]:
    """Use the attention that the options name, and restore the model's own afterwards.

    "auto" replaces sdpa by `blockwise_attention` for short rows in bfloat16 on a CPU, because torch's fused
    attention is slower there. The decision depends on the options and not on the rows,
    so that a resumed run computes as it began. Raises RecipeError if an attention is named for a model that
    is not one of transformers' or does not have that attention.
    """
    current = attention_implementation(model)
    wanted: str | None = options.attention
    if wanted == "auto":
        is_short = options.max_length <= _SHORT and accelerator.device.type == "cpu"
        use_blocks = current == "sdpa" and is_short and accelerator.mixed_precision == "bf16"
        wanted = NAME if use_blocks else current
        if use_blocks:
            register_blockwise_attention()
    elif current is None:
        raise RecipeError(
            f"{type(model).__name__} has no choice of attentions: leave attention at auto, not {wanted}"
        )
    if wanted == current:
        yield
        return
    network: Any = model
    try:
        network.set_attn_implementation(wanted)
    except (ValueError, ImportError) as error:
        raise RecipeError(
            f"{type(model).__name__} cannot use the attention {wanted}, leave attention at auto: {error}"
        ) from error
    try:
        yield
    finally:
        network.set_attn_implementation(current)
