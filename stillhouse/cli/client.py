"""The Python client of the gateway's REST API; the command line is built on it.

    with Client("http://127.0.0.1:8080", api_key) as client:
        pipeline = client.submit(spec)
        client.pull(pipeline["pipeline_id"], Path("student"))

Answers are the JSON objects of the API as they come (`/openapi.json` describes them), so a client
that is older than its gateway shows what it was told. Errors:

    StillhouseClientError
    |- StillhouseApiError        the gateway answered with a problem (RFC 9457)
    |- StillhouseUnreachableError  no gateway answered at the address
    `- DamagedFileError          a file is not what the student's manifest says
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from stillhouse.contracts.artifacts import student_file_key
from stillhouse.contracts.canonical import digest_of

Json = dict[str, Any]

ENDED = ("released", "withheld", "failed", "cancelled")
_CHUNK = 1 << 20
_BUSY = (429, 502, 503, 504)
_PAGE = 200
_PAUSE = 0.25
_POLL = 5.0
# Two minutes of beginning to ask, and the longest call.
_PROBE_TIMEOUT = httpx.Timeout(780.0, connect=5.0)
# The server says something every 15 seconds.
_STREAM_TIMEOUT = httpx.Timeout(45.0, connect=5.0)


class StillhouseClientError(Exception):
    """Base of what the client raises on purpose; the text says what to do."""


class StillhouseApiError(StillhouseClientError):
    """The gateway refused: `problem` is its problem+json, `status` the HTTP status."""

    def __init__(self, problem: Mapping[str, Any], status: int) -> None:
        self.problem = dict(problem)
        self.status = status
        super().__init__(_sentence(self.problem, status))


class StillhouseUnreachableError(StillhouseClientError):
    """Nobody answered, or what answered is no gateway."""


class DamagedFileError(StillhouseClientError):
    """A file that was fetched does not have the digest that its manifest names."""


class Client:
    """One gateway, one API key. `patience_seconds`: how long a request is tried again while the
    gateway is away or busy; only requests that may be repeated are."""

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        patience_seconds: float = 0.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.patience_seconds = patience_seconds
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise StillhouseUnreachableError(
                f"expected an address such as http://127.0.0.1:8080, found {base_url!r}"
            )
        if not (api_key.isascii() and api_key.isprintable()):
            raise StillhouseClientError("the API key has characters of no key: copy it again")
        self._http = httpx.Client(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {api_key.strip()}"},
            timeout=httpx.Timeout(60.0, connect=5.0),
            transport=transport,
            # A proxy that the user set for the internet does not reach this machine's loopback.
            trust_env=parts.hostname not in ("127.0.0.1", "localhost", "::1"),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # Pipelines

    def check(self, spec: Mapping[str, Any], *, probe: bool = False) -> Json:
        """Have a spec checked without creating anything; with `probe` its teachers answer (and
        bill) a handful of questions, which takes minutes where they are slow."""
        if not probe:
            return self._json("POST", "/v1/pipelines", params={"check": "true"}, json=spec)
        query = {"check": "true", "probe": "true"}
        return self._json("POST", "/v1/pipelines", params=query, json=spec, timeout=_PROBE_TIMEOUT)

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> Json:
        """Create a pipeline. The same spec gives the same pipeline again unless another
        `idempotency_key` is given (`new_key()` makes one)."""
        key = idempotency_key or f"spec-{digest_of(spec)}"
        return self._json("POST", "/v1/pipelines", json=spec, headers={"Idempotency-Key": key})

    def status(self, pipeline_id: str) -> Json:
        """Return a pipeline: state, stages, counts, money, figures."""
        return self._json("GET", _path(pipeline_id))

    def pipelines(self, *, limit: int | None = None) -> Iterator[Json]:
        """Yield pipelines, newest first."""
        return self._pages("/v1/pipelines", {}, limit)

    def cancel(self, pipeline_id: str) -> Json:
        """Stop a pipeline; answers already asked for are still settled."""
        return self._json("POST", f"{_path(pipeline_id)}/cancel")

    def wait(
        self,
        pipeline_id: str,
        *,
        timeout_seconds: float | None = None,
        seen: Callable[[Json], None] = lambda _: None,
    ) -> Json:
        """Return the pipeline once it has ended; `seen` gets it after each event on the way.

        It follows the stream of events. Raises TimeoutError, which a silent stream notices within
        15 seconds.
        """
        end = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds

        def look() -> Json:
            found = self.status(pipeline_id)
            seen(found)
            if found["state"] not in ENDED and time.monotonic() >= end:
                raise TimeoutError(
                    f"{pipeline_id} is still {found['state']} after {timeout_seconds:g} s"
                )
            return found

        pipeline = look()
        if pipeline["state"] in ENDED:
            return pipeline
        for event in self._messages(pipeline_id, pipeline["last_event"]):
            # What no event tells, such as a teacher that is away, is looked at when the stream
            # says that there is nothing new.
            if event is None or event["sequence"] > pipeline["last_event"]:
                pipeline = look()
            if pipeline["state"] in ENDED:
                return pipeline
        return look()

    # Live traffic

    def put_teacher(self, name: str, teacher: Mapping[str, Any]) -> Json:
        """Register a teacher for live traffic, or replace it; return it with verdict and money."""
        return self._json("PUT", _teacher_path(name), json=teacher)

    def teachers(self) -> list[Json]:
        """Return the registered teachers by name."""
        return list(self._json("GET", "/v1/teachers")["items"])

    def remove_teacher(self, name: str) -> None:
        """Take no more calls for a teacher; what was recorded and paid stays."""
        self._request("DELETE", _teacher_path(name))

    def captured(self, *, teacher: str | None = None) -> Json:
        """Return what was recorded, of one teacher or of all: totals, tags, the last failures."""
        query = {} if teacher is None else {"teacher": teacher}
        found = page = self._json("GET", "/v1/captured", params=query)
        while page["next"]:
            page = self._json("GET", "/v1/captured", params={**query, "after": page["next"]})
            found["teachers"] += page["teachers"]
        return {**found, "next": None}

    # What a pipeline left behind

    def events(
        self, pipeline_id: str, *, after: int = 0, limit: int | None = None
    ) -> Iterator[Json]:
        """Yield the stored events with a sequence above `after`, in order."""
        return self._pages(f"{_path(pipeline_id)}/events", {"after": after}, limit)

    def follow(self, pipeline_id: str, *, after: int = 0) -> Iterator[Json]:
        """Yield the events with a sequence above `after` as they are recorded, each once, until
        the pipeline has ended; a connection that breaks is made again. While the gateway takes no
        more streams they come in pages every few seconds."""
        return (event for event in self._messages(pipeline_id, after) if event is not None)

    def rejections(
        self, pipeline_id: str, *, reason: str | None = None, limit: int | None = None
    ) -> Iterator[Json]:
        """Yield the items that became no row, with stage, reason and detail."""
        query = {"reason": reason} if reason else {}
        return self._pages(f"{_path(pipeline_id)}/rejections", query, limit)

    def samples(
        self, pipeline_id: str, *, split: str | None = None, limit: int | None = None
    ) -> Json:
        """Return rows as they were stored, for reading."""
        query = {k: v for k, v in {"split": split, "limit": limit}.items() if v is not None}
        return self._json("GET", f"{_path(pipeline_id)}/samples", params=query)

    def report(self, pipeline_id: str) -> Json:
        """Return the figures of the evaluator."""
        return self._json("GET", f"{_path(pipeline_id)}/report")

    def charges(self, pipeline_id: str, *, limit: int | None = None) -> Iterator[Json]:
        """Yield the lines of the ledger, oldest first."""
        return self._pages(f"{_path(pipeline_id)}/charges", {}, limit)

    def student(self, pipeline_id: str) -> Json:
        """Return the student's manifest and the gateway's decision about it."""
        return self._json("GET", f"{_path(pipeline_id)}/student")

    # Files

    def upload(self, path: Path) -> str:
        """Store a file under its digest; return the reference to put into a spec."""
        with path.open("rb") as file:
            digest = _digest(file)

            def body() -> Iterator[bytes]:
                file.seek(0)
                while chunk := file.read(_CHUNK):
                    yield chunk

            # A length instead of chunks, so that the gateway can refuse before it reads.
            length = str(path.stat().st_size)
            self._request(
                "PUT",
                f"/v1/uploads/{digest}",
                content=body,
                headers={"Content-Length": length, "Content-Type": "application/octet-stream"},
            )
        return f"upload:{digest}"

    def pull(
        self,
        pipeline_id: str,
        folder: Path,
        *,
        progress: Callable[[str, int, int], None] = lambda _name, _done, _size: None,
    ) -> Path:
        """Fetch the student's folder; it appears under its name only when it is whole.

        What an earlier, broken pull left beside it is gone on with. `progress` gets file name,
        bytes so far and bytes in all.
        """
        student = self.student(pipeline_id)
        files = _files_of(student)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if folder.is_dir() and all(_is_whole(folder / name, files[name]) for name in files):
                return folder
            raise StillhouseClientError(
                f"{folder} exists and is not this student: name another with --to"
            )
        partial = folder.with_name(f".{folder.name}.{student['student_id']}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        for name, entry in files.items():
            url = f"{_path(pipeline_id)}/student/files/{quote(name)}"
            self._fetch(url, partial / name, entry, functools.partial(progress, name))
        for leftover in [path for path in partial.iterdir() if path.name not in files]:
            leftover.unlink()
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
        return folder

    def _fetch(
        self, url: str, target: Path, entry: Mapping[str, Any], progress: Callable[[int, int], Any]
    ) -> None:
        """Fetch one file, going on where an earlier try ended; leave it only when it is whole."""
        size = int(entry["size"])
        if _is_whole(target, entry):
            progress(size, size)
            return
        fresh = target.stat().st_size >= size if target.exists() else True
        for attempt in range(2):
            have = 0 if fresh else target.stat().st_size
            headers = {"Range": f"bytes={have}-"} if have else {}
            with self._stream(url, headers) as answer:
                have = have if answer.status_code == 206 else 0
                with target.open("ab" if have else "wb") as file:
                    for chunk in answer.iter_bytes(_CHUNK):
                        file.write(chunk)
                        have += len(chunk)
                        progress(have, size)
            if _is_whole(target, entry):
                return
            if fresh or attempt:
                break
            fresh = True  # the earlier try's bytes may be to blame: once more from the start
        target.unlink()
        raise DamagedFileError(
            f"{target.name} came with another digest than the student's manifest names: pull "
            "again; if it stays so, the object in the store is damaged"
        )

    # The stream of events

    def _messages(self, pipeline_id: str, after: int) -> Iterator[Json | None]:
        """Yield events, and None where the stream says that there is nothing new."""
        url = f"{_path(pipeline_id)}/events/stream"
        failing_since: float | None = None
        delay = _PAUSE
        while True:
            try:
                with self._http.stream(
                    "GET", url, headers={"Last-Event-ID": str(after)}, timeout=_STREAM_TIMEOUT
                ) as answer:
                    if answer.status_code == 204:
                        return
                    if answer.status_code >= 400:
                        answer.read()
                        raise _api_error(answer)
                    for event in self._read_stream(answer):
                        failing_since, delay = None, _PAUSE
                        if event is None:
                            yield None
                        elif event["sequence"] > after:
                            after = event["sequence"]
                            yield event
            except (httpx.TransportError, StillhouseApiError) as error:
                if isinstance(error, StillhouseApiError) and error.status == 429:
                    # Others hold all streams. Pages tell the same, only later.
                    for event in self.events(pipeline_id, after=after):
                        after = event["sequence"]
                        yield event
                    yield None
                    failing_since = None
                    time.sleep(_POLL)
                    continue
                if isinstance(error, StillhouseApiError) and error.status not in _BUSY:
                    raise
                now = time.monotonic()
                failing_since = now if failing_since is None else failing_since
                if now + delay > failing_since + self.patience_seconds:
                    if isinstance(error, httpx.TransportError):
                        raise self._unreachable(error) from error
                    raise
            # It may end at any time, with its server or in between: what comes next says.
            time.sleep(delay)
            delay = min(delay * 2, 5.0)

    def _read_stream(self, answer: httpx.Response) -> Iterator[Json | None]:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            raise self._no_gateway("no stream of events")
        # By line ends alone: JSON may hold characters that count as line ends elsewhere.
        rest, data = b"", b""
        for chunk in answer.iter_bytes():
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _CHUNK:
                raise self._no_gateway("a line without an end")
            for line in lines:
                if line.startswith(b"data:"):
                    data = line.removeprefix(b"data:")
                elif line.startswith(b":"):
                    yield None
                elif data and not line.strip():
                    try:
                        event = json.loads(data)
                    except ValueError:
                        raise self._no_gateway("an event that is no JSON") from None
                    yield event
                    data = b""

    # One request

    @contextlib.contextmanager
    def _stream(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        try:
            with self._http.stream("GET", url, headers=headers) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    raise _api_error(answer)
                yield answer
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _json(self, method: str, url: str, **request: Any) -> Json:
        answer = self._request(method, url, **request)
        try:
            value = answer.json()
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self._no_gateway("no JSON object")
        return value

    def _no_gateway(self, sent: str) -> StillhouseUnreachableError:
        return StillhouseUnreachableError(
            f"what answers at {self.base_url} is no Stillhouse (it sent {sent}): check "
            "STILLHOUSE_URL"
        )

    def _pages(self, url: str, query: Mapping[str, Any], limit: int | None) -> Iterator[Json]:
        """Yield the items of all pages, at most `limit`."""
        left = limit
        cursor: Any = query.get("after")
        while left is None or left > 0:
            size = _PAGE if left is None else min(left, _PAGE)
            place = {} if cursor is None else {"after": cursor}
            page = self._json("GET", url, params={**query, "limit": size, **place})
            items = page["items"]
            yield from items if left is None else items[:left]
            left = None if left is None else left - len(items)
            cursor = page.get("next")
            if not items or cursor is None:
                return

    def _request(self, method: str, url: str, **request: Any) -> httpx.Response:
        """Send a request; again while patience lasts when nobody answered or all were busy."""
        body = request.pop("content", None)
        end = time.monotonic() + self.patience_seconds
        delay = _PAUSE
        while True:
            again = {} if body is None else {"content": body()}
            try:
                answer = self._http.request(method, url, **request, **again)
            except httpx.TransportError as error:
                if time.monotonic() + delay > end:
                    raise self._unreachable(error) from error
            except httpx.InvalidURL as error:
                raise StillhouseUnreachableError(
                    f"{self.base_url} is no address: {error}"
                ) from error
            else:
                if answer.status_code < 400:
                    return answer
                if answer.status_code not in _BUSY or time.monotonic() + delay > end:
                    raise _api_error(answer)
            time.sleep(delay)
            delay = min(delay * 2, 5.0)

    def _unreachable(self, error: httpx.TransportError) -> StillhouseUnreachableError:
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectError):
            return StillhouseUnreachableError(
                f"{self.base_url} did not answer in time: try again, or look at its logs"
            )
        if isinstance(error, httpx.ConnectError):
            return StillhouseUnreachableError(
                f"no Stillhouse at {self.base_url}: start one with `stillhouse up`, or set "
                "STILLHOUSE_URL"
            )
        return StillhouseUnreachableError(
            f"the connection to {self.base_url} broke ({error}): try again"
        )


def new_key() -> str:
    """Return an idempotency key that nobody has used."""
    return f"new-{secrets.token_hex(16)}"


def _path(pipeline_id: str) -> str:
    return f"/v1/pipelines/{quote(pipeline_id, safe='')}"


def _teacher_path(name: str) -> str:
    return f"/v1/teachers/{quote(name, safe='')}"


def _files_of(student: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the files that the manifest names; a name that is none of a student's is refused."""
    files: dict[str, Mapping[str, Any]] = dict(student["files"])
    for name in files:
        try:
            student_file_key("any", "any", name)
        except ValueError as error:
            raise StillhouseClientError(
                f"the student's manifest is not to be trusted: {error}"
            ) from error
    return files


def _is_whole(path: Path, entry: Mapping[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != int(entry["size"]):
        return False
    with path.open("rb") as file:
        return _digest(file) == str(entry["sha256"])


def _digest(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _api_error(answer: httpx.Response) -> StillhouseApiError:
    try:
        problem = json.loads(answer.text)
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"title": answer.reason_phrase, "detail": answer.text[:300]}
    return StillhouseApiError(problem, answer.status_code)


def _sentence(problem: Mapping[str, Any], status: int) -> str:
    """Say what a problem says; several mistakes stand one a line."""
    said = problem.get("detail") or problem.get("title") or f"the gateway answered {status}"
    errors = [entry for entry in problem.get("errors") or () if isinstance(entry, Mapping)]
    if len(errors) < 2:
        return str(said)
    lines = [f"{len(errors)} mistakes:"]
    for entry in errors:
        where, what = entry.get("field"), entry.get("message")
        lines.append(f"  {where}: {what}" if where else f"  {what}")
    return "\n".join(lines)
