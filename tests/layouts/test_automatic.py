"""The layout that is found from the network, against the families' own layouts and transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from svdconvert.commands.decompose import decompose, plan_decompose
from svdconvert.config.options import SplitOptions
from svdconvert.errors import CheckpointError, TargetError, UnknownNameError
from svdconvert.inputs.model import open_model
from svdconvert.layouts.automatic import AutomaticLayout, automatic_layout
from tests.families.check import TOLERANCE, load, logits, make
from tests.stock import start_of
from tests.tiny import PEFT_MODEL_TYPES

Build = Callable[..., Path]
DECODERS = [kind for kind in PEFT_MODEL_TYPES if "bert" not in kind and kind != "gemma3"]


def found(directory: Path) -> AutomaticLayout:
    model = open_model(str(directory))
    return automatic_layout(model.path, model.config, model.source.infos)


def made(model_type: str, directory: Path, kind: str = "causal") -> Path:
    make(model_type, kind, directory)
    return directory


def edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_family_with_its_own_layout_gets_the_same_slots(model_type: str, checkpoint: Build) -> None:
    base = checkpoint(model_type)
    model = open_model(str(base))
    name, layout = model.layout()
    assert name != "auto"
    assert found(base).slots(model.source.infos) == layout.slots(model.source.infos)
    assert found(base).task_of(model.source.infos) == layout.task_of(model.source.infos)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3"])
def test_either_way_the_bytes_are_the_same(model_type: str, checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint(model_type)
    decompose(base, tmp_path / "own", SplitOptions(rank=4))
    decompose(base, tmp_path / "auto", SplitOptions(rank=4, layout="auto"))
    files = sorted(path.relative_to(tmp_path / "own") for path in (tmp_path / "own").rglob("*.*"))
    assert len(files) > 4
    for file in files:
        if file.name != "svdconvert.json":
            assert (tmp_path / "own" / file).read_bytes() == (tmp_path / "auto" / file).read_bytes(), file


def test_the_first_tensor_that_the_network_does_not_have_is_named(checkpoint: Build, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in checkpoint("llama").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.router.weight"] = torch.zeros(3, 32)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"holds model.layers.0.mlp.router.weight, which .*LlamaFor.*names"
    ):
        open_model(str(base)).layout("auto")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (
            {"num_hidden_layers": 10**9},
            r"num_hidden_layers 1000000000, and the checkpoint has only \d+ tensors",
        ),
        ({"hidden_size": 10**30}, "cannot build the network"),
        ({"num_attention_heads": "many"}, "cannot build the network"),
        ({"architectures": ["os"], "hidden_size": None}, "cannot build the network"),
    ],
)
def test_a_configuration_that_describes_no_network_is_refused_at_once(
    values: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    base = made("olmo2", tmp_path / "base")
    edit_config(base, **values)
    with pytest.raises(CheckpointError, match=complaint):
        open_model(str(base)).layout()


def test_a_model_type_that_nobody_knows_is_refused_with_a_way_out(tmp_path: Path) -> None:
    base = made("olmo2", tmp_path / "base")
    edit_config(base, model_type="qwen4")
    with pytest.raises(UnknownNameError, match=r"'qwen4'.*did you mean qwen[23].*--layout names"):
        open_model(str(base)).layout()
    edit_config(base, auto_map={"AutoConfig": "configuration_x.X"})
    with pytest.raises(UnknownNameError, match="--trust-remote-code"):
        open_model(str(base)).layout()


def test_the_layout_by_names_says_what_it_assumes(tmp_path: Path) -> None:
    base = made("olmo2", tmp_path / "base")
    edit_config(base, model_type="qwen4")
    plan = plan_decompose(base, SplitOptions(rank=2, layout="names"))
    assert any(
        "assumes" in remark and "model.layers.{layer}.mlp.down_proj.weight" in remark
        for remark in plan.remarks
    )
    model = open_model(str(base))
    assert model.layout("names")[1].slots(model.source.infos) == _of_olmo2(base, model.source.infos)


def _of_olmo2(base: Path, infos: object) -> object:
    edit_config(base, model_type="olmo2")
    return found(base).slots(infos)  # type: ignore[arg-type]


def test_a_checkpoint_without_numbered_blocks_has_no_layout_by_names(tmp_path: Path) -> None:
    save_file({"head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(TargetError, match="no tensor such as layers.0"):
        open_model(str(tmp_path / "model.safetensors")).layout("names")


def test_matrices_of_the_blocks_without_a_role_are_said(tmp_path: Path) -> None:
    base = made("qwen2_moe", tmp_path / "base")
    remarks = " ".join(found(base).remarks())
    assert "model.layers.*.mlp.shared_expert_gate.weight (a vector)" in remarks
    assert "model.layers.*.mlp.gate.weight (a router)" in remarks


def test_a_tower_has_roles_of_its_own_and_is_left_out_unless_named(tmp_path: Path) -> None:
    base = made("gemma3", tmp_path / "base", "image-text")
    model = open_model(str(base))
    layout = found(base)
    usual = layout.select(model.source.infos, ["all-linear"])
    tower = layout.select(model.source.infos, ["vision"])
    both = layout.select(model.source.infos, ["all-linear", "vision"])
    assert {slot.role for slot in usual.values()} == {
        *(f"attn.{part}" for part in "qkvo"),
        *(f"mlp.{part}" for part in ("gate", "up", "down")),
    }
    assert {slot.role for slot in tower.values()} >= {"vision.attn.q", "vision.mlp.fc1"}
    assert len(both) == len(usual) + len(tower)
    network = AutoModelForCausalLM.from_pretrained(base)
    for slot in both.values():
        network.get_submodule(slot.module)


@pytest.mark.parametrize(
    "spelling", ["language_model.model.", "model.language_model."], ids=["transformers-4", "transformers-5"]
)
def test_both_spellings_of_a_vision_language_model_are_understood(spelling: str, tmp_path: Path) -> None:
    base = made("gemma3", tmp_path / "base", "image-text")
    tensors = load_file(base / "model.safetensors")
    stored = next(name for name in tensors if "language_model" in name)
    before = "language_model.model." if stored.startswith("language_model.") else "model.language_model."
    tower = "" if spelling.startswith("language_model") else "model."
    renamed = {
        name.replace(before, spelling) if before in name else tower + name.removeprefix("model."): value
        for name, value in tensors.items()
        if "lm_head" not in name
    }
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    slots = found(base).slots(open_model(str(base)).source.infos)
    assert any(name.startswith(spelling) for name in slots)
    assert {
        slot.module.rpartition(".layers.")[0] for slot in slots.values() if "vision" not in slot.role
    } == {"model.language_model"}


def test_a_body_without_its_head_has_no_task(checkpoint: Build, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(made("olmo2", tmp_path / "base")).model.save_pretrained(
        tmp_path / "body"
    )
    layout = found(tmp_path / "body")
    assert layout.task is None
    assert "layers.0.self_attn.q_proj" in {slot.module for slot in layout.table.values()}


def test_a_matrix_that_the_files_hold_in_one_with_others_is_a_part(tmp_path: Path) -> None:
    base = made("hrm_text", tmp_path / "base")
    model = open_model(str(base))
    layout = found(base)
    source = layout.divided(model.source)
    network = AutoModelForCausalLM.from_pretrained(base)
    slots = layout.slots(source.infos)
    assert any(name.endswith("]") for name in slots)
    for name, slot in slots.items():
        assert torch.equal(network.get_submodule(slot.module).weight, source.read(name)), name


def test_a_conv1d_is_placed_as_in_out(tmp_path: Path) -> None:
    base = made("gpt2", tmp_path / "base")
    layout = found(base)
    assert layout.fan_in_fan_out
    assert all(slot.place is not None and slot.place.transposed for slot in layout.table.values())


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys"
)  # PEFT: those of parameters do count
def test_a_matrix_that_is_narrower_than_the_rank_gets_the_rank_that_it_has(tmp_path: Path) -> None:
    base = made("qwen3_next", tmp_path / "base")
    plan = plan_decompose(base, SplitOptions(rank=12, alpha=24))
    assert any("narrower than rank 12" in remark and "in_proj_ba" in remark for remark in plan.remarks)
    manifest = decompose(base, tmp_path / "out", SplitOptions(rank=12, alpha=24))
    narrow = [matrix for matrix in manifest.matrices.values() if matrix.rank != 12]
    assert narrow and all(matrix.rank == min(matrix.shape) for matrix in narrow)
    assert {matrix.scale for matrix in manifest.matrices.values()} == {2.0}
    started = PeftModel.from_pretrained(load("causal", tmp_path / "out"), start_of(tmp_path / "out"))
    wanted = logits(load("causal", base))
    assert (logits(started) - wanted).abs().max() < TOLERANCE * wanted.std()
    with pytest.raises(TargetError, match=r"rank 999 is above what .* give --rank"):
        plan_decompose(base, SplitOptions(rank=999))


@pytest.mark.slow
def test_modules_into_which_a_rearranged_tensor_goes_are_no_targets(tmp_path: Path) -> None:
    """The tower's q_proj is stored as wq, permuted: the language model's q_proj needs its full path."""
    if "mistral_large4" not in CONFIG_MAPPING:
        pytest.skip("this version of transformers does not know mistral_large4")
    base = made("mistral_large4", tmp_path / "base", "image-text")
    decompose(base, tmp_path / "out", SplitOptions(rank=2))
    adapted = PeftModel.from_pretrained(load("image-text", tmp_path / "out"), start_of(tmp_path / "out"))
    held = [name for name, _ in adapted.named_parameters() if ".lora_A." in name]
    assert held and not [name for name in held if "vision" in name]


def test_weights_that_several_layers_share_are_left_out_and_said(tmp_path: Path) -> None:
    base = made("zamba", tmp_path / "base")
    model = open_model(str(base))
    layout = found(base)
    assert not [slot for slot in layout.slots(model.source.infos).values() if "shared" in slot.module]
    assert any("several layers share it" in remark for remark in layout.remarks())
