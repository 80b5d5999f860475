"""The command doctor."""

from itertools import groupby

import typer
from rich.text import Text

from svdconvert.cli import summaries
from svdconvert.cli.application import app
from svdconvert.cli.arguments import DebugOpt, JsonOpt
from svdconvert.cli.errors import report_errors
from svdconvert.cli.options import SingleOptions
from svdconvert.cli.terminal import as_json, plain, stdout, wrapped
from svdconvert.hub.auth import scrub

_MARKS = {"ok": "", "note": "note: ", "missing": "MISSING: "}


@app.command(cls=SingleOptions, epilog="Example: svdconvert doctor --json")
def doctor(json: JsonOpt = False, debug: DebugOpt = False) -> None:
    """Describe the installation and this machine for a bug report; status 1 if something is missing."""
    with report_errors(debug=debug):
        from dataclasses import asdict, replace

        from svdconvert.commands.doctor import doctor as command

        facts = [replace(fact, value=scrub(fact.value)) for fact in command()]
        if json:
            as_json(
                {"passed": all(fact.state != "missing" for fact in facts), "facts": [*map(asdict, facts)]}
            )
        else:
            width = max(len(fact.name) for fact in facts) + 2
            for section, members in groupby(facts, lambda fact: fact.section):
                summaries.show(Text(section, style="bold"))
                for fact in members:
                    value = wrapped(_MARKS[fact.state] + plain(fact.value), stdout, width + 2)
                    summaries.show(Text(f"  {fact.name:{width}}{value}"))
        if any(fact.state == "missing" for fact in facts):
            raise typer.Exit(1)
