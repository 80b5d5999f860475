"""Adapters combined from files, against PEFT's add_weighted_adapter in memory."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdconvert import CombineOptions, MergeOptions, Run, SplitOptions, combine, decompose, merge, to_lora
from svdconvert.errors import ArtifactError, RecipeError
from tests.conftest import Build
from tests.stock import logits, plain, tensors, trained_from

RUN = Run(threads=1)
WEIGHTS = (0.7, -0.4)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapter_of(base: Path, out: Path, seed: int, **config: object) -> Path:
    """A LoRA as PEFT saves it, with random factors on both sides."""
    options = {"task_type": "CAUSAL_LM", "target_modules": TARGETS} | config
    model = get_peft_model(plain(base), LoraConfig(**options))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def base(checkpoint: Build) -> Path:
    return checkpoint("llama", dtype=torch.float32, tied=False)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    return {
        "a": adapter_of(base, home / "a", 1, r=4, lora_alpha=8),
        "b": adapter_of(base, home / "b", 2, r=4, lora_alpha=6),
        "wide": adapter_of(base, home / "wide", 3, r=6, lora_alpha=3, use_rslora=True),
        "patterns": adapter_of(
            base,
            home / "patterns",
            4,
            r=3,
            lora_alpha=6,
            rank_pattern={"q_proj": 5},
            alpha_pattern={"v_proj": 2},
        ),
        "few": adapter_of(base, home / "few", 5, r=2, target_modules=["q_proj"]),
        "saved": adapter_of(base, home / "saved", 6, r=2, modules_to_save=["lm_head"]),
        "saved too": adapter_of(base, home / "saved too", 7, r=2, modules_to_save=["lm_head"]),
    }


def peft_changes(base: Path, chosen: Sequence[Path], kind: str, **given: object) -> dict[str, Tensor]:
    """Module -> change of the combination that PEFT makes."""
    names = [f"n{number}" for number in range(len(chosen))]
    model = PeftModel.from_pretrained(plain(base), chosen[0], adapter_name=names[0])
    for path, name in zip(chosen[1:], names[1:], strict=True):
        model.load_adapter(path, name)
    model.base_model.add_weighted_adapter(names, list(WEIGHTS), "out", combination_type=kind, **given)
    return changes_in(model, "out")


def changes_in(model: PeftModel, name: str) -> dict[str, Tensor]:
    return {
        path.removeprefix("base_model.model."): module.get_delta_weight(name).detach()
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and name in module.lora_A
    }


def changes_of(base: Path, lora: Path) -> dict[str, Tensor]:
    return changes_in(PeftModel.from_pretrained(plain(base), lora), "default")


PARITY: dict[str, tuple[str, dict[str, object], CombineOptions]] = {
    "cat": ("cat", {}, CombineOptions(weights=WEIGHTS)),
    "linear": ("linear", {}, CombineOptions(method="peft-linear", weights=WEIGHTS)),
    "svd": ("svd", {"svd_rank": 3}, CombineOptions(weights=WEIGHTS, rank=3)),
    **{
        kind: (
            kind,
            {"density": 0.6} | ({"svd_rank": 3} if kind.endswith("svd") else {}),
            CombineOptions(
                method=f"peft-{kind.replace('_', '-')}",
                weights=WEIGHTS,
                density=0.6,
                rank=3 if kind.endswith("svd") else None,
            ),
        )
        for kind in ("ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd")
    },
}


@pytest.mark.parametrize("kind", PARITY)
def test_a_combination_is_that_of_peft(
    kind: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    name, given, options = PARITY[kind]
    chosen = [adapters["a"], adapters["b"]]
    combine(chosen, tmp_path / "out", options, RUN, init="none")
    expected = peft_changes(base, chosen, name, **given)
    found = changes_of(base, tmp_path / "out")
    assert found.keys() == expected.keys()
    for module, change in expected.items():
        assert torch.linalg.norm(found[module] - change) <= 1e-5 * torch.linalg.norm(change), module


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_has_the_distribution_of_peft(
    kind: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The mean over seeds of the sizes of all changes is that of PEFT, within three standard errors."""
    chosen = [adapters["a"], adapters["b"]]
    rank = {"rank": 8} if kind.endswith("svd") else {}
    sizes = {"ours": [], "theirs": []}
    torch.manual_seed(0)
    for seed in range(12):
        method = f"peft-{kind.replace('_', '-')}"
        options = CombineOptions(method=method, weights=WEIGHTS, density=0.7, seed=seed, **rank)
        combine(chosen, tmp_path / str(seed), options, RUN, init="none")
        given = {"density": 0.7} | ({"svd_rank": 8} if rank else {})
        for side, found in (
            ("ours", changes_of(base, tmp_path / str(seed))),
            ("theirs", peft_changes(base, chosen, kind, **given)),
        ):
            sizes[side].append(sum(float(change.square().sum()) for change in found.values()))
    ours, theirs = (torch.tensor(sizes[side]).double() for side in sizes)
    error = (ours.var() / 12 + theirs.var() / 12).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 4 * error
    assert len(set(sizes["ours"])) == 12


