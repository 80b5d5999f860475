"""The files that belong to a checkpoint besides its weights: configuration, tokenizer, templates, licence."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.safetensors_files import INDEX
from svdconvert.checkpoint.tensors import ELEMENTS
from svdconvert.errors import CheckpointError
from svdconvert.output.plan import PlannedFile, index_text

CONFIG = "config.json"
WEIGHT_ENDINGS = (
    ".safetensors",
    ".bin",
    ".pth",
    ".pt",
    ".st",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)
_OURS = ("README.md", "svdconvert.json", "metrics.jsonl")
_FOLDERS = ("additional_chat_templates",)
# Widest first. bfloat16 precedes float16, which cannot hold its range.
_FLOATS = ("F64", "F32", "BF16", "F16")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dictionary. Raises CheckpointError if it is missing or not a JSON object."""
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a checkpoint is a directory with weights and {CONFIG}")
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError if it holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}; restore the file") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; restore the file")
    return value


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write config.json."""
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")


def complete_checkpoint(
    source: Path, target: Path, shards: Sequence[PlannedFile], *, exclude: Sequence[str] = ()
) -> None:
    """Add to the `shards` in `target` what makes them a checkpoint: sidecars, index and config.json's dtype.

    Sidecars whose names match a pattern in `exclude` are not copied.
    """
    copy_sidecars(source, target, exclude=exclude)
    set_config_dtype(target, (info.dtype for shard in shards for info in shard.infos))
    if len(shards) > 1:
        (target / INDEX).write_text(index_text(shards), encoding="utf-8")


def copy_sidecars(source: Path, target: Path, *, exclude: Sequence[str] = ()) -> None:
    """Copy the files that a loader may need in addition to the weights; links are followed.

    If the model is a single file, only an RWKV vocabulary in the same directory is copied.
    """
    for path in sorted(source.iterdir() if source.is_dir() else vocabularies(source.parent)):
        if any(fnmatchcase(path.name, pattern) for pattern in exclude):
            continue
        if path.is_file() and path.name not in _OURS:
            if is_sidecar(path, path.parent):
                shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)


def is_sidecar(path: Path, directory: Path) -> bool:
    """True for a file of a model's `directory` that is not hidden and holds no weights."""
    folder = path.relative_to(directory).parent
    here = folder == Path() or folder.parts[0] in _FOLDERS
    return here and not path.name.startswith(".") and not path.name.endswith(WEIGHT_ENDINGS)


def vocabularies(directory: Path) -> list[Path]:
    """The RWKV vocabularies in a directory."""
    return sorted(directory.glob("rwkv_vocab*.txt"))


def set_config_dtype(directory: Path, dtypes: Iterable[str]) -> None:
    """Make config.json name the widest float element type of `dtypes` (safetensors codes).

    transformers loads in that dtype, so float32 residuals would be rounded if it said "bfloat16". The file is
    not rewritten if it names that type already, or if no tensor is of a float type. A model that is a single
    file has no config.json.
    """
    stored = set(dtypes)
    widest = next((code for code in _FLOATS if code in stored), None)
    path = directory / CONFIG
    if not path.exists():
        return
    config = read_json_object(path)
    if widest is None or not _rename_dtype(config, ELEMENTS[widest][1]):
        return
    write_config(directory, config)


def _rename_dtype(config: dict[str, Any], name: str) -> bool:
    """Set the dtype in `config` and in nested model configurations; True if that changed anything."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    changed = [key for key in keys if config[key] != name]
    config.update(dict.fromkeys(changed, name))
    nested = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)]
    inner = [_rename_dtype(value, name) for value in nested if "dtype" in value or "torch_dtype" in value]
    if not keys and "model_type" in config and not any(inner):
        config["dtype"] = name
        return True
    return bool(changed) or any(inner)
