"""PEFT's adapter directory, with stock PEFT as the oracle for reading and writing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from svdconvert.adapters.adapter_config import AdapterConfig, read_adapter_config
from svdconvert.adapters.peft_files import open_adapter, target_modules
from svdconvert.errors import ArtifactError, CheckpointError
from tests.stock import WEIGHTS, plain

Build = Callable[..., Path]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 5},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "rank by name": {"rank_pattern": {"q_proj": 2, "down_proj": 6}},
    "rank by path": {"rank_pattern": {"model.layers.0.self_attn.q_proj": 2}},
    "rank by regex": {"rank_pattern": {r".*\.layers\.1\..*": 2}},
    "ranks by path and name": {"rank_pattern": {"layers.1.mlp.up_proj": 3, "up_proj": 2, "v_proj": 7}},
    "the first pattern wins": {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 3}},
    "alpha by name": {"alpha_pattern": {"v_proj": 9, "layers.1.mlp.up_proj": 2.5}},
    "both": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 7}, "use_rslora": True},
}


def peft_model(base: Path, **settings: Any) -> PeftModel:
    """A tiny model with an adapter that stock PEFT filled with random values."""
    values = {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
    } | settings
    torch.manual_seed(3)
    return get_peft_model(plain(base), LoraConfig(**values, init_lora_weights=False, task_type="CAUSAL_LM"))


@pytest.fixture
def saved(checkpoint: Build, tmp_path: Path) -> Callable[..., Path]:
    def save(**settings: Any) -> Path:
        peft_model(checkpoint("llama", dtype=torch.float32), **settings).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


def edit(directory: Path, **values: Any) -> Path:
    """Change adapter_config.json."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


@pytest.mark.parametrize("name", SETTINGS)
def test_scales_and_factors_are_those_of_stock_peft(name: str, checkpoint: Build, tmp_path: Path) -> None:
    model = peft_model(checkpoint("llama", dtype=torch.float32), **SETTINGS[name])
    model.save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path)
    layers = {
        path.removeprefix("base_model.model."): layer
        for path, layer in model.named_modules()
        if isinstance(layer, Linear)
    }
    assert adapter.modules.keys() == layers.keys() and len(layers) == 8
    for module, layer in layers.items():
        found = adapter.factors(module)
        assert adapter.config.scale(module) == pytest.approx(layer.scaling["default"])
        assert found.rank == layer.r["default"]
        assert torch.allclose(
            found.dense(adapter.config.scale(module)), layer.get_delta_weight("default"), atol=1e-6
        )
        assert adapter.shape(module, "lora_B") == tuple(found.left_OR.shape)


@pytest.mark.parametrize(
    "key", ["q_proj", "proj", "_proj", "attn.q_proj", r".*\.q_proj", "a.0.attn", "q_proj|k_proj"]
)
@pytest.mark.parametrize("module", ["a.0.attn.q_proj", "a.0.attn.k_proj", "q_proj", "a.0.attn"])
def test_a_pattern_matches_the_modules_that_it_matches_in_peft(key: str, module: str) -> None:
    ranks = {key: 2}
    wanted = ranks.get(get_pattern_key(ranks.keys(), module), 4)
    config = AdapterConfig(rank=4, alpha=8, targets=[], rank_pattern=ranks)
    assert config.scale(module) == 8 / wanted


@pytest.mark.parametrize("alpha", [8, 8.0, 2.5])
def test_stock_peft_reads_the_configuration_that_is_written(alpha: float, tmp_path: Path) -> None:
    config = AdapterConfig(
        rank=4, alpha=alpha, targets=["v_proj", "q_proj"], base="org/name", rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 3.0}, rslora=True, dropout=0.1,
    )  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(config.text())
    known = LoraConfig.from_pretrained(tmp_path)
    assert (known.r, known.lora_alpha, known.target_modules) == (4, alpha, {"q_proj", "v_proj"})
    assert known.rank_pattern == {"q_proj": 2}
    assert known.alpha_pattern == {"q_proj": 3.0}
    assert known.use_rslora is known.init_lora_weights is known.inference_mode is True
    assert known.base_model_name_or_path == "org/name"
    assert (known.lora_dropout, known.bias, known.task_type) == (0.1, "none", "CAUSAL_LM")
    lines = config.text().splitlines()
    assert lines == json.dumps(json.loads(config.text()), indent=2, sort_keys=True).splitlines()
    assert not config.text().endswith("\n")


def test_what_is_written_is_what_is_read(saved: Callable[..., Path]) -> None:
    directory = saved(rank_pattern={"q_proj": 2})
    written = AdapterConfig(
        rank=4, alpha=2.5, targets=["q_proj"], base="x", rslora=True, rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 1.0}, dropout=0.2, initialised="pissa",
    )  # fmt: skip
    (directory / "adapter_config.json").write_text(written.text())
    assert read_adapter_config(directory) == written


