"""What a pipeline left behind in the store: sample rows, reports, the student's folder.

Objects are found through the events that named them, never by listing.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

import pyarrow.parquet as pq
from fastapi import APIRouter, Header, Path, Query
from fastapi.responses import StreamingResponse
from sqlalchemy import select

from services.teacher_gateway.database import Session, reading
from services.teacher_gateway.keys import Caller
from services.teacher_gateway.models import History, Pipeline
from services.teacher_gateway.problems import ProblemError, responses
from services.teacher_gateway.routes.parts import Gateway, Parts, PipelineId, Who, owned
from services.teacher_gateway.schemas import (
    CheckpointFigures,
    FileView,
    ReportView,
    Samples,
    SampleView,
    StudentView,
)
from stillhouse.chassis.errors import DigestMismatch, MissingObject
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import (
    CheckpointEvaluated,
    Event,
    ShardWritten,
    Split,
    StudentEvaluated,
    StudentReleased,
    StudentWithheld,
)
from stillhouse.contracts.trainings import Release, Report, StudentManifest

router = APIRouter(prefix="/v1/pipelines/{pipeline_id}", tags=["results"])

REPORTS_LISTED = 100
_COLUMNS = [name for name in SampleView.model_fields if name not in ("batch", "split")]
_RANGE = re.compile(r"^bytes=(\d{1,18})-(\d{0,18})$")
E = TypeVar("E", bound=Event)


@router.get("/samples", response_model=Samples, responses=responses(400, 401, 404, 422, 503))
def list_samples(
    pipeline_id: PipelineId,
    who: Who,
    parts: Parts,
    split: Annotated[Split | None, Query(description="only rows of this split")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="most rows")] = 10,
) -> Samples:
    """Read rows of the dataset, in the order of their shards."""
    with reading(parts.engine) as session:
        owned(session, who, pipeline_id)
        shards = sorted(_events(session, pipeline_id, ShardWritten), key=lambda event: event.batch)
    found: list[SampleView] = []
    for shard in shards:
        if len(found) == limit:
            break
        if shard.rows and split in (None, shard.split):
            rows = _rows(parts.store.get(shard.shard), limit - len(found))
            found += [
                SampleView(
                    **{**row, "messages": json.loads(row["messages"])},
                    batch=shard.batch,
                    split=shard.split,
                )
                for row in rows
            ]
    return Samples(items=found)


def _rows(shard: bytes, most: int) -> list[dict[str, Any]]:
    table = pq.read_table(io.BytesIO(shard), columns=_COLUMNS)
    rows: list[dict[str, Any]] = table.slice(0, most).to_pylist()
    return rows


@router.get("/report", response_model=ReportView, responses=responses(400, 401, 404, 422, 503))
def get_report(pipeline_id: PipelineId, who: Who, parts: Parts) -> ReportView:
    """Read the student's report, or the newest checkpoint's, and how the checkpoints went."""
    with reading(parts.engine) as session:
        pipeline = owned(session, who, pipeline_id)
        evaluated = _events(session, pipeline_id, CheckpointEvaluated)
        students = _events(session, pipeline_id, StudentEvaluated)
    if not evaluated and not students:
        raise _not_yet(pipeline, "report")
    newest = sorted(evaluated, key=lambda event: event.step)[-REPORTS_LISTED:]
    reports = [(event, parts.store.get_model(event.report, Report)) for event in newest]
    if students:
        shown = parts.store.get_model(students[-1].report, Report)
    else:
        shown = reports[-1][1]
    return ReportView(
        **shown.model_dump(),
        of="student" if students else "checkpoint",
        checkpoints=[
            CheckpointFigures(
                training_id=event.training_id,
                step=event.step,
                model=report.model,
                report=event.report,
            )
            for event, report in reports
        ],
    )


@router.get("/student", response_model=StudentView, responses=responses(400, 401, 404, 422, 503))
def get_student(pipeline_id: PipelineId, who: Who, parts: Parts) -> StudentView:
    """Read the student's manifest and the decision about its release."""
    manifest, ref, release = _student(parts, who, pipeline_id)
    return StudentView(
        student_id=manifest.student_id,
        training_id=manifest.training_id,
        step=manifest.step,
        files={
            name: FileView(size=entry.size, sha256=entry.sha256)
            for name, entry in manifest.files.items()
        },
        manifest=ref,
        release=release,
    )


