"""svdconvert push: a finished directory becomes a repository of the Hub."""

import shlex
from pathlib import Path

from svdconvert.config.options import PushOptions
from svdconvert.config.recipe import COMMAND_OF_KIND, to_cli_args
from svdconvert.manifest.schema import Manifest, Origin
from svdconvert.publish.upload import Destination, Published, check
from svdconvert.publish.upload import push as send


def push(
    directory: str | Path,
    repository: str,
    options: PushOptions | None = None,
    *,
    base: str | None = None,
    residual: str | None = None,
) -> Published:
    """Publish a directory that svdconvert wrote as org/name, with a card; what the Hub has is not sent again.

    `base` and `residual` are the repositories of models that were read from a local directory. Raises
    SvdConvertError with one sentence; the same push can be repeated.
    """
    return send(Path(directory), to(repository, options, base=base, residual=residual))


def check_push(repository: str, options: PushOptions | None = None) -> None:
    """Refuse, before there is a directory, what could not be pushed. Raises HubError with one sentence."""
    check(to(repository, options))


def to(
    repository: str,
    options: PushOptions | None = None,
    *,
    base: str | None = None,
    residual: str | None = None,
) -> Destination:
    """A destination whose card shows the command that made the directory."""
    return Destination(
        repository=repository,
        options=options or PushOptions(),
        base=base,
        residual=residual,
        command=lambda manifest: command_of(manifest, repository),
    )


def command_of(manifest: Manifest, repository: str) -> str:
    """What is typed to make the like, and to push it."""
    section = COMMAND_OF_KIND[manifest.kind]
    options = dict(manifest.options)
    if section == "to_lora" and "truncation" not in options:
        options.pop("rank", None)  # what came out, not what was asked for
    source = {
        "decompose": _name(manifest.base, "MODEL"),
        "convert": _name(manifest.base, "MODEL"),
        "train": _name(manifest.residual or manifest.base, "DECOMPOSED"),
    }.get(section, "TRAINED")
    words = ["svdconvert", section.replace("_", "-"), source, *to_cli_args(section, options)]
    return shlex.join([*words, "-o", repository.split("/")[-1], "--push", repository])


def _name(origin: Origin | None, otherwise: str) -> str:
    if origin is None:
        return otherwise
    return f"{origin.location}@{origin.revision}" if origin.revision else Path(origin.location).name
