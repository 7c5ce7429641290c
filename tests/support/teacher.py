"""A teacher that answers, stalls, lies and bills on demand: an HTTP server of one of three APIs.

    python -m tests.support.teacher --port 8123 --log invoices.jsonl --tokenizer byte
    python -m tests.support.teacher --port 8123 --log invoices.jsonl --tokenizer FOLDER \
        --faults faults.json --latency 0.05 --price-input 1 --price-output 2 --api anthropic

    with running_teacher(tmp_path / "invoices.jsonl", api="vllm") as teacher:
        teacher.script(Fault("rate_limited", match="[item 3]", attempts=(1,), retry_after=1))
        ...
        teacher.invoices()          # what it billed: the oracle for money

What it says is in `teacher_language`, how each API writes it in `teacher_apis` and
`anthropic_api`, what it does wrong in `teacher_faults`.

Every billed call is a line of the invoice log, flushed to the disk before the reply leaves. Prices
are US dollars for a million tokens, which is micro-dollars for one; each call is rounded up.

Faults can be changed while it runs: POST /control/faults (a list), DELETE /control/faults, and
GET /control/requests tells every request seen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from aiohttp import web
from pydantic import ValidationError

from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.chat import ChatTokenizer, TemplateRefused
from tests.support.anthropic_api import Anthropic
from tests.support.streamed import LIES, STREAMED, stream
from tests.support.teacher_apis import Api, BadRequest, OpenAI, Question, Vllm
from tests.support.teacher_faults import Fault, FaultKind, fault_from, misbehave
from tests.support.teacher_language import (
    Language,
    Spoken,
    digest_of_messages,
    nucleus,
    tempered,
)
from tests.support.tiny_tokenizer import read_folder, tiny_chat_tokenizer

__all__ = [
    "MODEL",
    "Fault",
    "FaultKind",
    "Invoice",
    "Language",
    "Prices",
    "Teacher",
    "read_invoices",
    "running_teacher",
    "teacher_process",
]

MODEL = "billing-teacher"
MARKER = re.compile(r"\[([^\]]{1,60})\]")
ApiName = Literal["openai", "vllm", "anthropic"]
Array = np.ndarray


@dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens."""

    input: float = 1.0
    output: float = 2.0

    def microusd(self, prompt_tokens: int, completion_tokens: int) -> int:
        # Exact: 0.1 * 30 must not become 4.
        exact = Fraction(str(self.input)) * prompt_tokens
        exact += Fraction(str(self.output)) * completion_tokens
        return math.ceil(exact)


@dataclass(frozen=True)
class Invoice:
    """One line of the log: a call that the caller pays for, whether its answer arrived or not."""

    request_id: str
    marker: str
    prompt_sha256: str
    attempt: int
    prompt_tokens: int
    completion_tokens: int
    microusd: int
    answer_sha256: str
    fault: str
    at: float


def read_invoices(log: Path) -> list[Invoice]:
    if not log.exists():
        return []
    return [Invoice(**json.loads(line)) for line in log.read_text().splitlines()]


