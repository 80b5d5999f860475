"""A tiny configuration of any model type that transformers knows: its default one with small numbers."""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 128
WIDTH = 32
HEADS = 4
HEAD = 8
MOST_LAYERS = 4

# Names of integers in configurations -> what they become. A value is never made larger.
SMALL: Mapping[str, int] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "emb_dim"), WIDTH),
    **dict.fromkeys(("attention_hidden_size", "word_embed_proj_dim", "out_hidden_size", "dim"), WIDTH),
    **dict.fromkeys(("hidden_size_global", "projection_dim", "vision_output_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 48),
    **dict.fromkeys(("d_ff", "dim_ff", "ffn_hidden_size", "n_inner", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size"), 24),
    **dict.fromkeys(("dense_intermediate_size", "moe_dense_intermediate_size"), 24),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("index_n_heads", "swa_num_attention_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("linear_num_value_heads",), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("swa_num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "dim_head", "d_kv", "linear_head_dim", "linear_key_head_dim"), HEAD),
    **dict.fromkeys(("linear_value_head_dim", "v_head_dim", "qk_nope_head_dim", "kv_channels"), HEAD),
    **dict.fromkeys(("qk_rope_head_dim", "swa_head_dim", "index_head_dim", "global_head_dim"), HEAD),
    **dict.fromkeys(("rotary_dim",), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "gated_norm_rank", "laurel_rank"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_blocks", "depth"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_dense_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 128),
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size", "local_attention"), 16),
    **dict.fromkeys(("sliding_window_size",), 16),
    **dict.fromkeys(("image_size",), 16),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input",), 8),
}


_PLAIN_ROPE: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER: Mapping[str, Any] = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_DOTS: Mapping[str, Any] = {
    "num_hidden_layers": 3,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"],
    "num_key_value_heads": 4,
    "head_dim": 16,
    "per_layer_config": {
        "02": {
            "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 16,
            "head_dim": 24,
        },
    },
}  # fmt: skip


def _sections(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary embeddings of a language model whose sections fill the small heads."""
    rope = {**_PLAIN_ROPE, "mrope_section": list(sections)}
    partial = HEAD // 2 - sum(sections)
    rope |= {"partial_rotary_factor": 0.5} if partial else {}
    return {"text_config": {"rope_parameters": rope, **more}}


# What the rule above gets wrong: sizes that depend on one another in a way of their own.
SPECIAL: dict[str, Mapping[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "jamba": {"num_hidden_layers": 8},
    "roc_bert": {"pronunciation_vocab_size": 128, "shape_vocab_size": 128},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": None},
    "recurrent_gemma": {"num_hidden_layers": 3},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "glmga"), _sections(2, 1, 1)),
    **dict.fromkeys(("cosmos3_edge", "paddleocr_vl", "qwen2_5_omni_thinker"), _sections(2, 1, 1)),
    "glm4v_moe": _sections(1, 1, 0),
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note_text": _DOTS,
    "dots3_note": {"text_config": _DOTS},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "blt": {"encoder_hash_byte_group_vocab": 32},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _PLAIN_ROPE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _PLAIN_ROPE}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "emu3": {
        "vocabulary_map": {"<image>": 120, "<|extra_200|>": 121, "<|visual token 000000|>": 122},
        "image_token_id": 120,
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 64},
    },
    "chameleon": {
        "vocabulary_map": {"<image>": 120, "IMGIMGA": 121},
        "image_token_id": 120,
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 64},
    },
    "janus": {"vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 64}},
    "florence2": {"vision_config": {"embed_dim": [16] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4}},
    "qwen4_exp_text": _INDEXER | {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _INDEXER | {"num_key_value_heads": 2}},
    "ernie4_5_vl_moe": _sections(1, 1, 2, moe_intermediate_size=[24, 16]),
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}},
    "mistral4": {"head_dim": 16},
    "mistral_large4": {
        "text_config": {
            "num_hidden_layers": 2,
            "kv_source_layers": [0, 1],
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["indexed_attention"] * 2,
            "indexer_types": ["full"] * 2,
            "no_rope_layers": [1, 0],
        },
    },
    "hunyuan_vl": {"text_config": {"rope_parameters": _PLAIN_ROPE | {"mrope_section": [1, 1, 1, 1]}}},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [1],
    },
    "muse_spark": {
        "audio_config": {
            "num_hidden_layers": 4,
            "hidden_sizes": [16] * 4,
            "depths": [1] * 4,
            "out_hidden_size": WIDTH,
        },
    },
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [-1, -2]},
        "vision_config": {"image_size": [16, 16]},
    },
    "step3p7": {"text_config": {"sliding_window": 16}},
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse"],
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        },
    },
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 32}},
    **dict.fromkeys(("gemma4_assistant",), {"text_config": {"hidden_size_per_layer_input": 0}}),
    **dict.fromkeys(
        ("blip-2", "instructblip", "instructblipvideo"),
        {"num_query_tokens": 4, "image_token_index": VOCABULARY - 1, "video_token_index": VOCABULARY - 1},
    ),
    "kosmos-2": {"latent_query_num": 4, "text_config": {"layers": 2}},
    "pp_formulanet": {"vision_config": {"decoder_hidden_size": WIDTH}},
    "pix2struct": {"vision_config": {"patch_size": 8, "seq_len": 16, "patch_embed_hidden_size": 192}},
    "llama4_text": {"moe_layers": [1, 3]},
}
_NO_DEFAULT = ("gemma4_assistant",)
# Names of layer counts: lists with one entry per layer become as long.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")


def shrunk(model_type: str) -> PretrainedConfig:
    """A tiny configuration of `model_type`. Raises whatever its class raises."""
    config_class = CONFIG_MAPPING[model_type]
    special = SPECIAL.get(model_type, {})
    values = config_class(**(special if model_type in _NO_DEFAULT else {})).to_dict()
    try:
        return config_class(**_merged(overrides(values), special))
    except Exception:
        # Inner configurations are read as a whole: their classes have other defaults than the outer one's.
        return config_class(**_merged(overrides(values, whole=True), special))


def _merged(values: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the entries of `special`, also in configurations inside it."""
    inner = {
        name: _merged(values[name], value) if isinstance(values.get(name), Mapping) else value
        for name, value in special.items()
    }
    return {**values, **inner}


def overrides(values: Mapping[str, Any], *, whole: bool = False) -> dict[str, Any]:
    """The entries of a configuration that have to change, also in configurations inside it.

    With `whole`, configurations inside it keep their other entries.
    """
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and "model_type" in value:
            changed[name] = (dict(value) if whole else {}) | overrides(value, whole=whole)
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            changed[name] = min(value, SMALL[name])
        elif name == "head_dim" and value is None:
            changed[name] = HEAD
        elif _is_wide(name, value):
            changed[name] = 48 if "intermediate" in name else WIDTH
    heads = values.get("num_attention_heads")
    if heads is not None and heads == values.get("num_key_value_heads"):
        changed["num_key_value_heads"] = changed["num_attention_heads"]
    return changed | dict(_layers(values)) | _tokens(values)


def _is_wide(name: str, value: Any) -> bool:
    """True for a width that SMALL does not know by name."""
    is_width = name.endswith(("_size", "_dim")) and "vocab" not in name and "patch" not in name
    return is_width and isinstance(value, int) and value >= 1024


def _tokens(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of special tokens, all inside the small vocabulary."""
    names = [
        name
        for name, value in values.items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCABULARY
    ]
    return {name: VOCABULARY - 1 - number for number, name in enumerate(names)}


def _layers(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """As few layers as show every kind of layer, and the lists with an entry per layer to match."""
    count_name = next((name for name in LAYER_COUNTS if isinstance(values.get(name), int)), None)
    if count_name is None:
        return
    count = values[count_name]
    lists = {
        name: value for name, value in values.items() if isinstance(value, list) and len(value) == count > 4
    }
    chosen = _representatives(lists, count)
    yield count_name, len(chosen)
    for name, value in lists.items():
        small = [value[number] for number in chosen]
        yield name, [min(one, SMALL[name]) for one in small] if name in SMALL else small


def _representatives(lists: Mapping[str, list[Any]], count: int) -> list[int]:
    """Numbers of layers: the last one of each kind, at most MOST_LAYERS and at least two."""
    kinds: dict[str, int] = {}
    for number in range(count):
        kinds[repr([value[number] for value in lists.values()])] = number
    chosen = sorted(kinds.values())[-MOST_LAYERS:]
    others = [number for number in range(count) if number not in chosen]
    return sorted(chosen + others[-1:]) if len(chosen) < 2 else chosen
