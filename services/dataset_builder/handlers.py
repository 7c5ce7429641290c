"""What the builder does with each event it consumes: pure, from event to jobs."""

from __future__ import annotations

from collections.abc import Mapping

from stillhouse.chassis.jobs import Handler, Job
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import (
    Event,
    PipelineAccepted,
    PipelineStopped,
    ResponseBatchStored,
    ResponsesCompleted,
)


def on_pipeline_accepted(envelope: Envelope, event: PipelineAccepted) -> list[Job]:
    """Nothing to do before there are answers: jobs read spec and tokenizer themselves."""
    return []


def on_response_batch_stored(envelope: Envelope, event: ResponseBatchStored) -> list[Job]:
    return [Job.of("build_shard", envelope)]


def on_responses_completed(envelope: Envelope, event: ResponsesCompleted) -> list[Job]:
    return [Job.of("seal_dataset", envelope)]


def on_pipeline_stopped(envelope: Envelope, event: PipelineStopped) -> list[Job]:
    """Nothing to do: each job looks for `stopped.json` before it works."""
    return []


HANDLERS: Mapping[type[Event], Handler] = {
    PipelineAccepted: on_pipeline_accepted,
    ResponseBatchStored: on_response_batch_stored,
    ResponsesCompleted: on_responses_completed,
    PipelineStopped: on_pipeline_stopped,
}
