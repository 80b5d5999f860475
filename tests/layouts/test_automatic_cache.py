"""Layouts that were found before are read from the cache, without transformers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from svdconvert.inputs.model import open_model
from svdconvert.layouts import automatic_cache
from svdconvert.layouts.automatic import automatic_layout
from tests.families.check import make

Build = Callable[..., Path]
PROGRAM = """
import sys
from svdconvert import decompose, inspect
from svdconvert.commands.decompose import plan_decompose
from svdconvert.config.options import SplitOptions
plan_decompose(sys.argv[1], SplitOptions(rank=2))
inspect(sys.argv[1])
sys.exit(str({"transformers"} & {*sys.modules}))
"""


def cached_file(cache: Path) -> Path:
    (file,) = (cache / "layouts").iterdir()
    return file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SVDCONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("model_type", ["olmo2", "qwen2_moe", "gpt2", "hrm_text", "gpt_oss"])
def test_a_layout_from_the_cache_is_the_one_that_was_found(
    model_type: str, cache: Path, tmp_path: Path
) -> None:
    make(model_type, "causal", tmp_path / "base")
    model = open_model(str(tmp_path / "base"))
    wanted = automatic_layout(model.path, model.config, model.source.infos)
    assert model.layout()[1] == wanted
    assert cached_file(cache).is_file()
    assert model.layout()[1] == wanted


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"table": 3}', "[" * 100_000])
def test_a_damaged_file_is_written_anew(
    damage: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("olmo2", "causal", tmp_path / "base")
    model = open_model(str(tmp_path / "base"))
    wanted = model.layout()[1]
    file = cached_file(cache)
    content = file.read_bytes()
    file.write_text(damage)
    assert model.layout()[1] == wanted
    assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SVDCONVERT_CACHE", str(tmp_path / "file"))
    make("olmo2", "causal", tmp_path / "base")
    assert open_model(str(tmp_path / "base")).layout()[0] == "auto"


def test_another_configuration_or_tensor_is_another_layout(cache: Path, tmp_path: Path) -> None:
    make("olmo2", "causal", tmp_path / "base")
    model = open_model(str(tmp_path / "base"))
    infos = dict(model.source.infos)
    keys = {
        automatic_cache._key(model.path, model.config, infos),
        automatic_cache._key(model.path, dict(model.config) | {"rms_norm_eps": 1}, infos),
        automatic_cache._key(model.path, model.config, dict([*infos.items()][1:])),
    }
    assert len(keys) == 3


@pytest.mark.processes
@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
def test_planning_and_inspecting_a_known_model_imports_no_transformers(
    model_type: str, checkpoint: Build, cache: Path, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    if model_type != "llama":
        base = tmp_path / "base"
        make(model_type, "causal", base)
        assert open_model(str(base)).layout()[0] == "auto"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(base)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"SVDCONVERT_CACHE": str(cache)},
    )
    assert done.stderr == "set()\n"


def test_the_file_is_json_that_a_person_can_read(cache: Path, tmp_path: Path) -> None:
    make("olmo2", "causal", tmp_path / "base")
    open_model(str(tmp_path / "base")).layout()
    values = json.loads(cached_file(cache).read_text())
    assert values["table"]["model.layers.0.self_attn.q_proj.weight"]["role"] == "attn.q"
