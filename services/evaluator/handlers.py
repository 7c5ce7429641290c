"""Which jobs the evaluator's events ask for."""

from __future__ import annotations

from collections.abc import Mapping

from stillhouse.chassis.jobs import Handler, Job
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import (
    CheckpointSaved,
    Event,
    HeldoutSealed,
    PipelineAccepted,
    PipelineStopped,
    TrainingCompleted,
)


def on_pipeline_accepted(envelope: Envelope, event: PipelineAccepted) -> list[Job]:
    """Nothing can be measured yet."""
    return []


def on_heldout_sealed(envelope: Envelope, event: HeldoutSealed) -> list[Job]:
    """Checkpoints may have been saved before the rows to measure them on were frozen."""
    return [Job.of("evaluate_training", envelope)]


def on_checkpoint_saved(envelope: Envelope, event: CheckpointSaved) -> list[Job]:
    return [Job.of("evaluate_checkpoint", envelope, step=event.step)]


def on_training_completed(envelope: Envelope, event: TrainingCompleted) -> list[Job]:
    return [Job.of("evaluate_student", envelope)]


def on_pipeline_stopped(envelope: Envelope, event: PipelineStopped) -> list[Job]:
    """Jobs under way see `stopped.json` themselves."""
    return []


HANDLERS: Mapping[type[Event], Handler] = {
    PipelineAccepted: on_pipeline_accepted,
    HeldoutSealed: on_heldout_sealed,
    CheckpointSaved: on_checkpoint_saved,
    TrainingCompleted: on_training_completed,
    PipelineStopped: on_pipeline_stopped,
}
