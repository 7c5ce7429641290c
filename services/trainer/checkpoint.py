"""Checkpoints: written so that a half of one is never read, read so that damage is noticed.

Tensors first, the manifest last, then HEAD in `state.json`: whoever follows HEAD finds whole
objects, with size and digest. Keys hold the lease's epoch, so a holder that lost its lease writes
beside its successor and never over it. A checkpoint that does not verify is passed over for its
parent, and the log says so; manifests are small and stay for ever, as the training's lineage.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from services.trainer.student import open_folder, write_model, write_tensors
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import DigestMismatch, MissingObject, PermanentError
from stillhouse.chassis.logs import logger
from stillhouse.chassis.storage import AlreadyExists, ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.canonical import canonical_json
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import (
    CheckpointManifest,
    Cursor,
    Environment,
    Head,
    Published,
)

log = logger(__name__)

UNREADABLE = "checkpoint_unreadable"
OPTIMIZERS_KEPT = 2  # HEAD and the one to fall back to
_TENSORS = ("model.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """A training at the end of a step, on the local disk. `optimizer` is None where there is
    nothing to go on with: at step 0 and at the last step."""

    cursor: Cursor
    parent: ObjectRef | None
    loss: float | None
    final: bool
    bitwise: bool
    environment: Environment
    saved_at: str
    folder: Path
    files: list[str]


def write_snapshot(
    folder: Path,
    model: nn.Module,
    optimizer: Mapping[str, Tensor],
    cursor: Cursor,
    *,
    parent: ObjectRef | None,
    loss: float | None,
    final: bool,
    bitwise: bool,
    environment: Environment,
) -> Snapshot:
    """Copy all that a checkpoint holds to disk, so that training may go on while it is sent."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = write_model(model, folder)
    if optimizer and not final:
        write_tensors({k: v.contiguous() for k, v in optimizer.items()}, folder / _TENSORS[1])
        files.append(_TENSORS[1])
    (folder / "cursor.json").write_bytes(canonical_json(cursor.model_dump(mode="json")))
    files.append("cursor.json")
    return Snapshot(
        cursor=cursor,
        parent=parent,
        loss=loss,
        final=final,
        bitwise=bitwise,
        environment=environment,
        saved_at=datetime.now(UTC).isoformat(),
        folder=folder,
        files=files,
    )


def upload(
    store: ObjectStore, resolved: ResolvedSpec, training: str, epoch: int, snapshot: Snapshot
) -> Head:
    """Put a snapshot into the store, manifest last; return what HEAD should say.

    Sending the same step again under the same lease finds its own objects.
    """
    tenant, step = resolved.tenant_id, snapshot.cursor.step
    files: dict[str, ObjectRef] = {}
    for name in snapshot.files:
        key = artifacts.checkpoint_file_key(tenant, training, step, epoch, name)
        files[name] = store.put_new_file(key, snapshot.folder / name)
        crash_point(f"trainer.uploaded.{name}")
    manifest = CheckpointManifest(
        tenant_id=tenant,
        pipeline_id=resolved.pipeline_id,
        training_id=training,
        step=step,
        epoch=epoch,
        files=files,
        parent=snapshot.parent,
        tokenizer_sha256=resolved.tokenizer_sha256,
        template_sha256=resolved.template_sha256,
        tokens=snapshot.cursor.tokens,
        rows=snapshot.cursor.rows,
        loss=snapshot.loss,
        final=snapshot.final,
        bitwise=snapshot.bitwise,
        environment=snapshot.environment,
        saved_at=snapshot.saved_at,
    )
    key = artifacts.checkpoint_manifest_key(tenant, training, step, epoch)
    try:
        ref = store.put_new_model(key, manifest)
    except AlreadyExists:
        found = store.find_model(key, CheckpointManifest)
        if found is None or found[0].files != files:
            raise
        ref = found[1]
    crash_point("trainer.manifest_written")
    return Head(step=step, epoch=epoch, manifest=ref)


@dataclass(frozen=True)
class Found:
    """A checkpoint whose manifest and cursor are intact."""

    manifest: CheckpointManifest
    ref: ObjectRef
    cursor: Cursor


def lineage(store: ObjectStore, head: ObjectRef) -> Iterator[tuple[CheckpointManifest, ObjectRef]]:
    """The manifests from HEAD back to step 0, until one cannot be read."""
    ref: ObjectRef | None = head
    while ref is not None:
        try:
            manifest = store.get_model(ref, CheckpointManifest)
        except (DigestMismatch, MissingObject, ValueError) as error:
            log.error("a checkpoint's manifest is damaged", key=ref.key, why=str(error))
            return
        yield manifest, ref
        ref = manifest.parent


def resumable(store: ObjectStore, head: ObjectRef) -> Iterator[Found]:
    """Checkpoints to go on from, the newest first; more than one is tried only after damage."""
    for manifest, ref in lineage(store, head):
        if manifest.step > 0 and not manifest.final and _TENSORS[1] not in manifest.files:
            continue
        try:
            cursor = store.get_model(manifest.files["cursor.json"], Cursor)
        except (DigestMismatch, MissingObject, KeyError, ValueError) as error:
            log.error("a checkpoint's cursor is damaged", key=ref.key, why=str(error))
            continue
        yield Found(manifest, ref, cursor)


def open_checkpoint(
    store: ObjectStore, found: Found, folder: Path
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Fetch and open a checkpoint's model and optimiser state (empty at step 0).

    Raises DigestMismatch, MissingObject or PermanentError where it is damaged.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        for name, ref in found.manifest.files.items():
            store.get_file(ref, folder / name)
        model = open_folder(folder)
        state: dict[str, Tensor] = {}
        if _TENSORS[1] in found.manifest.files:
            try:
                state = {k: v.clone() for k, v in load_file(folder / _TENSORS[1]).items()}
            except (SafetensorError, ValueError) as error:
                raise PermanentError(
                    f"{found.ref.key}: its optimiser state does not load: {error}",
                    reason=UNREADABLE,
                ) from error
        return model, state
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def collect(store: ObjectStore, head: Head, published: list[Published]) -> None:
    """Delete what serves nobody any more, once HEAD moved: tensors of checkpoints behind the last
    two, except the weights of published ones, which reports and the release are made from."""
    readable = {entry.manifest.key for entry in published}
    for age, (manifest, ref) in enumerate(lineage(store, head.manifest)):
        if age < OPTIMIZERS_KEPT:
            continue
        names = [n for n in _TENSORS if n in manifest.files]
        if ref.key in readable:
            names.remove(_TENSORS[0])
        keys = [manifest.files[name].key for name in names]
        # Each save collects what is behind it, so beyond the first that is gone all are.
        if keys and not any(store.exists(key) for key in keys):
            return
        for key in keys:
            store.delete(key)
            crash_point("trainer.collecting")


def sweep(store: ObjectStore, tenant: str, training: str, published: list[Published]) -> None:
    """When a training is done: delete all tensors but the weights of published checkpoints, also
    those that a holder sent and never named. Listing may miss some; they cost room only."""
    kept = {
        artifacts.checkpoint_file_key(tenant, training, entry.step, entry.epoch, _TENSORS[0])
        for entry in published
    }
    for key in list(store.keys(f"{artifacts.training_prefix(tenant, training)}/step-")):
        if key.endswith(_TENSORS) and key not in kept:
            store.delete(key)
