"""RWKV-6 as the code in the RWKV organisation's repositories on the Hub names it: only the names differ."""

from typing import Any

from svdconvert.checkpoint.tensors import TensorSource
from svdconvert.layouts.base import KnownUnsupported, Layout, LayoutFamily
from svdconvert.models.rwkv6_tensors import (
    BLOCK,
    GROUPS,
    NAMES,
    ROLES,
    STATE,
    Sizes,
    network_path,
    rename,
    states,
)

_RENAMED = (
    ("emb.", "rwkv.embeddings."),
    ("ln_out.", "rwkv.ln_out."),
    (f"{BLOCK}.ln0.", f"rwkv.{BLOCK}.pre_ln."),
    (f"{BLOCK}.att.", f"rwkv.{BLOCK}.attention."),
    (f"{BLOCK}.ffn.", f"rwkv.{BLOCK}.feed_forward."),
    (f"{BLOCK}.", f"rwkv.{BLOCK}."),
    ("head.", "head."),
)
_ATT = "rwkv.blocks.0.attention"


def name(canonical: str) -> str:
    """The layout's name of a tensor of the family."""
    before, after = next(pair for pair in _RENAMED if canonical.startswith(pair[0]))
    return after + canonical[len(before) :]


def config(family: TensorSource) -> dict[str, Any]:
    """config.json as the released models have it."""
    sizes = Sizes.of(family.infos)
    return {
        "architectures": ["Rwkv6ForCausalLM"],
        "attention_hidden_size": sizes.heads * sizes.head_size,
        "auto_map": {
            "AutoConfig": "configuration_rwkv6.Rwkv6Config",
            "AutoModelForCausalLM": "modeling_rwkv6.Rwkv6ForCausalLM",
        },
        "bos_token_id": 0,
        "eos_token_id": 0,
        "head_size": sizes.head_size,
        # The released models' code computes the group norm's epsilon from it: 1e-5 * 8^2.
        "head_size_divisor": 8,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.feed_forward,
        "layer_norm_epsilon": 1e-5,
        "model_type": "rwkv6",
        # In every released model this is the size of a head, not the number of heads.
        "num_attention_heads": sizes.head_size,
        "num_hidden_layers": sizes.layers,
        "rescale_every": 6,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": sizes.vocabulary,
    }


LAYOUT = Layout(
    model_types=frozenset(),
    roles={role: name(f"{BLOCK}.{role}.weight") for role in ROLES},
    summary="RWKV-6 as its code on the Hub names it; llama.cpp converts it",
    signature_tensor=f"{_ATT}.time_maa_w1",
    known_unsupported=(
        KnownUnsupported(
            "an RWKV-5", (f"{_ATT}.time_mix_key", f"{_ATT}.ln_x.weight"), (f"{_ATT}.time_maa_w1",)
        ),
    ),
    family=LayoutFamily(
        "rwkv6",
        network_path,
        tuple(rename(canonical, name(canonical)) for canonical in NAMES if canonical != STATE),
        states=states,
        groups=GROUPS,
        config=config,
        loading='AutoModelForCausalLM.from_pretrained("{path}", trust_remote_code=True)',
        advice="transformers has no RWKV-6: put configuration_rwkv6.py and modeling_rwkv6.py of a "
        "released model next to the weights and load with trust_remote_code=True. That code divides weights "
        "in place when it runs in half precision: do not save a model that ran",
    ),
)
