"""The names of options in sentences: `eval_rows` for callers from Python is --eval-rows on the command line.

Messages and help texts of the library put the name of an option in backquotes, as its documentation does.
"""

import re
from dataclasses import fields
from functools import cache

from svdconvert.config.chat import ChatOptions
from svdconvert.config.execution import Run
from svdconvert.config.options import PushOptions
from svdconvert.config.recipe import SECTIONS

SPELLINGS = {"side": "--from"}
"""Options that Python does not allow as names, or that are spelled otherwise."""
_OTHERS = ("base", "base_name", "init", "residual", "out", "push", "recipe", "config")
_QUOTED = re.compile(r"`([a-z_]+)`")


def spelled(name: str) -> str:
    """How an option is typed: `eval_rows` as --eval-rows."""
    return SPELLINGS.get(name, f"--{name.replace('_', '-')}")


def as_typed(sentence: str) -> str:
    """The sentence with every option in backquotes as it is typed on the command line."""
    return _QUOTED.sub(lambda found: _typed(found.group(1), found.group(0)), sentence)


def _typed(name: str, otherwise: str) -> str:
    return spelled(name) if name in _options() else otherwise


@cache
def _options() -> frozenset[str]:
    classes = (*SECTIONS.values(), ChatOptions, PushOptions, Run)
    return frozenset(field.name for kind in classes for field in fields(kind)) | frozenset(_OTHERS)
