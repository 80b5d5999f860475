"""RWKV-6 under its four sets of names: recognised by its tensors, converted without loss; kin refused."""

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.inputs.model import open_model
from tests.program import content, refused, succeeded
from tests.rwkv6 import random_model, save
from tests.stock import same_bytes

LAYOUTS = ("blinkdl", "hf", "fla", "web-rwkv")


@pytest.fixture(scope="session")
def pth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A width of which 3.5 times is no multiple of 32, float32 vectors among bf16 matrices."""
    tensors = random_model(width=96, head=32)
    mixed = OrderedDict(
        (name, tensor if name.endswith("time_decay") else tensor.bfloat16())
        for name, tensor in tensors.items()
    )
    return save(mixed, tmp_path_factory.mktemp("rwkv6") / "RWKV-x060.pth", None)


@pytest.fixture(scope="session")
def written(pth: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in every layout, each made from the one before."""
    place, model, found = tmp_path_factory.mktemp("layouts"), pth, {}
    for layout in ("hf", "fla", "web-rwkv", "blinkdl"):
        succeeded("convert", model, "-o", place / layout, "--layout", layout)
        model = found[layout] = place / layout
    return found


def read(path: Path) -> "OrderedDict[str, Tensor]":
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert isinstance(loaded, OrderedDict)
    return loaded


def test_from_pth_through_every_layout_and_back_are_the_same_bits_in_the_same_order(
    pth: Path, written: dict[str, Path]
) -> None:
    before, after = read(pth), read(written["blinkdl"] / "model.pth")
    assert list(after) == list(before)
    assert same_bytes(after, before)


@pytest.mark.parametrize("start", LAYOUTS)
@pytest.mark.parametrize("end", LAYOUTS)
def test_every_layout_becomes_every_other(
    start: str, end: str, written: dict[str, Path], tmp_path: Path
) -> None:
    succeeded("convert", written[start], "-o", tmp_path / "out", "--layout", end)
    before, after = open_checkpoint(written[end]), open_checkpoint(tmp_path / "out")
    assert list(after.infos) == list(before.infos)
    assert all(torch.equal(after.read(name), before.read(name)) for name in before.infos)
    succeeded("verify", tmp_path / "out")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_recognised_by_its_tensors_whatever_the_config(
    layout: str, written: dict[str, Path], tmp_path: Path
) -> None:
    name = open_model(str(written[layout])).layout()[0]
    assert name == f"rwkv6-{layout}"
    for config in (None, {"model_type": "rwkv6"}, {"model_type": "llama"}, {}):
        model = tmp_path / str(config)
        shutil.copytree(written[layout], model)
        (model / "svdconvert.json").unlink()
        (model / "config.json").unlink(missing_ok=True)
        if config is not None:
            (model / "config.json").write_text(json.dumps(config))
        assert f"plain checkpoint of the {name} layout" in succeeded("inspect", model).out


def test_the_hugging_face_names_are_known_to_gguf_and_its_config_to_llama_cpp(
    written: dict[str, Path],
) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf knows the names; pip install '.[gguf]'")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.RWKV6, 2)
    found = open_checkpoint(written["hf"]).infos
    assert [name for name in found if names.get_name(name, (".weight", ".bias")) is None] == []
    config = json.loads((written["hf"] / "config.json").read_text())
    assert config["intermediate_size"] == 320
    assert (config["hidden_size"], config["head_size"], config["head_size_divisor"]) == (96, 32, 8)
    assert {"rescale_every", "layer_norm_epsilon", "num_hidden_layers", "vocab_size"} <= config.keys()


