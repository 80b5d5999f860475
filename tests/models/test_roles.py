"""Roles from the paths of modules."""

import pytest

from svdconvert.models.roles import expert_role, role_of, tower_of


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("self_attn.q_proj", "attn.q"),
        ("self_attn.qkv_proj", "attn.qkv"),
        ("attention.query_key_value", "attn.query_key_value"),
        ("layer.0.SelfAttention.q", "attn.q"),
        ("layer.1.EncDecAttention.k", "cross.k"),
        ("encoder_attn.out_proj", "cross.out"),
        ("layer.2.DenseReluDense.wi_0", "mlp.wi_0"),
        ("mlp.gate_up_proj", "mlp.gate_up"),
        ("mlp.shared_expert.down_proj", "mlp.shared_expert.down"),
        ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_qkvz"),
        ("fc1", "fc1"),
    ],
)
def test_the_role_of_a_linear_layer_follows_from_its_path(path: str, role: str) -> None:
    assert role_of(path) == role


def test_experts_and_towers_have_groups_of_their_own() -> None:
    assert expert_role("gate_up_proj") == "experts.gate_up"
    assert tower_of("model.vision_tower.encoder") == "vision"
    assert tower_of("model.audio_tower") == "audio"
    assert tower_of("model.embedder", is_tower=True) == "vision"
    assert tower_of("model.layers") == ""
