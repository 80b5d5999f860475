"""The rules of the street: whose token is used, and what a refusal of the Hub means in one sentence."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from time import sleep
from typing import TypeVar

from svdconvert.errors import CheckpointError, HubError, ModelNotFoundError, RecipeError, SvdConvertError

T = TypeVar("T")

DOTENV = Path(".env")
_TOKEN = "HF_TOKEN"
_KEYS = (_TOKEN, "hf")  # the second is what SORSA's own code looks for
_BUSY = (429, 500, 502, 503, 504)
_PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def use_token() -> None:
    """Take the token from .env in the working directory, where the environment has none.

    The stored login is huggingface_hub's own affair. Raises RecipeError where .env cannot be read.
    """
    if os.environ.get(_TOKEN) or not DOTENV.is_file():
        return
    from dotenv import dotenv_values

    try:
        values = dotenv_values(DOTENV)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            ".env in the working directory cannot be read as KEY=value lines; mend it"
        ) from error
    if token := next((values[key] for key in _KEYS if values.get(key)), None):
        os.environ[_TOKEN] = token


@contextmanager
def explained(repository: str, revision: str | None = None, *, kind: type[SvdConvertError]) -> Iterator[None]:
    """Turn what huggingface_hub raises about a repository into one sentence, as an error of `kind`.

    A repository, revision or file that does not exist is a ModelNotFoundError when `kind` is CheckpointError.
    """
    try:
        yield
    except SvdConvertError:
        raise
    except Exception as error:
        cause = _cause(error)
        if sentence := _sentence(cause, repository, revision, pushing=kind is HubError):
            absent = kind is CheckpointError and _is_absence(cause)
            raise (ModelNotFoundError if absent else kind)(sentence) from error
        raise


def _is_absence(error: BaseException) -> bool:
    """True if there is no such repository, revision or file on the Hub."""
    from huggingface_hub import errors

    not_answered = (errors.GatedRepoError, errors.LocalEntryNotFoundError)
    absent = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.EntryNotFoundError,
        errors.HFValidationError,
    )
    return isinstance(error, absent) and not isinstance(error, not_answered)


def patiently(action: Callable[[], T]) -> T:
    """Do what can be done again, and do it again while the Hub is busy or a connection breaks midway.

    huggingface_hub itself waits in some of its calls only. A Hub that cannot be reached at all is not
    waited for.
    """
    for pause in _PAUSES:
        try:
            return action()
        except Exception as error:
            wanted = _wanted_pause(_cause(error))
            if wanted is None:
                raise
            sleep(max(pause, wanted))
    return action()


def _wanted_pause(error: BaseException) -> float | None:
    """Seconds that the Hub asks for; None where waiting is of no use."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        asked = error.response.headers.get("Retry-After", "0")
        return float(asked) if error.response.status_code in _BUSY and asked.isdigit() else None
    return 0.0 if is_passing(error) and type(error).__name__ != "ConnectError" else None


def is_passing(error: BaseException | None) -> bool:
    """True for a connection that broke, which may hold the next time."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, transport_errors()) and not isinstance(error, OfflineModeIsEnabled)


def endpoint() -> str:
    """The Hub that is spoken to: HF_ENDPOINT, else the public one."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def transport_errors() -> tuple[type[Exception], ...]:
    """What a broken, refused or silent connection raises, whichever HTTP client huggingface_hub uses."""
    from huggingface_hub.utils import get_session

    client = import_module(type(get_session()).__module__.split(".")[0])
    kind: type[Exception] = client.TransportError
    return (kind, ConnectionError)


def _cause(error: BaseException) -> BaseException:
    """What is beneath the errors that only say during what it happened."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _sentence(error: BaseException, repository: str, revision: str | None, pushing: bool) -> str | None:
    """What is wrong and what to do; None for what is not the Hub's doing."""
    from huggingface_hub import errors

    if pushing and type(error) in (RuntimeError, ConnectionError):  # as hf_xet's uploads fail
        return (
            f"the upload to {repository} failed ({' '.join(str(error).split())}); repeat the push, with "
            "HF_HUB_DISABLE_XET=1 in the environment if it fails again"
        )
    here = f"{repository} is neither a local directory nor in the local cache, and "
    absent, go_on = ("", "connect") if pushing else (here, "mend the path, or connect")
    there = (
        f"{repository} is not on {endpoint()}, or not for you to see"
        if pushing
        else (f"{repository} is neither here nor on {endpoint()}, or it is private there")
    )
    told: list[tuple[type[Exception] | tuple[type[Exception], ...], str]] = [
        (errors.LocalTokenNotFoundError, f"nobody is logged in at {endpoint()}; {_LOG_IN}"),
        (errors.HFValidationError, f"{repository} is no name of a repository; give org/name"),
        (errors.OfflineModeIsEnabled, f"{absent}HF_HUB_OFFLINE forbids to ask the Hub; unset it"),
        (
            errors.GatedRepoError,
            f"{repository} is gated: ask for access at {endpoint()}/{repository}, and {_LOG_IN}",
        ),
        (errors.RepositoryNotFoundError, f"{there}: check the name, or {_LOG_IN} as someone who may see it"),
        (
            (errors.LocalEntryNotFoundError, *transport_errors()),
            f"{absent}{endpoint()} is out of reach ({type(error).__name__}); {go_on} and run the same "
            "command again",
        ),
    ]
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision}; {_revisions(repository)}"
    if sentence := next((text for kind, text in told if isinstance(error, kind)), None):
        return sentence
    if isinstance(error, errors.HfHubHTTPError):
        return _by_status(error.response.status_code, error.server_message or "", repository)
    return None


def _by_status(status: int, message: str, repository: str) -> str:
    said = f" ({message})" if message else ""
    if status == 401:
        return (
            f"the token was refused{said}: it has expired or was revoked; make a new one at "
            f"{endpoint()}/settings/tokens, and {_LOG_IN}"
        )
    if status == 403:
        return f"the token may not do that to {repository}{said}; {_LOG_IN} with a token that may write there"
    if status == 412:
        return f"someone else has changed {repository} meanwhile; look at it, then push again"
    if status == 429:
        return f"{endpoint()} wants fewer requests; wait some minutes and run the same command again to go on"
    if status >= 500:
        return f"{endpoint()} is in trouble (status {status}); run the same command again to go on"
    return f"{endpoint()} refuses {repository} with status {status}{said}"


def _revisions(repository: str) -> str:
    """The end of a sentence about an unknown revision."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repository)
    except Exception:  # it is only a hint
        return "check its branches and tags"
    names = [ref.name for ref in [*refs.branches, *refs.tags]]
    return f"it has {', '.join(names[:8])}"
