"""How results look in a Python session: one short line, and a table in a notebook.

Results hold text from files that anybody may have written. It is made visible and escaped here.
"""

import unicodedata
from collections.abc import Mapping
from html import escape

_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # control, format, surrogate, private use, separators
_LONGEST = 299
_LONGEST_VALUE = 60


def visible(text: str, keep: str = "") -> str:
    """The text with control and format characters as escapes, such as \\x1b, except for those in `keep`."""
    return "".join(character if character in keep else _visible(character) for character in text)


def _visible(character: str) -> str:
    if unicodedata.category(character) not in _INVISIBLE:
        return character
    return character.encode("unicode_escape").decode("ascii")


class Shown:
    """Base of a result: `shown_as` gives it a repr of less than 300 characters and a table in a notebook.

    A dataclass of it is declared with repr=False.
    """

    __slots__ = ()

    def shown_as(self) -> Mapping[str, object]:
        """Name -> value of what a reader wants to know first; None for what is not known."""
        raise NotImplementedError

    def __repr__(self) -> str:
        known = {name: value for name, value in self.shown_as().items() if value is not None}
        parts = [f"{name.replace(' ', '_')}={_brief(repr(value))}" for name, value in known.items()]
        text = f"{type(self).__name__}({', '.join(parts)})"
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]}...)"

    def _repr_html_(self) -> str:
        known = {name: value for name, value in self.shown_as().items() if value is not None}
        rows = [
            f"<tr><th style='text-align:left'>{escape(name)}</th>"
            f"<td style='text-align:left'>{escape(_brief(visible(str(value)), 200))}</td></tr>"
            for name, value in known.items()
        ]
        return f"<table><caption>{type(self).__name__}</caption><tbody>{''.join(rows)}</tbody></table>"


def _brief(text: str, longest: int = _LONGEST_VALUE) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
