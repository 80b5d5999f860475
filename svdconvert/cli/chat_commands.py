"""The command chat: a conversation on a terminal, or one answer for a script."""

import sys
from typing import Annotated

import typer

from svdconvert.cli import progress
from svdconvert.cli.application import app
from svdconvert.cli.arguments import (
    BaseOpt,
    DebugOpt,
    DeviceOpt,
    ResidualOpt,
    ThreadsOpt,
    TrustOpt,
    run_settings,
)
from svdconvert.cli.errors import report_errors
from svdconvert.cli.options import SingleOptions, Typed, with_options
from svdconvert.cli.talking import answer_once, talk
from svdconvert.config.chat import ChatOptions, chat_options
from svdconvert.config.recipe import Recipe


@app.command(cls=SingleOptions, epilog='Example: svdconvert chat trained --prompt "What is 7 * 8?"')
@with_options(ChatOptions, panel="Answers")
def chat(
    typed: Typed,
    model: Annotated[
        str, typer.Argument(metavar="DIR|MODEL", help="Any directory or adapter, or org/name[@revision].")
    ],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Print the answer to this and end; without a terminal it is read."),
    ] = None,
    base: BaseOpt = None,
    residual: ResidualOpt = None,
    threads: ThreadsOpt = None,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Talk to a model, or to an adapter together with the weights that it belongs to."""
    with report_errors(debug=debug, out=None):
        from svdconvert.commands.chat import start_chat as command

        chosen = chat_options(typed)
        with progress.shown("chat") as track:
            run = run_settings(
                Recipe(), track, threads=threads, device=device, trust_remote_code=trust_remote_code
            )
            conversation = command(model, chosen, run, base=base, residual=residual)
        if prompt is None and sys.stdin is not None and sys.stdin.isatty():
            talk(conversation, model)
        else:
            answer_once(conversation, prompt)
