"""What holds for every method on every family, on tiny random checkpoints."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from svdconvert.adapters.matrix_factors import matrix_factors
from svdconvert.adapters.peft_files import open_adapter
from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.commands.decompose import decompose
from svdconvert.commands.merge import merge
from svdconvert.commands.to_lora import to_lora
from svdconvert.config.execution import Run
from svdconvert.config.progress import Progress
from svdconvert.errors import RecipeError
from svdconvert.linalg.factors import Factors
from svdconvert.linalg.solver import Solver
from svdconvert.manifest.schema import read_manifest
from svdconvert.pipeline.decompose import SplitOptions
from svdconvert.pipeline.merge import MergeOptions
from tests.stock import adapted, logits, plain, same_bits, same_bytes, start_of, tensors, trained_from
from tests.tiny import SHARDED, layout_of
from tests.ways import REBASED, WAYS, chosen, every_pair, every_rebased_pair, every_way

RANK = 4
Build = Callable[..., Path]

every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def roundings(dtype: torch.dtype) -> float:
    """One rounding to `dtype` after arithmetic in float32, as a share of the largest value."""
    return torch.finfo(dtype).eps / 2 + 1e-6


TRIPLETS = ("top", "bottom", "middle", "random")
"""Words for parts of the spectrum; a method with another word is no selection of singular triplets."""
SHAPES = pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
SCALES = pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])


@SCALES
@SHAPES
@every_way
def test_the_factors_have_the_rank_and_shape_that_were_asked_for(
    way: str, shape: tuple[int, int], scale: float
) -> None:
    factors = start(way, torch.randn(shape), scale)
    assert factors.rank == RANK
    assert factors.dense(scale).shape == shape
    assert WAYS[way].residual == bool(factors.dense(scale).abs().max() > 0)


@SCALES
@SHAPES
@pytest.mark.parametrize("way", [way for way in REBASED if WAYS[way].spectrum_part in TRIPLETS])
def test_a_method_takes_its_slice_of_the_singular_values_and_leaves_the_others(
    way: str, shape: tuple[int, int], scale: float
) -> None:
    weight_OI = torch.randn(shape)
    product_OI = start(way, weight_OI, scale).dense(scale)
    sigma = np.linalg.svd(weight_OI.double().numpy(), compute_uv=False)
    taken = np.linalg.svd(product_OI.double().numpy(), compute_uv=False)[:RANK]
    left = np.linalg.svd((weight_OI - product_OI).double().numpy(), compute_uv=False)
    numbers = [int(np.abs(sigma - value).argmin()) for value in taken]
    assert len({*numbers}) == RANK
    first = {"top": 0, "bottom": len(sigma) - RANK, "middle": (len(sigma) - RANK) // 2}.get(
        WAYS[way].spectrum_part
    )
    assert first is None or numbers == [*range(first, first + RANK)]
    assert np.allclose(taken, sigma[numbers], atol=1e-4)
    assert np.allclose(left[:-RANK], np.delete(sigma, numbers), atol=1e-4)
    assert np.abs(left[-RANK:]).max() < 1e-4


@SCALES
@SHAPES
def test_olora_takes_the_first_columns_of_q(shape: tuple[int, int], scale: float) -> None:
    weight_OI = torch.randn(shape)
    factors = start("olora", weight_OI, scale)
    q, r = np.linalg.qr(weight_OI.double().numpy())
    assert np.allclose(factors.dense(scale).numpy(), q[:, :RANK] @ r[:RANK], atol=1e-5)
    assert np.allclose(factors.left_OR.T @ factors.left_OR, np.eye(RANK), atol=1e-5)


def start(way: str, weight_OI: Tensor, scale: float) -> Factors:
    split = WAYS[way].split
    assert split is not None
    return split(weight_OI, RANK, scale, Solver("w", tol=1e-6)).factors


@every_dtype
@every_pair
@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
def test_what_is_stored_adds_up_to_the_base_within_one_rounding(  # noqa: PLR0913
    factors: str, way: str, family: str, dtype: torch.dtype, checkpoint: Build, decomposed: Build
) -> None:
    base = checkpoint(family, dtype=dtype)
    out = decomposed(base, **chosen(way), dtype=factors)
    before, manifest, start = tensors(base), read_manifest(out), open_adapter(start_of(out))
    after = tensors(out) or before
    every = layout_of(base).select(open_checkpoint(base).infos, ["all-linear"])
    assert manifest.matrices.keys() == every.keys()
    for name, matrix in manifest.matrices.items():
        whole, wanted = after[name].float(), before[name].float()
        if WAYS[way].residual:
            whole = whole + matrix_factors(start, matrix)[0].dense(matrix.scale)
        lost = torch.linalg.vector_norm(whole - wanted) / torch.linalg.vector_norm(wanted)
        assert matrix_factors(start, matrix)[0].left_OR.dtype == getattr(torch, factors)
        assert float(lost) == pytest.approx(matrix.error, rel=0.1, abs=3e-7)
        assert lost <= roundings(dtype)


@every_pair
def test_tensors_that_are_no_targets_leave_as_they_are(
    way: str, family: str, checkpoint: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, shard=SHARDED)
    copied = not WAYS[way].residual
    options = SplitOptions(
        **chosen(way), rank=RANK, targets=("attn",), max_shard_size="9KB", copy_base=copied
    )
    manifest = decompose(base, tmp_path / "out", options)
    before, after = tensors(base), tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    assert {matrix.role.split(".")[0] for matrix in manifest.matrices.values()} == {"attn"}
    others = before.keys() - manifest.matrices.keys()
    assert same_bytes({name: after[name] for name in others}, {name: before[name] for name in others})
    moved = [name for name in manifest.matrices if not same_bits(before[name], after[name])]
    assert len(moved) == (len(manifest.matrices) if WAYS[way].residual else 0)


@every_dtype
@every_pair
def test_merging_the_start_from_the_base_gives_the_base_byte_for_byte(  # noqa: PLR0913
    way: str, family: str, dtype: torch.dtype, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, dtype=dtype)
    start = decomposed(base, **chosen(way))
    manifest = merge(start, tmp_path / "out")
    before = tensors(base)
    zeros = torch.cat([before[name][before[name] == 0] for name in read_manifest(start).matrices])
    assert len(zeros) > 100
    assert zeros.signbit().all(), "the sign of a zero is what a sum would lose"
    assert manifest.result.side == "base"
    assert same_bytes(tensors(tmp_path / "out"), before)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@every_dtype
@every_rebased_pair
def test_merging_the_start_from_the_residual_gives_the_base_within_one_rounding(  # noqa: PLR0913
    way: str, family: str, dtype: torch.dtype, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, dtype=dtype)
    merge(decomposed(base, **chosen(way)), tmp_path / "out", MergeOptions(side="residual"))
    before, after = tensors(base), tensors(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: t.dtype for name, t in before.items()
    }
    for name, tensor in before.items():
        largest = tensor.float().abs().max()
        assert (after[name].float() - tensor.float()).abs().max() <= 2 * roundings(dtype) * largest, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_rebased_pair
def test_from_a_float32_residual_every_entry_comes_back(  # noqa: PLR0913
    way: str, family: str, dtype: torch.dtype, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, dtype=dtype)
    merge(
        decomposed(base, **chosen(way), residual_dtype="float32"),
        tmp_path / "out",
        MergeOptions(side="residual"),
    )
    before, after = tensors(base), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == dtype and torch.equal(after[name], before[name]) for name in before)


@every_pair
def test_base_and_lora_are_what_merge_makes_of_a_trained_adapter(
    way: str, family: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, dtype=torch.float32)
    out = decomposed(base, **chosen(way), alpha=7.0)
    trained = trained_from(out, tmp_path / "trained")
    to_lora(trained, tmp_path / "lora", residual=str(out))
    merge(trained, tmp_path / "merged", residual=str(out))
    merged = logits(plain(tmp_path / "merged"))
    moved = (merged - logits(plain(base))).abs().max()
    assert moved > 0.01, "the adapter of this test changes nothing"
    with_lora = logits(adapted(base, tmp_path / "lora"))
    assert (with_lora - merged).abs().max() < 1e-5 * max(1.0, float(merged.abs().max()))
    if WAYS[way].residual:
        merge(trained, tmp_path / "other", MergeOptions(side="residual"), residual=str(out))
        assert (logits(plain(tmp_path / "other")) - merged).abs().max() < 1e-4


@every_pair
def test_a_crash_leaves_no_directory_and_the_same_command_goes_on(
    way: str, family: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base, out = checkpoint(family), tmp_path / "out"
    options = SplitOptions(**chosen(way), rank=RANK)

    def crash(progress: Progress) -> None:
        if progress.done > progress.total // 2:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            decompose(base, out, options, Run(track=crash))
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    decompose(base, out, options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert digests(out) == digests(decomposed(base, **chosen(way)))


@every_pair
def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(
    way: str, family: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, shard=SHARDED)
    first = decomposed(base, **chosen(way))
    torch.manual_seed(11)
    decompose(base, tmp_path / "again", SplitOptions(**chosen(way), rank=RANK))
    assert digests(tmp_path / "again") == digests(first)
    other_seed = SplitOptions(**chosen(way), rank=RANK, seed=1)
    if not WAYS[way].draws and WAYS[way].work != "search":
        with pytest.raises(RecipeError, match="--seed changes nothing"):
            decompose(base, tmp_path / "other", other_seed)
        return
    decompose(base, tmp_path / "other", other_seed)
    engines = {matrix.engine for matrix in read_manifest(first).matrices.values()}
    drawn = WAYS[way].draws or "fast" in engines
    start, other = (
        load_file(start_of(path) / "adapter_model.safetensors") for path in (first, tmp_path / "other")
    )
    assert any(not same_bits(start[name], other[name]) for name in start) == drawn


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file, the manifest too: it speaks of its source, never of its own place."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
