"""Our 4-bit codes against bitsandbytes, and against the definition in float64 numpy."""

import json
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from svdconvert.checkpoint.tensors import dtype_code
from svdconvert.quantization.nf4 import (
    CODE_BOOKS,
    Kind,
    Rule,
    decode,
    double_quantize,
    dynamic_map,
    encode,
    encode_state,
    pack,
    quantize,
    state_fields,
    stored_infos,
)

KINDS: tuple[Kind, ...] = ("nf4", "fp4")
SHAPES = [(64, 64), (96, 160), (17, 33), (5, 7), (1, 1), (256, 320)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def matrix(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Weights of the size of a model's, with a few rows of zeros."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    if len(weight) > 8:
        weight[3:6] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_value_becomes_the_nearest_code_of_its_block(kind: Kind, shape: tuple[int, ...]) -> None:
    weight = matrix(shape)
    codes, absmax = quantize(weight.reshape(-1), kind)
    flat = weight.double().numpy().ravel()
    book = CODE_BOOKS[kind].double().numpy()
    for block in range(len(absmax)):
        values = flat[block * 64 : block * 64 + 64]
        largest = np.abs(values).max()
        assert float(absmax[block]) == pytest.approx(largest, abs=1e-37)
        if largest:
            shares = values / largest
            found = np.abs(shares - book[codes.numpy()[block * 64 : block * 64 + 64]])
            assert (found <= np.abs(shares[:, None] - book).min(1) + 1e-6).all()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_decode_as_the_whole_weight_does(kind: Kind, shape: tuple[int, ...], double: bool) -> None:
    stored = encode(matrix(shape), Rule(kind, double=double))
    whole = stored.decode()
    assert whole.shape == shape
    for start in range(shape[0]):
        stop = min(shape[0], start + 3)
        assert torch.equal(stored.decode(slice(start, stop)), whole[start:stop])


def test_a_large_weight_decodes_in_several_steps() -> None:
    weight = matrix((700, 1000))
    stored = encode(weight, Rule())
    codes, absmax = quantize(weight.reshape(-1), "nf4")
    expected = CODE_BOOKS["nf4"][codes.long()] * absmax.repeat_interleave(64)[: codes.numel()]
    assert torch.equal(stored.decode().reshape(-1), expected)


def test_nf4_without_double_quantisation_keeps_its_own_values() -> None:
    once = encode(matrix((96, 160)), Rule()).decode()
    assert torch.equal(encode(once, Rule()).decode(), once)


@pytest.mark.parametrize("kind", KINDS)
def test_values_at_the_bounds_get_the_code_that_a_search_finds(kind: Kind) -> None:
    levels = CODE_BOOKS[kind].sort().values
    bounds = (levels[1:] + levels[:-1]) / 2
    edges = torch.arange(257) / 128 - 1
    near = torch.cat([bounds, levels, edges])
    steps = [near, near.nextafter(torch.tensor(2.0)), near.nextafter(torch.tensor(-2.0))]
    values = torch.cat([torch.tensor([1.0]), *steps]).clamp(-1, 1)
    codes, _ = quantize(values, kind, 4096)
    found = CODE_BOOKS[kind][codes.int()]
    assert torch.equal(found, levels[torch.bucketize(values, bounds)])


@pytest.mark.parametrize("size", [1, 2, 63, 64])
def test_packing_puts_the_first_code_into_the_upper_bits(size: int) -> None:
    codes = torch.arange(size, dtype=torch.uint8) % 16
    bytes_ = pack(codes).tolist()
    assert len(bytes_) == (size + 1) // 2
    nibbles = [half for byte in bytes_ for half in (byte >> 4, byte & 15)]
    assert nibbles[:size] == codes.tolist()


def test_decoding_a_hand_made_block() -> None:
    packed = torch.tensor([0x0F, 0x7E], dtype=torch.uint8)
    values = decode(packed, torch.tensor([2.0]), CODE_BOOKS["nf4"], 64, 0, 4)
    assert values.tolist() == [-2.0, 2.0, 0.0, pytest.approx(2 * 0.7229568362236023)]


def test_double_quantisation_takes_the_nearest_level() -> None:
    absmax = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    codes, nested, offset = double_quantize(absmax)
    assert offset == pytest.approx(float(absmax.double().mean()), rel=1e-6)
    levels = dynamic_map().double().numpy()
    centred = absmax.double().numpy() - offset
    for block in range(4):
        part = slice(block * 256, block * 256 + 256)
        shares = centred[part] / np.abs(centred[part]).max()
        assert float(nested[block]) == pytest.approx(np.abs(centred[part]).max(), rel=1e-5)
        found = np.abs(shares - levels[codes.numpy()[part]])
        assert (found <= np.abs(shares[:, None] - levels).min(1) + 1e-6).all()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_stored_tensors_have_the_planned_shapes(shape: tuple[int, ...], double: bool) -> None:
    rule = Rule(double=double)
    tensors = encode(matrix(shape), rule).tensors("w.weight", torch.bfloat16)
    planned = stored_infos("w.weight", shape, rule, torch.bfloat16)
    assert [(info.name, info.shape, info.dtype) for info in planned] == [
        (name, tuple(tensor.shape), dtype_code(tensor.dtype)) for name, tensor in tensors.items()
    ]
    state = json.loads(bytes(tensors[planned[-1].name].tolist()))
    assert state["shape"] == list(shape)
    assert state["dtype"] == "bfloat16"


def test_a_large_matrix_takes_the_stated_bits() -> None:
    for rule in (Rule(), Rule(double=True)):
        infos = stored_infos("w", (4096, 4096), rule, torch.bfloat16)
        assert sum(info.nbytes for info in infos) * 8 / 4096**2 == pytest.approx(rule.bits, abs=1e-3)


@pytest.mark.parametrize("offset", [1.1754943508222875e-38, 0.05179988220334053, 3.4028234663852886e38])
def test_the_json_has_a_fixed_length_and_keeps_the_offset(offset: float) -> None:
    rule = Rule(double=True)
    length = stored_infos("w", (64, 64), rule, torch.float16)[-1].shape[0]
    for size in (length, length - 6):
        written = json.loads(bytes(encode_state(state_fields(rule, (64, 64), torch.float16, offset), size)))
        assert np.float32(written["nested_offset"]) == np.float32(offset)


class TestBitsandbytes:
    """Bit for bit; only its CPU kernel for double quantisation rounds differently."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_same_bytes_are_written(self, kind: Kind, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        functional = pytest.importorskip("bitsandbytes.functional")
        weight = matrix(shape, dtype)
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
        expected = {"w": packed} | {f"w.{key}": part for key, part in state.as_dict(packed=True).items()}
        found = encode(weight, Rule(kind)).tensors("w", dtype)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    @pytest.mark.parametrize("double", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(64, 64), (96, 192), (256, 320), (3, 128)])
    def test_it_decodes_our_bytes_to_our_values(
        self, kind: Kind, shape: tuple[int, ...], dtype: torch.dtype, double: bool
    ) -> None:
        functional = pytest.importorskip("bitsandbytes.functional")
        stored = encode(matrix(shape, dtype), Rule(kind, double=double))
        parts = {key.removeprefix("w."): part for key, part in stored.tensors("w", dtype).items()}
        packed = parts.pop("w")
        state = functional.QuantState.from_dict(parts, torch.device("cpu"))
        assert torch.equal(functional.dequantize_4bit(packed, state), stored.decode().to(dtype))

    def test_double_quantisation_differs_only_between_two_equally_near_levels(self) -> None:
        functional = pytest.importorskip("bitsandbytes.functional")
        weight = matrix((512, 1024))
        _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        stored = encode(weight, Rule(double=True))
        assert torch.equal(state.state2.code, dynamic_map())
        assert stored.offset == float(state.offset)
        assert stored.nested_scales is not None
        assert torch.equal(stored.nested_scales, state.state2.absmax)
        differ = stored.scales != state.absmax
        assert int((stored.scales.int() - state.absmax.int()).abs().max()) <= 1
        assert int(differ.sum()) <= prod(stored.scales.shape) // 200
