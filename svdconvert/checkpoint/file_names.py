"""Which names of files are accepted from a manifest, an index or the Hub, and which links are followed.

Such names come from files that anybody may have written, and what they name is read, copied and uploaded.
They must stay inside the directory of the model, and must not reach a file that is kept private in it.
"""

import unicodedata
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from svdconvert.errors import CheckpointError

_TENSORS = (".safetensors", ".bin", ".pth", ".pt", ".st")
_OTHERS = ("*.json", "*.jsonl", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.md", "*.vocab")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
_LONGEST = 255  # bytes of a file's name
_LONGEST_PATH = 1024  # bytes of a file's path below the model's directory
_HIDDEN_KINDS = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, surrogate, separators of lines


def name_fault(name: str) -> str | None:
    """What is wrong with a relative name that is not to leave its directory; None for a plain one."""
    parts = name.split("/")
    if not name or any(part in ("", ".") for part in parts[1:]):
        return "is no plain name"
    if parts[0] == "" or parts[0].endswith(":"):
        return "is an absolute path"
    if ".." in parts:
        return "leaves the directory"
    if any(part.startswith(".") for part in parts):
        return "is hidden"
    if "\\" in name or any(unicodedata.category(letter) in _HIDDEN_KINDS for letter in name):
        return "holds a backslash or a control character"
    if any(len(part.encode()) > _LONGEST for part in parts):
        return f"is longer than {_LONGEST} bytes"
    if len(name.encode()) > _LONGEST_PATH:
        return f"is longer than {_LONGEST_PATH} bytes"
    return None


def shared_name(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two names that are one file on disks which ignore case, or how a letter is composed.

    None if there are none. The disks of macOS and Windows usually do.
    """
    known: dict[str, str] = {}
    for name in names:
        folded = unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
        if folded in known:
            return known[folded], name
        known[folded] = name
    return None


def is_weights(name: str) -> bool:
    """True for the name of a file of a kind that holds tensors."""
    return name.endswith(_TENSORS)


def is_known_kind(name: str) -> bool:
    """True for the name of a file with tensors, a configuration, a tokenizer, code, a text or a licence."""
    file = name.rpartition("/")[2]
    return (
        is_weights(file)
        or file.endswith(".gguf")
        or any(fnmatchcase(file, pattern) for pattern in (*_OTHERS, *_LICENCES))
    )


def leads_outside(path: Path, directory: Path) -> bool:
    """True if `path`, followed through symbolic links, ends outside the model's `directory`.

    In a snapshot of the Hub's cache, links into the `blobs` of the same repository are inside.
    """
    try:
        root = directory.resolve(strict=True)
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a link to itself, or to nothing
        return True
    if target.is_relative_to(root):
        return False
    for parent in (root, *root.parents):
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return not target.is_relative_to(parent.parent / "blobs")
    return True


def refuse_links_outside(paths: Iterable[Path], directory: Path) -> None:
    """Raise CheckpointError if one of the `paths` is not in `directory` when links are followed."""
    for path in paths:
        if leads_outside(path, directory):
            raise CheckpointError(
                f"{path} is reached through a symbolic link that ends outside {directory}, and would be "
                "copied with the model; replace the link by the file, or remove it"
            )
