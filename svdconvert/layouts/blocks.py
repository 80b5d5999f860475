"""Tables from roles to tensor names for the blocks that many families share."""


def attention(prefix: str = "model") -> dict[str, str]:
    """Self-attention as Llama names it."""
    layer = f"{prefix}.layers.{{layer}}"
    return {f"attn.{part}": f"{layer}.self_attn.{part}_proj.weight" for part in ("q", "k", "v", "o")}


def gated_decoder(prefix: str = "model") -> dict[str, str]:
    """A decoder with a gated feed-forward block as Llama names it."""
    layer = f"{prefix}.layers.{{layer}}"
    feed_forward = {f"mlp.{part}": f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    return attention(prefix) | feed_forward


def encoder() -> dict[str, str]:
    """An encoder as BERT names it."""
    layer = "encoder.layer.{layer}"
    return {
        "attn.q": f"{layer}.attention.self.query.weight",
        "attn.k": f"{layer}.attention.self.key.weight",
        "attn.v": f"{layer}.attention.self.value.weight",
        "attn.o": f"{layer}.attention.output.dense.weight",
        "mlp.up": f"{layer}.intermediate.dense.weight",
        "mlp.down": f"{layer}.output.dense.weight",
    }
