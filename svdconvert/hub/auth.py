"""The address of the Hub, the token for it, and how the token is kept out of messages."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from svdconvert.errors import RecipeError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DOTENV = Path(".env")
_VARIABLE = "HF_TOKEN"
_DOTENV_KEYS = (_VARIABLE, "hf")  # SORSA's own code (github.com/Gunale0926/SORSA) reads the key `hf`


def find_token() -> str | None:
    """The token to use: HF_TOKEN of the environment, else HF_TOKEN or `hf` of .env in the working directory.

    None means that huggingface_hub uses its stored login, if there is one. The environment is not changed.
    Raises RecipeError if .env cannot be read.
    """
    if token := os.environ.get(_VARIABLE, "").strip():
        return token
    if not DOTENV.is_file():
        return None
    from dotenv import dotenv_values

    try:
        values = dotenv_values(DOTENV)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            ".env in the working directory cannot be read as KEY=value lines; correct or remove it"
        ) from error
    return next((value.strip() for key in _DOTENV_KEYS if (value := values.get(key))), None)


def hub_api() -> "HfApi":
    """huggingface_hub's client for `endpoint`, with the token of `find_token`."""
    from huggingface_hub import HfApi

    return HfApi(token=find_token())


def endpoint() -> str:
    """The address of the Hub: HF_ENDPOINT, else the public one."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def scrub(text: str) -> str:
    """`text` with *** in place of every token that may have been sent to the Hub."""
    from huggingface_hub import get_token

    for token in filter(None, (find_token(), get_token())):
        text = text.replace(token, "***")
    return text


def scrub_exception(error: BaseException) -> None:
    """Scrub the messages of an exception and of those that it was raised from, for a traceback."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        link.args = tuple(scrub(part) if isinstance(part, str) else part for part in link.args)
        link = link.__cause__ or link.__context__
