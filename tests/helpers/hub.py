"""A Hugging Face Hub on this machine: the few addresses of it that huggingface_hub asks for models, over HTTP."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writerwriterwriterwriterwriterwriter", "hf_readerreaderreaderreaderreaderreader"
"""Tokens that it knows."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """Attributes:
    files: on every branch, by path.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    branches: list[str] = field(default_factory=lambda: ["main"])
    is_private: bool = False
    is_gated: bool = False
    pushed_to: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """Attributes:
    repositories: by id.
    requests: method and path of each, in their order.
    refuses_commits: with status 500.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuses_commits: bool = False

    def add(self, name: str, directory: Path, **about: Any) -> Repository:
        """A repository with the files of a directory."""
        files = {
            path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
        }
        self.repositories[name] = Repository(files, **about)
        return self.repositories[name]


@contextlib.contextmanager
def local_hub() -> Iterator[Hub]:
    """The Hub while it runs; `endpoint` is what HF_ENDPOINT has to say."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *unused: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self._begin()
        if path == "/api/whoami-v2":
            role = {f"Bearer {WRITER}": "write", f"Bearer {READER}": "read"}.get(self.headers.get("Authorization", ""))
            known = {"name": "somebody", "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}}
            self._answer(401, {"error": "Invalid credentials"}) if role is None else self._answer(200, known)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
            self._about(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^?]+", path):
            files = self.hub.repositories[found[1]].files
            tree = [{"type": "file", "path": name, "size": len(text), "oid": _oid(text)} for name, text in files.items()]
            self._answer(200, tree)
        else:
            self._file(path)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = self._begin(), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {WRITER}" and path != "/api/validate-yaml":
            self._answer(401, {"error": "Invalid credentials"})
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'somebody'}/{wanted['name']}"
            is_private = bool(wanted.get("private") or wanted.get("visibility") == "private")
            status = 409 if name in self.hub.repositories else 200
            self.hub.repositories.setdefault(name, Repository(is_private=is_private))
            self._answer(status, {"url": f"{self.hub.endpoint}/{name}", "id": name, "name": name})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            self.hub.repositories[found[1]].branches.append(found[2])
            self._answer(200, {})
        elif re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            self._commit(found[1], found[2], body)
        else:
            self._answer(404, {"error": path})

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        if self.hub.refuses_commits:
            self._answer(500, {"error": "the disk is on fire"})
            return
        repository = self.hub.repositories[name]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del repository.files[line["value"]["path"]]
        repository.pushed_to.append(branch)
        url = f"{self.hub.endpoint}/{name}/commit/{COMMIT}"
        self._answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def _about(self, name: str, revision: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif repository.is_gated:
            self._answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        elif revision not in (*repository.branches, COMMIT):
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [{"rfilename": file} for file in repository.files]
            self._answer(
                200,
                {
                    "id": name,
                    "sha": COMMIT,
                    "siblings": siblings,
                    "private": repository.is_private,
                    "tags": [],
                    "downloads": 0,
                },
            )

    def _file(self, path: str) -> None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        text = self.hub.repositories[found[1]].files.get(found[2]) if found else None
        if text is None:
            self._answer(404, {"error": path}, {"X-Error-Code": "EntryNotFound"})
        else:
            self._answer(200, text, {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(text)}"'})

    def _begin(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(text: bytes) -> str:
    return hashlib.sha1(text).hexdigest()
