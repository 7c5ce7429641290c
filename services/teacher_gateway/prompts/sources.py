"""Where prompts lie: a file, an upload, a bucket, or the traffic that was captured.

Whatever the source, it is copied into one unnamed file of lines first, so that nobody changes it
while it is read, and so that acceptance may read each prompt again from where it lies.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import Engine

from services.teacher_gateway.files import open_below
from services.teacher_gateway.prompts.file import PromptsRefused
from services.teacher_gateway.prompts.parquet import is_parquet, lines_of_parquet
from services.teacher_gateway.settings import TeacherGatewaySettings
from stillhouse.chassis.references import check_object, open_object, sources_of
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import SHA256_PATTERN, upload_key
from stillhouse.contracts.spec import Spec

_CHUNK = 1 << 20


def snapshot(
    spec: Spec,
    tenant_id: str,
    *,
    settings: TeacherGatewaySettings,
    engine: Engine,
    store: ObjectStore,
    stored_before: float | None = None,
    alive: Callable[[], None] = lambda: None,
) -> BinaryIO:
    """Copy the prompts into an unnamed file, one JSON object a line.

    `stored_before` leaves out what was recorded later; `alive` is called now and then.
    """
    folder, most = settings.work_dir, settings.max_prompts_bytes
    if spec.prompts.captured is not None:
        # Here: recording traffic has admission of its own, which reads prompts.
        from services.teacher_gateway.capture.read import open_captured

        return open_captured(
            spec.prompts.captured,
            tenant_id,
            engine,
            store,
            folder,
            most,
            terms=_given_terms(spec),
            stored_before=stored_before,
            alive=alive,
        )
    assert spec.prompts.source is not None, "the spec has either"
    file = _copied(spec.prompts.source, tenant_id, settings, store, alive)
    if not is_parquet(file):
        return file
    with file:
        return lines_of_parquet(
            file, folder, max_bytes=most, max_rows=settings.max_prompts, alive=alive
        )


def check_source(
    spec: Spec,
    tenant_id: str,
    *,
    settings: TeacherGatewaySettings,
    engine: Engine,
    store: ObjectStore,
) -> None:
    """Refuse prompts that are not there, without reading them."""
    if spec.prompts.captured is not None:
        from services.teacher_gateway.capture.read import check_captured

        check_captured(spec.prompts.captured, tenant_id, engine, terms=_given_terms(spec))
        return
    reference = spec.prompts.source or ""
    if reference.startswith("upload:"):
        digest = upload_digest(reference)
        if not store.exists(upload_key(tenant_id, digest)):
            raise not_uploaded(digest)
    elif reference.startswith("s3:"):
        check_object(reference, sources_of(settings))
    else:
        open_below(settings.file_roots, reference).close()


def _given_terms(spec: Spec) -> str | None:
    """The terms under which the answers of recorded traffic would be learnt from."""
    return next((teacher.terms for teacher in spec.teachers if teacher.answers), None)


def _copied(
    reference: str,
    tenant_id: str,
    settings: TeacherGatewaySettings,
    store: ObjectStore,
    alive: Callable[[], None],
) -> BinaryIO:
    folder, most = settings.work_dir, settings.max_prompts_bytes
    if reference.startswith("upload:"):
        digest = upload_digest(reference)
        chunks = store.chunks(upload_key(tenant_id, digest))
        if chunks is None:
            raise not_uploaded(digest)
        return _copy(chunks, folder, most, digest, alive)
    if reference.startswith("s3:"):
        return _copy(open_object(reference, sources_of(settings)), folder, most, None, alive)
    with open_below(settings.file_roots, reference) as source:
        return _copy(iter(lambda: source.read(_CHUNK), b""), folder, most, None, alive)


def not_uploaded(digest: str) -> PromptsRefused:
    return PromptsRefused(
        f"nothing was uploaded as {digest}: send the file with PUT /v1/uploads/{digest}",
        reason="prompts_not_found",
    )


def upload_digest(reference: str) -> str:
    """The digest that an `upload:` reference names. Raises PromptsRefused."""
    digest = reference.removeprefix("upload:")
    if not re.fullmatch(SHA256_PATTERN, digest):
        raise PromptsRefused(
            f"expected upload:<64 hex digits of the file's SHA-256>, found {reference!r}",
            reason="prompts_not_found",
        )
    return digest


def _copy(
    chunks: Iterator[bytes],
    folder: Path,
    max_bytes: int,
    digest: str | None,
    alive: Callable[[], None],
) -> BinaryIO:
    found, size = hashlib.sha256(), 0
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the caller closes it)
    try:
        for chunk in chunks:
            size += len(chunk)
            if size > max_bytes:
                raise PromptsRefused(
                    f"the prompts have over {max_bytes} bytes: split them over several pipelines",
                    reason="prompts_too_large",
                )
            found.update(chunk)
            file.write(chunk)
            alive()
        if digest is not None and found.hexdigest() != digest:
            raise PromptsRefused(
                f"the upload {digest} is damaged (its SHA-256 is {found.hexdigest()}): upload it "
                "again",
                reason="prompts_damaged",
            )
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file
