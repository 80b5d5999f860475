"""An adapter's tokenizer and chat template replace those of the base, and the base's stay if it has none."""

import json
from pathlib import Path

import pytest

from svdconvert.output.tokenizer_files import copy_tokenizer, tokenizer_changes

BASE = {
    "tokenizer.json": "base", "tokenizer_config.json": "{}", "added_tokens.json": "base",
    "merges.txt": "base", "chat_template.jinja": "base", "config.json": "base",
}  # fmt: skip


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


def content(directory: Path) -> dict[str, str]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_text() for path in paths}


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ({}, BASE),
        ({"config.json": "own", "adapter_model.bin": "own", "note.txt": "own"}, BASE),
        (
            {"tokenizer.json": "own", "tokenizer_config.json": "{ }"},
            {
                "tokenizer.json": "own", "tokenizer_config.json": "{ }", "chat_template.jinja": "base",
                "config.json": "base",
            },
        ),
        ({"added_tokens.json": "own"}, BASE | {"added_tokens.json": "own"}),
        (
            {"additional_chat_templates/tools.jinja": "own"},
            {name: text for name, text in BASE.items() if name != "chat_template.jinja"}
            | {"additional_chat_templates/tools.jinja": "own"},
        ),
        (
            {"tokenizer_config.json": '{"chat_template": "own"}'},
            {name: text for name, text in BASE.items() if name != "chat_template.jinja"}
            | {"tokenizer_config.json": '{"chat_template": "own"}'},
        ),
    ],
)  # fmt: skip
def test_what_the_adapter_has_replaces_what_the_base_has(
    tmp_path: Path, own: dict[str, str], wanted: dict[str, str]
) -> None:
    target = write(tmp_path / "target", BASE)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    copy_tokenizer(write(adapter, own), target)
    assert content(target) == wanted


def test_a_template_inside_the_settings_stays_if_the_adapter_has_none(tmp_path: Path) -> None:
    target = write(tmp_path / "target", {"tokenizer_config.json": '{"chat_template": "base", "a": 1}'})
    adapter = write(tmp_path / "adapter", {"tokenizer.json": "own", "tokenizer_config.json": '{"a": 2}'})
    copy_tokenizer(adapter, target)
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"a": 2, "chat_template": "base"}


def test_changes_name_what_differs_or_is_new(tmp_path: Path) -> None:
    base = write(tmp_path / "base", BASE)
    own = {"tokenizer.json": "base", "added_tokens.json": "own", "vocab.txt": "own", "config.json": "own"}
    assert tokenizer_changes(write(tmp_path / "adapter", own), base) == ["added_tokens.json", "vocab.txt"]


def test_an_adapter_in_a_single_file_has_no_tokenizer(tmp_path: Path) -> None:
    target = write(tmp_path / "target", BASE)
    (tmp_path / "adapter.pth").write_text("x")
    assert tokenizer_changes(tmp_path / "adapter.pth", target) == []
    copy_tokenizer(tmp_path / "adapter.pth", target)
    assert content(target) == BASE
