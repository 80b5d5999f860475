"""With --json every command prints one document and nothing else, with the keys and types of docs/json.md."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from svdconvert.cli.app import app
from tests.laws.kinds import KINDS, PLAIN
from tests.program import Ended, svdconvert

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
PAGE = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "list": (list,),
    "object": (dict,),
    "null": (type(None),),
}
WRITES = ["decompose", "train", "merge", "to-lora", "convert", "combine", "extract"]
ALSO = {"combine": ["merge", "to-lora"], "extract": ["to-lora"]}
"""Command -> further sections whose keys it may have."""
SAMPLE = {"plain", "trained", "lora"}
NUMBER_AS_TEXT = re.compile(r"-?[\d.,]+(e[+-]?\d+)?( ?(B|KB|MB|GB|%|s))?")


def sections() -> dict[str, dict[str, str]]:
    """Heading of docs/json.md -> key -> type."""
    found: dict[str, dict[str, str]] = {}
    for part in re.split(r"^##+ ", PAGE, flags=re.MULTILINE)[1:]:
        title = part.splitlines()[0]
        found[title] = dict(re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", part, re.MULTILINE))
    return found


SECTIONS = sections()


def words_of(command: str, kind: str, here: Path, out: Path) -> list[list[Any]]:
    """The ways in which a command is run on a kind of directory."""
    one = here / kind
    plain = kind in PLAIN
    other = here / ("finetuned" if kind != "finetuned" else "plain")
    base = ["--base", here / "plain"] if kind == "foreign" else []
    rows = ["--data", here / "rows.jsonl", "--batch-size", 2, "--steps", 1]
    rank = ["--rank", 2] if plain else []
    first = kind == "plain"
    ways: dict[str, list[list[Any]]] = {
        "decompose": [[one, "-o", out, "--rank", 2], [one, "--rank", 2, "--plan"]],
        "train": [[one, "-o", out, *rows, *rank], [one, *rows, *rank, "--plan"]],
        "merge": [[one, "-o", out, *base], [one, *base, "--plan"], [one, here / "trained", "--plan"]],
        "to-lora": [[one, "-o", out, *base], [one, *base, "--plan"]],
        "convert": [[one, "-o", out, "--layout", "web-rwkv"], [one, "--layout", "web-rwkv", "--plan"]],
        "combine": [
            [one, other if plain else here / "trained", "-o", out, *base],
            [one, other if plain else here / "trained", *base, "--plan"],
        ],
        "extract": [[one, other, "-o", out], [one, other, "--plan", "--sketch"]],
        "push": [[one, "me/name", "--plan"]],
        "verify": [[one], ["--merged", one, "--adapter", here / "lora", "--base", here / "plain"]],
        "diff": [[one, other if plain else here / "lora"]],
        "inspect": [[one], [one, "--for", "vllm"]],
        "list": [[what] for what in ("methods", "layouts", "merges", "formats", "tasks", "recipes")]
        if first
        else [],
        "doctor": [[]] if first else [],
        "run": [[here / "recipe.yaml", "-o", out]] if first else [],
        "chat": [[one, "--prompt", "what is 1 + 2 ?", "--max-new-tokens", 2, *base]],
        "eval": [
            [
                one,
                "--tasks",
                "gsm8k",
                "--data",
                here / "rows.jsonl",
                "--limit",
                1,
                "--max-new-tokens",
                2,
                "-o",
                out,
                *base,
            ],
            [one, one, "--compare"],
        ],
        "report": [[one, "-o", out.with_suffix(".html")]] if kind in ("trained", "merged") else [],
    }
    assert command in ways, f"add the ways in which {command} is run here, and its keys to docs/json.md"
    return ways[command]


def cases() -> Iterator[Any]:
    for command in COMMANDS:
        for kind in KINDS:
            slow = command in ("train", "report", "chat", "eval") or kind not in SAMPLE
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(command, kind, marks=marks, id=f"{command} {kind}")


@pytest.mark.parametrize(("command", "kind"), [*cases()])
def test_a_command_prints_one_document_with_the_documented_keys(
    command: str, kind: str, here: Path, tmp_path: Path
) -> None:
    for words in words_of(command, kind, here, tmp_path / "out"):
        check_document(command, words, svdconvert(command, *words, "--json"))


def check_document(command: str, words: list[Any], ended: Ended) -> None:
    document = json.loads(ended.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    if command == "run" and isinstance(document, list):
        assert texts_that_are_numbers(document) == []
        return
    if isinstance(document, list):
        assert command in ("list", "eval", "run")
        assert [fault for row in document for fault in misfits(row, SECTIONS[command])] == []
        return
    if "error" in document:
        assert document["error"]["status"] == ended.status != 0
        assert not document["error"]["message"].startswith("unexpected ")
        assert document["error"]["message"] in ended.err.replace("\n", " ") or "\n" in ended.err.strip()
        return
    known = dict(SECTIONS["Every object"])
    if "--plan" in words:
        known |= SECTIONS[f"{command} --plan"]
    else:
        known |= SECTIONS["A written directory"] if command in WRITES else {}
        option = next((one for one in ("--merged", "--compare") if one in words), "")
        title = f"{command} {option}".strip()
        for section in [title, *ALSO.get(command, [])]:
            known |= SECTIONS.get(section, {})
    assert misfits(document, known) == []
    assert command == "doctor" or texts_that_are_numbers(document) == []
    assert "notices" in document


def misfits(document: dict[str, Any], known: dict[str, str]) -> list[str]:
    """The keys that are not in the table, or whose values have another type."""
    return [
        f"{name}: {type(value).__name__} is not {known.get(name, 'documented')}"
        for name, value in document.items()
        if name not in known or not has_type(value, known[name])
    ]


def has_type(value: Any, types: str) -> bool:
    allowed = tuple(kind for name in types.split(" or ") for kind in TYPES[name])
    return isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)


def texts_that_are_numbers(value: Any, path: str = "") -> list[str]:
    """Where a text is a number, with or without a unit; options are as they were given."""
    if isinstance(value, dict):
        items = [(f"{path}.{name}", inner) for name, inner in value.items() if name != "options"]
    elif isinstance(value, list):
        items = [(f"{path}[]", inner) for inner in value]
    else:
        is_number = isinstance(value, str) and NUMBER_AS_TEXT.fullmatch(value) is not None
        return [f"{path} {value}"] if is_number or value in ("True", "False", "None") else []
    return [found for name, inner in items for found in texts_that_are_numbers(inner, name)]


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_usage_is_a_document_too(command: str) -> None:
    ended = svdconvert(command, "--no-such-option", "--json")
    document = json.loads(ended.out)
    assert document == {"error": {"message": document["error"]["message"], "status": 2}}
    assert ended.status == 2
    assert "--no-such-option" in document["error"]["message"]


def test_every_section_has_keys_of_known_types() -> None:
    tables = {title: table for title, table in SECTIONS.items() if table}
    assert len(tables) > 15
    for table in tables.values():
        assert all(name in TYPES for types in table.values() for name in types.split(" or "))
