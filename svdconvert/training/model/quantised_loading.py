"""Loads a network whose quantised matrices stay quantised, through transformers' interface for quantisers.

transformers builds the network from config.json without its quantization_config; our quantiser puts a layer
without a weight in place of each quantised linear layer, so that no dense weight is ever allocated for it.
"""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.checkpoint.safetensors_files import open_checkpoint
from svdconvert.checkpoint.tensors import torch_dtype
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
    """What `from_pretrained(directory, **arguments)` returns, with quantised layers, and its loading info.

    Quantised weights of other parameters than those of linear layers, such as experts that are one parameter,
    are decoded.
    """
    from transformers import AutoConfig

    options = {name: arguments[name] for name in _OF_CONFIG if name in arguments}
    config = AutoConfig.from_pretrained(directory, local_files_only=True, **options)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    rest = {name: value for name, value in arguments.items() if name not in _OF_CONFIG}
    if rest.get("dtype") == "auto" and config.dtype is None:
        rest["dtype"] = torch_dtype(source.infos[next(iter(source.coded))].dtype)
    quantiser = _classes()()
    quantiser.wanted = {layout.module(name): name for name in source.coded}
    quantiser.paths = {}
    quantiser.tensors = {name: _StoredTensor(source, name) for name in source.infos}
    model, loaded = from_pretrained(
        directory,
        config=config,
        state_dict=quantiser.tensors,
        quantization_config=quantiser,
        trust_remote_code=arguments.get("trust_remote_code", False),
        **rest,
    )
    for path, name in quantiser.paths.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, QuantisedLinear)
        layer.fill(stored_weight(source, name))
    _forget_quantiser(model)
    return model, loaded


class _StoredTensor:
    """A tensor of a checkpoint that is read, and decoded, when transformers wants it.

    It has what transformers uses of the slices of safetensors files.
    """

    def __init__(self, source: DecodedSource, name: str) -> None:
        self._source = source
        self._name = name

    def __getitem__(self, index: Any) -> Tensor:
        return self._source.read(self._name)[index]

    def __deepcopy__(self, _: Any) -> "_StoredTensor":
        return self  # transformers copies the quantiser's configuration, and files are open here

    def get_dtype(self) -> str:
        return self._source.infos[self._name].dtype

    def get_shape(self) -> list[int]:
        return [*self._source.infos[self._name].shape]


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


def densify(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace quantised layers by plain ones with the decoded weights in `dtype`, to train these."""
    for path, _ in list(model.named_modules()):
        densify_layer(model, path, dtype)


def densify_layer(model: nn.Module, path: str, dtype: torch.dtype | None) -> None:
    """Replace the layer at `path` by a plain one with the decoded weight, if it is quantised.

    Without `dtype` the weight has the dtype that it is read in.
    """
    layer = model.get_submodule(path)
    if isinstance(layer, QuantisedLinear):
        plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
        plain.weight = nn.Parameter(layer.weight if dtype is None else layer.decoded(dtype))
        plain.bias = layer.bias
        model.set_submodule(path, plain)


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
            for name in config.paths.values():
                del config.tensors[name]
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
