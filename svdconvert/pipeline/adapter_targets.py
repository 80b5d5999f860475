"""The configuration of the initial adapter: which modules and parameters PEFT adapts, with which ranks.

PEFT turns every target whose name is that of a projection of experts (gate_proj, w1, ...) into a target for
the experts, also if it is a dense layer of the same model, and then loads its factors wrongly without a word
(peft/utils/transformers_weight_conversion.py of PEFT 0.21). In a model with experts such a layer is therefore
named by its parameter.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from svdconvert.adapters.adapter_config import PER_EXPERT, AdapterConfig
from svdconvert.adapters.peft_files import target_modules, target_parameters
from svdconvert.adapters.stacked import Stack
from svdconvert.checkpoint.tensors import TensorInfo
from svdconvert.config.options import SplitOptions
from svdconvert.errors import RecipeError
from svdconvert.layouts.base import Layout, Slot
from svdconvert.methods.base import Method
from svdconvert.pipeline.scaling import Scaling, as_pattern


@dataclass(frozen=True)
class Chosen:
    """The matrices that are adapted, and how."""

    layout: Layout
    infos: Mapping[str, TensorInfo]
    """All tensors of the divided source."""
    slots: Mapping[str, Slot]
    scalings: Mapping[str, Scaling]
    method: Method
    options: SplitOptions

    def shape(self, name: str) -> tuple[int, int]:
        """(out features, in features) of a matrix."""
        return matrix_shape(self.infos[name], self.slots[name])

    def is_stacked(self, name: str) -> bool:
        """True if the factors of a matrix are stored together with those of others."""
        place = self.slots[name].place
        if place is None or (place.expert is None and place.rows is None):
            return False
        return place.expert is None or self.options.experts == "fused"


def matrix_shape(info: TensorInfo, slot: Slot) -> tuple[int, int]:
    """(out features, in features) of the matrix that is stored as the tensor `info`."""
    rows, columns = info.shape
    return (columns, rows) if slot.place is not None and slot.place.transposed else (rows, columns)


def adapter_config(
    chosen: Chosen, stacks: Sequence[Stack], modules: Mapping[str, Sequence[str]]
) -> AdapterConfig:
    """The configuration of the initial adapter.

    `modules` has the names of the factors of each tensor. Raises RecipeError for options that PEFT could not
    follow.
    """
    options = chosen.options
    targets: dict[str, Scaling] = {}
    parameters: dict[str, Scaling] = {}
    for name, slot in chosen.slots.items():
        if chosen.is_stacked(name):
            continue
        by_parameter = options.experts == "fused" and is_moved_by_peft(chosen.layout, slot)
        for module in modules[name]:
            if by_parameter:
                parameters[f"{module}.weight"] = chosen.scalings[name]
            else:
                targets[module] = chosen.scalings[name]
    for stack in stacks:
        scaling = _scaling_of(chosen, stack)
        named = targets if stack.experts is None else parameters
        named[stack.parameter.removesuffix(".weight") if stack.experts is None else stack.parameter] = scaling
    refuse_dropout(options.dropout, list(parameters))
    return _config(chosen, targets, parameters)


def refuse_dropout(dropout: float, parameters: Sequence[str]) -> None:
    """Raise RecipeError for a dropout on parameters that are adapted by their names."""
    if parameters and dropout:
        raise RecipeError(
            f"--dropout {dropout:g} is not possible for {parameters[0]}: PEFT applies no dropout to "
            "parameters; leave it out, or choose other --targets"
        )


def _scaling_of(chosen: Chosen, stack: Stack) -> Scaling:
    """The rank of a stack, and the alpha that gives it the scale of its matrices."""
    module = stack.members[0].module
    one = next(chosen.scalings[name] for name, slot in chosen.slots.items() if slot.module == module)
    return one.at_rank(stack.rank)


def _config(
    chosen: Chosen, targets: Mapping[str, Scaling], parameters: Mapping[str, Scaling]
) -> AdapterConfig:
    options = chosen.options
    rank = options.rank
    alpha = float(options.alpha or options.rank)
    every = {**targets, **parameters}
    linears, others = _others(chosen, every)
    config = AdapterConfig(
        rank=rank,
        alpha=alpha,
        targets=target_modules(targets, [*targets, *linears]),
        parameters=target_parameters(parameters, others),
        peft_type=chosen.method.peft_type,
        base_is_residual=chosen.method.residual,
        rslora=options.rslora,
        rank_pattern=as_pattern({name: scaling.rank for name, scaling in every.items()}, rank),
        alpha_pattern=as_pattern({name: scaling.alpha for name, scaling in every.items()}, alpha),
        dropout=options.dropout,
        task=chosen.layout.task_of(chosen.infos),
        fan_in_fan_out=chosen.layout.fan_in_fan_out and bool(targets),
    )
    if options.experts == "each" and not _fused_by_peft(chosen, config):
        config = replace(config, peft_type=PER_EXPERT)
    return config


def _others(chosen: Chosen, adapted: Collection[str]) -> tuple[list[str], list[str]]:
    """(modules, parameters) of the model that could be taken for adapted ones by their last names."""
    slots = {**chosen.layout.slots(chosen.infos), **chosen.slots}
    modules = [
        module
        for name, info in chosen.infos.items()
        if len(info.shape) >= 2  # noqa: PLR2004 (a matrix or, which PEFT adapts too, a convolution)
        and not (chosen.options.experts == "fused" and name in slots and slots[name].expert is not None)
        for module in ([slots[name].module] if name in slots else chosen.layout.modules_of(name))
    ]
    parameters = [f"{module}.weight" for module in modules]
    parameters += [slot.place.parameter for slot in slots.values() if slot.place is not None]
    return [one for one in modules if one not in adapted], [one for one in parameters if one not in adapted]


def is_moved_by_peft(layout: Layout, slot: Slot) -> bool:
    """True if PEFT would take the name of this module for that of a projection of experts."""
    if layout.experts is None or slot.expert is not None:
        return False
    names = {name for names in layout.experts.parameters.values() for name in names}
    return slot.module.rpartition(".")[2] in names


def _fused_by_peft(chosen: Chosen, config: AdapterConfig) -> bool:
    """True if stock PEFT makes the right factors of fused parameters out of factors of single experts.

    It does if all experts of the adapted layers have both gate and up, all with the configuration's rank and
    alpha, and no dense layer has the name of a projection.
    """
    layout = chosen.layout
    if layout.experts is None or not layout.experts.fused_by_peft or chosen.method.peft_type != "LORA":
        return False
    if any(is_moved_by_peft(layout, slot) for slot in chosen.slots.values()):
        return False
    if config.rank_pattern or config.alpha_pattern or config.rslora:
        return False
    adapted = {slot.place.parameter for slot in chosen.slots.values() if slot.place is not None}
    every = layout.slots(chosen.infos)
    return not any(
        slot.place is not None and slot.place.parameter in adapted and name not in chosen.slots
        for name, slot in every.items()
    )
