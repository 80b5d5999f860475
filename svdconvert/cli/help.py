"""How `--help` looks: options in groups, each with its spelling and one sentence, in at most 100 columns.

Plain lines instead of boxes, so that 80 columns are enough and a line can be copied.
"""

import shutil
from textwrap import wrap
from typing import Any

import typer

from svdconvert.cli.option_groups import GENERAL, ORDER, OTHERS

_WIDEST = 100
_NARROWEST = 40
_COLUMN = 28  # at which the sentences start; a longer spelling has its sentence on the next lines


def examples(*commands: str) -> str:
    """The epilog of a command: command lines to copy, which must fit into 80 columns."""
    return "\n".join(commands)


def format_help(command: Any, context: Any, formatter: Any) -> None:
    """Write the help of a command, or of the program with its commands, into Click's `formatter`."""
    width = _width()
    formatter.write(_usage(command, context).replace("Usage:", _bold("Usage:"), 1) + "\n")
    for paragraph in (command.help or "").split("\n\n"):
        formatter.write("\n" + _wrapped(" ".join(paragraph.split()), width, 2) + "\n")
    for title, rows in _sections(command, context).items():
        formatter.write(f"\n{_bold(title)}\n")
        for spelling, sentence in rows:
            formatter.write(_row(spelling, sentence, width) + "\n")
    if lines := [line.removeprefix("Example: ").strip() for line in (command.epilog or "").splitlines()]:
        formatter.write(f"\n{_bold('Example' if len(lines) == 1 else 'Examples')}\n")
        formatter.write("".join(f"  {line}\n" for line in lines if line) + "\n")


def format_usage(command: Any, context: Any, formatter: Any) -> None:
    """Write the line that a usage error begins with."""
    formatter.write(_usage(command, context) + "\n")


def _width() -> int:
    return max(_NARROWEST, min(shutil.get_terminal_size().columns, _WIDEST))


def _usage(command: Any, context: Any) -> str:
    arguments = [_value(part) for part in _parameters(command, context, "argument")]
    output = [f"-o {_value(part)}" for part in command.params if "--out" in part.opts]
    words = [*arguments, *output, "[OPTIONS]"]
    if getattr(command, "commands", None):
        words = ["COMMAND", "..."]
    words = ["Usage:", context.command_path, *words]
    return "\n    ".join(wrap(" ".join(words), _width() - 4, break_long_words=False, break_on_hyphens=False))


def _sections(command: Any, context: Any) -> dict[str, list[tuple[str, str]]]:
    """Title -> (spelling, sentence) rows, in the order in which they are shown."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            title = getattr(inner, "rich_help_panel", None)
            title = title if isinstance(title, str) else "Commands"
            sections.setdefault(title, []).append((name, (inner.help or "").split("\n")[0]))
    for part in _parameters(command, context, "argument"):
        sections.setdefault("Arguments", []).append((_value(part), part.help or ""))
    groups: dict[str, list[tuple[str, str]]] = {}
    for part in _parameters(command, context, "option"):
        title = GENERAL if part.name == "help" else getattr(part, "rich_help_panel", None) or OTHERS
        groups.setdefault(title, []).append((_spelling(part), part.help or ""))
    known = [title for title in ORDER if title in groups]
    for title in [*known, *(title for title in groups if title not in ORDER)]:
        sections[title] = groups[title]
    return sections


def _parameters(command: Any, context: Any, kind: str) -> list[Any]:
    every = command.get_params(context)
    return [part for part in every if part.param_type_name == kind and not getattr(part, "hidden", False)]


def _spelling(option: Any) -> str:
    """Such as `-o, --out DIR` or `--[no-]packing`."""
    if option.secondary_opts:
        return f"--[no-]{option.opts[-1].removeprefix('--')}"
    names = ", ".join(sorted(option.opts, key=len))
    return names if option.is_flag or option.count else f"{names} {_value(option)}"


def _value(parameter: Any) -> str:
    """What the value of an argument or option is called."""
    return str(parameter.metavar or parameter.name.upper())


def _row(spelling: str, sentence: str, width: int) -> str:
    lines = _lines(sentence, width, _COLUMN)
    first = f"  {_bold(spelling)}"
    if len(spelling) > _COLUMN - 4 or not lines:
        return "\n".join([first, *lines])
    return "\n".join([first + " " * (_COLUMN - 2 - len(spelling)) + lines[0].lstrip(), *lines[1:]])


def _wrapped(text: str, width: int, indent: int) -> str:
    return "\n".join(_lines(text, width, indent))


def _lines(text: str, width: int, indent: int) -> list[str]:
    """Lines broken between words only."""
    margin = " " * indent
    return wrap(
        text,
        width,
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _bold(text: str) -> str:
    return typer.style(text, bold=True)
