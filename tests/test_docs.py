"""The documents speak the truth: commands parse, examples run, tables are the registry's, links lead on."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import svdconvert.layouts
from svdconvert.cli.app import app
from svdconvert.commands.list_plugins import layouts, methods
from svdconvert.layouts.base import LAYOUTS
from svdconvert.manifest.schema import Manifest, Matrix, Origin
from tests.conftest import Build
from tests.program import succeeded
from tests.reading import readable, write_sums
from tests.stock import adapted, logits, plain

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")])
VERBS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if re.fullmatch(language, name)]


def example(name: str) -> str:
    """The block behind a marker of the README."""
    return blocks(README.read_text().split(f"<!-- example: {name} -->")[1], "(?:python)?")[0]


def commands() -> Iterator[tuple[str, str]]:
    """(document, command) for all that can be typed."""
    for path in DOCUMENTS:
        text = path.read_text()
        shown = [line for block in blocks(text) for line in block.splitlines()]
        # A verb by itself in a sentence is a name, not a command.
        quoted = [" ".join(code.split()) for code in re.findall(r"`(svdconvert [^-`][^`]+)`", text)]
        shown += [code for code in quoted if len(code.split()) > 2]
        for line in shown:
            if line.startswith("svdconvert ") and "VERB" not in line:
                yield path.name, line.split("  #")[0].removesuffix(" ...")


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of what `svdconvert list` shows."""
    heads = list(rows[0])
    cells = [
        [f"{value:g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows
    ]
    lines = [heads, ["---"] * len(heads), *([f"`{first}`", *rest] for first, *rest in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@pytest.mark.parametrize(("document", "command"), [*commands()])
def test_a_command_can_be_typed(document: str, command: str) -> None:
    _, verb, *words = shlex.split(command)
    assert verb in VERBS, f"{document}: {command}"
    VERBS[verb].make_context(verb, words)


def test_the_documents_show_every_verb() -> None:
    assert {command.split()[1] for _, command in commands()} == VERBS.keys()


def test_what_the_documents_make_is_in_the_makefile() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    targets = {*re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    made = {*re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    assert {"demo", "test"} <= made <= targets


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_has_an_example_that_can_be_typed(verb: str) -> None:
    shown = VERBS[verb].epilog
    assert shown.startswith(f"Example: svdconvert {verb} ")
    VERBS[verb].make_context(verb, shlex.split(shown)[3:])
    for parameter in VERBS[verb].params:
        assert parameter.help, f"{verb} {parameter.name}"
        assert len(parameter.help) < 160


@pytest.mark.parametrize(("name", "rows"), [("methods", methods()), ("layouts", layouts())])
def test_a_table_of_the_readme_is_the_registrys(name: str, rows: list[dict[str, Any]]) -> None:
    shown = README.read_text().split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
    wanted = table(rows)
    missing = [line for line in wanted.splitlines() if line not in shown]
    assert not missing, f"the table of {name} in the README needs these lines:\n" + "\n".join(missing)
    assert shown.strip() == wanted


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_link_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    local = [link.split("#")[0] for link in links if not link.startswith("http")]
    assert [link for link in local if not (path.parent / link).exists()] == []


def test_the_manifest_is_described_key_by_key() -> None:
    text = (ROOT / "docs" / "manifest.md").read_text()
    for kind in (Manifest, Origin, Matrix):
        assert [entry.name for entry in fields(kind) if f"| `{entry.name}` |" not in text] == []


def test_the_decisions_are_numbered_and_have_three_parts() -> None:
    pages = sorted((ROOT / "docs" / "adr").glob("*.md"))
    numbers = [page.name[:4] for page in pages]
    assert len(numbers) == len({*numbers})
    for page in pages:
        text = page.read_text()
        assert re.match(r"# \d{4}[.:] ", text), page.name
        assert all(f"\n## {part}" in text for part in ("Context", "Decision", "Consequences")), page.name


@pytest.fixture
def workplace(checkpoint: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with what the README's examples start from."""
    monkeypatch.chdir(tmp_path)
    readable(checkpoint("llama", dtype=torch.float32), tmp_path / "model")
    write_sums(tmp_path / "train.jsonl")
    return tmp_path


def test_training_with_peft_and_converting_back_is_as_the_readme_says(workplace: Path) -> None:
    succeeded("decompose", "model", "-o", "pissa", "--rank", 4)
    before, after = re.split(r"^# \.\.\. train .*$", example("peft"), flags=re.MULTILINE)
    names: dict[str, Any] = {}
    exec(before, names)
    trained = [parameter for parameter in names["model"].parameters() if parameter.requires_grad]
    assert len(trained) == 28
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    wanted = logits(names["model"])
    exec(after, names)
    for line in example("back").splitlines():
        succeeded(*shlex.split(line)[1:])
    assert (wanted - logits(plain(workplace / "model"))).abs().max() > 0.01
    assert (logits(adapted(workplace / "model", workplace / "lora")) - wanted).abs().max() < 1e-5
    assert (logits(plain(workplace / "merged")) - wanted).abs().max() < 1e-5


def test_the_chain_in_python_is_as_the_readme_says(workplace: Path) -> None:
    shorter = example("python").replace("rank=16", "rank=4").replace("steps=200", "steps=2, max_length=48")
    exec(shorter, {})
    assert {path.name for path in workplace.iterdir() if (path / "svdconvert.json").exists()} == {
        "pissa",
        "trained",
        "merged",
        "lora",
    }


def test_a_layout_is_added_as_the_readme_says(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
    Phi3ForCausalLM(Phi3Config(**shape, num_attention_heads=4, pad_token_id=0)).save_pretrained("phi")
    (workplace / "layouts").mkdir()
    (workplace / "layouts" / "phi3.py").write_text(
        next(b for b in blocks(README.read_text(), "python") if "LAYOUT" in b)
    )
    monkeypatch.setattr(
        svdconvert.layouts, "__path__", [*svdconvert.layouts.__path__, str(workplace / "layouts")]
    )
    monkeypatch.delitem(LAYOUTS.__dict__, "_files", raising=False)
    try:
        assert "plain checkpoint of the phi3 layout" in succeeded("inspect", "phi").out
        assert "rank 4, 8 matrices" in succeeded("decompose", "phi", "-o", "out", "--rank", 4).out
        succeeded("verify", "out")
        start = logits(adapted(workplace / "out", workplace / "out" / "pissa_init"))
        assert (start - logits(plain(workplace / "phi"))).abs().max() < 1e-5
    finally:
        LAYOUTS.__dict__.pop("_files", None)
