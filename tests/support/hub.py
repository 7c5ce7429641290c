"""A hub of a few lines over real HTTP: one repository at one commit, and a second host for its
large files, as the real one redirects to.

It speaks what `huggingface_hub` asks for: `/api/models/<name>/revision/<commit>?blobs=true` and
`/<name>/resolve/<commit>/<file>`, errors by `X-Error-Code`. Faults are set by attributes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

NAME, COMMIT = "acme/tiny", "0123456789abcdef0123456789abcdef01234567"
REFERENCE = f"hf://{NAME}@{COMMIT}"
_CHUNK = 1 << 14


@dataclass
class FakeHub:
    """What it holds, what is wrong with it, and what it was asked."""

    files: dict[str, bytes]
    token: str | None = None  # without it the repository is gated
    sent: dict[str, bytes] = field(default_factory=dict)  # other bytes than it lists
    cut_after: dict[str, list[int]] = field(default_factory=dict)  # connections that break
    held: dict[str, threading.Event] = field(default_factory=dict)  # waits there after a chunk
    status: int | None = None  # answers everything with this
    ranges: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # (file, Range)
    authorizations: set[str | None] = field(default_factory=set)
    leaked: list[str] = field(default_factory=list)  # keys that reached the second host
    url: str = ""
    _cdn: str = ""

    def times(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.asked)

    def listing(self) -> dict[str, Any]:
        return {
            "id": NAME,
            "modelId": NAME,
            "sha": COMMIT,
            "siblings": [_sibling(name, data) for name, data in self.files.items()],
        }


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
    if name.endswith(".safetensors"):
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
    return entry


@contextmanager
def serving_hub(files: dict[str, bytes]) -> Iterator[FakeHub]:
    """Serve a repository; `url` of what is yielded is its HF_ENDPOINT."""
    hub = FakeHub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if not path.startswith("/cdn/"):
                hub.authorizations.add(self.headers.get("Authorization"))
            if path.startswith("/cdn/"):
                if key := self.headers.get("Authorization"):
                    hub.leaked.append(key)
                self._file(path.removeprefix("/cdn/"))
            elif hub.status is not None:
                self._answer(hub.status, b"")
            elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
            elif path == f"/api/models/{NAME}/revision/{COMMIT}":
                self._answer(200, json.dumps(hub.listing()).encode())
            elif path.startswith(f"/api/models/{NAME}/"):
                self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
                name = path.rsplit("/", 1)[1]
                hub.asked.append((name, self.headers.get("Range")))
                if name.endswith(".safetensors"):
                    self._answer(302, b"", {"Location": f"{hub._cdn}/cdn/{name}"})
                else:
                    self._file(name)
            else:
                self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

        def _file(self, name: str) -> None:
            data = hub.sent.get(name, hub.files[name])
            start = 0
            if hub.ranges and (asked := self.headers.get("Range")):
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            cuts = hub.cut_after.get(name)
            end = start + cuts.pop(0) if cuts else len(data)
            for place in range(start, min(end, len(data)), _CHUNK):
                self.wfile.write(data[place : min(place + _CHUNK, end)])
                if name in hub.held and place + _CHUNK < len(data):
                    hub.held[name].wait(60)
            if end < len(data):
                self.close_connection = True

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that was killed is no news."""

    servers = [Server(("127.0.0.1", 0), Handler) for _ in range(2)]
    threads = [threading.Thread(target=s.serve_forever, args=(0.02,)) for s in servers]
    for thread in threads:
        thread.start()
    hub.url, hub._cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for event in hub.held.values():
            event.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
