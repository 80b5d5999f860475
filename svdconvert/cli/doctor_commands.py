"""The command doctor."""

from itertools import groupby

import typer
from rich.text import Text

from svdconvert.cli import summaries
from svdconvert.cli.answers import tell
from svdconvert.cli.application import app
from svdconvert.cli.arguments import DebugOpt, JsonOpt
from svdconvert.cli.errors import report_errors
from svdconvert.cli.help import examples
from svdconvert.cli.options import SingleOptions
from svdconvert.cli.terminal import plain, stdout, wrapped
from svdconvert.hub.auth import scrub

_MARKS = {"ok": "", "note": "note: ", "missing": "MISSING: "}


@app.command(cls=SingleOptions, epilog=examples("svdconvert doctor --json"))
def doctor(json: JsonOpt = False, debug: DebugOpt = False) -> None:
    """Describe the installation and this machine for a bug report; status 1 if something is missing."""
    with report_errors(debug=debug, json=json):
        from dataclasses import asdict, replace

        from svdconvert.commands.doctor import doctor as command

        facts = [replace(fact, value=scrub(fact.value)) for fact in command()]
        passed = all(fact.state != "missing" for fact in facts)
        tell({"passed": passed, "facts": [asdict(fact) for fact in facts]})
        width = max(len(fact.name) for fact in facts) + 2
        for section, members in groupby(facts, lambda fact: fact.section):
            summaries.show(Text(section, style="bold"))
            for fact in members:
                value = wrapped(_MARKS[fact.state] + plain(fact.value), stdout, width + 2)
                summaries.show(Text(f"  {fact.name:{width}}{value}"))
        if not passed:
            raise typer.Exit(1)
