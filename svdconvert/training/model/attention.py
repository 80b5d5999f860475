"""Which of transformers' attentions a training computes with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from svdconvert.config.train import TrainOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

_SHORT = 512  # tokens; with 1024 nothing is gained any more, and the scores are most of the memory


@contextmanager
def attention_for(model: nn.Module, plan: TrainOptions, accelerator: "Accelerator") -> Iterator[None]:
    """Compute short rows in bfloat16 on a CPU as matrix products, and as before afterwards.

    There torch's fused attention takes half as long again (docs/training.md). The plan decides and not the
    rows at hand, so that a training that goes on computes as it began. A model that has another attention
    than transformers' usual one keeps it.
    """
    network: Any = model
    usual = getattr(getattr(network, "config", None), "_attn_implementation", None) == "sdpa"
    short = plan.max_length <= _SHORT and accelerator.device.type == "cpu"
    if not (usual and short and accelerator.mixed_precision == "bf16"):
        yield
        return
    network.set_attn_implementation("eager")
    try:
        yield
    finally:
        network.set_attn_implementation("sdpa")
