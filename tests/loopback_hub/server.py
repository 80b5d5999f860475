"""A Hub on loopback: the part of the real one's HTTP protocol that huggingface_hub speaks for models.

Faults can be ordered for requests to come, and every request is noted. Large files lie, as on the real
Hub, on another host than the API (localhost instead of 127.0.0.1), at links that carry no token.
Run as a program (`python -m tests.loopback_hub.server PORT DIRECTORY`) it serves until it is stopped;
its users are alice (token hf_alice) and bob (hf_bob).
"""

import json
import re
import sys
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs

from tests.loopback_hub.connection import Connection, Fault, Refused, Seen, route
from tests.loopback_hub.repository import LARGE, MAIN, Absent, File, Repository, StaleParent, Store

NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ANY = r"(?P<name>(?:datasets/)?[\w.-]+/[\w.-]+)"
"""A model or, with its prefix as its name here, a data set."""
OF_ANY = rf"/api/(?:models/|(?=datasets/)){ANY}"


class Hub:
    """The server: repositories, users and what was asked of them."""

    def __init__(self, directory: Path, port: int = 0) -> None:
        self.store = Store(directory)
        self.repositories: dict[str, Repository] = {}
        self.moved: dict[str, str] = {}
        """Legacy names without an organisation -> the name that requests are redirected to."""
        self.users = {"hf_alice": "alice", "hf_bob": "bob", "hf_reader": "alice"}
        self.readers = {"hf_reader"}
        self.part_size: int | None = None
        """Uploads above this many bytes come in parts."""
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.leaks: list[str] = []
        """Requests that hold their token elsewhere than in its header."""
        self.lock = Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.files_url = f"http://localhost:{self.port}"

    def __enter__(self) -> "Hub":
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve(self) -> None:
        self._server.serve_forever()

    def create(self, name: str, directory: Path | None = None, **kind: bool) -> Repository:
        """A repository, filled from a local directory."""
        self.repositories[name] = Repository(name, self.store, **kind)
        if directory is not None:
            self.repositories[name].fill(directory)
        return self.repositories[name]

    def fault(self, method: str, path: str, **what: Any) -> Fault:
        """Order a fault."""
        self.faults.append(Fault(method, path, **what))
        return self.faults[-1]

    def due(self, method: str, path: str) -> Fault | None:
        """The fault of this request, used up."""
        with self.lock:
            for fault in self.faults:
                if fault.fits(method, path) and fault.times:
                    if fault.after:
                        fault.after -= 1
                        return None
                    fault.times -= 1
                    return fault
        return None

    def asked(self, method: str, path: str) -> list[Seen]:
        """The requests so far whose path matches a regular expression."""
        return [seen for seen in self.seen if seen.method == method and re.search(path, seen.path)]


