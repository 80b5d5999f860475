"""What families call their matrices, against the models of transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.checkpoint.tensors import TensorInfo, TensorSource
from svdconvert.errors import TargetError, UnknownNameError
from svdconvert.layouts.base import LAYOUTS, Layout
from svdconvert.layouts.detect import find_layout
from tests import tiny
from tests.tiny import MODEL_TYPES, PEFT_MODEL_TYPES, layout_of

Build = Callable[..., Path]


def opened(directory: Path) -> tuple[TensorSource, Layout]:
    return open_checkpoint(directory), layout_of(directory)


@pytest.fixture
def llama(checkpoint: Build) -> tuple[TensorSource, Layout]:
    return opened(checkpoint("llama"))


def test_every_model_type_has_one_layout_and_a_tiny_model() -> None:
    assert len(MODEL_TYPES) == len({*MODEL_TYPES}), "two layouts claim one model type"
    assert {tiny.configuration(model_type).model_type for model_type in MODEL_TYPES} == {*MODEL_TYPES}


@pytest.mark.parametrize("model_type", PEFT_MODEL_TYPES)
def test_slots_are_exactly_the_linear_layers_of_the_decoder(model_type: str, checkpoint: Build) -> None:
    source, layout = opened(checkpoint(model_type))
    slots = layout.select(source.infos, ["all-linear"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint(model_type))
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and "head" not in path
        and "vision" not in path
        and not path.startswith("cls.")
    }
    assert {slot.module for slot in slots.values()} == linears.keys()
    for name, slot in slots.items():
        assert torch.equal(linears[slot.module].weight, source.read(name)), f"{slot.module} is not {name}"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_two_roles_claim_one_tensor_and_every_role_is_there(model_type: str, checkpoint: Build) -> None:
    source, layout = opened(checkpoint(model_type))
    slots = layout.select(source.infos, ["all-linear"])
    places = {(slot.role, slot.layer, slot.expert) for slot in slots.values()}
    assert len(places) == len(slots)
    joint = {"experts.gate_up"}  # of tensors with all experts of a layer
    assert {role for role, _, _ in places} == {role for role in layout.roles if "vision" not in role} - joint
    assert {layer for _, layer, _ in places} == {0, 1}
    for name in source.infos:
        assert sum(pattern.fullmatch(name) is not None for _, pattern in layout._patterns) <= 1
    assert len({slot.module for slot in slots.values()}) == len(slots)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_embeddings_heads_norms_and_biases_are_never_targets(model_type: str, checkpoint: Build) -> None:
    source, layout = opened(checkpoint(model_type))
    others = source.infos.keys() - layout.select(source.infos, ["all-linear"]).keys()
    assert any("norm" in name.lower() for name in others) and any("embed" in name for name in others)
    for name in layout.select(source.infos, ["all-linear"]):
        assert not any(word in name for word in ("embed", "head", "norm", "bias", "vision", "projector"))
    norm = next(name for name in others if "norm" in name.lower())
    with pytest.raises(TargetError, match="only tensors that are never decomposed"):
        layout.select(source.infos, [norm])


@pytest.mark.parametrize(
    ("targets", "count", "part"),
    [
        (["all-linear"], 14, "proj"),
        (["attn"], 8, "self_attn"),
        (["mlp"], 6, "mlp"),
        (["attn.q"], 2, "q_proj"),
        (["attn.q", "attn"], 8, "self_attn"),
        (["mlp.down", "attn.v"], 4, "proj"),
        (["model.layers.1.*"], 7, "layers.1."),
        (["*.[qk]_proj.weight"], 4, "_proj"),
        (["model.layers.0.mlp.up_proj.weight"], 1, "layers.0.mlp.up_proj"),
        (["q_proj"], 2, "q_proj"),
        (["q_proj", "self_attn.v_proj"], 4, "_proj"),
        (["model.layers.1.mlp.up_proj"], 1, "layers.1.mlp.up_proj"),
    ],
)
def test_targets_are_all_linear_roles_or_globs(
    llama: tuple[TensorSource, Layout], targets: list[str], count: int, part: str
) -> None:
    source, layout = llama
    chosen = layout.select(source.infos, targets)
    assert len(chosen) == count
    assert all(part in name for name in chosen)
    assert list(chosen) == [name for name in source.infos if name in chosen], "not in the checkpoint's order"


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("attn.w", r"'attn.w' matches no matrix; .*known: attn, attn.k, .*did you mean attn"),
        ("at", "matches no matrix"),
        ("model.layers.7.*", "matches no matrix"),
        ("lm_head.weight", "never decomposed, such as lm_head.weight"),
        ("*embed*", "never decomposed"),
        ("", "matches no matrix"),
    ],
)
def test_a_target_that_matches_nothing_is_refused_even_next_to_one_that_matches(
    llama: tuple[TensorSource, Layout], target: str, complaint: str
) -> None:
    source, layout = llama
    with pytest.raises(TargetError, match=complaint):
        layout.select(source.infos, ["attn", target])


def test_a_checkpoint_of_other_names_is_refused() -> None:
    with pytest.raises(TargetError, match="give another --layout"):
        LAYOUTS.get("llama").select(
            {"h.0.attn.weight": TensorInfo("h.0.attn.weight", (2, 2), "F32")}, ["all-linear"]
        )


def test_an_unknown_layout_or_model_type_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"no layout 'lama'; known: .*bert, .*; did you mean llama\?"):
        find_layout("lama", None, "dir")
    with pytest.raises(
        UnknownNameError, match=r"dir has the model type 'qwen4'.*did you mean qwen[23]\?.*--layout"
    ):
        find_layout(None, "qwen4", "dir")
    with pytest.raises(UnknownNameError, match="model type None"):
        find_layout(None, None, "dir")


def test_a_given_layout_wins() -> None:
    assert find_layout("qwen", "llama", "dir")[0] == "qwen"


def test_a_name_that_only_looks_like_a_pattern_is_no_slot() -> None:
    layout = LAYOUTS.get("llama")
    for name in (
        "model.layers.x.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight.lora",
        "model/layers.0.mlp.up_proj.weight",
        "vision.model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.bias",
    ):
        assert layout.slot(name) is None
