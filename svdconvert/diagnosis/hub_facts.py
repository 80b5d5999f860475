"""How this machine reaches the Hub; nothing is asked there."""

import os
from collections.abc import Iterator

from svdconvert.diagnosis.facts import Fact
from svdconvert.errors import RecipeError
from svdconvert.hub.access import address, is_offline, login

_VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_DISABLE_XET",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "SVDCONVERT_CACHE",
)


def hub_facts() -> Iterator[Fact]:
    """Address, login and the variables that change how the Hub is reached; never the token."""
    try:
        yield Fact("hub", "address", address())
        yield Fact("hub", "offline", "yes, by HF_HUB_OFFLINE" if is_offline() else "no")
        yield _token()
    except ImportError:
        return  # among the packages it is said that huggingface_hub is missing
    for name in _VARIABLES:
        if name in os.environ:
            yield Fact("hub", name, os.environ[name])


def _token() -> Fact:
    try:
        found = login()
    except RecipeError as error:
        return Fact("hub", "token", str(error), "note")
    if found is None:
        return Fact("hub", "token", "none: private and gated models and push need `hf auth login`", "note")
    return Fact("hub", "token", f"present ({found})")
