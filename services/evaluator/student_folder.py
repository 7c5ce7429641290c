"""The student folder: what `from_pretrained` needs, with its papers.

Every file is written once, the manifest last, and no byte depends on when or where it was
written: a worker that dies in the middle is repeated, and two workers write the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from services.evaluator.card import display_name, render_card
from services.evaluator.reasons import CHECKPOINT_INCOMPLETE, LINEAGE_BROKEN, STUDENT_CONFLICT
from stillhouse.chassis.errors import MissingObject, PermanentError
from stillhouse.chassis.storage import AlreadyExists, ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.canonical import canonical_json
from stillhouse.contracts.chat import ChatTokenizer
from stillhouse.contracts.shards import Dataset, Heldout
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import (
    CheckpointManifest,
    Cursor,
    Plan,
    Report,
    StudentManifest,
)

MOST_ANCESTORS = 100_000  # a chain that is longer than any training's runs in a circle


@dataclass(frozen=True)
class StudentInputs:
    """What a student folder is made of: the chosen checkpoint's manifest, the report over test,
    and the validation reports that it was chosen by."""

    spec: ResolvedSpec
    heldout: Heldout
    heldout_ref: ObjectRef
    tokenizer: ChatTokenizer
    checkpoint: ObjectRef
    report: Report
    validation: Sequence[Report]


def write_student(
    store: ObjectStore, inputs: StudentInputs, weights: Path
) -> tuple[StudentManifest, ObjectRef]:
    """Write the folder of the chosen checkpoint; `weights` holds its model and config.

    Returns the manifest, this one or the one that another worker wrote before.
    """
    spec = inputs.spec
    manifest = store.get_model(inputs.checkpoint, CheckpointManifest)
    cursor = store.get_model(_file(manifest, "cursor.json"), Cursor)
    dataset = _need(store, artifacts.dataset_key(spec.tenant_id, spec.dataset_id), Dataset)
    config = json.loads((weights / "config.json").read_text("utf-8"))
    texts = {
        "config.json": _pretty(config),
        **tokenizer_files(inputs.tokenizer, config),
        "provenance.json": _pretty(_provenance(store, inputs, manifest, cursor, dataset)),
        "report.json": canonical_json(inputs.report.model_dump(mode="json")),
        "README.md": render_card(
            spec,
            inputs.report,
            manifest,
            cursor,
            rejections=dataset[0].rejections,
            validation=inputs.validation,
        ).encode(),
    }
    files = {"model.safetensors": _put_weights(store, spec, weights / "model.safetensors")}
    for name, data in texts.items():
        files[name] = _put(store, _key(spec, name), data)
    student = StudentManifest(
        tenant_id=spec.tenant_id,
        pipeline_id=spec.pipeline_id,
        student_id=spec.student_id,
        training_id=spec.training_id,
        step=manifest.step,
        files=files,
    )
    key = artifacts.student_manifest_key(spec.tenant_id, spec.student_id)
    _put(store, key, canonical_json(student.model_dump(mode="json")))
    stored = store.find_model(key, StudentManifest)
    if stored is None:
        raise MissingObject(f"{key} was written and is not there")
    return stored


def tokenizer_files(chat: ChatTokenizer, config: dict[str, Any]) -> dict[str, bytes]:
    """The files that AutoTokenizer and generate read, from the teacher's tokenizer."""
    special = {"eos_token": chat.eos_token, "pad_token": chat.eos_token}
    ids: dict[str, Any] = {"eos_token_id": chat.eos_id, "pad_token_id": chat.eos_id}
    if chat.bos_token is not None:
        special["bos_token"] = chat.bos_token
        ids["bos_token_id"] = chat.tokenizer.token_to_id(chat.bos_token)
    return {
        "tokenizer.json": chat.tokenizer_json.encode(),
        "tokenizer_config.json": _pretty(
            {
                **special,
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": chat.chat_template,
                "clean_up_tokenization_spaces": False,
                "model_max_length": config.get("max_position_embeddings"),
            }
        ),
        "special_tokens_map.json": _pretty(special),
        "generation_config.json": _pretty(
            {name: value for name, value in ids.items() if value is not None}
        ),
    }


