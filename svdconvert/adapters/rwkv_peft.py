"""RWKV-PEFT's adapter files: one .pth with keys such as `blocks.0.att.key.lora_A`, and without the scale.

A is (R, I) and B is (O, R), as in PEFT, but without `.weight` in their names. The file also contains the time
and norm parameters, which are trained in full. PiSSA's initial factors are in a separate file,
`init_pissa.pth`, as `init_lora_A` and `init_lora_B`; their scale is 1. The scale of a LoRA is alpha / R, and
the file does not store alpha.
Source: github.com/JL-er/RWKV-PEFT, rwkvt/peft and merge/ of June 2025.
"""

import re
from pathlib import Path

from svdconvert.adapters.adapter_config import AdapterConfig
from svdconvert.adapters.extra_parameters import declaration
from svdconvert.adapters.peft_files import Adapter, check_factors, target_modules
from svdconvert.errors import ArtifactError
from svdconvert.manifest.compared import open_compared

ENDING = ".pth"
LAYOUT = "rwkv6-blinkdl"
"""The layout whose names the files use."""
FILE = "rwkv_lora.pth"
"""The name of the file that `to-lora` writes."""
_KEY = re.compile(r"(?P<module>.+)\.(?:init_)?(?P<piece>lora_[AB])")


def file_key(module: str, piece: str) -> str:
    """The name of a module's factor in a file."""
    return f"{module}.{piece}"


def is_adapter_file(path: Path) -> bool:
    """True if `path` is a .pth file, which may be such an adapter."""
    return path.is_file() and path.suffix == ENDING


def open_adapter_file(path: Path, alpha: float | None) -> Adapter:
    """Open a file. `alpha` is the lora_alpha of its training; None is for PiSSA, whose scale is 1.

    Raises ArtifactError if the file has no factors, or only one factor of a module.
    """
    source = open_compared(path)
    modules: dict[str, dict[str, str]] = {}
    extras: dict[str, str] = {}
    for name in source.infos:
        if match := _KEY.fullmatch(name):
            modules.setdefault(match["module"], {})[match["piece"]] = name
        else:
            extras[name] = name
    check_factors(path, source, modules)
    ranks = {module: source.infos[pieces["lora_A"]].shape[0] for module, pieces in modules.items()}
    rank = max(ranks.values())
    if alpha is not None and len({*ranks.values()}) > 1:
        raise ArtifactError(
            f"{path} has factors of several ranks, so one --alpha does not give their scales; "
            "merge it with RWKV-PEFT"
        )
    # Without patterns the scale is the same for every module, regardless of its rank.
    saved, bias = declaration(extras, modules)
    config = AdapterConfig(
        rank=rank,
        alpha=alpha or rank,
        targets=target_modules(modules, []),
        modules_to_save=saved,
        bias=bias,
    )
    return Adapter(path, config, source, modules, extras)
