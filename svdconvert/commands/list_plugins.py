"""svdconvert list: methods, layouts, merge methods, formats of weights, tasks, and recipes."""

from collections.abc import Callable
from typing import Any, Literal

from svdconvert.config.recipe_list import recipes
from svdconvert.errors import PluginError
from svdconvert.evaluation.base import TASKS
from svdconvert.layouts.base import AUTOMATIC, BY_NAMES, LAYOUTS
from svdconvert.merging.base import MERGES
from svdconvert.methods.base import METHODS, Method
from svdconvert.quantization.base import FORMATS


def list_plugins(
    what: Literal["methods", "layouts", "merges", "formats", "tasks", "recipes"],
) -> list[dict[str, Any]]:
    """One row for each method, layout, merge method, format or task, with those of installed packages.

    For recipes: one row for each recipe of this package.
    """
    listing = {"methods": methods, "layouts": layouts, "merges": merges, "formats": formats, "tasks": tasks}
    return {**listing, "recipes": recipes}[what]()


def methods() -> list[dict[str, Any]]:
    """One row for each method, in the order of their names; for one that cannot be loaded, the reason."""
    return [_method_row(name) for name in METHODS.names()]


def _method_row(name: str) -> dict[str, Any]:
    try:
        method = METHODS.get(name)
    except PluginError as error:
        columns = ("slice", "trains", "values of an O x I matrix", "base", "stock PEFT loads it")
        unknown = dict.fromkeys((*columns, "rate", "paper"), "")
        return {"method": name, "what it does": str(error), **unknown}
    loads = "no adapter" if method.split is None else "yes" if method.peft_type == "LORA" else "no"
    return {
        "method": name,
        "what it does": method.summary,
        "slice": _by_variant(method, lambda variant: variant.spectrum_part or "none"),
        "trains": ", ".join(sorted(method.trains)),
        "values of an O x I matrix": method.trained_formula,
        "base": _by_variant(method, _base),
        "stock PEFT loads it": loads,
        "rate": method.learning_rate,
        "paper": method.paper,
    }


def _by_variant(method: Method, text: Callable[[Method], str]) -> str:
    """The text of a method, or those of each of its initialisations if it has several."""
    if not method.variants:
        return text(method)
    return ", ".join(f"{text(variant)} (init {variant.init})" for variant in (method, *method.variants))


def _base(method: Method) -> str:
    if method.split is None:
        return "trained"
    return "residual" if method.residual else "untouched"


def layouts() -> list[dict[str, Any]]:
    """One row for each layout, in the order of their names; for one that cannot be loaded, the reason.

    The last two are found for each model.
    """
    return [*(_layout_row(name) for name in LAYOUTS.names()), *_FOUND]


_FOUND = (
    {
        "layout": AUTOMATIC,
        "models": "any other model that transformers knows; found from its network",
        "model_type": "any: config.json decides",
        "roles": "from the paths of the modules, such as attn.q, mlp.gate, experts.down, vision.attn.q",
    },
    {
        "layout": BY_NAMES,
        "models": "any model with numbered blocks; only with --layout names",
        "model_type": "any: the tensors' names decide",
        "roles": "from the tensors' names, such as attn.q",
    },
)


def _layout_row(name: str) -> dict[str, Any]:
    try:
        layout = LAYOUTS.get(name)
    except PluginError as error:
        return {"layout": name, "models": str(error), "model_type": "", "roles": ""}
    return {
        "layout": name,
        "models": layout.summary,
        "model_type": ", ".join(sorted(layout.model_types)) or "any: the tensors' names decide",
        "roles": ", ".join(layout.roles),
    }


def merges() -> list[dict[str, Any]]:
    """One row for each merge method, in the order of their names, or the reason why it cannot be loaded."""
    return [_merge_row(name) for name in MERGES.names()]


def _merge_row(name: str) -> dict[str, Any]:
    try:
        method = MERGES.get(name)
    except PluginError as error:
        return {"method": name, "what it does": str(error), "merges": "", "parameters": "", "paper": ""}
    return {
        "method": name,
        "what it does": method.summary,
        "merges": " and ".join(sorted(method.takes)),
        "parameters": ", ".join(f"{one.name} {_plain(one.default)}" for one in method.parameters),
        "paper": method.paper,
    }


def _plain(value: float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def formats() -> list[dict[str, Any]]:
    """One row for each format of quantised weights; for one that cannot be loaded, the reason."""
    return [_format_row(name) for name in FORMATS.names()]


def _format_row(name: str) -> dict[str, Any]:
    try:
        plugin = FORMATS.get(name)
    except PluginError as error:
        return {"format": name, "weights": str(error), "quant_method": "", "merge --keep-format": ""}
    return {
        "format": name,
        "weights": plugin.summary,
        "quant_method": ", ".join(sorted(plugin.methods)),
        "merge --keep-format": "yes" if plugin.encodes else "no",
    }


def tasks() -> list[dict[str, Any]]:
    """One row for each task of `eval`; for one that cannot be loaded, the reason."""
    return [_task_row(name) for name in TASKS.names()]


def _task_row(name: str) -> dict[str, Any]:
    try:
        task = TASKS.get(name)
    except PluginError as error:
        return {"task": name, "what it asks": str(error), "group": "", "data": "", "graded": "", "paper": ""}
    return {
        "task": name,
        "what it asks": task.summary,
        "group": ", ".join(task.groups),
        "data": task.data.name,
        "graded": ", ".join(task.protocols),
        "paper": task.paper,
    }
