"""The gateway's API on real parts: a database with tables, a key, a folder of weights, a server."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from sqlalchemy import Engine, select

from services.teacher_gateway.accept import accept_pipeline
from services.teacher_gateway.admission import survey
from services.teacher_gateway.api import ApiServer
from services.teacher_gateway.app import app_of
from services.teacher_gateway.context import Context
from services.teacher_gateway.database import open_engine, reading
from services.teacher_gateway.keys import create_key
from services.teacher_gateway.migrate import migrate
from services.teacher_gateway.models import History, Pipeline
from services.teacher_gateway.preflight.check import preflight
from services.teacher_gateway.routes.parts import Gateway
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.terms.gate import load_catalogue
from services.teacher_gateway.timeouts import table
from stillhouse.chassis import settings as chassis_settings
from stillhouse.chassis.bus import Publisher
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.flow import GATEWAY
from stillhouse.contracts.spec import Spec
from stillhouse.embedded.parts import Store
from tests.support.shards import store_of
from tests.support.tiny_tokenizer import VOCABULARY, write_folder
from tests.support.waiting import wait_for

NO_BROKER = "redis://127.0.0.1:1/0"
PEPPER = "a pepper for tests only"


@dataclass(frozen=True)
class Api:
    """An API with a caller, and a folder below which specs may name files."""

    gateway: Gateway
    tenant: str
    key: str
    files: Path

    @property
    def engine(self) -> Engine:
        return self.gateway.engine

    @property
    def app(self) -> FastAPI:
        return app_of(self.gateway)

    def context(self) -> Context:
        settings = self.gateway.settings
        return Context(
            engine=self.gateway.engine,
            store=self.gateway.store,
            publisher=Publisher(GATEWAY, settings.broker_url),
            settings=settings,
            times=table(settings.profile),
        )

    def headers(self, **more: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", **more}


def make_settings(tmp_path: Path, **fields: str) -> TeacherGatewaySettings:
    """Settings of an embedded gateway; `fields` are variables without their prefix."""
    files = tmp_path / "files"
    files.mkdir(exist_ok=True)
    told = {
        "BROKER_URL": NO_BROKER,
        "DATABASE_URL": f"sqlite:///{tmp_path / 'gateway.sqlite3'}",
        "KEY_PEPPER": PEPPER,
        "FILE_ROOTS": str(files),
        "WORK_DIR": str(tmp_path),
        "PROFILE": "embedded",
        **fields,
    }
    environ = {f"TEACHER_GATEWAY_{name}": value for name, value in told.items()}
    return chassis_settings.load(TeacherGatewaySettings, environ)


@contextlib.contextmanager
def gateway_api(
    tmp_path: Path, store: ObjectStore, tenant: str = "acme", **fields: str
) -> Iterator[Api]:
    """Make tables and a key; yield the parts of an API."""
    settings = make_settings(tmp_path, **fields)
    engine = open_engine(settings.database_url)
    try:
        migrate(engine)
        yield Api(
            gateway=Gateway(
                settings=settings,
                engine=engine,
                store=store,
                probe=store,
                catalogue=load_catalogue(settings.terms_file),
            ),
            tenant=tenant,
            key=create_key(engine, settings.key_pepper, tenant),
            files=settings.file_roots[0],
        )
    finally:
        engine.dispose()


def asgi_client(api: Api, **headers: str) -> httpx.AsyncClient:
    """A client that calls the app without a socket; a 500 is an answer, not an exception."""
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(api.app, raise_app_exceptions=False),
        base_url="http://127.0.0.1",
        headers=api.headers(**headers),
    )


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an app over real HTTP on a free port; yield its address."""
    server = ApiServer(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off"),
        leaving=app.state.event_streams.close,
    )
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        wait_for(lambda: server.started, 20, "the API serves")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