def test_the_fla_config_names_what_its_defaults_get_wrong(
    pth: Path, written: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((written["fla"] / "config.json").read_text())
    assert (config["expand_k"], config["expand_v"], config["intermediate_size"]) == (1.0, 1.0, 320)
    assert (config["num_heads"], config["proj_low_rank_dim"], config["gate_low_rank_dim"]) == (3, 5, 6)
    said = succeeded("convert", pth, "-o", tmp_path / "out", "--layout", "fla").err
    assert "64e-5" in said and "1e-5" in said


def test_the_fla_names_hold_what_its_modules_compute(pth: Path, written: dict[str, Path]) -> None:
    """Mixing as flash-linear-attention does it, one layer after the other, against the family's tensors."""
    own = {name: tensor.float() for name, tensor in read(pth).items()}
    fla = {name: tensor.float() for name, tensor in load_file(written["fla"] / "model.safetensors").items()}
    att, theirs = "blocks.1.att.time_", "model.layers.1.attn."
    x, delta = torch.randn(7, 96), torch.randn(7, 96)
    low = torch.tanh((x + delta * fla[theirs + "x_proj.0.mu"]) @ fla[theirs + "x_proj.0.linear.weight"].T)
    up = fla[theirs + "x_proj.2.weight"].view(96, 5, 5)
    mixed = torch.einsum("tfd,cfd->ftc", low.view(7, 5, 5), up) + fla[theirs + "x_bias"][:, None]
    low = torch.tanh((x + delta * own[att + "maa_x"][0]) @ own[att + "maa_w1"]).view(7, 5, 5)
    for place, letter in enumerate("wkvrg"):
        wanted = low[:, place] @ own[att + "maa_w2"][place] + own[f"{att}maa_{letter}"][0]
        assert torch.allclose(mixed["rwkvg".index(letter)], wanted, atol=1e-5)
    decay = torch.tanh(x @ fla[theirs + "w_proj.linear.lora.0.weight"].T)
    decay = decay @ fla[theirs + "w_proj.linear.lora.2.weight"].T + fla[theirs + "w_proj.linear.lora.2.bias"]
    wanted = own[att + "decay"][0] + torch.tanh(x @ own[att + "decay_w1"]) @ own[att + "decay_w2"]
    assert torch.allclose(decay, wanted, atol=1e-5)


def test_a_tuned_state_is_kept_by_layouts_that_can_hold_it(tmp_path: Path) -> None:
    model = save(random_model(state=True), tmp_path / "state.pth")
    succeeded("convert", model, "-o", tmp_path / "web", "--layout", "web-rwkv", "--dtype", "float16")
    state = load_file(tmp_path / "web" / "model.st")["blocks.0.att.time_state"]
    assert torch.equal(state, read(model)["blocks.0.att.time_state"].half().mT)
    succeeded("convert", tmp_path / "web", "-o", tmp_path / "back", "--layout", "blinkdl")
    assert list(read(tmp_path / "back" / "model.pth")) == list(read(model))
    for layout in ("hf", "fla"):
        command = ("convert", model, "-o", tmp_path / "out", "--layout", layout)
        refused(*command, words=["time_state", layout, "no place for"])
    assert not (tmp_path / "out").exists()


def test_lightnings_prefix_and_wrapper_are_taken_off(
    pth: Path, written: dict[str, Path], tmp_path: Path
) -> None:
    inner = OrderedDict((f"model.{name}", tensor) for name, tensor in read(pth).items())
    torch.save({"state_dict": inner}, tmp_path / "wrapped.pth")
    succeeded("convert", tmp_path / "wrapped.pth", "-o", tmp_path / "out", "--layout", "blinkdl")
    assert same_bytes(read(tmp_path / "out" / "model.pth"), read(pth))


@pytest.mark.parametrize("shape", [(3, 32), (96,)])
def test_vectors_are_read_in_every_shape_they_are_found_in(
    shape: tuple[int, ...], pth: Path, written: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(written["hf"], tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    name = "rwkv.blocks.1.attention.time_decay"
    tensors[name] = tensors[name].reshape(shape)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    succeeded("convert", tmp_path / "hf", "-o", tmp_path / "out", "--layout", "blinkdl")
    assert same_bytes(read(tmp_path / "out" / "model.pth"), read(pth))


ATT = "blocks.0.att"
SIBLINGS = {
    "RWKV-4": [f"{ATT}.time_mix_k", f"{ATT}.key.weight"],
    "RWKV-5": [f"{ATT}.time_mix_k", f"{ATT}.ln_x.weight", f"{ATT}.gate.weight"],
    "RWKV-7": [f"{ATT}.r_k", f"{ATT}.x_r", f"{ATT}.ln_x.weight"],
    "x060a": [f"{ATT}.time_maa_w1", f"{ATT}.gate_w1", f"{ATT}.gate_w2"],
    "x060b or x060c": [f"{ATT}.time_maa_rkvw_w1", f"{ATT}.ln_x.weight"],
}


@pytest.mark.parametrize("sibling", SIBLINGS)
@pytest.mark.parametrize("verb", ["decompose", "convert", "inspect"])
def test_a_sibling_is_refused_by_its_name(sibling: str, verb: str, tmp_path: Path) -> None:
    torch.save({name: torch.ones(4, 4) for name in SIBLINGS[sibling]}, tmp_path / "m.pth")
    more = {"decompose": ["-o", tmp_path / "out"], "convert": ["-o", tmp_path / "out", "--layout", "hf"]}
    refused(
        verb, tmp_path / "m.pth", *more.get(verb, []), words=["m.pth is an ", sibling, "no layout covers it"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]


def test_an_rwkv7_of_fla_is_refused_by_its_name(tmp_path: Path) -> None:
    save_file({"model.layers.0.attn.r_k": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    refused("decompose", tmp_path, "-o", tmp_path.parent / "out", words=["an RWKV-7"])


def test_what_is_missing_or_unknown_is_named(pth: Path, checkpoint: object, tmp_path: Path) -> None:
    tensors = dict(read(pth))
    lost = {name: tensor for name, tensor in tensors.items() if name != "blocks.1.ffn.value.weight"}
    torch.save(lost, tmp_path / "lost.pth")
    torch.save(tensors | {"blocks.0.att.odd": torch.ones(1)}, tmp_path / "odd.pth")
    torch.save(tensors | {"blocks.1.ffn.time_maa_k": torch.ones(1, 1, 95)}, tmp_path / "shape.pth")
    out = ["-o", tmp_path / "out", "--layout", "hf"]
    refused("convert", tmp_path / "lost.pth", *out, words=["has no blocks.1.ffn.value.weight", "(1 such"])
    refused("convert", tmp_path / "odd.pth", *out, words=["blocks.0.att.odd is no tensor"])
    refused("convert", tmp_path / "shape.pth", *out, words=["blocks.1.ffn.time_maa_k", "(1, 1, 95)"])
    refused(
        "convert", pth, "-o", tmp_path / "out", "--layout", "gguf", words=["no layout 'gguf'", "web-rwkv"]
    )
    assert {path.name for path in tmp_path.iterdir()} == {"lost.pth", "odd.pth", "shape.pth"}


def test_a_model_without_other_layouts_is_not_converted(checkpoint: object, tmp_path: Path) -> None:
    llama = checkpoint("llama")  # type: ignore[operator]
    refused("convert", llama, "-o", tmp_path / "out", "--layout", "hf", words=["llama", "no other layouts"])


def test_a_value_too_large_for_the_element_type_is_refused(tmp_path: Path) -> None:
    tensors = random_model(layers=1)
    tensors["blocks.0.ffn.key.weight"][3, 4] = 1e5
    model = save(tensors, tmp_path / "m.pth")
    command = ("convert", model, "-o", tmp_path / "out", "--layout", "web-rwkv", "--dtype", "float16")
    refused(*command, words=["blocks.0.ffn.key.weight", "float16"])
    assert not (tmp_path / "out").exists()


def test_several_files_in_a_directory_are_not_chosen_from(pth: Path, tmp_path: Path) -> None:
    shutil.copy(pth, tmp_path / "a.pth")
    assert "rwkv6-blinkdl" in succeeded("inspect", tmp_path).out
    shutil.copy(pth, tmp_path / "b.pth")
    refused("inspect", tmp_path, words=["several checkpoints", "a.pth, b.pth"])


def test_a_vocabulary_next_to_the_file_is_copied_and_nothing_else(pth: Path, tmp_path: Path) -> None:
    shutil.copy(pth, tmp_path / "m.pth")
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text("1 'a' 1\n")
    (tmp_path / "diary.txt").write_text("private")
    succeeded("convert", tmp_path / "m.pth", "-o", tmp_path / "hf", "--layout", "hf")
    assert content(tmp_path / "hf").keys() == {
        "config.json",
        "model.safetensors",
        "rwkv_vocab_v20230424.txt",
        "svdconvert.json",
    }
    (tmp_path / "hf" / "modeling_rwkv6.py").write_text("")
    succeeded("convert", tmp_path / "hf", "-o", tmp_path / "fla", "--layout", "fla")
    assert not (tmp_path / "fla" / "modeling_rwkv6.py").exists()
