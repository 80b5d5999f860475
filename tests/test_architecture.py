"""Which package may import which, and how large a file or a function may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "svdconvert"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# From the bottom up. A package (or a loose module) imports those below it and itself.
LEVELS = (
    "version",
    "errors",
    "plugins",
    "checkpoint",
    "quantization",
    "config",
    "linalg",
    "hub",
    "output",
    "methods",
    "merging",
    "manifest",
    "adapters",
    "models",
    "layouts",
    "inputs",
    "publish",
    "pipeline",
    "training",
    "evaluation",
    "conversation",
    "diagnosis",
    "reports",
    "commands",
    "workflow",
    "cli",
    "__main__",
    "__init__",
)
LEVEL = {package: number for number, package in enumerate(LEVELS)}
# A module of these packages imports no other one of its package, except those that they share.
PLUG_INS = {
    "layouts": {"base", "blocks", "experts"},
    "methods": {"base"},
    "merging": {
        "base",
        "magnitudes",
        "parameters",
        "peft_rules",
        "rank_space",
        "sparsity",
        "spectra",
        "sums",
    },
    "commands": set(),
    "quantization": {"base", "nf4", "packing", "floats", "integers"},
}
# These modules of such packages are no plug-ins.
NO_PLUG_INS = {"automatic", "automatic_cache", "base", "by_names", "detect", "experts", "loading", "view"}
# Heavy or remote: library -> the only packages that may import it.
ONLY_IN = {
    "accelerate": {"training", "models", "config"},
    "huggingface_hub": {"hub", "publish"},
    "lm_eval": {"evaluation"},
    "peft": set(),
    "rich": {"cli"},
    "transformers": {"training", "models", "evaluation", "conversation"},
    "typer": {"cli"},
}


def package(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[list[str]]:
    """Dotted names of all imported modules in parts, those inside functions and type checks too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield from (f"{node.module}.{alias.name}".split(".") for alias in node.names)


def internal_imports() -> Iterator[tuple[Path, list[str]]]:
    """(file, parts of the module that it imports), inside the package."""
    for file in FILES:
        for top, *parts in imports(file):
            if top == "svdconvert":
                yield file, parts


def test_every_package_has_a_level() -> None:
    assert {package(file) for file in FILES} == LEVEL.keys()


def test_a_module_imports_only_lower_packages_and_its_own() -> None:
    known = [(file, package(file), parts[0]) for file, parts in internal_imports() if parts[0] in LEVEL]
    assert len(known) > 100
    assert [
        (file.name, other) for file, own, other in known if other != own and LEVEL[other] >= LEVEL[own]
    ] == []


def test_a_plug_in_does_not_know_its_neighbours() -> None:
    found = [
        (file.name, parts[1])
        for file, parts in internal_imports()
        if (own := package(file)) in PLUG_INS and parts[0] == own and parts[1] not in PLUG_INS[own]
        if file.stem not in NO_PLUG_INS
    ]
    assert found == []


def test_heavy_libraries_stay_in_their_packages() -> None:
    found = [(file, name[0]) for file in FILES for name in imports(file) if name[0] in ONLY_IN]
    assert [(file.name, name) for file, name in found if package(file) not in ONLY_IN[name]] == []


def test_files_are_short_and_have_names_that_say_something() -> None:
    assert [file.name for file in [*FILES, *TESTS] if len(file.read_text().splitlines()) > 400] == []
    assert [file for file in [*FILES, *TESTS] if file.stem in {"utils", "helpers", "common", "misc"}] == []


def test_functions_are_short() -> None:
    nodes = [(file, node) for file in [*FILES, *TESTS] for node in ast.walk(ast.parse(file.read_text()))]
    functions = [(file, node) for file, node in nodes if isinstance(node, ast.FunctionDef)]
    assert [(file.name, node.name) for file, node in functions if node.end_lineno - node.lineno > 60] == []


def test_every_value_has_a_line_of_its_own() -> None:
    """`a, b = x, y` packs unrelated values; `rows, columns = matrix.shape` takes one value apart."""
    nodes = [(file, node) for file in FILES for node in ast.walk(ast.parse(file.read_text()))]
    packed = [
        (file.name, node.lineno)
        for file, node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    ]
    assert packed == []


def test_the_library_never_prints() -> None:
    nodes = [(file, node) for file in FILES for node in ast.walk(ast.parse(file.read_text()))]
    names = [
        (file.name, node.lineno) for file, node in nodes if isinstance(node, ast.Name) and node.id == "print"
    ]
    assert names == []


def test_the_command_line_starts_without_torch() -> None:
    program = (
        "import sys, svdconvert.cli.app;sys.exit(str({'torch', 'transformers', 'datasets'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == "set()\n"
