"""NVFP4 of compressed-tensors, which divides by the matrix's scale, and of ModelOpt, which multiplies."""

import pytest
import torch
from torch import Tensor

from svdconvert.errors import CheckpointError, TargetError
from tests.quantization.memory import Memory, decode, gaussian, only, view


def stored(rows: int = 6, columns: int = 64) -> dict[str, Tensor]:
    return {
        "a.weight_packed": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8),
        "a.weight_scale": (torch.rand(rows, columns // 16) * 400).to(torch.float8_e4m3fn),
        "a.weight_global_scale": torch.tensor([3.7]),
        "a.input_global_scale": torch.tensor([1.0]),
    }


def as_modelopt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "a.weight": tensors["a.weight_packed"],
        "a.weight_scale": tensors["a.weight_scale"],
        "a.weight_scale_2": 1.0 / tensors["a.weight_global_scale"].reshape(()),
        "a.input_scale": torch.tensor(1.0),
    }


def test_a_hand_made_file_has_its_right_values() -> None:
    packed = torch.full((1, 8), 0x72, dtype=torch.uint8)
    scale = torch.tensor([[8.0]]).to(torch.float8_e4m3fn)
    divided = {
        "a.weight_packed": packed,
        "a.weight_scale": scale,
        "a.weight_global_scale": torch.tensor([4.0]),
    }
    assert decode(divided).tolist() == [[2.0, 12.0] * 8]
    multiplied = {"a.weight": packed, "a.weight_scale": scale, "a.weight_scale_2": torch.tensor(4.0)}
    assert decode(multiplied, quant_method="modelopt").tolist() == [[32.0, 192.0] * 8]


def test_it_decodes_as_in_compressed_tensors() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    oracle = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    tensors = stored()
    state = {name.removeprefix("a."): tensor for name, tensor in tensors.items() if "input" not in name}
    expected = oracle.decompress(state, scheme)["weight"].float()  # computed in bfloat16
    found = decode(tensors, quant_method="compressed-tensors")
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


def test_modelopt_stores_the_inverse() -> None:
    tensors = stored()
    found = decode(as_modelopt(tensors), quant_method="modelopt")
    torch.testing.assert_close(found, decode(tensors), rtol=3e-7, atol=0)
    assert [*view(as_modelopt(tensors)).infos] == ["a.weight"]


def test_it_cannot_be_written() -> None:
    plugin, coded = only(Memory(stored()))
    with pytest.raises(TargetError, match="leave out --keep-format"):
        plugin.encode(coded, gaussian(6, 64), {})


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"needs \[6, 4\]"):
        view(stored() | {"a.weight_scale": torch.ones(6, 3).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match="rows of 34 values, which groups of 16 do not divide"):
        view(stored() | {"a.weight_packed": torch.zeros(6, 17, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match=r"needs \[\] or \[1\]"):
        view(stored() | {"a.weight_global_scale": torch.ones(6)})
