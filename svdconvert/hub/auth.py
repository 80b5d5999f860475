"""The address of the Hub, the token for it, and how the token is kept out of messages."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from svdconvert.errors import RecipeError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DOTENV = Path(".env")
_VARIABLE = "HF_TOKEN"
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{10,}")
_SHORTEST = 4  # characters; a shorter text is no token, and replacing it would spoil sentences
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
    """huggingface_hub's client for `endpoint`, with the token of `find_token`; its answers are checked."""
    from huggingface_hub import HfApi

    from svdconvert.hub.replies import watch_session

    watch_session()
    return HfApi(token=find_token())


def endpoint() -> str:
    """The address of the Hub: HF_ENDPOINT, else the public one."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def scrub(text: str) -> str:
    """`text` with *** in place of tokens that may have been sent, and of all that looks like one."""
    for token in _known_tokens():
        text = text.replace(token, "***")
    return _TOKEN.sub("***", text)


def _known_tokens() -> list[str]:
    """The tokens of the environment, of .env and of the stored login, longest first."""
    found = {os.environ.get(_VARIABLE, "").strip()}
    with suppress(RecipeError):  # which is reported by what needs the token
        found.add(find_token() or "")
    if "huggingface_hub" in sys.modules:  # else nothing was sent
        from huggingface_hub import get_token

        found.add(get_token() or "")
    return sorted((token for token in found if len(token) >= _SHORTEST), key=len, reverse=True)


def scrub_exception(error: BaseException) -> None:
    """Scrub the messages of an exception and of those that it was raised from, for a traceback."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        link.args = tuple(scrub(part) if isinstance(part, str) else part for part in link.args)
        link = link.__cause__ or link.__context__
