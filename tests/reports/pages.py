"""What a browser makes of a page, as far as html.parser can tell."""

import re
from collections import Counter
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link"}
LOADS = ("src", "href", "srcset", "data", "action", "poster", "background")


class Page(HTMLParser):
    """Parses a page strictly: every element is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        names = [name for name, _ in attrs]
        assert len(names) == len({*names}), f"{tag} repeats an attribute: {names}"
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> ends {self._open[-3:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        """All text of the page."""
        return "".join(self.texts)


def read_page(text: str) -> Page:
    """The page, which must be valid, load nothing and run nothing."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    ids = Counter(value for _, name, value in page.attributes if name == "id")
    assert [name for name, count in ids.items() if count > 1] == []
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name.split(":")[-1] in LOADS:
            assert value.startswith("#") and value[1:] in ids, (tag, name, value)
        assert "url(" not in value or re.fullmatch(r".*url\(#[\w-]+\).*", value), (tag, name, value)
    assert page.elements["script"] == page.elements["iframe"] == page.elements["object"] == 0
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/)", text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", text)
    return page
