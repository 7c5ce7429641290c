"""One batch of answers becomes one shard, once, whatever dies on the way.

Stored state decides. A marker (`If-None-Match`) is written before an attempt and its error after
it; a marker without error that is older than a job can live belongs to a worker that died. After
MOST_ATTEMPTS failed attempts the shard is written without rows, each item rejected with the
reason `build_failed`, so that a poisonous batch closes like any other.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel

from services.dataset_builder import metrics, reasons, shards
from services.dataset_builder.errors import AttemptFailed
from services.dataset_builder.inputs import Inputs
from services.dataset_builder.pipeline import rejection, run_steps
from services.dataset_builder.records import Draft
from stillhouse.chassis.errors import PermanentError, RetryableError, StillhouseError
from stillhouse.chassis.logs import logger
from stillhouse.chassis.storage import AlreadyExists, ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.responses import Item, Rejection, ResponsesManifest
from stillhouse.contracts.shards import ShardHeader
from stillhouse.contracts.spec import ResolvedSpec

log = logger(__name__)

MOST_ATTEMPTS = 3
# The store's clock has whole seconds, and a killed job may live a moment longer than its limit.
MARKER_MARGIN = 2.0


class AttemptMarker(BaseModel):
    """An attempt began. `holder` is random, so that two jobs cannot both think it is theirs."""

    attempt: int
    holder: str


class AttemptError(BaseModel):
    """An attempt failed, and how."""

    attempt: int
    error: str
    detail: str


@dataclass(frozen=True)
class BuiltShard:
    """A shard that is in the store. `fresh` when this job wrote it."""

    header: ShardHeader
    ref: ObjectRef
    fresh: bool
    seconds: float = 0.0


def build_shard(
    store: ObjectStore,
    inputs: Inputs,
    spec: ResolvedSpec,
    batch: int,
    responses: ObjectRef,
    *,
    job_seconds: float,
    run: Callable[..., tuple[list[Draft], list[Rejection]]] = run_steps,
) -> BuiltShard | None:
    """Make sure that the shard of a batch is in the store; None while another job is at it.

    Raises RetryableError where the world is in the way (no attempt is counted), AttemptFailed
    when the steps or their inputs failed, PermanentError when manifest, prompts or spec cannot be
    read, since without them not even a rejection can be written.
    """
    started = time.monotonic()
    found = _find(store, spec, batch, responses.sha256)
    if found is not None:
        return found
    # Before the marker: what cannot even be begun is no attempt.
    manifest = inputs.manifest(spec, batch, responses)
    items = inputs.items(manifest)
    recipe = inputs.recipe(spec, batch)

    attempt = claim(store, spec, batch, older_than=job_seconds + MARKER_MARGIN)
    if attempt is None:
        log.info("another job builds this shard", batch=batch)
        return None
    if attempt <= MOST_ATTEMPTS:
        try:
            rows, rejections = run(items, inputs.answers(manifest), manifest.rejections, recipe)
            header = shards.make_header(
                spec, manifest, responses, recipe.vocabulary, rows, rejections
            )
            data = shards.encode_shard(header, rows)
        except RetryableError:
            # Not the batch's fault: the next job may have the same number.
            store.delete(_marker_key(spec, batch, attempt))
            raise
        except Exception as error:
            _record_error(store, spec, batch, attempt, error)
            if attempt < MOST_ATTEMPTS:
                raise AttemptFailed(
                    f"attempt {attempt} of {MOST_ATTEMPTS} to build shard {batch} failed: "
                    f"{_say(error)}"
                ) from error
            log.error("the last attempt to build a shard failed", batch=batch, why=_say(error))
            attempt += 1
        else:
            return _write(store, spec, header, data, rows, started)
    header = empty_header(inputs, spec, manifest, responses, items)
    return _write(store, spec, header, shards.encode_shard(header, []), [], started)


def claim(store: ObjectStore, spec: ResolvedSpec, batch: int, *, older_than: float) -> int | None:
    """Take the number of an attempt by writing its marker.

    None while a younger marker may be at work; MOST_ATTEMPTS + 1 when all have failed.
    """
    died = False
    for attempt in range(1, MOST_ATTEMPTS + 1):
        marker = AttemptMarker(attempt=attempt, holder=secrets.token_hex(8))
        key = _marker_key(spec, batch, attempt)
        try:
            store.put_new_model(key, marker)
            break
        except AlreadyExists:
            age = store.age(key)
        died = not store.exists(_error_key(spec, batch, attempt))
        if died and (age is None or age < older_than):
            return None
    else:
        attempt = MOST_ATTEMPTS + 1
    if died:  # counted by the one that goes on after it
        metrics.ATTEMPTS_FAILED.labels("died").inc()
    return attempt


def empty_header(
    inputs: Inputs,
    spec: ResolvedSpec,
    manifest: ResponsesManifest,
    responses: ObjectRef,
    items: list[Item],
) -> ShardHeader:
    """The header of a shard that could not be built: every item rejected."""
    earlier = {each.item_id: each for each in manifest.rejections}
    detail = f"{MOST_ATTEMPTS} attempts to build the shard failed; the answers are still stored"
    rejections = [
        earlier.get(item.item_id) or rejection(item.item_id, reasons.BUILD_FAILED, detail)
        for item in items
    ]
    vocabulary = inputs.tokenization(spec).vocabulary
    return shards.make_header(spec, manifest, responses, vocabulary, [], rejections)


def _find(
    store: ObjectStore, spec: ResolvedSpec, batch: int, responses_sha256: str | None
) -> BuiltShard | None:
    key = artifacts.shard_key(spec.tenant_id, spec.dataset_id, batch)
    stored = store.read(key)
    if stored is None:
        return None
    header = shards.read_header(stored.data)
    if header.responses_sha256 != responses_sha256:
        raise PermanentError(
            f"{key} was made from the answers {header.responses_sha256}, expected "
            f"{responses_sha256}: a batch closes once",
            reason="shard_of_other_answers",
        )
    ref = ObjectRef(key=key, size=len(stored.data), sha256=sha256_hex(stored.data))
    return BuiltShard(header, ref, fresh=False)


def _write(
    store: ObjectStore,
    spec: ResolvedSpec,
    header: ShardHeader,
    data: bytes,
    rows: list[Draft],
    started: float,
) -> BuiltShard:
    key = artifacts.shard_key(spec.tenant_id, spec.dataset_id, header.batch)
    try:
        ref = store.put_new(key, data)
    except AlreadyExists:
        # Another version of this code, or another attempt's verdict: what is stored wins.
        found = _find(store, spec, header.batch, header.responses_sha256)
        if found is None:
            raise RetryableError(f"{key} was there and is gone") from None
        return found
    seconds = time.monotonic() - started
    metrics.count_shard(header, rows, len(data), seconds)
    return BuiltShard(header, ref, fresh=True, seconds=seconds)


def _record_error(
    store: ObjectStore, spec: ResolvedSpec, batch: int, attempt: int, error: Exception
) -> None:
    metrics.ATTEMPTS_FAILED.labels("error").inc()
    note = AttemptError(attempt=attempt, error=type(error).__name__, detail=_say(error)[:1000])
    try:
        store.put_new_model(_error_key(spec, batch, attempt), note)
    except AlreadyExists:
        log.warning("the attempt has an error already", batch=batch, attempt=attempt)


def _say(error: Exception) -> str:
    """Our own errors speak for themselves; the text of others may quote an answer."""
    return str(error) if isinstance(error, StillhouseError) else type(error).__name__


def _marker_key(spec: ResolvedSpec, batch: int, attempt: int) -> str:
    return artifacts.build_attempt_key(spec.tenant_id, spec.dataset_id, batch, attempt)


def _error_key(spec: ResolvedSpec, batch: int, attempt: int) -> str:
    return artifacts.build_error_key(spec.tenant_id, spec.dataset_id, batch, attempt)
