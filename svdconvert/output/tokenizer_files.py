"""An adapter's own tokenizer and chat template, which replace those of its base."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.file_names import refuse_links_outside
from svdconvert.checkpoint.json_text import read_json
from svdconvert.output.file_kinds import TEMPLATES, file_kind

_SETTINGS = "tokenizer_config.json"
# One of these is a complete tokenizer together with its settings.
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece*.model",
    "tekken.json", "*.tiktoken",
)  # fmt: skip
_REST = (_SETTINGS, "special_tokens_map.json", "added_tokens.json", "merges.txt", "bpe.codes")
_CHAT = ("chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*")


def tokenizer_changes(adapter: Path, base: Path) -> list[str]:
    """The files of an adapter's tokenizer and chat template that differ from the base's, or are new.

    Empty if the adapter is a single file, or has no such files.
    """
    return [name for name, path in _own_files(adapter).items() if not _is_same(path, base / name)]


def copy_tokenizer(adapter: Path, target: Path) -> None:
    """Put an adapter's tokenizer and chat template into `target`, in place of those that are there.

    A tokenizer is replaced in full, so that no files of two tokenizers are mixed. If the adapter has no chat
    template, that of `target` stays. Raises CheckpointError for a symbolic link that ends outside `adapter`.
    """
    own = _own_files(adapter)
    if not tokenizer_changes(adapter, target):
        return
    refuse_links_outside(own.values(), adapter)
    template = _settings(target).get("chat_template")
    brings_template = any(_matches(name, _CHAT) for name in own) or "chat_template" in _settings(adapter)
    is_complete = any(_matches(name, _VOCABULARIES) for name in own)
    for name, path in _own_files(target).items():
        if brings_template if _matches(name, _CHAT) else is_complete:
            path.unlink()
    for name, path in own.items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
    settings = _settings(target)
    if template is not None and not brings_template and "chat_template" not in settings:
        text = json.dumps({**settings, "chat_template": template}, indent=2, ensure_ascii=False) + "\n"
        (target / _SETTINGS).write_bytes(text.encode("utf-8", "backslashreplace"))


def copy_one_tokenizer(adapters: Sequence[Path], target: Path) -> None:
    """Put the tokenizer of the first of several adapters that brings one into `target`."""
    owners = [adapter for adapter in adapters if tokenizer_changes(adapter, target)]
    if owners:
        copy_tokenizer(owners[0], target)


def other_tokenizers(adapters: Sequence[Path]) -> Iterator[str]:
    """A sentence if several adapters bring different tokenizers or chat templates, of which one is kept."""
    owners = [adapter for adapter in adapters if _own_files(adapter)]
    for other in owners[1:]:
        if names := tokenizer_changes(other, owners[0]):
            yield (
                f"the tokenizer of {owners[0]} is kept, and that of {other} is another ({', '.join(names)}): "
                "text that is written for the second may be read otherwise"
            )
            return


def _own_files(directory: Path) -> dict[str, Path]:
    """Path relative to the directory -> path, of the files of its tokenizer and chat templates."""
    if not directory.is_dir():
        return {}
    paths = [path for path in (*directory.glob("*"), *directory.glob(f"{TEMPLATES}/*")) if path.is_file()]
    names = {path.relative_to(directory).as_posix(): path for path in sorted(paths)}
    return {
        name: path
        for name, path in names.items()
        if _matches(name, (*_VOCABULARIES, *_REST, *_CHAT)) and file_kind(name, [TEMPLATES]) == "sidecar"
    }


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _settings(directory: Path) -> Mapping[str, Any]:
    """tokenizer_config.json; empty if there is none or it is no JSON object."""
    try:
        value = read_json(directory / _SETTINGS)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
