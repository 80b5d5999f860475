"""One connection to the loopback Hub: which method answers, which faults are injected, what is recorded."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.loopback_hub.repository import Absent

ROUTES: list[tuple[str, re.Pattern[str], str]] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Have a method of the handler answer requests whose path matches."""

    def note(answer: Callable[..., None]) -> Callable[..., None]:
        ROUTES.append((method, re.compile(pattern), answer.__name__))
        return answer

    return note


ANY = "*"
"""The method of a fault that is for requests with every method."""


@dataclass
class Fault:
    """A fault that is injected into the next requests of a kind."""

    method: str
    """The method of the request, or ANY."""
    path: str
    """A regular expression."""
    status: int = 503
    times: int = 1
    after: int = 0
    """How many requests are answered normally before."""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    """Answer, but close the connection after this many bytes."""
    flip: bool = False
    """Answer, but with one byte changed."""
    echo: bool = False
    """Refuse with the Authorization header in the message."""
    rewrite: dict[str, str] = field(default_factory=dict)
    """Answer, but with these headers; an empty value leaves a header out."""
    body: Callable[[bytes], bytes] | None = None
    """Answer, but with another body, of which the headers state the length."""
    then: Callable[[], object] | None = None
    """Called first: what happens elsewhere at this moment."""

    @property
    def answers(self) -> bool:
        """True if the request is answered as always, apart from the fault."""
        return self.cut is not None or self.flip or bool(self.rewrite) or self.body is not None

    def fits(self, method: str, path: str) -> bool:
        return self.method in (method, ANY) and re.search(self.path, path) is not None


@dataclass(frozen=True)
class Seen:
    """A request that was answered."""

    method: str
    path: str
    token: str | None
    status: int
    received: int
    sent: int
    host: str


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class Connection(BaseHTTPRequestHandler):
    """Answers one connection."""

    hub: Any
    protocol_version = "HTTP/1.1"
    fault: Fault | None
    body: bytes

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        address = urlsplit(self.path)
        self.query, path = parse_qs(address.query), unquote(address.path)
        self.body = b""
        self.received, self.sent, self.status = int(self.headers.get("Content-Length") or 0), 0, 0
        self.fault = self.hub.due(self.command, path)
        if self.fault is not None and self.fault.then is not None:
            self.fault.then()
        method = "GET" if self.command == "HEAD" else self.command
        try:
            if self.fault is not None and not self.fault.answers:
                self._inject(self.fault)
            self.body = b"" if method == "PUT" else self.rfile.read(self.received)
            for kind, pattern, name in ROUTES:
                if kind == method and (match := pattern.fullmatch(path)):
                    getattr(self, name)(**match.groupdict())
                    break
            else:
                raise Refused(404, "EntryNotFound", f"no route for {method} {path}")
        except Refused as refusal:
            self._refuse(refusal)
        except Absent as absent:
            self._refuse(Refused(404, str(absent)))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        self._note(path)

    def _note(self, path: str) -> None:
        token = self._token()
        others = [value for name, value in self.headers.items() if name.lower() != "authorization"]
        if token is not None and (token in " ".join([self.path, *others]) or token.encode() in self.body):
            self.hub.leaks.append(self.path)
        host = (self.headers.get("Host") or "").split(":")[0]
        seen = Seen(self.command, path, token, self.status, self.received, self.sent, host)
        self.hub.seen.append(seen)

    def _inject(self, fault: Fault) -> None:
        if fault.status == 200:
            return
        self.rfile.read(self.received)
        said = self.headers.get("Authorization") or "" if fault.echo else ""
        raise Refused(fault.status, "", said and f"cannot serve {said}")

    def _refuse(self, refusal: Refused) -> None:
        headers = {"X-Error-Code": refusal.code} if refusal.code else {}
        headers |= {"X-Error-Message": refusal.message} if refusal.message else {}
        headers |= self.fault.headers if self.fault else {}
        self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.status = status
        body = self._altered(body)
        self._head(status, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)
            self.sent = len(body)

    def _altered(self, body: bytes) -> bytes:
        return self.fault.body(body) if self.fault is not None and self.fault.body is not None else body

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        altered = self.fault.rewrite if self.fault is not None else {}
        for name, value in {**headers, **altered}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _bytes(self, sha256: str, headers: dict[str, str]) -> None:
        size = self.hub.store.path(sha256).stat().st_size
        begin, end, self.status = 0, size, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end, self.status = int(match[1]), min(int(match[2] or size) + 1, size), 206
            if begin >= size:
                raise Refused(416)
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        if self.fault is not None and self.fault.body is not None and self.command != "HEAD":
            with self.hub.store.path(sha256).open("rb") as stream:
                stream.seek(begin)
                return self._send(self.status, stream.read(end - begin), headers)
        self._head(self.status, {**headers, "Content-Length": str(end - begin)})
        if self.command != "HEAD":
            self._write_bytes(sha256, begin, end - begin)

    def _write_bytes(self, sha256: str, begin: int, left: int) -> None:
        """Write `left` bytes from `begin`, as far as the fault allows."""
        fault = self.fault
        if fault is not None and fault.cut is not None and fault.cut < left:
            left, self.close_connection = fault.cut, True
        with self.hub.store.path(sha256).open("rb") as stream:
            stream.seek(begin)
            while left and (chunk := stream.read(min(left, 1 << 20))):
                if fault is not None and fault.flip:
                    chunk, fault = bytes([*chunk[:-1], chunk[-1] ^ 1]), None
                self.wfile.write(chunk)
                left, self.sent = left - len(chunk), self.sent + len(chunk)
