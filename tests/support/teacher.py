"""A teacher that answers, stalls, lies and bills on demand: an OpenAI-compatible HTTP server.

    python -m tests.support.teacher --port 8123 --log invoices.jsonl --tokenizer byte
    python -m tests.support.teacher --port 8123 --log invoices.jsonl --tokenizer FOLDER \
        --faults faults.json --latency 0.05 --price-input 1 --price-output 2

    with running_teacher(tmp_path / "invoices.jsonl") as teacher:
        teacher.script(Fault("rate_limited", match="[item 3]", attempts=(1,), retry_after=1))
        ...
        teacher.invoices()          # what it billed: the oracle for money

It is a small language model of its own: a Markov chain over the tokenizer's plain tokens, so its
log-probabilities are a true distribution (they sum to one over the vocabulary) and a tiny student
can learn it. An answer depends on the conversation and the request's `seed` alone (and on the
attempt with `vary`), so `Language.answer` tells a test beforehand what it will say.

Every billed call is a line of the invoice log, flushed to the disk before the reply leaves. Prices
are US dollars for a million tokens, which is micro-dollars for one; each call is rounded up.

Faults can be changed while it runs: POST /control/faults (a list), DELETE /control/faults, and
GET /control/requests tells every request seen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from aiohttp import web
from pydantic import ValidationError

from stillhouse.contracts.canonical import canonical_json, sha256_hex
from stillhouse.contracts.chat import ChatTokenizer, Message, TemplateRefused
from tests.support.tiny_tokenizer import read_folder, tiny_chat_tokenizer, token_bytes

MODEL = "billing-teacher"
MARKER = re.compile(r"\[([^\]]{1,60})\]")

FaultKind = Literal[
    "rate_limited",  # 429, with Retry-After where `retry_after` is set
    "status",  # `status`, with an OpenAI error body
    "invalid_json",  # 200 and a page of HTML
    "truncated_json",  # 200 and the first half of the answer, with a fitting Content-Length
    "cut_reply",  # the whole Content-Length promised, half of it sent, connection reset
    "wrong_schema",  # 200 and JSON of another shape
    "empty_choices",
    "null_content",
    "content_filter",  # finish_reason that is neither stop nor length
    "huge_body",  # 200 and `size` bytes of JSON string
    "gzip_bomb",  # `size` zero bytes, gzipped
    "slow_drip",  # the answer, one byte each `seconds`
    "never_answers",
    "closed",  # connection reset before the first byte of the reply
    "missing_logprobs",
    "missing_ids",
    "missing_usage",
    "wrong_usage",  # ten times the completion tokens
    "wrong_prompt_tokens",  # another tokenizer or template than ours
    "inflated",  # probabilities that sum to more than one
    "other_text",  # content that is not what the ids decode to
    "redirect",  # 302 to `location`
]
NOT_BILLED = frozenset({"rate_limited", "status", "redirect"})


@dataclass(frozen=True)
class Fault:
    """One scripted misbehaviour: for conversations that contain `match` (or whose digest starts
    with it), at these attempts (counted from 1 for each conversation; none given: always)."""

    kind: FaultKind
    match: str = ""
    attempts: tuple[int, ...] = ()
    retry_after: float | None = None
    status: int = 500
    size: int = 64 << 20
    seconds: float = 1.0
    location: str = "http://169.254.169.254/latest/meta-data/"
    billed: bool | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            raise ValueError(f"expected a fault of {get_args(FaultKind)}, found {self.kind!r}")

    def fits(self, text: str, digest: str, attempt: int) -> bool:
        meant = self.match in text or (len(self.match) >= 8 and digest.startswith(self.match))
        return meant and (not self.attempts or attempt in self.attempts)

    @property
    def bills(self) -> bool:
        """Whether the caller pays: a provider bills what it computed, arrived or not."""
        return self.billed if self.billed is not None else self.kind not in NOT_BILLED


@dataclass(frozen=True)
class Spoken:
    """An answer as the teacher means it. `ids` holds the end-of-turn id where it stopped."""

    ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]
    positions: list[dict[str, Any]]
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Language:
    """A Markov chain over the plain tokens of a tokenizer: what this teacher knows.

    The next token's distribution depends on the last one alone: `CANDIDATES` likely ones in an
    order that the last token decides, the end of turn from `SHORTEST` tokens on, and a floor of
    FLOOR spread over the whole vocabulary.
    """

    chat: ChatTokenizer

    CANDIDATES = 24
    DECAY = 0.35
    FLOOR = 1e-3
    SHORTEST = 8
    END = 0.05

    @cached_property
    def pieces(self) -> list[bytes]:
        return token_bytes(self.chat)

    @cached_property
    def plain(self) -> np.ndarray:
        """Ids whose text is ASCII letters or digits, perhaps behind one space."""
        fits = re.compile(rb"^ ?[A-Za-z0-9]+$")
        return np.array([i for i, piece in enumerate(self.pieces) if fits.match(piece)])

    def probabilities(self, last: int | None, position: int) -> np.ndarray:
        """The distribution over the whole vocabulary after a token; float64 [V], sums to one."""
        order = np.random.default_rng(1_000_003 + (-1 if last is None else last))
        chosen = order.choice(self.plain, min(self.CANDIDATES, len(self.plain)), replace=False)
        weights = np.exp(-self.DECAY * np.arange(len(chosen)))
        end = self.END if position >= self.SHORTEST else 0.0
        result = np.full(self.chat.vocabulary, self.FLOOR / self.chat.vocabulary)
        result[chosen] += (1 - self.FLOOR - end) * weights / weights.sum()
        result[self.chat.eos_id] += end
        return result

    def answer(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        top_logprobs: int = 0,
        seed: object = None,
        salt: str = "",
    ) -> Spoken:
        """Say what the teacher will answer. `salt` is the attempt where it varies."""
        prompt = digest_of_messages(messages)
        ids: list[int] = []
        positions: list[dict[str, Any]] = []
        finish: Literal["stop", "length"] = "length"
        while len(ids) < max_tokens:
            mass = self.probabilities(ids[-1] if ids else None, len(ids))
            # The floor is never sampled: it may be any bytes, and half a character has no text.
            likely = np.flatnonzero(mass > 2 * self.FLOOR / self.chat.vocabulary)
            drawn = _uniform(prompt, seed, salt, len(ids)) * mass[likely].sum()
            token = int(likely[np.searchsorted(np.cumsum(mass[likely]), drawn)])
            ids.append(token)
            positions.append(self._entry(token, mass, top_logprobs))
            if token == self.chat.eos_id:
                finish = "stop"
                break
        text = b"".join(self.pieces[i] for i in ids).decode()
        tokens = len(self.chat.encode_prompt(list(messages)))
        return Spoken(ids, text, finish, positions, tokens)

    def _entry(self, token: int, mass: np.ndarray, top: int) -> dict[str, Any]:
        # Stable: of equal ones the lowest id first, as servers do.
        best = np.argsort(-mass, kind="stable")[:top]
        return {
            **self._outcome(token, mass),
            "top_logprobs": [self._outcome(int(i), mass) for i in best],
        }

    def _outcome(self, token: int, mass: np.ndarray) -> dict[str, Any]:
        # As llama.cpp writes it: special tokens have an id and no text.
        piece = self.pieces[token]
        return {
            "id": token,
            "token": piece.decode(errors="replace"),
            "bytes": list(piece),
            "logprob": math.log(float(mass[token])),
        }


def digest_of_messages(messages: Sequence[Message]) -> str:
    return sha256_hex(canonical_json([message.model_dump() for message in messages]))


def _uniform(*key: object) -> float:
    data = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(data[:7], "big") / 2**56


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
    api_key: str | None = None
    most_logprobs: int = 64
    vary: bool = False
    requests: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self.language = Language(self.chat)
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
        app.router.add_post("/v1/chat/completions", self._complete)
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
        self.script(*[_fault_from(entry) for entry in await request.json()])
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
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return _error(401, "Incorrect API key provided", "invalid_api_key")
        try:
            body = await request.json()
            messages = [Message.model_validate(message) for message in body["messages"]]
            max_tokens = int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)
            top = int(body.get("top_logprobs") or 0) if body.get("logprobs") else 0
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            return _error(400, f"the request is malformed: {error}", "invalid_request_error")
        if top > self.most_logprobs:
            return _error(
                400, f"top_logprobs must be at most {self.most_logprobs}", "invalid_request_error"
            )
        if body.get("model") != self.model:
            return _error(404, f"the model {body.get('model')!r} does not exist", "model_not_found")
        digest = digest_of_messages(messages)
        text = "\n".join(message.content for message in messages)
        attempt = self._attempts[digest] = self._attempts.get(digest, 0) + 1
        fault = next((f for f in self.faults if f.fits(text, digest, attempt)), None)
        found = MARKER.search(text)
        seen = {
            "id": f"req-{self._boot}-{len(self.requests) + 1}",
            "marker": found[1] if found else digest[:12],
            "prompt_sha256": digest,
            "attempt": attempt,
            "fault": fault.kind if fault else "",
            "seed": body.get("seed"),
            "temperature": body.get("temperature"),
            "max_tokens": max_tokens,
            "top_logprobs": top,
            "authorization": bool(request.headers.get("Authorization")),
            "at": time.time(),
        }
        self.requests.append(seen)
        try:
            spoken = self.language.answer(
                messages,
                max_tokens=max_tokens,
                top_logprobs=top,
                seed=body.get("seed"),
                salt=str(attempt) if self.vary else "",
            )
        except TemplateRefused as error:
            return _error(400, str(error), "invalid_request_error")
        if self.latency:
            await asyncio.sleep(self.latency)
        if fault is None or fault.bills:
            self._bill(seen, spoken, fault)
        answer = self._completion(str(seen["id"]), spoken, logprobs=bool(body.get("logprobs")))
        if fault is None:
            return web.json_response(answer)
        return await misbehave(fault, request, answer)

    def _completion(self, request_id: str, spoken: Spoken, *, logprobs: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": spoken.text},
            "finish_reason": spoken.finish_reason,
        }
        if logprobs:
            choice["logprobs"] = {"content": spoken.positions}
        return {
            "id": request_id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": spoken.prompt_tokens,
                "completion_tokens": spoken.completion_tokens,
                "total_tokens": spoken.prompt_tokens + spoken.completion_tokens,
            },
        }

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


def _fault_from(entry: dict[str, Any]) -> Fault:
    return Fault(**{**entry, "attempts": tuple(entry.get("attempts", ()))})


def _error(status: int, message: str, kind: str, **headers: str) -> web.Response:
    body = {"error": {"message": message, "type": kind, "code": kind}}
    return web.json_response(body, status=status, headers=headers)


async def misbehave(
    fault: Fault, request: web.Request, answer: dict[str, Any]
) -> web.StreamResponse:
    """Reply to a request as the fault says, given the answer that an honest teacher would send."""
    choice, usage = answer["choices"][0], answer["usage"]
    whole = json.dumps(answer).encode()
    match fault.kind:
        case "rate_limited":
            headers = {"Retry-After": f"{fault.retry_after:g}"} if fault.retry_after else {}
            return _error(429, "Rate limit reached", "rate_limit_exceeded", **headers)
        case "status":
            return _error(fault.status, "The server had an error", "server_error")
        case "redirect":
            return web.Response(status=302, headers={"Location": fault.location})
        case "invalid_json":
            return web.Response(text="<html>upstream went away</html>", content_type="text/html")
        case "truncated_json":
            return _json_bytes(whole[: len(whole) // 2])
        case "cut_reply":
            return await _send_slowly(request, whole, stop_at=len(whole) // 2)
        case "slow_drip":
            return await _send_slowly(request, whole, seconds=fault.seconds)
        case "wrong_schema":
            return web.json_response({"output": choice["message"]["content"]})
        case "empty_choices":
            return web.json_response({**answer, "choices": []})
        case "huge_body":
            return await _send_chunks(request, fault.size)
        case "gzip_bomb":
            headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
            return web.Response(body=gzip.compress(b"\0" * fault.size, 9), headers=headers)
        case "never_answers":
            await asyncio.sleep(3600)
        case "closed":
            _reset(request)
            return web.Response()
        case "null_content":
            choice["message"]["content"] = None
        case "content_filter":
            choice["finish_reason"] = "content_filter"
        case "missing_logprobs":
            choice.pop("logprobs", None)
        case "missing_ids":
            for position in _positions(choice):
                for outcome in (position, *position["top_logprobs"]):
                    del outcome["id"]
        case "missing_usage":
            del answer["usage"]
        case "wrong_usage":
            usage["completion_tokens"] *= 10
            usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        case "wrong_prompt_tokens":
            usage["prompt_tokens"] += 3
            usage["total_tokens"] += 3
        case "inflated":
            for position in _positions(choice):
                for outcome in position["top_logprobs"]:
                    outcome["logprob"] = min(0.0, outcome["logprob"] + 1.0)
        case "other_text":
            choice["message"]["content"] += "!"
    return web.json_response(answer)


def _positions(choice: dict[str, Any]) -> list[dict[str, Any]]:
    return list((choice.get("logprobs") or {}).get("content") or [])


def _json_bytes(data: bytes) -> web.Response:
    return web.Response(body=data, content_type="application/json")


def _reset(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


async def _send_slowly(
    request: web.Request, data: bytes, *, seconds: float = 0.0, stop_at: int | None = None
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.content_length = len(data)
    await response.prepare(request)
    if stop_at is not None:
        await response.write(data[:stop_at])
        await asyncio.sleep(0.02)  # let the bytes leave before the reset overtakes them
        _reset(request)
        return response
    for number in range(len(data)):
        await response.write(data[number : number + 1])
        await asyncio.sleep(seconds)
    await response.write_eof()
    return response


async def _send_chunks(request: web.Request, size: int) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"choices": [{"message": {"content": "')
    chunk = b"a" * (1 << 16)
    for _ in range(size // len(chunk)):
        await response.write(chunk)
    await response.write(b'"}}]}')
    await response.write_eof()
    return response


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
    parser.add_argument("--api-key", help="what callers must send as a bearer token")
    parser.add_argument("--most-logprobs", type=int, default=64)
    parser.add_argument("--vary", action="store_true", help="another answer at each attempt")
    chosen = parser.parse_args(argv)
    faults = json.loads(chosen.faults.read_text()) if chosen.faults else []
    teacher = Teacher(
        log=chosen.log,
        chat=tokenizer_named(chosen.tokenizer),
        prices=Prices(chosen.price_input, chosen.price_output),
        latency=chosen.latency,
        faults=[_fault_from(entry) for entry in faults],
        model=chosen.model,
        api_key=chosen.api_key,
        most_logprobs=chosen.most_logprobs,
        vary=chosen.vary,
    )
    asyncio.run(_serve_until_stopped(teacher, chosen.port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
