"""docs/merging.md shows the merge methods of the registry."""

from pathlib import Path

from svdconvert.commands.list_plugins import in_words, list_plugins
from tests.test_docs import table

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "merging.md"


def test_the_table_of_merge_methods_is_that_of_the_registry() -> None:
    rows = [*map(in_words, list_plugins("merges"))]
    shown = DOCUMENT.read_text().partition("<!-- merges -->\n")[2].partition("\n<!-- /merges -->")[0]
    assert shown == table(rows, list(rows[0]))
