"""Acceptance: prompts in the store, rows in SQL, one event; repeated, interrupted, refused."""

from __future__ import annotations

import dataclasses
import io
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from sqlalchemy import func, select, update

from services.teacher_gateway import accept
from services.teacher_gateway.accept import MAX_ATTEMPTS, accept_pipeline
from services.teacher_gateway.database import reading, transaction
from services.teacher_gateway.models import Batch, Item, Outbox, Pipeline
from stillhouse.chassis.errors import StoreUnavailable
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.chat import ChatTokenizer
from stillhouse.contracts.events import PipelineAccepted
from stillhouse.contracts.responses import PROMPT_SCHEMA
from stillhouse.contracts.spec import ResolvedSpec
from tests.support.gateway_api import (
    Api,
    events,
    pipeline,
    posted_spec,
    submit,
    weights_folder,
)

Spec = dict[str, Any]


def resolved_of(api: Api, pipeline_id: str) -> ResolvedSpec:
    key = artifacts.spec_key(api.tenant, pipeline_id)
    found = api.gateway.store.find_model(key, ResolvedSpec)
    assert found is not None
    return found[0]


def items(api: Api, pipeline_id: str) -> list[Item]:
    with reading(api.engine) as session:
        query = select(Item).where(Item.pipeline_id == pipeline_id).order_by(Item.item_id)
        return list(session.scalars(query))


def batches(api: Api, pipeline_id: str) -> list[Batch]:
    with reading(api.engine) as session:
        query = select(Batch).where(Batch.pipeline_id == pipeline_id).order_by(Batch.batch)
        return list(session.scalars(query))


def check_accepted(api: Api, pipeline_id: str, expected_items: int) -> ResolvedSpec:
    """Everything that acceptance promises, whatever happened on the way."""
    resolved, found = resolved_of(api, pipeline_id), pipeline(api, pipeline_id)
    assert (found.state, found.next_attempt_at, found.attempts) == ("running", None, 0)
    assert found.items == resolved.items == expected_items
    assert found.batches == resolved.batches.total
    assert found.heldout_batches == resolved.batches.heldout
    assert found.dataset_id == resolved.dataset_id
    rows = batches(api, pipeline_id)
    assert [row.batch for row in rows] == list(range(resolved.batches.total))
    in_batches: dict[int, set[str]] = {}
    for item in items(api, pipeline_id):
        if item.batch is not None:
            assert item.outcome == "pending"
            in_batches.setdefault(item.batch, set()).add(item.item_id)
    assert sum(map(len, in_batches.values())) == expected_items
    for row in rows:
        assert row.split == resolved.batches.split_of(row.batch)
        table = pq.read_table(
            io.BytesIO(api.gateway.store.get(ObjectRef.model_validate_json(row.prompts)))
        )
        assert table.schema.equals(PROMPT_SCHEMA)
        assert set(table["item_id"].to_pylist()) == in_batches[row.batch]
        assert len(table) == row.items <= resolved.spec.prompts.batch
        assert len(set(table["prompt_id"].to_pylist())) == len(table)
    [event] = [e for e in events(api, pipeline_id) if e.type == "pipeline.accepted"]
    accepted = event.event()
    assert isinstance(accepted, PipelineAccepted)
    assert accepted.dataset_id == resolved.dataset_id
    assert api.gateway.store.get_model(accepted.spec, ResolvedSpec) == resolved
    chat = api.gateway.store.get_model(resolved.tokenizer, ChatTokenizer)
    assert chat.tokenizer_sha256 == resolved.tokenizer_sha256
    with reading(api.engine) as session:
        outbox = select(func.count()).select_from(Outbox).where(Outbox.pipeline_id == pipeline_id)
        assert session.execute(outbox).scalar_one() == 1
    return resolved


def test_an_accepted_pipeline_has_prompts_items_spec_and_event(api: Api) -> None:
    spec = posted_spec(api.files)
    spec["prompts"]["samples"] = 2
    with (api.files / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "what is the NUMBER 3?"}\nnot json\n{"prompt": " "}\n')
        file.write(json.dumps({"prompt": "x" * 10_000}) + "\n")
    pipeline_id = submit(api, spec)
    accept_pipeline(api.context(), pipeline_id)
    resolved = check_accepted(api, pipeline_id, 120)
    assert [v.subject for v in resolved.verdicts] == ["teacher:local", "prompts", "student"]
    assert resolved.rejected == 4
    refused = {item.item_id: item for item in items(api, pipeline_id) if item.batch is None}
    assert {name: item.reason for name, item in refused.items()} == {
        "line-61": "duplicate_prompt",
        "line-62": "invalid_prompt",
        "line-63": "blank_prompt",
        "line-64": "prompt_too_long",
    }
    assert {(i.outcome, i.stage) for i in refused.values()} == {("rejected", "accept")}
    accept_pipeline(api.context(), pipeline_id)
    check_accepted(api, pipeline_id, 120)


