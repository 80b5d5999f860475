"""The errors that a user can correct, as one tree.

SvdConvertError            one sentence: what is wrong, where, and what to do
├── CheckpointError        a file is missing, damaged or not a checkpoint, or the Hub does not answer
│   └── ModelNotFoundError there is no such path, repository, revision or file
├── TargetError            a target matches nothing, or a matrix cannot be decomposed
├── RecipeError            an option or recipe key is unknown, missing or ill-typed
│   └── MissingOptionError an option without a default is not given
├── UnknownNameError       no method or layout of that name
├── PluginError            a method or layout of another package cannot be loaded
├── OutputError            the output directory exists already, or cannot be written
├── ArtifactError          a directory of the wrong kind, incomplete, or for another base
│   └── ChangedError       a file differs from the svdconvert.json that lists it
├── HubError               the Hub refuses an upload, or is out of reach during one
├── DataError              training data that cannot be used
├── SandboxError           generated code cannot be confined, or must not be run
└── MissingPackageError    an optional package is not installed

Faults of the program itself are assertions, which are never caught.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import Repr

_REPR = Repr()
_REPR.maxlevel = 2
_REPR.maxstring = 60
_REPR.maxother = 60


class SvdConvertError(Exception):
    """Base of every error that the command line prints as one sentence."""


class CheckpointError(SvdConvertError):
    """A file is missing, damaged or not a checkpoint, or the Hub does not answer."""


class ModelNotFoundError(CheckpointError):
    """There is no such path, repository, revision or file.

    Raised for absence only: for a damaged model, a Hub that does not answer and a gated repository a plain
    CheckpointError is raised.
    """


class TargetError(SvdConvertError):
    """A target matches nothing, or a matrix cannot be decomposed."""


class RecipeError(SvdConvertError):
    """An option or recipe key is unknown, missing or ill-typed."""


class MissingOptionError(RecipeError):
    """An option that has no default is given neither directly nor by a recipe."""


class UnknownNameError(SvdConvertError):
    """No method or layout has that name."""


class PluginError(SvdConvertError):
    """A method or layout of another package cannot be loaded."""


class OutputError(SvdConvertError):
    """The output directory exists already, or cannot be written."""


class ArtifactError(SvdConvertError):
    """A directory is of the wrong kind, incomplete, or belongs to another base."""


class ChangedError(ArtifactError):
    """A file differs from the svdconvert.json that lists it."""


class HubError(SvdConvertError):
    """The Hub refuses an upload, or is out of reach during one."""


class DataError(SvdConvertError):
    """Training data that cannot be used."""


class SandboxError(SvdConvertError):
    """Generated code cannot be confined on this system, or must not be run without consent."""


class MissingPackageError(SvdConvertError):
    """An optional package is not installed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown `word`: `known: a, b, c; did you mean b?`."""
    names = sorted(known)
    nearest = get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"known: {', '.join(names)}{hint}"


def brief(value: object) -> str:
    """repr(value), shortened: a value may be of any size, and may contain a part of it thousands of times."""
    try:
        return _REPR.repr(value)
    except ValueError:  # an integer with too many digits
        return f"a very large {type(value).__name__}"
