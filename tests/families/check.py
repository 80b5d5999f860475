"""What must hold for a family: its targets, and the whole chain against stock transformers and PEFT."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as all_linear_of_peft
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from svdconvert.commands.decompose import decompose
from svdconvert.commands.merge import merge
from svdconvert.commands.to_lora import to_lora
from svdconvert.config.options import SplitOptions
from svdconvert.inputs.model import open_model
from svdconvert.layouts.base import Layout
from tests.families.inputs import inputs_of
from tests.families.shrink import shrunk
from tests.stock import same_bytes, start_of, tensors, trained_from
from tests.tiny import fill

RANK = 2
TOLERANCE = 1e-4
"""Of the spread of the logits."""
LARGEST = 20_000_000
"""Parameters of a tiny model."""
RULED_OUT = -1e30
KINDS: Mapping[str, Any] = {"causal": AutoModelForCausalLM, "image-text": AutoModelForImageTextToText}


class NotMade(Exception):
    """The family has no tiny model here; the reason is the text."""


@dataclass
class Family:
    """The findings on one family."""

    model_type: str
    kind: str
    made: bool = False
    matrices: int = 0
    experts: int = 0
    extra: list[str] = field(default_factory=list)
    """Modules that are targets here and not of PEFT's all-linear."""
    left: list[str] = field(default_factory=list)
    """Modules that are targets of PEFT's all-linear and not here."""
    start: float | None = None
    """Largest difference between the logits of residual and initial adapter and those of the source."""
    lora: float | None = None
    """Largest difference between the logits of base and LoRA and those of the merged model."""
    fault: str = ""
    """The first thing that does not hold; empty if all does."""


def examine(model_type: str, kind: str, directory: Path, build: "Build | None" = None) -> Family:
    """Make a tiny model of the family in `directory`, which is emptied, and check the chain."""
    family = Family(model_type, kind)
    shutil.rmtree(directory, ignore_errors=True)
    try:
        (build or make)(model_type, kind, directory / "base")
        family.made = True
        _check(family, directory)
    except NotMade as error:
        family.fault = f"not made: {error}"
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        family.fault = text.replace(str(directory), "DIR")[:300]
    return family


Build = Callable[[str, str, Path], None]


def make(model_type: str, kind: str, directory: Path) -> None:
    """Write a tiny model with random weights. Raises NotMade with the reason if that fails."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(model_type.encode()))
            _refuse_large(model_type, kind)
            model = KINDS[kind].from_config(tiny_configuration(model_type)).eval()
            fill(model)
        found = logits(model)
        if not found.isfinite().all():
            raise NotMade("its logits are not finite")
        model.save_pretrained(directory)
        again = logits(load(kind, directory))
        if (again - found).abs().max() > TOLERANCE * found.std():
            raise NotMade("transformers saves and loads another model")
    except NotMade:
        raise
    except Exception as error:
        raise NotMade(" ".join(f"{type(error).__name__}: {error}".split())[:400]) from error


def _refuse_large(model_type: str, kind: str) -> None:
    with torch.device("meta"):
        model = KINDS[kind].from_config(tiny_configuration(model_type))
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > LARGEST:
        raise NotMade(f"{size / 1e6:.0f} million parameters")


def tiny_configuration(model_type: str) -> PretrainedConfig:
    """The shrunk configuration, in float32."""
    config = shrunk(model_type)
    config.dtype = torch.float32
    return config


def load(kind: str, directory: Path) -> PreTrainedModel:
    """The model as transformers loads it without options, by the name of its class in config.json."""
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    model: PreTrainedModel = getattr(transformers, name, KINDS[kind]).from_pretrained(directory)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """The logits of fixed tokens, (2, 12, vocabulary), without those that the model itself rules out."""
    torch.manual_seed(0)
    found: Tensor = model.eval()(**inputs_of(model)).logits.float()
    return found[..., (found > RULED_OUT).flatten(0, -2).all(0)]


def _check(family: Family, directory: Path) -> None:
    base = directory / "base"
    source = load(family.kind, base)
    wanted = logits(source)
    spread = float(wanted.std())
    _, layout = open_model(str(base)).layout()
    _compare_targets(family, source, layout, base)
    decomposed = directory / "decomposed"
    decompose(base, decomposed, SplitOptions(rank=RANK))
    started = PeftModel.from_pretrained(load(family.kind, decomposed), start_of(decomposed))
    _require_all_loaded(started, start_of(decomposed))
    family.start = float((logits(started) - wanted).abs().max()) / spread
    _require(family.start < TOLERANCE, f"residual and adapter differ by {family.start:.1e} of the spread")
    merge(start_of(decomposed), directory / "back", base=str(base), residual=str(decomposed))
    _require(same_bytes(tensors(directory / "back"), tensors(base)), "merging does not give the base back")
    trained = trained_from(decomposed, directory / "trained")
    merge(trained, directory / "merged", residual=str(decomposed), base=str(base))
    to_lora(trained, directory / "lora", residual=str(decomposed))
    merged = logits(load(family.kind, directory / "merged"))
    added = PeftModel.from_pretrained(load(family.kind, base), directory / "lora")
    _require_all_loaded(added, directory / "lora")
    family.lora = float((logits(added) - merged).abs().max()) / float(merged.std())
    _require(family.lora < TOLERANCE, f"base and LoRA differ by {family.lora:.1e} from the merged model")
    changed = float((merged - wanted).abs().max()) / spread
    _require(changed > TOLERANCE, "training changes nothing")


def _compare_targets(family: Family, source: PreTrainedModel, layout: Layout, base: Path) -> None:
    infos = layout.divided(open_model(str(base)).source).infos
    slots = layout.select(infos, ["all-linear"])
    ours = {slot.module for slot in slots.values() if slot.place is None or slot.place.expert is None}
    family.matrices = len(slots)
    family.experts = len(
        {slot.place.parameter for slot in slots.values() if slot.place and slot.expert is not None}
    )
    config = all_linear_of_peft(LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"), source)
    theirs = set(config.target_modules)
    family.extra = sorted(ours - theirs)
    family.left = sorted(theirs - ours)


def _require_all_loaded(model: PeftModel, adapter: Path) -> None:
    """PEFT only warns of factors that it drops: count what it holds."""
    stored = tensors(adapter)
    held = [name for name, _ in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]
    _require(
        sum(value.numel() for value in stored.values())
        == sum(model.get_parameter(name).numel() for name in held),
        f"PEFT holds {len(held)} factors, and the adapter has {len(stored)}",
    )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
