"""Adapters without their initial adapter: directories of PEFT, and residuals that were published alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file

from svdconvert.checkpoint.safetensors_files import SafetensorsSource
from svdconvert.commands.merge import merge
from svdconvert.commands.to_lora import to_lora
from svdconvert.errors import ArtifactError
from svdconvert.inputs.recovered_init import RecoveredInit
from svdconvert.inputs.tensor_names import Share
from svdconvert.pipeline.merge import MergeOptions
from tests.program import refused, succeeded
from tests.stock import TOKENS, adapted, logits, plain, start_of, tensors, trained_from
from tests.ways import WAYS, chosen

Build = Callable[..., Path]
REBASED = [way for way, method in WAYS.items() if method.residual]


def plain_residual(decomposed: Path, out: Path) -> Path:
    """A residual as people publish it: without the initial adapter and without a manifest."""
    return Path(shutil.copytree(decomposed, out, ignore=shutil.ignore_patterns("*_init", "svdconvert.json")))


@pytest.mark.slow
@pytest.mark.parametrize("way", REBASED)
def test_a_lost_initial_adapter_is_recovered_from_base_and_residual(
    way: str, checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint("llama", dtype=torch.float32)
    out = decomposed(base, **chosen(way), alpha=6.0)
    trained = trained_from(out, tmp_path / "trained")
    residual = plain_residual(out, tmp_path / "residual")
    made = to_lora(trained, tmp_path / "lora", base=str(base), residual=str(residual))
    to_lora(trained, tmp_path / "known", residual=str(out))
    note = made.result.recovered
    assert note.by == "difference"
    assert note.error < 1e-5 and note.of_base < 1e-6
    wanted = logits(adapted(base, tmp_path / "known"))
    assert (logits(adapted(base, tmp_path / "lora")) - wanted).abs().max() < 2e-5 * wanted.abs().max()
    merge(trained, tmp_path / "one", base=str(base), residual=str(residual))
    merge(trained, tmp_path / "two", MergeOptions(side="base"), base=str(base), residual=str(residual))
    for name in ("one", "two"):
        assert (logits(plain(tmp_path / name)) - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_the_error_of_the_recovery_is_reported(checkpoint: Build, decomposed: Build, tmp_path: Path) -> None:
    base = checkpoint("llama")
    out = decomposed(base)
    trained = trained_from(out, tmp_path / "trained")
    residual = plain_residual(out, tmp_path / "residual")
    note = to_lora(trained, tmp_path / "lora", base=str(base), residual=str(residual)).result.recovered
    before, after = tensors(base), tensors(residual)
    rest = initial = whole = 0.0
    for name in (name for name in before if name.endswith("_proj.weight")):
        gap = before[name].double().numpy() - after[name].double().numpy()
        sigma = np.linalg.svd(gap, compute_uv=False)
        module = name.removesuffix(".weight")
        own = float(np.sqrt((sigma[4:] ** 2).sum() / (sigma**2).sum()))
        assert note.modules[module] == pytest.approx(own, rel=1e-2)
        rest += float((sigma[4:] ** 2).sum())
        initial += float((sigma**2).sum())
        whole += float(before[name].double().square().sum())
    assert note.error == pytest.approx(np.sqrt(rest / initial), rel=1e-2)
    assert note.of_base == pytest.approx(np.sqrt(rest / whole), rel=1e-2)
    assert 1e-4 < note.error < 0.02, "a bfloat16 residual is neither exact nor far from it"
    typed = ("to-lora", trained, "-o", tmp_path / "again", "--base", base, "--residual", residual)
    assert "recovered, with an error of" in succeeded(*typed).out


def test_weights_that_do_not_belong_together_are_refused(
    checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base, other = checkpoint("llama", dtype=torch.float32), checkpoint("mistral", dtype=torch.float32)
    out = decomposed(base)
    trained = trained_from(out, tmp_path / "trained")
    residual = plain_residual(out, tmp_path / "residual")
    typed = ("to-lora", trained, "-o", tmp_path / "lora", "--base", other, "--residual", residual)
    refused(*typed, words=["do not differ by a matrix of rank 4", "do not belong together"])
    refused(*typed[:4], "--residual", residual, words=["is unknown", "--init", "both --base and --residual"])
    far = checkpoint("gemma3", dtype=torch.float32)
    refused(
        *typed[:4], "--base", base, "--residual", far, words=["of the shape", "the residual of this base"]
    )
    refused(
        *typed[:4], "--base", base, "--residual", base, words=["the same in base and residual", "--init none"]
    )
    assert not (tmp_path / "lora").exists()


def test_a_trained_directory_without_its_initial_adapter_is_recovered_from_the_weights(
    checkpoint: Build, decomposed: Build, tmp_path: Path
) -> None:
    base = checkpoint("llama", dtype=torch.float32)
    out = Path(shutil.copytree(decomposed(base), tmp_path / "pissa"))
    trained = trained_from(out, tmp_path / "trained")
    manifest = json.loads((out / "svdconvert.json").read_text())
    origin = manifest["base"] | {"location": str(out)}
    (trained / "svdconvert.json").write_text(
        json.dumps(manifest | {"kind": "trained", "files": {}, "residual": origin})
    )
    to_lora(trained, tmp_path / "known", init=str(start_of(out)))
    shutil.rmtree(start_of(out))
    with pytest.raises(ArtifactError, match="is missing, .* or give --base and --residual to recover it"):
        to_lora(trained, tmp_path / "lora")
    to_lora(trained, tmp_path / "lora", base=str(base), residual=str(out))
    wanted = logits(adapted(base, tmp_path / "known"))
    assert (logits(adapted(base, tmp_path / "lora")) - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_a_residual_that_is_too_coarse_is_refused(tmp_path: Path) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    start = 1e-3 * torch.outer(weight[0], weight[:, 0])  # as large as the rounding of the rest
    for name, tensor in (("base", weight), ("residual", (weight - start).bfloat16())):
        save_file({"w": tensor}, tmp_path / f"{name}.safetensors")
    base, residual = (SafetensorsSource([tmp_path / f"{name}.safetensors"]) for name in ("base", "residual"))
    with pytest.raises(ArtifactError, match="rounded too coarsely .* merge --from residual, .* --init"):
        RecoveredInit(base, residual, {"m": [Share("w")]}, {"m": 1}, {"m": 1.0}).factors("m")


# --- adapters that PEFT made ------------------------------------------------------------------------------

STARTS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
}
SCALES: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 6},
    "rslora and patterns": {
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"up_proj": 9},
    },
}


def made_by_peft(start: str, scales: str, base: Path, directory: Path) -> PeftModel:
    """An adapter that PEFT initialised, then changed; init, residual and adapter are saved in `directory`."""
    values = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    if start == "corda":  # which has the same rank everywhere
        values |= {name: value for name, value in SCALES[scales].items() if name != "rank_pattern"}
    else:
        values |= SCALES[scales]
    config = LoraConfig(**values, **STARTS[start])
    model = plain(base)
    torch.manual_seed(0)
    if start == "corda":
        preprocess_corda(model, config, run_model=lambda: model(input_ids=TOKENS[:1]))
    if start == "lora_ga":

        def step() -> None:
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()

        preprocess_loraga(model, config, step)
    adapted_model = get_peft_model(model, config)
    adapted_model.save_pretrained(directory / "init")
    names = {
        name: p for name, p in adapted_model.named_parameters() if "base_layer" in name and "weight" in name
    }
    shutil.copytree(base, directory / "residual")
    _store(
        directory / "residual",
        {name.split("model.", 1)[1].replace(".base_layer", ""): p for name, p in names.items()},
    )
    with torch.no_grad():
        for parameter in adapted_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted_model.save_pretrained(directory / "adapter")
    return adapted_model


def _store(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    content = load_file(directory / "model.safetensors")
    found = {name.removeprefix("model.") if name not in content else name: p for name, p in weights.items()}
    assert found.keys() <= content.keys(), sorted(found)[:2]
    content |= {name: parameter.detach().contiguous() for name, parameter in found.items()}
    save_file(content, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("start", STARTS)
def test_the_initialisations_of_peft_are_converted_with_each_source_of_the_initial_adapter(
    start: str, scales: str, checkpoint: Build, tmp_path: Path
) -> None:
    base = checkpoint("llama", dtype=torch.float32)
    wanted = logits(made_by_peft(start, scales, base, tmp_path))
    adapter, init, residual = (tmp_path / name for name in ("adapter", "init", "residual"))
    assert json.loads((adapter / "adapter_config.json").read_text())["init_lora_weights"] == start
    ways: dict[str, dict[str, str]] = {
        "init": {"init": str(init)},
        "difference": {"base": str(base), "residual": str(residual)},
    }
    if start in ("pissa", "olora"):
        ways["repeated"] = {"base": str(base)}
    for way, places in ways.items():
        to_lora(adapter, tmp_path / f"lora {way}", **places)
        merge(adapter, tmp_path / f"merged {way}", **(places | {"base": str(base)}))
        found = logits(adapted(base, tmp_path / f"lora {way}"))
        assert (found - wanted).abs().max() < 3e-5 * wanted.abs().max(), way
        found = logits(plain(tmp_path / f"merged {way}"))
        assert (found - wanted).abs().max() < 3e-5 * wanted.abs().max(), way


@pytest.mark.filterwarnings("ignore")
def test_a_random_initialisation_is_not_repeated_but_asked_for(checkpoint: Build, tmp_path: Path) -> None:
    base = checkpoint("llama", dtype=torch.float32)
    made_by_peft("pissa_niter_4", "plain", base, tmp_path)
    for command in ("merge", "to-lora"):
        words = ["initialised as pissa_niter_4", "is unknown", "--init", "both --base and --residual"]
        refused(command, tmp_path / "adapter", "-o", tmp_path / "out", "--base", base, words=words)
    assert not (tmp_path / "out").exists()
