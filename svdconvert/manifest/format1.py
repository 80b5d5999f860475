"""Manifests of format 1, written up to version 0.1, with options and results in one mapping.

`upgraded` turns the JSON of a format 1 manifest into that of format 2.
"""

from collections.abc import Mapping
from typing import Any

FORMAT = 1
FULL = "full"
"""The method whose directories have the kind "merged" in format 1."""


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same manifest in format 2."""
    kind = values.get("kind")
    options = values.get("options")
    values = dict(values)
    if "rebased" in values:
        values["base_is_residual"] = values.pop("rebased")
    if kind == "merged" and values.get("method") == FULL:
        values["kind"] = "finetuned"
    elif isinstance(options, Mapping) and (move := _MOVES.get(str(kind))):
        remaining = dict(options)
        values["result"] = move(remaining)
        values["options"] = remaining
    return values | {"format": 2}


def _trained(options: dict[str, Any]) -> dict[str, Any]:
    return {"head": options.pop("head", None)}


def _merged(options: dict[str, Any]) -> dict[str, Any]:
    by = options.pop("recovered", None)
    return {
        "side": options.get("side", "base"),
        "update": options.pop("update", None),
        "recovered": {"by": by} if by else None,
        "head": options.pop("head", None),
    }


def _lora(options: dict[str, Any]) -> dict[str, Any]:
    truncation = options.pop("truncation", None)
    rank = options.get("rank")
    if truncation is None:
        options["rank"] = None  # format 1 replaced the requested rank with the resulting one
    return {
        "rank": rank or 0,
        "truncation": truncation,
        "recovered": options.pop("recovered", None),
        "head": options.pop("head", None),
    }


_MOVES = {"trained": _trained, "merged": _merged, "lora": _lora}
"""Kind -> the function that removes the results from the options, and returns them."""
