"""Weights of the Hub that differ from their svdconvert.json are refused, and none are published."""

import shutil
from pathlib import Path

import pytest

from svdconvert import Run, SplitOptions, decompose, merge
from tests.conftest import Build
from tests.loopback_hub.server import Hub
from tests.reading import readable
from tests.visitor import Visitor

pytestmark = pytest.mark.processes

MODEL = "model.safetensors"


@pytest.fixture
def changed(checkpoint: Build, hub: Hub, alice: Visitor, tmp_path: Path) -> Path:
    """A merged model with one changed byte, also as org/merged of the Hub, with its base as org/base."""
    base = readable(checkpoint("llama"), tmp_path / "base")
    decompose(base, tmp_path / "pissa", SplitOptions(rank=2), Run(threads=1))
    merge(tmp_path / "pissa", tmp_path / "merged", run=Run(threads=1))
    data = bytearray((tmp_path / "merged" / MODEL).read_bytes())
    data[-1] ^= 1
    (tmp_path / "merged" / MODEL).write_bytes(data)
    hub.create("org/base", base)
    hub.create("org/merged", tmp_path / "merged")
    return tmp_path / "merged"


@pytest.mark.parametrize(
    "words",
    [
        ["decompose", "org/merged", "-o", "out", "--rank", 2],
        ["decompose", "org/merged", "-o", "out", "--rank", 2, "--stream"],
        ["extract", "org/base", "org/merged", "-o", "out", "--stream"],
        ["extract", "org/merged", "org/base", "-o", "out"],
        ["combine", "org/base", "org/merged", "-o", "out", "--stream"],
        ["diff", "org/base", "org/merged"],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_changed_weights_of_the_hub_are_refused(words: list[object], changed: Path, alice: Visitor) -> None:
    alice.is_refused(*words, because=[MODEL, "is not the tensor that", "svdconvert.json lists"])
    assert not (alice.home / "out").exists()


def test_changed_weights_are_not_published(changed: Path, hub: Hub, alice: Visitor) -> None:
    alice.is_refused("push", changed, "alice/new", because=[MODEL, "is not the tensor that"])
    assert "alice/new" not in hub.repositories
    shutil.copytree(changed.parent / "pissa", changed.parent / "other")
    alice.succeeds("push", changed.parent / "other", "alice/new")
