"""Events, rejections, charges, samples, reports and students as the API tells them."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from sqlalchemy import delete

from services.teacher_gateway.accept import accept_pipeline
from services.teacher_gateway.database import transaction
from services.teacher_gateway.ledger import lock
from services.teacher_gateway.models import Charge, History, Item
from services.teacher_gateway.outbox import record
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.envelope import seal
from stillhouse.contracts.events import (
    CheckpointEvaluated,
    Event,
    StudentEvaluated,
    StudentReleased,
    StudentWithheld,
)
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import Figures, Release, Report, SamplePair, StudentManifest
from tests.support.gateway_api import Api, posted_spec
from tests.support.shards import make_shard, shard_written

WEIGHTS = bytes(range(256)) * 10_000


class Scene:
    """An accepted pipeline whose other services are played by the test."""

    def __init__(self, api: Api, client: httpx.Client) -> None:
        self.api, self.client = api, client
        answer = client.post("/v1/pipelines", json=posted_spec(api.files))
        self.pipeline_id = answer.json()["pipeline_id"]
        accept_pipeline(api.context(), self.pipeline_id)
        found = api.gateway.store.find_model(
            artifacts.spec_key(api.tenant, self.pipeline_id), ResolvedSpec
        )
        assert found is not None
        self.resolved = found[0]
        self.store: ObjectStore = api.gateway.store

    def get(self, path: str = "", **query: str | int) -> httpx.Response:
        return self.client.get(f"/v1/pipelines/{self.pipeline_id}{path}", params=query)

    def happened(self, event: Event) -> None:
        envelope = seal(event, tenant_id=self.api.tenant, pipeline_id=self.pipeline_id)
        with transaction(self.api.engine) as session:
            pipeline = lock(session, self.pipeline_id)
            assert pipeline is not None
            record(session, pipeline, envelope)

    def report(self, step: int, split: str, kl: float) -> ObjectRef:
        resolved = self.resolved
        model = Report.model_validate(
            {
                "training_id": resolved.training_id,
                "step": step,
                "split": split,
                "checkpoint": ObjectRef(key="k", size=1, sha256="0" * 64),
                "heldout_sha256": "0" * 64,
                "teacher": Figures(kl_top20=0.01, rows=8, tokens=90),
                "model": Figures(kl_top20=kl, rows=8, tokens=90),
                "untrained": Figures(kl_top20=9.0, rows=8, tokens=90),
                "samples": [SamplePair(prompt="p", teacher="t", student="s")],
            }
        )
        if split == "test":
            key = artifacts.student_file_key(self.api.tenant, resolved.student_id, "report.json")
        else:
            key = artifacts.report_key(self.api.tenant, resolved.training_id, step)
        return self.store.put_new_model(key, model)

    def checkpoint(self, step: int, kl: float) -> None:
        self.happened(
            CheckpointEvaluated(
                training_id=self.resolved.training_id,
                step=step,
                report=self.report(step, "validation", kl),
            )
        )

    def student(self, said: bytes = WEIGHTS) -> None:
        tenant, student = self.api.tenant, self.resolved.student_id
        files = {"model.safetensors": said, "config.json": b"{}", "empty.txt": b""}
        refs = {
            name: self.store.put_new(artifacts.student_file_key(tenant, student, name), data)
            for name, data in files.items()
        }
        manifest = StudentManifest(
            tenant_id=tenant,
            pipeline_id=self.pipeline_id,
            student_id=student,
            training_id=self.resolved.training_id,
            step=12,
            files=refs,
        )
        self.happened(
            StudentEvaluated(
                student_id=student,
                training_id=self.resolved.training_id,
                step=12,
                manifest=self.store.put_new_model(
                    artifacts.student_manifest_key(tenant, student), manifest
                ),
                report=self.report(12, "test", 0.5),
            )
        )

    def release(self, outcome: str, *reasons: str) -> None:
        release = Release.model_validate(
            {
                "tenant_id": self.api.tenant,
                "pipeline_id": self.pipeline_id,
                "student_id": self.resolved.student_id,
                "outcome": outcome,
                "reasons": list(reasons),
                "duties": [],
                "decided_at": "2000-01-01T00:00:00Z",
            }
        )
        key = artifacts.release_key(self.api.tenant, self.resolved.student_id)
        kind = StudentReleased if outcome == "released" else StudentWithheld
        ref = self.store.put_new_model(key, release)
        self.happened(kind(student_id=self.resolved.student_id, release=ref))


@pytest.fixture
def scene(small: Api, client: httpx.Client) -> Scene:
    return Scene(small, client)


def test_events_have_a_sequence_of_their_own_and_pages(scene: Scene) -> None:
    for step in (0, 4, 8):
        scene.checkpoint(step, 1.0)
    first = scene.get("/events", limit=3).json()
    assert [e["sequence"] for e in first["items"]] == [1, 2, 3]
    assert [e["type"] for e in first["items"]][:2] == ["pipeline.accepted", "checkpoint.evaluated"]
    assert first["items"][1]["payload"]["step"] == 0
    rest = scene.get("/events", after=first["next"]).json()
    assert ([e["sequence"] for e in rest["items"]], rest["next"]) == ([4], None)
    assert scene.get("/events", after=4).json() == {"items": [], "next": None}


def test_rejections_are_counted_filtered_and_paged(scene: Scene) -> None:
    with transaction(scene.api.engine) as session:
        session.execute(delete(Item))
        for n in range(7):
            session.add(
                Item(
                    pipeline_id=scene.pipeline_id,
                    item_id=f"pr-{n}-0",
                    tenant_id=scene.api.tenant,
                    batch=n,
                    outcome="row" if n == 6 else "rejected",
                    stage="" if n == 6 else "collect",
                    reason="" if n == 6 else "teacher_error" if n % 2 else "teacher_timeout",
                    detail="it broke",
                )
            )
    whole = scene.get("/rejections").json()
    assert whole["counts"] == {"teacher_error": 3, "teacher_timeout": 3}
    assert [r["item_id"] for r in whole["items"]] == [f"pr-{n}-0" for n in range(6)]
    page = scene.get("/rejections", reason="teacher_error", limit=2).json()
    assert [r["item_id"] for r in page["items"]] == ["pr-1-0", "pr-3-0"]
    rest = scene.get("/rejections", reason="teacher_error", after=page["next"]).json()
    assert ([r["item_id"] for r in rest["items"]], rest["next"]) == (["pr-5-0"], None)
    view = scene.get().json()
    assert (view["items"], view["rows"], view["pending"]) == (7, 1, 0)
    assert view["rejections"] == whole["counts"]


def test_charges_are_the_ledgers_lines_in_order(scene: Scene) -> None:
    with transaction(scene.api.engine) as session:
        for n in range(5):
            session.add(
                Charge(
                    pipeline_id=scene.pipeline_id,
                    charge_id=f"answers:{4 - n}:1",
                    tenant_id=scene.api.tenant,
                    kind="answers" if n else "probe",
                    batch=4 - n,
                    attempt=1,
                    answers=8,
                    microusd=10 + n,
                    booked_at=1000.0 + n // 2,
                )
            )
    page = scene.get("/charges", limit=3).json()
    rest = scene.get("/charges", after=page["next"], limit=3).json()
    names = [charge["charge_id"] for charge in page["items"] + rest["items"]]
    assert names == [f"answers:{n}:1" for n in (3, 4, 1, 2, 0)]
    assert page["totals_microusd"] == {"answers": 50, "probe": 10}
    assert page["cost"]["budget_microusd"] == 1_000_000
    assert scene.get("/charges", after="answers:99:1").status_code == 422


def test_samples_are_rows_of_the_shards(scene: Scene) -> None:
    assert scene.get("/samples").json() == {"items": []}
    resolved = scene.resolved
    last = resolved.batches.total - 1
    for batch in (last, 0):
        envelope = shard_written(resolved, make_shard(scene.store, resolved, batch))
        scene.happened(envelope.event())
    found = scene.get("/samples", limit=10).json()["items"]
    assert [row["batch"] for row in found] == [0] * 8 + [last] * 2
    assert found[0]["split"] == "validation"
    assert found[0]["messages"][-1]["role"] == "user"
    assert found[0]["answer"]
    assert found[0]["supervised_tokens"] > 0
    train = scene.get("/samples", split="train", limit=3).json()["items"]
    assert [(row["split"], row["batch"]) for row in train] == [("train", last)] * 3


def test_the_report_is_the_newest_checkpoints_until_the_student_has_one(scene: Scene) -> None:
    none = scene.get("/report")
    assert (none.status_code, none.json()["type"]) == (404, "urn:stillhouse:problem:no-report")
    scene.checkpoint(0, 9.0)
    scene.checkpoint(8, 2.0)
    scene.checkpoint(4, 4.0)
    running = scene.get("/report").json()
    assert (running["of"], running["step"], running["split"]) == ("checkpoint", 8, "validation")
    assert [(c["step"], c["model"]["kl_top20"]) for c in running["checkpoints"]] == [
        (0, 9.0),
        (4, 4.0),
        (8, 2.0),
    ]
    scene.student()
    final = scene.get("/report").json()
    assert (final["of"], final["split"], final["model"]["kl_top20"]) == ("student", "test", 0.5)
    assert final["samples"][0]["student"] == "s"
    assert len(final["checkpoints"]) == 3


def test_a_students_files_are_given_out_once_it_is_released(scene: Scene) -> None:
    assert scene.get("/student").json()["type"] == "urn:stillhouse:problem:no-student"
    scene.student()
    waiting = scene.get("/student").json()
    assert waiting["release"] is None
    early = scene.get("/student/files/config.json")
    assert (early.status_code, "not decided upon" in early.json()["detail"]) == (409, True)
    scene.release("released")
    student = scene.get("/student").json()
    assert student["student_id"] == scene.resolved.student_id
    assert student["release"]["outcome"] == "released"
    assert student["files"]["model.safetensors"]["size"] == len(WEIGHTS)
    whole = scene.get("/student/files/model.safetensors")
    assert (whole.status_code, whole.content == WEIGHTS) == (200, True)
    assert whole.headers["etag"] == f'"{student["files"]["model.safetensors"]["sha256"]}"'
    assert scene.get("/student/files/empty.txt").content == b""
    missing = scene.get("/student/files/passwd")
    assert (missing.status_code, "model.safetensors" in missing.json()["detail"]) == (404, True)


def test_a_broken_fetch_goes_on_where_it_ended(scene: Scene) -> None:
    scene.student()
    scene.release("released")
    url = f"/v1/pipelines/{scene.pipeline_id}/student/files/model.safetensors"
    size = len(WEIGHTS)
    cases = {
        "bytes=0-": (200, WEIGHTS),
        f"bytes={size - 5}-": (206, WEIGHTS[-5:]),
        "bytes=1048570-1048600": (206, WEIGHTS[1048570:1048601]),
        f"bytes=10-{size * 2}": (206, WEIGHTS[10:]),
        "bytes=-5": (200, WEIGHTS),
        "nonsense": (200, WEIGHTS),
    }
    for asked, (status, data) in cases.items():
        answer = scene.client.get(url, headers={"Range": asked})
        assert (answer.status_code, answer.content == data) == (status, True), asked
    beyond = scene.client.get(url, headers={"Range": f"bytes={size}-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")


def test_a_withheld_student_is_not_given_out(scene: Scene) -> None:
    scene.student()
    scene.release("withheld", "terms revoked")
    answer = scene.get("/student/files/config.json")
    assert answer.status_code == 409
    assert "was withheld: terms revoked" in answer.json()["detail"]
    assert scene.get("/student").json()["release"]["reasons"] == ["terms revoked"]


def test_a_damaged_file_breaks_off_instead_of_passing_for_whole(scene: Scene) -> None:
    scene.student()
    scene.release("released")
    key = artifacts.student_file_key(
        scene.api.tenant, scene.resolved.student_id, "model.safetensors"
    )
    scene.store.delete(key)
    absent = scene.get("/student/files/model.safetensors")
    assert absent.status_code == 500
    scene.store.put_new(key, WEIGHTS[:-1] + b"x")
    with pytest.raises(httpx.RemoteProtocolError):
        scene.get("/student/files/model.safetensors")


def test_the_client_pulls_a_student_through_the_api_alone(scene: Scene, tmp_path: Path) -> None:
    from stillhouse.cli.client import Client

    scene.student()
    scene.release("released")
    with Client(str(scene.client.base_url), scene.api.key) as client:
        folder = client.pull(scene.pipeline_id, tmp_path / "student")
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
        assert [e["type"] for e in client.events(scene.pipeline_id)][-1] == "student.released"
        assert client.status(scene.pipeline_id)["stages"]["train"]["state"] == "waiting"
        assert [p["pipeline_id"] for p in client.pipelines()] == [scene.pipeline_id]
        assert client.report(scene.pipeline_id)["model"]["kl_top20"] == 0.5


def test_events_of_another_version_are_shown_as_they_came(scene: Scene) -> None:
    with transaction(scene.api.engine) as session:
        [entry] = session.query(History).all()
        entry.envelope = entry.envelope.replace('"version":1', '"version":9')
    [event] = scene.get("/events").json()["items"]
    assert event["version"] == 9
