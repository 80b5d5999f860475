"""Parameters trained in full in addition to the factors (norms, biases, heads), under PEFT's names.

A parameter is named by its path at run time, such as `model.norm.weight`. In an adapter's file PEFT writes it
under this name (`modules_to_save`) or, if it is the bias of an adapted layer, below `base_layer` (`bias`).
"""

import re
from collections.abc import Collection, Iterable

PREFIX = "base_model.model."
_BASE = "base_layer"
_SAVED = re.compile(rf"\.(?:{_BASE}|original_module|modules_to_save(?:\.default)?)\.")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""Ends of the names of embeddings, which have a row for each entry of the vocabulary."""
HEADS = ("lm_head.weight", "embed_out.weight")
"""Ends of the names of heads, which have a row for each entry of the vocabulary."""
_COPY = re.compile(rf"\.original_module\.|\.{_BASE}\.weight$")


def extra_key(parameter: str, adapted: Collection[str]) -> str:
    """The name of a parameter in an adapter's file; `adapted` are the modules with factors."""
    module, _, leaf = parameter.rpartition(".")
    return PREFIX + (f"{module}.{_BASE}.{leaf}" if module in adapted else parameter)


def parameter_of(key: str) -> str:
    """The inverse of `extra_key`; also of keys below `modules_to_save`, as PEFT writes some of them."""
    return _SAVED.sub(".", key.removeprefix(PREFIX))


def copy_key(parameter: str) -> str:
    """The name in an adapter's file of a copy of the base's values of a parameter."""
    module, _, leaf = parameter.rpartition(".")
    return f"{PREFIX}{module}.{_BASE}.{leaf}"


def is_copy(key: str) -> bool:
    """True for a copy of the base's values: PEFT writes them with adapters of embeddings and heads."""
    return key.startswith(PREFIX) and _COPY.search(key) is not None


def is_declared(key: str, modules_to_save: Iterable[str], bias: str) -> bool:
    """True if a configuration with these entries declares that `key` is a parameter trained in full."""
    if not key.startswith(PREFIX) or "lora_" in key:
        return False
    module, _, leaf = parameter_of(key).rpartition(".")
    if leaf == "bias" and bias != "none":
        return True
    # PEFT matches an entry with the end of a module's path, even from the middle of a word.
    return any(f"{entry}." in f"{module}." for entry in modules_to_save)


def is_vocabulary(key: str) -> bool:
    """True for the weight of embeddings or a head: PEFT writes both whole if the vocabulary was resized."""
    return key.startswith(PREFIX) and parameter_of(key).endswith((*EMBEDDINGS, *HEADS))


def contains_adapters(parameters: Iterable[str], adapted: Collection[str]) -> bool:
    """True if a parameter belongs to a module that contains adapted modules.

    PEFT can save such a parameter only together with the entire module, including its adapters.
    """
    holders = {f"{parameter.rpartition('.')[0]}." for parameter in parameters}
    return any(module.startswith(holder) for holder in holders for module in adapted)


def declaration(parameters: Iterable[str], adapted: Collection[str]) -> tuple[list[str], str]:
    """(modules_to_save, bias) of adapter_config.json for these parameters.

    Entries are full paths, because PEFT matches an entry with the end of a path. The bias of an adapted layer
    is declared by `bias`, because PEFT does not accept an adapted layer in modules_to_save.
    """
    named = [parameter.rpartition(".") for parameter in parameters]
    modules = sorted({module for module, _, leaf in named if leaf != "bias"})
    biases = [module for module, _, leaf in named if leaf == "bias" and module not in modules]
    if not biases:
        return modules, "none"
    return modules, "lora_only" if all(module in adapted for module in biases) else "all"
