"""Several adapters, or one with a weight, merged into their base with one rounding."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdconvert import MergeOptions, Run, SplitOptions, decompose, merge, to_lora
from svdconvert.errors import ArtifactError, RecipeError
from tests.conftest import Build
from tests.pipeline.test_combine_adapters import adapter_of, changes_of
from tests.stock import logits, plain, same_bytes, tensors, trained_from

RUN = Run(threads=1)
WEIGHTS = (0.7, -0.4, 1.0)


@pytest.fixture(scope="module")
def base(checkpoint: Build) -> Path:
    return checkpoint("llama", dtype=torch.float32, tied=False)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs of PEFT, one of them with a head, and one trained on a residual."""
    home = tmp_path_factory.mktemp("adapters")
    decompose(base, home / "split", SplitOptions(rank=3, targets="attn.q,mlp.down"), RUN)
    return [
        adapter_of(base, home / "a", 1, r=4, lora_alpha=8),
        adapter_of(base, home / "b", 2, r=2, modules_to_save=["lm_head"]),
        trained_from(home / "split", home / "trained"),
    ]


def test_the_weighted_changes_of_all_adapters_are_added(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    split = tmp_path / "lora"
    to_lora(adapters[2], split, run=RUN, residual=str(adapters[2].parent / "split"))
    chosen = [*adapters[:2], split]
    merge(chosen, tmp_path / "out", MergeOptions(weights=WEIGHTS), RUN, base=str(base), init="none")
    model = plain(base)
    start = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        for weight, path in zip(WEIGHTS, chosen, strict=True):
            for module, change in changes_of(base, path).items():
                model.get_submodule(module).weight += weight * change
        head = load_file(adapters[1] / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
        model.lm_head.weight.copy_(start + WEIGHTS[1] * (head - start))
    assert torch.allclose(logits(plain(tmp_path / "out")), logits(model), atol=1e-5)


def test_a_weight_of_one_is_the_merge_without_a_weight(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    merge(adapters[0], tmp_path / "plain", run=RUN, base=str(base), init="none")
    merge(adapters[0], tmp_path / "one", MergeOptions(weights=(1.0,)), RUN, base=str(base), init="none")
    assert same_bytes(tensors(tmp_path / "one"), tensors(tmp_path / "plain"))


def test_several_changes_are_rounded_once(checkpoint: Build, adapters: list[Path], tmp_path: Path) -> None:
    half = checkpoint("llama", dtype=torch.bfloat16, tied=False)
    chosen = [adapters[0], adapters[0]]
    manifest = merge(chosen, tmp_path / "out", run=RUN, base=str(half), init="none")
    merge(chosen, tmp_path / "exact", MergeOptions(dtype="float32"), RUN, base=str(half), init="none")
    exact, found = tensors(tmp_path / "exact"), tensors(tmp_path / "out")
    for name, value in exact.items():
        assert torch.equal(found[name], value.to(torch.bfloat16)), name
    assert 0.9 < manifest.result.update.cosine < 1.0


def test_what_is_for_one_adapter_is_refused(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    two = adapters[:2]
    for options, given, message in (
        (MergeOptions(side="residual"), {}, "merged into their base"),
        (MergeOptions(weights=(1.0,)), {}, "1 numbers for 2 adapters"),
        (MergeOptions(), {"init": str(adapters[0])}, "one initial adapter for several"),
    ):
        with pytest.raises(RecipeError, match=message):
            merge(two, tmp_path / "out", options, RUN, **{"base": str(base)} | given)
    with pytest.raises(ArtifactError, match="--alpha changes nothing here"):
        merge(two, tmp_path / "out", MergeOptions(alpha=2.0), RUN, base=str(base))
    with pytest.raises(ArtifactError, match="--residual .* changes nothing here"):
        merge(two, tmp_path / "out", run=RUN, base=str(base), init="none", residual=str(base))
    with pytest.raises(ArtifactError, match="base of .* is not found"):
        merge(two, tmp_path / "out", run=RUN, init="none")
