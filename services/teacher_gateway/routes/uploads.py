"""Uploads: a file under its own digest, so that a spec can name it and a repetition is harmless."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.concurrency import run_in_threadpool

from services.teacher_gateway.problems import ProblemError, responses
from services.teacher_gateway.routes.parts import Parts, Who
from services.teacher_gateway.schemas import Uploaded
from stillhouse.contracts.artifacts import SHA256_PATTERN, upload_key

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

TEMPORARY = "stillhouse-upload-"


@router.put(
    "/{sha256}",
    status_code=201,
    response_model=Uploaded,
    responses={
        200: {"description": "It was there already", "model": Uploaded},
        **responses(400, 401, 408, 413, 415, 422, 503, 507),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
            },
        }
    },
)
async def put_upload(
    request: Request,
    response: Response,
    who: Who,
    parts: Parts,
    sha256: Annotated[
        str, Path(pattern=SHA256_PATTERN, description="SHA-256 of the file, 64 hex digits")
    ],
) -> Any:
    """Store a file; a spec names it as `upload:<sha256>`."""
    key = upload_key(who.tenant_id, sha256)
    digest, size = hashlib.sha256(), 0
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=parts.settings.work_dir)
    try:
        with os.fdopen(handle, "wb") as file:
            async for chunk in request.stream():
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            raise ProblemError(
                422,
                "digest",
                f"expected a body with the SHA-256 {sha256}, found {digest.hexdigest()} "
                f"({size} bytes): send the whole file unchanged",
            )
        there = await run_in_threadpool(parts.store.exists, key)
        await run_in_threadpool(parts.store.put_new_file, key, FilePath(name))
    finally:
        os.unlink(name)
    response.status_code = 200 if there else 201
    return Uploaded(sha256=sha256, size=size, reference=f"upload:{sha256}")


def sweep(folder: FilePath, older_than_seconds: float = 86_400) -> None:
    """Remove what killed uploads left in the scratch folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > older_than_seconds:
                path.unlink()
