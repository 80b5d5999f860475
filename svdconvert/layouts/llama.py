"""Llama and Mistral."""

from svdconvert.layouts.base import Layout
from svdconvert.layouts.blocks import gated_decoder

LAYOUT = Layout(
    model_types=frozenset({"llama", "mistral"}),
    roles=gated_decoder(),
    prefix="model.",
    summary="Llama 1-3, Mistral, SmolLM2 and others with the same names",
)
