"""A real pretrained model: SmolLM2-135M-Instruct in bfloat16, five shards."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.commands.decompose import decompose, plan_decompose
from svdconvert.commands.merge import merge
from svdconvert.manifest.schema import Manifest, read_manifest
from svdconvert.pipeline.decompose import SplitOptions
from svdconvert.pipeline.merge import MergeOptions
from tests.stock import same_bits

RANK = 16
Decomposed = tuple[Path, Manifest]

pytestmark = [pytest.mark.network, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Path:
    return smollm2


@pytest.fixture(scope="module")
def decomposed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Decomposed:
    out = tmp_path_factory.mktemp("smollm2") / "out"
    return out, decompose(model, out, SplitOptions(rank=RANK, max_shard_size="60MB"))


def share_restored(model: Path, merged: Path, manifest: Manifest) -> float:
    """Share of the target entries whose bits are those of the model."""
    before, after = open_checkpoint(model), open_checkpoint(merged)
    same = total = 0
    for name in manifest.matrices:
        wanted = before.read(name).view(torch.int16)
        same += int((after.read(name).view(torch.int16) == wanted).sum())
        total += wanted.numel()
    return same / total


def test_merging_into_the_base_restores_every_tensor_byte_for_byte(
    model: Path, decomposed: Decomposed, tmp_path: Path
) -> None:
    merge(decomposed[0], tmp_path / "merged", MergeOptions(max_shard_size="60MB"))
    before, after = open_checkpoint(model), open_checkpoint(tmp_path / "merged")
    assert before.infos.keys() == after.infos.keys()
    assert all(same_bits(before.read(name), after.read(name)) for name in before.infos)


def test_most_entries_are_restored_from_a_bfloat16_residual(
    model: Path, decomposed: Decomposed, tmp_path: Path
) -> None:
    out, manifest = decomposed
    assert len(manifest.matrices) == 210
    merge(out, tmp_path / "merged", MergeOptions(side="residual"))
    assert share_restored(model, tmp_path / "merged", manifest) >= 0.86
    assert max(matrix.error for matrix in manifest.matrices.values()) < 2.0**-8


def test_all_entries_are_restored_from_a_float32_residual(model: Path, tmp_path: Path) -> None:
    options = SplitOptions(rank=RANK, residual_dtype="float32", targets=("model.layers.[0-3].*",))
    manifest = decompose(model, tmp_path / "out", options)
    merge(tmp_path / "out", tmp_path / "merged", MergeOptions(side="residual"))
    assert len(manifest.matrices) == 28
    assert share_restored(model, tmp_path / "merged", manifest) == 1.0


@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"])
@pytest.mark.parametrize("layer", [0, 15, 29])
def test_the_residual_is_within_the_tolerance_of_the_optimum(
    layer: int, part: str, model: Path, decomposed: Decomposed
) -> None:
    out, manifest = decomposed
    name = f"model.layers.{layer}.{part}.weight"
    known = manifest.matrices[name]
    sigma = torch.linalg.svdvals(open_checkpoint(model).read(name).double())
    optimum = torch.linalg.vector_norm(sigma[RANK:])
    assert torch.linalg.vector_norm(residual(out, name)) / optimum - 1 < read_manifest(out).options["tol"]
    assert known.sigma_first == pytest.approx(float(sigma[0]), rel=1e-4)
    assert known.sigma_last == pytest.approx(float(sigma[RANK - 1]), rel=0.05)
    assert known.energy == pytest.approx(float(sigma[:RANK].square().sum() / sigma.square().sum()), rel=0.02)


@pytest.mark.parametrize(("svd", "digits"), [("exact", 1e-5), ("exact64", 2e-7)])
def test_the_exact_engine_has_the_accuracy_of_lapack_in_either_precision(
    svd: str, digits: float, model: Path, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    options = SplitOptions(rank=RANK, svd=svd, targets=(name,), residual_dtype="float32")
    known = decompose(model, tmp_path / "out", options).matrices[name]
    sigma = torch.linalg.svdvals(open_checkpoint(model).read(name).double())
    optimum = torch.linalg.vector_norm(sigma[RANK:])
    assert known.engine == "exact"
    assert known.sigma_first == pytest.approx(float(sigma[0]), rel=digits)
    assert known.sigma_last == pytest.approx(float(sigma[RANK - 1]), rel=digits)
    assert abs(torch.linalg.vector_norm(residual(tmp_path / "out", name)) / optimum - 1) < 1e-6


def test_the_plan_counts_the_larger_memory_of_float64(model: Path) -> None:
    memory = {
        svd: plan_decompose(model, SplitOptions(rank=RANK, svd=svd)).memory for svd in ("exact", "exact64")
    }
    assert memory["exact64"] - memory["exact"] == 9 * 4 * 1536 * 576


def residual(out: Path, name: str) -> Tensor:
    return open_checkpoint(out).read(name).double()


def test_the_estimate_of_every_matrix_is_within_the_tolerance(decomposed: Decomposed) -> None:
    matrices = decomposed[1].matrices.values()
    assert {matrix.engine for matrix in matrices} == {"fast"}
    assert all(matrix.excess is not None and 0 <= matrix.excess < 1e-3 for matrix in matrices)


def test_shards_are_no_larger_than_asked(decomposed: Decomposed) -> None:
    shards = sorted(decomposed[0].glob("model-*.safetensors"))
    assert len(shards) == 5
    assert all(shard.stat().st_size < 60e6 + 50_000 for shard in shards)


def test_residual_and_initial_adapter_give_the_logits_of_the_base(
    model: Path, decomposed: Decomposed
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (
        "The capital of France is Paris. Water boils at one hundred degrees, and the sun rises in the east."
    )
    tokens = AutoTokenizer.from_pretrained(decomposed[0])(text, return_tensors="pt")
    base, rest = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (model, decomposed[0])
    )
    with torch.no_grad():
        wanted, alone = base(**tokens).logits, rest(**tokens).logits
        initial = PeftModel.from_pretrained(rest, decomposed[0], subfolder="pissa_init").eval()
        found = initial(**tokens).logits
    assert mean_distance(found, wanted) < 0.01
    assert mean_distance(alone, wanted) > 0.5


def mean_distance(found: Tensor, wanted: Tensor) -> float:
    """Mean absolute difference, in standard deviations of `wanted`."""
    return float((found - wanted).abs().mean() / wanted.std())
