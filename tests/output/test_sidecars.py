"""What travels with the weights, and the dtype that config.json names."""

import json
from pathlib import Path
from typing import Any

import pytest

from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.errors import CheckpointError
from svdconvert.output.file_kinds import file_kind, sidecar_folders
from svdconvert.output.plan import plan_shards
from svdconvert.output.sidecars import (
    complete_checkpoint,
    copy_sidecars,
    read_config,
    refuse_foreign_sidecars,
    set_config_dtype,
    untie_different,
)

TRAVEL = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "preprocessor_config.json", "modeling_own.py", "LICENSE", "USE_POLICY.md",
)  # fmt: skip
STAY = (
    "README.md", "svdconvert.json", "metrics.jsonl", "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "old.gguf", "x.pth", ".gitattributes", "tf_model.h5",
    "rust_model.ot", "model.onnx", "model.onnx_data", "flax_model.msgpack", "lightning.ckpt",
    "consolidated.00.pth", "consolidated.safetensors", "adapter_config.json", "adapter_model.safetensors",
    "adapter_model.bin", "model.ONNX", "tf_model.h5.index.json", "model.ckpt.index",
)  # fmt: skip


def test_what_a_loader_wants_is_copied_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "models--org--name" / "snapshots" / "commit"
    target = tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "tools.jinja").write_text("t")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("p")
    (source / "2_Dense" / "inner").mkdir(parents=True)
    (source / "2_Dense" / "inner" / "model.safetensors").write_text("d")
    (source / "2_Dense" / ".hidden").write_text("h")
    (source / "onnx").mkdir()
    (source / "onnx" / "config.json").write_text("x")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../blobs"}, {"path": 3}, 7]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "original").mkdir()
    (source / "original" / "consolidated.00.pth").write_text("x")
    for name in STAY:
        (source / name).write_text(name)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    for name in TRAVEL:
        (blobs / name).write_text(name)
        (source / name).symlink_to(blobs / name)
    target.mkdir()
    copy_sidecars(source, target)
    folders = {"additional_chat_templates", "1_Pooling", "2_Dense"}
    assert {path.name for path in target.iterdir()} == {*TRAVEL, *folders, "modules.json"}
    assert (target / "1_Pooling" / "config.json").read_text() == "p"
    assert (target / "2_Dense" / "inner" / "model.safetensors").read_text() == "d"
    assert not (target / "2_Dense" / ".hidden").exists()
    assert (target / "additional_chat_templates" / "tools.jinja").read_text() == "t"
    assert not (target / "config.json").is_symlink()
    assert (target / "merges.txt").read_text() == "merges.txt"


@pytest.mark.parametrize("place", ["notes.txt", "additional_chat_templates/a.jinja", "config.json"])
def test_a_link_out_of_the_model_is_refused_by_name_before_anything_is_copied(
    tmp_path: Path, place: str
) -> None:
    secret, source, target = tmp_path / "id_rsa", tmp_path / "source", tmp_path / "target"
    secret.write_text("secret")
    (source / place).parent.mkdir(parents=True)
    target.mkdir()
    (source / "a.txt").write_text("a")
    (source / place).symlink_to(secret)
    for action in (lambda: copy_sidecars(source, target), lambda: refuse_foreign_sidecars(source)):
        with pytest.raises(CheckpointError, match=f"{place} is reached through a symbolic link"):
            action()
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("where", ["additional_chat_templates", "additional_chat_templates/up"])
def test_a_link_to_a_folder_of_templates_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "source" / where).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "source" / where).symlink_to(tmp_path / "source")
    with pytest.raises(CheckpointError, match=f"{where} is a symbolic link to a folder"):
        refuse_foreign_sidecars(tmp_path / "source")


