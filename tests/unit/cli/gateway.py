"""A gateway of a few lines over real HTTP, with answers in the shapes of the API."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

AT = "2026-01-02T03:04:05Z"
STUDENT = {"config.json": b"{}", "model.safetensors": b"weights"}

Json = dict[str, Any]


def pipeline(state: str = "running", **fields: Any) -> Json:
    stages = ("collect", "build", "train", "evaluate", "release")
    return {
        "pipeline_id": "pl-1",
        "name": "demo",
        "state": state,
        "stopping": "",
        "reason": "",
        "rows": 7,
        "items": 10,
        "pending": 1,
        "rejections": {"too_short": 2},
        "cost": {"budget_usd": 1.0, "spent_usd": 0.25, "reserved_usd": 0.0},
        "created_at": AT,
        "ended_at": None,
        "stages": {s: {"state": "running", "figures": {"loss": 0.5, "at": 1.0}} for s in stages},
        "batches": 4,
        "heldout_batches": 2,
        "batches_closed": 3,
        "tokens": {"prompt": 100, "completion": 200, "trained": 150},
        "student_id": "st-1",
        "last_event": 0,
        **fields,
    }


REPORT: Json = {
    "split": "test",
    "step": 12,
    "teacher": {"kl_top20": 0.01, "kl_full": 0.02, "ppl": 2.0, "top1": 0.99, "stop_rate": None},
    "untrained": {"kl_top20": 4.0, "kl_full": 5.0, "ppl": 900.0, "top1": 0.1, "stop_rate": 0.0},
    "model": {"kl_top20": 1.0, "kl_full": 1.5, "ppl": 9.5, "top1": 0.5, "stop_rate": 0.75},
    "samples": [{"prompt": "Hi?", "teacher": "Yes\x1b[2J", "untrained": "", "student": "Ye"}],
}
for _figures in ("teacher", "untrained", "model"):
    REPORT[_figures] |= {"rows": 8, "tokens": 80}


def captured(teacher: str | None) -> Json:
    """What was recorded of one teacher, or of all."""
    entries: list[Json] = [
        {"teacher": "live", "records": 5, "failures": 2, "cost_microusd": 300_000},
        {"teacher": "spare", "records": 1, "failures": 0, "cost_microusd": 0},
    ]
    chosen = [entry for entry in entries if teacher in (None, entry["teacher"])]
    of_live = any(entry["teacher"] == "live" for entry in chosen)
    failure = {"at": AT, "teacher": "live", "reason": "no_done", "status": 200}
    return {
        "records": sum(entry["records"] for entry in chosen),
        "failures": sum(entry["failures"] for entry in chosen),
        "cost_microusd": sum(entry["cost_microusd"] for entry in chosen),
        "teachers": [{**entry, "first_at": AT, "last_at": AT} for entry in chosen],
        "next": None,
        "tags_left_out": 0,
        "tags": {"app": {"shop": 1, "support": 3}, "team": {"a": 2}} if of_live else {},
        "reasons": {"no_done": 2} if of_live else {},
        "last_failures": [{**failure, "detail": "it broke off"}] if of_live else [],
    }


class FakeGateway:
    """Answers by a table of paths; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Json, Any]] = []
        # Each look at the pipeline or its stream takes one, the last stays.
        self.states = ["running"]
        self.problem: tuple[int, Json] | None = None

    def answer(self, method: str, path: str, query: Json, body: bytes) -> tuple[int, Any]:
        if self.problem is not None:
            return self.problem
        below = path.removeprefix("/v1/pipelines/pl-1")
        files = {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in STUDENT.items()
        }
        if method == "PUT":
            return 201, {"reference": f"upload:{path.rsplit('/', 1)[1]}"}
        if path == "/v1/captured":
            return 200, captured(query.get("teacher"))
        if path == "/v1/pipelines" and method == "POST":
            return 202, {"pipeline_id": "pl-1", "name": "demo", "created_at": AT}
        if path == "/v1/pipelines":
            return 200, {"items": [pipeline()], "next": None}
        if below in ("", "/cancel"):
            state = "cancelled" if below else self.states[0]
            self.states = self.states[1:] or self.states
            reason = "teacher said no" if state == "failed" else ""
            return 200, pipeline(state, reason=reason)
        if below == "/events/stream":
            state, self.states = self.states[0], self.states[1:] or self.states
            if query["Last-Event-ID"] == "0":
                event = {"sequence": 1, "type": "shard.written", "occurred_at": AT}
                data = json.dumps({**event, "payload": {"batch": 3, "shard": {}}})
                return 200, f"retry: 1\n\nid: 1\ndata: {data}\n\n: nothing new\n\n"
            return (200 if state == "running" else 204), ": nothing new\n\n"
        if below == "/events":
            event = {"sequence": 1, "type": "shard.written", "occurred_at": AT}
            items = (
                [{**event, "payload": {"batch": 3, "shard": {}}}] if query["after"] == "0" else []
            )
            return 200, {"items": items, "next": None}
        if below == "/rejections":
            item = {
                "item_id": "pr-1-0",
                "stage": "build",
                "reason": "too_short",
                "detail": "0 chars",
            }
            return 200, {"items": [item], "next": None, "counts": {"too_short": 1}}
        if below == "/samples":
            row = {"split": "train", "messages": [{"role": "user", "content": "Hi?"}]}
            return 200, {"items": [{**row, "answer": "Yes.", "finish_reason": "stop"}]}
        if below == "/report":
            return 200, REPORT
        if below == "/student":
            return 200, {"student_id": "st-1", "files": files}
        if below.startswith("/student/files/"):
            return 200, STUDENT[below.rsplit("/", 1)[1]]
        return 404, {"title": "Not Found", "detail": "there is no such pipeline"}


@contextmanager
def serving(gateway: FakeGateway) -> Iterator[str]:
    """Serve on a free port; yield the URL."""

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            if (seen := self.headers.get("Last-Event-ID")) is not None:
                query["Last-Event-ID"] = seen
            known = json.loads(body) if body.startswith(b"{") and self.command == "POST" else body
            gateway.asked.append((self.command, parts.path, query, known))
            status, value = gateway.answer(self.command, parts.path, query, body)
            if isinstance(value, str):
                kind, data = "text/event-stream", value.encode()
            else:
                kind = "application/json"
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
            if status == 204:
                data = b""
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
