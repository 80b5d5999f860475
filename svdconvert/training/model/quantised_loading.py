"""Loads a network whose quantised matrices stay quantised, through transformers' interface for quantisers.

transformers builds the network from config.json without its quantization_config; our quantiser puts a layer
without a weight in place of each quantised linear layer, so that no dense weight is ever allocated for it.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.checkpoint.tensors import torch_dtype
from svdconvert.errors import CheckpointError
from svdconvert.inputs.storage_format import decoded
from svdconvert.layouts.base import Layout
from svdconvert.output.sidecars import read_config
from svdconvert.quantization.base import FORMATS, Coded
from svdconvert.quantization.nf4 import NESTED_BLOCK, Quantized
from svdconvert.quantization.view import DecodedSource
from svdconvert.training.model.quantised_linear import QuantisedLinear, QuantisedWeight

_METHOD = "svdconvert"


def open_quantised(directory: Path) -> DecodedSource | None:
    """The checkpoint of a directory if it holds quantised weights, else None."""
    if not directory.is_dir():
        return None
    source = decoded(open_checkpoint(directory), read_config(directory), directory)
    return source if isinstance(source, DecodedSource) else None


def load_quantised(
    source: DecodedSource,
    layout: Layout,
    from_pretrained: Callable[..., Any],
    directory: Path,
    arguments: Mapping[str, Any],
) -> tuple[nn.Module, dict[str, Any]]:
    """What `from_pretrained(directory, **arguments)` returns, with quantised layers, and its loading info."""
    from transformers import AutoConfig

    options = {name: arguments[name] for name in _OF_CONFIG if name in arguments}
    config = AutoConfig.from_pretrained(directory, local_files_only=True, **options)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    wanted = {layout.module(name): name for name in source.coded}
    quantiser_config, paths = _quantiser_config(wanted)
    rest = {name: value for name, value in arguments.items() if name not in _OF_CONFIG}
    model, loaded = from_pretrained(
        directory,
        config=config,
        quantization_config=quantiser_config,
        trust_remote_code=arguments.get("trust_remote_code", False),
        **rest,
    )
    for path, name in paths.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, QuantisedLinear)
        layer.fill(stored_weight(source, name))
    filled = _fill_others(model, source, layout, set(paths.values()))
    loaded["missing_keys"] = set(loaded["missing_keys"]) - filled
    stored = {part for _, coded in source.coded.values() for part in coded.stored}
    loaded["unexpected_keys"] = {key for key in loaded["unexpected_keys"] if key not in stored}
    _forget_quantiser(model)
    return model, loaded


_OF_CONFIG = ("trust_remote_code", "id2label", "label2id", "problem_type")


def stored_weight(source: DecodedSource, name: str) -> QuantisedWeight:
    """A quantised weight of a checkpoint, not decoded."""
    plugin, coded = source.coded[name]
    return QuantisedWeight(plugin, coded, source.parts(name), torch_dtype(source.infos[name].dtype))


def weight_in_memory(weight: Quantized, dtype: torch.dtype) -> QuantisedWeight:
    """A weight that was just quantised, which programs decode to `dtype`."""
    tensors = weight.tensors("codes", dtype)
    parts = {_part(name): tensor for name, tensor in tensors.items()}
    settings: dict[str, Any] = {"kind": weight.rule.kind, "blocksize": weight.rule.blocksize}
    if weight.nested_scales is not None:
        settings |= {"nested_blocksize": NESTED_BLOCK, "offset": weight.offset}
    coded = Coded("codes", weight.shape, {part: part for part in parts}, 4, settings=settings)
    return QuantisedWeight(FORMATS.get("bitsandbytes-4bit"), coded, parts, dtype)


def _part(name: str) -> str:
    part = name.removeprefix("codes").removeprefix(".")
    return "state" if part.startswith("quant_state") else part or "codes"


def densify(model: nn.Module) -> None:
    """Replace quantised layers by plain ones with the decoded weights, to train these."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, QuantisedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
            plain.weight = nn.Parameter(layer.weight)
            plain.bias = layer.bias
            model.set_submodule(path, plain)


def _fill_others(model: nn.Module, source: DecodedSource, layout: Layout, done: set[str]) -> set[str]:
    """Decode the quantised weights of parameters that are no linear layers; return the parameters' names."""
    parameters = dict(model.named_parameters())
    filled = set()
    for name in source.coded.keys() - done:
        runtime = layout.runtime_name(name)
        parameter = parameters.get(runtime)
        if parameter is None:
            continue
        if tuple(parameter.shape) != source.infos[name].shape:
            raise CheckpointError(
                f"{name} decodes to {source.infos[name].shape}, and {type(model).__name__} has "
                f"{tuple(parameter.shape)} there; train another model, or convert this one with its own tools"
            )
        with torch.no_grad():
            parameter.copy_(source.read(name))
        filled.add(runtime)
    return filled


def _quantiser_config(wanted: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """(what from_pretrained takes, path in the network -> tensor, which loading fills in)."""
    config = _classes()()
    config.wanted = dict(wanted)
    config.paths = {}
    return config, config.paths


@cache
def _classes() -> Any:
    """The class of our quantiser's configuration; transformers knows both after the first call."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(_METHOD)
    class Config(QuantizationConfigMixin):
        """Names the linear layers that are quantised."""

        def __init__(self, **_: Any) -> None:
            self.quant_method = _METHOD  # type: ignore[assignment]

    @register_quantizer(_METHOD)
    class Quantiser(HfQuantizer):
        """Puts layers without a weight in place of the quantised ones."""

        def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
            config: Any = self.quantization_config
            config.paths.update(_replace_layers(model, config.wanted))
            return model

        @property
        def is_trainable(self) -> bool:
            return True

        def is_serializable(self, **_: Any) -> bool:
            return False

    return Config


def _replace_layers(model: nn.Module, wanted: Mapping[str, str]) -> dict[str, str]:
    """Path of each replaced linear layer -> its tensor; a body's names may lack or have its prefix."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = dict(model.named_modules())
    found = {}
    for module, name in wanted.items():
        for path in (module, prefix + module, module.removeprefix(prefix)):
            layer = modules.get(path)
            if isinstance(layer, nn.Linear):
                made = QuantisedLinear(layer.in_features, layer.out_features, layer.bias)
                vars(made)["_is_hf_initialized"] = True
                model.set_submodule(path, made)
                found[path] = name
                break
    return found


def _forget_quantiser(model: Any) -> None:
    """Remove what makes transformers and accelerate treat the network as one of their quantised ones."""
    model.hf_quantizer = None
    model.is_quantized = False
    for part in (model.config, model.config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def keep_quantised(model: nn.Module, path: str, weight: QuantisedWeight) -> None:
    """Put a layer with a quantised weight in the place of the linear layer at `path`."""
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    made = QuantisedLinear(layer.in_features, layer.out_features, layer.bias)
    model.set_submodule(path, made.fill(weight))
