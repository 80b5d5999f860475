"""MXFP4: the stacks of experts of gpt-oss, and single matrices."""

from typing import Any

import pytest
import torch
from torch import Tensor

from svdconvert.errors import CheckpointError
from svdconvert.quantization.floats import pack_e2m1, unpack_e2m1
from tests.quantization.memory import decode, encode, gaussian, view

BLOCKS = "model.layers.0.mlp.experts.gate_up_proj_blocks"
SCALES = "model.layers.0.mlp.experts.gate_up_proj_scales"
STACK = "model.layers.0.mlp.experts.gate_up_proj"
GROUPS = {"weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}}


def stack() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        BLOCKS: torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8, generator=generator),
        SCALES: torch.randint(110, 135, (3, 8, 2), dtype=torch.uint8, generator=generator),
    }


def matrix(rows: int = 6, columns: int = 64) -> dict[str, Tensor]:
    return {
        "a.weight_packed": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8),
        "a.weight_scale": torch.randint(100, 140, (rows, columns // 32), dtype=torch.uint8),
    }


def test_a_hand_made_file_has_its_right_values() -> None:
    """0x21 holds 0.5 and 1, the low nibble first; the exponent 128 means times two."""
    packed = torch.full((1, 16), 0x21, dtype=torch.uint8)
    packed[0, -1] = 0xF7
    tensors = {"a.weight_packed": packed, "a.weight_scale": torch.tensor([[128]], dtype=torch.uint8)}
    assert decode(tensors).tolist() == [[1.0, 2.0] * 15 + [12.0, -12.0]]


def test_experts_decode_as_in_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    expected = convert_moe_packed_tensors(stack()[BLOCKS], stack()[SCALES], dtype=torch.float32)
    found = decode(stack(), STACK, quant_method="mxfp4")
    assert found.shape == (3, 64, 8)
    assert torch.equal(found, expected)


def test_experts_show_the_names_and_shapes_of_a_plain_checkpoint() -> None:
    shown = view({**stack(), f"{STACK}_bias": torch.zeros(3, 8)}, "BF16", quant_method="mxfp4")
    assert [(info.name, info.shape, info.dtype) for info in shown.infos.values()] == [
        (STACK, (3, 64, 8), "BF16"),
        (f"{STACK}_bias", (3, 8), "F32"),
    ]


def test_matrices_decode_as_in_compressed_tensors() -> None:
    pytest.importorskip("compressed_tensors")
    tensors = matrix()
    expected = oracle().decompress(local(tensors), scheme())["weight"]
    assert torch.equal(decode(tensors, quant_method="compressed-tensors"), expected.float())


def oracle() -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")


def scheme() -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8, symmetric=True
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


def local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("a."): tensor for name, tensor in tensors.items()}


def test_matrices_are_written_as_compressed_tensors_does() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = gaussian(16, 64)
    grouped = weight.unflatten(1, (-1, 32))
    scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme().weights)
    expected = oracle().compress({"weight": weight, "weight_scale": scale.float()}, scheme())
    made = encode(matrix(16), weight)
    assert torch.equal(made["a.weight_scale"], expected["weight_scale"])
    # Ties between two codes go to either; no other value may differ.
    assert torch.equal(decode(made), oracle().decompress(dict(expected), scheme())["weight"].float())


def test_decoded_values_are_encoded_to_the_same_bytes() -> None:
    first = encode(matrix(), gaussian(6, 64))
    again = encode(first, decode(first))
    assert all(torch.equal(again[name], first[name]) for name in first)
    made = encode(stack(), torch.randn(3, 64, 8), quant_method="mxfp4")
    again = encode(made, decode(made, STACK), quant_method="mxfp4")
    assert all(torch.equal(again[name], made[name]) for name in made)


def test_ties_go_to_the_even_code_and_large_values_saturate() -> None:
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0])
    both = torch.stack([values, -values])
    assert unpack_e2m1(pack_e2m1(both))[0].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert unpack_e2m1(pack_e2m1(both))[1].tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0, -6.0]


def test_all_zero_and_tiny_blocks_are_written() -> None:
    weight = torch.zeros(6, 64)
    weight[1] = 1e-40
    assert decode(encode(matrix(), weight)).abs().max() <= 2.0**-126


def test_deepseeks_experts_have_the_scale_under_another_name() -> None:
    tensors = {
        "a.weight": matrix()["a.weight_packed"].view(torch.int8),
        "a.scale": torch.full((6, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    expected = unpack_e2m1(tensors["a.weight"])
    assert torch.equal(decode(tensors, quant_method="fp8"), expected)


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"needs \[3, 8, 2\]"):
        view({**stack(), SCALES: torch.zeros(3, 8, 1, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match=r"needs \[6, 2\]"):
        view({**matrix(), "a.weight_scale": torch.zeros(6, 3, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match="rows of 34 values, which groups of 32 do not divide"):
        view({**matrix(), "a.weight_packed": torch.zeros(6, 17, dtype=torch.uint8)})
