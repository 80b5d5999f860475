"""The documents are correct: commands parse, examples run, tables match the registry, links resolve."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer

import svdconvert.layouts
from svdconvert.cli.app import app
from svdconvert.commands.list_plugins import in_words, layouts, methods
from svdconvert.layouts.base import LAYOUTS, Layout
from svdconvert.manifest.results import RESULT_OF_KIND, KeptUpdate, RecoveredFactors, TruncatedLora, Update
from svdconvert.manifest.schema import Kind, Manifest, Matrix, Origin
from svdconvert.methods.base import Method
from svdconvert.plugins import Registry
from tests.conftest import Build
from tests.program import succeeded
from tests.reading import readable, write_sums
from tests.stock import adapted, logits, plain
from tests.test_architecture import LEVELS, PACKAGE

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "recipes").rglob("*.md")])
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TABLES = {"methods": [*map(in_words, methods())], "layouts": [*map(in_words, layouts())]}
# Words that were once used for the field's terms, each with one of those.
REPLACED = {
    "house": "program",
    "parcel": "files to send",
    "kin": "related methods",
    "departed": "uploaded",
    "pupil": "trained adapter",
    "beside": "next to",
    "whoever": "a user who",
    "by chance": "randomly",
}


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if re.fullmatch(language, name)]


def example(name: str) -> str:
    """The block after a marker, which one document has."""
    marker = f"<!-- example: {name} -->"
    (text,) = [text for path in DOCUMENTS if marker in (text := path.read_text())]
    return blocks(text.split(marker)[1], r"\w*")[0]


def commands() -> Iterator[tuple[str, str]]:
    """(document, command) for all that can be typed."""
    for path in DOCUMENTS:
        text = path.read_text()
        shown = [line for block in blocks(text) for line in block.splitlines()]
        # A command without arguments in a sentence is a name.
        quoted = [" ".join(code.split()) for code in re.findall(r"`(svdconvert [^-`][^`]+)`", text)]
        shown += [code for code in quoted if len(code.split()) > 2]
        for line in (line.removeprefix("$ ") for line in shown):
            if line.startswith("svdconvert ") and "COMMAND" not in line:
                yield path.name, line.split("  #")[0].removesuffix(" ...")


def table(rows: list[dict[str, Any]], heads: list[str]) -> str:
    """A Markdown table of columns that `svdconvert list` shows."""
    cells = [[row[head] for head in heads] for row in rows]
    lines = [heads, ["---"] * len(heads), *([f"`{first}`", *rest] for first, *rest in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@pytest.mark.parametrize(("document", "command"), [*commands()])
def test_a_documented_command_parses(document: str, command: str) -> None:
    _, name, *words = shlex.split(command)
    assert name in COMMANDS, f"{document}: {command}"
    COMMANDS[name].make_context(name, words)


def test_the_documents_show_every_command() -> None:
    assert {command.split()[1] for _, command in commands()} == COMMANDS.keys()


def test_every_documented_make_target_exists() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    targets = {*re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    shown = {*re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    assert {"demo", "test", "docs"} <= shown <= targets


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_has_examples_that_parse(name: str) -> None:
    shown = COMMANDS[name].epilog.splitlines()
    assert len(shown) >= (3 if name in ("decompose", "train") else 1)
    for line in shown:
        assert shlex.split(line)[:2] == ["svdconvert", name]
        COMMANDS[name].make_context(name, shlex.split(line)[2:])


def test_the_readme_is_short_and_starts_with_the_two_commands() -> None:
    text = README.read_text()
    assert len(text.split()) <= 1300
    assert len(text.splitlines()) <= 200
    first = blocks(text)[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


@pytest.mark.parametrize(
    ("document", "name"),
    [
        ("README.md", "methods"),
        ("docs/adapters.md", "methods"),
        ("docs/models.md", "layouts"),
    ],
)
def test_a_table_matches_the_registry(document: str, name: str) -> None:
    shown = (ROOT / document).read_text().split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()
    heads = [head.strip() for head in shown.splitlines()[0].strip("|").split("|")]
    wanted = table(TABLES[name], heads).splitlines()
    rows = shown.splitlines()
    assert len(rows) > 2
    assert [line for line in wanted if line in rows] == rows, "a row differs from what svdconvert list says"
    if "SVDCONVERT_DOCS" in os.environ:  # set by make docs: a published table lists everything
        missing = [line for line in wanted if line not in rows]
        assert not missing, f"the table of {name} in {document} needs these lines:\n" + "\n".join(missing)
    if document != "README.md":
        assert heads == list(TABLES[name][0])


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs derive them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_relative_link_resolves(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_uses_the_terms_of_the_field(path: Path) -> None:
    text = " ".join(path.read_text().lower().split())
    assert {word: term for word, term in REPLACED.items() if re.search(rf"\b{word}s?\b", text)} == {}


def test_a_documented_benchmark_has_the_options_shown() -> None:
    text = " ".join("\n".join(path.read_text() for path in DOCUMENTS).split())
    shown = re.findall(r"`python (benchmarks/\w+\.py)([^`]*)`", text)
    assert len(shown) > 10
    for script, arguments in shown:
        source = (ROOT / script).read_text()
        assert [name for name in re.findall(r"--[a-z-]+", arguments) if f'"{name}"' not in source] == []


def test_every_named_file_of_the_code_exists() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    named = {*re.findall(r"`((?:\w+/)+\w+\.py)\b", text)}
    assert len(named) > 10
    assert [name for name in named if not any((top / name).exists() for top in (ROOT, PACKAGE))] == []


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert {*re.findall(r"(\S+\.md)$", text, re.MULTILINE)} == pages


def test_the_overview_links_every_page() -> None:
    text = (DOCS / "index.md").read_text()
    pages = {str(page.relative_to(DOCS)) for page in (*DOCS.glob("*.md"), *DOCS.glob("*/README.md"))}
    assert {*re.findall(r"\]\(([^)#]+\.md)", text)} == pages - {"index.md"}


def test_the_packages_in_contributing_are_those_of_the_architecture() -> None:
    shown = (ROOT / "CONTRIBUTING.md").read_text().split("<!-- levels -->")[1].split("<!-- /levels -->")[0]
    assert re.findall(r"\w+", shown) == [*LEVELS]


def test_the_manifest_is_described_key_by_key() -> None:
    text = (DOCS / "manifest.md").read_text()
    for kind in (Manifest, Origin, Matrix):
        assert [entry.name for entry in fields(kind) if f"| `{entry.name}` |" not in text] == []
    for result in (*RESULT_OF_KIND.values(), Update, KeptUpdate, RecoveredFactors, TruncatedLora):
        assert [entry.name for entry in fields(result) if f"`{entry.name}`" not in text] == []
    assert [kind for kind in get_args(Kind) if f"`{kind}`" not in text] == []


def test_the_decisions_are_numbered_and_have_three_parts() -> None:
    pages = sorted((DOCS / "adr").glob("[0-9]*.md"))
    index = (DOCS / "adr" / "README.md").read_text()
    assert [page.name for page in pages if f"]({page.name})" not in index] == []
    numbers = [page.name[:4] for page in pages]
    assert len(numbers) == len({*numbers})
    for page in pages:
        text = page.read_text()
        assert text.startswith(f"# {page.name[:4]}. "), page.name
        assert all(f"\n## {part}" in text for part in ("Context", "Decision", "Consequences")), page.name


@pytest.fixture
def examples(checkpoint: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the inputs of the documented examples."""
    monkeypatch.chdir(tmp_path)
    readable(checkpoint("llama", dtype=torch.float32), tmp_path / "model")
    write_sums(tmp_path / "train.jsonl")
    return tmp_path