@pytest.mark.parametrize(
    "point", ["_write_prompts", "_put_tokenizer", "_put_spec", "_insert", "emit"]
)
@pytest.mark.parametrize("before", [True, False])
def test_an_acceptance_that_breaks_off_anywhere_is_gone_on_with(
    small: Api, monkeypatch: pytest.MonkeyPatch, point: str, before: bool
) -> None:
    with (small.files / "prompts.jsonl").open("w") as file:
        for n in range(60):
            file.write(json.dumps({"prompt": f"Question {n}"}) + "\n")
        file.write("nonsense\n")
    pipeline_id = submit(small, posted_spec(small.files))
    real = getattr(accept, point)

    class Killed(BaseException):
        """As a kill, it passes everything that catches exceptions."""

    def killed(*args: Any, **named: Any) -> Any:
        if not before:
            real(*args, **named)
        raise Killed

    monkeypatch.setattr(accept, point, killed)
    with pytest.raises(Killed):
        accept_pipeline(small.context(), pipeline_id)
    broken_off = pipeline(small, pipeline_id)
    assert (broken_off.state, broken_off.attempts) == ("accepting", 1)
    monkeypatch.setattr(accept, point, real)
    spec_there = small.gateway.store.exists(artifacts.spec_key(small.tenant, pipeline_id))
    if spec_there:
        # From now on the store decides; the inputs may even be gone.
        (small.files / "prompts.jsonl").unlink()
    accept_pipeline(small.context(), pipeline_id)
    check_accepted(small, pipeline_id, 60)
    refused = [item for item in items(small, pipeline_id) if item.batch is None]
    assert [item.item_id for item in refused] == ["line-61"]


def test_two_workers_accept_one_pipeline_once(api: Api) -> None:
    pipeline_id = submit(api, posted_spec(api.files))
    together = threading.Barrier(3)
    errors: list[BaseException] = []

    def run() -> None:
        together.wait()
        try:
            accept_pipeline(api.context(), pipeline_id)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    check_accepted(api, pipeline_id, 60)


