"""A local hub: an HTTP server with the parts of the hub's protocol that the tests need.

    with serve_hub() as hub:
        hub.add("someone/model", folder)
        environment = hub.environment(tmp_path)  # for a process that uses this hub

It has repositories of models with one branch. Every commit replaces the one before. It serves
whole files, or files from a byte on. Uploads come in the commit itself, or before it through the
LFS batch API.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_of_the_tests"


class Hub(ThreadingHTTPServer):
    """The repositories of the hub, and the requests to it.

    ``drop`` is the name of a file whose first download ends in the middle. ``requests`` has
    (method, path, first requested byte).
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []  # the number of commits
        self.blobs: dict[str, bytes] = {}  # files uploaded through LFS, by sha256
        self.requests: list[tuple[str, str, int]] = []
        self.drop: str | None = None

    def add(self, name: str, folder: Path) -> None:
        """Adds a repository with a folder's files, without its subfolders."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.repositories[name] = files

    def environment(self, home: Path) -> dict[str, str]:
        """Returns the environment variables with which a process uses this hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # this would be another protocol to another server
            "no_proxy": "127.0.0.1",
        }

    def commit_hash(self, name: str) -> str:
        """Returns a repository's commit, which changes with its files."""
        files = sorted(self.repositories[name].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._file(send=False)

    def do_GET(self) -> None:
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", self._path()):
            self._note()
            self._info(found[1])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(/.+)?", self._path()):
            self._note()
            if found[2] is None:
                self._tree(found[1])
            else:  # there are no folders
                self._error("EntryNotFound", {})
        else:
            self._file(send=True)

    def do_POST(self) -> None:
        self._note()
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "Invalid credentials"}, 401)
        elif self._path() == "/api/repos/create":
            repository = json.loads(content)
            name = f"{repository['organization']}/{repository['name']}"
            self.server.repositories.setdefault(name, {})
            self._json({"url": f"{self.server.url}/{name}"})
        elif self._path() == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/.+/preupload/main", self._path()):
            self._json({"files": [_upload_mode(file) for file in json.loads(content)["files"]]})
        elif self._path().endswith(".git/info/lfs/objects/batch"):
            self._json({"transfer": "basic", "objects": self._uploads(json.loads(content))})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", self._path()):
            self._commit(found[1], [json.loads(line) for line in content.splitlines()])
        else:
            self._json({"error": "Not found"}, 404)

    def do_PUT(self) -> None:
        self._note()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self._json({})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile", line
                files[value["path"]] = self.server.blobs[value["oid"]]
        commit = self.server.commit_hash(name)
        url = f"{self.server.url}/{name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "success": True})

    def _uploads(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {**blob, "actions": {"upload": {"href": f"{self.server.url}/lfs/{blob['oid']}"}}}
            for blob in batch["objects"]
        ]

    def _info(self, name: str) -> None:
        if name not in self.server.repositories:
            self._error("RepoNotFound", {})
            return
        siblings = [{"rfilename": path} for path in self.server.repositories[name]]
        commit = self.server.commit_hash(name)
        self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []})

    def _tree(self, name: str) -> None:
        files = self.server.repositories.get(name, {})
        self._json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
                for path, content in files.items()
            ]
        )

    def _file(self, send: bool) -> None:
        begin = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(begin[1]) if begin else 0
        self._note(start)
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(?:main|[0-9a-f]{40})/(.+)", self._path())
        if found is None or found[1] not in self.server.repositories:
            self._error("RepoNotFound", {})
            return
        name, path = found[1], found[2]
        headers = {"X-Repo-Commit": self.server.commit_hash(name)}
        content = self.server.repositories[name].get(path)
        if content is None:
            self._error("EntryNotFound", headers)
            return
        self.send_response(206 if begin else 200)
        headers |= {"ETag": f'"{_git_hash(content)}"', "Accept-Ranges": "bytes"}
        headers["Content-Length"] = str(len(content) - start)
        if begin:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if not send:
            return
        # announces the whole file, sends half, and closes the connection
        if path == self.server.drop:
            self.server.drop = None
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content[start:])

    def _error(self, code: str, headers: dict[str, str]) -> None:
        self.send_response(404)
        for key, value in {**headers, "X-Error-Code": code, "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()

    def _json(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _path(self) -> str:
        return self.path.split("?")[0]

    def _note(self, start: int = 0) -> None:
        self.server.requests.append((self.command, self._path(), start))

    def log_message(self, *arguments: Any) -> None:
        pass


def _upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    """Returns the way to upload a file: LFS for weights and other binaries, the commit for text."""
    binary = file["path"].endswith((".safetensors", ".bin"))
    mode = "lfs" if binary else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Runs a hub in a thread."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
