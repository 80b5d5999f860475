"""RWKV-PEFT's adapter files: one .pth, keys `blocks.0.att.key.lora_A`, no word about the scale.

A is (R, I) and B is (O, R), as PEFT has them, without `.weight`. Beside them lie the time and norm
parameters, trained whole. PiSSA's start is a file of its own, `init_pissa.pth`, with `init_lora_A`; its
scale is 1. The scale of a LoRA is alpha / R with an alpha that stands nowhere in the file.
Source: github.com/JL-er/RWKV-PEFT, rwkvt/peft and merge/ of June 2025.
"""

import re
from pathlib import Path

from svdconvert.adapters.adapter_config import AdapterConfig
from svdconvert.adapters.extra_parameters import declaration
from svdconvert.adapters.peft_files import Adapter, check_factors, target_modules
from svdconvert.checkpoint.safetensors_files import open_file
from svdconvert.errors import ArtifactError

ENDING = ".pth"
LAYOUT = "rwkv6-blinkdl"
"""Whose names the files use."""
FILE = "rwkv_lora.pth"
"""What `to-lora` calls such a file."""
_KEY = re.compile(r"(?P<module>.+)\.(?:init_)?(?P<piece>lora_[AB])")


def file_key(module: str, piece: str) -> str:
    """The name of a module's piece in a file."""
    return f"{module}.{piece}"


def is_adapter_file(path: Path) -> bool:
    """True where a file can be of this kind."""
    return path.is_file() and path.suffix == ENDING


def open_adapter_file(path: Path, alpha: float | None) -> Adapter:
    """Open a file; `alpha` is that of the training, None for PiSSA's scale of 1.

    Raises ArtifactError where it holds no factors, or one without the other.
    """
    source = open_file(path)
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
        raise ArtifactError(f"{path} has factors of several ranks, for which one alpha is no scale")
    # Without patterns the scale is the same for every module, whatever its rank.
    saved, bias = declaration(extras, modules)
    config = AdapterConfig(
        rank=rank,
        alpha=alpha or rank,
        targets=target_modules(modules, []),
        modules_to_save=saved,
        bias=bias,
    )
    return Adapter(path, config, source, modules, extras)
