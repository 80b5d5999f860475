"""Mixtures of experts are decomposed by several ranks, after kills, from the Hub, and onto the Hub."""

import json
import sys
from pathlib import Path

import pytest

from tests.loopback_hub.server import Hub
from tests.mixtures import mixture
from tests.process import finish, start, sums, wait_until_finished
from tests.visitor import Visitor

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "svdconvert"]
OPTIONS = ("--rank", 4, "--max-shard-size", "24KB")

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture(
    scope="module", params=[pytest.param(False, marks=pytest.mark.sweep), True], ids=["apart", "stacked"]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture("qwen3_moe", tmp_path_factory.mktemp("mixture") / "base", stacked=request.param)


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    """What one undisturbed process writes."""
    out = model.with_name("whole")
    finish(start("decompose", model, "-o", out, *OPTIONS))
    return out


def test_two_ranks_write_the_bytes_of_one(model: Path, whole: Path, tmp_path: Path) -> None:
    finish(start("decompose", model, "-o", tmp_path / "two", *OPTIONS, program=TORCHRUN))
    assert sums(tmp_path / "two") == sums(whole)
    finish(start("merge", whole, "-o", tmp_path / "one-merged"))
    finish(start("merge", whole, "-o", tmp_path / "two-merged", program=TORCHRUN))
    assert sums(tmp_path / "two-merged") == sums(tmp_path / "one-merged")


def test_a_killed_run_continues_to_the_same_bytes(model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("decompose", model, "-o", out, *OPTIONS)
    wait_until_finished(process, out, 5)
    process.kill()
    process.communicate()
    if not out.exists():
        finish(start("decompose", model, "-o", out, *OPTIONS))
    assert sums(out) == sums(whole)


def test_a_streamed_mixture_has_the_same_bytes_on_disk_and_on_the_hub(
    model: Path, hub: Hub, alice: Visitor, tmp_path: Path
) -> None:
    hub.create("org/mixture", model)
    repository = hub.create("alice/out")
    split = ["decompose", "org/mixture", *OPTIONS]
    alice.succeeds_with([*split, "-o", tmp_path / "fetched"])
    alice.succeeds_with([*split, "-o", tmp_path / "streamed", "--stream"])
    assert sums(tmp_path / "streamed") == sums(tmp_path / "fetched")
    alice.succeeds_with([*split, "--stream", "--push", "alice/out"])
    files = json.loads((tmp_path / "fetched" / "svdconvert.json").read_text())["files"]
    assert len(files) > 3
    assert {name: repository.read(name) for name in files} == {
        name: (tmp_path / "fetched" / name).read_bytes() for name in files
    }
    assert not any("experts.safetensors" in name for name in repository.names())
    alice.succeeds("verify", tmp_path / "fetched")
