"""Mixtures of experts go through the whole chain, in both forms on disk and in both forms of an adapter."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from svdconvert.checkpoint.parts import whole_name
from svdconvert.commands.decompose import decompose
from svdconvert.commands.inspect import inspect
from svdconvert.commands.merge import merge
from svdconvert.commands.to_lora import to_lora
from svdconvert.commands.verify import verify
from svdconvert.config.execution import Run
from svdconvert.config.options import LoraOptions, SplitOptions
from svdconvert.config.progress import Progress
from svdconvert.errors import OutputError, RecipeError
from svdconvert.manifest.schema import read_manifest
from svdconvert.output import staging
from svdconvert.pipeline import adapter_plan
from tests.families.inputs import TOKENS
from tests.mixtures import FAMILIES, mixture
from tests.process import sums
from tests.stock import adapted, plain, same_bytes, start_of, tensors, trained_from

pytestmark = pytest.mark.slow

RUN = Run(device="cpu", threads=1)
Build = Callable[..., Path]
every_storage = pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
every_form = pytest.mark.parametrize("form", ["fused", "each"])
CLOSE = 1e-4
"""Of the spread of the logits."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A tiny mixture, built once. Tests must not write to it."""
    made: dict[tuple[str, bool], Path] = {}

    def build(family: str, stacked: bool = False) -> Path:
        if (family, stacked) not in made:
            made[family, stacked] = mixture(family, tmp_path_factory.mktemp(family) / "base", stacked=stacked)
        return made[family, stacked]

    return build


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = TOKENS % 57
    return model.eval()(input_ids=tokens, use_cache=False).logits.float()


