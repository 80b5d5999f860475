"""bitsandbytes' weights, against bitsandbytes itself (on the CPU: widths that are multiples of 64 only)."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from svdconvert.errors import CheckpointError
from svdconvert.quantization import nf4
from tests.quantization.memory import Memory, decode, encode, gaussian, only, view

SETTINGS = {"quant_method": "bitsandbytes"}


def stored(weight: Tensor, kind: str = "nf4", double: bool = False) -> dict[str, Tensor]:
    made = nf4.encode(weight, nf4.Rule(kind, 64, double))  # type: ignore[arg-type]
    return made.tensors("a.weight", torch.bfloat16)


def state_of(tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    name = next(name for name in tensors if "quant_state" in name)
    return name, json.loads(bytes(tensors[name].tolist()))


def with_state(tensors: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    name, state = state_of(tensors)
    text = json.dumps({**state, **changes}).encode()
    return {**tensors, name: torch.tensor([*text], dtype=torch.uint8)}


def test_a_hand_made_file_has_its_right_values() -> None:
    """The byte 0xF0 holds the codes 15 and 0, the first one in the high nibble."""
    text = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 1]}).encode()
    tensors = {
        "a.weight": torch.tensor([[0xF0]], dtype=torch.uint8),
        "a.weight.absmax": torch.tensor([3.0]),
        "a.weight.quant_map": nf4.CODE_BOOKS["nf4"],
        "a.weight.quant_state.bitsandbytes__nf4": torch.tensor([*text], dtype=torch.uint8),
    }
    assert decode(tensors, **SETTINGS).tolist() == [[3.0], [-3.0]]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_bitsandbytes_writes_is_decoded_as_it_does(kind: str, double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(gaussian(96, 192), quant_type=kind, compress_statistics=double)
    tensors = {f"a.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    tensors["a.weight"] = packed
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(decode(tensors, **SETTINGS), expected.float())
    assert [*view(tensors, **SETTINGS).infos] == ["a.weight"]


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_codes_may_be_stored_under_another_type(storage: torch.dtype) -> None:
    tensors = stored(gaussian(8, 64))
    codes = tensors["a.weight"].reshape(-1).view(storage).reshape(-1, 1)
    assert torch.equal(decode({**tensors, "a.weight": codes}), decode(tensors))


@pytest.mark.parametrize("shape", [(3, 5), (7, 33), (64, 48)])
@pytest.mark.parametrize("double", [False, True])
def test_blocks_cross_rows_of_any_width(shape: tuple[int, int], double: bool) -> None:
    weight = gaussian(*shape)
    tensors = stored(weight, double=double)
    found = decode(tensors, **SETTINGS)
    assert (found - weight).norm() / weight.norm() < 0.15


def test_decoded_values_are_encoded_to_the_same_bytes() -> None:
    tensors = stored(gaussian(8, 64))
    again = encode(tensors, decode(tensors), **SETTINGS)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_decoded_values_of_fp4_are_encoded_to_the_same_values() -> None:
    """FP4 has two codes for zero."""
    tensors = stored(gaussian(8, 64), "fp4")
    assert torch.equal(decode(encode(tensors, decode(tensors), **SETTINGS)), decode(tensors))


@pytest.mark.parametrize("double", [False, True])
def test_new_weights_are_written_as_bitsandbytes_does(double: bool) -> None:
    weight = gaussian(96, 192, seed=5)
    made = encode(stored(gaussian(96, 192), double=double), weight, **SETTINGS)
    expected = stored(weight, double=double)
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert torch.equal(decode(made), decode(expected))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [8, 65]},
        {"shape": [10**9, 10**9]},
        {"shape": []},
        {"shape": [-8, -64]},
        {"shape": "8"},
        {"shape": [8.0, 64]},
        {"blocksize": 0},
        {"blocksize": 63},
        {"blocksize": "64"},
        {"blocksize": 32},
        {"blocksize": 64.0},
        {"blocksize": [64]},
        {"quant_type": "fp4"},
    ],
)
def test_a_state_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="a.weight"):
        view(with_state(stored(gaussian(8, 64)), **changes), **SETTINGS)


@pytest.mark.parametrize(
    "changes",
    [
        {"nested_blocksize": 0},
        {"nested_blocksize": 10**30},
        {"nested_blocksize": 16},
        {"nested_offset": "x"},
        {"nested_offset": 10**400},
        {"nested_offset": float("inf")},
    ],
)
def test_a_nested_state_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="a.weight"):
        view(with_state(stored(gaussian(64, 64), double=True), **changes), **SETTINGS)


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff", b"[" * 4000, b" " * 5000])
def test_a_damaged_state_is_refused(text: bytes) -> None:
    tensors = stored(gaussian(8, 64))
    name, _ = state_of(tensors)
    with pytest.raises(CheckpointError, match="a.weight"):
        view({**tensors, name: torch.tensor([*text], dtype=torch.uint8)}, **SETTINGS)


@pytest.mark.parametrize("lost", ["absmax", "quant_map"])
def test_a_lost_companion_is_named(lost: str) -> None:
    tensors = stored(gaussian(8, 64))
    del tensors[f"a.weight.{lost}"]
    with pytest.raises(CheckpointError, match="lacks its absmax or quant_map"):
        view(tensors, **SETTINGS)


def test_the_title_tells_the_type() -> None:
    plugin, coded = only(Memory(stored(gaussian(8, 64), double=True)))
    assert plugin.title(coded) == "bitsandbytes NF4 with double quantisation"


def eight_bit(weight: Tensor) -> dict[str, Tensor]:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    return {"a.weight": codes, "a.SCB": scale, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}


def test_a_hand_made_int8_file_has_its_right_values() -> None:
    tensors = {
        "a.weight": torch.tensor([[127, -127, 0]], dtype=torch.int8),
        "a.SCB": torch.tensor([2.0]),
        "a.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    assert decode(tensors, **SETTINGS).tolist() == [[2.0, -2.0, 0.0]]
    assert [*view(tensors).infos] == ["a.weight"]


def test_int8_decodes_as_in_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    tensors = eight_bit(gaussian(16, 64))
    expected = functional.int8_vectorwise_dequant(tensors["a.weight"], tensors["a.SCB"])
    torch.testing.assert_close(decode(tensors, **SETTINGS), expected.float(), rtol=3e-7, atol=0)


def test_int8_is_written_as_bitsandbytes_does() -> None:
    weight = gaussian(16, 64).half().float()
    expected = eight_bit(weight)
    made = encode({**expected, "a.weight": torch.zeros_like(expected["a.weight"])}, weight, **SETTINGS)
    assert (made["a.weight"].int() - expected["a.weight"].int()).abs().max() <= 1
    assert (made["a.weight"] == expected["a.weight"]).float().mean() > 0.99
    assert torch.equal(made["a.SCB"], expected["a.SCB"].float())