@pytest.mark.parametrize("method", ["sum", "mean", "ties", "tsv", "iso-c", "knots"])
def test_any_ranks_scales_and_targets_are_combined(
    method: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    names = ["a", "wide", "patterns", "few"]
    weights = (1.0, 0.5, -0.3, 2.0)
    options = CombineOptions(method=method, weights=weights)
    combine([adapters[name] for name in names], tmp_path / "out", options, RUN, init="none")
    found = changes_of(base, tmp_path / "out")
    each = [changes_of(base, adapters[name]) for name in names]
    assert found.keys() == each[0].keys()
    if method in ("sum", "mean"):
        divisor = sum(weights) if method == "mean" else 1.0
        for module, change in found.items():
            parts = zip(each, weights, strict=True)
            expected = sum(w * one[module] for one, w in parts if module in one) / divisor
            assert torch.linalg.norm(change - expected) <= 1e-5 * torch.linalg.norm(expected)


def test_the_stated_loss_of_a_truncation_is_the_true_one(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    chosen = [adapters["a"], adapters["wide"]]
    combine(chosen, tmp_path / "whole", CombineOptions(weights=WEIGHTS), RUN, init="none")
    manifest = combine(
        chosen, tmp_path / "cut", CombineOptions(weights=WEIGHTS, rank_budget=20), RUN, init="none"
    )
    whole, cut = changes_of(base, tmp_path / "whole"), changes_of(base, tmp_path / "cut")
    lost = sum(float((whole[name] - cut[name]).square().sum()) for name in whole) ** 0.5
    size = sum(float(change.square().sum()) for change in whole.values()) ** 0.5
    assert manifest.result.truncation.error == pytest.approx(lost / size, rel=1e-4)
    assert sum(one.rank for one in manifest.result.truncation.modules.values()) <= 20


def test_a_combined_lora_merges_to_what_the_adapters_add_up_to(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    combine([adapters["a"], adapters["b"]], tmp_path / "out", run=RUN, init="none")
    merge(tmp_path / "out", tmp_path / "merged", run=RUN, base=str(base))
    model = plain(base)
    changes = [changes_of(base, adapters[name]) for name in ("a", "b")]
    with torch.no_grad():
        for change in changes:
            for module, delta in change.items():
                model.get_submodule(module).weight += delta
    assert torch.allclose(logits(plain(tmp_path / "merged")), logits(model), atol=1e-5)


def test_parameters_trained_in_full_are_combined_as_changes_of_the_base(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    chosen = [adapters["saved"], adapters["saved too"]]
    with pytest.raises(ArtifactError, match=r"lm_head\.weight in full, or with different values.*--base"):
        combine(chosen, tmp_path / "out", CombineOptions(weights=WEIGHTS), RUN, init="none")
    combine(chosen, tmp_path / "out", CombineOptions(weights=WEIGHTS), RUN, init="none", base=str(base))
    key = "base_model.model.lm_head.weight"
    first, second, found = (
        load_file(path / "adapter_model.safetensors")[key] for path in (*chosen, tmp_path / "out")
    )
    start = plain(base).lm_head.weight.detach()
    expected = start + WEIGHTS[0] * (first - start) + WEIGHTS[1] * (second - start)
    assert torch.allclose(found, expected, atol=1e-6)
    combine([chosen[0], chosen[0]], tmp_path / "same", run=RUN, init="none")
    assert torch.equal(load_file(tmp_path / "same" / "adapter_model.safetensors")[key], first)


def test_a_parameter_that_one_adapter_trained_in_full_gets_its_share(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    chosen = [adapters["a"], adapters["saved"]]
    with pytest.raises(ArtifactError, match=r"not all adapters trained lm_head\.weight.*--base"):
        combine(chosen, tmp_path / "out", CombineOptions(weights=WEIGHTS), RUN, init="none")
    combine(chosen, tmp_path / "out", CombineOptions(weights=WEIGHTS), RUN, init="none", base=str(base))
    key = "base_model.model.lm_head.weight"
    trained, found = (
        load_file(path / "adapter_model.safetensors")[key] for path in (chosen[1], tmp_path / "out")
    )
    start = plain(base).lm_head.weight.detach()
    assert torch.allclose(found, start + WEIGHTS[1] * (trained - start), atol=1e-6)
    with pytest.raises(RecipeError, match=r"lm_head\.weight in full, which --weights does not scale"):
        combine(chosen[1:], tmp_path / "half", CombineOptions(weights=(0.5,)), RUN, init="none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1.0,)}, "1 numbers for 2 inputs"),
        ({"density": 0.5}, "sum has no parameter density"),
        ({"method": "ties", "set": {"gamma": 0.1}}, "ties has no parameter gamma"),
        ({"method": "ties", "set": {"normalize": 3.0}}, "must be true or false"),
        ({"method": "ties", "density": 0.5, "set": {"density": 0.5}}, "given twice"),
        ({"seed": 1}, "draws no random numbers"),
        ({"method": "slerp"}, "does not merge adapters"),
        ({"max_shard_size": "1GB"}, "changes nothing"),
    ],
    ids=str,
)
def test_an_option_without_effect_is_refused(
    options: dict[str, object], message: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        combine([adapters["a"], adapters["b"]], tmp_path / "out", CombineOptions(**options), RUN, init="none")
    assert not (tmp_path / "out").exists()


def test_a_start_in_a_residual_is_subtracted(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Of adapters that PEFT trained on a residual; one whose start is recorded is not changed by it."""
    decompose(base, tmp_path / "split", SplitOptions(rank=4, targets=("q_proj", "v_proj")), RUN)
    start = tmp_path / "split" / "pissa_init"
    trained = [trained_elsewhere(start, tmp_path / f"trained-{seed}", seed) for seed in (1, 2)]
    to_lora(adapters["a"], tmp_path / "plain", run=RUN, init="none")
    chosen = [*trained, tmp_path / "plain"]
    options = CombineOptions(weights=(0.5, -2.0, 1.0))
    residual = str(tmp_path / "split")
    combine(chosen, tmp_path / "out", options, RUN, residual=residual)
    found = changes_of(base, tmp_path / "out")
    plain_change, before = changes_of(base, adapters["a"]), changes_of(base, start)
    each = [changes_of(base, one) for one in trained]
    assert found.keys() == plain_change.keys()
    for module, change in found.items():
        expected = plain_change[module].clone()
        if module in before:
            expected += 0.5 * (each[0][module] - before[module]) - 2.0 * (each[1][module] - before[module])
        assert torch.linalg.norm(change - expected) <= 1e-5 * torch.linalg.norm(expected)
    merge(chosen, tmp_path / "merged", MergeOptions(weights=options.weights), RUN, residual=residual)
    merge(tmp_path / "out", tmp_path / "once", run=RUN, base=str(base))
    for name, tensor in tensors(tmp_path / "merged").items():
        assert torch.allclose(tensor, tensors(tmp_path / "once")[name], atol=1e-5)
    with pytest.raises(ArtifactError, match="--residual .* changes nothing here"):
        combine([chosen[2]] * 2, tmp_path / "no", run=RUN, residual=residual)


def trained_elsewhere(start: Path, out: Path, seed: int) -> Path:
    """An initial adapter after a training that left only the two files of PEFT."""
    out.mkdir()
    random = torch.Generator().manual_seed(seed)
    moved = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=random)
        for name, tensor in load_file(start / "adapter_model.safetensors").items()
    }
    save_file(moved, out / "adapter_model.safetensors", {"format": "pt"})
    (out / "adapter_config.json").write_text((start / "adapter_config.json").read_text())
    return out


def test_adapters_of_other_shapes_or_kinds_are_refused(
    base: Path, adapters: dict[str, Path], checkpoint: Build, tmp_path: Path
) -> None:
    other = adapter_of(base, tmp_path / "other", 9, r=2, target_modules=["q_proj"])
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    with pytest.raises(ArtifactError, match="combine adapters of one task"):
        combine([adapters["a"], other], tmp_path / "out", run=RUN, init="none")
    with pytest.raises(ArtifactError, match="is an adapter and .* a checkpoint"):
        combine([adapters["a"], base], tmp_path / "out", run=RUN)
    absent = config | {"base_model_name_or_path": "/absent"}
    (other / "adapter_config.json").write_text(json.dumps(absent))
    with pytest.raises(ArtifactError, match="does not record its initial state"):
        combine([other, other], tmp_path / "out", run=RUN)


@pytest.mark.parametrize("experts", ["fused", "each"])
def test_adapters_of_experts_are_combined(experts: str, checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint("mixtral", dtype=torch.float32)
    decompose(base, tmp_path / "start", SplitOptions(rank=2, method="lora", experts=experts), RUN)
    each = [
        trained_from(tmp_path / "start", tmp_path / name, amount) for name, amount in (("a", 0.1), ("b", 0.3))
    ]
    combine(each, tmp_path / "both", CombineOptions(weights=WEIGHTS), RUN)
    merged = {}
    for path in (*each, tmp_path / "both"):
        merge(path, tmp_path / f"merged-{path.name}", run=RUN, base=str(base))
        merged[path.name] = tensors(tmp_path / f"merged-{path.name}")
    start = tensors(base)
    assert any("experts" in name for name in start)
    for name, value in start.items():
        changes = [merged[own][name] - value for own in ("a", "b")]
        expected = value + WEIGHTS[0] * changes[0] + WEIGHTS[1] * changes[1]
        assert torch.allclose(merged["both"][name], expected, atol=1e-5), name
