"""Integer codes of compressed-tensors: int-quantized and pack-quantized."""

from typing import Any

import pytest
import torch
from torch import Tensor

from svdconvert.errors import CheckpointError
from svdconvert.quantization.packing import pack
from tests.quantization.memory import Memory, decode, encode, gaussian, only, view


def config(bits: int, symmetric: bool = True, group: int | None = None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


def test_a_hand_made_int8_file_has_its_right_values() -> None:
    codes = torch.tensor([[1, -2, 127], [-128, 0, 5]], dtype=torch.int8)
    tensors = {"a.weight": codes, "a.weight_scale": torch.tensor([[0.5], [0.25]])}
    assert decode(tensors).tolist() == [[0.5, -1.0, 63.5], [-32.0, 0.0, 1.25]]


def test_a_hand_made_int4_file_has_its_right_values() -> None:
    """Codes are stored plus 8, the first one in the lowest bits."""
    tensors = {
        "a.weight_packed": torch.tensor([[0x0F8]], dtype=torch.int32),
        "a.weight_scale": torch.tensor([[0.5]]),
        "a.weight_shape": torch.tensor([1, 3]),
    }
    found = decode(tensors, **config(4))
    assert found.tolist() == [[0.0, 3.5, -4.0]]


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("with_zero", [False, True])
@pytest.mark.parametrize("group", [8, 24, 72])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_codes_of_any_width(bits: int, group: int, with_zero: bool, order: bool) -> None:
    rows, columns, half = 5, 72, 1 << (bits - 1)
    codes = torch.randint(0, 2 * half, (rows, columns))
    zeros = torch.randint(0, 2 * half, (rows, columns // group))
    scale = torch.rand(rows, columns // group).bfloat16() + 0.1
    belongs = torch.arange(columns) // group
    tensors = {
        "a.weight_packed": pack(codes, bits),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([rows, columns]),
    }
    if order:
        belongs = belongs[torch.randperm(columns)]
        tensors["a.weight_g_idx"] = belongs.int()
    if with_zero:
        tensors["a.weight_zero_point"] = pack(zeros.T, bits).T
    else:
        zeros = torch.full_like(zeros, half)
    expected = (codes - zeros[:, belongs]).double() * scale.double()[:, belongs]
    assert torch.equal(decode(tensors, **config(bits, not with_zero, group)), expected.float())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_packed_codes_decode_as_in_compressed_tensors(bits: int, group: int | None, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    tensors, oracle = compressed("pack-quantized", bits, group, symmetric)
    assert torch.equal(decode(tensors, **config(bits, symmetric, group)), oracle)


def compressed(kind: str, bits: int, group: int | None, symmetric: bool) -> tuple[dict[str, Tensor], Tensor]:
    """(stored tensors, decoded weight) of a random matrix, both by compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = gaussian(48, 64)
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if group else "channel",
        group_size=group,
        type="int",
    )
    grouped = weight.unflatten(1, (-1, group or 64))
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(kind)
    stored = compressor.compress(state, scheme)
    decoded = compressor.decompress(dict(stored), scheme)["weight"]
    return {f"a.{name}": tensor for name, tensor in stored.items()}, decoded


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_new_weights_are_written_as_compressed_tensors_does(
    bits: int, group: int | None, symmetric: bool
) -> None:
    """From scales that fit badly, so that the rule's own are better for every group."""
    pytest.importorskip("compressed_tensors")
    tensors, _ = compressed("pack-quantized", bits, group, symmetric)
    wrong = {**tensors, "a.weight_scale": tensors["a.weight_scale"] * 50}
    made = encode(wrong, gaussian(48, 64), **config(bits, symmetric, group))
    for name, tensor in tensors.items():
        assert torch.equal(made[name], tensor), name


@pytest.mark.parametrize("with_zero", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_decoded_values_are_encoded_to_the_same_bytes(bits: int, with_zero: bool) -> None:
    half = 1 << (bits - 1)
    tensors = {
        "a.weight_packed": pack(torch.randint(0, 2 * half, (6, 64)), bits),
        "a.weight_scale": (torch.rand(6, 4) + 0.1).bfloat16(),
        "a.weight_shape": torch.tensor([6, 64]),
        "a.weight_g_idx": (torch.arange(64) // 16)[torch.randperm(64)].int(),
    }
    if with_zero:
        tensors["a.weight_zero_point"] = pack(torch.randint(0, 2 * half, (4, 6)), bits).T.contiguous()
    settings = config(bits, not with_zero, 16)
    made = encode(tensors, decode(tensors, **settings), **settings)
    assert torch.equal(decode(made, **settings), decode(tensors, **settings))
    assert torch.equal(made["a.weight_packed"], tensors["a.weight_packed"])


@pytest.mark.parametrize("shape", [(1,), (6, 1), (6, 4)])
def test_int8_is_written_with_no_more_error_than_half_a_step(shape: tuple[int, ...]) -> None:
    weight = gaussian(6, 64)
    tensors = {"a.weight": torch.zeros(6, 64, dtype=torch.int8), "a.weight_scale": torch.ones(shape)}
    made = encode(tensors, weight)
    largest = weight.unflatten(1, (shape[-1], -1)).abs().amax(-1) if len(shape) == 2 else weight.abs().max()
    step = (largest / 127.5).expand(6, shape[-1]).repeat_interleave(64 // shape[-1], dim=1)
    assert ((decode(made) - weight).abs() <= step * 0.51).all()


def test_the_only_row_of_a_matrix_may_have_groups() -> None:
    tensors = {"a.weight": torch.zeros(1, 64, dtype=torch.int8), "a.weight_scale": torch.ones(1, 4)}
    made = encode(tensors, gaussian(1, 64))
    assert (decode(made) - gaussian(1, 64)).abs().max() < gaussian(1, 64).abs().max() / 200


def test_a_zero_point_of_int8_is_subtracted() -> None:
    tensors = {
        "a.weight": torch.tensor([[1, 2]], dtype=torch.int8),
        "a.weight_scale": torch.tensor([[0.5]]),
        "a.weight_zero_point": torch.tensor([[-3]], dtype=torch.int8),
    }
    assert decode(tensors).tolist() == [[2.0, 2.5]]


def packed(**others: Tensor) -> dict[str, Tensor]:
    tensors = {
        "a.weight_packed": torch.zeros(4, 2, dtype=torch.int32),
        "a.weight_scale": torch.ones(4, 2),
        "a.weight_shape": torch.tensor([4, 16]),
    }
    return tensors | {f"a.{name}": tensor for name, tensor in others.items()}


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"weight_shape": torch.tensor([4, 10**9])}, "cannot hold"),
        ({"weight_shape": torch.tensor([4, -1])}, "cannot hold"),
        ({"weight_shape": torch.tensor([5, 16])}, "cannot hold"),
        ({"weight_shape": torch.tensor([4, 15])}, "does not divide"),
        ({"weight_shape": torch.tensor([4])}, r"needs \[2\]"),
        ({"weight_scale": torch.ones(4, 3)}, "does not divide"),
        ({"weight_scale": torch.ones(4, 2, dtype=torch.int8)}, "no scale of integer codes"),
        ({"weight_zero_point": torch.zeros(4, 2, dtype=torch.int32)}, r"needs \[1, 2\]"),
        ({"weight_g_idx": torch.zeros(8, dtype=torch.int32)}, r"needs \[16\]"),
    ],
)
def test_contradictions_are_refused(others: dict[str, Tensor], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        view(packed(**others), **config(4))


def test_an_order_outside_the_groups_is_refused() -> None:
    with pytest.raises(CheckpointError, match="names a group above 1"):
        decode(packed(weight_g_idx=torch.full((16,), 2, dtype=torch.int32)), **config(4))


def test_bits_that_neither_config_nor_shape_tell_are_refused() -> None:
    with pytest.raises(CheckpointError, match="does not tell how many bits"):
        view(packed(weight_shape=torch.tensor([4, 14])))


@pytest.mark.parametrize("bits", [[4], {}, "4", None, 4.5])
def test_bits_of_any_kind_are_survived(bits: Any) -> None:
    with pytest.raises(CheckpointError, match="does not tell how many bits"):
        view(packed(), **config(bits))


def test_the_titles_name_bits_and_groups() -> None:
    plugin, coded = only(Memory(packed()), **config(4))
    assert plugin.title(coded) == "INT4 in groups of 8"