def _provenance(
    store: ObjectStore,
    inputs: StudentInputs,
    manifest: CheckpointManifest,
    cursor: Cursor,
    dataset: tuple[Dataset, ObjectRef],
) -> dict[str, Any]:
    """Where the student comes from, down to the digest of the rows of every step."""
    spec = inputs.spec
    plan, plan_ref = _need(store, artifacts.plan_key(spec.tenant_id, spec.training_id), Plan)
    return {
        "version": 1,
        "student_id": spec.student_id,
        "name": display_name(spec),
        "pipeline_id": spec.pipeline_id,
        "tenant_id": spec.tenant_id,
        "code": {"stillhouse": metadata.version("stillhouse")},
        "spec": {
            "sha256": spec.spec_sha256,
            "object": _named(store, artifacts.spec_key(spec.tenant_id, spec.pipeline_id)),
            "purpose": spec.spec.purpose.model_dump(mode="json"),
        },
        "teachers": [
            {
                "name": teacher.name,
                "model": teacher.model,
                "terms": teacher.terms,
                "reference": teacher.known_weights,
                "signal": spec.signals[teacher.name].model_dump(mode="json"),
            }
            for teacher in spec.spec.teachers
        ],
        "verdicts": [verdict.model_dump(mode="json") for verdict in spec.verdicts],
        "duties": spec.duties,
        "student": {
            "weights": spec.spec.student.weights,
            "terms": spec.spec.student.terms,
            "layers_kept": plan.layers_kept,
        },
        "tokenizer": {
            "sha256": manifest.tokenizer_sha256,
            "template_sha256": manifest.template_sha256,
        },
        "dataset": {
            "dataset_id": spec.dataset_id,
            "object": _ref(dataset[1]),
            "rows": dict(dataset[0].rows),
            "rejections": dict(sorted(dataset[0].rejections.items())),
            "heldout": _ref(inputs.heldout_ref),
            "heldout_shards": [_ref(entry.shard) for entry in inputs.heldout.shards],
        },
        "trained_on": {
            "rows": cursor.rows,
            "tokens": cursor.tokens,
            "shards": [
                {**_ref(shard), "teacher": spec.batch_teachers[spec.batches.heldout + number]}
                for number, shard in enumerate(cursor.shards)
            ],
            "deleted_rows": dataset[0].deleted_rows,
            "steps": [entry.model_dump(mode="json") for entry in cursor.ledger],
        },
        "training": {
            "training_id": spec.training_id,
            "step": manifest.step,
            "settings": spec.spec.training.model_dump(mode="json"),
            "plan": _ref(plan_ref),
            "environment": manifest.environment.model_dump(mode="json"),
            "bitwise": manifest.bitwise,
        },
        "lineage": _lineage(store, inputs.checkpoint, manifest),
        "evaluation": {
            "split": inputs.report.split,
            "chosen_by": "validation",
            "steps_compared": [report.step for report in inputs.validation],
        },
    }


def _lineage(
    store: ObjectStore, ref: ObjectRef, manifest: CheckpointManifest
) -> list[dict[str, Any]]:
    """The checkpoint and those that it was resumed from, newest first.

    Manifests of checkpoints that only served a resume may have been collected since: such a one
    is named by its digest, and the chain ends there.
    """
    chain: list[dict[str, Any]] = []
    seen: set[str] = set()
    while True:
        chain.append(
            {
                "step": manifest.step,
                "epoch": manifest.epoch,
                "manifest": _ref(ref),
                "bitwise": manifest.bitwise,
                "environment": manifest.environment.model_dump(mode="json"),
                "saved_at": manifest.saved_at,
            }
        )
        seen.add(ref.sha256)
        if manifest.parent is None:
            return chain
        ref = manifest.parent
        if ref.sha256 in seen or len(chain) > MOST_ANCESTORS:
            raise PermanentError(
                f"{ref.key} is its own ancestor: its manifest was forged or damaged",
                reason=LINEAGE_BROKEN,
            )
        try:
            manifest = store.get_model(ref, CheckpointManifest)
        except MissingObject:
            return [*chain, {"manifest": _ref(ref), "collected": True}]


def _put_weights(store: ObjectStore, spec: ResolvedSpec, path: Path) -> ObjectRef:
    key = _key(spec, "model.safetensors")
    try:
        return store.put_new_file(key, path)
    except AlreadyExists as error:
        raise PermanentError(
            f"{key} holds other weights than the chosen checkpoint's: a student is written once; "
            "post the pipeline anew",
            reason=STUDENT_CONFLICT,
        ) from error


def _put(store: ObjectStore, key: str, data: bytes) -> ObjectRef:
    """Write once. A worker of another version may have been first: what it wrote is as true."""
    try:
        return store.put_new(key, data)
    except AlreadyExists:
        found = store.find(key)
        if found is None:
            raise MissingObject(f"{key} was there and is not any more") from None
        return found


def _need(store: ObjectStore, key: str, model: type[Any]) -> tuple[Any, ObjectRef]:
    found = store.find_model(key, model)
    if found is None:
        raise MissingObject(f"{key} is missing, and a finished training implies it")
    return found


def _file(manifest: CheckpointManifest, name: str) -> ObjectRef:
    if name not in manifest.files:
        raise PermanentError(
            f"the checkpoint of step {manifest.step} names no {name}",
            reason=CHECKPOINT_INCOMPLETE,
        )
    return manifest.files[name]


def _named(store: ObjectStore, key: str) -> dict[str, Any]:
    found = store.find(key)
    if found is None:
        raise MissingObject(f"{key} was there and is not any more")
    return _ref(found)


def _ref(ref: ObjectRef) -> dict[str, Any]:
    return ref.model_dump(mode="json")


def _key(spec: ResolvedSpec, name: str) -> str:
    return artifacts.student_file_key(spec.tenant_id, spec.student_id, name)


def _pretty(value: Any) -> bytes:
    """JSON for people and machines: sorted, indented, one final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
