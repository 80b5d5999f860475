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
    JsonOpt,
    ResidualOpt,
    ThreadsOpt,
    TrustOpt,
    option,
    run_settings,
)
from svdconvert.cli.errors import report_errors
from svdconvert.cli.help import examples
from svdconvert.cli.option_groups import ANSWERS
from svdconvert.cli.options import SingleOptions, Typed, with_options
from svdconvert.cli.talking import answer_once, talk
from svdconvert.config.chat import ChatOptions, chat_options
from svdconvert.config.recipe import Recipe


@app.command(
    cls=SingleOptions,
    epilog=examples(
        "svdconvert chat trained",
        'svdconvert chat trained --prompt "What is 7 * 8?" --max-new-tokens 64',
        "svdconvert chat org/name --temperature 0.7 --top-p 0.9 --seed 1",
    ),
)
@with_options(ChatOptions)
def chat(
    typed: Typed,
    model: Annotated[
        str, typer.Argument(metavar="DIR|MODEL", help="Any directory or adapter, or org/name[@revision].")
    ],
    prompt: Annotated[
        str | None,
        option(
            "--prompt",
            "TEXT",
            "Print the answer to this and end; without it and a terminal, standard input is the prompt.",
            ANSWERS,
        ),
    ] = None,
    base: BaseOpt = None,
    residual: ResidualOpt = None,
    threads: ThreadsOpt = None,
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    json: JsonOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Talk to a model, or to an adapter together with the weights that it belongs to."""
    with report_errors(debug=debug, json=json):
        from svdconvert.commands.chat import start_chat as command

        chosen = chat_options(typed)
        typing = prompt is None and sys.stdin is not None and sys.stdin.isatty()
        if typing and json:
            raise typer.BadParameter("--json is for one answer; add --prompt TEXT, or leave it out")
        with progress.shown("chat") as track:
            run = run_settings(
                Recipe(), track, threads=threads, device=device, trust_remote_code=trust_remote_code
            )
            conversation = command(model, chosen, run, base=base, residual=residual)
        talk(conversation, model) if typing else answer_once(conversation, prompt)
