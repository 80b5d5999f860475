"""How other programs load a plain checkpoint of a layout: the line of Python that users are shown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdconvert.layouts.base import LAYOUTS, LayoutFamily
from svdconvert.output.sidecars import CONFIG, read_config, read_json_object

CAUSAL = "AutoModelForCausalLM"
_IMAGE_TEXT = "AutoModelForImageTextToText"
_SEQUENCE_TO_SEQUENCE = "AutoModelForSeq2SeqLM"
_AUTO_CLASSES = {
    "ForCausalLM": CAUSAL,
    "LMHeadModel": CAUSAL,
    "ForConditionalGeneration": _IMAGE_TEXT,
    "ForVisionText2Text": _IMAGE_TEXT,
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}

_VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's --max-lora-rank from its default on."""


def auto_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads the first architecture of a config.json."""
    architecture = str((config.get("architectures") or [""])[0])
    found = next((name for end, name in _AUTO_CLASSES.items() if architecture.endswith(end)), "AutoModel")
    return _SEQUENCE_TO_SEQUENCE if found == _IMAGE_TEXT and is_encoder_decoder(config) else found


def generating_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads the model of a config.json as one that continues a text."""
    found = auto_class(config)
    return found if found in (_IMAGE_TEXT, _SEQUENCE_TO_SEQUENCE) else CAUSAL


def is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """True for a model that reads one sequence and writes another, such as T5 and BART."""
    return config.get("is_encoder_decoder") is True


def loading(name: str, path: object) -> str:
    """The expression that loads the plain checkpoint at `path` of the layout `name`; empty if none can."""
    if family := _family(name):
        return family.loading.format(path=path)
    directory = Path(str(path))
    class_name = auto_class(read_config(directory)) if (directory / CONFIG).is_file() else CAUSAL
    return f'{class_name}.from_pretrained("{path}")'


def is_transformers(name: str) -> bool:
    """True if transformers, and therefore PEFT, loads models of the layout `name`."""
    family = _family(name)
    return family is None or "AutoModel" in family.loading


def loading_in_peft(name: str, path: object) -> str:
    """The expression that loads the LoRA at `path` with stock PEFT; empty if that refuses it."""
    config = Path(str(path)) / "adapter_config.json"
    is_stock = config.is_file() and read_json_object(config).get("peft_type") == "LORA"
    return f'PeftModel.from_pretrained(base, "{path}")' if is_stock and is_transformers(name) else ""


def vllm_advice(rank: int) -> str | None:
    """What vLLM must be told to load a LoRA of this rank; None if nothing."""
    if rank <= _VLLM_RANKS[0]:
        return None
    allowed = next((one for one in _VLLM_RANKS if one >= rank), None)
    if allowed is None:
        return f"loads ranks up to {_VLLM_RANKS[-1]}; give to-lora a smaller --rank"
    return f"--max-lora-rank {allowed}"


def _family(name: str) -> LayoutFamily | None:
    return LAYOUTS.get(name).family if name in LAYOUTS.names() else None
