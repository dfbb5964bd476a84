"""A hub on the loopback interface that answers as the real one does, as far as fetching goes.

Large files are redirected to another path, as the hub does to its store, and can be read from a byte on. Repositories
can be gated, a branch can move, and a connection can be cut in the middle of a file.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

TOKEN = secrets.token_hex(16)
"""Of the one user. It is nowhere in the sources, of which runs keep a copy."""
_LARGE = 100_000
"""Bytes from which a file is in the store."""


@dataclass
class Repo:
    """A repository: its commits, and where its branches are."""

    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def push(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Make a commit of these files, move the branch to it, and return its hash."""
        parts = [branch, *(f"{name} {hashlib.sha1(data).hexdigest()}" for name, data in sorted(files.items()))]
        commit = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit


@dataclass
class HubServer:
    """What the hub holds and what it was asked."""

    url: str = ""
    repos: dict[tuple[Literal["models", "datasets"], str], Repo] = field(default_factory=dict)
    cut_after: dict[str, int] = field(default_factory=dict)
    """File -> bytes after which its next transfer is cut."""
    requests: list[str] = field(default_factory=list)
    """Method and path of each, and the range that was asked for."""
    status: int | None = None
    """Answer everything with this status."""

    def model(self, name: str, files: Mapping[str, bytes], *, gated: bool = False) -> str:
        """Push to a model and return the commit."""
        return self._repo("models", name, gated).push(files)

    def data_set(self, name: str, files: Mapping[str, bytes], *, branch: str = "main") -> str:
        """Push to a data set and return the commit."""
        return self._repo("datasets", name, False).push(files, branch)

    def fetched(self) -> list[str]:
        """Return the names of the files that were read, in order."""
        paths = [line.split(" ")[1] for line in self.requests if line.startswith("GET ")]
        large = [path for path in paths if path.startswith("/store/")]
        small = [path for path in paths if "/resolve/" in path and path.rpartition("/")[2] not in map(_last, large)]
        return [_last(path) for path in (*small, *large)]

    def _repo(self, kind: Literal["models", "datasets"], name: str, gated: bool) -> Repo:
        repo = self.repos.setdefault((kind, name), Repo())
        repo.gated = gated
        return repo


@contextmanager
def serve() -> Iterator[HubServer]:
    """Run a hub until the block ends."""
    hub = HubServer()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        asked = self.headers.get("Range")
        self.state.requests.append(f"{self.command} {path}{f' {asked}' if asked else ''}")
        parts = [unquote(part) for part in path.split("/")[1:]]
        if self.state.status is not None:
            self._send(self.state.status, b"", {})
        elif parts[0] == "api":
            self._api("datasets" if parts[1] == "datasets" else "models", "/".join(parts[2:4]), parts[4], parts[5])
        elif parts[0] == "store":
            self._store(parts)
        else:
            kind: Literal["models", "datasets"] = "datasets" if parts[0] == "datasets" else "models"
            rest = parts[1:] if kind == "datasets" else parts
            self._resolve(kind, "/".join(rest[:2]), rest[3], "/".join(rest[4:]))

    def _repo(self, kind: Literal["models", "datasets"], name: str) -> Repo | None:
        """Return a repository that this user may see, or answer and return None."""
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        repo = self.state.repos.get((kind, name))
        if repo is None and authorized:
            self._send(404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif repo is None:
            self._send(
                401, b'{"error":"Invalid username or password."}', {"X-Error-Message": "Invalid username or password."}
            )
        elif repo.gated and not authorized:
            self._send(401, b'{"error":"gated"}', {"X-Error-Code": "GatedRepo"})
        else:
            return repo
        return None

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = revision if revision in repo.commits else repo.branches.get(revision)
        if commit is None:
            self._send(404, b'{"error":"Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        return commit

    def _api(self, kind: Literal["models", "datasets"], name: str, what: str, revision: str) -> None:
        repo = self._repo(kind, name)
        commit = self._commit(repo, revision) if repo is not None else None
        if repo is None or commit is None:
            return
        files = repo.commits[commit]
        if what == "tree":
            entries = [_entry(file, data) for file, data in files.items()]
            self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            return
        siblings = [{"rfilename": file, "size": len(data), "blobId": _oid(data)} for file, data in files.items()]
        info = {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": [], "gated": repo.gated}
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _resolve(self, kind: Literal["models", "datasets"], name: str, revision: str, file: str) -> None:
        repo = self._repo(kind, name)
        commit = self._commit(repo, revision) if repo is not None else None
        if repo is None or commit is None:
            return
        data = repo.commits[commit].get(file)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        if len(data) < _LARGE:
            self._file(file, data, commit)
            return
        place = f"{self.state.url}/store/{kind}/{name}/{commit}/{file}"
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{_oid(data)}"', "X-Linked-Size": str(len(data))}
        self._send(302, b"", {**headers, "Location": place})

    def _store(self, parts: list[str]) -> None:
        kind: Literal["models", "datasets"] = "datasets" if parts[1] == "datasets" else "models"
        file = "/".join(parts[5:])
        self._file(file, self.state.repos[kind, "/".join(parts[2:4])].commits[parts[4]][file], parts[4])

    def _file(self, file: str, data: bytes, commit: str) -> None:
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        cut = self.state.cut_after.pop(file, None) if self.command == "GET" else None
        self._send(206 if begin else 200, data[begin:], headers, cut)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _entry(file: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": file, "size": len(data), "oid": _oid(data)[:40]}
    if len(data) >= _LARGE:
        entry["lfs"] = {"oid": _oid(data), "size": len(data), "pointerSize": 134}
    return entry
