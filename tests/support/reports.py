"""Checkpoints of a training in the store, as the trainer leaves them, for the evaluator's tests.

first = store_checkpoint(store, resolved, tiny_student(tmp_path / "a"), step=0)
last = store_checkpoint(store, resolved, tiny_student(tmp_path / "b"), step=8, final=True)
store_state(store, resolved, [first, last], done=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.canonical import canonical_json, digest_of
from stillhouse.contracts.envelope import Envelope, seal
from stillhouse.contracts.events import CheckpointSaved, Event, TrainingCompleted
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import (
    CheckpointManifest,
    Cursor,
    Environment,
    LedgerEntry,
    Plan,
    Published,
    TrainingState,
)

ENVIRONMENT = Environment(
    torch="2.13.0",
    device="cpu",
    dtype="float32",
    threads=1,
    cpu_capability="DEFAULT",
    deterministic=True,
    code="0.1.0",
)
SAVED_AT = "2000-01-01T00:00:00Z"


def store_checkpoint(
    store: ObjectStore,
    resolved: ResolvedSpec,
    folder: Path,
    *,
    step: int,
    epoch: int = 1,
    final: bool = False,
    parent: ObjectRef | None = None,
    shards: Sequence[ObjectRef] = (),
) -> Published:
    """Write the model of a `from_pretrained` folder as a checkpoint; every step took 4 rows."""
    tenant, training = resolved.tenant_id, resolved.training_id

    def key(name: str) -> str:
        return artifacts.checkpoint_file_key(tenant, training, step, epoch, name)

    cursor = Cursor(
        step=step,
        phase="done" if final else "stream",
        tokens=60 * step,
        rows=4 * step,
        shards=list(shards),
        ledger=[
            LedgerEntry(
                step=n,
                kind="stream",
                rows=4,
                tokens=60,
                rows_sha256=digest_of([n]),
                loss=1.0,
                learning_rate=0.01,
            )
            for n in range(1, step + 1)
        ],
    )
    files = {
        name: store.put_new_file(key(name), folder / name)
        for name in ("model.safetensors", "config.json")
    }
    files["cursor.json"] = store.put_new_model(key("cursor.json"), cursor)
    manifest = CheckpointManifest(
        tenant_id=tenant,
        pipeline_id=resolved.pipeline_id,
        training_id=training,
        step=step,
        epoch=epoch,
        files=files,
        parent=parent,
        tokenizer_sha256=resolved.tokenizer_sha256,
        template_sha256=resolved.template_sha256,
        tokens=cursor.tokens,
        rows=cursor.rows,
        loss=1.0 if step else None,
        final=final,
        bitwise=True,
        environment=ENVIRONMENT,
        saved_at=SAVED_AT,
    )
    ref = store.put_new_model(key("manifest.json"), manifest)
    return Published(step=step, epoch=epoch, manifest=ref, final=final)


def store_state(
    store: ObjectStore,
    resolved: ResolvedSpec,
    published: Sequence[Published],
    *,
    done: bool = False,
) -> None:
    """Write (over) state.json, and plan.json where it is missing."""
    tenant, training = resolved.tenant_id, resolved.training_id
    plan = Plan(
        training_id=training,
        micro_batch_tokens=1024,
        environment=ENVIRONMENT,
        layers_kept=[0, 2],
        started_at=SAVED_AT,
    )
    store.put_new_model(artifacts.plan_key(tenant, training), plan)
    state = TrainingState(
        training_id=training,
        epoch=1,
        write_id=digest_of([entry.step for entry in published])[:16],
        published=list(published),
        done=done,
    )
    key = artifacts.training_state_key(tenant, training)
    stored = store.read(key)
    data = canonical_json(state.model_dump(mode="json"))
    store.swap(key, data, None if stored is None else stored.etag)


def checkpoint_saved(resolved: ResolvedSpec, published: Published) -> Envelope:
    return _sealed(
        resolved,
        CheckpointSaved(
            training_id=resolved.training_id,
            step=published.step,
            epoch=published.epoch,
            manifest=published.manifest,
            tokens=60 * published.step,
            gpu_seconds=0,
            final=published.final,
        ),
    )


def training_completed(resolved: ResolvedSpec, published: Published) -> Envelope:
    return _sealed(
        resolved,
        TrainingCompleted(
            training_id=resolved.training_id,
            step=published.step,
            epoch=published.epoch,
            manifest=published.manifest,
            tokens=60 * published.step,
            gpu_seconds=0,
        ),
    )


def _sealed(resolved: ResolvedSpec, event: Event) -> Envelope:
    return seal(event, tenant_id=resolved.tenant_id, pipeline_id=resolved.pipeline_id)