@dataclass
class Teacher:
    """The server's state and its HTTP application."""

    log: Path
    chat: ChatTokenizer = field(default_factory=tiny_chat_tokenizer)
    prices: Prices = field(default_factory=Prices)
    latency: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    model: str = MODEL
    api: ApiName = "openai"
    api_key: str | None = None
    most_logprobs: int = 64
    refuses: tuple[str, ...] = ()
    vary: bool = False
    requests: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    bad_requests: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self.language = Language(self.chat)
        self.speaks: Api
        if self.api == "anthropic":
            self.speaks = Anthropic(self.refuses)
        else:
            kind = Vllm if self.api == "vllm" else OpenAI
            self.speaks = kind(self.refuses, self.most_logprobs)
        self._attempts: dict[str, int] = {}
        self._active = 0
        self._boot = os.urandom(4).hex()

    # What tests ask

    def script(self, *faults: Fault) -> None:
        self.faults.extend(faults)

    def forgive(self) -> None:
        """Forget all faults; attempts go on counting."""
        self.faults.clear()

    def invoices(self) -> list[Invoice]:
        return read_invoices(self.log)

    def invoiced_microusd(self) -> int:
        return sum(invoice.microusd for invoice in self.invoices())

    # The server

    def application(self) -> web.Application:
        app = web.Application(client_max_size=256 << 20)
        app.router.add_post(self.speaks.path, self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/control/requests", self._seen)
        app.router.add_post("/control/faults", self._add_faults)
        app.router.add_delete("/control/faults", self._remove_faults)
        return app

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _models(self, _: web.Request) -> web.Response:
        entry = {"id": self.model, "object": "model", "created": 0, "owned_by": "tests"}
        return web.json_response({"object": "list", "data": [entry]})

    async def _seen(self, _: web.Request) -> web.Response:
        return web.json_response({"requests": self.requests, "most_at_once": self.most_at_once})

    async def _add_faults(self, request: web.Request) -> web.Response:
        self.script(*[fault_from(entry) for entry in await request.json()])
        return web.json_response({"faults": len(self.faults)})

    async def _remove_faults(self, _: web.Request) -> web.Response:
        self.forgive()
        return web.json_response({"faults": 0})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self._active += 1
        self.most_at_once = max(self.most_at_once, self._active)
        try:
            return await self._answer(request)
        finally:
            self._active -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        api, headers = self.speaks, request.headers
        if self.api_key and api.key_of(headers) != self.api_key:
            return api.error(401, "Incorrect API key provided")
        try:
            body = await request.json()
            question = api.read(headers, body)
        except BadRequest as error:
            self.bad_requests += 1
            return api.error(error.status, str(error), **error.fields)
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            return api.error(400, f"the request is malformed: {error}")
        if question.model != self.model:
            return api.error(404, f"the model {question.model!r} does not exist")
        digest = digest_of_messages(question.messages)
        text = "\n".join(message.text for message in question.messages)
        attempt = self._attempts[digest] = self._attempts.get(digest, 0) + 1
        fault = next((f for f in self.faults if f.fits(text, digest, attempt)), None)
        found = MARKER.search(text)
        seen = {
            "id": f"req-{self._boot}-{len(self.requests) + 1}",
            "marker": found[1] if found else digest[:12],
            "prompt_sha256": digest,
            "attempt": attempt,
            "fault": fault.kind if fault else "",
            "seed": question.seed,
            "temperature": question.temperature,
            "max_tokens": question.max_tokens,
            "top_logprobs": question.top_logprobs or 0,
            "tools": len(question.tools),
            "authorization": bool(api.key_of(headers)),
            "cookie": headers.get("Cookie"),
            "fields": sorted(body),
            "at": time.time(),
        }
        self.requests.append(seen)
        try:
            spoken = self.language.answer(
                question.messages,
                max_tokens=question.max_tokens,
                tools=question.tools,
                top_logprobs=question.top_logprobs or 0,
                seed=question.seed,
                salt=str(attempt) if self.vary else "",
                view=_view(fault, question, attempt),
            )
        except TemplateRefused as error:
            return api.error(400, str(error))
        spoken = dataclasses.replace(spoken, prompt_tokens=spoken.prompt_tokens + api.hidden_tokens)
        if self.latency:
            await asyncio.sleep(self.latency)
        if fault is None or fault.bills:
            self._bill(seen, spoken, fault)
        answer = api.write(str(seen["id"]), spoken, question)
        if body.get("stream") and (fault is None or fault.kind in STREAMED):
            if fault is not None and fault.kind in LIES:
                api.lie(fault.kind, answer, question.tool)
            options = body.get("stream_options") or {}
            return await stream(request, answer, fault, usage=bool(options.get("include_usage")))
        if fault is None:
            return web.json_response(answer)
        return await misbehave(fault, request, api, answer, question.tool)

    def _bill(self, seen: dict[str, Any], spoken: Spoken, fault: Fault | None) -> None:
        invoice = Invoice(
            request_id=seen["id"],
            marker=seen["marker"],
            prompt_sha256=seen["prompt_sha256"],
            attempt=seen["attempt"],
            prompt_tokens=spoken.prompt_tokens,
            completion_tokens=spoken.completion_tokens,
            microusd=self.prices.microusd(spoken.prompt_tokens, spoken.completion_tokens),
            answer_sha256=sha256_hex(spoken.text.encode()),
            fault=fault.kind if fault else "",
            at=time.time(),
        )
        # One write and one fsync: a kill leaves whole lines.
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, json.dumps(asdict(invoice)).encode() + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)


