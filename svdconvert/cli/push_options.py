"""`--push` and its options, for every command that writes a directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdconvert.cli import progress, summaries
from svdconvert.cli.answers import notify
from svdconvert.cli.arguments import option
from svdconvert.cli.option_groups import PUBLISHING
from svdconvert.cli.options import Typed
from svdconvert.cli.wording import spelled
from svdconvert.config.options import PushOptions
from svdconvert.config.ranks import find_ranks
from svdconvert.config.recipe import Recipe
from svdconvert.output.ownership import check_free, refuse_inputs

if TYPE_CHECKING:
    from svdconvert.publish.streaming_upload import StreamingUpload
    from svdconvert.publish.upload import Destination

PushOpt = Annotated[
    str | None,
    option(
        "--push",
        "ORG/NAME",
        "Push the directory to this repository of the Hub when it is finished.",
        PUBLISHING,
    ),
]


@dataclass(frozen=True)
class Output:
    """Where a command writes."""

    directory: Path
    shard_sink: "StreamingUpload | None" = None
    """With --stream --push, the upload that takes finished shards; no directory is kept on disk."""

    @property
    def place(self) -> object:
        """The output's name in a summary."""
        return self.shard_sink or self.directory


@contextmanager
def published(
    out: Path | None, push: str | None, pushing: Typed, recipe: Recipe, *, stream: bool = False
) -> Iterator[Output]:
    """The output of a command; leaving the context pushes it if `push` names a repository.

    Raises OutputError if the recipe is in the output. The repository is checked before any work. The push
    follows when the command is done: if it fails, nothing is lost, and it can be repeated with
    `svdconvert push`.
    """
    if push is None:
        refuse_push_options(push, pushing)
        if out is None:
            raise typer.BadParameter("-o DIR is missing")
        refuse_inputs(out, [recipe.path])
        yield Output(out)
        return
    from svdconvert.publish.upload import Destination, check_destination, upload

    destination = Destination(repository=push, options=PushOptions(**pushing))
    ranks = find_ranks()
    sink = _streaming(destination) if stream else None
    if out is None and sink is None:
        raise typer.BadParameter("-o DIR is missing")
    if ranks.leads:
        with progress.shown("check"):
            check_destination(destination)
    output = Output(out or Path(push.split("/")[-1]), sink)
    refuse_inputs(output.directory, [recipe.path])
    yield output
    if sink is not None:
        assert sink.published is not None, "the upload finishes with the output"
        summaries.show_published(output.directory, push, sink.published, after=True)
    elif ranks.leads:
        with progress.shown("push"):
            done = upload(output.directory, destination, notify)
        summaries.show_published(output.directory, push, done, after=True)


def check_plan(
    out: Path | None, push: str | None, pushing: Typed, recipe: Recipe, *, overwrite: bool
) -> None:
    """With --plan: raise what the command would raise because of `out`, and BadParameter for --push."""
    if push is not None:
        raise typer.BadParameter(
            "--push changes nothing with --plan, which writes nothing; leave one of them out"
        )
    refuse_push_options(push, pushing)
    if out is not None:
        check_free(out, overwrite=overwrite, given=[recipe.path])


def refuse_push_options(push: str | None, pushing: Typed) -> None:
    """Raise BadParameter for options of a push without --push."""
    if push is None and pushing:
        name = spelled(next(iter(pushing)))
        raise typer.BadParameter(f"{name} is an option of --push; add --push ORG/NAME, or leave it out")


def _streaming(destination: "Destination") -> "StreamingUpload":
    from svdconvert.publish.streaming_upload import StreamingUpload

    find_ranks().alone("--stream --push")
    return StreamingUpload(destination, notify)
