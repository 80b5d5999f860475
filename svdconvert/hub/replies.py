"""What an answer of the Hub must be before anything in it is believed.

A proxy, a captive portal or a broken mirror may answer instead of the Hub, and the Hub itself may ask to wait
for a time that nobody waits. Each of these ends in one sentence.
"""

import re
from logging import getLogger
from typing import Any

from svdconvert.checkpoint.file_names import name_fault
from svdconvert.errors import brief
from svdconvert.hub.auth import endpoint, scrub

LONGEST_PAUSE = 60.0
"""Seconds that a busy Hub is waited for at once."""
BUSY = (429, 500, 502, 503, 504)
"""Statuses after which the same request is repeated."""
_ANNOUNCED = 5.0  # seconds; a shorter pause is not mentioned
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_RESET = re.compile(r"\bt=([0-9]{1,12})")
_DANGEROUS = ("is an absolute path", "leaves the directory", "is no name")
_log = getLogger(__name__)


class WrongReplyError(Exception):
    """An answer that is not the Hub's, or that cannot be used; its text is a sentence for the user."""


def watch_session() -> None:
    """Have every answer that huggingface_hub receives checked by `check_reply`."""
    from huggingface_hub import get_session

    session = get_session()
    hooks = session.event_hooks
    if check_reply not in hooks["response"]:
        session.event_hooks = {**hooks, "response": [*hooks["response"], check_reply]}


def check_reply(response: Any) -> None:
    """Raise WrongReplyError for a web page instead of data, and if the Hub asks for a long wait."""
    if response.status_code in BUSY:
        refuse_long_pause(requested_pause(response))
    is_page = response.headers.get("Content-Type", "").startswith("text/html")
    if response.status_code == 200 and is_page and "/api/" in response.url.path:
        raise WrongReplyError(web_page_sentence())


def web_page_sentence() -> str:
    """For an answer that is a page to be read by people."""
    return (
        f"{endpoint()} answers with a web page instead of data: the network may ask for a login first; open "
        "a page in a browser, or check HF_ENDPOINT and the proxy"
    )


def requested_pause(response: Any) -> float:
    """The seconds that a busy Hub asks to wait; 0 if it does not say."""
    after = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,12}", after):
        return float(after)
    reset = _RESET.search(response.headers.get("RateLimit", "")) if response.status_code == 429 else None
    return float(reset[1]) if reset else 0.0


def refuse_long_pause(seconds: float) -> None:
    """Raise WrongReplyError if the Hub asks for more than LONGEST_PAUSE; mention a wait that is felt."""
    if seconds > LONGEST_PAUSE:
        raise WrongReplyError(
            f"{endpoint()} is busy and asks to wait {seconds:.0f} seconds; run the same command again after "
            "that to continue"
        )
    if seconds >= _ANNOUNCED:
        _log.warning("svdconvert: %s is busy; waiting %.0f seconds as it asks", endpoint(), seconds)


def is_commit(text: object) -> bool:
    """True for the full hash of a commit."""
    return isinstance(text, str) and _COMMIT.fullmatch(text) is not None


def listed_files(info: Any, repository: str) -> dict[str, str | None]:
    """The files of a repository by huggingface_hub's ModelInfo -> SHA-256 of those in LFS, else None.

    Raises WrongReplyError for a name that is no text or leads out of the repository.
    """
    files: dict[str, str | None] = {}
    for file in info.siblings or []:
        name = file.rfilename
        fault = name_fault(name) if isinstance(name, str) else "is no name"
        if fault in _DANGEROUS:
            raise WrongReplyError(
                f"{endpoint()} lists {brief(name)} in {repository}, which {fault}; use another source"
            )
        files[name] = file.lfs.sha256 if file.lfs else None
    return files


def listed_sizes(info: Any) -> dict[str, int]:
    """The sizes in bytes of the files of a repository, as far as ModelInfo has them: for display only."""
    sizes = {file.rfilename: getattr(file, "size", None) for file in info.siblings or []}
    return {name: size for name, size in sizes.items() if type(size) is int and 0 <= size < 1 << 60}


def check_range(response: Any, name: str, begin: int, end: int, size: int | None) -> int:
    """The size of the file, from an answer to a request for its bytes from `begin` to `end`.

    `size` is what earlier answers said. Raises WrongReplyError unless the answer is that range of that file.
    """
    if response.status_code != 206:
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise WrongReplyError(web_page_sentence())
        raise WrongReplyError(f"{endpoint()} does not answer range requests for {name}; leave out --stream")
    stated = response.headers.get("Content-Range", "")
    match = _RANGE.fullmatch(stated.strip())
    total = int(match[3]) if match else 0
    if match is None or (int(match[1]), int(match[2])) != (begin, min(end, total) - 1):
        raise WrongReplyError(
            f"{endpoint()} was asked for the bytes {begin} to {end - 1} of {name} and answers with "
            f"{scrub(stated)[:80] or 'an unknown range'!r}; leave out --stream, or check the proxy"
        )
    if size not in (None, total):
        raise WrongReplyError(
            f"{name} had {size} bytes and has {total} now, according to {endpoint()}; run the same command "
            "again"
        )
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise WrongReplyError(
            f"{endpoint()} sends {name} compressed, which was not asked for; leave out --stream"
        )
    return total


def check_commit(response: Any, name: str, commit: str) -> None:
    """Raise WrongReplyError if an answer, or the redirect to it, is about another commit."""
    for answer in (*response.history, response):
        stated = answer.headers.get("X-Repo-Commit", commit)
        if is_commit(commit) and stated != commit:
            raise WrongReplyError(
                f"{endpoint()} was asked for {name} at {commit} and answers with {scrub(stated)[:40]!r}; run "
                "the same command again, or check HF_ENDPOINT"
            )
