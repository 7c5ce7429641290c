"""The Python client and the command line against the real API: its routes, store and database."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.teacher_gateway.database import transaction
from services.teacher_gateway.models import History, Pipeline
from stillhouse.chassis.storage import ObjectStore
from stillhouse.cli import main as command_line
from stillhouse.cli.client import Client, StillhouseApiError, new_key
from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.envelope import seal
from stillhouse.contracts.events import Event, StudentEvaluated, StudentReleased
from stillhouse.contracts.trainings import Release, StudentManifest
from tests.support.gateway_api import Api, gateway_api, posted_spec, serving, write_prompts
from tests.support.teacher import Fault, running_teacher

FILES = {"model.safetensors": bytes(range(256)) * 20_000, "config.json": b"{}", "README.md": b"#"}


@pytest.fixture
def api(tmp_path: Path, store: ObjectStore, tenant: str) -> Iterator[Api]:
    with gateway_api(tmp_path, store, tenant) as found:
        yield found


@pytest.fixture
def url(api: Api) -> Iterator[str]:
    with serving(api.app) as found:
        yield found


@pytest.fixture
def client(api: Api, url: str) -> Iterator[Client]:
    with Client(url, api.key) as found:
        yield found


def test_a_spec_is_checked_without_creating_a_pipeline(api: Api, client: Client) -> None:
    found = client.check(posted_spec(api.files))

    assert found["prompts"]["items"] == 60
    assert list(client.pipelines()) == []


def test_the_same_spec_is_the_same_pipeline_until_a_new_one_is_wanted(
    api: Api, client: Client
) -> None:
    spec = posted_spec(api.files)
    first, again = client.submit(spec), client.submit(spec)
    other = client.submit(spec, idempotency_key=new_key())

    assert first == again
    assert first["pipeline_id"] != other["pipeline_id"]
    assert client.status(first["pipeline_id"])["state"] == "accepting"


def test_all_pages_of_pipelines_come_newest_first(api: Api, client: Client) -> None:
    spec = posted_spec(api.files)
    made = [client.submit(spec, idempotency_key=new_key())["pipeline_id"] for _ in range(5)]

    assert [p["pipeline_id"] for p in client.pipelines()] == made[::-1]
    assert [p["pipeline_id"] for p in client.pipelines(limit=2)] == made[:2:-1]


def test_an_upload_is_what_a_spec_can_name(api: Api, client: Client, tmp_path: Path) -> None:
    reference = client.upload(write_prompts(tmp_path / "mine.jsonl", 40))
    spec = posted_spec(api.files)
    spec["prompts"]["from"] = reference

    assert client.check(spec)["prompts"]["prompts"] == 40


def test_a_mistake_is_told_by_field(api: Api, client: Client) -> None:
    spec = posted_spec(api.files, budget={}, signal={"kind": "topk", "k": 5000})

    with pytest.raises(StillhouseApiError) as caught:
        client.check(spec)

    assert "2 mistakes" in str(caught.value)
    assert "budget.teacher_usd" in str(caught.value)
    assert "signal.k" in str(caught.value)


def test_a_cancelled_pipeline_says_so(api: Api, client: Client) -> None:
    pipeline_id = client.submit(posted_spec(api.files))["pipeline_id"]
    client.cancel(pipeline_id)

    found = client.status(pipeline_id)
    assert "cancelled" in (found["state"], found["stopping"])


def test_a_wrong_key_is_refused_with_what_to_do(url: str) -> None:
    with Client(url, "sth_wrong_key") as client, pytest.raises(StillhouseApiError) as caught:
        client.status("pl-1")

    assert caught.value.status == 401
    assert "keys create" in str(caught.value)


def test_events_are_read_over_pages_and_from_a_place(api: Api, client: Client) -> None:
    pipeline_id = client.submit(posted_spec(api.files))["pipeline_id"]
    for number in range(450):
        record(api, pipeline_id, number + 1, released(number))

    assert [e["sequence"] for e in client.events(pipeline_id)] == list(range(1, 451))
    assert [e["sequence"] for e in client.events(pipeline_id, after=440)] == list(range(441, 451))


def test_a_released_student_is_pulled_whole_and_a_broken_pull_goes_on(
    api: Api, client: Client, tmp_path: Path
) -> None:
    pipeline_id = client.submit(posted_spec(api.files))["pipeline_id"]
    store_student(api, pipeline_id)
    name = "model.safetensors"
    left_behind = tmp_path / ".student.st-1.partial"
    left_behind.mkdir()
    (left_behind / name).write_bytes(FILES[name][:3_000_000])
    progress: list[tuple[str, int]] = []

    folder = client.pull(
        pipeline_id,
        tmp_path / "student",
        progress=lambda n, done, _size: progress.append((n, done)),
    )

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert min(done for n, done in progress if n == name) > 3_000_000


def test_the_command_line_submits_and_shows_it(
    api: Api,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STILLHOUSE_URL", url)
    monkeypatch.setenv("STILLHOUSE_API_KEY", api.key)
    # Below no root of the gateway: only an upload can bring it there.
    write_prompts(tmp_path / "mine.jsonl")
    spec = posted_spec(api.files)
    spec["prompts"]["from"] = "file:mine.jsonl"
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))

    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["stillhouse", *words])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        assert ended.value.code in (0, None), capsys.readouterr().err
        return capsys.readouterr().out

    assert "tiny: this spec can be submitted" in run("check", str(tmp_path / "spec.yaml"))
    pipeline_id = run("submit", str(tmp_path / "spec.yaml")).strip()
    assert f"{pipeline_id} (tiny): accepting" in run("status", pipeline_id)
    assert pipeline_id in run("status")
    assert run("events", pipeline_id) == ""
    assert run("rejections", pipeline_id) == "nothing was rejected\n"
    assert run("samples", pipeline_id) == "no rows yet\n"


def test_check_with_probe_shows_what_the_teachers_said(
    api: Api,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STILLHOUSE_URL", url)
    monkeypatch.setenv("STILLHOUSE_API_KEY", api.key)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["stillhouse", *words])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    with running_teacher(tmp_path / "invoices.jsonl") as teacher:
        spec = posted_spec(api.files)
        spec["teachers"][0] |= {"url": teacher.url, "model": teacher.model}
        file = tmp_path / "spec.yaml"
        file.write_text(json.dumps(spec))

        status, out, _ = run("check", str(file), "--probe")
        assert status == 0
        lines = out.splitlines()
        heading = next(line for line in lines if line.startswith("teacher "))
        assert heading.split() == ["teacher", "finding", "value", "verdict"]
        assert any(
            line.startswith("local") and "raw logprobs" in line and line.endswith("  ok")
            for line in lines
        )
        # Answers of 16 tokens are cut.
        assert any(line.startswith("warning: `signal.max_tokens`:") for line in lines)

        status, out, _ = run("check", str(file), "--probe", "--json")
        assert status == 0
        assert json.loads(out)["preflight"]["teachers"][0]["k"] == 5

        teacher.script(Fault("missing_logprobs"))
        status, _, err = run("check", str(file), "--probe")
        assert (status, "use `signal.kind: text`" in err) == (1, True)


def released(number: int) -> StudentReleased:
    ref = ObjectRef(key=f"release-{number}", size=1, sha256="0" * 64)
    return StudentReleased(student_id="st-1", release=ref)


def record(api: Api, pipeline_id: str, sequence: int, event: Event) -> None:
    """Put an event into the history, as the gateway does when it comes."""
    envelope = seal(event, tenant_id=api.tenant, pipeline_id=pipeline_id)
    with transaction(api.engine) as session:
        session.add(
            History(
                pipeline_id=pipeline_id,
                sequence=sequence,
                tenant_id=api.tenant,
                event_id=envelope.event_id,
                type=envelope.type,
                envelope=envelope.encode().decode(),
                recorded_at=0.0,
            )
        )


def store_student(api: Api, pipeline_id: str) -> None:
    """Put a released student where the evaluator and the gateway would."""
    store, tenant = api.gateway.store, api.tenant
    files = {
        name: store.put_new(artifacts.student_file_key(tenant, "st-1", name), data)
        for name, data in FILES.items()
    }
    assert files["config.json"].sha256 == hashlib.sha256(b"{}").hexdigest()
    ids = {"tenant_id": tenant, "pipeline_id": pipeline_id, "student_id": "st-1"}
    manifest = StudentManifest(**ids, training_id="tr-1", step=3, files=files)
    stored = store.put_new(
        artifacts.student_manifest_key(tenant, "st-1"), manifest.model_dump_json().encode()
    )
    release = Release(**ids, outcome="released", reasons=[], duties=[], decided_at="2026-01-01")
    decision = store.put_new(
        artifacts.release_key(tenant, "st-1"), release.model_dump_json().encode()
    )
    evaluated = StudentEvaluated(
        student_id="st-1", training_id="tr-1", step=3, manifest=stored, report=stored
    )
    record(api, pipeline_id, 1, evaluated)
    record(api, pipeline_id, 2, StudentReleased(student_id="st-1", release=decision))
    with transaction(api.engine) as session:
        pipeline = session.get(Pipeline, pipeline_id)
        assert pipeline is not None
        pipeline.state = "released"
