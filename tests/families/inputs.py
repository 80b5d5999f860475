"""What a tiny model is called with: tokens, and what else its family cannot do without."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.families.shrink import VOCABULARY

TOKENS = 3 + torch.arange(24).reshape(2, 12) % (VOCABULARY // 2)
IMAGE_SIZE = 16
QUERIES = 4
"""Tokens of an image behind a Q-Former."""


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """The arguments of a call: fixed tokens, and images for models that refuse to see none."""
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = network.config
    parameters = inspect.signature(network.forward).parameters
    inputs: dict[str, Any] = {"input_ids": TOKENS, "use_cache": False}
    if getattr(config, "is_encoder_decoder", False) or network.main_input_name == "pixel_values":
        inputs["decoder_input_ids"] = TOKENS
    inputs |= _ALSO.get(config.model_type, dict)()
    return {name: value for name, value in inputs.items() if name in parameters or "kwargs" in parameters}


def _images() -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * IMAGE_SIZE**2).reshape(2, 3, IMAGE_SIZE, IMAGE_SIZE).sin()


def _images_alone() -> dict[str, Any]:
    return {"pixel_values": _images()}


def _behind_queries() -> dict[str, Any]:
    """Images whose features replace the first tokens; the Q-Former reads the tokens too."""
    places = TOKENS.clone()
    places[:, :QUERIES] = VOCABULARY - 1
    return {"input_ids": places, "pixel_values": _images(), "qformer_input_ids": TOKENS}


def _frames_behind_queries() -> dict[str, Any]:
    return _behind_queries() | {"pixel_values": _images()[:, None]}


def _kosmos() -> dict[str, Any]:
    mask = torch.zeros_like(TOKENS)
    mask[:, 1 : 1 + QUERIES] = 1
    return {"pixel_values": _images(), "image_embeds_position_mask": mask}


def _idefics() -> dict[str, Any]:
    mask = torch.ones(*TOKENS.shape, 1, dtype=torch.long)
    return {"pixel_values": _images()[:, None], "image_attention_mask": mask}


def _patches() -> dict[str, Any]:
    """Flattened patches, each after its row and column."""
    places = torch.cartesian_prod(torch.arange(1, 3), torch.arange(1, 3)).float().expand(2, -1, -1)
    patches = torch.linspace(-1, 1, 2 * 4 * 192).reshape(2, 4, 192).sin()
    return {"flattened_patches": torch.cat([places, patches], dim=2), "attention_mask": torch.ones(2, 4)}


def _boxes() -> dict[str, Any]:
    corners = torch.linspace(0, 0.4, 48).reshape(2, 12, 2)
    return {"bbox": torch.cat([corners, corners + 0.5], dim=2)}


_ALSO: Mapping[str, Any] = {
    **dict.fromkeys(("blip", "vision-encoder-decoder", "pp_formulanet"), _images_alone),
    **dict.fromkeys(("blip-2", "instructblip"), _behind_queries),
    "instructblipvideo": _frames_behind_queries,
    "kosmos-2": _kosmos,
    "idefics": _idefics,
    "pix2struct": _patches,
    "udop": _boxes,
}
