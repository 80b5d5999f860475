"""What a user types for a model is a path, a name, an address, or is refused with what to type instead."""

from pathlib import Path

import pytest

from svdconvert.errors import CheckpointError, ModelNotFoundError
from svdconvert.hub.reference import ModelRef
from tests import tiny
from tests.conftest import Build
from tests.loopback_hub.server import Hub
from tests.visitor import Visitor

NAMES = {
    "org/name": ("org/name", None, None),
    "org/name@v1": ("org/name", "v1", None),
    "org/name@refs/pr/1": ("org/name", "refs/pr/1", None),
    "org/name/a/b.pth@v1": ("org/name", "v1", "a/b.pth"),
    "roberta-base": ("roberta-base", None, None),
    "gpt2@v1": ("gpt2", "v1", None),
    "t5-v1.1": ("t5-v1.1", None, None),
    "https://huggingface.co/org/name": ("org/name", None, None),
    "https://huggingface.co/org/name/": ("org/name", None, None),
    "https://hf.co/org/name?library=transformers#files": ("org/name", None, None),
    "https://huggingface.co/roberta-base": ("roberta-base", None, None),
    "https://huggingface.co/org/name/tree/main": ("org/name", None, None),
    "https://huggingface.co/org/name/tree/v1": ("org/name", "v1", None),
    "https://huggingface.co/org/name/tree/refs%2Fpr%2F1": ("org/name", "refs/pr/1", None),
    "https://huggingface.co/org/name/resolve/main/x.pth": ("org/name", None, "x.pth"),
    "https://huggingface.co/org/name/blob/v1/a/x.pth?download=true": ("org/name", "v1", "a/x.pth"),
}


@pytest.mark.parametrize("text", NAMES)
def test_names_and_addresses_of_models_are_read(text: str) -> None:
    found = ModelRef.parse(text)
    assert (found.repository, found.revision, found.file) == NAMES[text]


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/org/name",
        "https://huggingface.co/datasets/org/name",
        "https://huggingface.co/spaces/org/name",
        "https://huggingface.co",
        "s3://bucket/model",
        "https://huggingface.co.example.org/org/name",
    ],
)
def test_an_address_that_is_no_model_of_the_hub_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="not the address of a model on the Hub; .* give org/name"):
        ModelRef.parse(text)


@pytest.mark.parametrize(
    "text",
    ["./x", "../org/x", "/a/b", "x.pth", "model.safetensors", "org/../x", "x y", "", "a" * 5000 + ".b"],
)
def test_what_can_only_be_a_path_is_refused_as_one(text: str) -> None:
    if text:
        with pytest.raises(ModelNotFoundError, match="does not exist"):
            ModelRef.parse(text)


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("org/name/checkpoint-500", "checkpoint-500"),
        ("org/name/a/b/", "a/b"),
        ("https://huggingface.co/org/name/tree/main/checkpoint-500", "checkpoint-500"),
    ],
)
def test_for_a_folder_of_a_repository_the_command_that_fetches_it_is_named(text: str, folder: str) -> None:
    with pytest.raises(ModelNotFoundError) as told:
        ModelRef.parse(text)
    assert f'hf download org/name --include "{folder}/*" --local-dir DIR' in str(told.value)
    assert f"give DIR/{folder}" in str(told.value)


def test_a_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "roberta-base"):
        (tmp_path / name).mkdir(parents=True)
        assert ModelRef.parse(name).path == Path(name)


def test_a_legacy_name_is_recorded_as_the_name_that_the_hub_redirects_it_to(
    hub: Hub, alice: Visitor, checkpoint: Build
) -> None:
    hub.create("FacebookAI/roberta-base", checkpoint("llama"))
    hub.moved["roberta-base"] = "FacebookAI/roberta-base"
    program = (
        "from svdconvert.hub.download import fetch\n"
        "found = fetch('roberta-base')\nresult = [found.location, found.revision]"
    )
    head = hub.repositories["FacebookAI/roberta-base"].head().oid
    assert alice.runs(program) == ["FacebookAI/roberta-base", head]


def test_a_repository_with_models_in_folders_only_says_which(
    hub: Hub, alice: Visitor, tmp_path: Path
) -> None:
    (tmp_path / "runs" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "runs" / "README.md").write_text("x")
    (tmp_path / "runs" / "checkpoint-5" / "adapter_config.json").write_text("{}")
    hub.create("org/runs", tmp_path / "runs")
    hub.create("org/empty")
    alice.is_refused("inspect", "org/runs", because=["but in checkpoint-5", "hf download org/runs --include"])
    alice.is_refused("inspect", "org/empty", because=["org/empty holds neither a model nor an adapter"])


def test_a_pickled_adapter_is_read_unless_there_is_a_safe_one(
    hub: Hub, alice: Visitor, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    source = decomposed(checkpoint("llama", shard=tiny.SHARDED), rank=2) / "pissa_init"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "old" / "adapter_model.bin")
    hub.create("org/old", tmp_path / "old")
    program = (
        "from pathlib import Path\nfrom svdconvert.hub.download import fetch\n"
        "from svdconvert.adapters.peft_files import open_adapter\n"
        "result = sorted(open_adapter(fetch('org/old', 'adapter').path).source.infos)"
    )
    assert alice.runs(program) == sorted(tensors)
