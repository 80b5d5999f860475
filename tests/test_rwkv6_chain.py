"""Decompose, train, merge and convert back an RWKV-6, in every layout and with every method."""

import json
from collections import OrderedDict
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig

from svdconvert.adapters.peft_files import open_adapter
from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.commands.merge import merge
from svdconvert.config.execution import Run
from svdconvert.config.progress import Progress
from svdconvert.manifest.schema import read_manifest
from svdconvert.methods.base import METHODS
from svdconvert.models.rwkv6 import Output, Rwkv6
from tests.models.oracle import needs_rwkv, rwkv_logits
from tests.models.test_rwkv6 import TOKENS, opened
from tests.program import refused, succeeded
from tests.rwkv6 import random_model, save
from tests.stock import same_bytes, trained_from
from tests.test_rwkv6_layouts import LAYOUTS, read

RANK = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A byte-level model in float32 in every layout."""
    place = tmp_path_factory.mktemp("models")
    path = save(random_model(vocabulary=256), place / "m.pth", torch.float32)
    for layout in LAYOUTS[1:]:
        succeeded("convert", path, "-o", place / layout, "--layout", layout)
    return {"blinkdl": path} | {layout: place / layout for layout in LAYOUTS[1:]}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{n} plus {n} is", "completion": f" {2 * n}, so"} for n in range(12)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "t.jsonl"


def with_lora(base: Path, lora: Path) -> dict[str, np.ndarray]:
    """base + B A in float64, by numpy alone."""
    source, adapter = open_checkpoint(base), open_adapter(lora)
    tensors = {name: source.read(name).double().numpy() for name in source.infos}
    for module in adapter.modules:
        factors = adapter.factors(module)
        product = factors.left_OR.double().numpy() @ factors.right_RI.double().numpy()
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + product * adapter.config.scale(module)
    return tensors


def chain(model: Path, method: str, place: Path) -> None:
    """Decompose, pretend to train, merge from both sides and convert to a LoRA below `place`."""
    succeeded("decompose", model, "-o", place / "out", "--method", method, "--rank", RANK)
    succeeded("verify", place / "out")
    trained_from(place / "out", place / "trained")
    succeeded("merge", place / "trained", "-o", place / "merged", "--residual", place / "out")
    succeeded("to-lora", place / "trained", "-o", place / "lora", "--residual", place / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layout"),
    [
        *((method, "blinkdl") for method in METHODS.names() if METHODS.get(method).split),
        *(("pissa", layout) for layout in LAYOUTS[1:]),
    ],
)
def test_base_and_lora_are_what_merge_makes(
    method: str, layout: str, models: dict[str, Path], tmp_path: Path
) -> None:
    chain(models[layout], method, tmp_path)
    manifest = read_manifest(tmp_path / "out")
    roles = {matrix.role for matrix in manifest.matrices.values()}
    assert len(roles) == 8 and len(manifest.matrices) == 16
    merged, wanted = open_checkpoint(tmp_path / "merged"), with_lora(models[layout], tmp_path / "lora")
    assert list(merged.infos) == list(open_checkpoint(models[layout]).infos)
    moved = 0
    for name, value in wanted.items():
        found = merged.read(name).double().numpy()
        assert np.abs(found - value).max() <= 1e-5 * max(1.0, np.abs(value).max()), name
        moved += bool(
            np.abs(value - open_checkpoint(models[layout]).read(name).double().numpy()).max() > 1e-3
        )
    assert moved == 16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_untrained_adapter_gives_the_checkpoint_back(
    layout: str, models: dict[str, Path], tmp_path: Path
) -> None:
    succeeded("decompose", models[layout], "-o", tmp_path / "out", "--rank", RANK)
    for side in ("base", "residual"):
        succeeded("merge", tmp_path / "out", "-o", tmp_path / side, "--from", side)
        source, found = open_checkpoint(models[layout]), open_checkpoint(tmp_path / side)
        assert list(found.infos) == list(source.infos)
        for name in source.infos:
            assert torch.allclose(found.read(name), source.read(name), atol=0 if side == "base" else 1e-6)
    assert (
        tmp_path / "base" / {"blinkdl": "model.pth", "web-rwkv": "model.st"}.get(layout, "config.json")
    ).exists()


def test_a_pth_becomes_safetensors_under_its_names_and_a_pth_again(tmp_path: Path) -> None:
    """In mixed element types, which safetensors files sort and a .pth does not."""
    tensors = random_model()
    mixed = OrderedDict((n, t if "time_" in n else t.bfloat16()) for n, t in tensors.items())
    model = save(mixed, tmp_path / "RWKV-x060.pth", None)
    succeeded("decompose", model, "-o", tmp_path / "out", "--rank", RANK, "--residual-dtype", "float32")
    assert open_checkpoint(tmp_path / "out").infos.keys() == mixed.keys()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model.safetensors",
        "pissa_init",
        "svdconvert.json",
    ]
    for side in ("base", "residual"):
        succeeded("merge", tmp_path / "out", "-o", tmp_path / side, "--from", side)
        merged = read(tmp_path / side / "model.pth")
        assert list(merged) == list(mixed)
        assert (
            same_bytes(merged, mixed)
            if side == "base"
            else all(torch.equal(merged[name], mixed[name]) for name in mixed)
        )
        assert ZipFile(tmp_path / side / "model.pth").testzip() is None
        succeeded("verify", tmp_path / side)


def test_an_interrupted_merge_to_a_pth_is_resumed(models: dict[str, Path], tmp_path: Path) -> None:
    chain(models["blinkdl"], "pissa", tmp_path)
    places = {"residual": str(tmp_path / "out")}

    def stop(progress: Progress) -> None:
        if progress.done > progress.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "trained", tmp_path / "again", run=Run(track=stop), **places)
    assert (tmp_path / "again.partial" / "model.pth").exists()
    merge(tmp_path / "trained", tmp_path / "again", **places)
    files = [tmp_path / name / "model.pth" for name in ("merged", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("targets", "roles"),
    [
        ("att.key", {"att.key"}),
        ("ffn.key,att.gate", {"ffn.key", "att.gate"}),
        ("att", {f"att.{part}" for part in ("receptance", "key", "value", "gate", "output")}),
        ("blocks.1.*.value.weight", {"att.value", "ffn.value"}),
    ],
)
def test_targets_tell_the_attentions_key_from_the_feed_forwards(
    targets: str, roles: set[str], models: dict[str, Path], tmp_path: Path
) -> None:
    command = ("decompose", models["blinkdl"], "-o", tmp_path / "out", "--rank", RANK)
    succeeded(*command, "--targets", targets)
    matrices = read_manifest(tmp_path / "out").matrices.values()
    assert {matrix.role for matrix in matrices} == roles
    for module in open_adapter(tmp_path / "out" / "pissa_init").modules:
        assert any(role in module for role in roles)


def test_a_residual_base_is_not_converted_without_its_adapter(
    models: dict[str, Path], tmp_path: Path
) -> None:
    succeeded("decompose", models["blinkdl"], "-o", tmp_path / "out", "--rank", RANK)
    command = ("convert", tmp_path / "out", "-o", tmp_path / "hf", "--layout", "hf")
    refused(*command, words=["a decomposed directory", "convert needs a plain checkpoint"])


def test_vectors_and_small_factors_are_no_targets(models: dict[str, Path], tmp_path: Path) -> None:
    command = ("decompose", models["blinkdl"], "-o", tmp_path / "out")
    refused(*command, "--targets", "*.time_maa_w1", words=["time_maa_w1", "never decomposed"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "method"), [(layout, "pissa") for layout in LAYOUTS] + [("blinkdl", "sorsa")]
)
def test_training_lowers_the_loss_and_merges(
    layout: str, method: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    model = models[layout]
    succeeded("decompose", model, "-o", tmp_path / "out", "--rank", RANK, "--method", method)
    options = ["--lr", "2e-2", "--eval-rows", 2, "--max-length", 64, "--precision", "fp32", "--device", "cpu"]
    succeeded("train", tmp_path / "out", "-o", tmp_path / "trained", "--data", text, "--steps", 8, *options)
    losses = [json.loads(line) for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval_loss"] for line in losses if "eval_loss" in line]
    assert held_out[-1] < held_out[0] - 0.2
    assert (
        open_adapter(tmp_path / "trained").modules.keys()
        == open_adapter(tmp_path / "out" / f"{method}_init").modules.keys()
    )
    succeeded("merge", tmp_path / "trained", "-o", tmp_path / "merged")
    succeeded("to-lora", tmp_path / "trained", "-o", tmp_path / "lora")
    wanted, merged = with_lora(model, tmp_path / "lora"), open_checkpoint(tmp_path / "merged")
    for name, value in wanted.items():
        assert np.abs(merged.read(name).double().numpy() - value).max() <= 1e-5


@pytest.mark.slow
@needs_rwkv
def test_the_rwkv_package_runs_what_was_merged(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    succeeded(
        "train", models["blinkdl"], "-o", tmp_path / "trained", "--data", text, "--rank", RANK, "--steps", 3
    )
    succeeded("merge", tmp_path / "trained", "-o", tmp_path / "merged")
    wanted = rwkv_logits(tmp_path / "merged" / "model.pth", tmp_path, TOKENS)[0]
    before = rwkv_logits(models["blinkdl"], tmp_path, TOKENS)[0]
    with torch.no_grad():
        found = opened(tmp_path / "merged")(torch.tensor([TOKENS])).logits[0]
    assert (found - wanted).abs().max() < 1e-5
    assert (before - wanted).abs().max() > 1e-4


class HubNames(nn.Module):
    """Our model with its modules where the code on the Hub has them, for PEFT to find."""

    def __init__(self, model: Rwkv6) -> None:
        super().__init__()
        self.rwkv = nn.Module()
        self.rwkv.blocks = nn.ModuleList()
        for block in model.blocks:
            self.rwkv.blocks.append(nn.ModuleDict({"attention": block.att, "feed_forward": block.ffn}))  # type: ignore[dict-item]
        self.model = [model]  # not a second path to the same modules
        self.config = PretrainedConfig()

    def forward(self, input_ids: Tensor, **_: object) -> Output:
        return self.model[0](input_ids)  # type: ignore[no-any-return]

    def prepare_inputs_for_generation(self) -> None:
        """PEFT wants it of a causal language model."""


@pytest.mark.parametrize("method", ["pissa", "sorsa"])
def test_peft_loads_the_lora_on_the_hubs_layout(method: str, models: dict[str, Path], tmp_path: Path) -> None:
    chain(models["hf"], method, tmp_path)
    model = PeftModel.from_pretrained(HubNames(opened(models["hf"])), tmp_path / "lora")  # type: ignore[arg-type]
    loaded = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert len(loaded) == 16
    with torch.no_grad():
        found = model(torch.tensor([TOKENS])).logits
        wanted = opened(tmp_path / "merged")(torch.tensor([TOKENS])).logits
        before = opened(models["hf"])(torch.tensor([TOKENS])).logits
    assert (found - wanted).abs().max() < 1e-5
    assert (before - wanted).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_time_and_norms_are_trained_too_and_carried_to_the_checkpoint(
    layout: str, models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    command = (
        "train",
        models[layout],
        "-o",
        tmp_path / "trained",
        "--data",
        text,
        "--rank",
        RANK,
        "--steps",
        3,
    )
    succeeded(*command, "--train-also", "time,norms", "--lr", "1e-2", "--precision", "fp32")
    succeeded("merge", tmp_path / "trained", "-o", tmp_path / "merged")
    succeeded("convert", models[layout], "-o", tmp_path / "before", "--layout", "blinkdl")
    succeeded("convert", tmp_path / "merged", "-o", tmp_path / "after", "--layout", "blinkdl")
    before, after = read(tmp_path / "before" / "model.pth"), read(tmp_path / "after" / "model.pth")
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert sorted(still) == ["emb.weight", "head.weight"]
    assert '"peft_type": "LORA_WITH_PARAMETERS"' in (tmp_path / "trained" / "adapter_config.json").read_text()
    succeeded("to-lora", tmp_path / "trained", "-o", tmp_path / "lora")
    assert '"peft_type": "LORA_WITH_PARAMETERS"' in (tmp_path / "lora" / "adapter_config.json").read_text()
    succeeded("merge", tmp_path / "lora", "-o", tmp_path / "again")
    again = open_checkpoint(tmp_path / "again")
    merged = open_checkpoint(tmp_path / "merged")
    assert all(torch.allclose(again.read(name), merged.read(name), atol=1e-5) for name in merged.infos)
    # The same training gives the same values in every layout.
    wanted = read_once(models["blinkdl"], text)
    assert all(torch.allclose(after[name], wanted[name], atol=1e-5) for name in after)


@pytest.mark.slow
@needs_rwkv
def test_a_first_state_is_added_tuned_and_run_by_the_package(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    succeeded("convert", models["hf"], "-o", tmp_path / "model", "--layout", "blinkdl", "--state")
    added = read(tmp_path / "model" / "model.pth")
    states = [name for name in added if name.endswith("time_state")]
    assert [tuple(added[name].shape) for name in states] == [(2, 32, 32)] * 2
    assert not any(added[name].any() for name in states)
    command = ("train", tmp_path / "model", "-o", tmp_path / "trained", "--data", text, "--rank", RANK)
    succeeded(*command, "--steps", 3, "--train-also", "*.time_state", "--lr", "1e-2", "--precision", "fp32")
    succeeded("merge", tmp_path / "trained", "-o", tmp_path / "merged")
    merged = read(tmp_path / "merged" / "model.pth")
    assert list(merged) == list(added)
    assert all(merged[name].any() for name in states)
    wanted = rwkv_logits(tmp_path / "merged" / "model.pth", tmp_path, TOKENS)[0]
    with torch.no_grad():
        found = opened(tmp_path / "merged")(torch.tensor([TOKENS])).logits[0]
    assert (found - wanted).abs().max() < 1e-5
    command = ("convert", models["hf"], "-o", tmp_path / "fla", "--layout", "fla", "--state")
    refused(*command, words=["time_state", "no place for"])


_WANTED: dict[str, Tensor] = {}


def read_once(model: Path, text: Path) -> dict[str, Tensor]:
    """What the same training makes of the .pth."""
    if not _WANTED:
        place = text.parent / "wanted"
        command = ("train", model, "-o", place, "--data", text, "--rank", RANK, "--steps", 3)
        succeeded(*command, "--train-also", "time,norms", "--lr", "1e-2", "--precision", "fp32")
        succeeded("merge", place, "-o", text.parent / "wanted-merged")
        _WANTED.update(read(text.parent / "wanted-merged" / "model.pth"))
    return _WANTED
