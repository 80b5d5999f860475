"""GPTQ and AWQ, which store (in, out): every value from the bits of its word, in Python's integers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from svdconvert.errors import CheckpointError
from tests.quantization.memory import Memory, decode, only, view


def words(rows: int, columns: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32)


def code(stream: list[int], bits: int, place: int) -> int:
    """The code number `place` of a stream of 32-bit words, lowest bits first."""
    joined = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(stream))
    return joined >> (bits * place) & ((1 << bits) - 1)


def gptq(bits: int, inputs: int = 64, outputs: int = 32, group: int = 32) -> dict[str, Tensor]:
    groups = inputs // group
    return {
        "a.qweight": words(inputs * bits // 32, outputs),
        "a.qzeros": words(groups, outputs * bits // 32),
        "a.scales": (torch.rand(groups, outputs) + 0.1).half(),
        "a.g_idx": (torch.arange(inputs) // group)[torch.randperm(inputs)].int(),
        "a.bias": torch.zeros(outputs),
    }


def expected_gptq(tensors: dict[str, Tensor], bits: int, added: int) -> Tensor:
    inputs, outputs = tensors["a.g_idx"].shape[0], tensors["a.qweight"].shape[1]
    found = torch.empty(outputs, inputs, dtype=torch.float64)
    for o in range(outputs):
        for i in range(inputs):
            group = int(tensors["a.g_idx"][i])
            zero = (code(tensors["a.qzeros"][group].tolist(), bits, o) + added) % (1 << bits)
            q = code(tensors["a.qweight"][:, o].tolist(), bits, i)
            found[o, i] = float(tensors["a.scales"][group, o]) * (q - zero)
    return found.float()


@pytest.mark.parametrize(("version", "added"), [(None, 1), ("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_values(bits: int, version: str | None, added: int) -> None:
    tensors = gptq(bits)
    settings = {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}
    assert torch.equal(decode(tensors, **settings), expected_gptq(tensors, bits, added))
    assert [*view(tensors, **settings).infos] == ["a.weight", "a.bias"]


def test_a_hand_made_gptq_file_has_its_right_values() -> None:
    """A stored zero point of 15 means 0 in the first version, and 15 in the second."""
    tensors = {
        "a.qweight": torch.full((1, 8), 0x76543210, dtype=torch.int32),
        "a.qzeros": torch.full((1, 1), -1, dtype=torch.int32),
        "a.scales": torch.full((1, 8), 0.5).half(),
        "a.g_idx": torch.zeros(8, dtype=torch.int32),
    }
    settings: dict[str, Any] = {"quant_method": "gptq", "bits": 4}
    assert decode(tensors, **settings)[0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    second = decode(tensors, **settings, checkpoint_format="gptq_v2")
    assert second[0].tolist() == [-7.5, -7.0, -6.5, -6.0, -5.5, -5.0, -4.5, -4.0]


def test_gptq_without_an_order_takes_the_groups_one_after_another() -> None:
    tensors = gptq(4)
    tensors["a.g_idx"] = (torch.arange(64) // 32).int()
    without = {name: tensor for name, tensor in tensors.items() if name != "a.g_idx"}
    assert torch.equal(decode(without, quant_method="gptq", bits=4), decode(tensors, bits=4))


def awq(inputs: int = 64, outputs: int = 32, group: int = 32) -> dict[str, Tensor]:
    return {
        "a.qweight": words(inputs, outputs // 8),
        "a.qzeros": words(inputs // group, outputs // 8),
        "a.scales": (torch.rand(inputs // group, outputs) + 0.1).half(),
    }


def test_awq_values() -> None:
    tensors = awq()
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    expected = torch.empty(32, 64, dtype=torch.float64)
    for o in range(32):
        for i in range(64):
            nibble = order.index(o % 8)
            q = code([int(tensors["a.qweight"][i, o // 8])], 4, nibble)
            z = code([int(tensors["a.qzeros"][i // 32, o // 8])], 4, nibble)
            expected[o, i] = float(tensors["a.scales"][i // 32, o]) * (q - z)
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    assert torch.equal(decode(tensors, **settings), expected.float())
    plugin, coded = only(Memory(tensors), **settings)
    assert plugin.title(coded) == "AWQ INT4 in groups of 32"


def test_a_hand_made_awq_file_has_its_right_values() -> None:
    """The word holds the codes of the outputs 0 2 4 6 1 3 5 7, from the lowest bits."""
    tensors = {
        "a.qweight": torch.tensor([[0x75316420]], dtype=torch.int32),
        "a.qzeros": torch.tensor([[0x11111111]], dtype=torch.int32),
        "a.scales": torch.full((1, 8), 0.5).half(),
    }
    assert decode(tensors)[:, 0].tolist() == [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def test_other_versions_of_awq_are_refused() -> None:
    tensors = {**awq(), "a.scales": torch.ones(2, 16).half()}
    with pytest.raises(CheckpointError, match="AWQ version 'gemv', which is not supported"):
        view(tensors, quant_method="awq", version="gemv")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a.scales": torch.ones(2, 31).half()}, "does not fit"),
        ({"a.scales": torch.ones(0, 32).half()}, "does not fit"),
        ({"a.scales": torch.ones(2, 32, dtype=torch.int8)}, "does not fit"),
        ({"a.qzeros": torch.ones(2, 5, dtype=torch.int32)}, "do not explain"),
        ({"a.g_idx": torch.zeros(10**3, dtype=torch.int32)}, "do not explain"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Tensor], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        view({**gptq(4), **changes}, quant_method="gptq", bits=4)


@pytest.mark.parametrize("group", [2, -3])
def test_an_order_outside_the_groups_is_refused(group: int) -> None:
    tensors = {**gptq(4), "a.g_idx": torch.full((64,), group, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match="names a group outside the 2"):
        decode(tensors, bits=4)


@pytest.mark.parametrize("bits", [None, 5, "4", [4], 4.0])
def test_the_shapes_tell_the_bits_if_the_configuration_does_not(bits: object) -> None:
    """As in a checkpoint with other bits in some layers, and without the order of the groups."""
    tensors = {name: tensor for name, tensor in gptq(4).items() if name != "a.g_idx"}
    expected = decode(tensors, quant_method="gptq", bits=4)
    assert torch.equal(decode(tensors, quant_method="gptq", bits=bits), expected)


@pytest.mark.parametrize(
    ("packing", "added"),
    [("auto_round", 0), ("auto_round:gptqmodel", 0), ("auto_round:auto_gptq", 1), (None, 1)],
)
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_autoround_has_both_versions_and_more_bits(bits: int, packing: str | None, added: int) -> None:
    tensors = gptq(bits)
    tensors["a.g_idx"] = (torch.arange(64) // 32).int()
    expected = expected_gptq(tensors, bits, added)
    del tensors["a.g_idx"]
    settings = {"quant_method": "auto-round", "bits": bits, "group_size": 32, "packing_format": packing}
    assert torch.equal(decode(tensors, **settings), expected)


@pytest.mark.parametrize("key", ["checkpoint_format", "packing_format"])
def test_unknown_packings_are_refused_by_name(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"packed as 'marlin', a {key} that is not known"):
        view(gptq(4), quant_method="gptq", bits=4, **{key: "marlin"})
