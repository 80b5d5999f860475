"""The example of a plug-in package can be installed, and its method and layout work in the program."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Phi3Config, Phi3ForCausalLM

from tests import tiny
from tests.stock import adapted, logits, plain, same_bytes, tensors

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the example installed into it, without a network."""
    place = tmp_path_factory.mktemp("plugin")
    copy = shutil.copytree(EXAMPLE, place / "source")  # because a build writes next to the source
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check")
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", place / "site", copy]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    return place / "site"


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("phi")
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
    model = Phi3ForCausalLM(Phi3Config(**sizes, num_attention_heads=4, pad_token_id=0))
    tiny.fill(model)
    model.save_pretrained(directory)
    return directory


def run(site: Path, *arguments: object) -> str:
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "svdconvert", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_lists_show_the_plug_ins(site: Path) -> None:
    methods = {row["method"]: row for row in json.loads(run(site, "list", "methods", "--json"))}
    assert methods["columns"]["trains"] == ["lora_B"]
    assert methods["columns"]["slice"] == "largest columns"
    layouts = {row["layout"]: row for row in json.loads(run(site, "list", "layouts", "--json"))}
    assert layouts["phi3"]["model_types"] == ["phi3"]


def test_a_model_is_decomposed_verified_and_merged_with_both(site: Path, phi: Path, tmp_path: Path) -> None:
    out, merged = tmp_path / "out", tmp_path / "merged"
    run(site, "decompose", phi, "-o", out, "--method", "columns", "--rank", 4)
    run(site, "verify", out)
    run(site, "merge", out, "-o", merged)
    assert same_bytes(tensors(merged), tensors(phi))
    start = logits(adapted(out, out / "columns_init"))
    assert (start - logits(plain(phi))).abs().max() < 1e-5
    factors = load_file(out / "columns_init" / "adapter_model.safetensors")
    selections = [tensor for name, tensor in factors.items() if ".lora_A." in name]
    assert len(selections) == 8
    for selection_RI in selections:
        assert torch.equal(selection_RI @ selection_RI.T, torch.eye(4))
        assert {*selection_RI.flatten().tolist()} == {0.0, 1.0}
