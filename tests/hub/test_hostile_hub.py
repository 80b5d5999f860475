"""No answer of a Hub, a proxy or a captive portal is believed without a check, and every wait ends."""

from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from svdconvert.errors import CheckpointError
from svdconvert.hub import remote_source
from svdconvert.hub.remote_source import RemoteFile
from tests.loopback_hub.server import Hub
from tests.visitor import Visitor

FILE = "model.safetensors"
SIZE = 1_500_000


def bytes_of(size: int) -> bytes:
    return bytes(number * 7 % 251 for number in range(251)) * (size // 251 + 1)


@pytest.fixture
def remote(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteFile:
    """A file of the loopback Hub that is read in this process."""
    from huggingface_hub import constants

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / FILE).write_bytes(bytes_of(SIZE)[:SIZE])
    commit = hub.create("org/x", tmp_path / "model").head().oid
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote_source, "_LONGEST_WAIT", 0.001)
    file = RemoteFile("org/x", commit, FILE)
    monkeypatch.setattr(file, "_url", f"{hub.url}/org/x/resolve/{commit}/{FILE}")
    return file


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "another begin": ({"rewrite": {"Content-Range": f"bytes 8-1007/{SIZE}"}}, "asked for the bytes 0 to 999"),
    "another end": ({"rewrite": {"Content-Range": f"bytes 0-1006/{SIZE}"}}, "asked for the bytes 0 to 999"),
    "no size": ({"rewrite": {"Content-Range": "bytes 0-999/*"}}, "answers with 'bytes 0-999/\\*'"),
    "a small size": ({"rewrite": {"Content-Range": "bytes 0-999/7"}}, "asked for the bytes"),
    "a huge size": ({"rewrite": {"Content-Range": f"bytes 0-999/{10**30}"}}, "asked for the bytes"),
    "no range": ({"rewrite": {"Content-Range": ""}}, "an unknown range"),
    "a word": ({"rewrite": {"Content-Range": "pages 1-2/3"}}, "pages 1-2/3"),
    "too much": ({"body": lambda body: body + b"more"}, "sends more of org/x/model.safetensors"),
    "compression": ({"rewrite": {"Content-Encoding": "gzip"}}, "compressed"),
    "another commit": ({"rewrite": {"X-Repo-Commit": "b" * 40}}, "and answers with 'bbbb"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_is_not_the_range_that_was_asked_for_is_refused_at_once(
    hub: Hub, remote: RemoteFile, lie: str
) -> None:
    lies, words = LIES[lie]
    fault = hub.fault("GET", "/file/", **lies, times=99)
    with pytest.raises(CheckpointError, match=words):
        remote.read(0, 1000)
    assert fault.times == 98


def test_a_size_that_changes_between_two_requests_is_refused(hub: Hub, remote: RemoteFile) -> None:
    remote.read(0, 10)
    hub.fault("GET", "/file/", rewrite={"Content-Range": f"bytes 0-9/{SIZE + 1}"})
    with pytest.raises(CheckpointError, match=f"had {SIZE} bytes and has {SIZE + 1} now"):
        remote.read(0, 10)


@pytest.mark.parametrize("body", [lambda body: b"", lambda body: body[:1]])
def test_answers_that_bring_nothing_or_nearly_nothing_end_after_a_bounded_number_of_requests(
    hub: Hub, remote: RemoteFile, body: Callable[[bytes], bytes]
) -> None:
    fault = hub.fault("GET", "/file/", body=body, times=10_000)
    with pytest.raises(CheckpointError, match="breaks again and again at byte"):
        remote.read(0, 100_000)
    assert 6 < 10_000 - fault.times < 70


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_stays_busy_is_given_up(hub: Hub, remote: RemoteFile, status: int) -> None:
    fault = hub.fault("GET", "/file/", status=status, times=10_000)
    with pytest.raises(CheckpointError, match="again and again"):
        remote.read(0, 1000)
    assert fault.times == 10_000 - 7


def test_short_answers_are_continued_and_the_bytes_are_right(hub: Hub, remote: RemoteFile) -> None:
    hub.fault("GET", "/file/", body=lambda body: body[:300_000], times=3)
    hub.fault("GET", "/file/", body=lambda body: b"", times=2)
    assert remote.read(5, SIZE + 99) == bytes_of(SIZE)[5:SIZE]


def test_a_connection_that_drips_is_given_up(
    hub: Hub, remote: RemoteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_source, "_TIMEOUT", 0.0 + 1e-9)
    monkeypatch.setattr(remote_source, "_SLOWEST", 1e15)
    monkeypatch.setattr(remote_source, "_CHUNK", 1000)
    monkeypatch.setattr(remote_source, "_RETRIES_IN_ALL", 3)
    with pytest.raises(CheckpointError, match="again and again"):
        remote.read(0, SIZE)


@pytest.mark.parametrize("seconds", ["61", "1000000", "9" * 12])
def test_a_hub_that_asks_for_a_long_wait_is_not_waited_for(
    hub: Hub, remote: RemoteFile, seconds: str
) -> None:
    hub.fault("GET", "/file/", status=429, headers={"Retry-After": seconds}, times=99)
    begun = monotonic()
    with pytest.raises(CheckpointError, match=f"busy and asks to wait {seconds} seconds; run the same"):
        remote.read(0, 1000)
    assert monotonic() - begun < 5


REFUSED = """
from svdconvert.errors import SvdConvertError
from svdconvert.hub.download import fetch
try:
    result = str(fetch("org/x").path)
except SvdConvertError as error:
    result = str(error)
"""
PAGE = {"Content-Type": "text/html"}
ANSWERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "a long wait": (
        "GET",
        "/api/models/",
        {"status": 429, "headers": {"Retry-After": "1000000"}},
        "asks to wait 1000000 seconds",
    ),
    "a long wait for a file": (
        "HEAD",
        "/resolve/",
        {"status": 503, "headers": {"Retry-After": "1000000"}},
        "asks to wait 1000000 seconds",
    ),
    "a captive portal": (
        "GET",
        "/api/models/",
        {"rewrite": PAGE, "body": lambda body: b"<html>log in</html>"},
        "a web page instead of data",
    ),
    "an empty object": ("GET", "/api/models/", {"body": lambda body: b"{}"}, "check HF_ENDPOINT"),
    "null": ("GET", "/api/models/", {"body": lambda body: b"null"}, "check HF_ENDPOINT"),
    "a list": ("GET", "/api/models/", {"body": lambda body: b"[1]"}, "check HF_ENDPOINT"),
    "no JSON": ("GET", "/api/models/", {"body": lambda body: b"hello"}, "check HF_ENDPOINT"),
    "a commit that is a path": (
        "GET",
        "/api/models/",
        {"body": lambda body: body.replace(b'"sha": "', b'"sha": "../')},
        "names no commit",
    ),
    "a file above the repository": (
        "GET",
        "/api/models/",
        {"body": lambda body: body.replace(b'"config.json"', b'"../../x_init/a.json"')},
        "which leaves the directory",
    ),
    "a mirror without commits": ("HEAD", "/resolve/", {"rewrite": {"X-Repo-Commit": ""}}, "HF_ENDPOINT"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_is_not_the_hubs_is_a_sentence(
    hub: Hub, alice: Visitor, tmp_path: Path, answer: str
) -> None:
    method, path, fault, words = ANSWERS[answer]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    hub.create("org/x", tmp_path / "model")
    hub.fault(method, path, **fault, times=99)
    said = str(alice.runs(REFUSED))
    assert words in said and "\n" not in said
    assert len(hub.seen) < 20


def test_a_revision_that_moves_at_every_request_is_given_up(hub: Hub, alice: Visitor, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    repository = hub.create("org/x", tmp_path / "model")
    hub.fault("GET", "/api/models/", status=200, times=999, then=lambda: repository.fill(tmp_path / "model"))
    assert "org/x changed during each of 2 downloads" in str(alice.runs(REFUSED))
    assert len(hub.seen) < 20
