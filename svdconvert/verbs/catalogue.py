"""svdconvert list: what methods and layouts there are."""

from typing import Any

from svdconvert.layout import LAYOUTS
from svdconvert.method import METHODS


def methods() -> list[dict[str, Any]]:
    """One row for each method, in the order of their names."""
    rows = []
    for name in METHODS.names():
        method = METHODS.get(name)
        rows.append(
            {
                "method": name,
                "what it does": method.summary,
                "trains": ", ".join(sorted(method.trains)),
                "base": "residual" if method.residual else "untouched",
                "stock PEFT loads it": "yes" if method.peft_type == "LORA" else "no",
                "rate": method.learning_rate,
                "paper": method.paper,
            }
        )
    return rows


def layouts() -> list[dict[str, Any]]:
    """One row for each layout, in the order of their names."""
    rows = []
    for name in LAYOUTS.names():
        layout = LAYOUTS.get(name)
        rows.append(
            {
                "layout": name,
                "models": layout.summary,
                "model_type": ", ".join(sorted(layout.model_types)),
                "roles": ", ".join(layout.roles),
            }
        )
    return rows
