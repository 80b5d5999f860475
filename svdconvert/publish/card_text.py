"""Foreign text inside Markdown: in a table, in a block of code, in Python."""

import re


def cell(text: object) -> str:
    """Text as the cell of a table: on one line, without markup of Markdown or HTML."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))


def block(text: str) -> str:
    """Text as a block of code, whatever it contains."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.strip(chr(10))}\n{fence}"


def literal(text: str) -> str:
    """Text as a string of Python on one line, in double quotes as the rest of a card's code."""
    quoted = "'" + repr('"' + text)[2:]  # the double quote makes repr choose single quotes
    inner = quoted[1:-1].replace("\\'", "'").replace('"', '\\"')
    return f'"{inner}"'
