"""The house keeps its floors: who may import whom, and how large a file or function may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "svdconvert"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# From the ground up. A room is a file or folder of the package; it imports lower floors and itself.
FLOORS = (
    {"errors"},
    {"importing", "memory", "progress", "ranks", "shipment"},
    {"run", "stopping"},
    {"checkpoint", "factors", "registry"},
    {"linalg", "naming"},
    {"layout", "method"},
    {"adapters", "models"},
    {"artifact"},
    {"layouts", "methods", "training", "hub"},
    {"recipe"},
    {"verbs"},
    {"console", "command"},
    {"publishing"},
    {"cli"},
    {"__main__", "__init__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# What lies in these does not know what lies beside it.
PLUG_INS = ("layouts", "methods", "verbs")
# Heavy or remote: package -> the only rooms that may import it.
ONLY_IN = {
    "accelerate": {"training", "models", "ranks"},
    "huggingface_hub": {"hub"},
    "peft": set(),
    "rich": {"console"},
    "transformers": {"training", "models"},
    "typer": {"cli", "command", "console", "publishing"},
}


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[list[str]]:
    """Dotted names of all imported modules in parts, those inside functions and type checks too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield from (f"{node.module}.{alias.name}".split(".") for alias in node.names)


def neighbours() -> Iterator[tuple[Path, str, str]]:
    """(file, its room, the room of a module that it imports)."""
    for file in FILES:
        for top, *parts in imports(file):
            if top == "svdconvert":
                yield file, room(file), parts[0]


def test_every_room_has_a_floor() -> None:
    assert {room(file) for file in FILES} <= FLOOR.keys()


def test_a_module_imports_only_lower_floors_and_its_own_room() -> None:
    known = [(file, own, other) for file, own, other in neighbours() if {own, other} <= FLOOR.keys()]
    assert len(known) > 100
    assert [
        (file.name, other) for file, own, other in known if other != own and FLOOR[other] >= FLOOR[own]
    ] == []


def test_a_plug_in_does_not_know_its_neighbours() -> None:
    assert [(file.name, other) for file, own, other in neighbours() if own == other and own in PLUG_INS] == []


def test_heavy_packages_stay_in_their_rooms() -> None:
    found = [(file, name[0]) for file in FILES for name in imports(file) if name[0] in ONLY_IN]
    assert [(file.name, name) for file, name in found if room(file) not in ONLY_IN[name]] == []


def test_files_are_short_and_have_names_that_say_something() -> None:
    assert [file.name for file in [*FILES, *TESTS] if len(file.read_text().splitlines()) > 400] == []
    assert [file for file in [*FILES, *TESTS] if file.stem in {"utils", "helpers", "common", "misc"}] == []


def test_functions_are_short() -> None:
    nodes = [(file, node) for file in [*FILES, *TESTS] for node in ast.walk(ast.parse(file.read_text()))]
    functions = [(file, node) for file, node in nodes if isinstance(node, ast.FunctionDef)]
    assert [(file.name, node.name) for file, node in functions if node.end_lineno - node.lineno >= 50] == []


def test_the_library_never_prints() -> None:
    nodes = [(file, node) for file in FILES for node in ast.walk(ast.parse(file.read_text()))]
    names = [
        (file.name, node.lineno) for file, node in nodes if isinstance(node, ast.Name) and node.id == "print"
    ]
    assert names == []


def test_the_command_line_starts_without_torch() -> None:
    program = (
        "import sys, svdconvert.cli; sys.exit(str({'torch', 'transformers', 'datasets'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == "set()\n"
