"""Tiny models that take images, with the processors, tokens and chat templates of released ones.

The processors are those that transformers loads next to torchvision: with the part for videos, and with the
image processors that compute with torchvision. The tokenizers work on bytes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PretrainedConfig,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from tests import tiny

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "<image>", "<video>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>",
    "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>", "<end_of_turn>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)  # fmt: skip
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TEXT: dict[str, Any] = {
    **tiny.TEXT,
    "vocab_size": len(BYTES) + len(SPECIAL),
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": len(BYTES) + 2,
    "pad_token_id": len(BYTES),
    "tie_word_embeddings": False,
}

_PARTS = (
    "{%% for part in message.content %%}{%% if part.type == 'image' or 'image' in part %%}%s"
    "{%% elif part.type == 'video' or 'video' in part %%}%s{%% elif 'text' in part %%}{{ part.text }}"
    "{%% endif %%}{%% endfor %%}"
)
_CHATML = (
    "{%% set images = namespace(count=0) %%}{%% for message in messages %%}%s"
    "<|im_start|>{{ message.role }}\n{%% if message.content is string %%}{{ message.content }}{%% else %%}"
    + _PARTS
    + "{%% endif %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)
_SYSTEM = (
    "{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}"
)
_QWEN_IMAGE = (
    "{% set images.count = images.count + 1 %}{% if add_vision_id %}Picture {{ images.count }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
)
_QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
QWEN2_TEMPLATE = _CHATML % (_SYSTEM, _QWEN_IMAGE, _QWEN_VIDEO)
QWEN3_TEMPLATE = _CHATML % ("", _QWEN_IMAGE, _QWEN_VIDEO)
LLAVA_TEMPLATE = _CHATML % ("", "<image>\n", "<video>\n")
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}:{% else %}: {% endif %}"
    + _PARTS % ("<image>", "<video>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{% if message.content is string %}{{ message.content | trim }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<start_of_image>"
    "{% elif part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def token_id(token: str) -> int:
    """The number of a special token."""
    return len(BYTES) + SPECIAL.index(token)


def _tokenizer(**special: Any) -> Any:
    vocabulary = {token: number for number, token in enumerate((*BYTES, *SPECIAL))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], **{"eos_token": "<|im_end|>"} | special)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


_QWEN_TOKENS = {
    "image_token_id": token_id("<|image_pad|>"), "video_token_id": token_id("<|video_pad|>"),
    "vision_start_token_id": token_id("<|vision_start|>"), "vision_end_token_id": token_id("<|vision_end|>"),
}  # fmt: skip
_QWEN_TOWER = {
    "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_CLIP = CLIPVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8,
    patch_size=4, projection_dim=16,
)  # fmt: skip


def _sections(*sections: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 1e4, **more}
    return {**TEXT, "rope_parameters": rope}


def _qwen2_vl() -> PretrainedConfig:
    tower = {**_QWEN_TOWER, "embed_dim": 16, "hidden_size": tiny.HIDDEN, "mlp_ratio": 2}
    return Qwen2VLConfig(text_config=_sections(1, 1, 2), vision_config=tower, **_QWEN_TOKENS)


def _qwen2_5_vl() -> PretrainedConfig:
    tower = {
        **_QWEN_TOWER, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": tiny.HIDDEN,
        "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return Qwen2_5_VLConfig(text_config=_sections(1, 1, 2), vision_config=tower, **_QWEN_TOKENS)


def _qwen3_vl() -> PretrainedConfig:
    tower = {
        **_QWEN_TOWER, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": tiny.HIDDEN,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    return Qwen3VLConfig(
        text_config=_sections(2, 1, 1, mrope_interleaved=True), vision_config=tower, **_QWEN_TOKENS
    )


def _tower(image: int, patch: int) -> dict[str, int]:
    return {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": image, "patch_size": patch,
    }  # fmt: skip


def _smolvlm() -> PretrainedConfig:
    return SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=_tower(8, 2), scale_factor=2,
        image_token_id=token_id("<image>"), tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip


def _gemma3() -> PretrainedConfig:
    return Gemma3Config(
        text_config={**TEXT, "sliding_window": 64}, vision_config=_tower(16, 4), mm_tokens_per_image=4,
        image_token_index=token_id("<image_soft_token>"), boi_token_index=token_id("<start_of_image>"),
        eoi_token_index=token_id("<end_of_image>"),
    )  # fmt: skip


def _llava() -> PretrainedConfig:
    return LlavaConfig(
        vision_config=_CLIP, text_config=LlamaConfig(**TEXT), image_token_id=token_id("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip


def _llava_next() -> PretrainedConfig:
    return LlavaNextConfig(
        vision_config=_CLIP, text_config=LlamaConfig(**TEXT), image_token_id=token_id("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=4,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]], tie_word_embeddings=False,
    )  # fmt: skip


def _qwen_parts(video: str) -> Callable[[], Mapping[str, Any]]:
    size = {"shortest_edge": 64, "longest_edge": 1024}
    values = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    return lambda: {
        "image_processor": transformers.Qwen2VLImageProcessor(**values),
        "video_processor": getattr(transformers, video)(**values),
    }


def _smolvlm_parts() -> Mapping[str, Any]:
    size = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 8}}
    return {
        "image_processor": transformers.SmolVLMImageProcessor(**size, do_image_splitting=True),
        "video_processor": transformers.SmolVLMVideoProcessor(**size, num_frames=2, fps=1),
        "image_seq_len": 4,
    }


def _gemma3_parts() -> Mapping[str, Any]:
    return {
        "image_processor": transformers.Gemma3ImageProcessor(size={"height": 16, "width": 16}),
        "image_seq_length": 4,
    }


def _llava_parts(name: str, **values: Any) -> Callable[[], Mapping[str, Any]]:
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    return lambda: {
        "image_processor": getattr(transformers, name)(**size, **values),
        "patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
    }  # fmt: skip


@dataclass(frozen=True)
class Released:
    """How the models of a family come."""

    config: Callable[[], PretrainedConfig]
    processor: str
    parts: Callable[[], Mapping[str, Any]]
    template: str
    reply: str
    """What the model is to write; `%s` is the answer. A line break follows, which nobody has to write."""
    tokenizer: Mapping[str, Any]


_CHATML_REPLY = "%s<|im_end|>"
_GEMMA_TOKENS = {
    "bos_token": "<|endoftext|>", "eos_token": "<end_of_turn>",
    "extra_special_tokens": {
        "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
    },
}  # fmt: skip
_LLAVA_NEXT_GRID = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
FAMILIES: Mapping[str, Released] = {
    "qwen2_vl": Released(
        _qwen2_vl, "Qwen2VLProcessor", _qwen_parts("Qwen2VLVideoProcessor"), QWEN2_TEMPLATE,
        _CHATML_REPLY, {},
    ),
    "qwen2_5_vl": Released(
        _qwen2_5_vl, "Qwen2_5_VLProcessor", _qwen_parts("Qwen2VLVideoProcessor"), QWEN2_TEMPLATE,
        _CHATML_REPLY, {},
    ),
    "qwen3_vl": Released(
        _qwen3_vl, "Qwen3VLProcessor", _qwen_parts("Qwen3VLVideoProcessor"), QWEN3_TEMPLATE, _CHATML_REPLY, {}
    ),
    "smolvlm": Released(
        _smolvlm, "SmolVLMProcessor", _smolvlm_parts, SMOLVLM_TEMPLATE, " %s<end_of_utterance>",
        {"eos_token": "<end_of_utterance>"},
    ),
    "gemma3": Released(
        _gemma3, "Gemma3Processor", _gemma3_parts, GEMMA_TEMPLATE, "%s<end_of_turn>", _GEMMA_TOKENS
    ),
    "llava": Released(
        _llava, "LlavaProcessor", _llava_parts("CLIPImageProcessor"), LLAVA_TEMPLATE, _CHATML_REPLY, {}
    ),
    "llava_next": Released(
        _llava_next, "LlavaNextProcessor", _llava_parts("LlavaNextImageProcessor", **_LLAVA_NEXT_GRID),
        LLAVA_TEMPLATE, _CHATML_REPLY, {},
    ),
}  # fmt: skip


def build(family: str, directory: Path) -> Path:
    """Write a tiny model of `family` in float32 with its processor into `directory`, and return it."""
    released = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(family.encode()))
        model = AutoModelForImageTextToText.from_config(released.config())
        tiny.fill(model)
    model.to(torch.float32).save_pretrained(directory)
    tokenizer = _tokenizer(**released.tokenizer)
    made: ProcessorMixin = getattr(transformers, released.processor)(
        tokenizer=tokenizer, chat_template=released.template, **released.parts()
    )
    made.save_pretrained(directory)
    return directory
