"""The release decision: what stands in `release.json`, written once.

A student is released when every terms verdict allows it and its folder and report are what they
say they are; otherwise it is withheld, with the reasons.
"""

from __future__ import annotations

import math

from stillhouse.chassis.storage import AlreadyExists, ObjectStore
from stillhouse.contracts.artifacts import ObjectRef, release_key
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import StudentEvaluated
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import Release, Report, StudentManifest


def decide(
    resolved: ResolvedSpec, event: StudentEvaluated, manifest: StudentManifest, report: Report
) -> list[str]:
    """Return the reasons to withhold a student; none when it may be released."""
    found = [
        f"terms of {verdict.subject} deny it: {verdict.reason}"
        for verdict in resolved.verdicts
        if verdict.outcome == "deny"
    ]
    if event.student_id != resolved.student_id or event.training_id != resolved.training_id:
        found.append(
            f"expected student {resolved.student_id} of training {resolved.training_id}, found "
            f"{event.student_id} of {event.training_id}"
        )
    if (manifest.student_id, manifest.step) != (event.student_id, event.step):
        found.append("the student folder's manifest names another student or step")
    if (report.training_id, report.step) != (event.training_id, event.step):
        found.append("the report is another checkpoint's")
    if report.split != "test":
        found.append(f"expected a report over test rows, found {report.split}")
    figures = report.model
    measured = [v for v in (figures.kl_top20, figures.ppl) if v is not None]
    if not any(math.isfinite(value) for value in measured):
        found.append("the report holds no finite figure of the student")
    return found


def write_release(
    store: ObjectStore, resolved: ResolvedSpec, envelope: Envelope, event: StudentEvaluated
) -> tuple[Release, ObjectRef]:
    """Decide and write the decision; the one that stands already wins."""
    key = release_key(resolved.tenant_id, resolved.student_id)
    if standing := store.find_model(key, Release):
        return standing
    manifest = store.get_model(event.manifest, StudentManifest)
    report = store.get_model(event.report, Report)
    reasons = decide(resolved, event, manifest, report)
    release = Release(
        tenant_id=resolved.tenant_id,
        pipeline_id=resolved.pipeline_id,
        student_id=resolved.student_id,
        outcome="withheld" if reasons else "released",
        reasons=reasons,
        duties=resolved.duties,
        decided_at=envelope.occurred_at.isoformat(),
    )
    try:
        return release, store.put_new_model(key, release)
    except AlreadyExists:
        found = store.find_model(key, Release)
        assert found is not None, "it was there a moment ago and is never removed"
        return found