def distance(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """The largest difference of logits, as a share of their spread."""
    wanted = logits(other)
    return float((logits(one) - wanted).abs().max() / wanted.std())


def split(base: Path, out: Path, **options: object) -> Path:
    decompose(base, out, SplitOptions(**{"rank": 4, **options}), RUN)  # type: ignore[arg-type]
    return out


@every_storage
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_gives_the_logits_of_the_source_and_of_the_merged_model(
    family: str, stacked: bool, model: Build, tmp_path: Path
) -> None:
    base = model(family, stacked)
    out = split(base, tmp_path / "out")
    places = [matrix.place for matrix in read_manifest(out).matrices.values()]
    assert any(place is not None and place.expert is not None for place in places)
    assert distance(adapted(out, start_of(out)), plain(base)) < CLOSE
    assert distance(plain(out), plain(base)) > 100 * CLOSE
    trained = trained_from(out, tmp_path / "trained")
    merge(trained, tmp_path / "merged", base=str(base), residual=str(out))
    assert distance(adapted(out, trained), plain(tmp_path / "merged")) < CLOSE
    merge(start_of(out), tmp_path / "back", base=str(base))
    assert same_bytes(tensors(tmp_path / "back"), tensors(base))
    assert verify(out).passed


@every_storage
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_in_either_form_gives_the_merged_model(
    family: str, stacked: bool, model: Build, tmp_path: Path
) -> None:
    base = model(family, stacked)
    out = split(base, tmp_path / "out")
    trained = trained_from(out, tmp_path / "trained")
    merge(trained, tmp_path / "merged", base=str(base), residual=str(out))
    for form in ("fused", "each"):
        to_lora(trained, tmp_path / form, LoraOptions(experts=form), residual=str(out))
        merge(tmp_path / form, tmp_path / f"{form}-merged", base=str(base))
        assert distance(plain(tmp_path / f"{form}-merged"), plain(tmp_path / "merged")) < CLOSE
        if config(tmp_path / form)["peft_type"] == "LORA":
            assert distance(adapted(base, tmp_path / form), plain(tmp_path / "merged")) < CLOSE
        else:
            assert form == "each"
            with pytest.raises((KeyError, ValueError), match="LORA_PER_EXPERT"):
                adapted(base, tmp_path / form)
    to_lora(tmp_path / "each", tmp_path / "again", base=str(base))
    assert distance(adapted(base, tmp_path / "again"), plain(tmp_path / "merged")) < CLOSE


@every_storage
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_by_themselves_are_split_merged_and_loaded_or_refused_by_peft(
    family: str, stacked: bool, model: Build, tmp_path: Path
) -> None:
    base = model(family, stacked)
    out = split(base, tmp_path / "out", experts="each")
    stored = tensors(start_of(out))
    assert any(".experts.2." in name for name in stored) and not any("base_layer" in name for name in stored)
    assert verify(out).passed
    merge(start_of(out), tmp_path / "back", base=str(base))
    assert same_bytes(tensors(tmp_path / "back"), tensors(base))
    trained = trained_from(out, tmp_path / "trained")
    merge(trained, tmp_path / "merged", base=str(base), residual=str(out))
    to_lora(trained, tmp_path / "lora", residual=str(out))  # fused
    assert distance(adapted(base, tmp_path / "lora"), plain(tmp_path / "merged")) < CLOSE
    if family == "mixtral":  # no dense layer, and in PEFT's table
        assert distance(adapted(out, start_of(out)), plain(base)) < CLOSE
    else:
        with pytest.raises((KeyError, ValueError), match="LORA_PER_EXPERT"):
            adapted(out, start_of(out))


def config(directory: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((directory / "adapter_config.json").read_text())
    return found


def test_gate_and_up_that_are_split_apart_have_twice_the_rank(model: Build, tmp_path: Path) -> None:
    apart = config(start_of(split(model("mixtral"), tmp_path / "apart", alpha=8.0)))
    assert apart["rank_pattern"] == {"gate_up_proj": 8} and apart["alpha_pattern"] == {"gate_up_proj": 16.0}
    together = config(start_of(split(model("mixtral", True), tmp_path / "together", alpha=8.0)))
    assert together["rank_pattern"] == {} and together["r"] == 4
    assert apart["target_parameters"] == together["target_parameters"]


@every_storage
@pytest.mark.parametrize(
    "options",
    [
        {"method": "milora", "alpha": 3.0, "rslora": True},
        {"method": "lora-fa"},
        {"method": "olora"},
        {"targets": ("experts.down",)},
        {"targets": ("*layers.0*experts*[[]1]", "*experts.1.*"), "rank_pattern": {"experts": 3}},
        {"method": "sorsa"},
        {"method": "lora-xs", "copy_base": True},
        {"method": "lora"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_every_method_and_choice_of_experts_adds_up(
    options: dict[str, object], stacked: bool, model: Build, tmp_path: Path
) -> None:
    base = model("mixtral", stacked)
    if options.get("targets") == ("*layers.0*experts*[[]1]", "*experts.1.*"):
        options = {**options, "targets": (options["targets"][0 if stacked else 1],)}  # type: ignore[index]
    out = split(base, tmp_path / "out", **options)
    assert verify(out).passed
    merge(start_of(out), tmp_path / "back", base=str(base))
    assert same_bytes(tensors(tmp_path / "back"), tensors(base))
    trained = trained_from(out, tmp_path / "trained")
    merge(trained, tmp_path / "merged", base=str(base), residual=str(out))
    to_lora(trained, tmp_path / "lora", residual=str(out))
    assert distance(adapted(base, tmp_path / "lora"), plain(tmp_path / "merged")) < CLOSE
    if config(start_of(out))["peft_type"] == "LORA" and not options.get("copy_base"):
        holder = out if read_manifest(out).base_is_residual else base
        assert distance(adapted(holder, trained), plain(tmp_path / "merged")) < 20 * CLOSE


def test_the_adapter_of_peft_for_experts_is_merged_and_converted(model: Build, tmp_path: Path) -> None:
    base = model("qwen3_moe")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    made = get_peft_model(
        plain(base), LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=names)
    )
    generator = torch.Generator().manual_seed(3)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    made.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(base))
    assert distance(plain(tmp_path / "merged"), made) < CLOSE
    to_lora(tmp_path / "adapter", tmp_path / "lora", LoraOptions(experts="each"), base=str(base))
    merge(tmp_path / "lora", tmp_path / "again", base=str(base))
    assert distance(plain(tmp_path / "again"), made) < CLOSE


@every_storage
def test_a_lost_initial_adapter_is_recovered_from_base_and_residual(
    stacked: bool, model: Build, tmp_path: Path
) -> None:
    base = model("qwen3_moe", stacked)
    out = split(base, tmp_path / "out")
    trained = trained_from(out, tmp_path / "trained")
    merge(trained, tmp_path / "merged", base=str(base), residual=str(out))
    (out / "svdconvert.json").unlink()
    shutil.rmtree(out / "pissa_init")
    to_lora(trained, tmp_path / "lora", base=str(base), residual=str(out))
    assert distance(adapted(base, tmp_path / "lora"), plain(tmp_path / "merged")) < CLOSE


@every_storage
def test_an_interrupted_run_continues_to_the_same_bytes(stacked: bool, model: Build, tmp_path: Path) -> None:
    base = model("qwen3_moe", stacked)
    wanted = sums(split(base, tmp_path / "whole", max_shard_size="9KB"))
    items: list[str] = []

    def stop(progress: Progress) -> None:
        items.append(progress.phase)
        if len(items) % 7 == 0:
            raise KeyboardInterrupt

    run = Run(device="cpu", threads=1, track=stop)
    for _ in range(20):
        try:
            decompose(base, tmp_path / "out", SplitOptions(rank=4, max_shard_size="9KB"), run)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out").exists()
    assert len(items) > 14
    assert sums(tmp_path / "out") == wanted
    assert not (tmp_path / "out" / "pissa_init" / "experts.safetensors").exists()


@pytest.mark.parametrize("place", ["while factors are put together", "before the directory is renamed"])
def test_a_run_that_is_stopped_at_its_end_continues_to_the_same_bytes(
    place: str, model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model("mixtral")
    wanted = sums(split(base, tmp_path / "whole"))
    module, name = (adapter_plan, "write_stack") if "factors" in place else (staging, "install")
    original = getattr(module, name)
    calls: list[int] = []

    def stop(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == (3 if "factors" in place else 1):
            raise OSError(5, "stopped")
        original(*arguments)

    monkeypatch.setattr(module, name, stop)
    with pytest.raises((OSError, OutputError)):
        split(base, tmp_path / "out")
    assert (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()
    messages: list[str] = []
    again = Run(device="cpu", threads=1, notify=messages.append)
    decompose(base, tmp_path / "out", SplitOptions(rank=4), again)
    assert any("tensors are done" in message for message in messages)
    assert sums(tmp_path / "out") == wanted


def test_a_stacked_tensor_stays_one_tensor_in_the_files(model: Build, tmp_path: Path) -> None:
    base = model("mixtral", True)
    out = split(base, tmp_path / "out")
    assert tensors(out).keys() == tensors(base).keys()
    parts = [name for name in read_manifest(out).checksums if whole_name(name) != name]
    assert len(parts) == 2 * 2 * 3  # layers, parameters, experts


def test_options_that_peft_cannot_follow_are_refused(model: Build, checkpoint: Build, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--dropout 0.1 is not possible for .*experts"):
        split(model("mixtral"), tmp_path / "out", dropout=0.1)
    with pytest.raises(RecipeError, match="--experts each changes nothing here: no expert is adapted"):
        split(model("mixtral"), tmp_path / "out", experts="each", targets=("attn",))
    with pytest.raises(RecipeError, match="--experts each changes nothing here"):
        split(checkpoint("llama"), tmp_path / "out", experts="each")
    assert not os.listdir(tmp_path)


def test_inspect_knows_the_experts(model: Build, tmp_path: Path) -> None:
    assert inspect(model("mixtral", True)).details["roles"]["experts.gate_up"] == 2 * 3
    assert inspect(split(model("mixtral"), tmp_path / "out")).details["roles"]["experts.up"] == 2 * 3
    assert inspect(start_of(tmp_path / "out")).details["modules"] == 2 * (4 + 2 * 3)
