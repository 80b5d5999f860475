"""What pydantic finds wrong with options, in one clause."""

from pydantic import ValidationError

from svdconvert.errors import brief


def first_fault(error: ValidationError) -> str:
    """The first fault: the option, its value and what it should be.

    Not the error's own text, which repeats the value: with YAML's aliases a short file holds a huge one.
    """
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "it should", 1)
    return f"`{key}` is {brief(first['input'])}: {message}" if key else message
