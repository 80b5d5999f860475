"""A conversation on a terminal, and a single answer; what the model writes is made safe to print."""

import re
import sys
from typing import TYPE_CHECKING

from svdconvert.cli.answers import tell, wants_json
from svdconvert.cli.terminal import say, standard_output
from svdconvert.config.chat import CHAT, NO_TEMPLATE
from svdconvert.config.display import visible
from svdconvert.errors import DataError, OutputError, SvdConvertError

if TYPE_CHECKING:
    from svdconvert.conversation.conversation import Conversation

_COMMAND = re.compile(r"/[a-z]+")
_LONGEST = 1 << 20  # characters of a prompt on standard input
_KNOWN = "/reset begins anew, /exit leaves, Ctrl-C stops an answer"


def answer_once(conversation: "Conversation", prompt: str | None) -> None:
    """Print the answer to `prompt`, or to all of standard input."""
    asked = _read_prompt() if prompt is None else prompt
    if wants_json():
        tell(prompt=asked, template=conversation.template, answer="".join(conversation.ask(asked)))
    else:
        _print_answer(conversation, asked)


def _read_prompt() -> str:
    """All of standard input as one prompt. Raises DataError if there is none, or too much."""
    try:
        text = sys.stdin.read(_LONGEST + 1) if sys.stdin is not None else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"standard input cannot be read as text ({error}); give `prompt`") from error
    if len(text) > _LONGEST:
        raise DataError(f"standard input has more than {_LONGEST:,} characters; give a shorter one")
    if not text.strip():
        raise DataError("there is no prompt: give --prompt, or write it to standard input")
    return text.removesuffix("\n")


def talk(conversation: "Conversation", model: str) -> None:
    """Ask and answer until the user leaves."""
    say(f"{model} is asked {_manner(conversation.template)}; {_KNOWN}")
    while True:
        try:
            if not _take(conversation, input("> ")):
                return
        except KeyboardInterrupt:
            _write("\n")
            say("type /exit or press Ctrl-D to leave")
        except EOFError:
            _write("\n")
            return


def _take(conversation: "Conversation", line: str) -> bool:
    """Do what a line asks for; False if that is to leave."""
    if line == "/exit":
        return False
    if line == "/reset":
        conversation.reset()
        say("what was said is forgotten")
    elif _COMMAND.fullmatch(line):
        say(f"there is no {line}; {_KNOWN}")
    elif line.strip():
        _answer(conversation, line)
    return True


def _answer(conversation: "Conversation", line: str) -> None:
    """Print an answer, as far as the user lets it come."""
    try:
        _print_answer(conversation, line)
    except KeyboardInterrupt:
        _write("\n")
    except OutputError:
        raise
    except SvdConvertError as error:  # such as a question that is too long
        say(str(error))


def _manner(template: str) -> str:
    if template == CHAT:
        return "through its chat template"
    if template == NO_TEMPLATE:
        return "to continue the text, each time anew"
    return "through the prompt template of its training, each question by itself"


def _print_answer(conversation: "Conversation", prompt: str) -> None:
    for piece in conversation.ask(prompt):
        _write(visible(piece, "\n\t"))
    _write("\n")


def _write(text: str) -> None:
    with standard_output():
        if sys.stdout is None:
            raise OSError("it is closed")
        sys.stdout.write(text)
        sys.stdout.flush()
