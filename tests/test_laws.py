"""What holds for every method on every family, on tiny random checkpoints."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdconvert.adapters.peft_format import open_adapter
from svdconvert.artifact.manifest import read_manifest
from svdconvert.artifact.merging import MergeOptions
from svdconvert.artifact.split import SplitOptions
from svdconvert.checkpoint.reader import open_checkpoint
from svdconvert.layout import find_layout
from svdconvert.linalg.solver import Solver
from svdconvert.method import METHODS
from svdconvert.progress import Progress
from svdconvert.run import Run
from svdconvert.verbs.decompose import decompose
from svdconvert.verbs.merge import merge
from svdconvert.verbs.to_lora import to_lora
from tests.stock import adapted, logits, plain, same_bits, same_bytes, start_of, tensors, trained_from
from tests.tiny import MODEL_TYPES, PEFT_MODEL_TYPES, SHARDED

RANK = 4
Build = Callable[..., Path]

every_method = pytest.mark.parametrize("method", METHODS.names())
every_family = pytest.mark.parametrize("family", MODEL_TYPES)
every_peft_family = pytest.mark.parametrize("family", PEFT_MODEL_TYPES)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def roundings(dtype: torch.dtype) -> float:
    """One rounding to `dtype` after arithmetic in float32, as a share of the largest value."""
    return torch.finfo(dtype).eps / 2 + 1e-6


@every_method
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
def test_a_split_matrix_adds_up_to_the_best_residual(
    method: str, shape: tuple[int, int], scale: float
) -> None:
    weight_OI = torch.randn(shape)
    split = METHODS.get(method).split(weight_OI, RANK, scale, Solver("w", tol=1e-6))
    product_OI = split.factors.dense(scale)
    assert split.factors.rank == RANK
    assert product_OI.shape == shape
    if not METHODS.get(method).residual:
        return
    sigma = torch.linalg.svdvals(weight_OI.double())
    left_over = torch.linalg.svdvals((weight_OI - product_OI).double())
    kept = sigma[:-RANK] if METHODS.get(method).minor else sigma[RANK:]
    assert torch.allclose(left_over[: len(kept)], kept, atol=1e-4)
    assert left_over[len(kept) :].abs().max() < 1e-4


@every_dtype
@every_family
@every_method
@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
def test_what_is_stored_adds_up_to_the_base_within_one_rounding(  # noqa: PLR0913
    factors: str, method: str, family: str, dtype: torch.dtype, checkpoint: Build, decomposed: Build
) -> None:
    base = checkpoint(family, dtype=dtype)
    out = decomposed(base, method=method, dtype=factors)
    before, manifest, start = tensors(base), read_manifest(out), open_adapter(start_of(out))
    after = tensors(out) or before
    assert (
        manifest.matrices.keys() == find_layout(None, family, "")[1].slots(open_checkpoint(base).infos).keys()
    )
    for name, matrix in manifest.matrices.items():
        whole, wanted = after[name].float(), before[name].float()
        if METHODS.get(method).residual:
            whole = whole + start.factors(matrix.module).dense(matrix.scale)
        lost = torch.linalg.vector_norm(whole - wanted) / torch.linalg.vector_norm(wanted)
        assert start.factors(matrix.module).left_OR.dtype == getattr(torch, factors)
        assert float(lost) == pytest.approx(matrix.error, rel=0.1, abs=3e-7)
        assert lost <= roundings(dtype)


@every_family
@every_method
def test_tensors_that_are_no_targets_leave_as_they_are(
    method: str, family: str, checkpoint: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, shard=SHARDED)
    options = SplitOptions(method=method, rank=RANK, targets=("attn",), max_shard_size="9KB", copy_base=True)
    manifest = decompose(base, tmp_path / "out", options)
    before, after = tensors(base), tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    assert {matrix.role.split(".")[0] for matrix in manifest.matrices.values()} == {"attn"}
    others = before.keys() - manifest.matrices.keys()
    assert same_bytes({name: after[name] for name in others}, {name: before[name] for name in others})
    moved = [name for name in manifest.matrices if not same_bits(before[name], after[name])]
    assert len(moved) == (len(manifest.matrices) if METHODS.get(method).residual else 0)


@every_dtype
@every_family
@every_method
def test_merging_the_start_from_the_base_gives_the_base_byte_for_byte(  # noqa: PLR0913
    method: str, family: str, dtype: torch.dtype, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, dtype=dtype)
    manifest = merge(decomposed(base, method=method), tmp_path / "out")
    before = tensors(base)
    slots = [name for name in before if name.endswith("q_proj.weight")]
    assert all(
        (before[name] == 0).any() and before[name][before[name] == 0].signbit().all() for name in slots
    )
    assert manifest.options["side"] == "base"
    assert same_bytes(tensors(tmp_path / "out"), before)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@every_dtype
@every_family
@pytest.mark.parametrize("method", [name for name in METHODS.names() if METHODS.get(name).residual])
def test_merging_the_start_from_the_residual_gives_the_base_within_one_rounding(  # noqa: PLR0913
    method: str, family: str, dtype: torch.dtype, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, dtype=dtype)
    merge(decomposed(base, method=method), tmp_path / "out", MergeOptions(side="residual"))
    before, after = tensors(base), tensors(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: t.dtype for name, t in before.items()
    }
    for name, tensor in before.items():
        largest = tensor.float().abs().max()
        assert (after[name].float() - tensor.float()).abs().max() <= 2 * roundings(dtype) * largest, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_family
@pytest.mark.parametrize("method", [name for name in METHODS.names() if METHODS.get(name).residual])
def test_from_a_float32_residual_every_entry_comes_back(  # noqa: PLR0913
    method: str, family: str, dtype: torch.dtype, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, dtype=dtype)
    merge(
        decomposed(base, method=method, residual_dtype="float32"),
        tmp_path / "out",
        MergeOptions(side="residual"),
    )
    before, after = tensors(base), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == dtype and torch.equal(after[name], before[name]) for name in before)


@every_peft_family
@every_method
def test_base_and_lora_are_what_merge_makes_of_a_trained_adapter(
    method: str, family: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, dtype=torch.float32)
    out = decomposed(base, method=method, alpha=7.0)
    trained = trained_from(out, tmp_path / "trained")
    to_lora(trained, tmp_path / "lora", residual=str(out))
    merge(trained, tmp_path / "merged", residual=str(out))
    merged = logits(plain(tmp_path / "merged"))
    moved = (merged - logits(plain(base))).abs().max()
    assert moved > 0.01, "the adapter of this test changes nothing"
    with_lora = logits(adapted(base, tmp_path / "lora"))
    assert (with_lora - merged).abs().max() < 1e-5 * max(1.0, float(merged.abs().max()))
    if METHODS.get(method).residual:
        merge(trained, tmp_path / "other", MergeOptions(side="residual"), residual=str(out))
        assert (logits(plain(tmp_path / "other")) - merged).abs().max() < 1e-4


@every_family
@every_method
def test_a_crash_leaves_no_directory_and_the_same_command_goes_on(
    method: str, family: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base, out = checkpoint(family), tmp_path / "out"
    options = SplitOptions(method=method, rank=RANK)

    def crash(progress: Progress) -> None:
        if progress.done > progress.total // 2:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            decompose(base, out, options, Run(track=crash))
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    decompose(base, out, options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert digests(out) == digests(decomposed(base, method=method))


@every_family
@every_method
def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(
    method: str, family: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint(family, shard=SHARDED)
    first = decomposed(base, method=method)
    torch.manual_seed(11)
    decompose(base, tmp_path / "again", SplitOptions(method=method, rank=RANK))
    decompose(base, tmp_path / "other", SplitOptions(method=method, rank=RANK, seed=1))
    assert digests(tmp_path / "again") == digests(first)
    drawn = {matrix.engine for matrix in read_manifest(first).matrices.values()} & {None, "fast"}
    start, other = (
        load_file(start_of(path) / "adapter_model.safetensors") for path in (first, tmp_path / "other")
    )
    assert any(not same_bits(start[name], other[name]) for name in start) == bool(drawn)


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file, the manifest too: it speaks of its source, never of its own place."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