def test_training_with_peft_and_converting_back_works_as_documented(examples: Path) -> None:
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
    assert (wanted - logits(plain(examples / "model"))).abs().max() > 0.01
    assert (logits(adapted(examples / "model", examples / "lora")) - wanted).abs().max() < 1e-5
    assert (logits(plain(examples / "merged")) - wanted).abs().max() < 1e-5


def test_the_chain_in_python_works_as_documented(examples: Path) -> None:
    shorter = example("python").replace("rank=16", "rank=4").replace("steps=200", "steps=2, max_length=48")
    exec(shorter, {})
    assert {path.name for path in examples.iterdir() if (path / "svdconvert.json").exists()} == {
        "pissa",
        "trained",
        "merged",
        "lora",
    }


def test_a_layout_is_added_as_documented(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
    Phi3ForCausalLM(Phi3Config(**shape, num_attention_heads=4, pad_token_id=0)).save_pretrained("phi")
    (examples / "layouts").mkdir()
    (examples / "layouts" / "phi3.py").write_text(example("layout"))
    # Alone, so that a layout of the package with the same name or model type is not found instead.
    monkeypatch.setattr(svdconvert.layouts, "__path__", [str(examples / "layouts")])
    monkeypatch.delitem(sys.modules, "svdconvert.layouts.phi3", raising=False)
    monkeypatch.delattr(svdconvert.layouts, "phi3", raising=False)
    monkeypatch.delitem(LAYOUTS.__dict__, "_files", raising=False)
    try:
        assert "plain checkpoint of the phi3 layout" in succeeded("inspect", "phi").out
        assert "rank 4, 8 matrices" in succeeded("decompose", "phi", "-o", "out", "--rank", 4).out
        succeeded("verify", "out")
        start = logits(adapted(examples / "out", examples / "out" / "pissa_init"))
        assert (start - logits(plain(examples / "phi"))).abs().max() < 1e-5
    finally:
        LAYOUTS.__dict__.pop("_files", None)
        sys.modules.pop("svdconvert.layouts.phi3", None)


def test_the_documented_method_is_the_one_of_pissa() -> None:
    assert example("method") == (ROOT / "svdconvert" / "methods" / "pissa.py").read_text()


def test_a_plug_in_package_registers_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = re.sub(r'\[project.entry-points."(.+)"\]', r"[\1]", example("entry points")).replace('"', "")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_method.py").write_text(example("method"))
    (tmp_path / "my_package" / "phi3.py").write_text(example("layout"))
    (tmp_path / "my_package-1.dist-info").mkdir()
    (tmp_path / "my_package-1.dist-info" / "METADATA").write_text("Name: my-package\nVersion: 1\n")
    (tmp_path / "my_package-1.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    found_layouts: Registry[Layout] = Registry("svdconvert.layouts", "LAYOUT", Layout)
    found_methods: Registry[Method] = Registry("svdconvert.methods", "METHOD", Method)
    assert "attn.qkv" in found_layouts.get("phi3").roles
    assert found_methods.get("my-method").paper == "arXiv:2404.02948"
