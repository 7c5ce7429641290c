"""A provider's batch API before a fault teacher: files, batches, and what goes wrong with them.

    with running_provider(teacher) as provider:
        provider.faults.add("expired")
        ...                       # the gateway's teacher is at provider.url
        provider.release()        # what was held goes on

Each line of a batch is one real call of the teacher, so its faults are the lines' faults and its
invoices what the provider bills. Batches are worked on when they are created, or with `hold` at
`release`; `stop_after` lines of each, where it is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
from aiohttp import web

from tests.support.teacher import Teacher

ProviderFault = Literal[
    "upload_down",  # 503 for an upload
    "create_busy",  # 429 for a create, which did not begin
    "create_refused",  # 400 for a create
    "create_lost_reply",  # it began, and the connection broke
    "create_not_found",  # 404: there is no such API
    "no_list",  # 404 for the list of batches
    "list_forbidden",  # 403 for it
    "down",  # 503 for everything
    "validation",  # the batch fails as a whole
    "limit",  # the batch fails by the account's limit
    "expired",  # the window closes after `stop_after` lines
    "forgotten",  # 404 for a batch
    "never_cancels",
    "cut_output",  # the output file breaks off
    "no_output",  # the output file is gone
    "rude_ids",
    "keeps_files",  # 405 for a deletion
    "lists_late",  # what was created is not in the list yet
]


@dataclass
class Job:
    """A batch at the provider."""

    id: str
    file_id: str
    metadata: dict[str, str]
    created_at: int
    status: str = "in_progress"
    output: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    said: list[dict[str, str]] = field(default_factory=list)
    cancels: int = 0
    counts: bool = True

    def shown(self) -> dict[str, Any]:
        ended = self.status in ("completed", "expired", "cancelled", "failed")
        counts = {
            "total": len(self.output) + len(self.errors),
            "completed": len(self.output),
            "failed": sum(line["response"] is not None for line in self.errors),
        }
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "created_at": self.created_at,
            "status": self.status,
            "input_file_id": self.file_id,
            "output_file_id": f"{self.id}-output" if ended and self.output else None,
            "error_file_id": f"{self.id}-errors" if ended and self.errors else None,
            "errors": {"object": "list", "data": self.said} if self.said else None,
            "request_counts": counts if self.counts else None,
            "metadata": self.metadata,
        }


@dataclass
class Provider:
    """The server's state and its HTTP application."""

    teacher: Teacher
    hold: bool = False
    stop_after: int | None = None
    page: int = 100
    unknown: str = ""  # a parameter that its model does not support
    faults: set[ProviderFault] = field(default_factory=set)
    files: dict[str, bytes] = field(default_factory=dict)  # all that were ever uploaded
    deleted: list[str] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    authorizations: set[str] = field(default_factory=set)
    url: str = ""

    def __post_init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # What tests ask

    def release(self) -> None:
        """Let held batches go on, and wait until all are over."""
        self.hold = False
        self.wait()

    def wait(self) -> None:
        """Wait until no batch is worked on."""
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self._settle(), self._loop).result(30)

    def count(self, start: str) -> int:
        """Requests whose method and path begin so."""
        return sum(request.startswith(start) for request in self.requests)

    # The server

    def serves_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _settle(self) -> None:
        while self._tasks:
            await asyncio.gather(*self._tasks)

    def application(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20, middlewares=[self._noting])
        app.router.add_post("/v1/chat/completions", self._live)
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{id}/content", self._content)
        app.router.add_delete("/v1/files/{id}", self._delete)
        app.router.add_post("/v1/batches", self._create)
        app.router.add_get("/v1/batches", self._list)
        app.router.add_get("/v1/batches/{id}", self._show)
        app.router.add_post("/v1/batches/{id}/cancel", self._cancel)
        return app

    @web.middleware
    async def _noting(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        self.authorizations.add(request.headers.get("Authorization", ""))
        if "down" in self.faults:
            return _error(503, "overloaded")
        return await handler(request)

    async def _live(self, request: web.Request) -> web.Response:
        """What is asked at once, such as the probe."""
        async with aiohttp.ClientSession() as session:
            status, body = await self._answer(
                session, {"url": request.path, "body": await request.json()}
            )
        return web.json_response(body, status=status)

    async def _upload(self, request: web.Request) -> web.Response:
        if "upload_down" in self.faults:
            return _error(503, "overloaded")
        form = await request.post()
        assert form["purpose"] == "batch"
        name = f"file-{len(self.files) + 1}"
        self.files[name] = form["file"].file.read()  # type: ignore[union-attr]
        shown = "../v1/models" if "rude_ids" in self.faults else name
        return web.json_response({"id": shown, "object": "file", "purpose": "batch"})

    async def _delete(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        if "keeps_files" in self.faults:
            return _error(405, "Method Not Allowed")
        if name in self.deleted:
            return _error(404, "No such file")
        self.deleted.append(name)
        return web.json_response({"id": name, "object": "file", "deleted": True})

    async def _create(self, request: web.Request) -> web.StreamResponse:
        if "create_busy" in self.faults:
            return _error(429, "slow down")
        if "create_not_found" in self.faults:
            return _error(404, "Not Found")
        body = await request.json()
        if "create_refused" in self.faults:
            return _error(400, "this model has no batches")
        if body["input_file_id"] not in self.files.keys() - set(self.deleted):
            return _error(400, "no such file")
        assert body["endpoint"] == "/v1/chat/completions"
        assert body["completion_window"] == "24h"
        job = Job(
            f"batch_{len(self.jobs) + 1}",
            body["input_file_id"],
            dict(body["metadata"]),
            int(time.time()),
        )
        self.jobs[job.id] = job
        task = asyncio.create_task(self._work(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if "create_lost_reply" in self.faults:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(job.shown())

    async def _list(self, request: web.Request) -> web.Response:
        if "no_list" in self.faults:
            return _error(404, "Not Found")
        if "list_forbidden" in self.faults:
            return _error(403, "this key may not list batches")
        newest = [] if "lists_late" in self.faults else list(reversed(self.jobs.values()))
        if after := request.query.get("after"):
            newest = newest[[job.id for job in newest].index(after) + 1 :]
        page = newest[: min(int(request.query["limit"]), self.page)]
        data = [job.shown() for job in page]
        return web.json_response(
            {"object": "list", "data": data, "has_more": len(newest) > len(page)}
        )

    async def _show(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["id"])
        if job is None or "forgotten" in self.faults:
            return _error(404, "No such batch")
        return web.json_response(job.shown())

    async def _cancel(self, request: web.Request) -> web.Response:
        job = self.jobs[request.match_info["id"]]
        job.cancels += 1
        if job.status == "in_progress":
            job.status = "cancelling"
        return web.json_response(job.shown())

    async def _content(self, request: web.Request) -> web.StreamResponse:
        name, _, kind = request.match_info["id"].rpartition("-")
        job = self.jobs[name]
        if request.match_info["id"] in self.deleted:
            return _error(404, "No such file")
        if kind == "output" and "no_output" in self.faults:
            return _error(404, "No such file")
        lines = job.output if kind == "output" else job.errors
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        if kind == "output" and "cut_output" in self.faults:
            response = web.StreamResponse()
            response.content_length = len(data)
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            await asyncio.sleep(0.02)
            assert request.transport is not None
            request.transport.abort()
            return response
        return web.Response(body=data, content_type="application/octet-stream")

    async def _work(self, job: Job) -> None:
        """Answer the lines in order, one real call of the teacher for each."""
        lines = [json.loads(line) for line in self.files[job.file_id].splitlines()]
        for kind, code in (("validation", "invalid_json_line"), ("limit", "token_limit_exceeded")):
            if kind in self.faults:
                job.said = [{"code": code, "message": "this batch cannot begin", "line": "1"}]
                job.status = "failed"
                return
        async with aiohttp.ClientSession() as session:
            for number, line in enumerate(lines):
                if number == self.stop_after or (self.stop_after is None and self.hold):
                    while self.hold and job.status == "in_progress":  # noqa: ASYNC110 (a thread)
                        await asyncio.sleep(0.01)
                if number == self.stop_after and "expired" in self.faults:
                    self._end(job, "expired", lines[number:])
                    return
                if job.status == "cancelling":
                    while "never_cancels" in self.faults:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                    self._end(job, "cancelled", lines[number:])
                    return
                status, body = await self._answer(session, line)
                answered = {"status_code": status, "request_id": "r", "body": body}
                (job.output if status == 200 else job.errors).append(
                    {"id": "b", "custom_id": line["custom_id"], "response": answered, "error": None}
                )
        job.status = "completed"

    async def _answer(self, session: aiohttp.ClientSession, line: dict[str, Any]) -> Any:
        if self.unknown and self.unknown in line["body"]:
            said = f"Unsupported parameter: '{self.unknown}' is not supported with this model."
            return 400, {"error": {"message": said, "type": "invalid_request_error"}}
        url = self.teacher.url + line["url"].removeprefix("/v1")
        async with session.post(url, json=line["body"]) as reply:
            return reply.status, await reply.json(content_type=None)

    def _end(self, job: Job, status: str, unanswered: list[dict[str, Any]]) -> None:
        error = {"code": f"batch_{status}", "message": "not executed"}
        job.errors += [
            {"id": "b", "custom_id": line["custom_id"], "response": None, "error": error}
            for line in unanswered
        ]
        job.status = status


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "error"}}, status=status)


@contextlib.contextmanager
def running_provider(teacher: Teacher, **options: Any) -> Iterator[Provider]:
    """Serve on a thread of its own, before a teacher that runs."""
    provider = Provider(teacher, **options)
    loop = asyncio.new_event_loop()
    ready, ended = threading.Event(), asyncio.Event()

    async def serve() -> None:
        runner = web.AppRunner(provider.application(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        provider.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        provider.serves_on(asyncio.get_running_loop())
        ready.set()
        await ended.wait()
        await provider.close()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield provider
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
        loop.close()
