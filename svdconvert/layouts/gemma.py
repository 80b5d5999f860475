"""Gemma 1, 2 and the text-only Gemma 3; their extra norms are left as they are."""

from svdconvert.layouts.base import Layout
from svdconvert.layouts.blocks import gated_decoder

LAYOUT = Layout(
    model_types=frozenset({"gemma", "gemma2", "gemma3_text"}),
    roles=gated_decoder(),
    prefix="model.",
    summary="Gemma 1, Gemma 2, Gemma 3 text models",
)
