"""The flow: one table of who publishes and who consumes what.

The broker's topology, the check of handlers at start-up, the refusal of unlisted publications,
the picture in the README and the contract tests are all made from this table. Read it first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillhouse.contracts import events as e
from stillhouse.contracts.events import Event

Service = Literal["teacher_gateway", "dataset_builder", "trainer", "evaluator"]

GATEWAY: Service = "teacher_gateway"
BUILDER: Service = "dataset_builder"
TRAINER: Service = "trainer"
EVALUATOR: Service = "evaluator"
SERVICES: tuple[Service, ...] = (GATEWAY, BUILDER, TRAINER, EVALUATOR)


@dataclass(frozen=True)
class Route:
    """Who may publish an event, and whose queue is bound to it."""

    event: type[Event]
    publishers: tuple[Service, ...]
    consumers: tuple[Service, ...]


FLOW: tuple[Route, ...] = (
    Route(e.PipelineAccepted, (GATEWAY,), (BUILDER, TRAINER, EVALUATOR)),
    Route(e.ResponseBatchStored, (GATEWAY,), (BUILDER,)),
    Route(e.ShardWritten, (BUILDER,), (TRAINER, GATEWAY)),
    Route(e.HeldoutSealed, (BUILDER,), (EVALUATOR, GATEWAY)),
    Route(e.ResponsesCompleted, (GATEWAY,), (BUILDER,)),
    Route(e.DatasetSealed, (BUILDER,), (TRAINER, GATEWAY)),
    Route(e.CheckpointSaved, (TRAINER,), (EVALUATOR, GATEWAY)),
    Route(e.CheckpointEvaluated, (EVALUATOR,), (GATEWAY,)),
    Route(e.TrainingCompleted, (TRAINER,), (EVALUATOR, GATEWAY)),
    Route(e.StudentEvaluated, (EVALUATOR,), (GATEWAY,)),
    Route(e.StudentReleased, (GATEWAY,), ()),
    Route(e.StudentWithheld, (GATEWAY,), ()),
    Route(e.PipelineStopped, (GATEWAY,), (BUILDER, TRAINER, EVALUATOR)),
    Route(e.StageProgressed, SERVICES, (GATEWAY,)),
    Route(e.StageFailed, SERVICES, (GATEWAY,)),
)

# Lost messages are repaired by sending a step's input event again, verbatim. All inputs of other
# services' steps are in the gateway's history, so the gateway is the one re-publisher.
REPUBLISHER: Service = GATEWAY


@dataclass(frozen=True)
class Step:
    """Work that turns an input event into an output event: what re-drive looks after.

    `per` is the field that pairs input and output (a batch, a step of a training), None where
    there is one of each in a pipeline. The step is due once `requires` happened too and, where
    `gathers` is set, once every held-out batch has that event. `may_wait` marks work that queues
    for a GPU: it is shown as waiting and never counted as failed.
    """

    service: Service
    stage: e.Stage
    input: type[Event]
    output: type[Event]
    per: str | None = None
    requires: type[Event] | None = None
    gathers: type[Event] | None = None
    may_wait: bool = False


STEPS: tuple[Step, ...] = (
    Step(BUILDER, "build", e.ResponseBatchStored, e.ShardWritten, per="batch"),
    Step(BUILDER, "build", e.ResponseBatchStored, e.HeldoutSealed, gathers=e.ShardWritten),
    Step(BUILDER, "build", e.ResponsesCompleted, e.DatasetSealed),
    Step(TRAINER, "train", e.PipelineAccepted, e.CheckpointSaved, may_wait=True),
    Step(TRAINER, "train", e.DatasetSealed, e.TrainingCompleted, may_wait=True),
    Step(
        EVALUATOR,
        "evaluate",
        e.CheckpointSaved,
        e.CheckpointEvaluated,
        per="step",
        requires=e.HeldoutSealed,
    ),
    Step(
        EVALUATOR,
        "evaluate",
        e.TrainingCompleted,
        e.StudentEvaluated,
        requires=e.HeldoutSealed,
    ),
)


def published_by(service: Service) -> set[str]:
    return {route.event.TYPE for route in FLOW if service in route.publishers}


def consumed_by(service: Service) -> set[str]:
    return {route.event.TYPE for route in FLOW if service in route.consumers}


def mermaid() -> str:
    """Draw the table for the README: one edge for each pair of services, labelled by its events."""
    edges: dict[tuple[Service, Service], list[str]] = {}
    for route in FLOW:
        if route.publishers == SERVICES:
            continue
        for publisher in route.publishers:
            for consumer in route.consumers:
                edges.setdefault((publisher, consumer), []).append(route.event.TYPE)
    lines = ["flowchart LR"]
    for (source, target), types in edges.items():
        label = "<br/>".join(types)
        lines.append(f'    {source} -- "{label}" --> {target}')
    return "\n".join(lines)