def test_hidden_files_of_a_template_folder_stay(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates" / ".git").mkdir(parents=True)
    for name in ("a.jinja", ".env", ".git/config"):
        (source / "additional_chat_templates" / name).write_text(name)
    target.mkdir()
    copy_sidecars(source, target)
    assert [str(path.relative_to(target)) for path in target.rglob("*.*")] == [
        "additional_chat_templates/a.jinja"
    ]


@pytest.mark.parametrize(
    ("config", "stored", "wanted"),
    [
        ({"dtype": "bfloat16"}, ["BF16", "F32"], {"dtype": "float32"}),
        ({"dtype": "float32"}, ["BF16", "I64"], {"dtype": "bfloat16"}),
        ({"torch_dtype": "float16"}, ["F32"], {"torch_dtype": "float32"}),
        (
            {"dtype": "float16", "torch_dtype": "float16"},
            ["F32"],
            {"dtype": "float32", "torch_dtype": "float32"},
        ),
        ({"model_type": "llama"}, ["F16"], {"model_type": "llama", "dtype": "float16"}),
        ({"dtype": "bfloat16"}, ["F16", "BF16"], {"dtype": "float32"}),
        ({"dtype": "float32"}, ["F64"], {"dtype": "float64"}),
        ({"dtype": "bfloat16"}, ["I64"], {"dtype": "bfloat16"}),
        (
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "vision_config": {"layers": 2}},
            ["F32"],
            {"dtype": "float32", "text_config": {"dtype": "float32"}, "vision_config": {"layers": 2}},
        ),
        (
            {"model_type": "x", "decoder": {"model_type": "y", "inner_config": {"torch_dtype": "float16"}}},
            ["F32"],
            {
                "model_type": "x",
                "dtype": "float32",
                "decoder": {"model_type": "y", "inner_config": {"torch_dtype": "float32"}},
            },
        ),
        (
            {"dtype": "float16", "quantization_config": {"dtype": "float16"}},
            ["BF16"],
            {"dtype": "bfloat16", "quantization_config": {"dtype": "float16"}},
        ),
    ],
)
def test_config_names_the_widest_float_that_is_stored(
    tmp_path: Path, config: dict[str, Any], stored: list[str], wanted: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    set_config_dtype(tmp_path, stored)
    assert read_config(tmp_path) == wanted


def test_a_config_that_is_right_keeps_its_bytes(tmp_path: Path) -> None:
    text = '{"dtype":   "bfloat16", "é": 1}'
    (tmp_path / "config.json").write_text(text)
    set_config_dtype(tmp_path, ["BF16"])
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize("text", ["", "{", "not json", "[1]", "3", "[" * 100_000, "\udcff"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="config.json is not"):
        read_config(tmp_path)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json is missing"):
        read_config(tmp_path)


@pytest.mark.parametrize(("limit", "index"), [(8, True), (16, False)])
def test_several_shards_have_an_index_and_one_has_none(tmp_path: Path, limit: int, index: bool) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    (tmp_path / "in" / "model.safetensors.index.json").write_text("stale")
    (tmp_path / "out").mkdir()
    shards = plan_shards([TensorInfo("a", (2,), "F32"), TensorInfo("b", (2,), "F32")], limit)
    complete_checkpoint(tmp_path / "in", tmp_path / "out", shards)
    written = tmp_path / "out" / "model.safetensors.index.json"
    assert written.exists() == index
    if index:
        assert json.loads(written.read_text())["metadata"] == {"total_size": 16}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tokenizer.json", "sidecar"),
        ("model.safetensors", "weights"),
        ("adapter_config.json", "adapter"),
        ("README.md", "ours"),
        (".env", "hidden"),
        ("1_Pooling/config.json", "sidecar"),
        ("1_Pooling/.git/config", "hidden"),
        ("2_Dense/config.json", "foreign"),
        ("1_Pooling_old/config.json", "foreign"),
    ],
)
def test_a_file_is_what_its_name_says(name: str, kind: str) -> None:
    assert file_kind(name, ["1_Pooling"]) == kind


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[1]", "[" * 100_000, '[{"path": "/etc"}]', '[{"path": "."}]']
)
def test_a_list_of_modules_names_only_folders_of_its_directory(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    assert sidecar_folders(tmp_path) == ["additional_chat_templates"]


A, B = "1" * 8, "2" * 8


@pytest.mark.parametrize(
    ("config", "stored", "wanted"),
    [
        ({"tie_word_embeddings": True}, {"lm_head.weight": A, "model.embed_tokens.weight": B}, False),
        ({}, {"lm_head.weight": A, "model.embed_tokens.weight": B}, False),
        ({"tie_word_embeddings": True}, {"lm_head.weight": A, "model.embed_tokens.weight": A}, True),
        ({"tie_word_embeddings": True}, {"model.embed_tokens.weight": A}, True),
        ({}, {"cls.predictions.decoder.weight": A, "x.word_embeddings.weight": B}, False),
        ({"tie_word_embeddings": False}, {"lm_head.weight": A, "model.embed_tokens.weight": A}, False),
    ],
)  # fmt: skip
def test_a_head_is_tied_unless_another_matrix_is_stored(
    tmp_path: Path, config: dict[str, Any], stored: dict[str, str], wanted: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    untie_different(
        tmp_path, {f"{number}": {name: mark} for number, (name, mark) in enumerate(stored.items())}
    )
    assert read_config(tmp_path)["tie_word_embeddings"] is wanted


def test_a_head_of_a_part_of_the_model_is_untied_as_well(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"tie_word_embeddings": true}, "x": {"y": 1}}')
    untie_different(tmp_path, {"f": {"lm_head.weight": A, "model.embed_tokens.weight": B}})
    assert read_config(tmp_path) == {
        "text_config": {"tie_word_embeddings": False}, "x": {"y": 1}, "tie_word_embeddings": False
    }  # fmt: skip
