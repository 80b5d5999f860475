"""Multimodal Gemma 3: the language model is adapted; the vision tower and the projector are left as they are.

In the files the language model has the prefix `language_model.model`, and at run time (transformers 5)
`model.language_model`.
"""

from svdconvert.layouts.base import Layout
from svdconvert.layouts.blocks import gated_decoder

LAYOUT = Layout(
    model_types=frozenset({"gemma3"}),
    roles=gated_decoder("language_model.model"),
    modules=(
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head", "lm_head"),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ),
    summary="Gemma 3 with images; only its language model is decomposed",
)
