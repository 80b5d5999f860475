"""svdconvert list: methods, layouts, merge methods, formats of weights, tasks, and recipes."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from svdconvert.config.recipe_list import recipes
from svdconvert.errors import PluginError, UnknownNameError, did_you_mean
from svdconvert.evaluation.base import TASKS
from svdconvert.layouts.base import AUTOMATIC, BY_NAMES, LAYOUTS

if TYPE_CHECKING:
    from svdconvert.methods.base import Method

LABELS: Mapping[str, str] = {
    "about": "what it is",
    "asks": "what it asks",
    "does": "what it does",
    "groups": "group",
    "trained_values": "values of an O x I matrix",
    "loads_in_peft": "stock PEFT loads it",
    "model_types": "model_type",
    "quant_methods": "quant_method",
    "keeps_format": "merge --keep-format",
}
"""Key of a row -> its heading in a table for people, if that is not the key itself."""


def list_plugins(
    what: Literal["methods", "layouts", "merges", "formats", "tasks", "recipes"], name: str | None = None
) -> list[dict[str, Any]]:
    """One row for each method, layout, merge method, format or task, with those of installed packages.

    With a name only the row of that one; raises UnknownNameError if there is none.

    For recipes: one row for each recipe of this package. The first value of a row is the name, the second a
    phrase. Several values are a list, parameters a mapping to their defaults; a value that does not apply is
    None. `in_words` makes texts of all of them.
    """
    listing = {"methods": methods, "layouts": layouts, "merges": merges, "formats": formats, "tasks": tasks}
    rows = {**listing, "recipes": recipes}[what]()
    if name is None:
        return rows
    known = {str(next(iter(row.values()))): row for row in rows}
    if name not in known:
        raise UnknownNameError(f"{name} is none of the {what}; {did_you_mean(name, known)}")
    return [known[name]]


def in_words(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of `list_plugins` with the headings and the texts of a table for people."""
    special = _FOUND_IN_WORDS.get(row.get("layout", ""), {})
    return {LABELS.get(key, key): special.get(key) or _in_words(key, value) for key, value in row.items()}


def _in_words(key: str, value: Any) -> str:
    if value is None:
        return "no adapter" if key == "loads_in_peft" else ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_number(one)}" for name, one in value.items())
    if isinstance(value, list):
        empty = "any: the tensors' names decide" if key == "model_types" else ""
        return (" and " if key == "merges" else ", ").join(value) or empty
    return str(value)


def _number(value: float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def methods() -> list[dict[str, Any]]:
    """One row for each method, in the order of their names; for one that cannot be loaded, the reason."""
    from svdconvert.methods.base import METHODS  # it imports torch, which takes seconds

    return [_method_row(name) for name in METHODS.names()]


def _method_row(name: str) -> dict[str, Any]:
    from svdconvert.methods.base import METHODS

    try:
        method = METHODS.get(name)
    except PluginError as error:
        columns = ("slice", "trains", "trained_values", "base", "loads_in_peft", "rate", "paper")
        return {"method": name, "does": str(error), **dict.fromkeys(columns)}
    return {
        "method": name,
        "does": method.summary,
        "slice": _by_variant(method, lambda variant: variant.spectrum_part or "none"),
        "trains": sorted(method.trains),
        "trained_values": method.trained_formula,
        "base": _by_variant(method, _base),
        "loads_in_peft": None if method.split is None else method.peft_type == "LORA",
        "rate": method.learning_rate,
        "paper": method.paper,
    }


def _by_variant(method: "Method", text: "Callable[[Method], str]") -> str:
    """The text of a method, or those of each of its initialisations if it has several."""
    if not method.variants:
        return text(method)
    return ", ".join(f"{text(variant)} (init {variant.init})" for variant in (method, *method.variants))


def _base(method: "Method") -> str:
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
        "model_types": None,
        "roles": None,
    },
    {
        "layout": BY_NAMES,
        "models": "any model with numbered blocks; only with --layout names",
        "model_types": None,
        "roles": None,
    },
)
_FOUND_IN_WORDS = {
    AUTOMATIC: {
        "model_types": "any: config.json decides",
        "roles": "from the paths of the modules, such as attn.q, mlp.gate, experts.down, vision.attn.q",
    },
    BY_NAMES: {
        "model_types": "any: the tensors' names decide",
        "roles": "from the tensors' names, such as attn.q",
    },
}


def _layout_row(name: str) -> dict[str, Any]:
    try:
        layout = LAYOUTS.get(name)
    except PluginError as error:
        return {"layout": name, "models": str(error), "model_types": None, "roles": None}
    return {
        "layout": name,
        "models": layout.summary,
        "model_types": sorted(layout.model_types),
        "roles": list(layout.roles),
    }


def merges() -> list[dict[str, Any]]:
    """One row for each merge method, in the order of their names, or the reason why it cannot be loaded."""
    from svdconvert.merging.base import MERGES  # it imports torch, which takes seconds

    return [_merge_row(name) for name in MERGES.names()]


def _merge_row(name: str) -> dict[str, Any]:
    from svdconvert.merging.base import MERGES

    try:
        method = MERGES.get(name)
    except PluginError as error:
        return {"method": name, "does": str(error), **dict.fromkeys(("merges", "parameters", "paper"))}
    return {
        "method": name,
        "does": method.summary,
        "merges": sorted(method.takes),
        "parameters": {one.name: one.default for one in method.parameters},
        "paper": method.paper,
    }


def formats() -> list[dict[str, Any]]:
    """One row for each format of quantised weights; for one that cannot be loaded, the reason."""
    from svdconvert.quantization.base import FORMATS  # it imports torch, which takes seconds

    return [_format_row(name) for name in FORMATS.names()]


def _format_row(name: str) -> dict[str, Any]:
    from svdconvert.quantization.base import FORMATS

    try:
        plugin = FORMATS.get(name)
    except PluginError as error:
        return {"format": name, "weights": str(error), "quant_methods": None, "keeps_format": None}
    return {
        "format": name,
        "weights": plugin.summary,
        "quant_methods": sorted(plugin.methods),
        "keeps_format": plugin.encodes,
    }


def tasks() -> list[dict[str, Any]]:
    """One row for each task of `eval`; for one that cannot be loaded, the reason."""
    return [_task_row(name) for name in TASKS.names()]


def _task_row(name: str) -> dict[str, Any]:
    try:
        task = TASKS.get(name)
    except PluginError as error:
        return {"task": name, "asks": str(error), **dict.fromkeys(("groups", "data", "graded", "paper"))}
    return {
        "task": name,
        "asks": task.summary,
        "groups": list(task.groups),
        "data": task.data.name,
        "graded": list(task.protocols),
        "paper": task.paper,
    }
