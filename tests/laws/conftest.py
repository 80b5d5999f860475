"""Directories of every kind, for all laws."""

from pathlib import Path

import pytest

from tests.conftest import Build
from tests.laws.kinds import make_kinds


@pytest.fixture(scope="session")
def here(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of every kind, made from one base. Not to be written to."""
    return make_kinds(checkpoint, tmp_path_factory.mktemp("kinds"))
