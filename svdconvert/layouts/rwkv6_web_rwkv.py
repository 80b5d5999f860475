"""RWKV-6 as web-rwkv, Ai00 and RWKV-Runner read it: a .st file, which is a single safetensors file.

BlinkDL's names, except time_first and time_mix; tensors that are multiplied from the left are transposed.
Source: github.com/cryscan/web-rwkv, assets/scripts/convert_safetensors.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from svdconvert.checkpoint.rename_rules import RenameRule
from svdconvert.layouts.base import Layout, LayoutFamily
from svdconvert.models.rwkv6_tensors import BLOCK, GROUPS, NAMES, ROLES, network_path, rename, states

if TYPE_CHECKING:
    from torch import Tensor

_TRANSPOSED = ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2", "time_state")


def _rule(canonical: str) -> RenameRule:
    plain = rename(canonical, canonical.replace("time_faaaa", "time_first").replace("time_maa", "time_mix"))
    if not canonical.endswith(_TRANSPOSED):
        return plain
    return replace(plain, to_layout=lambda tensors: tensors[0].mT, to_canonical=_transposed)


def _transposed(tensor: "Tensor") -> "Sequence[Tensor]":
    return [tensor.mT]


LAYOUT = Layout(
    model_types=frozenset(),
    roles={role: f"{BLOCK}.{role}.weight" for role in ROLES},
    summary="RWKV-6 in the .st files of web-rwkv, Ai00 and RWKV-Runner",
    signature_tensor="blocks.0.att.time_mix_w1",
    family=LayoutFamily(
        "rwkv6",
        network_path,
        tuple(map(_rule, NAMES)),
        states=states,
        groups=GROUPS,
        file="model.st",
        advice="its readers need float16: add --dtype float16 if the source has another element type",
    ),
)
