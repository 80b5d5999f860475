"""Shared fixtures: tiny checkpoints, made once per session, and one thread for repeatable bytes."""

import os
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from svdconvert.commands.decompose import decompose
from svdconvert.config.execution import Run
from svdconvert.pipeline.decompose import SplitOptions
from tests import tiny
from tests.loopback_hub.server import Hub
from tests.visitor import Visitor

Build = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[1]
MODELS = os.environ.get("SVDCONVERT_CACHE") or str(ROOT / ".cache")
"""Where downloaded models are kept, which outlives the tests and is shared by their workers."""


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Automatic layouts are not kept in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDCONVERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def smollm2(own_cache: None) -> Path:
    """SmolLM2-135M-Instruct in bfloat16, downloaded once into the project's cache."""
    recipe = runpy.run_path(str(ROOT / "recipes" / "demo" / "smollm2.py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDCONVERT_CACHE", MODELS)
        try:
            return Path(recipe["ensure_smollm2"](recipe["cache_dir"]() / "smollm2-135m"))
        except (SystemExit, OSError) as error:
            pytest.skip(f"SmolLM2 is not available here: {error}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the loopback Hub, which start the program, and what is beyond the sample."""
    for item in items:
        if {"hub", "alice"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.processes)
        parameters = getattr(item, "callspec", None) and item.callspec.params
        if parameters and not is_in_the_sample(parameters):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests counted, as tables for docs/reliability.md, if the soak asks for its numbers."""
    if not {"SVDCONVERT_KILLS", "SVDCONVERT_FUZZ_INPUTS", "SVDCONVERT_FAULTS"} & os.environ.keys():
        return
    rows: dict[str, list[dict[str, Any]]] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in getattr(report, "user_properties", ()):
            for title, row in value.items() if name == "counts" and report.when == "call" else ():
                rows.setdefault(title, []).append(row)
    for title, table in rows.items():
        terminalreporter.write_line(f"\n{title}\n")
        terminalreporter.write_line(counts_table(table))


def counts_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows with the same keys; the last row has the sums of the numbers.

    Rows with the same first cell become one.
    """
    heads = [*rows[0]]
    joined: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = joined.setdefault(row[heads[0]], dict.fromkeys(heads, 0))
        joined[row[heads[0]]] = {
            head: known[head] + cell if isinstance(cell, int) else cell for head, cell in row.items()
        }
    rows = [*joined.values()]
    sums = [sum(row[head] for row in rows) if isinstance(rows[0][head], int) else "" for head in heads]
    lines = [
        heads,
        ["---"] * len(heads),
        *([row[head] for head in heads] for row in rows),
        ["all", *sums[1:]],
    ]
    return "\n".join(
        f"| {' | '.join(f'{cell:,}' if isinstance(cell, int) else cell for cell in line)} |" for line in lines
    )


def is_in_the_sample(parameters: Mapping[str, Any]) -> bool:
    """True for what `make quick` runs of the tests over methods, families and dtypes.

    That is every method on llama, pissa on every family but mixtures, in bfloat16, and what does not depend
    on a method on llama. `make test` runs all of them.
    """
    family, dtype = parameters.get("family", "llama"), parameters.get("dtype", torch.bfloat16)
    if family in tiny.MIXTURES:
        return False
    if family != "llama" and parameters.get("way") != "pissa":
        return False
    return dtype == torch.bfloat16 or "way" not in parameters


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`tiny.build` without the directory, built once for the same arguments. Tests must not write to it."""
    made: dict[str, Path] = {}

    def make(model_type: str, **options: Any) -> Path:
        key = repr((model_type, sorted(options.items(), key=str)))
        if key not in made:
            made[key] = tiny.build(model_type, tmp_path_factory.mktemp(model_type), **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def decomposed(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`decompose` without the output directory, at rank 4; built once. Tests must not write to it."""
    made: dict[str, Path] = {}

    def make(model: Path, **options: Any) -> Path:
        key = repr((model, sorted(options.items())))
        if key not in made:
            out = tmp_path_factory.mktemp("decomposed") / "out"
            decompose(model, out, SplitOptions(**{"rank": 4, **options}), Run(device="cpu"))
            made[key] = out
        return made[key]

    return make


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "store") as server:
        yield server


@pytest.fixture
def alice(hub: Hub, tmp_path: Path) -> Visitor:
    """A user of the loopback Hub who is logged in by HF_TOKEN."""
    return Visitor(hub, tmp_path / "alice")
