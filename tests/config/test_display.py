"""Everything that a public function returns has a short repr and a safe table in a notebook."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from svdconvert import Run, SplitOptions, decompose, diff, inspect, read_manifest, verify, verify_merge
from svdconvert.config.display import Shown, visible
from svdconvert.manifest.evaluations import read_evaluation
from svdconvert.publish.upload import Published
from tests.conftest import Build
from tests.evaluated import write_result
from tests.program import succeeded


@pytest.fixture(scope="module")
def results(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What public functions return."""
    home = tmp_path_factory.mktemp("results")
    base = checkpoint("llama")
    manifest = decompose(base, home / "pissa", SplitOptions(rank=4), Run(device="cpu"))
    succeeded("to-lora", home / "pissa", "-o", home / "lora")
    succeeded("merge", home / "pissa", "-o", home / "merged")
    path, _ = write_result(home / "pissa", [True, False])
    return [
        manifest,
        read_manifest(home / "lora"),
        read_manifest(home / "merged"),
        inspect(home / "pissa"),
        inspect(base),
        verify(home / "pissa"),
        verify_merge(home / "merged", [base], home / "lora"),
        diff(base, home / "merged"),
        diff(home / "lora", home / "lora"),
        read_evaluation(path),
        Published("https://hub/x", "0" * 40, 3, 100, [], changed=True),
    ]


def test_a_repr_is_one_short_line_with_the_class_and_what_matters(results: list[Any]) -> None:
    for result in results:
        text = repr(result)
        assert len(text) < 300 and "\n" not in text
        assert text.startswith(f"{type(result).__name__}(")
    assert "kind='decomposed', method='pissa'" in repr(results[0]) and "rank=4" in repr(results[0])
    assert "passed=True" in repr(results[5]) and "accuracy=0.5" in repr(results[9])


class Tags(HTMLParser):
    """Collects the names of all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.add(tag)


def test_a_notebook_shows_a_table(results: list[Any]) -> None:
    for result in results:
        table = result._repr_html_()
        parser = Tags()
        parser.feed(table)
        assert parser.found == {"table", "caption", "tbody", "tr", "th", "td"}


class Hostile(Shown):
    """A result whose values come from a file."""

    def shown_as(self) -> dict[str, object]:
        return {"name": "<script>\x1b[31m\u202e", "other": ["x" * 500], "more": "y" * 500, "last": "z" * 500}


def test_foreign_text_is_escaped_and_cut() -> None:
    assert "<script>" not in Hostile()._repr_html_() and "\x1b" not in Hostile()._repr_html_()
    assert "\u202e" not in Hostile()._repr_html_()
    assert len(repr(Hostile())) < 300 and "\x1b" not in repr(Hostile())


def test_only_control_and_format_characters_become_escapes() -> None:
    assert visible("é 漢\t\n\x00\u200e") == "é 漢\\t\\n\\x00\\u200e"
    assert visible("a\tb\n\r", "\n\t") == "a\tb\n\\r"


def test_a_path_is_shown_as_it_was_given(tmp_path: Path, results: list[Any]) -> None:
    assert results[0].base.location in results[0]._repr_html_()
