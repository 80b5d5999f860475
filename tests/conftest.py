"""What many tests need: tiny checkpoints, made once a session, and one thread for repeatable bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from svdconvert.artifact.split import SplitOptions
from svdconvert.run import Run
from svdconvert.verbs.decompose import decompose
from tests import tiny

Build = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`tiny.build` without the directory, made once for the same arguments. Not to be written to."""
    made: dict[str, Path] = {}

    def make(model_type: str, **options: Any) -> Path:
        key = repr((model_type, sorted(options.items(), key=str)))
        if key not in made:
            made[key] = tiny.build(model_type, tmp_path_factory.mktemp(model_type), **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def decomposed(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`decompose` without the output directory, at rank 4; made once. Not to be written to."""
    made: dict[str, Path] = {}

    def make(model: Path, **options: Any) -> Path:
        key = repr((model, sorted(options.items())))
        if key not in made:
            out = tmp_path_factory.mktemp("decomposed") / "out"
            decompose(model, out, SplitOptions(**{"rank": 4, **options}), Run(device="cpu"))
            made[key] = out
        return made[key]

    return make
