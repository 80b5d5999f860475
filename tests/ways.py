"""Every method with every variant of its initial adapter, and the families that they are tested on."""

from typing import Any

import pytest

from svdconvert.methods.base import METHODS, Method
from tests.tiny import MODEL_TYPES


def _ways() -> dict[str, Method]:
    found = {}
    for name in METHODS.names():
        method = METHODS.get(name)
        if method.split is not None:
            found[name] = method
            found |= {f"{name} {variant.init}": variant for variant in method.variants}
    return found


WAYS = _ways()
"""The methods with an adapter, by "method" or "method init"."""
REBASED = [way for way, method in WAYS.items() if method.residual]
# Every method is tested on a family whose module paths equal the names on disk, and on one whose paths
# differ. The other families differ in names and in which tensors are not adapted: two methods are enough.
_FEW = ("llama", "gemma3")
_BROAD = ("pissa", "lora")


def chosen(way: str) -> dict[str, Any]:
    """The options that select a way."""
    method, _, init = way.partition(" ")
    return {"method": method} | ({"init": init} if init else {})


def pairs(ways: list[str], families: list[str]) -> Any:
    """Parameters `way` and `family`."""
    found = [(way, family) for way in ways for family in families if way in _BROAD or family in _FEW]
    return pytest.mark.parametrize(("way", "family"), found)


every_way = pytest.mark.parametrize("way", WAYS)
every_pair = pairs([*WAYS], MODEL_TYPES)
every_rebased_pair = pairs(REBASED, MODEL_TYPES)
