"""How this machine reaches the Hub: cache, login and address, without asking the Hub."""

import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from svdconvert.hub.auth import endpoint, find_token

Login = Literal["HF_TOKEN", ".env", "stored login"]


def cache_directory() -> Path:
    """The directory that models of the Hub are downloaded to."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def login() -> Login | None:
    """Which token would be used; None without one. The token itself is not returned.

    Raises RecipeError if .env cannot be read.
    """
    if os.environ.get("HF_TOKEN", "").strip():
        return "HF_TOKEN"
    if find_token():
        return ".env"
    from huggingface_hub import get_token

    return "stored login" if get_token() else None


def address() -> str:
    """The Hub's address without a user name, password or path that somebody may have put into it."""
    parts = urlsplit(endpoint())
    try:
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        port = ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}"


def is_offline() -> bool:
    """True if HF_HUB_OFFLINE forbids requests."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