def test_prompts_that_change_between_two_attempts_end_the_pipeline(
    small: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline_id = submit(small, posted_spec(small.files))

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(accept, "_put_tokenizer", killed)
    with pytest.raises(KeyboardInterrupt):
        accept_pipeline(small.context(), pipeline_id)
    monkeypatch.undo()
    text = (small.files / "prompts.jsonl").read_text()
    (small.files / "prompts.jsonl").write_text(text.replace("number", "figure"))
    accept_pipeline(small.context(), pipeline_id)
    found = pipeline(small, pipeline_id)
    assert found.state == "failed"
    assert "the prompts changed while" in found.reason


def test_an_uploaded_file_is_accepted_like_one_on_disk(
    client: httpx.Client, small: Api, store: ObjectStore
) -> None:
    spec = posted_spec(small.files)
    data = (small.files / "prompts.jsonl").read_bytes()
    digest = sha256_hex(data)
    first = client.put(f"/v1/uploads/{digest}", content=data)
    again = client.put(f"/v1/uploads/{digest}", content=iter([data[:100], data[100:]]))
    assert (first.status_code, again.status_code) == (201, 200)
    assert (
        first.json()
        == again.json()
        == {
            "sha256": digest,
            "size": len(data),
            "reference": f"upload:{digest}",
        }
    )
    spec["prompts"]["from"] = first.json()["reference"]
    pipeline_id = submit(small, spec)
    accept_pipeline(small.context(), pipeline_id)
    check_accepted(small, pipeline_id, 60)
    assert not list(small.gateway.settings.work_dir.glob("stillhouse-upload-*"))


def test_an_upload_that_is_not_what_it_says_is_refused(
    client: httpx.Client, small: Api, store: ObjectStore
) -> None:
    answer = client.put(f"/v1/uploads/{sha256_hex(b'one')}", content=b"another")
    assert answer.status_code == 422
    assert "send the whole file unchanged" in answer.json()["detail"]
    assert not store.exists(artifacts.upload_key(small.tenant, sha256_hex(b"one")))
    assert not list(small.gateway.settings.work_dir.glob("stillhouse-upload-*"))


def test_an_upload_belongs_to_its_tenant(client: httpx.Client, small: Api) -> None:
    from services.teacher_gateway.keys import create_key

    data = b'{"prompt": "a"}\n' * 3
    client.put(f"/v1/uploads/{sha256_hex(data)}", content=data)
    spec = posted_spec(small.files)
    spec["prompts"]["from"] = f"upload:{sha256_hex(data)}"
    stranger = create_key(small.engine, small.gateway.settings.key_pepper, "stranger")
    answer = client.post(
        "/v1/pipelines", json=spec, headers={"Authorization": f"Bearer {stranger}"}
    )
    assert answer.status_code == 422
    assert "nothing was uploaded" in answer.json()["detail"]


def break_prompts(files: Path) -> None:
    (files / "prompts.jsonl").write_text("nonsense\n" * 3)


def break_split(files: Path) -> None:
    (files / "prompts.jsonl").write_text('{"prompt": "only one"}\n')


def break_file(files: Path) -> None:
    (files / "prompts.jsonl").unlink()


def break_tokenizer(files: Path) -> None:
    (files / "weights" / "tokenizer.json").write_text("{}")


def break_weights(files: Path) -> None:
    (files / "weights" / "model.safetensors").unlink()


def mismatch(files: Path) -> None:
    other = weights_folder(files / "other")
    values = json.loads((other / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {"A": 66, "B": 65}
    (files / "weights" / "tokenizer.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("broken", "reason", "said"),
    [
        (break_prompts, "no_prompts", "has 3 lines, none a prompt; line 1: it is not JSON"),
        (break_split, "split_empty", "give more prompts, or raise `prompts.heldout`"),
        (break_file, "refused", "does not exist"),
        (break_tokenizer, "tokenizer_refused", "cannot be used"),
        (break_weights, "model_weights_refused", "no *.safetensors"),
        (mismatch, "tokenizer_mismatch", "is not the teacher's"),
    ],
)
def test_what_cannot_be_accepted_ends_as_failed_with_the_reason(
    client: httpx.Client, small: Api, broken: Any, reason: str, said: str
) -> None:
    spec = posted_spec(small.files)
    if broken is mismatch:
        weights_folder(small.files / "other")
        spec["teachers"][0]["reference"] = f"file:{small.files / 'other'}"
    pipeline_id = submit(small, spec)
    broken(small.files)
    accept_pipeline(small.context(), pipeline_id)
    view = client.get(f"/v1/pipelines/{pipeline_id}").json()
    assert view["state"] == "failed"
    assert view["reason"].startswith(f"{reason}: ")
    assert said in view["reason"]
    assert view["ended_at"] is not None
    assert {stage["state"] for stage in view["stages"].values()} == {"failed"}
    told = client.get(f"/v1/pipelines/{pipeline_id}/events").json()["items"]
    assert [event["type"] for event in told] == ["stage.failed"]
    assert told[0]["payload"]["fatal"] is True
    assert not small.gateway.store.exists(artifacts.stopped_key(small.tenant, pipeline_id))
    accept_pipeline(small.context(), pipeline_id)
    assert len(events(small, pipeline_id)) == 1


def test_terms_that_were_withdrawn_meanwhile_end_the_pipeline(small: Api, tmp_path: Path) -> None:
    pipeline_id = submit(small, posted_spec(small.files))
    own = tmp_path / "terms.yaml"
    own.write_text(
        "version: 1\nentries:\n- id: smollm2@self-hosted\n  for: [teacher]\n  source: a letter\n"
        "  as_of: today\n  evidence: primary\n  rules: [{outcome: deny, reason: withdrawn}]\n"
    )
    context = small.context()
    told = context.settings.model_copy(update={"terms_file": own})
    accept_pipeline(dataclasses.replace(context, settings=told), pipeline_id)
    found = pipeline(small, pipeline_id)
    assert (found.state, found.reason) == ("failed", "terms_denied: withdrawn")


def test_a_store_that_is_away_puts_acceptance_off_without_counting(small: Api) -> None:
    pipeline_id = submit(small, posted_spec(small.files))
    away = ObjectStore(
        bucket="b",
        endpoint_url="http://127.0.0.1:1",
        access_key="a",
        secret_key="s",
        connect_timeout=1,
        attempts=1,
    )
    for _ in range(MAX_ATTEMPTS + 1):
        with pytest.raises(StoreUnavailable):
            accept_pipeline(dataclasses.replace(small.context(), store=away), pipeline_id)
    found = pipeline(small, pipeline_id)
    assert (found.state, found.attempts) == ("accepting", 0)
    assert found.next_attempt_at is not None
    accept_pipeline(small.context(), pipeline_id)
    check_accepted(small, pipeline_id, 60)


def test_an_acceptance_that_kills_its_worker_again_and_again_is_given_up(small: Api) -> None:
    pipeline_id = submit(small, posted_spec(small.files))
    with transaction(small.engine) as session:
        session.execute(update(Pipeline).values(attempts=MAX_ATTEMPTS))
    accept_pipeline(small.context(), pipeline_id)
    found = pipeline(small, pipeline_id)
    assert found.state == "failed"
    assert found.reason.startswith("acceptance_failed: acceptance broke off 8 times")


def test_a_pipeline_cancelled_during_acceptance_stays_cancelled(
    small: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.teacher_gateway.stop import cancel_pipeline

    pipeline_id = submit(small, posted_spec(small.files))
    real = accept._put_spec

    def cancelling(*args: Any) -> Any:
        cancel_pipeline(small.engine, small.gateway.store, pipeline_id, "cancelled by test")
        return real(*args)

    monkeypatch.setattr(accept, "_put_spec", cancelling)
    accept_pipeline(small.context(), pipeline_id)
    assert pipeline(small, pipeline_id).state == "cancelled"
    assert "pipeline.accepted" not in [event.type for event in events(small, pipeline_id)]
