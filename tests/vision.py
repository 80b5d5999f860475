"""Tiny models that take images, with their processors, and rows with images to train on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    Gemma3Processor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PretrainedConfig,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2VLProcessor,
    SmolVLMConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests import tiny
from tests.reading import WORDS, tokenizer_of

COLOURS = {"1": (255, 0, 0), "2": (0, 0, 255), "3": (0, 255, 0), "4": (255, 255, 0)}
"""The answer of a row -> the colour of its image."""
SPECIAL = ["<image>", "<video>", "<boi>", "<eoi>", "<fake>", "<global>", "<end>"]
"""Tokens that processors write, after the words."""

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}"
    "{{ part['text'] }}{% endif %} {% endfor %}{% endif %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


class ImageOnlyQwenProcessor(Qwen2VLProcessor):
    """The processor of Qwen-VL without videos, for which transformers needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token = "<image>"
        self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        self.video_token = "<video>"
        self.video_token_id = tokenizer.convert_tokens_to_ids("<video>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


AutoProcessor.register(Qwen2_5_VLConfig, ImageOnlyQwenProcessor, exist_ok=True)


def _id(token: str) -> int:
    return len(WORDS) + SPECIAL.index(token)


def _llava(text: dict[str, Any]) -> PretrainedConfig:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=16,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**text), image_token_id=_id("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=4,
        tie_word_embeddings=False,
    )  # fmt: skip


def _qwen(text: dict[str, Any]) -> PretrainedConfig:
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": tiny.HIDDEN, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    return Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision, image_token_id=_id("<image>"), video_token_id=_id("<video>"),
        vision_start_token_id=_id("<boi>"), vision_end_token_id=_id("<eoi>"), tie_word_embeddings=False,
    )  # fmt: skip


def _smolvlm(text: dict[str, Any]) -> PretrainedConfig:
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 2,
    }  # fmt: skip
    return SmolVLMConfig(
        text_config={"model_type": "llama", **text}, vision_config=vision, scale_factor=2,
        image_token_id=_id("<image>"), tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip


def _gemma(text: dict[str, Any]) -> PretrainedConfig:
    config = tiny.CONFIGS["gemma3"](**text)
    config.image_token_id = config.image_token_index = _id("<image>")
    config.boi_token_index = _id("<boi>")
    config.eoi_token_index = _id("<eoi>")
    return config


def _llava_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        image_processor, tokenizer, patch_size=4, vision_feature_select_strategy="default",
        chat_template=template.replace("IMAGE", "<image>"), num_additional_image_tokens=1,
    )  # fmt: skip


def _qwen_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    return ImageOnlyQwenProcessor(
        image_processor, tokenizer, chat_template=template.replace("IMAGE", "<boi><image><eoi>")
    )


def _smolvlm_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 8}, do_image_splitting=True
    )
    tokenizer.add_special_tokens({"additional_special_tokens": []})
    return Idefics3Processor(
        image_processor, tokenizer, image_seq_len=4, chat_template=template.replace("IMAGE", "<image>")
    )


def _gemma_processor(tokenizer: Any, template: str) -> ProcessorMixin:
    image_processor = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(
        image_processor, tokenizer, chat_template=template.replace("IMAGE", "<boi>"), image_seq_length=4
    )


FAMILIES: dict[str, tuple[Callable[[dict[str, Any]], PretrainedConfig], Callable[[Any, str], ProcessorMixin]]]
FAMILIES = {
    "llava": (_llava, _llava_processor),
    "qwen2_5_vl": (_qwen, _qwen_processor),
    "gemma3": (_gemma, _gemma_processor),
    "smolvlm": (_smolvlm, _smolvlm_processor),
}


def build(family: str, directory: Path, template: str = TEMPLATE) -> Path:
    """Write a tiny model of `family` in float32 with its processor into `directory`, and return it."""
    make_config, make_processor = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(family.encode()))
        model = AutoModelForImageTextToText.from_config(make_config(tiny.TEXT))
        tiny.fill(model)
    model.to(torch.float32).save_pretrained(directory)
    tokenizer = tokenizer_of(
        [*WORDS, *SPECIAL],
        image_token="<image>", end_of_turn_token="<end>", boi_token="<boi>", eoi_token="<eoi>",
        video_token="<video>", fake_image_token="<fake>", global_image_token="<global>",
    )  # fmt: skip
    make_processor(tokenizer, template).save_pretrained(directory)
    return directory


def write_images(folder: Path, size: tuple[int, int] = (12, 8)) -> Path:
    """One image of each colour, named by its answer."""
    folder.mkdir(parents=True, exist_ok=True)
    for answer, colour in COLOURS.items():
        Image.new("RGB", size, colour).save(folder / f"{answer}.png")
    return folder


def write_rows(path: Path, rows: int = 16, **extra: Any) -> Path:
    """Questions whose answers are seen in the images only, as .jsonl next to a folder of the images."""
    write_images(path.parent / "images")
    answers = [str(number % len(COLOURS) + 1) for number in range(rows)]
    lines = [
        {"question": "what is ?", "answer": answer, "images": [f"images/{answer}.png"], **extra}
        for answer in answers
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
