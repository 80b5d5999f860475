"""RoBERTa and XLM-RoBERTa, with or without a head."""

from svdconvert.layouts.base import Layout
from svdconvert.layouts.blocks import encoder

LAYOUT = Layout(
    model_types=frozenset({"roberta", "xlm-roberta"}),
    roles=encoder(),
    prefix="roberta.",
    modules=tuple((f"{part}.", f"roberta.{part}.") for part in ("embeddings", "encoder", "pooler")),
    task=None,
    summary="RoBERTa encoders",
)
