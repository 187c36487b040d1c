"""A model hub on this machine's own address: it serves folders as repositories, and writes down what it is asked."""

from __future__ import annotations

import hashlib
import json
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """``repositories`` are folders by name, those of data as ``datasets/org/name``.

    ``refusals`` are (status, X-Error-Code, message) by name, for their files and for what is pushed to them.
    ``pushed`` are the files of what was pushed by name, ``private`` says of each repository that was made here whether it is.
    """

    repositories: dict[str, Path]
    refusals: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    token: str | None = None  # the one that may push
    pushed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    is_busy: bool = False  # answers 429 to everything
    url: str = ""

    def environment(self, home: Path) -> dict[str, str]:
        """What sends a process's hub library here, with nothing in its cache."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}

    @staticmethod
    def fetched(requests: list[tuple[str, str]]) -> list[str]:
        """The files that were downloaded by these requests, each as often as it was."""
        return sorted(
            path.partition("/resolve/")[2].partition("/")[2]
            for method, path in requests
            if method == "GET" and "/resolve/" in path
        )


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, answering until the end of ``with``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if path == "/api/validate-yaml":
                return self._send_json({"errors": [], "warnings": []})
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._refuse(401, "", "Invalid user token.")
            if path == "/api/repos/create":
                return self._create(json.loads(content))
            name, _, action = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
            if action == "preupload":
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(content)["files"]
                ]
                return self._send_json({"files": files})
            assert action == "commit", path
            lines = [json.loads(line) for line in content.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            hub.pushed.setdefault(name, {}).update({file["path"]: b64decode(file["content"]) for file in files})
            return self._send_json({"commitUrl": f"{hub.url}/{name}/commit/{SHA}", "commitOid": SHA})

        def _create(self, asked: dict) -> None:
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.refusals:
                return self._refuse(*hub.refusals[name])
            if name in hub.private:
                url = json.dumps({"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
                return self._send(409, url.encode(), {"Content-Type": "application/json"})
            hub.private[name] = asked.get("visibility") == "private"
            return self._send_json({"url": f"{hub.url}/{name}"})

        def _send_json(self, content: object) -> None:
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            if hub.is_busy:
                return self._refuse(429, "", "Too many requests")
            if path == "/api/whoami-v2":
                if self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self._refuse(401, "", "Invalid user token.")
                return self._send_json({"type": "user", "name": "me"})
            for name, is_private in hub.private.items():
                if path == f"/api/models/{name}":
                    return self._send_json({"_id": "1", "id": name, "sha": SHA, "private": is_private, "siblings": []})
            for name, folder in hub.repositories.items():
                kind = "" if name.startswith("datasets/") else "models/"
                if path.startswith(f"/api/{kind}{name}"):
                    return self._send(200, json.dumps(_described(name, folder, path)).encode())
                if path.startswith(f"/{name}/resolve/"):
                    return self._send_file(name, folder / path.removeprefix(f"/{name}/resolve/").split("/", 1)[1])
            return self._refuse(404, "RepoNotFound", "Repository not found")

        def _send_file(self, name: str, file: Path) -> None:
            if name in hub.refusals:
                return self._refuse(*hub.refusals[name])
            if not file.is_file():
                return self._refuse(404, "EntryNotFound", "Entry not found")
            content = file.read_bytes()
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self._send(200, content, {"ETag": etag, "X-Repo-Commit": SHA})

        def _refuse(self, status: int, code: str, message: str) -> None:
            self._send(status, b"", {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))

        def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for header, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _described(name: str, folder: Path, path: str) -> object:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if "/tree/" in path:
        return [
            {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size,
             "oid": hashlib.sha1(file.read_bytes()).hexdigest()}
            for file in files
        ]  # fmt: skip
    siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
    return {"_id": "1", "id": name.removeprefix("datasets/"), "sha": SHA, "siblings": siblings}
