"""What a failed request to the Hub means, in one sentence, and which requests are repeated."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import sleep
from traceback import walk_tb
from typing import TypeVar

from svdconvert.errors import CheckpointError, HubError, ModelNotFoundError, SvdConvertError
from svdconvert.hub.auth import endpoint, hub_api, scrub, scrub_exception
from svdconvert.hub.replies import BUSY, WrongReplyError, refuse_long_pause, requested_pause

T = TypeVar("T")

_DISK = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EIO)
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError)
_PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@contextmanager
def hub_errors_as(
    kind: type[SvdConvertError], repository: str, revision: str | None = None
) -> Iterator[None]:
    """Turn what huggingface_hub raises about a repository into an error of `kind` with one sentence.

    With CheckpointError, a repository, revision or file that does not exist is a ModelNotFoundError. No
    token is left in the message, nor in those of the exceptions that it was raised from.
    """
    try:
        yield
    except SvdConvertError as error:
        scrub_exception(error)
        raise
    except Exception as error:
        scrub_exception(error)
        cause = _cause(error)
        if sentence := _sentence(cause, repository, revision, pushing=kind is HubError):
            absent = kind is CheckpointError and _is_absence(cause)
            raise (ModelNotFoundError if absent else kind)(scrub(sentence)) from error
        raise


def with_retries(action: Callable[[], T]) -> T:
    """The result of an `action` that may be repeated, and is while the Hub is busy or a connection breaks.

    huggingface_hub repeats only some of its requests. A Hub that cannot be reached at all is not waited for.
    """
    for pause in _PAUSES:
        try:
            return action()
        except Exception as error:
            requested = pause_before_retry(error)
            if requested is None:
                raise
            sleep(max(pause, requested))
    return action()


def pause_before_retry(error: BaseException) -> float | None:
    """The seconds that the Hub asks to wait; None if repeating the request is of no use.

    Raises WrongReplyError if it asks for more than a short wait.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code not in BUSY:
            return None
        seconds = requested_pause(error.response)
        refuse_long_pause(seconds)
        return seconds
    return 0.0 if is_connection_error(error) and not isinstance(error, httpx.ConnectError) else None


def is_connection_error(error: BaseException | None) -> bool:
    """True for a refused, broken or silent connection; the same request may succeed later."""
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    broken = isinstance(error, (httpx.TransportError, ConnectionError))
    return broken and not isinstance(error, OfflineModeIsEnabled)


def is_unanswered(error: BaseException) -> bool:
    """True if the Hub is out of reach, forbidden by HF_HUB_OFFLINE, or fails with a status of 500 or more."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, (OfflineModeIsEnabled, httpx.TransportError))


def _is_absence(error: BaseException) -> bool:
    """True if there is no such repository, revision or file on the Hub."""
    from huggingface_hub import errors

    unknown = (errors.GatedRepoError, errors.LocalEntryNotFoundError)
    absent = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.EntryNotFoundError,
        errors.HFValidationError,
    )
    return isinstance(error, absent) and not isinstance(error, unknown)


def _cause(error: BaseException) -> BaseException:
    """The exception below those that only say during which operation it was raised."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _sentence(error: BaseException, repository: str, revision: str | None, pushing: bool) -> str | None:
    """What is wrong and what to do; None for an exception that is not about the Hub."""
    from huggingface_hub import errors

    if isinstance(error, WrongReplyError):
        return str(error)
    if pushing and type(error) in (RuntimeError, ConnectionError):  # raised by hf_xet's uploads
        return (
            f"the upload to {repository} failed ({' '.join(str(error).split())}); repeat the push, with "
            "HF_HUB_DISABLE_XET=1 in the environment if it fails again"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision}; {_known_revisions(repository)}"
    if sentence := _by_class(error, repository, pushing):
        return sentence
    if isinstance(error, errors.HfHubHTTPError):
        return _by_status(error.response.status_code, error.server_message or "", repository)
    return _by_origin(error, pushing)


def _by_origin(error: BaseException, pushing: bool) -> str | None:
    """For an error of the cache's disk, or of huggingface_hub over an answer that it cannot read."""
    from huggingface_hub import constants
    from huggingface_hub.errors import FileMetadataError

    if not pushing and isinstance(error, OSError) and error.errno in _DISK:
        return (
            f"the cache {constants.HF_HUB_CACHE} cannot be used ({error.strerror}: {error.filename}); make "
            "it writable or free space on it, or set HF_HOME to another directory"
        )
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    theirs = any(module.startswith("huggingface_hub") for module in modules)
    if isinstance(error, FileMetadataError) or (theirs and isinstance(error, _UNREADABLE)):
        return (
            f"{endpoint()} does not answer as the Hub does ({type(error).__name__}: "
            f"{' '.join(scrub(str(error)).split())[:200]}); check HF_ENDPOINT, the proxy, and "
            "whether the network asks for a login"
        )
    return None


def _by_class(error: BaseException, repository: str, pushing: bool) -> str | None:
    from huggingface_hub import errors

    hub = endpoint()
    not_here = "" if pushing else f"{repository} is neither a local directory nor in the local cache, and "
    advice = "connect" if pushing else "correct the path, or connect"
    absent = "does not exist on" if pushing else "exists neither on this machine nor on"
    table: list[tuple[type[Exception], str]] = [
        (errors.LocalTokenNotFoundError, f"no token for {hub} is known; {_LOG_IN}"),
        (errors.HFValidationError, f"{repository} is not a valid name of a repository; give org/name"),
        (errors.OfflineModeIsEnabled, f"{not_here}HF_HUB_OFFLINE forbids requests to the Hub; unset it"),
        (
            errors.GatedRepoError,
            f"{repository} is gated: request access at {hub}/{repository}, and {_LOG_IN}",
        ),
        (
            errors.RepositoryNotFoundError,
            f"{repository} {absent} {hub}, or it is private: check the name, or {_LOG_IN} with access to it",
        ),
    ]
    if sentence := next((text for kind, text in table if isinstance(error, kind)), None):
        return sentence
    if isinstance(error, errors.LocalEntryNotFoundError) or is_connection_error(error):
        return (
            f"{not_here}{hub} is out of reach ({type(error).__name__}); {advice} and run the same command "
            "again"
        )
    return None


def _by_status(status: int, message: str, repository: str) -> str:
    said = f" ({message})" if message else ""
    if status == 401:
        return (
            f"the token was refused{said}: it has expired or was revoked; create a new one at "
            f"{endpoint()}/settings/tokens, and {_LOG_IN}"
        )
    if status == 403:
        return f"the token may not do that to {repository}{said}; {_LOG_IN} with a token that may write"
    if status == 412:
        return f"someone else has changed {repository} meanwhile; look at the change, then push again"
    if status == 429:
        return f"{endpoint()} wants fewer requests; wait some minutes and repeat the command to continue"
    if status >= 500:
        return f"{endpoint()} fails with status {status}; run the same command again to continue"
    return f"{endpoint()} refuses {repository} with status {status}{said}; check the name and the revision"


def _known_revisions(repository: str) -> str:
    """The end of a sentence about an unknown revision."""
    try:
        refs = hub_api().list_repo_refs(repository)
    except Exception:  # the sentence is complete without this hint
        return "check its branches and tags"
    names = [ref.name for ref in [*refs.branches, *refs.tags]]
    return f"it has {', '.join(names[:8])}"
