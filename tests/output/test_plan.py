"""Which tensor goes into which file, with huggingface_hub's splitter as the oracle."""

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from svdconvert.checkpoint.header import build_header
from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.output.plan import plan_file, plan_shards


def infos(sizes: list[int]) -> list[TensorInfo]:
    return [TensorInfo(f"t{number}", (size,), "U8") for number, size in enumerate(sizes)]


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_shards_are_filled_and_named_as_the_hub_library_does_it(sizes: list[int]) -> None:
    state = {info.name: torch.empty(info.shape, dtype=torch.uint8) for info in infos(sizes)}
    oracle = split_torch_state_dict_into_shards(state, max_shard_size=50)
    assert {file.path: [info.name for info in file.infos] for file in plan_shards(infos(sizes), 50)} == {
        file: list(names) for file, names in oracle.filename_to_tensors.items()
    }


@given(sizes=st.lists(st.integers(0, 120), min_size=1, max_size=30), limit=st.integers(1, 100))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_shard_is_within_the_limit_or_holds_one_tensor(sizes: list[int], limit: int) -> None:
    planned = plan_shards(infos(sizes), limit)
    assert all(file.nbytes <= limit or len(file.infos) == 1 for file in planned)
    assert [info for file in planned for info in file.infos] == infos(sizes)
    for before, after in zip(planned, planned[1:], strict=False):
        assert before.nbytes + after.infos[0].nbytes > limit, "a shard was closed too early"


def test_wide_elements_come_first_and_else_the_order_stays() -> None:
    codes = ["BF16", "F32", "U8", "F16", "I64", "F32", "BF16", "F8_E4M3"]
    mixed = [TensorInfo(f"t{number}", (3,), code) for number, code in enumerate(codes)]
    assert [info.name for info in plan_file("f", mixed).infos] == [
        "t4",
        "t1",
        "t5",
        "t0",
        "t3",
        "t6",
        "t2",
        "t7",
    ]


def test_tensors_with_wide_elements_come_first_so_that_all_are_aligned() -> None:
    shapes = {"norm": (7,), "q": (64, 64), "bias": (5,), "empty": (0, 4), "wide": (2, 512), "k": (32, 64)}
    mixed = [TensorInfo(name, shape, "F32" if name == "wide" else "BF16") for name, shape in shapes.items()]
    planned = plan_file("f", mixed).infos
    assert [info.name for info in planned] == ["wide", "norm", "q", "bias", "empty", "k"]
    offsets = build_header(planned)[1]
    assert all(offsets[info.name] % (4 if info.dtype == "F32" else 2) == 0 for info in planned)
