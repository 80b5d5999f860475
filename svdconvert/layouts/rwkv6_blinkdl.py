"""RWKV-6 as its author publishes it: one .pth file with a flat state dict and no configuration."""

from svdconvert.layouts.base import KnownUnsupported, Layout, LayoutFamily
from svdconvert.models.rwkv6_tensors import BLOCK, GROUPS, NAMES, ROLES, network_path, rename, states

_ATT = "blocks.0.att"

LAYOUT = Layout(
    model_types=frozenset(),
    roles={role: f"{BLOCK}.{role}.weight" for role in ROLES},
    summary="RWKV-6 in BlinkDL's .pth files, which the rwkv package runs",
    signature_tensor=f"{_ATT}.time_maa_w1",
    known_unsupported=(
        KnownUnsupported("an x060a, an experimental variant of RWKV-6", (f"{_ATT}.gate_w1",)),
        KnownUnsupported(
            "an x060b or x060c, an experimental variant of RWKV-6", (f"{_ATT}.time_maa_rkvw_w1",)
        ),
        KnownUnsupported("an RWKV-7", (f"{_ATT}.r_k",)),
        # An RWKV-6 of the web-rwkv layout also has these two, but it has time_mix_w1 as well.
        KnownUnsupported(
            "an RWKV-5", (f"{_ATT}.time_mix_k", f"{_ATT}.ln_x.weight"), (f"{_ATT}.time_mix_w1",)
        ),
        KnownUnsupported("an RWKV-4", (f"{_ATT}.time_mix_k",), (f"{_ATT}.ln_x.weight",)),
    ),
    family=LayoutFamily(
        "rwkv6",
        network_path,
        tuple(rename(name, name) for name in NAMES),
        states=states,
        groups=GROUPS,
        file="model.pth",
        loading='rwkv.model.RWKV("{path}/model.pth", "cpu fp32")',
    ),
)
