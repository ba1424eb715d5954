"""A stand-in for the Hugging Face hub: the part of its HTTP interface that an upload uses."""

import base64
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

TOKEN = "hf_standInTokenThatMayWrite00001"
OWNER = "me"


@dataclass
class Repo:
    """A repository: whether it is private, its files, and the messages of its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    commits: list[str] = field(default_factory=list[str])


class Hub(ThreadingHTTPServer):
    """
    Repositories by ORG/NAME. TOKEN may write to those of OWNER.

    Args:
        fails_at: Part of a path at which it answers 500.
    """

    daemon_threads = True
    fails_at: str | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Generator[Hub, None, None]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        if self._is_refused():
            return
        if self.path == "/api/whoami-v2":
            self._give({"name": OWNER, "type": "user"})
        elif self.path.startswith("/api/models/"):
            self._give_info("/".join(self.path.split("/")[3:5]))
        elif "/resolve/" in self.path:
            self._give_file()
        else:  # what the client asks for besides
            self._refuse(404, "Not found")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self._body()
        if self._is_refused(writes=True):
            return
        if self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self._give({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs"
                    if one["path"].endswith(".safetensors")
                    else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            self._give({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **one,
                    "actions": {
                        "upload": {"href": f"{self.server.address}/lfs/{one['oid']}"}
                    },
                }
                for one in json.loads(body)["objects"]
            ]
            self._give({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self._commit("/".join(self.path.split("/")[3:5]), body)

    def do_PUT(self) -> None:
        content = self._body()
        assert self.path.endswith(sha256(content).hexdigest())
        self.server.large[self.path.rpartition("/")[2]] = content
        self._give({})

    def _is_refused(self, writes: bool = False) -> bool:
        self.server.asked.append(f"{self.command} {self.path}")
        given = self.headers.get("Authorization")
        if self.server.fails_at is not None and self.server.fails_at in self.path:
            self._refuse(500, "out of order")
        elif given is not None and given != f"Bearer {TOKEN}":
            self._refuse(401, "Invalid credentials in Authorization header")
        elif (writes or self.path == "/api/whoami-v2") and given is None:
            self._refuse(401, "Invalid username or password.")
        else:
            return False
        return True

    def _give_info(self, name: str) -> None:
        repo = self.server.repos.get(name)
        if repo is None:
            self._refuse(404, "Repository not found", "RepoNotFound")
            return
        self._give(
            {
                "id": name,
                "private": repo.private,
                "siblings": [{"rfilename": path} for path in repo.files],
            }
        )

    def _create(self, wanted: dict[str, Any]) -> None:
        owner = wanted.get("organization") or OWNER
        name = f"{owner}/{wanted['name']}"
        if owner != OWNER:
            self._refuse(403, "You don't have the rights to create a model")
        else:
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.server.repos[name] = Repo(bool(private), {".gitattributes": b""})
            self._give({"url": f"{self.server.address}/{name}", "id": name})

    def _commit(self, name: str, body: bytes) -> None:
        repo = self.server.repos[name]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repo.commits.append(value["summary"])
            elif entry["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repo.files[value["path"]] = self.server.large[value["oid"]]
        oid = sha256(body).hexdigest()[:40]
        self._give(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.server.address}/{name}/commit/{oid}",
            }
        )

    def _give_file(self) -> None:
        owner, name, _, _, *path = unquote(self.path.lstrip("/")).split("/")
        repo = self.server.repos.get(f"{owner}/{name}")
        content = None if repo is None else repo.files.get("/".join(path))
        if content is None:
            self._refuse(404, "Entry not found", "EntryNotFound")
            return
        headers = {
            "ETag": f'"{sha256(content).hexdigest()}"',
            "X-Repo-Commit": "0" * 40,
            "Content-Type": "application/octet-stream",
        }
        self._answer(200, content, headers)

    def _give(self, value: Any) -> None:
        headers = {"Content-Type": "application/json"}
        self._answer(200, json.dumps(value).encode(), headers)

    def _refuse(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message}
        if code is not None:
            headers["X-Error-Code"] = code
        self._answer(status, b"", headers)

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts: list[bytes] = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))
