"""A model hub on 127.0.0.1, for the real client: what it answers is what the real hub answers, as far as pull, show and
their failures go. Point the client at it with HF_ENDPOINT.

    with HubServer() as hub:
        repository = hub.add("org/model", {"config.json": b"{}", "model.safetensors": data})
        hub.fail("resolve", 503)            # from now on, every request whose path contains "resolve" fails
        ... subprocess with env={"HF_ENDPOINT": hub.endpoint}
        assert hub.asked("GET", "model.safetensors")
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".bin", ".pt", ".npz")


@dataclass
class Repository:
    """Commits by hash, and the branches and tags that point to them."""

    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    gated: bool = False
    private: bool = False
    allowed: set[str] = field(default_factory=set)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """A new commit on a branch; its hash, which depends on the content, as git's does."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name, data in sorted(files.items()):
            digest.update(name.encode() + b"\0" + data + b"\0")
        digest.update(str(len(self.commits)).encode())
        commit = digest.hexdigest()
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        return commit

    def tag(self, name: str, commit: str) -> None:
        self.refs[name] = commit
        self.tags.add(name)

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    match: str
    status: int
    headers: Mapping[str, str]
    body: bytes
    times: int | None


class HubServer:
    """The server, and what it was asked. `tokens` are those it knows; others get a 401."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: Mapping[str, bytes], **settings: Any) -> Repository:
        repository = Repository(name, **settings)
        repository.commit(files)
        self.repositories[name] = repository
        return repository

    def fail(
        self,
        match: str,
        status: int,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        times: int | None = None,
    ) -> None:
        """Requests whose "METHOD path" contains `match` get this answer, `times` times or for good."""
        self.faults.append(Fault(match, status, headers or {}, body, times))

    def asked(self, method: str, part: str) -> list[str]:
        """The paths of requests of that method whose path contains `part`."""
        return [path for verb, path, _ in self.requests if verb == method and part in path]


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Silent: `hub.requests` is the log."""

        def do_GET(self) -> None:
            self._serve()

        def do_HEAD(self) -> None:
            self._serve()

        # ------------------------------------------------------------------------------------ routes

        def _serve(self) -> None:
            path = urlsplit(self.path).path
            hub.requests.append((self.command, unquote(path), dict(self.headers.items())))
            for fault in hub.faults:
                if fault.match in f"{self.command} {unquote(path)}" and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return self._send(fault.status, fault.body, fault.headers)
            if match := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree|refs)(?:/([^/]+))?)?", path):
                name, what, revision = match.groups()
                return self._api(unquote(name), what or "revision", unquote(revision or "main"))
            if match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
                return self._resolve(*(unquote(group) for group in match.groups()))
            self._error(404, "", "Not found")

        def _repository(self, name: str) -> Repository | None:
            """The repository, if the one who asks may know of it; otherwise the error has been sent."""
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token and token not in hub.tokens:
                return self._error(401, "", "Invalid credentials in Authorization header")
            found = hub.repositories.get(name)
            if found is None or (found.private and token not in found.allowed):
                # The real hub does not tell those whom it does not know what exists.
                status = 404 if token else 401
                return self._error(status, "RepoNotFound" if token else "", "Invalid username or password.")
            return found

        def _api(self, name: str, what: str, revision: str) -> None:
            repository = self._repository(name)
            if repository is None:
                return
            if what == "refs":
                refs = [
                    {
                        "name": ref,
                        "ref": f"refs/{'tags' if ref in repository.tags else 'heads'}/{ref}",
                        "targetCommit": at,
                    }
                    for ref, at in repository.refs.items()
                ]
                tags = [ref for ref in refs if ref["name"] in repository.tags]
                branches = [ref for ref in refs if ref["name"] not in repository.tags]
                return self._json({"branches": branches, "tags": tags, "converts": []})
            commit = repository.resolve(revision)
            if commit is None:
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            files = repository.commits[commit]
            if what == "tree":
                tree = [{"type": "file", "path": path, **_blob(path, data)} for path, data in files.items()]
                return self._json(tree)
            self._json(
                {
                    "id": name,
                    "modelId": name,
                    "sha": commit,
                    "private": repository.private,
                    "gated": "auto" if repository.gated else False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "siblings": [{"rfilename": path} for path in files],
                }
            )

        def _resolve(self, name: str, revision: str, path: str) -> None:
            repository = self._repository(name)
            if repository is None:
                return
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if repository.gated and token not in repository.allowed:
                said = f"Access to model {name} is restricted."
                return self._error(403 if token else 401, "GatedRepo", said)
            commit = repository.resolve(revision)
            if commit is None:
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            data = repository.commits[commit].get(path)
            headers = {"X-Repo-Commit": commit}
            if data is None:
                return self._error(404, "EntryNotFound", "Entry not found", headers)
            headers |= {"ETag": f'"{_etag(path, data)}"', "Accept-Ranges": "bytes"}
            if path.endswith(LFS):
                headers |= {"X-Linked-Etag": f'"{_etag(path, data)}"', "X-Linked-Size": str(len(data))}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if wanted is None:
                return self._send(200, data, headers)
            start, stop = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            if start > stop:
                return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
            self._send(206, data[start : stop + 1], headers)

        # ------------------------------------------------------------------------------------ answers

        def _json(self, thing: object) -> None:
            self._send(200, json.dumps(thing).encode(), {"Content-Type": "application/json"})

        def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
            named = {"X-Error-Message": message, **(headers or {})}
            if code:
                named["X-Error-Code"] = code
            body = json.dumps({"error": message}).encode()
            self._send(status, body, {"Content-Type": "application/json", **named})

        def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _etag(path: str, data: bytes) -> str:
    """As the hub names blobs: large files by sha256, others as git does."""
    if path.endswith(LFS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _blob(path: str, data: bytes) -> dict[str, Any]:
    blob: dict[str, Any] = {"oid": hashlib.sha1(data, usedforsecurity=False).hexdigest(), "size": len(data)}
    if path.endswith(LFS):
        blob["lfs"] = {"oid": _etag(path, data), "size": len(data), "pointerSize": 134}
    return blob
