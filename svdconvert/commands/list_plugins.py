"""svdconvert list: what methods and layouts there are."""

from collections.abc import Callable
from typing import Any

from svdconvert.layouts.base import LAYOUTS
from svdconvert.methods.base import METHODS, Method


def methods() -> list[dict[str, Any]]:
    """One row for each method, in the order of their names."""
    rows = []
    for name in METHODS.names():
        method = METHODS.get(name)
        loads = "no adapter" if method.split is None else "yes" if method.peft_type == "LORA" else "no"
        rows.append(
            {
                "method": name,
                "what it does": method.summary,
                "slice": _by_start(method, lambda way: way.spectrum_part),
                "trains": ", ".join(sorted(method.trains)),
                "values of an O x I matrix": method.trained_formula,
                "base": _by_start(method, _base),
                "stock PEFT loads it": loads,
                "rate": method.learning_rate,
                "paper": method.paper,
            }
        )
    return rows


def _by_start(method: Method, told: Callable[[Method], str]) -> str:
    """What is told of a method, or of each way to start it where it knows several."""
    if not method.variants:
        return told(method)
    return ", ".join(f"{told(way)} (init {way.init})" for way in (method, *method.variants))


def _base(method: Method) -> str:
    if method.split is None:
        return "trained"
    return "residual" if method.residual else "untouched"


def layouts() -> list[dict[str, Any]]:
    """One row for each layout, in the order of their names."""
    rows = []
    for name in LAYOUTS.names():
        layout = LAYOUTS.get(name)
        rows.append(
            {
                "layout": name,
                "models": layout.summary,
                "model_type": ", ".join(sorted(layout.model_types)) or "any: the tensors' names decide",
                "roles": ", ".join(layout.roles),
            }
        )
    return rows
