"""A tiny S3 server in this process that is wrong on purpose: what start-up must refuse.

It holds objects in memory and checks no signature; `honours_conditions` and `tells_time` say what
it can. Only what `ObjectStore.self_test` calls is here.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def fake_store(*, honours_conditions: bool, tells_time: bool = True) -> Iterator[str]:
    """Serve on loopback; yield the endpoint's URL."""
    objects: dict[str, bytes] = {}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                present = objects.get(self.path)
                if honours_conditions and self._refused(present):
                    self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                    return
                objects[self.path] = body
            self._answer(200, etag=_etag(body))

        def _refused(self, present: bytes | None) -> bool:
            if self.headers["If-None-Match"]:
                return present is not None
            wanted = self.headers["If-Match"]
            return bool(wanted) and (present is None or wanted != _etag(present))

        def do_GET(self) -> None:
            present = objects.get(self.path)
            if present is None:
                self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            else:
                self._answer(200, present, etag=_etag(present))

        do_HEAD = do_GET

        def do_DELETE(self) -> None:
            objects.pop(self.path, None)
            self._answer(204)

        def _answer(self, status: int, body: bytes = b"", etag: str = "") -> None:
            self.send_response_only(status)
            if tells_time:
                self.send_header("Date", formatdate(usegmt=True))
            self.send_header("Last-Modified", formatdate(usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            if etag:
                self.send_header("ETag", etag)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