class Handler(Connection):
    """Answers in the words of the Hub."""

    def _user(self) -> str | None:
        """The user of the request's token, or None without one. An unknown token counts as expired."""
        token = self._token()
        if token is not None and token not in self.hub.users:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.users.get(token or "")

    def _repository(self, name: str, *, writing: bool = False) -> Repository:
        user, found = self._user(), self.hub.repositories.get(name)
        if found is None or (found.private and user != name.split("/")[0]):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if writing and (user != name.split("/")[0] or self._token() in self.hub.readers):
            raise Refused(403 if user else 401, "", "You don't have the required permissions")
        return found

    # ----- accounts and repositories

    @route("GET", "/api/whoami-v2")
    def who(self) -> None:
        if (user := self._user()) is None:
            raise Refused(401, "", "Invalid username or password.")
        role = "read" if self._token() in self.hub.readers else "write"
        self._json({"name": user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}})

    @route("POST", "/api/validate-yaml")
    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        wanted, user = json.loads(self.body), self._user()
        owner = wanted.get("organization") or user
        name = f"{owner}/{wanted['name']}"
        if user is None or owner != user or self._token() in self.hub.readers:
            raise Refused(403 if user else 401, "", f"You don't have the rights to create {name}")
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            return self._json(url | {"error": "You already created this model repo"}, 409)
        self.hub.create(name, private=wanted.get("visibility") == "private")
        self._json(url)

    @route("GET", rf"{OF_ANY}(/revision/(?P<revision>.+))?")
    def info(self, name: str, revision: str | None) -> None:
        found = self._repository(name)
        commit = found.head(revision or MAIN)
        siblings = [{"rfilename": path, **_sizes(file)} for path, file in sorted(commit.files.items())]
        self._json({"id": name, "sha": commit.oid, "private": found.private, "siblings": siblings})

    @route("GET", r"/api/models/(?P<name>[\w.-]+)")
    def legacy(self, name: str) -> None:
        if name not in self.hub.moved:
            raise Refused(404, "RepoNotFound", "Repository not found")
        self._send(307, b"{}", {"Location": f"/api/models/{self.hub.moved[name]}"})

    @route("GET", rf"{OF_ANY}/tree/(?P<revision>[^/]+|refs/pr/\d+)")
    def tree(self, name: str, revision: str) -> None:
        files = self._repository(name).head(revision).files
        self._json([_entry(path, file) for path, file in sorted(files.items())])

    @route("POST", rf"{OF_ANY}/paths-info/(?P<revision>.+)")
    def paths(self, name: str, revision: str) -> None:
        wanted = parse_qs(self.body.decode())["paths"]
        files = self._repository(name).head(revision).files
        self._json([_entry(path, files[path]) for path in wanted if path in files])

    @route("GET", rf"{OF_ANY}/refs")
    def refs(self, name: str) -> None:
        found = self._repository(name)
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid}
            for ref, oid in found.refs.items()
            if not ref.startswith("refs/")
        ]
        self._json({"branches": branches, "converts": [], "tags": []})

    @route("POST", rf"/api/models/{NAME}/branch/(?P<branch>.+)")
    def branch(self, name: str, branch: str) -> None:
        found = self._repository(name, writing=True)
        if branch in found.refs:
            raise Refused(409, "", "Reference already exists")
        found.refs[branch] = found.head(json.loads(self.body).get("startingPoint") or MAIN).oid
        self._json({})

    @route("DELETE", rf"/api/models/{NAME}/branch/(?P<branch>.+)")
    def unbranch(self, name: str, branch: str) -> None:
        if self._repository(name, writing=True).refs.pop(branch, None) is None:
            raise Absent("RevisionNotFound")
        self._json({})

    # ----- commits and uploads

    @route("POST", rf"/api/models/{NAME}/preupload/(?P<revision>.+)")
    def preupload(self, name: str, revision: str) -> None:
        files = self._repository(name, writing=not self.query.get("create_pr")).head(revision).files
        answers = [
            {
                "path": (path := wanted["path"]),
                "uploadMode": "lfs" if path.endswith(LARGE) or wanted["size"] > 10_000_000 else "regular",
                "shouldIgnore": False,
                **({"oid": files[path].etag()} if path in files else {}),
            }
            for wanted in json.loads(self.body)["files"]
        ]
        self._json({"files": answers})

    @route("POST", rf"/{NAME}\.git/info/lfs/objects/batch")
    def batch(self, name: str) -> None:
        self._repository(name)
        self._json({"objects": [self._upload(wanted) for wanted in json.loads(self.body)["objects"]]})

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size, part = wanted["oid"], wanted["size"], self.hub.part_size
        if self.hub.store.has(oid):
            return {"oid": oid, "size": size}
        upload: dict[str, Any] = {"href": f"{self.hub.files_url}/upload/{oid}"}
        if part is not None and size > part:
            numbers = range(1, -(-size // part) + 1)
            links = {str(n): f"{self.hub.files_url}/part/{oid}/{n}" for n in numbers}
            upload = {
                "href": f"{self.hub.url}/complete/{oid}",
                "header": {"chunk_size": str(part), **links},
            }
        verify = {"href": f"{self.hub.url}/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    @route("PUT", r"/upload/(?P<oid>\w+)")
    def upload(self, oid: str) -> None:
        if self.fault is not None and self.fault.cut is not None:
            self.rfile.read(self.fault.cut)
            self.close_connection = True
            return
        if self.hub.store.put(self.rfile, self.received, oid) is None:
            raise Refused(400, "", "the content is not what its name says")
        self._json({})

    @route("PUT", r"/part/(?P<oid>\w+)/(?P<number>\d+)")
    def part(self, oid: str, number: str) -> None:
        path = self.hub.store.path(f"{oid}-{int(number):05}")
        path.write_bytes(self.rfile.read(self.received))
        self._send(200, b"", {"ETag": f'"{number}"'})

    @route("POST", r"/complete/(?P<oid>\w+)")
    def complete(self, oid: str) -> None:
        parts = sorted(self.hub.store.directory.glob(f"{oid}-*"))
        wanted = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        if wanted != [*range(1, len(parts) + 1)] or not self.hub.store.join(parts, oid):
            raise Refused(400, "", "the parts do not make up the file")
        self._json({})

    @route("POST", "/verify")
    def verify(self) -> None:
        if not self.hub.store.has(json.loads(self.body)["oid"]):
            raise Absent("EntryNotFound")
        self._json({})

    @route("POST", rf"/api/models/{NAME}/commit/(?P<revision>.+)")
    def commit(self, name: str, revision: str) -> None:
        pull = bool(self.query.get("create_pr"))
        found = self._repository(name, writing=not pull)
        lines = [json.loads(line) for line in self.body.splitlines()]
        try:
            with self.hub.lock:
                made, number = found.commit(revision, lines, pull=pull)
        except StaleParent:
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.") from None
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}", "commitOid": made.oid}
        if number is not None:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        if self.fault is not None and self.fault.cut is not None:
            self.close_connection = True  # the commit is made, but the answer is lost
            return
        self._json(answer)

    # ----- downloads

    @route("GET", rf"/{ANY}/resolve/(?P<revision>[^/]+|refs/pr/\d+)/(?P<path>.+)")
    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self._repository(name)
        if found.gated and self._user() != name.split("/")[0]:
            raise Refused(403 if self._user() else 401, "GatedRepo", "Access to this model is restricted")
        commit, file = found.head(revision), found.file(revision, path)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag()}"', "Accept-Ranges": "bytes"}
        if not file.large:
            return self._bytes(file.sha256, headers)
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        self._send(302, b"", headers | {"Location": f"{self.hub.files_url}/file/{file.sha256}"})

    @route("GET", r"/file/(?P<sha256>\w+)")
    def file(self, sha256: str) -> None:
        self._bytes(sha256, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})


def _sizes(file: File) -> dict[str, Any]:
    lfs = {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": 134}} if file.large else {}
    return {"size": file.size, "blobId": file.oid, **lfs}


def _entry(path: str, file: File) -> dict[str, Any]:
    lfs = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.large else {}
    return {"type": "file", "path": path, "size": file.size, "oid": file.oid, **lfs}


if __name__ == "__main__":
    Hub(Path(sys.argv[2]), int(sys.argv[1])).serve()
