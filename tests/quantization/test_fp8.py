"""FP8 codes and their scales: per block, row and matrix, and MXFP8."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from svdconvert.errors import CheckpointError
from tests.quantization.memory import Memory, decode, encode, gaussian, only, view

SETTINGS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def stored(codes: Tensor, scale: Tensor, name: str = "weight_scale_inv") -> dict[str, Tensor]:
    return {"a.weight": codes.to(torch.float8_e4m3fn), f"a.{name}": scale}


def test_a_hand_made_file_has_its_right_values() -> None:
    codes = torch.tensor([[1.0, -2.0, 448.0], [0.5, 0.0625, -0.0]])
    found = decode(stored(codes, torch.tensor([[0.5]])), weight_block_size=[2, 3])
    assert found.tolist() == [[0.5, -1.0, 224.0], [0.25, 0.03125, -0.0]]


def test_blocks_at_the_edges_are_cut_off() -> None:
    """576 x 200 as DeepSeek's kv_a_proj_with_mqa: five rows of scales, the last for 64 rows."""
    codes = (torch.randn(576, 200) * 20).to(torch.float8_e4m3fn)
    scale = torch.rand(5, 2) + 0.1
    expected = torch.empty(576, 200, dtype=torch.float64)
    for row in range(576):
        for column in range(200):
            expected[row, column] = codes[row, column].double() * scale[row // 128, column // 128].double()
    found = decode({"a.weight": codes, "a.weight_scale_inv": scale}, **SETTINGS)
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
def test_blocks_decode_as_in_transformers(block: tuple[int, int], dtype: torch.dtype) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = (torch.randn(256, 384) * 20).to(torch.float8_e4m3fn)
    scale = (torch.rand(256 // block[0], 384 // block[1]) + 0.1).to(dtype)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    found = decode(stored(codes.float(), scale), weight_block_size=list(block))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1)])
def test_scales_of_the_matrix_and_of_rows(shape: tuple[int, ...]) -> None:
    codes = (torch.randn(6, 10) * 20).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.1
    expected = codes.double() * (scale.reshape(-1, 1) if scale.numel() == 6 else scale.reshape(())).double()
    tensors = {"a.weight": codes, "a.weight_scale": scale, "a.input_scale": torch.ones(1)}
    assert torch.equal(decode(tensors, quant_method="compressed-tensors"), expected.float())
    assert [*view(tensors).infos] == ["a.weight"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_mxfp8_has_a_power_of_two_per_32_values(dtype: torch.dtype) -> None:
    codes = (torch.randn(4, 64) * 20).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[127, 120], [130, 127], [1, 254], [126, 128]], dtype=torch.uint8)
    factors = (2.0 ** (exponents.double() - 127)).repeat_interleave(32, dim=1)
    found = decode({"a.weight": codes, "a.weight_scale": exponents.view(dtype)}, quant_method="mxfp8")
    assert torch.equal(found, (codes.double() * factors).float())


def test_scales_of_the_cache_of_attention_are_hidden() -> None:
    tensors = stored(torch.ones(4, 4), torch.ones(1)) | {"a.k_scale": torch.ones(1), "a.bias": torch.ones(4)}
    assert [*view(tensors).infos] == ["a.weight", "a.bias"]


def test_scales_that_do_not_fit_are_refused() -> None:
    tensors = stored(torch.ones(300, 300), torch.ones(2, 3))
    with pytest.raises(CheckpointError, match=r"a.weight_scale_inv has the shape \[2, 3\].*needs \[3, 3\]"):
        view(tensors, **SETTINGS)


@pytest.mark.parametrize("size", [0, -1, "128", 1.5, True, None, [128]])
def test_a_block_size_of_any_kind_is_survived(size: object) -> None:
    shown = view(stored(torch.ones(300, 300), torch.ones(3, 3)), weight_block_size=[size, 128])
    assert shown.coded["a.weight"][1].settings["block"] == (128, 128)


@pytest.mark.parametrize(("rows", "columns", "block"), [(256, 384, (128, 128)), (64, 96, (64, 96))])
def test_blocks_are_written_as_transformers_does(rows: int, columns: int, block: tuple[int, int]) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    weight = gaussian(rows, columns)
    config = SimpleNamespace(weight_block_size=block, scale_fmt=None)
    rule = Fp8Quantize(SimpleNamespace(quantization_config=config))._quantize_one("a.weight", weight)
    tensors = stored(torch.zeros(rows, columns), torch.ones(rows // block[0], columns // block[1]))
    made = encode(tensors, weight, weight_block_size=list(block))
    # transformers takes the inverse of the scale twice, which differs in the last place.
    torch.testing.assert_close(made["a.weight_scale_inv"], rule["a.weight_scale_inv"], rtol=3e-7, atol=0)
    same = made["a.weight"].view(torch.uint8) == rule["a.weight"].view(torch.uint8)
    assert same.float().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (130, 1), (2, 3)])
def test_decoded_values_are_encoded_to_the_same_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    first = encode(stored(torch.zeros(130, 320), torch.ones(shape, dtype=dtype)), gaussian(130, 320))
    again = encode(first, decode(first))
    assert torch.equal(again["a.weight"].view(torch.uint8), first["a.weight"].view(torch.uint8))
    assert torch.equal(again["a.weight_scale_inv"], first["a.weight_scale_inv"])
    error = torch.linalg.vector_norm(decode(first) - gaussian(130, 320))
    assert error / torch.linalg.vector_norm(gaussian(130, 320)) < 0.04


def test_mxfp8_is_written_with_the_same_values() -> None:
    first = encode(stored(torch.zeros(4, 320), torch.ones(4, 10, dtype=torch.uint8)), gaussian(4, 320))
    assert torch.equal(decode(encode(first, decode(first))), decode(first))
    error = torch.linalg.vector_norm(decode(first) - gaussian(4, 320))
    assert error / torch.linalg.vector_norm(gaussian(4, 320)) < 0.04


def test_blocks_of_zeros_stay_zero() -> None:
    tensors = stored(torch.zeros(4, 4), torch.ones(4, 1), "weight_scale")
    made = encode(tensors, torch.zeros(4, 4))
    assert torch.equal(decode(made), torch.zeros(4, 4))


def test_the_title_says_what_has_a_scale() -> None:
    for scale, title in (
        (torch.ones(1), "FP8 per tensor"),
        (torch.ones(4, 1), "FP8 per channel"),
        (torch.ones(2, 2), "FP8 in blocks of 2 x 2"),
    ):
        plugin, coded = only(Memory(stored(torch.ones(4, 4), scale)), weight_block_size=[2, 2])
        assert plugin.title(coded) == title
