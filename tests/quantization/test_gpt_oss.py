"""gpt-oss: the experts of a layer are one quantised tensor, which commands read expert by expert."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig

from svdconvert import MergeOptions, Run, SplitOptions, decompose, merge
from svdconvert.checkpoint.parts import PartsSource
from svdconvert.commands.verify import verify
from svdconvert.inputs.model import open_model
from svdconvert.manifest.fingerprint import tensor_checksum
from svdconvert.quantization.base import FORMATS, Coded
from svdconvert.quantization.view import DecodedSource, read_to_compute, rows_to_compute
from tests.quantization.checkpoints import stored_tensors
from tests.tiny import fill

RUN = Run(device="cpu", threads=1)
STACK = "model.layers.0.mlp.experts.gate_up_proj"


def encode(stack: Tensor) -> tuple[Tensor, Tensor]:
    experts, inputs, outputs = stack.shape
    parts = {
        "codes": torch.zeros(experts, outputs, inputs // 32, 16, dtype=torch.uint8),
        "scale": torch.zeros(experts, outputs, inputs // 32, dtype=torch.uint8),
    }
    coded = Coded("a", tuple(stack.shape), {}, 4, settings={"stacked": True})
    made = FORMATS.get("mxfp4").encode(coded, stack.float(), parts)
    return made["codes"], made["scale"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss as it is published: experts in MXFP4, all else in bfloat16."""
    directory = tmp_path_factory.mktemp("gpt-oss") / "model"
    config = GptOssConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        network = AutoModelForCausalLM.from_config(config)
        fill(network)
        for name, parameter in network.named_parameters():
            if parameter.dim() == 3:
                torch.nn.init.normal_(parameter, std=0.1)
                assert name.endswith(("gate_up_proj", "down_proj"))
    network.to(torch.bfloat16).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        codes, scale = encode(tensors.pop(name))
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": scale}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    values = json.loads((directory / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def view(model: Path) -> DecodedSource:
    source = open_model(str(model)).source
    assert isinstance(source, DecodedSource)
    return source


def test_one_expert_is_read_without_the_others(model: Path) -> None:
    source = view(model)
    parts = PartsSource(source, [f"{STACK}[{expert}]" for expert in range(3)])
    whole = read_to_compute(source, STACK)
    for expert in range(3):
        name = f"{STACK}[{expert}]"
        assert torch.equal(read_to_compute(parts, name), whole[expert])
        assert torch.equal(parts.read(name), whole[expert].bfloat16())
        assert torch.equal(torch.cat([*rows_to_compute(parts, name, 10)]), whole[expert])
        marks: list[bytes] = []
        read_to_compute(parts, name, on_chunk=lambda chunk, marks=marks: marks.append(bytes(chunk)))
        found = PartsSource(source, [f"{STACK}[{number}]" for number in range(3)])
        assert b"".join(marks) == b"".join(bytes(chunk) for chunk in found.chunks(name, 100))
        assert tensor_checksum(parts, name) == tensor_checksum(found, name)


def test_any_section_of_a_decoded_tensor_is_read(model: Path) -> None:
    source = view(model)
    whole = b"".join(bytes(chunk) for chunk in source.chunks(STACK, 1000))
    for begin, end in ((0, 1), (5, 9000), (len(whole) - 3, len(whole)), (8191, 8193)):
        found = b"".join(bytes(chunk) for chunk in source.chunks(STACK, 700, None, slice(begin, end)))
        assert found == whole[begin:end]


def test_transformers_decodes_the_same_values(model: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    source = view(model)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, source.read(name)), name


def test_experts_are_decomposed_and_merged(model: Path, tmp_path: Path) -> None:
    decompose(model, tmp_path / "out", SplitOptions(rank=2), RUN)
    merge(tmp_path / "out", tmp_path / "merged", MergeOptions(side="base"), RUN)
    source = view(model)
    found = stored_tensors(tmp_path / "merged")
    assert found.keys() == source.infos.keys()
    assert all(torch.equal(tensor, source.read(name)) for name, tensor in found.items())
    residual = stored_tensors(tmp_path / "out")
    assert not torch.equal(residual[STACK], found[STACK])
    merge(tmp_path / "out", tmp_path / "kept", MergeOptions(side="base", keep_format=True), RUN)
    assert same(stored_tensors(tmp_path / "kept"), stored_tensors(model))


def test_untouched_experts_keep_their_bytes(model: Path, tmp_path: Path) -> None:
    decompose(model, tmp_path / "out", SplitOptions(rank=2, targets=("attn",)), RUN)
    merge(tmp_path / "out", tmp_path / "kept", MergeOptions(side="base", keep_format=True), RUN)
    before = stored_tensors(model)
    after = stored_tensors(tmp_path / "kept")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_adapted_experts_are_quantised_again_and_no_others(model: Path, tmp_path: Path) -> None:
    """Of the experts of one stack, one is adapted: the codes of the others keep their bytes."""
    target = f"{STACK}[1]"
    decompose(model, tmp_path / "out", SplitOptions(rank=2, targets=(f"{STACK}[[]1[]]",)), RUN)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (init,) = (tmp_path / "out").glob("*_init")
    (adapter / "adapter_config.json").write_bytes((init / "adapter_config.json").read_bytes())
    tensors = load_file(init / "adapter_model.safetensors")
    tensors = {name: tensor * 1.5 for name, tensor in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    options = MergeOptions(keep_format=True)
    manifest = merge(adapter, tmp_path / "kept", options, RUN, base=str(model), init=str(init))
    merge(adapter, tmp_path / "plain", MergeOptions(), RUN, base=str(model), init=str(init))
    before, after = stored_tensors(model), stored_tensors(tmp_path / "kept")
    assert before.keys() == after.keys()
    changed = {
        (name, expert)
        for name, tensor in before.items()
        for expert in range(len(tensor))
        if not torch.equal(tensor[expert], after[name][expert])
    }
    assert changed <= {(f"{STACK}_blocks", 1), (f"{STACK}_scales", 1)} and changed
    exact = stored_tensors(tmp_path / "plain")[STACK]
    found = view(tmp_path / "kept").read(STACK)
    assert torch.equal(found[0], exact[0]) and torch.equal(found[2], exact[2])
    assert (found[1] - exact[1]).norm() < 0.15 * exact[1].norm()
    assert manifest.result.update is not None and [*manifest.result.update.matrices] == [target]
    assert verify(tmp_path / "kept").passed
