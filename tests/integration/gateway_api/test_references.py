"""Acceptance of specs whose weights and prompts lie in a bucket or on the hub."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from services.teacher_gateway import accept
from services.teacher_gateway.accept import MAX_ATTEMPTS, accept_pipeline
from services.teacher_gateway.database import transaction
from services.teacher_gateway.ledger import lock
from stillhouse.chassis import download
from stillhouse.chassis.hub import HubUnavailable
from stillhouse.chassis.references import pin_of
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.chat import ChatTokenizer
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.embedded.parts import Store
from tests.support.gateway_api import (
    Api,
    asgi_client,
    gateway_api,
    pipeline,
    posted_spec,
    submit,
    weights_folder,
    write_prompts,
)
from tests.support.hub import REFERENCE, FakeHub, serving_hub
from tests.support.references import Bucket, weights_bucket
from tests.support.tiny_tokenizer import tiny_chat_tokenizer
from tests.support.waiting import wait_for


@pytest.fixture
def bucket(store_part: Store, tmp_path: Path) -> Iterator[Bucket]:
    with weights_bucket(store_part, tmp_path / "cache") as found:
        found.put_folder(weights_folder(tmp_path / "weights"))
        found.put({"prompts.jsonl": write_prompts(tmp_path / "prompts.jsonl").read_bytes()})
        yield found


@pytest.fixture
def api(bucket: Bucket, store: ObjectStore, tenant: str, tmp_path: Path) -> Iterator[Api]:
    told = {name.upper(): str(value) for name, value in bucket.settings().items()}
    with gateway_api(tmp_path, store, tenant, **told) as found:
        yield found


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = weights_folder(tmp_path / "on-the-hub")
    monkeypatch.setattr(download, "_PAUSE", 0.001)
    with serving_hub({path.name: path.read_bytes() for path in folder.iterdir()}) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


def resolved_of(api: Api, pipeline_id: str) -> ResolvedSpec:
    found = api.gateway.store.find_model(artifacts.spec_key(api.tenant, pipeline_id), ResolvedSpec)
    assert found is not None, pipeline(api, pipeline_id).reason
    return found[0]


def spec_of(api: Api, weights: str, prompts: str | None = None) -> dict[str, Any]:
    spec = posted_spec(api.files)
    spec["student"] |= {"of": weights}
    spec["teachers"][0]["reference"] = weights
    if prompts is not None:
        spec["prompts"]["from"] = prompts
    return spec


def test_a_bucket_gives_weights_and_prompts_and_its_content_is_pinned(
    api: Api, bucket: Bucket
) -> None:
    spec = spec_of(api, bucket.reference, f"{bucket.reference}/prompts.jsonl")
    pipeline_id = submit(api, spec)
    accept_pipeline(api.context(), pipeline_id)
    resolved = resolved_of(api, pipeline_id)
    assert resolved.items == 60
    assert resolved.pinned == {bucket.reference: pin_of(bucket.reference, bucket.sources())}
    tokenizer = api.gateway.store.get_model(resolved.tokenizer, ChatTokenizer)
    assert tokenizer.chat_template == tiny_chat_tokenizer().chat_template
    assert not list(bucket.cache.glob("*/*.safetensors")), "acceptance fetches no weights"


def test_prompts_that_are_not_in_the_bucket_are_refused_at_once(api: Api, bucket: Bucket) -> None:
    async def post(prompts: str) -> tuple[int, str]:
        async with asgi_client(api) as client:
            spec = spec_of(api, bucket.reference, prompts)
            answer = await client.post("/v1/pipelines", json=spec)
            return answer.status_code, answer.json()["detail"]

    status, said = asyncio.run(post(f"{bucket.reference}/none.jsonl"))
    assert (status, "does not exist" in said) == (422, True)
    status, said = asyncio.run(post(f"s3://{bucket.part.bucket}/tenants/other/prompts.jsonl"))
    assert (status, "TEACHER_GATEWAY_S3_BUCKETS" in said) == (422, True)


def test_the_hub_gives_the_tokenizer_of_a_commit(api: Api, hub: FakeHub) -> None:
    pipeline_id = submit(api, spec_of(api, REFERENCE))
    accept_pipeline(api.context(), pipeline_id)
    resolved = resolved_of(api, pipeline_id)
    assert resolved.spec.student.of == REFERENCE
    assert resolved.pinned == {}, "a commit names itself"
    assert {name for name, _ in hub.asked} == {
        *("config.json", "tokenizer.json", "tokenizer_config.json")
    }


def test_an_acceptance_that_waits_for_a_slow_hub_is_seen_to_live(
    api: Api, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the clock would give it to another worker, which would fetch the same."""
    monkeypatch.setattr(accept, "_BEAT_SECONDS", 0)
    hub.files["tokenizer.json"] += b" " * (1 << 15)  # more than the hub sends before it waits
    held = hub.held["tokenizer.json"] = threading.Event()
    pipeline_id = submit(api, spec_of(api, REFERENCE))
    with ThreadPoolExecutor(1) as worker:
        accepting = worker.submit(accept_pipeline, api.context(), pipeline_id)
        try:
            wait_for(lambda: hub.times("tokenizer.json"), 60, "the tokenizer on its way")
            due = pipeline(api, pipeline_id).next_attempt_at
            assert due is not None
            wait_for(
                lambda: pipeline(api, pipeline_id).next_attempt_at,
                60,
                "a beat of the acceptance",
                until=lambda later: later is not None and later > due,
            )
        finally:
            held.set()
        accepting.result(60)
    assert pipeline(api, pipeline_id).state == "running"


def test_a_fetch_ends_when_its_pipeline_is_cancelled(
    api: Api, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accept, "_BEAT_SECONDS", 0)
    pipeline_id = submit(api, spec_of(api, REFERENCE))
    fetch = download.Download.fetch

    def cancelled(self: download.Download, files: Any) -> dict[str, str]:
        with transaction(api.gateway.engine) as session:
            held = lock(session, pipeline_id)
            assert held is not None
            held.stopping = "cancelled"
        return fetch(self, files)

    monkeypatch.setattr(download.Download, "fetch", cancelled)
    accept_pipeline(api.context(), pipeline_id)
    assert {name for name, _ in hub.asked} == {"config.json"}
    assert pipeline(api, pipeline_id).state == "accepting"


def test_a_hub_that_stays_away_fails_the_pipeline_in_the_end(api: Api, hub: FakeHub) -> None:
    hub.status = 503
    pipeline_id = submit(api, spec_of(api, REFERENCE))
    for attempt in range(MAX_ATTEMPTS - 1):
        with pytest.raises(HubUnavailable):
            accept_pipeline(api.context(), pipeline_id)
        assert pipeline(api, pipeline_id).attempts == attempt + 1
    accept_pipeline(api.context(), pipeline_id)
    found = pipeline(api, pipeline_id)
    assert found.state == "failed"
    assert found.reason.startswith("hub_away: the hub at http://127.0.0.1")


def test_a_hub_that_comes_back_costs_nothing(api: Api, hub: FakeHub) -> None:
    hub.status = 503
    pipeline_id = submit(api, spec_of(api, REFERENCE))
    with pytest.raises(HubUnavailable):
        accept_pipeline(api.context(), pipeline_id)
    hub.status = None
    accept_pipeline(api.context(), pipeline_id)
    assert pipeline(api, pipeline_id).state == "running"
