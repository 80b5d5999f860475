"""GGUF files, written by the library `gguf`, against transformers' reading of the same file."""

import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from svdconvert import MergeOptions, Run, SplitOptions, TrainOptions, decompose, merge, train
from svdconvert.checkpoint.gguf_file import GgufFile
from svdconvert.commands.chat import chat
from svdconvert.commands.inspect import inspect
from svdconvert.commands.train import plan_train
from svdconvert.config.chat import ChatOptions
from svdconvert.errors import CheckpointError, TargetError
from svdconvert.inputs.model import open_model
from svdconvert.inputs.storage_format import decoded
from svdconvert.quantization.view import DecodedSource, read_to_compute
from svdconvert.training.compat import reset_accelerate_state
from svdconvert.training.model.load import load_network
from svdconvert.training.model.quantised_linear import QuantisedLinear
from tests.reading import write_sums
from tests.stock import tensors
from tests.tiny import fill

gguf: Any = pytest.importorskip("gguf")
RUN = Run(device="cpu", threads=1)
TYPE = gguf.GGMLQuantizationType
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(weight: Tensor, heads: int) -> Tensor:
    """As llama.cpp's converter: pairs of neighbours instead of two halves."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(file: Path, kind: str = "Q8_0") -> Path:
    """A Llama with two layers; matrices in blocks of `kind`, norms in float32, embeddings in float16."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config)
        fill(model)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    words = ["<unk>", "<s>", "</s>", *(f"\u2581{number}" for number in range(61))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * 64)
    writer.add_token_types([2, 3, 3, *([1] * 61)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, tensor in model.state_dict().items():
        path = name.removesuffix(".weight").removeprefix("model.layers.")
        layer, _, module = path.partition(".") if path[0].isdigit() else ("", "", path)
        if module.endswith(("q_proj", "k_proj")):
            tensor = permuted(tensor, 4 if "q_proj" in module else 2)
        stored = f"blk.{layer}.{NAMES[module]}.weight" if layer else f"{NAMES[module]}.weight"
        values = tensor.float().numpy()
        if "proj" in name:
            codes = gguf.quants.quantize(values, TYPE[kind])
            writer.add_tensor(stored, codes, raw_dtype=TYPE[kind])
        else:
            writer.add_tensor(stored, values if values.ndim == 1 else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_tensor_is_decoded_as_in_transformers(kind: str, tmp_path: Path) -> None:
    source = open_model(str(write(tmp_path / "tiny.gguf", kind))).source
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    expected = model.state_dict()
    assert source.infos.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read_to_compute(source, name), tensor), name
        assert torch.equal(source.read(name), tensor.bfloat16())


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0"])
def test_blocks_of_random_bytes_are_decoded_as_in_the_library(kind: str, tmp_path: Path) -> None:
    _, nbytes = gguf.GGML_QUANT_SIZES[TYPE[kind]]
    codes = np.random.default_rng(0).integers(0, 60, (24, 2 * nbytes), dtype=np.uint8)
    source = with_tensors(tmp_path / "one.gguf", {"blk.0.ffn_up.weight": (codes, TYPE[kind])})
    shown = decoded(source, {}, tmp_path)
    assert isinstance(shown, DecodedSource)
    found = read_to_compute(shown, "model.layers.0.mlp.up_proj.weight")
    expected = gguf.quants.dequantize(codes, TYPE[kind])
    assert found.shape == (24, 512)
    np.testing.assert_array_equal(found.numpy(), expected)


def with_tensors(
    file: Path, tensors: dict[str, tuple[Any, Any]], architecture: str = "qwen2", **metadata: int
) -> GgufFile:
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in metadata.items():
        writer.add_uint32(f"{architecture}.{key.replace('__', '.')}", value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(file)


def test_the_experts_of_a_stack_are_shown_one_by_one(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(3, 8, 32)).astype(np.float32)
    codes = gguf.quants.quantize(values, TYPE.Q8_0)
    source = with_tensors(tmp_path / "moe.gguf", {"blk.1.ffn_up_exps.weight": (codes, TYPE.Q8_0)}, "qwen3moe")
    shown = decoded(source, {}, tmp_path)
    for expert in range(3):
        found = shown.read(f"model.layers.1.mlp.experts.{expert}.up_proj.weight")
        expected = gguf.quants.dequantize(codes[expert], TYPE.Q8_0)
        assert torch.equal(found, torch.from_numpy(expected).bfloat16())


def test_norms_of_gemma_are_less_one(tmp_path: Path) -> None:
    values = np.array([1.5, 0.25], dtype=np.float32)
    source = with_tensors(tmp_path / "g.gguf", {"blk.0.ffn_norm.weight": (values, TYPE.F32)}, "gemma2")
    found = decoded(source, {}, tmp_path).read("model.layers.0.pre_feedforward_layernorm.weight")
    assert found.tolist() == [0.5, -0.75]


def test_a_file_is_decomposed_and_merged_into_a_model_that_transformers_loads(
    file: Path, tmp_path: Path
) -> None:
    decompose(file, tmp_path / "out", SplitOptions(rank=4), RUN)
    merge(tmp_path / "out", tmp_path / "merged", run=RUN)
    source = open_model(str(file)).source
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.read(name)), name
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert not [*(tmp_path / "merged").glob("*.gguf")]


def test_inspect_shows_the_types(file: Path) -> None:
    found = inspect(file).details
    assert found["quantised"] == {"GGUF F16": 2, "GGUF F32": 5, "GGUF Q8_0": 14}
    assert found["layout"] == "llama"


def test_it_cannot_be_written(file: Path, tmp_path: Path) -> None:
    decompose(file, tmp_path / "out", SplitOptions(rank=4), RUN)
    with pytest.raises(TargetError, match="is stored as GGUF Q8_0.*leave out --keep-format"):
        merge(tmp_path / "out", tmp_path / "merged", MergeOptions(side="base", keep_format=True), RUN)


def test_the_network_is_that_of_transformers_and_stays_quantised(file: Path) -> None:
    model = open_model(str(file))
    network = load_network(model.sidecars, model.layout()[1], None)
    quantised = [layer for layer in network.modules() if isinstance(layer, QuantisedLinear)]
    assert len(quantised) == 15
    expected = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(network(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize(("method", "precision"), [("pissa", "fp32"), ("lora", "fp32"), ("pissa", "bf16")])
def test_it_is_trained_and_chatted_with(
    method: str, precision: Literal["fp32", "bf16"], file: Path, tmp_path: Path
) -> None:
    """In memory, and from what decompose wrote, which has no residual with `lora`."""
    write_sums(tmp_path / "sums.jsonl")
    split = SplitOptions(rank=4, method=method)
    data = str(tmp_path / "sums.jsonl")
    options = TrainOptions(data=data, steps=1, batch_size=2, max_length=48, lr=1e-2, precision=precision)
    assert plan_train(file, options, RUN, split=split).steps == 1
    train(file, tmp_path / "trained", options, RUN, split=split)
    decompose(file, tmp_path / "out", split, RUN)
    reset_accelerate_state()
    train(tmp_path / "out", tmp_path / "again", options, RUN)
    reset_accelerate_state()
    one, two = (tensors(tmp_path / name) for name in ("trained", "again"))
    assert one.keys() == two.keys()
    if method == "lora":
        assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    merge(tmp_path / "trained", tmp_path / "merged", run=RUN)
    assert {*tensors(tmp_path / "merged")} == {*open_model(str(file)).source.infos}
    for model in (file, tmp_path / "trained", tmp_path / "again"):
        assert chat(model, ["1 2"], ChatOptions(max_new_tokens=2), RUN)


def test_other_architectures_and_tensors_are_refused_by_name(tmp_path: Path) -> None:
    values = (np.ones((2, 32), dtype=np.float32), TYPE.F32)
    other = with_tensors(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": values}, "mamba")
    with pytest.raises(CheckpointError, match="a model of the architecture 'mamba'"):
        decoded(other, {}, tmp_path)
    odd = with_tensors(tmp_path / "b.gguf", {"blk.0.ssm_out.weight": values})
    with pytest.raises(CheckpointError, match=r"holds blk.0.ssm_out.weight, which is no tensor of a qwen2"):
        decoded(odd, {}, tmp_path)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_the_rows_are_refused(heads: int, tmp_path: Path) -> None:
    values = (np.ones((8, 32), dtype=np.float32), TYPE.F32)
    tensors = {"blk.0.attn_q.weight": values}
    source = with_tensors(tmp_path / "a.gguf", tensors, "llama", attention__head_count=heads)
    with pytest.raises(CheckpointError, match="attention.head_count, which does not divide the rows"):
        decoded(source, {}, tmp_path)


def test_every_cut_and_flipped_header_is_refused_in_one_sentence(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    generator = np.random.default_rng(2)
    cases = [data[:length] for length in (0, 3, 4, 11, 24, 30, 200, 2000, len(data) - 1)]
    for place in range(4, 24):
        cases.append(data[:place] + b"\xff" + data[place + 1 :])
    for _ in range(150):
        place = int(generator.integers(24, 5000))
        cases.append(data[:place] + bytes(generator.integers(0, 256, 8, dtype=np.uint8)) + data[place + 8 :])
    for case in cases:
        damaged.write_bytes(case)
        try:
            source = GgufFile(damaged)
            decoded(source, {}, tmp_path)
        except CheckpointError as error:
            assert str(damaged) in str(error) or "stored" in str(error)
        else:
            assert sum(info.nbytes for info in source.infos.values()) <= 2 * len(case)


def test_an_array_of_an_impossible_length_takes_no_time(tmp_path: Path) -> None:
    """The library's own reader counts to that length."""
    key = b"x"
    for inner in (0, 4, 8, 9):
        text = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
        text += struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, inner, 1 << 60)
        (tmp_path / "long.gguf").write_bytes(text + bytes(100))
        with pytest.raises(CheckpointError, match="is damaged"):
            GgufFile(tmp_path / "long.gguf")


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _entry(name: bytes, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def _file(tensors: list[bytes], entries: list[bytes], data: int) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join([*entries, *tensors])
    return header + bytes(-len(header) % 32) + bytes(data)


_LLAMA = _text(b"general.architecture") + struct.pack("<I", 8) + _text(b"llama")


@pytest.mark.parametrize(
    ("tensors", "entries", "reason"),
    [
        ([_entry(b"a", (4,), 0), _entry(b"a", (4,), 0, 32)], [_LLAMA], "two tensors of one name"),
        ([_entry(b"a", (4,), 0)], [_LLAMA, _LLAMA], "two values of 'general.architecture'"),
        ([_entry(b"a", (1, 1, 3_000_000), 24)], [_LLAMA], "for 3000000 experts"),
        ([_entry(b"\xff", (4,), 0)], [_LLAMA], "is damaged"),
    ],
)
def test_what_the_library_refuses_and_what_is_no_model_is_refused(
    tensors: list[bytes], entries: list[bytes], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "odd.gguf").write_bytes(_file(tensors, entries, 3_000_000))
    with pytest.raises(CheckpointError, match=reason):
        GgufFile(tmp_path / "odd.gguf")


@pytest.mark.parametrize(
    ("counts", "more"),
    [
        ((0, 1), _text(b"x") + struct.pack("<IIQ", 9, 0, 30_000_000_000)),
        ((0, 1), _text(b"x") + struct.pack("<IIQ", 9, 8, 3_000_000_000)),
        ((0, 1), struct.pack("<Q", 30_000_000_000)),
        ((1_000_000_000, 0), b""),
        ((0, 1_000_000_000), b""),
    ],
)
def test_a_header_without_end_in_a_huge_sparse_file_is_refused(
    counts: tuple[int, int], more: bytes, tmp_path: Path
) -> None:
    with (tmp_path / "long.gguf").open("wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQ", 3, *counts) + more)
        stream.truncate(40_000_000_000)
    with pytest.raises(CheckpointError, match="is damaged"):
        GgufFile(tmp_path / "long.gguf")