@pytest.mark.filterwarnings(
    "ignore:Setting .save_embedding_layers. to .True.", "ignore:Adapter .default.. 2 LoRA"
)
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"lora_bias": True, "base": "qwen2", "target_modules": ["q_proj"]},
            "lora_B.bias, which is neither a low-rank factor",
        ),
    ],
)
def test_nothing_of_an_adapter_is_ever_dropped(
    checkpoint: Build, tmp_path: Path, settings: dict[str, Any], complaint: str
) -> None:
    base = checkpoint(settings.get("base", "llama"), dtype=torch.float32)
    peft_model(base, **{name: value for name, value in settings.items() if name != "base"}).save_pretrained(
        tmp_path
    )
    with pytest.raises(ArtifactError, match=complaint):
        open_adapter(tmp_path)


def test_magnitudes_that_the_configuration_does_not_mention_are_not_dropped(
    saved: Callable[..., Path],
) -> None:
    directory = edit(saved(use_dora=True), use_dora=False)
    with pytest.raises(ArtifactError, match="lora_magnitude_vector, a magnitude of DoRA"):
        open_adapter(directory)


def test_a_dora_that_started_from_a_part_of_its_base_is_refused(saved: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactError, match="DoRA adapter that started from a part"):
        open_adapter(edit(saved(use_dora=True), init_lora_weights="pissa"))


def test_transposed_layers_are_read_and_written(saved: Callable[..., Path]) -> None:
    assert not open_adapter(saved()).config.fan_in_fan_out
    config = open_adapter(edit(saved(), fan_in_fan_out=True)).config
    assert config.fan_in_fan_out
    assert json.loads(config.text())["fan_in_fan_out"] is True


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_a_missing_file_is_refused_by_name(saved: Callable[..., Path], name: str) -> None:
    directory = saved()
    (directory / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        open_adapter(directory)


@pytest.mark.parametrize("values", [{"r": None}, {"lora_alpha": "much"}, {"target_modules": [1]}, {"r": []}])
def test_a_configuration_with_invalid_values_is_refused(
    saved: Callable[..., Path], values: dict[str, Any]
) -> None:
    with pytest.raises(ArtifactError, match=f"adapter_config.json has {next(iter(values))} .* must be"):
        open_adapter(edit(saved(), **values))


def test_an_adapter_with_missing_factors_is_refused(saved: Callable[..., Path]) -> None:
    directory = saved()
    factors = load_file(directory / WEIGHTS)
    lost = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file({name: factor for name, factor in factors.items() if name != lost}, directory / WEIGHTS)
    with pytest.raises(ArtifactError, match="no lora_B for model.layers.1.self_attn.q_proj"):
        open_adapter(directory)
    save_file({}, directory / WEIGHTS)
    with pytest.raises(ArtifactError, match="no lora_A and lora_B"):
        open_adapter(directory)


def test_a_truncated_adapter_is_refused(saved: Callable[..., Path]) -> None:
    directory = saved()
    raw = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(raw[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        open_adapter(directory)


LINEARS = [
    f"layers.{layer}.{part}" for layer in (0, 1) for part in ("attn.q_proj", "attn.k_proj", "mlp.up_proj")
]


@pytest.mark.parametrize(
    ("chosen", "targets"),
    [
        (LINEARS, ["k_proj", "q_proj", "up_proj"]),
        ([name for name in LINEARS if "attn" in name], ["k_proj", "q_proj"]),
        (["layers.0.attn.q_proj"], ["layers.0.attn.q_proj"]),
        ([*LINEARS[:3], "layers.1.mlp.up_proj"], ["layers.0.attn.k_proj", "layers.0.attn.q_proj", "up_proj"]),
    ],
)
def test_targets_are_module_suffixes_if_these_select_exactly_the_chosen_modules(
    chosen: list[str], targets: list[str]
) -> None:
    assert target_modules(chosen, LINEARS) == targets


@pytest.mark.parametrize("regex", [r".*layers\.1\..*(q|up)_proj", "all-linear", None])
def test_targets_that_are_not_a_list_become_the_modules_of_the_file(
    regex: str | None, checkpoint: Build, saved: Callable[..., Path]
) -> None:
    adapter = open_adapter(edit(saved(), target_modules=regex))
    assert adapter.config.targets == sorted(adapter.modules)


@pytest.mark.parametrize(
    "values", [{"layers_to_transform": [1]}, {"exclude_modules": ["layers.0.self_attn.q_proj"]}]
)
def test_targets_that_other_settings_narrow_become_the_modules_of_the_file(
    values: dict[str, Any], saved: Callable[..., Path]
) -> None:
    adapter = open_adapter(saved(**values))
    assert len(adapter.modules) < 8
    assert adapter.config.targets == sorted(adapter.modules)
