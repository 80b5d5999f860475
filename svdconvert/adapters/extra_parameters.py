"""What is trained whole beside the factors: norms, biases, heads, under the names that PEFT gives them.

A parameter is named by its path at run time, as `model.norm.weight`. In an adapter's file PEFT writes it as
it is (`modules_to_save`), or below `base_layer` where it is the bias of an adapted layer (`bias`).
"""

from collections.abc import Collection, Iterable

PREFIX = "base_model.model."
_BASE = "base_layer"


def extra_key(parameter: str, adapted: Collection[str]) -> str:
    """The name of a parameter in an adapter's file; `adapted` are the modules with factors."""
    module, _, leaf = parameter.rpartition(".")
    return PREFIX + (f"{module}.{_BASE}.{leaf}" if module in adapted else parameter)


def parameter_of(key: str) -> str:
    """The inverse of `extra_key`."""
    return key.removeprefix(PREFIX).replace(f".{_BASE}.", ".")


def is_declared(key: str, modules_to_save: Iterable[str], bias: str) -> bool:
    """True where a configuration with these entries says that `key` holds a whole trained tensor."""
    if not key.startswith(PREFIX) or "lora_" in key:
        return False
    module, _, leaf = parameter_of(key).rpartition(".")
    if leaf == "bias" and bias != "none":
        return True
    # PEFT takes an entry for the end of a module's path, though it begin in the middle of a word.
    return any(f"{entry}." in f"{module}." for entry in modules_to_save)


def beside_adapters(parameters: Iterable[str], adapted: Collection[str]) -> bool:
    """True where a parameter belongs to a module that has adapted ones below it: PEFT could save only that
    module as a whole, with the adapters in it."""
    holders = {f"{parameter.rpartition('.')[0]}." for parameter in parameters}
    return any(module.startswith(holder) for holder in holders for module in adapted)


def declaration(parameters: Iterable[str], adapted: Collection[str]) -> tuple[list[str], str]:
    """(modules_to_save, bias) of adapter_config.json for these parameters.

    Whole paths, because PEFT takes an entry for the end of a path. A bias of an adapted layer cannot be
    saved as a module, since that module is the adapter's.
    """
    named = [parameter.rpartition(".") for parameter in parameters]
    modules = sorted({module for module, _, leaf in named if leaf != "bias"})
    alone = [module for module, _, leaf in named if leaf == "bias" and module not in modules]
    if not alone:
        return modules, "none"
    return modules, "lora_only" if all(module in adapted for module in alone) else "all"
