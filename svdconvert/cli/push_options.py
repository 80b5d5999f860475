"""The options of pushing, for every command that writes a directory."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from svdconvert.cli import summaries
from svdconvert.cli.options import Typed, sign, with_options
from svdconvert.config.options import PushOptions
from svdconvert.config.ranks import find_ranks

PushOpt = Annotated[
    str | None,
    typer.Option(
        "--push",
        metavar="ORG/NAME",
        help="Push the directory to this repository of the Hub when it is finished.",
        rich_help_panel="Publishing",
    ),
]


def publishes(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that writes `out` the option to push it.

    It is pushed after the command has returned: a push that fails loses nothing, and can be repeated
    alone. With --stream the command gets a `shard_sink` instead, and leaves nothing on the disk.
    """

    @functools.wraps(command)
    def call(*, push: str | None, pushing: Typed, **values: Any) -> None:
        if push is None and pushing:
            option = f"--{next(iter(pushing)).replace('_', '-')}"
            raise typer.BadParameter(f"{option} is for pushing; say where to with --push ORG/NAME")
        if push is None or values.get("plan"):
            command(**values)
            return
        debug, options, streaming = bool(values["debug"]), PushOptions(**pushing), values.get("stream")
        with summaries.report_errors(debug=debug, out=None):
            from svdconvert.commands.push import check_push, to
            from svdconvert.commands.push import push as verb
            from svdconvert.publish.streaming_upload import StreamingUpload

            ranks = find_ranks()
            if streaming:
                ranks.alone("--stream --push")
                values["out"] = values["out"] or Path(push.split("/")[-1])
                values["shard_sink"] = StreamingUpload(to(push, options), summaries.notify)
            if ranks.leads:
                check_push(push, options)
        command(**values)
        with summaries.report_errors(debug=debug, out=None):
            if streaming:
                summaries.show_published(values["out"], push, values["shard_sink"].published)
            elif ranks.leads and values["out"] is not None:
                summaries.show_published(values["out"], push, verb(values["out"], push, options))

    own = [value for name, value in inspect.signature(command).parameters.items() if name != "shard_sink"]
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = inspect.Parameter("push", keyword, default=None, annotation=PushOpt)
    sign(call, [*own, added, inspect.Parameter("pushing", keyword, annotation=Typed)])
    return with_options(PushOptions, "pushing", "Publishing")(call)