@router.get(
    "/student/files/{name}",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The file",
            "content": {"application/octet-stream": {"schema": {"type": "string"}}},
        },
        206: {
            "description": "The range that was asked for",
            "content": {"application/octet-stream": {"schema": {"type": "string"}}},
        },
        **responses(400, 401, 404, 409, 416, 422, 503),
    },
)
def get_student_file(
    pipeline_id: PipelineId,
    name: Annotated[str, Path(max_length=101)],
    who: Who,
    parts: Parts,
    asked: Annotated[
        str | None, Header(alias="Range", description="`bytes=N-` goes on with a broken fetch")
    ] = None,
) -> StreamingResponse:
    """Stream a file of a released student's folder."""
    manifest, _, release = _student(parts, who, pipeline_id)
    if release is None or release.outcome != "released":
        why = "is not decided upon yet" if release is None else "was withheld"
        reasons = f": {'; '.join(release.reasons)}" if release and release.reasons else ""
        raise ProblemError(409, "not-released", f"the student {why}{reasons}")
    ref = manifest.files.get(name)
    if ref is None:
        names = ", ".join(sorted(manifest.files))
        raise ProblemError(404, "not-found", f"the student has no such file: expected {names}")
    start, end = _range(asked, ref.size)
    headers = {
        "Content-Length": str(end - start),
        "Content-Disposition": f'attachment; filename="{name}"',
        "ETag": f'"{ref.sha256}"',
        "Accept-Ranges": "bytes",
    }
    partial = (start, end) != (0, ref.size)
    if partial:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{ref.size}"
    return StreamingResponse(
        _stream(parts.store, ref, start, end),
        206 if partial else 200,
        headers=headers,
        media_type="application/octet-stream",
    )


def _range(asked: str | None, size: int) -> tuple[int, int]:
    """First byte and the one after the last; a range that is not understood is the whole."""
    match = _RANGE.fullmatch(asked or "")
    if match is None:
        return 0, size
    start = int(match[1])
    end = min(int(match[2]) + 1, size) if match[2] else size
    if start >= end:
        raise ProblemError(
            416,
            "range",
            f"the file has {size} bytes",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end


def _stream(store: ObjectStore, ref: ObjectRef, start: int, end: int) -> Iterator[bytes]:
    """Open the object now, so that its absence is still an answer; then yield it.

    A whole object is checked at its end: a damaged one breaks off, so that the length is short.
    """
    chunks = store.chunks(ref.key, start)
    if chunks is None:
        raise MissingObject(f"{ref.key} is named by a manifest and not in the store")

    def read() -> Iterator[bytes]:
        digest, left = hashlib.sha256(), end - start
        held = b""
        for chunk in chunks:
            digest.update(chunk)
            if held:
                yield held
            held = chunk[:left]
            left -= len(held)
            if not left:
                break
        whole = (start, end) == (0, ref.size)
        if left or (whole and digest.hexdigest() != ref.sha256):
            raise DigestMismatch(f"{ref.key} is not what its manifest names")
        yield held

    return read()


def _student(
    parts: Gateway, who: Caller, pipeline_id: str
) -> tuple[StudentManifest, ObjectRef, Release | None]:
    with reading(parts.engine) as session:
        pipeline = owned(session, who, pipeline_id)
        evaluated = _events(session, pipeline_id, StudentEvaluated)
        decided: list[StudentReleased | StudentWithheld] = [
            *_events(session, pipeline_id, StudentReleased),
            *_events(session, pipeline_id, StudentWithheld),
        ]
    if not evaluated:
        raise _not_yet(pipeline, "student")
    ref = evaluated[-1].manifest
    manifest = parts.store.get_model(ref, StudentManifest)
    release = parts.store.get_model(decided[-1].release, Release) if decided else None
    return manifest, ref, release


def _events(session: Session, pipeline_id: str, kind: type[E]) -> list[E]:
    found = session.scalars(
        select(History.envelope)
        .where(History.pipeline_id == pipeline_id, History.type == kind.TYPE)
        .order_by(History.sequence)
    )
    return [kind.model_validate(Envelope.decode(envelope).payload) for envelope in found]


def _not_yet(pipeline: Pipeline, what: str) -> ProblemError:
    ended = pipeline.state not in ("accepting", "running")
    then = "and has ended" if ended else "so far; `stages` of the pipeline shows where it is"
    return ProblemError(404, f"no-{what}", f"the pipeline ({pipeline.state}) has no {what} {then}")