def weights_folder(
    folder: Path, *, layers: int = 4, vocabulary: int = VOCABULARY, **config: Any
) -> Path:
    """Write what the gateway reads of a folder of weights: config, tokenizer, an empty tensor
    file."""
    write_folder(folder)
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def write_prompts(path: Path, count: int = 60) -> Path:
    lines = [json.dumps({"prompt": f"What is the number {n}?"}) for n in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def posted_spec(files: Path, **changes: Any) -> dict[str, Any]:
    """A spec that is accepted: prompts and weights are written below `files`. `changes` replaces
    whole parts at the top."""
    if not (files / "prompts.jsonl").exists():
        write_prompts(files / "prompts.jsonl")
    if not (files / "weights").exists():
        weights_folder(files / "weights")
    spec: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "teachers": [
            {
                "name": "local",
                "url": "http://127.0.0.1:9/v1",
                "model": "m",
                "terms": "smollm2@self-hosted",
                "usd_per_million": {"input": 1, "output": 2},
                "reference": f"file:{files / 'weights'}",
            }
        ],
        "prompts": {"from": f"file:{files / 'prompts.jsonl'}", "heldout": 0.3, "batch": 8},
        "signal": {"kind": "topk", "k": 5, "max_tokens": 16},
        "student": {"layers": 2, "of": f"file:{files / 'weights'}", "terms": "own-weights"},
        "budget": {"teacher_usd": 1},
    }
    return copy.deepcopy(spec | changes)


def submit(api: Api, spec: dict[str, Any]) -> str:
    """Post a spec; return the pipeline's id."""

    async def post() -> httpx.Response:
        async with asgi_client(api) as client:
            return await client.post("/v1/pipelines", json=spec)

    answer = asyncio.run(post())
    assert answer.status_code == 202, answer.text
    return str(answer.json()["pipeline_id"])


def pipeline(api: Api, pipeline_id: str) -> Pipeline:
    with reading(api.engine) as session:
        found = session.get(Pipeline, pipeline_id)
    assert found is not None
    return found


def events(api: Api, pipeline_id: str) -> list[Envelope]:
    with reading(api.engine) as session:
        found = session.scalars(
            select(History.envelope)
            .where(History.pipeline_id == pipeline_id)
            .order_by(History.sequence)
        )
        return [Envelope.decode(envelope) for envelope in found]


_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.support.gateway", "tests.support.gateway_api"])


def check_in_process(
    tmp_path: Path, store: Store, tenant: str, spec: dict[str, Any], *, crash_at: str
) -> int:
    """Ask the teachers of a spec in another process, which is told where to die; return its
    status."""
    return _in_process(_check, tmp_path, store, tenant, spec, crash_at)


def accept_in_process(tmp_path: Path, store: Store, pipeline_id: str, *, crash_at: str) -> int:
    """Accept a pipeline in another process, which is told where to die; return its status."""
    return _in_process(_accept, tmp_path, store, pipeline_id, crash_at)


def _in_process(target: Callable[..., None], *args: Any) -> int:
    child = _processes.Process(target=target, args=args)
    child.start()
    child.join(120)
    if child.is_alive():
        child.kill()
        raise AssertionError("a job in a process of its own did not end within 120 s")
    return int(child.exitcode or 0)


def _check(tmp_path: Path, part: Store, tenant: str, spec: dict[str, Any], crash_at: str) -> None:
    os.environ["STILLHOUSE_CRASH_AT"] = crash_at
    settings = make_settings(tmp_path)
    engine = open_engine(settings.database_url)
    posted = Spec.model_validate(spec)
    catalogue = load_catalogue(settings.terms_file)
    found = survey(posted, tenant, settings, catalogue, store_of(part), engine, samples=8)
    preflight(posted, found, settings, engine, tenant)


def _accept(tmp_path: Path, part: Store, pipeline_id: str, crash_at: str) -> None:
    os.environ["STILLHOUSE_CRASH_AT"] = crash_at
    settings = make_settings(tmp_path)
    context = Context(
        engine=open_engine(settings.database_url),
        store=store_of(part),
        publisher=Publisher(GATEWAY, settings.broker_url),
        settings=settings,
        times=table(settings.profile),
    )
    accept_pipeline(context, pipeline_id)
