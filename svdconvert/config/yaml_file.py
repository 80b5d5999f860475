"""YAML that a user gives: small, from a regular file, plain data, and every key once."""

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from svdconvert.checkpoint.regular_file import open_regular
from svdconvert.errors import RecipeError, SvdConvertError, brief

_LARGEST_FILE = 1 << 20
_LONGEST = 300  # characters that are shown of a library's message


def read_yaml(path: Path, option: str) -> Any:
    """The value in the YAML file that `option` names; None for an empty one.

    Raises RecipeError if the file cannot be read, has more than 1 MiB, is no YAML, or has a key twice.
    """
    import yaml  # only if there is a file: the import takes time

    try:
        with open(open_regular(path), "rb") as stream:
            if os.fstat(stream.fileno()).st_size > _LARGEST_FILE:
                raise RecipeError(f"{path} has more than 1 MiB; give {option} a YAML file")
            text = stream.read(_LARGEST_FILE).decode("utf-8")
        _refuse_double_keys(yaml.compose(text, yaml.SafeLoader), path)
        return yaml.safe_load(text)
    except RecipeError:
        raise
    except (OSError, SvdConvertError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{path} cannot be read: {reason}; give {option} a YAML file") from error
    except Exception as error:  # a tag such as !!timestamp raises whatever its text leads to
        reason = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
        raise RecipeError(f"{path} cannot be read as YAML: {reason}") from error


def _refuse_double_keys(root: Any, path: Path) -> None:
    """Raise RecipeError for a key that a mapping has twice: YAML's readers silently take the last one."""
    import yaml

    seen: set[int] = set()
    left = [root]
    while left:
        node = left.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
            continue
        keys: set[Hashable] = set()
        for key, value in node.value:
            left += (key, value)
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                line = key.start_mark.line + 1
                raise RecipeError(f"{path}, line {line}: {brief(key.value)} is there twice; keep one of them")
            if isinstance(key, yaml.ScalarNode):
                keys.add(key.value)
