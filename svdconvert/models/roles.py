"""The role of a matrix, from the path of its module: self_attn.q_proj is attn.q."""

from collections.abc import Mapping

TOWERS = ("vision", "audio")
"""First part of the roles of towers: of what sees or hears for a language model."""
ROUTERS = ("gate", "router", "wg", "switch")
"""Names of the layers that choose experts, in lower case."""
_GROUPS: Mapping[str, str] = {
    **dict.fromkeys(("self_attn", "self_attention", "attention", "selfattention", "attn"), "attn"),
    **dict.fromkeys(("cross_attn", "encoder_attn", "encdecattention", "crossattention"), "cross"),
    **dict.fromkeys(("mlp", "ffn", "feed_forward", "densereludense", "ff"), "mlp"),
    **dict.fromkeys(("layer", "layers", "block", "blocks", "self"), ""),
}
"""Component of a path, in lower case -> part of a role; empty if it says nothing."""
_ENDINGS = ("_proj", "_lin")
_HEARING = ("audio", "speech", "sound")
_SEEING = ("vision", "visual", "vit", "image")


def role_of(path: str) -> str:
    """The role of a linear layer, from its path within its block."""
    parts = [part for part in path.split(".") if not part.isdigit()]
    groups = [_GROUPS.get(part.lower(), part) for part in parts[:-1]]
    return ".".join([*(group for group in groups if group), plain(parts[-1])])


def expert_role(name: str) -> str:
    """The role of an expert's projection or parameter: gate_up_proj is experts.gate_up."""
    return f"experts.{plain(name)}"


def tower_of(path: str, *, is_tower: bool = False) -> str:
    """vision or audio for a path in a tower, else empty; `is_tower` tells that it is one of them."""
    name = path.lower()
    if any(part in name for part in _HEARING):
        return "audio"
    return "vision" if is_tower or any(part in name for part in _SEEING) else ""


def plain(name: str) -> str:
    """The name of a layer without the ending that says that it is a projection."""
    return next((name.removesuffix(end) for end in _ENDINGS if name.endswith(end)), name)
