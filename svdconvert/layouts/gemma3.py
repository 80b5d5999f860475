"""Multimodal Gemma 3: its language model is adapted, vision tower and projector leave as they are.

On disk the language model lies below `language_model.model`, at run time (transformers 5) below
`model.language_model`; adapters speak of modules, checkpoints of tensors on disk.
"""

from svdconvert.layouts.base import Layout
from svdconvert.layouts.blocks import gated_decoder

LAYOUT = Layout(
    model_types=frozenset({"gemma3"}),
    roles=gated_decoder("language_model.model"),
    modules=(("language_model.model.", "model.language_model."),),
    summary="Gemma 3 with images; only its language model is decomposed",
)
