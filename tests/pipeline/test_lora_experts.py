"""The configuration of a LoRA for experts."""

from svdconvert.adapters.adapter_config import AdapterConfig
from svdconvert.adapters.stacked import Stack
from svdconvert.pipeline.lora_experts import LoraForm

EXPERTS = "model.layers.0.mlp.experts.down_proj"
SHARED = "model.layers.0.mlp.shared_experts.down_proj"
STACK = Stack(EXPERTS, experts=4, rank=4, shape=(8, 6), members=())


def test_the_rank_of_experts_does_not_become_that_of_a_dense_layer_with_the_same_last_name() -> None:
    patterns = LoraForm({SHARED: ((SHARED, None),)}, (STACK,)).rank_pattern(8)
    config = AdapterConfig(
        rank=8, alpha=8, targets=["down_proj"], parameters=["experts.down_proj"], rank_pattern=patterns
    )
    assert config.rank_of(EXPERTS) == 4
    assert config.rank_of(SHARED) == 8


def test_alone_they_are_named_by_the_last_name() -> None:
    assert LoraForm({}, (STACK,)).rank_pattern(8) == {"down_proj": 4}
    assert LoraForm({}, (STACK,)).rank_pattern(4) == {}
