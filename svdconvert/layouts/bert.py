"""BERT, with or without a head; MiniLM and sentence encoders based on it have the same names."""

from svdconvert.layouts.base import Layout
from svdconvert.layouts.blocks import encoder

LAYOUT = Layout(
    model_types=frozenset({"bert"}),
    roles=encoder(),
    # A checkpoint of the body alone lacks the prefix that a model with a head has at run time.
    prefix="bert.",
    modules=tuple((f"{part}.", f"bert.{part}.") for part in ("embeddings", "encoder", "pooler")),
    task=None,
    summary="BERT encoders, MiniLM",
)
