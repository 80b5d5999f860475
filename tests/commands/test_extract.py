"""extract: what it writes is the best LoRA for the change, with the error that it states."""

import shutil
from collections import OrderedDict
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdconvert import ExtractOptions, LoraOptions, Manifest, Run, extract, merge, to_lora
from svdconvert.commands.extract import plan_extract
from svdconvert.config.progress import Progress
from svdconvert.errors import ArtifactError, OutputError, RecipeError, TargetError
from svdconvert.manifest.results import Extraction, LoraResult
from tests import rwkv6, stock
from tests.conftest import Build
from tests.loopback_hub.server import Hub
from tests.program import svdconvert
from tests.tiny import SHARDED
from tests.visitor import Visitor

RUN = Run(device="cpu", threads=1)
Change = Callable[[str, Tensor, torch.Generator], Tensor]


def noise(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Every entry moves, in the tensor's own dtype."""
    moved = tensor.float() + 0.1 * torch.randn(tensor.shape, generator=generator)
    return moved.to(tensor.dtype)


def matrices_only(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A change of rank 3 of the matrices of the blocks; everything else stays."""
    if tensor.dim() != 2 or "layers" not in name:
        return tensor
    rows, columns = tensor.shape
    left, right = (torch.randn(shape, generator=generator) for shape in ((rows, 3), (3, columns)))
    return (tensor.float() + 0.05 * left @ right).to(tensor.dtype)


def tuned_from(base: Path, out: Path, change: Change = noise) -> Path:
    """A copy of a checkpoint whose tensors were changed."""
    shutil.copytree(base, out)
    generator = torch.Generator().manual_seed(1)
    for file in sorted(out.glob("*.safetensors")):
        changed = {name: change(name, tensor, generator) for name, tensor in load_file(file).items()}
        save_file(changed, file, {"format": "pt"})
    return out


def extraction(manifest: Manifest) -> Extraction:
    assert isinstance(manifest.result, LoraResult) and manifest.result.extracted is not None
    return manifest.result.extracted


def changes(base: Path, tuned: Path) -> dict[str, np.ndarray]:
    """tuned - base in float64, by tensor."""
    before, after = stock.tensors(base), stock.tensors(tuned)
    return {name: (after[name].double() - before[name].double()).numpy() for name in before}


def spectra(base: Path, tuned: Path) -> dict[str, np.ndarray]:
    """Singular values by LAPACK in float64, of the changes of the blocks' matrices, by module."""
    return {
        name.removesuffix(".weight"): np.linalg.svd(change, compute_uv=False)
        for name, change in changes(base, tuned).items()
        if change.ndim == 2 and "layers" in name
    }


def distance(one: Path, other: Path, base: Path) -> float:
    """||one - other|| / ||other - base|| over all tensors."""
    lost, whole = changes(other, one).values(), changes(base, other).values()
    return sqrt(sum(float((part**2).sum()) for part in lost) / sum(float((part**2).sum()) for part in whole))


@pytest.fixture(scope="module")
def models(checkpoint: Build, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = checkpoint("llama", dtype=torch.float32, tied=False)
    return base, tuned_from(base, tmp_path_factory.mktemp("tuned") / "tuned")


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_error_of_every_matrix_is_the_best_at_its_rank(
    rank: int, models: tuple[Path, Path], tmp_path: Path
) -> None:
    found = extraction(extract(*models, tmp_path / "lora", ExtractOptions(rank=rank), RUN))
    wanted = spectra(*models)
    assert found.modules.keys() == wanted.keys()
    for module, sigma in wanted.items():
        best = sqrt((sigma[rank:] ** 2).sum() / (sigma**2).sum())
        assert best * (1 - 1e-5) <= found.modules[module].error <= best * 1.001 + 1e-6


@pytest.mark.parametrize(
    "options",
    [{"rank": 5}, {"tol": 0.4}, {"energy": 0.7}, {"rank_budget": 70}, {"rank": 3, "keep": "none"}],
    ids=str,
)
def test_merging_the_lora_gives_the_tuned_model_within_the_stated_error(
    options: dict[str, Any], models: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = models
    found = extraction(extract(base, tuned, tmp_path / "lora", ExtractOptions(**options), RUN))
    merge(tmp_path / "lora", tmp_path / "merged", run=RUN)
    assert distance(tmp_path / "merged", tuned, base) == pytest.approx(found.error, rel=1e-4)


def test_the_rules_give_the_smallest_ranks_that_keep_their_promise(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    sigmas = spectra(*models)
    lost = {module: np.sqrt((sigma[::-1] ** 2).cumsum())[::-1] for module, sigma in sigmas.items()}
    by_tol = extraction(extract(*models, tmp_path / "tol", ExtractOptions(tol=0.3), RUN))
    by_energy = extraction(extract(*models, tmp_path / "energy", ExtractOptions(energy=0.91), RUN))
    for module, matrix in by_tol.modules.items():
        assert matrix.rank == int((lost[module] > 0.3 * lost[module][0]).sum())
        assert by_energy.modules[module].rank == matrix.rank  # 0.3^2 = 1 - 0.91


def test_a_budget_keeps_the_largest_singular_values_of_all_matrices(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    found = extraction(extract(*models, tmp_path / "lora", ExtractOptions(rank_budget=90), RUN))
    every = np.sort(np.concatenate([*spectra(*models).values()]))[::-1]
    assert sum(matrix.rank for matrix in found.modules.values()) == 90
    lost = sum((matrix.error * matrix.norm) ** 2 for matrix in found.modules.values())
    assert lost + sum(norm**2 for norm in found.omitted.values()) == pytest.approx(
        float((every[90:] ** 2).sum()), rel=1e-4
    )


def test_a_budget_that_one_matrix_deserves_alone_goes_to_it(checkpoint: Build, tmp_path: Path) -> None:
    def one_large(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
        amount = 10.0 if name == "model.layers.1.mlp.up_proj.weight" else 1e-3
        return tensor + amount * torch.randn(tensor.shape, generator=generator)

    base = checkpoint("llama", dtype=torch.float32, tied=False)
    tuned = tuned_from(base, tmp_path / "tuned", one_large)
    options = ExtractOptions(rank_budget=30, keep="none")
    found = extraction(extract(base, tuned, tmp_path / "lora", options, RUN))
    assert {module: matrix.rank for module, matrix in found.modules.items()} == {
        "model.layers.1.mlp.up_proj": 30
    }


def test_a_merged_lora_is_found_again_with_its_rank(checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint("llama", dtype=torch.float32, tied=False)
    tuned = tuned_from(base, tmp_path / "tuned", matrices_only)
    manifest = extract(base, tuned, tmp_path / "lora", ExtractOptions(tol=1e-3), RUN)
    found = extraction(manifest)
    assert {matrix.rank for matrix in found.modules.values()} == {3}
    assert found.error < 1e-5 and found.kept == () and found.omitted == {}
    factors = stock.tensors(tmp_path / "lora")
    for name, change in changes(base, tuned).items():
        if name.removesuffix(".weight") in found.modules:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            product = factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
            assert np.linalg.norm(product.numpy() - change) <= 1e-6 * np.linalg.norm(change) + 1e-6


def test_matrices_that_did_not_change_get_no_factors(checkpoint: Build, tmp_path: Path) -> None:
    def only_queries(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
        return noise(name, tensor, generator) if "q_proj" in name else tensor

    base = checkpoint("llama", dtype=torch.bfloat16, tied=False)
    tuned = tuned_from(base, tmp_path / "tuned", only_queries)
    extract(base, tuned, tmp_path / "lora", ExtractOptions(rank=4), RUN)
    names = {name.rsplit(".", 3)[1] for name in stock.tensors(tmp_path / "lora")}
    assert names == {"q_proj"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "bert", "roberta", "mixtral"])
def test_every_family_and_its_biases_come_back(family: str, checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint(family, dtype=torch.float32)
    tuned = tuned_from(base, tmp_path / "tuned")
    found = extraction(extract(base, tuned, tmp_path / "lora", ExtractOptions(rank=32), RUN))
    assert found.omitted == {} and found.error < 1e-5
    merge(tmp_path / "lora", tmp_path / "merged", run=RUN)
    assert distance(tmp_path / "merged", tuned, base) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_stock_peft_loads_it_and_gives_the_tuned_models_logits(
    tied: bool, checkpoint: Build, tmp_path: Path
) -> None:
    base = checkpoint("llama", dtype=torch.float32, tied=tied)
    tuned = tuned_from(base, tmp_path / "tuned")
    extract(base, tuned, tmp_path / "lora", ExtractOptions(rank=32), RUN)
    wanted = stock.logits(stock.plain(tuned))
    found = stock.logits(stock.adapted(base, tmp_path / "lora"))
    assert torch.allclose(found, wanted, atol=1e-4)


def test_an_rwkv6_in_its_authors_format_comes_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    before = rwkv6.random_model(layers=1, width=32, head=16)
    after = OrderedDict((name, noise(name, tensor, generator)) for name, tensor in before.items())
    base, tuned = rwkv6.save(before, tmp_path / "base.pth"), rwkv6.save(after, tmp_path / "tuned.pth")
    found = extraction(extract(base, tuned, tmp_path / "lora", ExtractOptions(rank=32), RUN))
    assert found.error < 1e-5 and found.omitted == {}
    merge(tmp_path / "lora", tmp_path / "merged", run=RUN)
    merged = torch.load(next((tmp_path / "merged").glob("*.pth")))
    for name, tensor in torch.load(tuned).items():
        assert torch.allclose(merged[name].float(), tensor.float(), atol=1e-5, rtol=1e-2), name


def test_to_lora_truncates_what_was_extracted(models: tuple[Path, Path], tmp_path: Path) -> None:
    extract(*models, tmp_path / "lora", ExtractOptions(rank=16), RUN)
    cut = to_lora(tmp_path / "lora", tmp_path / "cut", LoraOptions(rank=4), RUN)
    direct = extraction(extract(*models, tmp_path / "direct", ExtractOptions(rank=4), RUN))
    assert isinstance(cut.result, LoraResult) and cut.result.rank == 4
    assert {matrix.rank for matrix in direct.modules.values()} == {4}


def test_equal_checkpoints_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing to extract"):
        extract(models[0], models[0], tmp_path / "lora", run=RUN)
    assert not (tmp_path / "lora").exists()


def test_a_grown_vocabulary_is_refused_unless_it_is_left_out(checkpoint: Build, tmp_path: Path) -> None:
    def grown(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
        if "embed_tokens" in name or "lm_head" in name:
            return torch.cat([tensor, tensor[:2]])
        return noise(name, tensor, generator)

    base = checkpoint("llama", dtype=torch.float32, tied=False)
    tuned = tuned_from(base, tmp_path / "tuned", grown)
    with pytest.raises(ArtifactError, match=r"vocabulary was resized.*--keep none"):
        extract(base, tuned, tmp_path / "lora", run=RUN)
    found = extraction(extract(base, tuned, tmp_path / "lora", ExtractOptions(keep="none"), RUN))
    assert found.kept == ()


def test_checkpoints_of_different_models_are_refused(checkpoint: Build, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="give two checkpoints of one model"):
        extract(checkpoint("llama"), checkpoint("bert"), tmp_path / "lora", run=RUN)


def test_nan_is_refused_by_the_tensors_name(checkpoint: Build, tmp_path: Path) -> None:
    def poisoned(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
        return tensor * float("nan") if "1.mlp.up_proj" in name else tensor

    base = checkpoint("llama", dtype=torch.float32, tied=False)
    tuned = tuned_from(base, tmp_path / "tuned", poisoned)
    with pytest.raises(TargetError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
        extract(base, tuned, tmp_path / "lora", run=RUN)


@pytest.mark.parametrize("row", [0, 999])
def test_integers_that_differ_anywhere_are_refused(row: int, checkpoint: Build, tmp_path: Path) -> None:
    """Also in a tensor that is read in several blocks."""
    base = tmp_path / "base"
    shutil.copytree(checkpoint("llama", dtype=torch.float32, tied=False), base)
    stored = load_file(base / "model.safetensors") | {"codes": torch.zeros(1000, 500, dtype=torch.int32)}
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    tuned = tuned_from(base, tmp_path / "tuned", matrices_only)
    extract(base, tuned, tmp_path / "lora", run=RUN)
    stored = load_file(tuned / "model.safetensors")
    stored["codes"][row, 3] = 1
    save_file(stored, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="codes is stored as I32 and differs"):
        extract(base, tuned, tmp_path / "other", run=RUN)


def test_stream_without_the_hub_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--stream changes nothing here"):
        extract(*models, tmp_path / "lora", run=Run(stream=True))


def test_two_rules_for_the_rank_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="`tol` and `energy` exclude each other"):
        ExtractOptions(tol=0.1, energy=0.9)


def test_the_sketch_predicts_the_errors_that_are_measured_later(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = plan_extract(*models, ExtractOptions(keep="none"), RUN, sketch=True)
    assert plan.changed == 14 and plan.read > 0 and [row.rank for row in plan.ranks] == [1, 2, 4, 8, 16]
    for row in plan.ranks:
        found = extraction(extract(*models, tmp_path / f"{row.rank}", ExtractOptions(rank=row.rank), RUN))
        lost = sum((matrix.error * matrix.norm) ** 2 for matrix in found.modules.values())
        whole = sum(matrix.norm**2 for matrix in found.modules.values())
        assert row.error == pytest.approx(sqrt(lost / whole), rel=2e-3)
        assert row.budget_error <= row.error * (1 + 1e-6)
        factors = {
            name: one for name, one in stock.tensors(tmp_path / f"{row.rank}").items() if "lora_" in name
        }
        assert row.nbytes == sum(tensor.nbytes for tensor in factors.values())
    assert not (tmp_path / "out").exists()


def test_the_command_plans_and_sketches(models: tuple[Path, Path], tmp_path: Path) -> None:
    shown = svdconvert("extract", *models, "--plan")
    assert shown.status == 0 and "attn.q" in shown.out and "--rank-budget" not in shown.out
    sketched = svdconvert("extract", *models, "--plan", "--sketch")
    assert sketched.status == 0 and "--rank-budget" in sketched.out and "--energy 0.9" in sketched.out
    assert svdconvert("extract", *models, "--sketch", "-o", tmp_path / "out").status == 2
    done = svdconvert("extract", *models, "-o", tmp_path / "out", "--rank", 4)
    assert done.status == 0 and "relative error" in done.out and "kept in full" in done.out
    assert svdconvert("verify", tmp_path / "out").status == 0
    assert "extract" not in svdconvert("inspect", tmp_path / "out").err


def test_a_damaged_factor_file_is_computed_again(models: tuple[Path, Path], tmp_path: Path) -> None:
    """As after a power cut: the journal has the matrix, and the file of its factors is not what it says."""
    extract(*models, tmp_path / "whole", ExtractOptions(rank=4), RUN)
    broken: list[str] = []

    def stop(progress: Progress) -> None:
        if progress.done > progress.total // 2:
            file = tmp_path / "out.partial" / "factors" / "1.f32"
            broken.append(progress.phase)
            file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(*models, tmp_path / "out", ExtractOptions(rank=4), Run(device="cpu", threads=1, track=stop))
    assert broken
    extract(*models, tmp_path / "out", ExtractOptions(rank=4), RUN)
    for name in ("adapter_model.safetensors", "adapter_config.json", "svdconvert.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


HUB = """
from svdconvert import ExtractOptions, Run, extract
from svdconvert.hub.equal_files import shared_weights
from svdconvert.inputs.model_pair import open_pair
pair = open_pair("alice/base", "alice/tuned", "extract", stream={stream})
extract("alice/base", "alice/tuned", "out", ExtractOptions(rank=4), Run(threads=1, stream={stream}))
result = [len(pair.equal), len(pair.base.source.infos)]
"""


@pytest.mark.parametrize("stream", [False, True])
def test_equal_files_of_the_hub_are_not_downloaded(
    stream: bool, hub: Hub, alice: Visitor, checkpoint: Build, tmp_path: Path
) -> None:
    def one_layer(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
        return noise(name, tensor, generator) if "layers.1." in name else tensor

    base = checkpoint("llama", dtype=torch.float32, tied=False, shard=SHARDED)
    tuned = tuned_from(base, tmp_path / "tuned", one_layer)
    hub.create("alice/base", base)
    hub.create("alice/tuned", tuned)
    equal, every = alice.runs(HUB.format(stream=stream))
    assert 0 < equal < every
    extract(base, tuned, tmp_path / "local", ExtractOptions(rank=4), RUN)
    found = load_file(alice.home / "out" / "adapter_model.safetensors")
    assert stock.same_bytes(found, stock.tensors(tmp_path / "local"))
    shared = [
        file.name
        for file in base.glob("*.safetensors")
        if file.read_bytes() == (tuned / file.name).read_bytes()
    ]
    assert shared
    cached = {path.name for path in alice.home.rglob("*.safetensors") if "snapshots" in path.parts}
    assert not cached & {*shared}
    assert bool(cached) == (not stream)


def test_factors_that_cannot_be_deleted_are_not_left_in_a_complete_output(
    checkpoint: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint("llama")
    tuned = tuned_from(base, tmp_path / "tuned")

    def broken(path: Path, **_: object) -> None:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("svdconvert.pipeline.extracted_file.shutil.rmtree", broken)
        with pytest.raises(OutputError, match="factors cannot be written: Input/output error"):
            extract(base, tuned, tmp_path / "out", ExtractOptions(rank=2), RUN)
    assert not (tmp_path / "out").exists()
    extract(base, tuned, tmp_path / "out", ExtractOptions(rank=2), RUN)
    assert not (tmp_path / "out" / "factors").exists()
