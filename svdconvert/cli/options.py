"""Makes a command's options from the fields of its options class, so that each is defined only once."""

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand, TyperGroup

from svdconvert.cli.answers import print_failure
from svdconvert.cli.help import format_help, format_usage
from svdconvert.cli.option_groups import METAVARS, RESULT, headings
from svdconvert.cli.terminal import plain, stderr, wrapped
from svdconvert.cli.wording import as_typed, spelled
from svdconvert.config.train import REPEATED

# Typer does not export its UsageError, the class above this one.
_USAGE_ERRORS = cast(tuple[type[Exception], ...], typer.BadParameter.__bases__)
Typed = Mapping[str, Any]
"""The options on the command line: name -> value, only those that were given."""


class Commands(TyperGroup):
    """The commands, whose usage errors repeat what was typed without its control characters.

    With --json among the words, a usage error is a document on standard output too.
    """

    def make_context(self, info_name: Any, args: list[str], *others: Any, **named: Any) -> Any:
        """As usual, with errors that are safe to print."""
        self._json = "--json" in args
        with self._plain_usage_errors():
            return super().make_context(info_name, args, *others, **named)

    def invoke(self, ctx: Any) -> Any:
        """As usual, with errors that are safe to print."""
        with self._plain_usage_errors():
            return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help of the program: its commands."""
        format_help(self, ctx, formatter)

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """The first line of a usage error."""
        format_usage(self, ctx, formatter)

    @contextmanager
    def _plain_usage_errors(self) -> Iterator[None]:
        try:
            yield
        except _USAGE_ERRORS as error:
            if isinstance(message := getattr(error, "message", None), str):
                vars(error)["message"] = plain(as_typed(_without_internals(message)))
            usage = cast(Any, error)
            whole = usage.format_message()
            if self._json:
                print_failure(whole, 2)
            raise _USAGE_ERRORS[0](wrapped(f"Error: {whole}", stderr)[len("Error: ") :], usage.ctx) from None


_CHOICES = re.compile(r"'([^']*)' is not one of ((?:'[^']*'(?:, )?)+)\.?$")


def _without_internals(message: str) -> str:
    """Typer's message without pydantic's prefix, and with the choice that was probably meant."""
    message = message.replace("Value error, ", "", 1)
    found = _CHOICES.search(message)
    if found is None:
        return message
    names = re.findall(r"'([^']*)'", found[2])
    nearest = get_close_matches(found[1], names, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{message[: found.start()]}{found[1]!r} is not one of {', '.join(names)}{hint}"


class SingleOptions(TyperCommand):
    """A command that refuses an option that is given twice, of which only the last would count."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as usual. Raises BadParameter for a repeated option."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        counts = Counter(parameter for parameter in order if parameter.param_type_name == "option")
        for parameter, count in counts.items():
            if count > 1 and not getattr(parameter, "multiple", False):
                raise typer.BadParameter(f"{parameter.opts[-1]} is given {count} times; give it once")
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """The first line of a usage error."""
        format_usage(self, ctx, formatter)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help of the command: its options in groups."""
        format_help(self, ctx, formatter)


def with_options(
    kind: type, into: str = "typed", panel: str = RESULT, only: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add one option per field of `kind` to a command, which gets the given ones as its argument `into`.

    The headings are those of option_groups.py, and `panel` for fields that have none there. With `only`,
    there are options for these fields alone, and all of them under `panel`.
    """
    described: Mapping[str, FieldInfo] = kind.__pydantic_fields__  # type: ignore[attr-defined]
    known = {} if only else headings(kind)
    described = {name: described[name] for name in only or described}
    order = [
        *(name for name in known if name in described),
        *(name for name in described if name not in known),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command).parameters.values()
        added = [_parameter(name, described[name], known.get(name, panel)) for name in order]

        @functools.wraps(command)
        def call(**values: Any) -> None:
            typed = {name: values.pop(name) for name in described}
            given = {name: value for name, value in typed.items() if value not in (None, [])}
            command(**values, **{into: given})

        sign(call, [*(parameter for parameter in own if parameter.name != into), *added])
        return call

    return decorate


def sign(call: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """Set the signature from which Typer makes the parameters of a command."""
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    call.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _parameter(name: str, info: FieldInfo, panel: str) -> inspect.Parameter:
    spelling = spelled(name)
    if info.annotation is bool:
        spelling = f"{spelling}/--no-{spelling[2:]}"
    kind = _plain(info.annotation, name)
    option = typer.Option(
        spelling,
        help=as_typed(f"{info.description}{_default(info)}").replace("`", ""),
        show_default=False,
        rich_help_panel=panel,
        metavar=METAVARS.get(name) or _metavar(kind),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _default(info: FieldInfo) -> str:
    """The sentence about the default, unless that is nothing or the description's business."""
    if info.is_required():
        return " Required."
    value = ",".join(info.default) if isinstance(info.default, tuple) else info.default
    if value is None or value is False or value == "":
        return ""
    return f" Default: {value:g}." if isinstance(value, float) else f" Default: {value}."


def _metavar(kind: Any) -> str:
    """What a value is called in the help: N and X are numbers."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _plain(annotation: Any, name: str = "") -> Any:
    """The simple type that Typer parses; pydantic checks the constraints."""
    if name in REPEATED:
        return list[str]
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _plain(next(part for part in get_args(annotation) if part is not NoneType))
    if get_origin(annotation) is tuple:
        return str
    return annotation if get_origin(annotation) is Literal or annotation in (int, float, bool) else str
