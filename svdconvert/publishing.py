"""The options of pushing, for every command that writes a directory."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from svdconvert import console
from svdconvert.artifact.options import PushOptions
from svdconvert.command import Typed, sign, with_options
from svdconvert.ranks import find_ranks

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

    It is pushed after the command has returned: a push that fails loses nothing, and can be repeated alone.
    """

    @functools.wraps(command)
    def call(*, push: str | None, pushing: Typed, **values: Any) -> None:
        wanted = push is not None and not values.get("plan") and values["out"] is not None
        if not wanted or push is None:
            command(**values)
            return
        out, debug, options = Path(values["out"]), bool(values["debug"]), PushOptions(**pushing)
        with console.telling(debug=debug, out=None):
            from svdconvert.verbs.push import check_push
            from svdconvert.verbs.push import push as verb

            leads = find_ranks().leads
            if leads:
                check_push(push, options)
        command(**values)
        with console.telling(debug=debug, out=None):
            if leads:
                console.show_published(out, push, verb(out, push, options))

    own = list(inspect.signature(command).parameters.values())
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = inspect.Parameter("push", keyword, default=None, annotation=PushOpt)
    sign(call, [*own, added, inspect.Parameter("pushing", keyword, annotation=Typed)])
    return with_options(PushOptions, "pushing", "Publishing")(call)
