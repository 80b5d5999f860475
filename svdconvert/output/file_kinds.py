"""What each file of a model's directory is, by its name: one rule for copying, publishing and downloading."""

from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal

from svdconvert.checkpoint.file_names import name_fault
from svdconvert.checkpoint.json_text import read_json

FileKind = Literal["sidecar", "weights", "adapter", "ours", "hidden", "foreign"]
"""`sidecar`: a loader may need it next to the weights. `foreign`: in a folder that belongs to no loader."""

TEMPLATES = "additional_chat_templates"
MODULES = "modules.json"

# In every format that a library writes for itself, and states of training. None of them describes the tensors
# that a command writes.
_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pth", "*.pt", "*.st", "*.gguf", "*.ggml", "*.ckpt", "*.ckpt.*", "*.ckpt-*",
    "*.h5", "*.keras", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data*", "*.onnx.data*", "*.tflite", "*.mlmodel",
    "*.npz", "*.npy", "*.pdparams", "*.pkl", "*.pickle", "*.distcp", "*.nemo", "*.engine",
    "consolidated*", "*.index.json",
)  # fmt: skip
_ADAPTER = ("adapter_config.json", "adapter_model.*", "adapters.safetensors", "adapter.gguf")
# A copy of a journal would replace that of the run that copies.
_OURS = ("README.md", "svdconvert.json", "metrics.jsonl", "journal.jsonl", "journal-*.jsonl", "sent.jsonl")


def file_kind(name: str, folders: Collection[str] = ()) -> FileKind:
    """The kind of the file at `name`, a path with slashes relative to the model's directory.

    `folders` are those of `sidecar_folders`: a loader reads all that they hold, including the weights of a
    sentence encoder's own layers.
    """
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts):
        return "hidden"
    if len(path.parts) > 1:
        return "sidecar" if any(path.is_relative_to(folder) for folder in folders) else "foreign"
    if any(fnmatchcase(path.name, pattern) for pattern in _OURS):
        return "ours"
    if any(fnmatchcase(path.name, pattern) for pattern in _ADAPTER):
        return "adapter"
    return "weights" if is_named_as_weights(path.name) else "sidecar"


def is_named_as_weights(file_name: str) -> bool:
    """True if a file has a name that some library gives to weights, or to an index of them."""
    return any(fnmatchcase(file_name.lower(), pattern) for pattern in _WEIGHTS)


def sidecar_folders(directory: Path) -> list[str]:
    """The folders of a model's directory that a loader reads: templates, and a sentence encoder's modules.

    sentence-transformers lists its modules in modules.json (1_Pooling, 2_Dense). Paths that lead outside the
    directory are left out, and so is a list that is malformed.
    """
    return [TEMPLATES, *_module_folders(directory / MODULES)]


def _module_folders(listing: Path) -> list[str]:
    try:
        modules = read_json(listing)
    except (OSError, ValueError):
        return []
    rows = [row for row in modules if isinstance(row, dict)] if isinstance(modules, list) else []
    paths = [str(PurePosixPath(row["path"])) for row in rows if isinstance(row.get("path"), str)]
    return [path for path in paths if name_fault(path) is None]