def _view(fault: Fault | None, question: Question, attempt: int) -> Callable[[Array], Array]:
    """What becomes of a distribution before it is reported."""
    match fault.kind if fault else "":
        case "tempered":
            return lambda mass: tempered(mass, question.temperature or 1.0)
        case "nucleus":
            return lambda mass: nucleus(mass, 1.0 if question.top_p is None else question.top_p)
        case "replicas" if attempt % 2 == 0:
            return lambda mass: tempered(mass, 1.3)
    return lambda mass: mass


@contextlib.asynccontextmanager
async def serving(teacher: Teacher, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Serve on the running loop; yield the base URL with /v1."""
    runner = web.AppRunner(teacher.application(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        bound = runner.addresses[0][1]
        teacher.url = f"http://{host}:{bound}/v1"
        yield teacher.url
    finally:
        await runner.cleanup()


@contextlib.contextmanager
def running_teacher(log: Path, *, port: int = 0, **options: Any) -> Iterator[Teacher]:
    """Serve on a thread of its own, for tests in the same process."""
    teacher = Teacher(log, **options)
    loop = asyncio.new_event_loop()
    ready, ended = threading.Event(), asyncio.Event()
    failed: list[BaseException] = []

    async def serve() -> None:
        async with serving(teacher, port=port):
            ready.set()
            await ended.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        except BaseException as error:
            failed.append(error)
        finally:
            loop.run_until_complete(_end_what_stalls())
            loop.close()
            ready.set()

    thread = threading.Thread(target=run, name="teacher", daemon=True)
    thread.start()
    ready.wait()
    if failed:
        raise failed[0]
    try:
        yield teacher
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)


async def _end_what_stalls() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


@contextlib.contextmanager
def teacher_process(log: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Serve in a process of its own; yield it with its base URL. It is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.teacher", "--log", str(log), *options],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # printed once it listens; empty when it died
        if not line:
            raise RuntimeError(f"the teacher ended with {process.wait()}; see its message above")
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def tokenizer_named(name: str) -> ChatTokenizer:
    return tiny_chat_tokenizer() if name == "byte" else read_folder(Path(name))


async def _serve_until_stopped(teacher: Teacher, port: int) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with serving(teacher, port=port) as url:
        print(f"{teacher.model} at {url}", flush=True)
        await ended.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.teacher")
    parser.add_argument("--port", type=int, default=0, help="0 for a free one, which is printed")
    parser.add_argument("--log", type=Path, required=True, help="the invoices, one JSON a line")
    parser.add_argument("--tokenizer", default="byte", help="`byte`, or a model's folder")
    parser.add_argument("--faults", type=Path, help="JSON list of faults")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--price-input", type=float, default=1.0, help="USD a million tokens")
    parser.add_argument("--price-output", type=float, default=2.0)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--api", choices=("openai", "vllm", "anthropic"), default="openai")
    parser.add_argument("--api-key", help="what callers must send")
    parser.add_argument("--most-logprobs", type=int, default=64)
    parser.add_argument("--refuses", nargs="*", default=[], help="parameters that are unsupported")
    parser.add_argument("--vary", action="store_true", help="another answer at each attempt")
    chosen = parser.parse_args(argv)
    faults = json.loads(chosen.faults.read_text()) if chosen.faults else []
    teacher = Teacher(
        log=chosen.log,
        chat=tokenizer_named(chosen.tokenizer),
        prices=Prices(chosen.price_input, chosen.price_output),
        latency=chosen.latency,
        faults=[fault_from(entry) for entry in faults],
        model=chosen.model,
        api=chosen.api,
        api_key=chosen.api_key,
        most_logprobs=chosen.most_logprobs,
        refuses=tuple(chosen.refuses),
        vary=chosen.vary,
    )
    asyncio.run(_serve_until_stopped(teacher, chosen.port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
